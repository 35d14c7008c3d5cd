"""The same inputs give the same bytes: in another folder, after an interruption, from the recipe that was saved."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmmpq import pipeline, ridejournal
from llmmpq.errors import CheckpointError
from llmmpq.measure.perturb import Ride
from llmmpq.pipeline import quantize_model
from llmmpq.recipe import Budget, Recipe, load_recipe
from llmmpq.workdir import Stage
from tests import tiny
from tests.e2e.running import (
    Interrupted,
    Recorder,
    digests,
    leftovers,
    packed_names,
    raw_tensors,
    read_plan,
    run_here,
    tiny_recipe,
)

NUM_BLOCKS = 2
# More than any run here saves; a test below says that it is not fewer.
MOST_SAVES = 24


@pytest.fixture(autouse=True)
def snapshots_after_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridejournal, "SNAPSHOT_EVERY_S", 0.0)
    monkeypatch.setattr(ridejournal, "LARGEST_SHARE", 1e9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("phi3", tmp_path_factory.mktemp("phi3"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def recipe(model: Path, calibration_file: Path) -> Recipe:
    return tiny_recipe(model, calibration_file, allocation__widths=[3, 8], allocation__profiles=[6.0])


@pytest.fixture(scope="module")
def reference(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """The uninterrupted output, its work folder, and the number of steps the run reported."""
    folder, progress = tmp_path_factory.mktemp("reference"), Recorder()
    quantize_model(recipe, out=folder / "out", work_dir=folder / "work", progress=progress)
    return folder / "out", folder / "work", progress.num_steps


def test_another_folder_gives_the_same_files(recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path) -> None:
    quantize_model(recipe, out=tmp_path / "deep" / "other")
    assert digests(tmp_path / "deep" / "other") == digests(reference[0])
    assert sorted(digests(reference[0])) == [
        "config.json",
        "digests.json",
        "generation_config.json",
        "model.safetensors",
        "plan.json",
        "recipe.yaml",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def counting_saves(patch: pytest.MonkeyPatch, *, interrupt_at: int, after: bool) -> list[str]:
    """Have the `interrupt_at`th save of a run fail, before or after it is done; returns what was saved, as it comes."""
    seen: list[str] = []

    def interrupting(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            now = len(seen) == interrupt_at
            seen.append(args[1] if label == "save" else label)
            if now and not after:
                raise Interrupted
            result = function(*args, **kwargs)
            if now:
                raise Interrupted
            return result

        return wrapped

    patch.setattr(Stage, "write", interrupting(Stage.write, "save"))  # what `save` comes down to
    patch.setattr(Stage, "save_result", interrupting(Stage.save_result, "marker"))
    patch.setattr(pipeline, "write_output", interrupting(pipeline.write_output, "output"))
    return seen


def test_every_kind_of_save_is_among_those_interrupted(
    recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        seen = counting_saves(patch, interrupt_at=-1, after=False)
        quantize_model(recipe, out=tmp_path / "out")
    assert len(seen) <= MOST_SAVES
    assert {"ride-0000-0000", "ride-0001-0000", "marker", "sensitivity", "block-0001", "output"} <= set(seen)
    assert seen.count("sensitivity") == 2  # measured, and again around the plan


@pytest.mark.parametrize(("position", "after"), [(n, n % 2 == 1) for n in range(MOST_SAVES)])
def test_interrupted_where_something_is_saved(
    position: int,
    after: bool,
    recipe: Recipe,
    reference: tuple[Path, Path, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        seen = counting_saves(patch, interrupt_at=position, after=after)
        try:
            quantize_model(recipe, out=out)
        except Interrupted:
            assert len(seen) == position + 1
        else:
            assert len(seen) <= position  # nothing left to interrupt
    written = out.exists()
    assert written == (len(seen) <= position or (seen[-1] == "output" and after))
    summary = quantize_model(recipe, out=out)
    assert summary["already_done"] == written
    assert digests(out) == digests(reference[0])
    assert leftovers(tmp_path) == []


def test_an_interrupted_measurement_goes_on_from_its_last_block(
    recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saved(stop_at: str | None) -> list[str]:
        with monkeypatch.context() as patch:
            seen = counting_saves(patch, interrupt_at=10**9, after=False)
            through = Ride.through

            def counted(self: Ride, block: Any, *args: Any, **kwargs: Any) -> None:
                if seen and seen[-1] == stop_at:
                    raise Interrupted
                seen.append(f"through {block.index}")
                through(self, block, *args, **kwargs)

            patch.setattr(Ride, "through", counted)
            try:
                quantize_model(recipe, out=tmp_path / "out")
            except Interrupted:
                assert stop_at is not None
        return [name for name in seen if name.startswith("through")]

    assert saved("marker") == ["through 0"]
    # Block 0 is not measured again; around the plan both are.
    assert saved(None)[:3] == ["through 1", "through 0", "through 1"]
    assert digests(tmp_path / "out") == digests(reference[0])


def test_a_damaged_snapshot_is_measured_anew(
    recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        counting_saves(patch, interrupt_at=8, after=False)
        with pytest.raises(Interrupted):
            quantize_model(recipe, out=tmp_path / "out")
    snapshots = list((tmp_path / ".llmmpq-work").glob("*/measure*/ride-*"))
    assert snapshots
    snapshots[0].write_bytes(snapshots[0].read_bytes()[:-50] + bytes(50))
    quantize_model(recipe, out=tmp_path / "out")
    assert digests(tmp_path / "out") == digests(reference[0])


@pytest.mark.parametrize("seed", range(6))
def test_interrupted_anywhere_and_often(
    seed: int, recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path
) -> None:
    """A run that is ended at random steps, three times in a row: in a candidate, a layer, or half a shard."""
    _, _, num_steps = reference
    rng = random.Random(seed)
    out = tmp_path / "out"
    for _ in range(3):
        try:
            quantize_model(recipe, out=out, progress=Recorder(interrupt_at=rng.randrange(1, num_steps + 1)))
        except Interrupted:
            assert not out.exists()
            assert leftovers(tmp_path) == []
    quantize_model(recipe, out=out)
    assert digests(out) == digests(reference[0])


def test_interrupted_in_the_middle_of_a_shard(
    recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match="write"):
        quantize_model(recipe, out=out, progress=Recorder(interrupt_at=reference[2] - 20))
    assert not out.exists()
    assert leftovers(tmp_path) == []
    assert quantize_model(recipe, out=out)["resumed_blocks"] == NUM_BLOCKS
    assert digests(out) == digests(reference[0])


def test_a_damaged_journal_is_done_anew(recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        quantize_model(recipe, out=out, progress=Recorder(interrupt_at=reference[2] - 20))
    first, second = sorted((tmp_path / ".llmmpq-work").glob("*/quantize-*/block-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(b"")
    assert quantize_model(recipe, out=out)["resumed_blocks"] == 0
    assert digests(out) == digests(reference[0])


def test_the_saved_recipe_gives_the_same_files(reference: tuple[Path, Path, int], tmp_path: Path) -> None:
    saved = load_recipe(reference[0] / "recipe.yaml")
    quantize_model(saved, out=tmp_path / "out", work_dir=tmp_path / "work")
    assert digests(tmp_path / "out") == digests(reference[0])


def test_the_same_command_again_does_nothing(recipe: Recipe, reference: tuple[Path, Path, int]) -> None:
    out, work, _ = reference
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    progress = Recorder()
    assert quantize_model(recipe, out=out, work_dir=work, progress=progress)["already_done"]
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert not {"measure", "quantize", "write"} & set(progress.tasks)


def test_a_second_budget_measures_nothing(recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path) -> None:
    progress = Recorder()
    changed = recipe.override({"budget.avg_bits": 4.2})
    summary = quantize_model(changed, out=tmp_path / "out", work_dir=reference[1], progress=progress)
    assert "measure" not in progress.tasks
    assert "quantize" in progress.tasks
    assert 3.9 < summary["plan"]["bits_per_weight"] <= 4.2


def test_another_calibration_text_is_noticed_and_named(
    recipe: Recipe, reference: tuple[Path, Path, int], calibration_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(calibration_file.read_text()[::-1])
    progress = Recorder()
    changed = recipe.override({"calibration.source": str(text)})
    quantize_model(changed, out=tmp_path / "out", work_dir=reference[1], progress=progress)
    assert "measure" in progress.tasks
    assert [note for note in progress.notes if "calibration tokens" in note and "changed" in note]
    assert digests(tmp_path / "out")["model.safetensors"] != digests(reference[0])["model.safetensors"]


def test_a_calibration_file_edited_in_place_is_noticed(
    recipe: Recipe, model: Path, calibration_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(calibration_file.read_text())
    recipe = recipe.override({"calibration.source": str(text)})
    quantize_model(recipe, out=tmp_path / "out")
    text.write_text(calibration_file.read_text().replace("dog", "cat"))
    with pytest.raises(CheckpointError, match="made from other inputs"):
        quantize_model(recipe, out=tmp_path / "out")


def test_plans_share_a_measurement_and_give_what_a_direct_run_gives(
    recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_file, plans = tmp_path / "recipe.yaml", tmp_path / "plans"
    recipe_file.write_text(recipe.to_yaml())
    outcome = run_here(["plan", "--recipe", recipe_file, "--avg-bits", "4,5", "--out", plans, "--json"], capsys)
    assert outcome.code == 0
    made = [json.loads((plans / name).read_text()) for name in ("plan-4.json", "plan-5.json")]
    assert json.loads(outcome.stdout)["plans"] == made
    assert made[0]["bits_per_weight"] <= 4 < made[1]["bits_per_weight"] <= 5
    assert len(list((plans.parent / ".llmmpq-work").glob(f"*/measure-{16 * '?'}"))) == 1
    assert made[1] == read_plan(reference[0])
    quantize_model(recipe, out=tmp_path / "out", plan_file=plans / "plan-5.json")
    assert raw_tensors(tmp_path / "out") == raw_tensors(reference[0])


def test_plans_for_budgets_that_are_nearly_equal_are_both_saved(
    recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path
) -> None:
    budgets = [Budget(avg_bits=bits) for bits in (4.5, 4.5000001)]
    pipeline.make_plans(recipe, budgets, out=tmp_path / "plans", work_dir=reference[1])
    assert len(list((tmp_path / "plans").iterdir())) == 2


@pytest.fixture
def edited_plan(reference: tuple[Path, Path, int], tmp_path: Path) -> tuple[Path, str]:
    """The reference's plan with one matrix of one width raised to 8 bits, as by hand, and the name of that matrix."""
    plan = read_plan(reference[0])
    name = next(name for name, entry in plan["linears"].items() if entry["bits"] in (2, 3, 4))
    plan["linears"][name]["bits"] = 8
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(plan, indent=2))
    return path, name


def test_an_edited_plan_is_carried_out(
    edited_plan: tuple[Path, str],
    recipe: Recipe,
    reference: tuple[Path, Path, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, changed = edited_plan
    # Not sequential: the other layers do not see the change, so their bytes must stay.
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(recipe.override({"quantizer.sequential": False}).to_yaml())
    arguments = ["quantize", "--recipe", recipe_file, "--work-dir", tmp_path / "work", "--quiet"]
    for name, plan_file in (("as-made", reference[0] / "plan.json"), ("edited", path)):
        outcome = run_here([*arguments, "--out", tmp_path / name, "--plan", plan_file], capsys)
        assert (outcome.code, outcome.stderr) == (0, "")

    before, after = read_plan(tmp_path / "as-made")["linears"], read_plan(tmp_path / "edited")["linears"]
    assert before == read_plan(reference[0])["linears"]
    assert {name for name in before if before[name] != after[name]} == {changed}
    assert (before[changed]["bits"] in (2, 3, 4), after[changed]["bits"]) == (True, 8)
    old, new = raw_tensors(tmp_path / "as-made"), raw_tensors(tmp_path / "edited")
    assert {name for name in old if old[name] != new[name]} == set(packed_names(changed, after[changed]))
    assert list(json.loads((tmp_path / "edited" / "config.json").read_text())["quantization_config"]["linears"]) == [
        *before
    ]


@pytest.mark.parametrize("change", [{"group_size": 32}, {"symmetric": True}], ids=["group-size", "symmetric"])
def test_a_plan_edited_in_more_than_bits_is_another_input(
    change: dict[str, Any], recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path
) -> None:
    plan = read_plan(reference[0])
    first = next(name for name, entry in plan["linears"].items() if isinstance(entry["bits"], int))
    plan["linears"][first] |= change
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    out = tmp_path / "out"
    quantize_model(recipe, out=out)
    with pytest.raises(CheckpointError, match="made from other inputs"):
        quantize_model(recipe, out=out, plan_file=tmp_path / "edited.json")


def test_another_result_is_replaced_only_when_asked(
    recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path
) -> None:
    out, work = tmp_path / "out", reference[1]
    quantize_model(recipe.override({"budget.bits": 2}), out=out, work_dir=work)
    before = digests(out)
    with pytest.raises(CheckpointError, match="--overwrite"):
        quantize_model(recipe, out=out, work_dir=work)
    assert digests(out) == before
    quantize_model(recipe, out=out, work_dir=work, overwrite=True)
    assert digests(out) == digests(reference[0])
    assert leftovers(tmp_path) == []


def test_what_appears_in_the_output_meanwhile_is_not_lost(recipe: Recipe, tmp_path: Path) -> None:
    """A run takes hours; the folder that was free when it began may hold somebody's work when it ends."""
    out = tmp_path / "out"

    class Meanwhile(Recorder):
        def task(self, label: str, total: int, unit: str = "") -> Any:
            if label == "write":
                out.mkdir()
                (out / "thesis.tex").write_text("years of work")
            return super().task(label, total, unit)

    with pytest.raises(CheckpointError):
        quantize_model(recipe, out=out, progress=Meanwhile())
    assert digests(out).keys() == {"thesis.tex"}
    assert leftovers(tmp_path) == []


def test_interrupted_between_the_old_output_and_the_new(
    recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", reference[1]
    quantize_model(recipe.override({"budget.bits": 2}), out=out, work_dir=work)
    old = digests(out)
    rename = Path.rename

    def refuse_the_second(path: Path, target: Path) -> Path:
        if target == out:
            raise Interrupted
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse_the_second)
        with pytest.raises(Interrupted):
            quantize_model(recipe, out=out, work_dir=work, overwrite=True)
    kept = [digests(folder) for folder in tmp_path.iterdir() if folder.is_dir()]
    assert old in kept or digests(reference[0]) in kept
    quantize_model(recipe, out=out, work_dir=work, overwrite=True)
    assert digests(out) == digests(reference[0])
    assert leftovers(tmp_path) == []


def test_a_second_run_in_the_same_work_folder_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    class Second(Recorder):
        def note_second(self) -> None:
            with pytest.raises(CheckpointError, match="another llmmpq is at work"):
                quantize_model(recipe, out=tmp_path / "b", work_dir=tmp_path / "work")

        def task(self, label: str, total: int, unit: str = "") -> Any:
            if label == "measure":
                self.note_second()
            return super().task(label, total, unit)

    progress = Second()
    quantize_model(recipe, out=tmp_path / "a", work_dir=tmp_path / "work", progress=progress)
    assert "measure" in progress.tasks
    assert not (tmp_path / "b").exists()


def test_one_input_in_two_shards_gives_the_same_tensors(
    recipe: Recipe, reference: tuple[Path, Path, int], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize_model(recipe.override({"output.max_shard_size": "40KB"}), out=out, work_dir=reference[1])
    assert len(list(out.glob("model-*-of-*.safetensors"))) >= 2
    assert raw_tensors(out) == raw_tensors(reference[0])
    assert pipeline.inspect(out)["problems"] == []
