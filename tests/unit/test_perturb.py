"""The pass of all candidates, against the plain way: a whole model for every candidate, every pair from its logits."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmmpq.measure import perturb
from llmmpq.measure.candidates import MeasureSettings, candidates_of
from llmmpq.measure.perturb import NON_FINITE_KL, Ride, expected_forwards
from llmmpq.measure.states import StateStore
from llmmpq.model.checkpoint import Checkpoint
from llmmpq.model.skeleton import build_skeleton
from llmmpq.model.stream import BlockStream
from llmmpq.quantize.linear import dequantized
from llmmpq.records import Scheme
from tests import tiny

CPU = torch.device("cpu")
CALIBRATION, PROBE = tiny.token_ids(4, 24), tiny.token_ids(7, 24)[4:]
SETTINGS = MeasureSettings(
    use_gptq=True, damping=0.01, activation_order=True, column_block=64, sweeps=0, num_probe_tokens=1
)
SCHEMES = (Scheme(bits=2, group_size=32), Scheme(bits=4, group_size=32))


def measure(
    folder, tmp_path, *, place="host", tokens_per_forward=64, base=None, dtype=torch.float32, change=None, head=False
):
    """`base`: weights by name that the base has in place of the original's. Returns the result, names and weights."""
    checkpoint = Checkpoint.open(folder)
    skeleton = build_skeleton(folder, checkpoint, with_head=head)
    options = {spec.name: SCHEMES for spec in skeleton.linears}
    stream = BlockStream(skeleton, checkpoint, CALIBRATION, device=CPU, dtype=dtype, many=True)
    with stream.around() as around, torch.no_grad():
        entering = [around.embed(window[None]).to(dtype) for window in PROBE]
    store = StateStore(
        num_rows=len(SCHEMES) * len(skeleton.linears),
        window_shapes=[tuple(state.shape[1:]) for state in entering],
        dtype=dtype,
        place=place,
        device=CPU,
        folder=tmp_path / "states",
    )
    ride = Ride(
        store,
        entering,
        tokens_per_forward=tokens_per_forward,
        base_is_original=base is None,
        with_rounding=base is None,
    )
    names, weights = [], []
    for block in stream:
        made = []
        for spec, _position, packed in candidates_of(block, options, SETTINGS, warnings=[]):
            weight = dequantized(packed, dtype)
            weight = weight if change is None else change(spec, weight)
            names.append(spec.name)
            weights.append(weight)
            made.append((spec, weight))
        if base is not None:
            for spec in block.linears:
                block.linear(spec).weight.data = base[spec.name]
        if block.is_head:
            ride.through_head(block, made)
        else:
            ride.through(block, made, on_forward=lambda num: None)
        if base is not None:
            for spec in block.linears:
                block.linear(spec).weight.data = block.original_weights[spec.name]
    with stream.around() as around, torch.no_grad():
        around.embed(PROBE[:1])
        found = ride.perturbations(around, on_tokens=lambda num: None)
    store.close()
    return found, names, weights, skeleton


def plain_way(folder, names, weights, base=None, tokens=slice(None)):
    """Every candidate in a model of its own, in float64: rows u of the base and of each, and exact KL figures.

    `tokens`: of all windows one after the other, those that the products are to be of.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    logits = lambda: model(PROBE).logits.flatten(0, 1)  # noqa: E731

    def put(name, weight):
        linear = model.get_submodule(name)
        old, linear.weight.data = linear.weight.data, weight.double()
        return old

    with torch.no_grad():
        original = logits()
        for name, weight in (base or {}).items():
            put(name, weight)
        at_base, changed = logits(), []
        for name, weight in zip(names, weights, strict=True):
            old = put(name, weight)
            changed.append(logits())
            put(name, old)
    p = original.softmax(-1)
    row = lambda dz: (p.sqrt() * (dz - (p * dz).sum(-1, keepdim=True)))[tokens].flatten()  # noqa: E731
    kl = lambda z: float((p * (original.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean())  # noqa: E731
    rows = torch.stack([row(at_base - original), *(row(z - at_base) for z in changed)])
    gram = (rows @ rows.T / (2 * len(p[tokens]))).numpy()
    return gram, np.array([kl(at_base), *map(kl, changed)])


def assert_close_gram(found, expected):
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs(found - expected).max() > 0 or np.array_equal(found, expected)
    assert (np.abs(found - expected) <= 2e-4 * scale + 1e-12).all()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_all_pairs_equal_those_of_whole_models(folders, tmp_path, name):
    found, names, weights, _ = measure(folders(name), tmp_path)
    gram, kl = plain_way(folders(name), names, weights)
    assert_close_gram(found.gram_CC, gram[1:, 1:])
    assert found.kl_C == pytest.approx(kl[1:], rel=2e-3, abs=1e-9)
    assert found.num_tokens == PROBE.numel()
    assert found.base_kl == found.constant == 0
    assert not found.linear_C.any()
    assert np.linalg.eigvalsh(found.gram_CC).min() > -1e-9 * np.abs(found.gram_CC).max()


@pytest.mark.parametrize("piece", [24, 10])
def test_pieces_go_to_two_halves_by_turns(folders, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(perturb, "PIECE", piece)
    found, names, weights, _ = measure(folders("llama"), tmp_path)
    window, token = torch.arange(PROBE.numel()) // PROBE.shape[1], torch.arange(PROBE.numel()) % PROBE.shape[1]
    first = (window + token // piece) % 2 == 0
    half, _ = plain_way(folders("llama"), names, weights, tokens=first)
    assert_close_gram(found.half_CC, half[1:, 1:])
    assert found.half_share == pytest.approx(float(first.double().mean()))


def test_a_probe_of_one_piece_has_no_halves(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.unit.test_perturb.PROBE", PROBE[:1])
    found, *_ = measure(folders("llama"), tmp_path)
    assert found.half_CC is None


def test_around_a_base_the_program_gains_a_constant_and_a_linear_term(folders, tmp_path):
    folder = folders("llama")
    _, names, weights, skeleton = measure(folder, tmp_path)
    base = dict(zip(names[::2], weights[::2], strict=True))  # the 2-bit option of every linear
    assert base.keys() == {spec.name for spec in skeleton.linears}
    found, names, weights, _ = measure(folder, tmp_path, base=base)
    gram, kl = plain_way(folder, names, weights, base)
    own = np.arange(len(names)) % 2 == 0  # the base's own options change nothing
    assert np.abs(found.gram_CC[own]).max() <= 1e-9
    assert np.abs(found.linear_C[own]).max() <= 1e-9
    others = ~own
    assert_close_gram(found.gram_CC[np.ix_(others, others)], gram[1:, 1:][np.ix_(others, others)])
    assert found.linear_C[others] == pytest.approx(2 * gram[0, 1:][others], rel=1e-3, abs=1e-6 * gram[0, 0])
    assert found.constant == pytest.approx(gram[0, 0], rel=1e-4)
    assert found.base_kl == pytest.approx(kl[0], rel=1e-3)
    assert found.kl_C[others] == pytest.approx(kl[1:][others], rel=2e-3)
    # The model predicts what changing two layers at once does, and better than adding up single changes does.
    x = np.zeros(len(names))
    x[[1, 5]] = 1
    predicted = found.constant + found.linear_C @ x + x @ found.gram_CC @ x
    together, _ = plain_way(folder, [], [], base | {names[1]: weights[1], names[5]: weights[5]})
    assert predicted == pytest.approx(together[0, 0], rel=0.05)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("around", [False, True])
def test_the_head_is_one_more_linear(folders, tmp_path, name, around):
    _, names, weights, _ = measure(folders(name), tmp_path, head=True)
    base = dict(zip(names[::2], weights[::2], strict=True)) if around else None
    found, names, weights, skeleton = measure(folders(name), tmp_path, head=True, base=base)
    assert names[-1] == names[-2] == skeleton.head.name in ("lm_head", "embed_out")
    gram, kl = plain_way(folders(name), names, weights, base)
    size = np.sqrt(np.outer(np.diag(gram), np.diag(gram)))[1:, 1:]
    assert (np.abs(found.gram_CC - gram[1:, 1:]) <= 2e-4 * size + 1e-9).all()
    assert found.linear_C == pytest.approx(2 * gram[0, 1:], rel=1e-3, abs=1e-6 * gram[0, 0] + 1e-12)
    assert found.kl_C == pytest.approx(kl[1:], rel=2e-3)
    assert found.base_kl == pytest.approx(kl[0], rel=1e-3)
    assert (found.base_kl > 0) == around


@pytest.mark.parametrize(("place", "tokens_per_forward"), [("disk", 64), ("device", 1), ("host", 10_000)])
def test_where_states_wait_and_how_many_go_together_change_nothing(folders, tmp_path, place, tokens_per_forward):
    usual, *_ = measure(folders("qwen3"), tmp_path)
    other, *_ = measure(folders("qwen3"), tmp_path, place=place, tokens_per_forward=tokens_per_forward)
    scale = np.sqrt(np.outer(np.diag(usual.gram_CC), np.diag(usual.gram_CC)))
    assert (np.abs(other.gram_CC - usual.gram_CC) <= 1e-6 * scale + 1e-12).all()
    assert not list((tmp_path / "states").glob("*")) if place == "disk" else not (tmp_path / "states").exists()


def test_forwards_are_as_many_as_the_formula_says(folders, tmp_path):
    found, names, _, skeleton = measure(folders("llama"), tmp_path)
    per_block = [len(SCHEMES) * len(skeleton.block_linears(index)) for index in range(3)]
    assert found.num_forwards == pytest.approx(expected_forwards(per_block, extra=2))
    assert expected_forwards(per_block, extra=0) == sum(len(names[: sum(per_block[: index + 1])]) for index in range(3))


def test_rounding_the_original_to_bfloat16_has_a_small_kl(folders, tmp_path):
    found, *_ = measure(folders("llama"), tmp_path)
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(folders("llama"), dtype=dtype)(PROBE).logits.double().log_softmax(-1)
        for dtype in (torch.float64, torch.bfloat16)
    )
    kl = float((exact.exp() * (exact - rounded)).sum(-1).mean())
    assert kl / 3 < found.rounding_kl < 3 * kl < np.median(found.kl_C)


def test_a_candidate_that_breaks_the_model_is_the_last_to_be_chosen(folders, tmp_path):
    calls = []

    def change(spec, weight):
        calls.append(spec.name)
        return torch.full_like(weight, torch.nan) if len(calls) == 3 else weight

    usual, *_ = measure(folders("llama"), tmp_path)
    found, *_ = measure(folders("llama"), tmp_path, change=change)
    assert found.kl_C[2] == found.gram_CC[2, 2] == NON_FINITE_KL
    assert not np.delete(found.gram_CC[2], 2).any()
    rest = np.arange(len(found.kl_C)) != 2
    assert found.gram_CC[np.ix_(rest, rest)] == pytest.approx(usual.gram_CC[np.ix_(rest, rest)], rel=1e-5, abs=1e-12)
