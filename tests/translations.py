"""Torch makes its table of ONNX translations anew for every export, which takes longer than exporting a small model."""

import copy
import functools


def remember_translations():
    """Let this process make it once for each operator set."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    make = functools.cache(ONNXRegistry.from_torchlib)

    def remembered(*args, **kwargs):
        registry = copy.copy(make(*args, **kwargs))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(remembered)
