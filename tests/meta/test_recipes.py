"""Every packaged recipe loads, spells out every knob, and says for whom it is."""

from pathlib import Path

import pytest
import yaml

from llmmpq.errors import RecipeError
from llmmpq.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_packaged_recipes_are_the_files_of_the_repository():
    with pytest.raises(RecipeError) as caught:
        load_recipe("no-such-recipe")
    assert str(caught.value).endswith(f"packaged are: {', '.join(NAMES)}")
    assert {"demo", "8b-24gb-3.5bit", "8b-24gb-2.5bit", "70b-one-gpu", "cpu"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_complete(name):
    recipe, written = load_recipe(name), yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    every = Recipe().to_dict()
    assert list(written) == list(every)
    for section, knobs in every.items():
        if isinstance(knobs, dict):
            assert list(written[section]) == list(knobs), section
    assert Recipe.from_dict(written) == recipe == recipe.resolve()


@pytest.mark.parametrize("name", NAMES)
def test_recipe_begins_with_its_purpose_and_names_no_model(name):
    assert (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").startswith("# For a ")
    assert load_recipe(name).model == ("demo" if name == "demo" else None)
