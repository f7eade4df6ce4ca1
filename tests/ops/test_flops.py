"""Both counters know what the operators cost, and agree with the matrix products of the definition."""

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

from vitrail.ops import channel_attention, flops, region_route, routed_attention, use_ops


class Routed(torch.nn.Module):
    def forward(self, x):
        q, k, v = x.split([16, 16, 32], -1)
        size = [x.shape[1] // 4, x.shape[2] // 2]
        return routed_attention(q, k, v, region_route(q, k, 3, size), size, 2)


def fvcore_macs(module, *inputs):
    analysis = FlopCountAnalysis(module, inputs).set_op_handle(**flops.fvcore_handlers())
    return analysis.unsupported_ops_warnings(False).tracer_warnings("none").total()


def torch_macs(module, *inputs):
    with FlopCounterMode(display=False, custom_mapping=flops.torch_flop_formulas()) as counter:
        module(*inputs)
    return counter.get_total_flops() / 2


# 2 images of 8 x 12 tokens, 3 regions of 2 x 6 each: scores and values; 8 regions meet 8
EXPECTED = 2 * 8 * 12 * 3 * 12 * (16 + 32) + 2 * 8 * 8 * 16


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("count", [fvcore_macs, torch_macs])
def test_forward_costs_two_products_per_pair_of_tokens_that_meet(mode, count):
    with use_ops(mode):
        assert count(Routed(), torch.randn(2, 8, 12, 64)) == EXPECTED


def test_backward_is_counted_with_the_recomputed_scores():
    x = torch.randn(2, 8, 12, 64, requires_grad=True)
    pairs = 2 * 8 * 12 * 3 * 12
    assert torch_macs(lambda x: Routed()(x).sum().backward(), x) == EXPECTED + pairs * (3 * 16 + 2 * 32)


@pytest.mark.parametrize("count", [fvcore_macs, torch_macs])
def test_dense_attention_on_the_cpu_is_counted(count):
    class Dense(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    q, k, v = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    assert count(Dense(), q, k, v) == 2 * 3 * 10 * 20 * (8 + 8)


class Channels(torch.nn.Module):
    def forward(self, x):
        return channel_attention(*x.chunk(3, -1), 2)


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("count", [fvcore_macs, torch_macs])
def test_channel_attention_costs_two_products_per_token_and_pair_of_channels_of_a_head(mode, count):
    with use_ops(mode):
        assert count(Channels(), torch.randn(2, 8, 12, 48)) == 2 * 8 * 12 * 16 * (8 + 8)


def test_the_backward_of_channel_attention_is_counted_with_the_recomputed_scores():
    x = torch.randn(2, 8, 12, 48, requires_grad=True)
    assert torch_macs(lambda x: Channels()(x).sum().backward(), x) == 2 * 8 * 12 * 16 * 8 * (2 + 5)
