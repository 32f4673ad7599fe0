"""Errors whose message is written for the person at the keyboard."""

from __future__ import annotations


class OptionError(ValueError):
    """An option, or a combination of options, that cannot be honoured."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be found, read, written or fitted to the model."""


class NonFiniteLossError(RuntimeError):
    """A loss or gradient that is not finite; raised before the optimizer step."""


class ExportError(RuntimeError):
    """A model that cannot be exported, or an exported file that does not compute what the model computes."""
