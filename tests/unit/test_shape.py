"""Rows that share their errors: every step against the least squares it stands for."""

import pytest
import torch

from llmmpq.measure.output_metric import mixed_metric
from llmmpq.quantize.gptq import factorize
from llmmpq.quantize.linear import LinearQuantizer, dequantized
from llmmpq.quantize.shape import NUM_PARTS, SMALLEST_PART, shape_errors, share_rows
from llmmpq.records import Scheme

ROWS, COLUMNS = 40, 24


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def metric_of(num_rows, *, seed=1):
    """Few strong directions, as gradients have them."""
    gradients = random(3 * num_rows, num_rows, seed=seed) * torch.logspace(1, -1, num_rows)
    gradients = gradients @ torch.linalg.qr(random(num_rows, num_rows, seed=seed + 1))[0]
    return mixed_metric(gradients.t() @ gradients)


def cost(metric_NN, error_NK, moment_KK):
    return float(((metric_NN @ error_NK) * (error_NK @ moment_KK)).double().sum())


def halves(rows, wanted):
    return (wanted * 2).round() / 2


def test_what_is_on_the_grid_already_stays():
    weight = random(ROWS, COLUMNS)
    assert torch.equal(shape_errors(weight, share_rows([metric_of(ROWS)]), lambda rows, wanted: wanted), weight)


def test_every_row_is_visited_once_and_those_that_matter_most_first():
    metric, seen = metric_of(ROWS), []

    def note(rows, wanted):
        seen.append(rows.tolist())
        return wanted

    shape_errors(random(ROWS, COLUMNS), share_rows([metric]), note)
    order = [row for rows in seen for row in rows]
    assert order == torch.argsort(metric.diagonal(), descending=True, stable=True).tolist()
    assert [len(rows) for rows in seen] == [SMALLEST_PART] * (ROWS // SMALLEST_PART)


@pytest.mark.parametrize(("rows", "sizes"), [(1, [1]), (100, [8] * 12 + [4]), (160, [10] * 16), (170, [11] * 15 + [5])])
def test_sizes_of_parts(rows, sizes):
    (piece,) = share_rows([torch.eye(rows)])
    parts = [piece.part(number) for number in range(NUM_PARTS)]
    assert [part.stop - part.start for part in parts] == sizes + [0] * (NUM_PARTS - len(sizes))


def test_the_rows_to_come_are_where_they_cost_least():
    """After each part the others, if they need not be rounded, make the whole cost as small as it can be."""
    metric, weight = metric_of(ROWS), random(ROWS, COLUMNS)
    done, errors, checked = [], torch.zeros(ROWS, COLUMNS), []

    def check(rows, wanted):
        if done:
            others = [row for row in range(ROWS) if row not in done]
            best = torch.linalg.solve(metric[others][:, others], metric[others][:, done] @ errors[done])
            place = [others.index(row) for row in rows.tolist()]
            # error = weight - value, and what is wanted has none of its own: value = weight + best
            torch.testing.assert_close(wanted, weight[rows] + best[place], rtol=1e-3, atol=1e-4)
            checked.append(len(rows))
        values = halves(rows, wanted)
        errors[rows] = weight[rows] - values
        done.extend(rows.tolist())
        return values

    shape_errors(weight, share_rows([metric]), check)
    assert sum(checked) == ROWS - SMALLEST_PART


def test_rows_of_different_pieces_do_not_share():
    sizes = (ROWS, 7, 1)
    metrics = [metric_of(size, seed=size) for size in sizes]
    weight = random(sum(sizes), COLUMNS)
    together = shape_errors(weight, share_rows(metrics), halves)
    start = 0
    for size, metric in zip(sizes, metrics, strict=True):
        alone = shape_errors(weight[start : start + size], share_rows([metric]), halves)
        torch.testing.assert_close(together[start : start + size], alone)
        start += size
    assert torch.equal(together[-1], weight[-1])


def test_a_metric_of_no_use_is_no_factor():
    assert share_rows([torch.eye(4), torch.full((4, 4), float("nan"))]) is None


def quantizers(weight, moment, metrics):
    factor = factorize(moment, damping=0.01, activation_order=True)
    return [
        LinearQuantizer(
            weight, importance_K=moment.diagonal(), factor=factor, column_block=16, sweeps=1, pieces=share_rows(metrics)
        )
        for metrics in metrics
    ]


SCHEMES = [
    Scheme(bits=2, group_size=8, symmetric=False),
    Scheme(bits=3, group_size=8, symmetric=False, scale_dtype="float8"),
    Scheme(bits=4, group_size=8, symmetric=True, scale_dtype="float8"),
    Scheme(bits=None, group_size=8, symmetric=False, runs=((2, 2), (4, 1))),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=["2", "3", "4", "mixed"])
def test_the_error_that_matters_falls_and_the_plain_one_grows(scheme):
    weight, inputs, metric = random(ROWS, COLUMNS), random(200, COLUMNS, seed=5), metric_of(ROWS)
    moment = inputs.t() @ inputs / 200
    shaped, plain = (
        weight - dequantized(one.quantize(scheme).packed, torch.float32)
        for one in quantizers(weight, moment, [[metric], [torch.eye(ROWS)]])
    )
    assert cost(metric, shaped, moment) < 0.9 * cost(metric, plain, moment)
    assert cost(torch.eye(ROWS), shaped, moment) > cost(torch.eye(ROWS), plain, moment)


@pytest.mark.parametrize("scheme", SCHEMES, ids=["2", "3", "4", "mixed"])
def test_rows_that_matter_alike_are_quantized_as_if_each_were_alone(scheme):
    weight, inputs = random(ROWS, COLUMNS), random(200, COLUMNS, seed=5)
    moment = inputs.t() @ inputs / 200
    (shaped,) = quantizers(weight, moment, [[torch.eye(25), torch.eye(ROWS - 25)]])
    plain = LinearQuantizer(weight, importance_K=moment.diagonal(), factor=shaped.factor, column_block=16, sweeps=1)
    found, expected = (dequantized(one.quantize(scheme).packed, torch.float32) for one in (shaped, plain))
    assert torch.equal(found, expected)


def test_what_tuning_begins_with_is_what_was_packed():
    weight, inputs, metric = random(ROWS, COLUMNS), random(200, COLUMNS, seed=5), metric_of(ROWS)
    (quantizer,) = quantizers(weight, inputs.t() @ inputs, [[metric]])
    quantized = quantizer.quantize(SCHEMES[0], to_be_tuned=True)
    rounded = quantized.rounded
    assert torch.equal(rounded.grid.values(rounded.codes_NK), dequantized(quantized.packed, torch.float32))
