"""BiFormer, whose routing is what exporters usually write badly."""

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch

from vitrail.export import to_onnx, verify_onnx
from vitrail.ops import use_ops


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """biformer_tiny at 224 x 224 with its file and report."""
    torch.manual_seed(0)
    model = timm.create_model("biformer_tiny").eval()
    path = tmp_path_factory.mktemp("biformer") / "tiny.onnx"
    return model, path, to_onnx(model, path)


def short(name, **kwargs):
    """A BiFormer of one block per stage."""
    torch.manual_seed(0)
    return timm.create_model(name, depths=(1, 1, 1, 1), **kwargs).eval()


def test_the_graph_is_written_for_runtimes(tiny):
    model, _, report = tiny
    found = report.graph.operators
    assert "GatherElements" not in found
    assert "Expand" not in found
    assert "Erf" not in found
    assert found["LayerNormalization"] == sum(isinstance(m, torch.nn.LayerNorm) for m in model.modules())
    assert found["Gelu"] == sum(isinstance(m, torch.nn.GELU) for m in model.modules())
    assert (found["ArgMax"], found["TopK"]) == (2, 10)
    assert report.notes == ()


def test_the_file_agrees_with_torch_to_rounding(tiny):
    _, _, report = tiny
    assert report.verification.passed
    assert max(check.max_relative for check in report.verification.checks) < 1e-5
    assert all(check.top1 == check.images for check in report.verification.checks)


@pytest.mark.parametrize("batch", [2, 4])
def test_the_batch_is_free(tiny, batch):
    model, path, _ = tiny
    images = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(images).numpy()
    np.testing.assert_allclose(
        session.run(None, {"input": images.numpy()})[0], expected, rtol=1e-4, atol=1e-5
    )


def test_the_file_agrees_with_the_reference_operators_too(tiny):
    model, path, _ = tiny
    with use_ops("reference"):
        assert verify_onnx(path, model).passed


@pytest.mark.parametrize("name", ["biformer_stl", "biformer_stl_nchw"])
def test_the_feature_pyramid_exports_at_a_size_that_needs_padding(tmp_path, name):
    report = to_onnx(short(name), tmp_path / "m.onnx", img_size=(100, 132), form="features")
    assert [value.name for value in report.outputs] == ["stage0", "stage1", "stage2", "stage3"]
    assert report.outputs[0].shape[2:] == (25, 33)
    assert {node.domain for node in onnx.load(tmp_path / "m.onnx").graph.node} <= {"", "ai.onnx"}
    assert "GatherElements" not in report.graph.operators


@pytest.mark.long
def test_height_and_width_are_free_at_any_size(tmp_path):
    model = short(
        "biformer_stl", embed_dims=(16, 16, 16, 32), head_dim=8, topks=(1, 4, -2, -2), num_classes=5
    )
    report = to_onnx(model, tmp_path / "m.onnx", dynamic=("batch", "height", "width"))
    assert [text.split()[0] for text in report.dynamic.values()] == ["any"] * 3
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch, *size in ((1, 32, 32), (3, 100, 131), (2, 224, 96)):
        images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = model(images).numpy()
        np.testing.assert_allclose(
            session.run(None, {"input": images.numpy()})[0], expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.long
def test_regions_that_round_down_leave_the_sizes_open_too(tmp_path):
    model = short("biformer_stl_nchw", embed_dims=(16, 16, 16, 32), head_dim=8, topks=(1, 4, -2, -2))
    report = to_onnx(model, tmp_path / "m.onnx", dynamic=("height", "width"))
    assert report.dynamic == dict.fromkeys(("height", "width"), "any (proven from 64 on)")
    assert len({check.shape for check in report.verification.checks}) > 1
