"""Parts of reports as report.json has them: scenarios, coverage, half precision, errors by layer."""

from __future__ import annotations

import math
import random
from typing import Any

from qwenport.validate.localisation import WHOLE_LAYER
from qwenport.validate.rounding import END


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
        "effective_positions": 0.4 * positions,
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
        "own_ratio": 0.81,
        "own_ratio_interval": None,
        "kl_interval": None,
        "top1_interval": None,
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
        check("NaN and infinite logits", 0, "==", 0),
        check("rel-L2", scale, "<=", 5e-6),
        check("same top-1 outside near-ties", 1.0, ">=", 1.0),
    ]
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
        "by_position": {"rel_l2": rel_l2, "kl": kl, "difference": [60 * r for r in rel_l2]},
    }


def in_bf16(positions: int) -> dict[str, Any]:
    """Logits in half precision, judged by the nearer ends of intervals."""
    found = scenario("in bf16", positions, scale=6e-3)
    found["metrics"] |= {
        "own_ratio": 0.908,
        "own_ratio_interval": interval(0.806, 1.02),
        "kl_mean": 4.81e-4,
        "kl_interval": interval(3.7e-4, 6.72e-4),
        "top1_interval": interval(0.976675, 1.0),
    }
    names = ("rel-L2 over transformers' own in bf16, lower end", "mean KL, lower end")
    values = ((0.806367, 2.0), (3.70351e-4, 2.55728e-3))
    found["checks"][1:] = [
        check(name, value, "<=", bound) for name, (value, bound) in zip(names, values, strict=True)
    ]
    return found


def interval(low: float, high: float) -> dict[str, float]:
    return {"low": low, "high": high, "confidence": 0.999}


def check(metric: str, value: Any, relation: str, bound: Any, **changes: Any) -> dict[str, Any]:
    found = {"metric": metric, "value": value, "relation": relation, "bound": bound}
    return found | {"where": None, "passed": True} | changes


def exact(name: str, *metrics: str) -> dict[str, Any]:
    """A row of exact comparisons, of which all hold."""
    return not_run(name, "") | {
        "summary": f"What {name} compares, byte for byte",
        "status": "passed",
        "reason": None,
        "checks": [check(metric, 0, "==", 0) for metric in metrics],
    }


def coverage(**changes: Any) -> dict[str, Any]:
    """Of a standard budget on a model of 32,768 positions."""
    return {
        "budget": "standard",
        "seed": 7,
        "step_widths": [1, 2, *range(4, 8), 9, *range(12, 19), 26, 33, 64, 65, 100, 221, 511, 512],
        "widest_step": 512,
        "last_logits_steps": 38,
        "all_logits_steps": 15,
        "single_steps": 402,
        "batches": [1, 2, 3, 8],
        "max_batch": 8,
        "rows": [0, 1, 2, 3, 4, 5, 6, 7],
        "spans": [64, 128, 512, 32768],
        "all_spans": 512,
        "capacities": [64, 192, 32768],
        "all_capacities": 512,
        "single_positions": [[5, 100], [32760, 32767]],
        "positions": [[0, 511], [32700, 32767]],
        "max_seq_len": 32768,
        "distance": 575,
        "layer_distance": {"layer 0": 4095, "layer 3": 32766},
        "token_ids": 1225,
        "embedded_ids": 151936,
        "vocab_size": 151936,
        "experts": [],
        "rounding": 513,
        "left_out": [
            "32188 of 32768 positions by the whole model, and its attention beyond 576",
            "the kernels that TensorRT's builder chooses, which only a GPU can run",
        ],
        **changes,
    }


def rounding(layers: int, *, bad: int | None = None) -> list[dict[str, Any]]:
    """Three operators a layer, the layer, and what is behind them; in one layer a norm of low precision."""
    rng = random.Random(layers)

    def spread(quantile: float, own: float, ratio: float) -> dict[str, float]:
        return {
            "quantile": quantile,
            "made": own * ratio,
            "own": own,
            "times_own": ratio,
            "least": ratio * rng.uniform(0.6, 0.95),
        }

    def error(layer: int | None, operator: str, systematic: float = 1.0) -> dict[str, Any]:
        draw = [rng.lognormvariate(0, 0.1) for _ in range(4)]
        return {
            "layer": layer,
            "operator": operator,
            "positions": 512,
            "nonfinite": 0,
            "relative": [spread(0.5, 2.3e-3, draw[0]), spread(0.95, 2.6e-3, draw[1])],
            "systematic": [
                spread(0.5, 2.1e-4, draw[2] * systematic),
                spread(0.95, 6.0e-4, draw[3] * systematic),
            ],
        }

    inside = ("input_layernorm", "self_attn.q_proj", "mlp.down_proj")
    return [
        *(
            error(layer, name, 10.0 if layer == bad and name == inside[0] else 1.0)
            for layer in range(layers)
            for name in (*inside, WHOLE_LAYER)
        ),
        error(None, END),
    ]


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
