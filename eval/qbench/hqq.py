"""hqq: half-quadratic quantization, without calibration text. Settings: `group_size` (64). Bits: 2, 3, 4, 8.

Codes come from float32 weights; scales and zeros are stored in float16, as its default compute dtype does, and enter
the judged weights as stored. Three bits are packed ten to a word of 32, so they take 3.2.
"""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from qbench_exchange import Job, Result, nbytes_of


def quantize(job: Job) -> Result:
    job.accept_settings("group_size")
    bits = job.whole_bits(2, 3, 4, 8)
    config = BaseQuantizeConfig(nbits=bits, group_size=job.setting("group_size", 64), axis=1)
    model = job.load_model()
    weights, nbytes = {}, {}
    for name in job.linears:
        linear = HQQLinear(model.get_submodule(name), config, compute_dtype=torch.float16, device="cpu", del_orig=False)
        nbytes[name] = nbytes_of(linear.W_q, linear.meta["scale"], linear.meta["zero"])
        exact = linear.meta | {key: linear.meta[key].float() for key in ("scale", "zero")}
        weights[name] = Quantizer.dequantize(linear.W_q.data, exact | {"compute_dtype": torch.float32})
    return Result(
        weights=weights,
        nbytes=nbytes,
        counted="its packed codes (3 bits take 3.2), 16-bit scales and zeros",
        package="hqq",
    )
