"""packed_conv: against stock convolutions in float64, and its place in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.ops import pack_kernel, packed_conv, use_ops

from ..threads import torch_threads, with_threads
from .counting import macs_by_both
from .place import check_compiled_and_scripted, check_vmap
from .refusals import check_kernel_refuses

DTYPES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_mode = pytest.mark.parametrize("mode", ["auto", "reference"])


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def example(
    shape=(2, 5, 6, 7), columns=33, kernel=(3, 2), stride=(2, 1), padding=(1, 0), dtype=torch.float64,
    bias=True, seed=0,
):  # fmt: skip
    """Arguments of packed_conv, but for a weight that is not packed."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size, of=dtype):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(of)

    return {
        "x": draw(*shape),
        "weight": draw(columns, shape[3], *kernel) / (shape[3] * kernel[0] * kernel[1]) ** 0.5,
        "bias": draw(columns, of=wide(dtype)) if bias else None,
        "columns": columns,
        "kernel": list(kernel),
        "stride": list(stride),
        "padding": list(padding),
    }


def call(args):
    return packed_conv(**args | {"weight": pack_kernel(args["weight"])})


def stock(args):
    """The same from stock layers, in float64."""
    bias = None if args["bias"] is None else args["bias"].double()
    x = args["x"].double().permute(0, 3, 1, 2)
    return F.conv2d(x, args["weight"].double(), bias, args["stride"], args["padding"]).permute(0, 2, 3, 1)


def error(got, want):
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


# --- values -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    images=st.integers(1, 3),
    size=st.tuples(*[st.integers(1, 40)] * 2),
    channels=st.sampled_from([1, 3, 4, 8, 17, 32, 40]),
    columns=st.sampled_from([1, 16, 31, 32, 33, 64, 100]),
    kernel=st.tuples(*[st.integers(1, 7)] * 2),
    stride=st.tuples(*[st.integers(1, 9)] * 2),
    padding=st.tuples(*[st.integers(0, 8)] * 2),
    dtype=st.sampled_from(list(DTYPES)),
    bias=st.booleans(),
    mode=st.sampled_from(["auto", "reference"]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_any_window_is_that_of_stock_layers(
    images, size, channels, columns, kernel, stride, padding, dtype, bias, mode, threads
):
    kernel = [min(taps, n) for taps, n in zip(kernel, size, strict=True)]
    padding = [min(zeros, taps - 1) for zeros, taps in zip(padding, kernel, strict=True)]
    args = example((images, *size, channels), columns, kernel, stride, padding, dtype, bias)
    with torch_threads(threads), use_ops(mode):
        got = call(args)
    want = stock(args)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert got.is_contiguous() or mode == "reference"
    assert error(got, want) <= DTYPES[dtype]


@each_mode
def test_maps_may_be_parts_of_wider_ones(mode):
    args = example((2, 8, 9, 16), padding=(2, 1), dtype=torch.float32)
    wider = torch.full((2, 10, 12, 40), torch.nan)
    part = wider[:, 1:9, 2:11, 8:24]
    part.copy_(args["x"])
    with use_ops(mode):
        assert torch.equal(call(args | {"x": part}), call(args))


@each_dtype
def test_results_do_not_depend_on_the_number_of_threads_or_on_other_images(dtype):
    args = example((4, 40, 33, 24), 70, (3, 3), (2, 2), (1, 1), dtype)
    with_threads(lambda: (call(args),))
    assert torch.equal(call(args | {"x": args["x"][1:2]}), call(args)[1:2])


@each_mode
def test_no_images_give_no_images(mode):
    with use_ops(mode):
        assert call(example((0, 5, 6, 7), dtype=torch.float32)).shape == (0, 3, 5, 33)


def test_what_is_not_finite_stays_within_reach():
    """Zeros past the map are not multiplied with what lies there in memory."""
    maps = torch.full((1, 3, 9, 4), torch.inf)
    maps[:, 1] = 1
    args = example((1, 1, 9, 4), 5, (3, 3), (1, 1), (1, 1), torch.float32)
    got = call(args | {"x": maps[:, 1:2]})
    torch.testing.assert_close(got, stock(args | {"x": torch.ones(1, 1, 9, 4)}).float())


# --- its place in PyTorch ---------------------------------------------------------------------------------------------


def operands(dtype=torch.float64):
    args = example((2, 4, 3, 5), dtype=dtype)
    return list((args | {"weight": pack_kernel(args["weight"])}).values())


@each_dtype
def test_registrations_pass_opcheck(dtype):
    args = [x.requires_grad_() if torch.is_tensor(x) else x for x in operands(dtype)]
    torch.library.opcheck(torch.ops.vitrail.packed_conv.default, args)


def test_gradients_are_those_of_the_definition():
    x, weight, bias, *rest = operands()

    def run(*tensors):
        return torch.ops.vitrail.packed_conv(*tensors, *rest)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, weight, bias)])


def test_vmap_gives_each_entry_its_own_result():
    check_vmap(torch.ops.vitrail.packed_conv, *operands())


def test_it_can_be_compiled_and_scripted():
    args = example(dtype=torch.float32)
    args["weight"] = pack_kernel(args["weight"])
    check_compiled_and_scripted(packed_conv, args)


@each_mode
def test_both_counters_agree(mode):
    x, *rest = operands(torch.float32)
    macs = (2 * 2 * 2) * (3 * 2 * 5) * 33
    with use_ops(mode):
        assert macs_by_both(lambda x: torch.ops.vitrail.packed_conv(x, *rest), x) == (macs, macs)


# --- wrong arguments --------------------------------------------------------------------------------------------------

BAD = {
    "no map": ({"x": torch.zeros(5, 6, 7)}, ValueError, r"x must have 4 dimensions \(B, H, W, C\)"),
    "half": ({"x": torch.zeros(2, 5, 6, 7).half()}, TypeError, "x must be float32, float64 or bfloat16, got torch.float16"),
    "strided": ({"x": torch.zeros(2, 7, 6, 5).double().mT}, ValueError, "x must have contiguous channels"),
    "not packed": ({"weight": torch.zeros(33, 7, 3, 2).double()}, ValueError, r"weight must be what pack_weight makes of a torch.float64 matrix \(33, 42\)"),
    "bias": ({"bias": torch.zeros(8).double()}, ValueError, r"bias must have shape \(33,\), got \(8,\)"),
    "bias's dtype": ({"bias": torch.zeros(33)}, ValueError, "dtype torch.float64, got .* of torch.float32"),
    "kernel": ({"kernel": [3, 0]}, ValueError, r"kernel must be two numbers of at least 1, got \(3, 0\)"),
    "stride": ({"stride": [2]}, ValueError, r"stride must be two numbers of at least 1, got \(2,\)"),
    "padding": ({"padding": [0, -1]}, ValueError, r"padding must be two numbers of at least 0, got \(0, -1\)"),
    "wide padding": ({"padding": [1, 2]}, ValueError, r"padding must be less than the kernel, \(3, 2\), got \(1, 2\)"),
    "small map": ({"x": torch.zeros(2, 5, 1, 7).double()}, ValueError, r"at least as wide as the kernel, 2, got 1 \+ 2 \* 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_with_the_rule(case):
    change, kind, message = BAD[case]
    args = example()
    args["weight"] = pack_kernel(args["weight"])
    with pytest.raises(kind, match=message):
        packed_conv(**args | change)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (2, 0, 3, 3)], ids=str)
def test_only_kernels_can_be_packed(shape):
    with pytest.raises(ValueError, match="weight must"):
        pack_kernel(torch.zeros(shape))


RAW = {
    "rank": ({0: torch.zeros(5, 6, 7)}, r"x must have 4 dimensions \(B, H, W, C\)"),
    "no channels": ({0: torch.zeros(2, 4, 3, 0)}, "a patch must have from 1 to"),
    "half": ({0: torch.zeros(2, 4, 3, 5).half()}, "x must be float32, float64 or bfloat16, got float16"),
    "weight": ({1: torch.zeros(2, 30, 32)}, "weight must be float64, got float32"),
    "weight's shape": ({1: torch.zeros(2, 29, 32).double()}, r"weight must have shape \(2, 30, 32\), got \(2, 29, 32\)"),
    "bias": ({2: torch.zeros(4).double()}, r"bias must have shape \(33\), got \(4\)"),
    "columns": ({3: 0}, "the number of columns must be from 1 to"),
    "kernel": ({4: [3, 0]}, r"the kernel must be from 1 to \d+ wide, got 0"),
    "large kernel": ({4: [2**62, 2]}, r"the kernel must be from 1 to \d+ high, got"),
    "one number": ({4: [3]}, "must be two numbers each, got 1, 2 and 2"),
    "stride": ({5: [0, 1]}, r"strides must be from 1 to \d+, got 0"),
    "padding": ({6: [1, -1]}, r"padding must be from 0 to less than the kernel, 2, got -1"),
    "small map": ({4: [7, 2]}, r"at least as high as the kernel, 7, got 4 \+ 2 \* 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", RAW)
def test_the_compiled_operator_checks_for_itself(case):
    check_kernel_refuses("packed_conv", operands(), *RAW[case])
