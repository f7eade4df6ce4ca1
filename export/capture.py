"""From a module to an exported program: torch's graph of what the module computes, true for every size it claims."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import ExportError

PLACES = {"batch": 0, "height": 2, "width": 3}
"""The axes that can be dynamic, and their places in the (B, C, H, W) input."""
AXES = tuple(PLACES)
INPUT = "input"
"""Name of the file's input."""


FORMS = ("classifier", "features", "pre_logits")
"""What a file can put out: what the model returns, its feature pyramid, or what its classifier reads."""


def check_form(model: nn.Module, form: str) -> None:
    """Raise ValueError unless `model` has what `form` needs."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    needed = {"features": ["forward_intermediates"], "pre_logits": ["forward_features", "forward_head"]}
    if missing := [name for name in needed.get(form, []) if not hasattr(model, name)]:
        raise ValueError(
            f"{type(model).__name__} has no {' and no '.join(missing)}, so form={form!r} can't be had; "
            f"export another form, or give the module methods as timm's models have"
        )


def form_of(names: Sequence[str]) -> str:
    """The form that outputs of these names belong to."""
    if list(names) == ["pre_logits"]:
        return "pre_logits"
    return "features" if names and names[0] == "stage0" else "classifier"


class Outputs(nn.Module):
    """A module whose outputs are a tuple of tensors with known names, whatever `model` returns.

    Args:
        model: any module of one image tensor.
        form: one of `FORMS`. The pyramid comes from `model.forward_intermediates`, the input of the classifier from
            `model.forward_head(..., pre_logits=True)`, as timm's models have them.
    """

    def __init__(self, model: nn.Module, form: str = "classifier"):
        super().__init__()
        self.model = model
        self.form = form
        self.names: list[str] = []
        self.training = model.training

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Run the model on images (B, C, H, W); `names` then holds the outputs' names."""
        model: Any = self.model
        if self.form == "features":
            pyramid = model.forward_intermediates(image, intermediates_only=True, output_fmt="NCHW")
            named = [(f"stage{i}", value) for i, value in enumerate(pyramid)]
        elif self.form == "pre_logits":
            named = [("pre_logits", model.forward_head(model.forward_features(image), pre_logits=True))]
        else:
            named = list(_named(model(image)))
            if named and named[0][0] == "":
                named = [("logits" if getattr(model, "num_classes", 0) else "output", named[0][1])]
        self.names = [name for name, _ in named]
        for name, value in named:
            if not isinstance(value, Tensor):
                raise ExportError(
                    f"the model's output {name!r} is a {type(value).__name__}; only tensors (alone, or in a "
                    f"tuple, a list or a dictionary) can leave an ONNX graph. Wrap the model in one that returns "
                    f"tensors"
                )
        if not named or len({*self.names, INPUT}) <= len(named):
            raise ExportError(
                f"outputs need distinct names other than {INPUT!r}; the model's are {', '.join(self.names) or 'none'}"
            )
        return tuple(value for _, value in named)


def _named(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Names for what a model returns: keys of dictionaries, `output0`... for sequences, joined by `_`; "" alone."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, f"{path}_{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _named(item, f"{path}_{i}" if path else f"output{i}")
    else:
        yield path, value


def prepared(model: nn.Module) -> nn.Module:
    """The float32 module on the CPU that stands for `model`: itself, or a copy where it lives elsewhere.

    Raises:
        TypeError: not an eager `nn.Module`.
        ValueError: weights in another precision than float32, or without values (meta device).
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a TorchScript module can't be exported; give the nn.Module that it was made from")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors):
        raise ValueError("the model is on the meta device and has no weights to export; load them first")
    other = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()} - {"float32"}
    if other:
        raise ValueError(
            f"the model holds {' and '.join(sorted(other))} weights; export works in float32: call model.float() "
            f"first, and convert the finished file if the runtime wants another precision"
        )
    if all(t.device.type == "cpu" for t in tensors):
        return model
    return copy.deepcopy(model).cpu()


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in torch's default surroundings: float32 on the CPU, no gradients, autocast, inference mode.

    Each submodule gets its own mode back.
    """
    modes = {module: module.training for module in model.modules()}
    dtype = torch.get_default_dtype()
    model.eval()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        model.train(modes[model])  # for modules that do more than set a flag
        for module, training in modes.items():
            module.training = training


_CHATTY = (
    "torch.onnx",
    "torch.export",
    "torch._export",
    "torch._guards",
    "torch.fx",
    "onnxscript",
    "onnx_ir",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's warnings and log lines from the user; its errors are exceptions and pass."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class PlainAttention(TorchFunctionMode):
    """Scaled dot-product attention as two products and a softmax.

    Torch's exporter writes the same with shape arithmetic and extra reshapes around the transpose (davit_tiny:
    54 nodes more), which hides the pattern that runtimes fuse.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if is_causal or enable_gqa or dropout_p or (attn_mask is not None and attn_mask.dtype == torch.bool):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


@contextlib.contextmanager
def plain_operators(opset: int) -> Iterator[None]:
    """Operators as their plain definitions, so that the graph holds standard nodes only."""
    from ..ops import use_ops

    # ONNX has an Attention node of its own from opset 23 on.
    with use_ops("reference"), PlainAttention() if opset < 23 else contextlib.nullcontext():
        yield


def capture(
    module: Outputs, example: Tensor, dynamic: Sequence[str], opset: int
) -> tuple[torch.export.ExportedProgram, dict[str, Sizes]]:
    """Trace `module` and prove that the graph holds for every size of the dynamic axes.

    Named dimensions make torch.export check each assumption that the trace took against the whole range
    of sizes. (torch.onnx.export called on a module skips that check: a batch size that went through Python
    arithmetic, `B = int(windows.shape[0] / n)`, is then frozen without a word.)

    A place that treats a size of 1 by itself (layouts of memory do) limits what can be proven to larger images.

    Returns:
        the program, and for each dynamic axis the sizes that the proof covers.

    Raises:
        ExportError: the module can't be traced, or froze an axis that should be dynamic.
    """
    dims: dict[int, Any] = {PLACES[axis]: torch.export.Dim(axis, min=1) for axis in dynamic}
    # Without this, torch takes sizes apart into "one" and "more", and no range of heights is provable.
    sizes_are_plain = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    try:
        with (
            plain_operators(opset),
            sizes_are_plain if set(dynamic) - {"batch"} else contextlib.nullcontext(),
        ):
            while True:
                try:
                    program = torch.export.export(module, (example,), dynamic_shapes=(dims,), strict=False)
                    break
                except torch._dynamo.exc.UserError as error:
                    dims = _refined(error, dims, dynamic)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch.export could not trace the model{_blame(error, module)}: {_first_line(error)}"
        ) from error
    sizes = {axis: Sizes.of(dims[PLACES[axis]]) for axis in dynamic}
    frozen = [axis for axis in dynamic if isinstance(input_value(program).shape[PLACES[axis]], int)]
    if frozen:
        raise ExportError(_frozen_message(frozen))
    return program, sizes


def _refined(
    error: torch._dynamo.exc.UserError, dims: dict[int, Any], dynamic: Sequence[str]
) -> dict[int, Any]:
    """Dimensions as torch.export suggests them (`height = 28*_height`), or from the size on at which its guards hold.

    Raises:
        ExportError: it suggests to freeze one, or has nothing to suggest.
        UserError: `error`, where it is about something else.
    """
    message = error.msg
    if "Constraints violated" not in message:
        raise error
    try:
        shapes: Any = torch.export.dynamic_shapes.refine_dynamic_shapes_from_suggested_fixes(message, (dims,))
        refined: dict[int, Any] = shapes[0]
    except torch._dynamo.exc.UserError:  # no suggestion in it
        refined = dims
    frozen = [axis for axis in dynamic if isinstance(refined[PLACES[axis]], int)]
    if frozen:
        raise ExportError(_frozen_message(frozen)) from error
    for axis in dynamic:
        dim = refined[PLACES[axis]]
        lowest = _lowest(message, axis)
        if lowest is not None and isinstance(dim, torch.export.Dim) and dim.min < lowest <= dim.max:
            refined[PLACES[axis]] = torch.export.Dim(axis, min=lowest)
    if _described(refined) == _described(dims):
        raise ExportError(_constrained_message(message, dynamic)) from error
    return refined


def _frozen_message(axes: Sequence[str]) -> str:
    many = len(axes) > 1
    return (
        f"the model fixes the {' and the '.join(axes)} at the traced size{'s' if many else ''}, so a file with "
        f"{'these axes' if many else 'this axis'} dynamic would be wrong at every other size. Look for a size that "
        f"goes through int(), float division or a Python constant (integer division, //, keeps it dynamic), or "
        f"leave {', '.join(map(repr, axes))} out of dynamic"
    )


def _constrained_message(message: str, dynamic: Sequence[str]) -> str:
    """What the model assumes of its sizes, in the axes' own names."""
    guards = re.findall(r"satisfy the generated guard (.+?)\.?$", message, re.MULTILINE)
    for axis in AXES:
        guards = [re.sub(rf"L\['\w+'\](\[0\])?\.size\(\)\[{PLACES[axis]}\]", axis, guard) for guard in guards]
    return (
        f"the model is not free in the {' and the '.join(dynamic)}: it takes for granted that "
        f"{'; '.join(guards[:3]) or _first_line(ValueError(message))}. Leave the axis out of dynamic, or write that "
        f"place so that it holds for every size"
    )


@dataclass(frozen=True)
class Sizes:
    """What an open axis may be: multiples of a number, from a size on."""

    multiple: int = 1
    lowest: int = 1

    @classmethod
    def of(cls, dim: Any) -> Sizes:
        """Of `28*_height` the multiple, of a dimension with a name of its own its least value."""
        if found := re.match(r"(\d+)\*", dim.__name__):
            return cls(multiple=int(found[1]))
        return cls(lowest=dim.min)

    def describe(self, smallest: float) -> str:
        """In words; `smallest` is the least size that the file was tried with."""
        if self.multiple > 1:
            return f"multiples of {self.multiple}"
        if self.lowest == 1:
            return "any"
        return f"any (proven from {self.lowest} on)" if smallest < self.lowest else f"{self.lowest} and more"


def _described(dims: Mapping[int, Any]) -> list[tuple[str, int]]:
    return [(dim.__name__, getattr(dim, "min", 1)) for dim in dims.values()]


_SEARCHED = 1024
"""Up to this size the guards are tried out; what holds for the last half of it is worth another trace."""


def _lowest(message: str, axis: str) -> int | None:
    """The size from which on all guards hold that speak of this axis alone; None if there is none, or no such guard."""
    size = re.compile(rf"L\['\w+'\](?:\[0\])?\.size\(\)\[{PLACES[axis]}\]")
    guards = re.findall(r"satisfy the generated guard (.+?)\.?$", message, re.MULTILINE)
    guards = [size.sub("size", guard) for guard in guards if size.search(guard)]
    guards = [guard.replace("torch.sym_", "") for guard in guards if "L[" not in size.sub("", guard)]
    names = {"__builtins__": {}, "min": min, "max": max, "IntInfinity": lambda: math.inf}
    try:
        tests = [compile(guard, "guard", "eval") for guard in guards]
        failing = [
            n for n in range(1, _SEARCHED) if not all(eval(test, names, {"size": n}) for test in tests)
        ]
    except Exception:  # written in other words than these
        return None
    lowest = max(failing, default=0) + 1
    return lowest if tests and lowest <= _SEARCHED // 2 else None


def input_value(program: torch.export.ExportedProgram) -> Tensor:
    """The fake tensor that stands for the image; its dynamic sizes are symbolic."""
    name = program.graph_signature.user_inputs[0]
    value: Tensor = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    return value


def _blame(error: BaseException, module: nn.Module) -> str:
    """` in stages.0.attn (Attention)`: the innermost submodule that was running when `error` was raised."""
    names = {child: name for name, child in module.named_modules()}
    found: nn.Module | None = None
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in names:
            found = owner
        trace = trace.tb_next
    path = names[found].removeprefix("model").lstrip(".") if found is not None else ""
    return f" in {path} ({type(found).__name__})" if path else ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def translate(program: torch.export.ExportedProgram, opset: int) -> Any:
    """Torch's ONNX exporter, and its errors in one line.

    Returns:
        the `torch.onnx.ONNXProgram`.

    Raises:
        ExportError: an operator that has no ONNX form; says which, and where in the model it stands.
    """
    try:
        translated = torch.onnx.export(
            program,
            (),
            input_names=[INPUT],
            opset_version=opset,
            optimize=False,  # `optimise` does, in a tenth of the time
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        text = str(error)
        if missing := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text):
            where = _users(program, missing[1])
            raise ExportError(
                f"{missing[1]} has no ONNX form{where}; write that place with other operators"
            ) from error
        summary = re.search(r"Exception summary\s+<class '[^']*'>: (.+)", text)
        raise ExportError(
            f"torch's ONNX exporter failed: {summary[1] if summary else _first_line(error)}"
        ) from error
    return translated


def _users(program: torch.export.ExportedProgram, operator: str) -> str:
    """` (used by head.pool)`: the submodules whose forward calls `operator`, as far as the graph knows."""
    paths = []
    for node in program.graph.nodes:
        if str(node.target).startswith(operator):
            stack = node.meta.get("nn_module_stack") or {}
            path = [name for name, _ in stack.values()][-1:]
            paths += [p.removeprefix("model").lstrip(".") or "the model itself" for p in path]
    unique = list(dict.fromkeys(paths))
    more = f" and {len(unique) - 3} more" if len(unique) > 3 else ""
    return f" (used by {', '.join(unique[:3])}{more})" if unique else ""
