"""Safetensors in, safetensors out: a lazy reader of model folders and a streaming, sharded writer.

Reading opens a shard, copies the tensors asked for into memory of their own and closes it again, so that resident
memory is what the caller holds and never the mapped file. Only safetensors are read: a pickle can run code.

Writing knows every tensor's size beforehand, lays out the shards, and streams the bytes through a hash. Within a
shard tensors are ordered by falling element size, which keeps each one aligned, then by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open

from llmmpq.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COPY_CHUNK_NBYTES = 32 << 20
HEADER_ALIGNMENT = 8  # the data of a shard begins at a multiple of it

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
STORED_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor of a checkpoint lies, and its name there."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


class Checkpoint:
    """The tensors of a model folder, found through headers alone and read when asked for."""

    def __init__(self, folder: Path, entries: Mapping[str, StoredTensor]) -> None:
        self.folder = folder
        self.entries = entries

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        entries: dict[str, StoredTensor] = {}
        weight_map = _weight_map(folder)
        for file in sorted(set(weight_map.values())) if weight_map else [SINGLE_FILE]:
            for entry in _read_header(folder, file):
                if not weight_map or weight_map.get(entry.name) == file:
                    entries[entry.name] = entry
        missing = sorted(set(weight_map) - set(entries))
        if missing:
            raise CheckpointError(
                f"{folder / INDEX_FILE} places {missing[0]!r} in {weight_map[missing[0]]}, which does not hold it "
                f"({len(missing)} such tensors). Download the model again."
            )
        return cls(folder, entries)

    @property
    def files(self) -> list[Path]:
        return [self.folder / file for file in sorted({entry.file for entry in self.entries.values()})]

    @property
    def nbytes(self) -> int:
        """Of what is stored: a tensor with two names counts once."""
        return sum(entry.nbytes for entry in set(self.entries.values()))

    def read(
        self, names: Iterable[str], *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Copies of the named tensors; floating-point ones are cast to `dtype`. NaN and inf are refused."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        tensors: dict[str, torch.Tensor] = {}
        for file, file_names in by_file.items():
            with _opened(self.folder / file) as shard:
                for name in file_names:
                    stored = shard.get_tensor(self.entries[name].name)
                    target = dtype if dtype is not None and stored.is_floating_point() else stored.dtype
                    tensor = stored.to(device=device, dtype=target, copy=True)
                    if tensor.is_floating_point() and not is_finite(tensor):
                        self._check_finite(name, stored)
                        raise CheckpointError(
                            f"tensor {name!r} reaches {float(stored.abs().max()):.3g}, more than {target} holds: use "
                            "--dtype bfloat16 or float32"
                        )
                    tensors[name] = tensor
        return tensors

    def row_chunks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in blocks of rows of at most `COPY_CHUNK_NBYTES`, each checked for NaN and inf."""
        entry = self.entries[name]
        with _opened(self.folder / entry.file) as shard:
            if not entry.shape or entry.nbytes <= COPY_CHUNK_NBYTES:
                chunks: Iterable[torch.Tensor] = [shard.get_tensor(entry.name)]
            else:
                rows = max(1, COPY_CHUNK_NBYTES * entry.shape[0] // entry.nbytes)
                view = shard.get_slice(entry.name)
                chunks = (view[start : start + rows] for start in range(0, entry.shape[0], rows))
            for chunk in chunks:
                if chunk.is_floating_point():
                    self._check_finite(name, chunk)
                yield chunk

    def check_finite(self, names: Iterable[str]) -> None:
        for name in names:
            for _ in self.row_chunks(name):
                pass

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        if not is_finite(tensor):
            num_bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"tensor {name!r} in {self.folder / self.entries[name].file} holds {num_bad} NaN or infinite "
                "values. The checkpoint is damaged or was saved from a diverged model; download it again."
            )


def is_finite(tensor: torch.Tensor) -> bool:
    # The sum is a cheap witness: any NaN or inf makes it non-finite. Only then is every element looked at.
    total = tensor.sum(dtype=torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype)
    return math.isfinite(total.item()) or bool(torch.isfinite(tensor).all())


def _weight_map(folder: Path) -> dict[str, str]:
    """The index of a sharded checkpoint, checked; empty for a single-file one."""
    index = folder / INDEX_FILE
    # A single file wins over an index beside it, as in transformers: both must read the same weights.
    if (folder / SINGLE_FILE).is_file():
        return {}
    if not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened and are never "
                "read. Convert them to safetensors first (load and save_pretrained in an environment you trust)."
            )
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: not a model folder")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error!r}). Download the model again.") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' must map tensor names to file names and must not be empty")
    for name, file in weight_map.items():
        parts = PurePosixPath(file).parts if isinstance(file, str) else ()
        if len(parts) != 1 or parts[0] in ("..", "/") or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} places {name!r} in {file!r}: shards must be .safetensors files inside the model folder"
            )
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"{index} names the shard {file}, which is missing. Download the model again.")
    return weight_map


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise CheckpointError(
            f"{path} ({size} bytes) cannot be read as safetensors: {error}. "
            "It is truncated or damaged; download it again."
        ) from None


def _read_header(folder: Path, file: str) -> list[StoredTensor]:
    entries = []
    with _opened(folder / file) as shard:
        for name in shard.keys():  # noqa: SIM118 (safe_open is not a mapping)
            view = shard.get_slice(name)
            dtype = str(view.get_dtype())
            if dtype not in TORCH_DTYPES:
                raise CheckpointError(
                    f"tensor {name!r} in {folder / file} has dtype {dtype}; readable are {', '.join(TORCH_DTYPES)}"
                )
            entries.append(StoredTensor(name=name, file=file, dtype=dtype, shape=tuple(view.get_shape())))
    return entries


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """A tensor to be written: its layout, and where its bytes come from when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path,
    tensors: Sequence[OutputTensor],
    *,
    max_shard_nbytes: int,
    on_bytes: Callable[[int], None] = lambda num: None,
) -> dict[str, str]:
    """Stream the tensors into one or more shards (and an index). Returns file name -> sha256."""
    shards: list[list[OutputTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(item.nbytes for item in shards[-1]) + tensor.nbytes > max_shard_nbytes:
            shards.append([])
        shards[-1].append(tensor)
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = _shard_name(number, len(shards))
        digests[file] = _write_shard(folder / file, shard, on_bytes)
        weight_map |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        digests[INDEX_FILE] = write_text(folder / INDEX_FILE, _index(weight_map, total))
    return digests


def write_text(path: Path, text: str) -> str:
    return write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> str:
    """Write a small file durably; returns its sha256."""
    try:
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise _write_failed(path, error) from None
    return hashlib.sha256(data).hexdigest()


def _write_failed(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write {path}: {error.strerror or error}. Free some space or choose another --out, then run the same "
        "command again: finished work is kept."
    )


def most_overhead_nbytes(tensors: Sequence[OutputTensor], *, max_shard_nbytes: int) -> int:
    """The most bytes that headers and index can take beside these tensors, or beside smaller ones in their place.

    In one shard that holds everything each tensor's offset has at least as many digits as in any other layout. Two
    neighbouring shards hold more than `max_shard_nbytes` between them, which limits their number.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    num_shards = 1 if total <= max_shard_nbytes else min(len(tensors), 2 * total // max_shard_nbytes + 1)
    in_one = len(_header(_in_file_order(tensors)))
    if num_shards == 1:
        return in_one
    another, padding = len(_header([])), HEADER_ALIGNMENT - 1
    file = _shard_name(num_shards, num_shards)
    index = _index({tensor.name: file for tensor in tensors}, total)
    return in_one + (num_shards - 1) * another + num_shards * padding + len(index.encode())


def _shard_name(number: int, num_shards: int) -> str:
    return SINGLE_FILE if num_shards == 1 else f"model-{number:05d}-of-{num_shards:05d}.safetensors"


def _index(weight_map: Mapping[str, str], total_nbytes: int) -> str:
    index = {"metadata": {"total_size": total_nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _in_file_order(shard: Sequence[OutputTensor]) -> list[OutputTensor]:
    return sorted(shard, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))


def _header(ordered: Sequence[OutputTensor]) -> bytes:
    """What a shard begins with: the length of the JSON and the JSON."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": STORED_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % HEADER_ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def _write_shard(path: Path, shard: Sequence[OutputTensor], on_bytes: Callable[[int], None]) -> str:
    ordered = _in_file_order(shard)
    hasher = hashlib.sha256()
    try:
        with path.open("wb") as stream:

            def emit(data: bytes | memoryview) -> None:
                hasher.update(data)
                stream.write(data)

            emit(_header(ordered))
            for tensor in ordered:
                written = 0
                for chunk in tensor.chunks():
                    if chunk.dtype != tensor.dtype:
                        raise CheckpointError(f"{tensor.name}: planned as {tensor.dtype}, got {chunk.dtype}")
                    flat = chunk.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    data = memoryview(flat.numpy())  # type: ignore[arg-type]
                    emit(data)
                    written += data.nbytes
                    on_bytes(data.nbytes)
                if written != tensor.nbytes:
                    raise CheckpointError(f"{tensor.name}: planned {tensor.nbytes} bytes, got {written}")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise _write_failed(path, error) from None
    return hasher.hexdigest()
