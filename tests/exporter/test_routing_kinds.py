"""Routing that looks beyond a token is refused in a decoder over a KV cache, with the reason."""

from __future__ import annotations

import checkpoints
import pytest
import torch

from qwenport.exporter import ConfigError, parse_config
from qwenport.exporter.emission import GraphBuilder, emit
from qwenport.exporter.errors import TracingError
from qwenport.exporter.tracing import trace
from qwenport.plugins import moe_router


def test_a_config_may_name_the_routing_that_the_exporter_has() -> None:
    plain = parse_config(checkpoints.mini("qwen2_moe"))
    assert parse_config(checkpoints.mini("qwen2_moe", router_type="top_k")) == plain


@pytest.mark.parametrize("kind", [moe_router.SWITCH, moe_router.EXPERT_CHOICE])
def test_a_config_that_asks_for_it_is_told_why_not(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"'{kind}'.* prefill and decode would disagree"):
        parse_config(checkpoints.mini("qwen2_moe", router_type=kind))


def test_a_config_with_a_routing_nobody_has_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match="router_type 'sinkhorn' is not supported"):
        parse_config(checkpoints.mini("qwen3_moe", router_type="sinkhorn"))


def test_a_traced_module_with_such_a_router_is_not_emitted() -> None:
    class Module(torch.nn.Module):
        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            weights, _ = moe_router.moe_router(logits, moe_router.SWITCH)
            return weights

    traced = trace(Module(), [torch.empty(1, 4, device="meta")], [{0: "tokens"}])
    with pytest.raises(TracingError, match="prefill and decode would disagree"):
        emit(traced, GraphBuilder(), [None], {}, "model")  # type: ignore[list-item]
