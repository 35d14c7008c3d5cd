"""The command line: one verb per stage of a model's life, thin, with the work in `pipeline`.

Torch is imported when a verb runs, so that `--help` and a mistyped flag answer at once. Results go to stdout, progress
and errors to stderr; with --json stdout is exactly one JSON object. Of several processes that share a run (`ranks.py`)
the first alone speaks, of failures one. `main` is the only place that turns an `LlmmpqError` into one line and exit
code 2; any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import dataclasses
import inspect as signatures
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.main import get_command

from llmmpq import __version__, speed_tables, tables
from llmmpq.errors import LlmmpqError, RecipeError
from llmmpq.flags import (
    DECIDED_BY_A_PLAN,
    RECIPE_FLAGS,
    BaselineOption,
    BaseModelOption,
    BatchesOption,
    BatchSizeOption,
    BranchOption,
    CacheOption,
    CurveFileOption,
    DeviceOption,
    DtypeOption,
    EvaluationWindowOption,
    FewshotOption,
    FolderArgument,
    IncludeOption,
    JsonOption,
    KlTokensOption,
    LimitOption,
    MessageOption,
    ModelArgument,
    MostTokensOption,
    NewTokensOption,
    OutOption,
    OverwriteOption,
    PageOption,
    ParetoOption,
    PlanBitsOption,
    PlanFileOption,
    PlanSizesOption,
    PlanVramOption,
    PrivateOption,
    PromptLengthOption,
    PromptOption,
    QuietOption,
    RecipeOption,
    ReplaceOption,
    RepoArgument,
    ResultsFileOption,
    ResultsOption,
    RunnableArgument,
    RuntimeOption,
    SamplingSeedOption,
    StrideOption,
    TasksOption,
    TemperatureOption,
    TextOption,
    WorkOption,
    WrittenOption,
)
from llmmpq.progress import Progress, Silent, Terminal
from llmmpq.ranks import ALONE, Ranks, join, launched
from llmmpq.recipe import SEED_RULE, Recipe
from llmmpq.typed import default_out, read_numbers, read_recipe, read_window, refuse_idle_flags, with_values

EXIT_FAILED, EXIT_MISTAKE, EXIT_INTERRUPTED = 1, 2, 130  # 130: what shells report after Ctrl-C

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mixed-precision quantization of large language models: every matrix gets the bits it deserves.",
    epilog="Start with: llmmpq quantize demo --avg-bits 3.5",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for a mistake that the user can correct, 130 after Ctrl-C."""
    try:
        ranks = join()
    except LlmmpqError as error:
        return _fail(str(error), ALONE)
    try:
        with nullcontext() if ranks.is_first else _unheard():
            code = _run(list(sys.argv[1:] if arguments is None else arguments) or ["--help"], ranks)
            sys.stdout.flush()
        ranks.leave(code)
        return code
    except BrokenPipeError:  # `llmmpq inspect ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # python flushes once more when it exits
        return EXIT_FAILED


@contextmanager
def _unheard() -> Iterator[None]:
    """For all processes but the first: the libraries beneath have the same to say in each of them."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _run(arguments: list[str], ranks: Ranks) -> int:
    # Not `app()`: in typer 0.29 that turns Ctrl-C into a bare exit code, and any broken pipe into a silent exit.
    try:
        command = get_command(app)
        with command.make_context("llmmpq", list(with_values(arguments)), obj=ranks) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.TyperException as error:  # typer's word for a mistyped command line
        where = getattr(error, "ctx", None)  # missing where the mistake lies outside any verb
        path = "llmmpq" if where is None else where.command_path
        return _fail(f"{error.format_message().rstrip('.')}. See `{path} --help`.", ranks)
    except LlmmpqError as error:
        return _fail(str(error), ranks)
    except BrokenPipeError:
        raise
    except OSError as error:  # a name too long, a folder without permission: the machine's word, not a bug of ours
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}", ranks)
    except KeyboardInterrupt:
        if ranks.is_first:
            print("interrupted; run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _fail(message: str, ranks: Ranks) -> int:
    if ranks.may_report():
        print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
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
            function(read_recipe(model, recipe, given), given, **values)

        _, _, *own = signatures.signature(function, eval_str=True).parameters.values()
        command.__signature__ = signatures.Signature([*shared, *own])  # type: ignore[attr-defined]
        app.command(function.__name__, help=function.__doc__)(command)
        return function

    return register


@_recipe_verb()
def quantize(
    recipe: Recipe,
    given: Mapping[str, Any],
    *,
    call: typer.Context,
    out: OutOption = None,
    work_dir: WorkOption = None,
    overwrite: OverwriteOption = False,
    plan: PlanFileOption = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="<user/name>", show_default=False, help="Publish the result there."),
    ] = None,
    private: PrivateOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize MODEL into a folder that transformers can load. The same command again continues."""
    refuse_idle_flags(recipe.budget, given)
    if plan is not None and (decided := [name for name in DECIDED_BY_A_PLAN if name in given]):
        flags = ", ".join("--" + name.replace("_", "-") for name in decided)
        raise RecipeError(
            f"--plan and {flags} are both given; the plan decides that: edit its file, or leave --plan out"
        )
    if private and push_to_hub is None:
        raise RecipeError("--private would change nothing: nothing is published; use it with --push-to-hub")
    folder = out or default_out(recipe, plan)
    with _pipeline(quiet=quiet, ranks=call.obj) as (pipeline, progress):
        result = pipeline.quantize_model(
            recipe,
            out=folder,
            work_dir=work_dir,
            overwrite=overwrite,
            plan_file=plan,
            publish=None if push_to_hub is None else pipeline.Destination(repo=push_to_hub, private=private),
            progress=progress,
            ranks=call.obj,
        )
    _show(tables.show_quantized, result, as_json=as_json)


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
    refuse_idle_flags(recipe.budget, given)
    with _pipeline(quiet=quiet) as (pipeline, _):
        result = pipeline.check(recipe, out=out, work_dir=work_dir, overwrite=overwrite)
    _show(tables.show_check, result, as_json=as_json)
    if result["problems"]:
        raise typer.Exit(EXIT_MISTAKE)


@_recipe_verb(without=("avg_bits", "bits", "max_size", "fit_vram"))
def plan(
    recipe: Recipe,
    given: Mapping[str, Any],
    *,
    call: typer.Context,
    avg_bits: PlanBitsOption = None,
    max_size: PlanSizesOption = None,
    fit_vram: PlanVramOption = None,
    pareto: ParetoOption = None,
    out: OutOption = None,
    work_dir: WorkOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose the bits of MODEL for one or several budgets, which share one measurement, without quantizing it."""
    asked: list[tuple[str, Any]] = []
    if avg_bits is not None:
        bits = read_numbers(avg_bits, float, flag="--avg-bits", example="2.5,3,3.5")
        asked += [("avg_bits", value) for value in bits]
    for kind, sizes in (("max_size", max_size), ("fit_vram", fit_vram)):
        asked += [] if sizes is None else [(kind, value) for value in sizes.split(",")]
    budgets = [recipe.override({f"budget.{kind}": value}).budget for kind, value in asked]
    if budgets:
        recipe = dataclasses.replace(recipe, budget=budgets[0])
    elif pareto is None and recipe.budget.bits is not None:
        raise RecipeError(f"the recipe asks for {recipe.budget.bits} bits everywhere: nothing to plan; give --avg-bits")
    elif pareto is None:
        recipe = recipe.resolve()
        budgets = [recipe.budget]
    if not any(budget.fit_vram for budget in budgets):
        refuse_idle_flags(recipe.budget, given)
    result: dict[str, Any] = {"out": None if out is None else str(out), "plans": []}
    places = {"out": out, "work_dir": work_dir, "ranks": call.obj}
    with _pipeline(quiet=quiet, ranks=call.obj) as (pipeline, progress):
        if budgets:
            plans = pipeline.make_plans(recipe, list(dict.fromkeys(budgets)), **places, progress=progress)
            result["plans"] = [made.to_json() for made in plans]
        if pareto is not None:
            result["curve"] = pipeline.trace_curve(recipe, pareto, **places, progress=progress)
    _show(tables.show_plans, result, as_json=as_json)


@app.command()
def inspect(folder: FolderArgument, runtime: RuntimeOption = False, as_json: JsonOption = False) -> None:
    """Show what a quantized folder holds, and check that it is what was written. Exit code 2 if not."""
    with _pipeline(quiet=True) as (pipeline, _):
        result = pipeline.inspect(Path(folder), runtime=runtime)
    _show(tables.show_inspected, result, as_json=as_json)
    if runtime and not as_json:
        _show(speed_tables.show_runtime, result["runtime"], as_json=False)
    if result["problems"]:
        raise typer.Exit(EXIT_MISTAKE)


@app.command()
def report(
    folder: FolderArgument,
    out: PageOption = None,
    pareto: CurveFileOption = None,
    results: ResultsFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML page on a quantized folder: bits, sensitivity, size against loss, figures, provenance."""
    with _pipeline(quiet=True) as (pipeline, _):
        result = pipeline.write_report(Path(folder), out=out, pareto=pareto, results=results)
    _show(tables.show_report, result, as_json=as_json)


@app.command("eval")
def evaluate(
    model: RunnableArgument,
    baseline: BaselineOption = None,
    text: TextOption = None,
    window: EvaluationWindowOption = None,
    stride: StrideOption = None,
    tokens: MostTokensOption = None,
    kl_tokens: KlTokensOption = None,
    cache_dir: CacheOption = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    num_fewshot: FewshotOption = None,
    batch_size: BatchSizeOption = None,
    include_path: IncludeOption = None,
    out: ResultsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity and speed of a model, and what it lost against a baseline; or run lm-eval's tasks on it."""
    run = {"device": device, "dtype": dtype}
    Recipe().override({f"run.{key}": value for key, value in run.items()})
    of_text = {"text": text, "window": read_window(window), "stride": stride, "tokens": tokens}
    of_text |= {"kl_tokens": kl_tokens, "cache_dir": cache_dir}
    of_tasks = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
    of_tasks |= {"include_path": include_path, "out": out}
    idle = of_tasks if tasks is None else of_text
    if flags := ["--" + name.replace("_", "-") for name, value in idle.items() if value is not None]:
        verb = "need" if len(flags) > 1 else "needs"
        clash = f"{verb} --tasks" if tasks is None else "cannot be had with --tasks: run eval once for each"
        raise RecipeError(f"{' and '.join(flags)} {clash}")
    given = {name: value for name, value in (of_text if tasks is None else of_tasks).items() if value is not None}
    given |= {"baseline": baseline, **run}
    with _pipeline(quiet=quiet) as (pipeline, progress):
        if tasks is None:
            result = pipeline.evaluate(model, progress=progress, **given)
        else:
            result = pipeline.run_tasks(model, tasks.split(","), progress=progress, **given)
    _show(tables.show_evaluated if tasks is None else tables.show_tasks, result, as_json=as_json)


@app.command()
def bench(
    model: RunnableArgument,
    batch: BatchesOption = "1,8",
    prompt: PromptLengthOption = 512,
    new: WrittenOption = 128,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast a model reads and writes, beside itself dequantized: speed, memory, bandwidth."""
    run = {"device": device, "dtype": dtype}
    Recipe().override({f"run.{key}": value for key, value in run.items()})
    batches = read_numbers(batch, int, flag="--batch", example="1,8")
    with _pipeline(quiet=quiet) as (pipeline, progress):
        result = pipeline.bench(model, batches=batches, prompt=prompt, new=new, progress=progress, **run)
    _show(speed_tables.show_bench, result, as_json=as_json)


@app.command()
def generate(
    model: RunnableArgument,
    prompt: PromptOption,
    max_new_tokens: NewTokensOption = 64,
    temperature: TemperatureOption = 0.0,
    seed: SamplingSeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Let a model continue a text."""
    run = {"device": device, "dtype": dtype}
    Recipe().override({f"run.{key}": value for key, value in run.items()})
    if not SEED_RULE.holds(seed):
        raise RecipeError(f"--seed is {seed}; allowed: a whole number {SEED_RULE.says}")
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with _pipeline(quiet=False) as (pipeline, _):
        text = pipeline.generate(model, prompt, **settings, **run)
    result = {"model": model, "prompt": prompt, **settings, "text": text}
    _show(lambda console, shown: print(shown["text"]), result, as_json=as_json)


@app.command()
def push(
    folder: FolderArgument,
    repo: RepoArgument,
    private: PrivateOption = False,
    revision: BranchOption = None,
    overwrite: ReplaceOption = False,
    results: ResultsFileOption = None,
    base_model: BaseModelOption = None,
    message: MessageOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Publish a quantized folder on the Hub, with a model card. The same command again continues."""
    with _pipeline(quiet=quiet) as (pipeline, progress):
        destination = pipeline.Destination(repo=repo, private=private, revision=revision, overwrite=overwrite)
        result = pipeline.push_folder(
            Path(folder), destination, results=results, base_model=base_model, message=message, progress=progress
        )
    _show(tables.show_pushed, result, as_json=as_json)


@contextmanager
def _pipeline(*, quiet: bool, ranks: Ranks | None = None) -> Iterator[tuple[ModuleType, Progress]]:
    """The stages and where they report. What a library of theirs prints goes to stderr: stdout is for results.

    A verb that gives no `ranks` cannot share its work.
    """
    if ranks is None and (num := launched().num) > 1:
        raise RecipeError(f"only quantize and plan share their work among {num} processes: start this verb in one")
    quiet = quiet or not (ranks is None or ranks.is_first)
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
