"""Sparsifiner: a vision transformer that predicts for every query which keys are worth attending to.

Paper: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", Wei et al.,
CVPR 2023, arXiv 2303.13755. Published code (no trained weights): https://github.com/lim142857/Sparsifiner (MIT).

    image -> 16 x 16 patches, class token, position -> 12 blocks -> LayerNorm -> class token -> classifier

The trunk is DeiT's. Before every attention a connectivity predictor (section 3) approximates the row of attention of
each query and head as a mixture of a few learned basis rows, and the query then attends to the keys where that row is
largest, a quarter of them. The class token attends to all. Optionally tokens are pruned on the way: three layers keep
those that the class token attends to most, and from there on nothing is computed for the others.

Training has two phases. First the predictor learns to reconstruct the dense attention (`reconstruction_loss`), then the
network learns with its own sparse attention, whose choice of keys carries no gradient: the predictor rests.

The number of tokens is part of the predictor's weights, so a model takes one image size: that of `img_size`, or of
`set_input_size`. `sparsifiner_lvvit.py` holds the form with the trunk of LV-ViT.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil, log
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..ops import connectivity_attention, connectivity_topk
from ..ops.connectivity_attention import connectivity_logits
from .layers import check_img_size, check_patches
from .sparsifiner_weights import ADVICE, cfg, checkpoint_filter_fn
from .weights import build_model, resize_grid

for _function in (connectivity_attention, connectivity_topk):
    register_notrace_function(_function)  # they check their arguments, which torch.fx cannot follow

# --- which keys: the connectivity predictor ---------------------------------------------------------------------------


class ConnectivityPredictor(nn.Module):
    """Low-rank attention of the image tokens to all tokens, and from it the keys that each of them attends to.

    Queries and keys are projected to a part of the head's width, keys are compressed to `num_basis` along the tokens.
    The softmax of their products are the coefficients of `num_basis` rows of attention, the basis (W-up in the paper).
    `share_inout_proj` compresses with the basis. For the options of the choice see `Sparsifiner`.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_tokens: int,
        num_basis: int,
        reduce_c_factor: int = 2,
        share_inout_proj: bool = False,
        basis_threshold: float = 0.02,
        basis_coef_topk: int = 8,
        basis_coef_threshold: float = 0.0,
        attn_score_threshold: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = num_heads**-0.5  # by the number of heads: what the authors' code does
        self.num_keys = 0  # of each query; set by the network, which knows how many tokens there are
        self.basis_threshold = basis_threshold
        self.basis_coef_topk = basis_coef_topk
        self.basis_coef_threshold = basis_coef_threshold
        self.attn_score_threshold = attn_score_threshold
        reduced = head_dim // reduce_c_factor
        self.projects_tokens = (
            num_basis * (head_dim - reduced) > head_dim * reduced
        )  # before they are compressed
        self.q_down = nn.Linear(head_dim, reduced, **dd)
        self.k_down = nn.Linear(head_dim, reduced, **dd)
        self.token_down = nn.Parameter(torch.empty(num_tokens, num_basis, **dd))
        self.basis = None if share_inout_proj else nn.Parameter(torch.empty(num_tokens, num_basis, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation."""
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else trunc_normal_(parameter, std=0.02)

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the matrices that belong to the tokens, `(tokens, num_basis)`."""
        for name in ("token_down", "basis"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, nn.Parameter(change(old.detach()), requires_grad=old.requires_grad))

    def rows(self) -> Tensor:
        """The basis, `(num_basis, tokens)`."""
        return (self.token_down if self.basis is None else self.basis).t()

    def compress(self, k: Tensor, tokens: Optional[Tensor] = None) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """Compressed keys, offset and projection: the logits of the coefficients are the products of queries, after the
        projection where there is one, with the compressed keys, plus the offset; see `connectivity_attention`.

        All projections are linear. Where there are few basis rows, they act on the few compressed keys, and tokens stay
        as they are; where there are many, tokens are projected first.

        Args:
            k: `(B, tokens, C)` with the class token in front, heads interleaved.
            tokens: `(B, tokens)` which tokens of the image these are, where some were pruned.
        """
        down = self.token_down.expand(k.shape[0], -1, -1) if tokens is None else self.token_down[tokens]
        heads = [self.num_heads, self.k_down.in_features]
        if self.projects_tokens:
            k = F.linear(k.unflatten(2, heads), self.k_down.weight).flatten(2)
            keys = (down.transpose(1, 2) @ k).unflatten(2, [self.num_heads, self.k_down.out_features])
        else:
            keys = F.linear((down.transpose(1, 2) @ k).unflatten(2, heads), self.k_down.weight)
        keys = (keys + down.sum(1)[:, :, None, None] * self.k_down.bias) * self.scale
        offset = (keys * self.q_down.bias).sum(-1)
        if self.projects_tokens:
            return keys.flatten(2), offset, self.q_down.weight
        return (keys @ self.q_down.weight).flatten(2), offset, None

    def logits(self, q: Tensor, k: Tensor, tokens: Optional[Tensor] = None) -> Tensor:
        """Logits of the coefficients, `(B, heads, queries, num_basis)`, for queries and keys as in `forward`."""
        compressed, offset, projection = self.compress(k, tokens)
        return connectivity_logits(q, compressed, offset, projection, self.num_heads)

    def forward(self, q: Tensor, k: Tensor, tokens: Optional[Tensor] = None) -> Tensor:
        """The keys of every query, `(B, heads, queries, slots)`, -1 for an empty slot.

        The network itself chooses and attends in one step, see `attend`; this is to look at the choice.

        Args:
            q: `(B, queries, C)` image tokens, heads interleaved.
            k: `(B, tokens, C)` with the class token in front.
            tokens: `(B, tokens)` which tokens of the image these are, where some were pruned.
        """
        return connectivity_topk(
            self.logits(q.detach(), k.detach(), tokens),
            self.rows(),
            num_keys=self.num_keys,
            num_coefficients=self.basis_coef_topk,
            basis_threshold=self.basis_threshold,
            coefficient_threshold=self.basis_coef_threshold,
            score_threshold=self.attn_score_threshold,
            candidates=tokens,
        )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, num_pruned: int, tokens: Optional[Tensor] = None
    ) -> Tensor:
        """Attention of the image tokens to the keys that they choose, and of the class token to all; `(B, tokens, C)`.

        Args:
            q, k, v: `(B, tokens, C)`, the class token first, heads interleaved.
            scale: of the scores.
            num_pruned: pruned tokens count in the class token's row with keys and values of zero, as in the authors'
                code: each adds exp(0) to the sum.
            tokens: see `compress`.
        """
        compressed, offset, projection = self.compress(k.detach(), tokens)
        return connectivity_attention(
            q,
            k,
            v,
            compressed,
            offset,
            self.rows(),
            self.num_heads,
            num_keys=self.num_keys,
            num_coefficients=self.basis_coef_topk,
            basis_threshold=self.basis_threshold,
            coefficient_threshold=self.basis_coef_threshold,
            score_threshold=self.attn_score_threshold,
            candidates=tokens,
            num_dense=1,
            num_pruned=num_pruned,
            scale=scale,
            projection=projection,
        )


# --- attention to these keys ------------------------------------------------------------------------------------------


def _split(x: Tensor, num_heads: int) -> Tensor:
    """`(B, tokens, heads * d)` to `(B, heads, tokens, d)`."""
    return x.unflatten(2, [num_heads, x.shape[2] // num_heads]).transpose(1, 2)


class SparseAttention(nn.Module):
    """Attention of image tokens to the predicted keys, and of the class token to all; `(B, tokens, C)` to the same."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        predictor: ConnectivityPredictor,
        qkv_bias: bool = True,
        qk_scale: Optional[float] = None,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.num_pruned = 0  # tokens, before this layer; set by the network
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.predictor = predictor
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def class_attention(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention of the class token, `(B, heads, 1, tokens)`, by which tokens are pruned.

        Tokens pruned before count with keys of zero.
        """
        scores = _split(q[:, :1] * self.scale, self.num_heads) @ _split(k, self.num_heads).transpose(-2, -1)
        if self.num_pruned == 0:
            return scores.softmax(-1)
        return F.pad(scores, (0, 1), value=log(self.num_pruned)).softmax(-1)[..., :-1]

    def attend(self, x: Tensor, tokens: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """The result, and the attention of the class token."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        y = self.predictor.attend(q, k, v, self.scale, self.num_pruned, tokens)
        return self.proj_drop(self.proj(y)), self.class_attention(q, k)

    def forward(self, x: Tensor, tokens: Optional[Tensor] = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj_drop(self.proj(self.predictor.attend(q, k, v, self.scale, self.num_pruned, tokens)))

    def reconstruct(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Dense attention: its result, the predictor's approximation of it, and itself (the image tokens' rows).

        Only the approximation carries a gradient, and only to the predictor.
        """
        with torch.no_grad():
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            queries, keys, values = (_split(y, self.num_heads) for y in (q * self.scale, k, v))
            attention = (queries @ keys.transpose(-2, -1)).softmax(-1)
            x = self.proj_drop(self.proj((attention @ values).transpose(1, 2).flatten(2)))
        # here all coefficients count, and the basis with its signs
        approximation = self.predictor.logits(q[:, 1:], k).softmax(-1) @ self.predictor.rows()
        return x, approximation, attention[:, :, 1:]


# --- block, network ---------------------------------------------------------------------------------------------------


class SparseBlock(nn.Module):
    """Attention and MLP, each after a LayerNorm and with a residual (times `residual_scale`, in LV-ViT)."""

    __constants__ = ("prunes",)
    prunes = False

    def __init__(
        self,
        dim: int,
        attn: SparseAttention,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        residual_scale: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.residual_scale = residual_scale
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def add_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """The first residual."""
        return torch.add(x, self.drop_path1(y), alpha=self.residual_scale)

    def add_mlp(self, x: Tensor) -> Tensor:
        """The second."""
        return torch.add(x, self.drop_path2(self.mlp(self.norm2(x))), alpha=self.residual_scale)

    def forward(self, x: Tensor, tokens: Optional[Tensor] = None) -> Tensor:
        return self.add_mlp(self.add_attention(x, self.attn(self.norm1(x), tokens)))

    def reconstruct(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """The block with dense attention; see `SparseAttention.reconstruct`."""
        with torch.no_grad():
            y = self.norm1(x)
        y, approximation, attention = self.attn.reconstruct(y)
        with torch.no_grad():
            return self.add_mlp(self.add_attention(x, y)), approximation, attention


class PruningBlock(SparseBlock):
    """A block after whose attention only those tokens go on that the class token attends to most, mean over heads."""

    prunes = True
    num_kept = 0  # image tokens; set by the network

    def forward(  # type: ignore[override]
        self, x: Tensor, tokens: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        y, attention = self.attn.attend(self.norm1(x), tokens)
        kept = attention[:, :, 0, 1:].mean(1).topk(self.num_kept, sorted=False).indices.sort().values
        kept = F.pad(kept + 1, (1, 0))  # and the class token
        tokens = kept if tokens is None else tokens.gather(1, kept)
        x = self.add_attention(x, y).gather(1, kept.unsqueeze(2).expand(-1, -1, x.shape[2]))
        return self.add_mlp(x), tokens


class Sparsifiner(VisionTransformer):
    """Sparsifiner on DeiT's trunk, for images of one size.

    Args:
        img_size: pixels, or (height, width); multiples of the patch.
        patch_size: pixels of a patch.
        in_chans: channels of the image.
        num_classes: size of the output; 0 for pooled features.
        global_pool: `token`, `avg`, `max`, `avgmax`, ..., or empty for the tokens themselves.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: of the trunk.
        qk_scale: factor of the attention scores; default: head width ** -0.5.
        attn_keep_rate: share of all tokens that a query attends to (after pruning: at most as many as image tokens are
            left); one number, or one for each block.
        token_pruning_loc: blocks (from 0) after whose attention tokens are pruned.
        token_keep_rate: base r of the shares that remain: r, r ** 2, r ** 3 in the second, third and last quarter of
            the blocks; or one share for each block.
        reduce_n_factor: tokens per basis row.
        reduce_c_factor: head width over the predictor's width.
        num_basis: number of basis rows; default: tokens // reduce_n_factor.
        share_inout_proj: the predictor compresses keys with its basis.
        basis_threshold: entries of the basis with an absolute value up to this are zero.
        basis_coef_topk: how many coefficients a query keeps; 0: those above `basis_coef_threshold`.
        basis_coef_threshold: see `basis_coef_topk`.
        attn_score_threshold: instead of a share of the tokens, a query attends to all whose approximate attention is
            above this.
        norm_eps: of the LayerNorms.
        residual_scale: factor of the blocks' branches.
        drop_rate: dropout before the classifier.
        pos_drop_rate, proj_drop_rate: dropout after the position embedding, and in attention and MLP.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        embed_layer: builds the patch embedding, with the arguments of `timm.layers.PatchEmbed`.
    """

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Any = "token",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: Optional[float] = None,
        attn_keep_rate: Union[float, Sequence[float]] = 0.25,
        token_pruning_loc: Sequence[int] = (),
        token_keep_rate: Union[float, Sequence[float]] = 1.0,
        reduce_n_factor: int = 6,
        reduce_c_factor: int = 2,
        num_basis: Optional[int] = None,
        share_inout_proj: bool = False,
        basis_threshold: float = 0.02,
        basis_coef_topk: int = 8,
        basis_coef_threshold: float = 0.0,
        attn_score_threshold: float = 0.0,
        norm_eps: float = 1e-6,
        residual_scale: float = 1.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        embed_layer: Callable[..., nn.Module] = PatchEmbed,
        device: Any = None,
        dtype: Any = None,
    ):
        dd = {"device": device, "dtype": dtype}
        check_patches(img_size, patch_size)
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        if not 1 <= reduce_c_factor <= embed_dim // num_heads:
            raise ValueError(
                f"reduce_c_factor must lie between 1 and the head width {embed_dim // num_heads}, got {reduce_c_factor}"
            )
        if basis_coef_topk and basis_coef_threshold > 0:
            raise ValueError(
                "coefficients are kept by number or by threshold: "
                f"with basis_coef_threshold {basis_coef_threshold} set basis_coef_topk=0, got {basis_coef_topk}"
            )
        pruning = sorted(set(token_pruning_loc))
        if pruning and not 0 <= pruning[0] <= pruning[-1] < depth:
            raise ValueError(
                f"token_pruning_loc must name blocks, 0 to {depth - 1}, got {tuple(token_pruning_loc)}"
            )
        super().__init__(
            img_size, patch_size, in_chans, num_classes, global_pool, embed_dim, depth=0, num_heads=num_heads,
            drop_rate=drop_rate, pos_drop_rate=pos_drop_rate, norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            embed_layer=embed_layer, weight_init="skip", **dd,
        )  # fmt: skip
        self.attn_keep_rates = _shares("attn_keep_rate", attn_keep_rate, [1] * depth)
        self.token_keep_rates = _shares(
            "token_keep_rate", token_keep_rate, [4 * i // depth for i in range(depth)]
        )
        num_tokens = self.patch_embed.num_patches + 1
        self.free_num_basis = num_basis is None  # a checkpoint may bring another number
        self.num_basis = num_tokens // reduce_n_factor if num_basis is None else num_basis
        if self.num_basis < 1:
            raise ValueError(f"the {num_tokens} tokens need at least one basis row, got {self.num_basis}")

        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = []
        for i in range(depth):
            predictor = ConnectivityPredictor(
                embed_dim // num_heads, num_heads, num_tokens, self.num_basis, reduce_c_factor, share_inout_proj,
                basis_threshold, basis_coef_topk, basis_coef_threshold, attn_score_threshold, **dd,
            )  # fmt: skip
            attn = SparseAttention(embed_dim, num_heads, predictor, qkv_bias, qk_scale, proj_drop_rate, **dd)
            block_fn = PruningBlock if i in pruning else SparseBlock
            drop_rates = (proj_drop_rate, drop_path_rates[i])
            blocks.append(block_fn(embed_dim, attn, mlp_ratio, norm_eps, *drop_rates, residual_scale, **dd))
        self.blocks: Any = nn.ModuleList(blocks)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self._plan()
        self.init_weights(needs_reset=False)

    def _plan(self) -> None:
        """Numbers of keys and tokens, which follow from the image's size."""
        alive = image_tokens = self.patch_embed.num_patches
        limit = image_tokens + 1
        for i, block in enumerate(self.blocks):
            predictor = block.attn.predictor
            wanted = ceil(self.attn_keep_rates[i] * (image_tokens + 1))
            predictor.num_keys = min(wanted, limit) if predictor.attn_score_threshold == 0 else 0
            block.attn.num_pruned = image_tokens - alive
            if block.prunes:
                # after pruning the authors' limit leaves out the class token, though it remains a candidate
                limit = alive = block.num_kept = min(ceil(self.token_keep_rates[i] * image_tokens), alive)

    def set_input_size(
        self, img_size: Optional[Tuple[int, int]] = None, patch_size: Optional[Tuple[int, int]] = None
    ) -> None:
        """Take images of another size: resamples the position embedding and the predictors' matrices."""
        check_patches(img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size)
        old = self.patch_embed.grid_size
        super().set_input_size(img_size, patch_size)
        if self.patch_embed.grid_size != old:
            for block in self.blocks:
                block.attn.predictor.replace(lambda x: resize_grid(x, old, self.patch_embed.grid_size))
            self._plan()
            update_model_args(self, num_basis=self.num_basis)

    def set_num_basis(self, num_basis: int) -> None:
        """Make room for another number of basis rows, as a checkpoint of another image size has it."""
        if num_basis != self.num_basis:
            warnings.warn(f"from now on {num_basis} basis rows, not {self.num_basis}", stacklevel=3)
            self.num_basis = num_basis
            for block in self.blocks:
                block.attn.predictor.replace(lambda x: x.new_empty(x.shape[0], num_basis))
            update_model_args(self, num_basis=num_basis)

    def _embed(self, x: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to the tokens that enter the first block."""
        height, width = self.patch_embed.img_size
        check_img_size(x, self.in_chans, height, width)
        return self._pos_embed(self.patch_embed(x))

    def _restore(self, x: Tensor, tokens: Optional[Tensor]) -> Tensor:
        """All tokens of the image, zeros where they were pruned."""
        if tokens is None:
            return x
        zeros = x.new_zeros(x.shape[0], self.patch_embed.num_patches + 1, x.shape[2])
        return zeros.scatter(1, tokens.unsqueeze(2).expand(-1, -1, x.shape[2]), x)

    def _run(self, x: Tensor, count: int, wanted: List[int]) -> Tuple[Tensor, List[Tensor]]:
        """Tokens after the first `count` blocks, and after those that are `wanted`."""
        tokens: Optional[Tensor] = None
        found: List[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i < count:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    out = checkpoint(block, x, tokens)
                    x, tokens = out if block.prunes else (out, tokens)
                elif block.prunes:
                    x, tokens = block(x, tokens)
                else:
                    x = block(x, tokens)
                if i in wanted:
                    found.append(self._restore(x, tokens))
        return self._restore(x, tokens), found

    def forward_intermediates(  # type: ignore[override]
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        attn_mask: Optional[Tensor] = None,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Image tokens after the blocks, with zeros where they were pruned.

        Args:
            x: images `(B, C, H, W)`.
            indices: which blocks: the last n if an integer, all if None.
            return_prefix_tokens: give pairs, with the class token.
            norm: apply the final norm.
            stop_early: skip the blocks after the last one wanted.
            output_fmt: `NCHW` for maps, `NLC` for lists of tokens.
            intermediates_only: leave the final features out.
            attn_mask: must be None, as the network chooses its own.
        """
        assert attn_mask is None, "attn_mask must be None"
        assert output_fmt in ("NCHW", "NLC"), "output_fmt must be NCHW or NLC"
        wanted, last = feature_take_indices(len(self.blocks), indices)
        x, found = self._run(self._embed(x), last + 1 if stop_early else len(self.blocks), wanted)
        if norm:
            found = [self.norm(y) for y in found]
        maps = [y[:, 1:] for y in found]
        if output_fmt == "NCHW":
            height, width = self.patch_embed.grid_size
            maps = [y.transpose(1, 2).unflatten(2, [height, width]).contiguous() for y in maps]
        if not torch.jit.is_scripting() and return_prefix_tokens:
            maps = [(y, z[:, :1]) for y, z in zip(maps, found, strict=True)]  # type: ignore[misc]
        if intermediates_only:
            return maps
        return self.norm(x), maps

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images `(B, C, H, W)` to normalised tokens `(B, N, C)`, the class token first."""
        return self.norm(self._run(self._embed(x), len(self.blocks), [])[0])

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images `(B, C, H, W)` to logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def reconstruct_attention(self, x: Tensor) -> List[Tuple[Tensor, Tensor]]:
        """For every block the predictor's approximation of its attention, and the attention itself.

        The network runs densely and without gradient, so it is its own teacher, as the authors' is (DeiT, whose weights
        both start from). Nothing is pruned. Both are `(B, heads, N - 1, N)`: the class token has no row to predict.
        """
        with torch.no_grad():
            x = self._embed(x)
        pairs = []
        for block in self.blocks:
            x, approximation, attention = block.reconstruct(x)
            pairs.append((approximation, attention))
        return pairs

    @torch.jit.ignore
    def reconstruction_loss(self, x: Tensor) -> Tensor:
        """The first phase's loss: squared errors of the approximate attention, summed, mean over the blocks."""
        pairs = self.reconstruct_attention(x)
        losses = [F.mse_loss(approximation, attention, reduction="sum") for approximation, attention in pairs]
        return torch.stack(losses).mean()


def _shares(name: str, value: Union[float, Sequence[float]], powers: Sequence[int]) -> List[float]:
    """A share for each block; one number is raised to their powers."""
    shares = [value**power for power in powers] if isinstance(value, float | int) else list(value)
    if len(shares) != len(powers):
        raise ValueError(f"{name} must have one share per block ({len(powers)}), got {len(shares)}")
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"{name} must lie above 0 and up to 1, got {value}")
    return shares


# --- variants ---------------------------------------------------------------------------------------------------------


def _create_sparsifiner(variant: str, pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    return build_model(
        Sparsifiner,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        advice=ADVICE.format(tag="sparsifiner_small.deit_in1k_init"),
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **kwargs,
    )


def _deit(size: str) -> Dict[str, Any]:
    """Weights of the trunk alone."""
    return cfg(hf_hub_id=f"timm/deit_{size}_patch16_224.fb_in1k", license="apache-2.0")


# the star makes a tag without weights the default: pretrained=True must not pass off DeiT for Sparsifiner
default_cfgs = generate_default_cfgs(
    {
        "sparsifiner_tiny.deit_in1k_init": _deit("tiny"),
        "sparsifiner_tiny.*": cfg(),
        "sparsifiner_small.deit_in1k_init": _deit("small"),
        "sparsifiner_small.*": cfg(),
        "sparsifiner_base.deit_in1k_init": _deit("base"),
        "sparsifiner_base.*": cfg(),
        "sparsifiner_pico": cfg(input_size=(3, 32, 32), crop_pct=1.0),
    }
)


@register_model
def sparsifiner_tiny(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    """Sparsifiner-T, on DeiT-T: 5.9 M parameters."""
    model_args = {"embed_dim": 192, "num_heads": 3}
    return _create_sparsifiner("sparsifiner_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def sparsifiner_small(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    """Sparsifiner-S, on DeiT-S: 22.3 M parameters."""
    model_args = {"embed_dim": 384, "num_heads": 6}
    return _create_sparsifiner("sparsifiner_small", pretrained, **dict(model_args, **kwargs))


@register_model
def sparsifiner_base(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    """Sparsifiner-B, on DeiT-B: 86.8 M parameters."""
    model_args = {"embed_dim": 768, "num_heads": 12}
    return _create_sparsifiner("sparsifiner_base", pretrained, **dict(model_args, **kwargs))


@register_model
def sparsifiner_pico(pretrained: bool = False, **kwargs: Any) -> Sparsifiner:
    """A small one for small images, 32 x 32: below 1 M parameters, learns on a CPU."""
    model_args = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 4,
        "reduce_n_factor": 2,
    }
    return _create_sparsifiner("sparsifiner_pico", pretrained, **dict(model_args, **kwargs))
