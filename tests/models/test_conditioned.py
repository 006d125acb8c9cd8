"""Conditioned sharing over every backbone: it starts as hard sharing, and each row sees its own task's vectors only."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from conftest import BACKBONES
from safetensors.torch import load_file, save_file
from test_hard_sharing import SERVED, TASKS, assert_equal, count_calls, make_backbone, make_batch, make_labels
from test_layers import FAMILIES
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    OpenAIGPTConfig,
    OpenAIGPTModel,
    XLNetConfig,
    XLNetModel,
)

from hf_multitask import HardSharingModel
from hf_multitask.models.conditioned import ConditionedConfig, ConditionedModel
from hf_multitask.models.manifest import write_manifest
from hf_multitask.models.passes import Segment

NAMES = [task.name for task in TASKS]
SEGMENTS = {"names": Segment(2, 4, 6), "tone": Segment(0, 2, 9), "helper": Segment(4, 5, 3)}
LABELS = {"names": 2, "tone": 2, "helper": 1}
OPTIONS = {"both": {}, "task_embedding": {"film": False}, "film": {"task_embedding": False}}
backbones = pytest.mark.parametrize("name", BACKBONES)
ways = pytest.mark.parametrize("way", OPTIONS)


def make_model(name: str = "bert", way: str = "both", **options) -> ConditionedModel:
    """Return a model with random heads, layers and vectors of the tasks: nothing is zero or one."""
    model = ConditionedModel.from_backbone(make_backbone(name), TASKS, **OPTIONS[way], **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if key.startswith("conditioning") else 0.05))
    return model


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for task in expected:
        torch.testing.assert_close(found[task], expected[task], rtol=1e-5, atol=1e-6)


def gradients(model: ConditionedModel) -> dict[str, Tensor]:
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


# ---- what it computes ----


@ways
@backbones
def test_it_starts_as_hard_sharing_bit_for_bit(name, way):
    hard = HardSharingModel.from_backbone(make_backbone(name), TASKS)
    model = ConditionedModel.from_backbone(make_backbone(name), TASKS, **OPTIONS[way])
    model.heads.load_state_dict(hard.heads.state_dict())
    batch = make_batch()
    assert_equal(model(**batch, segments=SEGMENTS).logits, hard(**batch, segments=SEGMENTS).logits)
    assert_equal(model(**batch).logits, hard(**batch).logits)
    found, expected = ({}, {})
    for one, grads in ((model, found), (hard, expected)):
        one(**batch, segments=SEGMENTS, labels=make_labels(LABELS, width=6)).loss.backward()
        grads |= gradients(one)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


@ways
@backbones
def test_a_mixed_batch_takes_one_pass_and_is_read_like_each_task_alone(name, way):
    model, batch = make_model(name, way), make_batch()
    calls = count_calls(model)
    mixed = model(**batch, segments=SEGMENTS, single_pass=True).logits
    assert calls == [5]
    for task, segment in SEGMENTS.items():
        rows = slice(segment.start, segment.stop)
        own = {key: value[rows] for key, value in batch.items()}
        alone = model(**own, segments={task: Segment(0, segment.rows, 9)}, single_pass=True).logits
        assert_close({task: mixed[task]}, alone)


@pytest.mark.parametrize("name", sorted({*FAMILIES, "openai-gpt"} - {*BACKBONES}))
def test_other_families_are_conditioned_too(name, monkeypatch):
    # Among them layers that return tuples, and lists.
    gpt = OpenAIGPTConfig(vocab_size=90, n_embd=32, n_layer=3, n_head=4, n_positions=66)
    monkeypatch.setitem(BACKBONES, name, FAMILIES.get(name, lambda: OpenAIGPTModel(gpt)))
    model, batch = make_model(name), make_batch()
    hard = HardSharingModel.from_backbone(model.backbone, TASKS)
    hard.heads.load_state_dict(model.heads.state_dict())
    plain = hard(**batch, segments=SEGMENTS, single_pass=True).logits
    for way in OPTIONS:
        model = make_model(name, way)
        mixed = model(**batch, segments=SEGMENTS, single_pass=True).logits
        for task, segment in SEGMENTS.items():
            own = {key: value[segment.start : segment.stop] for key, value in batch.items()}
            alone = model(**own, segments={task: Segment(0, segment.rows, 9)}, single_pass=True).logits
            torch.testing.assert_close(mixed[task], alone[task], rtol=1e-4, atol=1e-5)
            assert (mixed[task] - plain[task]).abs().max() > 1e-3


@backbones
def test_tasks_differ_in_what_they_see_not_in_their_heads_alone(name):
    for way in OPTIONS:
        model, batch = make_model(name, way), make_batch()
        last = {}
        for task in NAMES:
            output = model(**batch, segments={task: Segment(0, 5, 9)}, output_hidden_states=True)
            last[task] = output.hidden_states[-1]
        for one in NAMES:
            for other in NAMES:
                assert one == other or (last[one] - last[other]).abs().amax(-1).min() > 1e-3


def test_bert_by_hand():
    model, lengths = make_model("bert"), (7, 7, 7, 7, 7)
    ids = make_batch(lengths)["input_ids"]
    output = model(input_ids=ids, segments=SEGMENTS, output_hidden_states=True)
    bert = model.backbone
    owners = ["tone", "tone", "names", "names", "helper"]
    for row, task in enumerate(owners):
        own = model.conditioning[task]
        words = bert.embeddings.word_embeddings.weight[ids[row]] + own.embedding
        hidden = (
            words + bert.embeddings.position_embeddings.weight[:7] + bert.embeddings.token_type_embeddings.weight[0]
        )
        hidden = bert.embeddings.LayerNorm(hidden)[None]
        states = [hidden]
        for number, layer in enumerate(bert.encoder.layer):
            # the layer's parts, so that no hook of the layer runs
            attention = layer.attention(hidden)
            attention = attention[0] if isinstance(attention, tuple) else attention
            hidden = layer.output(layer.intermediate(attention), attention)
            hidden = hidden + own.scale[number] * hidden + own.shift[number]
            states.append(hidden)
        assert len(states) == len(output.hidden_states) == 3
        for state, found in zip(states, output.hidden_states, strict=True):
            torch.testing.assert_close(found[row], state[0], rtol=1e-5, atol=1e-6)
        place = row - owners.index(task)
        expected = model.heads[task](hidden, None)[0]
        torch.testing.assert_close(output.logits[task][place], expected, rtol=1e-5, atol=1e-6)


@ways
@backbones
def test_serving_conditions_each_task_in_a_pass_of_its_own(name, way):
    model, batch = make_model(name, way), make_batch()
    calls = count_calls(model)
    served = model(**batch, task_ids=torch.full((5,), 3)).logits
    assert list(served) == SERVED and calls == [5] * len(SERVED)
    for task in SERVED:
        assert_equal({task: served[task]}, model(**batch, segments={task: Segment(0, 5, 9)}).logits)


def test_rows_that_two_tasks_read_take_two_passes():
    model, batch = make_model(), make_batch()
    segments = {"tone": Segment(0, 2, 9), "strength": Segment(0, 2, 9), "names": Segment(2, 5, 6)}
    ids = torch.tensor([0, 0, 1, 1, 1])  # a collator names the first task of rows that feed two
    calls = count_calls(model)
    found = model(**batch, segments=segments, task_ids=ids).logits
    assert calls == [2, 2, 3]
    for task, segment in segments.items():
        assert_close({task: found[task]}, model(**batch, segments={task: segment}).logits)
    # Without the first task's segment the second's rows are still its own.
    del segments["tone"]
    some = model(**batch, segments=segments, task_ids=ids, single_pass=True).logits
    assert_close(
        {"strength": some["strength"], "names": some["names"][:, :6]},
        {"strength": found["strength"], "names": found["names"]},
    )


@backbones
def test_task_ids_change_nothing_beside_segments(name):
    model, batch = make_model(name), make_batch()
    ids = torch.tensor([NAMES.index(task) for task in ("tone", "tone", "names", "names", "helper")])
    for single_pass in (True, False):
        found = model(**batch, segments=SEGMENTS, task_ids=ids, single_pass=single_pass).logits
        assert_equal(found, model(**batch, segments=SEGMENTS, single_pass=single_pass).logits)


def test_rows_of_no_task_make_no_difference():
    model, batch = make_model(), make_batch()
    segments = {"tone": Segment(1, 2, 9), "names": Segment(3, 4, 9)}
    output = model(**batch, segments=segments)
    for task, segment in segments.items():
        own = {key: value[segment.start : segment.stop] for key, value in batch.items()}
        assert_close({task: output.logits[task]}, model(**own, segments={task: Segment(0, 1, 9)}).logits)


@pytest.mark.parametrize("layers", [[0], [1]])
def test_only_the_chosen_layers_are_conditioned(layers):
    model, batch = make_model(film_layers=layers), make_batch()
    every = make_model()
    with torch.no_grad():
        every.backbone.load_state_dict(model.backbone.state_dict())
        every.heads.load_state_dict(model.heads.state_dict())
        for task in NAMES:
            own, other = model.conditioning[task], every.conditioning[task]
            assert own.scale.shape == own.shift.shape == (1, 32) and other.scale.shape == (2, 32)
            other.embedding.copy_(own.embedding)
            for one, both in ((own.scale, other.scale), (own.shift, other.shift)):
                both.zero_()
                both[layers[0]] = one[0]
    assert_equal(model(**batch, segments=SEGMENTS).logits, every(**batch, segments=SEGMENTS).logits)


@backbones
def test_the_backbone_called_by_itself_is_plain(name):
    backbone, model, batch = make_backbone(name), make_model(name), make_batch()
    backbone.load_state_dict(model.backbone.state_dict(), strict=False)
    model(**batch, segments=SEGMENTS)
    found = model.backbone(**batch).last_hidden_state
    assert torch.equal(found, backbone(**batch).last_hidden_state)
    # A model over that backbone is not conditioned by the hooks it was copied with.
    hard = HardSharingModel.from_backbone(model.backbone, TASKS)
    assert torch.equal(hard.backbone(**batch).last_hidden_state, found)
    hard.heads.load_state_dict(model.heads.state_dict())
    again = ConditionedModel.from_backbone(model.backbone, TASKS)
    again.heads.load_state_dict(model.heads.state_dict())
    assert_equal(again(**batch).logits, hard(**batch).logits)
    again.conditioning.load_state_dict(model.conditioning.state_dict())
    assert_equal(again(**batch).logits, model(**batch).logits)


# ---- input embeddings ----


@ways
@backbones
def test_embeddings_in_place_of_ids_are_conditioned_once(name, way):
    model, batch = make_model(name, way), make_batch((9, 9, 9, 9, 9))
    mask = batch["attention_mask"]
    for _ in range(2):
        embeds = model.get_input_embeddings()(batch["input_ids"])
        found = model(inputs_embeds=embeds, attention_mask=mask, segments=SEGMENTS).logits
        assert_equal(found, model(**batch, segments=SEGMENTS).logits)


@pytest.mark.parametrize("part", ["the model", "its backbone"])
@backbones
def test_new_input_embeddings_are_conditioned_once(name, part):
    model, batch = make_model(name), make_batch()
    expected = model(**batch, segments=SEGMENTS).logits
    owner = model if part == "the model" else model.backbone
    old = owner.get_input_embeddings()
    for new in (copy.deepcopy(old), torch.nn.Embedding(*old.weight.shape, padding_idx=old.padding_idx), old):
        new.load_state_dict(old.state_dict())
        owner.set_input_embeddings(new)
        for _ in range(2):
            assert_equal(model(**batch, segments=SEGMENTS).logits, expected)
    owner.resize_token_embeddings(95)
    assert_equal(model(**batch, segments=SEGMENTS).logits, expected)
    # A wrapper around the module with the hook must not lead to a second hook.
    wrapped = torch.nn.Sequential(model.get_input_embeddings())
    wrapped.weight = wrapped[0].weight
    owner.set_input_embeddings(wrapped)
    assert_equal(model(**batch, segments=SEGMENTS).logits, expected)


def test_hidden_states_are_conditioned_although_the_backbone_recorded_before():
    backbone, batch = make_backbone("llama"), make_batch()
    backbone(**batch, output_hidden_states=True)  # leaves hooks in the layers that record
    begun = ConditionedModel.from_backbone(backbone, TASKS)
    model = make_model("llama")
    begun.load_state_dict(model.state_dict())
    found, expected = (one(**batch, segments=SEGMENTS, output_hidden_states=True) for one in (begun, model))
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(one, other)


# ---- whose parameters are whose ----


@ways
@backbones
def test_shared_and_task_parameters_are_disjoint_and_complete(name, way):
    model = make_model(name, way)
    parts = [list(model.shared_parameters()), *(list(model.task_parameters(task)) for task in NAMES)]
    ids = [id(parameter) for part in parts for parameter in part]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in parts[0]} == {id(p) for p in model.backbone.parameters()}
    vectors = {"both": 3, "task_embedding": 1, "film": 2}[way]
    for task, part in zip(NAMES, parts[1:], strict=True):
        assert len(part) == vectors + len(list(model.heads[task].parameters()))
    assert not model.shares_rows
    with pytest.raises(ValueError, match="task 'nobody' is not one of this model's: tone, names"):
        list(model.task_parameters("nobody"))


@ways
@backbones
def test_a_step_moves_the_tasks_that_have_rows_and_no_others(name, way):
    model = make_model(name, way).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    batch, labels = make_batch(), make_labels(LABELS)
    for segments in ({task: Segment(s.start, s.stop, 9) for task, s in SEGMENTS.items()}, {"tone": Segment(0, 2, 9)}):
        own_labels = {task: labels[task] for task in segments}
        before = copy.deepcopy(model.state_dict())
        model(**batch, segments=segments, labels=own_labels, single_pass=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for key, value in model.state_dict().items():
            part, _, rest = key.partition(".")
            if part in ("heads", "conditioning"):
                assert (value != before[key]).any() == (rest.split(".")[0] in segments), key


def test_idle_tasks_take_part_with_a_term_of_0_where_processes_wait_for_all():
    model, batch = make_model(), make_batch()
    labels = make_labels({"tone": 5})
    inputs = {**batch, "segments": {"tone": Segment(0, 5, 9)}, "labels": labels}
    model(**inputs).loss.backward()
    expected = gradients(model)
    model(**inputs, run_every_head=True).loss.backward()
    found = gradients(model)
    assert found.keys() == {key for key, _ in model.named_parameters()}
    for key, value in found.items():
        assert torch.equal(value, expected.get(key, torch.zeros_like(value))), key


# ---- Hugging Face's and torch's contracts ----


@backbones
def test_activation_checkpointing_changes_no_bit_of_a_gradient(name):
    model = make_model(name).train()
    batch = make_batch(lengths=(60, 60, 6, 5, 3))
    segments = {"tone": Segment(0, 2, 60), "names": Segment(2, 4, 6), "helper": Segment(4, 5, 3)}
    calls, linears = count_calls(model), []
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: linears.append(1))

    def run(**options) -> tuple[int, dict[str, Tensor]]:
        torch.manual_seed(5)
        linears.clear()
        model(**batch, segments=segments, labels=make_labels(LABELS, width=6), **options).loss.backward()
        return len(linears), gradients(model)

    once, expected = run()
    assert len(calls) > 1
    model.activation_checkpointing_enable()
    again, found = run()
    assert again > 1.5 * once and found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@ways
@backbones
def test_a_saved_model_is_loaded_bit_for_bit(tmp_path, name, way):
    model = make_model(name, way, **({} if way == "task_embedding" else {"film_layers": [1]}))
    model.save_pretrained(tmp_path)
    loaded, info = ConditionedModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.tasks == TASKS and list(loaded.heads) == list(loaded.conditioning) == NAMES
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters.pop(key), value) for key, value in model.named_parameters()) and not parameters
    batch = make_batch()
    assert_equal(loaded(**batch, segments=SEGMENTS).logits, model(**batch, segments=SEGMENTS).logits)
    assert_equal(loaded(**batch).logits, model(**batch).logits)
    for field in ("task_embedding", "film", "film_layers", "task_embedding_std"):
        assert getattr(loaded.config, field) == getattr(model.config, field)


@pytest.mark.parametrize("std", [0.0, 0.5])
def test_vectors_that_a_saved_model_lacks_are_reported_and_start_afresh(tmp_path, std):
    make_model(task_embedding_std=std).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    lost = {f"conditioning.names.{key}" for key in ("embedding", "scale", "shift")}
    save_file({key: value for key, value in weights.items() if key not in lost}, path, metadata={"format": "pt"})
    write_manifest(tmp_path)
    loaded, info = ConditionedModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == lost
    own = loaded.conditioning["names"]
    assert not own.scale.any() and not own.shift.any()
    assert own.embedding.isfinite().all() and bool(own.embedding.any()) == bool(std)
    assert loaded.conditioning["tone"].scale.all()


@backbones
def test_task_embeddings_start_with_the_deviation_that_is_asked_for(name):
    model = ConditionedModel.from_backbone(make_backbone(name), TASKS, task_embedding_std=0.5)
    width = model.get_input_embeddings().weight.shape[1]
    vectors = torch.stack([model.conditioning[task].embedding for task in NAMES])
    assert vectors.shape == (5, width) and 0.35 < vectors.std() < 0.65
    assert not any(model.conditioning[task].scale.any() or model.conditioning[task].shift.any() for task in NAMES)


@backbones
def test_a_copy_goes_its_own_way(name):
    model, batch = make_model(name), make_batch()
    expected = model(**batch, segments=SEGMENTS).logits
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        assert_equal(other(**batch, segments=SEGMENTS).logits, expected)
        with torch.no_grad():
            for parameter in other.conditioning.parameters():
                parameter.zero_()
        hard = HardSharingModel.from_backbone(other.backbone, TASKS)
        hard.heads.load_state_dict(other.heads.state_dict())
        assert_equal(other(**batch, segments=SEGMENTS).logits, hard(**batch, segments=SEGMENTS).logits)
        assert_equal(model(**batch, segments=SEGMENTS).logits, expected)


@backbones
def test_the_dtype_of_hidden_states_is_kept(name):
    hard = HardSharingModel.from_backbone(make_backbone(name), TASKS)
    model, batch = make_model(name), make_batch()

    def dtypes(one) -> list[torch.dtype]:
        output = one(**batch, segments=SEGMENTS, output_hidden_states=True)
        return [state.dtype for state in (*output.hidden_states, *output.logits.values())]

    with torch.autocast("cpu", torch.bfloat16):
        assert dtypes(model) == dtypes(hard)
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert set(dtypes(model)) == {torch.bfloat16}
    output = model(**batch, segments=SEGMENTS, labels=make_labels(LABELS, width=6))
    output.loss.backward()
    assert all(torch.isfinite(value).all() for value in gradients(model).values())
    # Vectors of another dtype than the hidden states are cast, not they.
    model.conditioning.float()
    assert set(dtypes(model)) == {torch.bfloat16}


def test_a_compiled_backbone_sees_the_rows_of_each_pass():
    model, batch = make_model(), make_batch()
    expected = {task: model(**batch, segments={task: Segment(0, 5, 9)}).logits for task in ("tone", "names")}
    mixed = model(**batch, segments=SEGMENTS, single_pass=True).logits
    model.compile_backbone(backend="eager")
    try:
        for _ in range(2):
            for task, logits in expected.items():
                assert_equal(model(**batch, segments={task: Segment(0, 5, 9)}).logits, logits)
            assert_close(model(**batch, segments=SEGMENTS, single_pass=True).logits, mixed)
    finally:
        torch._dynamo.reset()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_embedding": False, "film": False}, "task_embedding and film are both off, which is hard sharing"),
        ({"film_layers": []}, r"film_layers must be a list of different numbers of layers, or None, got \[\]"),
        ({"film_layers": [0, 0]}, r"film_layers must be a list of different numbers of layers, or None, got \[0, 0\]"),
        ({"film_layers": ["0"]}, r"film_layers must be a list .* got \['0'\]"),
        ({"film_layers": [True]}, r"film_layers must be a list .* got \[True\]"),
        ({"film_layers": 1}, "film_layers must be a list .* got 1"),
        ({"film_layers": [0], "film": False}, r"film_layers=\[0\] needs film=True"),
        ({"film_layers": [0, 2]}, "film_layers: the backbone 'bert' has no layer 2; its layers are 0 to 1"),
        ({"film_layers": [-1]}, "film_layers: the backbone 'bert' has no layer -1; its layers are 0 to 1"),
        ({"task_embedding_std": -0.1}, "task_embedding_std must be a number from 0, got -0.1"),
        ({"task_embedding_std": float("nan")}, "task_embedding_std must be a number from 0, got nan"),
        ({"task_embedding_std": 0.1, "task_embedding": False}, "task_embedding_std=0.1 needs task_embedding=True"),
        ({"films": True}, "ConditionedModel has no option 'films', did you mean 'film'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConditionedModel.from_backbone(make_backbone("bert"), TASKS, **options)


def test_a_configuration_has_the_options():
    config = ConditionedConfig(backbone_config=BertConfig(), tasks=[task.to_dict() for task in TASKS])
    assert config.model_type == "hf_multitask_conditioned" and config.get_tasks() == TASKS
    assert (config.task_embedding, config.film, config.film_layers, config.task_embedding_std) == (True, True, None, 0)


def test_layers_that_cannot_be_found_leave_the_task_embedding():
    torch.manual_seed(0)
    size = dict(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    albert = AlbertModel(AlbertConfig(**size, embedding_size=16)).eval()
    with pytest.raises(ValueError, match="the layers of backbone 'albert' cannot be found"):
        ConditionedModel.from_backbone(albert, TASKS)
    model, batch = ConditionedModel.from_backbone(albert, TASKS, film=False, task_embedding_std=0.5), make_batch()
    assert model.conditioning["tone"].embedding.shape == (16,)
    mixed = model(**batch, segments=SEGMENTS, single_pass=True).logits
    for task, segment in SEGMENTS.items():
        own = {key: value[segment.start : segment.stop] for key, value in batch.items()}
        alone = model(**own, segments={task: Segment(0, segment.rows, 9)}, single_pass=True).logits
        assert_close({task: mixed[task]}, alone)


def test_layers_that_hand_on_something_else_are_refused():
    class Odd(torch.nn.Module):
        def __init__(self, returned):
            super().__init__()
            self.returned = returned

        def forward(self, hidden, *args, **kwargs):
            return self.returned(hidden)

    batch = make_batch()
    for returned, message in (
        (lambda hidden: {"hidden": hidden}, "film cannot condition Odd: it returns a dict, neither a tensor"),
        (lambda hidden: hidden.transpose(0, 1), r"film cannot condition Odd: its hidden states are \[9, 5, 32\]"),
        (lambda hidden: hidden[0], r"film cannot condition Odd: its hidden states are \[9, 32\], not \[rows, L, 32\]"),
    ):
        backbone = make_backbone("bert")
        backbone.encoder.layer[1] = Odd(returned)
        model = ConditionedModel.from_backbone(backbone, TASKS)
        with pytest.raises(ValueError, match=message):
            model(**batch, segments=SEGMENTS, single_pass=True)


def test_positions_in_front_are_refused():
    xlnet = XLNetModel(XLNetConfig(vocab_size=90, d_model=32, n_layer=2, n_head=4, d_inner=48))
    with pytest.raises(ValueError, match="the layers of backbone 'xlnet' cannot be used"):
        ConditionedModel.from_backbone(xlnet, TASKS)
