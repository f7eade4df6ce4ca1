"""The models, one file per family or two. Importing this package registers them with timm."""

from timm.models import list_models

from . import biformer, davit_fused, sparsifiner, sparsifiner_lvvit, stripmlp, stvit_deit, stvit_swin
from .inference import fuse_for_inference

FAMILIES = {
    "biformer": (biformer,),
    "davit_fused": (davit_fused,),
    "sparsifiner": (sparsifiner, sparsifiner_lvvit),
    "stripmlp": (stripmlp,),
    "stvit": (stvit_deit, stvit_swin),
}


def list_families() -> dict[str, list[str]]:
    """Names of the registered models of each family."""
    return {
        family: [
            name for name in list_models(f"{family}*") if any(hasattr(module, name) for module in modules)
        ]
        for family, modules in FAMILIES.items()
    }


__all__ = ["FAMILIES", "fuse_for_inference", "list_families"]
