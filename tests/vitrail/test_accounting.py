"""Costs in the terms of the papers: sparse attention beside the dense trunk's, patches projected as copies."""

import pytest
import timm
import torch

from vitrail.accounting import attention_cost, repeated_projections
from vitrail.cli import main
from vitrail.profiling import profile


def test_the_cost_is_scores_values_and_the_choice_of_the_keys():
    args = {
        "img_size": 64,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 3,
        "num_classes": 5,
        "reduce_n_factor": 2,
    }
    cost = profile(timm.create_model("sparsifiner_tiny", **args), img_size=64, batch=2).attention
    tokens, width, heads, head, down, rows, keys = 17, 24, 3, 8, 4, 8, 5
    predictor = rows * tokens * width + 2 * rows * heads * head * down + 16 * width * rows
    mixture = 16 * heads * 8 * tokens
    sparse, class_row = 2 * 16 * keys * width, 2 * tokens * width
    assert cost.ours == 2 * (predictor + mixture + sparse + class_row)
    assert cost.dense == 2 * 2 * tokens**2 * width
    assert cost.claimed is None


def test_other_models_have_no_such_cost():
    assert attention_cost(torch.nn.Linear(1, 1), {}, 1) is None
    assert profile("biformer_tiny", img_size=32).attention is None


def test_the_command_prints_it_beside_the_claim(capsys):
    assert main(["profile", "sparsifiner_tiny"]) == 0
    assert "0.091 GMAC, 49% below the 0.179 of dense; claimed 48% to 69%" in " ".join(
        capsys.readouterr().out.split()
    )


def test_patches_of_stvit_r_are_counted_as_the_authors_copy_them():
    model = timm.create_model("stvit_r_swin_small").eval()
    # 4 patches of 10 x 10 tokens on 14 x 14, keys and values of width 384, in each of 3 rounds
    assert repeated_projections(model, torch.zeros(2, 3, 224, 224)) == 2 * 3 * (4 * 100 - 196) * 2 * 384**2


@pytest.mark.parametrize("name", ["stvit_r_swin_small", "stvit_r_swin_base"])
def test_stvit_r_costs_what_was_published_but_for_these_copies(name):
    report = profile(name)
    assert report.ok
    gmac = next(c for c in report.comparisons if c.figure.startswith("GMAC with patches projected as copies"))
    assert abs(gmac.deviation) < 0.002
    assert report.macs / 1e9 < gmac.ours - 0.1


def test_other_models_project_nothing_twice():
    assert repeated_projections(timm.create_model("davit_fused_pico"), torch.zeros(1, 3, 32, 32)) == 0
