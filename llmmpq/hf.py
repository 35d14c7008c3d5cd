"""The Hugging Face face: importing this module teaches transformers to load and save llmmpq models.

    import llmmpq.hf
    model = AutoModelForCausalLM.from_pretrained(folder)    # or LlmmpqForCausalLM.from_pretrained(folder)

`LlmmpqHfQuantizer` replaces the `nn.Linear`s named in config.json by `PackedLinear` before transformers fills in the
weights. Hugging Face keeps ownership of the model code, sharding, device maps and offloading.

transformers only warns about a missing tensor and leaves that parameter uninitialised; it casts a wrong float dtype,
accepts a wrong integer dtype, and does not look at the shape of a tensor that stays on disk. So the headers of the
safetensors files are compared with the model before anything is loaded, and every difference in a packed tensor is an
error. Names are compared after transformers' own renaming: a few architectures (GPT-NeoX's head) use other names on
disk than in the module tree.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmmpq.errors import CheckpointError
from llmmpq.records import Scheme
from llmmpq.runtime.contents import checked_names, content_problems
from llmmpq.runtime.linear import STORED, PackedLinear, share_launches
from llmmpq.runtime.together import separate
from llmmpq.scheme import LAYOUT_VERSIONS, check_layout_version, refuse_newer_schemes

METHOD = "llmmpq"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
SAFETENSORS_DTYPES = {"I32": torch.int32, "F16": torch.float16, "U8": torch.uint8, "F32": torch.float32}
SCHEME_TYPES = {"bits": (int, dict), "group_size": (int,), "symmetric": (bool,), "scale_dtype": (str,)}
MAX_PROBLEMS_SHOWN = 5


class LlmmpqConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: the layout version, and the scheme of every packed linear by name."""

    def __init__(
        self,
        linears: Mapping[str, Scheme | Mapping[str, Any]] | None = None,
        layout_version: int | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if quant_method != METHOD:
            raise CheckpointError(f"quantization_config: 'quant_method' is {quant_method!r}, expected {METHOD!r}")
        version = None if layout_version is None else _checked(lambda: check_layout_version(layout_version))
        if unknown:
            raise CheckpointError(
                f"quantization_config: layout {LAYOUT_VERSIONS[-1]} does not know the key {min(unknown)!r}"
            )
        if not isinstance(linears, Mapping) or not linears:
            raise CheckpointError(
                "quantization_config: 'linears' must map the name of each packed linear to its scheme"
            )
        self.quant_method = METHOD  # type: ignore[assignment]  # the enum lists transformers' own methods only
        self.linears = {name: _read_scheme(name, linears[name]) for name in linears}
        # Nothing given: the first layout that can store them all, so that older readers take what they can.
        self.layout_version = version or max(scheme.layout_version for scheme in self.linears.values())
        named = {f"linears[{name!r}]": scheme for name, scheme in self.linears.items()}
        _checked(lambda: refuse_newer_schemes(named, self.layout_version))

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        if "layout_version" not in config_dict:
            raise CheckpointError("quantization_config lacks the key 'layout_version'")
        _checked(lambda: check_layout_version(config_dict["layout_version"]))
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "layout_version": self.layout_version,
            "linears": {name: scheme.to_json() for name, scheme in self.linears.items()},
        }

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def _checked(check: Callable[[], Any]) -> Any:
    try:
        return check()
    except CheckpointError as error:
        raise CheckpointError(f"quantization_config: {error}") from None


def _read_scheme(name: str, scheme: Scheme | Mapping[str, Any]) -> Scheme:
    if isinstance(scheme, Scheme):
        return scheme
    where = f"quantization_config: linears[{name!r}]"
    if not isinstance(scheme, Mapping):
        raise CheckpointError(f"{where} is {scheme!r}, expected a scheme with the keys bits, group_size, symmetric")
    for key, value in scheme.items():
        if key not in SCHEME_TYPES:
            raise CheckpointError(f"{where} has the key {key!r}, unknown to layout {LAYOUT_VERSIONS[-1]}")
        if type(value) not in SCHEME_TYPES[key]:
            expected = " or ".join(kind.__name__ for kind in SCHEME_TYPES[key])
            raise CheckpointError(f"{where}: {key!r} is {value!r}, expected {expected}")
    try:
        return Scheme.from_json(scheme)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None


class LlmmpqHfQuantizer(HfQuantizer):
    """What transformers calls around the loading of a model whose `quant_method` is "llmmpq"."""

    quantization_config: LlmmpqConfig

    def __init__(self, quantization_config: LlmmpqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise CheckpointError(
                "this model is not quantized, and llmmpq does not quantize while loading: run `llmmpq quantize` first"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise CheckpointError(f"llmmpq models load from .safetensors files only, got {checkpoint_files!r}")
        _replace_linears(model, self.quantization_config.linears)
        headers = _read_headers(model, checkpoint_files, quantizer=self)
        problems = _compare_headers(model, headers) or _check_contents(model, headers)
        if problems:
            more = len(problems) - MAX_PROBLEMS_SHOWN
            listed = "; ".join(problems[:MAX_PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            raise CheckpointError(f"checkpoint does not match its quantization_config: {listed}")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            # An architecture's `_keep_in_fp32_modules` may have widened the scales on their way in, without loss.
            if isinstance(module, PackedLinear) and module.scales.dtype not in (torch.float16, torch.uint8):
                module.scales = nn.Parameter(module.scales.to(torch.float16))
        share_launches(model)
        # The whole model: a packed linear cannot pass a gradient on to what lies before it.
        return model.requires_grad_(False)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
        if any(parameter.device.type == "meta" for parameter in model.parameters()):
            raise CheckpointError("cannot dequantize a model that is partly offloaded: load it with one device first")
        # save_pretrained leaves the name of the dtype in the config.
        wanted: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, packed in list(model.named_modules()):
            if isinstance(packed, PackedLinear):
                linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(packed.dequantize(wanted))
                if packed.bias is not None:
                    linear.bias = nn.Parameter(packed.bias.to(wanted))
                _set_module(model, name, linear.train(packed.training))
        separate(model)
        return model.requires_grad_(True)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _replace_linears(model: PreTrainedModel, linears: Mapping[str, Scheme]) -> None:
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if type(module) is nn.Linear]
    tied = {**model.all_tied_weights_keys, **{source: key for key, source in model.all_tied_weights_keys.items()}}
    for name, scheme in linears.items():
        linear = modules.get(name)
        if type(linear) is not nn.Linear:
            found = "no such module" if linear is None else f"a {type(linear).__name__}"
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise CheckpointError(
                f"quantization_config: linears[{name!r}] must name an nn.Linear of {type(model).__name__},"
                f" found {found}{hint}"
            )
        if f"{name}.weight" in tied:
            raise CheckpointError(
                f"quantization_config: {name!r} is packed, but config.json ties its weight to"
                f" {tied[f'{name}.weight']!r}: set tie_word_embeddings to false or leave {name!r} unpacked"
            )
        try:
            packed = PackedLinear(
                (linear.out_features, linear.in_features),
                scheme,
                has_bias=linear.bias is not None,
                bias_dtype=linear.weight.dtype,
            )
        except CheckpointError as error:
            raise CheckpointError(f"quantization_config: linears[{name!r}]: {error}") from None
        _set_module(model, name, packed)


class _Header(NamedTuple):
    key: str
    file: str
    dtype: torch.dtype | str
    shape: tuple[int, ...]
    converted: bool  # merged or split by transformers on loading, so its shape is not the parameter's


def _read_headers(model: PreTrainedModel, files: list[str], *, quantizer: HfQuantizer) -> dict[str, _Header]:
    """Every tensor of the checkpoint, by the name that transformers will give it in the model."""
    transforms = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    expected = model.state_dict()
    headers = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
                    if name not in expected and key in expected:
                        name, pattern = key, None
                    view = opened.get_slice(key)
                    dtype = SAFETENSORS_DTYPES.get(view.get_dtype(), view.get_dtype())
                    headers[name] = _Header(key, str(file), dtype, tuple(view.get_shape()), pattern is not None)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {file}: {error}") from error
    return headers


def _compare_headers(model: PreTrainedModel, headers: Mapping[str, _Header]) -> list[str]:
    """What is wrong with the checkpoint, in words: missing tensors, and packed ones that do not fit their scheme."""
    expected = model.state_dict()
    packed_names = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    problems = []
    for name in expected:
        if name not in headers and not _may_be_missing(model, name, headers):
            problems.append(f"{name} is missing")
    for name, header in headers.items():
        owner, _, leaf = name.rpartition(".")
        if name not in expected:
            if owner in packed_names or leaf in STORED:
                problems.append(f"{name} in {header.file} is not expected")
            continue
        wanted = expected[name]
        if header.shape != tuple(wanted.shape) and not header.converted:
            problems.append(f"{name} in {header.file} has shape {header.shape}, expected {tuple(wanted.shape)}")
        if owner in packed_names and leaf in STORED and header.dtype != wanted.dtype:
            problems.append(f"{name} in {header.file} is {header.dtype}, expected {wanted.dtype}")
    return problems


def _check_contents(model: PreTrainedModel, headers: Mapping[str, _Header]) -> list[str]:
    """What is wrong with the few stored numbers that must be right before a kernel sees them, in words."""
    problems = []
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and (keys := checked_names(module.scheme)):
            tensors = {}
            for key in keys:
                header = headers[f"{name}.{key}"]
                with safe_open(header.file, framework="pt") as opened:
                    tensors[key] = opened.get_tensor(header.key)
            problems += [f"{name}: {problem}" for problem in content_problems(tensors, module.scheme, module.shape)]
    return problems


def _may_be_missing(model: PreTrainedModel, name: str, headers: Mapping[str, _Header]) -> bool:
    source = model.all_tied_weights_keys.get(name, name)
    group = {source, *(key for key, other in model.all_tied_weights_keys.items() if other == source)}
    return not group.isdisjoint(headers)


class LlmmpqForCausalLM:
    """A thin door to `AutoModelForCausalLM` for llmmpq models; what comes back is the architecture's own class.

    It adds three things: importing it registers the format, anything that is not an llmmpq model is refused with a
    `CheckpointError`, and neither remote code nor pickled weights are ever loaded.
    """

    def __init__(self) -> None:
        raise TypeError("LlmmpqForCausalLM is not a model: use LlmmpqForCausalLM.from_pretrained(folder_or_repo)")

    @staticmethod
    def from_pretrained(folder_or_repo: str, **options: Any) -> PreTrainedModel:
        """Load from a folder or a Hub repository; `options` are those of `AutoModelForCausalLM.from_pretrained`."""
        for option, value in {"trust_remote_code": False, "use_safetensors": True}.items():
            if options.setdefault(option, value) is not value:
                raise CheckpointError(f"llmmpq models are loaded with {option}={value}, got {options[option]!r}")
        hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
        try:
            config, _ = PreTrainedConfig.get_config_dict(folder_or_repo, **hub_options)
            if not config:
                raise CheckpointError(f"{folder_or_repo} is not an llmmpq model: it has no config.json")
            method = (config.get("quantization_config") or {}).get("quant_method")
            if method != METHOD:
                raise CheckpointError(
                    f"{folder_or_repo} is not an llmmpq model: 'quant_method' in the quantization_config of its"
                    f" config.json is {method!r}, expected {METHOD!r}"
                )
            return AutoModelForCausalLM.from_pretrained(folder_or_repo, **options)
        except OSError as error:
            raise CheckpointError(f"cannot load {folder_or_repo}: {error}") from error


# Assigned rather than registered: transformers' decorators refuse a second registration, which a reload would be.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LlmmpqConfig
AUTO_QUANTIZER_MAPPING[METHOD] = LlmmpqHfQuantizer
