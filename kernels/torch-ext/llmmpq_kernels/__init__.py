"""Packed low-bit matrices: the bit layout and the plain-torch reference that every kernel is tested against."""

from .layout import pack, unpack
from .reference import dequantize, packed_linear

__all__ = ["dequantize", "pack", "packed_linear", "unpack"]
