import json
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from vitrail.export import ExportError, VerificationError, to_onnx, verify_onnx


def raw_export(model, path, size=32):
    """What torch's exporter writes when it is called directly, without any check."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (torch.randn(2, 3, size, size),),
            path,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            external_data=False,
            verbose=False,
        )
    return path


def rewritten(path, target, change):
    """A copy of the file at `path` whose model `change` has edited."""
    model = onnx.load(path)
    change(model)
    onnx.save(model, target)
    return target


def test_a_right_file_passes_at_two_batch_sizes_on_photos_and_noise(exported):
    model, path, _ = exported
    report = verify_onnx(path, model)
    assert report.passed
    assert [(check.source, check.shape) for check in report.checks] == [
        ("photos", (1, 3, 32, 32)),
        ("noise", (1, 3, 32, 32)),
        ("photos", (3, 3, 32, 32)),
        ("noise", (3, 3, 32, 32)),
    ]
    assert report.images == ("china.jpg", "flower.jpg")
    for check in report.checks:
        assert check.max_relative < 1e-5
        assert check.mean_error <= check.max_error
        assert check.cosine == pytest.approx(1, abs=1e-9)
        assert check.top1 == check.images
    report.raise_on_failure()


def test_noise_is_the_same_each_time_and_differs_between_seeds(exported):
    model, path, _ = exported
    first, again, other = (verify_onnx(path, model, seed=seed).checks[1] for seed in (0, 0, 1))
    assert first == again
    assert first.mean_error != other.mean_error


def test_every_photo_given_is_compared(exported, tmp_path):
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (50, 40), (60 * i, 10, 200)).save(tmp_path / f"{i}.png")
    model, path, _ = exported
    report = verify_onnx(path, model, images=tmp_path)
    assert report.images == ("0.png", "1.png", "2.png", "3.png")
    assert [check.images for check in report.checks if check.source == "photos"] == [4, 6]


# --- broken files: each must fail --------------------------------------------------------------------------


def test_a_batch_size_frozen_by_torchs_own_exporter_is_caught(make, tmp_path):
    model = make("WindowReverse")
    report = verify_onnx(raw_export(model, tmp_path / "m.onnx"), model)
    assert not report.passed
    assert any(check.shape[0] == 3 for check in report.checks if not check.passed)


def test_a_batch_size_frozen_in_the_graph_is_caught(tmp_path):
    class Frozen(nn.Module):
        """Mixes the images of a batch in the graph and not in eager mode, as a frozen batch size does."""

        def forward(self, x):
            x = x.mean((2, 3))
            return (
                x.reshape(2, -1).roll(1, 1).reshape(-1, 3) if torch.compiler.is_exporting() else x.roll(1, 1)
            )

    report = verify_onnx(raw_export(Frozen(), tmp_path / "m.onnx"), Frozen())
    assert not report.passed


def perturb(model):
    tensor = next(t for t in model.graph.initializer if t.name == "stem.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name))


def poison(model):
    tensor = next(t for t in model.graph.initializer if t.name == "head.bias")
    values = numpy_helper.to_array(tensor).copy()
    values[3] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def halve_output(model):
    output = model.graph.output[0]
    model.graph.node.append(
        onnx.helper.make_node("Cast", [output.name], ["half"], to=onnx.TensorProto.FLOAT16)
    )
    output.name = "half"
    output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    rename(model, "half", "logits")


def rename(model, old, new):
    for node in model.graph.node:
        node.input[:] = ["_" + new if name == new else name for name in node.input]
        node.output[:] = [{old: new, new: "_" + new}.get(name, name) for name in node.output]
    model.graph.output[0].name = new


def rename_output(model):
    rename(model, "logits", "scores")


def swap_classes(model):
    for name in ("head.bias",):
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), name))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (perturb, "max error .* exceeds"),
        (poison, "the file's output holds NaN or infinity"),
        (halve_output, "expected torch.float32 .* got torch.float16"),
        (rename_output, "the model's outputs are"),
        (swap_classes, "max error .* exceeds"),
    ],
)
def test_an_edited_file_fails_with_the_reason(exported, tmp_path, change, reason):
    model, path, _ = exported
    report = verify_onnx(rewritten(path, tmp_path / "edited.onnx", change), model)
    assert not any(check.passed for check in report.checks)
    with pytest.raises(VerificationError, match=reason) as error:
        report.raise_on_failure()
    assert error.value.report is report
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_transposed_axis_of_the_same_shape_is_caught(tmp_path):
    class Map(nn.Conv2d):
        swapped = False

        def forward(self, x):
            x = super().forward(x)
            return x.transpose(2, 3) if self.swapped else x

    model = Map(3, 4, 4, 4)
    to_onnx(model, tmp_path / "m.onnx", img_size=16)
    model.swapped = True
    report = verify_onnx(tmp_path / "m.onnx", model)
    assert not any(check.passed for check in report.checks)


def test_a_selection_of_one_region_too_few_is_caught(make, tmp_path):
    model = make("Routed", topk=4)
    to_onnx(model, tmp_path / "m.onnx", img_size=64)
    assert verify_onnx(tmp_path / "m.onnx", model).passed
    model.topk = 3
    assert not any(check.passed for check in verify_onnx(tmp_path / "m.onnx", model).checks)


def test_another_models_weights_are_caught(exported, make):
    other = make("Attentive")
    nn.init.normal_(other.qkv.weight)
    assert not verify_onnx(exported[1], other).passed


def test_a_model_that_puts_out_nan_itself_fails(exported, make):
    model = make("Attentive")
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(VerificationError, match="the model's own output holds NaN"):
        verify_onnx(exported[1], model).raise_on_failure()


def test_a_model_that_does_not_repeat_itself_is_named_as_the_reason(tmp_path):
    class Noisy(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + torch.rand(())

    with pytest.raises(VerificationError, match="the model does not repeat itself"):
        to_onnx(Noisy(3, 4, 4), tmp_path / "m.onnx", img_size=16)
    assert not list(tmp_path.iterdir())


def test_agreement_of_outputs_that_ignore_the_image_is_remarked_upon(make, tmp_path):
    model = make("Attentive")
    nn.init.zeros_(model.head.weight)
    report = to_onnx(model, tmp_path / "m.onnx", img_size=32).verification
    assert report.passed
    assert "logits does not depend on the image" in report.notes[0]


def test_tolerance_is_what_the_caller_says_and_nothing_else(exported, tmp_path):
    model, path, _ = exported
    edited = rewritten(path, tmp_path / "edited.onnx", perturb)
    assert not verify_onnx(edited, model).passed
    assert verify_onnx(edited, model, rtol=0.1).passed
    assert not verify_onnx(path, model, rtol=0, atol=0).passed


def test_a_failed_verification_leaves_no_file_and_keeps_the_old_one(make, tmp_path):
    target = tmp_path / "m.onnx"
    with pytest.raises(VerificationError, match="max error"):
        to_onnx(make("Attentive"), target, img_size=32, rtol=0, atol=0)
    assert not list(tmp_path.iterdir())
    target.write_bytes(b"old")
    with pytest.raises(VerificationError):
        to_onnx(make("Attentive"), target, img_size=32, rtol=0, atol=0)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("content", [b"", b"not an ONNX file", None])
def test_a_file_that_cannot_be_loaded_is_one_clear_error(exported, tmp_path, content):
    model, path, _ = exported
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(ExportError, match="ONNX Runtime can't load the file"):
        verify_onnx(broken, model)


def test_the_rows_of_a_failure_are_in_the_table(exported, tmp_path):
    import io

    from rich.console import Console

    model, path, _ = exported
    report = verify_onnx(rewritten(path, tmp_path / "edited.onnx", perturb), model)
    console = Console(width=200, file=io.StringIO())
    console.print(report.table())
    assert console.file.getvalue().count("exceeds") == 4
