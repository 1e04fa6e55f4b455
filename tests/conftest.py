"""What every test shares: a reproducible hypothesis profile, one thread a process, no network, a cache of its own."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, settings


class _OneThread(onnxruntime.SessionOptions):
    """Options whose default is one thread: others wait for work in a loop that keeps a core busy."""

    def __init__(self) -> None:
        super().__init__()
        self.intra_op_num_threads = 1


torch.set_num_threads(1)  # the tests run in two processes on two cores
onnxruntime.SessionOptions = _OneThread

# HYPOTHESIS_PROFILE=search looks for new counterexamples.
_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "ci",
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.register_profile(
    "search", max_examples=500, deadline=None, suppress_health_check=_SLOW_IS_FINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that no user and no other process of the tests has."""
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The checkpoint that is in the repository. Tests must not change it."""
    return ROOT / "examples" / "tiny-qwen2.5"


@pytest.fixture(scope="session")
def tiny_package(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint's package in its own dtype, with weights of its own. Do not change it."""
    from qwenport.exporter import export

    package = tmp_path_factory.mktemp("tiny") / "package"
    export(tiny_checkpoint, package, weights="copy")
    return package
