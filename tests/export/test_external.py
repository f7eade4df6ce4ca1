"""Weights in a file of their own: where one file can't hold them, and only there."""

import os
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import helper, numpy_helper
from torch import nn

from vitrail.export import VerificationError, external, to_onnx, verify_onnx


@pytest.fixture
def low_limit(monkeypatch):
    monkeypatch.setattr("vitrail.export.external.ONE_FILE", 2000)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.GELU(), nn.Conv2d(32, 32, 1)).eval()


def export(folder, seed=0, **kwargs):
    return to_onnx(model(seed), folder / "m.onnx", img_size=16, **kwargs)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def weights_of(path):
    graph = onnx.load(path, load_external_data=False).graph
    return {entry.value for t in graph.initializer for entry in t.external_data if entry.key == "location"}


def test_small_models_are_one_file(tmp_path):
    export(tmp_path, verify=False)
    assert names(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_models_are_a_file_and_its_weights(low_limit, tmp_path, dtype):
    report = export(tmp_path, dtype=dtype)
    (data,) = weights_of(tmp_path / "m.onnx")
    assert names(tmp_path) == sorted([data, "m.onnx"])
    assert re.fullmatch(r"m\.[0-9a-f]{16}\.onnx\.data", data)
    assert report.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert report.verification.passed
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    assert verify_onnx(tmp_path / "m.onnx", model()).passed
    assert not verify_onnx(tmp_path / "m.onnx", model(1)).passed


def test_onnx_runtime_loads_the_pair_from_anywhere(low_limit, tmp_path):
    export(tmp_path, verify=False)
    moved = tmp_path.parent / f"{tmp_path.name} moved"
    tmp_path.rename(moved)
    session = onnxruntime.InferenceSession(moved / "m.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(2, 3, 16, 16)
    np.testing.assert_allclose(
        session.run(None, {"input": x.numpy()})[0], model()(x).detach(), rtol=1e-4, atol=1e-5
    )


def test_a_new_pair_replaces_the_old_one(low_limit, tmp_path):
    export(tmp_path, verify=False)
    (old,) = weights_of(tmp_path / "m.onnx")
    (tmp_path / "other.0123456789abcdef.onnx.data").write_bytes(b"another model's")
    export(tmp_path, seed=1, verify=False)
    (new,) = weights_of(tmp_path / "m.onnx")
    assert new != old
    assert names(tmp_path) == sorted([new, "m.onnx", "other.0123456789abcdef.onnx.data"])


def test_a_single_file_replaces_a_pair(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("vitrail.export.external.ONE_FILE", 2000)
        export(tmp_path, verify=False)
    assert len(names(tmp_path)) == 2
    export(tmp_path, verify=False)
    assert names(tmp_path) == ["m.onnx"]


def test_the_same_model_gives_the_same_pair(low_limit, tmp_path):
    export(tmp_path, verify=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    export(tmp_path, verify=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def pair_of(value):
    """A model of one weight that is written as a pair."""
    weight = numpy_helper.from_array(np.full(1000, value, np.float32), "w")
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1000])
    return helper.make_model(
        helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [result], [weight])
    )


def publish(target, value):
    with external.scratch_pair(pair_of(value), target) as pair:
        external.publish(pair, target)


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_the_old_pair_and_nothing_else(tmp_path, monkeypatch, step, call, error):
    publish(tmp_path / "m.onnx", 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, calls = getattr(os, step), []

    def fail(*args):
        calls.append(args)
        if len(calls) > call:
            raise error
        return real(*args)

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        publish(tmp_path / "m.onnx", 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_pair_that_fails_its_verification_leaves_the_old_one(low_limit, tmp_path):
    publish(tmp_path / "m.onnx", 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(VerificationError):
        export(tmp_path, rtol=0, atol=0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_a_model_of_more_than_two_gib(tmp_path):
    torch.manual_seed(0)
    giant = timm.create_model("davit_fused_giant").eval()
    report = to_onnx(giant, tmp_path / "m.onnx", dynamic=())
    assert report.size_bytes > 2**31
    assert report.verification.passed
    assert len(names(tmp_path)) == 2
