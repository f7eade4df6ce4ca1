"""The figures printed in the papers, read from `configs/published.yaml`."""

from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Published:
    """What a paper says about one model. A figure that was not published is None."""

    model: str
    family: str
    paper: str
    venue: str
    url: str
    code: str
    """Address of the authors' code."""
    weights: str
    """Where the authors' weights are and how to use them."""
    params: float | None = None
    """Parameters in millions."""
    gmac: float | None = None
    """Multiply-accumulates in billions for one image of `img_size`."""
    repeated: float = 0.0
    """What of `gmac` the authors' code computes again, on copies of the same tokens, and ours does not."""
    top1: float | None = None
    """ImageNet-1K top-1 accuracy in percent."""
    img_size: int = 224
    mhsa_reduction: tuple[float, float] | None = None
    """Range of the share that the cost of self-attention falls by, against the dense trunk."""


@cache
def _figures() -> dict[str, Published]:
    import yaml

    text = (resources.files("vitrail.configs") / "published.yaml").read_text(encoding="utf-8")
    return {
        model: Published(
            model=model,
            family=family,
            paper=entry["paper"],
            venue=entry["venue"],
            url=entry["url"],
            code=entry["code"],
            weights=entry["weights"],
            **{key: tuple(value) if isinstance(value, list) else value for key, value in figures.items()},
        )
        for family, entry in yaml.safe_load(text).items()
        for model, figures in entry["models"].items()
    }


def published_figures(model: str) -> Published | None:
    """The figures published for a model name (a tag behind a dot is ignored); None where there are none."""
    return _figures().get(model.split(".")[0])
