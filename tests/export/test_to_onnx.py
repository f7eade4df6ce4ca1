import io
import json
import logging
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.export import ExportError, VerificationError, to_onnx


def load(path):
    return onnx.load(path)


def operators(path):
    return [node.op_type for node in load(path).graph.node]


def run(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": images.numpy()})


# --- the file ----------------------------------------------------------------------------------------------


def test_the_file_holds_standard_operators_only(exported):
    model = load(exported[1])
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [entry.domain for entry in model.opset_import] == [""]
    assert not model.functions
    onnx.checker.check_model(model, full_check=True)


def test_input_output_and_batch_axis_have_plain_names(exported):
    _, _, report = exported
    assert [str(value) for value in report.inputs] == ["input float (batch, 3, 32, 32)"]
    assert [str(value) for value in report.outputs] == ["logits float (batch, 10)"]
    assert report.dynamic == {"batch": "any"}


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_file_computes_what_the_model_computes_at_any_batch_size(exported, batch):
    model, path, _ = exported
    images = torch.randn(batch, 3, 32, 32)
    np.testing.assert_allclose(run(path, images)[0], model(images).detach(), rtol=1e-4, atol=1e-6)


def test_layer_norm_and_gelu_are_single_nodes(exported):
    found = operators(exported[1])
    assert found.count("LayerNormalization") == 1
    assert found.count("Gelu") == 1
    assert "Erf" not in found


def test_attention_is_two_products_and_a_softmax_without_shape_arithmetic(exported):
    found = operators(exported[1])
    assert found.count("Softmax") == 1
    assert not {"Shape", "Slice", "Expand"} & set(found)


def test_weights_keep_the_names_of_the_state_dict(exported):
    model, path, _ = exported
    names = {tensor.name for tensor in load(path).graph.initializer}
    assert {"stem.weight", "norm.weight", "head.bias"} <= names & set(model.state_dict())


def test_nothing_of_the_machine_that_traced_it_is_in_the_file(exported, tmp_path):
    content = exported[1].read_bytes()
    assert b"site-packages" not in content
    assert b"forward" not in content
    assert str(tmp_path.parent).encode() not in content


def test_the_metadata_tells_how_to_feed_the_file(make, tmp_path):
    model = make("Attentive")
    model.pretrained_cfg = {
        "architecture": "attentive",
        "tag": "v1",
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "license": "mit",
        "input_size": (3, 24, 40),
    }
    to_onnx(model, tmp_path / "m.onnx", metadata={"owner": "me", "classes": ["a", "b"]})
    found = {entry.key: entry.value for entry in load(tmp_path / "m.onnx").metadata_props}
    assert found["model"] == "attentive.v1"
    assert json.loads(found["input_size"]) == [3, 24, 40]
    assert json.loads(found["mean"]) == [0.5] * 3
    assert found["interpolation"] == "bilinear"
    assert found["crop_pct"] == "0.9"
    assert found["num_classes"] == "10"
    assert found["license"] == "mit"
    assert found["torch"] == torch.__version__
    assert found["owner"] == "me"
    assert json.loads(found["classes"]) == ["a", "b"]
    config = json.loads(found["config"])
    assert config["class"].endswith("conftest.Attentive")
    assert (config["architecture"], config["img_size"], config["num_classes"]) == ("attentive", [24, 40], 10)
    assert {found[key] for key in ("form", "dtype", "input_layout")} == {
        "classifier",
        "float32",
        "float32 NCHW",
    }
    assert found["timm"] == timm.__version__
    assert found["onnx"] == onnx.__version__


def test_the_names_of_the_classes_are_noted_in_the_file(make, tmp_path):
    names = [f"class {i}" for i in range(10)]
    report = to_onnx(make("Attentive"), tmp_path / "m.onnx", img_size=32, classes=names, verify=False)
    assert json.loads(report.metadata["classes"]) == names


def test_exporting_twice_gives_the_same_bytes(exported, tmp_path):
    model, path, _ = exported
    to_onnx(model, tmp_path / "again.onnx", img_size=32)
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_the_ends_of_the_opset_range_work(make, tmp_path, opset):
    report = to_onnx(make("Attentive"), tmp_path / "m.onnx", img_size=32, opset=opset)
    assert load(tmp_path / "m.onnx").opset_import[0].version == report.opset == opset
    assert ("Gelu" in report.graph.operators) == (opset >= 20)
    assert ("Attention" in report.graph.operators) == (opset >= 23)
    assert any("no Gelu node" in note for note in report.notes) == (opset < 20)


@pytest.mark.parametrize("topk", [1, 3])
def test_routing_gathers_whole_regions_and_picks_one_by_argmax(make, tmp_path, topk):
    report = to_onnx(make("Routed", topk=topk), tmp_path / "m.onnx", img_size=64)
    found = operators(tmp_path / "m.onnx")
    assert "GatherElements" not in found
    assert "Gather" in found
    assert ("ArgMax" in found, "TopK" in found) == ((True, False) if topk == 1 else (False, True))
    assert not report.notes


def test_a_static_file_fixes_every_size(make, tmp_path):
    report = to_onnx(make("Attentive"), tmp_path / "m.onnx", img_size=(24, 32), dynamic=())
    assert report.inputs[0].shape == (1, 3, 24, 32)
    assert report.dynamic == {}


def test_height_and_width_can_stay_open(make, tmp_path):
    model = make("Attentive")
    report = to_onnx(model, tmp_path / "m.onnx", img_size=32, dynamic=("batch", "height", "width"))
    assert report.inputs[0].shape == ("batch", 3, "height", "width")
    assert {check.shape[2:] for check in report.verification.checks} == {(32, 32), (69, 19)}
    images = torch.randn(4, 3, 50, 81)
    np.testing.assert_allclose(
        run(tmp_path / "m.onnx", images)[0], model(images).detach(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("shift", [None, [3, 2]])
def test_windows_that_do_not_divide_the_map_leave_its_sides_open(make, tmp_path, shift):
    model = make("Windowed", shift=shift)
    report = to_onnx(model, tmp_path / "m.onnx", img_size=32, dynamic=("batch", "height", "width"))
    assert report.dynamic == {"batch": "any", "height": "any", "width": "any"}
    for size in ((28, 28), (60, 33), (9, 100)):
        images = torch.randn(2, 3, *size)
        np.testing.assert_allclose(
            run(tmp_path / "m.onnx", images)[0], model(images).detach(), rtol=1e-4, atol=1e-5
        )


class SmallIsSpecial(nn.Module):
    """Goes another way with maps of less than 5 rows, to the same end or to another."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.stem = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        x = self.stem(x)
        return x.sum(2) if x.shape[2] >= 5 else self.factor * x.cumsum(2)[:, :, -1]


def test_sizes_below_what_torch_can_prove_are_tried_out(tmp_path):
    report = to_onnx(SmallIsSpecial(1.0), tmp_path / "m.onnx", img_size=32, dynamic=("height", "width"))
    # the stem takes 8 pixels at least
    assert report.dynamic == {"height": "any (proven from 40 on)", "width": "8 and more"}
    assert {check.shape[2:] for check in report.verification.checks} == {(32, 32), (69, 19), (10, 32)}
    report = to_onnx(SmallIsSpecial(2.0), tmp_path / "n.onnx", img_size=96, dynamic=("height",), verify=False)
    assert report.dynamic == {"height": "40 and more"}


def test_a_model_that_treats_small_images_otherwise_fails_verification(tmp_path):
    with pytest.raises(VerificationError, match=r"photos 1x3x10x96: max error"):
        to_onnx(SmallIsSpecial(2.0), tmp_path / "m.onnx", img_size=96, dynamic=("height", "width"))
    assert not list(tmp_path.iterdir())


class Divided(nn.Module):
    """Takes heights that 8 divides, and no others."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        if x.shape[2] % 8:
            raise ValueError(f"the height must be a multiple of 8, got {x.shape[2]}")
        return x.unflatten(2, (8, x.shape[2] // 8)).mean(3)


def test_an_open_size_that_must_be_a_multiple_is_found_reported_and_verified(tmp_path):
    report = to_onnx(Divided(), tmp_path / "m.onnx", img_size=32, dynamic=("batch", "height"))
    assert report.dynamic == {"batch": "any", "height": "multiples of 8"}
    assert report.inputs[0].shape == ("batch", 3, "height", 32)
    assert {check.shape[2:] for check in report.verification.checks} == {(32, 32), (40, 32)}


def test_features_become_named_outputs(make, tmp_path):
    model = make("Pyramid")
    report = to_onnx(model, tmp_path / "m.onnx", img_size=32, form="features")
    assert report.metadata["form"] == "features"
    assert [str(value) for value in report.outputs] == [
        "stage0 float (batch, 16, 4, 4)",
        "stage1 float (batch, 16, 2, 2)",
    ]
    assert "head.weight" not in {tensor.name for tensor in load(tmp_path / "m.onnx").graph.initializer}
    assert {check.output for check in report.verification.checks} == {"stage0", "stage1"}


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (lambda x: (x, [x + 1, x + 2]), ["output0", "output1_0", "output1_1"]),
        (lambda x: {"mask": x, "boxes": (x + 1,)}, ["mask", "boxes_0"]),
        (lambda x: {"logits": x, "same": x}, ["logits", "same"]),
        (lambda x: [x], ["output0"]),
        (lambda x: x, ["output"]),
    ],
)
def test_several_outputs_get_names_in_order(tmp_path, outputs, names):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 4, 4)

        def forward(self, x):
            return outputs(self.stem(x))

    report = to_onnx(Several(), tmp_path / "m.onnx", img_size=16)
    assert [value.name for value in report.outputs] == names


@pytest.mark.parametrize("channels", [1, 4])
def test_the_number_of_channels_is_the_models(make, tmp_path, channels):
    report = to_onnx(make("Attentive", in_chans=channels), tmp_path / "m.onnx", img_size=32)
    assert report.inputs[0].shape[1] == channels


# --- the model is left as it was ---------------------------------------------------------------------------


def test_training_mode_of_each_submodule_and_the_weights_survive(make, tmp_path):
    model = make("Attentive").train()
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    to_onnx(model, tmp_path / "m.onnx", img_size=32)
    assert model.training
    assert model.qkv.training
    assert not model.norm.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_module_that_acts_on_a_change_of_mode_is_never_put_into_training(tmp_path):
    class Merging(nn.Conv2d):
        def train(self, mode=True):
            assert not mode
            return super().train(mode)

    to_onnx(Merging(3, 4, 4).eval(), tmp_path / "m.onnx", img_size=16)


def test_training_mode_survives_a_failure(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 4), nn.AdaptiveMaxPool2d(3), nn.Dropout()).train()
    with pytest.raises(ExportError):
        to_onnx(model, tmp_path / "m.onnx", img_size=32)
    assert all(module.training for module in model.modules())


def test_dropout_and_batch_norm_are_exported_in_evaluation_mode(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    to_onnx(model, tmp_path / "m.onnx", img_size=16)
    assert operators(tmp_path / "m.onnx") == ["Conv"]


def test_surrounding_inference_mode_autocast_and_hooks_do_no_harm(make, tmp_path):
    calls = []
    model = make("Attentive")
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert to_onnx(model, tmp_path / "m.onnx", img_size=32).verification.passed
    assert calls


def test_other_default_types_and_devices_do_no_harm(make, tmp_path):
    model = make("Attentive")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert to_onnx(model, tmp_path / "m.onnx", img_size=32).verification.passed
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_compiled_module_is_exported_as_its_original(make, tmp_path):
    report = to_onnx(torch.compile(make("Attentive")), tmp_path / "m.onnx", img_size=32)
    assert "stem.weight" in {tensor.name for tensor in load(tmp_path / "m.onnx").graph.initializer}
    assert report.verification.passed


def test_an_export_prints_and_warns_nothing(make, tmp_path, capfd, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_onnx(make("Pyramid"), tmp_path / "m.onnx", img_size=32, opset=18)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert logging.getLogger("torch.onnx").level <= logging.WARNING


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["WindowReverse", "FixedBatch"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_batch_size_frozen_by_the_model_is_refused_with_or_without_verification(
    make, tmp_path, module, verify
):
    with pytest.raises(
        ExportError, match=r"fixes the batch at the traced size.*leave 'batch' out of dynamic"
    ):
        to_onnx(make(module), tmp_path / "m.onnx", img_size=32, verify=verify)
    assert not list(tmp_path.iterdir())


def test_the_same_model_exports_with_a_fixed_batch(make, tmp_path):
    assert to_onnx(make("WindowReverse"), tmp_path / "m.onnx", img_size=32, dynamic=()).verification.passed


class OneSize(nn.Module):
    """Runs at its construction size only, though nothing in its graph says so."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x):
        if not torch.compiler.is_exporting() and x.shape[2] != 32:
            raise ValueError(f"this model takes 32 pixels, got {x.shape[2]}")
        return self.stem(x)


@pytest.mark.parametrize(
    ("axes", "words"), [(("height", "width"), "height and width"), (("batch", "width"), "width")]
)
def test_a_model_built_for_one_size_is_refused_before_anything_is_traced(tmp_path, monkeypatch, axes, words):
    monkeypatch.setattr("vitrail.export.onnx.capture", lambda *_: pytest.fail("traced"))
    model = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), depth=1).eval()
    with pytest.raises(
        ExportError,
        match=rf"vit_tiny_patch16_224 has weights for 64 x 96 only: .*, so {words} can't stay open.*img_size=",
    ):
        to_onnx(model, tmp_path / "m.onnx", img_size=(64, 96), dynamic=axes)


def test_a_file_that_claims_sizes_the_model_refuses_fails_verification(tmp_path):
    with pytest.raises(VerificationError, match=r"refuses this size.*takes 32 pixels, got 69"):
        to_onnx(OneSize(), tmp_path / "m.onnx", img_size=32, dynamic=("height",))
    assert not list(tmp_path.iterdir())


def test_a_size_that_the_model_refuses_is_said_in_the_models_words(tmp_path):
    with pytest.raises(ValueError, match="2 x 3 x 30 x 30 input: the height must be a multiple of 8, got 30"):
        to_onnx(Divided(), tmp_path / "m.onnx", img_size=30)


def test_an_operator_without_onnx_form_is_named_with_its_place(tmp_path):
    class Pool(nn.Module):
        def forward(self, x):
            return F.adaptive_max_pool2d(x, 3)

    model = nn.Sequential(nn.Conv2d(3, 4, 4), Pool())
    with pytest.raises(ExportError, match=r"aten.adaptive_max_pool2d has no ONNX form \(used by 1\)"):
        to_onnx(model, tmp_path / "m.onnx", img_size=32)
    assert not list(tmp_path.iterdir())


def test_a_module_that_cannot_be_traced_is_named(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 4)
            self.choice = Branch()

        def forward(self, x):
            return self.choice(self.stem(x))

    with pytest.raises(ExportError, match=r"could not trace the model in choice \(Branch\)"):
        to_onnx(Net(), tmp_path / "m.onnx", img_size=32)


def test_an_operator_outside_the_standard_is_refused(tmp_path):
    class Custom(nn.Module):
        def forward(self, x):
            return torch.onnx.ops.symbolic("my.domain::Op", (x,), dtype=x.dtype, shape=x.shape, version=1)

    with pytest.raises(ExportError, match=r"not standard ONNX: my\.domain::Op"):
        to_onnx(Custom(), tmp_path / "m.onnx", img_size=32, in_chans=3, verify=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"opset": 16}, ValueError, "between 17 and 23, got 16"),
        ({"opset": 99}, ValueError, "between 17 and 23, got 99"),
        ({"opset": 20.0}, TypeError, "whole number"),
        ({"dynamic": ("batch", "depth")}, ValueError, "names depth; the axes are batch, height, width"),
        ({"form": "features"}, ValueError, "Attentive has no forward_intermediates"),
        ({"form": "pre_logits"}, ValueError, "Attentive has no forward_features and no forward_head"),
        (
            {"form": "logits"},
            ValueError,
            "form must be one of classifier, features, pre_logits, got 'logits'",
        ),
        ({"dtype": "int8"}, ValueError, "dtype must be one of float32, float16, bfloat16, got 'int8'"),
        ({"classes": ["cat", "dog"]}, ValueError, "classes has 2 names, and the model has 10 classes"),
        ({"classes": ["cat", ""] * 5}, ValueError, "none of them empty"),
        ({"img_size": 0}, ValueError, "must be positive, got 0"),
        ({"img_size": (32, 32, 3)}, TypeError, r"whole number or \(height, width\)"),
        ({"img_size": "32"}, TypeError, r"whole number or \(height, width\)"),
        ({"in_chans": 0}, ValueError, "in_chans must be positive"),
        ({"in_chans": 5}, ExportError, "does not take a 2 x 5 x 32 x 32 input"),
        ({"preprocessing": {"means": 0.5}}, ValueError, "preprocessing has no means"),
        ({"preprocessing": {"std": 0.0}}, ValueError, "std need a value per channel, std above 0"),
        ({"images": []}, ValueError, "images is empty"),
        ({"images": ["nowhere.jpg"]}, FileNotFoundError, "no such image or folder: nowhere.jpg"),
    ],
)
def test_wrong_arguments_get_one_clear_message_and_no_file(make, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        to_onnx(make("Attentive"), tmp_path / "m.onnx", **{"img_size": 32, **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_than_float32_are_refused_with_the_remedy(make, tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"holds {name} weights; .*model.float()"):
        to_onnx(make("Attentive").to(dtype), tmp_path / "m.onnx", img_size=32)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_models_without_weights_or_without_python_are_refused(make, tmp_path):
    with pytest.raises(ValueError, match="meta device"):
        to_onnx(make("Attentive").to("meta"), tmp_path / "m.onnx", img_size=32)
    with pytest.raises(TypeError, match="TorchScript"):
        to_onnx(torch.jit.trace(nn.Conv2d(3, 4, 4), torch.ones(1, 3, 8, 8)), tmp_path / "m.onnx", img_size=32)
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got str"):
        to_onnx("resnet18", tmp_path / "m.onnx", img_size=32)


def test_outputs_that_are_no_tensors_are_refused(tmp_path):
    class Text(nn.Conv2d):
        def forward(self, x):
            return {"logits": super().forward(x), "label": "cat"}

    with pytest.raises(ExportError, match="output 'label' is a str; only tensors"):
        to_onnx(Text(3, 4, 4), tmp_path / "m.onnx", img_size=32)


@pytest.mark.parametrize("outputs", [lambda x: {"input": x}, lambda x: {"a": [x], "a_0": x}, lambda x: []])
def test_outputs_without_distinct_names_are_refused(tmp_path, outputs):
    class Named(nn.Conv2d):
        def forward(self, x):
            return outputs(super().forward(x))

    with pytest.raises(ExportError, match="outputs need distinct names other than 'input'"):
        to_onnx(Named(3, 4, 4), tmp_path / "m.onnx", img_size=32)


def test_a_missing_package_is_named_with_the_way_to_get_it(make, tmp_path, monkeypatch):
    from importlib.util import find_spec

    monkeypatch.setattr(
        "vitrail.export.onnx.find_spec", lambda n: None if n == "onnxscript" else find_spec(n)
    )
    with pytest.raises(ImportError, match="needs onnxscript: pip install onnxscript"):
        to_onnx(make("Attentive"), tmp_path / "m.onnx", img_size=32)


# --- the report --------------------------------------------------------------------------------------------


def test_the_report_is_json_and_a_table(exported):
    from rich.console import Console

    _, path, report = exported
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["size_bytes"] == path.stat().st_size
    assert found["graph"]["operators"]["Gelu"] == 1
    assert found["graph"]["nodes"] == len(load(path).graph.node)
    assert found["verification"]["passed"] is True
    assert len(found["verification"]["checks"]) == 4
    assert set(found["seconds"]) == {"trace", "translate", "optimise", "check", "verify", "write"}
    console = Console(width=140, file=io.StringIO())
    console.print(report.table())
    text = console.file.getvalue()
    for word in ("model.onnx", "LayerNormalization 1", "(batch, 3, 32, 32)", "photos", "noise", "passed"):
        assert word in text


def test_progress_tells_each_step(make, tmp_path):
    steps = []
    to_onnx(make("Attentive"), tmp_path / "m.onnx", img_size=32, progress=steps.append)
    assert steps[:5] == [
        "running the model once",
        "tracing the model",
        "translating to ONNX",
        "optimising the graph",
        "checking the graph",
    ]
    assert "comparing on photos, 3 x 3 x 32 x 32" in steps
    assert steps[-1] == "writing the file"


def test_without_verification_the_report_says_so(make, tmp_path):
    report = to_onnx(make("Attentive"), tmp_path / "m.onnx", img_size=32, verify=False)
    assert report.verification is None
    assert "not verified" in report.notes
