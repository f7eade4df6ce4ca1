"""FlexAttention, which is how stock PyTorch says sparse attention on a GPU: masks of blocks, compiled by Triton.

Where it runs without a GPU (in tests) it is not compiled, and computes all scores.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_BLOCK = 128  # tokens that the compiled kernel skips, or does not, at once


def attention() -> Callable[..., Tensor]:
    """`flex_attention`, compiled anew for every row: shapes are constants of the kernel."""
    if not torch.cuda.is_available():
        return flex_attention  # type: ignore[return-value]
    return torch.compile(flex_attention, dynamic=False)


class RegionMask:
    """Queries see the keys of the regions that their own region chose; tokens lie in the order of their regions."""

    def __init__(self, routes: Tensor, tokens: int) -> None:
        self._routes, self._tokens = routes, tokens
        batch, regions, _ = routes.shape
        # one table for all calls: a new one would be compiled anew
        table = self._table = torch.zeros(batch, regions, regions, dtype=torch.bool, device=routes.device)

        def visible(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return table[image, query // tokens, key // tokens]

        self._visible = visible

    def make(self) -> BlockMask:
        """The mask of blocks, which a new choice of regions needs anew."""
        self._table.zero_().scatter_(2, self._routes, True)
        batch, regions, topk = self._routes.shape
        length = regions * self._tokens
        if self._tokens % _BLOCK:
            on_gpu = self._routes.is_cuda
            device = self._routes.device
            return create_block_mask(
                self._visible, batch, None, length, length, device=device, _compile=on_gpu
            )
        # regions are blocks, all of whose pairs of tokens see each other: the routes are the mask
        counts = self._routes.new_full((batch, 1, regions), topk, dtype=torch.int32)
        indices = counts.new_zeros(batch, 1, regions, regions)
        indices[..., :topk] = self._routes.unsqueeze(1)
        none = torch.zeros_like(counts), torch.zeros_like(indices)
        return BlockMask.from_kv_blocks(
            *none,
            counts,
            indices,
            BLOCK_SIZE=self._tokens,
            mask_mod=self._visible,
            seq_lengths=(length, length),
        )


def label_mask(labels: Tensor) -> BlockMask:
    """Tokens of the same label see each other, in all images alike."""

    def visible(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return labels[query] == labels[key]

    return create_block_mask(visible, None, None, len(labels), len(labels), device=labels.device)


def add_bias(bias: Tensor) -> Callable[..., Tensor]:
    """Adds a window's bias, `(heads, N, N)`, to scores of tokens that lie window by window."""
    tokens = bias.shape[-1]

    def score(value: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return value + bias[head, query % tokens, key % tokens]

    return score


def hide(mask: Tensor) -> Callable[..., Tensor]:
    """Leaves the pairs of `(B, heads, queries, keys)`: no block of random keys is empty, so none can be skipped."""

    def score(value: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(mask[image, head, query, key], value, -torch.inf)

    return score
