"""Write docs/MODELS.md from the registry: names, figures, sizes, weights, options.

python scripts/model_docs.py           # write it
python scripts/model_docs.py --check   # fail if it is not up to date
"""

import re
import sys
from collections.abc import Iterator
from inspect import getdoc
from pathlib import Path
from urllib.parse import urlsplit

import timm
import torch
from pages import write_pages
from rich.progress import track
from torch import nn

from vitrail.catalog import ModelRow, describe, size_rule
from vitrail.published import published_figures
from vitrail.zoo import list_families

DOCS = Path(__file__).resolve().parents[1] / "docs"

_MODELS = """\
# Models

<!-- Written by scripts/model_docs.py (`make docs`); change the sources, not this page. -->

All that `timm.create_model` knows after `import vitrail`. Parameters are in millions, multiply-accumulates (which the
papers call FLOPs) in billions for one image of the size given; beside ours, counted, stand the paper's. Top-1 is
ImageNet-1K accuracy as published, not measured here. Where no figure was published there is a dash.

Besides their own options, all models take timm's: `num_classes`, `in_chans`, `img_size`, `global_pool`, `drop_rate`,
`drop_path_rate`, `features_only`, `out_indices`, `device`, `dtype`. [WEIGHTS.md](WEIGHTS.md) says where weights come
from and how to load them.
"""


_WEIGHTS = """\
# Weights

<!-- Written by scripts/model_docs.py (`make docs`); change the sources, not this page. -->

Where weights were published, by their authors or by timm, `pretrained=True` fetches them. Nothing is fetched before,
and from any source only tensors are read: pickled code in a file is never run, and such a file is refused.

```python
import timm
import vitrail  # noqa: F401

model = timm.create_model("davit_fused_tiny", pretrained=True)  # the first tag of the table
model = timm.create_model("stvit_deit_small.deit_in1k_init", pretrained=True)  # the trunk of another network
model = timm.create_model("stripmlp_tiny", pretrained=True, pretrained_cfg_overlay={"file": "authors.pth"})
```

A file in the authors' layout loads as it is. `vitrail convert` checks it once in every tensor and writes safetensors:

```sh
vitrail convert stripmlp_tiny authors.pth stripmlp_tiny.safetensors
```

Tags that end in `_init` start a network from the weights of its trunk (DeiT, Swin, LV-ViT): what the trunk does not
have keeps its random initialisation, a warning says so, and the model has to be trained. A file that holds such a trunk
does the same: name it with `pretrained_cfg_overlay`, or hand it to `vitrail convert`.

Tables, strips and bases that belong to an image size are resampled where a model is built for another, with a warning.
With `num_classes` other than the file's the classifier starts anew, with `in_chans` other than 3 the first convolution
is adapted, both as timm does. Whatever else does not fit is one error that lists every mismatch, and nothing is loaded.

To work without a network, fetch the file elsewhere and name it as above, or copy a repository of the hub and load
`timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay={"source": "local-dir", "file": "folder"})`.
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


def sources(models: list[str]) -> Iterator[str]:
    """A line for every set of weights of a family's models, and for every model without any."""
    for model in models:
        tags = timm.list_pretrained(f"{model}.*")
        for tag in tags:
            cfg = timm.get_pretrained_cfg(tag)
            if cfg.hf_hub_id:
                file = f", `{cfg.hf_hub_filename}`" if cfg.hf_hub_filename else ""
                source = f"[{cfg.hf_hub_id}](https://huggingface.co/{cfg.hf_hub_id}){file}"
            else:
                source = f"[{urlsplit(cfg.url).hostname}]({cfg.url})"
            layout = "timm's" if (cfg.hf_hub_id or "").startswith("timm/") else "the authors'"
            yield f"| `{tag}` | {source} | {cfg.license} | {layout} |"
        if not tags:
            yield f"| `{model}` | {weights_of(model)} | | |"


def weights_of(model: str) -> str:
    """What is known of weights that cannot be fetched."""
    paper = published_figures(model)
    return paper.weights if paper else "none; to be trained"


def weights_page() -> str:
    """docs/WEIGHTS.md."""
    sections = [_WEIGHTS]
    for name, models in list_families().items():
        sections += [
            f"## `{name}`\n",
            "| weights | source | licence | layout |\n| --- | --- | --- | --- |",
            *sources(models),
            "",
        ]
    return "\n".join(sections)


def models_page() -> str:
    """docs/MODELS.md."""
    families = list_families()
    names = [name for models in families.values() for name in models]
    rows = {name: describe(name) for name in track(names, "counting", transient=True)}
    sections = [
        family(name, sorted(models, key=lambda m: (rows[m].macs, m)), rows)
        for name, models in families.items()
    ]
    return "\n".join([_MODELS, *sections])


def main() -> int:
    """Write the pages, or check them."""
    made = {DOCS / "MODELS.md": models_page, DOCS / "WEIGHTS.md": weights_page}
    return write_pages(__doc__, made, "the registry says")


if __name__ == "__main__":
    sys.exit(main())
