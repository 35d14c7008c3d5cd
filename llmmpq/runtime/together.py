"""Sibling linears with one input share a launch: q, k and v, or gate and up.

transformers calls `q_proj(x)`, `k_proj(x)`, `v_proj(x)` one by one. Hooks on their parent mark where its forward begins
and ends. Between the two the first sibling that is called multiplies with the matrices of all, and each of the others
takes its part if it is called with the same tensor object, unchanged by what torch counts as a change (`_version`), on
the same stream, and still holds the same parameters; else it multiplies alone, as everything does outside of such a
forward. Parts live no longer than that forward (one that was interrupted from the keyboard: until the thread's next),
and only its thread sees them.

A set whose parts were not all taken (another input, a sibling left out) is not put together again: it costs time. One
call alone is what remains under `torch.inference_mode`, whose tensors count no changes, under offloading, which leaves
the siblings' matrices on meta, where a gradient is needed, and where `torch.compile` traces. Modules, names of
parameters and what is saved are as without. Hooks hold names only, so that models can be copied and pickled.

Rejected: one module in place of the siblings (other names in the state dict, and code that reads `q_proj.weight`
breaks); siblings that know each other (copying one would copy all); trusting names alone (cross-attention has k and v
of another input).
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from llmmpq.runtime import ops
from llmmpq_kernels.operands import Operands


class Packed(Protocol):
    """A module that is a packed matrix."""

    _parameters: dict[str, Any]

    def operands(self) -> Operands: ...


class Source(NamedTuple):
    """The input that parts were computed from. Held weakly: a part keeps nothing else alive."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    stream: object

    @classmethod
    def of(cls, x: torch.Tensor) -> Source:
        return cls(weakref.ref(x), x._version, _stream(x))

    def is_still(self, x: torch.Tensor) -> bool:
        return self.tensor() is x and self.version == x._version and self.stream == _stream(x)


class Part(NamedTuple):
    """What one sibling is to answer."""

    source: Source
    operands: Operands
    output: torch.Tensor

    def answers(self, linear: Packed, x: torch.Tensor) -> bool:
        used, held = self.operands, linear._parameters
        return self.source.is_still(x) and all(getattr(used, name) is held[name] for name in ops.TENSORS)


class Siblings:
    """The hooks of one parent; `sets` are names of children, `apart` the sets that did not prove to be one and why."""

    def __init__(self, sets: tuple[tuple[str, ...], ...], devices: tuple[str, ...]) -> None:
        self.sets, self.devices = sets, devices
        self.apart: dict[tuple[str, ...], str] = {}

    def enter(self, parent: nn.Module, _args: object) -> None:
        if not torch.compiler.is_compiling():
            outer = _here.call
            if outer is not None and outer.parent is parent:  # left behind: an interrupt is not told to hooks
                outer = outer.outer
            _here.call = Call(self, parent, outer)

    def leave(self, parent: nn.Module, _args: object, output: object) -> None:
        if torch.compiler.is_compiling():
            return
        call = _here.call
        while call is not None and call.parent is not parent:
            call = call.outer
        if call is not None:
            _here.call = call.outer
            if output is not None:  # after an error there is none, and who was not called yet proves nothing
                call.close()


class Call:
    """One forward of a parent, inside that of an `outer` one or none, and the parts that lie ready in it."""

    def __init__(self, siblings: Siblings, parent: nn.Module, outer: Call | None) -> None:
        self.siblings, self.parent, self.outer = siblings, parent, outer
        self.begun: set[tuple[str, ...]] = set()
        self.parts: dict[Packed, Part] = {}

    def multiply(self, linear: Packed, x: torch.Tensor) -> torch.Tensor | None:
        """The product, or None: then the matrix multiplies alone."""
        part = self.parts.pop(linear, None)
        if part is not None:
            if part.answers(linear, x):
                return part.output
            self._set_apart(linear, "was called with another input than its siblings")
            return None
        if x.device.type not in self.siblings.devices:
            return None
        names, members = self._set_of(linear)
        if not names or names in self.begun or names in self.siblings.apart or x.is_inference():
            return None
        self.begun.add(names)
        if len(set(members)) < len(members) or any(type(each) is not type(linear) for each in members):
            return None
        operands = [each.operands() for each in members]
        outputs = ops.multiply_together(x, operands)
        if outputs is None:
            return None
        source = Source.of(x)
        parts = map(Part, [source] * len(members), operands, outputs)
        self.parts.update(zip(members, parts, strict=True))
        return self.parts.pop(linear).output

    def close(self) -> None:
        for linear in self.parts:
            self._set_apart(linear, "was not called with its siblings")

    def _set_of(self, linear: Packed) -> tuple[tuple[str, ...], list[Any]]:
        children = self.parent._modules
        for names in self.siblings.sets:
            members = [children.get(name) for name in names]
            if any(each is linear for each in members):
                return names, members
        return (), []

    def _set_apart(self, linear: Packed, reason: str) -> None:
        names, members = self._set_of(linear)
        if names:
            place = next(place for place, each in enumerate(members) if each is linear)
            self.siblings.apart.setdefault(names, f"{names[place]} {reason}")


class _Here(threading.local):
    """The forward that this thread is in."""

    call: Call | None = None


_here = _Here()


def multiply(linear: Packed, x: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T + bias`, with the siblings of the linear where that pays. For callers whom nobody traces."""
    call = _here.call
    if call is not None:
        output = call.multiply(linear, x)
        if output is not None:
            return output
    return ops.multiply(x, linear.operands())


def put_together(
    model: nn.Module, kind: type[nn.Module], roles: tuple[tuple[str, ...], ...], devices: tuple[str, ...]
) -> None:
    """Let children of `kind` that lie side by side under the names of a set share launches on such devices."""
    separate(model)
    if not devices:
        return
    for parent in model.modules():
        present = [tuple(name for name in names if isinstance(parent._modules.get(name), kind)) for names in roles]
        sets = tuple(names for names in present if len(names) > 1)
        if sets:
            siblings = Siblings(sets, devices)
            parent.register_forward_pre_hook(siblings.enter)
            parent.register_forward_hook(siblings.leave, always_call=True)


def separate(model: nn.Module) -> None:
    """Undo `put_together`."""
    for parent in model.modules():
        for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Siblings):
                    del hooks[key]
                    parent._forward_hooks_always_called.pop(key, None)


def _stream(x: torch.Tensor) -> object:
    return torch.cuda.current_stream(x.device) if x.is_cuda else None
