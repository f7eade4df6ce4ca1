"""Files in 8 bits: what they hold, what is left out and why, and what stops them."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

from vitrail.export import ExportError, Preprocessing, QuantizationError, quantize_onnx, to_onnx
from vitrail.export import quantise as module
from vitrail.export.calibration import METHODS, find_photos, find_ranges, preprocessing_of
from vitrail.export.external import write_pair
from vitrail.export.functions import DOMAIN
from vitrail.export.qdq import Quantiser, Range, find_layers
from vitrail.export.sensitivity import compare, outputs, speedups

from ..csrc.runtime_kernels import portable_kernels, session
from .cuttings import write_cuttings


class Fragile(nn.Module):
    """Two branches, of which one reads tokens whose first channel is a thousand times the others, for nothing."""

    num_classes = 10

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.robust = nn.Linear(width, width)
        self.fragile = nn.Linear(width, width)
        self.head = nn.Linear(width, self.num_classes)
        self.fragile.weight.data[:, 0] = 0
        self.register_buffer("scale", torch.ones(width))
        self.scale[0] = 1000

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((self.robust(x) + self.fragile(x * self.scale)).tanh().mean(1))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 20 cuttings of photos, 48 x 48, some of them in a folder of their own."""
    return write_cuttings(tmp_path_factory.mktemp("photos") / "cuttings")


@pytest.fixture(scope="module")
def fragile(tmp_path_factory):
    """A `Fragile` and its file."""
    torch.manual_seed(0)
    model = Fragile().eval()
    path = tmp_path_factory.mktemp("fragile") / "model.onnx"
    to_onnx(model, path, img_size=32, verify=False)
    return model, path


@pytest.fixture(scope="module")
def quantised(exported, photos, tmp_path_factory):
    """The file of `exported` in 8 bits, all layers of it, and the report."""
    model, source, _ = exported
    path = tmp_path_factory.mktemp("quantised") / "int8.onnx"
    report = quantize_onnx(source, path, calibration=photos, limit=12, model=model, faster_only=False)
    return path, report


def optimised(path, tmp_path):
    """Types of the nodes that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


# --- what is in the file ----------------------------------------------------------------------------------------------


def test_the_runtime_multiplies_integers(quantised, tmp_path):
    path, report = quantised
    found = optimised(path, tmp_path)
    assert {"QLinearConv", "MatMulIntegerToFloat", "QGemm"} <= set(found)
    assert "Conv" not in found
    assert len(report.layers) == 3
    assert report.excluded == ()


def test_weights_are_int8_with_a_scale_for_each_channel_and_activations_uint8(quantised):
    path, _ = quantised
    graph = onnx.load(path).graph
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    of_weights = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in values]
    shapes = {values[n.input[0]].shape: values[n.input[1]].shape for n in of_weights}
    assert shapes == {(16, 3, 8, 8): (16,), (16,): (16,), (16, 48): (48,), (10, 16): (10,), (10,): (10,)}
    assert {str(values[n.input[0]].dtype) for n in of_weights} == {"int8", "int32"}
    zeros = [values[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"]
    assert [(z.dtype, z.shape) for z in zeros] == [(np.uint8, ())] * 4


def test_it_keeps_its_interface_its_operator_set_and_its_metadata(exported, quantised):
    plain, made = onnx.load(exported[1]), onnx.load(quantised[0])
    assert list(made.graph.input) == list(plain.graph.input)
    assert list(made.graph.output) == list(plain.graph.output)
    assert list(made.opset_import) == list(plain.opset_import)
    meta = {entry.key: entry.value for entry in made.metadata_props}
    entry = json.loads(meta.pop("quantization"))
    assert meta == {entry.key: entry.value for entry in plain.metadata_props}
    assert entry["weights"] == "int8, 8 bits, per channel"
    assert entry["activations"] == "uint8, per tensor"
    assert (entry["calibration"], entry["images"], entry["layers"]) == ("minmax", 12, 3)
    assert entry["float32"] == {}
    assert 0 < entry["error"] < 0.1
    assert len(entry["errors"]) == 3


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_it_computes_the_same_at_any_batch_size(exported, quantised, batch):
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)).numpy()
    plain, made = (outputs(Path(path).read_bytes(), images) for path in (exported[1], quantised[0]))
    assert compare(plain, made).error < 0.1
    alone = outputs(Path(quantised[0]).read_bytes(), images, size=1)
    np.testing.assert_allclose(made["logits"], alone["logits"], rtol=1e-5, atol=1e-6)


def test_a_fixed_batch_stays_one(make, photos, tmp_path):
    model = make("Attentive")
    to_onnx(model, tmp_path / "one.onnx", img_size=32, dynamic=(), verify=False)
    report = quantize_onnx(
        tmp_path / "one.onnx", tmp_path / "int8.onnx", calibration=photos, model=model, faster_only=False
    )
    assert [check.batch for check in report.checks] == [1]
    assert report.passed


@pytest.mark.parametrize(
    ("name", "form", "names"),
    [("Pyramid", "features", ["stage0", "stage1"]), ("Headed", "pre_logits", ["pre_logits"])],
)
def test_other_forms_are_verified_output_by_output(make, photos, tmp_path, name, form, names):
    model = make(name)
    to_onnx(model, tmp_path / "m.onnx", img_size=32, form=form, preprocess=True, verify=False)
    report = quantize_onnx(
        tmp_path / "m.onnx", tmp_path / "int8.onnx", calibration=photos, model=model, faster_only=False
    )
    assert report.passed
    assert report.result.top1 is None
    assert [output.name for output in report.graph.outputs] == names
    assert str(report.graph.inputs[0]) == "input uint8 (batch, 32, 32, 3)"


def test_other_readers_of_a_tensor_keep_it_in_float32():
    weight = np.eye(4, dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], "layer"),
        helper.make_node("Add", ["x", "y"], ["z"], "residual"),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4]) for name in "xz"]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made = Quantiser(model, find_layers(model), {"x": Range(-1, 1)}).apply(find_layers(model))
    by_name = {node.name: node for node in made.graph.node}
    assert by_name["residual"].input[0] == "x"
    assert by_name["layer"].input[0] != "x"
    assert "w" not in {t.name for t in made.graph.initializer}


def test_between_two_convolutions_numbers_change_once():
    weights = [numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), name) for name in "vw"]
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["y"], "first"),
        helper.make_node("Conv", ["y", "w"], ["z"], "second"),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 2, 4, 4]) for name in "xz"]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    layers, ranges = find_layers(model), dict.fromkeys("xyz", Range(-4, 4))
    made = Quantiser(model, layers, ranges).apply(layers)
    assert sum(node.op_type == "QuantizeLinear" for node in made.graph.node) == 3
    images = np.ones((3, 2, 4, 4), np.float32)
    np.testing.assert_allclose(outputs(made, images)["z"], outputs(model, images)["z"], atol=0.05)


def test_layers_that_cannot_be_in_8_bits_say_why_and_products_of_activations_are_none():
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32), name) for name in ("w", "left", "scaled")]
    weights.append(numpy_helper.from_array(np.ones((2, 4, 4), np.float32), "stack"))
    weights.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), "biased"))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["c"]),
        helper.make_node("MatMul", ["left", "c"], ["d"]),
        helper.make_node("Gemm", ["d", "scaled"], ["e"], alpha=0.5),
        helper.make_node("Gemm", ["e", "biased", "a"], ["f"]),
        helper.make_node("MatMul", ["f", "stack"], ["y"]),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:], weights))
    assert [(layer.name, layer.weight, layer.obstacle) for layer in find_layers(model)] == [
        ("MatMul_0", "w", "weights shared"),
        ("MatMul_1", "w", "weights shared"),
        ("MatMul_3", "left", "weights on the left"),
        ("Gemm_4", "scaled", "product scaled or transposed"),
        ("Gemm_5", "biased", "bias computed"),
        ("MatMul_6", "stack", "weights of other dimensions"),
    ]


# --- pixels and open sides ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels(exported, tmp_path_factory):
    """The file of `exported` that takes pixels, its normalisation in the first convolution."""
    path = tmp_path_factory.mktemp("pixels") / "model.onnx"
    to_onnx(exported[0], path, img_size=32, preprocess=True, verify=False)
    return path


def test_pixels_go_into_a_convolution_that_normalises_them_as_the_8_bits_they_are(
    exported, pixels, photos, tmp_path
):
    path = tmp_path / "int8.onnx"
    report = quantize_onnx(pixels, path, calibration=photos, limit=12, model=exported[0], faster_only=False)
    assert report.passed
    assert [(check.batch, check.against) for check in report.checks] == [(1, "torch"), (3, "torch")]
    graph = onnx.load(path).graph
    first, read, *_ = graph.node
    assert (first.op_type, first.input[0], read.op_type) == ("Transpose", "input", "DequantizeLinear")
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    assert [values[name] for name in read.input[1:]] == [1, 0]
    found = optimised(path, tmp_path)
    assert found[0] == "QLinearConv"  # ONNX Runtime's reads them as they lie, without the Transpose
    assert "Cast" not in found


def test_pixels_that_something_else_reads_too_stay_there_for_it():
    weight = numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "w")
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["y"], "layer"),
        helper.make_node("ReduceMax", ["t"], ["z"]),
    ]
    info = [helper.make_tensor_value_info("x", TensorProto.UINT8, ["b", 4, 4, 3])]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "yz"]
    graph = helper.make_graph(nodes, "g", info, results, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    layers = find_layers(model)
    made = Quantiser(model, layers, {"t": Range(3, 7), "y": Range(0, 765)}).apply(layers)
    assert [n.op_type for n in made.graph.node].count("Cast") == 1
    images = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), dtype=np.uint8)
    got, expected = outputs(made, images), outputs(model, images)
    assert got["z"] == expected["z"]
    np.testing.assert_allclose(got["y"], expected["y"], atol=1.6)


def test_open_sides_are_verified_at_a_second_size_and_padded_stems_normalise_in_nodes(photos, tmp_path):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 4, 2, 1), nn.GELU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*layers).eval()
    axes = ("batch", "height", "width")
    to_onnx(model, tmp_path / "m.onnx", img_size=32, dynamic=axes, preprocess=True, verify=False)
    report = quantize_onnx(
        tmp_path / "m.onnx", tmp_path / "int8.onnx", calibration=photos, model=model, faster_only=False
    )
    assert report.passed
    assert [(check.size, check.batch) for check in report.checks] == [
        ((32, 32), 1),
        ((32, 32), 3),
        ((69, 19), 3),
    ]
    operators = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert {"Cast", "Mul", "Add", "QuantizeLinear"} <= operators


def test_fused_operators_stay_as_they_are_between_layers_in_8_bits(make, photos, tmp_path):
    model, path = make("Routed", topk=2), tmp_path / "int8.onnx"
    to_onnx(model, tmp_path / "fused.onnx", img_size=32, operators="fused", verify=False)
    report = quantize_onnx(
        tmp_path / "fused.onnx", path, calibration=photos, limit=12, model=model, faster_only=False
    )
    assert {layer.module for layer in report.layers if layer.quantised} == {"stem", "qkv", "head"}
    before, after = (
        [n.op_type for n in onnx.load(file).graph.node if n.domain == DOMAIN]
        for file in (tmp_path / "fused.onnx", path)
    )
    assert before == after == ["region_route", "routed_attention"]
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
    by_functions, by_kernels = (
        session(path.read_bytes(), kernels).run(None, {"input": image})[0]
        for kernels in (None, portable_kernels())
    )
    # an activation between two steps of 8 bits may come out at the other one
    assert by_kernels == pytest.approx(by_functions, abs=2e-2 * float(np.abs(by_functions).max()))


def test_pixels_are_not_normalised_in_another_way_than_the_file_does(pixels, photos, tmp_path):
    with pytest.raises(
        ValueError, match=r"normalises them with a mean of \(0\.485, .*leave mean out, or export"
    ):
        quantize_onnx(
            pixels, tmp_path / "x.onnx", calibration=photos, preprocessing={"mean": (0.5, 0.5, 0.5)}
        )


# --- what is left in float32 ------------------------------------------------------------------------------------------


def test_a_sensitive_layer_is_found_and_stays_in_float32_and_no_other(fragile, photos, tmp_path):
    model, source = fragile
    path = tmp_path / "int8.onnx"
    report = quantize_onnx(source, path, calibration=photos, model=model, faster_only=False, max_error=0.05)
    worst, *others = report.layers
    assert worst.module == "fragile"
    assert worst.error > 10 * others[0].error
    assert [layer.module for layer in report.excluded] == ["fragile"]
    assert worst.verdict == "float32: sensitive"
    assert worst.after == report.result.error <= 0.05 < report.everything.error
    made = onnx.load(path)
    entry = json.loads(next(e.value for e in made.metadata_props if e.key == "quantization"))
    assert entry["float32"] == {worst.name: "sensitive"}
    kept = {t.name for t in made.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    assert len(kept) == 1


def test_the_report_shows_layers_by_their_error_and_what_became_of_them(fragile, photos, tmp_path):
    from rich.console import Console

    report = quantize_onnx(
        fragile[1], tmp_path / "x.onnx", calibration=photos, limit=12, faster_only=False, max_error=0.05
    )
    console = Console(width=150)
    with console.capture() as capture:
        console.print(report.table())
    lines = capture.get().splitlines()
    begun = next(i for i, line in enumerate(lines) if "where the error comes from, by layer" in line)
    rows = [line for line in lines[begun:] if "MatMul" in line or "Conv" in line or "Gemm" in line]
    assert ["fragile" in row and "float32: sensitive" in row for row in rows] == [True, False, False, False]
    assert any("against float32 file" in line for line in lines)
    assert any("8, not calibrated with" in line for line in lines)


def test_a_layer_that_cannot_be_in_8_bits_is_listed_with_the_reason(exported, photos, tmp_path):
    from rich.console import Console

    plain = onnx.load(exported[1])
    (head,) = (node for node in plain.graph.node if node.op_type == "Gemm")
    next(attribute for attribute in head.attribute if attribute.name == "alpha").f = 0.5
    report = quantize_onnx(
        plain.SerializeToString(), tmp_path / "int8.onnx", calibration=photos, faster_only=False
    )
    assert [(x.module, x.verdict) for x in report.excluded] == [
        ("head", "float32: product scaled or transposed")
    ]
    entry = json.loads(report.metadata["quantization"])
    assert entry["float32"] == {report.excluded[0].name: "product scaled or transposed"}
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report.table())
    assert "2 in 8 bits; in float32: 1 product scaled or transposed" in capture.get()


def test_a_wide_tolerance_keeps_it_in_8_bits(fragile, photos, tmp_path):
    report = quantize_onnx(
        fragile[1], tmp_path / "int8.onnx", calibration=photos, faster_only=False, max_error=0.99
    )
    assert report.excluded == ()
    assert report.everything == report.result
    assert report.layers[0].together >= report.layers[0].error


def test_layers_that_are_no_faster_stay_in_float32(exported, photos, tmp_path, monkeypatch):
    model, source, _ = exported
    by_type = {"Conv": 0.9, "MatMul": 2.0, "Gemm": 1.2}
    monkeypatch.setattr(
        module, "speedups", lambda model, layers, *_: {x.name: by_type[x.op_type] for x in layers}
    )
    report = quantize_onnx(source, tmp_path / "int8.onnx", calibration=photos, model=model)
    assert [(x.operator, x.verdict, x.speedup) for x in report.excluded] == [
        ("Conv", "float32: no faster", 0.9)
    ]
    assert report.excluded[0].error is None
    assert report.settings["least_speedup"] == 1.1
    monkeypatch.setattr(
        module, "speedups", lambda model, layers, *_: dict.fromkeys((x.name for x in layers), 0.5)
    )
    with pytest.raises(
        ExportError, match=r"none of the 3 layers faster on this machine \(the best by 0.50x\)"
    ):
        quantize_onnx(source, tmp_path / "none.onnx", calibration=photos)
    assert not (tmp_path / "none.onnx").exists()


def test_every_layer_is_timed_in_both_precisions(exported):
    plain = onnx.load(exported[1])
    layers = find_layers(plain)
    image = np.zeros((1, 3, 32, 32), np.float32)
    ranges = {name: Range(-1, 1) for layer in layers for name in (layer.input, layer.output)}
    found = speedups(plain, layers, ranges, image, lambda *_: None)
    assert set(found) == {layer.name for layer in layers}
    assert all(0 < ratio < 100 for ratio in found.values())


# --- what stops it ----------------------------------------------------------------------------------------------------


def test_a_tolerance_that_cannot_be_met_leaves_the_old_file_and_says_who_is_to_blame(
    exported, photos, tmp_path
):
    path = tmp_path / "int8.onnx"
    path.write_bytes(b"old")
    with pytest.raises(
        QuantizationError, match="with one layer left in 8 bits the outputs still have"
    ) as caught:
        quantize_onnx(exported[1], path, calibration=photos, faster_only=False, max_error=1e-7)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert caught.value.report.layers[0].module in str(caught.value)
    json.dumps(caught.value.report.to_dict(), allow_nan=False)


def test_a_file_of_another_model_is_not_taken_for_this_one(make, exported, photos, tmp_path):
    other = make("Attentive")
    other.head.weight.data.neg_()
    with pytest.raises(QuantizationError, match="too far from the torch model: error"):
        quantize_onnx(exported[1], tmp_path / "int8.onnx", calibration=photos, model=other, faster_only=False)
    assert not (tmp_path / "int8.onnx").exists()


def test_it_is_verified_on_images_that_it_has_not_seen_where_there_are_enough(photos):
    found = find_photos(photos, limit=12)
    assert (len(found.calibration), len(found.verification), found.held_out) == (12, 8, True)
    found = find_photos(photos, limit=100)
    assert (len(found.calibration), found.held_out) == (20, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "mean"}, "method must be one of minmax, entropy, percentile, got 'mean'"),
        ({"limit": 3}, "at least 8 images are needed to calibrate with, got a limit of 3"),
        ({"max_error": 0}, "max_error must lie between 0 and 1, got 0"),
        ({"min_top1": 1.5}, "min_top1 is a share and must lie between 0 and 1, got 1.5"),
        ({"weight_bits": 4}, "weight_bits must be 8 or 7, got 4"),
        ({"probes": 0}, "probes must be at least 1, got 0"),
        ({"preprocessing": {"blur": 1}}, "preprocessing has no blur; its fields are mean, std"),
    ],
)
def test_wrong_arguments_are_named(exported, photos, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_onnx(exported[1], tmp_path / "x.onnx", **{"calibration": photos, **arguments})


def test_a_folder_without_images_with_too_few_or_with_a_broken_one_is_refused(exported, tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(FileNotFoundError, match=r"no such image or folder: .*folder"):
        quantize_onnx(exported[1], tmp_path / "x.onnx", calibration=folder)
    folder.mkdir()
    with pytest.raises(ValueError, match=r"the folder .* holds no image"):
        quantize_onnx(exported[1], tmp_path / "x.onnx", calibration=folder)
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    with pytest.raises(ValueError, match="1 image is too few to calibrate with: give at least 8"):
        quantize_onnx(exported[1], tmp_path / "x.onnx", calibration=folder)
    for i in range(1, 9):
        (folder / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png is not an image that can be read"):
        quantize_onnx(exported[1], tmp_path / "x.onnx", calibration=folder)


def test_files_that_cannot_be_quantised_say_why(quantised, fragile, photos, tmp_path):
    with pytest.raises(ExportError, match="is quantised already; start from the float32 file"):
        quantize_onnx(quantised[0], tmp_path / "x.onnx", calibration=photos)
    with pytest.raises(ExportError, match="is no ONNX file"):
        quantize_onnx(b"no file", tmp_path / "x.onnx", calibration=photos)
    (tmp_path / "pair").mkdir()
    write_pair(onnx.load(fragile[1]), tmp_path / "pair" / "m.onnx")
    with pytest.raises(ExportError, match=r"weights lie in a second file.*onnx\.save\(onnx\.load"):
        quantize_onnx(tmp_path / "pair" / "m.onnx", tmp_path / "x.onnx", calibration=photos)
    to_onnx(nn.AvgPool2d(2), tmp_path / "pool.onnx", img_size=32, verify=False)
    with pytest.raises(ExportError, match="has nothing to quantise: no Conv, MatMul or Gemm"):
        quantize_onnx(tmp_path / "pool.onnx", tmp_path / "x.onnx", calibration=photos)


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_ranges_follow_the_values_and_the_finer_methods_cut_outliers_off(method):
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 1, 100, 100]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", info[:1], info[1:]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    images = np.random.default_rng(0).normal(size=(40, 1, 100, 100)).astype(np.float32)
    images[0, 0, 0, 0] = 100
    counted = []
    found = find_ranges(model, ["x", "y"], images, method, lambda *state: counted.append(state))
    assert found["y"].low == 0
    assert found["x"].low == pytest.approx(-4.5, abs=1)
    if method == "minmax":
        assert found["y"].high == 100
    else:
        assert 3 < found["y"].high < 60
    assert counted[-1] == (40, 40, f"calibrating ({method})")


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(-1, 1, 128), (0.5, 2.55, 0), (-2.55, -1, 255), (0, 0, 0)]
)
def test_zero_is_a_number_of_every_scale(low, high, expected):
    scale, zero = Range(low, high).scale()
    assert scale > 0
    assert zero == pytest.approx(expected, abs=1)


def test_preprocessing_comes_from_the_file():
    meta = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]", "interpolation": "bilinear"}
    expected = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")
    assert preprocessing_of(meta) == expected
    assert preprocessing_of(meta, {"crop_pct": 1.0}).crop_pct == 1
    assert preprocessing_of({}) == Preprocessing()
