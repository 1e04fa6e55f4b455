"""The HTML report: every page well formed and harmless, whatever is in the report; in a browser, nothing overflows."""

from __future__ import annotations

import copy
import html
import json
import math
import random
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenport.validate.html import render

VOID = {"meta", "br", "hr", "img", "input", "link", "base", "source", "embed", "col", "wbr"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=http://example.com/x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</style><style>@import url(http://example.com)</style>",
    "</title></svg>--><!-- ]]>",
    "{{ 7 * 7 }}{% raw %}",
    "&amp;&lt;&#60;",
    "javascript:alert(1)",
    "line\nline\r\n\ttab",
    "\u202egnp.exe\x00\x1b[31m\udc80\u2028",
    "",
    "x" * 300,
]
NOT_FINITE = ["NaN", "Infinity", "-Infinity"]


def metrics(positions: int, **changes: Any) -> dict[str, Any]:
    return {
        "positions": positions,
        "vocab": 151936,
        "nonfinite": 0,
        "max_abs": 2.1e-5,
        "mean_abs": 1.7e-6,
        "rel_l2": 5.8e-7,
        "worst_rel_l2": 3.1e-6,
        "worst_position": min(17, positions - 1),
        "cosine_p5": 0.9999999999,
        "kl_mean": 3.4e-12,
        "kl_p99": 4.1e-11,
        "top1": 1.0,
        "top1_clear": 1.0,
        "near_ties": 1,
        "near_tie_margin": 1e-3,
        "smallest_margin": 4.2e-4,
        "first_disagreement": None,
        "first_disagreement_margin": None,
        "top5_overlap": 0.998,
        "own_ratio": None,
        **changes,
    }


def scenario(
    name: str, positions: int, *, scale: float = 5e-7, failed: bool = False, seed: int = 0
) -> dict[str, Any]:
    """A scenario with an error around `scale` at each position; the bound that it fails is the one on rel-L2."""
    rng = random.Random(f"{name} {seed}")
    rel_l2 = [scale * rng.lognormvariate(0, 0.4) for _ in range(positions)]
    kl = [0.0 if rng.random() < 0.05 else (r * rng.lognormvariate(0, 1)) ** 2 * 20 for r in rel_l2]
    checks = [
        {"metric": "NaN and infinite logits", "value": 0, "relation": "==", "bound": 0},
        {"metric": "rel-L2", "value": scale, "relation": "<=", "bound": 5e-6},
        {"metric": "same top-1 outside near-ties", "value": 1.0, "relation": ">=", "bound": 1.0},
    ]
    for check in checks:
        check |= {"where": None, "passed": True}
    if failed:
        checks[1] |= {"passed": False, "where": "worst at row 0 position 12"}
    return {
        "name": name,
        "summary": f"What {name} would be described as, in a few words",
        "status": "failed" if failed else "passed",
        "reason": None,
        "seconds": 1.25,
        "checks": checks,
        "metrics": metrics(positions, rel_l2=scale, worst_rel_l2=max(rel_l2)),
        "by_position": {"rel_l2": rel_l2, "kl": kl},
    }


def not_run(name: str, reason: str) -> dict[str, Any]:
    return {
        "name": name,
        "summary": "Rows of different lengths, chunked, decoded, some idle",
        "status": "not run",
        "reason": reason,
        "seconds": 0.0,
        "checks": [],
        "metrics": None,
        "by_position": None,
    }


def layer_errors(count: int, *, bad: int | None = None) -> list[dict[str, Any]]:
    rng = random.Random(count)
    rows = [{"name": "embedding", "accumulated": 0.0, "local": 0.0, "own": 0.0}]
    for layer in range(count):
        wrong = 0.31 if layer == bad else 0.0
        spread = 0.31 / math.sqrt(layer - bad + 1) if bad is not None and layer >= bad else 0.0
        rows.append(
            {
                "name": f"layer {layer}",
                "accumulated": 1.2e-7 * math.sqrt(layer + 1) + spread,
                "local": 1.1e-7 * rng.lognormvariate(0, 0.1) + wrong,
                "own": 1.0e-7 * rng.lognormvariate(0, 0.1),
            }
        )
    return rows


def passing(**changes: Any) -> dict[str, Any]:
    """A dense model that passes."""
    return {
        "schema_version": 2,
        "passed": True,
        "complete": True,
        "target": "tiny.package",
        "judged_as": "package",
        "target_dtype": "bf16",
        "compute_dtype": "fp32",
        "reference": "examples/tiny-qwen2.5",
        "reference_mode": "whole",
        "reference_weights": "fp32",
        "layers_judged": 24,
        "layers": 24,
        "prompts": "the package's tokenizer on a text about the sea, 512 tokens",
        "own_rounding": 5.1e-7,
        "cache_slots": 512,
        "max_seq_len": 32768,
        "loosened": [],
        "scenarios": [
            {
                **not_run("rope tables", ""),
                "summary": "Every row of the package's cos and sin tables",
                "status": "passed",
                "reason": None,
                "checks": [
                    {
                        "metric": "error of rope.cos, in units of rounding",
                        "value": 0.41,
                        "relation": "<=",
                        "bound": 1.0,
                        "where": "worst at position 31999",
                        "passed": True,
                    }
                ],
            },
            scenario("prefill", 64),
            scenario("full cache", 64),
            scenario("decode", 45),
            scenario("chunked prefill", 100),
            scenario("ragged batch", 144),
            scenario("greedy", 32),
        ],
        "layers_error": layer_errors(24),
        "fault": None,
        "routing": [],
        "replayed": 0,
        "environment": {
            "date": "2026-01-31T12:00:00+00:00",
            "qwenport": "0.1.0",
            "python": "3.11.2",
            "platform": "Linux x86_64",
            "torch": "2.9.1",
            "transformers": "5.0.0",
            "onnxruntime": "1.24.1",
        },
        "hashes": {
            "target manifest": "3f9a" * 16,
            "target model.onnx": "07c1" * 16,
            "reference config.json": "be52" * 16,
        },
        **changes,
    }


def failing(**changes: Any) -> dict[str, Any]:
    """A mixture of experts of which one layer is wrong."""
    operators = [
        ("input norm", 1.3e-6, 8.1e-8, 7.9e-8),
        ("attention", 1.4e-6, 1.9e-7, 1.7e-7),
        ("post-attention norm", 1.4e-6, 8.2e-8, 8.0e-8),
        ("router logits", 1.5e-6, 1.1e-7, 1.2e-7),
        ("router weights", 1.6e-6, 9.0e-8, 9.1e-8),
        ("experts", 0.33, 0.31, 2.2e-7),
        ("shared expert", 1.5e-6, 1.6e-7, 1.5e-7),
    ]
    routing = [
        (0.0, 1e-6, 3, 1),
        (1e-6, 1e-5, 11, 8),
        (1e-5, 1e-4, 64, 62),
        (1e-4, 1e-3, 518, 516),
        (1e-3, 1e-2, 5104, 5104),
        (1e-2, 1e-1, 28214, 28213),
        (1e-1, "Infinity", 86, 86),
    ]
    broken = scenario("decode", 45, scale=0.42, failed=True)
    broken["by_position"]["rel_l2"][9:12] = ["NaN", "Infinity", "NaN"]
    broken["metrics"] |= {"rel_l2": "NaN", "nonfinite": 151936 * 3, "kl_mean": "NaN"}
    broken["checks"][0] |= {"value": 455808, "passed": False, "where": "first at position 9"}
    broken["checks"][1] |= {"value": "NaN"}
    report = passing(
        passed=False,
        target="exports/qwen3-moe.package",
        judged_as="tensorrt-network",
        compute_dtype="bf16",
        reference="checkpoints/a-mixture-of-experts",
        reference_mode="streamed",
        layers=48,
        layers_judged=48,
        scenarios=[
            scenario("prefill", 64, scale=0.31, failed=True),
            scenario("full cache", 64, scale=0.28, failed=True),
            broken,
            not_run("ragged batch", "the target was made for one row"),
            {
                **not_run("greedy", "the target raised RuntimeError: CUDA error\nout of memory"),
                "status": "failed",
            },
        ],
        layers_error=layer_errors(48, bad=17),
        fault={
            "scenario": "prefill",
            "layer": 17,
            "operator": "experts",
            "input_error": 1.6e-6,
            "output_error": 0.33,
            "local_error": 0.31,
            "own_error": 2.2e-7,
            "text": "The fault starts in layer 17, at its experts: an error of 1.6e-06 goes in, 0.33 comes out.",
            "operators": [
                {"name": name, "accumulated": accumulated, "local": local, "own": own}
                for name, accumulated, local, own in operators
            ],
        },
        routing=[
            {"least": least, "most": most, "choices": choices, "agreeing": agreeing}
            for least, most, choices, agreeing in routing
        ],
        replayed=14,
    )
    return report | changes


def interrupted(**changes: Any) -> dict[str, Any]:
    """Stopped in the second scenario, of a quick look by loosened bounds."""
    return passing(
        complete=False,
        layers_judged=4,
        loosened=["rel-L2 at most 0.05 instead of 1e-05", "same top-1 at least 0.9 instead of 1"],
        scenarios=[scenario("prefill", 64), not_run("decode", "interrupted")],
        layers_error=layer_errors(4)[:3],
        **changes,
    )
