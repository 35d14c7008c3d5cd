"""One matrix at a time: grids, rounding, GPTQ, packing. Pure functions on tensors."""
