"""Lists of words have the tokens of the same text with spaces, and labels where predictions look for them."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_multitask import HardSharingModel, MultiTaskTrainer, MultiTaskTrainingArguments, Task
from hf_multitask.data.preprocessing import prepare
from hf_multitask.data.sources import make_sources
from hf_multitask.data.words import first_tokens, space_ids, spaced, with_spaces
from hf_multitask.prediction import Predictor
from hf_multitask.prediction_windows import cut_into_windows, word_probabilities

TEXT = "we saw maria in paris , and john 1 time in berlin ."
LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>"]


@cache
def family(name: str) -> str:
    """The tokenizer of a family, learned from a few words, as JSON."""
    split, normalizer, kind = {
        "GPT-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None, "bpe"),
        "GPT-2, add_prefix_space": (pre_tokenizers.ByteLevel(add_prefix_space=True), None, "bpe"),
        "Llama 3": (
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            None,
            "bpe",
        ),
        "Llama 2": (
            None,
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
            "bpe without spaces inside",
        ),
        "Gemma": (None, normalizers.Replace(" ", "▁"), "bpe without spaces inside"),
        "SentencePiece": (pre_tokenizers.Metaspace(prepend_scheme="always"), None, "unigram"),
        "SentencePiece, first": (pre_tokenizers.Metaspace(prepend_scheme="first"), None, "unigram"),
        "SentencePiece, never": (pre_tokenizers.Metaspace(prepend_scheme="never"), None, "unigram"),
        "WordPiece": (pre_tokenizers.BertPreTokenizer(), None, "bpe"),
    }[name]
    made = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>"))
    if kind == "bpe without spaces inside":
        # Learned from words with their space, as SentencePiece does; then there is nothing that splits texts.
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    elif split is not None:
        made.pre_tokenizer = split
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "Byte" in str(split) else []
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>")
    else:
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    made.train_from_iterator([TEXT, "the film was good . we saw a b c"] * 20, trainer)
    if normalizer is not None:
        made.normalizer = normalizer
        made.pre_tokenizer = pre_tokenizers.Sequence([])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return made.to_str()


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    options = dict(unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(family(name)), **options)


NEEDS_SPACES = {"GPT-2": True, "Llama 3": True, "Gemma": True, "SentencePiece, never": True}
FAMILIES = pytest.mark.parametrize(
    "name",
    [*NEEDS_SPACES, "GPT-2, add_prefix_space", "Llama 2", "SentencePiece", "SentencePiece, first", "WordPiece"],
)
TASK = Task("names", "token_classification", labels=("O", "B-person", "B-place", "B-number"))
TAGS = {"maria": "B-person", "john": "B-person", "paris": "B-place", "berlin": "B-place", "1": "B-number"}


def state(tokenizer) -> dict:
    kept = json.loads(tokenizer.backend_tokenizer.to_str())
    return {**kept, "truncation": None, "padding": None, "init": str(tokenizer.init_kwargs)}


def prepared(tokenizer, words: list[str], **options):
    rows = Dataset.from_dict({"tokens": [words], "tags": [[TAGS.get(word, "O") for word in words]]})
    (source,) = make_sources([TASK])
    return prepare(rows, source, tokenizer, max_length=64, **options)[0]


@FAMILIES
def test_words_have_the_tokens_of_their_text(name):
    tokenizer, words = tokenizer_of(name), TEXT.split()
    before = state(tokenizer)
    assert spaced(tokenizer) is NEEDS_SPACES.get(name, False)
    row = prepared(tokenizer, words)
    assert row["input_ids"] == tokenizer(TEXT)["input_ids"]
    (given,), (text,) = (cut_into_windows(tokenizer, [(one,)], 64, None, [0])[0] for one in (words, TEXT))
    assert given.encoding.ids == text.encoding.ids == row["input_ids"]
    assert state(tokenizer) == before


@FAMILIES
@pytest.mark.parametrize("stride", [None, 3])
def test_words_and_their_text_are_answered_at_the_token_that_was_labelled(name, stride):
    tokenizer, words = tokenizer_of(name), TEXT.split()
    labels = prepared(tokenizer, words)["labels_names"]
    wanted = [TASK.labels.index(TAGS.get(word, "O")) for word in words]
    assert [label for label in labels if label != -100] == wanted
    found = []
    for one in (words, TEXT):
        (windows,) = cut_into_windows(tokenizer, [(one,)], 64 if stride is None else 12, stride, [0])
        for window in windows:  # as a model that has learned the labels of a text by heart: by place in the whole text
            window.logits["names"] = _known(tokenizer, window, labels)
        places, probabilities = word_probabilities(windows, one, TASK)
        assert len(places) == len(words)
        found.append(probabilities.argmax(-1).tolist())
    assert found == [wanted, wanted]


def _known(tokenizer, window, labels) -> torch.Tensor:
    """Logits of the labels of a window's tokens, found by its place in the whole text; -100 is a wrong one."""
    whole = tokenizer(TEXT)["input_ids"]
    own = window.encoding.ids[1:-1]
    starts = [i for i in range(1, len(whole) - len(own)) if whole[i : i + len(own)] == own]
    (start,) = starts
    ids = torch.tensor([0, *labels[start : start + len(own)], 0])
    wrong = 1 + (ids == -100).long()  # another one than any word next to it may have
    return torch.nn.functional.one_hot(torch.where(ids == -100, wrong, ids), 4).float() * 9


def test_empty_words_and_words_with_a_space_of_their_own_stay_as_they_are():
    assert with_spaces([["a", "b", "", " c", "d"], ["", "a", "b"], []]) == [
        ["a", " b", "", " c", " d"],
        ["", "a", " b"],
        [],
    ]


def test_first_tokens_are_not_spaces_unless_a_word_has_no_other():
    assert first_tokens([None, 0, 0, 1, 2, 2, None]) == [1, 3, 4]
    assert first_tokens([None, 0, 0, 1, 2, 2, None], [False, True, False, True, True, True, False]) == [2, 3, 4]
    assert space_ids(make_tokenizer()) == frozenset()
    tokenizer = tokenizer_of("SentencePiece")
    assert tokenizer.convert_ids_to_tokens(sorted(space_ids(tokenizer))) == ["▁"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["GPT-2", "SentencePiece"])
def test_a_trained_model_finds_in_a_text_what_it_finds_in_its_words(name, tmp_path):
    tokenizer, words = tokenizer_of(name), TEXT.split()
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    )
    arguments = dict(max_steps=40, learning_rate=0.01, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = MultiTaskTrainer(
        HardSharingModel.from_backbone(bert, [TASK], head_dropout=0.0),
        MultiTaskTrainingArguments(str(tmp_path), logging_steps=1000, save_strategy="no", **arguments),
        train_dataset={"names": Dataset.from_dict({"tokens": [words] * 8, "tags": [[*map(tag, words)]] * 8})},
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(tmp_path))
    for predictor in (Predictor(trainer.model, tokenizer), Predictor.from_pretrained(tmp_path, "cpu")):
        in_text, in_words = predictor([TEXT, words])
        entities = [(entity["text"], entity["label"]) for entity in in_text["names"]]
        assert entities == [(word, tag(word)[2:]) for word in words if tag(word) != "O"]
        assert [(entity["text"], entity["label"]) for entity in in_words["names"]] == entities


def tag(word: str) -> str:
    return TAGS.get(word, "O")
