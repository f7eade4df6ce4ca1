import re
import shutil
from pathlib import Path

import pytest
import torch

from vitrail.export.images import sample_photos

PAGE = Path(__file__).parents[2] / "docs" / "EXPORT.md"


def test_the_serving_snippet_of_the_documentation_runs_and_agrees(exported, tmp_path, monkeypatch, capsys):
    model, path, _ = exported
    shutil.copy(path, tmp_path / "model.onnx")
    shutil.copy(sample_photos()[0], tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    snippet = next(
        code
        for code in re.findall(r"```python\n(.+?)```", PAGE.read_text(), re.DOTALL)
        if "InferenceSession" in code
    )
    names = {}
    exec(snippet, names)
    with torch.no_grad():
        expected = model(torch.from_numpy(names["batch"]))
    assert names["logits"] == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)
    assert capsys.readouterr().out == f"[{expected.argmax().item()}]\n"
