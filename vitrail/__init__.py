"""Efficient vision backbones for PyTorch. Importing the package registers its models with timm."""

from . import zoo as zoo

__version__ = "0.1.0"
