"""What is known about a quantized folder: what it says itself, and a curve and evaluation figures where there are any.

These files may have been edited, or come from another version: what they must be is checked here or read tolerantly, so
that the page never fails on a figure that is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmmpq.curve import JSON_FILE as CURVE_FILE
from llmmpq.digest import file_sha256
from llmmpq.errors import CheckpointError
from llmmpq.evaluate.results import RESULTS_FILE, checked_results, mapping, number
from llmmpq.inspection import inspect_folder, plan_of, recipe_of
from llmmpq.names import shortened, without_places
from llmmpq.output import DIGESTS_FILE, RECIPE_FILE, REPORT_FILE, read_object

TELLING = ("provenance", "fallbacks", "warnings")  # what of a folder may name places of the machine it was made on


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """`folder` is what `inspect` says; the rest is None or empty where there is no such file."""

    name: str  # of the folder, without where it lies: the page is for others
    folder: Mapping[str, Any]
    measured_kl: float | None
    report: Mapping[str, Any]
    digests: Mapping[str, Any]
    recipe_yaml: str
    curve: Mapping[str, Any] | None
    results: Mapping[str, Any] | None
    digest: str | None = None  # of digests.json

    @property
    def provenance(self) -> Mapping[str, Any]:
        return mapping(self.folder["provenance"])

    @property
    def recipe(self) -> Mapping[str, Any]:
        try:
            return mapping(yaml.safe_load(self.recipe_yaml))
        except yaml.YAMLError:
            return {}

    @property
    def is_local(self) -> bool:
        """Whether losses are errors of block outputs, not KL."""
        return bool(self.folder["method"] == "local")

    @property
    def loss_unit(self) -> str:
        return "relative error of block outputs" if self.is_local else "KL, nats per token"

    @property
    def losses(self) -> dict[str, dict[float, float]]:
        """Name -> width (a mean where there are several) -> what it costs alone; for the matrices of the plan."""
        losses = mapping(mapping(self.report.get("sensitivity")).get("losses"))
        found = {}
        for linear in self.folder["linears"]:
            options = {
                width: float(loss)
                for bits, loss in mapping(losses.get(linear["name"])).items()
                if (width := _width(str(bits))) is not None and number(loss) is not None
            }
            if options:
                found[linear["name"]] = dict(sorted(options.items()))
        return found

    @property
    def kl(self) -> Mapping[str, Any]:
        """Figures of the evaluation by their plain names: mean, median, p90, p99, top1_agreement, noise_floor (a mean).

        Evaluations by others may nest and call them otherwise.
        """
        results = mapping(self.results)
        figures = {**mapping(results.get("divergence")), **mapping(results.get("kl"))}
        floor = figures.get("noise_floor", results.get("noise_floor"))
        if isinstance(floor, Mapping):
            floor = floor.get("kl_mean", floor.get("mean"))
        return {str(key).removeprefix("kl_"): value for key, value in figures.items()} | {"noise_floor": floor}


def collect(folder: Path, *, pareto: Path | None = None, results: Path | None = None) -> Evidence:
    """Read the folder, and the curve and the figures that are named or lie in it. Where they lay is left out."""
    found = inspect_folder(folder)
    plan = plan_of(folder)
    curve_file = pareto or _in(folder, CURVE_FILE)
    results_file = results or _in(folder, RESULTS_FILE)
    digests = folder / DIGESTS_FILE
    recipe = recipe_of(folder)
    places = shortened(mapping(found["provenance"]), recipe)
    return Evidence(
        name=folder.resolve().name,
        folder={**found, **{key: without_places(found[key], places) for key in TELLING}},
        measured_kl=None if plan is None else plan.measured_kl,
        report=read_object(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else {},
        digests=read_object(digests) if digests.is_file() else {},
        recipe_yaml=_recipe_text(folder / RECIPE_FILE, recipe, places),
        curve=None if curve_file is None else _read_curve(curve_file, mapping(found["provenance"])),
        results=None if results_file is None else checked_results(read_object(results_file), results_file),
        digest=file_sha256(digests) if digests.is_file() else None,
    )


def _recipe_text(path: Path, recipe: Mapping[str, Any], places: Mapping[str, str]) -> str:
    """The file as it is, or without the places it names."""
    if places and recipe:
        return yaml.safe_dump(without_places(recipe, places), sort_keys=False)
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _in(folder: Path, name: str) -> Path | None:
    return folder / name if (folder / name).is_file() else None


def _read_curve(path: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    curve = read_object(path)
    points = curve.get("points")
    keys = ("nbytes", "total_nbytes", "bits_per_weight", "predicted_loss")
    if curve.get("format") != "llmmpq-pareto" or not isinstance(points, list) or not points:
        raise CheckpointError(f"{path} is not a curve: give the pareto.json that `llmmpq plan --pareto --out` wrote")
    for point in points:
        if any(number(mapping(point).get(key)) is None for key in keys) or point["bits_per_weight"] <= 0:
            raise CheckpointError(f"{path}: a point is {str(point)[:80]}, expected numbers for {', '.join(keys)}")
    mine = mapping(provenance.get("model_files"))
    others = mapping(mapping(curve.get("provenance")).get("model_files"))
    if mine and others and dict(mine) != dict(others):
        raise CheckpointError(f"{path} is the curve of another model (the digests of its files differ): make it anew")
    return curve


def _width(text: str) -> float | None:
    """A width, an int where it is whole; None for what is no width."""
    try:
        width = float(text)
    except ValueError:
        return None
    if not 0 < width < math.inf:
        return None
    return int(width) if width.is_integer() else width
