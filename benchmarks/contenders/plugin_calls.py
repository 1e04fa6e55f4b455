"""A plugin as a Python callable on torch tensors, through the C functions of tests/plugins/native/calls.cpp."""

from __future__ import annotations

import ctypes as c
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

DATA_TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.int32: 3,
    torch.bfloat16: 7,
    torch.int64: 8,
}


class Tensor(c.Structure):
    _fields_ = [("type", c.c_int32), ("rank", c.c_int32), ("sizes", c.c_int64 * 8)]


def _described(tensors: Sequence[torch.Tensor]) -> c.Array[Tensor]:
    return (Tensor * len(tensors))(
        *[Tensor(DATA_TYPES[t.dtype], t.ndim, (c.c_int64 * 8)(*t.shape)) for t in tensors]
    )


def _addresses(tensors: Sequence[torch.Tensor]) -> c.Array[c.c_void_p]:
    return (c.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


class PluginCall:
    """A plugin opened for tensors of given sizes; calling it with tensors of these sizes enqueues it.

    Attributes:
        workspace: memory that the plugin may write, of the size that it asked for.
    """

    def __init__(
        self,
        calls: Path,
        library: Path,
        name: str,
        fields: Mapping[str, int],
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> None:
        """Open it.

        Args:
            calls: libplugin_calls.so.
            library: the plugins.
            outputs: uninitialised; results go to the outputs passed to a call.

        Raises:
            RuntimeError: it cannot be opened; the reason is on stderr.
        """
        self._c = c.CDLL(str(calls))
        self._c.plugin_open.restype = c.c_void_p
        self._c.plugin_workspace.restype = c.c_size_t
        self._c.plugin_workspace.argtypes = self._c.plugin_close.argtypes = [c.c_void_p]
        tensors = [*inputs, *outputs]
        opened = self._c.plugin_open(
            str(library).encode(),
            name.encode(),
            len(fields),
            (c.c_char_p * len(fields))(*[field.encode() for field in fields]),
            (c.c_int32 * len(fields))(*fields.values()),
            _described(tensors),
            len(inputs),
            len(outputs),
        )
        if not opened:
            raise RuntimeError(f"{name} cannot be opened")
        self._call, self._name = c.c_void_p(opened), name
        size = self._c.plugin_workspace(self._call)
        self.workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=inputs[0].device)
        self._on_gpu = inputs[0].is_cuda

    def __del__(self) -> None:
        if hasattr(self, "_call"):
            self._c.plugin_close(self._call)

    def __call__(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        stream = torch.cuda.current_stream().cuda_stream if self._on_gpu else 0
        status = self._c.plugin_enqueue(
            self._call,
            _addresses(inputs),
            _addresses(outputs),
            c.c_void_p(self.workspace.data_ptr()),
            c.c_void_p(stream),
        )
        if status:
            raise RuntimeError(f"{self._name}: enqueue returned {status}")
