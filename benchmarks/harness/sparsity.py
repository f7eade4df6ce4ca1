"""Sparsifiner's choice of keys and attention to them, by number of tokens, and formulations in stock PyTorch."""

from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.ops import connectivity_attention, connectivity_topk, sparse_attention
from vitrail.ops.connectivity_attention import connectivity_logits

from . import flex
from .problems import Function, Problem, Setting

_HEADS, _CHANNELS, _COEFFICIENTS, _THRESHOLD = 6, 384, 8, 0.02


def _split(qkv: Tensor) -> tuple[Tensor, ...]:
    """Queries without the class token, keys and values; `(B, heads, tokens, 64)`."""
    q, k, v = (x.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
    return q[:, :, 1:], k, v


def _attend(qkv: Tensor, mask: Tensor | None = None) -> Tensor:
    out = F.scaled_dot_product_attention(*_split(qkv), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def _mask(qkv: Tensor, keys: Tensor) -> Tensor:
    """Of all keys, `(B, heads, queries, tokens)`, those that are listed."""
    shape = (*keys.shape[:3], qkv.shape[1])
    return torch.zeros(shape, dtype=torch.bool, device=qkv.device).scatter_(-1, keys, True)


def _masked_flex(keys: Tensor) -> Function:
    attend = flex.attention()

    def call(qkv: Tensor) -> Tensor:
        out = attend(*_split(qkv), score_mod=flex.hide(_mask(qkv, keys)))
        return out.transpose(1, 2).flatten(2)

    return call


def _masked_sdpa(qkv: Tensor, keys: Tensor) -> Tensor:
    return _attend(qkv, _mask(qkv, keys))


def _gather_matmul(qkv: Tensor, keys: Tensor) -> Tensor:
    """A copy of its keys and values for every query."""
    q, k, v = _split(qkv)
    index = keys.flatten(2).unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
    k, v = (x.gather(2, index).unflatten(2, keys.shape[2:]) for x in (k, v))
    attention = ((q * q.shape[-1] ** -0.5).unsqueeze(3) @ k.transpose(-1, -2)).softmax(-1)
    return (attention @ v).squeeze(3).transpose(1, 2).flatten(2)


def _scores(logits: Tensor, basis: Tensor) -> Tensor:
    """Of all keys, by adding up the few rows of the basis that a query keeps."""
    rows = F.threshold(basis.float().abs(), _THRESHOLD, 0.0)
    coefficients, which = logits.float().softmax(-1).topk(_COEFFICIENTS, sorted=False)
    flat = [x.reshape(-1, _COEFFICIENTS) for x in (which, coefficients)]
    scores = F.embedding_bag(flat[0], rows, per_sample_weights=flat[1], mode="sum")
    return scores.view(*logits.shape[:3], basis.shape[1])


def _bag_topk(logits: Tensor, basis: Tensor, count: int) -> Tensor:
    return _scores(logits, basis).topk(count, sorted=False).indices


def _inputs(tokens: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Function]:
    """Packed queries, keys and values; logits and basis; the chooser. Keep 25 percent, basis of a sixth."""
    rows, count = tokens // 6, ceil(0.25 * tokens)
    qkv = torch.randn(batch, tokens, 3 * _CHANNELS).to(dtype)
    logits = torch.randn(batch, _HEADS, tokens - 1, rows).to(dtype)
    basis = (0.05 * torch.randn(tokens, rows)).to(dtype).t()
    choose = partial(
        connectivity_topk, num_keys=count, num_coefficients=_COEFFICIENTS, basis_threshold=_THRESHOLD
    )
    return qkv, logits, basis, choose


def _choice(tokens: int, batch: int, dtype: torch.dtype) -> Problem:
    _, logits, basis, choose = _inputs(tokens, batch, dtype)
    scores = _scores(logits, basis)
    stock = {"embedding_bag + topk": partial(_bag_topk, count=ceil(0.25 * tokens))}
    return Problem(
        (logits, basis),
        choose,
        stock,
        comparable=lambda keys: scores.gather(-1, keys).sort(-1).values,
        chooses=dtype
        != torch.float32,  # of equal logits, which only so few bits make, any may be among the largest
    )


def _sparse(tokens: int, batch: int, dtype: torch.dtype) -> Problem:
    qkv, logits, basis, choose = _inputs(tokens, batch, dtype)
    keys = choose(logits, basis)

    def operator(qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, -1)
        return sparse_attention(q[:, 1:], k, v, keys, _HEADS)

    stock = {"mask + SDPA": partial(_masked_sdpa, keys=keys)}
    if tokens < 1000:  # else the copies do not fit
        stock["gather + matmul"] = partial(_gather_matmul, keys=keys)
    flexible = {"mask + flex": partial(_masked_flex, keys)}
    return Problem((qkv,), operator, stock, yardsticks={DENSE: _attend}, flex=flexible)


def _both(tokens: int, batch: int, dtype: torch.dtype, apart: bool = False) -> Problem:
    """From queries and compressed keys on, as in the model: where there are many rows, queries are projected first.

    In one operator, or `apart` in two, with the lists of keys between them.
    """
    qkv, _, basis, choose = _inputs(tokens, batch, dtype)
    width = _CHANNELS // _HEADS
    projection = torch.randn(width // 2, width).to(dtype) / width**0.5 if len(basis) > width else None
    channels = _CHANNELS if projection is None else _CHANNELS // 2
    compressed = torch.randn(batch, len(basis), channels).to(dtype) / width**0.5
    offset = torch.randn(batch, len(basis), _HEADS).to(dtype)
    count = ceil(0.25 * tokens)

    def operator(qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, -1)
        return connectivity_attention(
            q[:, 1:],
            k,
            v,
            compressed,
            offset,
            basis,
            _HEADS,
            num_keys=count,
            num_coefficients=_COEFFICIENTS,
            basis_threshold=_THRESHOLD,
            projection=projection,
        )

    def operators(qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, -1)
        logits = connectivity_logits(q[:, 1:].detach(), compressed, offset, projection, _HEADS)
        return sparse_attention(q[:, 1:], k, v, choose(logits, basis), _HEADS)

    def stock(qkv: Tensor) -> Tensor:
        q = _split(qkv.detach())[0]
        q = q if projection is None else F.linear(q, projection)
        keys = compressed.unflatten(-1, (_HEADS, -1)).permute(0, 2, 3, 1)
        logits = q @ keys + offset.transpose(1, 2).unsqueeze(2)
        return _masked_sdpa(qkv, _bag_topk(logits, basis, count))

    ours = operators if apart else operator
    return Problem((qkv,), ours, {"topk + SDPA": stock}, yardsticks={DENSE: _attend}, chooses=True)


DENSE = "dense SDPA"
_APART = partial(_both, apart=True)

SETTINGS = tuple(
    Setting(
        operator,
        f"sparsifiner_small, {tokens} tokens{', with the choice' * (build is _APART)}",
        partial(build, tokens),
        kernels,
        trains,
        largest_batch=8 if tokens < 4000 else 1,
        quick=tokens < 1000,
        on_cpu=tokens < 10000 and build is not _APART,
        gpu_batch={197: 64, 1025: 16, 4097: 4, 16385: 1}[tokens],
    )
    for operator, build, kernels, trains in (
        ("sparse_attention", _sparse, (), True),
        ("sparse_attention", _APART, ("connectivity_topk", "sparse_attention"), True),
        ("connectivity_topk", _choice, (), False),
        (
            "connectivity_attention",
            _both,
            ("connectivity_attention", "connectivity_topk", "sparse_attention"),
            True,
        ),
    )
    for tokens in (197, 1025, 4097, 16385)
)
