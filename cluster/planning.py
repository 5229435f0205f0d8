"""Performs what the coordinator's core asks of models: open, import, plan, lower, store the blobs.

Beside the loop, which never waits. What a plan looks like is decided in ``meshinfer.planner``.
"""

from __future__ import annotations

import queue
from collections import OrderedDict
from itertools import chain

import msgspec
import onnx
from onnx import helper

from cluster.blobs import BlobStore
from cluster.importing import Importer
from cluster.loop import Post, report, start_thread
from cluster.storing import perform
from meshinfer import limits
from meshinfer.cost import DeviceProfile, timeline
from meshinfer.cost.expected import expected_seconds, is_better
from meshinfer.errors import InvalidInput
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.image import ImageSpec
from meshinfer.importers import Source, inputs_needed, load, open_model
from meshinfer.legality import refuse_sums, validate
from meshinfer.plan import Plan
from meshinfer.planner import make_plan, refuse_pinned
from meshinfer.programs import Programs, make_programs
from meshinfer.protocol.messages import Report
from meshinfer.report import report_of
from meshinfer.scheduler.events import (
    Effect,
    FindBlobs,
    MakePlan,
    ModelOpened,
    OpenModel,
    PlanReady,
    ServeBlob,
    Signature,
    WriteBlob,
)
from meshinfer.scheduler.profiles import profile_of, with_head, within


class PlanningThread:
    """``post`` hands events and messages to the coordinator's loop."""

    def __init__(self, store: BlobStore, post: Post) -> None:
        self._store, self._post = store, post
        self._graphs: OrderedDict[object, tuple[Graph, int]] = OrderedDict()
        # Model -> the files of its weights; newest last. Trimming spares them.
        self._models: dict[str, tuple[str, ...]] = {}
        self._import = Importer()
        self._jobs: queue.SimpleQueue[Effect | None] = queue.SimpleQueue()
        self._files: queue.SimpleQueue[Effect | None] = queue.SimpleQueue()
        # Planning may take seconds; workers that fetch blobs meanwhile must not wait for it.
        self._threads = [
            start_thread("planning", self._plan_all, post),
            start_thread("files", self._serve_all, post),
        ]

    def put(self, effect: Effect) -> None:
        heavy = isinstance(effect, OpenModel | MakePlan)
        (self._jobs if heavy else self._files).put(effect)

    def close(self) -> None:
        self._jobs.put(None)
        self._files.put(None)
        for thread in self._threads:
            thread.join(timeout=2.0)
        self._import.close()

    def _plan_all(self) -> None:
        while (effect := self._jobs.get()) is not None:
            match effect:
                case OpenModel():
                    self._post(self._open(effect))
                case MakePlan():
                    self._post(self._plan(effect))
                case _:
                    raise AssertionError(f"a coordinator cannot plan {effect}")

    def _serve_all(self) -> None:
        while (effect := self._files.get()) is not None:
            match effect:
                case FindBlobs() | WriteBlob() | ServeBlob():
                    answer = perform(self._store, effect)
                    if answer is not None:
                        self._post(answer)
                case _:
                    raise AssertionError(f"a coordinator cannot perform {effect}")

    def _open(self, effect: OpenModel) -> ModelOpened:
        try:
            source = self._source(effect.digest)
            source.check()
            image = effect.image
            if image is None and source.image is not None:
                image = source.image.to_json()
            inputs = {v.name: _input(v) for v in source.inputs}
            outputs = inputs_needed(source.proto)
            shapes, weights = source.static_shapes(), source.weight_files
            del source  # the next line may need as much memory again
            if shapes is not None:  # refused models are refused now, not at the first request
                self._graph(effect.digest, None, Signature(False, tuple(sorted(shapes.items()))))
            self._models.pop(effect.digest, None)
            self._models[effect.digest] = weights
            for old in list(self._models)[: -limits.MODELS * limits.VERSIONS_PER_MODEL]:
                del self._models[old]
            return ModelOpened(effect.key, inputs, image, outputs=outputs)
        except Exception as error:
            return ModelOpened(effect.key, {}, None, report(error))

    def _plan(self, effect: MakePlan) -> PlanReady:
        try:
            spec = effect.image if effect.signature.picture else None
            graph = self._graph(effect.digest, spec, effect.signature)
            if effect.strict:
                graph = graph.as_strict()
            plan, made = self._planned(graph, effect)
            profiles = _profiles(effect)
            if effect.present is not None and not is_better(
                graph, plan, Plan.parse(effect.present), profiles, effect.objective
            ):
                return PlanReady(effect.deployment, kept=True)
            programs = make_programs(graph, plan)
            _refuse_too_long(str(plan), programs)
            for digest, data in programs.blobs.items():
                if self._store.missing((digest,)):
                    self._store.put(digest, data())
            self._store.trim(keep={*self._models, *chain(*self._models.values())})
            return PlanReady(
                effect.deployment,
                str(plan),
                programs.by_device,
                made,
                window=plan.window,
                expected=expected_seconds(graph, plan, profiles),
            )
        except Exception as error:
            return PlanReady(effect.deployment, failure=report(error))

    def _planned(self, graph: Graph, effect: MakePlan) -> tuple[Plan, Report]:
        """A valid plan, given or searched, and what it comes to."""
        profiles = _profiles(effect)
        given = self._given_plan(graph, effect)
        if given is not None:
            validate(graph, given)
            if effect.strict:
                refuse_sums(given)
            refuse_pinned(graph, given, profiles, _pins(effect))
            expected = timeline(graph, given, profiles)
            return given, report_of(graph, given, expected, ("the plan was given",))
        head = DeviceId(effect.head)
        planned = make_plan(
            graph,
            profiles,
            head,
            head,
            objective=effect.objective,
            spread=effect.spread,
            pin=_pins(effect),
        )
        validate(graph, planned.plan)
        return planned.plan, report_of(graph, planned.plan, planned.timeline, planned.notes)

    def _given_plan(self, graph: Graph, effect: MakePlan) -> Plan | None:
        """The user's plan, if the core asks for it and it is for this graph."""
        if effect.plan is None:
            return None
        plan = Plan.parse(effect.plan)
        other = effect.signature.picture or effect.signature.outputs is not None
        if other and plan.graph != graph.digest:
            return None  # it is for arrays, for pictures of another size, or for other outputs
        known = {effect.head, *(c.device for c in effect.candidates)}
        unknown = sorted({*plan.devices(), plan.source, plan.sink} - known)
        if unknown:
            raise InvalidInput(
                f"the plan names the device {unknown[0]!r}, which is not in the cluster",
                hint=f"devices are {sorted(known)}; the coordinator's own is {effect.head!r}",
            )
        if (plan.source, plan.sink) != (effect.head, effect.head):
            raise InvalidInput(
                f"the plan goes from {plan.source!r} to {plan.sink!r}",
                hint=f"source and sink are the coordinator's own device, {effect.head!r}",
            )
        return plan

    def _source(self, digest: str) -> Source:
        """The model, with its weights in the store: they are named by their digests."""
        source = open_model(self._store.path(digest).read_bytes())
        return Source(source.proto, self._store.folder)

    def _graph(self, digest: str, image: str | None, signature: Signature) -> Graph:
        key = (digest, image, signature.shapes, signature.outputs)
        found = self._graphs.pop(key, None)
        if found is None:
            graph = load(
                self._source(digest),
                shapes=dict(signature.shapes),
                image=None if image is None else ImageSpec.from_json(image),
                outputs=signature.outputs,
                through=self._import,
                scratch=self._store.folder,
            )
            weights = graph.model.graph.initializers
            found = (graph, sum(graph.nbytes(name) for name in weights))
        self._graphs[key] = found  # the last ones stay, as many as memory allows
        while (
            len(self._graphs) > limits.SHAPES_PER_MODEL
            or sum(nbytes for _, nbytes in self._graphs.values()) > limits.GRAPH_CACHE_BYTES
        ) and len(self._graphs) > 1:
            self._graphs.popitem(last=False)
        return found[0]


def _profiles(effect: MakePlan) -> list[DeviceProfile]:
    """Of the candidates, within the memory that the user grants, and of the head."""
    found = [profile_of(c.device, c.facts, c.link, c.slowdown, c.host) for c in effect.candidates]
    return with_head(within(found, effect.memory), effect.head, effect.head_host)


def _pins(effect: MakePlan) -> dict[str, tuple[DeviceId, ...]]:
    return {value: tuple(map(DeviceId, devices)) for value, devices in effect.pin.items()}


def _input(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | None, ...] | None]:
    tensor = value.type.tensor_type
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).newbyteorder("<").str
    except (KeyError, TypeError):
        dtype = "?"
    if not tensor.HasField("shape"):
        return dtype, None
    return dtype, tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)


def _refuse_too_long(plan: str, programs: Programs) -> None:
    """A plan's text and each device's programs travel as one message each."""
    longest = max(
        (len(msgspec.msgpack.encode(each)) for each in programs.by_device.values()), default=0
    )
    if len(plan) > limits.PLAN_TEXT_BYTES or longest > limits.INSTALL_BYTES:
        raise InvalidInput(
            f"the plan is too long: {len(plan)} bytes, and {longest} for one device",
            hint="cut the model into fewer stages or tasks",
        )
