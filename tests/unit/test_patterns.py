"""One rule for the names that a person gives: pins and --keep mean the same by the same pattern."""

import pytest

from llmmpq.allocate.problem import match_pins
from llmmpq.errors import RecipeError
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.skeleton import build_skeleton
from llmmpq.patterns import matches
from tests import tiny

NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (NAME, True),
        ("layers.0.mlp.down_proj", True),
        ("mlp.down_proj", True),
        ("down_proj", True),
        ("layers.0.*", True),
        ("layers.?.*", True),
        ("layers.[01].*", True),
        ("*.down_proj", True),
        ("*", True),
        ("proj", False),
        ("ayers.0.*", False),
        ("layers.0", False),
        ("layers.1.*", False),
        ("Down_proj", False),
        ("", False),
    ],
)
def test_whole_names_or_all_after_a_dot(pattern, expected):
    assert matches(pattern, NAME) is expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    "pattern",
    [
        "down_proj",
        "layers.0.*",
        "0.mlp.*",
        "model.layers.1.*",
        "self_attn.?_proj",
        "*.q_proj",
        "q*",
        "*2*",
        "proj",
        "no",
    ],
)
def test_pins_and_keep_take_the_same_linears(pattern, folder):
    def kept():
        skeleton = build_skeleton(folder, checkpoint, keep=(pattern,))
        return {spec.name for spec in every} - {spec.name for spec in skeleton.linears}

    checkpoint = Checkpoint.open(folder)
    every = build_skeleton(folder, checkpoint).linears
    expected = {spec.name for spec in every if matches(pattern, spec.name)}
    if expected:
        assert kept() == set(match_pins(every, {pattern: 8})) == expected
    else:
        with pytest.raises(RecipeError, match="matches no linear"):
            match_pins(every, {pattern: 8})
        with pytest.raises(RecipeError, match="matches no linear"):
            kept()
