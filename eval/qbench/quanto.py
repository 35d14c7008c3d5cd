"""optimum-quanto: round to nearest by minimum and maximum. Settings: `group_size` (64). Bits: 2, 4.

It keeps scales and shifts in the dtype of the model. Codes come from float32 weights here, and scales and shifts are
rounded to float16 afterwards, as a 16-bit checkpoint would store them: closer than running all of it in 16 bits.
"""

from __future__ import annotations

import torch
from optimum.quanto import QLinear, freeze, qint2, qint4
from optimum.quanto import quantize as quantize_model
from qbench_exchange import AdapterError, Job, Result


def quantize(job: Job) -> Result:
    job.accept_settings("group_size")
    bits, group_size = job.whole_bits(2, 4), job.setting("group_size", 64)
    model = job.load_model()
    quantize_model(model, weights={2: qint2, 4: qint4}[bits], include=list(job.linears))
    weights, nbytes = {}, {}
    linears = {name: model.get_submodule(name) for name in job.linears}
    for name, linear in linears.items():
        if not isinstance(linear, QLinear) or linear.in_features % group_size:
            raise AdapterError(f"{name} cannot be quantized in groups of {group_size}")
        linear.weight_group_size = group_size
    freeze(model)
    for name, linear in linears.items():
        stored = linear.weight
        stored._scale, stored._shift = (t.to(torch.float16).float() for t in (stored._scale, stored._shift))
        weights[name] = stored.dequantize()
        num_parameters = stored._scale.numel() + stored._shift.numel()
        nbytes[name] = stored._data._data.numel() + 2 * num_parameters
    return Result(
        weights=weights,
        nbytes=nbytes,
        counted="its packed codes, 16-bit scales and shifts",
        package="optimum-quanto",
    )
