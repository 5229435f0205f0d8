"""The imported model: operators in topological order, values, and what is alive at a cut.

Built over onnx-ir, which holds the weights without copying them. A graph never changes after
import; node indices and value names are only meaningful together with its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from meshinfer.geometry import Box
from meshinfer.identity import Digest

CONSTANT_ELEMENTS = 1024
"""Initializers up to this size are read to resolve shapes, axes and bounds (ONNX keeps those
small)."""


_UNKNOWN = Box(())


@dataclass(frozen=True, eq=False, slots=True)
class Op:
    """One node: its names, attributes and the graph in which they mean something.

    ``inputs`` has an empty name where an optional input is left out; ``captured`` are the values of
    the outer scope that a subgraph attribute (If, Loop, Scan) reads.
    """

    index: int
    graph: Graph
    type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    captured: tuple[str, ...]
    attributes: Mapping[str, Any]
    proto: onnx.NodeProto

    def shape(self, position: int = 0) -> tuple[int, ...]:
        """Static shape of an input."""
        shape = self.graph.shape(self.inputs[position])
        assert shape is not None, f"{self} has an input of unknown shape"
        return shape

    def out_shape(self, position: int = 0) -> tuple[int, ...]:
        """Static shape of an output."""
        shape = self.graph.shape(self.outputs[position])
        assert shape is not None, f"{self} has an output of unknown shape"
        return shape

    def has(self, position: int) -> bool:
        """Whether this optional input is given."""
        return position < len(self.inputs) and self.inputs[position] != ""

    def constant(self, position: int) -> np.ndarray[Any, Any] | None:
        """The value of a small input that is an initializer; None when it is not."""
        return self.graph.constant(self.inputs[position]) if self.has(position) else None

    def __str__(self) -> str:
        return f"{self.type}#{self.index}({self.outputs[0] if self.outputs else ''})"


@dataclass(frozen=True, eq=False)
class Graph:
    """A model with static shapes where it has them. Use ``meshinfer.importers`` to make one."""

    model: ir.Model
    sums: Mapping[str, int] = field(default_factory=dict)
    """Sums that onnxruntime computes inside a convolution here: value -> which operand that is."""
    strict: bool = False
    """Rules grow boxes until the kernels of tiles round as those of the whole model do."""
    half_transfers: bool = False
    """float32 values travel between the tasks of a plan as float16 (``halves``)."""
    memo: dict[tuple[object, ...], Any] = field(default_factory=dict, repr=False)
    """What was worked out about this graph once: constants, digests of weights, rules."""

    def as_strict(self) -> Graph:
        """The same graph, ``strict``."""
        return replace(self, strict=True)

    def with_half_transfers(self) -> Graph:
        """The same graph, whose float32 values travel between tasks as float16."""
        return replace(self, half_transfers=True)

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        return tuple(self._op(i, node) for i, node in enumerate(self.model.graph))

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors a request must give."""
        return tuple(_name(v) for v in self.model.graph.inputs)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the answers: values that ops make, or inputs as they are (from source to
        sink)."""
        return tuple(_name(v) for v in self.model.graph.outputs)

    @cached_property
    def opset(self) -> int:
        return self.model.opset_imports.get("", 1)

    @cached_property
    def values(self) -> Mapping[str, ir.Value]:
        """Every value of the main graph by name: inputs, initializers and node outputs."""
        found = {_name(v): v for v in self.model.graph.inputs}
        found.update({_name(v): v for v in self.model.graph.initializers.values()})
        for node in self.model.graph:
            found.update({_name(v): v for v in node.outputs if v.name})
        return found

    @cached_property
    def producer(self) -> Mapping[str, int]:
        """Index of the op that makes a value; inputs and initializers have none."""
        return {name: op.index for op in self.ops for name in op.outputs if name}

    @cached_property
    def last_use(self) -> Mapping[str, int]:
        """Index of the last op that reads a value; ``len(ops)`` for the model's outputs."""
        last: dict[str, int] = {}
        for op in self.ops:
            for name in (*op.inputs, *op.captured):
                last[name] = op.index
        last.update({name: len(self.ops) for name in self.outputs})
        return last

    @cached_property
    def first_use(self) -> Mapping[str, int]:
        """Index of the first op that reads a value; absent for what none reads."""
        first: dict[str, int] = {}
        for op in reversed(self.ops):
            for name in (*op.inputs, *op.captured):
                first[name] = op.index
        return first

    def is_initializer(self, value: str) -> bool:
        return value in self.model.graph.initializers

    def weight(self, value: str) -> np.ndarray[Any, Any]:
        """An initializer as an array (memory-mapped where the file allows it)."""
        tensor = self.model.graph.initializers[value].const_value
        assert tensor is not None, f"initializer {value} has no data"
        return tensor.numpy()

    def weight_bytes(self, value: str, box: Box) -> memoryview:
        """The raw little-endian bytes of a box of an initializer, in C order."""
        return _bytes_of(np.ascontiguousarray(self.weight(value)[box.within(self.whole(value))]))

    def weight_digest(self, value: str, box: Box) -> str:
        """SHA-256 of ``weight_bytes``, remembered."""
        key = ("digest", value, box)
        if key not in self.memo:
            self.memo[key] = hashlib.sha256(self.weight_bytes(value, box)).hexdigest()
        return str(self.memo[key])

    def constant(self, value: str) -> np.ndarray[Any, Any] | None:
        """A small initializer as an array; None when the value is computed, or large."""
        if not self.is_initializer(value):
            return None
        shape = self.shape(value)
        if shape is None or int(np.prod(shape, dtype=np.int64)) > CONSTANT_ELEMENTS:
            return None
        key = ("constant", value)
        if key not in self.memo:
            self.memo[key] = np.array(self.weight(value))
        result: np.ndarray[Any, Any] = self.memo[key]
        return result

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Static shapes, by value; those that depend on data, or are of no tensor, are absent."""
        found: dict[str, tuple[int, ...]] = {}
        for name, value in self.values.items():
            if isinstance(value.type, ir.TensorType) and value.shape is not None:
                dims = [d for d in value.shape if isinstance(d, int)]
                if len(dims) == len(value.shape):
                    found[name] = tuple(int(d) for d in dims)
        return found

    def shape(self, value: str) -> tuple[int, ...] | None:
        """Static shape; None when it depends on data, or when the value is no tensor."""
        return self.shapes.get(value)

    def dtype(self, value: str) -> ir.DataType | None:
        """Element type; None for values that are no tensors (sequences, optionals)."""
        found = self.values[value]
        return found.type.dtype if isinstance(found.type, ir.TensorType) else None

    def numpy_dtype(self, value: str) -> np.dtype[Any]:
        """Element type as numpy's. Raises ``TypeError`` when numpy has none."""
        dtype = self.dtype(value)
        if dtype is None:
            raise TypeError(f"value {value!r} is no tensor")
        return dtype.numpy()

    def whole(self, value: str) -> Box:
        """The box of the whole value; the box without axes where the shape is not static
        (WHOLE)."""
        return self._wholes.get(value, _UNKNOWN)

    def itemsize(self, value: str) -> float:
        """Bytes of an element; below 1 for packed ones, 0 for what is no tensor."""
        return self._itemsizes.get(value, 0)

    def travels(self, value: str) -> bool:
        """Whether devices can exchange it: a tensor of a type that numpy has by itself."""
        dtype = self.dtype(value)
        if dtype in (None, ir.DataType.STRING):
            return False
        try:
            return self.numpy_dtype(value).isbuiltin == 1
        except TypeError:
            return False

    @cached_property
    def _wholes(self) -> Mapping[str, Box]:
        return {name: Box.whole(shape) for name, shape in self.shapes.items()}

    @cached_property
    def _itemsizes(self) -> Mapping[str, float]:
        dtypes = {name: self.dtype(name) for name in self.values}
        return {name: dtype.itemsize for name, dtype in dtypes.items() if dtype is not None}

    def nbytes(self, value: str, box: Box | None = None) -> int:
        """Bytes of a box of a value (of all of it by default); 0 where they are not known."""
        itemsize = self._itemsizes.get(value, 0)
        volume = self.whole(value).volume if box is None else box.volume
        return int(volume * itemsize + 0.999)

    def wire_share(self, value: str) -> float:
        """The share of a value's bytes that crosses a link from one task to another."""
        if not self.half_transfers or self.dtype(value) != ir.DataType.FLOAT:
            return 1.0
        return 0.5

    def produced(self, start: int, stop: int) -> tuple[str, ...]:
        """Values made by ops ``[start, stop)``, in order."""
        return tuple(name for op in self.ops[start:stop] for name in op.outputs if name)

    def live(self, cut: int) -> tuple[str, ...]:
        """Values made before ``cut`` and read at or after it, or asked for as outputs.

        These are what crosses from the stages before a cut to those after it.
        """
        return tuple(name for name in self.produced(0, cut) if self.last_use.get(name, -1) >= cut)

    def live_outputs(self, start: int, stop: int) -> tuple[str, ...]:
        """Values that a stage ``[start, stop)`` makes for others: its live values at ``stop``."""
        return tuple(
            name for name in self.produced(start, stop) if self.last_use.get(name, -1) >= stop
        )

    @cached_property
    def cut_points(self) -> tuple[int, ...]:
        """Positions ``0 < i < len(ops)`` where all that is alive can travel: sequences cannot."""
        stuck: set[int] = set()
        for name, made in self.producer.items():
            if not self.travels(name):
                stuck.update(range(made + 1, self.last_use.get(name, -1) + 1))
        return tuple(cut for cut in range(1, len(self.ops)) if cut not in stuck)

    @property
    def digest(self) -> Digest:
        """SHA-256 over opsets, nodes, types and weights: what makes indices comparable."""
        if ("digest",) not in self.memo:
            self.memo["digest",] = self._digest()
        return Digest(self.memo["digest",])

    def _digest(self) -> Digest:
        total = hashlib.sha256(repr(sorted(self.model.opset_imports.items())).encode())
        for op in self.ops:
            total.update(op.proto.SerializeToString(deterministic=True))
        for name in (*self.inputs, *self.outputs):
            total.update(f"{name}:{self.dtype(name)}:{self.shape(name)};".encode())
        for name in sorted(self.model.graph.initializers):
            array = np.asarray(self.weight(name), order="C")
            total.update(f"{name}:{array.dtype}:{array.shape};".encode())
            total.update(_bytes_of(array))
        return Digest(total.hexdigest())

    def _op(self, index: int, node: ir.Node) -> Op:
        proto = ir.to_proto(node)
        return Op(
            index=index,
            graph=self,
            type=node.op_type,
            domain="" if node.domain == "ai.onnx" else node.domain,
            inputs=tuple("" if v is None else _name(v) for v in node.inputs),
            outputs=tuple(v.name or "" for v in node.outputs),
            captured=_captured(node),
            attributes={a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute},
            proto=proto,
        )


def _name(value: ir.Value) -> str:
    assert value.name, "a value without a name"
    return value.name


def _bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    if array.dtype == object:  # strings
        return memoryview(repr(array.tolist()).encode())
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _captured(node: ir.Node) -> tuple[str, ...]:
    """Outer values read inside the node's subgraphs, in order of their first use."""
    found: dict[str, None] = {}
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for graph in graphs:
            for inner in ir.traversal.RecursiveGraphIterator(graph):
                for value in inner.inputs:
                    if value is not None and value.graph is node.graph and value.name:
                        found[value.name] = None
            for value in graph.outputs:
                if value is not None and value.graph is node.graph and value.name:
                    found[value.name] = None
    return tuple(found)
