"""Sparsifiner, whose file must choose the keys and tokens that the model chooses, image by image."""

import onnx
import pytest
import timm
import torch

from vitrail.export import to_onnx, verify_onnx
from vitrail.ops import use_ops

FORMS = {
    "plain": ("sparsifiner_pico", {}),
    "pruned": ("sparsifiner_pico", {"token_pruning_loc": (0, 1), "token_keep_rate": [0.5, 0.25]}),
    "by threshold": ("sparsifiner_pico", {"attn_score_threshold": 0.02, "basis_coef_topk": 0}),
    "LV-ViT": ("sparsifiner_lvvit_small", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}),
}


def network(form):
    """Two blocks, with weights large enough for choices to matter and not to tie."""
    name, options = FORMS[form]
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, num_classes=5, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_the_file_agrees_with_torch_at_any_batch_size(form, tmp_path):
    model = network(form)
    report = to_onnx(model, tmp_path / "m.onnx", img_size=32)
    assert report.verification.passed
    assert {check.shape[0] for check in report.verification.checks} == {1, 3}
    assert {node.domain for node in onnx.load(tmp_path / "m.onnx").graph.node} <= {"", "ai.onnx"}
    with use_ops("reference"):
        assert verify_onnx(tmp_path / "m.onnx", model, img_size=32).passed
