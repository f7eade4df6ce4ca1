import os

import pytest

from vitrail.export import to_onnx
from vitrail.export.files import check_target, write_atomically


def test_a_file_is_written_whole(tmp_path):
    write_atomically(tmp_path / "m.onnx", b"abc")
    assert (tmp_path / "m.onnx").read_bytes() == b"abc"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old")
    target.chmod(0o640)
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_new_file_has_the_permissions_that_the_user_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "m.onnx", b"abc")
    finally:
        os.umask(before)
    assert (tmp_path / "m.onnx").stat().st_mode & 0o777 == 0o640


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real.onnx").write_bytes(b"old")
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    write_atomically(check_target(tmp_path / "link.onnx", ".onnx"), b"new")
    assert (tmp_path / "link.onnx").is_symlink()
    assert (tmp_path / "real.onnx").read_bytes() == b"new"


@pytest.fixture(params=["new", "existing"])
def target(request, tmp_path):
    path = tmp_path / "m.onnx"
    if request.param == "existing":
        path.write_bytes(b"old")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    yield path
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_a_failure_at_any_step_of_writing_changes_nothing(target, monkeypatch, step, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_atomically(target, b"new")


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("capture", KeyboardInterrupt),
        ("translate", OSError),
        ("check", KeyboardInterrupt),
        ("verify_onnx", MemoryError),
        ("write_atomically", OSError),
    ],
)
def test_a_failure_at_any_step_of_an_export_changes_nothing(make, target, monkeypatch, step, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(f"vitrail.export.onnx.{step}", fail)
    model = make("Attentive").train()
    with pytest.raises(error):
        to_onnx(model, target, img_size=32)
    assert model.training


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("m.pth", ValueError, r"must end with \.onnx, got '.*m\.pth'"),
        ("m", ValueError, r"must end with \.onnx"),
        ("missing/m.onnx", FileNotFoundError, "the folder .*missing does not exist; create it first"),
        ("file.txt/m.onnx", NotADirectoryError, r"file\.txt is not a folder"),
        ("folder.onnx", IsADirectoryError, "is a directory; name a file in it"),
    ],
)
def test_an_impossible_target_is_refused_before_any_work(make, tmp_path, name, error, message):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(error, match=message):
        to_onnx(make("Attentive"), tmp_path / name, img_size=32, progress=lambda text: pytest.fail(text))


def test_a_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="is not writable"):
        check_target(tmp_path / "m.onnx", ".onnx")
