"""Reports as report.json has them: usual ones, and such as a page could stumble over."""

from __future__ import annotations

from typing import Any

from .pieces import coverage, exact, in_bf16, layer_errors, not_run, rounding, scenario

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

VERDICT = (
    "parity holds: 11 passed; judged: steps of 1 to 512 of 512 tokens (22 widths), batches of 1, 2, 3, 8 of 8, "
    "rows 0 to 7, 4 of 512 spans, 580 of 32768 positions, attention over 32767, 151936 of 151936 token ids, "
    "rounding at 513 positions"
)

SCRIPT = """from pathlib import Path
from qwenport.engines import open_session
session = open_session(Path(TARGET), max_batch=8, capacity=512)
session.prefill([[148], [890, 740], [596, 1188], []])
session.decode([None, 3, 4, None])"""


def passing(**changes: Any) -> dict[str, Any]:
    """A dense model that passes."""
    return {
        "schema_version": 4,
        "passed": True,
        "verdict": VERDICT,
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
        "cost": None,
        "coverage": coverage(),
        "loosened": [],
        "scenarios": [
            exact("weights", "tensors that differ", "tensors that the checkpoint does not have"),
            exact("graph", "differences from the exporter's graph"),
            exact("files", "companion files that differ", "paths that leave the package"),
            exact("constants", "constants that differ"),
            exact("parsed network"),
            exact("rope tables", "error of rope.cos, in units of rounding"),
            exact("embedding", "ids with another embedding"),
            scenario("prefill", 64),
            scenario("last logits", 14),
            scenario("decode", 45),
            scenario("batches", 144),
            scenario("greedy", 32),
            exact("distance of layer 3", "NaN and infinite hidden states"),
            exact("rounding of layers", "NaN and infinite results"),
            exact("rounding of operators", "NaN and infinite results"),
            in_bf16(256),
        ],
        "layers_error": layer_errors(24),
        "rounding": rounding(24),
        "fault": None,
        "unexplained": None,
        "script": None,
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
        "weights_sha256": {
            "model-00001-of-00002.safetensors": "8d46" * 16,
            "model-00002-of-00002.safetensors": "17aa" * 16,
            "weights/model.layers.3.mlp.experts.safetensors": "c0de" * 16,
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
        verdict=VERDICT.replace(
            "parity holds: 11 passed", "parity does NOT hold: 4 failed, 1 not run"
        ),
        target="exports/qwen3-moe.package",
        judged_as="tensorrt-network",
        compute_dtype="bf16",
        reference="checkpoints/a-mixture-of-experts",
        reference_mode="streamed",
        layers=48,
        layers_judged=48,
        scenarios=[
            scenario("prefill", 64, scale=0.31, failed=True),
            scenario("last logits", 14, scale=0.28, failed=True),
            broken,
            not_run("batches", "the target was made for one row"),
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
        coverage=coverage(
            experts=[
                {"layer": 0, "experts": 64, "without_tokens": [3, 4, 5, 60]},
                {"layer": 17, "experts": 64, "without_tokens": []},
            ]
        ),
        rounding=rounding(48, bad=17),
        script=SCRIPT,
    )
    return report | changes


def interrupted(**changes: Any) -> dict[str, Any]:
    """Stopped in the second scenario, of a quick look by loosened bounds."""
    return passing(
        complete=False,
        layers_judged=4,
        verdict="interrupted, no verdict for the first 4 of 24 layers: 1 passed; judged: steps of 64 tokens",
        loosened=["rel-L2 at most 0.05 instead of 1e-05", "same top-1 at least 0.9 instead of 1"],
        scenarios=[scenario("prefill", 64), not_run("decode", "interrupted")],
        layers_error=layer_errors(4)[:3],
        rounding=[],
        **changes,
    )


def extremes() -> dict[str, dict[str, Any]]:
    """Reports that a plot could stumble over."""
    bare = passing(
        scenarios=[],
        layers_error=[],
        rounding=[],
        environment={},
        hashes={},
        weights_sha256={},
        coverage=None,
        own_rounding=None,
        cost=None,
        reference_weights="",
    )
    one = [{"name": "embedding", "accumulated": 1e-7, "local": 1e-7, "own": 1e-7}]
    zeros = [{"name": f"layer {i}", "accumulated": 0.0, "local": 0, "own": 0.0} for i in range(3)]
    broken = layer_errors(6)
    broken[3] |= {"accumulated": "NaN", "local": "Infinity"}
    broken[4] |= {"accumulated": "-Infinity"}
    never = [dict.fromkeys(row, "NaN") | {"name": row["name"]} for row in layer_errors(3)]
    far = [
        {"name": "embedding", "accumulated": 5e-324, "local": 1.7e308, "own": 1.0},
        {"name": "layer 0", "accumulated": 1.0, "local": 1e-300, "own": 10.0},
    ]

    def at(rel_l2: list[Any], kl: list[Any]) -> dict[str, Any]:
        return scenario("prefill", 8) | {
            "by_position": {"rel_l2": rel_l2, "kl": kl, "difference": rel_l2}
        }

    ratios = rounding(4)
    for number, value in enumerate((0.0, "NaN", "Infinity", 5e-324, 1.7e308)):
        ratios[4 * number + 3 if number < 4 else -1]["relative"][0] |= {
            "times_own": value,
            "least": value,
        }
    nan = [{**error, "nonfinite": 3, "relative": [], "systematic": []} for error in rounding(1)]
    many = coverage(
        step_widths=list(range(1, 2000, 3)),
        positions=[[n, n + 1] for n in range(0, 9000, 5)],
        spans=list(range(64, 32769, 64)),
        experts=[
            {"layer": n, "experts": 128, "without_tokens": list(range(n % 3, 128, 3))}
            for n in range(48)
        ],
        left_out=[f"experts of layer {n}" for n in range(48)],
    )
    none = coverage(
        step_widths=[], batches=[], rows=[], spans=[], capacities=[], positions=[], rounding=0, single_positions=[],
        layer_distance={}, left_out=[],
    )  # fmt: skip
    bands = [
        {"least": 0.0, "most": "Infinity", "choices": 0, "agreeing": 0},
        {"least": 0.0, "most": 1e-6, "choices": 10**9, "agreeing": 10**9 - 1},
    ]
    return {
        "nothing": bare,
        "one layer": passing(layers_error=one),
        "only zeros": passing(layers_error=zeros, scenarios=[at([0.0, 0.0], [0.0, 0.0])]),
        "some are not finite": passing(layers_error=broken),
        "none is finite": passing(
            layers_error=never, scenarios=[at(["NaN"] * 3, ["Infinity"] * 3)]
        ),
        "the range of a double": passing(
            layers_error=far, scenarios=[at([5e-324, 1.7e308], [5e-324, 1.7e308])]
        ),
        "one position": passing(scenarios=[at([1e-6], [1e-12])]),
        "no position": passing(scenarios=[at([], [])]),
        "equal values": passing(scenarios=[at([1e-6] * 5, [1e-12] * 5)]),
        "80 layers, 2000 positions": passing(
            layers_error=layer_errors(80), scenarios=[scenario(n, 2000) for n in ("a", "b", "c")]
        ),
        "odd ratios": passing(rounding=ratios),
        "nothing but NaN in half precision": passing(rounding=nan),
        "one layer in half precision": passing(rounding=rounding(1)[3:4]),
        "operators only": passing(rounding=rounding(1)[:2]),
        "80 layers in half precision": passing(rounding=rounding(80, bad=3)),
        "much covered": passing(coverage=many),
        "nothing covered": passing(coverage=none),
        "odd bands": passing(routing=bands, replayed=1),
        "a fault nowhere": failing(
            fault=failing()["fault"] | {"layer": None, "operators": []}, layers_error=[]
        ),
        "a fault that was not found": failing(fault=None),
        "a fault of rounding": failing(
            fault=failing()["fault"] | {"input_error": "NaN", "own_error": "NaN", "operators": []}
        ),
        "a long script": failing(script="session.prefill([" + "[1, 2, 3, 4]," * 3000 + "])"),
        "everything failed": failing(
            scenarios=[scenario(f"way {n}", 4, scale=0.3, failed=True) for n in range(17)]
        ),
    }


def hostile(report: Any, text: str) -> Any:
    """The report with every string but those with a meaning replaced."""
    if isinstance(report, dict):
        fixed = {"status", "relation", "judged_as", "reference_mode", "most"}
        return {
            key: value if key in fixed else hostile(value, text) for key, value in report.items()
        }
    if isinstance(report, list):
        return [hostile(item, text) for item in report]
    return text if isinstance(report, str) and report not in {"NaN", "Infinity"} else report
