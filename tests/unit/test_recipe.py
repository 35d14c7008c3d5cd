"""Recipes: every wrong key, type and value is refused with the file, the key, what was seen and what is allowed."""

import subprocess
import sys

import pytest

from llmmpq.errors import RecipeError
from llmmpq.recipe import Allocation, Budget, Output, Recipe, load_recipe, parse_size


def test_empty_recipe_has_documented_defaults():
    recipe = Recipe.from_dict({})
    assert recipe == Recipe()
    assert (recipe.calibration.source, recipe.calibration.tokens, recipe.calibration.window) == ("auto", 16384, 2048)
    assert recipe.allocation.widths == (2, 3, 4, 8)
    assert recipe.quantizer.group_size == 64
    assert recipe.output.max_shard_nbytes == 5 * 10**9


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"budget": {"avgbits": 3}}, ["'budget.avgbits'", "'budget.avg_bits'"]),
        ({"calibraton": {}}, ["'calibraton'", "'calibration'"]),
        ({"seed": 1}, ["'seed'", "'calibration.seed'"]),
        ({"quantizer": {"groupsize": 1}}, ["'quantizer.groupsize'", "'quantizer.group_size'"]),
        ({3: 3}, ["unknown key '3'"]),
        ({"budget": {"avg_bits": "3"}}, ["budget.avg_bits", "'3' (text)", "a number above 0 and at most 16"]),
        ({"budget": {"avg_bits": 17}}, ["17 (a whole number)", "at most 16"]),
        ({"budget": {"avg_bits": 0}}, ["above 0"]),
        ({"budget": {"avg_bits": float("nan")}}, ["nan"]),
        ({"budget": {"avg_bits": 10**400}}, ["at most 16"]),
        ({"budget": {"bits": 5}}, ["budget.bits", "one of 2, 3, 4, 8"]),
        ({"budget": {"bits": 4.0}}, ["4.0 (a number)"]),
        ({"budget": {"avg_bits": 3, "bits": 4}}, ["not both"]),
        ({"budget": 3}, ["budget is 3 (a whole number)", "a mapping with avg_bits, bits"]),
        ([], ["the recipe is [] (list)"]),
        ({"calibration": {"tokens": 0}}, ["calibration.tokens", "at least 1"]),
        ({"calibration": {"tokens": True}}, ["True (true or false)", "a whole number"]),
        ({"calibration": {"source": ""}}, ["not empty"]),
        ({"calibration": {"seed": -1}}, ["from 0"]),
        ({"measurement": {"quantizer": "awq"}}, ["'awq'", "one of gptq, rtn"]),
        ({"allocation": {"widths": [2, 5]}}, ["allocation.widths", "[2, 5]"]),
        ({"allocation": {"widths": []}}, ["at least one"]),
        ({"allocation": {"widths": [4, 4]}}, ["none twice"]),
        ({"allocation": {"fuse": 1}}, ["true or false"]),
        ({"allocation": {"pins": {"*.q_proj": 5}}}, ["allocation.pins", "one of 2, 3, 4, 8"]),
        ({"allocation": {"pins": [4]}}, ["a mapping from"]),
        ({"allocation": {"time_limit_s": 0}}, ["above 0"]),
        ({"quantizer": {"damping": -0.1}}, ["quantizer.damping", "from 0 to 1"]),
        ({"output": {"keep": "lm_head"}}, ["output.keep", "a list"]),
        ({"output": {"max_shard_size": "5 bananas"}}, ["'5 bananas'", "5GB"]),
        ({"output": {"max_shard_size": True}}, ["true or false"]),
        ({"run": {"device": "cuda:x"}}, ["run.device", "cuda:1"]),
        ({"run": {"dtype": "int8"}}, ["bfloat16"]),
        ({"calibration": {"window": 1}}, ["calibration.window", "at least 2"]),
        ({"model": None, "revision": 1234567}, ["revision", "1234567 (a whole number)", "text"]),
    ],
)
def test_wrong_recipe_is_refused(data, expected):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(data, source="some.yaml")
    assert str(caught.value).startswith("some.yaml: ")
    for part in expected:
        assert part in str(caught.value)


def test_sections_are_checked_when_built_directly():
    with pytest.raises(RecipeError, match="widths"):
        Allocation(widths=(7,))
    with pytest.raises(RecipeError, match="budget"):
        Recipe(budget={"avg_bits": 3})


def test_values_take_their_stored_form():
    recipe = Recipe.from_dict(
        {"budget": {"avg_bits": 3}, "allocation": {"widths": [4]}, "output": {"max_shard_size": 1000}, "run": None}
    )
    assert type(recipe.budget.avg_bits) is float
    assert recipe.allocation.widths == (4,)
    assert recipe.output.max_shard_nbytes == 1000
    assert recipe.run == Recipe().run


def test_pins_are_a_copy():
    pins = {"*.down_proj": 8}
    allocation = Allocation(pins=pins)
    pins["*"] = 2
    assert allocation.pins == {"*.down_proj": 8}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("5gib", 5 * 2**30), ("200 MB", 2 * 10**8), ("1.5KiB", 1536), ("17", 17), (" 3B ", 3)],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes
    assert Output(max_shard_size=text).max_shard_nbytes == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.2", "5TBs", "5 G B", "1e3", "٥GB"])  # noqa: RUF001
def test_sizes_not_understood(text):
    with pytest.raises(RecipeError, match="allowed: sizes such as 5GB"):
        parse_size(text)


def test_override_sets_and_checks():
    recipe = Recipe().override({"model": "demo", "calibration.tokens": 99, "allocation.pins": {"a.b": 8}})
    assert (recipe.model, recipe.calibration.tokens, recipe.allocation.pins) == ("demo", 99, {"a.b": 8})
    assert recipe.calibration.window == Recipe().calibration.window
    with pytest.raises(RecipeError, match=r"command line: calibration\.tokens is 'x'"):
        recipe.override({"calibration.tokens": "x"})
    with pytest.raises(RecipeError, match=r"nearest valid key is 'calibration\.tokens'"):
        recipe.override({"calibration.token": 1})
    with pytest.raises(RecipeError, match=r"nearest valid key is 'budget\.avg_bits'"):
        recipe.override({"budgets.avg_bits": 1})
    with pytest.raises(RecipeError, match="model is 3"):
        recipe.override({"model": 3})
    assert recipe.model == "demo"


def test_overriding_one_budget_clears_the_other():
    uniform = Recipe(budget=Budget(bits=4))
    assert uniform.override({"budget.avg_bits": 3.0}).budget == Budget(avg_bits=3.0)
    assert Recipe(budget=Budget(avg_bits=3.0)).override({"budget.bits": 8}).budget == Budget(bits=8)
    assert uniform.override({"budget.avg_bits": None}).budget == uniform.budget
    assert uniform.override({"budget.max_size": "4.35 GB"}).budget == Budget(max_size="4.35 GB")
    vram = Recipe(budget=Budget(fit_vram="24GB", context=99, sequences=2))
    assert vram.override({"budget.bits": 8}).budget == Budget(bits=8, context=99, sequences=2)
    with pytest.raises(RecipeError, match="not both"):
        uniform.override({"budget.avg_bits": 3.0, "budget.bits": 4})


def test_resolve_fills_the_budget_only_when_none_is_named():
    assert Recipe().resolve().budget == Budget(avg_bits=3.5)
    for budget in (Budget(bits=4), Budget(max_size="1GB"), Budget(fit_vram="1GB")):
        recipe = Recipe(budget=budget)
        assert recipe.resolve() is recipe


def test_sizes_are_the_decimals_that_were_typed():
    assert parse_size("4.35GB") == 4_350_000_000  # 4.35 * 1e9 is one less in doubles
    assert parse_size(" 1.5 kib ") == 1536
    assert Budget(max_size=5_000_000).max_size == "5000000"  # YAML reads it as a number


@pytest.mark.parametrize(
    ("budget", "label"),
    [
        (Budget(), "3.5bit"),
        (Budget(avg_bits=2.25), "2.25bit"),
        (Budget(bits=4), "4bit"),
        (Budget(max_size="5.5 GB"), "5.5GB"),
        (Budget(fit_vram="24GiB"), "24GiB-vram"),
    ],
)
def test_a_budget_names_files(budget, label):
    assert budget.label == label


def write(folder, text):
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_file_is_loaded(tmp_path):
    path = write(tmp_path, "\ufeffmodel: a/b\nbudget: {avg_bits: 3}\nquantizer: {damping: 1e-2}\n")
    recipe = load_recipe(path)
    assert (recipe.model, recipe.budget.avg_bits, recipe.quantizer.damping) == ("a/b", 3.0, 0.01)
    assert load_recipe(write(tmp_path, "# nothing\n")) == Recipe()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("budget: {avg_bits: 3, avg_bits: 4}", "'avg_bits' is given twice"),
        ("model: a\nmodel: b", "line 2"),
        ("model: [", "not valid YAML"),
        ("model: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("revision: 2024-99-99", "not valid YAML"),
        (b"model: \xff", "not valid YAML"),
        ("model: " + "[" * 5000, "not valid YAML"),
        ("? {a: 1}\n: 2", "not valid YAML"),
        ("calibration: {sorce: x}", "'calibration.source'"),
    ],
)
def test_bad_file_is_named(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 500


def test_alias_bomb_is_refused_in_a_short_message(tmp_path):
    levels = ["&l0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"&l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(RecipeError, match="model is") as caught:
        load_recipe(write(tmp_path, f"model: [{', '.join(levels)}]"))
    assert len(str(caught.value)) < 1000


def test_unknown_name_lists_the_packaged_ones():
    with pytest.raises(RecipeError, match=r"packaged are: 70b-one-gpu, 8b-24gb-2\.5bit, 8b-24gb-3\.5bit, cpu, demo$"):
        load_recipe("no-such-recipe")


def test_packaged_name_wins_over_a_file_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("model: other")
    assert load_recipe("demo").model == "demo"
    assert load_recipe("./demo").model == "other"


def test_torch_is_not_imported():
    code = "import sys, llmmpq.recipe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
