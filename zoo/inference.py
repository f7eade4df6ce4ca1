"""The inference form of a model: the same function, with all that does not depend on the image worked out beforehand.

`fuse_for_inference` folds what is linear (BatchNorm into convolutions, norms' and layers' scales into the layers beside
them, the identity of a residual into a depthwise convolution), and takes the branches of a block as one: on the CPU
`packed_linear` and its like carry rows of tokens through norm, product, activation and residual while they are in
cache; elsewhere, and in exported files, standard operators compute the same.
"""

import copy
import itertools
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

from ..ops.packed_linear import DTYPES, pack_weight, packed_grn_mlp, packed_linear, packed_mlp
from . import biformer, davit_fused, sparsifiner, stripmlp, stvit, stvit_swin

# --- layers -----------------------------------------------------------------------------------------------------------


class _Folded(nn.Module):
    """Linear layers whose weights have taken in what surrounds them; packed, or as they are for other runtimes."""

    def __init__(self, like: nn.Linear, norm: Optional[nn.LayerNorm], pack: bool):
        super().__init__()
        self.in_features = like.in_features
        self.norm_eps = None if norm is None else norm.eps
        self.pack = pack
        self.dtype = like.weight.dtype

    def fold(
        self,
        name: str,
        linear: nn.Linear,
        norm: Optional[nn.LayerNorm] = None,
        scale: Optional[Tensor] = None,
        shift: Optional[Tensor] = None,
        columns: slice = slice(None),
    ) -> int:
        """Buffers `weight<name>` and `shift<name>` for `scale * linear(norm without its scale and shift) + shift`.

        Worked out in float64; returns the number of columns.
        """
        weight = linear.weight.detach().double()
        bias = torch.zeros(len(weight), dtype=torch.float64) if linear.bias is None else linear.bias.double()
        if norm is not None and norm.bias is not None:
            bias = bias + weight @ norm.bias.double()
        if norm is not None and norm.weight is not None:
            weight = weight * norm.weight.double()
        if scale is not None:
            weight, bias = weight * scale[:, None], bias * scale
        if shift is not None:
            bias = bias + shift
        weight, bias = weight[columns].to(self.dtype), bias[columns]
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.register_buffer(f"weight{name}", pack_weight(weight) if self.pack else weight)
        self.register_buffer(f"shift{name}", bias.to(wide if self.pack else self.dtype))
        return len(weight)

    def normalised(self, x: Tensor) -> Tensor:
        """The norm, without scale and shift; for layers that are not packed."""
        return x if self.norm_eps is None else F.layer_norm(x, [self.in_features], eps=self.norm_eps)


class FoldedLinear(_Folded):
    """`residual + activation(scale * linear(norm(x)) + shift)`, of whose columns some may be picked."""

    weight: Tensor
    shift: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        pack: bool,
        norm: Optional[nn.LayerNorm] = None,
        scale: Optional[Tensor] = None,
        shift: Optional[Tensor] = None,
        activation: str = "none",
        columns: slice = slice(None),
    ):
        super().__init__(linear, norm, pack)
        self.out_features = self.fold("", linear, norm, scale, shift, columns)
        # what the layer makes of zeros, which attention asks for where it pads
        self.bias = linear.bias
        self.activation = activation

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        if self.pack:
            return packed_linear(
                x, self.weight, self.shift, self.out_features, residual, self.norm_eps, self.activation
            )
        x = F.linear(self.normalised(x), self.weight, self.shift)
        if self.activation == "gelu":
            x = F.gelu(x)
        return x if residual is None else residual + x

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, norm_eps={self.norm_eps}, activation={self.activation}"
        )


class MlpBranch(_Folded):
    """`x + scale * fc2(gelu(fc1(norm(x))))`."""

    weight1: Tensor
    weight2: Tensor
    shift1: Tensor
    shift2: Tensor

    def __init__(self, norm: nn.LayerNorm, mlp: Any, pack: bool, scale: Optional[Tensor] = None):
        super().__init__(mlp.fc1, norm, pack)
        self.hidden_features = self.fold("1", mlp.fc1, norm)
        self.out_features = self.fold("2", mlp.fc2, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.pack:
            return packed_mlp(
                x, self.weight1, self.shift1, self.weight2, self.shift2, self.hidden_features, self.out_features,
                x, self.norm_eps,
            )  # fmt: skip
        hidden = F.gelu(F.linear(self.normalised(x), self.weight1, self.shift1))
        return x + F.linear(hidden, self.weight2, self.shift2)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.hidden_features}, {self.out_features}, norm_eps={self.norm_eps}"


class ResponseMlp(_Folded):
    """`residual + fc2(grn(gelu(fc1(norm(x)))))`, with global response normalisation."""

    weight1: Tensor
    weight2: Tensor
    shift1: Tensor
    shift2: Tensor
    grn_weight: Tensor

    def __init__(self, norm: nn.LayerNorm, mlp: Any, pack: bool):
        super().__init__(mlp.fc1, norm, pack)
        grn = mlp.grn
        self.hidden_features = self.fold("1", mlp.fc1, norm)
        shift = mlp.fc2.weight.double() @ grn.bias.double().flatten()
        self.out_features = self.fold("2", mlp.fc2, shift=shift)
        self.grn_eps = grn.eps
        self.register_buffer("grn_weight", grn.weight.detach().flatten().to(self.shift1.dtype))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.pack:
            return packed_grn_mlp(
                x, self.weight1, self.shift1, self.grn_weight, self.weight2, self.shift2, self.hidden_features,
                self.out_features, residual, self.norm_eps, self.grn_eps,
            )  # fmt: skip
        hidden = F.gelu(F.linear(self.normalised(x), self.weight1, self.shift1))
        norm = hidden.norm(p=2, dim=(1, 2), keepdim=True)
        hidden = hidden * (1 + self.grn_weight * (norm / (norm.mean(-1, keepdim=True) + self.grn_eps)))
        return residual + F.linear(hidden, self.weight2, self.shift2)


# --- branches of blocks -----------------------------------------------------------------------------------------------


class AttentionBranch(nn.Module):
    """`x + scale * proj(attn(norm(x)))`, for an attention whose last layer is `proj`."""

    def __init__(self, norm: nn.Module, attn: Any, pack: bool, scale: Optional[Tensor] = None):
        super().__init__()
        self.norm = norm
        self.attn = attn
        self.proj = FoldedLinear(attn.proj, pack, scale=scale)
        self.attn.proj = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attn(self.norm(x)), x)


class CrossBranch(AttentionBranch):
    """The same of tokens `x` that attend to tokens `y`; the norm is in the attention's first layers."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.proj(self.attn(x, y), x)


class CenterBranch(AttentionBranch):
    """Attention of `stvit.CenterLayer`: pooled centres gather from the image."""

    def __init__(self, layer: Any, pack: bool):
        super().__init__(nn.Identity(), layer.attn, pack, _scale(layer.ls1))
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

    scale: Tensor
    shift: Tensor

    def __init__(self, block: Any, pack: bool):
        super().__init__()
        tokens, channels = block.token_mixing, block.channel_mixing
        for name, x in zip(("scale", "shift"), _affine(tokens.norm1), strict=True):
            self.register_buffer(name, x.to(tokens.proj.weight.dtype))
        self.dwconv = _channels_last(tokens.dwconv)
        # the halves apart, so that each is a map of its own
        half, affine = tokens.proj.out_features // 2, _affine(tokens.norm2)
        self.far = FoldedLinear(tokens.proj, pack, None, *affine, "gelu", slice(half))
        self.near = FoldedLinear(tokens.proj, pack, None, *affine, "gelu", slice(half, None))
        strips = tokens.strips
        self.row_pos, self.row_mix = strips.row_pos, strips.row_mix
        self.row_fuse = FoldedLinear(strips.row_fuse, pack, None, *_affine(strips.norm), "gelu")
        self.col_pos, self.col_mix = strips.col_pos, strips.col_mix
        self.col_fuse = FoldedLinear(strips.col_fuse, pack)
        self.local = tokens.local
        self.fuse = FoldedLinear(tokens.fuse, pack)
        self.channel_dwconv = _channels_last(channels.dwconv)
        self.channel_mlp = ResponseMlp(channels.norm, channels.mlp, pack)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(F.gelu(torch.addcmul(self.shift, x, self.scale)))
        far, near = self.far(y), self.near(y)
        rows = self.row_fuse(torch.cat([self.row_mix(self.row_pos(far)), far], -1))
        far = self.col_fuse(torch.cat([far, self.col_mix(self.col_pos(rows))], -1))
        x = self.fuse(torch.cat([far, self.local(near)], -1), x)
        return self.channel_mlp(self.channel_dwconv(x), x)


class FusedSparseBlock(sparsifiner.SparseBlock):
    """`sparsifiner.SparseBlock` whose MLP holds its norm and residual."""

    def add_mlp(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class FusedPruningBlock(sparsifiner.PruningBlock):
    """The same of `sparsifiner.PruningBlock`."""

    def add_mlp(self, x: Tensor) -> Tensor:
        return self.mlp(x)


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
    assert mean is not None
    assert variance is not None
    scale = norm.weight.detach().double() / (variance.double() + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - mean.double() * scale


def _channels_last(conv: Any) -> nn.Conv2d:
    """A depthwise convolution for channels-last maps."""
    own = biformer.DepthwiseConv(conv.in_channels, conv.kernel_size[0], device=conv.weight.device)
    own.weight, own.bias = conv.weight, conv.bias
    return own


def _with_identity(conv: nn.Conv2d) -> nn.Conv2d:
    """A depthwise convolution that adds its input to its result."""
    kh, kw = conv.weight.shape[2:]
    conv.weight.data[:, 0, kh // 2, kw // 2] += 1
    return conv


def _attention(block: Any, pack: bool, scale: Optional[Tensor] = None) -> nn.Module:
    """The first branch of a block; the norm goes into the projections where nothing else reads it."""
    attn, norm = block.attn, block.norm1
    if isinstance(attn, stvit.TokenAttention):
        _fold_norm(attn, norm, pack)
        return AttentionBranch(nn.Identity(), attn, pack, scale)
    alone = isinstance(attn, _ONE_READER) or (
        isinstance(attn, biformer.FullAttention) and not attn.lepe_of_input
    )
    attn.qkv = FoldedLinear(attn.qkv, pack, norm if alone else None)
    return AttentionBranch(nn.Identity() if alone else norm, attn, pack, scale)


_ONE_READER = (
    biformer.BiLevelRoutingAttention,
    davit_fused.WindowAttention,
    davit_fused.ChannelAttention,
    stvit_swin.WindowAttention,
    ViTAttention,
)


_TRANSFORMERS = (stvit_swin.WindowAttention, stvit.TokenAttention, ViTAttention)


def _fold_norm(attn: Any, norm: nn.LayerNorm, pack: bool) -> None:
    attn.q, attn.kv = FoldedLinear(attn.q, pack, norm), FoldedLinear(attn.kv, pack, norm)


def _biformer_block(block: Any, pack: bool) -> Optional[nn.Module]:
    attn = block.attn
    projected = hasattr(attn, "qkv") and isinstance(attn.proj, nn.Linear)
    if not (block.pre_norm and projected and _is_plain(block.mlp)):
        return None
    position = [] if block.pos_embed is None else [_with_identity(block.pos_embed)]
    return nn.Sequential(
        *position,
        _attention(block, pack, _scale(block.ls1)),
        MlpBranch(block.norm2, block.mlp, pack, _scale(block.ls2)),
    )


def _davit_block(block: Any, pack: bool) -> Optional[nn.Module]:
    norms = [block.norm1] + ([] if block.mlp is None else [block.norm2])
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        return None
    layers = [_position(block.cpe1), _attention(block, pack), _position(block.cpe2)]
    return nn.Sequential(*layers, *([] if block.mlp is None else [MlpBranch(block.norm2, block.mlp, pack)]))


def _position(cpe: davit_fused.ConvPosEnc) -> nn.Module:
    return _with_identity(_channels_last(cpe.proj)) if isinstance(cpe.act, nn.Identity) else cpe


def _transformer_block(block: Any, pack: bool) -> Optional[nn.Module]:
    """timm's ViT block, Swin's, and that of semantic tokens."""
    norms = isinstance(block.norm1, nn.LayerNorm) and isinstance(block.norm2, nn.LayerNorm)
    if not (norms and _is_plain(block.mlp) and isinstance(block.attn, _TRANSFORMERS)):
        return None
    return nn.Sequential(
        _attention(block, pack, _scale(block.ls1)),
        MlpBranch(block.norm2, block.mlp, pack, _scale(block.ls2)),
    )


def _cross_layer(layer: Any, pack: bool) -> nn.Module:
    _fold_norm(layer.attn, layer.norm1, pack)
    branch = CrossBranch(nn.Identity(), layer.attn, pack, _scale(layer.ls1))
    return FusedCrossLayer(branch, MlpBranch(layer.norm2, layer.mlp, pack, _scale(layer.ls2)))


def _center_layer(layer: Any, pack: bool) -> nn.Module:
    _fold_norm(layer.attn, layer.norm1, pack)
    return nn.Sequential(
        CenterBranch(layer, pack), MlpBranch(layer.norm2, layer.mlp, pack, _scale(layer.ls2))
    )


def _sparse_block(block: Any, pack: bool) -> nn.Module:
    attn, width = block.attn, block.mlp.fc2.out_features
    scale = torch.full((width,), block.residual_scale, dtype=torch.float64)
    attn.qkv, attn.proj = FoldedLinear(attn.qkv, pack, block.norm1), FoldedLinear(attn.proj, pack)
    block.mlp = MlpBranch(block.norm2, block.mlp, pack, scale)
    block.norm1, block.norm2 = nn.Identity(), nn.Identity()
    block.__class__ = FusedPruningBlock if block.prunes else FusedSparseBlock
    return block


RULES: dict[type[nn.Module], Callable[[Any, bool], Optional[nn.Module]]] = {
    biformer.BiFormerBlock: _biformer_block,
    davit_fused.DaViTBlock: _davit_block,
    stripmlp.StripMLPBlock: FusedStripBlock,
    stvit.SelfLayer: _transformer_block,
    stvit.CrossLayer: _cross_layer,
    stvit.CenterLayer: _center_layer,
    sparsifiner.SparseBlock: _sparse_block,
    sparsifiner.PruningBlock: _sparse_block,
    ViTBlock: _transformer_block,
}
# These take the weights of their layers themselves.
_WEIGHT_READERS = (sparsifiner.ConnectivityPredictor, biformer.RegionRouter, nn.MultiheadAttention)


def _fold_batch_norm(layers: nn.Sequential) -> None:
    """BatchNorm goes into the convolution before it."""
    for first, second in itertools.pairwise(list(layers._modules)):
        conv, norm = layers._modules[first], layers._modules[second]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers._modules[first] = fuse_conv_bn_eval(conv, norm)
            layers._modules[second] = nn.Identity()


def _fuse(module: nn.Module, pack: bool) -> nn.Module:
    rule = RULES.get(type(module))
    fused = rule(module, pack) if rule is not None else None
    if fused is not None:
        return fused
    if type(module) is nn.Linear and pack:
        return FoldedLinear(module, pack)
    if isinstance(module, nn.Sequential):
        _fold_batch_norm(module)
    if not isinstance(module, _WEIGHT_READERS):
        for name, child in module.named_children():
            setattr(module, name, _fuse(child, pack))
    return module


def fuse_for_inference(
    model: nn.Module, dtype: Optional[torch.dtype] = None, pack: Optional[bool] = None
) -> nn.Module:
    """A copy of a model in inference form: the same function to rounding, faster, without gradients.

    Args:
        model: a model of this package, or anything made of one (a `features_only` backbone, a detector). Modules that
            no rule knows stay as they are, but for linear layers and for BatchNorm after convolutions.
        dtype: of the copy; default: as it is. Weights are folded in float64 before they are rounded.
        pack: lay weights out for the CPU kernels; default: where the model is on the CPU in float32, float64 or
            bfloat16. Without it the form consists of standard operators alone, for export and other devices.

    Returns:
        The copy, in evaluation mode. It holds folded weights only, so that it cannot be trained, and its state_dict is
        its own: load checkpoints before.

    Raises:
        ValueError: `pack=True` for a model that is elsewhere, or of another dtype.
    """
    weights = next(model.parameters(), None)
    device = torch.device("cpu") if weights is None else weights.device
    wanted = dtype or (torch.float32 if weights is None else weights.dtype)
    packable = device.type == "cpu" and wanted in DTYPES
    if pack and not packable:
        raise ValueError(
            f"pack=True needs a model on the CPU in float32, float64 or bfloat16, got {wanted} on {device}"
        )
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        model = model.to(dtype)
    with torch.no_grad():
        return _fuse(model, packable if pack is None else pack).eval()


def standard_form(model: nn.Module) -> nn.Module:
    """The inference form of standard operators alone, for export."""
    return fuse_for_inference(model, pack=False)
