"""Packed low-bit matrices: the bit layout and the plain-torch reference that every kernel is tested against."""

from .layout import pack, unpack
from .reference import dequantize, packed_linear
from .runs import locate_runs, pack_runs, pack_zeros
from .scales import nearest_scale_codes, widen_scales

__all__ = [
    "dequantize",
    "locate_runs",
    "nearest_scale_codes",
    "pack",
    "pack_runs",
    "pack_zeros",
    "packed_linear",
    "unpack",
    "widen_scales",
]
