"""depthwise_conv: against stock convolutions in float64, and its place in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.ops import depthwise_conv, use_ops

from ..threads import torch_threads, with_threads
from .counting import macs_by_both
from .place import check_compiled_and_scripted, check_vmap
from .refusals import check_kernel_refuses

DTYPES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_mode = pytest.mark.parametrize("mode", ["auto", "reference"])


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def example(shape=(2, 5, 6, 7), kernel=(3, 5), dtype=torch.float64, per_image=False, extras=True, seed=0):
    """Arguments of depthwise_conv."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size, of=None):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(of or wide(dtype))

    channels = shape[3]
    images = shape[:1] if per_image else ()
    args = {"x": draw(*shape, of=dtype), "weight": draw(*images, *kernel, channels)}
    if extras:
        args |= {name: draw(channels) for name in ("bias", "scale", "shift")}
        args |= {"residual": draw(*shape, of=dtype), "activation": "gelu"}
    return args


def stock(x, weight, bias=None, residual=None, scale=None, shift=None, activation="none"):
    """The same from stock layers, an image at a time, in float64."""
    y = x.double() * (1 if scale is None else scale.double()) + (0 if shift is None else shift.double())
    y = F.gelu(y) if activation == "gelu" else y
    kernels = weight.double().expand(len(x), *weight.shape[-3:])
    outs = [
        F.conv2d(
            image.permute(2, 0, 1)[None],
            kernel.permute(2, 0, 1)[:, None],
            padding=(kernel.shape[0] // 2, kernel.shape[1] // 2),
            groups=x.shape[3],
        )[0].permute(1, 2, 0)
        for image, kernel in zip(y, kernels, strict=True)
    ]
    y = torch.stack(outs)
    y = y if bias is None else y + bias.double()
    return y if residual is None else y + residual.double()


def error(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


# --- values -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    images=st.integers(1, 3),
    height=st.integers(1, 20),
    width=st.integers(1, 30),
    channels=st.sampled_from([1, 3, 4, 8, 15, 16, 17, 32, 40, 50, 80]),
    kernel=st.tuples(*[st.sampled_from([1, 3, 5, 7, 9, 11])] * 2),
    dtype=st.sampled_from(list(DTYPES)),
    per_image=st.booleans(),
    extras=st.booleans(),
    mode=st.sampled_from(["auto", "reference"]),
    threads=st.sampled_from([1, 2, 3]),
)
def test_any_shape_is_that_of_stock_layers(
    images, height, width, channels, kernel, dtype, per_image, extras, mode, threads
):
    args = example((images, height, width, channels), kernel, dtype, per_image, extras)
    with torch_threads(threads), use_ops(mode):
        got = depthwise_conv(**args)
    assert got.dtype == dtype
    assert got.is_contiguous() or mode == "reference"
    assert error(got, stock(**args)) <= DTYPES[dtype]


@each_mode
def test_maps_may_be_parts_of_wider_ones(mode):
    args = example((2, 8, 9, 16), dtype=torch.float32)
    wider = torch.full((2, 10, 9, 40), torch.nan)
    part = wider[:, 1:9, :, 8:24]
    part.copy_(args["x"])
    with use_ops(mode):
        assert torch.equal(depthwise_conv(**args | {"x": part}), depthwise_conv(**args))


@each_dtype
def test_results_do_not_depend_on_the_number_of_threads_or_on_other_images(dtype):
    args = example((4, 40, 33, 48), (7, 3), dtype)
    with_threads(lambda: (depthwise_conv(**args),))
    some = args | {name: args[name][1:2] for name in ("x", "residual")}
    assert torch.equal(depthwise_conv(**some), depthwise_conv(**args)[1:2])


@each_mode
@pytest.mark.parametrize("shape", [(0, 4, 4, 8), (2, 0, 4, 8), (2, 4, 0, 8)], ids=str)
def test_empty_maps_stay_empty(shape, mode):
    with use_ops(mode):
        assert depthwise_conv(**example(shape, dtype=torch.float32)).shape == shape


def test_what_is_not_finite_stays_within_reach():
    """A kernel that is skipped past the edge must not turn infinity into NaN elsewhere."""
    x = torch.zeros(1, 9, 9, 16)
    x[0, 4, 4] = torch.inf
    got = depthwise_conv(x, torch.ones(3, 3, 16))
    assert got[0, 3:6, 3:6].isinf().all()
    got[0, 3:6, 3:6] = 0
    assert (got == 0).all()


# --- its place in PyTorch ---------------------------------------------------------------------------------------------


def operands(dtype=torch.float64, per_image=False):
    args = example((2, 4, 3, 5), dtype=dtype, per_image=per_image)
    return [args[n] for n in ("x", "weight", "bias", "residual", "scale", "shift", "activation")]


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_registrations_pass_opcheck(dtype, per_image):
    args = [x.requires_grad_() if torch.is_tensor(x) else x for x in operands(dtype, per_image)]
    torch.library.opcheck(torch.ops.vitrail.depthwise_conv.default, args)


@pytest.mark.parametrize("per_image", [False, True])
def test_gradients_are_those_of_the_definition(per_image):
    *tensors, activation = operands(per_image=per_image)

    def call(*tensors):
        return torch.ops.vitrail.depthwise_conv(*tensors, activation)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in tensors])


def test_vmap_gives_each_entry_its_own_result():
    check_vmap(torch.ops.vitrail.depthwise_conv, *operands())


def test_it_can_be_compiled_and_scripted():
    args = example(dtype=torch.float32)
    check_compiled_and_scripted(depthwise_conv, args)


@each_mode
def test_both_counters_agree(mode):
    args = operands(torch.float32)
    macs = 2 * 4 * 3 * 5 * 15
    with use_ops(mode):
        assert macs_by_both(lambda x: torch.ops.vitrail.depthwise_conv(x, *args[1:]), args[0]) == (macs, macs)


# --- wrong arguments --------------------------------------------------------------------------------------------------

BAD = {
    "no map": ({"x": torch.zeros(5, 6, 7)}, ValueError, r"x must have 4 dimensions \(B, H, W, C\)"),
    "integers": ({"x": torch.zeros(2, 5, 6, 7, dtype=torch.int64)}, TypeError, "x must be float32, float64"),
    "strided": ({"x": torch.zeros(2, 7, 6, 5).double().mT}, ValueError, "x must have contiguous channels"),
    "other channels": ({"weight": torch.zeros(3, 5, 8).double()}, ValueError, r"weight must have shape \(height, width, 7\)"),
    "other dtype": ({"weight": torch.zeros(3, 5, 7)}, ValueError, "and dtype torch.float64, got .* of torch.float32"),
    "other images": ({"weight": torch.zeros(3, 3, 5, 7).double()}, ValueError, "weight must be given for 2 images, got 3"),
    "even": ({"weight": torch.zeros(3, 4, 7).double()}, ValueError, "the kernel must be odd, got 3 x 4"),
    "bias": ({"bias": torch.zeros(8).double()}, ValueError, r"bias must have shape \(7,\)"),
    "scale": ({"scale": torch.zeros(7)}, ValueError, r"scale must have shape \(7,\) and dtype torch.float64"),
    "residual": ({"residual": torch.zeros(2, 5, 6, 8).double()}, ValueError, r"residual must have shape \(2, 5, 6, 7\)"),
    "residual's dtype": ({"residual": torch.zeros(2, 5, 6, 7)}, TypeError, "residual is torch.float32 but x is torch.float64"),
    "activation": ({"activation": "relu"}, ValueError, "activation must be one of none, gelu, got 'relu'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_with_the_rule(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        depthwise_conv(**{**example(), **change})


RAW = {
    "rank": ({0: torch.zeros(5, 6, 7)}, r"x must have 4 dimensions \(B, H, W, C\)"),
    "no channels": ({0: torch.zeros(2, 4, 3, 0)}, "x must have from 1 to"),
    "dtype": ({1: torch.zeros(3, 5, 5)}, "weight must be float64, got float32"),
    "weight's rank": ({1: torch.zeros(3, 5).double()}, r"weight must have shape \(height, width, C\), or"),
    "channels": ({1: torch.zeros(3, 5, 6).double()}, r"weight must have shape \(3, 5, 5\), got \(3, 5, 6\)"),
    "images": ({1: torch.zeros(3, 3, 5, 5).double()}, r"weight must have shape \(2, 3, 5, 5\), got \(3, 3, 5, 5\)"),
    "even": ({1: torch.zeros(2, 5, 5).double()}, "the kernel must be odd, up to 1023 high and wide, got 2 x 5"),
    "strided": ({1: torch.zeros(5, 3, 5).double().transpose(0, 1)}, "weight must be contiguous"),
    "bias": ({2: torch.zeros(4).double()}, r"bias must have shape \(5\), got \(4\)"),
    "residual": ({3: torch.zeros(2, 4, 3, 6).double()}, r"residual must have shape \(2, 4, 3, 5\)"),
    "name": ({6: "relu"}, "activation must be 'none' or 'gelu', got 'relu'"),
}  # fmt: skip


@pytest.mark.parametrize("case", RAW)
def test_the_compiled_operator_checks_for_itself(case):
    check_kernel_refuses("depthwise_conv", operands(), *RAW[case])
