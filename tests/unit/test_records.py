"""Records refuse what they cannot mean, count bytes as they are on disk, and survive JSON."""

import json
import math

import pytest

from llmmpq.errors import CheckpointError
from llmmpq.records import LinearSpec, Plan, PlannedLinear, Scheme, Sensitivity
from llmmpq.scheme import LAYOUT_VERSIONS


def spec_of(name: str = "layers.0.up", shape=(8, 64), block: int = 0) -> LinearSpec:
    role = name.rpartition(".")[2]
    return LinearSpec(name=name, shape=shape, dtype="BF16", block=block, role=role, fused_set=name)


def plan_of(**schemes: Scheme) -> Plan:
    linears = {
        name: PlannedLinear(shape=(8, 64), block=0, role=name, scheme=scheme) for name, scheme in schemes.items()
    }
    return Plan(linears=linears, method="additive", budget={"kind": "avg_bits", "value": 3.5})


def plan_json(**changes) -> dict:
    data = json.loads(json.dumps(plan_of(up=Scheme(bits=4, group_size=32)).to_json()))
    return data | changes


# Scheme


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 16, -2, "4", None, 4.0, 2.5, True, [4]])
def test_a_width_that_is_not_stored(bits):
    with pytest.raises(CheckpointError, match="bits"):
        Scheme(bits=bits, group_size=64)


@pytest.mark.parametrize("group_size", [0, -1, 64.0, "64", None, True, 1.5])
def test_a_group_size_that_is_no_count(group_size):
    with pytest.raises(CheckpointError, match="group_size"):
        Scheme(bits=4, group_size=group_size)


@pytest.mark.parametrize("symmetric", ["no", "yes", "false", 0, 1, None, []])
def test_symmetric_is_true_or_false(symmetric):
    with pytest.raises(CheckpointError, match="symmetric"):
        Scheme(bits=4, group_size=64, symmetric=symmetric)
    with pytest.raises(CheckpointError, match="symmetric"):
        Scheme.from_json({"bits": 4, "group_size": 64, "symmetric": symmetric})


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "", None])
def test_scales_are_float16(scale_dtype):
    with pytest.raises(CheckpointError, match="scale_dtype"):
        Scheme(bits=4, group_size=64, scale_dtype=scale_dtype)
    with pytest.raises(CheckpointError, match="scale_dtype"):
        Scheme.from_json({"bits": 4, "group_size": 64, "symmetric": False, "scale_dtype": scale_dtype})


@pytest.mark.parametrize("key", ["bits", "group_size", "symmetric"])
def test_a_scheme_that_lacks_a_key(key):
    data = Scheme(bits=4, group_size=64).to_json()
    del data[key]
    with pytest.raises(CheckpointError, match=f"lacks the key '{key}'"):
        Scheme.from_json(data)


@pytest.mark.parametrize(
    ("scheme", "shape", "expected"),
    [
        # rows * bits * chunks of 32 * 4 bytes, rows * groups * 2 bytes, groups * bits * chunks of rows * 4 bytes
        (Scheme(bits=4, group_size=64), (64, 128), 64 * 4 * 4 * 4 + 64 * 2 * 2 + 2 * 4 * 2 * 4),
        (Scheme(bits=4, group_size=64, symmetric=True), (64, 128), 64 * 4 * 4 * 4 + 64 * 2 * 2),
        (Scheme(bits=3, group_size=32), (5, 33), 5 * 3 * 2 * 4 + 5 * 2 * 2 + 2 * 3 * 1 * 4),
        (Scheme(bits=2, group_size=1000), (1, 1), 2 * 4 + 2 + 2 * 4),
        (Scheme(bits=8, group_size=1), (2, 3), 2 * 8 * 4 + 2 * 3 * 2 + 3 * 8 * 4),
    ],
)
def test_bytes_by_hand(scheme, shape, expected):
    assert scheme.nbytes(shape) == expected
    assert scheme.bits_per_weight(shape) == 8 * expected / math.prod(shape)


@pytest.mark.parametrize(
    ("scheme", "shape", "expected"),
    [
        # Three full groups of 2 bits, then one of 3; words of both runs, scales, zeros of each group, order.
        (
            Scheme(bits=None, runs=((2, 3), (3, 1)), group_size=64),
            (40, 256),
            40 * (2 * 6 + 3 * 2) * 4 + 40 * 4 * 2 + (3 * 2 * 2 + 1 * 3 * 2) * 4 + 4 * 4,
        ),
        # The short last group is counted as a full one: 24 columns are a chunk in either run.
        (
            Scheme(bits=None, runs=((2, 1), (4, 1)), group_size=24, symmetric=True),
            (5, 33),
            5 * (2 + 4) * 4 + 5 * 2 * 2 + 2 * 4,
        ),
        (
            Scheme(bits=4, group_size=64, symmetric=True, scale_dtype="float8"),
            (64, 128),
            64 * 4 * 4 * 4 + 64 * 2 * 1 + 4,
        ),
    ],
)
def test_bytes_of_layout_2_by_hand(scheme, shape, expected):
    assert scheme.nbytes(shape) == expected
    assert scheme.layout_version == 2


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (((2, 3),), "name one width"),
        (((3, 1), (2, 1)), "must rise"),
        (((2, 1), (2, 1)), "must rise"),
        (((2, 1), (5, 1)), "must be from"),
        (((2, 0), (3, 1)), "from 1"),
        (((2, 1.0), (3, 1)), "from 1"),
        (((2, True), (3, 1)), "from 1"),
        ((("2", 1), (3, 1)), "must be from"),
    ],
)
def test_runs_that_cannot_be(runs, message):
    with pytest.raises(CheckpointError, match=message):
        Scheme(bits=None, runs=runs, group_size=64)


def test_bits_and_runs_exclude_each_other():
    with pytest.raises(CheckpointError, match="exclude each other"):
        Scheme(bits=3, runs=((2, 1), (3, 1)), group_size=64)


def test_runs_must_be_all_groups_of_the_shape():
    scheme = Scheme(bits=None, runs=((2, 3), (3, 1)), group_size=64)
    assert scheme.widths((8, 200)) == ((2, 3), (3, 1))
    assert scheme.code_bits((8, 200)) == 2.25
    with pytest.raises(CheckpointError, match="name 4 groups: 257 inputs in groups of 64 are 5"):
        scheme.tensors((8, 257))
    with pytest.raises(CheckpointError, match="name 4 groups"):
        PlannedLinear(shape=(8, 64), block=0, role="up", scheme=scheme)


def test_a_scheme_of_layout_1_has_the_keys_of_layout_1():
    assert Scheme(bits=3, group_size=64).to_json() == {"bits": 3, "group_size": 64, "symmetric": False}
    mixed = Scheme(bits=None, runs=((2, 3), (3, 1)), group_size=64, scale_dtype="float8")
    data = {"bits": {"2": 3, "3": 1}, "group_size": 64, "symmetric": False, "scale_dtype": "float8"}
    assert mixed.to_json() == data
    assert Scheme.from_json(data | {"bits": {"3": 1, "2": 3}}) == mixed  # in whatever order a person writes them


def test_a_scheme_is_a_value():
    assert Scheme(bits=4, group_size=64) == Scheme(bits=4, group_size=64, symmetric=False)
    assert len({Scheme(bits=4, group_size=64), Scheme(bits=4, group_size=64)}) == 1
    with pytest.raises(AttributeError):
        Scheme(bits=4, group_size=64).bits = 8


# Sensitivity


def test_options_and_losses_must_agree_in_number():
    options = {"layers.0.up": (Scheme(bits=2, group_size=8), Scheme(bits=4, group_size=8))}
    with pytest.raises(CheckpointError, match=r"layers\.0\.up: options and losses differ"):
        Sensitivity(linears=(spec_of(),), options=options, losses={"layers.0.up": (0.5,)}, num_tokens=1, digest="")


# Plan


def test_figures_are_computed_from_the_schemes():
    plan = plan_of(up=Scheme(bits=4, group_size=32), down=Scheme(bits=2, group_size=64, symmetric=True))
    up = Scheme(bits=4, group_size=32).nbytes((8, 64))
    down = Scheme(bits=2, group_size=64, symmetric=True).nbytes((8, 64))
    assert plan.nbytes == up + down
    assert plan.num_weights == 2 * 512
    assert plan.bits_per_weight == 8 * (up + down) / 1024
    assert plan.code_bits_per_weight == 3.0


def test_edited_figures_are_not_believed():
    data = plan_json(nbytes=1, num_weights=1, bits_per_weight=0.1, code_bits_per_weight=0.1)
    data["linears"]["up"]["nbytes"] = 1
    assert Plan.from_json(data).nbytes == Scheme(bits=4, group_size=32).nbytes((8, 64))


def test_an_edited_width_is_taken():
    data = plan_json()
    data["linears"]["up"]["bits"] = 8
    assert Plan.from_json(data).linears["up"].scheme == Scheme(bits=8, group_size=32)


@pytest.mark.parametrize("format_", [None, "llmmpq", "LLMMPQ-PLAN", 1])
def test_something_that_is_no_plan(format_):
    with pytest.raises(CheckpointError, match="not a plan"):
        Plan.from_json(plan_json(format=format_))


@pytest.mark.parametrize("version", [None, LAYOUT_VERSIONS[-1] + 1, "1", 0])
def test_a_plan_of_another_layout(version):
    with pytest.raises(CheckpointError, match="'layout_version' is"):
        Plan.from_json(plan_json(layout_version=version))


@pytest.mark.parametrize("data", [[], None, "plan", 3, {}])
def test_json_that_is_no_plan(data):
    with pytest.raises(CheckpointError, match="not a plan"):
        Plan.from_json(data)


@pytest.mark.parametrize("linears", [{}, [], None, "up", {"up": None}, {"up": []}, {"up": "4"}, {"up": 4}])
def test_linears_that_are_no_mapping_of_entries(linears):
    with pytest.raises(CheckpointError):
        Plan.from_json(plan_json(linears=linears))


@pytest.mark.parametrize("key", ["shape", "block", "role", "bits", "group_size", "symmetric"])
def test_an_entry_that_lacks_a_key_is_named(key):
    data = plan_json()
    del data["linears"]["up"][key]
    with pytest.raises(CheckpointError, match=f"plan entry up.*lacks the key '{key}'"):
        Plan.from_json(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", 5),
        ("bits", "4"),
        ("bits", 4.0),
        ("group_size", 0),
        ("symmetric", "no"),
        ("shape", [8]),
        ("shape", [8, 64, 2]),
        ("shape", [8, -64]),
        ("shape", [8, 64.5]),
        ("shape", "88"),
        ("shape", 512),
        ("shape", None),
        ("block", "zero"),
        ("block", None),
        ("block", -1),
    ],
)
def test_an_entry_with_a_wrong_value_is_named(key, value):
    data = plan_json()
    data["linears"]["up"][key] = value
    with pytest.raises(CheckpointError, match="plan entry up"):
        Plan.from_json(data)


def test_a_scheme_with_unknown_keys_of_a_later_layout_is_not_taken_for_this_one():
    data = plan_json()
    data["linears"]["up"]["scale_dtype"] = "float8"
    with pytest.raises(CheckpointError, match=r"plan entry up.*scale_dtype"):
        Plan.from_json(data)


def test_a_plan_names_the_first_layout_that_can_store_it():
    data = plan_json()
    assert data["layout_version"] == 1
    assert Plan.from_json(data | {"layout_version": 2}).to_json() == data
    data["linears"]["up"]["bits"] = {"2": 1, "3": 1}
    with pytest.raises(CheckpointError, match=r"plan entry up: .* needs 'layout_version' 2, found 1"):
        Plan.from_json(data)
    plan = Plan.from_json(data | {"layout_version": 2})
    assert plan.to_json()["layout_version"] == 2
    assert plan.code_bits_per_weight == 2.5
    data["linears"]["up"]["bits"] = {"2": 2, "3": 1}
    with pytest.raises(CheckpointError, match=r"plan entry up: bits .* name 3 groups"):
        Plan.from_json(data | {"layout_version": 2})
