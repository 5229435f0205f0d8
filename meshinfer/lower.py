"""A task becomes an ONNX submodel that reads just the boxes and the weights it needs.

Walks the task's receptive field forwards: every op is emitted by its rule for its box, crops are
inserted where a value is held wider than an op reads it. Weights are named, not embedded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from meshinfer.geometry import Box
from meshinfer.graph import Graph, Op
from meshinfer.halo import Field, Job, receptive_field
from meshinfer.ops import Emission, rule_of
from meshinfer.ops.layout import crop
from meshinfer.plan import Shard, Stage, Task

INLINE_ELEMENTS = 64
"""Smaller weights stay in the submodel: shapes and bounds must be there for shape inference."""

_BLOCKS = frozenset(("Conv", "MaxPool", "AveragePool"))
_KEEPS = frozenset("Add Sum Mul Relu Clip Sigmoid Tanh HardSigmoid LeakyRelu".split())
"""Operators whose output onnxruntime has in its blocked layout: always, or if the inputs are."""
_REORDERED = 4
"""It puts values into that layout if their channels are a multiple of this."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A box of an initializer, by the SHA-256 (hex) of its little-endian bytes."""

    shard: Shard
    digest: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Submodel:
    """One task, lowered. Names are tensor names of ``model``; shards say what they hold.

    ``weights`` are the boxes of initializers that ``model`` refers to as external data, each in a
    file that is named by the SHA-256 of its bytes.
    """

    model: bytes
    inputs: tuple[tuple[str, Shard], ...]
    outputs: tuple[tuple[str, Shard], ...]
    weights: tuple[Weight, ...]
    flops: int


def lower(graph: Graph, stage: Stage, task: Task) -> Submodel:
    """The submodel of a task; equal tasks give equal bytes."""
    return _Lowering(graph, task, receptive_field(graph, stage, task)).submodel()


class _Lowering:
    """Collects nodes; implements ``meshinfer.ops.Emitter``."""

    def __init__(self, graph: Graph, task: Task, field: Field) -> None:
        self.graph, self.task, self.field = graph, task, field
        self.opset = graph.opset
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}
        self.used = {name for op in graph.ops for name in (*op.outputs, *op.inputs)}
        self.crops: dict[tuple[str, Box], str] = {}
        self.blocked: set[str] = set()  # names that onnxruntime holds in its blocked layout

    # The Emitter's interface.

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: object,
    ) -> None:
        values = cast(dict[str, Any], attributes)
        self.nodes.append(
            helper.make_node(op_type, list(inputs), list(outputs), domain=domain, **values)
        )

    def copy(
        self,
        op: Op,
        inputs: Sequence[str],
        outputs: Sequence[str],
        drop: Sequence[str] = (),
        **attributes: object,
    ) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(op.proto)
        node.ClearField("name")  # a task may compute an op several times, for several partial sums
        replaced = {*drop, *attributes}
        kept = [a for a in op.proto.attribute if a.name not in replaced]
        del node.attribute[:], node.input[:], node.output[:]
        node.attribute.extend(kept)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        node.input.extend(inputs)
        node.output.extend(outputs)
        self.nodes.append(node)

    def ints(self, values: Sequence[int]) -> str:
        return self._constant(np.asarray(list(values), dtype=np.int64))

    def array(self, values: np.ndarray[Any, np.dtype[Any]]) -> str:
        return self._constant(values)

    def scalar(self, value: float, op: Op) -> str:
        return self._constant(np.asarray(value, dtype=self.graph.numpy_dtype(op.inputs[0])))

    def fresh(self, hint: str) -> str:
        index = len(self.used)
        while (name := f"{hint}~{index}") in self.used:
            index += 1
        self.used.add(name)
        return name

    # The walk.

    def submodel(self) -> Submodel:
        outputs: list[tuple[str, Shard]] = []
        for job in self.field.jobs:
            self._emit(job, outputs)
        for shard in self.task.outputs:
            if shard.over is None:
                outputs.append((self._output(shard), shard))
        self._weights()
        inputs = [(name, Shard(name, self.field.needs[name])) for name in self.field.fetches]
        model = self._model(inputs, outputs)
        return Submodel(
            model=model.SerializeToString(deterministic=True),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            weights=tuple(
                self._weight(name) for name in self.field.weights if name not in self.tensors
            ),
            flops=sum(rule_of(job.op).flops(job.op, job.outs) for job in self.field.jobs),
        )

    def _emit(self, job: Job, outputs: list[tuple[str, Shard]]) -> None:
        op, rule = job.op, rule_of(job.op)
        inputs = tuple(
            "" if box is None or not name else self._read(name, box)
            for name, box in zip(job.reads, job.ins, strict=True)
        )
        names, crops = [], []
        for name, box in zip(op.outputs, job.outs, strict=False):
            if box is None or not name:
                names.append("")
                continue
            if job.partial is not None:
                wanted, target = job.partial.box, self.fresh(name)
                outputs.append((target, job.partial))
            else:
                wanted, target = self.field.needs.get(name, box), name
            names.append(target if wanted == box else self.fresh(name))
            if wanted != box:
                crops.append((names[-1], box, wanted, target))
        if op.outputs[0] in self.graph.sums:
            inputs = self._as_one_kernel(job, inputs)
        if op.type == "GlobalAveragePool" and inputs[0] in self.field.fetches:
            inputs = (self._as_in_the_whole(op, inputs[0]),)
        rule.emit(op, Emission(job.outs, job.ins, job.over, inputs, tuple(names)), self)
        if op.type in _BLOCKS or (op.type in _KEEPS and self.blocked.issuperset(inputs)):
            self.blocked.update(names)
        for source, held, wanted, target in crops:
            crop(self, source, held, wanted, target)

    def _read(self, name: str, box: Box) -> str:
        held = self.field.needs[name]
        if held == box:
            return name
        if (name, box) not in self.crops:
            self.crops[name, box] = self.fresh(name)
            crop(self, name, held, box, self.crops[name, box])
        return self.crops[name, box]

    def _as_one_kernel(self, job: Job, inputs: tuple[str, ...]) -> tuple[str, ...]:
        """Operands of a sum that onnxruntime is to compute inside a convolution, which goes first.

        The other must be in its blocked layout (NCHWc). What comes from elsewhere, or was cropped,
        is not: a depthwise convolution with ones puts it there and changes no bit.
        """
        position = self.graph.sums[job.op.outputs[0]]
        other = inputs[1 - position]
        box = job.ins[1 - position]
        assert box is not None, f"{job.op} lacks an operand"
        channels = box[1].size
        if other not in self.blocked and channels % _REORDERED == 0:
            ones = self._constant(np.ones((channels, 1, 1, 1), np.float32))
            target = self.fresh(other)
            self.node("Conv", [other, ones], [target], group=channels, kernel_shape=[1, 1])
            other = target
        return (inputs[position], other)

    def _as_in_the_whole(self, op: Op, name: str) -> str:
        """A mean's operand that onnxruntime puts into its blocked layout only if it would so in the
        whole model: what comes from outside it always does, what an operator made in plain layout
        never (seen of 1.32). A maximum of one operand keeps it plain and changes no bit.
        """
        made = self.graph.producer.get(op.inputs[0], -1) >= 0
        if not made or _in_blocks(self.graph, op.inputs[0]):
            return name
        target = self.fresh(name)
        self.node("Max", [name], [target])
        return target

    def _output(self, shard: Shard) -> str:
        target = self.fresh("out")
        crop(self, shard.value, self.field.needs[shard.value], shard.box, target)
        return target

    def _constant(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
        name = self.fresh("const")
        self.tensors[name] = numpy_helper.from_array(array, name)
        return name

    def _weights(self) -> None:
        for name in self.field.weights:
            box = self.field.needs[name]
            # Elements smaller than a byte are packed inside a model and nowhere else.
            if box.volume <= INLINE_ELEMENTS or self.graph.itemsize(name) < 1:
                array = self.graph.weight(name)[box.within(self.graph.whole(name))]
                self.tensors[name] = numpy_helper.from_array(np.array(array, order="C"), name)

    def _model(
        self, inputs: Sequence[tuple[str, Shard]], outputs: Sequence[tuple[str, Shard]]
    ) -> onnx.ModelProto:
        tensors = list(self.tensors.values())
        for name in self.field.weights:
            if name not in self.tensors:
                tensors.append(self._external(name, self.field.needs[name]))
        body = helper.make_graph(
            self.nodes,
            "task",
            [self._info(name, shard) for name, shard in inputs],
            [self._info(name, shard) for name, shard in outputs],
            tensors,
        )
        imports = [helper.make_opsetid(d, v) for d, v in self.graph.model.opset_imports.items()]
        return helper.make_model(
            body, opset_imports=imports, ir_version=min(self.graph.model.ir_version, 10)
        )

    def _info(self, name: str, shard: Shard) -> onnx.ValueInfoProto:
        dtype = self.graph.dtype(shard.value)
        assert dtype is not None, f"{shard.value} is no tensor and cannot be cut"
        static = self.graph.shape(shard.value) is not None
        return helper.make_tensor_value_info(
            name, dtype.value, list(shard.box.shape) if static else None
        )

    def _external(self, name: str, box: Box) -> TensorProto:
        dtype = self.graph.dtype(name)
        assert dtype is not None
        tensor = TensorProto(name=name, data_type=dtype.value, dims=box.shape)
        tensor.data_location = TensorProto.EXTERNAL
        weight = self._weight(name)
        entries = {"location": weight.digest, "offset": "0", "length": str(weight.nbytes)}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        return tensor

    def _weight(self, name: str) -> Weight:
        box = self.field.needs[name]
        return Weight(
            Shard(name, box), self.graph.weight_digest(name, box), self.graph.nbytes(name, box)
        )


def _in_blocks(graph: Graph, name: str) -> bool:
    """Whether onnxruntime has a value of the whole model in its blocked layout."""
    key = ("blocks", name)
    if key not in graph.memo:
        index = graph.producer.get(name, -1)
        op = graph.ops[index] if index >= 0 else None
        kept = op is not None and op.type in _KEEPS
        read = [n for n in op.inputs if n and not graph.is_initializer(n)] if op and kept else []
        graph.memo[key] = op is not None and (
            op.type in _BLOCKS or (bool(read) and all(_in_blocks(graph, n) for n in read))
        )
    return bool(graph.memo[key])
