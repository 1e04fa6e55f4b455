"""Export Qwen and Llama checkpoints to ONNX, build TensorRT engines from them, and prove parity.

Only the standard library is imported here: the command line starts through this module.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# From release 1.29 on, onnxruntime tells Microsoft about the models that it loads, unless this is set before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["MissingExtraError", "QwenportError", "__version__", "import_extra"]


class QwenportError(Exception):
    """Base of all errors meant for the user; the command line prints one line and exits 2."""


class MissingExtraError(QwenportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        """Say which distribution `purpose` needs and which command installs `extra`.

        Args:
            module: import name, for example ``tensorrt_rtx``.
            extra: the extra of this project that installs it, for example ``rtx``.
            purpose: what it is needed for; completes the phrase "needed to".
        """
        self.module = module
        self.extra = extra
        self.purpose = purpose
        distribution = module.partition(".")[0].replace("_", "-")
        super().__init__(
            f"{distribution} is not installed, needed to {purpose}: pip install 'qwenport[{extra}]'"
        )


COMPONENTS = ("exporter", "plugins", "engines", "validate")


def missing_link(folder: Path = Path(__file__).parent) -> str | None:
    """What is wrong with a checkout in which a component is no link to its folder, or None."""
    for name in COMPONENTS:
        if not (folder / name / "__init__.py").is_file():
            return (
                f"{folder / name} is not the link that it should be; have git write links "
                "(git config core.symlinks true, on Windows in developer mode), then: "
                "git checkout -- qwenport"
            )
    return None


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in COMPONENTS and (wrong := missing_link()):
            raise ImportError(wrong)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
