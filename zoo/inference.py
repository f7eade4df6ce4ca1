"""The inference form of a model: the same function, with all that does not depend on the image worked out beforehand.

`fuse_for_inference` folds what is linear (BatchNorm into convolutions, norms' and layers' scales into the layers beside
them, the identity of a residual into a depthwise convolution), and takes the branches of a block as one: on the CPU
`packed_linear` and its like carry rows of tokens through norm, product, activation and residual while they are in
cache; on a GPU products are those of its libraries, and operators of this package do what surrounds them; elsewhere,
and in exported files, standard operators compute the same.
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

from ..ops import depthwise_conv, strip_mix
from . import biformer, davit_fused, sparsifiner, stripmlp, stvit, stvit_swin
from .folded import FoldedConv, FoldedLinear, MlpBranch, PackedConv, Placed, ResponseMlp, taps_of

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


class BlendedConv(Placed):
    """`stripmlp.LocalStripMixing` as one convolution: its convolutions and the identity, blended for each image.

    The blend depends on the means of what they give. The mean of a convolution is that of its taps, each times the sum
    of those numbers of the map that it meets.
    """

    taps: Tensor
    rows: Tensor
    columns: Tensor
    wide = ("taps",)

    def __init__(self, local: stripmlp.LocalStripMixing, size: tuple[int, int]):
        super().__init__(pack=True)
        dtype = local.row_conv.weight.dtype
        side = max(local.row_conv.kernel_size)
        taps = [_centred(taps_of(local.col_conv), side), _centred(taps_of(local.row_conv), side)]
        identity = _centred(torch.ones_like(taps[0][:1, :1]), side)
        self.register_buffer("taps", torch.stack([*taps, identity]))
        for name, length in zip(("rows", "columns"), size, strict=True):
            self.register_buffer(name, _meets(side, length).to(identity.device, dtype))
        self.reweight = local.reweight
        self.place()

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        sums = self.columns @ (self.rows @ x.view(b, h, w * c)).view(b, -1, w, c)
        pooled = (sums * self.taps.sum(0)).sum((1, 2)) / (h * w)
        blend = self.reweight(pooled.to(x.dtype)).to(self.taps.dtype).view(b, 1, 1, c, 3).softmax(-1)
        kernel = self.taps[0] * blend[..., 0]
        for i in (1, 2):
            kernel.addcmul_(self.taps[i], blend[..., i])
        return depthwise_conv(x, kernel)


def _centred(taps: Tensor, side: int) -> Tensor:
    """A kernel in the middle of a square one."""
    above, left = (side - taps.shape[0]) // 2, (side - taps.shape[1]) // 2
    return F.pad(taps, (0, 0, left, left, above, above))


def _meets(taps: int, length: int) -> Tensor:
    """Which of the numbers of a line each tap meets, as it moves along, `(taps, length)`."""
    at = torch.arange(length) - torch.arange(taps)[:, None] + taps // 2
    return (at >= 0) & (at < length)


class FusedStripBlock(nn.Module):
    """`stripmlp.StripMLPBlock`."""

    def __init__(self, block: Any, pack: bool):
        super().__init__()
        tokens, channels = block.token_mixing, block.channel_mixing
        self.dwconv = FoldedConv(tokens.dwconv, pack, *_affine(tokens.norm1), "gelu")
        # the halves apart, so that each is a map of its own
        half, affine = tokens.proj.out_features // 2, _affine(tokens.norm2)
        self.far = FoldedLinear(tokens.proj, pack, None, *affine, "gelu", slice(half))
        self.near = FoldedLinear(tokens.proj, pack, None, *affine, "gelu", slice(half, None))
        strips = tokens.strips
        self.row_mix, self.col_mix = strips.row_mix, strips.col_mix
        # mixing is linear: what it makes of the positions is a shift of the layer that follows
        of_rows, _ = _split_columns(strips.row_fuse)
        scale, shift = _affine(strips.norm)
        shift = shift + scale * (_mixed_positions(strips.row_pos, strips.row_mix) @ of_rows.t())
        self.row_fuse = FoldedLinear(strips.row_fuse, pack, None, scale, shift, "gelu")
        # and so are the two layers that follow the columns
        of_strips, of_local = _split_columns(tokens.fuse)
        of_far, of_cols = (of_strips @ weight for weight in _split_columns(strips.col_fuse))
        shift = _mixed_positions(strips.col_pos, strips.col_mix) @ of_cols.t()
        joined = nn.Linear(3 * half, 2 * half, bias=False, device="meta")
        joined.weight = nn.Parameter(torch.cat([of_far, of_cols, of_local], 1), requires_grad=False)
        self.local = BlendedConv(tokens.local, strips.row_pos.size) if pack else tokens.local
        self.fuse = FoldedLinear(joined, pack, shift=shift, dtype=tokens.fuse.weight.dtype)
        self.channel_dwconv = FoldedConv(channels.dwconv, pack)
        self.channel_mlp = ResponseMlp(channels.norm, channels.mlp, pack)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x)
        far, near = self.far(y), self.near(y)
        rows = self.row_fuse(self.row_mix(far), x2=far)
        x = self.fuse(far, x, self.col_mix(rows), self.local(near))
        return self.channel_mlp(self.channel_dwconv(x), x)


class FusedSparseBlock(sparsifiner.SparseBlock):
    """`sparsifiner.SparseBlock` whose last layers of attention and MLP add their residuals."""

    proj: FoldedLinear

    def add_attention(self, x: Tensor, y: Tensor) -> Tensor:
        return self.proj(y, x)

    def add_mlp(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class FusedPruningBlock(FusedSparseBlock, sparsifiner.PruningBlock):
    """The same of `sparsifiner.PruningBlock`."""


class FoldedPredictor(sparsifiner.ConnectivityPredictor):
    """`sparsifiner.ConnectivityPredictor` with the projections of keys and queries, and both biases, in one matrix."""

    matrix: Tensor
    constant: Tensor

    def fold(self) -> None:
        """The matrix, `(head_dim, head_dim + 1)`, whose last column gives the offset, and what one token adds."""
        (key, key_bias), (query, query_bias) = (
            (down.weight.detach().double(), down.bias.detach().double())
            for down in (self.k_down, self.q_down)
        )
        both = torch.cat([query, query_bias[:, None]], 1) * self.scale
        self.register_buffer("matrix", (key.t() @ both).to(self.token_down.dtype))
        self.register_buffer("constant", (key_bias @ both).to(self.token_down.dtype))

    def compress(self, k: Tensor, tokens: Optional[Tensor] = None) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        if self.projects_tokens:
            return super().compress(k, tokens)
        down = self.token_down if tokens is None else self.token_down[tokens]
        shift = down.sum(-2)[..., None, None] * self.constant
        keys = down.expand(k.shape[0], -1, -1).transpose(1, 2) @ k
        keys = keys.unflatten(2, [self.num_heads, self.k_down.in_features]) @ self.matrix + shift
        return keys[..., :-1].flatten(2), keys[..., -1], None


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


def _split_columns(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """The weights of a layer for the halves of its input."""
    first, second = linear.weight.detach().double().chunk(2, dim=1)
    return first, second


def _mixed_positions(position: stripmlp.RelativePosition, layer: stripmlp.StripLayer) -> Tensor:
    """What a strip layer, but for its bias, makes of a position table, `(H, W, C)`."""
    table = F.embedding(position.index, position.table.detach().double())
    return strip_mix(table.unsqueeze(0), layer.weight.detach().double(), None, layer.axis).squeeze(0)


def _with_identity(conv: Any) -> Any:
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
    position = [] if block.pos_embed is None else [FoldedConv(_with_identity(block.pos_embed), pack)]
    if attn.lepe is not None:
        attn.lepe = FoldedConv(attn.lepe, pack)
    return nn.Sequential(
        *position,
        _attention(block, pack, _scale(block.ls1)),
        MlpBranch(block.norm2, block.mlp, pack, _scale(block.ls2)),
    )


def _davit_block(block: Any, pack: bool) -> Optional[nn.Module]:
    norms = [block.norm1] + ([] if block.mlp is None else [block.norm2])
    if not all(isinstance(norm, nn.LayerNorm) for norm in norms):
        return None
    layers = [_position(block.cpe1, pack), _attention(block, pack), _position(block.cpe2, pack)]
    return nn.Sequential(*layers, *([] if block.mlp is None else [MlpBranch(block.norm2, block.mlp, pack)]))


def _position(cpe: davit_fused.ConvPosEnc, pack: bool) -> nn.Module:
    return FoldedConv(_with_identity(cpe.proj), pack) if isinstance(cpe.act, nn.Identity) else cpe


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
    scale = attn.qkv.weight.new_full((width,), block.residual_scale, dtype=torch.float64)
    attn.qkv, block.proj = (
        FoldedLinear(attn.qkv, pack, block.norm1),
        FoldedLinear(attn.proj, pack, scale=scale),
    )
    block.mlp = MlpBranch(block.norm2, block.mlp, pack, scale)
    attn.proj, block.norm1, block.norm2 = nn.Identity(), nn.Identity(), nn.Identity()
    attn.predictor.__class__ = FoldedPredictor
    attn.predictor.fold()
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
    if type(module) is nn.Conv2d and pack:
        if PackedConv.pays(module):
            return PackedConv(module)
        # stock convolutions of channels-last maps want weights that are channels-last, too
        weight = module.weight.detach().to(memory_format=torch.channels_last)
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module
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
            no rule knows stay as they are, but for linear layers, convolutions, and BatchNorm after those.
        dtype: of the copy; default: as it is. Weights are folded in float64 before they are rounded.
        pack: use the operators of this package, with weights laid out for the device; default: where the model is on
            the CPU or on a GPU. Without it the form consists of standard operators alone, for export and other devices.

    Returns:
        The copy, in evaluation mode. It holds folded weights only, so that it cannot be trained, and its state_dict is
        its own: load checkpoints before. It may be moved and converted like any module, and lays its weights out anew.

    Raises:
        ValueError: `pack=True` for a model that is elsewhere.
    """
    weights = next(model.parameters(), None)
    device = torch.device("cpu") if weights is None else weights.device
    has_kernels = device.type in ("cpu", "cuda")
    if pack and not has_kernels:
        raise ValueError(f"pack=True needs a model on the CPU or on a GPU, got one on {device}")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        model = model.to(dtype)
    with torch.no_grad():
        return _fuse(model, has_kernels if pack is None else pack).eval()


def standard_form(model: nn.Module) -> nn.Module:
    """The inference form of standard operators alone, for export."""
    return fuse_for_inference(model, pack=False)
