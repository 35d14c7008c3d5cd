"""The flags of the command line: which recipe key each one sets, and how it is declared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def _option(kind: Any, *names: str, text: str, panel: str | None = None, metavar: str | None = None) -> Any:
    """A flag that is None unless it was given."""
    option = typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)
    return Annotated[kind | None, option]


BUDGET, CALIBRATION, BITS, QUANTIZER, MACHINE = "Budget", "Calibration", "Choice of bits", "Quantizer", "Machine"
# The rule of `patterns.matches`, for both; tests/unit/test_patterns.py holds pins to it.
PATTERN_HELP = "A pattern, with wildcards, is a whole name or all of it after a dot: down_proj, 'layers.0.*'."
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
    "max_size": (
        ("budget.max_size",),
        _option(str, "--max-size", panel=BUDGET, metavar="<size>", text="All files of weights together, as in 5.5GB."),
    ),
    "fit_vram": (
        ("budget.fit_vram",),
        _option(
            str,
            "--fit-vram",
            panel=BUDGET,
            metavar="<size>",
            text="GPU memory that must hold the weights, the KV cache and a margin, as in 24GB.",
        ),
    ),
    "context": (
        ("budget.context",),
        _option(int, "--context", panel=BUDGET, text="With --fit-vram: tokens of each sequence (8192)."),
    ),
    "sequences": (
        ("budget.sequences",),
        _option(int, "--sequences", panel=BUDGET, text="With --fit-vram: how many sequences run at once (1)."),
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
            text="auto, builtin, self (text that the model writes), a file, a folder, or "
            "hf:DATASET/CONFIG:SPLIT:COLUMN.",
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
        _option(
            str, "--method", panel=BITS, metavar="<iqp|additive|local|uniform|pairs>", text="How widths are chosen."
        ),
    ),
    "refine": (
        ("allocation.refine",),
        _option(int, "--refine", panel=BITS, text="How often to measure again around the plan and choose again."),
    ),
    "widths": (
        ("allocation.widths",),
        _option(str, "--widths", panel=BITS, metavar="<2,3,4,8>", text="The widths to choose from."),
    ),
    "head_bits": (
        ("allocation.head_bits",),
        _option(
            str,
            "--head-bits",
            panel=BITS,
            metavar="<auto|2|3|4|8>",
            text="Quantize the output head too, at this width, or auto: at the one that pays. Not where the embedding "
            "shares its weights.",
        ),
    ),
    "layer_only": (
        ("allocation.layer_only",),
        _option(
            bool,
            "--layer-only/--group-bits",
            panel=BITS,
            text="One width for each matrix, for runtimes that need it; or groups of two widths where that pays.",
        ),
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
            text=f"Fix the width of matching matrices, as in 'down_proj=8'. {PATTERN_HELP} Repeatable; adds to the "
            "recipe's, the last match counts.",
        ),
    ),
    "keep": (
        ("output.keep",),
        _option(
            list[str],
            "--keep",
            panel=BITS,
            metavar="<pattern>",
            text=f"Leave matching matrices unquantized. {PATTERN_HELP} Repeatable; adds to the recipe's.",
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
    "scale_dtype": (
        ("quantizer.scale_dtype",),
        _option(
            str,
            "--scale-dtype",
            panel=QUANTIZER,
            metavar="<float16|float8>",
            text="How scales are stored: float8 halves what they cost.",
        ),
    ),
    "sweeps": (
        ("quantizer.sweeps",),
        _option(int, "--sweeps", panel=QUANTIZER, text="How often codes and scales are improved after GPTQ (3)."),
    ),
    "sequential": (
        ("quantizer.sequential",),
        _option(bool, "--sequential/--no-sequential", panel=QUANTIZER, text="Let later layers see quantized ones."),
    ),
    "correction": (
        ("quantizer.correction",),
        _option(float, "--correction", panel=QUANTIZER, text="How much of the incoming error to repair, 0 to 1."),
    ),
    "rotate": (
        ("quantizer.rotate",),
        _option(
            bool,
            "--rotate/--no-rotate",
            panel=QUANTIZER,
            text="Turn the residual stream first: up to rounding no prediction changes, and weights are easier to "
            "quantize. A shared output head gets weights of its own.",
        ),
    ),
    "tune": (
        ("quantizer.tune",),
        _option(int, "--tune", panel=QUANTIZER, metavar="<steps>", text="Steps of tuning each quantized block (0)."),
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
DECIDED_BY_A_PLAN = (
    *("avg_bits", "bits", "max_size", "fit_vram", "context", "sequences"),
    *("method", "refine", "widths", "head_bits", "layer_only", "fuse", "pin", "group_size", "symmetric", "scale_dtype"),
)


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
# The budgets of `plan`: several, with commas between them.
PlanBitsOption = Annotated[
    str | None,
    typer.Option(
        "--avg-bits",
        metavar="<2.5,3,3.5>",
        rich_help_panel=BUDGET,
        show_default=False,
        help="True bits per weight: one budget, or several that share one measurement.",
    ),
]
PlanSizesOption = Annotated[
    str | None,
    typer.Option(
        "--max-size",
        metavar="<4GB,5.5GB>",
        rich_help_panel=BUDGET,
        show_default=False,
        help="All files of weights together: one size, or several.",
    ),
]
PlanVramOption = Annotated[
    str | None,
    typer.Option(
        "--fit-vram",
        metavar="<16GB,24GB>",
        rich_help_panel=BUDGET,
        show_default=False,
        help="GPU memory that must hold the weights, the KV cache and a margin: one size, or several.",
    ),
]
NUM_BUDGETS, MOST_BUDGETS = 24, 1000  # of a curve
ParetoOption = Annotated[
    int | None,
    typer.Option(
        "--pareto",
        min=2,
        max=MOST_BUDGETS,
        metavar="[count]",
        rich_help_panel=BUDGET,
        show_default=False,
        help=f"The curve of predicted loss against bytes, from so many budgets ({NUM_BUDGETS}).",
    ),
]
# Of `eval`: every one is None unless it was given, so that one that would change nothing can be refused.
TEXT, TASKS = "Text", "Tasks of lm-eval"


def _eval_option(kind: Any, name: str, *, panel: str | None, text: str, metavar: str | None = None, **more: Any) -> Any:
    option = typer.Option(name, help=text, rich_help_panel=panel, metavar=metavar, show_default=False, **more)
    return Annotated[kind | None, option]


BaselineOption = _eval_option(
    str, "--baseline", panel=None, metavar="<model>", text="The original: compare with it, on the same text or tasks."
)
TextOption = _eval_option(
    str,
    "--text",
    panel=TEXT,
    metavar="<source>",
    text="A file, a folder, or hf:DATASET/CONFIG:SPLIT:COLUMN; else the packaged text.",
)
EvaluationWindowOption = _eval_option(
    str,
    "--window",
    panel=TEXT,
    metavar="<tokens|own>",
    text="Tokens per window (2048, or what the model reads where that is less); own: what the model reads.",
)
StrideOption = _eval_option(
    int, "--stride", panel=TEXT, min=1, text="Tokens from one window's start to the next (the window: no overlap)."
)
MostTokensOption = _eval_option(int, "--tokens", panel=TEXT, min=2, text="At most so many of the text (524288).")
KlTokensOption = _eval_option(
    int, "--kl-tokens", panel=TEXT, min=0, text="Of them, at most so many for the KL divergence (8192; 0: none)."
)
CacheOption = _eval_option(
    Path, "--cache-dir", panel=TEXT, metavar="<folder>", text="Where the baseline's logits are kept (.llmmpq-work)."
)
TasksOption = _eval_option(
    str, "--tasks", panel=TASKS, metavar="<a,b,...>", text="Run these tasks of lm-eval in place of the text."
)
LimitOption = _eval_option(float, "--limit", panel=TASKS, text="So many examples per task, or a share below 1.")
FewshotOption = _eval_option(int, "--num-fewshot", panel=TASKS, min=0, text="Examples shown before each question.")
BatchSizeOption = _eval_option(
    str, "--batch-size", panel=TASKS, metavar="<number|auto>", text="Requests per forward (1)."
)
IncludeOption = _eval_option(
    Path, "--include-path", panel=TASKS, metavar="<folder>", text="A folder with tasks of your own."
)
ResultsOption = _eval_option(
    Path, "--out", panel=TASKS, metavar="<folder>", text="Where results are saved, as lm-eval saves them."
)
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
PrivateOption = Annotated[bool, typer.Option("--private", help="A new repository is made private.")]
DeviceOption = Annotated[str, typer.Option("--device", metavar="<auto|cpu|cuda:N>", help="Where to compute.")]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="<name>", help=DTYPE_HELP)]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else there.")]
PlanFileOption = Annotated[
    Path | None,
    typer.Option("--plan", metavar="<file>", show_default=False, help="Carry out this plan, as made or edited."),
]
PageOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="<file.html>", show_default=False, help="The page (<folder>-report.html here)."),
]
CurveFileOption = Annotated[
    Path | None,
    typer.Option(
        "--pareto",
        metavar="<file>",
        show_default=False,
        help="Draw this curve, as `plan --pareto` wrote it; else pareto.json of the folder, if there.",
    ),
]
ResultsFileOption = Annotated[
    Path | None,
    typer.Option(
        "--results",
        metavar="<file>",
        show_default=False,
        help="Figures that `llmmpq eval --json` printed; else eval.json of the folder, if there.",
    ),
]
RuntimeOption = Annotated[
    bool, typer.Option("--runtime", help="Also which kernel would run each matrix on this machine, and why not others.")
]
BatchesOption = Annotated[
    str, typer.Option("--batch", metavar="<1,8>", help="Sequences at once: one number, or several.")
]
PromptLengthOption = Annotated[int, typer.Option("--prompt", min=1, help="Tokens of each prompt.")]
WrittenOption = Annotated[int, typer.Option("--new", min=1, help="Tokens to write after it.")]
RepoArgument = Annotated[str, typer.Argument(metavar="USER/NAME", show_default=False, help="A repository of the Hub.")]
BranchOption = Annotated[
    str | None,
    typer.Option("--revision", metavar="<branch>", show_default=False, help="A branch, made if missing (main)."),
]
ReplaceOption = Annotated[bool, typer.Option("--overwrite", help="Replace what the repository holds.")]
BaseModelOption = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="<user/name>",
        show_default=False,
        help="The original on the Hub, where a local folder was quantized.",
    ),
]
MessageOption = Annotated[
    str | None, typer.Option("--message", metavar="<text>", show_default=False, help="Of the commit.")
]
PromptOption = Annotated[str, typer.Option("--prompt", metavar="<text>", show_default=False, help="What to continue.")]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", help="How many tokens to write.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")]
SamplingSeedOption = Annotated[int, typer.Option("--seed", help="Equal seeds write equal texts.")]
