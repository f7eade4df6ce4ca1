"""Engines are really built here, by TensorRT-RTX, which needs no GPU; what is in them is read from log and bytes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from vitrail.export import ExportError, VerificationError, to_onnx, to_tensorrt
from vitrail.export import build_process, engine_shapes
from vitrail.export import tensorrt as module
from vitrail.zoo.inference import standard_form

from .gpu_stand_in import gpu

# attentions in the file, and how many of them TensorRT-RTX computes in one kernel in float16
FAMILIES = {
    "biformer_pico": (4, 2),
    "davit_fused_pico": (6, 5),
    "sparsifiner_pico": (0, 0),
    "stripmlp_pico": (0, 0),
    "stvit_deit_pico": (0, 0),
    "stvit_swin_pico": (0, 0),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`files(name)`: a model's ONNX file and the modules that its nodes come from, made once."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=10).eval()
            path = tmp_path_factory.mktemp(name) / "m.onnx"
            to_onnx(model, path, verify=False, rewrite=standard_form)
            made[name] = path, {path for path, _ in standard_form(model).named_modules()}
        return made[name]

    return make


def share_of_weights(engine, file, dtype):
    """Which part of the file's weights stands in the engine, number for number, in one of the layouts it may have."""
    found = total = 0
    for tensor in onnx.load(file).graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < 32:
            continue
        total += values.size
        layouts = [values, values.T, values.transpose(0, 2, 3, 1)] if values.ndim == 4 else [values, values.T]
        kinds = {dtype, "float32"}  # norms stay in float32
        texts = (np.ascontiguousarray(layout.astype(kind)).tobytes() for layout in layouts for kind in kinds)
        found += values.size * any(text in engine for text in texts)
    return found / total


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_an_engine_of_every_family_builds_in_float32_and_float16_with_a_free_batch(name, files, tmp_path):
    file, modules = files(name)
    attentions, fused = FAMILIES[name]
    reports = {}
    for dtype in ("float32", "float16"):
        target = tmp_path / f"{dtype}.engine"
        report = reports[dtype] = to_tensorrt(file, target, dtype=dtype, batch=(1, 8, 32), threads=1)
        engine = target.read_bytes()
        assert json.loads((tmp_path / f"{dtype}.engine.json").read_text()) == json.loads(
            json.dumps(report.to_dict())
        )
        assert (report.size_bytes, report.dtype, report.ran) == (len(engine), dtype, False)
        assert report.profile == {"input": ((1, 3, 32, 32), (8, 3, 32, 32), (32, 3, 32, 32))}
        assert report.archs == ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
        assert sum(report.kernel_types.values()) > 10
        computed = {module for kernel in report.kernels for module in kernel.modules}
        assert computed
        assert computed <= modules
        assert report.attentions == attentions
        assert share_of_weights(engine, file, dtype) > 0.9
    assert len(reports["float32"].fused_attentions) == 0
    assert len(reports["float16"].fused_attentions) == fused
    assert reports["float16"].weights_bytes < 0.75 * reports["float32"].weights_bytes
    assert reports["float16"].activation_bytes < reports["float32"].activation_bytes
