"""Activations in int8 as onnxruntime's MatMulNBits rounds them, and transformers rounding so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from quantized import write_pack_quantized

from qwenport import exporter
from qwenport.contract import INT8
from qwenport.validate.reference import Reference
from qwenport.validate.reference.int8 import rounded
from qwenport.validate.target import open_target
from qwenport.validate.text import Text

EXAMPLES = Path(__file__).parents[3] / "examples"
ROUTERS = (r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$")


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 5),
    block=st.sampled_from([16, 32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    outlier=st.sampled_from([0.0, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_activations_are_rounded_as_onnxruntime_rounds_them(
    rows: int, blocks: int, block: int, bits: int, outlier: float, seed: int
) -> None:
    random, n, k = np.random.default_rng(seed), 24, blocks * block
    codes = random.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    scales = random.uniform(0.5, 1.5, (n, blocks)).astype(np.float32)
    x = random.standard_normal((rows, k)).astype(np.float32)
    x[:, 0] *= outlier
    weight = (codes.astype(np.float32) - (1 << (bits - 1))).reshape(n, blocks, block)
    wanted = rounded(torch.from_numpy(x), block) @ torch.from_numpy(
        (weight * scales[:, :, None]).reshape(n, k).T
    )
    found = _product(x, codes, scales, bits, block)
    assert np.linalg.norm(found - wanted.numpy()) <= 2e-6 * np.linalg.norm(wanted)


def _product(
    x: np.ndarray, codes: np.ndarray, scales: np.ndarray, bits: int, block: int
) -> np.ndarray:
    """x @ weight^T by MatMulNBits with accuracy_level 4; the zero points are the middle code."""
    (n, k), packed = codes.shape, codes
    if bits == 4:
        packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        **{"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4},
    )
    shape = [n, k // block, block * bits // 8]
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [
            helper.make_tensor("codes", TensorProto.UINT8, shape, packed.tobytes(), raw=True),
            onnx.numpy_helper.from_array(scales, "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {"x": x})
    return np.asarray(found)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("name", "ignore"), [("tiny-qwen2.5", ("lm_head",)), ("tiny-qwen2-moe", ("lm_head", *ROUTERS))]
)
def test_transformers_rounds_where_a_weight_is_quantized_and_nowhere_else(
    name: str, ignore: tuple[str, ...], streamed: bool, tmp_path: Path, monkeypatch
) -> None:
    checkpoint = write_pack_quantized(EXAMPLES / name, tmp_path / "checkpoint", ignore=ignore)
    target = open_target(exporter.export(checkpoint, tmp_path / "package").path)
    reference = Reference(target, checkpoint, streamed=streamed)
    text = Text.ending(range(100, 124), 8)
    (exact,), (int8,) = reference.logits([text]), reference.logits([text], INT8)
    assert 1e-4 < np.linalg.norm(int8 - exact) / np.linalg.norm(exact) < 0.1
    seen: list[tuple[int, int]] = []

    def unchanged(activations: torch.Tensor, columns: int) -> torch.Tensor:
        seen.append((activations.shape[-1], columns))
        return activations

    monkeypatch.setattr("qwenport.validate.reference.int8.rounded", unchanged)
    (same,) = reference.logits([text], INT8)
    assert np.array_equal(same, exact)
    moe, layers = target.config.moe, target.config.num_hidden_layers
    assert {columns for _, columns in seen} == {32}
    if moe is None:
        assert len(seen) == 7 * layers
    else:  # four of attention, three of the shared expert, and those of the experts that are chosen
        assert len(seen) > 7 * layers
        sizes = {width for width, _ in seen}
        assert {target.config.hidden_size, moe.expert_size, moe.shared_expert_size} <= sizes
