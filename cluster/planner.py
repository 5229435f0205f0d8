"""The process that opens and plans models for the coordinator, one after another, at low priority.

A search never holds the coordinator's interpreter, and one that nobody waits for takes only its
share of the processor. What a plan looks like is decided in ``meshinfer.planner``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import msgspec
import onnx
from onnx import helper

from cluster import granted, jobs, loss, processes, telemetry
from cluster.blobs import BlobStore
from cluster.importing import Importer
from cluster.loop import report
from meshinfer import limits
from meshinfer.cost import DeviceProfile, timeline
from meshinfer.cost.expected import expected_seconds, is_better
from meshinfer.errors import InvalidInput
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.image import ImageSpec
from meshinfer.importers import Source, check_image, inputs_needed, load, open_model
from meshinfer.legality import as_asked, refuse_sums, validate
from meshinfer.plan import Plan
from meshinfer.planner import (
    ADAPTED,
    Layout,
    Planned,
    Spares,
    adapt_plan,
    find_spares,
    make_plan,
    pins_of,
    refuse_pinned,
)
from meshinfer.programs import Programs, make_programs
from meshinfer.protocol import messages as m
from meshinfer.protocol.messages import Report
from meshinfer.report import report_of, with_spares
from meshinfer.scheduler.events import MakePlan, ModelOpened, OpenModel, PlanReady, Signature
from meshinfer.scheduler.profiles import profile_of, slowed, with_head, within


class Dropped(BaseException):
    """Nobody wants it now. No ``Exception``: nothing on the way may take it for its own."""


class Pace:
    """Holds work to a share of the processor, by pauses; what may be dropped is, on SIGUSR1.

    Two processes in one control group share its quota as equals, however low one's priority: so
    it is not enough to be nice. One job at a time, in the main thread, where signals are handled.
    ``drops``: as in ``jobs.Begin``. A drop comes at any time, also when its job has just ended.
    """

    def __init__(self, drops: int) -> None:
        self._drops = drops
        self._dropped: set[int] = set()
        self._job: int | None = None
        self._share = 1.0
        self._worked_s, self._since = 0.0, 0.0
        self._open = False
        signal.signal(signal.SIGPROF, self._pause)
        signal.signal(signal.SIGUSR1, self._hurry)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1,))

    @contextmanager
    def share(self, share: float, job: int | None) -> Iterator[None]:
        """Take so much of a processor meanwhile, until something else is urgent. ``job``: as drops
        name it, if they may."""
        self._share, self._job = share, job
        self._start_slice()
        if share < 1.0:
            signal.setitimer(signal.ITIMER_PROF, limits.SEARCH_SLICE_S, limits.SEARCH_SLICE_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            self._share, self._job = 1.0, None
            self._dropped.clear()  # the next one's can only come when this one is answered

    @contextmanager
    def may_be_dropped(self) -> Iterator[None]:
        """Raises ``Dropped`` anywhere inside when nobody wants it any more."""
        try:
            self._open = True
            if self._hurried:
                raise Dropped
            yield
        finally:
            self._open = False

    @property
    def _hurried(self) -> bool:
        return self._job in self._dropped

    def _hurry(self, *_: object) -> None:
        self._dropped.update(jobs.read_drops(self._drops))
        if self._open and self._hurried:
            self._open = False
            raise Dropped

    def _pause(self, *_: object) -> None:
        if self._share >= 1.0 or self._hurried:
            return
        took = (time.process_time() - self._worked_s) / self._share
        # Not for long: one call into C may have taken seconds, and what is urgent must not wait.
        ends = min(self._since + took, time.monotonic() + limits.SEARCH_PAUSE_S)
        while not self._hurried and (left := ends - time.monotonic()) > 0.0:
            time.sleep(min(left, limits.SEARCH_SLICE_S * 10))
        self._start_slice()

    def _start_slice(self) -> None:
        self._worked_s, self._since = time.process_time(), time.monotonic()


class Planner:
    """Keeps models that were opened, and graphs that were imported. Owned by the main thread."""

    def __init__(self, store: BlobStore, models: Mapping[str, tuple[str, ...]], pace: Pace) -> None:
        self._store, self._pace = store, pace
        self._graphs: OrderedDict[object, tuple[Graph, int]] = OrderedDict()
        self._layouts: OrderedDict[object, deque[Layout]] = OrderedDict()
        # Model -> the files of its weights; newest last. Trimming spares them.
        self._models = dict(models)
        self._import = Importer()
        self._measuring_s = 0.0

    def perform(self, job: jobs.Job) -> jobs.Answer:
        """Never raises for what the job asks."""
        quota = granted.cpu_quota()
        cores = 1.0 if quota is None else min(1.0, quota.cores)
        share = 1.0 if job.plan is None else job.plan.share
        before_s, self._measuring_s = time.process_time(), 0.0
        try:
            number = None if job.plan is None else job.plan.deployment
            with self._pace.share(share if share >= 1.0 else share * cores, number):
                if job.open is not None:
                    return self._open(job.open)
                assert job.plan is not None
                planned = self._plan(job.plan)
        except Dropped:
            assert job.plan is not None
            planned = PlanReady(job.plan.deployment, dropped=True)
        took_s = (time.process_time() - before_s - self._measuring_s) / cores
        return jobs.Answer(planned=replace(planned, search_s=took_s))

    def _open(self, effect: OpenModel) -> jobs.Answer:
        try:
            source = self._source(effect.digest)
            source.check()
            image = effect.image
            if image is None and source.image is not None:
                image = source.image.to_json()
            if image is not None:
                check_image(source.proto, ImageSpec.from_json(image))
            inputs = {v.name: _input(v) for v in source.inputs}
            outputs = inputs_needed(source.proto)
            shapes, weights = source.static_shapes(), source.weight_files
            del source  # the next line may need as much memory again
            if shapes is not None:  # refused models are refused now, not at the first request
                self._graph(effect.digest, None, Signature(False, tuple(sorted(shapes.items()))))
            jobs.remember(self._models, effect.digest, weights)
            return jobs.Answer(
                opened=ModelOpened(effect.key, inputs, image, outputs=outputs), weights=weights
            )
        except Exception as error:
            return jobs.Answer(opened=ModelOpened(effect.key, {}, None, report(error)))

    def _plan(self, effect: MakePlan) -> PlanReady:
        try:
            spec = effect.image if effect.signature.picture else None
            graph = self._graph(effect.digest, spec, effect.signature)
            graph = as_asked(graph, strict=effect.strict, half_transfers=effect.half_transfers)
            with self._pace.may_be_dropped():
                plan, made = self._planned(graph, effect)
            profiles = _profiles(effect)
            if effect.present is not None and not is_better(
                graph, plan, Plan.parse(effect.present), profiles, effect.objective
            ):
                return PlanReady(effect.deployment, kept=True)
            programs, made = _with_spares(graph, plan, profiles, effect, made)
            for digest, data in programs.blobs.items():
                if self._store.missing((digest,)):
                    self._store.put(digest, data())
            self._store.trim(keep={*self._models, *chain(*self._models.values())})
            if effect.tell_loss:
                made = self._with_loss(graph, plan, made)
            return PlanReady(
                effect.deployment,
                str(plan),
                programs.by_device,
                made,
                window=plan.window,
                expected=expected_seconds(graph, plan, profiles, programs.spares),
                adapted=ADAPTED in made.notes,
            )
        except Exception as error:
            return PlanReady(effect.deployment, failure=report(error))

    def _with_loss(self, graph: Graph, plan: Plan, made: Report) -> Report:
        """What it takes is no part of what a search takes."""
        before_s = time.process_time()
        with self._pace.may_be_dropped():
            made = loss.with_loss(graph, plan, made, self._store.folder)
        self._measuring_s = time.process_time() - before_s
        return made

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
        planned = self._searched(graph, profiles, effect)
        validate(graph, planned.plan)
        return planned.plan, report_of(graph, planned.plan, planned.timeline, planned.notes)

    def _searched(self, graph: Graph, profiles: list[DeviceProfile], effect: MakePlan) -> Planned:
        """By what earlier plans for these devices were like, where that is enough: devices that
        become slow do so now and then, and are what they were afterwards."""
        key = (graph.digest, effect.strict, effect.half_transfers, effect.objective)
        layouts = self._layouts.setdefault(key, deque(maxlen=limits.LAYOUTS_KNOWN))
        self._layouts.move_to_end(key)
        while len(self._layouts) > limits.SHAPES_PER_MODEL:
            self._layouts.popitem(last=False)
        head, pin, objective = DeviceId(effect.head), _pins(effect), effect.objective
        paces = {DeviceId(c.device): c.slowdown for c in effect.candidates}
        planned = None
        if effect.paced and effect.present is not None and not effect.spread:
            present = Plan.parse(effect.present)
            planned = adapt_plan(
                graph, profiles, head, head, layouts, paces, objective=objective, pin=pin
            )
            if planned and not is_better(graph, planned.plan, present, profiles, objective):
                planned = None
        if planned is None:
            planned = make_plan(
                graph,
                profiles,
                head,
                head,
                objective=objective,
                spread=effect.spread,
                pin=pin,
            )
        if len(paces) > 1:
            layouts.append(Layout(planned.blocks, paces))
        return planned

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
    found = [profile_of(c.device, c.facts, c.link, c.host, c.links) for c in effect.candidates]
    alike = with_head(within(found, effect.memory), effect.head, effect.head_host)
    return slowed(alike, {c.device: c.slowdown for c in effect.candidates})


def _with_spares(
    graph: Graph, plan: Plan, profiles: list[DeviceProfile], effect: MakePlan, made: Report
) -> tuple[Programs, Report]:
    """Programs, with two spare devices or one for the loss of each device if their messages are not
    too long."""
    pins = pins_of(graph, plan, profiles, _pins(effect))
    for twice in (True, False):
        spares = find_spares(graph, plan, profiles, pins, strict=effect.strict, twice=twice)
        programs = make_programs(graph, plan, spares.devices)
        longest = _longest(programs)
        if longest <= limits.INSTALL_BYTES:
            break
    if spares.devices and longest > limits.INSTALL_BYTES:
        spares = Spares({}, {}, ("the loss of a device takes a new plan: too many tasks",))
        programs = make_programs(graph, plan)
        longest = _longest(programs)
    if len(str(plan)) > limits.PLAN_TEXT_BYTES or longest > limits.INSTALL_BYTES:
        raise InvalidInput(
            f"the plan is too long: {len(str(plan))} bytes, and {longest} for one device",
            hint="cut the model into fewer stages or tasks",
        )
    return programs, with_spares(made, spares)


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


def _longest(programs: Programs) -> int:
    """Bytes of what is longest to install: each device's programs travel as one message, and those
    that it prepares for others as another."""
    spare: dict[str, list[m.Program]] = {}
    for each in programs.by_device.values():
        for program in each:
            for device in program.spares:
                spare.setdefault(device, []).append(program)
    sets = (*programs.by_device.values(), *spare.values())
    return max((len(msgspec.msgpack.encode(each)) for each in sets), default=0)


def main() -> None:
    """Jobs come on stdin, answers go to what was stdout, and whatever is printed to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    begin = jobs.read(sys.stdin.buffer, jobs.Begin)
    if begin is None:
        return
    telemetry.configure(begin.log_level, begin.log_form, name="planning")
    processes.watch_parent(begin.parent, lambda: os._exit(0))
    store = BlobStore(Path(begin.folder), begin.max_bytes, shared=True)
    planner = Planner(store, begin.models, Pace(begin.drops))
    while (job := jobs.read(sys.stdin.buffer, jobs.Job)) is not None:
        jobs.write(answers, planner.perform(job))


if __name__ == "__main__":
    main()
