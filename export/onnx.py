"""`to_onnx`: from a module to an ONNX file of standard operators that is proven to compute the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .capture import (
    AXES,
    PLACES,
    Outputs,
    Sizes,
    capture,
    check_form,
    evaluation,
    input_value,
    prepared,
    quiet,
    translate,
)
from .clock import Clock
from .compare import noise
from .downgrade import TRANSLATED, to_opset_17
from .errors import ExportError
from .external import is_large, publish, remove_weights, scratch_pair
from .files import check_target, write_atomically
from .functions import Nodes
from .graph import GraphSummary, TensorInfo, advice, check, check_file, clean, summarize
from .images import Preprocessing, default_size, find_images, load_image, pretrained_cfg
from .measure import VerificationReport
from .metadata import check_classes, describe, installed, text
from .optimise import optimise
from .pixels import take_pixels
from .precision import check_dtype, convert_precision
from .runs import load
from .verify import verify_onnx

if TYPE_CHECKING:
    import onnx

OPSETS = range(17, 24)
"""Operator sets that can be written. Torch's translations start at 18, 17 is made from that; 23 is the newest that the
oldest supported onnx and ONNX Runtime know. Gelu is one node from 20 on, attention from 23 on; LayerNormalization is
one in all; convolutions in bfloat16 exist from 22 on."""

DEFAULT_OPSETS = {"float32": 20, "float16": 20, "bfloat16": 22}

OPERATORS = ("standard", "fused")
"""How the operators of `vitrail.ops` are written."""

TRACED_BATCH = 2  # 0 and 1 are special to torch.export
_LARGE = 256


@dataclass(frozen=True)
class ExportReport:
    """What was written, how it was checked, how long it took. `table()` renders it, `to_dict()` is for JSON."""

    path: str
    model: str
    size_bytes: int
    graph: GraphSummary
    dynamic: dict[str, str]
    metadata: dict[str, str]
    seconds: dict[str, float]
    verification: VerificationReport | None
    notes: tuple[str, ...] = field(default=())

    @property
    def opset(self) -> int:
        """Version of ONNX's standard operator set."""
        return self.graph.opset

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Inputs of the file."""
        return self.graph.inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Outputs of the file."""
        return self.graph.outputs

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        names = ("path", "model", "size_bytes", "dynamic", "metadata", "seconds")
        return {
            **{name: getattr(self, name) for name in names},
            "graph": json.loads(json.dumps(asdict(self.graph))),
            "verification": self.verification.to_dict() if self.verification else None,
            "notes": list(self.notes),
        }

    def table(self) -> Any:
        """Rich tables of the file and its verification."""
        from .render import report_table

        return report_table(self)


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    dynamic: Collection[str] = ("batch",),
    opset: int | None = None,
    dtype: str = "float32",
    form: str = "classifier",
    preprocess: bool = False,
    classes: Sequence[str] | None = None,
    images: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    verify: bool = True,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    metadata: Mapping[str, object] | None = None,
    rewrite: Callable[[nn.Module], nn.Module] | None = None,
    operators: str = "standard",
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write `model` as an ONNX file of standard operators, verified against the model before it appears.

    The file has one float32 input, `input` (B, C, H, W), and the output `logits` (`output` for modules that
    aren't classifiers, `output0`... or the keys for several), `stage0`... for the form 'features', `pre_logits` for
    that form. Weights of more than 2 GiB go into a second file beside it. On any failure there is no file, and a file
    that was there before is as it was. The model is left as it was.

    Args:
        model: any module that takes one image tensor, in float32. Models on another device are copied to the CPU.
        path: where to; ends with `.onnx`. An existing file is replaced, atomically.
        img_size: height and width of the input; default: the model's own (`pretrained_cfg`), else 224.
        in_chans: channels of the input; default: what the model's first convolution takes.
        dynamic: axes that the file leaves open, of 'batch', 'height', 'width'. A fixed batch is 1.
        opset: version of the operator set, 17 to 23; default 20, and 22 for bfloat16. Under 20, Gelu is spelled out.
        dtype: 'float32', 'float16' or 'bfloat16': of weights and activations; see `convert_precision`. The float32
            graph is verified first. Inputs and outputs are float32 in any case.
        form: 'classifier' for what the model returns, 'features' for its feature pyramid (`forward_intermediates`,
            NCHW), 'pre_logits' for what its classifier reads (timm's `forward_head(..., pre_logits=True)`).
        preprocess: let the file take uint8 (B, H, W, C), of the input's size, and normalise it.
        classes: names of the classes, for the file's metadata.
        images: photos for the verification (files, folders); default: the two that scikit-learn ships.
        preprocessing: how photos become inputs, also noted in the file: overrides of what the model's
            `pretrained_cfg` says (mean, std, interpolation, crop_pct).
        verify: run the file in ONNX Runtime against the model; see `verify_onnx`.
        rtol, atol: tolerances of the verification of the finished file; default: `vitrail.export.TOLERANCES`.
        seed: of the verification's noise.
        metadata: further entries for the file's metadata; they win over the standard ones.
        rewrite: from the model to another module that computes the same, which is traced in its place, such as
            `vitrail.zoo.inference.standard_form`. What the file is verified against is the model itself.
        operators: `standard`: those of `vitrail.ops` are written as their definitions, in standard operators alone.
            `fused`: each is one node of domain `vitrail`, with its definition as a function in the file, so that
            runtimes that know no more compute the same, and TensorRT takes this project's kernels where they are
            registered as plugins; see docs/EXPORT.md.
        progress: called with a line of text before each step.

    Raises:
        ExportError: the model can't be traced or translated, or would be wrong at other sizes.
        VerificationError: an ExportError; the file differs from the model. Its `report` has the figures.
        ValueError, TypeError: wrong arguments, a size that the model refuses, a model that isn't float32.
        OSError: the file can't be written there.
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    say = progress or (lambda text: None)
    axes = _check_axes(dynamic)
    check_dtype(dtype)
    if opset is None:
        opset = DEFAULT_OPSETS[dtype]
    _check_opset(opset)
    if operators not in OPERATORS:
        raise ValueError(f"operators must be one of {', '.join(OPERATORS)}, got {operators!r}")
    target = check_target(path, ".onnx")
    size = default_size(model, img_size)
    prepare = Preprocessing.of(model, preprocessing)
    _check_packages(("onnx", "onnxscript", "onnxruntime") if verify else ("onnx", "onnxscript"))
    if verify:
        for photo in find_images(images):  # a wrong path should not cost a minute
            load_image(photo)
    check_form(model, form)
    check_classes(model, classes)
    model = prepared(model)
    channels = _channels(model) if in_chans is None else in_chans
    if channels < 1:
        raise ValueError(f"in_chans must be positive, got {channels}")

    batch = TRACED_BATCH if "batch" in axes else 1
    example = noise(batch, channels, *size, seed=seed)
    module = Outputs(model if rewrite is None else rewrite(model), form)
    with evaluation(module):
        say("running the model once")
        names = _dry_run(module, example)
        open_sides = [axis for axis in axes if axis != "batch"]
        if open_sides:
            _check_free(model, size, open_sides)
            example = _large(module, example, open_sides)
        clock = Clock()
        with quiet():
            say("tracing the model")
            nodes = Nodes() if operators == "fused" else None
            program, sizes = capture(module, example, axes, opset, nodes)
            clock.lap("trace")
            say("translating to ONNX")
            onnx_program = translate(program, max(opset, TRANSLATED))
            clock.lap("translate")
            say("optimising the graph")
            optimise(onnx_program.model, names)
            clock.lap("optimise")
    say("checking the graph")
    proto = onnx_program.model_proto
    clean(proto, _symbols(input_value(program), axes, sizes))
    del onnx_program, program, module
    normalisation = take_pixels(proto, prepare) if preprocess else "outside"
    if opset < TRANSLATED:
        to_opset_17(proto)
    if nodes:
        say("writing the operators' functions")
        nodes.attach(proto, opset)
        clock.lap("functions")
    entries = describe(model, (channels, *size), prepare, classes)
    entries.update(
        {
            "input_layout": "uint8 NHWC" if preprocess else "float32 NCHW",
            "normalisation": normalisation,
            "dynamic": text(axes),
            "opset": text(opset),
            "form": form,
            "dtype": dtype,
            **{f"vitrail.{axis}_multiple": text(s.multiple) for axis, s in sizes.items() if s.multiple > 1},
            **{f"vitrail.{axis}_proven_from": text(s.lowest) for axis, s in sizes.items() if s.lowest > 1},
            **{key: text(value) for key, value in (metadata or {}).items()},
        }
    )
    del proto.metadata_props[:]
    for key, value in entries.items():
        proto.metadata_props.add(key=key, value=value)
    proto.producer_name, proto.producer_version = "vitrail", installed("vitrail")
    proto.graph.name = entries["model"]
    check(proto, opset)
    clock.lap("check")

    def verified(
        candidate: Path | bytes, original: Path | bytes | None, **tolerances: Any
    ) -> VerificationReport:
        report = verify_onnx(
            candidate,
            model,
            img_size=size,
            images=images,
            preprocessing=prepare,
            seed=seed,
            original=original,
            progress=progress,
            **tolerances,
        )
        report.raise_on_failure()
        return report

    tolerances = {"rtol": rtol, "atol": atol}
    summary, notes = summarize(proto), _notes(opset, verify) + advice(proto)
    with ExitStack() as stack:
        original = _candidate(proto, target, stack)
        verification = (
            verified(original, None, **(tolerances if dtype == "float32" else {})) if verify else None
        )
        if dtype == "float32":
            candidate = original
        else:
            clock.lap("verify float32")
            say(f"converting to {dtype}")
            proto = convert_precision(load(original), dtype)
            check(proto, opset)
            summary, notes = summarize(proto), _notes(opset, verify) + advice(proto)
            clock.lap("convert")
            candidate = _candidate(proto, target, stack)
            verification = verified(candidate, original, **tolerances) if verify else None
        if verify:
            clock.lap("verify")
        del proto
        say("writing the file")
        size_bytes = _put(candidate, target)
    clock.lap("write")
    return ExportReport(
        path=os.fspath(path),
        model=entries["model"],
        size_bytes=size_bytes,
        graph=summary,
        dynamic={axis: sizes[axis].describe(_smallest(verification, axis)) for axis in axes},
        metadata=entries,
        seconds=clock.laps,
        verification=verification,
        notes=tuple(notes),
    )


def _candidate(proto: onnx.ModelProto, target: Path, stack: ExitStack) -> Path | bytes:
    """What is to become the file: its content, or where it is too large for one file a pair in a folder that is
    gone when `stack` closes."""
    if is_large(proto):
        pair: Path = stack.enter_context(scratch_pair(proto, target))
        check_file(pair)
        return pair
    return proto.SerializeToString(deterministic=True)


def _put(candidate: Path | bytes, target: Path) -> int:
    """Write the file, or move the pair, to where it belongs; returns its bytes."""
    if isinstance(candidate, Path):
        return publish(candidate, target)
    write_atomically(target, candidate)
    remove_weights(target)
    return len(candidate)


def _check_free(model: nn.Module, size: tuple[int, int], axes: Sequence[str]) -> None:
    """Refuse open sides where the model was built for one size, by what it says of itself."""
    config = pretrained_cfg(model)
    flexible = getattr(model, "dynamic_img_size", False) or not getattr(
        getattr(model, "patch_embed", None), "strict_img_size", True
    )
    if config.get("fixed_input_size") and not flexible:
        raise ExportError(
            f"{config.get('architecture') or type(model).__name__} has weights for {size[0]} x {size[1]} only: their "
            f"shapes depend on the image's size, so {' and '.join(axes)} can't stay open. Leave "
            f"{'them' if len(axes) > 1 else 'it'} out of dynamic; for another size create the model with img_size=..."
        )


def _large(module: Outputs, example: Tensor, axes: Sequence[str]) -> Tensor:
    """An example to trace open sides with: a multiple of the wanted one, so large that no map shrinks to one token.

    A size of 1 is special to torch, and what is traced with it holds for nothing else.
    """
    batch, channels, *size = example.shape
    for i, axis in enumerate(("height", "width")):
        if axis in axes:
            size[i] *= -(-_LARGE // size[i])
    larger = noise(batch, channels, *size, seed=0)
    try:
        module(larger)
    except Exception:  # then the graph, or the verification, says what the model has against it
        return example
    return larger


def _smallest(verification: VerificationReport | None, axis: str) -> float:
    checks = verification.checks if verification else ()
    return min((check.shape[PLACES[axis]] for check in checks), default=float("inf"))


def _check_axes(dynamic: Collection[str]) -> tuple[str, ...]:
    given = {dynamic} if isinstance(dynamic, str) else set(dynamic)
    if unknown := sorted(map(str, given - set(AXES))):
        raise ValueError(f"dynamic names {', '.join(unknown)}; the axes are {', '.join(AXES)}")
    return tuple(axis for axis in AXES if axis in given)


def _check_opset(opset: int) -> None:
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(f"opset must be a whole number, got {opset!r}")
    if opset not in OPSETS:
        raise ValueError(
            f"opset must lie between {OPSETS[0]} and {OPSETS[-1]}, got {opset}; "
            f"20 is the least that has Gelu as a node"
        )


def _check_packages(names: Sequence[str]) -> None:
    if missing := [name for name in names if find_spec(name) is None]:
        raise ImportError(f"ONNX export needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _channels(model: nn.Module) -> int:
    """Channels that the model takes: what it says, what its first convolution takes, what its weights were for."""
    if isinstance(stated := getattr(model, "in_chans", None), int):
        return stated
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        return first.in_channels
    input_size = pretrained_cfg(model).get("input_size")
    return int(input_size[0]) if input_size else 3


def _dry_run(module: Outputs, example: Tensor) -> list[str]:
    """Run the model as the user would, so that what it has against the input is said in its own words."""
    try:
        module(example)
    except ExportError:
        raise
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else ExportError
        shape = " x ".join(map(str, example.shape))
        raise kind(f"the model does not take a {shape} input: {error}") from error
    return module.names


def _symbols(image: Tensor, axes: Sequence[str], sizes: Mapping[str, Sizes]) -> dict[str, str]:
    """Names for torch's symbols: s77 is batch, 28*s3 is height and s3 alone is (height//28)."""
    names = {}
    for axis in axes:
        traced = str(image.shape[PLACES[axis]])
        names[traced] = axis
        if sizes[axis].multiple > 1:
            names[traced.split("*")[-1]] = f"({axis}//{sizes[axis].multiple})"
    return names


def _notes(opset: int, verify: bool) -> list[str]:
    notes = []
    if opset < 20:
        notes.append(
            f"opset {opset} has no Gelu node: Gelu is spelled out (Div, Erf, Add, Mul); use opset 20 or later"
        )
    if not verify:
        notes.append("not verified")
    return notes
