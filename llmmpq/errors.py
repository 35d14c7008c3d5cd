"""The exception tree. Every message says what is wrong, the value seen, what is allowed and what to do.

    LlmmpqError
    |-- RecipeError             wrong key, type or value
    |-- CheckpointError         missing shard, bad dtype, digest mismatch, unknown layout version, write failed
    |-- UnsupportedModelError   no decoder blocks found, a layer kind we cannot quantize
    |-- CalibrationError        too few tokens, non-finite activations, unreadable text
    |-- InfeasibleBudgetError   budget below the smallest plan
    |-- KernelUnavailableError  a kernel was asked for that cannot run here
    |-- HubError                the Hub cannot be reached, or refuses what was asked
    `-- RankError               another process of this run ended or cannot be reached

`cli.py` turns these into one line and exit code 2. Anything else is a bug of ours and keeps its traceback.
"""


class LlmmpqError(Exception):
    """Base of every error a user can act on."""


class RecipeError(LlmmpqError):
    """A recipe or flag has a wrong key, type or value."""


class CheckpointError(LlmmpqError):
    """A model folder cannot be read or written as asked."""


class UnsupportedModelError(LlmmpqError):
    """The architecture holds something that cannot be quantized yet."""


class CalibrationError(LlmmpqError):
    """The calibration text or the activations it produces cannot be used."""


class InfeasibleBudgetError(LlmmpqError):
    """No assignment of bits meets the budget and the pins."""


class KernelUnavailableError(LlmmpqError):
    """A kernel was asked for by name that cannot run on this device."""


class HubError(LlmmpqError):
    """The Hub cannot be reached, or refuses what was asked of it."""


class RankError(LlmmpqError):
    """The processes of one run cannot reach each other, or one of them has ended."""
