"""Every error a user can cause, as one tree.

    CollegiumError
    ├── ConfigError            a setting, or a combination of settings, is not allowed
    ├── ModelError             a model cannot be used as asked
    │   ├── NotMoEError            it has no MoE block
    │   ├── UnsupportedFamilyError its MoE block is of a family no adapter covers
    │   ├── CheckpointError        its files are missing, truncated, or do not fit the config
    │   ├── NonFiniteError         a tensor holds NaN or infinity
    │   └── RemoteCodeError        its config asks to execute code that came with the checkpoint
    ├── DataError              a corpus cannot be read, or nothing usable is in it
    ├── TraceError             a trace folder is not readable
    ├── StatisticsError        a folder of statistics is not readable
    ├── PlanError              a plan is not readable, contradicts itself, or is for another model
    └── StorageError           a file could not be written (disk full, no permission)

A message says what was wrong, the value seen, where, and what to do. The command line prints it on one
line and exits with status 2; anything that is not a ``CollegiumError`` is a defect of ours and shows its traceback.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CollegiumError",
    "ConfigError",
    "DataError",
    "ModelError",
    "NonFiniteError",
    "NotMoEError",
    "PlanError",
    "RemoteCodeError",
    "StatisticsError",
    "StorageError",
    "TraceError",
    "UnsupportedFamilyError",
]


class CollegiumError(Exception):
    """Base of every error a user can cause."""


class ConfigError(CollegiumError, ValueError):
    """A setting, or a combination of settings, is not allowed."""


class ModelError(CollegiumError):
    """A model cannot be used as asked."""


class NotMoEError(ModelError):
    """The model has no MoE block."""


class UnsupportedFamilyError(ModelError):
    """The model's MoE block is of a family that no adapter covers."""


class CheckpointError(ModelError):
    """Checkpoint files are missing, truncated, or do not fit the config."""


class NonFiniteError(ModelError):
    """A tensor holds NaN or infinity; the message names it."""


class RemoteCodeError(ModelError):
    """The config asks to execute code that came with the checkpoint."""


class DataError(CollegiumError):
    """A corpus cannot be read, or nothing usable is in it."""


class TraceError(CollegiumError):
    """A trace folder is not readable."""


class StatisticsError(CollegiumError):
    """A folder of statistics is not readable."""


class PlanError(CollegiumError):
    """A plan is not readable, contradicts itself, or is for another model."""


class StorageError(CollegiumError, OSError):
    """A file could not be written; what was there before is still there."""
