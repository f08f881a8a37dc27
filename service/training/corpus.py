"""The rated texts behind the embedded checkpoint: fetch, parse, clean, label and split.

Source: `additional_resources/hutto_ICWSM_2014.tar.gz` inside the vaderSentiment 3.3.2 source
distribution (MIT licence, C.J. Hutto): four tab-separated files of id, mean human rating in
[-4, 4] over fifteen to twenty raters, and text. The same distribution carries the VADER lexicon.

Everything here is deterministic: the same archive gives the same rows, labels and splits on any
machine, in any order of calls. Nothing is extracted to disk.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
import subprocess
import sys
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from gptjet.service.embedded import LABELS, Label

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = get_args(Split)

SDIST_REQUIREMENT = "vaderSentiment==3.3.2"
SDIST_NAME = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"

# A text is neutral when its mean rating lies strictly inside (-0.5, 0.5): raters answered in whole
# points, so a mean below half a point rounds to 0, "neutral (or neither)". See MODEL_CARD.md for
# the thresholds that were compared.
NEUTRAL_BELOW = 0.5

TEST_SHARE = 0.10
VALIDATION_SHARE = 0.05
SPLIT_SEED = "gptjet-embedded-1"
# Two texts that share this many consecutive words land in the same split.
SHINGLE_WORDS = 8

_SOURCES = {
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "editorial": "nytEditorialSnippets_GroundTruth.txt",
    "tweet": "tweets_GroundTruth.txt",
}
# The two files whose ids are DOCUMENT_SENTENCE; the others number their snippets through.
_GROUPED_SOURCES = frozenset({"amazon", "editorial"})

__all__ = ["LABELS", "SPLITS", "Corpus", "CorpusError", "Label", "Row", "Split"]

# Typographic quotes, the grave accent and Windows-1252's apostrophe.
_QUOTES = str.maketrans("\u201c\u201d\u2018\u2019`\x92", "\"\"''''")


class CorpusError(RuntimeError):
    """The archive is missing, altered, or not in the documented format."""


@dataclass(frozen=True)
class Row:
    """One rated text. `mean_rating` is the raters' mean in [-4, 4]; `document` groups snippets."""

    id: str
    source: str
    document: str
    text: str
    mean_rating: float
    label: Label


@dataclass(frozen=True)
class Corpus:
    """The cleaned, deduplicated rows by split, and the rated lexicon (word -> mean in [-4, 4])."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]
    lexicon: dict[str, float]

    def rows(self, split: Split) -> tuple[Row, ...]:
        """The rows of one split, in archive order."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


def fetch_sdist(cache_dir: Path) -> Path:
    """Path of the verified source distribution, downloaded by pip into `cache_dir` when absent.

    Raises CorpusError when pip fails or the file's sha256 is not the pinned one.
    """
    path = cache_dir / SDIST_NAME
    if not path.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        command += ["--dest", str(cache_dir), SDIST_REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not path.exists():
            raise CorpusError(
                f"pip could not download {SDIST_REQUIREMENT}; pass --sdist PATH to use a copy.\n"
                f"{done.stderr.strip()}"
            )
    verify_sdist(path)
    return path


def verify_sdist(path: Path) -> None:
    """Raise CorpusError unless `path` is byte for byte the pinned source distribution."""
    if not path.is_file():
        raise CorpusError(f"{path} is not a file")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise CorpusError(f"{path} has sha256 {digest}, expected {SDIST_SHA256}")


def load_corpus(sdist: Path) -> Corpus:
    """Read, clean, deduplicate, label and split the rated texts of a verified `sdist`."""
    verify_sdist(sdist)
    root = SDIST_NAME.removesuffix(".tar.gz")
    with tarfile.open(sdist) as outer:
        lexicon = parse_lexicon(_member(outer, f"{root}/vaderSentiment/vader_lexicon.txt"))
        inner_bytes = _member(outer, f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz")
    rows: list[Row] = []
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        for source, name in _SOURCES.items():
            rows += parse_ground_truth(source, _member(inner, f"hutto_ICWSM_2014/{name}"))
    by_split = split_rows(deduplicate(rows))
    return Corpus(
        train=tuple(by_split["train"]),
        validation=tuple(by_split["validation"]),
        test=tuple(by_split["test"]),
        lexicon=lexicon,
    )


def parse_ground_truth(source: str, data: bytes) -> list[Row]:
    """Rows of one ground-truth file: `id TAB mean_rating TAB text`, CRLF lines."""
    rows = []
    for number, line in enumerate(_decode(data).splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split("\t", 2)
        if len(fields) != 3:
            raise CorpusError(f"{source} line {number}: expected 3 fields, found {len(fields)}")
        row_id, rating_field, raw_text = fields
        text = clean_text(raw_text)
        if not text:
            continue
        document = row_id.partition("_")[0] if source in _GROUPED_SOURCES else row_id
        rating = float(rating_field)
        rows.append(
            Row(
                id=f"{source}-{row_id}",
                source=source,
                document=f"{source}-{document}",
                text=text,
                mean_rating=rating,
                label=label_for(rating),
            )
        )
    return rows


def parse_lexicon(data: bytes) -> dict[str, float]:
    """Word -> mean rating from `word TAB mean TAB deviation TAB raw ratings`; emoticons too."""
    lexicon = {}
    for line in _decode(data).splitlines():
        fields = line.split("\t")
        if len(fields) >= 2 and fields[0].strip():
            lexicon[fields[0].strip()] = float(fields[1])
    return lexicon


def label_for(mean_rating: float) -> Label:
    """The reference class of a mean human rating."""
    if mean_rating >= NEUTRAL_BELOW:
        return "positive"
    return "negative" if mean_rating <= -NEUTRAL_BELOW else "neutral"


def clean_text(raw: str) -> str:
    """One line of readable text: entities decoded, quotes made plain, whitespace collapsed."""
    # Some tweets were escaped twice: "&amp;lt;3".
    text = html.unescape(html.unescape(raw))
    text = unicodedata.normalize("NFC", text).translate(_QUOTES).replace("''", '"')
    return " ".join(text.split())


def normalised_key(text: str) -> str:
    """What two texts must share to count as the same: lower-case words without punctuation.

    A text without any word (an emoticon) is its own key.
    """
    return " ".join(_words(text)) or text.strip()


def deduplicate(rows: Iterable[Row]) -> list[Row]:
    """The rows without later copies of the same normalised text."""
    seen: set[str] = set()
    kept = []
    for row in rows:
        key = normalised_key(row.text)
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def split_rows(rows: Sequence[Row]) -> dict[Split, list[Row]]:
    """Rows by split, whole clusters at a time, in their given order.

    A cluster is everything tied together by a common document (product review, editorial) or by
    SHINGLE_WORDS consecutive words in common. Its split depends only on a hash of its smallest
    row id, so it does not change with the platform or the order of rows.
    """
    cluster_of = _clusters(rows)
    split: dict[Split, list[Row]] = {name: [] for name in SPLITS}
    for row in rows:
        split[_split_for(cluster_of[row.id])].append(row)
    return split


def fingerprint(rows: Iterable[Row]) -> str:
    """sha256 over ids, texts and labels in order: what the model card and tests compare."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.id}\t{row.text}\t{row.label}\n".encode())
    return digest.hexdigest()


def _split_for(cluster: str) -> Split:
    digest = hashlib.sha256(f"{SPLIT_SEED}:{cluster}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < TEST_SHARE:
        return "test"
    return "validation" if position < TEST_SHARE + VALIDATION_SHARE else "train"


def _clusters(rows: Sequence[Row]) -> dict[str, str]:
    """Row id -> smallest row id of its cluster (union-find over documents and shingles)."""
    parent = {row.id: row.id for row in rows}

    def find(node: str) -> str:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    members: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        members[f"document {row.document}"].append(row.id)
        words = _words(row.text)
        for start in range(len(words) - SHINGLE_WORDS + 1):
            members[" ".join(words[start : start + SHINGLE_WORDS])].append(row.id)
    for ids in members.values():
        for other in ids[1:]:
            first, second = find(ids[0]), find(other)
            parent[max(first, second)] = min(first, second)
    return {row.id: find(row.id) for row in rows}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _decode(data: bytes) -> str:
    # The 2014 files are UTF-8, but their own README mixes in Latin-1 bytes; accept both.
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        stream = archive.extractfile(name)
    except KeyError as error:
        raise CorpusError(f"the archive has no {name}") from error
    if stream is None:
        raise CorpusError(f"{name} is not a file in the archive")
    return stream.read()
