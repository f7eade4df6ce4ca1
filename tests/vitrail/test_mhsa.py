"""The cost of sparse attention beside the dense trunk's."""

import timm
import torch

from vitrail.cli import main
from vitrail.mhsa import attention_cost
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
