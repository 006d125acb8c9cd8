"""Many threads get what one thread gets, and a forward pass in inference writes nothing on modules."""

from __future__ import annotations

import asyncio
import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from conftest import make_tasks, make_tokenizer
from language import decoder_tasks, decoder_tokenizer, encoder_decoder, seq2seq_tasks
from language_models import make_plain
from test_schemes import KINDS, check_close, make_batch, make_model, weights
from transformers import pipeline

from hf_multitask import HardSharingModel, Task
from hf_multitask.models.auto import SCHEMES
from hf_multitask.models.base import MultiTaskModel
from hf_multitask.models.passes import Segment
from hf_multitask.models.target_scores import target_scores

THREADS = 8
Call = Callable[[], Any]

TEXTS = ["good", "the film was good , and we saw it .", "we saw maria and john in paris , a very very sad film " * 2]
QUESTION = {"question": "who saw it", "context": "maria and john saw the film in paris , and it was very good " * 2}
WRITERS = ("hard", "soft", "conditioned", "prefix", "adapter", "mixture_of_experts")


def encoder_tasks() -> list[Task]:
    """A task of each type that an encoder has; some heads are those of Transformers."""
    tone, strength, traits, names = make_tasks()
    return [
        Task("tone", tone.type, labels=tone.labels, dataset="reviews", head="native"),
        strength,
        traits,
        Task("names", names.type, labels=names.labels, head="native"),
        Task("where", "question_answering", stride=4, max_length=24),
        Task("next", "multiple_choice", text_columns="start", choice_columns=("one", "other")),
        Task("hidden", "masked_lm", dataset="reviews", auxiliary=True),
    ]


def model_calls(model: MultiTaskModel) -> list[Call]:
    """Passes of a model: mixed rows, the rows of some tasks, all tasks of all rows, losses."""
    batch = make_batch()
    slices = {"tone": Segment(0, 2, 9), "traits": Segment(2, 3, 4), "names": Segment(3, 5, 6)}
    labels = {"tone": torch.tensor([0, 1]), "traits": torch.ones(1, 3), "names": torch.ones(2, 6, dtype=torch.long)}
    short = {key: value[3:, :6] for key, value in batch.items()}

    def logits(given: dict[str, torch.Tensor], guard: Any = torch.no_grad, **more: Any) -> dict[str, torch.Tensor]:
        with guard():
            return {name: value.clone() for name, value in model(**given, **more).logits.items()}

    def losses() -> dict[str, torch.Tensor]:
        output = model(**batch, segments=slices, labels=labels)
        return {**output.task_losses, "loss": output.loss}

    def hidden() -> tuple[torch.Tensor, ...]:
        return model(**batch, segments=slices, output_hidden_states=True).hidden_states

    def words() -> dict[str, torch.Tensor]:
        places = {"hidden": torch.tensor([[1, 2], [9, 11]])}
        given = {key: value[:2] for key, value in batch.items()}
        return model(**given, segments={"hidden": Segment(0, 2, 9)}, label_positions=places).logits

    return [
        partial(logits, batch, segments=slices),
        partial(logits, batch, segments=slices, guard=torch.enable_grad),
        partial(logits, batch, segments=slices, single_pass=True),
        partial(logits, short),
        *(partial(logits, short, torch.inference_mode, segments={name: Segment(0, 2, 6)}) for name in slices),
        losses,
        hidden,
        words,
    ]


def encoder_pipeline_calls(model: MultiTaskModel) -> list[Call]:
    """Questions to a pipeline: other tasks, lengths, forms and options in each."""
    ask = pipeline("multi-task", model=model, tokenizer=make_tokenizer(), device="cpu", max_length=16)
    choice = {"start": "the film was", "one": "very good .", "other": "paris"}
    return [
        partial(ask, TEXTS),
        partial(ask, TEXTS[::-1], tasks=["tone"], batch_size=1),
        partial(ask, TEXTS, tasks=["names", "traits"], stride=3, top_k=2),
        partial(ask, TEXTS[1], tasks=["strength"]),
        partial(ask, [text.split() for text in TEXTS], tasks=["names"]),
        partial(ask, QUESTION, tasks=["where"]),
        partial(ask, choice, tasks=["next"], top_k=2),
        lambda: list(ask(iter(TEXTS), batch_size=2)),
    ]


def writer_calls(model: MultiTaskModel, tokenizer: Any, writers: tuple[str, ...], padded: bool) -> list[Call]:
    """Texts written by a model's tasks, and the answers of a pipeline."""
    ids = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 3}
    ask = pipeline("multi-task", model=model, tokenizer=tokenizer, device="cpu")
    return [
        *(partial(model.generate, **inputs, task=name) for name in writers),
        partial(model.generate, ids[:1, :3], task=writers[-1], num_beams=2, max_new_tokens=3, pad_token_id=3),
        partial(ask, TEXTS[:2], tasks=["mood"], top_k=2),
        partial(ask, TEXTS[:2], tasks=["tone"]),
        partial(ask, {"said": "paris and london"}, tasks=["repeat"], generate_kwargs={"max_new_tokens": 3}),
        partial(model, input_ids=ids, attention_mask=torch.ones_like(ids)),
    ]


def shaken(model: MultiTaskModel) -> MultiTaskModel:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_encoder(kind: str) -> MultiTaskModel:
    return make_model(kind, encoder_tasks(), dropout=None).eval()


def make_writer(scheme: str) -> MultiTaskModel:
    return shaken(SCHEMES[scheme].from_backbone(make_plain("llama, tied", noise=0.3), decoder_tasks()))


def make_encoder_decoder() -> MultiTaskModel:
    torch.manual_seed(0)
    return shaken(HardSharingModel.from_backbone(encoder_decoder("t5").eval(), seq2seq_tasks()))


SUBJECTS: dict[str, Callable[[], tuple[MultiTaskModel, Callable[[MultiTaskModel], list[Call]]]]] = {
    **{
        f"{kind}, {what}": partial(lambda kind, calls: (make_encoder(kind), calls), kind, calls)
        for kind in KINDS
        for what, calls in (("model", model_calls), ("pipeline", encoder_pipeline_calls))
    },
    **{
        f"{scheme}, writes": partial(
            lambda scheme: (
                make_writer(scheme),
                lambda model: writer_calls(model, decoder_tokenizer(), ("mood", "repeat"), True),
            ),
            scheme,
        )
        for scheme in WRITERS
    },
    "encoder-decoder": lambda: (
        make_encoder_decoder(),
        lambda model: writer_calls(model, decoder_tokenizer(), ("mood", "repeat"), False),
    ),
}


def same(one: Any, other: Any) -> bool:
    """Return whether two results are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@contextmanager
def frequent_switches() -> Iterator[None]:
    """Let threads interrupt each other all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_threads(functions: list[Call]) -> list[BaseException]:
    """Run functions in threads of their own, all from the same moment on; return what they raised."""
    start, errors = threading.Barrier(len(functions)), []

    def run(function: Call) -> None:
        torch.set_num_threads(1)
        start.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    with frequent_switches():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return errors


def check_threads(calls: list[Call], rounds: int) -> None:
    """Check that each of many threads, each at another call, gets what one thread got."""
    expected = [call() for call in calls]
    wrong: list[int] = []

    def ask(first: int) -> None:
        for number in range(first, first + rounds):
            place = number % len(calls)
            if not same(calls[place](), expected[place]):
                wrong.append(place)

    errors = run_threads([partial(ask, first) for first in range(THREADS)])
    assert not errors, errors[:2]
    assert not wrong, f"{len(wrong)} of {THREADS * rounds} calls got something else, calls {sorted(set(wrong))}"


@pytest.mark.sample(3)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_many_threads_get_what_one_thread_gets(subject):
    model, calls = SUBJECTS[subject]()
    check_threads(calls(model), 4)


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
def test_many_threads_get_what_one_thread_gets_for_long(subject):
    model, calls = SUBJECTS[subject]()
    check_threads(calls(model), 500)


def attributes(model: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """Return what stands in the `__dict__` of every module: which objects, and what containers hold."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            found[path, name] = id(value)
            if isinstance(value, dict):
                found[path, f"{name}, within"] = [(key, id(item)) for key, item in value.items()]
            elif isinstance(value, (list, set)):
                found[path, f"{name}, within"] = list(map(id, value))
            elif isinstance(value, (int, float, str, type(None))):
                found[path, name] = value
    return found


@contextmanager
def noted_writes(model: torch.nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Note which attributes are set on modules of a model, also those that are set back afterwards."""
    paths, written = {id(module): path for path, module in model.named_modules()}, []
    plain = torch.nn.Module.__setattr__

    def note(module: torch.nn.Module, name: str, value: Any) -> None:
        if id(module) in paths:
            written.append((paths[id(module)], name))
        plain(module, name, value)

    torch.nn.Module.__setattr__ = note
    try:
        yield written
    finally:
        torch.nn.Module.__setattr__ = plain


@pytest.mark.sample(3)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_pass_in_inference_writes_nothing_on_modules(subject):
    model, make_calls = SUBJECTS[subject]()
    calls = make_calls(model)
    for number, call in enumerate(calls):
        if getattr(call, "__name__", "") == "hidden":
            call()  # Transformers itself adds hooks the first time that it returns hidden states
        # Objects are held, so that no new one can have the identity of an old one.
        held = [list(vars(module).values()) for module in model.modules()]
        before = attributes(model)
        with noted_writes(model) as written:
            call()
        after = attributes(model)
        assert not written, (number, written[:3])
        assert after == before, (number, [key for key in before if after.get(key) != before[key]][:3])
        del held


def test_scores_of_targets_leave_a_model_in_training_as_it_was():
    model = make_writer("hard").train()
    before = attributes(model)
    target_scores(model, "mood", [[5, 6, 7]], [[[8], [9]]])
    model.generate(torch.tensor([[5, 6, 7]]), task="mood", max_new_tokens=1, pad_token_id=3)
    assert attributes(model) == before and all(module.training for module in model.modules())


# ---- copies, and threads that take over ----


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_model_run_beside_it(kind):
    model = make_encoder(kind)
    other = shaken(copy.deepcopy(model))
    for one in (model, other, pickle.loads(pickle.dumps(other))):
        alone = model_calls(one)[0]()
        for _ in range(2):
            assert same(model_calls(one)[0](), alone)
    check_threads([*model_calls(model)[:3], *model_calls(other)[:3]], 2)


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_backward_pass_may_run_in_another_thread(kind, checkpointing):
    """Layers that are computed again see the rows of their pass, whoever computes, whatever has passed since."""
    batch, gradients = make_batch(), []
    slices = {"tone": Segment(0, 2, 9), "traits": Segment(2, 3, 4), "names": Segment(3, 5, 6)}
    labels = {"tone": torch.tensor([0, 1]), "traits": torch.ones(1, 3), "names": torch.ones(2, 6, dtype=torch.long)}
    for elsewhere in (False, True):
        model = make_model(kind, **({"router_noise": 0.0} if "mixture" in kind else {})).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        loss = model(**batch, segments=slices, labels=labels).loss
        if elsewhere:
            with torch.no_grad():
                model(**batch, segments={"names": Segment(0, 5, 9)})
            assert not run_threads([loss.backward])
        else:
            loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items()) and gradients[0]


def test_coroutines_may_share_a_model():
    model = make_encoder("adapter")
    calls = model_calls(model)
    expected = [call() for call in calls]

    async def ask() -> list[Any]:
        async def one(call: Call) -> Any:
            await asyncio.sleep(0)
            return call()

        return await asyncio.gather(*map(one, calls), *(asyncio.to_thread(call) for call in calls))

    found = asyncio.run(ask())
    assert same(found, expected * 2)


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", ["conditioned", "prefix", "adapter, shared", "mixture, tasks routed"])
def test_a_compiled_backbone_is_one_graph_and_serves_threads(kind):
    model = make_model(kind)
    batch = make_batch()
    calls = [lambda name=name: model(**batch, segments={name: Segment(0, 5, 9)}).logits for name in ("tone", "names")]
    expected = [call() for call in calls]
    model.compile_backbone(backend="eager", fullgraph=True)
    try:
        for call, logits in zip(calls, expected, strict=True):
            check_close(call(), logits)
        check_threads(calls, 3)
    finally:
        torch._dynamo.reset()


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", ["conditioned", "prefix", "adapter", "mixture, tasks routed"])
def test_training_goes_on_while_another_model_answers(kind, make_trainer):
    def train() -> dict[str, torch.Tensor]:
        model = make_model(kind, dropout=None)
        make_trainer(model, max_steps=3).train()
        return weights(model)

    alone = train()
    calls, stop, found = encoder_pipeline_calls(make_encoder(kind)), threading.Event(), []
    expected = [call() for call in calls]

    def ask() -> None:
        while not stop.is_set():
            found.extend(same(call(), answer) for call, answer in zip(calls, expected, strict=True))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    with frequent_switches():
        for thread in threads:
            thread.start()
        try:
            together = train()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert same(together, alone) and all(found) and len(found) >= len(calls)
