"""Write docs/MODELS.md from the registry: names, figures, sizes, weights, options.

python scripts/model_docs.py           # write it
python scripts/model_docs.py --check   # fail if it is not up to date
"""

import argparse
import re
import sys
from collections.abc import Iterator
from inspect import getdoc
from pathlib import Path

import timm
import torch
from rich.progress import track
from torch import nn

from vitrail.catalog import ModelRow, describe, size_rule
from vitrail.published import published_figures
from vitrail.zoo import list_families

TARGET = Path(__file__).resolve().parents[1] / "docs" / "MODELS.md"

_INTRO = """\
# Models

<!-- Written by scripts/model_docs.py (`make docs`); change the sources, not this page. -->

All that `timm.create_model` knows after `import vitrail`. Parameters are in millions, multiply-accumulates (which the
papers call FLOPs) in billions for one image of the size given; beside ours, counted, stand the paper's. Top-1 is
ImageNet-1K accuracy as published, not measured here. Where no figure was published there is a dash.

Besides their own options, all models take timm's: `num_classes`, `in_chans`, `img_size`, `global_pool`, `drop_rate`,
`drop_path_rate`, `features_only`, `out_indices`, `device`, `dtype`. [WEIGHTS.md](WEIGHTS.md) says where weights come
from and how to load them.
"""


def arguments(cls: type[nn.Module]) -> Iterator[tuple[str, str]]:
    """Names and descriptions under `Args:` in a class's docstring."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", getdoc(cls) or "", re.MULTILINE | re.DOTALL)
    if section is None:
        raise SystemExit(f"error: the docstring of {cls.__name__} has no `Args:` to list its options from")
    for entry in re.split(r"\n(?=    \S)", section[1].rstrip()):
        names, _, text = " ".join(entry.split()).partition(": ")
        yield names, text


def figure(ours: float, paper: float | None, digits: int) -> str:
    """Ours and the paper's."""
    return f"{ours:.{digits}f} / {'-' if paper is None else f'{paper:g}'}"


def row(model: ModelRow, rule: str) -> str:
    """One line of a family's table."""
    paper = model.published
    height, width = model.img_size
    cells = [
        f"`{model.name}`",
        figure(model.parameters / 1e6, paper.params if paper else None, 2),
        figure(model.macs / 1e9, paper.gmac if paper else None, 2),
        f"{paper.top1:g}" if paper and paper.top1 else "-",
        f"{height}" if height == width else f"{height} x {width}",
        rule,
        f"[{model.weights}]({model.weights_url})" if model.weights_url else model.weights,
    ]
    return f"| {' | '.join(cells)} |"


def family(name: str, models: list[str], rows: dict[str, ModelRow]) -> str:
    """A family's section."""
    paper = next(p for p in map(published_figures, models) if p)
    classes: dict[type[nn.Module], list[str]] = {}
    rules = {}
    for model in models:
        with torch.device("meta"):
            network = timm.create_model(model)
        classes.setdefault(type(network), []).append(model)
        rules[model] = size_rule(network)
    lines = [
        f"## `{name}`",
        "",
        f"{paper.paper}, {paper.venue}: [paper]({paper.url}), [authors' code]({paper.code}).",
        "",
        "| model | parameters, ours / paper | GMAC, ours / paper | top-1 | image | sizes | weights |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
        *(row(rows[model], rules[model]) for model in models),
        "",
    ]
    for cls, users in classes.items():
        which = "" if len(classes) == 1 else f" of {', '.join(f'`{user}`' for user in users)}"
        lines += [f"Options{which}:", ""]
        lines += [f"- `{option.replace(', ', '`, `')}`: {text}" for option, text in arguments(cls)]
        lines.append("")
    return "\n".join(lines)


def document() -> str:
    """The whole page."""
    families = list_families()
    names = [name for models in families.values() for name in models]
    rows = {name: describe(name) for name in track(names, "counting", transient=True)}
    sections = [
        family(name, sorted(models, key=lambda m: (rows[m].macs, m)), rows)
        for name, models in families.items()
    ]
    return "\n".join([_INTRO, *sections])


def main() -> int:
    """Write the page or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/MODELS.md is not up to date")
    options = parser.parse_args()
    text = document()
    if not options.check:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
        print("error: docs/MODELS.md is not what the registry says; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
