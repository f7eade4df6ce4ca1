"""Efficient vision backbones for PyTorch. Importing the package registers its models with timm.

`profile` (parameters and multiply-accumulates) and `explain_picture` (what a place in a photo looks at) live here
too and are imported when first used.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout the subpackages lie beside this folder, not in it. An installed package has them inside; a clone
# that is the current directory hides that package and must import all the same.
if not (Path(__file__).parent / "zoo").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from . import zoo as zoo

if TYPE_CHECKING:
    from .explain import explain_picture as explain_picture
    from .profiling import profile as profile

__version__ = "0.1.0"

_LAZY = {"profile": "profiling", "explain_picture": "explain"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vitrail' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
