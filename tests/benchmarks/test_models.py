"""`benchmarks/models.py`: its command line, its results, and other people's code beside ours."""

import json
import sys
from dataclasses import replace

import pytest
import timm
import torch

from harness import footprint, networks, peers

PICO = ("--models", "biformer_pico", "--batch", 2, "--min-seconds", 0.01, "--min-rounds", 2, "--threads", 1)

# What stands for the authors' repository: its layout, and a network of ours that it builds.
CODE = """
from timm.models import create_model, register_model
from ops.bra_legacy import unused

@register_model
def biformer_pico():
    return create_model("biformer_pico")
"""
HELPER = "import not_installed.part\nfrom not_installed.other import thing as unused\n"


@pytest.fixture
def checkouts(tmp_path, monkeypatch):
    """A function that makes a folder of checkouts; its arguments are the files of one of them."""
    peer = next(peer for peer in peers.PEERS if peer.repository == "rayleizhu/BiFormer")
    peer = replace(peer, models=("biformer_pico",), unused=("not_installed",))
    others = tuple(p for p in peers.PEERS if p.repository != peer.repository)
    monkeypatch.setattr(peers, "PEERS", (peer, *others))

    def make(code=CODE, helper=HELPER):
        for name, text in (("models/biformer.py", code), ("ops/bra_legacy.py", helper)):
            file = tmp_path / "any name" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    before = set(sys.modules)
    yield make
    for name in set(sys.modules) - before:
        if name.startswith("_peer_"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "biformer_tinny"], "no model is called 'biformer_tinny'; did you mean biformer_tiny"),
        (["--batch", "0"], "'0' is no whole number of at least 1"),
        (["--size", "x"], "'x' is no whole number"),
        (["--min-rounds", "0"], "'0' is no whole number of at least 1"),
        (["--memory", "--training"], "leave --training and --compile out"),
        (["--memory", "--time-limit", "9"], "leave --time-limit out"),
        (["--memory", "--batch", "1", "8"], "--memory takes one batch size"),
        (["--peers", "no/such/folder"], "--peers: there is no folder 'no/such/folder'"),
        (["--output", "results.csv"], "must end with .json"),
    ],
)
def test_wrong_use_is_explained(run, models, arguments, message):
    result = run(models, *arguments)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_size_that_the_network_does_not_take_is_explained(run, models):
    result = run(models, "--models", "sparsifiner_pico", "--size", 33)
    assert result.code == 2
    assert "sparsifiner_pico does not run at 33x33" in result.err


def test_a_run_is_written_with_all_that_a_sceptic_wants(run, models, tmp_path):
    target = tmp_path / "models.json"
    result = run(models, *PICO, "--output", target)
    assert result.code == 0, result.err
    document = json.loads(target.read_text())
    assert {"date", "command", "versions", "machine", "compiler", "instruction_set", "gemm_gflops"} <= set(
        document
    )
    assert document["peers"] == {}
    rows = {row["candidate"]: row for row in document["rows"]}
    assert {"fused", "reference"} <= set(rows)
    for row in rows.values():
        assert (row["model"], row["size"], row["batch"], row["kind"]) == ("biformer_pico", 32, 2, "inference")
        assert row["seconds"] > 0
        assert row["rounds"] >= 2
        assert row["efficiency"] > 0
        assert row["error"] < 1e-3
    assert rows["fused"]["as_long_as"]["fused"] == 1
    assert "efficiency: 2 x MACs / time" in result.out
    shown = next(line.split()[-1] for line in result.out.splitlines() if "reference" in line)
    assert float(shown) == round(rows["reference"]["macs"] / 2 / 1e9, 2)


def test_a_step_of_training(run, models):
    document = run(models, *PICO, "--training", "--json").document
    assert [row["candidate"] for row in document["rows"]] == ["fused", "reference"]
    assert {row["kind"] for row in document["rows"]} == {"training"}
    assert all(row["error"] < 1e-4 for row in document["rows"])


def test_bfloat16_stands_beside_its_own_float32(run, models):
    document = run(models, *PICO, "--dtype", "bfloat16", "--json").document
    rows = {row["candidate"]: row for row in document["rows"]}
    assert rows["fused"]["dtype"] == "bfloat16"
    assert rows["fused, float32"]["dtype"] == "float32"
    assert rows["fused, float32"]["efficiency"] is None
    assert rows["fused, float32"]["as_long_as"]["fused"] > 0


def test_the_form_for_inference_is_measured_where_there_is_one(run, models, monkeypatch):
    monkeypatch.setattr(networks.zoo, "fuse_for_inference", lambda model, dtype=None: model, raising=False)
    document = run(models, *PICO, "--json").document
    assert [row["candidate"] for row in document["rows"]] == ["inference form", "fused", "reference"]
    assert document["rows"][2]["as_long_as"].keys() == {"fused", "inference form"}


def test_a_form_for_inference_that_computes_something_else_is_not_timed(run, models, monkeypatch):
    def fuse(model, dtype=None):
        with torch.no_grad():
            model.head.fc.bias += 1
        return model

    monkeypatch.setattr(networks.zoo, "fuse_for_inference", fuse, raising=False)
    result = run(models, *PICO)
    assert result.code == 1
    assert "inference form: what it computes differs from the definition" in result.err


# --- code of others ---------------------------------------------------------------------------------------------------


def test_the_same_network_is_timed_beside_ours(run, models, checkouts):
    result = run(models, *PICO, "--peers", checkouts(), "--json")
    assert result.code == 0, result.err
    document = result.document
    assert [row["candidate"] for row in document["rows"]][-1] == "authors"
    assert document["same_network"]["biformer_pico"]["authors"]["error"] < 1e-12
    assert document["peers"]["rayleizhu/BiFormer"] == {"folder": "any name", "commit": None}


def test_a_checkout_leaves_no_trace_among_our_modules(checkouts):
    entrypoint, path = timm.model_entrypoint("biformer_pico"), list(sys.path)
    found = peers.find_checkouts(checkouts())["biformer_pico"]
    stranger = sys.modules["ops"] = type(sys)("ops")
    try:
        for _ in range(2):  # the second time its modules are there already
            model = found.build("biformer_pico", 32)
        assert type(model).__name__ == "BiFormer"
        assert sys.modules["ops"] is stranger
    finally:
        del sys.modules["ops"]
    assert timm.model_entrypoint("biformer_pico") is entrypoint
    assert sys.path == path
    assert not any(isinstance(module, peers._AbsentModule) for module in sys.modules.values())
    assert sys.modules["_peer_BiFormer.models.biformer"].__name__ == "_peer_BiFormer.models.biformer"


def test_a_package_that_is_missing_is_named(run, models, checkouts):
    result = run(models, *PICO, "--peers", checkouts(helper="import nowhere_to_be_found\nunused = 1\n"))
    assert result.code == 2
    assert "needs nowhere_to_be_found: pip install nowhere_to_be_found" in result.err


def test_a_package_that_is_used_after_all_is_named(run, models, checkouts):
    result = run(models, *PICO, "--peers", checkouts(code=CODE.replace("return", "unused(); return")))
    assert result.code == 2
    assert "needs not_installed: pip install not_installed" in result.err


def test_a_folder_without_a_checkout_says_what_to_clone(run, models, tmp_path):
    result = run(models, *PICO, "--peers", tmp_path)
    assert result.code == 2
    assert "holds no checkout that is known here" in result.err
    assert "https://github.com/changsn/STViT-R" in result.err


def test_a_checkout_that_is_not_there_is_named(run, models, checkouts, monkeypatch):
    monkeypatch.setattr(models, "measure_all", lambda *_: ({"rows": []}, [], True))
    result = run(models, "--models", "biformer_pico", "stripmlp_tiny", "--peers", checkouts())
    assert result.code == 0
    assert "no checkout of Med-Process/Strip_MLP for stripmlp_tiny" in result.err
    assert "BiFormer" not in result.err


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('create_model("biformer_pico", num_classes=7)', "is another network: "),
        ('create_model("biformer_pico", topks=(1, 4, -2, -2))', "another number of multiply-accumulates"),
        ('create_model("biformer_pico", qk_scale=0.5)', "computes something else: logits differ by"),
    ],
)
def test_another_network_is_not_timed(run, models, checkouts, code, message):
    folder = checkouts(code=CODE.replace('create_model("biformer_pico")', code))
    result = run(models, *PICO, "--peers", folder)
    assert result.code == 1
    assert message in result.err


def test_a_network_of_others_that_fails_is_reported_and_the_rest_measured(run, models, checkouts):
    code = CODE.replace("return create", "model = create").replace(
        '_model("biformer_pico")',
        '_model("biformer_pico")\n    model.register_forward_pre_hook(refuse)\n    return model',
    )
    code += """
def refuse(module, args):
    if module.training:
        raise RuntimeError("not in this version of torch")
"""
    result = run(models, *PICO, "--training", "--peers", checkouts(code=code), "--json")
    assert result.code == 0, result.err
    assert [row["candidate"] for row in result.document["rows"]] == ["fused", "reference"]
    assert "not in this version of torch" in result.document["failed"]["biformer_pico"]["authors"]
    assert "warning: biformer_pico, authors: RuntimeError: not in this version of torch" in result.err


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_memory_is_measured_in_a_process_of_its_own():
    task = footprint.Task("biformer_pico", 64, "fused", True, 2, "float32", 1, None)
    found = footprint.measure(task)
    assert found.weights > 1e6
    assert found.peak.allocated > 2 * 64 * 64 * 32  # at least some maps of the first stage
    assert found.peak.resident is None or found.peak.resident > 0


def test_the_table_of_memory(run, models, monkeypatch):
    def measure(task):
        size = 2**20 * (3 if task.candidate == "reference" else 1)
        return footprint.Footprint(footprint.Peak(size, size), 2**20)

    monkeypatch.setattr(footprint, "measure", measure)
    result = run(models, "--memory", "--models", "biformer_pico", "--size", 32, "--json")
    assert result.code == 0, result.err
    rows = [(row["candidate"], row["kind"], row["allocated_bytes"]) for row in result.document["rows"]]
    assert ("reference", "training", 3 * 2**20) in rows
    text = run(models, "--memory", "--models", "biformer_pico", "--size", 32).out
    assert "3.00x" in text
