"""Dual chunk attention for the oracle: transformers' attention modules, which ignore it, compute it pair by pair.

Source: DualChunkRotaryEmbedding and dual_chunk_flash_attn of vLLM, without their sparse approximation. Nothing is
shared with the graph: every pair of a query and a key has its own rotation, by the difference of two positions.

With p // c - j // c chunks between a query at p and a key at j, and c = chunk_size - local_size, the query stands at
p mod c, min(p mod c + c, chunk_size) or min(2c - 1, chunk_size), for none, one and more; the key at j mod c.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from qwenport.exporter import DualChunk

PAIRS_AT_ONCE = 1 << 20  # queries x keys x frequencies in memory at a time, per head

Rotary = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""transformers' rotary module: (a tensor of a dtype, positions [1, n]) -> (cos, sin) [1, n, head_dim]."""

_REQUESTS: contextvars.ContextVar[tuple[int, tuple[int, ...]] | None] = contextvars.ContextVar(
    "requests", default=None
)


@contextlib.contextmanager
def of_requests(first_position: int, lengths: Sequence[int]) -> Iterator[None]:
    """State the request that each token belongs to; by default all belong to one that ends with the last query.

    Args:
        first_position: of the first token.
        lengths: positions of each token's request; empty: the default.
    """
    token = _REQUESTS.set((first_position, tuple(lengths)) if lengths else None)
    try:
        yield
    finally:
        _REQUESTS.reset(token)


def use_dual_chunk(layers: Sequence[Any], settings: DualChunk, rotary: Rotary) -> None:
    """Make transformers' decoder layers attend so; their weights, projections and norms stay transformers' own."""
    if not len(layers):
        return
    known = type(layers[0].self_attn)

    class DualChunked(known):  # type: ignore[misc, valid-type]
        __module__ = known.__module__  # where probes look for its functions

        def forward(
            self,
            hidden_states: torch.Tensor,
            position_ids: torch.Tensor,
            past_key_values: Any = None,
            **others: Any,
        ) -> Any:
            positions = position_ids[0]
            if (
                past_key_values is None
                and int(positions[-1]) < settings.chunk
                and bool((_scales(positions, settings) == 1).all())
            ):  # transformers' own rotates alike there, to the last bit, and takes a fraction of the time
                return super().forward(hidden_states, position_ids=position_ids, **others)
            return _forward(self, settings, rotary, hidden_states, position_ids, past_key_values)

    for layer in layers:
        layer.self_attn.__class__ = DualChunked


def _forward(
    module: Any,
    settings: DualChunk,
    rotary: Rotary,
    hidden: torch.Tensor,
    position_ids: torch.Tensor,
    cache: Any,
) -> tuple[torch.Tensor, None]:
    batch, count, _ = hidden.shape
    assert batch == 1, "the oracle runs one text at a time"
    heads = (batch, count, -1, module.head_dim)
    q, k, v = (part(hidden).view(heads) for part in (module.q_proj, module.k_proj, module.v_proj))
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    queries = position_ids[0]
    scale = _scales(queries, settings).to(q.dtype)[:, None]
    q, k = q * scale, k * scale
    if cache is not None:  # keys that are scaled, and not rotated
        k, v = cache.update(k, v, module.layer_idx)
    keys = torch.arange(int(queries[-1]) + 1 - k.shape[2], int(queries[-1]) + 1)
    k, v = (part.repeat_interleave(module.num_key_value_groups, dim=1)[0] for part in (k, v))
    rows = max(1, PAIRS_AT_ONCE // (len(keys) * module.head_dim // 2))
    made = [
        attend(q[0, :, at : at + rows], k, v, queries[at : at + rows], keys, settings, rotary)
        for at in range(0, count, rows)
    ]
    joined = torch.cat(made, dim=1).transpose(0, 1).reshape(1, count, -1)
    return module.o_proj(joined), None


def _scales(positions: torch.Tensor, settings: DualChunk) -> torch.Tensor:
    """The factor of each token's query and key, fp64 [n]."""
    original = settings.original_max_position_embeddings
    if original is None:
        return torch.ones(len(positions), dtype=torch.float64)
    stated = _REQUESTS.get()
    if stated is None:
        lengths = [int(positions[-1]) + 1] * len(positions)
    else:
        first, of_tokens = stated
        lengths = [of_tokens[int(position) - first] for position in positions]
    factors = [max(1.0, 0.1 * math.log(length / original) + 1.0) for length in lengths]
    return torch.tensor(factors, dtype=torch.float64)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    settings: DualChunk,
    rotary: Rotary,
) -> torch.Tensor:
    """Some queries [heads, n, head_dim] over all keys [heads, m, head_dim]."""
    scores = _scores(q, k, queries, keys, settings, rotary) * q.shape[-1] ** -0.5
    seen = keys[None, :] <= queries[:, None]
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    return (weights.to(v.dtype) @ v).to(v.dtype)


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    settings: DualChunk,
    rotary: Rotary,
) -> torch.Tensor:
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    half, one = q.shape[-1] // 2, torch.ones(1, dtype=kind)
    cos_k, sin_k = (part[0, :, :half] for part in rotary(one, keys[None] % settings.chunk))
    where, index = torch.unique(
        _positions(queries[:, None], keys[None, :], settings), return_inverse=True
    )
    cos_q, sin_q = (part[0, index, :half] for part in rotary(one, where[None]))
    cos = cos_q * cos_k + sin_q * sin_k  # of the difference of both positions, for each pair
    sin = sin_q * cos_k - cos_q * sin_k
    a, b = q[..., None, :half].to(kind), q[..., None, half:].to(kind)
    c, d = k[:, None, :, :half].to(kind), k[:, None, :, half:].to(kind)
    return torch.stack(
        [
            ((a[h] * c[h] + b[h] * d[h]) * cos + (a[h] * d[h] - b[h] * c[h]) * sin).sum(-1)
            for h in range(len(q))
        ]
    )


def _positions(queries: torch.Tensor, keys: torch.Tensor, settings: DualChunk) -> torch.Tensor:
    """Where each query stands for each key."""
    size, chunk = settings.chunk_size, settings.chunk_size - settings.local_size
    apart = queries // chunk - keys // chunk
    near = torch.where(apart < 1, queries % chunk, (queries % chunk + chunk).clamp(max=size))
    return torch.where(apart < 2, near, torch.tensor(min(2 * chunk - 1, size)))
