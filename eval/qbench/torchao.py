"""torchao: weight-only integers without calibration text. Bits: 1 to 8.

Settings: `group_size` (64), `algorithm` (affine: minimum and maximum; hqq: its search for scales, symmetric only),
`symmetric` (true). It keeps a byte per code in memory and leaves packing to the runtime, so the bytes are what its
codes take when packed without gaps: generous to it, since no file of that size comes out.
"""

from __future__ import annotations

import torch
from qbench_exchange import AdapterError, Job, Result, packed_nbytes
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm


def quantize(job: Job) -> Result:
    job.accept_settings("group_size", "algorithm", "symmetric")
    bits, group_size = job.whole_bits(*range(1, 9)), job.setting("group_size", 64)
    algorithm = job.setting("algorithm", "affine", ("affine", "hqq"))
    symmetric = job.setting("symmetric", True, (True, False))
    if algorithm == "hqq" and not symmetric:
        raise AdapterError("algorithm hqq is symmetric only")
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group_size),
        mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm={
            "affine": IntxChooseQParamsAlgorithm.AFFINE,
            "hqq": IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
        }[algorithm],
    )
    model = job.load_model()
    quantize_(model, config, filter_fn=lambda module, name: name in job.linears)
    weights, nbytes = {}, {}
    for name in job.linears:
        stored = model.get_submodule(name).weight
        scale = stored.scale.to(torch.float16).float()
        groups = (stored.qdata.reshape(*scale.shape, -1).float(), stored.zero_point.float(), scale)
        weights[name] = ((groups[0] - groups[1][..., None]) * groups[2][..., None]).reshape(stored.qdata.shape)
        zero_bits = 0 if symmetric else bits * scale.numel()
        nbytes[name] = packed_nbytes(stored.qdata.numel(), bits, 16 * scale.numel(), zero_bits)
    return Result(
        weights=weights,
        nbytes=nbytes,
        counted="its codes as if packed (it stores a byte each), 16-bit scales, zeros as wide as codes",
        package="torchao",
    )
