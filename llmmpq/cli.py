"""The command line: one verb per stage of a model's life, thin, with the work in `pipeline`.

Torch is imported when a verb runs, so that `--help` and a mistyped flag answer at once. Results go to stdout, progress
and errors to stderr; with --json stdout is exactly one JSON object. `main` is the only place that turns an
`LlmmpqError` into one line and exit code 2; any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import inspect as signatures
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.main import get_command

from llmmpq import __version__, tables
from llmmpq.errors import LlmmpqError, RecipeError
from llmmpq.progress import Progress, Silent, Terminal
from llmmpq.recipe import Recipe, load_recipe

EXIT_FAILED, EXIT_MISTAKE, EXIT_INTERRUPTED = 1, 2, 130  # 130: what shells report after Ctrl-C

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mixed-precision quantization of large language models: every matrix gets the bits it deserves.",
    epilog="Start with: llmmpq quantize demo --avg-bits 3.5",
)


def _option(kind: Any, *names: str, text: str, panel: str | None = None, metavar: str | None = None) -> Any:
    """A flag that is None unless it was given."""
    option = typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)
    return Annotated[kind | None, option]


BUDGET, CALIBRATION, BITS, QUANTIZER, MACHINE = "Budget", "Calibration", "Choice of bits", "Quantizer", "Machine"
DTYPE_HELP = "What to compute in: auto, float32, bfloat16 or float16."

# Parameter -> the recipe keys it sets, and its declaration. A flag overrides the recipe only when it was given.
RECIPE_FLAGS: Mapping[str, tuple[tuple[str, ...], Any]] = {
    "avg_bits": (
        ("budget.avg_bits",),
        _option(float, "--avg-bits", panel=BUDGET, text="True bits per weight, scales and zeros included (3.5)."),
    ),
    "bits": (
        ("budget.bits",),
        _option(int, "--bits", panel=BUDGET, metavar="<2|3|4|8>", text="The same width everywhere, without a search."),
    ),
    "revision": (
        ("revision",),
        _option(str, "--revision", text="Branch, tag or commit of a model on the Hub."),
    ),
    "calib": (
        ("calibration.source",),
        _option(
            str,
            "--calib",
            panel=CALIBRATION,
            metavar="<source>",
            text="auto, builtin, a file, a folder, or hf:DATASET/CONFIG:SPLIT:COLUMN.",
        ),
    ),
    "tokens": (
        ("calibration.tokens",),
        _option(int, "--tokens", panel=CALIBRATION, text="How many tokens to calibrate on."),
    ),
    "window": (
        ("calibration.window",),
        _option(int, "--window", panel=CALIBRATION, text="Tokens per calibration sequence."),
    ),
    "seed": (("calibration.seed",), _option(int, "--seed", panel=CALIBRATION, text="Which sequences are drawn.")),
    "method": (
        ("allocation.method",),
        _option(str, "--method", panel=BITS, metavar="<additive|uniform>", text="How widths are chosen."),
    ),
    "widths": (
        ("allocation.widths",),
        _option(str, "--widths", panel=BITS, metavar="<2,3,4,8>", text="The widths to choose from."),
    ),
    "fuse": (
        ("allocation.fuse",),
        _option(bool, "--fuse/--no-fuse", panel=BITS, text="Make q/k/v agree on a width, and gate/up."),
    ),
    "pin": (
        ("allocation.pins",),
        _option(
            list[str],
            "--pin",
            panel=BITS,
            metavar="<pattern=bits>",
            text="Fix the width of matching matrices, as in '*.down_proj=8'. Repeatable; adds to the recipe's.",
        ),
    ),
    "keep": (
        ("output.keep",),
        _option(
            list[str],
            "--keep",
            panel=BITS,
            metavar="<pattern>",
            text="Leave matching matrices unquantized. Repeatable; adds to the recipe's.",
        ),
    ),
    "quantizer": (
        # A measurement by another algorithm than the one that runs would choose widths for the wrong errors.
        ("quantizer.algorithm", "measurement.quantizer"),
        _option(str, "--quantizer", panel=QUANTIZER, metavar="<gptq|rtn>", text="How codes are found."),
    ),
    "group_size": (
        ("quantizer.group_size",),
        _option(int, "--group-size", panel=QUANTIZER, text="Inputs that share a scale: fewer are closer and larger."),
    ),
    "symmetric": (
        ("quantizer.symmetric",),
        _option(bool, "--symmetric/--asymmetric", panel=QUANTIZER, text="Store no zeros, or one for each group."),
    ),
    "sequential": (
        ("quantizer.sequential",),
        _option(bool, "--sequential/--no-sequential", panel=QUANTIZER, text="Let later layers see quantized ones."),
    ),
    "correction": (
        ("quantizer.correction",),
        _option(float, "--correction", panel=QUANTIZER, text="How much of the incoming error to repair, 0 to 1."),
    ),
    "device": (
        ("run.device",),
        _option(str, "--device", panel=MACHINE, metavar="<auto|cpu|cuda:N>", text="Where to compute."),
    ),
    "dtype": (
        ("run.dtype",),
        _option(str, "--dtype", panel=MACHINE, metavar="<name>", text=DTYPE_HELP),
    ),
    "activations": (
        ("run.activations",),
        _option(str, "--activations", panel=MACHINE, metavar="<device|host>", text="Where states wait between blocks."),
    ),
    "batch": (("run.batch",), _option(int, "--batch", panel=MACHINE, text="Sequences per forward.")),
    "threads": (("run.threads",), _option(int, "--threads", panel=MACHINE, text="CPU threads.")),
    "max_shard_size": (
        ("output.max_shard_size",),
        _option(str, "--max-shard-size", panel=MACHINE, metavar="<size>", text="Largest file to write, as in 5GB."),
    ),
}
# What a plan file has already decided.
DECIDED_BY_A_PLAN = ("avg_bits", "bits", "method", "widths", "fuse", "pin", "keep", "group_size", "symmetric")

ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", show_default=False, help="A folder, a Hub id such as user/name, or demo."),
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", metavar="<name|file>", show_default=False, help="A packaged recipe or a file.")
]
FolderArgument = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help="A quantized model folder.")]
RunnableArgument = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help="A quantized or plain model.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="<folder>", show_default=False, help="Where to write.")
]
WorkOption = Annotated[
    Path | None,
    typer.Option("--work-dir", metavar="<folder>", show_default=False, help="Where finished blocks are kept."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
DeviceOption = Annotated[str, typer.Option("--device", metavar="<auto|cpu|cuda:N>", help="Where to compute.")]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="<name>", help=DTYPE_HELP)]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else there.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for a mistake that the user can correct, 130 after Ctrl-C."""
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments) or ["--help"])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `llmmpq inspect ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # python flushes once more when it exits
        return EXIT_FAILED


def _run(arguments: list[str]) -> int:
    # Not `app()`: in typer 0.29 that turns Ctrl-C into a bare exit code, and any broken pipe into a silent exit.
    try:
        command = get_command(app)
        with command.make_context("llmmpq", arguments) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.TyperException as error:  # typer's word for a mistyped command line
        where = getattr(error, "ctx", None)  # missing where the mistake lies outside any verb
        path = "llmmpq" if where is None else where.command_path
        return _fail(f"{error.format_message().rstrip('.')}. See `{path} --help`.")
    except LlmmpqError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return EXIT_MISTAKE


@app.callback()
def _llmmpq(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda asked: _show_version(asked), help="The version.")
    ] = False,
) -> None:
    pass


def _show_version(asked: bool) -> None:
    if asked:
        print(f"llmmpq {__version__}")
        raise typer.Exit


def _recipe_verb(*, without: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of `function(recipe, given, ...)`: MODEL, --recipe and the recipe flags replace the first two.

    `given` holds the flags that were given, by parameter name. A flag in `without` is left out or declared anew.
    """
    names = [name for name in RECIPE_FLAGS if name not in without]
    declared = {"model": ModelArgument, "recipe": RecipeOption} | {name: RECIPE_FLAGS[name][1] for name in names}
    keyword = signatures.Parameter.KEYWORD_ONLY
    shared = [signatures.Parameter(name, keyword, default=None, annotation=kind) for name, kind in declared.items()]

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            model, recipe = values.pop("model"), values.pop("recipe")
            given = {name: value for name in names if (value := values.pop(name)) is not None}
            function(_read_recipe(model, recipe, given), given, **values)

        _, _, *own = signatures.signature(function, eval_str=True).parameters.values()
        command.__signature__ = signatures.Signature([*shared, *own])  # type: ignore[attr-defined]
        app.command(function.__name__, help=function.__doc__)(command)
        return function

    return register


def _read_recipe(model: str | None, name: str | None, given: Mapping[str, Any]) -> Recipe:
    recipe = Recipe() if name is None else load_recipe(name)
    changes: dict[str, Any] = {} if model is None else {"model": model}
    for flag, value in given.items():
        if flag == "pin":
            value = {**recipe.allocation.pins, **dict(map(_read_pin, value))}
        elif flag == "keep":
            value = [*recipe.output.keep, *value]
        elif flag == "widths":
            value = _read_numbers(value, int, flag="--widths", example="2,3,4,8")
        changes |= dict.fromkeys(RECIPE_FLAGS[flag][0], value)
    recipe = recipe.override(changes)
    if recipe.model is None:
        raise RecipeError("no model is named; give MODEL (a folder, a Hub id such as user/name, or demo), or a recipe")
    return recipe


def _read_pin(text: str) -> tuple[str, int]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not bits.isdecimal():
        raise RecipeError(f"--pin is {text!r}; allowed: PATTERN=BITS, such as '*.down_proj=8'")
    return pattern, int(bits)


def _read_numbers(text: str, kind: Callable[[str], Any], *, flag: str, example: str) -> list[Any]:
    try:
        return [kind(item) for item in text.split(",")]
    except ValueError:
        raise RecipeError(f"{flag} is {text!r}; allowed: numbers with commas between them, such as {example}") from None


@_recipe_verb()
def quantize(
    recipe: Recipe,
    given: Mapping[str, Any],
    *,
    out: OutOption = None,
    work_dir: WorkOption = None,
    overwrite: OverwriteOption = False,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="<file>", show_default=False, help="Carry out this plan, as made or edited."),
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize MODEL into a folder that transformers can load. The same command again continues."""
    if plan is not None and (decided := [name for name in DECIDED_BY_A_PLAN if name in given]):
        flags = ", ".join("--" + name.replace("_", "-") for name in decided)
        raise RecipeError(
            f"--plan and {flags} are both given; the plan decides that: edit its file, or leave --plan out"
        )
    folder = out or _default_out(recipe, plan)
    with _pipeline(quiet=quiet) as (pipeline, progress):
        result = pipeline.quantize_model(
            recipe, out=folder, work_dir=work_dir, overwrite=overwrite, plan_file=plan, progress=progress
        )
    _show(tables.show_quantized, result, as_json=as_json)


def _default_out(recipe: Recipe, plan: Path | None) -> Path:
    """<model>-<bits>bit in the current folder."""
    name = Path(recipe.model or "").expanduser().resolve().name or "model"
    budget = recipe.resolve().budget
    bits = budget.avg_bits if budget.bits is None else budget.bits
    return Path(f"{name}-{bits:g}bit" if plan is None else f"{name}-{plan.stem}")


@_recipe_verb()
def check(
    recipe: Recipe,
    given: Mapping[str, Any],
    *,
    out: OutOption = None,
    work_dir: WorkOption = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what `quantize` with the same flags would do and need. Nothing is written; exit code 2 if it cannot work."""
    with _pipeline(quiet=quiet) as (pipeline, _):
        result = pipeline.check(recipe, out=out)
    _show(tables.show_check, result, as_json=as_json)
    if result["problems"]:
        raise typer.Exit(EXIT_MISTAKE)


@_recipe_verb(without=("avg_bits", "bits"))
def plan(
    recipe: Recipe,
    given: Mapping[str, Any],
    *,
    avg_bits: Annotated[
        str | None,
        typer.Option(
            "--avg-bits",
            metavar="<2.5,3,3.5>",
            rich_help_panel=BUDGET,
            show_default=False,
            help="True bits per weight: one budget, or several that share one measurement.",
        ),
    ] = None,
    out: OutOption = None,
    work_dir: WorkOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose the bits of MODEL for one or several budgets, without quantizing it."""
    if avg_bits is not None:
        budgets = _read_numbers(avg_bits, float, flag="--avg-bits", example="2.5,3,3.5")
    elif recipe.budget.bits is not None:
        raise RecipeError(f"the recipe asks for {recipe.budget.bits} bits everywhere: nothing to plan; give --avg-bits")
    else:
        budgets = [recipe.resolve().budget.avg_bits]
    for bits in reversed(budgets):
        recipe = recipe.override({"budget.avg_bits": bits})
    with _pipeline(quiet=quiet) as (pipeline, progress):
        plans = pipeline.make_plans(recipe, list(dict.fromkeys(budgets)), out=out, work_dir=work_dir, progress=progress)
    result = {"out": None if out is None else str(out), "plans": [made.to_json() for made in plans]}
    _show(tables.show_plans, result, as_json=as_json)


@app.command()
def inspect(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Show what a quantized folder holds, and check that it is what was written. Exit code 2 if not."""
    with _pipeline(quiet=True) as (pipeline, _):
        result = pipeline.inspect(Path(folder))
    _show(tables.show_inspected, result, as_json=as_json)
    if result["problems"]:
        raise typer.Exit(EXIT_MISTAKE)


@app.command("eval")
def evaluate(
    model: RunnableArgument,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="<model>", show_default=False, help="Compare with it, on the same text."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="<file>", show_default=False, help="A text file; else the packaged text."),
    ] = None,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens per window.")] = 1024,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the perplexity, size and reading speed of a model, beside those of a baseline."""
    run = {"device": device, "dtype": dtype}
    Recipe().override({f"run.{key}": value for key, value in run.items()})
    with _pipeline(quiet=quiet) as (pipeline, progress):
        result = pipeline.evaluate(model, baseline=baseline, text=text, window=window, progress=progress, **run)
    _show(tables.show_evaluated, result, as_json=as_json)


@app.command()
def generate(
    model: RunnableArgument,
    prompt: Annotated[str, typer.Option("--prompt", metavar="<text>", show_default=False, help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="How many tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Equal seeds write equal texts.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Let a model continue a text."""
    run = {"device": device, "dtype": dtype}
    Recipe().override({f"run.{key}": value for key, value in run.items()} | {"calibration.seed": seed})
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with _pipeline(quiet=True) as (pipeline, _):
        text = pipeline.generate(model, prompt, **settings, **run)
    result = {"model": model, "prompt": prompt, **settings, "text": text}
    _show(lambda console, shown: print(shown["text"]), result, as_json=as_json)


@contextmanager
def _pipeline(*, quiet: bool) -> Iterator[tuple[ModuleType, Progress]]:
    """The stages and where they report. What a library of theirs prints goes to stderr: stdout is for results."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read once, when huggingface_hub is imported
    with redirect_stdout(sys.stderr):
        from llmmpq import pipeline

        yield pipeline, Silent() if quiet else Terminal()


def _show(show: Callable[[Console, Any], None], result: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_strict(result), allow_nan=False))
    else:
        show(Console(highlight=False), result)


def _strict(value: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for both."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
