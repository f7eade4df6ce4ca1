from functools import cache

import pytest
import torch
from torch import nn

from vitrail.catalog import create_model, describe
from vitrail.ops import use_ops
from vitrail.profiling import Comparison, PathCount, ProfileReport, profile
from vitrail.published import published_figures

PUBLISHED = ["biformer_tiny", "biformer_small", "biformer_base", "biformer_stl"]


@cache
def report_of(name: str) -> ProfileReport:
    return profile(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_figures_are_met_within_two_percent(name):
    report = report_of(name)
    figures = published_figures(name)
    assert report.macs / 1e9 == pytest.approx(figures.gmac, rel=0.02)
    assert report.parameters / 1e6 == pytest.approx(figures.params, rel=0.001)
    assert report.ok, report.failures


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_counters_agree_on_both_paths(name):
    report = report_of(name)
    assert [path.path for path in report.paths] == ["fused", "reference"]
    for path in report.paths:
        assert path.fvcore == pytest.approx(path.torch, rel=0.001)
        assert path.uncounted == {}
    fused, reference = report.paths
    assert fused.fvcore == reference.fvcore
    assert "routed_attention" in fused.by_operator
    assert "routed_attention" not in reference.by_operator


def test_the_stages_make_up_the_whole():
    report = report_of("biformer_tiny")
    assert sum(stage.macs for stage in report.stages) == report.paths[0].fvcore
    assert sum(stage.parameters for stage in report.stages) == report.parameters
    assert sum(stage.share for stage in report.stages) == pytest.approx(1)
    stages = {stage.name: (stage.resolution, stage.channels) for stage in report.stages}
    assert stages["stages.0"] == ((56, 56), 64)
    assert stages["stages.3"] == ((7, 7), 512)
    assert stages["head"] == ((), 1000)


def test_the_list_of_models_shows_the_same_figures():
    report = report_of("biformer_tiny")
    row = describe("biformer_tiny")
    assert row.macs == pytest.approx(report.macs, rel=1e-4)
    assert row.parameters == report.parameters


def test_with_the_reference_path_forced_only_that_is_counted():
    with use_ops("reference"):
        report = profile("biformer_tiny", img_size=64)
    assert [path.path for path in report.paths] == ["reference"]


def test_attention_of_other_models_is_counted_where_fvcore_alone_counts_none():
    report = profile("test_vit")
    (path,) = report.paths
    model_width, tokens, blocks = 64, 10 * 10 + 1, 6
    assert path.path == "standard"
    assert path.by_operator["scaled_dot_product_attention"] == blocks * 2 * tokens**2 * model_width
    assert report.ok
    assert report.comparisons == []


def test_channels_last_models_show_their_resolution():
    stages = {s.name: s for s in profile("swin_tiny_patch4_window7_224").stages}
    assert (stages["layers.1"].resolution, stages["layers.1"].channels) == ((28, 28), 192)


def test_a_batch_costs_its_images():
    one, three = profile("test_resnet"), profile("test_resnet", batch=3)
    assert three.paths[0].fvcore == 3 * one.paths[0].fvcore
    assert three.macs == one.macs


def test_other_sizes_are_counted_and_not_held_against_the_paper():
    report = profile("biformer_tiny", img_size=(96, 160))
    assert report.img_size == (96, 160)
    assert report.comparisons == []
    assert {s.name: s.resolution for s in report.stages}["stages.1"] == (12, 20)
    assert report.ok, report.failures


def test_a_module_of_other_width_is_not_held_against_the_paper():
    report = profile(create_model("biformer_tiny", num_classes=2), img_size=64)
    assert report.model == "biformer_tiny"
    assert report.comparisons == []
    assert report.ok, report.failures


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        return torch.linalg.inv(x @ x.mT + torch.eye(x.shape[-2])).sigmoid().sum()


def test_what_fvcore_cannot_count_is_reported_when_it_may_be_work():
    (path,) = profile(Odd(), img_size=8).paths
    assert path.uncounted == {"aten::linalg_inv": 1}


def test_a_module_is_left_as_it_came():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    profile(model, img_size=16)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "biformer_tiny", "img_size": 0}, "at least 1x1, got 0x0"),
        ({"model": "biformer_tiny", "batch": 0}, "batch must be at least 1, got 0"),
        ({"model": nn.Linear(3, 3, device="meta")}, "meta device"),
        ({"model": "biformer_tinny"}, "did you mean biformer_tiny"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        profile(**arguments)


def _report(**changes):
    path = PathCount("fused", 1_000_000, changes.pop("torch", 1_000_000), {}, {})
    return ProfileReport("model", (224, 224), 1, 10, [path], [], **changes)


def test_a_disagreement_of_the_counters_is_a_failure():
    report = _report(torch=1_002_000)
    assert not report.ok
    assert "the counters disagree on the fused path" in report.failures[0]
    assert report.to_dict()["failures"] == report.failures
    assert _report(torch=1_000_900).ok


def test_a_missed_figure_is_a_failure():
    report = _report(comparisons=[Comparison("GMAC", 2.25, 2.2)])
    assert not report.ok
    assert "GMAC: 2.25 is +2.3% from the paper's 2.2" in report.failures[0]
    assert _report(comparisons=[Comparison("GMAC", 2.24, 2.2)]).ok
