"""The plugins as TensorRT meets them: what the driver checks of each, and what they refuse, named in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cpp.builds import built
from plugin_checks import ran
from plugin_driver import Driver

INT32 = "int32"


@pytest.fixture(scope="session", params=["on_cpu", "sanitized", "for_tensorrt"])
def driver(request: pytest.FixtureRequest) -> Driver:
    """Each build; the last is the library that TensorRT loads, of which everything but enqueue runs here."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def for_tensorrt() -> Driver:
    return Driver(built("plugins") / "drive", built("plugins-cuda") / "libqwenport_plugins.so")


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, list[torch.Tensor]]:
    """Inputs that each plugin takes."""
    q, k, table = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 3, 8), torch.ones(9, 4)
    x, weights = torch.ones(2, 3, 16), torch.ones(2, 3, 2)
    gate_up, down = torch.ones(4, 12, 16), torch.ones(4, 16, 6)
    positions, indices = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 2).long()
    return {
        "RotaryEmbeddingQK": [*(t.to(dtype) for t in (q, k, table, table)), positions],
        "MoERouter": [torch.ones(2, 3, 60).to(dtype)],
        "MoEExperts": [x.to(dtype), indices, weights, gate_up.to(dtype), down.to(dtype)],
    }


FIELDS: dict[str, dict[str, int]] = {
    "RotaryEmbeddingQK": {},
    "MoERouter": {"k": 4, "normalize": 1},
    "MoEExperts": {},
}
every_plugin = pytest.mark.parametrize("plugin", FIELDS)


@every_plugin
def test_a_plugin_goes_through_its_life(driver: Driver, plugin: str) -> None:
    """The driver checks names, clones, serialised fields; here, what is particular."""
    inputs = tensors()[plugin]
    dynamic = [[0, 1] if plugin != "RotaryEmbeddingQK" else [0, 2]]
    driven = driver.drive(plugin, inputs, FIELDS[plugin], dynamic=dynamic, enqueue=False)
    assert driven.log == [] and driven.report["stopped"] == "no enqueue was asked for"
    assert sorted(driven.report["plugins"]) == sorted(FIELDS)
    assert (driven.report["version"], driven.report["namespace"]) == ("1", "qwenport")
    assert (driven.report.get("attributes") or []) == list(FIELDS[plugin])
    outputs = [(o["type"], o["shape"]) for o in driven.report["outputs"]]
    assert (
        outputs
        == {
            "RotaryEmbeddingQK": [("bf16", [2, 4, 3, 8]), ("bf16", [2, 2, 3, 8])],
            "MoERouter": [("fp32", [2, 3, 4]), ("int64", [2, 3, 4])],
            "MoEExperts": [("bf16", [2, 3, 16])],
        }[plugin]
    )
    formats = {
        "RotaryEmbeddingQK": ["T", "T", "T", "T", "int64", "T", "T"],
        "MoERouter": ["T", "fp32", "int64"],
        "MoEExperts": ["T", "int64", "fp32", "T", "T", "T"],
    }[plugin]
    expected = [
        [dtype if name == "T" else name for name in formats] for dtype in ("fp32", "fp16", "bf16")
    ]
    assert driven.report["formats"] == expected


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"k": 4}, "attribute 'normalize' is missing"),
        ({"normalize": 1}, "attribute 'k' is missing"),
        ({"k": 0, "normalize": 1}, "attribute 'k' is 0, outside 1..16"),
        ({"k": 17, "normalize": 1}, "attribute 'k' is 17, outside 1..16"),
        ({"k": 4, "normalize": 2}, "attribute 'normalize' is 2, outside 0..1"),
        ({"k": 4, "normalize": 1, "top": 1}, "attribute 'top' is unknown"),
        (
            [{"name": "k", "type": "fp32", "values": [4]}],
            "attribute 'k' is not one int32",
        ),
        ([{"name": "k", "type": INT32, "values": [4, 4]}], "attribute 'k' is not one int32"),
        ([{"name": "k", "type": INT32, "values": []}], "attribute 'k' is not one int32"),
        (
            [{"name": "k", "type": INT32, "values": [4]}] * 2,
            "attribute 'k' is given twice",
        ),
    ],
)
def test_a_bad_attribute_gives_no_plugin_and_one_line(
    driver: Driver, fields: Any, complaint: str
) -> None:
    driven = driver.drive("MoERouter", tensors()["MoERouter"], fields, enqueue=False)
    assert driven.report["stopped"] == "create"
    assert driven.log == [f"MoERouter: {complaint}"]


def sized(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("plugin", "changes", "complaint"),
    [
        ("RotaryEmbeddingQK", {1: sized(2, 2, 4, 8)}, "not [batch, heads, seq, head_dim] of the"),
        ("RotaryEmbeddingQK", {0: sized(2, 4, 3, 7), 1: sized(2, 2, 3, 7)}, "head_dim 7 is odd"),
        ("RotaryEmbeddingQK", {2: sized(9, 5)}, "are not [positions, head_dim/2]"),
        ("RotaryEmbeddingQK", {3: sized(8, 4)}, "are not [positions, head_dim/2]"),
        ("RotaryEmbeddingQK", {4: sized(2, 4, dtype=torch.int64)}, "is not [batch, seq]"),
        ("MoERouter", {0: sized(3, 513)}, "513 experts; there can be 4..512"),
        ("MoERouter", {0: sized(3, 3)}, "3 experts; there can be 4..512 to choose 4 from"),
        ("MoERouter", {0: sized()}, "no axis of experts"),
        ("MoEExperts", {2: sized(2, 3, 1)}, "are not of the same tokens"),
        ("MoEExperts", {1: sized(2, 4, 2, dtype=torch.int64)}, "are not of the same tokens"),
        ("MoEExperts", {0: sized(6, 16)}, "are not of the same tokens"),
        ("MoEExperts", {4: sized(4, 16, 5)}, "are not [experts, 2*inner, hidden] and"),
        ("MoEExperts", {3: sized(5, 12, 16)}, "are not [experts, 2*inner, hidden] and"),
        (
            "MoEExperts",
            {1: sized(2, 3, 17, dtype=torch.int64), 2: sized(2, 3, 17)},
            "17 of 4 experts; there can be 1..16 of 512",
        ),
    ],
)
def test_shapes_that_do_not_agree_are_refused_by_name(
    driver: Driver, plugin: str, changes: dict[int, torch.Tensor], complaint: str
) -> None:
    inputs = tensors(torch.float32)[plugin]
    for index, tensor in changes.items():
        inputs[index] = tensor
    driven = driver.drive(plugin, inputs, FIELDS[plugin], enqueue=False)
    assert driven.report["stopped"] == "shapes"
    (line,) = driven.log
    assert line.startswith(f"{plugin}: ") and complaint in line


def test_the_wrong_number_of_inputs_is_refused(driver: Driver) -> None:
    driven = driver.drive("MoEExperts", tensors()["MoEExperts"][:4], enqueue=False)
    assert driven.log == ["MoEExperts: has 5 inputs and 1 outputs, not 4 and 1"]


def test_the_workspace_is_that_of_the_largest_shapes(on_cpu: Driver) -> None:
    """And enough for them: the sanitized runs write to a workspace of no more than this."""
    inputs = tensors()["MoEExperts"]
    small = on_cpu.drive("MoEExperts", inputs, enqueue=False).report["workspace"]
    most = {0: (2, 300, 16), 1: (2, 300, 2), 2: (2, 300, 2)}
    large = on_cpu.drive("MoEExperts", inputs, enqueue=False, dynamic=[[1]] * 3, most=most)
    pairs = 2 * 300 * 2
    assert large.report["workspace"] >= pairs * (6 + 16) * 2 > small > 0


def test_bounds_of_sizes_that_are_equal_at_run_time_need_not_be(driver: Driver) -> None:
    """Nor need they be what a run may have: 2^40 tokens are refused when they come."""
    inputs = tensors()["MoEExperts"]
    most = {0: (2, 2**39, 16), 1: (2, 400, 2), 2: (2, 2**20, 2)}
    driven = driver.drive("MoEExperts", inputs, enqueue=False, dynamic=[[1]] * 3, most=most)
    assert driven.log == [] and driven.report["stopped"] == "no enqueue was asked for"
    assert driven.report["workspace"] >= 2**30 * (6 + 16) * 2


def test_a_gpu_that_is_too_old_is_refused(on_cpu: Driver) -> None:
    for plugin, inputs in tensors().items():
        driven = replace(on_cpu, gpu="75").drive(plugin, inputs, FIELDS[plugin])
        assert driven.report["stopped"] == "attach"
        assert driven.log == [
            f"{plugin}: needs a GPU of compute capability 8.0 or newer, this one has 7.5"
        ]


def test_any_new_enough_gpu_serves(on_cpu: Driver) -> None:
    inputs = tensors()["MoERouter"]
    for gpu in ("80", "120"):
        ran(replace(on_cpu, gpu=gpu).drive("MoERouter", inputs, FIELDS["MoERouter"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@every_plugin
def test_without_a_gpu_a_launch_is_an_error(for_tensorrt: Driver, plugin: str) -> None:
    driven = for_tensorrt.drive(plugin, tensors()[plugin], FIELDS[plugin])
    assert driven.report["stopped"] == "enqueue"
    (line,) = driven.log
    assert line.startswith(f"{plugin}: ") and "CUDA" in line
