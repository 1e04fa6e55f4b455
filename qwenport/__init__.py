"""Export Qwen and Llama checkpoints to ONNX, build TensorRT engines from them, and prove parity.

Only the standard library is imported here: the command line starts through this module.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"

__all__ = ["MissingExtraError", "QwenportError", "__version__", "import_extra"]


class QwenportError(Exception):
    """Every error meant for the user; the command line prints it as one line and exits 2."""


class MissingExtraError(QwenportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        """State which distribution `purpose` needs and the command that installs `extra`.

        Args:
            module: import name, for example ``tensorrt_rtx``.
            extra: the extra of this project that brings it, for example ``rtx``.
            purpose: what it is needed for, to be read after "needed to".
        """
        self.module = module
        self.extra = extra
        self.purpose = purpose
        distribution = module.partition(".")[0].replace("_", "-")
        super().__init__(
            f"{distribution} is not installed, needed to {purpose}: pip install 'qwenport[{extra}]'"
        )


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args: as for `MissingExtraError`.

    Raises:
        MissingExtraError: `module` is not installed. A module that is installed but fails to
            import one of its own dependencies raises that error instead.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingExtraError(module, extra, purpose) from error
