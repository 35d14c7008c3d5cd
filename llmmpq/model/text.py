"""Texts to calibrate and to evaluate on: a source's name in, its documents out, each read when its turn comes.

Sources: `builtin` (the packaged text), a file or folder, `hf:DATASET[/CONFIG][:SPLIT][:COLUMN]`, and `auto` (the
standard data set when it can be reached, else the packaged text, and a note says which).
"""

from __future__ import annotations

import json
import os
import threading
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import chain
from pathlib import Path
from typing import Any

from llmmpq.errors import CalibrationError

STANDARD_DATASET = "Salesforce/wikitext"
STANDARD_SOURCE = f"hf:{STANDARD_DATASET}/wikitext-2-raw-v1:train:text"
HUB_TIMEOUT_S = 3.0  # longer than a slow answer, short enough not to look like a hang
# A longer document is cut at the next line end, so that a huge file is neither held nor tokenized whole.
MAX_DOCUMENT_CHARS = 2**18
FOLDER_SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """A resolved source: its documents by part (one per file), each part opened when its turn comes."""

    source: str
    parts: Sequence[Iterable[str]]
    notes: tuple[str, ...] = ()


def evaluation_text(source: str | None, *, max_chars: int) -> tuple[str, str]:
    """A name for the source, and its text, of which no more is read than `max_chars` need.

    A file is taken as it is. The documents of a folder, of a `.jsonl` file and the rows of a data set are joined by an
    empty line; of wikitext's rows that makes the text on which GPTQ and its successors report perplexity.
    """
    if source is None:
        return "packaged held-out text", packaged_text("heldout.txt")
    path = Path(source).expanduser()
    if source.startswith("hf:"):
        source, texts = _hub_texts(source)
    elif path.is_dir() or path.suffix.lower() == ".jsonl":
        texts = chain.from_iterable(resolve_text(source).parts)
    else:
        return source, read_text(path)
    pieces, num_chars = [], 0
    for text in texts:
        pieces.append(text)
        num_chars += len(text)
        if num_chars >= max_chars:
            break
    return source, "\n\n".join(pieces)


def read_text(path: str | Path) -> str:
    return "".join(_lines(Path(path).expanduser()))


def packaged_text(name: str) -> str:
    """A text that ships with llmmpq: `calibration.txt` or `heldout.txt`."""
    return files("llmmpq").joinpath("assets", name).read_text(encoding="utf-8")


def resolve_text(source: str) -> CalibrationText:
    if source == "auto":
        return _resolve_auto()
    if source == "builtin":
        builtin = files("llmmpq").joinpath("assets", "calibration.txt")
        return CalibrationText(source=source, parts=[_documents(_split(_lines(builtin)))])
    if source.startswith("hf:"):
        return _resolve_hub(source)
    path = Path(source).expanduser()
    if source and path.is_file():
        return CalibrationText(source=source, parts=[_file_documents(path)])
    if source and path.is_dir():
        paths = sorted(_text_files(path))
        if not paths:
            raise CalibrationError(f"text folder {source} holds no file ending in {', '.join(FOLDER_SUFFIXES)}")
        return CalibrationText(source=source, parts=[_file_documents(item) for item in paths])
    raise CalibrationError(
        f"calibration source {source!r} does not exist; allowed: auto, builtin, self, a file, a folder, "
        "or hf:DATASET[/CONFIG][:SPLIT][:COLUMN]"
    )


def _lines(path: Traversable) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:  # -sig: editors on Windows put a mark first
            yield from file
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x}, {error.reason}. Convert it to UTF-8"
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None


def _split(lines: Iterable[str]) -> Iterator[str | None]:
    """None in place of each line that holds only `---`."""
    return (None if line.strip() == "---" else line for line in lines)


def _documents(pieces: Iterable[str | None]) -> Iterator[str]:
    """Documents: pieces up to a None, or up to the longest document we keep whole."""
    document: list[str] = []
    num_chars = 0
    for piece in chain(pieces, [None]):
        if piece is not None:
            document.append(piece)
            num_chars += len(piece)
        if piece is None or num_chars >= MAX_DOCUMENT_CHARS:
            if whole := "".join(document).strip("\n"):
                yield whole
            document, num_chars = [], 0


def _text_files(folder: Path) -> Iterator[Path]:
    for item in folder.iterdir():
        if item.name.startswith(".") or item.is_symlink():
            continue
        if item.is_dir():
            yield from _text_files(item)
        elif item.is_file() and item.suffix.lower() in FOLDER_SUFFIXES:
            yield item


def _file_documents(path: Path) -> Iterator[str]:
    if path.suffix.lower() == ".jsonl":
        return _json_documents(path)
    return _documents(_split(_lines(path)))


def _json_documents(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise CalibrationError(f"{path} line {number} is a JSON {type(row).__name__}; allowed: one object per line")
        where = f"{path} line {number}"
        yield from _documents([_field(row, _text_key(row, where), where)])


def _text_key(row: Mapping[str, Any], where: str) -> str:
    texts = [key for key, value in row.items() if isinstance(value, str)]
    if "text" in row or len(texts) == 1:
        return "text" if "text" in row else texts[0]
    raise CalibrationError(
        f"{where} has no key 'text' and {len(texts)} keys that hold text, so the text is not known; "
        f"its keys are: {', '.join(map(str, row)) or 'none'}"
    )


def _field(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str | None):
        raise CalibrationError(f"{where}: {key!r} holds {type(value).__name__}; allowed: text")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{where}: {key!r} holds half of a surrogate pair (at {error.start})") from None
    return value or ""


def _resolve_auto() -> CalibrationText:
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):  # as huggingface_hub reads it
            raise CalibrationError("HF_HUB_OFFLINE is set")
        _load_dataset_function()
        if not _hub_answers():
            raise CalibrationError(f"the hub did not answer within {HUB_TIMEOUT_S:.0f} seconds")
        return _resolve_hub(STANDARD_SOURCE)
    except CalibrationError as error:
        builtin = resolve_text("builtin")
        note = f"Calibration uses the packaged text in place of {STANDARD_SOURCE}, because {error}."
        return CalibrationText(source=builtin.source, parts=builtin.parts, notes=(note,))


def _resolve_hub(source: str) -> CalibrationText:
    resolved, texts = _hub_texts(source)
    return CalibrationText(source=resolved, parts=[_documents(_row_pieces(texts))])


def _hub_texts(source: str) -> tuple[str, Iterator[str]]:
    """The resolved source and its rows. The first is read here, so that a wrong name fails before anything long."""
    path, config, split, column = parse_hub_source(source)
    load_dataset = _load_dataset_function()
    rows = _hub_rows(source, lambda: load_dataset(path, name=config, split=split, streaming=True))
    first = next(rows, None)
    if first is None:
        raise CalibrationError(f"{source} has no rows")
    if column is None:
        column = _text_key(first, source)
    elif column not in first:
        raise CalibrationError(f"{source} has no column {column!r}; its columns are: {', '.join(first)}")
    resolved = f"hf:{'/'.join(filter(None, (path, config)))}:{split}:{column}"
    return resolved, (_field(row, column, resolved) for row in chain([first], rows))


def parse_hub_source(source: str) -> tuple[str, str | None, str, str | None]:
    """Data set, configuration, split and column of hf:DATASET[/CONFIG][:SPLIT][:COLUMN].

    DATASET is NAME or OWNER/NAME, so a configuration is always the third part.
    """
    name, *rest = source.removeprefix("hf:").split(":")
    parts = name.split("/")
    if len(parts) > 3 or len(rest) > 2 or not all([*parts, *rest]):
        raise CalibrationError(
            f"text source {source!r} is not understood; allowed: hf:DATASET[/CONFIG][:SPLIT][:COLUMN], "
            f"for example {STANDARD_SOURCE}"
        )
    split, column = [*rest, None, None][:2]
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train", column


def _load_dataset_function() -> Any:
    try:
        # A folder named `datasets` in the current directory imports too, but has no such function.
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError("the package `datasets` is missing (pip install 'llmmpq[eval]')") from None
    return load_dataset


def _hub_rows(source: str, load: Any) -> Iterator[Mapping[str, Any]]:
    try:
        yield from load()
    except Exception as error:  # `datasets` raises what its many back ends raise; all mean the same to the user
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CalibrationError(
            f"{source} cannot be read ({reason}). Check the name and the network, or use another text"
        ) from error


def _row_pieces(texts: Iterable[str]) -> Iterator[str | None]:
    """One document per row, except that a row which is empty or ends a line goes on in the next one.

    Wikitext stores one line per row; its lines as documents would be calibration on contexts of one paragraph.
    """
    for text in texts:
        yield text
        if text and not text.endswith("\n"):
            yield None


def _hub_answers() -> bool:
    """Whether the hub serves the standard data set's page. In a thread: no timeout bounds a name look-up."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{endpoint}/api/datasets/{STANDARD_DATASET}", timeout=HUB_TIMEOUT_S):
                answered.set()
        except (OSError, ValueError, HTTPException):  # refused, unknown host, timeout, no address, no HTTP
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answered.is_set()
