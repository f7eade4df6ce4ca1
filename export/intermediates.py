"""Values on the way from image to output: those of a module, operator by operator, and those of an ONNX graph.

Neither is ever held as a whole: a source runs as often as needed and hands out the values asked for.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .capture import evaluation
from .graph import opset_of, walk
from .runs import open_session
from .subjects import ModuleSubject, OnnxSubject

if TYPE_CHECKING:
    import onnx

CHUNK = 256 * 2**20
"""Bytes of intermediate values that an ONNX graph is asked for at once."""

Visit = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Entry:
    """A value: its name, what computes it, where (module, or layer whose weights it uses), from what values."""

    key: str
    op: str
    where: str
    inputs: tuple[str, ...]

    def __str__(self) -> str:
        if self.key.startswith(f"{self.where or 'model'}:"):  # of a module, which says it all
            return self.key
        return f"{self.key} ({self.op}{f', {self.where}' if self.where else ''})"


class ModuleSource:
    """What a module's operators return, in order of execution; operators of this package count as one.

    Args:
        subject: the module.
        images: its input.
        around: a context to run it in, such as the one in which operators are their plain definitions.
    """

    def __init__(
        self,
        subject: ModuleSubject,
        images: Tensor,
        around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        self._subject, self._images, self._around = subject, images, around
        self.entries: list[Entry] = []
        self._bytes: dict[str, int] = {}
        self.outputs = self.visit(None, lambda key, value: self._bytes.update({key: value.nbytes}))

    def visit(self, keys: Collection[str] | None, see: Visit) -> dict[str, Tensor]:
        """Run once; `see` gets the values with these keys (None: all) as they are computed. Returns the outputs."""
        entries: list[Entry] = []

        def record(entry: Entry, value: Tensor) -> None:
            previous = (entries[-1].key,) if entries else ()
            entries.append(Entry(entry.key, entry.op, entry.where, previous))
            if keys is None or entry.key in keys:
                see(entry.key, value)

        module = self._subject.module
        with _paths(module) as path, self._around(), evaluation(module), _Recorder(path, record):
            values = module(self._images)
        self.entries = entries
        return dict(zip(module.names, values, strict=True))

    def chunks(self, keys: Collection[str]) -> list[list[str]]:
        """The keys in groups whose values fit together in `CHUNK` bytes."""
        return _groups(self.entries, keys, self._bytes)


@contextlib.contextmanager
def _paths(module: nn.Module) -> Iterator[list[str]]:
    """A stack whose top is the path of the submodule that runs."""
    stack = [""]

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: stack.append(name)

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(enter(name.removeprefix("model").lstrip("."))))
        handles.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchDispatchMode):
    """Names each tensor that an operator returns by submodule, operator and a count."""

    def __init__(self, path: list[str], record: Callable[[Entry, Tensor], None]):
        super().__init__()
        self._path, self._record = path, record
        self._counts: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        op = func.overloadpacket.__name__
        where = self._path[-1]
        self._counts[where, op] += 1
        outputs = [
            v for v in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(v, Tensor)
        ]
        for i, value in enumerate(outputs):
            key = f"{where or 'model'}:{op}.{self._counts[where, op]}" + (f".{i}" if len(outputs) > 1 else "")
            self._record(Entry(key, op, where, ()), value.detach())
        return result


class OnnxSource:
    """What the nodes of an ONNX graph compute, as the graph is written: without the runtime's optimisation.

    Model-local functions are opened where no kernels run in their place; what is inside of branches and loops stays
    there.

    Args:
        subject: the file.
        images: its input.
    """

    def __init__(self, subject: OnnxSubject, images: Tensor):
        import onnx
        import onnx.inliner

        self._subject, self._images = subject, images
        proto = subject.proto
        opened = proto.functions and not subject.kernels
        self._proto = onnx.inliner.inline_local_functions(proto) if opened else proto
        self.opset = opset_of(self._proto)
        weights = {tensor.name for tensor in self._proto.graph.initializer}
        self._input = self._proto.graph.input[0].name
        self.nodes = {name: node for node in self._proto.graph.node for name in node.output if name}
        varying, passed = {self._input}, ""
        self.entries: list[Entry] = []
        for node in self._proto.graph.node:
            inner = {name for child in _graphs(node) for n in walk(child) for name in n.input}
            inputs = tuple(name for name in (*node.input, *inner) if name in varying)
            if inputs and node.op_type not in ("Shape", "Size"):  # else it does not depend on the image
                layer = _layer([name for name in node.input if name in weights])
                where = layer or (f"after {passed}" if passed else "")
                passed = layer or passed
                names = [name for name in node.output if name]
                varying.update(names)
                self.entries += [Entry(name, node.op_type, where, inputs) for name in names]
        self._sizes = _sizes(self._proto, images)

    def chunks(self, keys: Collection[str]) -> list[list[str]]:
        """The keys in groups whose values fit together in `CHUNK` bytes."""
        return _groups(self.entries, keys, self._sizes)

    def visit(self, keys: Collection[str] | None, see: Visit) -> dict[str, Tensor]:
        """Run once for each chunk; `see` gets the values with these keys (None: all). Returns the outputs."""
        wanted = {entry.key for entry in self.entries} if keys is None else set(keys)
        outputs = [output.name for output in self._proto.graph.output]
        results: dict[str, Tensor] = {}
        for chunk in self.chunks(wanted):
            session = open_session(
                self._with_outputs(chunk), self._subject.folder, "none", self._subject.kernels
            )
            values = dict(
                zip(
                    [*outputs, *chunk],
                    self._subject.run_session(session, [*outputs, *chunk], self._images),
                    strict=True,
                )
            )
            results = {name: values[name] for name in outputs}
            for key in chunk:
                see(key, values[key])
        return results

    def _with_outputs(self, names: Sequence[str]) -> bytes:
        """The file with further outputs."""
        import onnx

        present = {output.name for output in self._proto.graph.output}
        added = [onnx.ValueInfoProto(name=name) for name in names if name not in present]
        graph = self._proto.graph
        count = len(graph.output)
        graph.output.extend(added)
        try:
            return self._proto.SerializeToString()
        finally:
            del graph.output[count:]


def _groups(entries: Sequence[Entry], keys: Collection[str], sizes: Mapping[str, int]) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    held = 0
    for entry in entries:
        if entry.key in keys:
            size = sizes.get(entry.key, CHUNK // 16)
            if groups[-1] and held + size > CHUNK:
                groups.append([])
                held = 0
            groups[-1].append(entry.key)
            held += size
    return groups


def _graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]


def _layer(weights: Sequence[str]) -> str:
    """The layer that a node stands for, by the names of its weights: `head.fc` for `head.fc.weight`."""
    dotted = [name for name in weights if re.fullmatch(r"[\w]+(\.\w+)+", name)]
    return dotted[0].rpartition(".")[0] if dotted else ""


def _sizes(proto: onnx.ModelProto, images: Tensor) -> dict[str, int]:
    """Bytes of the graph's values for this input, as far as shape inference knows them."""
    import math

    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.value_info[:]
    for dim, size in zip(bare.graph.input[0].type.tensor_type.shape.dim, images.shape, strict=True):
        dim.dim_value = size
    try:
        bare = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    except Exception:  # too large for it: then sizes are guessed
        return {}
    sizes = {}
    for value in bare.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if all(d.HasField("dim_value") for d in dims):
            sizes[value.name] = 8 * math.prod(d.dim_value for d in dims)
    return sizes


class Nothing(Exception):
    """A side that shows nothing of its inside."""


def source_of(subject: Any, images: Tensor) -> ModuleSource | OnnxSource:
    """The source of a side's intermediate values.

    Raises:
        Nothing: an engine keeps them to itself.
    """
    if isinstance(subject, ModuleSubject):
        return ModuleSource(subject, images)
    if isinstance(subject, OnnxSubject):
        return OnnxSource(subject, images)
    raise Nothing(
        f"{subject.name} shows no intermediate values; compare the ONNX file that it was built from to see which "
        f"of the two steps went wrong"
    )
