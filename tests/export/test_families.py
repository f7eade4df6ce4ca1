"""Files of every family: what all must do, on its smallest models; of every model when there is time."""

import onnx
import pytest
import timm
import torch

from vitrail.export import ExportError, to_onnx
from vitrail.zoo import list_families

MODELS = [name for names in list_families().values() for name in names]
PICOS = [name for name in MODELS if name.endswith("_pico")]
ONE_SIZE = [name for name in PICOS if timm.get_pretrained_cfg(name).fixed_input_size]
# one file holds less than 2 GiB of weights
TOO_LARGE = ("davit_fused_giant",)


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def test_every_family_has_a_small_model():
    for family, names in list_families().items():
        assert set(names) & set(PICOS), family


@pytest.mark.parametrize("name", PICOS)
def test_the_file_computes_the_same_for_any_batch_with_standard_operators(name, tmp_path):
    report = to_onnx(create(name, num_classes=10), tmp_path / "m.onnx")
    assert {check.shape[0] for check in report.verification.checks} == {1, 3}
    assert max(check.max_relative for check in report.verification.checks) < 1e-5
    assert {node.domain for node in onnx.load(tmp_path / "m.onnx").graph.node} <= {"", "ai.onnx"}


@pytest.mark.parametrize("name", PICOS)
def test_the_feature_pyramid_comes_as_named_maps(name, tmp_path):
    model = create(name, num_classes=0)
    report = to_onnx(model, tmp_path / "m.onnx", form="features")
    with torch.no_grad():
        maps = model.forward_intermediates(torch.zeros(1, 3, 32, 32), intermediates_only=True)
    assert [value.name for value in report.outputs] == [f"stage{i}" for i in range(len(maps))]
    assert [tuple(value.shape[1:]) for value in report.outputs] == [tuple(x.shape[1:]) for x in maps]


@pytest.mark.parametrize("name", ONE_SIZE)
def test_models_of_one_size_refuse_open_sides_with_the_reason(name, tmp_path):
    with pytest.raises(
        ExportError, match=rf"{name} has weights for 32 x 32 only: .*create the model with img_size="
    ):
        to_onnx(create(name), tmp_path / "m.onnx", dynamic=("batch", "height", "width"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in {*PICOS, *TOO_LARGE}])
def test_every_model_has_a_verified_file(name, tmp_path):
    # untrained predictors choose among nearly equal keys, and float32 rounding flips some of the choices
    options = {"rtol": 2e-2} if name.startswith("sparsifiner") else {}
    if name.startswith("biformer_stl"):
        # in the noise of seed 0 two regions tie in float32 (their scores differ by 4e-9 of 2e-2)
        options["seed"] = 1
    assert to_onnx(create(name), tmp_path / "m.onnx", **options).verification.passed


@pytest.mark.slow
@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_model_of_more_than_two_gib_is_refused_with_the_reason(name, tmp_path):
    with pytest.raises(ExportError, match=r"the weights take 5\.\d GiB and one ONNX file holds less than 2"):
        to_onnx(create(name), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
