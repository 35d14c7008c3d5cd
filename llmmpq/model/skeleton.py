"""A model without its weights: the module tree on the meta device, its decoder blocks, and what can be quantized.

Everything is found by structure, never by the name of a model family: the decoder blocks are the ModuleList that
holds most of the linear weights; the quantizable linears are the `nn.Linear` modules inside them. What cannot be
quantized is either an error that names the layer (kinds we may not skip) or listed with the reason it is kept. The
output head joins them on demand, as one block after the last.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from llmmpq.errors import CheckpointError, RecipeError, UnsupportedModelError
from llmmpq.model.checkpoint import TORCH_DTYPES, Checkpoint
from llmmpq.patterns import matches
from llmmpq.records import FUSED_ROLES, LinearSpec


@dataclass(frozen=True, kw_only=True)
class KeptTensor:
    """A weight that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """The meta model and what was found in it."""

    model: PreTrainedModel
    block_names: tuple[str, ...]
    linears: tuple[LinearSpec, ...]
    kept: tuple[KeptTensor, ...]
    stored_names: dict[str, str]  # name in the model's state dict -> name in the checkpoint
    ignored: tuple[str, ...]  # tensors of the checkpoint that the model does not use

    def block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.block_names[index])

    def block_linears(self, index: int) -> list[LinearSpec]:
        return [spec for spec in self.linears if spec.block == index]

    @property
    def head(self) -> LinearSpec | None:
        """The output head, where it is to be quantized."""
        return next((spec for spec in self.linears if spec.block == len(self.block_names)), None)

    @property
    def linears_by_block(self) -> list[list[LinearSpec]]:
        """Those of each block in turn; at the end the head by itself, where it is to be quantized."""
        return [self.block_linears(index) for index in range(len(self.block_names) + (self.head is not None))]

    def block_tensors(self, index: int) -> list[str]:
        """State-dict names of the stored tensors of one block."""
        prefix = self.block_names[index] + "."
        return [name for name in self.stored_names if name.startswith(prefix)]

    @property
    def readable_names(self) -> dict[str, str]:
        """Like `stored_names`, with tied weights under the name of the tensor they share."""
        tied = dict(getattr(self.model, "all_tied_weights_keys", {}))
        stored = self.stored_names
        return stored | {name: stored[source] for name, source in tied.items() if source in stored}

    @property
    def widest_in_features(self) -> int:
        return max(spec.shape[1] for spec in self.linears)


def build_skeleton(
    folder: Path, checkpoint: Checkpoint, *, keep: Sequence[str] = (), with_head: bool = False, untie: bool = False
) -> Skeleton:
    """With `untie`, weights that the model shares become tensors of their own; see `untied`."""
    model = _meta_model(folder, untie=untie)
    block_names = _find_blocks(model)
    stored_names, ignored = _match_names(model, checkpoint)
    _refuse_unsupported(model, block_names)
    head = _untied_head(model) if with_head else None
    linears, kept = _inventory(model, block_names, checkpoint, stored_names, keep, head)
    if not linears:
        raise UnsupportedModelError(f"nothing is left to quantize: every linear matches --keep {list(keep)}")
    return Skeleton(
        model=model,
        block_names=block_names,
        linears=linears,
        kept=kept,
        stored_names=stored_names,
        ignored=ignored,
    )


def untied(folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with what is stored once for several weights of the model under all their names.

    A weight that is stored beside the one it should share is taken as it is stored, as transformers does.
    """
    model = _meta_model(folder)
    stored_names, _ = _match_names(model, checkpoint)
    entries = dict(checkpoint.entries)
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if name not in stored_names:
            for missing in {name, source} - set(entries):
                entries[missing] = checkpoint.entries[stored_names[source]]
    return Checkpoint(checkpoint.folder, entries)


def locate_linears(folder: Path, names: Collection[str]) -> dict[str, tuple[int, tuple[int, int]]]:
    """Block and shape of the named linears of a quantized model, in the order of the model, from config.json alone.

    The output head, and any other linear outside the blocks, counts as one block after the last.
    """
    model = _meta_model(folder, quantized=True)
    block_names = _find_blocks(model)
    found = {}
    for name, module in model.named_modules():
        if name in names and isinstance(module, nn.Linear):
            block = next((i for i, block in enumerate(block_names) if name.startswith(block + ".")), len(block_names))
            found[name] = (block, (module.out_features, module.in_features))
    absent = sorted(set(names) - set(found))
    if absent:
        raise CheckpointError(f"{folder / 'config.json'}: 'linears' names {absent[0]!r}, which the model lacks")
    return found


def _meta_model(folder: Path, *, quantized: bool = False, untie: bool = False) -> PreTrainedModel:
    # transformers answers a damaged config with any kind of exception: whatever it is, the config is at fault.
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UnsupportedModelError(
            f"{folder / 'config.json'} describes no model that this transformers knows: {_first_line(error)} "
            "(models that bring their own code are not run; trust_remote_code is off)"
        ) from None
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not quantized:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(f"{folder} is already quantized ({method}): start from its 16-bit original")
    if untie:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    except Exception as error:
        raise UnsupportedModelError(
            f"{folder / 'config.json'} gives no causal language model: {_first_line(error)}"
        ) from None
    if untie and getattr(model, "all_tied_weights_keys", {}):
        raise UnsupportedModelError(
            f"{type(model).__name__} shares {next(iter(model.all_tied_weights_keys))} with another weight whatever its "
            "config says: leave out --rotate, which needs them apart"
        )
    model.eval()
    _fill_computed_buffers(model)
    return model


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}" if lines else type(error).__name__


def _fill_computed_buffers(model: PreTrainedModel) -> None:
    """Buffers that no checkpoint stores (rotary frequencies, embedding scales) are computed by the model itself."""
    persistent = set(model.state_dict())
    for name, module in model.named_modules():
        computed = [
            key for key in module._buffers if module._buffers[key] is not None and f"{name}.{key}" not in persistent
        ]
        if computed:
            for key in computed:
                module._buffers[key] = torch.empty_like(module._buffers[key], device="cpu")
            with torch.no_grad():
                model._init_weights(module)


def _find_blocks(model: PreTrainedModel) -> tuple[str, ...]:
    best_name, best_size, num_blocks = "", 0, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(item) for item in module}) == 1:
            linears = (item for item in module.modules() if isinstance(item, nn.Linear | Conv1D))
            size = sum(item.weight.numel() for item in linears)
            experts = sum(p.numel() for p in module.parameters() if p.dim() >= 3)
            if size + experts > best_size:
                best_name, best_size, num_blocks = name, size + experts, len(module)
    if not best_name:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder blocks with nn.Linear layers: nothing can be quantized"
        )
    return tuple(f"{best_name}.{index}" for index in range(num_blocks))


def _match_names(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[dict[str, str], tuple[str, ...]]:
    """Match checkpoint names to state-dict names by transformers' own renaming rules, and check every shape."""
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    wanted = model.state_dict()
    stored_names: dict[str, str] = {}
    ignored = []
    for stored in checkpoint.entries:
        name, converter = rename_source_key(stored, renamings, converters, model.base_model_prefix, wanted)
        if converter is not None and name in wanted:
            raise UnsupportedModelError(
                f"{name}: transformers merges or splits the stored tensor {stored!r} into another shape on loading "
                "(fused experts of mixture-of-experts models are stored so). Such layers are not supported yet."
            )
        if name not in wanted and stored in wanted:
            name = stored
        if name not in wanted:
            ignored.append(stored)
        elif tuple(wanted[name].shape) != checkpoint.entries[stored].shape:
            raise CheckpointError(
                f"tensor {stored!r} has shape {list(checkpoint.entries[stored].shape)}, but config.json asks for "
                f"{list(wanted[name].shape)}: config and weights are not of one model"
            )
        elif wanted[name].is_floating_point() and not TORCH_DTYPES[checkpoint.entries[stored].dtype].is_floating_point:
            raise CheckpointError(
                f"tensor {stored!r} is stored as {checkpoint.entries[stored].dtype}, but must be floating point "
                "(F16, BF16 or F32): start from the 16-bit original"
            )
        else:
            stored_names[name] = stored
    tied = set(model.all_tied_weights_keys) if hasattr(model, "all_tied_weights_keys") else set()
    for name, source in dict(getattr(model, "all_tied_weights_keys", {})).items():
        if source not in stored_names and name in stored_names:
            stored_names[source] = stored_names.pop(name)  # tied, and stored under the other name
    missing = [name for name in wanted if name not in stored_names and name not in tied]
    if missing:
        raise CheckpointError(
            f"the checkpoint in {checkpoint.folder} lacks {missing[0]!r} ({len(missing)} missing in all) that "
            f"{type(model).__name__} needs. Download the model again, or check that config.json belongs to it."
        )
    return {name: stored_names[name] for name in wanted if name in stored_names}, tuple(ignored)


def _refuse_unsupported(model: PreTrainedModel, block_names: Iterable[str]) -> None:
    for block_name in block_names:
        for name, module in model.get_submodule(block_name).named_modules():
            full_name = f"{block_name}.{name}"
            if isinstance(module, Conv1D):
                raise UnsupportedModelError(
                    f"{full_name} is a transformers Conv1D (GPT-2 style, weight stored transposed): not supported "
                    "yet. Only decoders whose blocks hold nn.Linear can be quantized."
                )
            if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
                raise UnsupportedModelError(
                    f"{full_name} is a {type(module).__name__} with a forward of its own: not supported yet"
                )
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 3 and not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                    raise UnsupportedModelError(
                        f"{full_name}.{key} is a tensor of shape {list(parameter.shape)} (fused experts of a "
                        "mixture-of-experts block, or another kind of layer): not supported yet"
                    )


def _untied_head(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or type(head) is not nn.Linear:
        raise UnsupportedModelError(
            f"the output head of {type(model).__name__} is {type(head).__name__}, not nn.Linear: leave out --head-bits"
        )
    tied = dict(getattr(model, "all_tied_weights_keys", {}))
    if f"{name}.weight" in {*tied, *tied.values()}:
        raise UnsupportedModelError(
            f"{name} shares its weights with the embedding, which is read row by row and stays at 16 bits: leave out "
            "--head-bits"
        )
    return name


def _inventory(
    model: PreTrainedModel,
    block_names: Sequence[str],
    checkpoint: Checkpoint,
    stored_names: dict[str, str],
    keep: Sequence[str],
    head: str | None,
) -> tuple[tuple[LinearSpec, ...], tuple[KeptTensor, ...]]:
    linears: list[LinearSpec] = []
    kept_by_pattern: set[str] = set()
    matched: set[str] = set()
    for index, block_name in enumerate(block_names):
        for name, module in model.get_submodule(block_name).named_modules():
            if not isinstance(module, nn.Linear):
                continue
            full_name = f"{block_name}.{name}"
            matching = {pattern for pattern in keep if matches(pattern, full_name)}
            if matching:
                matched |= matching
                kept_by_pattern.add(f"{full_name}.weight")
                continue
            linears.append(_spec(model, full_name, checkpoint, stored_names, block=index))
    if head is not None:
        linears.append(_spec(model, head, checkpoint, stored_names, block=len(block_names)))
    unmatched = [pattern for pattern in keep if pattern not in matched]
    if unmatched:
        example = linears[0].name if linears else block_names[0]
        raise RecipeError(f"output.keep {unmatched[0]!r} matches no linear; names look like {example!r}")
    quantized = {f"{spec.name}.weight" for spec in linears}
    kept = []
    for name, stored in stored_names.items():
        if name not in quantized:
            entry = checkpoint.entries[stored]
            reason = _reason_kept(name, entry.shape, block_names, by_pattern=name in kept_by_pattern)
            kept.append(KeptTensor(name=name, shape=entry.shape, nbytes=entry.nbytes, reason=reason))
    return tuple(linears), tuple(kept)


def _spec(
    model: PreTrainedModel, name: str, checkpoint: Checkpoint, stored_names: Mapping[str, str], *, block: int
) -> LinearSpec:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    parent, _, role = name.rpartition(".")
    return LinearSpec(
        name=name,
        shape=(module.out_features, module.in_features),
        dtype=checkpoint.entries[stored_names[f"{name}.weight"]].dtype,
        block=block,
        role=role,
        fused_set=_fused_set(parent, role),
    )


def _fused_set(parent: str, role: str) -> str:
    for roles in FUSED_ROLES:
        if role in roles:
            return f"{parent}.{'+'.join(roles)}"
    return f"{parent}.{role}"


def _reason_kept(name: str, shape: tuple[int, ...], block_names: Sequence[str], *, by_pattern: bool) -> str:
    if by_pattern:
        return "named by output.keep"
    if len(shape) < 2 or math.prod(shape) == max(shape):
        return "norm, bias or other vector"
    if any(name.startswith(block_name + ".") for block_name in block_names):
        return "matrix in a block that is no nn.Linear"
    return "embedding, output head or other matrix outside the blocks"
