"""Where long work leaves its results, so that the same command run again continues.

One folder per model. A stage's folder is named by the digest of all its inputs: an artifact found there fits by
construction, and one made from other inputs is left alone, so that going back costs nothing. Every file appears
complete or not at all (written beside, synced, renamed). A lock keeps two runs out of each other's way; the system
drops it when a process dies. Where several processes make one run, the first alone locks, reads and writes, and tells
the others what it found.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmmpq.digest import digest_of
from llmmpq.errors import CheckpointError
from llmmpq.ranks import ALONE, Ranks

# Raise when a change of code changes results: artifacts of older code are then not reused.
ALGORITHM_VERSION = 5
DEFAULT_WORK_FOLDER = ".llmmpq-work"  # beside the output, unless --work-dir says otherwise


class WorkDir:
    """The locked work folder of one model."""

    def __init__(self, folder: Path, *, ranks: Ranks = ALONE) -> None:
        self.folder, self.ranks = folder, ranks
        self._lock: IO[str] | None = None
        ranks.from_first(self._take_lock)

    def _take_lock(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise CheckpointError(
                f"cannot use the work folder {self.folder}: {error.strerror}. Give --work-dir."
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise CheckpointError(
                f"another llmmpq is at work in {self.folder}: wait for it, or give this run its own --work-dir"
            ) from None

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def stage(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        inputs = json.loads(json.dumps({**inputs, "algorithm_version": ALGORITHM_VERSION}))
        return Stage(self.folder, name, inputs, ranks=self.ranks)


class Stage:
    """The results of one stage for one set of inputs: a journal of blocks, and the finished result."""

    def __init__(self, work: Path, name: str, inputs: Mapping[str, Any], *, ranks: Ranks = ALONE) -> None:
        self.digest = digest_of(inputs)
        self.folder = work / f"{name}-{self.digest[:16]}"
        self.ranks = ranks
        self.changed: list[str] = ranks.from_first(lambda: self._begin(work, name, inputs))

    def _begin(self, work: Path, name: str, inputs: Mapping[str, Any]) -> list[str]:
        if (self.folder / "inputs.json").is_file():
            return []
        changed = self._differences(work, name, inputs)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _no_room(self.folder, error) from None
        _write(self.folder / "inputs.json", json.dumps(inputs, indent=1, sort_keys=True).encode())
        return changed

    @staticmethod
    def _differences(work: Path, name: str, inputs: Mapping[str, Any]) -> list[str]:
        """Which inputs differ from those of the most recent other run of this stage."""
        others = sorted(work.glob(f"{name}-*/inputs.json"), key=lambda path: path.stat().st_mtime_ns)
        for path in reversed(others):
            try:
                earlier = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                continue
            if not isinstance(earlier, dict):
                continue
            return sorted(key for key in earlier.keys() | inputs.keys() if earlier.get(key) != inputs.get(key))
        return []

    def load_result(self) -> dict[str, Any] | None:
        """None when there is none, or one that cannot be read: it is then made again."""
        return self.ranks.from_first(self._read_result)

    def _read_result(self) -> dict[str, Any] | None:
        try:
            loaded = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return loaded if isinstance(loaded, dict) else None

    def save_result(self, result: Mapping[str, Any]) -> None:
        if not self.ranks.is_first:
            return
        _write(self.folder / "result.json", json.dumps(result).encode())

    @property
    def nbytes(self) -> int:
        """Of the blocks that lie there."""
        return sum(path.stat().st_size for path in self.folder.glob("block-*.safetensors"))

    def block_file(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def load_block(self, index: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Notes and tensors of a finished block; None when it has to be done (again)."""
        return self.load(self.block_file(index).stem)

    def save_block(self, index: int, notes: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.save(self.block_file(index).stem, notes, tensors)

    def load(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Notes and tensors saved under a name; None when there are none, or damaged ones."""
        return self.ranks.from_first(lambda: self.read(name))

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """The same for this process alone."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt", device="cpu") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
        except SafetensorError:
            metadata, tensors = {}, {}
        if metadata.get("digest") != _tensors_digest(metadata.get("notes", ""), tensors):
            path.unlink()
            return None
        return json.loads(metadata["notes"]), tensors

    def save(self, name: str, notes: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if self.ranks.is_first:
            self.write(name, notes, tensors)

    def write(self, name: str, notes: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """The same for this process alone, under a name that is its own."""
        path = self.folder / f"{name}.safetensors"
        partial = path.with_suffix(".partial")
        stored = {name: tensor.cpu() for name, tensor in tensors.items()}
        text = json.dumps(notes)
        try:
            # safetensors writes the file itself; the sync makes the rename mean what it says.
            save_file(stored, partial, {"notes": text, "digest": _tensors_digest(text, stored)})
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise _no_room(path, error) from None

    def forget(self, pattern: str) -> None:
        """Remove saved files whose name fits a pattern."""
        for path in self.folder.glob(pattern):
            path.unlink(missing_ok=True)

    def discard(self) -> None:
        if self.ranks.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)


def _tensors_digest(notes: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Over every byte: a bit that flips in the journal must not reach the model."""
    hasher = hashlib.sha256(notes.encode())
    for name in sorted(tensors):
        hasher.update(name.encode())
        flat = tensors[name].contiguous().reshape(-1).view(torch.uint8)
        hasher.update(memoryview(flat.numpy()))  # type: ignore[arg-type]
    return hasher.hexdigest()


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _no_room(path, error) from None


def _no_room(path: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or str(error)
    return CheckpointError(
        f"cannot write {path}: {reason}. Free some space or give another --work-dir; finished blocks are kept."
    )
