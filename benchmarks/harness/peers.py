"""The authors' own models, imported from checkouts of their repositories that the user has.

Nothing of theirs is here. A folder holds the checkouts, whatever they are called there; each is known by a few of its
files. Their module is imported from where it lies and their published constructor is called.

Their repositories have top-level packages called `models`, `ops`, `config`, and one even its own old `timm`. So each is
imported with its folder in front of everything else, and afterwards all modules are as they were before; theirs stay
behind under names of their own.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import io
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import timm.models
from torch import Tensor, nn

Build = Callable[[Callable[[str], Any], str, int], nn.Module]


class PeerError(Exception):
    """A checkout that is not there or does not import; the message says what to do."""


# --- their constructors ---------------------------------------------------------------------------------------------
# Stochastic depth is off everywhere, since it would leave out work.


def _biformer(load: Callable[[str], Any], name: str, size: int) -> nn.Module:
    return getattr(load("models.biformer"), name)()


def _davit(load: Callable[[str], Any], name: str, size: int) -> nn.Module:
    published = name.replace("davit_fused", "DaViT")
    return getattr(load("timm.models.davit"), published)(drop_path_rate=0.0)


def _stripmlp(load: Callable[[str], Any], name: str, size: int) -> nn.Module:
    layers, width = {"tiny_light": ([2, 2, 6, 2], 80), "tiny": ([2, 2, 12, 2], 80)}[
        name.removeprefix("stripmlp_")
    ]
    return load("models.strip_mlp").StripMLPNet(img_size=size, embed_dim=width, layers=layers)


def _sparsifiner(load: Callable[[str], Any], name: str, size: int) -> nn.Module:
    config = load("config.default_config")
    cfg = config.get_cfg_defaults()
    folder = Path(config.__file__).parents[2] / "experiments-results-analysis" / "experiments"
    cfg.merge_from_file(str(folder / "sparsifiner_default_config.yaml"))
    # statistics for their log, which cost time and change nothing
    cfg.SPAR.OUT_BASIS_SPARSITY = cfg.SPAR.OUT_BASIS_COEF_SPARSITY = cfg.SPAR.OUT_ATTN_MASK_SPARSITY = False
    depth = 12
    return load("models.sparsifiner").Sparsifiner(
        img_size=size,
        embed_dim=384,
        depth=depth,
        num_heads=6,
        attn_keep_rate_list=[cfg.SPAR.ATTN_KEEP_RATE] * depth,
        token_keep_rate_list=[cfg.SPAR.TOKEN_KEEP_RATE_BASE] * depth,
        token_pruning_loc_indicator=[False] * depth,
        reduce_n_factor=cfg.SPAR.REDUCE_N_FACTOR,
        reduce_c_factor=cfg.SPAR.REDUCE_C_FACTOR,
        share_inout_proj=cfg.SPAR.SHARE_INOUT_PROJ,
        cfg=cfg,
    )


def _stvit(load: Callable[[str], Any], name: str, size: int) -> nn.Module:
    network = load("models.swin_transformer").SwinTransformer
    return network(img_size=size, depths=[2, 2, 18, 2], drop_path_rate=0.0, use_global=False)


@dataclass(frozen=True)
class Peer:
    """A repository of the authors'."""

    repository: str
    telltale: tuple[str, ...]
    """Files that tell its checkout from others."""
    models: tuple[str, ...]
    """Ours that it has."""
    build: Build
    root: str = "."
    """The folder that its imports start from."""
    unused: tuple[str, ...] = ()
    """Packages that its files import, but that these models do not use."""


PEERS = (
    Peer(
        "rayleizhu/BiFormer",
        ("models/biformer.py", "ops/bra_legacy.py"),
        ("biformer_tiny", "biformer_small", "biformer_base"),
        _biformer,
        unused=("fairscale",),
    ),
    Peer(
        "dingmyu/davit",
        ("timm/models/davit.py",),
        ("davit_fused_tiny", "davit_fused_small", "davit_fused_base"),
        _davit,
    ),
    Peer(
        "Med-Process/Strip_MLP",
        ("models/strip_mlp.py",),
        ("stripmlp_tiny_light", "stripmlp_tiny"),
        _stripmlp,
        unused=("matplotlib", "einops"),
    ),
    Peer(
        "lim142857/Sparsifiner",
        ("src/models/sparsifiner.py", "src/config/default_config.py"),
        ("sparsifiner_small",),
        _sparsifiner,
        root="src",
    ),
    Peer(
        "changsn/STViT-R",
        ("models/swin_transformer.py", "models/multi_scale.py"),
        ("stvit_r_swin_small",),
        _stvit,
    ),
)


# --- finding and importing them ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkout:
    """A repository of the authors' on this machine."""

    peer: Peer
    folder: Path

    @property
    def commit(self) -> str | None:
        """The commit that is checked out, where git can tell."""
        if not (self.folder / ".git").exists():
            return None
        command = ["git", "-C", str(self.folder), "rev-parse", "HEAD"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return None

    def build(self, name: str, size: int) -> nn.Module:
        """Their model that ours of this name is, for square images of `size` pixels.

        Raises:
            PeerError: it does not import or build.
        """
        what = f"{self.peer.repository} in {self.folder}"
        try:
            with (
                _isolated(self.folder / self.peer.root, self.peer),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                return self.peer.build(importlib.import_module, name, size)
        except ModuleNotFoundError as error:
            raise PeerError(
                f"{what} needs {error.name}: pip install {str(error.name).partition('.')[0]}"
            ) from error
        except Exception as error:  # whatever code of others raises
            raise PeerError(f"{what} does not give its {name}: {type(error).__name__}: {error}") from error


def find_checkouts(folder: Path) -> dict[str, Checkout]:
    """By our models' names, the checkouts in a folder (or the one that the folder is).

    Raises:
        PeerError: there is no such folder, or no checkout in it.
    """
    if not folder.is_dir():
        raise PeerError(f"there is no folder '{folder}'")
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found: dict[str, Checkout] = {}
    for peer in PEERS:
        for place in places:
            if all((place / file).is_file() for file in peer.telltale):
                found |= {name: Checkout(peer, place.resolve()) for name in peer.models}
                break
    if not found:
        known = ", ".join(f"https://github.com/{peer.repository}" for peer in PEERS)
        raise PeerError(
            f"'{folder}' holds no checkout that is known here; clone into it what you want of {known}"
        )
    return found


class _Placeholder:
    """Stands for anything of a package that is not installed; to be imported, not to be used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        package = self._name.partition(".")[0]
        raise ModuleNotFoundError(f"{self._name} is used after all", name=package)


class _AbsentModule(ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder(f"{self.__name__}.{name}")


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last of the finders: what is found here is not installed."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _under(root: Path, module: ModuleType) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(place and Path(place).resolve().is_relative_to(root) for place in places)


def _hides(entry: Path, root: Path) -> bool:
    """Whether a package of theirs that has no `__init__.py` would be taken from another entry of the path.

    Such a package comes after a module of that name anywhere, as `models.py` beside this folder.
    """
    bare = [path.name for path in root.iterdir() if path.is_dir() and not (path / "__init__.py").exists()]
    installed = entry.name in ("site-packages", "dist-packages")
    return not installed and any(
        (entry / name / "__init__.py").exists() or (entry / f"{name}.py").exists() for name in bare
    )


@contextlib.contextmanager
def _isolated(root: Path, peer: Peer) -> Iterator[None]:
    """Imports start from `root` inside; afterwards modules, finders and paths are as before."""
    root = root.resolve()
    prefix = f"_peer_{peer.repository.partition('/')[2].replace('-', '_')}"
    own = {path.stem for path in root.iterdir() if path.is_dir() or path.suffix == ".py"}
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in own}
    for name in hidden:
        del sys.modules[name]
    # what was imported here before
    kept = {name: module for name, module in sys.modules.items() if name.startswith(f"{prefix}.")}
    sys.modules.update({name.removeprefix(f"{prefix}."): module for name, module in kept.items()})
    path, finder, before = list(sys.path), _Absent(peer.unused), set(sys.modules)
    sys.path[:] = [str(root), *(entry for entry in path if not _hides(Path(entry), root))]
    sys.meta_path.append(finder)
    importlib.invalidate_caches()
    try:
        # their models must not take our names in timm's registry
        patch = mock.patch.object(timm.models, "register_model", lambda function: function)
        with patch, warnings.catch_warnings(record=True):  # they warn of their age
            yield
    finally:
        sys.path[:] = path
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _AbsentModule)]:
            del sys.modules[name]
        for name in [name for name in kept if name.removeprefix(f"{prefix}.") in sys.modules]:
            del sys.modules[name.removeprefix(f"{prefix}.")]
        for name in set(sys.modules) - before:
            if _under(root, sys.modules[name]):
                _rename(name, prefix)
        sys.modules.update(hidden)


def _rename(name: str, prefix: str) -> None:
    """torch.compile looks a function's globals up by the name of its module, which must not be somebody else's."""
    module = sys.modules.pop(name)
    module.__name__ = f"{prefix}.{name}"
    if module.__package__:
        module.__package__ = f"{prefix}.{module.__package__}"
    if module.__spec__ is not None:
        module.__spec__.name = module.__name__
    sys.modules[module.__name__] = module


class Logits(nn.Module):
    """Some of their models return a dictionary of everything; ours and timm's return logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        out = self.model(images)
        return out["x"] if isinstance(out, dict) else out
