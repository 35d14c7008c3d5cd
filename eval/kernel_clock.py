"""The time of one call on a GPU, of a copy, and of what others multiply with: cuBLAS, torch's int4 product, GemLite."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from kernel_operands import GROUP_SIZE, num_copies

LAUNCHES, REPLAYS = 20, 7


def eager_microseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Of one call that the host launches, the calls taken in turn."""
    if device.type == "cpu":
        return microseconds(calls, device)
    times = []
    for _ in range(REPLAYS + 1):  # the first is not counted
        torch.cuda.synchronize()
        started = time.perf_counter()
        for index in range(LAUNCHES):
            calls[index % len(calls)]()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - started) / LAUNCHES)
    return statistics.median(times[1:])


def microseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Of one call, the calls taken in turn."""
    for call in calls[:2]:
        call()
    if device.type == "cpu":
        started = time.perf_counter()
        calls[0]()
        return 1e6 * (time.perf_counter() - started)
    num = max(LAUNCHES, len(calls))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(num):
            calls[index % len(calls)]()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / num)
    return statistics.median(times)


def copy_gbytes_per_s(device: torch.device) -> float:
    source = torch.ones((2**28 if device.type == "cuda" else 2**22,), device=device)
    targets = [torch.empty_like(source) for _ in range(2)]
    return 2 * source.nbytes / microseconds([partial(to.copy_, source) for to in targets], device) / 1000


def cublas(shape: tuple[int, int], x: torch.Tensor) -> float:
    num = num_copies(2 * shape[0] * shape[1])
    weights = [torch.randn(shape, device=x.device, dtype=x.dtype) for _ in range(num)]
    return microseconds([partial(torch.nn.functional.linear, x, w) for w in weights], x.device)


def torch_int4(shape: tuple[int, int], x: torch.Tensor) -> float:
    """torch's own packed product: 4 bits, groups of 128, bfloat16. Its weights are random: no result to compare."""
    num_n, num_k = shape
    raw = torch.randint(0, 256, (num_n, num_k // 2), device=x.device, dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(raw, 8)
    scales = torch.rand(num_k // GROUP_SIZE, num_n, 2, device=x.device, dtype=x.dtype)
    copies = [packed.clone() for _ in range(num_copies(packed.nbytes))]
    product = torch.ops.aten._weight_int4pack_mm
    return microseconds([partial(product, x, w, GROUP_SIZE, scales) for w in copies], x.device)


def gemlite(shape: tuple[int, int], x: torch.Tensor) -> float:
    """GemLite at 4 bits, groups of 128, where it is installed."""
    from gemlite.core import DType, GemLiteLinear

    num_n, num_k = shape
    layers = []
    for _ in range(min(16, num_copies(num_n * num_k // 2))):
        layer = GemLiteLinear(
            4,
            group_size=GROUP_SIZE,
            in_features=num_k,
            out_features=num_n,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        codes = torch.randint(0, 16, shape, device=x.device, dtype=torch.uint8)
        scales = torch.rand(num_n, num_k // GROUP_SIZE, device=x.device, dtype=x.dtype)
        layer.pack(codes, scales, torch.full_like(scales, 8), None)
        layers.append(layer)
    return microseconds([partial(layer, x) for layer in layers], x.device)


OTHERS = {"torch int4": torch_int4, "gemlite": gemlite}
