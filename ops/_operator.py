"""An operator made from its definition: schema, kernel of last resort, fake kernel, derivatives, vmap, autocast.

A file of this package states what is particular to its operator: the definition, the shapes of the results, the checks.
What follows from these is here. A compiled kernel, for the operator or for its `_backward`, takes precedence over the
kernels of last resort by PyTorch's own dispatch.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from . import library

_lib = torch.library.Library("vitrail", "FRAGMENT")
_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
_AUTOGRAD_KEYS = [
    getattr(torch._C.DispatchKey, x) for x in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView")
]


def wide_dtype(x: Tensor) -> torch.dtype:
    """The type that sums and softmax are computed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def in_transform() -> bool:
    """Whether a torch.func transform is active. It does not see the rules that are registered with the dispatcher."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def holds_values(x: Tensor) -> bool:
    """Whether values can be read here and now: on the CPU, and not while a graph is captured or transformed."""
    captured = torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform()
    return x.device.type == "cpu" and not captured and type(x) is Tensor


class Outline:
    """What a fake kernel asks of a tensor: shape and dtype."""

    def __init__(self, shape: Sequence[Any], dtype: torch.dtype):
        self.shape, self.dtype = tuple(shape), dtype

    def new_empty(self, shape: Sequence[Any], dtype: Optional[torch.dtype] = None) -> "Outline":
        return Outline(shape, dtype or self.dtype)


Replacement = Callable[[str, Callable[..., Any], Sequence[Any], Outline], Tensor]
_replacement: Optional[Replacement] = None


@contextlib.contextmanager
def replaced(by: Replacement) -> Iterator[None]:
    """Calls of operators inside a `with` block are calls of `by`, so that an export can write a node for each.

    Args:
        by: gets the operator's name, its definition, the arguments in the order of its schema, and shape and dtype of
            the result; returns what stands for the result.
    """
    global _replacement
    before, _replacement = _replacement, by
    try:
        yield
    finally:
        _replacement = before


def is_replaced() -> bool:
    """Whether calls of operators are replaced here and now."""
    return _replacement is not None


def replacement(
    name: str, definition: Callable[..., Any], fake: Callable[..., Any], args: Sequence[Any]
) -> Optional[Tensor]:
    """What stands for the result of a call inside `replaced`; None outside, where the operator is called."""
    if _replacement is None:
        return None
    outlines = [Outline(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in args]
    return _replacement(name, definition, args, _tuple(fake(*outlines))[0])


def hands_over(name: str, device: str, compiled: Sequence[str]) -> bool:
    """Whether the compiled library, loaded now if it was not, has put a kernel in front of the one of last resort.

    Args:
        name: of the operator, without its namespace.
        device: where its arguments are.
        compiled: device types whose compiled library holds a kernel, so that loading it is worth while.
    """
    known = device in compiled and library.load(device)
    return known and library.has_kernel(f"vitrail::{name}", device.upper())


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Autograd inside a kernel, which runs below it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def _tuple(x: Any) -> Tuple[Any, ...]:
    return x if isinstance(x, tuple) else tuple(x) if isinstance(x, list) else (x,)


class Operator:
    """`torch.ops.vitrail.<name>` and its backward, which recomputes from the inputs and stores nothing else.

    Args:
        name: of the operator.
        arguments: as a schema states them, without defaults.
        definition: the operator in plain PyTorch: differentiable, traceable, the body that export uses.
        fake: empty outputs with the right shapes, from the same arguments.
        differentiable: names of the tensor arguments that get gradients; their gradients are the outputs of
            `<name>_backward(grad, [outputs,] arguments)`, empty where the argument is None.
        outputs: names of the outputs. The first is the result and carries the gradient. Where there are more, they are
            what a backward kernel needs, and all outputs are passed to it.
        forward: kernel of last resort that computes all outputs; default: the definition.
        cast: names of the arguments that autocast converts; default: the differentiable ones.
        shared: names of the tensor arguments without a batch, such as weights; the others have it in front.
        check_values: raises for values that are not allowed (indices out of range); called where they can be read.
        foldable: whether `vmap` may join the mapped dimension to the first one of the arguments that are not shared.
        compiled: device types whose compiled library holds a kernel, so that loading it is worth while.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        definition: Callable[..., Tensor],
        fake: Callable[..., Any],
        *,
        differentiable: Sequence[str],
        outputs: Sequence[str] = ("out",),
        forward: Optional[Callable[..., Any]] = None,
        cast: Optional[Sequence[str]] = None,
        shared: Sequence[str] = (),
        check_values: Optional[Callable[..., None]] = None,
        foldable: bool = True,
        compiled: Sequence[str] = (),
    ):
        self.name = name
        self.definition = definition
        self.fake = fake
        self.outputs = tuple(outputs)
        self._forward = forward or definition
        self._check_values = check_values
        self._foldable = foldable
        self._compiled = tuple(compiled)

        results = ", ".join(f"Tensor {x}" for x in outputs)
        saved = ", ".join(f"Tensor {x}" for x in ("grad", *(outputs if len(outputs) > 1 else ())))
        grads = ", ".join(f"Tensor grad_{x}" for x in differentiable)
        tags = (torch.Tag.pt2_compliant_tag,)
        _lib.define(f"{name}({arguments}) -> ({results})", tags=tags)
        _lib.define(f"{name}_backward({saved}, {arguments}) -> ({grads})", tags=tags)
        self.op = getattr(torch.ops.vitrail, name)
        self.backward_op = getattr(torch.ops.vitrail, f"{name}_backward")

        schema = self.op.default._schema.arguments
        self._tensors = [i for i, a in enumerate(schema) if "Tensor" in str(a.type)]
        self._count = len(schema)
        names = [a.name for a in schema]
        self._wanted = [names.index(x) for x in differentiable]
        self._cast = [names.index(x) for x in (differentiable if cast is None else cast)]
        self._shared = {names.index(x) for x in shared}
        self._saved = len(outputs) if len(outputs) > 1 else 0

        qualified = f"vitrail::{name}"
        _lib.impl(name, self._kernel, "CompositeExplicitAutograd")
        _lib.impl(f"{name}_backward", self._backward_kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=_lib)
        torch.library.register_fake(f"{qualified}_backward", self._fake_backward, lib=_lib)
        rules = (self._setup, self._backward, self._vmap)
        torch.library.register_autograd(qualified, rules[1], setup_context=rules[0], lib=_lib)
        torch.library.register_vmap(qualified, rules[2], lib=_lib)
        self._function = _as_function(name, self.op, *rules)
        rules = (self._setup_double, self._double_backward, self._vmap_backward)
        torch.library.register_autograd(f"{qualified}_backward", rules[1], setup_context=rules[0], lib=_lib)
        torch.library.register_vmap(f"{qualified}_backward", rules[2], lib=_lib)
        self._backward_function = _as_function(f"{name}_backward", self.backward_op, *rules)
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _lib.impl(name, self._autocast(device), key)

    def __call__(self, *args: Any) -> Tensor:
        """The result, along the path in force; arguments are checked, but for their values."""
        if (stands_for := replacement(self.name, self.definition, self.fake, args)) is not None:
            return stands_for
        if library.mode() == "reference":
            if self._check_values is not None and holds_values(args[0]):
                self._check_values(*args)
            return self.definition(*args)
        if args[0].is_cuda and not self.fits_gpu(*args):
            return self.definition(*args)
        out = self._function.apply(*args) if in_transform() else self.op(*args)
        return out[0] if self._saved else out

    def fits_gpu(self, *args: Any) -> bool:
        """Whether the GPU kernels take these arguments; the definition runs where they do not."""
        return args[0].dtype != torch.float64

    # --- kernels of last resort ---

    def _kernel(self, *args):
        """Hands over to the compiled library once that is loaded, else runs the definition."""
        device = args[0].device.type
        if hands_over(self.name, device, self._compiled):
            return self.op(*args)
        if self._check_values is not None and device == "cpu":
            self._check_values(*args)
        out = tuple(x.contiguous() for x in _tuple(self._forward(*args)))
        # an operator must not return one of its inputs
        out = tuple(x.clone() if any(x is args[i] for i in self._tensors) else x for x in out)
        return out if self._saved else out[0]

    def _backward_kernel(self, grad, *rest):
        """The same for the gradients."""
        device = grad.device.type
        if hands_over(f"{self.name}_backward", device, self._compiled):
            return self.backward_op(grad, *rest)
        return self._differentiate(grad, *rest)

    def _differentiate(self, grad, *rest):
        """The gradients by way of the definition."""
        with _recording():
            args, leaves = self._leaves(rest[self._saved :])
            grads = iter(torch.autograd.grad(self.definition(*args), leaves, grad, materialize_grads=True))
        grads = tuple(
            args[0].new_empty(0) if args[i] is None else next(grads).contiguous() for i in self._wanted
        )
        return grads if len(grads) > 1 else grads[0]

    def _leaves(self, args):
        """The arguments with fresh leaves where they are differentiable, and these leaves."""
        fresh = list(args)
        for i in self._wanted:
            if fresh[i] is not None:
                fresh[i] = fresh[i].detach().requires_grad_()
        return fresh, [fresh[i] for i in self._wanted if fresh[i] is not None]

    def _fake_backward(self, grad, *rest):
        args = rest[self._saved :]
        grads = [
            args[0].new_empty(0) if args[i] is None else args[i].new_empty(args[i].shape)
            for i in self._wanted
        ]
        return tuple(grads) if len(grads) > 1 else grads[0]

    # --- derivatives ---

    def _setup(self, ctx, inputs, output) -> None:
        outputs = _tuple(output)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*(inputs[i] for i in self._tensors), *outputs[: self._saved])
        ctx.settings = [x for i, x in enumerate(inputs) if i not in self._tensors]

    def _restore(self, tensors, settings):
        tensors, settings = iter(tensors), iter(settings)
        return [next(tensors) if i in self._tensors else next(settings) for i in range(self._count)]

    def _backward(self, ctx, grad, *_):
        saved = ctx.saved_tensors
        args = self._restore(saved, ctx.settings)
        op = self._backward_function.apply if in_transform() else self.backward_op
        grads = _tuple(op(grad.contiguous(), *saved[len(self._tensors) :], *args))
        out: list[Optional[Tensor]] = [None] * self._count
        for i, g in zip(self._wanted, grads, strict=True):
            out[i] = g if args[i] is not None else None
        return tuple(out)

    def _setup_double(self, ctx, inputs, output) -> None:
        args = inputs[1 + self._saved :]
        ctx.save_for_backward(inputs[0], *(args[i] for i in self._tensors))
        ctx.settings = [x for i, x in enumerate(args) if i not in self._tensors]

    def _double_backward(self, ctx, *grads):
        """Second derivatives through the definition: they are rare, and the formula is long."""
        grad, *tensors = ctx.saved_tensors
        inputs = self._restore(tensors, ctx.settings)
        present = [i for i in self._wanted if inputs[i] is not None]
        given = [g for g, i in zip(grads, self._wanted, strict=True) if inputs[i] is not None]
        with torch.enable_grad():
            args, leaves = self._leaves(inputs)
            grad = grad.detach().requires_grad_()
            first = torch.autograd.grad(
                self.definition(*args), leaves, grad, create_graph=True, materialize_grads=True
            )
            # a gradient that does not depend on anything has no second derivative
            used = [(f, g) for f, g in zip(first, given, strict=True) if f.requires_grad and g is not None]
            second = torch.autograd.grad(
                [f for f, _ in used], [grad, *leaves], [g for _, g in used], materialize_grads=True
            )
        out: list[Optional[Tensor]] = [None] * self._count
        for i, g in zip(present, second[1:], strict=True):
            out[i] = g
        return (second[0], *[None] * self._saved, *out)

    # --- torch.func, autocast ---

    def _vmap(self, info, in_dims, *args):
        foldable = self._foldable and all(in_dims[i] is None for i in self._shared if args[i] is not None)
        return _batched(self.op, info, in_dims, args, self._shared, foldable)

    def _vmap_backward(self, info, in_dims, *args):
        shared = {i + 1 + self._saved for i in self._shared}
        # the gradient of a shared argument is summed over the batch, so a mapped dimension must not join it
        foldable = self._foldable and not any(args[i] is not None for i in shared)
        return _batched(self.backward_op, info, in_dims, args, shared, foldable)

    def _autocast(self, device: str):
        def kernel(*args):
            dtype = torch.get_autocast_dtype(device)
            converted = list(args)
            for i in self._cast:
                if args[i] is not None and args[i].dtype != torch.float64:
                    converted[i] = args[i].to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_AUTOCAST_KEYS[device])):
                return self.op(*converted)

        return kernel


def _batched(op, info, in_dims, args, shared, foldable):
    """vmap: the mapped dimension joins the batch, since every image is computed on its own; else one by one."""
    size = info.batch_size
    if not foldable:

        def pick(x, dim, i):
            return x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x

        singles = [
            _tuple(op(*(pick(x, dim, i) for x, dim in zip(args, in_dims, strict=True)))) for i in range(size)
        ]
        outs = tuple(torch.stack(x) for x in zip(*singles, strict=True))
    else:

        def fold(i, x, dim):
            if not isinstance(x, Tensor) or i in shared:
                return x
            x = x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
            return x.flatten(0, 1)

        outs = _tuple(op(*(fold(i, x, dim) for i, (x, dim) in enumerate(zip(args, in_dims, strict=True)))))
        # gradients of absent arguments come back empty, without a batch to unfold
        outs = tuple(x.unflatten(0, (size, -1)) if x.dim() > 1 else x.expand(size, *x.shape) for x in outs)
    return (outs, (0,) * len(outs)) if len(outs) > 1 else (outs[0], 0)


def _as_function(name: str, op, setup_context, backward, vmap) -> type[torch.autograd.Function]:
    """The same rules for torch.func transforms, which do not see those registered with the dispatcher."""
    rules = {
        "forward": lambda *args: op(*args),
        "setup_context": setup_context,
        "backward": backward,
        "vmap": vmap,
    }
    title = "".join(part.capitalize() for part in name.split("_"))
    return type(title, (torch.autograd.Function,), {key: staticmethod(rule) for key, rule in rules.items()})
