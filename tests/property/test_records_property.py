"""Records survive JSON unchanged, and their figures are those of what they hold."""

import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmpq.errors import CheckpointError
from llmmpq.records import LinearSpec, Plan, PlannedLinear, Scheme, Sensitivity
from llmmpq.scheme import WIDTHS

names = st.text(min_size=1, max_size=20)
sizes = st.integers(1, 10**5)
shapes = st.tuples(sizes, sizes)
schemes = st.builds(Scheme, bits=st.sampled_from(WIDTHS), group_size=st.integers(1, 10**4), symmetric=st.booleans())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
losses = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
linear_specs = st.builds(
    LinearSpec,
    name=names,
    shape=shapes,
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    block=st.integers(0, 200),
    role=names,
    fused_set=names,
)
plans = st.builds(
    Plan,
    linears=st.dictionaries(
        names,
        st.builds(PlannedLinear, shape=shapes, block=st.integers(0, 200), role=names, scheme=schemes),
        min_size=1,
        max_size=5,
    ),
    method=names,
    budget=st.dictionaries(names, json_values, max_size=3),
    predicted_loss=st.none() | losses,
    optimality_gap=st.none() | losses,
    provenance=st.dictionaries(names, json_values, max_size=3),
)


@st.composite
def sensitivities(draw) -> Sensitivity:
    specs = draw(st.lists(linear_specs, max_size=4, unique_by=lambda spec: spec.name))
    options = {spec.name: tuple(draw(st.lists(schemes, min_size=1, max_size=4))) for spec in specs}
    return Sensitivity(
        linears=tuple(specs),
        options=options,
        losses={name: tuple(draw(losses) for _ in items) for name, items in options.items()},
        num_tokens=draw(sizes),
        digest=draw(names),
        warnings=tuple(draw(st.lists(names, max_size=2))),
    )


def through_json(record):
    return type(record).from_json(json.loads(json.dumps(record.to_json())))


@settings(deadline=None)
@given(st.one_of(schemes, linear_specs, plans, sensitivities()))
def test_records_survive_json(record):
    assert through_json(record) == record


@settings(deadline=None)
@given(plans)
def test_the_figures_of_a_plan_are_sums_over_its_linears(plan):
    data = plan.to_json()
    linears = plan.linears.values()
    assert data["nbytes"] == plan.nbytes == sum(linear.scheme.nbytes(linear.shape) for linear in linears)
    assert data["num_weights"] == plan.num_weights == sum(math.prod(linear.shape) for linear in linears)
    assert sum(entry["nbytes"] for entry in data["linears"].values()) == plan.nbytes
    assert plan.code_bits_per_weight <= plan.bits_per_weight


@settings(deadline=None)
@given(schemes, shapes)
def test_bytes_are_those_of_the_tensors_and_bounded_by_their_codes(scheme, shape):
    tensors = scheme.tensors(shape)
    assert tensors.keys() == ({"words", "scales"} if scheme.symmetric else {"words", "scales", "zeros"})
    itemsize = {"int32": 4, "float16": 2}
    assert scheme.nbytes(shape) == sum(itemsize[dtype] * math.prod(dims) for dtype, dims in tensors.values())
    rows, columns = shape
    words = 4 * math.prod(tensors["words"][1])
    assert scheme.bits * rows * columns <= 8 * words <= scheme.bits * rows * (columns + 31)
    assert (tensors["scales"][1][1] - 1) * scheme.group_size < columns <= tensors["scales"][1][1] * scheme.group_size


@settings(deadline=None)
@given(shapes, st.integers(1, 10**4), st.booleans())
def test_wider_costs_more(shape, group_size, symmetric):
    sizes = [Scheme(bits=bits, group_size=group_size, symmetric=symmetric).nbytes(shape) for bits in WIDTHS]
    assert sizes == sorted(set(sizes))


@settings(deadline=None, max_examples=200)
@given(json_values | plans.map(Plan.to_json), st.data())
def test_any_json_is_a_plan_or_a_checkpoint_error(value, data):
    """A plan is edited by hand: whatever comes of it, the answer is one line, not a traceback."""
    if isinstance(value, dict) and value.get("linears"):
        entry = value["linears"][data.draw(st.sampled_from(sorted(value["linears"])))]
        place = data.draw(st.sampled_from([value, value["linears"], entry]))
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(json_values)
    value = json.loads(json.dumps(value))
    try:
        plan = Plan.from_json(value)
    except CheckpointError:
        return
    # Types first: multiplied, a text that was let through as a size would fill the memory.
    assert all(type(size) is int and size > 0 for linear in plan.linears.values() for size in linear.shape)
    assert all(type(linear.block) is int and type(linear.role) is str for linear in plan.linears.values())
    assert through_json(plan) == plan
