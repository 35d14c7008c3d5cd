"""What a run should do: YAML in, frozen dataclasses out, every value checked when built.

A recipe is data only: no code, no dotted paths to import, safe-loaded YAML. One generic check reads the
annotations of the dataclasses below (types, `Literal` choices, `Rule`s), so that a new knob is one line here and
nothing else. A schema library was rejected: it would be a dependency of `llmmpq --help` for a hundred lines of work.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from fractions import Fraction
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from llmmpq.errors import RecipeError
from llmmpq.scheme import LARGEST_GROUP

DEFAULT_AVG_BITS = 3.5
BUDGET_KINDS = ("avg_bits", "bits", "max_size", "fit_vram")
SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Rule:
    """A condition beyond the type. `says` continues the sentence "allowed: a whole number ..."."""

    says: str
    holds: Callable[[Any], bool]


def parse_size(text: str) -> int:
    """Bytes of '5GB' (5e9), '5GiB' (5 * 2**30), '200MB' or '1000000'."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", text, flags=re.ASCII)
    unit = SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or (nbytes := int(Fraction(match[1]) * unit)) < 1:
        raise RecipeError(f"size {text!r} is not understood; allowed: sizes such as 5GB, 4.5GiB, 200MB or 1000000")
    return nbytes


def _is_size(text: str) -> bool:
    try:
        return parse_size(text) > 0
    except RecipeError:
        return False


NonEmpty = Annotated[str, Rule("that is not empty", lambda text: bool(text.strip()))]
Positive = Annotated[int, Rule("of at least 1", lambda number: number >= 1)]
NotNegative = Annotated[int, Rule("of at least 0", lambda number: number >= 0)]
GroupSize = Annotated[int, Rule(f"from 1 to {LARGEST_GROUP}", lambda number: 1 <= number <= LARGEST_GROUP)]
Threads = Annotated[int, Rule("from 1 to 1024", lambda number: 1 <= number <= 1024)]
Window = Annotated[int, Rule("of at least 2", lambda number: number >= 2)]  # one token to read, one to predict
SEED_RULE = Rule("from 0 to 2**63 - 1", lambda number: 0 <= number < 2**63)  # what torch's generator takes
Seed = Annotated[int, SEED_RULE]
Size = Annotated[str, Rule("such as 5GB, 4.5GiB, 200MB or 1000000", _is_size)]
Device = Annotated[str, Rule("such as auto, cpu or cuda:1", re.compile(r"[a-z]+(:[0-9]+)?").fullmatch)]
AvgBits = Annotated[float, Rule("above 0 and at most 16", lambda number: 0 < number <= 16)]
Width = Literal[2, 3, 4, 8]
Widths = Annotated[tuple[Width, ...], Rule("(at least one, none twice)", lambda w: 0 < len(w) == len(set(w)))]
ProfileBits = Annotated[float, Rule("above 2 and below 8", lambda number: 2 < number < 8)]
Profiles = Annotated[tuple[ProfileBits, ...], Rule("(none twice)", lambda p: len(p) == len(set(p)))]
Algorithm = Literal["gptq", "rtn"]


class _Checked:
    """Checks every field against its annotation when built."""

    def __post_init__(self) -> None:
        for name, annotation in _annotations(type(self)).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, _accept(value, annotation))
            except ValueError:
                raise RecipeError(f"{name} is {_seen(value)}; allowed: {_describe(annotation)}") from None


@dataclass(frozen=True, kw_only=True)
class Budget(_Checked):
    """Of `BUDGET_KINDS` at most one is set; with none, `Recipe.resolve` asks for 3.5 bits."""

    avg_bits: AvgBits | None = None  # true bits per weight of the quantized linears, scales and zeros included
    bits: Width | None = None  # the same width everywhere
    max_size: Size | None = None  # of all files of weights on disk
    fit_vram: Size | None = None  # weights, KV cache and a margin for the runtime
    context: Positive = 8192  # for fit_vram: tokens of each sequence in the KV cache
    sequences: Positive = 1  # for fit_vram: sequences that run at the same time

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {kind: value for kind in BUDGET_KINDS if (value := getattr(self, kind)) is not None}
        if len(given) > 1:
            seen = " and ".join(f"{kind} is {value}" for kind, value in given.items())
            raise RecipeError(f"{seen}; allowed: one of them, not {'both' if len(given) == 2 else 'all'}")

    @property
    def kind(self) -> str | None:
        return next((kind for kind in BUDGET_KINDS if getattr(self, kind) is not None), None)

    @property
    def label(self) -> str:
        """What names a file or folder made for this budget: 3.5bit, 5.5GB, 24GB-vram."""
        if self.max_size is not None:
            return "".join(self.max_size.split())
        if self.fit_vram is not None:
            return "".join(self.fit_vram.split()) + "-vram"
        bits = self.avg_bits if self.bits is None else self.bits
        return f"{DEFAULT_AVG_BITS if bits is None else bits:.10g}bit"


@dataclass(frozen=True, kw_only=True)
class Calibration(_Checked):
    source: NonEmpty = "auto"  # auto | builtin | self | a path | hf:DATASET[/CONFIG][:SPLIT][:COLUMN]
    tokens: Positive = 16384
    window: Window = 2048
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Measurement(_Checked):
    tokens: Positive = 4096  # of the probe: text of the same source that the candidates were not calibrated on
    quantizer: Algorithm = "gptq"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32, which resolves 8-bit candidates
    memory: Size = "8GB"  # for the states of all candidates; beyond it they wait on disk

    @property
    def memory_nbytes(self) -> int:
        return parse_size(self.memory)


@dataclass(frozen=True, kw_only=True)
class Allocation(_Checked):
    method: Literal["iqp", "additive", "local", "uniform", "pairs"] = "iqp"
    refine: Annotated[int, Rule("from 0 to 10", lambda number: 0 <= number <= 10)] = 0  # measured again around the plan
    target_gap: Annotated[float, Rule("from 0 to 1", lambda number: 0 <= number <= 1)] = 0.001
    widths: Widths = (2, 3, 4, 8)
    profiles: Profiles = (2.5, 3.5)  # mean bits of matrices whose groups have two of the widths
    layer_only: bool = False  # one width for each matrix, whatever the profiles
    head_bits: Literal["auto", 2, 3, 4, 8] | None = None  # of an untied output head; auto: chosen; null: 16 bits
    fuse: bool = False  # q/k/v and gate/up agree
    pins: Mapping[NonEmpty, Width] = field(default_factory=dict)  # pattern, see patterns.py -> width
    time_limit_s: Annotated[float, Rule("above 0", lambda number: number > 0)] = 60.0


@dataclass(frozen=True, kw_only=True)
class Quantizer(_Checked):
    algorithm: Algorithm = "gptq"
    group_size: GroupSize = 64
    symmetric: bool = False
    scale_dtype: Literal["float16", "float8"] = "float8"
    damping: Annotated[float, Rule("from 0 to 1", lambda number: 0 <= number <= 1)] = 0.01
    activation_order: bool = True
    sequential: bool = True
    correction: Annotated[float, Rule("from 0 to 1", lambda number: 0 <= number <= 1)] = 0.5  # of the error coming in
    correction_of: Literal["stream", "layer"] = "stream"  # the error where an output is added, or of the output alone
    column_block: Positive = 128
    sweeps: Annotated[int, Rule("from 0 to 100", lambda number: 0 <= number <= 100)] = 3  # of descent after GPTQ
    shape_errors: bool = True  # across the rows of a matrix: away from what changes the model's output
    rotate: bool = False  # turn the residual stream, exactly, so that the weights that meet it are flatter
    tune: NotNegative = 0  # steps in which all linears of a block are tuned together, after they were quantized
    tune_metric: Literal["output", "plain"] = "output"  # of the block's error: by its effect on the model, or as it is


@dataclass(frozen=True, kw_only=True)
class Output(_Checked):
    max_shard_size: Size = "5GB"
    keep: tuple[NonEmpty, ...] = ()  # patterns, see patterns.py, of linears that stay at 16 bits

    @property
    def max_shard_nbytes(self) -> int:
        return parse_size(self.max_shard_size)


@dataclass(frozen=True, kw_only=True)
class Run(_Checked):
    device: Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    activations: Literal["device", "host"] = "device"
    batch: Positive = 1  # sequences per forward
    threads: Threads | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe(_Checked):
    model: NonEmpty | None = None
    revision: NonEmpty | None = None
    budget: Budget = field(default_factory=Budget)
    calibration: Calibration = field(default_factory=Calibration)
    measurement: Measurement = field(default_factory=Measurement)
    allocation: Allocation = field(default_factory=Allocation)
    quantizer: Quantizer = field(default_factory=Quantizer)
    output: Output = field(default_factory=Output)
    run: Run = field(default_factory=Run)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None, *, source: str = "recipe") -> Recipe:
        """Missing keys take their defaults. `source` is what errors call the data, for example its file."""
        recipe: Recipe = _build(cls, data, source=source, prefix="")
        return recipe

    def override(self, changes: Mapping[str, Any], *, source: str = "command line") -> Recipe:
        """A recipe with dotted keys replaced; setting one kind of budget clears the others."""
        data = self.to_dict()
        if any(changes.get(f"budget.{kind}") is not None for kind in BUDGET_KINDS):
            data["budget"] |= dict.fromkeys(BUDGET_KINDS)
        for dotted, value in changes.items():
            section, _, key = dotted.partition(".")
            if key and isinstance(data.get(section), dict):
                data[section][key] = value
            else:
                data[dotted] = value
        return Recipe.from_dict(data, source=source)

    def resolve(self) -> Recipe:
        """The recipe with a budget: 3.5 bits when it names none."""
        if self.budget.kind is None:
            return dataclasses.replace(self, budget=dataclasses.replace(self.budget, avg_bits=DEFAULT_AVG_BITS))
        return self

    def to_dict(self) -> dict[str, Any]:
        return {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}

    def to_yaml(self) -> str:
        """Every knob, in the order of the classes above; loading it gives an equal recipe."""
        # Escapes beyond ASCII: with allow_unicode PyYAML writes U+0085 bare, and reads it back as a space.
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=False)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A packaged recipe by its bare name, anything with a folder or a .yaml/.yml ending as a file."""
    path, packaged = Path(name_or_path), _packaged()
    if str(name_or_path) in packaged:
        file, source = packaged[str(name_or_path)], f"recipe {name_or_path}"
    elif path.is_file():
        file, source = path, str(path)
    else:
        raise RecipeError(
            f"recipe {str(name_or_path)!r} is neither a file nor a packaged recipe; packaged are: {', '.join(packaged)}"
        )
    try:
        data = yaml.load(file.read_bytes().decode("utf-8"), Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    return Recipe.from_dict(data, source=source)


def _packaged() -> dict[str, Traversable]:
    checkout = Path(__file__).parent.parent / "recipes"
    try:
        folder: Traversable = files("llmmpq.recipes")
    except ModuleNotFoundError:
        folder = checkout
    found = {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def _build(kind: type[Any], data: Any, *, source: str, prefix: str) -> Any:
    annotations = _annotations(kind)
    data = {} if data is None else data  # a section whose every line is commented out
    if not isinstance(data, Mapping):
        where = prefix.removesuffix(".") or "the recipe"
        raise RecipeError(f"{source}: {where} is {_seen(data)}; allowed: a mapping with {', '.join(annotations)}")
    values = {}
    for key, value in data.items():
        if key not in annotations:
            unknown = f"{prefix}{key}"
            raise RecipeError(
                f"{source}: unknown key {unknown!r}; the nearest valid key is {_nearest(unknown)!r}. "
                f"{prefix.removesuffix('.') or 'The top level'} takes: {', '.join(annotations)}"
            )
        nested = dataclasses.is_dataclass(annotations[key])
        values[key] = _build(annotations[key], value, source=source, prefix=f"{key}.") if nested else value
    try:
        return kind(**values)
    except RecipeError as error:
        raise RecipeError(f"{source}: {prefix}{error}") from None


def _annotations(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _nearest(unknown: str) -> str:
    """Alike as a whole or in the last part: `tokens` at the top level leads to `calibration.tokens`."""
    known = list(_annotations(Recipe))
    for name, annotation in _annotations(Recipe).items():
        if dataclasses.is_dataclass(annotation):
            known += [f"{name}.{key}" for key in _annotations(annotation)]

    def likeness(key: str) -> float:
        pairs = ((unknown, key), (unknown.rpartition(".")[2], key.rpartition(".")[2]))
        return sum(SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(known, key=likeness)


def _accept(value: Any, annotation: Any) -> Any:
    """The value in its stored form; ValueError when the annotation does not allow it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if annotation == Size and type(value) is int:  # YAML reads a plain number of bytes as a number
            value = str(value)
        accepted = _accept(value, args[0])
        if all(rule.holds(accepted) for rule in args[1:]):
            return accepted
    elif origin in (Union, types.UnionType):
        return None if value is None else _accept(value, args[0])
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):  # 2.0 and True are no widths
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(_accept(item, args[0]) for item in value)
    elif origin is Mapping and isinstance(value, Mapping):
        return {_accept(key, args[0]): _accept(item, args[1]) for key, item in value.items()}
    elif annotation is float:
        # Also false for nan, inf, and an int too long for a double.
        if type(value) in (int, float) and abs(value) < 1e300:
            return float(value)
    elif type(value) is annotation:
        return value
    raise ValueError


def _describe(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([_describe(args[0]), *(rule.says for rule in args[1:])])
    if origin in (Union, types.UnionType):
        return f"{_describe(args[0])}, or null"
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list, each item {_describe(args[0])}"
    if origin is Mapping:
        return f"a mapping from {_describe(args[0])} to {_describe(args[1])}"
    plain = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return plain.get(annotation) or annotation.__name__


def _seen(value: Any) -> str:
    kind = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    # reprlib bounds every level: YAML aliases can make a small file print as gigabytes.
    shown = reprlib.repr(value)
    shown = shown if len(shown) <= 100 else f"{shown[:96]} ..."
    return f"{shown} ({kind.get(type(value)) or type(value).__name__})"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice: YAML forbids it, PyYAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as a number."""


for _tool in (_Loader, _Dumper):
    # PyYAML follows YAML 1.1, where 1e-2 is text; people mean the number.
    _tool.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
