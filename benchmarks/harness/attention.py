"""Attention on grids at the shapes of BiFormer, DaViT and STViT, and its formulations in stock PyTorch."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.ops import (
    channel_attention,
    region_route,
    routed_attention,
    semantic_attention,
    window_attention,
)
from vitrail.ops.regions import merge, partition

from . import flex
from .problems import Function, Problem, Setting

Pair = tuple[int, int]


def _heads(x: Tensor, heads: int) -> Tensor:
    """`(..., tokens, C)` to `(..., heads, tokens, C / heads)`."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _join(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)


# --- BiFormer: routed_attention, region_route -------------------------------------------------------------------------


def _picked(x: Tensor, routes: Tensor, region: Pair) -> Tensor:
    """Tokens of the chosen regions, `(B * R, topk * tokens, C)`: whole regions by a flat `index_select`."""
    b, regions, topk = routes.shape
    index = (routes + regions * torch.arange(b, device=routes.device).view(b, 1, 1)).flatten()
    chosen = partition(x, region).flatten(0, 1).flatten(1).index_select(0, index)
    return chosen.view(b * regions, topk * region[0] * region[1], x.shape[3])


def _gather_sdpa(qkv: Tensor, routes: Tensor, region: Pair, heads: int, scale: float) -> Tensor:
    q, k, v = qkv.chunk(3, -1)
    b, regions, _ = routes.shape
    queries = _heads(partition(q, region).flatten(0, 1), heads)
    keys, values = (_heads(_picked(x, routes, region), heads) for x in (k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
    return merge(_join(out).unflatten(0, (b, regions)), region, q.shape[1], q.shape[2])


def _mask_sdpa(qkv: Tensor, routes: Tensor, region: Pair, heads: int, scale: float) -> Tensor:
    """Dense attention in the order of the regions, with a mask that leaves the chosen ones."""
    q, k, v = (_heads(partition(x, region).flatten(1, 2), heads) for x in qkv.chunk(3, -1))
    b, regions, _ = routes.shape
    tokens = region[0] * region[1]
    chosen = torch.zeros(b, regions, regions, dtype=torch.bool, device=routes.device).scatter_(
        2, routes, True
    )
    mask = chosen.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2).unsqueeze(1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return merge(_join(out).unflatten(1, (regions, tokens)), region, qkv.shape[1], qkv.shape[2])


_FLEX = (("flex", False), ("mask + flex", True))
"""With a mask that is there already, and with one that is made of the routes at every call, as a model must."""


def _flex(routes: Tensor, region: Pair, heads: int, scale: float, anew: bool) -> Function:
    """FlexAttention in the order of the regions."""
    attend, mask = flex.attention(), flex.RegionMask(routes, region[0] * region[1])
    ready = None if anew else mask.make()

    def call(qkv: Tensor) -> Tensor:
        q, k, v = (_heads(partition(x, region).flatten(1, 2), heads) for x in qkv.chunk(3, -1))
        out = _join(attend(q, k, v, block_mask=mask.make() if ready is None else ready, scale=scale))
        return merge(out.unflatten(1, (routes.shape[1], -1)), region, qkv.shape[1], qkv.shape[2])

    return call


def _routed(side: int, heads: int, topk: int, batch: int, dtype: torch.dtype) -> Problem:
    channels = 32 * heads
    region, scale = (side // 7, side // 7), channels**-0.5
    qkv = torch.randn(batch, side, side, 3 * channels).to(dtype)
    q, k, _ = qkv.chunk(3, -1)
    settings = {"routes": region_route(q, k, topk, region), "region": region, "heads": heads, "scale": scale}

    def operator(qkv: Tensor) -> Tensor:
        return routed_attention(*qkv.chunk(3, -1), settings["routes"], region, heads, scale)

    stock = {"gather + SDPA": partial(_gather_sdpa, **settings)}
    if topk * 4 >= 49:  # else dense attention is out of the question
        stock["mask + SDPA"] = partial(_mask_sdpa, **settings)
    flexible = {name: partial(_flex, **settings, anew=anew) for name, anew in _FLEX}
    return Problem((qkv,), operator, stock, flex=flexible)


def _pool_route(qkv: Tensor, topk: int, region: Pair, channels: int) -> Tensor:
    q, k = (x.permute(0, 3, 1, 2).float() for x in qkv.split(channels, -1)[:2])
    q, k = (F.avg_pool2d(x, region).flatten(2) for x in (q, k))
    return (q.transpose(1, 2) @ k).topk(topk, -1).indices


def _route(side: int, heads: int, topk: int, batch: int, dtype: torch.dtype) -> Problem:
    channels, region = 32 * heads, (side // 7, side // 7)
    qkv = torch.randn(batch, side, side, 3 * channels).to(dtype)
    q, k, _ = qkv.float().chunk(3, -1)
    means = (partition(x, region).mean(2) for x in (q, k))
    scores = next(means) @ next(means).transpose(1, 2)

    def operator(qkv: Tensor) -> Tensor:
        q, k, _ = qkv.chunk(3, -1)
        return region_route(q, k, topk, region)

    stock = {"avg_pool2d + topk": partial(_pool_route, topk=topk, region=region, channels=channels)}
    return Problem((qkv,), operator, stock, comparable=lambda routes: scores.gather(2, routes).sort(2).values)


# --- DaViT, Swin's blocks of STViT: window_attention ------------------------------------------------------------------


def _pieces(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """The piece of a shifted window that a token lies in, `(windows, tokens, 1)`."""
    place = torch.arange(side, device=device)
    piece = (place >= side - window).int() + (place >= side - shift).int()
    return partition((3 * piece[:, None] + piece)[None, :, :, None], (window, window))[0]


def _window_sdpa(
    qkv: Tensor,
    padding: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    side: int,
    window: int,
    shift: int,
    heads: int,
) -> Tensor:
    """Roll, cut, attend under an additive mask, put together, roll back. The windows fit these grids: no padding."""
    grids = qkv.roll((-shift, -shift), (1, 2)) if shift else qkv
    q, k, v = (_heads(partition(x, (window, window)), heads) for x in grids.chunk(3, -1))
    mask = bias
    if shift:
        pieces = _pieces(side, window, shift, qkv.device)
        apart = (pieces != pieces.transpose(1, 2)).unsqueeze(1)
        mask = qkv.new_zeros(apart.shape).masked_fill(apart, -torch.inf) + bias
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = merge(_join(out), (window, window), side, side)
    return out.roll((shift, shift), (1, 2)) if shift else out


def _window_flex(side: int, window: int, shift: int, heads: int, like: Tensor) -> Function:
    """The same by FlexAttention, tokens window by window."""
    pieces = _pieces(side, window, shift, like.device)
    windows = torch.arange(len(pieces), device=like.device).view(-1, 1, 1)
    attend, mask = (
        flex.attention(),
        flex.label_mask((9 * windows + (pieces if shift else 0 * pieces)).flatten()),
    )

    def call(qkv: Tensor, padding: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        grids = qkv.roll((-shift, -shift), (1, 2)) if shift else qkv
        q, k, v = (_heads(partition(x, (window, window)).flatten(1, 2), heads) for x in grids.chunk(3, -1))
        score = None if bias is None else flex.add_bias(bias)
        out = _join(attend(q, k, v, score_mod=score, block_mask=mask)).unflatten(1, (len(pieces), -1))
        out = merge(out, (window, window), side, side)
        return out.roll((shift, shift), (1, 2)) if shift else out

    return call


def _window(
    kind: str, side: int, heads: int, window: int, shift: int, batch: int, dtype: torch.dtype
) -> Problem:
    """`davit`: tokens that pad a window are given; `swin`: these and a bias; `plain`: neither."""
    channels, tokens = 32 * heads, window * window
    qkv = torch.randn(batch, side, side, 3 * channels).to(dtype)
    bias = torch.randn(heads, tokens, tokens).to(dtype)
    padding = torch.randn(2 * channels).to(dtype)

    def operator(qkv: Tensor, padding: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        key, value = (None, None) if padding is None else padding.chunk(2)
        options = {"shift": [shift, shift], "bias": bias, "pad_key": key, "pad_value": value}
        return window_attention(*qkv.chunk(3, -1), [window, window], heads, **options)

    leaves = {"davit": (qkv, padding), "swin": (qkv, padding, bias), "plain": (qkv,)}[kind]
    settings = {"side": side, "window": window, "shift": shift, "heads": heads}
    stock = {"partition + SDPA": partial(_window_sdpa, **settings)}
    flexible = {"partition + flex": partial(_window_flex, **settings, like=qkv)}
    return Problem(leaves, operator, stock, flex=flexible)


# --- DaViT: channel_attention -----------------------------------------------------------------------------------------


def _channel_matmul(qkv: Tensor, heads: int, channels: int) -> Tensor:
    """As published code and timm have it."""
    v, q, k = qkv.flatten(1, 2).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    attention = ((q * (channels // heads) ** -0.5).transpose(-1, -2) @ k).softmax(-1)
    return _join((attention @ v.transpose(-1, -2)).transpose(-1, -2)).view(*qkv.shape[:3], channels)


def _channel_sdpa(qkv: Tensor, heads: int, channels: int) -> Tensor:
    v, q, k = (_heads(x.flatten(1, 2), heads).transpose(-1, -2) for x in qkv.chunk(3, -1))
    out = F.scaled_dot_product_attention(q, k, v, scale=(channels // heads) ** -0.5)
    return _join(out.transpose(-1, -2)).view(*qkv.shape[:3], channels)


def _channel(side: int, heads: int, batch: int, dtype: torch.dtype) -> Problem:
    channels = 32 * heads
    # scores are sums over all tokens
    qkv = (torch.randn(batch, side, side, 3 * channels) / side**0.5).to(dtype)

    def operator(qkv: Tensor) -> Tensor:
        v, q, k = qkv.chunk(3, -1)
        return channel_attention(q, k, v, heads)

    settings = {"heads": heads, "channels": channels}
    stock = {"matmul": partial(_channel_matmul, **settings), "SDPA": partial(_channel_sdpa, **settings)}
    return Problem((qkv,), operator, stock)


# --- STViT: semantic_attention ----------------------------------------------------------------------------------------


def _unfold_sdpa(q: Tensor, own: Tensor, image: Tensor, window: Pair, patch: int, heads: int) -> Tensor:
    """Patches copied out of the map, the window's own tokens in front of each."""
    b, side, _, channels = q.shape
    count = side // window[0]
    step = (image.shape[1] - patch) // (count - 1)
    patches = F.unfold(image.permute(0, 3, 1, 2), patch, stride=step)
    patches = patches.view(b, 2 * channels, patch * patch, count * count).permute(0, 3, 2, 1)
    keys, values = torch.cat([partition(own, window), patches], 2).chunk(2, -1)
    queries = partition(q, window)
    out = F.scaled_dot_product_attention(_heads(queries, heads), _heads(keys, heads), _heads(values, heads))
    return merge(_join(out), window, side, side)


def _semantic(batch: int, dtype: torch.dtype) -> Problem:
    heads, channels, window, patch = 12, 384, (3, 3), 10
    q = torch.randn(batch, 6, 6, channels).to(dtype)
    own, image = (torch.randn(batch, side, side, 2 * channels).to(dtype) for side in (6, 14))

    def operator(q: Tensor, own: Tensor, image: Tensor) -> Tensor:
        (own_k, own_v), (k, v) = own.chunk(2, -1), image.chunk(2, -1)
        return semantic_attention(q, k, v, own_k, own_v, window, [patch, patch], heads)

    stock = {"unfold + SDPA": partial(_unfold_sdpa, window=window, patch=patch, heads=heads)}
    return Problem((q, own, image), operator, stock)


# --- the layers -------------------------------------------------------------------------------------------------------

_BIFORMER = ((1, 2, 1), (2, 4, 4), (3, 8, 16))  # stage, heads, regions chosen


def _side(size: int, stage: int) -> int:
    return size // 2 ** (stage + 1)


SETTINGS = (
    *(
        Setting(
            "routed_attention",
            f"biformer_small {size}, stage {stage}",
            partial(_routed, _side(size, stage), heads, topk),
            largest_batch=8 if size == 224 else 1,
            quick=size == 224,
            on_cpu=stage < 4,
            gpu_batch=64 * 224**2 // size**2,
        )
        for size in (224, 896)
        for stage, heads, topk in (*_BIFORMER, (4, 16, 49))  # stage 4 as a choice of all regions
    ),
    *(
        Setting(
            "region_route",
            f"biformer_small 224, stage {stage}",
            partial(_route, _side(224, stage), heads, topk),
            trains=False,
        )
        for stage, heads, topk in _BIFORMER
    ),
    *(
        Setting(
            "window_attention",
            f"davit_fused_tiny, stage {stage}",
            partial(_window, "davit", _side(224, stage), heads, 7, 0),
        )
        for stage, heads in ((1, 3), (2, 6), (3, 12), (4, 24))
    ),
    *(
        Setting(
            "window_attention", f"stvit_r_swin_small, {name}", partial(_window, kind, side, heads, *windows)
        )
        for name, kind, side, heads, windows in (
            ("stage 1, shifted", "swin", 56, 3, (7, 3)),
            ("stage 2, shifted", "swin", 28, 6, (7, 3)),
            ("stage 3", "swin", 14, 12, (7, 0)),
            ("semantic tokens", "plain", 6, 12, (3, 0)),
        )
    ),
    *(
        Setting(
            "channel_attention",
            f"davit_fused_tiny, stage {stage}",
            partial(_channel, _side(224, stage), heads),
        )
        for stage, heads in ((1, 3), (2, 6), (3, 12), (4, 24))
    ),
    Setting("semantic_attention", "stvit_r_swin_small, stage 3", _semantic),
)
