"""The model around its blocks: what turns tokens into states, and what turns states into logits.

Both sides are run by the model itself with its blocks silenced: on the way in the first block's input and every
block's other arguments (masks, rotary tables, layer kinds) are recorded exactly as the model passes them; on the way
out the last block hands over the states it is given. So no architecture needs code of its own. Weights outside the
blocks are read when their module is first called and freed when the context ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmmpq.errors import UnsupportedModelError
from llmmpq.model.skeleton import Skeleton

Loader = Callable[[nn.Module, list[str], str], None]


class EnoughSeenError(Exception):
    """Raised inside the model's forward to end it where the blocks begin or end."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the model passes a block besides the hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def broadcast_to(self, other: Arguments) -> bool:
        """Whether these, recorded for one sequence, do for the batch that `other` was recorded for."""
        return _broadcasts(self.positional, other.positional) and _broadcasts(self.named, other.named)

    def cast(self, dtype: torch.dtype) -> Arguments:
        return Arguments(positional=_cast(self.positional, dtype), named=_cast(self.named, dtype))


class Around:
    """A context in which the blocks of a skeleton are silent. `load` puts weights into a module."""

    def __init__(self, skeleton: Skeleton, load: Loader) -> None:
        self.skeleton = skeleton
        self.blocks = [skeleton.block(index) for index in range(len(skeleton.block_names))]
        self.arguments: list[dict[int, Arguments]] = [{} for _ in self.blocks]
        self._load = load
        self._loaded: dict[str, nn.Module] = {}
        self._handles: list[Any] = []
        self._state: torch.Tensor | None = None
        self._final: torch.Tensor | None = None
        self._returns_tuple = False
        self._wrong_return = False

    def __enter__(self) -> Around:
        model = self.skeleton.model
        for index, block in enumerate(self.blocks):
            block.forward = lambda *args, _index=index, **kwargs: self._seen(_index, args, kwargs)
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for name, module in model.named_modules():
            if id(module) not in inside and (module._parameters or module._buffers):
                handle = module.register_forward_pre_hook(lambda mod, _args, name=name: self._on_call(mod, name))
                self._handles.append(handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for block in self.blocks:
            del block.forward
        for handle in self._handles:
            handle.remove()
        for name, module in self._loaded.items():
            for key in module._parameters | module._buffers:
                if f"{name}.{key}" in self.skeleton.readable_names:
                    free_tensor(module, key)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The states that enter block 0; the arguments of every block are recorded on the way."""
        self._state = self._final = None
        for self._returns_tuple in (False, True):
            self._wrong_return = False
            try:
                self.skeleton.model(input_ids=ids, use_cache=False)
            except EnoughSeenError:
                pass
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
                # A block that must return a tuple breaks the model when it returns a tensor: try the other way.
                if self._returns_tuple:
                    raise UnsupportedModelError(
                        f"{type(self.skeleton.model).__name__} cannot be run up to its blocks: {error}"
                    ) from error
                self._wrong_return = True
            if not self._wrong_return:
                break
        if self._state is None:
            raise UnsupportedModelError(f"{type(self.skeleton.model).__name__} never called its decoder blocks")
        if self._wrong_return:
            raise UnsupportedModelError(
                f"{type(self.skeleton.model).__name__} changes the hidden states between its blocks: such models "
                "cannot be streamed yet"
            )
        return self._state

    def logits(self, states_BTD: torch.Tensor) -> torch.Tensor:
        """What final norm and head make of the last block's states; `embed` must have run before."""
        self._state, self._final = None, states_BTD
        ids = torch.zeros(states_BTD.shape[:2], dtype=torch.long, device=states_BTD.device)
        try:
            output: torch.Tensor = self.skeleton.model(input_ids=ids, use_cache=False).logits
        finally:
            self._final = None
        return output

    def _on_call(self, module: nn.Module, name: str) -> None:
        if name not in self._loaded:
            prefix = name + "."
            wanted = [f"{prefix}{key}" for key in module._parameters | module._buffers]
            self._load(module, [key for key in wanted if key in self.skeleton.readable_names], prefix)
            self._loaded[name] = module

    def _seen(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._final is not None:
            last = index == len(self.blocks) - 1
            return self._as_block_output(self._final if last else hidden)
        rest = Arguments(positional=args[1:], named={k: v for k, v in kwargs.items() if k != "hidden_states"})
        if index == 0:
            self._state = hidden
        assert self._state is not None
        if hidden is not self._state and not (hidden.shape == self._state.shape and torch.equal(hidden, self._state)):
            self._wrong_return = True
            raise EnoughSeenError
        known = self.arguments[index].setdefault(len(hidden), rest)
        if not _same(known.named, rest.named) or not _same(known.positional, rest.positional):
            raise UnsupportedModelError(
                f"{self.skeleton.block_names[index]} takes an argument that depends on the tokens besides the hidden "
                "states: such blocks cannot be streamed yet"
            )
        if index == len(self.blocks) - 1:
            raise EnoughSeenError
        return self._as_block_output(hidden)

    def _as_block_output(self, hidden: torch.Tensor) -> Any:
        return (hidden, None) if self._returns_tuple else hidden


def set_tensor(module: nn.Module, path: str, value: torch.Tensor) -> None:
    parent_path, _, key = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    if key in parent._parameters:
        parent._parameters[key] = nn.Parameter(value, requires_grad=False)
    else:
        parent._buffers[key] = value


def free_tensor(module: nn.Module, path: str) -> None:
    parent_path, _, key = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    held = (parent._parameters if key in parent._parameters else parent._buffers)[key]
    assert held is not None
    set_tensor(module, path, held.data.to("meta"))


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, tuple | list):
        return type(first) is type(second) and len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(_same(first[k], second[k]) for k in first)
        )
    return type(first) is type(second)


def _broadcasts(one: Any, many: Any) -> bool:
    if isinstance(one, torch.Tensor):
        if not isinstance(many, torch.Tensor) or one.dim() != many.dim() or one.shape[1:] != many.shape[1:]:
            return False
        return len(one) in (1, len(many)) and torch.equal(one.expand_as(many), many)
    if isinstance(one, tuple | list):
        return type(one) is type(many) and len(one) == len(many) and all(map(_broadcasts, one, many))
    if isinstance(one, dict):
        return isinstance(many, dict) and one.keys() == many.keys() and all(_broadcasts(one[k], many[k]) for k in one)
    return type(one) is type(many)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value
