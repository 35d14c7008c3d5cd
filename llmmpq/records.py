"""What passes between the stages: frozen records, validated when built, that know no torch.

`Scheme` is the only place that knows what a quantized matrix costs on disk; everything that counts bytes
(allocation, writing, loading, inspection) asks it. `docs/format.md` describes the tensors it names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmmpq.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch

WIDTHS = (2, 3, 4, 8)
LAYOUT_VERSION = 1
LARGEST_GROUP = 2**20  # wider than any layer: from there on a row is one group
# 32 codes of b bits fill exactly b 32-bit words, for every width: the unit in which rows are padded.
CODES_PER_CHUNK = 32
DTYPE_NBYTES = {"int32": 4, "float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one matrix of shape (out_features, in_features) is stored."""

    bits: int
    group_size: int
    symmetric: bool = False
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in WIDTHS:
            raise CheckpointError(f"bits {self.bits!r} is not a stored width: use one of {WIDTHS}")
        if type(self.group_size) is not int or not 1 <= self.group_size <= LARGEST_GROUP:
            raise CheckpointError(f"group_size {self.group_size!r} must be a whole number from 1 to {LARGEST_GROUP}")
        if type(self.symmetric) is not bool:
            raise CheckpointError(f"symmetric {self.symmetric!r} must be true or false")
        if self.scale_dtype != "float16":
            raise CheckpointError(f"scale_dtype {self.scale_dtype!r} is not known: layout 1 stores float16")

    def num_groups(self, in_features: int) -> int:
        return -(-in_features // self.group_size)

    def tensors(self, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, int]]]:
        """Name -> (dtype, shape) of every tensor stored for a matrix of this shape."""
        num_rows, num_columns = shape
        num_groups = self.num_groups(num_columns)
        stored = {
            "words": ("int32", (num_rows, self.bits * _chunks(num_columns))),
            "scales": (self.scale_dtype, (num_rows, num_groups)),
        }
        if not self.symmetric:
            stored["zeros"] = ("int32", (num_groups, self.bits * _chunks(num_rows)))
        return stored

    def nbytes(self, shape: tuple[int, int]) -> int:
        return sum(DTYPE_NBYTES[dtype] * math.prod(dims) for dtype, dims in self.tensors(shape).values())

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return 8 * self.nbytes(shape) / math.prod(shape)

    def to_json(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scheme:
        try:
            return cls(
                bits=data["bits"],
                group_size=data["group_size"],
                symmetric=data["symmetric"],
                scale_dtype=data.get("scale_dtype", "float16"),
            )
        except KeyError as error:
            raise CheckpointError(f"scheme {dict(data)!r} lacks the key {error}") from None


def _chunks(num_codes: int) -> int:
    return -(-num_codes // CODES_PER_CHUNK)


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """One quantizable matrix of the model, by its name in the model's state dict (without `.weight`)."""

    name: str
    shape: tuple[int, int]
    dtype: str
    block: int
    role: str
    fused_set: str  # linears with the same value feed one fused kernel in other runtimes (q/k/v, gate/up)

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LinearSpec:
        return cls(**{**data, "shape": tuple(data["shape"])})


@dataclass(frozen=True, kw_only=True, eq=False)  # eq of arrays is an array
class Quadratic:
    """KL(x) ~ constant + linear'x + x' gram x on the probe, around a base: the original model, or a plan.

    Options count in the order of the linears and, within one, of its options. `base` names the option of each linear
    in the plan measured around; its rows are zero. KL figures are exact and against the original model.
    """

    gram_OO: np.ndarray
    linear_O: np.ndarray
    constant: float
    base: tuple[int, ...] | None
    base_kl: float
    rounding_kl: float | None  # of computing the original in bfloat16: differences below it say nothing

    def to_json(self) -> dict[str, Any]:
        return {
            "constant": self.constant,
            "base": None if self.base is None else list(self.base),
            "base_kl": self.base_kl,
            "rounding_kl": self.rounding_kl,
        }


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What was measured: for each linear the loss of each of its options, on the probe tokens.

    The loss is the exact KL of the option alone, or what it does to its block's output when measured locally.
    """

    linears: tuple[LinearSpec, ...]
    options: Mapping[str, tuple[Scheme, ...]]
    losses: Mapping[str, tuple[float, ...]]
    num_tokens: int
    digest: str
    warnings: tuple[str, ...] = ()
    quadratic: Quadratic | None = None

    def __post_init__(self) -> None:
        for spec in self.linears:
            if len(self.options[spec.name]) != len(self.losses[spec.name]):
                raise CheckpointError(f"measurement of {spec.name}: options and losses differ in number")

    def to_json(self) -> dict[str, Any]:
        return {
            "linears": [spec.to_json() for spec in self.linears],
            "options": {name: [s.to_json() for s in schemes] for name, schemes in self.options.items()},
            "losses": {name: list(losses) for name, losses in self.losses.items()},
            "num_tokens": self.num_tokens,
            "digest": self.digest,
            "warnings": list(self.warnings),
            "quadratic": None if self.quadratic is None else self.quadratic.to_json(),
        }

    def summary(self) -> dict[str, Any]:
        """What a reader wants to see of it, without the pairs: for `report.json`."""
        return {
            "kind": "block_error" if self.quadratic is None else "kl",
            "num_tokens": self.num_tokens,
            "rounding_kl": None if self.quadratic is None else self.quadratic.rounding_kl,
            "losses": {
                spec.name: {
                    str(scheme.bits): float(f"{loss:.6g}")
                    for scheme, loss in zip(self.options[spec.name], self.losses[spec.name], strict=True)
                }
                for spec in self.linears
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> Sensitivity:
        """The arrays of the quadratic model lie apart from the JSON."""
        quadratic = None
        if data["quadratic"] is not None:
            assert arrays is not None
            known = dict(data["quadratic"])
            known["base"] = None if known["base"] is None else tuple(known["base"])
            quadratic = Quadratic(gram_OO=arrays["gram"], linear_O=arrays["linear"], **known)
        return cls(
            linears=tuple(LinearSpec.from_json(item) for item in data["linears"]),
            options={name: tuple(Scheme.from_json(item) for item in items) for name, items in data["options"].items()},
            losses={name: tuple(items) for name, items in data["losses"].items()},
            num_tokens=data["num_tokens"],
            digest=data["digest"],
            warnings=tuple(data["warnings"]),
            quadratic=quadratic,
        )


@dataclass(frozen=True, kw_only=True)
class PlannedLinear:
    """One line of a plan: a matrix and how it will be stored."""

    shape: tuple[int, int]
    block: int
    role: str
    scheme: Scheme

    def __post_init__(self) -> None:
        sizes = self.shape
        if not (isinstance(sizes, tuple) and len(sizes) == 2 and all(type(n) is int and n > 0 for n in sizes)):
            raise CheckpointError(f"shape {sizes!r} must be two positive whole numbers")
        if type(self.block) is not int or self.block < 0:
            raise CheckpointError(f"block {self.block!r} must be a whole number from 0")
        if not isinstance(self.role, str):
            raise CheckpointError(f"role {self.role!r} must be text")

    @property
    def nbytes(self) -> int:
        return self.scheme.nbytes(self.shape)

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)


EDITED = "edited"  # the method of a plan that a person gave


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The decision: a scheme for every linear. Byte figures are always computed from the schemes."""

    linears: Mapping[str, PlannedLinear]
    method: str
    budget: Mapping[str, Any]
    predicted_loss: float | None = None
    optimality_gap: float | None = None
    measured_kl: float | None = None  # on the probe, with everything quantized as the plan says
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kinds in (("method", str), ("budget", Mapping), ("provenance", Mapping)):
            if not isinstance(getattr(self, name), kinds):
                raise CheckpointError(f"the plan's {name!r} is {getattr(self, name)!r}, expected {kinds.__name__}")
        for name in ("predicted_loss", "optimality_gap", "measured_kl"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float)):
                raise CheckpointError(f"the plan's {name!r} is {value!r}, expected a number or null")

    @property
    def nbytes(self) -> int:
        return sum(linear.nbytes for linear in self.linears.values())

    @property
    def num_weights(self) -> int:
        return sum(linear.num_weights for linear in self.linears.values())

    @property
    def bits_per_weight(self) -> float:
        """True bits: codes, scales and zeros, as on disk."""
        return 8 * self.nbytes / self.num_weights

    @property
    def code_bits_per_weight(self) -> float:
        """Codes only, the figure many tools quote."""
        return sum(linear.scheme.bits * linear.num_weights for linear in self.linears.values()) / self.num_weights

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "llmmpq-plan",
            "layout_version": LAYOUT_VERSION,
            "method": self.method,
            "budget": dict(self.budget),
            "nbytes": self.nbytes,
            "num_weights": self.num_weights,
            "bits_per_weight": round(self.bits_per_weight, 6),
            "code_bits_per_weight": round(self.code_bits_per_weight, 6),
            "predicted_loss": self.predicted_loss,
            "optimality_gap": self.optimality_gap,
            "measured_kl": self.measured_kl,
            "provenance": dict(self.provenance),
            "linears": {
                name: {
                    "block": linear.block,
                    "role": linear.role,
                    "shape": list(linear.shape),
                    **linear.scheme.to_json(),
                    "nbytes": linear.nbytes,
                }
                for name, linear in self.linears.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        if not isinstance(data, Mapping) or data.get("format") != "llmmpq-plan":
            seen = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise CheckpointError(f"not a plan: 'format' is {seen!r}, expected 'llmmpq-plan'")
        if data.get("layout_version") != LAYOUT_VERSION:
            raise CheckpointError(
                f"the plan is for layout version {data.get('layout_version')!r}; this llmmpq writes {LAYOUT_VERSION}"
            )
        entries = data.get("linears")
        if not isinstance(entries, Mapping) or not entries:
            raise CheckpointError("the plan's 'linears' must map names to schemes, and must not be empty")
        linears = {name: _read_planned(name, entry) for name, entry in entries.items()}
        return cls(
            linears=linears,
            method=data.get("method", "edited"),
            budget=data.get("budget", {}),
            predicted_loss=data.get("predicted_loss"),
            optimality_gap=data.get("optimality_gap"),
            measured_kl=data.get("measured_kl"),
            provenance=data.get("provenance", {}),
        )


def _read_planned(name: str, entry: Any) -> PlannedLinear:
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"plan entry {name} is {entry!r}, expected shape, block, role and a scheme")
    try:
        shape = entry["shape"]
        return PlannedLinear(
            shape=tuple(shape) if isinstance(shape, list) else shape,
            block=entry["block"],
            role=entry["role"],
            scheme=Scheme.from_json(entry),
        )
    except KeyError as error:
        raise CheckpointError(f"plan entry {name} lacks the key {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"plan entry {name}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """Exactly what is on disk for one linear. `zeros` is None for symmetric schemes."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    scheme: Scheme
    shape: tuple[int, int]

    def tensors(self) -> dict[str, torch.Tensor]:
        stored = {"words": self.words, "scales": self.scales}
        return stored if self.zeros is None else stored | {"zeros": self.zeros}
