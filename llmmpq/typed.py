"""What was typed on the command line, made into a recipe, numbers and folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmmpq.errors import RecipeError
from llmmpq.flags import NUM_BUDGETS, RECIPE_FLAGS
from llmmpq.recipe import Budget, Recipe, load_recipe


def with_values(arguments: Sequence[str]) -> Iterator[str]:
    """In `plan`, `--pareto` alone stands for `--pareto 24`; typer knows no option whose value may be left out."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        yield argument
        if arguments[0] == "plan" and argument == "--pareto" and not following.removeprefix("-").isdecimal():
            yield str(NUM_BUDGETS)


def read_recipe(model: str | None, name: str | None, given: Mapping[str, Any]) -> Recipe:
    recipe = Recipe() if name is None else load_recipe(name)
    changes: dict[str, Any] = {} if model is None else {"model": model}
    for flag, value in given.items():
        if flag == "pin":
            value = {**recipe.allocation.pins, **dict(map(_read_pin, value))}
        elif flag == "keep":
            value = [*recipe.output.keep, *value]
        elif flag == "widths":
            value = read_numbers(value, int, flag="--widths", example="2,3,4,8")
        elif flag == "head_bits" and value.isdecimal():
            value = int(value)
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


def read_numbers(text: str, kind: Callable[[str], Any], *, flag: str, example: str) -> list[Any]:
    try:
        return [kind(item) for item in text.split(",")]
    except ValueError:
        raise RecipeError(f"{flag} is {text!r}; allowed: numbers with commas between them, such as {example}") from None


def default_out(recipe: Recipe, plan: Path | None) -> Path:
    """<model>-<budget> in the current folder."""
    name = Path(recipe.model or "").expanduser().resolve().name or "model"
    return Path(f"{name}-{recipe.budget.label}" if plan is None else f"{name}-{plan.stem}")


def refuse_idle_flags(budget: Budget, given: Mapping[str, Any]) -> None:
    idle = ["--" + name for name in ("context", "sequences") if name in given]
    if idle and budget.fit_vram is None:
        asked = f"--{(budget.kind or 'avg_bits').replace('_', '-')}"
        raise RecipeError(f"{' and '.join(idle)} would change nothing: the budget is {asked}; use it with --fit-vram")


def read_window(text: str | None) -> int | str | None:
    if text is None or text == "own":
        return text
    if not text.isdecimal() or int(text) < 2:
        raise RecipeError(f"--window is {text!r}; allowed: a whole number of at least 2, or own (the model's longest)")
    return int(text)
