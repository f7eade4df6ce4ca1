import json
import subprocess
import sys

import pytest
import timm

import vitrail

HEAVY = [
    "onnx",
    "onnxruntime",
    "onnxscript",
    "fvcore",
    "sklearn",
    "rich",
    "matplotlib",
    "yaml",
    "PIL.ImageDraw",
]


def test_import_prints_nothing_and_leaves_heavy_packages_alone(tmp_path):
    code = f"""
import sys, timm
before = set(sys.modules)
import vitrail, json
new = set(sys.modules) - before
sys.stderr.write(json.dumps([name for name in {HEAVY} if name in new]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert json.loads(done.stderr) == []


def test_import_registers_the_models_with_timm():
    assert timm.is_model("biformer_tiny")


def test_public_functions_are_found_without_importing_their_modules_by_hand():
    from vitrail.explain import explain_picture
    from vitrail.profiling import profile

    assert vitrail.profile is profile
    assert vitrail.explain_picture is explain_picture
    assert {"profile", "explain_picture", "__version__"} <= set(dir(vitrail))


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prophile'"):
        _ = vitrail.prophile
