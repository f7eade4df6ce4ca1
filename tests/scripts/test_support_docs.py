"""Tables of what is supported: worst figures, refusals with their numbers, what was not tried."""

import json

import pytest
import support_docs

CELLS = [
    cell
    for columns in (support_docs.RUNTIME, support_docs.ENGINES)
    for group in columns.values()
    for cell in group
]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A function from outcomes by model to the cells of all rows, and the text."""
    monkeypatch.setattr(support_docs, "RECORD", tmp_path / "support.json")

    def made(models):
        record = {"versions": {"torch": "2.99"}, "models": models}
        support_docs.RECORD.write_text(json.dumps(record))
        text = support_docs.support()
        lines = [
            [cell.strip() for cell in line.strip("| ").split("|")]
            for line in text.splitlines()
            if line.startswith("|")
        ]
        return lines, text

    return made


def outcomes(axes, outcome, **others):
    return {f"{axes}-{cell}": others.get(cell.replace("-", "_"), outcome) for cell in CELLS}


def test_of_a_fixed_and_an_open_batch_the_worse_counts(rows):
    lines, text = rows(
        {
            "m": {
                **outcomes("fixed", "verified 1.0e-07"),
                **outcomes("batch", "verified 2.5e-03", onnx_float16="built"),
            }
        }
    )
    assert "torch 2.99" in text
    assert lines[2] == ["`m`", "nothing, or batch", "2.5e-3", "1.0e-7, built", *["2.5e-3"] * 5]


def test_refusals_of_one_kind_share_a_number_and_name_their_models(rows):
    reason = "refused {} has one size: no more. Leave it out"
    models = {
        name: {**outcomes("batch", "built"), **outcomes("sides", reason.format(name))}
        for name in ("net_a", "net_b")
    }
    models["net_b"]["sides-int8-int8"] = "refused too large"
    lines, text = rows(models)
    assert lines[2][:3] == ["`net_a`", "batch", "built"]
    assert lines[3] == ["`net_a`", "batch, height, width", *["(1)"] * 7]
    assert lines[5][-1] == "(2)"
    assert text.endswith("1. `net_a`, `net_b`: it has one size: no more\n2. `net_b`: too large")


def test_what_was_not_tried_says_so(rows):
    some = outcomes("batch", "built")
    del some["batch-int8-int8"]
    lines, _ = rows({"m": some})
    assert lines[2][2:] == [*["built"] * 6, support_docs.NOT_TRIED]
