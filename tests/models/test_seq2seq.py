"""Encoder-decoders under hard sharing: tasks that write beside tasks that read what the encoder made."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import BACKBONES
from language import ENCODER_DECODERS, encoder_decoder, seq2seq_tasks
from transformers import (
    AutoModelForSeq2SeqLM,
    FSMTConfig,
    FSMTModel,
    LongT5Config,
    M2M100Config,
    MarianConfig,
    MBartConfig,
    SwitchTransformersConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)

from hf_multitask import AutoModelForMultiTask, HardSharingModel, Task
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.base import MultiTaskModel
from hf_multitask.models.conversion import select_tasks
from hf_multitask.models.encoder_decoder import decoder_parameters
from hf_multitask.models.generation import language_model
from hf_multitask.models.passes import Segment

EVERY = pytest.mark.parametrize("name", ENCODER_DECODERS)
TONE = Task("tone", "single_label_classification", labels=("negative", "positive"))
SMALL_T5 = dict(vocab_size=90, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=3, eos_token_id=2)


def make(name: str, tasks=None) -> tuple[MultiTaskModel, torch.nn.Module]:
    """A multi-task model, and the model of Transformers that it is made of."""
    torch.manual_seed(0)
    native = encoder_decoder(name).eval()
    return HardSharingModel.from_backbone(native, tasks or seq2seq_tasks()), native


def make_batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 90, (3, 8), generator=draw)
    mask = (torch.arange(8) < torch.tensor([8, 4, 6]).unsqueeze(1)).long()
    return {"input_ids": ids.masked_fill(mask == 0, 3), "attention_mask": mask}


def make_labels() -> torch.Tensor:
    labels = torch.randint(5, 90, (3, 5), generator=torch.Generator().manual_seed(3))
    labels[1, 3:] = -100
    return labels


def run(model: MultiTaskModel, task: str = "repeat", **options):
    """The output for one task that writes."""
    return model(**make_batch(), segments={task: Segment(0, 3, 8)}, labels={task: make_labels()}, **options)


@EVERY
def test_logits_loss_and_gradients_are_transformers_own(name):
    model, native = make(name)
    output, expected = run(model, loss_weights={"repeat": 1.0}), native(**make_batch(), labels=make_labels())
    assert torch.equal(output.logits["repeat"], expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)
    output.loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in native.named_parameters() if p.grad is not None}
    own = {name.removeprefix("backbone."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(own) == len(list(native.parameters()))
    for key, value in own.items():
        key = key if key in gradients else f"{native.base_model_prefix}.{key}"
        torch.testing.assert_close(value, gradients[key], rtol=1e-4, atol=1e-6)


@EVERY
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"use_cache": False}])
def test_what_is_written_is_what_transformers_writes(name, options):
    model, native = make(name)
    model.train()
    results = []
    for writer, more in ((native, {}), (model, {"task": "repeat"})):
        torch.manual_seed(1)
        results.append(writer.generate(**make_batch(), **more, max_new_tokens=6, min_new_tokens=3, **options))
    assert torch.equal(*results) and results[0].shape[1] > 4
    assert model.training and model.backbone.training and model.backbone.get_decoder().training


def test_settings_of_a_task_and_of_a_checkpoint_are_kept(tmp_path):
    torch.manual_seed(0)
    native = encoder_decoder("bart")
    native.generation_config.num_beams, native.generation_config.forced_bos_token_id = 2, 1
    native.save_pretrained(tmp_path / "bart")
    task = Task("say", "seq2seq_lm", generation={"max_new_tokens": 4, "min_new_tokens": 4})
    model = HardSharingModel.from_backbone(str(tmp_path / "bart"), [task])
    assert language_model(model, "say").generation_config.num_beams == 2
    written = model.generate(**make_batch())
    assert written.shape == (3, 5) and (written[:, 1] == 1).all()
    model.export_task("say", tmp_path / "say")
    exported = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "say")
    assert exported.generation_config.num_beams == 2
    assert torch.equal(exported.generate(**make_batch(), max_new_tokens=4, min_new_tokens=4), written)


@EVERY
def test_saved_loaded_exported_and_converted_it_is_the_same(tmp_path, name):
    model, native = make(name)
    assert (model.lm_head is not None) == ("untied" in name)
    native.save_pretrained(tmp_path / "native")
    again = HardSharingModel.from_backbone(str(tmp_path / "native"), seq2seq_tasks())
    assert torch.equal(run(again).logits["repeat"], run(model).logits["repeat"])
    model.resize_token_embeddings(93)
    expected = run(model).logits["repeat"]
    assert expected.shape == (3, 5, 93)
    model.save_pretrained(tmp_path / "model")
    loaded, info = AutoModelForMultiTask.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    model.export_task("repeat", tmp_path / "task")
    exported, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "task", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(exported(**make_batch(), labels=make_labels()).logits, expected)
    for other in (loaded, model.to_scheme("hard"), copy.deepcopy(model), select_tasks(model, ["repeat"])):
        assert torch.equal(run(other).logits["repeat"], expected)
        assert other.lm_head is None or not torch.equal(other.lm_head.weight, other.get_input_embeddings().weight)


@EVERY
def test_the_other_tasks_read_the_encoder(name):
    model, native = make(name)
    hidden = native.get_encoder()(**make_batch()).last_hidden_state
    expected = model.heads["tone"](hidden, make_batch()["attention_mask"])
    output = model(**make_batch(), output_hidden_states=True)
    assert list(output.logits) == ["tone"]  # what writes has logits for targets only
    assert torch.equal(output.logits["tone"], expected)
    assert torch.equal(output.hidden_states[-1], hidden) and len(output.hidden_states) == 3
    both = model(
        **make_batch(),
        segments={task: Segment(0, 3, 8) for task in ("tone", "mood", "repeat")},
        labels={"repeat": make_labels()},
    )
    assert list(both.logits) == ["tone", "repeat"]
    torch.testing.assert_close(both.logits["repeat"], run(model).logits["repeat"])
    with pytest.raises(ValueError, match=r"segments is empty: no task has rows \(and labels, which seq2seq_lm needs\)"):
        model(**make_batch(), segments={"repeat": Segment(0, 3, 8)})
    with pytest.raises(ValueError, match="task 'tone' is single_label_classification and does not generate text"):
        model.generate(**make_batch(), task="tone")


@EVERY
def test_without_a_task_that_writes_the_decoder_is_left_out(tmp_path, name):
    model, native = make(name)
    native.save_pretrained(tmp_path / "native")
    alone = [
        HardSharingModel.from_backbone(native, [TONE]),
        HardSharingModel.from_backbone(str(tmp_path / "native"), [TONE]),
        select_tasks(model, ["tone"]),
    ]
    for one in alone:
        one.heads.load_state_dict({key: value for key, value in model.heads.state_dict().items() if "tone" in key})
        one.resize_token_embeddings(95)
        one.save_pretrained(tmp_path / "one")
        loaded = AutoModelForMultiTask.from_pretrained(tmp_path / "one")
        for which in (one, loaded):
            assert torch.equal(which(**make_batch()).logits["tone"], model(**make_batch()).logits["tone"])
            assert not [key for key in which.state_dict() if "decoder" in key or "lm_head" in key]
            assert which.lm_head is None and not decoder_parameters(which.backbone)
    assert native.get_decoder() is not None and len(decoder_parameters(model.backbone)) > 10


@EVERY
def test_decoder_and_tables_are_shared_by_the_tasks_that_write(name):
    model, _ = make(name)
    shared = list(model.shared_parameters())
    own = [p for task in model.tasks for p in model.task_parameters(task.name)]
    assert len({id(p) for p in [*shared, *own]}) == len(shared) + len(own) == len(list(model.parameters()))
    decoder = {id(p) for p in decoder_parameters(model.backbone)}
    table = set() if model.lm_head is None else {id(model.lm_head.weight)}
    assert {id(p) for p in own} == {id(p) for p in model.heads["tone"].parameters()}
    assert decoder | table < {id(p) for p in shared}
    reading = {
        id(p) for part in (model.backbone.get_encoder(), model.get_input_embeddings()) for p in part.parameters()
    }
    assert decoder | table | reading == {id(p) for p in shared} and not decoder & reading
    tone = {id(p) for p in model.task_parameters("tone")}
    for idle, expected in (
        (["words", "mood"], set()),
        (["tone", "repeat"], tone),
        (["words", "mood", "repeat"], decoder | table),
        ([task.name for task in model.tasks], decoder | table | tone),
    ):
        assert {id(p) for p in model.untrained_parameters(idle)} == expected


@EVERY
def test_coefficients_scale_all_that_is_shared(name):
    model, _ = make(name)
    gradients = []
    for scale in (1.0, 0.25, 0.0):
        model.zero_grad()
        run(model, gradient_scales={"repeat": scale}).loss.backward()
        gradients.append([p.grad.clone() for p in model.shared_parameters()])
    for plain, scaled, none in zip(*gradients, strict=True):
        torch.testing.assert_close(scaled, 0.25 * plain, rtol=1e-5, atol=1e-8)
        assert not none.any()
    assert sum(gradient.abs().sum() for gradient in gradients[0]) > 0


@EVERY
def test_heads_without_rows_run_for_other_processes(name):
    model, _ = make(name)
    segments, labels = {"tone": Segment(0, 3, 8)}, {"tone": torch.tensor([0, 1, 1])}
    results = []
    for every in (False, True):
        model.zero_grad()
        output = model(**make_batch(), segments=segments, labels=labels, run_every_head=every)
        output.loss.backward()
        results.append((output.loss, [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for alone, together in zip(results[0][1], results[1][1], strict=True):
        assert together is not None and torch.equal(together, torch.zeros_like(together) if alone is None else alone)
    assert any(alone is None for alone in results[0][1])


@EVERY
def test_checkpointed_and_compiled_it_computes_the_same(name):
    model, _ = make(name)
    results = []
    for change in (None, model.activation_checkpointing_enable, lambda: model.compile_backbone(backend="eager")):
        if change is not None:
            change()
        model.train().zero_grad()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        output = run(model)
        output.loss.backward()
        results.append([output.loss, *[p.grad.clone() for p in model.shared_parameters()]])
    for other in results[1:]:
        for value, again in zip(results[0], other, strict=True):
            torch.testing.assert_close(again, value)
    parts = (model.backbone.get_encoder(), model.backbone.get_decoder())
    assert all(part._compiled_call_impl is not None for part in parts)
    assert any(getattr(module, "gradient_checkpointing", False) for module in parts[1].modules())


@EVERY
def test_a_half_precise_model_computes_in_its_type(name):
    model, native = make(name)
    model, native = model.to(torch.bfloat16), native.to(torch.bfloat16)
    output = run(model)
    assert output.logits["repeat"].dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    assert torch.equal(output.logits["repeat"], native(**make_batch(), labels=make_labels()).logits)


def test_a_checkpoint_without_a_head_predicts_with_its_embeddings(tmp_path):
    for name in ("t5", "bart"):
        model, native = make(name)
        backbone = copy.deepcopy(model.backbone)
        backbone.save_pretrained(tmp_path / name)
        for source in (backbone, str(tmp_path / name)):
            other = HardSharingModel.from_backbone(source, seq2seq_tasks())
            logits = run(other).logits["repeat"]
            bias = native.final_logits_bias if name == "bart" else 0.0  # the only thing that is no part of a backbone
            torch.testing.assert_close(logits + bias, run(model).logits["repeat"])


_LAYERS = dict(
    vocab_size=90,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=66,
    pad_token_id=3,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
)


@pytest.mark.parametrize(
    "config",
    [
        MBartConfig(**_LAYERS),
        MarianConfig(**_LAYERS),
        M2M100Config(**_LAYERS),
        LongT5Config(**SMALL_T5, decoder_start_token_id=3),
    ],
    ids=lambda config: config.model_type,
)
def test_other_families_with_an_encoder_and_a_decoder(tmp_path, config):
    torch.manual_seed(0)
    native = AutoModelForSeq2SeqLM.from_config(config).eval()
    model = HardSharingModel.from_backbone(native, seq2seq_tasks())
    expected = native(**make_batch(), labels=make_labels()).logits
    assert torch.equal(run(model).logits["repeat"], expected)
    model.export_task("repeat", tmp_path)
    assert torch.equal(
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path)(**make_batch(), labels=make_labels()).logits, expected
    )
    assert run(model, run_every_head=True).loss.isfinite()


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "hard"])
def test_other_schemes_refuse_encoder_decoders_by_name(scheme):
    model, native = make("t5")
    for attempt in (
        lambda: SCHEMES[scheme].from_backbone(native, seq2seq_tasks()),
        lambda: SCHEMES[scheme].from_backbone(native, [TONE]),
        lambda: model.to_scheme(scheme),
    ):
        with pytest.raises(ValueError, match="backbone 't5'"):
            attempt()


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_other_tasks_over_the_vocabulary_do_not_go_with_it(kind):
    _, native = make("bart")
    for tasks in ([Task("say", "seq2seq_lm"), Task("other", kind)], [Task("other", kind), Task("say", "seq2seq_lm")]):
        message = f"task 'other': {kind} does not go with an encoder-decoder, which 'bart' is; use seq2seq_lm"
        with pytest.raises(ValueError, match=message):
            HardSharingModel.from_backbone(native, tasks)
    with pytest.raises(ValueError, match="backbone 'bart' is an encoder-decoder"):
        HardSharingModel.from_backbone(native, [Task("other", kind)])


@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_an_encoder_or_a_decoder_alone_cannot_write_so(tmp_path, backbone):
    BACKBONES[backbone]().save_pretrained(tmp_path)
    message = (
        f"task 'say': seq2seq_lm needs an encoder-decoder, such as T5 or BART; '{backbone}' is none, use causal_lm"
    )
    for source in (BACKBONES[backbone](), str(tmp_path)):
        with pytest.raises(ValueError, match=message):
            HardSharingModel.from_backbone(source, [Task("say", "seq2seq_lm")])


def test_what_does_not_fit_is_named():
    task = Task("say", "seq2seq_lm")
    t5 = T5ForConditionalGeneration(T5Config(**SMALL_T5))
    with pytest.raises(ValueError, match="seq2seq_lm on 't5': .*; set decoder_start_token_id and pad_token_id"):
        HardSharingModel.from_backbone(t5, [task])
    switch = AutoModelForSeq2SeqLM.from_config(SwitchTransformersConfig(**SMALL_T5, decoder_start_token_id=3))
    with pytest.raises(ValueError, match="seq2seq_lm on 'switch_transformers': .* has experts"):
        HardSharingModel.from_backbone(switch, [task])
    fsmt = FSMTModel(FSMTConfig(**{**_LAYERS, "src_vocab_size": 90, "tgt_vocab_size": 90, "langs": ["a", "b"]}))
    with pytest.raises(ValueError, match="seq2seq_lm on 'fsmt': .* with a table that its decoder alone has"):
        HardSharingModel.from_backbone(fsmt, [task])
    encoder = T5EncoderModel(T5Config(**SMALL_T5))
    encoder.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="T5EncoderModel has no 'decoder'; give the whole model, a T5Model"):
        HardSharingModel.from_backbone(encoder, [TONE])
    native = Task("tone", "single_label_classification", labels=("a", "b"), head="native")
    for tasks in ([native], [native, task]):
        with pytest.raises(ValueError, match="task 'tone': .* encoder-decoder 't5' reads its decoder, so there is no"):
            HardSharingModel.from_backbone(T5Model(T5Config(**SMALL_T5, decoder_start_token_id=3)), tasks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "linear"}, "the head of seq2seq_lm is the backbone's own"),
        ({"label_smoothing": 0.1}, "label_smoothing is for losses with a softmax"),
        ({"mlm_probability": 0.5}, "mlm_probability is for masked_lm, not for seq2seq_lm"),
        ({"labels": ()}, "labels is empty"),
        ({"text_columns": "target"}, "column 'target' cannot be the text and the label at once"),
        ({"prompt": "{text"}, "is no template"),
        ({"generation": 3}, "generation must be a dictionary"),
    ],
)
def test_bad_options_of_a_task_are_named(options, message):
    with pytest.raises(ValueError, match=f"task 'say': .*{message}"):
        Task("say", "seq2seq_lm", **options)


def test_a_task_has_defaults_and_survives_a_configuration():
    task = Task("say", "seq2seq_lm", generation={"num_beams": 2}, labels=("a", "b"), chat=True)
    assert task.text_columns == ("text",) and task.label_column == "target" and task.weight == 1.0
    assert Task("say", "seq2seq_lm", prompt="{a} {b}").text_columns == ("a", "b")
    assert Task.from_dict(task.to_dict()) == task and task.type.generates and task.type.needs_own_rows
