"""`to_tensorrt`: from a module, or an ONNX file, to a TensorRT engine and a report of what is in it.

Engines are built by NVIDIA's `tensorrt` or `tensorrt_rtx`, which have one interface. The first needs the GPU that it
builds for; the second builds ahead of time, on any machine, for several architectures at once. Both take precisions as
they stand in the ONNX file (networks are strongly typed).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .build_process import Builder, arch_text
from .commit import together
from .engine import NOT_RUN, Engine, choose_library, verify_engine
from .engine_report import EngineReport, kernels_of_inspector, kernels_of_log, memory_of_log
from .engine_shapes import (
    BATCH,
    Size,
    Triple,
    fix_shape,
    image_input,
    profile_of,
    read_onnx,
    save,
    size_triple,
    triple,
)
from .files import check_target, explaining, temporary_folder, write_atomically
from .graph import precision_of, summarize, walk
from .images import Preprocessing
from .measure import TOLERANCES
from .onnx import to_onnx
from .precision import check_dtype, convert_precision
from .traps import attentions, traps

if TYPE_CHECKING:
    import onnx

Images = Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None


def to_tensorrt(
    source: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    batch: int | Triple | None = None,
    sizes: Sequence[Size] | None = None,
    archs: Sequence[str] = (),
    workspace: int | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    tf32: bool = False,
    plugins: Sequence[str | os.PathLike[str]] = (),
    library: str | None = None,
    model: nn.Module | None = None,
    images: Images = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    verify: bool = True,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    export: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> EngineReport:
    """Build a TensorRT engine, and write it together with its report, `<path>.json`.

    Where torch sees a GPU the engine also runs: it is compared with the module and timed before it is written. On any
    failure neither file is written, and files that were there before are as they were.

    Args:
        source: a module, which goes through `to_onnx` first, or an ONNX file with one image input.
        path: where to; ends with `.engine`.
        dtype: 'float32', 'float16' or 'bfloat16'; default: as in the file, 'float32' for a module. Inputs and outputs
            keep their types.
        batch: least, best and largest batch of the engine, or one number to fix it (TensorRT then fuses more);
            default: 1, 8, 32 where the batch is open.
        sizes: least, best and largest image, pixels or (height, width) each, where those are open.
        archs: GPU architectures, such as 'sm_89'; default: for TensorRT-RTX all that it offers from Ampere on, for
            TensorRT the GPU at hand.
        workspace: limit of the scratch memory, in bytes; default: TensorRT's.
        timing_cache: a file to read and to update; TensorRT only.
        threads: how many build; default: as many as this process may use.
        tf32: let float32 products round to TF32, which is faster.
        plugins: libraries of TensorRT plugins, which become part of the engine.
        library: 'tensorrt' or 'tensorrt_rtx'; default: TensorRT where it is installed and there is a GPU.
        model: the module that an ONNX file was made from, to compare the engine with where there is a GPU.
        images, preprocessing: of the comparison, see `verify_onnx`.
        verify: verify the ONNX file that a module becomes, and the engine where there is a GPU.
        rtol, atol: tolerances of the engine's comparison; default: `vitrail.export.TOLERANCES`.
        seed: of the noise in comparisons.
        export: further arguments of `to_onnx`, for a module.
        progress: called with a line of text before each step.

    Returns:
        the report; `report.ran` says whether the engine has run.

    Raises:
        ExportError: the module can't be exported, the file is not ONNX with one image input, TensorRT doesn't take a
            node or can't build the engine; the message has its reasons and the modules they lie in.
        VerificationError: an ExportError; the engine differs from the module.
        ValueError, TypeError: wrong arguments, such as an unknown architecture or a batch that the file doesn't have.
        OSError: a file can't be read or written.
        ImportError: TensorRT is not installed.
    """
    say = progress or (lambda text: None)
    target = check_target(path, ".engine")
    span = None if batch is None else triple(batch)
    spread = None if sizes is None else size_triple(sizes)
    if dtype is not None:
        check_dtype(dtype)
    library = choose_library(library)
    if timing_cache is not None and library == "tensorrt_rtx":
        raise ValueError(
            "TensorRT-RTX times nothing when it builds and has no timing cache; leave timing_cache out"
        )
    plugins = [os.fspath(Path(plugin).resolve(strict=True)) for plugin in plugins]
    builder = Builder(library)
    chosen = builder.architectures(archs)
    with temporary_folder() as folder:
        started = time.perf_counter()
        if isinstance(source, nn.Module):
            model = source if model is None else model
            options = {
                "dtype": dtype or "float32",
                "images": images,
                "preprocessing": preprocessing,
                "verify": verify,
                "seed": seed,
                **(export or {}),
            }
            proto = _exported(source, folder, span, spread is not None, options, say)
        elif export:
            raise ValueError(
                "export holds arguments of to_onnx, and the source is a file already: leave it out"
            )
        else:
            proto = read_onnx(source)
        info = image_input(proto)
        profile = profile_of(proto, info, span, spread)
        proto = _converted(proto, dtype, say)
        fix_shape(proto, info, profile)
        notes = traps(proto, open_batch=profile[0][0] != profile[-1][0])
        onnx_file, new_cache = save(proto, folder / "prepared.onnx"), folder / "cache"
        prepared = time.perf_counter() - started
        files = [target, target.with_name(f"{target.name}.json")]
        with together(files) as (engine, beside):
            say(f"building the engine with {builder.name}")
            answer = builder.build(
                _names_by_type(proto),
                onnx=os.fspath(onnx_file),
                engine=os.fspath(engine),
                target=os.fspath(target),
                profile={info.name: profile} if profile[0] != profile[-1] else {},
                archs=chosen,
                workspace=workspace or 0,
                timing_cache=os.path.abspath(timing_cache) if timing_cache is not None else "",
                new_cache=os.fspath(new_cache),
                threads=threads or _cores(),
                tf32=tf32,
                plugins=plugins,
            )
            if timing_cache is not None:
                write_atomically(Path(os.path.realpath(timing_cache)), new_cache.read_bytes())
            report = EngineReport(
                path=os.fspath(path),
                library=builder.name,
                archs=tuple(map(arch_text, chosen)),
                profile={info.name: profile},
                seconds={"prepare": prepared, "build": answer["seconds"]},
                notes=tuple(notes),
                **_facts_of_file(proto, source),
                **_facts_of_engine(engine, answer),
            )
            if torch.cuda.is_available():
                usual = TOLERANCES[report.dtype]
                tolerances = usual[0] if rtol is None else rtol, usual[1] if atol is None else atol
                compared = model if verify else None
                report = _tried(
                    report, engine, library, compared, images, preprocessing, tolerances, seed, say
                )
            else:
                report = replace(report, notes=(*report.notes, NOT_RUN))
            say("writing the engine and its report")
            text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
            with explaining(files[1], len(text)):
                beside.write_text(text)
    return report


def _exported(
    model: nn.Module, folder: Path, batch: Triple | None, open_sides: bool, options: dict[str, Any], say: Any
) -> onnx.ModelProto:
    """The module as an ONNX file with those axes open that the engine is to vary in."""
    axes = ["height", "width"] if open_sides else []
    if (batch or BATCH) != (1, 1, 1):
        axes.append("batch")
    file = folder / "exported.onnx"
    to_onnx(model, file, dynamic=axes, progress=say, **options)
    return read_onnx(file)


def _converted(proto: onnx.ModelProto, dtype: str | None, say: Callable[[str], None]) -> onnx.ModelProto:
    """The graph in `dtype`.

    Raises:
        ValueError: it is in another precision than float32 already.
    """
    present = precision_of(proto)
    if dtype is None or dtype == present:
        return proto
    if present != "float32":
        raise ValueError(
            f"the file is in {present}, and only float32 files can become {dtype}: start from that one"
        )
    say(f"converting to {dtype}")
    return convert_precision(proto, dtype)


def _names_by_type(proto: onnx.ModelProto) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for node in walk(proto.graph):
        names.setdefault(node.op_type, []).append(node.name)
    return names


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _facts_of_file(proto: onnx.ModelProto, source: object) -> dict[str, Any]:
    meta = {entry.key: entry.value for entry in proto.metadata_props}
    summary = summarize(proto)
    fallback = type(source).__name__ if isinstance(source, nn.Module) else Path(str(source)).name
    return {
        "model": meta.get("model", fallback),
        "dtype": precision_of(proto),
        "inputs": summary.inputs,
        "outputs": summary.outputs,
        "attentions": attentions(proto.graph),
        "metadata": meta,
    }


def _facts_of_engine(engine: Path, answer: Mapping[str, Any]) -> dict[str, Any]:
    inspected = answer["inspected"]
    digest = hashlib.sha256()
    with open(engine, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return {
        "size_bytes": engine.stat().st_size,
        "sha256": digest.hexdigest(),
        "network_layers": answer["network_layers"],
        "kernels": kernels_of_inspector(inspected["layers"])
        if inspected
        else kernels_of_log(answer["lines"]),
        "plugins": tuple(answer["plugins"]),
        "activation_bytes": inspected["activation"]
        if inspected
        else memory_of_log(answer["lines"], "Activation"),
        "weights_bytes": memory_of_log(answer["lines"], "Weights"),
    }


def _tried(
    report: EngineReport,
    file: Path,
    library: str,
    model: nn.Module | None,
    images: Images,
    preprocessing: Preprocessing | Mapping[str, Any] | None,
    tolerances: tuple[float, float],
    seed: int,
    say: Callable[[str], None],
) -> EngineReport:
    """The report with what running the engine says: comparison and times.

    Raises:
        VerificationError: the engine differs from the module.
    """
    engine = Engine(file, library=library, host_code=bool(report.plugins))
    verification = None
    if model is not None:
        rtol, atol = tolerances
        verification = verify_engine(
            engine,
            model,
            precision=report.dtype,
            images=images,
            preprocessing=preprocessing,
            rtol=rtol,
            atol=atol,
            seed=seed,
            progress=say,
        )
        verification.raise_on_failure()
    say("timing the engine")
    timings = tuple(engine.time(shape) for shape in dict.fromkeys(engine.profile))
    return replace(report, verification=verification, timings=timings)
