"""Efficient vision backbones for PyTorch. Importing the package registers its models with timm."""

from pathlib import Path

# In a checkout the subpackages lie beside this folder, not in it. An installed package has them inside; a clone
# that is the current directory hides that package and must import all the same.
if not (Path(__file__).parent / "zoo").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from . import zoo as zoo

__version__ = "0.1.0"
