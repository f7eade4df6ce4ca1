"""Any two sides: what is tried, what fails, and that errors of real toolchains are caught and found."""

import json
import math

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper
from torch import nn

from vitrail.export import ExportError, Preprocessing, compare, to_onnx
from vitrail.export.intermediates import ModuleSource, OnnxSource
from vitrail.export.matching import Match, Search, match, sample
from vitrail.export.measure import measure
from vitrail.export.subjects import ModuleSubject, OnnxSubject, subject
from vitrail.export.ties import explain_choice
from vitrail.zoo.inference import standard_form

from . import mutations


def lively(model):
    """Give every parameter and running statistic a value that matters: fresh ones are zeros, ones, or tiny."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def biformer(tmp_path_factory):
    """A `biformer_pico` whose weights matter, and its export."""
    torch.manual_seed(0)
    model = lively(timm.create_model("biformer_pico", num_classes=10))
    path = tmp_path_factory.mktemp("biformer") / "model.onnx"
    to_onnx(model, path, rewrite=standard_form)
    return model, path


def edited(path, change):
    """The content of a copy that `change` has edited, and what that returns."""
    model = onnx.load(path)
    result = change(model)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(), result


def around(content, value, steps=2):
    """`value`, its own steps, what it is computed from within a few nodes, and what is computed from it."""
    nodes = list(onnx.load_from_string(content).graph.node)
    found, edge = (
        {value, *(node.output[0] for node in nodes if node.output[0].startswith(f"{value}_step"))},
        {value},
    )
    for _ in range(steps):
        edge = {name for node in nodes if edge & set(node.output) for name in node.input}
        found |= edge
    readers = {name for node in nodes if value in node.input for name in node.output}
    return found | readers


# --- what real toolchains get wrong -----------------------------------------------------------------------------------

ERRORS = [
    mutations.weights_perturbed,
    mutations.weights_transposed,
    mutations.bias_missing,
    mutations.batch_norm_folded_with_wrong_variance,
    mutations.height_and_width_swapped,
    mutations.softmax_along_the_wrong_axis,
    mutations.classes_permuted,
    mutations.colours_swapped,
    mutations.batch_frozen_at_the_traced_one,
    mutations.choices_of_the_first_image_for_all,
    mutations.choices_off_by_one,
    mutations.one_choice_too_few,
    mutations.gelu_by_tanh,
    mutations.input_normalised_twice,
    mutations.input_not_normalised,
    mutations.overflow_in_float16,
]


@pytest.mark.parametrize("change", ERRORS, ids=lambda change: change.__name__)
def test_a_broken_export_fails_against_its_model_and_the_place_is_named(biformer, change):
    model, path = biformer
    content, wrong = edited(path, change)
    report = compare(model, content, rewrite=standard_form)
    assert not report.passed
    assert report.trace.how == "by value"
    assert report.trace.first_key in around(content, wrong)
    assert "first diverging: " in report.explain()
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("change", ERRORS, ids=lambda change: change.__name__)
def test_a_broken_export_fails_against_the_right_one_and_the_node_is_named(biformer, change):
    _, path = biformer
    content, wrong = edited(path, change)
    report = compare(path, content)
    assert not report.passed
    assert report.trace.how == "by name"
    # what stands at the input has no counterpart in the right file, where its first reader is the place
    assert report.trace.first_key in {wrong, *(around(content, wrong, steps=0) if wrong == "image" else ())}
    assert report.trace.last is None or report.trace.last.agrees


def test_a_file_that_is_right_at_its_traced_batch_only_passes_there_and_nowhere_else(biformer):
    model, path = biformer
    content, _ = edited(path, mutations.batch_frozen_at_the_traced_one)
    assert compare(model, content, batches=[2]).passed
    report = compare(model, content, trace=False)
    assert {check.shape[0] for check in report.checks if not check.passed} == {1, 3, 5}


def test_choices_of_the_first_image_for_all_pass_one_image_at_a_time(biformer):
    model, path = biformer
    content, _ = edited(path, mutations.choices_of_the_first_image_for_all)
    assert compare(model, content, batches=[1]).passed
    report = compare(model, content, trace=False)
    assert {check.shape[0] for check in report.checks if not check.passed} == {2, 3, 5}


def test_an_epsilon_that_was_dropped_is_caught_where_features_are_small(biformer):
    def shrink(model):
        conv = mutations.nodes_of(model, "Conv")[2]
        for name in conv.input[1:]:
            mutations.set_weight(model, name, mutations.weight_of(model, name) * np.float32(1e-4))

    right, _ = edited(biformer[1], shrink)
    model = onnx.load_from_string(right)
    wrong = mutations.epsilon_dropped(model)
    report = compare(right, model.SerializeToString())
    assert not report.passed
    assert report.trace.first_key == wrong


def test_a_size_frozen_at_the_traced_one_is_caught_by_another_size(make, tmp_path):
    model = make("Windowed")
    to_onnx(model, tmp_path / "m.onnx", img_size=56, dynamic=("batch", "height", "width"), verify=False)
    right = compare(model, tmp_path / "m.onnx", img_size=56)
    assert right.passed
    assert len({check.shape[2:] for check in right.checks}) > 1

    model_file = onnx.load(tmp_path / "m.onnx")
    mutations.size_frozen(model_file, 56)
    report = compare(model, model_file.SerializeToString(), img_size=56, trace=False)
    assert {check.shape[2:] for check in report.checks if not check.passed} == {
        shape for shape in {check.shape[2:] for check in report.checks} if shape != (56, 56)
    }


# --- quantised and half files ---------------------------------------------------------------------------------------------


def quantised(model, names, factor=1.0):
    """Put the activations `names` through 8 bits, scaled by their range on noise times `factor`."""
    image = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    values = {}
    OnnxSource(OnnxSubject(model.SerializeToString()), image).visit(names, values.__setitem__)
    for name in names:
        scale = mutations.constant(model, np.float32(values[name].abs().max() / 127 * factor))
        zero = mutations.constant(model, np.int8(0))
        steps = [("QuantizeLinear", [..., scale, zero], {}), ("DequantizeLinear", [..., scale, zero], {})]
        mutations.after(model, name, *steps)
    return names[len(names) // 2]


def activations(model):
    return [node.output[0] for node in mutations.nodes_of(model, "LayerNormalization")]


def test_a_file_quantised_well_passes_with_the_tolerance_of_8_bits(biformer):
    content, _ = edited(biformer[1], lambda model: quantised(model, activations(model)))
    report = compare(biformer[1], content)
    assert (report.precision, report.rtol, report.passed) == ("int8", 0.15, True)
    assert max(check.max_relative for check in report.checks) > 1e-4
    assert not compare(biformer[1], content, rtol=1e-4, trace=False).passed


def test_a_wrong_scale_is_found_among_right_ones(biformer):
    def spoil(model):
        names = activations(model)
        quantised(model, names)
        wrong = names[0]
        node = next(node for node in model.graph.node if node.output[0] == wrong)
        name = mutations.constant(model, mutations.weight_of(model, node.input[1]) / np.float32(30))
        for each in model.graph.node:
            if "QuantizeLinear" in each.op_type and each.output[0] in (wrong, f"{wrong}_step0"):
                each.input[1] = name
        return wrong

    right, _ = edited(biformer[1], lambda model: quantised(model, activations(model)))
    content, wrong = edited(biformer[1], spoil)
    for reference in (right, biformer[1]):
        report = compare(reference, content)
        assert (report.precision, report.passed) == ("int8", False)
        assert report.trace.first_key in (wrong, f"{wrong}_step0")


# --- no false alarms ------------------------------------------------------------------------------------------------------


def test_a_right_file_passes_at_every_batch_and_agrees_all_along_the_way(biformer):
    model, path = biformer
    report = compare(model, path, rewrite=standard_form, trace=True)
    assert report.passed
    assert [check.shape[0] for check in report.checks] == [1, 1, 2, 2, 3, 3, 5, 5]
    assert report.trace.first is None
    assert len(report.trace.places) > 50
    assert all(place.agrees for place in report.trace.places)
    for check in report.checks:
        assert check.top1 == check.top5 == check.images
        assert list(check.percentiles) == sorted(check.percentiles)
        assert check.percentiles[-1] <= check.max_error


def test_sides_can_be_swapped(biformer):
    model, path = biformer
    content, wrong = edited(path, mutations.gelu_by_tanh)
    assert compare(path, model).passed
    report = compare(content, model, rewrite=standard_form)
    assert not report.passed
    assert report.trace.first_key == wrong


# --- what is tried ----------------------------------------------------------------------------------------------------------


def test_a_file_for_one_image_at_a_time_can_be_the_reference(make, tmp_path):
    model = make("Attentive")
    to_onnx(model, tmp_path / "one.onnx", img_size=16, dynamic=(), verify=False)
    to_onnx(model, tmp_path / "any.onnx", img_size=16, verify=False)
    report = compare(tmp_path / "one.onnx", tmp_path / "any.onnx")
    assert report.passed
    assert {check.shape[0] for check in report.checks} == {1, 2, 3, 5}
    assert {check.shape[0] for check in compare(model, tmp_path / "one.onnx").checks} == {1}


def test_sides_without_a_common_size_are_refused(make, tmp_path):
    model = make("Attentive")
    to_onnx(model, tmp_path / "a.onnx", img_size=16, verify=False)
    to_onnx(model, tmp_path / "b.onnx", img_size=24, verify=False)
    with pytest.raises(ExportError, match=r"takes a height of 16 only and .* of 24: no image fits both"):
        compare(tmp_path / "a.onnx", tmp_path / "b.onnx")
    with pytest.raises(ValueError, match="the height is fixed at 16, so img_size can't make it 32"):
        compare(tmp_path / "a.onnx", tmp_path / "a.onnx", img_size=32)


def test_other_classes_are_said_to_be_that(make):
    a, b = make("Attentive"), make("Attentive")
    b.head = nn.Linear(16, 7)
    report = compare(a, b, img_size=16)
    assert all("the first model has 10 classes and the second model 7" in c.failure for c in report.checks)


def test_outputs_of_other_names_are_compared_in_their_order_and_that_is_noted(exported):
    model, path, _ = exported
    graph = onnx.load(path)
    mutations.after(graph, "logits", ("Identity", [...], {}))
    graph.graph.node[-1].output[0] = graph.graph.output[0].name = "scores"
    report = compare(model, graph.SerializeToString())
    assert report.passed
    assert any(
        "different names and are compared in their order: logits with scores" in n for n in report.notes
    )


def test_sides_that_prepare_photos_differently_fail_unless_told_how(exported):
    model, path, _ = exported
    graph = onnx.load(path)
    for entry in graph.metadata_props:
        if entry.key == "mean":
            entry.value = "[0.5, 0.5, 0.5]"
    other = graph.SerializeToString()
    report = compare(path, other)
    assert not report.passed
    assert all(check.passed for check in report.checks)
    assert "prepare photos differently: mean (0.485, 0.456, 0.406) and (0.5, 0.5, 0.5)" in report.explain()
    assert compare(path, other, preprocessing=Preprocessing()).passed
    silent = compare(model, path)
    assert silent.passed
    assert "does not say how photos are to be prepared" in silent.notes[0]


def test_pictures_go_as_they_are_to_a_file_that_normalises_itself(exported):
    model, path, _ = exported
    graph = onnx.load(path)
    prepare = Preprocessing()
    image = graph.graph.input[0]
    batch = image.type.tensor_type.shape.dim[0].dim_param
    steps = [
        ("Cast", [...], {"to": onnx.TensorProto.FLOAT}),
        ("Transpose", [...], {"perm": [0, 3, 1, 2]}),
        ("Div", [..., mutations.constant(graph, np.float32(255))], {}),
        ("Sub", [..., mutations.constant(graph, np.float32(prepare.mean).reshape(3, 1, 1))], {}),
        ("Div", [..., mutations.constant(graph, np.float32(prepare.std).reshape(3, 1, 1))], {}),
    ]
    mutations.on_input(graph, *steps)
    new = helper.make_tensor_value_info(image.name, onnx.TensorProto.UINT8, [batch, 32, 32, 3])
    image.CopyFrom(new)
    assert compare(model, graph.SerializeToString()).passed
    divide = next(node for node in graph.graph.node if node.op_type == "Div")
    divide.input[1] = mutations.constant(graph, np.float32(256))
    assert not compare(model, graph.SerializeToString()).passed


def test_the_first_submodule_that_differs_is_named_for_two_models(make):
    a, b = make("Attentive"), make("Attentive")
    with torch.no_grad():
        b.qkv.weight.mul_(1.01)
    report = compare(a, b, img_size=16)
    assert not report.passed
    assert (report.a, report.trace.how) == ("the first model", "by name")
    assert report.trace.first_key.startswith("qkv:")
    assert report.trace.last.b.startswith("qkv:") or "norm" in report.trace.last.b
    assert compare(a, make("Attentive"), img_size=16).passed


def test_another_architecture_with_the_same_weights_is_found_by_value(make):
    class Renamed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model
            self.num_classes = model.num_classes

        def forward(self, x):
            return self.inner(x)

    a, b = make("Attentive"), Renamed(make("Attentive"))
    assert compare(a, b, img_size=16).passed
    with torch.no_grad():
        b.inner.head.weight.mul_(1.01)
    report = compare(a, b, img_size=16)
    assert (report.passed, report.trace.how) == (False, "by value")
    assert report.trace.first_key.startswith("inner.head:")


def test_an_engine_without_a_gpu_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "m.engine").write_bytes(b"")
    with pytest.raises(ExportError, match="runs on an NVIDIA GPU and torch sees none here"):
        compare(tmp_path / "m.engine", tmp_path / "m.engine")


@pytest.mark.parametrize("side", ["weights.pth", "model.txt"])
def test_another_kind_of_file_is_refused_with_the_kinds_there_are(side):
    with pytest.raises(ValueError, match=r"neither an ONNX file \(\.onnx\) nor an engine"):
        subject(side)


# --- ties -------------------------------------------------------------------------------------------------------------------


class Chooser(nn.Module):
    """Reads two of four rows by their scores, which are the first image's pixels."""

    def forward(self, x):
        scores = x[:, 0, 0, :4]
        best = scores.topk(2).indices
        rows = x[:, 1, :4]
        return rows.gather(1, best[..., None].expand(-1, -1, rows.shape[-1])).sum(1)


def flipped(gap):
    """Findings on a TopK that chose otherwise between two candidates whose scores are `gap` apart."""
    graph = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[1, 1, 1, 4] x) => (float[1, 1, 1, 2] v, int64[1, 1, 1, 2] i)'
        "<int64[1] k = {2}> { s = Identity(x) v, i = TopK<axis = -1>(s, k) }"
    )
    image = torch.tensor([4.0, 1.0, 1.0 + gap, 0.0])[None, None, None]
    source = OnnxSource(OnnxSubject(graph.SerializeToString()), image)
    model = nn.Identity()

    class Other(nn.Module):
        def forward(self, x):
            return torch.tensor([0, 1]).reshape(1, 1, 1, 2) + 0 * x[..., :2].long()

    pool = ModuleSource(ModuleSubject(Other()), image)
    key = pool.entries[-1].key
    assert model is not None
    values = {}
    source.visit(["i"], values.__setitem__)
    assert values["i"].flatten().tolist() == [0, 2]
    found = {"i": match(key, torch.tensor([0, 1]).reshape(1, 1, 1, 2), values["i"], 0, 0)}
    (finding,) = explain_choice(source, "i", found, [pool])
    return finding


def test_a_choice_between_scores_that_tie_is_reported_as_a_flip():
    assert "1 of 1 choices differ" in flipped(2e-6)
    assert "they tie to within rounding" in flipped(2e-6)
    assert "no tie, so the selection itself is wrong" in flipped(0.1)


def test_a_wrong_selection_is_not_called_a_tie(biformer):
    model, path = biformer
    content, _ = edited(path, mutations.one_choice_too_few)
    report = compare(path, content)
    assert report.trace.findings == ()  # what is wrong stands behind the TopK, not in it
    graph = onnx.load(path)
    node = mutations.nodes_of(graph, "TopK")[0]
    mutations.set_attribute(node, "largest", 0)
    report = compare(model, graph.SerializeToString())
    assert not report.passed
    assert report.trace.first_key in node.output
    assert any("no tie, so the selection itself is wrong" in finding for finding in report.trace.findings)


# --- measuring ----------------------------------------------------------------------------------------------------------------


def test_figures_are_what_they_are_called():
    expected = torch.arange(1000.0)
    figures = measure(expected, expected + torch.linspace(0, 1, 1000))
    assert figures.max_error == pytest.approx(1)
    assert figures.mean_error == pytest.approx(0.5, abs=1e-3)
    assert figures.max_relative == pytest.approx(1 / 999)
    assert figures.percentiles == pytest.approx((0.5, 0.9, 0.99, 0.999), abs=1e-3)
    assert measure(torch.zeros(0), torch.zeros(0)).cosine == 1
    assert math.isnan(measure(torch.ones(3), torch.tensor([1, math.nan, 1])).max_error)


def test_a_sample_reads_a_permuted_tensor_in_the_order_of_its_elements():
    value = torch.randn(7, 11, 5, 13).permute(2, 0, 3, 1)
    at = torch.linspace(0, value.numel() - 1, 1024, dtype=torch.float64).long()
    torch.testing.assert_close(sample(value), value.flatten()[at].double(), rtol=0, atol=0)


def test_intermediate_values_come_in_pieces_that_fit_into_memory(biformer, monkeypatch):
    monkeypatch.setattr("vitrail.export.intermediates.CHUNK", 200_000)
    source = OnnxSource(OnnxSubject(biformer[1]), torch.randn(1, 3, 32, 32))
    chunks = source.chunks({entry.key for entry in source.entries})
    assert len(chunks) > 3
    assert [key for chunk in chunks for key in chunk] == [entry.key for entry in source.entries]
    seen = {}
    source.visit(None, seen.__setitem__)
    assert seen.keys() == {entry.key for entry in source.entries}
    assert max(sum(seen[key].nbytes for key in chunk) for chunk in chunks if len(chunk) > 1) <= 200_000


def test_a_small_fault_is_found_where_it_starts_and_not_where_it_passes_the_tolerance():
    from vitrail.export.intermediates import Entry

    names = "abcdef"
    entries = [Entry(name, "Add", "", (names[i - 1],) if i else ()) for i, name in enumerate(names)]
    errors = dict(zip(names, (2e-7, 3e-7, 3e-5, 6e-5, 2e-4, 4e-4), strict=True))

    def of(error):
        return Match("x", (1,), measure(torch.ones(1), torch.ones(1) + error), error < 1e-4, True)

    found = {name: of(error) for name, error in errors.items()}
    assert Search(entries, found, 2.0**-22, {"f"}).first() == "c"
