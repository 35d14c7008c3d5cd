"""What the original says about the windows, computed once and kept on disk for every model that is compared with it.

Kept are the loss of every window, the logits of the first ones in float32, and the bf16 noise floor: the divergence
between the original as it is here, computed in float32, and the same weights rounded to bfloat16 and computed in it.

A folder under the cache is named by the digest of everything that decides a bit of it: the model's files, the tokens,
how they are scored, device kind, batch, threads and versions. It holds `logits.f32`, positions x vocabulary in the
order of the text, and `reference.json`, which is written last and knows the other's sha256. What does not fit its
digest is made again. A lock lets a second process wait for the first instead of computing the same.

Log-probabilities in float16 were rejected: half the size, but then the original against itself would give 6e-7 nats
instead of 0 (docs/log.md), and a figure that is exact needs no footnote.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.filesize import decimal

from llmmpq import __version__
from llmmpq.digest import cached_digests, digest_of, file_sha256
from llmmpq.errors import CheckpointError
from llmmpq.evaluate.divergence import Divergence, divergence
from llmmpq.evaluate.perplexity import first_scored, num_scored, window_nll
from llmmpq.model.source import companion_files
from llmmpq.model.tokens import digest_of_ids
from llmmpq.progress import Progress
from llmmpq.reading import Reader
from llmmpq.workdir import DEFAULT_WORK_FOLDER

FORMAT = 1  # raise when what is kept changes its meaning
LOGITS_FILE, FIGURES_FILE = "logits.f32", "reference.json"
SPARE_NBYTES = 64 << 20  # of disk that stay free beside the logits


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Which tokens are looked at: windows, how far apart they begin, and how many of them are compared in full."""

    windows: torch.Tensor
    stride: int
    num_kl_windows: int

    @property
    def kl_windows(self) -> torch.Tensor:
        return self.windows[: self.num_kl_windows]

    def positions(self, first: int, logits_BTV: torch.Tensor) -> torch.Tensor:
        """The logits that predict scored tokens, of those windows of a batch that are compared: [N, V] in float32."""
        parts = []
        for index, logits_TV in enumerate(logits_BTV[: max(0, self.num_kl_windows - first)], start=first):
            parts.append(logits_TV[first_scored(self.windows.shape[1], index, self.stride) - 1 : -1])
        return torch.cat(parts).float() if parts else logits_BTV.new_empty((0, logits_BTV.shape[-1]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """The original on the windows."""

    nll: float
    logits_NV: torch.Tensor | None  # mapped from the file: no memory of its own
    noise_floor: Mapping[str, Any] | None
    was_cached: bool


def reference_of(
    model: str,
    scoring: Scoring,
    *,
    cache_dir: Path | None,
    device: str,
    progress: Progress,
) -> Reference:
    """From the cache, or computed and put there."""
    root = cache_dir or Path.cwd() / DEFAULT_WORK_FOLDER
    reader = Reader(model, device=device, dtype="float32")
    inputs = _inputs(reader, scoring, root, progress)
    with _entry(root, reader, inputs) as folder:
        figures = _read(folder, progress)
        known = figures is not None
        if figures is None:
            figures = _make(reader, scoring, folder, inputs, progress)
        logits_NV = None
        if figures["shape"][0]:
            mapped = np.memmap(folder / LOGITS_FILE, dtype="<f4", mode="c", shape=tuple(figures["shape"]))
            logits_NV = torch.from_numpy(mapped)
    return Reference(
        nll=math.fsum(figures["nll_by_window"]) / num_scored(scoring.windows, scoring.stride),
        logits_NV=logits_NV,
        noise_floor=figures["noise_floor"],
        was_cached=known,
    )


def _inputs(reader: Reader, scoring: Scoring, root: Path, progress: Progress) -> dict[str, Any]:
    files = [*reader.checkpoint.files, reader.folder / "config.json", *companion_files(reader.folder)]
    label = f"hash the files of {reader.name}"
    with progress.task(label, sum(path.stat().st_size for path in files), "bytes") as advance:
        try:
            root.mkdir(parents=True, exist_ok=True)
            digests = cached_digests(files, root / "file-hashes.json", advance=advance)
        except OSError as error:
            raise _unusable(root, error) from None
    return {
        "format": FORMAT,
        "model": dict(sorted(digests.items())),
        "tokens": digest_of_ids(scoring.windows),
        "stride": scoring.stride,
        "num_kl_windows": scoring.num_kl_windows,
        "device": reader.device.type,
        "batch": reader.batch(scoring.windows.shape[1]),
        "threads": torch.get_num_threads() if reader.device.type == "cpu" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "llmmpq": __version__,
    }


@contextmanager
def _entry(root: Path, reader: Reader, inputs: Mapping[str, Any]) -> Iterator[Path]:
    folder = root / f"reference-{Path(reader.name).name}-{digest_of(inputs)[:16]}"
    try:
        folder.mkdir(exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise _unusable(root, error) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits: whoever holds it is computing what we need
        yield folder


def _read(folder: Path, progress: Progress) -> dict[str, Any] | None:
    """None where there is nothing, or something that is not what was written."""
    try:
        figures = json.loads((folder / FIGURES_FILE).read_text(encoding="utf-8"))
        nbytes = (folder / LOGITS_FILE).stat().st_size
    except (OSError, ValueError):
        return None
    if not isinstance(figures, dict) or digest_of(figures.get("figures")) != figures.get("digest"):
        return None
    with progress.task("verify the original's logits", nbytes, "bytes") as advance:
        if file_sha256(folder / LOGITS_FILE, advance=advance) != figures["figures"]["sha256"]:
            progress.note(f"{folder / LOGITS_FILE} is damaged: the original is computed again")
            return None
    found: dict[str, Any] = figures["figures"]
    return found


def _make(
    reader: Reader, scoring: Scoring, folder: Path, inputs: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    (folder / FIGURES_FILE).unlink(missing_ok=True)
    num_positions = num_scored(scoring.kl_windows, scoring.stride) if scoring.num_kl_windows else 0
    vocabulary = int(reader.config.get_text_config().vocab_size)
    _check_disk(folder, 4 * num_positions * vocabulary)
    if num_positions:
        progress.note(
            f"the original's logits on {num_positions:,} tokens take {decimal(4 * num_positions * vocabulary)} in "
            f"{folder}: kept for the next comparison, to be deleted at any time"
        )
    reader.load()  # below, its errors would be taken for those of the disk
    nll_by_window, shape, hasher = list[float](), [0, vocabulary], hashlib.sha256()
    partial = folder / f"{LOGITS_FILE}.partial"
    try:
        with (
            partial.open("wb") as file,
            progress.task(f"evaluate {reader.name}", len(scoring.windows), "windows") as advance,
        ):
            for first, logits in reader.logits(scoring.windows):
                nll_by_window += window_nll(logits, scoring.windows, first=first, stride=scoring.stride)
                kept = scoring.positions(first, logits)
                data = kept.cpu().numpy().astype("<f4", copy=False).tobytes()
                file.write(data)
                hasher.update(data)
                shape = [shape[0] + len(kept), kept.shape[1]]
                advance(len(logits))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / LOGITS_FILE)
    except OSError as error:
        raise _unusable(folder, error) from None
    finally:
        partial.unlink(missing_ok=True)
    noise_floor = None
    if shape[0]:
        mapped = torch.from_numpy(np.memmap(folder / LOGITS_FILE, dtype="<f4", mode="c", shape=tuple(shape)))
        rounded = Reader(reader.name, device=str(reader.device), dtype="bfloat16")
        noise_floor = compare(mapped, rounded, scoring, progress).to_json()
    figures = {"nll_by_window": nll_by_window, "shape": shape, "sha256": hasher.hexdigest(), "noise_floor": noise_floor}
    try:
        written = folder / f"{FIGURES_FILE}.partial"
        stored = {"figures": figures, "digest": digest_of(figures), "inputs": inputs}
        written.write_text(json.dumps(stored, indent=1), encoding="utf-8")
        written.replace(folder / FIGURES_FILE)
    except OSError as error:
        raise _unusable(folder, error) from None
    return figures


def compare(original_NV: torch.Tensor, reader: Reader, scoring: Scoring, progress: Progress) -> Divergence:
    """Another model, or the same in bfloat16, at the positions of which the original's logits are kept."""
    parts: list[Divergence] = []
    label = f"compare {reader.name} in {str(reader.dtype).removeprefix('torch.')}"
    with progress.task(label, scoring.num_kl_windows, "windows") as advance:
        for first, logits in reader.logits(scoring.kl_windows):
            compare_batch(original_NV, scoring, first, logits, parts)
            advance(len(logits))
    return Divergence.of(parts)


def compare_batch(
    original_NV: torch.Tensor, scoring: Scoring, first: int, logits: torch.Tensor, parts: list[Divergence]
) -> None:
    """Adds what one batch gives to `parts`, which hold the batches before."""
    other_NV = scoring.positions(first, logits)
    if not len(other_NV):
        return
    refuse_other_words(other_NV.shape[1], original_NV.shape[1])
    start = sum(len(part.kl_N) for part in parts)
    parts.append(divergence(original_NV[start : start + len(other_NV)], other_NV))


def refuse_other_words(num_words: int, num_original: int) -> None:
    if num_words != num_original:
        raise CheckpointError(
            f"the models know {num_words} and {num_original} words: their predictions cannot be compared. Is it the "
            "right baseline? (--kl-tokens 0 compares perplexity alone)"
        )


def _check_disk(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes and nbytes + SPARE_NBYTES > free:
        raise CheckpointError(
            f"the original's logits take {decimal(nbytes)}, {decimal(free)} are free in {folder.parent}: give "
            "--cache-dir on another disk, or fewer --kl-tokens"
        )


def _unusable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot keep the original's logits in {folder}: {error.strerror or error}. Give --cache-dir"
    )
