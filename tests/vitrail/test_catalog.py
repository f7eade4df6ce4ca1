import re

import pytest
import torch

from vitrail.catalog import (
    SizeError,
    UnknownModelError,
    check_model_name,
    create_model,
    default_size,
    describe,
    family_of,
    model_names,
)
from vitrail.published import published_figures
from vitrail.zoo import list_families
from vitrail.zoo.weights import CheckpointError


def test_every_model_of_every_family_is_listed():
    assert model_names() == [name for names in list_families().values() for name in names]
    assert {"biformer_tiny", "biformer_small", "biformer_base", "biformer_stl", "biformer_stl_nchw"} <= set(
        model_names()
    )


def test_names_are_filtered_by_part_and_by_wildcard():
    assert model_names("tiny") == [n for n in model_names() if "tiny" in n]
    assert {"biformer_tiny", "stripmlp_tiny_light", "stvit_r_swin_tiny"} <= set(model_names("tiny"))
    assert model_names("biformer_s*") == [n for n in model_names() if n.startswith("biformer_s")]
    assert model_names("nothing like it") == []


def test_a_model_is_described_without_allocating_its_weights(monkeypatch):
    made = []
    original = torch.nn.Module.register_parameter

    def register(self, name, parameter):
        made.append(parameter)
        original(self, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", register)
    row = describe("biformer_tiny")
    assert row.parameters == 13142760
    assert all(parameter is None or parameter.is_meta for parameter in made)


def test_every_model_has_a_family_and_figures_where_some_were_published():
    without = {name for name in model_names() if published_figures(name) is None}
    for name in set(model_names()) - without:
        figures = published_figures(name)
        assert figures.family == family_of(name)
        assert figures.url.startswith("https://arxiv.org/")
    # ours, Florence-2's towers, and the forms of STViT that the paper has no table for
    assert {name for name in without if not re.search("_pico$|_fl$|^stvit_(r_)?(swin|deit)_", name)} == set()


def test_published_figures_ignore_the_tag_of_the_weights():
    assert published_figures("biformer_tiny.in1k") == published_figures("biformer_tiny")
    assert published_figures("resnet18") is None


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("biformer_tinny", "did you mean biformer_tiny"),
        ("BiFormer_Small", "did you mean biformer_small"),
        ("resnet18x", "resnet18"),
        ("biformer", "is a family, not a model; choose one of .*biformer_base"),
        ("qqqqqqqq", "`vitrail models` lists them all"),
    ],
)
def test_an_unknown_name_is_met_with_the_nearest_ones(name, hint):
    with pytest.raises(UnknownModelError, match=hint):
        check_model_name(name)


def test_models_whose_weights_depend_on_the_size_are_made_for_it():
    model = create_model("test_vit", img_size=(96, 128))
    assert not model.training
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 96, 128)).shape == (1, 1000)
    assert default_size("test_vit") == (160, 160)


@pytest.mark.parametrize(
    ("name", "size"), [("biformer_stl", (8, 8)), ("test_vit", (7, 7)), ("test_resnet", (0, 5))]
)
def test_a_size_that_a_model_does_not_take_is_refused_with_its_reason(name, size):
    with pytest.raises(SizeError, match=rf"{name} does not run at {size[0]}x{size[1]}: \w+"):
        create_model(name, img_size=size)


@pytest.fixture
def ten_classes(tmp_path):
    torch.manual_seed(0)
    model = create_model("test_resnet", num_classes=10)
    file = tmp_path / "ten.pth"
    torch.save(model.state_dict(), file)
    return file, model


def test_a_fine_tuned_classifier_is_loaded_not_left_random(ten_classes):
    file, model = ten_classes
    again = create_model("test_resnet", num_classes=10, checkpoint=str(file))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_without_its_classifier_gives_features(ten_classes):
    file, model = ten_classes
    features = create_model("test_resnet", num_classes=0, checkpoint=str(file))
    assert torch.equal(features.conv1[0].weight, model.conv1[0].weight)


def test_a_checkpoint_of_other_classes_is_refused_with_both_numbers(ten_classes):
    with pytest.raises(CheckpointError, match="has 10 classes where 1000 are asked for"):
        create_model("test_resnet", checkpoint=str(ten_classes[0]))


def test_a_checkpoint_of_another_model_is_refused(ten_classes):
    with pytest.raises(CheckpointError, match="does not fit test_vit"):
        create_model("test_vit", num_classes=10, checkpoint=str(ten_classes[0]))
