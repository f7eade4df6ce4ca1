"""Whatever writes a file, each at its smallest, by the name of the file that it writes."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from PIL import Image

from vitrail.export import build_process, quantize_onnx, to_onnx, to_tensorrt
from vitrail.export.external import publish, scratch_pair
from vitrail.export.files import write_atomically

BUILDER = Path(__file__).with_name("builder_stand_in.py")
"""Builds engines in no time, in a process as the real one is."""


class Tiny(torch.nn.Sequential):
    """The smallest model there is."""

    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 4, 4, 4), torch.nn.Flatten())


def prepare(folder):
    """Put into `folder` what the writers start from: a float32 file and photos."""
    torch.manual_seed(0)
    to_onnx(Tiny().eval(), folder / "source.onnx", img_size=16, verify=False)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    (folder / "photos").mkdir()
    for i, photo in enumerate(pixels):
        Image.fromarray(photo).save(folder / "photos" / f"{i}.png")


def _bytes(target, _given, _say):
    write_atomically(target, bytes(100_000))


def _many_bytes(target, _given, _say):
    write_atomically(target, bytes(20_000_000))


def _onnx(target, _given, say):
    to_onnx(Tiny().eval(), target, img_size=16, verify=False, progress=say)


def _verified(target, _given, say):
    to_onnx(Tiny().eval(), target, img_size=16, progress=say)


def weight(value=0):
    """A model of a weight alone."""
    weights = numpy_helper.from_array(np.full(5000, value, np.float32), "w")
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [5000])
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [result], [weights])
    return helper.make_model(graph)


def _pair(target, _given, _say):
    with scratch_pair(weight(), target) as pair:
        publish(pair, target)


def _int8(target, given, say):
    quantize_onnx(
        given / "source.onnx",
        target,
        calibration=given / "photos",
        faster_only=False,
        progress=lambda done, total, text: say(text),
    )


def _engine(target, given, say, script=BUILDER):
    real, build_process._SCRIPT = build_process._SCRIPT, script or build_process._SCRIPT
    try:
        to_tensorrt(given / "source.onnx", target, batch=1, archs=["sm_89"], progress=say)
    finally:
        build_process._SCRIPT = real


def _real_engine(target, given, say):
    _engine(target, given, say, script=None)


WRITERS = {
    "bytes.bin": _bytes,
    "model.onnx": _onnx,
    "pair.onnx": _pair,
    "int8.onnx": _int8,
    "m.engine": _engine,
}
"""Functions of the target, of the folder that was prepared, and of what is told about progress."""

KILLED = WRITERS | {"many_bytes.bin": _many_bytes, "verified.onnx": _verified, "real.engine": _real_engine}
"""Those, and others that take longer."""


def files_of(name):
    """The names of the files that a writer writes, as far as they are known beforehand."""
    return [name, f"{name}.json"] if name.endswith(".engine") else [name]
