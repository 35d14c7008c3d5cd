"""Any valid recipe survives YAML and dictionaries unchanged."""

from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmmpq.recipe import (
    Allocation,
    Budget,
    Calibration,
    Measurement,
    Output,
    Quantizer,
    Recipe,
    Run,
    load_recipe,
)

TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip),
    # What YAML reads as something other than text unless it is quoted.
    st.sampled_from(["1e2", "-1E+3", "null", "~", "no", "3.5", "0x1F", "2024-01-01", "<<", "=", "1_0", ".inf", "- a"]),
)
COUNTS = st.integers(min_value=2, max_value=10**12)
WIDTHS = st.sampled_from([2, 3, 4, 8])
ALGORITHMS = st.sampled_from(["gptq", "rtn"])
SIZES = st.builds("{}{}".format, st.integers(1, 10**6), st.sampled_from(["", "B", "MB", " GiB", ".25GB"]))

RECIPES = st.builds(
    Recipe,
    model=st.none() | TEXTS,
    revision=st.none() | TEXTS,
    budget=st.one_of(
        st.builds(Budget, avg_bits=st.floats(min_value=0, max_value=16, exclude_min=True)),
        st.builds(Budget, bits=WIDTHS),
        st.builds(Budget, max_size=SIZES),
        st.builds(Budget, fit_vram=SIZES, context=COUNTS, sequences=COUNTS),
        st.just(Budget()),
    ),
    calibration=st.builds(
        Calibration, source=TEXTS, tokens=COUNTS, window=COUNTS, seed=st.integers(min_value=0, max_value=2**63 - 1)
    ),
    measurement=st.builds(Measurement, tokens=COUNTS, quantizer=ALGORITHMS),
    allocation=st.builds(
        Allocation,
        method=st.sampled_from(["iqp", "additive", "local", "uniform", "pairs"]),
        widths=st.lists(WIDTHS, min_size=1, unique=True).map(tuple),
        fuse=st.booleans(),
        pins=st.dictionaries(TEXTS, WIDTHS, max_size=3),
        time_limit_s=st.floats(min_value=1e-9, max_value=1e20),
    ),
    quantizer=st.builds(
        Quantizer,
        algorithm=ALGORITHMS,
        group_size=st.integers(1, 2**20),
        symmetric=st.booleans(),
        damping=st.floats(min_value=0, max_value=1),
        activation_order=st.booleans(),
        sequential=st.booleans(),
        correction=st.floats(min_value=0, max_value=1),
        column_block=COUNTS,
        tune=st.integers(0, 10**6),
        tune_metric=st.sampled_from(["output", "plain"]),
    ),
    output=st.builds(
        Output,
        max_shard_size=SIZES,
        keep=st.lists(TEXTS, max_size=3).map(tuple),
    ),
    run=st.builds(
        Run,
        device=st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
        dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
        activations=st.sampled_from(["device", "host"]),
        batch=COUNTS,
        threads=st.none() | st.integers(1, 1024),
    ),
)


@settings(deadline=None)
@example(Recipe(model="1e2", output=Output(keep=("0\x85", "a\u2028b", "c: #"))))
@given(RECIPES)
def test_recipe_survives_yaml(recipe):
    with TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(recipe.to_yaml(), encoding="utf-8", newline="\n")
        loaded = load_recipe(path)
    assert loaded == recipe
    assert list(loaded.allocation.pins) == list(recipe.allocation.pins)
    assert loaded.to_yaml() == recipe.to_yaml()


@settings(deadline=None)
@given(RECIPES)
def test_recipe_survives_a_dictionary(recipe):
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.override({}) == recipe


@settings(deadline=None)
@given(RECIPES)
def test_yaml_is_plain_and_complete(recipe):
    """Other YAML readers see the same keys in the same order, whatever the values."""
    loaded = yaml.safe_load(recipe.to_yaml())
    default = Recipe().to_dict()
    assert list(loaded) == list(default)
    assert all(list(loaded[key]) == list(value) for key, value in default.items() if isinstance(value, dict))
