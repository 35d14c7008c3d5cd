"""The metric of each block against gradients through the whole model, for every promised architecture."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmmpq.measure import output_metric
from llmmpq.measure.output_metric import (
    NUM_DRAWS,
    BlockMetric,
    draw_tokens,
    measure_output_metric,
    mixed_metric,
    num_passes,
    piece_sizes,
    pull_back,
    row_pieces,
)
from llmmpq.measure.states import StateStore
from llmmpq.metric import _tensors, load_metric
from llmmpq.model.stream import BlockStream
from llmmpq.workdir import WorkDir
from tests import tiny

CPU = torch.device("cpu")
# Longer than the sliding window of 16, so that a mask that was lost or taken from another layer shows.
WINDOWS = tiny.token_ids(3, 24)


def measured(opened, folder, *, place="host", dtype=torch.float32, windows=WINDOWS):
    """G of each block, and how often a pass was told of."""
    skeleton, checkpoint = opened
    stream = BlockStream(skeleton, checkpoint, windows, device=CPU, dtype=dtype)
    store = StateStore(
        num_rows=len(skeleton.block_names),
        window_shapes=[(windows.shape[1], tiny.HIDDEN)] * len(windows),
        dtype=dtype,
        place=place,
        device=CPU,
        folder=folder,
    )
    found, passes = {}, []
    measure_output_metric(stream, store, on_pass=lambda: passes.append(1), save=found.__setitem__)
    store.close()
    assert list(found) == list(reversed(range(len(skeleton.block_names))))
    return found, len(passes)


def metric_by_autograd(opened):
    """The same through the model as transformers loads and runs it, with all in memory: by what gives the output."""
    skeleton, checkpoint = opened
    model, outputs = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval(), []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    names = [*skeleton.block_names, *(spec.name for spec in skeleton.linears)]
    sums, called = {}, []

    def keep(name, output):
        called.append(name)
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
    for window, ids in enumerate(WINDOWS):
        outputs.clear()
        called.clear()
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        generator = torch.Generator().manual_seed(window)
        uniform = torch.rand(NUM_DRAWS, len(ids), generator=generator, dtype=torch.float64)
        for tokens in draw_tokens(logits.detach(), uniform):
            likelihood = logits.log_softmax(-1).gather(1, tokens[:, None]).sum()
            gradients = torch.autograd.grad(likelihood, outputs, retain_graph=True)
            for name, gradient in zip(called, gradients, strict=True):
                rows = gradient.flatten(0, -2)
                sums[name] = sums.get(name, 0) + (rows.t() @ rows).double()
    assert set(sums) == set(names)
    return {name: total / (NUM_DRAWS * WINDOWS.numel()) for name, total in sums.items()}


def close(metric, expected):
    assert metric.dtype == torch.float32
    assert torch.equal(metric, metric.t())
    return float((metric.double() - expected).norm()) < 1e-4 * float(expected.norm())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_it_is_what_gradients_through_the_whole_model_give(opened, name, tmp_path):
    found, passes = measured(opened(name), tmp_path)
    assert passes == num_passes(len(found), len(WINDOWS))
    expected = metric_by_autograd(opened(name))
    skeleton, _ = opened(name)
    for index, metric in found.items():
        assert close(metric.output_DD, expected[skeleton.block_names[index]])
        assert list(metric.linears) == [spec.name for spec in skeleton.block_linears(index)]
        for linear, (piece,) in metric.linears.items():
            assert close(piece, expected[linear]), linear


def test_a_wide_linear_has_pieces(opened, tmp_path, monkeypatch):
    whole, _ = measured(opened("llama"), tmp_path)
    monkeypatch.setattr(output_metric, "PIECE", 20)
    monkeypatch.setattr(output_metric, "PIECE_OF_WIDE", 15)
    assert piece_sizes(20) == [20]
    assert piece_sizes(39) == [20, 19]
    assert piece_sizes(41) == [14, 14, 13]
    cut, _ = measured(opened("llama"), tmp_path)
    for index, metric in whole.items():
        for name, (piece,) in metric.linears.items():
            start = 0
            assert [len(own) for own in cut[index].linears[name]] == piece_sizes(len(piece))
            for own in cut[index].linears[name]:
                outputs = slice(start, start := start + len(own))
                torch.testing.assert_close(own, piece[outputs, outputs], rtol=1e-5, atol=1e-9)


def test_a_linear_that_no_gradient_reaches_is_absent(opened, tmp_path, monkeypatch):
    skeleton, _ = opened("llama")
    name = skeleton.linears[4].name

    def without(*args, on_linear):
        return pull_back(*args, on_linear=lambda own, found: own == name or on_linear(own, found))

    monkeypatch.setattr(output_metric, "pull_back", without)
    found, _ = measured(opened("llama"), tmp_path)
    block = skeleton.linears[4].block
    assert set(found[block].linears) == {spec.name for spec in skeleton.block_linears(block)} - {name}
    assert row_pieces(found[block], name, CPU) is None
    assert row_pieces(None, name, CPU) is None
    assert row_pieces(found[block], skeleton.linears[5].name, CPU) is not None


def test_gradients_that_are_no_numbers_are_left_out(opened, tmp_path, monkeypatch):
    """As if the tokens that have them were not there, for all pieces of a linear alike."""
    monkeypatch.setattr(output_metric, "PIECE", 20)
    monkeypatch.setattr(output_metric, "PIECE_OF_WIDE", 15)

    def spoiling(value):
        def spoiled(*args, on_linear):
            def show(own, gradient):
                gradient = gradient.clone()
                gradient[..., 3, 1] = value
                on_linear(own, gradient if value else gradient[..., [t for t in range(24) if t != 3], :])

            return pull_back(*args, on_linear=show)

        return spoiled

    found = []
    for value in (float("nan"), 0.0):
        monkeypatch.setattr(output_metric, "pull_back", spoiling(value))
        found.append(measured(opened("llama"), tmp_path)[0])
    for index, metric in found[0].items():
        torch.testing.assert_close(tensors(metric), tensors(found[1][index]), rtol=1e-5, atol=1e-9)


def test_a_block_that_changes_an_output_or_cuts_its_gradient(opened, tmp_path, monkeypatch):
    expected, _ = measured(opened("llama"), tmp_path)
    skeleton, _ = opened("llama")

    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        up = self.up_proj(x)
        up.mul_(gate)
        with torch.no_grad():
            self.up_proj(x)
        return self.down_proj(up)

    monkeypatch.setattr(type(skeleton.block(0).mlp), "forward", forward)
    found, _ = measured(opened("llama"), tmp_path)
    for index, metric in expected.items():
        torch.testing.assert_close(tensors(found[index]), tensors(metric), rtol=1e-4, atol=1e-8)


def test_pieces_cover_all_rows_and_survive_the_disk(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(output_metric, "PIECE", 4)
    monkeypatch.setattr(output_metric, "PIECE_OF_WIDE", 5)
    found, _ = measured(opened("llama"), tmp_path)
    skeleton, _ = opened("llama")
    spec = max(skeleton.linears, key=lambda spec: spec.shape[0])
    metric = found[spec.block]
    assert len(metric.linears[spec.name]) > 11
    pieces = row_pieces(metric, spec.name, CPU)
    assert sorted(torch.cat([piece.rows_p for piece in pieces]).tolist()) == list(range(spec.shape[0]))
    with WorkDir(tmp_path / "work") as work:
        stage = work.stage("metric", {})
        stage.save_block(spec.block, {}, _tensors(metric))
        loaded = load_metric(stage, SimpleNamespace(index=spec.block, is_head=False))
    assert set(loaded.linears) == set(metric.linears)
    for name, pieces in metric.linears.items():
        assert all(map(torch.equal, loaded.linears[name], pieces))


def tensors(metric):
    return [metric.output_DD, *(piece for pieces in metric.linears.values() for piece in pieces)]


def test_equal_bits_again_and_with_the_states_on_disk(opened, tmp_path):
    one, two, on_disk = (measured(opened("qwen2"), tmp_path, place=place)[0] for place in ("host", "host", "disk"))
    for index, metric in one.items():
        for mine, again, from_disk in zip(*map(tensors, (metric, two[index], on_disk[index])), strict=True):
            assert torch.equal(mine, again)
            assert torch.equal(mine, from_disk)
    assert list(tmp_path.iterdir()) == []


def test_the_head_takes_a_few_tokens_at_a_time(opened, tmp_path, monkeypatch):
    whole, _ = measured(opened("gemma3"), tmp_path)
    monkeypatch.setattr(output_metric, "CHUNK_NUM_LOGITS", 7 * output_metric.COPIES_OF_LOGITS * tiny.VOCAB)
    some, _ = measured(opened("gemma3"), tmp_path)
    for index, metric in whole.items():
        torch.testing.assert_close(tensors(some[index]), tensors(metric), rtol=1e-4, atol=1e-7)


def test_blocks_are_freed_and_take_no_gradients(opened, tmp_path):
    skeleton, _ = opened("llama")
    measured(opened("llama"), tmp_path)
    for parameter in skeleton.model.parameters():
        assert parameter.device.type == "meta"
        assert parameter.grad is None


def test_sixteen_bits_come_close(opened, tmp_path):
    exact, _ = measured(opened("llama"), tmp_path)
    rough, _ = measured(opened("llama"), tmp_path, dtype=torch.bfloat16)
    for index, metric in exact.items():
        for mine, whole in zip(tensors(rough[index]), tensors(metric), strict=True):
            assert mine.dtype == torch.float32
            assert float((mine - whole).norm()) < 0.5 * float(whole.norm())  # some draws are others


def test_a_model_that_diverges_has_no_metric(opened, tmp_path, monkeypatch):
    load = BlockStream._load

    def spoil(self, module, names, *, prefix):
        load(self, module, names, prefix=prefix)
        if names:
            next(iter(module.parameters())).data.fill_(float("nan"))

    monkeypatch.setattr(BlockStream, "_load", spoil)
    found, _ = measured(opened("llama"), tmp_path)
    assert list(found.values()) == [BlockMetric(output_DD=None, linears={})] * 3


def test_tokens_are_drawn_by_their_probabilities():
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(5000, -1)
    uniform = torch.rand(2, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = Counter(draw_tokens(logits, uniform).flatten().tolist())
    assert 1 not in counts
    for token, share in ((0, 0.5), (2, 0.3), (3, 0.2)):
        assert counts[token] / 10000 == pytest.approx(share, abs=0.02)
    edges = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert draw_tokens(logits[:2], edges).tolist() == [[0, 3]]


def test_mixed_with_the_identity():
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    mixed = mixed_metric(rows.t() @ rows)
    assert float(mixed.trace()) == pytest.approx(8)
    smallest, largest = torch.linalg.eigvalsh(mixed)[[0, -1]].tolist()
    assert 0.1 < smallest < 1 < largest
    assert torch.equal(mixed_metric(torch.zeros(8, 8)), torch.eye(8))
