"""How one matrix is stored: widths, groups, scales. Knows no torch.

`Scheme` is the only place that knows what a quantized matrix costs on disk; everything that counts bytes
(allocation, writing, loading, inspection) asks it. `docs/format.md` describes the tensors it names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmmpq.errors import CheckpointError

WIDTHS = (2, 3, 4, 8)
LAYOUT_VERSIONS = (1, 2)  # 2 adds several widths in a matrix, and 8-bit scales
SCALE_DTYPES = ("float16", "float8")
LARGEST_GROUP = 2**20  # wider than any layer: from there on a row is one group
# 32 codes of b bits fill exactly b 32-bit words, for every width: the unit in which rows are padded.
CODES_PER_CHUNK = 32
DTYPE_NBYTES = {"uint8": 1, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4}

Runs = tuple[tuple[int, int], ...]  # (bits, number of groups), rising in bits: the order in which they are stored


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one matrix of shape (out_features, in_features) is stored: `bits` everywhere, or `runs` of groups."""

    bits: int | None
    group_size: int
    symmetric: bool = False
    scale_dtype: str = "float16"
    runs: Runs = ()

    def __post_init__(self) -> None:
        if self.runs:
            _check_runs(self.bits, self.runs)
        elif type(self.bits) is not int or self.bits not in WIDTHS:
            raise CheckpointError(f"bits {self.bits!r} is not a stored width: use one of {WIDTHS}")
        if type(self.group_size) is not int or not 1 <= self.group_size <= LARGEST_GROUP:
            raise CheckpointError(f"group_size {self.group_size!r} must be a whole number from 1 to {LARGEST_GROUP}")
        if type(self.symmetric) is not bool:
            raise CheckpointError(f"symmetric {self.symmetric!r} must be true or false")
        if self.scale_dtype not in SCALE_DTYPES:
            raise CheckpointError(f"scale_dtype {self.scale_dtype!r} is not known: use one of {SCALE_DTYPES}")

    @property
    def mixed(self) -> bool:
        """Whether the groups have several widths."""
        return bool(self.runs)

    @property
    def layout_version(self) -> int:
        """The first layout that can store it."""
        return 2 if self.mixed or self.scale_dtype != "float16" else 1

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The names of the stored tensors, whatever the shape."""
        names = ["words", "scales"]
        names += [] if self.symmetric else ["zeros"]
        names += ["order"] if self.mixed else []
        return (*names, "scale_base") if self.scale_dtype == "float8" else tuple(names)

    def num_groups(self, in_features: int) -> int:
        return -(-in_features // self.group_size)

    def widths(self, shape: tuple[int, int]) -> Runs:
        """(bits, number of groups) of each run of a matrix of this shape; one run where all have the same width."""
        num_groups = self.num_groups(shape[1])
        if self.bits is not None:
            return ((self.bits, num_groups),)
        if sum(count for _, count in self.runs) != num_groups:
            raise CheckpointError(
                f"bits {_runs_json(self.runs)!r} name {sum(count for _, count in self.runs)} groups: {shape[1]} "
                f"inputs in groups of {self.group_size} are {num_groups}"
            )
        return self.runs

    def code_bits(self, shape: tuple[int, int]) -> float:
        """Mean bits of a code. A short last group counts as a full one: its width is not known before quantizing."""
        runs = self.widths(shape)
        return sum(bits * count for bits, count in runs) / sum(count for _, count in runs)

    def tensors(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor stored for a matrix of this shape."""
        num_rows, num_columns = shape
        runs, num_groups = self.widths(shape), self.num_groups(num_columns)
        # In a mixed matrix every group is stored full, so that sizes do not depend on which groups are wide.
        columns = [count * self.group_size for _, count in runs] if self.mixed else [num_columns]
        words_in_row = sum(bits * _chunks(size) for (bits, _), size in zip(runs, columns, strict=True))
        stored: dict[str, tuple[str, tuple[int, ...]]] = {
            "words": ("int32", (num_rows, words_in_row)),
            "scales": ("uint8" if self.scale_dtype == "float8" else "float16", (num_rows, num_groups)),
        }
        if not self.symmetric:
            zeros = [(count, bits * _chunks(num_rows)) for bits, count in runs]
            stored["zeros"] = ("int32", (sum(math.prod(dims) for dims in zeros),) if self.mixed else zeros[0])
        if self.mixed:
            stored["order"] = ("int32", (num_groups,))
        if self.scale_dtype == "float8":
            stored["scale_base"] = ("float32", (1,))
        return stored

    def nbytes(self, shape: tuple[int, int]) -> int:
        return sum(DTYPE_NBYTES[dtype] * math.prod(dims) for dtype, dims in self.tensors(shape).values())

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return 8 * self.nbytes(shape) / math.prod(shape)

    def to_json(self) -> dict[str, Any]:
        """A scheme that layout 1 can store has the keys of layout 1."""
        bits = _runs_json(self.runs) if self.mixed else self.bits
        data = {"bits": bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return data if self.scale_dtype == "float16" else data | {"scale_dtype": self.scale_dtype}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scheme:
        try:
            bits = data["bits"]
            runs = _read_runs(bits) if isinstance(bits, Mapping) else ()
            return cls(
                bits=None if runs else bits,
                group_size=data["group_size"],
                symmetric=data["symmetric"],
                scale_dtype=data.get("scale_dtype", "float16"),
                runs=runs,
            )
        except KeyError as error:
            raise CheckpointError(f"scheme {dict(data)!r} lacks the key {error}") from None


def runs_at(average: float, num_groups: int, widths: Sequence[int]) -> Runs:
    """The two neighbouring widths whose groups come nearest to this mean; empty where one width alone does."""
    narrower = [bits for bits in widths if bits < average]
    wider = [bits for bits in widths if bits > average]
    if average in widths or not narrower or not wider:
        return ()
    low, high = max(narrower), min(wider)
    num_high = math.floor((average - low) / (high - low) * num_groups + 0.5)
    return ((low, num_groups - num_high), (high, num_high)) if 0 < num_high < num_groups else ()


def check_layout_version(layout_version: object) -> int:
    """The version, when it is one that this llmmpq reads."""
    if type(layout_version) is not int or layout_version not in LAYOUT_VERSIONS:
        known = " and ".join(map(str, LAYOUT_VERSIONS))
        raise CheckpointError(
            f"'layout_version' is {layout_version!r}; this llmmpq reads {known}. "
            "Install the llmmpq that wrote this model, or quantize it again"
        )
    return layout_version


def refuse_newer_schemes(schemes: Mapping[str, Scheme], layout_version: int) -> None:
    """An error for a scheme that this layout cannot store."""
    for name, scheme in schemes.items():
        if scheme.layout_version > layout_version:
            raise CheckpointError(
                f"{name}: {scheme.to_json()} needs 'layout_version' {scheme.layout_version}, found {layout_version}"
            )


def _check_runs(bits: object, runs: Runs) -> None:
    widths = [width for width, _ in runs]
    if bits is not None:
        raise CheckpointError(f"bits {bits!r} and runs {runs!r} exclude each other: give one of them")
    if len(runs) < 2:
        raise CheckpointError(f"bits {_runs_json(runs)!r} name one width: write the number alone")
    if any(type(width) is not int or width not in WIDTHS for width in widths):
        raise CheckpointError(f"bits {_runs_json(runs)!r}: widths must be from {WIDTHS}")
    if widths != sorted(set(widths)):
        raise CheckpointError(f"bits {_runs_json(runs)!r}: widths must rise")
    if any(type(count) is not int or count < 1 for _, count in runs):
        raise CheckpointError(f"bits {_runs_json(runs)!r}: each width needs a whole number of groups from 1")


def _runs_json(runs: Runs) -> dict[str, int]:
    return {str(bits): count for bits, count in runs}


def _read_runs(bits: Mapping[str, Any]) -> Runs:
    known = {str(width): width for width in WIDTHS}
    if not bits or not bits.keys() <= known.keys():
        raise CheckpointError(f"bits {dict(bits)!r} must map widths from {WIDTHS} to numbers of groups")
    return tuple(sorted((known[width], count) for width, count in bits.items()))


def _chunks(num_codes: int) -> int:
    return -(-num_codes // CODES_PER_CHUNK)
