"""Weights of the Sparsifiners: what timm knows of them, and the layouts that they come in."""

import warnings
from typing import Any, Dict

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from .weights import check_state_dict, resample_tokens

ADVICE = (
    "the authors released no trained Sparsifiner. Start from the trunk's weights, e.g. "
    "timm.create_model('{tag}', pretrained=True), and train; or pass a file of your own: "
    "pretrained_cfg_overlay=dict(file=...)"
)


def cfg(url: str = "", **kwargs: Any) -> Dict[str, Any]:
    """What timm knows of a set of weights."""
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2303.13755",
        "paper_name": "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        "origin_url": "https://github.com/lim142857/Sparsifiner",
        **kwargs,
    }


# the authors' names
_RENAMES = {
    ".mask_predictor.proj_c_q.": ".predictor.q_down.",
    ".mask_predictor.proj_c_k.": ".predictor.k_down.",
    ".mask_predictor.proj_n": ".predictor.token_down",
    ".mask_predictor.proj_back_n": ".predictor.basis",
}


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: Any) -> Dict[str, Tensor]:
    """Turn the authors' layout, or the trunk's (DeiT, LV-ViT), into ours. Refuses what does not fit the model.

    What belongs to another image size is resampled. A trunk without predictors leaves the model's as they are.
    """
    renamed = {}
    for key, value in state_dict.items():
        for old, new in _RENAMES.items():
            key = key.replace(old, new)
        renamed[key] = value
    wanted = model.state_dict()
    predictors = {key: value for key, value in wanted.items() if ".predictor." in key}
    for key in [key for key in renamed if key.endswith(".basis") and key not in wanted]:
        other = renamed.get(key.replace(".basis", ".token_down"))
        if other is not None and torch.equal(renamed[key], other):
            del renamed[key]  # one matrix, which the authors save under both names
    if not any(".predictor." in key for key in renamed):
        warnings.warn(
            "the checkpoint holds a trunk without connectivity predictors: they keep their initial values, "
            "train them first (reconstruction_loss)",
            stacklevel=2,
        )
        renamed |= predictors
    resample_tokens(renamed, model, (".token_down", ".basis"))
    tables = {key for key in predictors if key.endswith((".token_down", ".basis"))} & renamed.keys()
    rows = {renamed[key].shape[-1:] for key in tables}
    if model.free_num_basis and len(rows) == 1 and len(*rows) == 1:
        check_state_dict(renamed | {key: wanted[key] for key in tables}, model)  # before the model is changed
        model.set_num_basis(*rows.pop())
    return check_state_dict(renamed, model)
