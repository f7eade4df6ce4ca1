"""Checkpoints load whole, safely, or not at all."""

import contextlib
import io
import pickle
import re
import sys
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vitrail.zoo import list_families
from vitrail.zoo.weights import CheckpointError, convert_checkpoint, read_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from parity import authors_checkpoint  # noqa: E402
from seeded import load_case, relative_error, seeded_image  # noqa: E402


class Malicious:
    def __reduce__(self):
        return (open, (str(Malicious.trace), "w"))


@pytest.fixture(scope="module")
def case():
    return load_case(GOLDEN / "biformer_tiny_224.json")


@pytest.fixture(scope="module")
def authors_file(case, tmp_path_factory):
    """A training checkpoint as the authors save them: weights under `model`, options beside them."""
    path = tmp_path_factory.mktemp("weights") / "authors.pth"
    torch.save({"model": authors_weights(case), "epoch": 299}, path)
    return path


def authors_weights(case):
    """float32, with all that a published file also holds."""
    return {key: x.float() if x.is_floating_point() else x for key, x in authors_checkpoint(case).items()}


def partial_of(weights):
    return {key: value for key, value in weights.items() if key != "norm.weight"}


def bad_files(folder, authors_file):
    """Name -> (file, what the one error must say)."""
    weights = torch.load(authors_file, weights_only=True)["model"]
    Malicious.trace = folder / "executed"

    def write(name, content):
        torch.save(content, folder / name)
        return folder / name

    (folder / "truncated.pth").write_bytes(authors_file.read_bytes()[:100_000])
    (folder / "text.pth").write_text("not a checkpoint")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "pickled.pth").write_bytes(pickle.dumps({"model": Malicious()}))
    save_file({"a": torch.zeros(3)}, folder / "whole.safetensors")
    (folder / "truncated.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-4])
    wide = dict(weights, **{"stages.0.0.attn.wo.weight": torch.zeros(96, 96), "norm.weight": torch.zeros(7)})
    broken = dict(weights, **{"norm.bias": torch.full((512,), torch.nan)})
    resnet = timm.create_model("resnet18").state_dict()
    channels = dict(weights, **{"downsample_layers.0.0.weight": torch.zeros(32, 5, 3, 3)})
    whole_numbers = {
        key: value.long() if key.startswith("norm.") else value for key, value in weights.items()
    }
    several = dict(
        partial_of(weights), **{"surplus": torch.zeros(1), "norm.bias": torch.full((512,), torch.inf)}
    )
    partial = {key: value for key, value in weights.items() if not key.startswith("stages.2.0.")}
    return {
        "missing": (folder / "nowhere.pth", "no checkpoint at .*nowhere.pth"),
        "truncated": (folder / "truncated.pth", "truncated.pth is truncated or no torch checkpoint"),
        "text": (folder / "text.pth", "text.pth is no torch checkpoint"),
        "empty": (folder / "empty.pth", "empty.pth is truncated or no torch checkpoint"),
        "truncated safetensors": (folder / "truncated.safetensors", "is truncated or no safetensors"),
        "malicious": (write("malicious.pth", {"model": weights, "hook": Malicious()}), "could run code"),
        "malicious pickle": (folder / "pickled.pth", "could run code"),
        "wrong family": (write("resnet.pth", resnet), "no checkpoint of biformer_tiny: 0 of its"),
        "wrong size": (write("wide.pth", wide), r"2 mismatches: of another shape \(2\): .*attn.proj.weight \(96, 96\) instead of \(64, 64\)"),
        "missing layers": (write("partial.pth", partial), r"16 mismatches: missing \(16\): stages.2.blocks.0.*, stages.2.blocks.0.mlp.fc2.bias$"),
        "left-over keys": (write("extra.pth", dict(weights, surplus=torch.zeros(1))), r"1 mismatches: unknown \(1\): surplus$"),
        "NaN": (write("nan.pth", broken), r"with NaN or infinity \(1\): norm.bias$"),
        "wrong channels": (write("channels.pth", channels), r"stem.0.weight \(32, 5, 3, 3\) instead of \(32, 3, 3, 3\)"),
        "wrong kind": (write("whole.pth", whole_numbers), r"of another kind \(4\): norm.weight torch.int64 instead of torch.float32, "),
        "all at once": (write("several.pth", several), r"3 mismatches: missing \(1\): norm.weight; unknown \(1\): surplus; with NaN or infinity \(1\): norm.bias"),
        "no tensors": (write("text_dict.pth", {"state_dict": {"a": "b"}}), "entries that are no tensors: a"),
        "a bare list": (write("list.pth", [1, 2]), "holds no state dict, but list"),
    }  # fmt: skip


BAD = [
    "missing", "truncated", "text", "empty", "truncated safetensors", "malicious", "malicious pickle", "wrong family",
    "wrong size", "missing layers", "left-over keys", "NaN", "wrong channels", "wrong kind", "all at once", "no tensors",
    "a bare list",
]  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory, authors_file):
    files = bad_files(tmp_path_factory.mktemp("bad"), authors_file)
    assert sorted(files) == sorted(BAD)
    return files


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_gives_one_error_and_no_output(kind, bad, tmp_path):
    path, message = bad[kind]
    with pytest.raises(CheckpointError, match=message) as error:
        convert_checkpoint("biformer_tiny", path, tmp_path / "out.safetensors")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match=message):
        timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert not Malicious.trace.exists(), "code in the file was executed"


@settings(max_examples=150)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused_with_the_same_error(content):
    for suffix in (".pth", ".safetensors"):
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            file.write(content)
            file.flush()
            with pytest.raises(CheckpointError):
                read_checkpoint(file.name)


@settings(max_examples=150)
@given(data=st.data(), old_format=st.booleans())
def test_a_damaged_checkpoint_loads_or_is_refused_and_never_fails_otherwise(data, old_format):
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.arange(6.0)}}, buffer, _use_new_zipfile_serialization=not old_format)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        file.write(content)
        file.flush()
        with contextlib.suppress(CheckpointError):
            assert all(isinstance(value, torch.Tensor) for value in read_checkpoint(file.name).values())


def test_the_authors_layout_loads_through_timm(case, authors_file):
    overlay = {"file": str(authors_file)}
    model = timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        logits = model(seeded_image(case.input_shape, case.input_seed).float())
    assert relative_error(logits, case.logits) < 1e-5
    assert "state_dict" not in model.pretrained_cfg


def test_a_converted_file_loads_and_equals_the_source(authors_file, tmp_path):
    report = convert_checkpoint("biformer_tiny", authors_file, tmp_path / "out.safetensors")
    assert (report.parameters, report.num_classes) == (13_142_760, 1000)
    overlay = {"file": str(tmp_path / "out.safetensors")}
    ours = timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    theirs = timm.create_model(
        "biformer_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(authors_file)}
    )
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def test_classes_and_channels_adapt_as_timm_users_expect(authors_file):
    overlay = {"file": str(authors_file)}
    model = timm.create_model(
        "biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1
    )
    assert model.head.fc.weight.shape == (5, 512)
    assert model.stem[0].weight.shape[1] == 1
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 5)
    net = timm.create_model(
        "biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True
    )
    assert len(net(torch.randn(1, 3, 64, 64))) == 4


def test_a_checkpoint_with_other_classes_converts_with_its_own_head(tmp_path):
    source = timm.create_model("biformer_tiny", num_classes=10)
    torch.save(source.state_dict(), tmp_path / "ten.pth")
    report = convert_checkpoint("biformer_tiny", tmp_path / "ten.pth", tmp_path / "ten.safetensors")
    assert report.num_classes == 10
    assert load_file(tmp_path / "ten.safetensors")["head.fc.weight"].shape == (10, 512)


def test_the_target_must_be_safetensors_in_a_folder_that_exists(authors_file, tmp_path):
    with pytest.raises(ValueError, match=r"must end in .safetensors, got out.pth"):
        convert_checkpoint("biformer_tiny", authors_file, tmp_path / "out.pth")
    with pytest.raises(ValueError, match="does not exist; create it first"):
        convert_checkpoint("biformer_tiny", authors_file, tmp_path / "no" / "out.safetensors")


def test_a_full_disk_leaves_nothing_behind(authors_file, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitrail.zoo.weights.save_file", full)
    (tmp_path / "out.safetensors").write_bytes(b"older file")
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint("biformer_tiny", authors_file, tmp_path / "out.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
    assert (tmp_path / "out.safetensors").read_bytes() == b"older file"


def test_published_weights_are_kept_under_the_models_own_name(authors_file, tmp_path, monkeypatch):
    """The authors' host names every file `content`; a cache by that name would mix the models up."""
    asked = []

    def download(url, target, progress):
        asked.append(url)
        Path(target).write_bytes(authors_file.read_bytes())

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    for _ in range(2):
        model = timm.create_model("biformer_tiny", pretrained=True)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["vitrail_biformer_tiny.pth"]
    assert asked == [model.pretrained_cfg["url"]]


def test_a_failed_download_tells_how_to_go_on(tmp_path, monkeypatch):
    def download(*args, **kwargs):
        raise OSError("network unreachable")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    with pytest.raises(
        CheckpointError, match=r"could not download the weights of biformer_small.*by hand.*file="
    ):
        timm.create_model("biformer_small", pretrained=True)


def test_options_saved_beside_the_weights_do_no_harm(authors_file, tmp_path):
    from argparse import Namespace

    content = torch.load(authors_file, weights_only=True)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in content["model"].items()}, "args": Namespace(lr=1)},
        tmp_path / "a.pth",
    )
    assert read_checkpoint(tmp_path / "a.pth").keys() == content["model"].keys()


# --- the Hugging Face hub ---------------------------------------------------------------------------------------------


def as_the_hub_keeps_it(cache, repository, name, write, revision="main"):
    """A file in the hub's cache, which a download would have left there."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    write(folder / "snapshots" / ("0" * 40) / name)


@pytest.fixture
def offline(monkeypatch):
    """The hub's own library, real but for the network, which it must not even try."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_timms_davit_weights_come_from_the_hub_and_compute_what_they_do_in_timm(offline, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("davit_tiny").eval()
    as_the_hub_keeps_it(
        tmp_path,
        "timm/davit_tiny.msft_in1k",
        "model.safetensors",
        lambda path: save_file(theirs.state_dict(), path),
    )
    ours = timm.create_model("davit_fused_tiny", pretrained=True, cache_dir=tmp_path).eval()
    image = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        assert relative_error(ours(image), theirs(image)) < 1e-5
    assert ours.pretrained_cfg["hf_hub_id"] == "timm/davit_tiny.msft_in1k"
    assert "state_dict" not in ours.pretrained_cfg


def test_stvit_r_weights_come_from_the_authors_file_on_the_hub(offline, tmp_path):
    case = load_case(GOLDEN / "stvitr_swin_small_224.json")
    weights = authors_weights(case)
    as_the_hub_keeps_it(
        tmp_path, "csncsn/STViT-R", "STViT-R-Swin-S.pth", lambda path: torch.save({"model": weights}, path)
    )
    model = timm.create_model("stvit_r_swin_small", pretrained=True, cache_dir=tmp_path).eval()
    with torch.inference_mode():
        logits = model(seeded_image(case.input_shape, case.input_seed).float())
    assert relative_error(logits, case.logits) < 1e-5


def test_a_file_from_the_hub_is_read_as_safely_as_any_other(offline, tmp_path):
    Malicious.trace = tmp_path / "executed"
    as_the_hub_keeps_it(
        tmp_path,
        "csncsn/STViT-R",
        "STViT-R-Swin-S.pth",
        lambda path: torch.save({"model": Malicious()}, path),
    )
    with pytest.raises(CheckpointError, match="could run code"):
        timm.create_model("stvit_r_swin_small", pretrained=True, cache_dir=tmp_path)
    assert not Malicious.trace.exists()


def test_without_a_network_the_error_tells_what_to_fetch_and_how_to_go_on(offline, tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"could not fetch STViT-R-Swin-B.pth of csncsn/STViT-R .*by hand and pass .*file=",
    ) as error:
        timm.create_model("stvit_r_swin_base", pretrained=True, cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_the_usual_names_are_tried_in_turn_and_a_revision_is_passed_on(monkeypatch, authors_file):
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repository, name, revision, cache_dir):
        asked.append((repository, name, revision))
        if name == "model.safetensors":
            raise EntryNotFoundError("no such file")
        return str(authors_file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    overlay = {"hf_hub_id": "someone/biformer@v2"}
    timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    assert asked == [("someone/biformer", name, "v2") for name in ("model.safetensors", "pytorch_model.bin")]

    overlay |= {"hf_hub_filename": "model.safetensors"}
    with pytest.raises(
        CheckpointError, match=r"someone/biformer on the Hugging Face hub has no model.safetensors"
    ):
        timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_local_copy_of_a_repository_loads(authors_file, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(authors_file.read_bytes())
    overlay = {"source": "local-dir", "file": str(tmp_path)}
    model = timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.pretrained_cfg["source"] == "local-dir"
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model.safetensors and no pytorch_model.bin"):
        timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay)


# --- what there is ----------------------------------------------------------------------------------------------------

MODELS = [name for names in list_families().values() for name in names]
SOURCES = {
    name: [tag for tag in timm.list_pretrained(f"{name}.*") if timm.get_pretrained_cfg(tag).has_weights]
    for name in MODELS
}


@pytest.mark.parametrize("name", [name for name in MODELS if not timm.get_pretrained_cfg(name).has_weights])
def test_where_nothing_was_published_the_error_tells_what_to_do(name):
    with pytest.raises(CheckpointError, match=rf"there are no weights for {name} to load: .*file=") as error:
        timm.create_model(name, pretrained=True, device="meta")
    for tag in re.findall(r"create_model\('([^']+)'", str(error.value)):
        assert timm.get_pretrained_cfg(tag).has_weights, tag


def test_a_file_with_another_number_of_classes_is_one_error_that_names_both(tmp_path):
    torch.save(timm.create_model("biformer_tiny", num_classes=10).state_dict(), tmp_path / "ten.pth")
    with pytest.raises(
        CheckpointError, match=r"file has 10 classes where biformer_tiny has 1000: .*num_classes=10"
    ):
        timm.create_model(
            "biformer_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "ten.pth")}
        )


def test_families_list_their_registered_models():
    families = list_families()
    assert list(families) == ["biformer", "davit_fused", "sparsifiner", "stripmlp", "stvit"]
    for family, names in families.items():
        assert names
        assert set(names) <= set(timm.list_models(f"{family}*"))
    assert set(families["biformer"]) >= {"biformer_base", "biformer_stl_nchw", "biformer_tiny"}
