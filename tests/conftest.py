"""Tiny models, a tiny tokenizer and small datasets, all made here: the tests are offline."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task

# The models are so small that a second thread only waits for the first.
torch.set_num_threads(1)

POSITIVE = ("good", "great", "fine", "happy", "superb")
NEGATIVE = ("bad", "awful", "poor", "sad", "dreadful")
NEUTRAL = ("the", "film", "was", "a", "very", "and", "it", "we", "saw", "paris", "berlin", "london", "maria", "john")
PAD_ID = 3  # not 0, on purpose
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
VOCABULARY = [
    *SPECIAL,
    *POSITIVE,
    *NEGATIVE,
    *NEUTRAL,
    *"abcdefghijklmnopqrstuvwxyz",
    *[f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"],
    ".",
    ",",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(dict.fromkeys(VOCABULARY))}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


_SIZE = dict(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
_SMALL = dict(**_SIZE, max_position_embeddings=66, pad_token_id=PAD_ID)
BACKBONES = {
    "bert": lambda: BertModel(BertConfig(**_SMALL)),
    "roberta": lambda: RobertaModel(RobertaConfig(**{**_SMALL, "max_position_embeddings": 70})),
    "electra": lambda: ElectraModel(ElectraConfig(**_SMALL, embedding_size=16)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(
            vocab_size=90, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=66, pad_token_id=PAD_ID
        )
    ),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(**_SMALL, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    ),
    "llama": lambda: LlamaModel(LlamaConfig(**_SMALL, num_key_value_heads=2)),
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def bert() -> BertModel:
    torch.manual_seed(0)
    return BACKBONES["bert"]()


def make_tasks() -> list[Task]:
    """A task of each type; `tone` and `strength` read the same rows."""
    return [
        Task("tone", "single_label_classification", labels=("negative", "positive"), dataset="reviews"),
        Task("strength", "regression", dataset="reviews", label_column="strength"),
        Task("traits", "multi_label_classification", labels=("long", "happy", "sad")),
        Task("names", "token_classification", labels=("O", "B-person", "B-place")),
    ]


def make_datasets(seed: int = 0, rows: int = 40) -> dict[str, Dataset]:
    """Rows that the tasks of `make_tasks` can learn; each dataset has another size and other lengths."""
    draw = random.Random(seed)

    def words(length: int, mood: tuple[str, ...] = ()) -> list[str]:
        return [draw.choice(NEUTRAL + mood * 3) for _ in range(length)]

    reviews = []
    for i in range(rows):
        mood = (POSITIVE, NEGATIVE)[i % 2]
        text = words(draw.randint(3, 9), mood)
        score = sum(w in POSITIVE for w in text) - sum(w in NEGATIVE for w in text)
        reviews.append({"text": " ".join(text), "label": ("positive", "negative")[i % 2], "strength": float(score)})
    traits = []
    for i in range(rows // 2):
        text = words(draw.randint(4, 30), (POSITIVE, NEGATIVE)[i % 2])
        present = (["long"] if len(text) > 15 else []) + ["happy" if i % 2 == 0 else "sad"]
        traits.append({"text": " ".join(text), "labels": present})
    kinds = {"maria": "B-person", "john": "B-person", "paris": "B-place", "berlin": "B-place", "london": "B-place"}
    names = []
    for _ in range(rows // 4 + 1):
        tokens = words(draw.randint(2, 12))
        names.append({"tokens": tokens, "tags": [kinds.get(word, "O") for word in tokens]})
    return {
        name: Dataset.from_list(part) for name, part in (("reviews", reviews), ("traits", traits), ("names", names))
    }


@pytest.fixture
def tasks() -> list[Task]:
    return make_tasks()


@pytest.fixture(scope="session")
def datasets() -> dict[str, Dataset]:
    return make_datasets()


@pytest.fixture
def model(bert: BertModel, tasks: list[Task]) -> HardSharingModel:
    torch.manual_seed(1)
    return HardSharingModel.from_backbone(bert, tasks)


@pytest.fixture
def make_trainer(tmp_path, tokenizer, datasets):
    """A function that makes a trainer with small, quiet defaults."""

    def make(model, train=None, evaluation=None, *, trainer_kwargs=None, **arguments) -> MultiTaskTrainer:
        defaults = dict(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        return MultiTaskTrainer(
            model=model,
            args=MultiTaskTrainingArguments(**{**defaults, **arguments}),
            train_dataset=datasets if train is None else train,
            eval_dataset=evaluation,
            **{"processing_class": tokenizer, **(trainer_kwargs or {})},
        )

    return make


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked `sample(n)`, only each n-th is part of the default run; the rest is slow."""
    seen: dict[str, int] = {}
    for item in items:
        if mark := item.get_closest_marker("sample"):
            name = item.nodeid.partition("[")[0]
            number = seen[name] = seen.get(name, -1) + 1
            if number % mark.args[0]:
                item.add_marker(pytest.mark.slow)


_HOLD = """
import sys, time
from hf_multitask.folder_lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def other_process(tmp_path):
    """A function that lets another process take the lock of a folder, and returns the process."""
    started = []

    def hold(place):
        process = subprocess.Popen([sys.executable, "-c", _HOLD, str(place)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
