"""Engines with plugins: TensorRT takes the nodes of a fused file, and falls back to their functions without them.

The plugins are those over emulated kernels: what an engine is built from, the interface, is the same.
"""

import pytest

pytest.importorskip("tensorrt_rtx")

import onnx
import timm
import torch

from vitrail.export import to_onnx, to_tensorrt
from vitrail.export.functions import DOMAIN
from vitrail.ops import library
from vitrail.zoo.inference import standard_form

from ..csrc.plugins import EMULATED_PLUGINS

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def plugins():
    return library.build(part=EMULATED_PLUGINS, progress=lambda *_: None)


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """The fused file of a model, by its name; made once."""
    folder, made = tmp_path_factory.mktemp("fused"), {}

    def file(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = folder / f"{name}.onnx"
            model = timm.create_model(name, num_classes=10).eval()
            to_onnx(model, made[name], operators="fused", rewrite=standard_form, verify=False)
        return made[name]

    return file


def nodes_of(path):
    return sum(node.domain == DOMAIN for node in onnx.load(path).graph.node)


def of_plugins(report):
    """Layers of the engine that are a plugin's."""
    return sum(kernel.type == "custom_layer" for kernel in report.kernels)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("biformer_pico", "float32"),
        ("biformer_pico", "float16"),
        ("biformer_pico", "bfloat16"),
        ("davit_fused_pico", "float16"),
        ("sparsifiner_pico", "float16"),
        ("stripmlp_pico", "float16"),
        ("stvit_swin_pico", "float16"),
    ],
)
def test_every_node_is_a_plugin_in_the_engine(fused, plugins, tmp_path, name, dtype):
    report = to_tensorrt(
        fused(name), tmp_path / "m.engine", dtype=dtype, batch=(1, 2, 8), archs=["sm_89"], plugins=[plugins]
    )
    assert len(report.plugins) == of_plugins(report) == nodes_of(fused(name)) > 0
    # the engine carries the library, and so runs where there is none
    assert report.size_bytes > plugins.stat().st_size


@pytest.mark.parametrize("name", ["biformer_pico", "sparsifiner_pico"])
def test_without_plugins_the_functions_are_built(fused, tmp_path, name):
    report = to_tensorrt(fused(name), tmp_path / "m.engine", batch=(1, 2, 8), archs=["sm_89"], plugins=[])
    assert len(report.plugins) == of_plugins(report) == 0
