"""Carry out a plan, block by block: collect second moments, quantize, let the next block see the result.

Sequential (the default): within a block the linears are taken in the order in which they run, each seeing inputs
that already went through the quantized ones before it, and the next block sees the quantized block's outputs. With
a correction share above 0 the unchanged model is followed beside it, and each layer's target moves towards what that
layer gave in it, or, where its output is added to a stream, towards what the stream was there: a later layer repairs
what an earlier one broke. Not sequential: every layer sees the original model's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from llmmpq.errors import CalibrationError
from llmmpq.measure.moments import Moment
from llmmpq.measure.output_metric import BlockMetric, mixed_metric, row_pieces
from llmmpq.model.landing import Landing, errors_where_it_lands, landing_of
from llmmpq.model.stream import Block
from llmmpq.quantize.correct import corrected_weight, correction_target
from llmmpq.quantize.gptq import Factor, factorize
from llmmpq.quantize.linear import LinearQuantizer, dequantized, pack_codes, quantize_linear
from llmmpq.quantize.tune import Rounded, Tuned
from llmmpq.records import LinearSpec, PackedTensor, Plan, Scheme
from llmmpq.tuning import tune_block

NO_GRADIENT = "no gradient of the calibration text reached it, or none that is a number"
UNFACTORED = "the second moment of its gradients could not be factored"


@dataclass(frozen=True, kw_only=True)
class ExecuteSettings:
    """How a plan is carried out."""

    use_gptq: bool
    damping: float
    activation_order: bool
    column_block: int
    sweeps: int
    sequential: bool
    correction: float
    correct_stream: bool = True  # what has gone wrong where the output is added, or with the layer's own output only
    shape_errors: bool = False  # by the metric of each linear's output, across its rows
    tune: int = 0  # steps
    tune_by_output: bool = True  # the block's error weighed by its metric, or squared as it is

    @property
    def corrects(self) -> bool:
        return self.sequential and self.use_gptq and self.correction > 0

    @property
    def corrects_stream(self) -> bool:
        return self.corrects and self.correct_stream

    @property
    def shapes(self) -> bool:
        return self.shape_errors and self.use_gptq

    @property
    def needs_metric(self) -> bool:
        return self.shapes or (self.tune > 0 and self.tune_by_output)

    @property
    def follow_original(self) -> bool:
        return self.corrects or (self.sequential and self.tune > 0)


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """The packed linears of one block and, for the report, what happened to each."""

    packed: dict[str, PackedTensor]
    notes: dict[str, dict[str, object]] = field(default_factory=dict)
    others: dict[str, dict[Scheme, PackedTensor]] = field(default_factory=dict)  # schemes that the plan did not choose


def quantize_block(
    block: Block,
    plan: Plan,
    settings: ExecuteSettings,
    *,
    on_linear: Callable[[LinearSpec], None],
    options: Mapping[str, Sequence[Scheme]] | None = None,
    metric: BlockMetric | None = None,
) -> BlockResult:
    """Quantize every linear of the block; on return its weights are what the next block must see.

    With `options`, each linear is also quantized in the schemes it might have had, on the same inputs. `metric` says
    how much each output matters, where the settings need it; an output head has none.
    """
    packed: dict[str, PackedTensor] = {}
    notes: dict[str, dict[str, object]] = {}
    others: dict[str, dict[Scheme, PackedTensor]] = {}
    originals = block.original_weights
    # An output head has nothing behind it to be tuned for: its own loss is what GPTQ minimises.
    to_be_tuned = settings.tune > 0 and not block.is_head
    rounded: dict[str, Rounded] = {}
    groups = block.input_groups()
    for group in groups:
        landing = landing_of(block, group[0]) if settings.corrects_stream and len(group) == 1 else None
        moment = _moment_of(block, group[0], landing, corrects=settings.corrects)
        mean_KK, cross_EK = moment.means(group[0].name)
        importance_K = mean_KK.diagonal().clone()
        # The widest moments decide the peak of memory: the cross moment is gone before the factor is made.
        targets = {} if cross_EK is None else _targets(group, originals, cross_EK, landing)
        del cross_EK
        trace = float(importance_K.double().sum())
        factor = (
            factorize(mean_KK, damping=settings.damping, activation_order=settings.activation_order)
            if settings.use_gptq
            else None
        )
        for spec in group:
            weight = originals[spec.name]
            if factor is not None and spec.name in targets:
                weight = corrected_weight(weight, targets.pop(spec.name), factor, share=settings.correction)
            pieces = None
            if settings.shape_errors and factor is not None:
                pieces = row_pieces(metric, spec.name, block.device)
            quantizer = LinearQuantizer(
                weight,
                importance_K=importance_K,
                factor=factor,
                column_block=settings.column_block,
                sweeps=settings.sweeps,
                pieces=pieces,
            )
            quantized = quantizer.quantize(plan.linears[spec.name].scheme, to_be_tuned=to_be_tuned)
            if quantized.rounded is not None:
                rounded[spec.name] = quantized.rounded
            block.ranks.take_first_(quantized.packed.tensors())  # equal already, unless their machines differ
            packed[spec.name] = quantized.packed
            others[spec.name] = {
                scheme: quantizer.quantize(scheme).packed
                for scheme in (options or {}).get(spec.name, ())
                if scheme != plan.linears[spec.name].scheme
            }
            notes[spec.name] = _note(quantized.algorithm, settings, factor, moment, trace)
            if factor is not None and settings.shape_errors and pieces is None and not block.is_head:
                known = metric is not None and spec.name in metric.linears
                notes[spec.name]["unshaped"] = UNFACTORED if known else NO_GRADIENT
            if landing is not None:
                notes[spec.name]["corrects"] = f"input of {landing.module}" if landing.module else "output of the block"
            if settings.sequential:
                block.linear(spec).weight.data = dequantized(quantized.packed, originals[spec.name].dtype)
            on_linear(spec)
        del moment, mean_KK, factor
    for spec in block.linears:
        if spec.name not in packed:
            weight = originals[spec.name]
            ones_K = torch.ones(weight.shape[1], device=weight.device)
            quantized = quantize_linear(
                weight, plan.linears[spec.name].scheme, importance_K=ones_K, factor=None, column_block=1
            )
            packed[spec.name] = quantized.packed
            notes[spec.name] = {"algorithm": "rtn", "fallback": "no calibration token reached this layer"}
            if settings.sequential:
                block.linear(spec).weight.data = dequantized(quantized.packed, weight.dtype)
            on_linear(spec)
    if rounded:
        metric_DD = None
        if metric is not None and settings.tune_by_output:
            if metric.output_DD is None:
                raise CalibrationError(
                    f"no gradient by the output of {block.name} is a number: tuning cannot weigh its error. Tune with "
                    "tune_metric: plain, or calibrate on other text."
                )
            metric_DD = mixed_metric(metric.output_DD.to(block.device))
        tuned = tune_block(block, rounded, steps=settings.tune, metric_DD=metric_DD)
        _take(tuned, block, list(rounded), settings, packed=packed, notes=notes)
    order = [spec.name for spec in block.linears]
    return BlockResult(packed={n: packed[n] for n in order}, notes={n: notes[n] for n in order}, others=others)


def _take(
    tuned: Tuned | None,
    block: Block,
    names: Sequence[str],
    settings: ExecuteSettings,
    *,
    packed: dict[str, PackedTensor],
    notes: dict[str, dict[str, object]],
) -> None:
    """`packed`, `notes` and the block take what tuning has made of these linears."""
    if tuned is None:
        for name in names:
            notes[name]["untuned"] = "no calibration text was free of NaN and inf"
        return
    specs = {spec.name: spec for spec in block.linears}
    for name, matrix, changed in zip(names, tuned.matrices, tuned.changed_codes, strict=True):
        notes[name]["tuned"] = {
            "kept": tuned.kept,
            "changed_codes": changed,
            "held_back_loss": [tuned.loss_before, tuned.loss_after],
        }
        packed[name] = pack_codes(matrix.codes_NK, matrix.grid)
        block.ranks.take_first_(packed[name].tensors())
        if settings.sequential:
            linear = block.linear(specs[name])
            linear.weight.data = dequantized(packed[name], linear.weight.dtype)


def _moment_of(block: Block, spec: LinearSpec, landing: Landing | None, *, corrects: bool) -> Moment:
    """Of the input, and of it with the errors that a correction is to undo: of the input itself, or where it lands."""
    num_errors = spec.shape[0 if landing else 1] if corrects else 0
    moment = Moment(spec.shape[1], device=block.device, num_errors=num_errors, ranks=block.ranks)
    if landing is not None:
        for inputs, errors in errors_where_it_lands(block, spec, landing):
            moment.add(inputs, errors)
        return moment
    for inputs, originals in block.inputs_of(spec):
        change: torch.Tensor | None = None
        # A layer that sees only some tokens may see others in the original model: which belong together is not known.
        if originals is not None and originals.shape == inputs.shape:
            change = originals.float() - inputs.float()
        moment.add(inputs, change)
    return moment


def _targets(
    group: Sequence[LinearSpec], weights: dict[str, torch.Tensor], cross_EK: torch.Tensor, landing: Landing | None
) -> dict[str, torch.Tensor]:
    """What each linear's output would have to add, times its input, in the mean."""
    if landing is not None:
        return {group[0].name: cross_EK}
    return {spec.name: correction_target(weights[spec.name], cross_EK) for spec in group}


def apply_result(block: Block, result: BlockResult) -> None:
    """Put the quantized weights of an earlier run into the block."""
    for spec in block.linears:
        linear = block.linear(spec)
        packed = result.packed[spec.name]
        moved = PackedTensor.from_tensors(
            {key: tensor.to(block.device) for key, tensor in packed.tensors().items()}, packed.scheme, packed.shape
        )
        linear.weight.data = dequantized(moved, linear.weight.dtype)


def _note(
    algorithm: str, settings: ExecuteSettings, factor: Factor | None, moment: Moment, trace: float
) -> dict[str, object]:
    note: dict[str, object] = {"algorithm": algorithm, "input_energy": trace}
    if factor is not None:
        note["damping"] = factor.damping
        if factor.num_dead:
            note["dead_channels"] = factor.num_dead
    elif settings.use_gptq:
        note["fallback"] = "the second moment of the inputs could not be factored: rounded to nearest instead"
    if moment.num_excluded:
        note["excluded_tokens"] = moment.num_excluded
    if moment.num_without_errors:
        note["uncorrected_tokens"] = moment.num_without_errors
    return note


def fallbacks(notes: Sequence[tuple[str, dict[str, object]]]) -> list[str]:
    """One sentence for each linear that did not get the algorithm asked for, or lost tokens."""
    sentences = [f"{name}: {note['fallback']}" for name, note in notes if "fallback" in note]
    sentences += [
        f"{name}: {note['excluded_tokens']} tokens with NaN or inf left out"
        for name, note in notes
        if "excluded_tokens" in note
    ]
    sentences += [
        f"{name}: {note['uncorrected_tokens']} tokens not corrected for: the original model sends others here"
        for name, note in notes
        if "uncorrected_tokens" in note
    ]
    sentences += [f"{name}: rows share no errors: {note['unshaped']}" for name, note in notes if "unshaped" in note]
    sentences += [f"{name}: not tuned: {note['untuned']}" for name, note in notes if "untuned" in note]
    return sentences
