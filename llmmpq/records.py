"""What passes between the stages: frozen records, validated when built, that know no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmmpq.errors import CheckpointError
from llmmpq.scheme import Scheme, check_layout_version, refuse_newer_schemes

if TYPE_CHECKING:
    import numpy as np
    import torch

# Linears with one input, which runtimes run as one kernel where they can. Names of roles, not of models.
FUSED_ROLES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


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


RELIABILITY = ("across", "within", "block")  # its arrays, as they are stored


@dataclass(frozen=True, kw_only=True, eq=False)  # eq of arrays is an array
class Reliability:
    """How much of the products between options of different linears is to be believed: the rest is the probe's chance.

    Between blocks it is across_i across_j of what was measured; within one, within_i within_j more.
    """

    across_O: np.ndarray
    within_O: np.ndarray
    block_O: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
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
    reliability: Reliability | None = None  # None: not known, everything is believed

    def arrays(self) -> dict[str, np.ndarray]:
        """What lies apart from the JSON."""
        known = {"gram": self.gram_OO, "linear": self.linear_O}
        if self.reliability is not None:
            known |= {name: getattr(self.reliability, f"{name}_O") for name in RELIABILITY}
        return known

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
                    f"{scheme.code_bits(spec.shape):g}": float(f"{loss:.6g}")
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
            reliability = None
            if "across" in arrays:
                reliability = Reliability(**{f"{name}_O": arrays[name] for name in RELIABILITY})
            quadratic = Quadratic(gram_OO=arrays["gram"], linear_O=arrays["linear"], reliability=reliability, **known)
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
        self.scheme.widths(sizes)  # the groups it names must be those of the shape

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
        code_bits = sum(linear.scheme.code_bits(linear.shape) * linear.num_weights for linear in self.linears.values())
        return code_bits / self.num_weights

    @property
    def layout_version(self) -> int:
        """The first layout that can store all of it."""
        return max(linear.scheme.layout_version for linear in self.linears.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "llmmpq-plan",
            "layout_version": self.layout_version,
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
        layout_version = check_layout_version(data.get("layout_version"))
        entries = data.get("linears")
        if not isinstance(entries, Mapping) or not entries:
            raise CheckpointError("the plan's 'linears' must map names to schemes, and must not be empty")
        linears = {name: _read_planned(name, entry) for name, entry in entries.items()}
        refuse_newer_schemes({f"plan entry {name}": linear.scheme for name, linear in linears.items()}, layout_version)
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
    """Exactly what is on disk for one linear; tensors that its scheme does not store are None."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    order: torch.Tensor | None = None
    scale_base: torch.Tensor | None = None
    scheme: Scheme
    shape: tuple[int, int]

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {"words": self.words, "scales": self.scales, "zeros": self.zeros}
        named |= {"order": self.order, "scale_base": self.scale_base}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]) -> PackedTensor:
        """The inverse of `tensors`."""
        return cls(**{"zeros": None, **tensors}, scheme=scheme, shape=shape)  # type: ignore[arg-type]
