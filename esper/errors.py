"""Every exception that Esper raises on purpose.

The text follows one template: what was expected, what arrived, where, and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "AttachError",
    "CheckpointError",
    "ConfigError",
    "DataFormatError",
    "DataNotFoundError",
    "EsperError",
    "ExportError",
    "GrowthError",
    "LearningError",
    "LifecycleError",
    "MessageError",
    "MissingExtraError",
    "RankError",
    "StoreError",
    "UnsupportedError",
]


class EsperError(Exception):
    """Base class of every error raised by Esper."""


class ConfigError(EsperError, ValueError):
    """A setting is missing, unknown or out of range."""


class AttachError(EsperError, RuntimeError):
    """A model, or a part of it, cannot carry seeds."""


class GrowthError(EsperError, RuntimeError):
    """A seed cannot be built, placed or removed as asked."""


class LifecycleError(EsperError, RuntimeError):
    """A stage transition was asked for that the lifecycle does not allow."""


class CheckpointError(EsperError, RuntimeError):
    """A checkpoint is corrupt, foreign, or does not fit the model."""


class LearningError(EsperError, RuntimeError):
    """A policy cannot be trained further: a loss or a gradient is NaN or inf."""


class ExportError(EsperError, RuntimeError):
    """A grown network cannot be written in the format asked for."""


class MessageError(EsperError, ValueError):
    """Bytes from the bus are not a valid message."""


class UnsupportedError(EsperError, RuntimeError):
    """A trainer setting or optimizer that growth cannot work with; raised before training starts."""


class DataNotFoundError(EsperError, FileNotFoundError):
    """A data set is not where it was looked for."""


class DataFormatError(EsperError, ValueError):
    """A data file is there but does not hold what its format promises."""


class StoreError(EsperError, RuntimeError):
    """A store of experiences cannot be read or written now: it is locked, full, or gone."""


class MissingExtraError(EsperError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class RankError(RuntimeError):
    """Another process of this run has failed, so this one stops too.

    No :class:`EsperError`, because nothing may take it for a refusal and train on.
    """
