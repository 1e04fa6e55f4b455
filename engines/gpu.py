"""Memory and a stream of the first GPU, for a session. torch owns both."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_DRIVER = Path("/sys/module/nvidia/version")


class Gpu:
    """All work is in the order of one stream; copies are asynchronous, so host memory must stay until `synchronize`."""

    def __init__(self) -> None:
        """Take the first GPU."""
        import torch

        self._device = torch.device("cuda", 0)
        self._stream = torch.cuda.Stream(self._device)

    @property
    def stream(self) -> int:
        """The CUDA stream's address."""
        return int(self._stream.cuda_stream)

    @property
    def identity(self) -> list[str]:
        """What code compiled for this GPU depends on: its name, its architecture and the driver."""
        import torch

        version = ctypes.c_int(0)
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        driver = _DRIVER.read_text().strip() if _DRIVER.is_file() else ""
        found = torch.cuda.get_device_properties(self._device)
        return [found.name, f"{found.major}.{found.minor}", str(version.value), driver]

    def used(self) -> AbstractContextManager[Any]:
        """While it is entered, torch's own work goes to the stream."""
        import torch

        context: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return context

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Zeroed device memory."""
        import torch

        with self.used():
            return torch.zeros(shape, dtype=dtype, device=self._device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Page-locked host memory."""
        import torch

        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between pinned and device memory."""
        with self.used():
            to.copy_(source, non_blocking=True)

    def synchronize(self) -> None:
        """Wait for all work on the stream."""
        self._stream.synchronize()
