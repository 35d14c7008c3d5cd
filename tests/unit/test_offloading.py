"""Packed linears under accelerate's offloading, which takes parameters away after each call."""

import gc
import weakref

import pytest
import torch
from torch import nn

from llmmpq.runtime import ops
from llmmpq.runtime.linear import PackedLinear
from tests.unit.test_linear import random_packed


def test_nothing_of_an_offloaded_matrix_is_held_after_a_call(monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(PackedLinear.from_packed(random_packed()))
    x = torch.randn(2, model[0].in_features)
    wanted = model(x)
    seen, multiply = [], ops.multiply

    def watch(x, operands):
        seen.extend(weakref.ref(tensor) for tensor in (operands, operands.words, operands.scales, operands.zeros))
        return multiply(x, operands)

    monkeypatch.setattr(ops, "multiply", watch)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model(x), wanted)
    assert all(parameter.is_meta for parameter in model.parameters())
    gc.collect()
    assert len(seen) == 4
    assert all(reference() is None for reference in seen)
