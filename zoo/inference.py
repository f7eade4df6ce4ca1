"""The inference form of a model: the same function, with all that does not depend on the image worked out beforehand.

`fuse_for_inference` folds what is linear (BatchNorm into convolutions, norms' scales and layer scales into the layers
beside them, the identity of a residual into a depthwise convolution), and replaces the branches of a block by
`packed_linear` and `packed_mlp`, which take rows of tokens through norm, product, activation and residual while they
are in cache.
"""

import copy
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import Attention as ViTAttention
from timm.layers import LayerScale, Mlp
from timm.models.vision_transformer import Block as ViTBlock
from timm.models.vision_transformer import LayerScale as ViTLayerScale
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..ops.packed_linear import pack_weight, packed_grn_mlp, packed_linear, packed_mlp
from . import biformer, davit_fused, sparsifiner, stripmlp, stvit, stvit_swin

# --- layers -----------------------------------------------------------------------------------------------------------


class _Weights:
    """Weight and bias of a linear layer in float64, with what surrounds the layer folded into them."""

    def __init__(
        self,
        linear: nn.Linear,
        norm: Optional[nn.LayerNorm] = None,
        scale: Optional[Tensor] = None,
        shift: Optional[Tensor] = None,
    ):
        self.weight = linear.weight.detach().double()
        self.bias = linear.bias.detach().double() if linear.bias is not None else None
        if norm is not None and norm.bias is not None:
            shift = self.weight @ norm.bias.detach().double()
            self.bias = shift if self.bias is None else self.bias + shift
        if norm is not None and norm.weight is not None:
            self.weight = self.weight * norm.weight.detach().double()
        if scale is not None:
            self.weight = self.weight * scale[:, None]
            self.bias = self.bias * scale if self.bias is not None else None
        if shift is not None:
            self.bias = shift if self.bias is None else self.bias + shift

    def packed(self, dtype: torch.dtype) -> tuple[Tensor, Optional[Tensor]]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return pack_weight(self.weight.to(dtype)), None if self.bias is None else self.bias.to(wide)


class PackedLinear(nn.Module):
    """A linear layer with a packed weight, after the norm that it takes in; `residual` is added to its result.

    `scale` and `shift` are applied to the result, before the activation. `rows` picks some of the columns.
    """

    packed: Tensor
    shift: Optional[Tensor]

    def __init__(
        self,
        linear: nn.Linear,
        norm: Optional[nn.LayerNorm] = None,
        scale: Optional[Tensor] = None,
        shift: Optional[Tensor] = None,
        activation: str = "none",
        columns: slice = slice(None),
    ):
        super().__init__()
        weights = _Weights(linear, norm, scale, shift)
        weights.weight = weights.weight[columns]
        weights.bias = None if weights.bias is None else weights.bias[columns]
        self.in_features = linear.in_features
        self.out_features = len(weights.weight)
        # what the layer makes of zeros, which attention asks for where it pads
        self.bias = linear.bias
        self.norm_eps = None if norm is None else norm.eps
        self.activation = activation
        packed, shift = weights.packed(linear.weight.dtype)
        self.register_buffer("packed", packed)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        return packed_linear(
            x, self.packed, self.shift, self.out_features, residual, self.norm_eps, self.activation
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, norm_eps={self.norm_eps}, activation={self.activation}"
        )


class MlpBranch(nn.Module):
    """`x + scale * fc2(gelu(fc1(norm(x))))`."""

    packed1: Tensor
    packed2: Tensor
    shift1: Optional[Tensor]
    shift2: Optional[Tensor]

    def __init__(self, norm: nn.LayerNorm, mlp: Mlp, scale: Optional[Tensor] = None):
        super().__init__()
        self.in_features = mlp.fc1.in_features
        self.hidden_features = mlp.fc1.out_features
        self.out_features = mlp.fc2.out_features
        self.norm_eps = norm.eps
        dtype = mlp.fc1.weight.dtype
        for name, weights in (("1", _Weights(mlp.fc1, norm)), ("2", _Weights(mlp.fc2, scale=scale))):
            packed, shift = weights.packed(dtype)
            self.register_buffer(f"packed{name}", packed)
            self.register_buffer(f"shift{name}", shift)

    def forward(self, x: Tensor) -> Tensor:
        return packed_mlp(
            x, self.packed1, self.shift1, self.packed2, self.shift2, self.hidden_features, self.out_features,
            x, self.norm_eps,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.hidden_features}, {self.out_features}, norm_eps={self.norm_eps}"


class AttentionBranch(nn.Module):
    """`x + scale * proj(attn(norm(x)))`, for an attention whose last layer is `proj`."""

    def __init__(self, norm: nn.Module, attn: nn.Module, scale: Optional[Tensor] = None):
        super().__init__()
        self.norm = norm
        self.attn: Any = attn
        self.proj = PackedLinear(self.attn.proj, scale=scale)
        self.attn.proj = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attn(self.norm(x)), x)


class CrossBranch(AttentionBranch):
    """The same of tokens `x` that attend to tokens `y`; the norm is in the attention's first layers."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.proj(self.attn(x, y), x)


class CenterBranch(AttentionBranch):
    """Attention of `stvit.CenterLayer`: pooled centres gather from the image."""

    def __init__(self, layer: Any, scale: Optional[Tensor] = None):
        super().__init__(nn.Identity(), layer.attn, scale)
        self.pool = layer.pool
        self.shortcut = layer.shortcut

    def forward(self, x: Tensor) -> Tensor:
        centers = self.pool(x)
        return self.proj(self.attn(centers, x), centers if self.shortcut else None)


class FusedCrossLayer(nn.Module):
    """`stvit.CrossLayer`."""

    def __init__(self, branch: CrossBranch, mlp: MlpBranch):
        super().__init__()
        self.branch = branch
        self.mlp = mlp

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.mlp(self.branch(x, y))


class FusedStripBlock(nn.Module):
    """`stripmlp.StripMLPBlock`."""

    grn_weight: Tensor

    def __init__(self, block: Any):
        super().__init__()
        tokens, channels = block.token_mixing, block.channel_mixing
        self.scale, self.shift = (nn.Buffer(x.to(tokens.proj.weight.dtype)) for x in _affine(tokens.norm1))
        self.dwconv = _channels_last(tokens.dwconv)
        half = tokens.proj.out_features // 2
        affine = _affine(tokens.norm2)
        self.far = PackedLinear(tokens.proj, None, *affine, "gelu", slice(half))
        self.near = PackedLinear(tokens.proj, None, *affine, "gelu", slice(half, None))
        strips = tokens.strips
        self.row_pos, self.row_mix = strips.row_pos, strips.row_mix
        self.row_fuse = PackedLinear(strips.row_fuse, None, *_affine(strips.norm), "gelu")
        self.col_pos, self.col_mix = strips.col_pos, strips.col_mix
        self.col_fuse = PackedLinear(strips.col_fuse)
        self.local = tokens.local
        self.fuse = PackedLinear(tokens.fuse)

        self.dwconv2 = _channels_last(channels.dwconv)
        mlp = channels.mlp
        dtype = mlp.fc1.weight.dtype
        self.hidden, self.columns = mlp.fc1.out_features, mlp.fc2.out_features
        self.norm_eps, self.grn_eps = channels.norm.eps, mlp.grn.eps
        packed, shift = _Weights(mlp.fc1, channels.norm).packed(dtype)
        self.packed1, self.shift1 = nn.Buffer(packed), nn.Buffer(shift)
        of_bias = mlp.fc2.weight.detach().double() @ mlp.grn.bias.detach().double().flatten()
        packed, shift = _Weights(mlp.fc2, shift=of_bias).packed(dtype)
        self.packed2, self.shift2 = nn.Buffer(packed), nn.Buffer(shift)
        self.grn_weight = nn.Buffer(mlp.grn.weight.detach().flatten().to(shift.dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(F.gelu(torch.addcmul(self.shift, x, self.scale)))
        far, near = self.far(y), self.near(y)
        rows = self.row_fuse(torch.cat([self.row_mix(self.row_pos(far)), far], -1))
        far = self.col_fuse(torch.cat([far, self.col_mix(self.col_pos(rows))], -1))
        x = self.fuse(torch.cat([far, self.local(near)], -1), x)
        return packed_grn_mlp(
            self.dwconv2(x), self.packed1, self.shift1, self.grn_weight, self.packed2, self.shift2, self.hidden,
            self.columns, x, self.norm_eps, self.grn_eps,
        )  # fmt: skip


# --- rules: what each kind of module becomes --------------------------------------------------------------------------


def _is_plain(mlp: Any) -> bool:
    return (
        type(mlp) is Mlp
        and type(mlp.fc1) is nn.Linear
        and type(mlp.act) is nn.GELU
        and mlp.act.approximate == "none"
        and type(mlp.norm) is nn.Identity
    )


def _scale(module: nn.Module, factor: float = 1.0) -> Optional[Tensor]:
    """A layer scale (or its absence) times a factor, as what a layer before it can take in."""
    if isinstance(module, (LayerScale, ViTLayerScale)):
        return module.gamma.detach().double() * factor
    return None


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a BatchNorm that learns no more."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    scale = norm.weight.detach().double() / (variance.double() + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - mean.double() * scale


def _channels_last(conv: nn.Conv2d) -> nn.Conv2d:
    """A depthwise convolution for channels-last maps."""
    own = biformer.DepthwiseConv(conv.in_channels, conv.kernel_size[0], device=conv.weight.device)
    own.weight, own.bias = conv.weight, conv.bias
    return own


def _with_identity(conv: nn.Conv2d) -> nn.Conv2d:
    """A depthwise convolution that adds its input to its result."""
    kh, kw = conv.weight.shape[2:]
    conv.weight.data[:, 0, kh // 2, kw // 2] += 1
    return conv


def _attention(block: Any, scale: Optional[Tensor]) -> nn.Module:
    """The first branch of a block; the norm goes into the projection where nothing else reads it."""
    attn, norm = block.attn, block.norm1
    if isinstance(attn, (ViTAttention, *_ONE_READER)) or (
        isinstance(attn, biformer.FullAttention) and not attn.lepe_of_input
    ):
        attn.qkv = PackedLinear(attn.qkv, norm)
        norm = nn.Identity()
    elif hasattr(attn, "qkv"):
        attn.qkv = PackedLinear(attn.qkv)
    elif isinstance(attn, stvit.TokenAttention):
        attn.q, attn.kv = PackedLinear(attn.q, norm), PackedLinear(attn.kv, norm)
        norm = nn.Identity()
    return AttentionBranch(norm, attn, scale)


_ONE_READER = (davit_fused.WindowAttention, davit_fused.ChannelAttention, stvit_swin.WindowAttention)


def _biformer_block(block: Any) -> Optional[nn.Module]:
    attn = block.attn
    if (
        not block.pre_norm
        or not _is_plain(block.mlp)
        or not isinstance(getattr(attn, "proj", None), nn.Linear)
    ):
        return None
    position = [] if block.pos_embed is None else [_with_identity(block.pos_embed)]
    return nn.Sequential(
        *position, _attention(block, _scale(block.ls1)), MlpBranch(block.norm2, block.mlp, _scale(block.ls2))
    )


def _davit_block(block: Any) -> Optional[nn.Module]:
    norms = [block.norm1] + ([] if block.mlp is None else [block.norm2])
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        return None
    layers = [_position(block.cpe1), _attention(block, None), _position(block.cpe2)]
    return nn.Sequential(*layers, *([] if block.mlp is None else [MlpBranch(block.norm2, block.mlp)]))


def _position(cpe: davit_fused.ConvPosEnc) -> nn.Module:
    if not isinstance(cpe.act, nn.Identity):
        return cpe
    return _with_identity(_channels_last(cpe.proj))


def _transformer_block(block: Any) -> Optional[nn.Module]:
    """timm's ViT block, and Swin's and that of semantic tokens."""
    if not _is_plain(block.mlp):
        return None
    attention = _attention(block, _scale(block.ls1))
    return nn.Sequential(attention, MlpBranch(block.norm2, block.mlp, _scale(block.ls2)))


def _cross_layer(layer: Any) -> Optional[nn.Module]:
    layer.attn.q, layer.attn.kv = (
        PackedLinear(layer.attn.q, layer.norm1),
        PackedLinear(layer.attn.kv, layer.norm1),
    )
    branch = CrossBranch(nn.Identity(), layer.attn, _scale(layer.ls1))
    return FusedCrossLayer(branch, MlpBranch(layer.norm2, layer.mlp, _scale(layer.ls2)))


def _center_layer(layer: Any) -> nn.Module:
    layer.attn.q, layer.attn.kv = (
        PackedLinear(layer.attn.q, layer.norm1),
        PackedLinear(layer.attn.kv, layer.norm1),
    )
    branch = CenterBranch(layer, _scale(layer.ls1))
    return nn.Sequential(branch, MlpBranch(layer.norm2, layer.mlp, _scale(layer.ls2)))


RULES: dict[type[nn.Module], Callable[[Any], Optional[nn.Module]]] = {
    biformer.BiFormerBlock: _biformer_block,
    davit_fused.DaViTBlock: _davit_block,
    stvit.SelfLayer: _transformer_block,
    ViTBlock: _transformer_block,
    stvit.CrossLayer: _cross_layer,
    stvit.CenterLayer: _center_layer,
    stripmlp.StripMLPBlock: FusedStripBlock,
}


# These take the weights of their layers themselves.
_WEIGHT_READERS = (sparsifiner.ConnectivityPredictor, biformer.RegionRouter, nn.MultiheadAttention)


def _sequential(layers: nn.Sequential) -> None:
    """BatchNorm goes into the convolution before it."""
    names = list(layers._modules)
    for first, second in zip(names, names[1:], strict=False):
        conv, norm = layers._modules[first], layers._modules[second]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers._modules[first] = fuse_conv_bn_eval(conv, norm)
            layers._modules[second] = nn.Identity()


def _fuse(module: nn.Module) -> nn.Module:
    for kind, rule in RULES.items():
        if type(module) is kind:
            return rule(module) or module
    if isinstance(module, nn.Sequential):
        _sequential(module)
    if type(module) is nn.Linear:
        return PackedLinear(module)
    if not isinstance(module, _WEIGHT_READERS):
        for name, child in module.named_children():
            setattr(module, name, _fuse(child))
    return module


def fuse_for_inference(model: nn.Module, dtype: Optional[torch.dtype] = None) -> nn.Module:
    """A copy of a model for inference."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        model = model.to(dtype)
    return _fuse(model)
