"""What can be wrong with a checkpoint, an export request or a package."""

from qwenport import QwenportError


class ConfigError(QwenportError):
    """config.json holds something ambiguous or unsupported."""


class CheckpointError(QwenportError):
    """The checkpoint's files are missing, damaged, or do not match its config.json."""


class ExportError(QwenportError):
    """The requested export is not possible."""


class PackageError(QwenportError):
    """A directory is not a package, has another format version, or was changed after export."""


class TracingError(QwenportError):
    """The traced module uses an operator without an ONNX translation here."""
