"""An opened model and the recipe's choices made concrete: the common start of every verb."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmmpq import __version__
from llmmpq.allocate.problem import match_pins
from llmmpq.errors import CheckpointError, RecipeError
from llmmpq.model.checkpoint import TORCH_DTYPES, Checkpoint
from llmmpq.model.skeleton import Skeleton, build_skeleton, untied
from llmmpq.model.source import companion_files, is_hub_name, resolve_model
from llmmpq.model.tokens import TokenWindows, advise_num_tokens, load_tokens, split_windows
from llmmpq.ranks import ALONE, Ranks
from llmmpq.recipe import Recipe
from llmmpq.records import LinearSpec, Scheme
from llmmpq.scheme import runs_at


@dataclass(frozen=True, kw_only=True)
class Session:
    """Everything a stage needs besides the calibration tokens."""

    recipe: Recipe  # resolved: nothing in it says auto, but the calibration source
    folder: Path
    checkpoint: Checkpoint
    skeleton: Skeleton
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks = ALONE

    def options(self) -> dict[str, tuple[Scheme, ...]]:
        """The schemes each linear may take, in rising order of bits; pins may add a width to a linear."""
        allocation, head = self.recipe.allocation, self.skeleton.head
        pinned = match_pins(self.skeleton.linears, self.pins())

        def unit(spec: LinearSpec) -> str:
            return spec.fused_set if allocation.fuse else spec.name

        added: dict[str, set[int]] = {}
        for spec in self.skeleton.linears:
            if spec.name in pinned:
                added.setdefault(unit(spec), set()).add(pinned[spec.name])
        options = {
            spec.name: self._schemes(spec, {*allocation.widths, *added.get(unit(spec), ())})
            for spec in self.skeleton.linears
        }
        if head is not None and head.name in pinned:  # the largest of all: no width is tried that cannot be taken
            options[head.name] = (self.scheme(pinned[head.name]),)
        return options

    def pins(self) -> dict[str, int]:
        """The recipe's, and the head's width where it is fixed."""
        allocation, head = self.recipe.allocation, self.skeleton.head
        if head is None or not isinstance(allocation.head_bits, int):
            return dict(allocation.pins)
        return {**allocation.pins, head.name: allocation.head_bits}

    def _schemes(self, spec: LinearSpec, widths: set[int]) -> tuple[Scheme, ...]:
        """One width for the whole matrix, or groups of two neighbouring widths, in rising order of their mean."""
        allocation, num_groups = self.recipe.allocation, self.scheme(8).num_groups(spec.shape[1])
        profiles = () if allocation.layer_only else allocation.profiles
        runs = {runs_at(average, num_groups, sorted(allocation.widths)) for average in profiles} - {()}
        mixed = [dataclasses.replace(self.scheme(8), bits=None, runs=one) for one in runs]
        # Options are told apart by their mean: where a pin adds the width that a mixture comes to, the width it is.
        mixed = [scheme for scheme in mixed if scheme.code_bits(spec.shape) not in widths]
        schemes = [*(self.scheme(bits) for bits in widths), *mixed]
        return tuple(sorted(schemes, key=lambda scheme: scheme.code_bits(spec.shape)))

    def scheme(self, bits: int) -> Scheme:
        quantizer = self.recipe.quantizer
        return Scheme(
            bits=bits,
            group_size=quantizer.group_size,
            symmetric=quantizer.symmetric,
            scale_dtype=quantizer.scale_dtype,
        )

    @property
    def measuring_dtype(self) -> torch.dtype:
        """Of everything that is measured by the model's output."""
        name = self.recipe.measurement.dtype
        chosen: torch.dtype = torch.float32 if name == "auto" else getattr(torch, name)
        return chosen

    @property
    def hidden_size(self) -> int:
        return int(self.skeleton.model.config.get_text_config().hidden_size)

    def source_files(self) -> list[Path]:
        return [*self.checkpoint.files, self.folder / "config.json", *companion_files(self.folder)]

    def numerics(self) -> dict[str, Any]:
        """What, besides the inputs, decides the last bit of a result."""
        shared = {"processes": self.ranks.num} if self.ranks.num > 1 else {}
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.recipe.run.batch,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "llmmpq": __version__,
            **shared,
        }

    def max_window(self) -> int | None:
        longest = getattr(self.skeleton.model.config.get_text_config(), "max_position_embeddings", None)
        return longest if isinstance(longest, int) and longest > 0 else None

    def tokens(self, drawn: TokenWindows | None = None) -> Tokens:
        """What to calibrate on, and apart from it the probe; from the recipe's source unless windows are given."""
        calibration, probe = split_windows(drawn or self._drawn(), probe_share=self._probe_share())
        advice = advise_num_tokens(calibration.num_tokens, self.skeleton.widest_in_features)
        notes = calibration.notes if advice is None else (*calibration.notes, advice)
        return Tokens(calibration=dataclasses.replace(calibration, notes=notes), probe=probe)

    def _drawn(self) -> TokenWindows:
        recipe = self.recipe
        window, wanted = recipe.calibration.window, (recipe.calibration.tokens, recipe.measurement.tokens)
        return load_tokens(
            load_tokenizer(self.folder),
            source=recipe.calibration.source,
            # Whole windows of both, so that neither takes from the other.
            num_tokens=sum(max(1, num // window) * window for num in wanted),
            window=window,
            seed=recipe.calibration.seed,
            max_window=self.max_window(),
            vocab_size=self.skeleton.model.config.get_text_config().vocab_size,
        )

    def _probe_share(self) -> float:
        probe, calibration = self.recipe.measurement.tokens, self.recipe.calibration.tokens
        return probe / (probe + calibration)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Calibration windows, and those of the probe: drawn together, held apart."""

    calibration: TokenWindows
    probe: TokenWindows

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.calibration.notes, *self.probe.notes)


def open_session(recipe: Recipe, *, ranks: Ranks = ALONE) -> Session:
    recipe = recipe.resolve()
    if recipe.model is None:
        raise RecipeError("no MODEL: name a folder, a Hub id or 'demo' on the command line or as 'model' in the recipe")
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    folder = resolve_model(recipe.model, revision=recipe.revision)
    checkpoint = Checkpoint.open(folder)
    with_head = recipe.allocation.head_bits is not None
    rotate = recipe.quantizer.rotate  # the gain of the last norm goes into the head, and not into the embedding
    if rotate:
        checkpoint = untied(folder, checkpoint)
    skeleton = build_skeleton(folder, checkpoint, keep=recipe.output.keep, with_head=with_head, untie=rotate)
    device = pick_device(recipe.run.device, ranks=ranks)
    dtype = _pick_dtype(recipe.run.dtype, device, skeleton)
    # With several processes each has a device of its own: none of them is the run's.
    device_name = str(device) if ranks.num == 1 else device.type
    resolved: dict[str, Any] = {"run.device": device_name, "run.dtype": str(dtype).removeprefix("torch.")}
    if device.type == "cpu":
        resolved["run.threads"] = torch.get_num_threads()  # sums in another order end in other bits
    if is_hub_name(recipe.model):
        resolved["revision"] = folder.name  # the commit that the name stood for
    recipe = recipe.override(resolved, source="resolved recipe")
    return Session(
        recipe=recipe,
        folder=folder,
        checkpoint=checkpoint,
        skeleton=skeleton,
        device=device,
        dtype=dtype,
        ranks=ranks,
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer file makes transformers raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder} has no tokenizer that can be loaded: {reason}") from None
    return tokenizer


def pick_device(name: str, *, ranks: Ranks = ALONE) -> torch.device:
    """With several processes: the process's own device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"run.device {name!r} is no device torch knows; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"run.device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise RecipeError(f"run.device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here")
    return device if ranks.num == 1 or device.type == "cpu" else _own_device(device, ranks)


def _own_device(device: torch.device, ranks: Ranks) -> torch.device:
    if device.index is not None:
        raise RecipeError(
            f"run.device is '{device}', but {ranks.num} processes need one device each: give auto or cuda"
        )
    if ranks.local_num > torch.cuda.device_count():
        raise RecipeError(
            f"{ranks.local_num} processes on this machine need one CUDA device each, torch sees "
            f"{torch.cuda.device_count()} here: start fewer, or give --device cpu"
        )
    own = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(own)
    return own


def _pick_dtype(name: str, device: torch.device, skeleton: Skeleton) -> torch.dtype:
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    stored = TORCH_DTYPES[skeleton.linears[0].dtype]
    # 16-bit arithmetic is slow and coarse on most CPUs; on a GPU the model's own dtype is what it was trained in.
    return stored if device.type != "cpu" else torch.float32
