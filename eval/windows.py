"""Which windows of a text to judge on, when it has more than are asked for."""

from __future__ import annotations

import torch


def spread(windows: torch.Tensor, num: int) -> torch.Tensor:
    """So many of them, evenly over the text: its first pages may be of one subject, on which models differ by luck."""
    if len(windows) <= num:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, num).round().long()]
