"""The models, one file per family. Importing this package registers them with timm."""

from timm.models import list_models

from . import biformer, stripmlp

FAMILIES = {"biformer": biformer, "stripmlp": stripmlp}


def list_families() -> dict[str, list[str]]:
    """Names of the registered models of each family."""
    return {
        family: [name for name in list_models(f"{family}*") if hasattr(module, name)]
        for family, module in FAMILIES.items()
    }


__all__ = ["FAMILIES", "list_families"]
