"""Which weights of a model read its residual stream, and which are added to it: what a rotation of the stream changes.

Found by running it, not by names. A norm of the stream takes the block's input, or that with the output of a linear
added to it; the linears that take such a norm's output read the stream, those whose output is added write it. Norms
must scale each state by its size and by a gain for each channel, nothing else: then a turned state leaves a norm
without gain as the turned output, and the gain can move into the linears behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmmpq.errors import UnsupportedModelError
from llmmpq.model.around import Around
from llmmpq.model.stream import Block

NO_GAIN = (1.0, 0.0)  # what a norm's weight holds for a gain of one: some models store the gain, others gain - 1
SAME = 1e-4  # of what is compared
ROUNDING = 1e-6  # of the stream, where something small is added to it in float32


@dataclass(frozen=True, kw_only=True)
class Residual:
    """By the names of the model's state dict."""

    readers: Mapping[str, str]  # weight -> the norm in front of it
    writers: tuple[str, ...]  # weights and biases: their outputs are added to the stream
    embeddings: tuple[str, ...]  # their rows are states
    norms: Mapping[str, float]  # weight -> what it holds for a gain of one

    def __or__(self, other: Residual) -> Residual:
        return Residual(
            readers={**self.readers, **other.readers},
            writers=(*self.writers, *other.writers),
            embeddings=(*self.embeddings, *other.embeddings),
            norms={**self.norms, **other.norms},
        )

    def renamed(self, names: Mapping[str, str]) -> Residual:
        """By other names: those of the tensors as they are stored."""
        return Residual(
            readers={names[weight]: names[norm] for weight, norm in self.readers.items()},
            writers=tuple(names[weight] for weight in self.writers),
            embeddings=tuple(names[weight] for weight in self.embeddings),
            norms={names[weight]: value for weight, value in self.norms.items()},
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "readers": dict(self.readers),
            "writers": list(self.writers),
            "embeddings": list(self.embeddings),
            "norms": dict(self.norms),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Residual:
        return cls(
            readers=data["readers"],
            writers=tuple(data["writers"]),
            embeddings=tuple(data["embeddings"]),
            norms=data["norms"],
        )


@torch.no_grad()
def residual_of(block: Block) -> Residual:
    """Of one block, whose linears must all be among `block.linears`."""
    state = block.states[0].to(block.device)
    with _watched(block.module, state.shape[-1]) as seen:
        leaving = block.call(state.clone())
    places = [*(entering for entering, _ in seen.norms.values()), leaving]
    stream, writers = [state], []
    for name, (_, output) in seen.linears.items():
        place = next((place for place in places if any(_is_sum(place, known, output) for known in stream)), None)
        if place is not None:
            stream.append(place)
            writers.append(name)
    on_stream = [norm for norm, (entering, _) in seen.norms.items() if any(_same(entering, known) for known in stream)]
    readers = {}
    for name, (entering, _) in seen.linears.items():
        for norm in on_stream:
            if _same(seen.norms[norm][1], entering):
                readers[f"{block.name}.{name}.weight"] = f"{block.name}.{norm}.weight"
    if not readers or not _same(stream[-1], leaving):
        what = "no linear reads it behind a norm" if not readers else "it is not made of linears' outputs alone"
        raise UnsupportedModelError(
            f"{block.name}: its residual stream cannot be rotated: {what} (norms must have a gain for each channel and "
            "nothing else, and nothing may come between a layer's output and the stream). Leave out --rotate."
        )
    return Residual(
        readers=readers,
        writers=tuple(
            f"{block.name}.{name}.{key}"
            for name in writers
            for key, held in block.module.get_submodule(name)._parameters.items()
            if held is not None
        ),
        embeddings=(),
        norms={
            f"{block.name}.{norm}.weight": _no_gain(block.module.get_submodule(norm), f"{block.name}.{norm}", state)
            for norm in on_stream
        },
    )


@torch.no_grad()
def residual_around(around: Around, states_BTD: torch.Tensor) -> Residual:
    """Of what lies around the blocks: embedding, last norm and output head. `embed` must have run before."""
    model = around.skeleton.model
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (
        names.get(id(module), "") for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    with _watched(model, states_BTD.shape[-1]) as seen:
        around.logits(states_BTD[:1])
        entering = seen.linears[head][0] if head in seen.linears else None
        behind = [norm for norm, (_, left) in seen.norms.items() if entering is not None and _same(left, entering)]
        if not behind or not embedding:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its residual stream cannot be rotated: no norm with a gain for each channel "
                f"and nothing else is in front of its output head {head!r}. Leave out --rotate."
            )
        norm = behind[0]
        value = _no_gain(model.get_submodule(norm), norm, states_BTD)
    return Residual(
        readers={f"{head}.weight": f"{norm}.weight"},
        writers=(),
        embeddings=(f"{embedding}.weight",),
        norms={f"{norm}.weight": value},
    )


@dataclass(frozen=True, kw_only=True)
class _Seen:
    norms: dict[str, tuple[torch.Tensor, torch.Tensor]]  # what enters and what leaves
    linears: dict[str, tuple[torch.Tensor, torch.Tensor]]  # the same


@contextmanager
def _watched(root: nn.Module, num_channels: int) -> Iterator[_Seen]:
    seen = _Seen(norms={}, linears={})
    handles = []
    for name, module in root.named_modules():
        known = seen.linears if isinstance(module, nn.Linear) else seen.norms
        if isinstance(module, nn.Linear) or _may_be_norm(module, num_channels):

            def keep(
                _module: nn.Module, args: tuple[Any, ...], output: Any, name: str = name, known: Any = known
            ) -> None:
                if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                    known[name] = (args[0].clone(), output.clone())

            handles.append(module.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _may_be_norm(module: nn.Module, num_channels: int) -> bool:
    held = {key: tensor for key, tensor in module._parameters.items() if tensor is not None}
    return not module._modules and list(held) == ["weight"] and held["weight"].shape == (num_channels,)


def _is_sum(place: torch.Tensor, state: torch.Tensor, output: torch.Tensor) -> bool:
    """Whether the place is the state with that output added, times one number: some models scale what they add."""
    if output.numel() != place.numel():
        return False
    added, output = (place.double() - state.double()).flatten(), output.double().flatten()
    factor = (added @ output) / (output @ output).clamp_min(1e-300)
    rounding = ROUNDING * float(place.norm())
    return float((added - factor * output).norm()) <= SAME * float(added.norm()) + rounding < float(added.norm())


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _no_gain(norm: nn.Module, name: str, state: torch.Tensor) -> float:
    """What the norm's weight holds for a gain of one; an error where there is no such thing."""
    generator = torch.Generator().manual_seed(0)
    sample, axis = (torch.randn(8, state.shape[-1], generator=generator).to(state) for _ in range(2))
    axis = axis[0] / axis[0].norm()
    held = norm._parameters["weight"]
    assert held is not None
    exact, as_stored = held.data, norm(sample)
    try:
        for value in NO_GAIN:
            held.data = torch.full_like(exact, value)
            plain, mirrored = norm(sample), norm(_mirror(sample, axis))
            size = float(plain.square().mean().sqrt())
            by_gain = plain * (exact + (1 - value))
            if (
                0.5 < size < 2
                and float((mirrored - _mirror(plain, axis)).abs().max()) < SAME * float(plain.abs().max())
                and float((by_gain - as_stored).abs().max()) <= SAME * float(as_stored.abs().max())
            ):
                return value
    finally:
        held.data = exact
    raise UnsupportedModelError(
        f"{name} is no norm that a rotation passes through (it does more than to scale a state by its size and by a "
        "gain for each channel): the residual stream of this model cannot be rotated. Leave out --rotate."
    )


def _mirror(states: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    return states - 2 * (states @ axis)[:, None] * axis
