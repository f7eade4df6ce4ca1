"""`routed_attention`: every token attends to the tokens of the regions that its own region chose.

BiFormer, arXiv 2303.08810, section 3.2 (token-to-token attention, eq. 5 and 6). The definition is `reference`; a
compiled library, where there is one, computes the same without gathering copies of keys and values and without
storing scores.
"""

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from . import library
from ._checks import check_grid, check_like, check_region_size, check_routes_in_range
from .regions import concrete, merge, partition, region_count

# --- the definition ---------------------------------------------------------------------------------------------------


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """`(B, R, tokens, heads * d)` to `(B, R, heads, tokens, d)`."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(2, 3)


def _select(x: Tensor, routes: Tensor) -> Tensor:
    """The tokens of the chosen regions: `(B, Rk, S, C)` and `(B, R, topk)` to `(B, R, topk * S, C)`.

    Whole regions by a flat index: several times faster than an element-wise gather, here and in ONNX Runtime.
    """
    b, regions, tokens, c = x.shape
    flat = routes + regions * torch.arange(b, device=routes.device, dtype=routes.dtype).view(b, 1, 1)
    chosen = x.reshape(b * regions, tokens * c).index_select(0, flat.flatten())
    return chosen.reshape(b, routes.shape[1], routes.shape[2] * tokens, c)


def _key_weights(weights: Tensor, tokens: int) -> Tensor:
    """A weight per slot, `(B, R, topk)`, to one per key, `(B, R, 1, 1, topk * tokens)`."""
    return weights.repeat_interleave(tokens, -1)[:, :, None, None]


def _operands(q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale):
    """Per region and head: queries (scaled), chosen keys and values `(B, R, heads, tokens, d)`, weight of each key."""
    if q.dtype in (torch.bfloat16, torch.float16):
        q, k, v = q.float(), k.float(), v.float()
    queries = _heads(partition(q, region_size), num_heads) * scale
    keys = _heads(_select(partition(k, kv_region_size), routes), num_heads)
    values = _heads(_select(partition(v, kv_region_size), routes), num_heads)
    key_weights = None
    if weights is not None:
        key_weights = _key_weights(weights.to(q.dtype), kv_region_size[0] * kv_region_size[1])
    return queries, keys, values, key_weights


def _scores(queries: Tensor, keys: Tensor, key_weights: Optional[Tensor]) -> Tensor:
    scores = queries @ keys.transpose(-2, -1)
    return scores if key_weights is None else scores * key_weights


def _to_grid(x: Tensor, like: Tensor, region_size: List[int]) -> Tensor:
    """`(B, R, heads, tokens, d)` back to `(B, H, W, heads * d)` with the dtype and grid of `like`."""
    return merge(x.transpose(2, 3).flatten(3), region_size, like.shape[1], like.shape[2]).to(like.dtype)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    weights: Optional[Tensor],
    region_size: List[int],
    kv_region_size: List[int],
    num_heads: int,
    scale: float,
) -> Tensor:
    """The definition in plain PyTorch; differentiable, traceable, and the body that export uses."""
    queries, keys, values, key_weights = _operands(
        q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale
    )
    attention = _scores(queries, keys, key_weights).softmax(-1)
    if key_weights is not None:
        attention = attention * key_weights
    return _to_grid(attention @ values, q, region_size)


# --- the operator -----------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor routes, Tensor? weights, "
    "SymInt[2] region_size, SymInt[2] kv_region_size, int num_heads, float scale"
)
_lib = torch.library.Library("vitrail", "FRAGMENT")
_lib.define(
    f"routed_attention({_ARGUMENTS}) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    f"routed_attention_backward(Tensor grad, Tensor out, Tensor lse, {_ARGUMENTS}) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_weights)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward(q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale):
    """Kernel of last resort: hands over to the compiled library once that is loaded, else runs the definition."""
    if q.device.type == "cpu" and library.load():
        return torch.ops.vitrail.routed_attention(
            q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale
        )
    if q.device.type == "cpu":
        check_routes_in_range(routes, region_count(k, kv_region_size))
    queries, keys, values, key_weights = _operands(
        q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale
    )
    scores = _scores(queries, keys, key_weights)
    lse = scores.logsumexp(-1, keepdim=True)
    attention = (scores - lse).exp()
    if key_weights is not None:
        attention = attention * key_weights
    lse_grid = merge(lse.transpose(2, 3).flatten(3), region_size, q.shape[1], q.shape[2])
    return _to_grid(attention @ values, q, region_size).contiguous(), lse_grid.contiguous()


def _scatter(grad: Tensor, routes: Tensor, like: Tensor, region_size: List[int]) -> Tensor:
    """Transpose of `_select` and `_heads`: adds the gradients of chosen tokens up where they were chosen from."""
    b, regions, _, tokens, _ = grad.shape
    topk = routes.shape[2]
    count = region_count(like, region_size)
    flat = routes + count * torch.arange(b, device=routes.device, dtype=routes.dtype).view(b, 1, 1)
    rows = grad.transpose(2, 3).reshape(b * regions * topk, (tokens // max(topk, 1)) * like.shape[3])
    out = rows.new_zeros((b * count, rows.shape[1])).index_add(0, flat.flatten(), rows)
    out = out.reshape(b, count, region_size[0] * region_size[1], like.shape[3])
    return merge(out, region_size, like.shape[1], like.shape[2]).to(like.dtype)


def _backward_formula(
    grad, out, lse, q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale
):
    """Gradients from the inputs and the log-sum-exp of each row alone; the attention matrix was never stored."""
    queries, keys, values, key_weights = _operands(
        q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale
    )
    raw = queries @ keys.transpose(-2, -1)
    scores = raw if key_weights is None else raw * key_weights
    attention = (scores - _heads(partition(lse, region_size), num_heads)).exp()
    grad_out = _heads(partition(grad.to(queries.dtype), region_size), num_heads)
    out = _heads(partition(out.to(queries.dtype), region_size), num_heads)

    weighted = attention if key_weights is None else attention * key_weights
    grad_values = weighted.transpose(-2, -1) @ grad_out
    by_value = grad_out @ values.transpose(-2, -1)
    grad_attention = by_value if key_weights is None else by_value * key_weights
    grad_scores = attention * (grad_attention - (grad_out * out).sum(-1, keepdim=True))
    grad_raw = grad_scores if key_weights is None else grad_scores * key_weights
    grad_q = _to_grid((grad_raw @ keys) * scale, q, region_size)
    grad_k = _scatter(grad_raw.transpose(-2, -1) @ queries, routes, k, kv_region_size)
    grad_v = _scatter(grad_values, routes, v, kv_region_size)
    if weights is None:
        return grad_q, grad_k, grad_v, q.new_empty(0)
    per_key = (grad_scores * raw + attention * by_value).sum((2, 3))
    grad_weights = per_key.unflatten(-1, (weights.shape[2], -1)).sum(-1).to(weights.dtype)
    return grad_q, grad_k, grad_v, grad_weights


def _backward_kernel(*args) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.contiguous() for x in _backward_formula(*args))


_lib.impl("routed_attention", _forward, "CompositeExplicitAutograd")
_lib.impl("routed_attention_backward", _backward_kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("vitrail::routed_attention", lib=_lib)
def _fake_forward(q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale):
    b, h, w, _ = q.shape
    return q.new_empty((b, h, w, v.shape[3])), q.new_empty((b, h, w, num_heads), dtype=_lse_dtype(q))


@torch.library.register_fake("vitrail::routed_attention_backward", lib=_lib)
def _fake_backward(grad, out, lse, q, k, v, routes, weights, *_):
    grad_weights = q.new_empty((0,)) if weights is None else weights.new_empty(weights.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_weights


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, routes, weights, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, routes, weights, out, lse)


def _backward(ctx, grad, _grad_lse):
    q, k, v, routes, weights, out, lse = ctx.saved_tensors
    op = _BackwardFunction.apply if _in_transform() else torch.ops.vitrail.routed_attention_backward
    grads = op(grad.contiguous(), out, lse, q, k, v, routes, weights, *ctx.settings)
    return (*grads[:3], None, None if weights is None else grads[3], None, None, None, None)


torch.library.register_autograd(
    "vitrail::routed_attention", _backward, setup_context=_setup_context, lib=_lib
)


def _setup_double(ctx, inputs, output) -> None:
    grad, _, _, q, k, v, routes, weights, *ctx.settings = inputs
    ctx.save_for_backward(grad, q, k, v, routes, weights)


def _double_backward(ctx, *grads):
    """Second derivatives through the definition: they are rare, and the formula is long."""
    grad, q, k, v, routes, weights = ctx.saved_tensors
    leaves = [x.detach().requires_grad_() for x in (grad, q, k, v)]
    if weights is not None:
        leaves.append(weights.detach().requires_grad_())
    with torch.enable_grad():
        q, k, v, weights = leaves[1], leaves[2], leaves[3], leaves[4] if weights is not None else None
        out = reference(q, k, v, routes, weights, *ctx.settings)
        first = torch.autograd.grad(out, leaves[1:], leaves[0], create_graph=True)
        second = torch.autograd.grad(first, leaves, grads[: len(first)], allow_unused=True)
    grad_weights = second[4] if weights is not None else None
    return (second[0], None, None, *second[1:4], None, grad_weights, None, None, None, None)


torch.library.register_autograd(
    "vitrail::routed_attention_backward", _double_backward, setup_context=_setup_double, lib=_lib
)


def _fold(op, info, in_dims, args):
    """vmap: the mapped dimension joins the batch, since every image is computed on its own anyway."""

    def fold(x, dim):
        if not isinstance(x, Tensor):
            return x
        x = x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)
        return x.flatten(0, 1)

    outs = op(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
    # gradients of absent weights come back empty, without a batch to unfold
    outs = tuple(x.unflatten(0, (info.batch_size, -1)) if x.dim() > 1 else x for x in outs)
    return outs, tuple(0 if x.dim() > 1 else None for x in outs)


def _vmap(info, in_dims, *args):
    return _fold(torch.ops.vitrail.routed_attention, info, in_dims, args)


def _vmap_backward(info, in_dims, *args):
    return _fold(torch.ops.vitrail.routed_attention_backward, info, in_dims, args)


torch.library.register_vmap("vitrail::routed_attention", _vmap, lib=_lib)
torch.library.register_vmap("vitrail::routed_attention_backward", _vmap_backward, lib=_lib)


def _function(name: str, op, setup_context, backward, vmap) -> type[torch.autograd.Function]:
    """The same rules for torch.func transforms, which do not see those registered with the dispatcher."""
    rules = {
        "forward": lambda *args: op(*args),
        "setup_context": setup_context,
        "backward": backward,
        "vmap": vmap,
    }
    return type(name, (torch.autograd.Function,), {key: staticmethod(rule) for key, rule in rules.items()})


_Function = _function("RoutedAttention", torch.ops.vitrail.routed_attention, _setup_context, _backward, _vmap)
_BackwardFunction = _function(
    "RoutedAttentionBackward",
    torch.ops.vitrail.routed_attention_backward,
    _setup_double,
    _double_backward,
    _vmap_backward,
)


def _in_transform() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _autocast(device: str):
    def kernel(q, k, v, routes, weights, *settings):
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_AUTOCAST_KEYS[device])):
            q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
            return torch.ops.vitrail.routed_attention(q, k, v, routes, weights, *settings)

    return kernel


_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _lib.impl("routed_attention", _autocast(_device), _key)


# --- the public function ----------------------------------------------------------------------------------------------


def _check(q, k, v, routes, weights, region_size, kv_region_size, num_heads) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_grid(name, x)
        check_like(name, x, "q", q)
    check_region_size("region_size", region_size)
    check_region_size("kv_region_size", kv_region_size)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q and k must agree in batch and channels, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k and v must lie on the same grid, got {tuple(k.shape)} and {tuple(v.shape)}")
    if num_heads < 1 or q.shape[3] % num_heads or v.shape[3] % num_heads:
        raise ValueError(
            f"num_heads must divide the channels of q ({q.shape[3]}) and of v ({v.shape[3]}), got {num_heads}"
        )
    if routes.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"routes must be int32 or int64, got {routes.dtype}; convert it with .long()")
    if routes.device != q.device:
        raise ValueError(f"routes is on {routes.device} but q is on {q.device}; move one of them with .to()")
    regions = region_count(q, region_size)
    if routes.dim() != 3 or routes.shape[0] != q.shape[0] or routes.shape[1] != regions:
        raise ValueError(
            f"routes must have shape (batch {q.shape[0]}, regions {regions}, topk), got {tuple(routes.shape)}"
        )
    if routes.shape[2] < 1:
        raise ValueError("routes must name at least one region per region (topk >= 1), got topk 0")
    if weights is not None:
        if weights.shape != routes.shape:
            raise ValueError(
                f"weights must have the shape of routes, {tuple(routes.shape)}, got {tuple(weights.shape)}"
            )
        if weights.dtype != _lse_dtype(q):
            raise TypeError(f"weights must be {_lse_dtype(q)} for {q.dtype} queries, got {weights.dtype}")
        if weights.device != q.device:
            raise ValueError(
                f"weights is on {weights.device} but q is on {q.device}; move one of them with .to()"
            )


def _holds_values(x: Tensor) -> bool:
    """Whether routes can be read here and now: on the CPU, and not while a graph is captured or transformed."""
    captured = torch.compiler.is_compiling() or torch.jit.is_tracing() or _in_transform()
    return x.device.type == "cpu" and not captured and type(x) is Tensor


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    region_size: List[int],
    num_heads: int,
    scale: Optional[float] = None,
    kv_region_size: Optional[List[int]] = None,
    weights: Optional[Tensor] = None,
) -> Tensor:
    """Multi-head attention of every token to all tokens of the regions that its own region chose.

    BiFormer, arXiv 2303.08810, section 3.2. Regions are numbered row by row. Region sizes need not divide the grids:
    keys past the grid are zero vectors that do take part in the softmax, as in the authors' code.

    Args:
        q: `(B, H, W, C)` queries, heads interleaved in C; float32, float64, bfloat16 or float16 (sums and softmax are
            float32, float64 for float64). Channels must be contiguous, other strides are free: views of a packed
            projection need no copy.
        k: `(B, Hk, Wk, C)` keys, dtype and device of `q`.
        v: `(B, Hk, Wk, Cv)` values.
        routes: `(B, R, topk)` int32 or int64: for each of the R query regions the key regions it attends to.
        region_size: `(height, width)` of a query region.
        num_heads: number of heads; divides C and Cv.
        scale: factor of the scores; default: (C / num_heads) ** -0.5.
        kv_region_size: `(height, width)` of a key region; default: `region_size`.
        weights: `(B, R, topk)` float32 (float64 for float64 queries): soft routing; the keys and values of a chosen
            region are multiplied by its weight.

    Returns:
        `(B, H, W, Cv)`, contiguous, dtype of `q`.

    Raises:
        TypeError: a dtype that is not allowed, or dtypes that differ.
        ValueError: shapes, devices or strides that do not fit.
        IndexError: a route that names no region.
    """
    if kv_region_size is None:
        kv_region_size = region_size
    if not torch.jit.is_scripting():
        region_size, kv_region_size = concrete(region_size), concrete(kv_region_size)
        _check(q, k, v, routes, weights, region_size, kv_region_size, num_heads)
    if scale is None:
        scale = (q.shape[3] // num_heads) ** -0.5
    if torch.jit.is_scripting():
        return torch.ops.vitrail.routed_attention(
            q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale
        )[0]
    if library.mode() == "reference":
        if _holds_values(routes):  # the operator's kernels check for themselves
            check_routes_in_range(routes, region_count(k, kv_region_size))
        return reference(q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale)
    op = _Function.apply if _in_transform() else torch.ops.vitrail.routed_attention
    return op(q, k, v, routes, weights, region_size, kv_region_size, num_heads, scale)[0]
