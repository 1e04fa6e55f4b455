"""What can be wrong with a checkpoint, an export request or a package."""

from qwenport import QwenportError


class ConfigError(QwenportError):
    """config.json holds something Qwenport would have to guess about, or does not support."""


class CheckpointError(QwenportError):
    """The checkpoint's files are missing, damaged, or not what its config.json promises."""


class ExportError(QwenportError):
    """The export that was asked for cannot be made."""


class PackageError(QwenportError):
    """A package directory is not one, is of another format version, or was changed after export."""


class TracingError(QwenportError):
    """The traced module used an operator that has no ONNX translation here."""
