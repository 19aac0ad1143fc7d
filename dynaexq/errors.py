"""The exceptions dynaexq raises; every message names what was expected, what came and the remedy.

DynaExqError
├── SettingsError(ValueError)         an option has a value it cannot take
├── BudgetError(ValueError)           nothing that was asked for fits the byte budget
├── UnsupportedModelError(TypeError)  this model, or the state it is in, cannot be patched
├── PatchError(RuntimeError)          an operation that a patched model cannot carry out
│   └── UnpatchError                  the exact original weights cannot be reached any more
├── QuantizationError(ValueError)     a weight that no code can represent (NaN, infinity)
├── StoreError(OSError)               upgrade bytes could not be read or written
├── CheckpointError(OSError)          a checkpoint that is incomplete, damaged, of another kind, or cannot be written
├── TraceError(ValueError)            a routing trace that cannot be read, or a recording that cannot begin
├── HotnessError(ValueError)          a hotness file that cannot be read, or of another model
├── InputError(ValueError)            tensors that do not belong together were given to a layer
├── ReentryError(RuntimeError)        control was asked for from within itself, where waiting would never end
└── ClosedError(RuntimeError)         the runtime was closed
"""


class DynaExqError(Exception):
    """Base of all errors raised by dynaexq."""


class SettingsError(DynaExqError, ValueError):
    """An option has a value it cannot take."""


class BudgetError(DynaExqError, ValueError):
    """The byte budget cannot hold the model at the requested tiers.

    Attributes:
        budget: the bytes that were given.
        least: the least budget, in bytes, that fits what was asked for.
    """

    def __init__(self, message: str, budget: int, least: int):
        super().__init__(message)
        self.budget = budget
        self.least = least


class UnsupportedModelError(DynaExqError, TypeError):
    """This model, or the state it is in, cannot be patched."""


class PatchError(DynaExqError, RuntimeError):
    """An operation that a patched model cannot carry out."""


class UnpatchError(PatchError):
    """The exact original weights cannot be reached any more; the model is left patched and working."""


class QuantizationError(DynaExqError, ValueError):
    """A weight that no code can represent."""


class StoreError(DynaExqError, OSError):
    """Upgrade bytes could not be read from, or written to, the host store."""


class CheckpointError(DynaExqError, OSError):
    """A checkpoint that is incomplete, damaged, or of another kind than was expected, or that cannot be written."""


class ClosedError(DynaExqError, RuntimeError):
    """The runtime was closed and its memory released."""


class TraceError(DynaExqError, ValueError):
    """A routing trace that cannot be read, or a recording that cannot begin."""


class InputError(DynaExqError, ValueError):
    """Tensors that do not belong together, or not to the layer that they were given to."""


class ReentryError(DynaExqError, RuntimeError):
    """Control was asked for from within itself (a policy, a signal handler), where waiting would never end."""


class HotnessError(DynaExqError, ValueError):
    """A hotness file that cannot be read, or that belongs to another model."""


class NoServerError(DynaExqError, OSError):
    """No server of dynaexq answers at an address."""
