"""Every option of every linear of a block, quantized on the inputs that the block has now.

Linears that share an input share its second moment and factor. The moments come from all calibration tokens in one
pass through the block: those of all processes, where several share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from llmmpq.measure.moments import Moment
from llmmpq.model.stream import Block
from llmmpq.quantize.gptq import factorize
from llmmpq.quantize.linear import LinearQuantizer, quantize_linear
from llmmpq.records import LinearSpec, PackedTensor, Scheme


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How candidates are made."""

    use_gptq: bool
    damping: float
    activation_order: bool
    column_block: int
    sweeps: int
    num_probe_tokens: int


def candidates_of(
    block: Block,
    options: Mapping[str, Sequence[Scheme]],
    settings: MeasureSettings,
    *,
    warnings: list[str],
    on_output: Callable[[int, torch.Tensor], None] = lambda position, output: None,
) -> Iterator[tuple[LinearSpec, int, PackedTensor]]:
    """(linear, position among its options, its codes), in the order of the block's inputs.

    Linears that no calibration token reaches come last, rounded to nearest. `on_output` is shown the block's output
    for each batch of the pass that collects the moments; a caller that swaps weights puts them back before going on.
    """
    groups = block.input_groups()
    unreached = [spec for spec in block.linears if all(spec not in group for group in groups)]
    warnings += [
        f"{spec.name}: no calibration token reached it; its options count as equally good" for spec in unreached
    ]
    moments = {group[0].name: Moment(group[0].shape[1], device=block.device, ranks=block.ranks) for group in groups}
    leaders = [group[0] for group in groups]
    outputs = block.run_with_inputs(lambda spec, inputs: moments[spec.name].add(inputs), leaders)
    for position, output in enumerate(outputs):
        on_output(position, output)
    for group in groups:
        moment = moments.pop(group[0].name)
        mean_KK, _ = moment.means(group[0].name)
        if moment.num_excluded:
            warnings.append(f"{group[0].name}: {moment.num_excluded} tokens with NaN or inf left out")
        importance_K = mean_KK.diagonal().clone()
        factor = (
            factorize(mean_KK, damping=settings.damping, activation_order=settings.activation_order)
            if settings.use_gptq
            else None
        )
        del moment, mean_KK
        for spec in group:
            quantizer = LinearQuantizer(
                block.original_weights[spec.name],
                importance_K=importance_K,
                factor=factor,
                column_block=settings.column_block,
                sweeps=settings.sweeps,
            )
            for position, scheme in enumerate(options[spec.name]):
                yield spec, position, quantizer.quantize(scheme).packed
    for spec in unreached:
        weight = block.original_weights[spec.name]
        ones_K = torch.ones(weight.shape[1], device=weight.device)
        for position, scheme in enumerate(options[spec.name]):
            quantized = quantize_linear(weight, scheme, importance_K=ones_K, factor=None, column_block=1)
            yield spec, position, quantized.packed
