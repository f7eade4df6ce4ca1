"""Files of every family: what all must do, on its smallest models; of every model when there is time."""

import itertools

import onnx
import pytest
import timm
import torch

from vitrail.export import FORMS, convert_precision, to_onnx, verify_onnx
from vitrail.export.onnx import OPERATORS
from vitrail.zoo import list_families
from vitrail.zoo.inference import standard_form

from .support import COUNTS, PICOS, SLACK

MODELS = [name for names in list_families().values() for name in names]
# of more than 2 GiB, for tests/export/test_external.py
LARGE = ("davit_fused_giant",)


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def test_every_family_has_a_small_model():
    for family, names in list_families().items():
        assert set(names) & set(PICOS), family


def verify_halves(path, model):
    """The file in float16 and in bfloat16 against the model."""
    for dtype in ("float16", "bfloat16"):
        half = convert_precision(onnx.load(path), dtype).SerializeToString()
        verify_onnx(half, model, original=path).raise_on_failure()


@pytest.mark.parametrize("name", PICOS)
def test_what_the_classifier_reads_can_be_had_without_it_from_pixels_in_every_precision(name, tmp_path):
    model = create(name, num_classes=10)
    report = to_onnx(
        model,
        tmp_path / "m.onnx",
        opset=22,
        form="pre_logits",
        dynamic=(),
        preprocess=True,
        rewrite=standard_form,
    )
    assert [value.name for value in report.outputs] == ["pre_logits"]
    assert report.outputs[0].shape == (1, model.head_hidden_size)
    verify_halves(tmp_path / "m.onnx", model)


AT_THE_ENDS = {
    ("sparsifiner_pico", 17, "fused", "float16"),
    ("davit_fused_pico", 17, "standard", "bfloat16"),
    ("stvit_swin_pico", 23, "standard", "float16"),
    ("biformer_pico", 23, "fused", "bfloat16"),
}
"""One of each kind, for every run."""


@pytest.mark.parametrize(
    ("name", "opset", "operators", "dtype"),
    [
        pytest.param(*case, marks=() if case in AT_THE_ENDS else pytest.mark.slow)
        for case in itertools.product(PICOS, (17, 23), OPERATORS, ("float16", "bfloat16"))
    ],
)
def test_half_precision_at_both_ends_of_the_opset_range(name, opset, operators, dtype, tmp_path):
    model = create(name, num_classes=10)
    report = to_onnx(
        model, tmp_path / "m.onnx", opset=opset, operators=operators, dtype=dtype, rewrite=standard_form
    )
    assert report.verification.passed
    assert (report.opset, report.metadata["dtype"]) == (opset, dtype)
    proto = onnx.load(tmp_path / "m.onnx")
    assert {entry.version for f in proto.functions for entry in f.opset_import} <= {opset}
    onnx.checker.check_model(proto, full_check=True)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [(), ("batch",)], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PICOS)
def test_every_form_in_every_precision(name, form, dynamic, tmp_path):
    model = create(name, num_classes=10)
    path = tmp_path / "m.onnx"
    for preprocess in (False, True):
        to_onnx(
            model, path, opset=22, form=form, dynamic=dynamic, preprocess=preprocess, rewrite=standard_form
        )
        verify_halves(path, model)


@pytest.mark.parametrize("name", PICOS)
def test_the_feature_pyramid_comes_as_named_maps_in_every_precision(name, tmp_path):
    model = create(name, num_classes=0)
    report = to_onnx(model, tmp_path / "m.onnx", form="features")
    with torch.no_grad():
        maps = model.forward_intermediates(torch.zeros(1, 3, 32, 32), intermediates_only=True)
    assert [value.name for value in report.outputs] == [f"stage{i}" for i in range(len(maps))]
    assert [tuple(value.shape[1:]) for value in report.outputs] == [tuple(x.shape[1:]) for x in maps]
    verify_halves(tmp_path / "m.onnx", model)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in {*PICOS, *LARGE}])
def test_every_model_has_a_verified_file_of_few_nodes(name, tmp_path):
    # untrained predictors choose among nearly equal keys, and float32 rounding flips some of the choices
    options = {"rtol": 2e-2} if name.startswith("sparsifiner") else {}
    if name.startswith("biformer_stl"):
        # in the noise of seed 0 two regions tie in float32 (their scores differ by 4e-9 of 2e-2)
        options["seed"] = 1
    report = to_onnx(create(name), tmp_path / "m.onnx", rewrite=standard_form, **options)
    assert report.verification.passed
    assert report.graph.nodes <= SLACK * COUNTS[name]
