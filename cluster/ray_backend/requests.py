"""One request on Ray: its input is cut here, each task is a call on references, and the answer is
merged here. An attempt that loses an actor is made again; the deadline ends all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from cluster import results
from cluster.ray_backend.actor import Ran
from cluster.ray_backend.coordinator import RayCoordinator
from cluster.ray_backend.nodes import SIGNS
from cluster.ray_backend.serving import Serving
from cluster.results import Result, closed_error
from meshinfer import limits
from meshinfer.errors import ClusterUnavailable, DeadlineExceeded, InvalidInput, WorkerLost
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Array, error_of, failure_of
from meshinfer.scheduler.calls import Call, results_of
from meshinfer.scheduler.catalogue import Model
from meshinfer.scheduler.events import Signature
from meshinfer.scheduler.recipe import Gathering, Recipe

_PUT_BYTES = 64 << 10
"""Longer pieces of an input are put into the object store once, whoever reads them."""
_SLICE_S = 0.25
"""How often a request that waits looks whether it still should."""
_SILENT_S = limits.DEAD_AFTER_S
"""An actor that gives no sign of life for so long is lost to us. Ray takes 10 s and more to say so
of a node that was killed, and longer of one that stands still."""


@dataclass(slots=True)
class Asked:
    """One accepted request. ``lost``: devices that were, and why; ``hurt_s``: from its start until
    what was lost was begun again."""

    header: m.Submit
    arrays: Mapping[str, Array]
    model: Model
    signature: Signature
    wanted: tuple[str, ...] | None
    begun: float
    ends: float
    cancelled: bool = False
    attempts: int = 0
    kernel_failures: int = 0
    crashes: int = 0
    started: float | None = None
    lost: dict[str, str] = field(default_factory=dict)
    hurt_s: float = 0.0


class _Lost(Exception):
    """An attempt came to nothing, since something in Ray was lost: this actor, if known."""

    def __init__(self, why: str, actor: str = "") -> None:
        super().__init__(why)
        self.actor = actor


@dataclass(slots=True)
class _Attempt:
    """``made``: every result so far, an array or a reference. ``told``: what each task says.
    ``asked``: for a sign of life, when."""

    serving: Serving
    devices: dict[m.Place, str] = field(default_factory=dict)
    made: dict[tuple[m.Place, int], Any] = field(default_factory=dict)
    told: dict[m.Place, Any] = field(default_factory=dict)
    asked: dict[str, tuple[Any, float]] = field(default_factory=dict)


class Requests:
    """Runs requests, each in the thread that asks."""

    def __init__(self, coordinator: RayCoordinator) -> None:
        self._coordinator, self._ray = coordinator, coordinator.ray
        self._nodes = coordinator.nodes

    def answer(self, asked: Asked) -> Result:
        """The result. Raises a typed error, by the deadline."""
        while True:
            serving = self._coordinator.serving(
                asked.model, asked.signature, asked.ends, lambda: asked.cancelled
            )
            try:
                now = time.monotonic()
                if asked.started is None:
                    asked.started = now
                elif asked.lost:
                    asked.hurt_s = now - asked.started
                asked.attempts += 1
                attempt = _Attempt(serving)
                found = self._attempt(asked, attempt)
                if found is not None:
                    return found
            except _Lost as lost:
                self._look_for_lost(asked, attempt, lost)
            finally:
                self._coordinator.done(serving)

    # --- one attempt

    def _attempt(self, asked: Asked, attempt: _Attempt) -> Result | None:
        """None if a kernel failed and it may be tried again."""
        serving = attempt.serving
        try:
            self._call_all(asked, attempt)
            sink = serving.calls.sink
            final = [attempt.made[argument] for argument in sink.arguments]
            references = [each for each in final if not isinstance(each, np.ndarray)]
            got = iter(self._get(asked, attempt, [*attempt.told.values(), *references]))
            ran = {place: msgspec.msgpack.decode(next(got), type=Ran) for place in attempt.told}
            failed = next((r.failed for r in ran.values() if r.failed), None)
            if failed is not None:
                self._kernel_failed(asked, failed)
                return None
            merged = Gathering(Recipe.of(sink.program))
            for slot, each in zip(sink.slots, final, strict=True):
                merged.put(slot, each if isinstance(each, np.ndarray) else next(got))
            return self._result(asked, attempt, ran, merged.inputs())
        finally:
            with self._coordinator.changed:
                serving.busy.subtract(attempt.devices.values())

    def _call_all(self, asked: Asked, attempt: _Attempt) -> None:
        """Submit every task; none is waited for."""
        serving, source = attempt.serving, attempt.serving.calls.source
        recipe = Recipe.of(source.program)
        given = [asked.arrays[output.name] for output in source.program.outputs]
        for number, cut in enumerate(results_of(recipe)):
            piece = cut.sent(given)
            apart = piece.nbytes > _PUT_BYTES
            attempt.made[source.place, number] = self._ray.put(piece) if apart else piece
        for call in serving.calls.tasks:
            with self._coordinator.changed:
                device = serving.device(call, self._nodes.is_current)
                if device is None:
                    raise _Lost("a device of its plan is gone")
                serving.busy[device] += 1
            attempt.devices[call.place] = device
            pieces = [attempt.made[argument] for argument in call.arguments]
            run = serving.actors[device].run.options(num_returns=1 + len(call.readers))
            answer = run.remote(serving.number, call.place, call.slots, *pieces)
            told, *made = answer if call.readers else [answer]
            attempt.told[call.place] = told
            attempt.made |= {(call.place, i): each for i, each in enumerate(made)}

    def _get(self, asked: Asked, attempt: _Attempt, references: list[Any]) -> list[Any]:
        """What they refer to; in slices, since Ray does not wake us for a deadline of ours."""
        errors = self._ray.exceptions
        while True:
            left_s = asked.ends - time.monotonic()
            try:
                return self._ray.get(references, timeout=max(0.0, min(left_s, _SLICE_S)))
            except errors.GetTimeoutError:
                self._go_on(asked, attempt, left_s)
            except (errors.RayTaskError, errors.RayError) as error:
                cause = _loss(errors, error)
                if cause is None:
                    raise error_of(failure_of(error)) from error
                actor = getattr(cause, "actor_id", None) or ""
                raise _Lost(type(cause).__name__, actor) from error

    def _go_on(self, asked: Asked, attempt: _Attempt, left_s: float) -> None:
        """Whether to wait on. Raises what ends the request, or the attempt."""
        if self._coordinator.closed:
            raise closed_error()
        if left_s <= _SLICE_S or asked.cancelled:
            for told in attempt.told.values():
                self._ray.cancel(told)  # what has not begun
            lost = f"; lost on the way: {', '.join(asked.lost)}" if asked.lost else ""
            raise DeadlineExceeded(
                f"no answer within {asked.ends - asked.begun:.3g} s{lost}",
                hint="give a longer deadline_s, add nodes, or submit less at once",
            )
        actors = attempt.serving.actors
        for name in set(attempt.devices.values()):
            if not self._nodes.is_current(name, actors[name]):
                raise _Lost(f"{name} is gone")
            sign, since = attempt.asked.get(name, (None, 0.0))
            now = time.monotonic()
            if sign is None or self._ray.wait([sign], timeout=0)[0]:
                attempt.asked[name] = self._sign(actors[name]), now
            elif now > since + _SILENT_S:
                self._coordinator.lost(attempt.serving, {name: "it gives no sign of life"})
                raise _Lost(f"{name} is silent")

    # --- what goes wrong

    def _kernel_failed(self, asked: Asked, text: str) -> None:
        asked.kernel_failures += 1
        if asked.kernel_failures >= limits.KERNEL_FAILURES_PER_REQUEST:
            raise InvalidInput(
                f"a task failed {asked.kernel_failures} times: {text}",
                hint="if a kernel failed, plain onnxruntime should fail on this input, too",
            )

    def _look_for_lost(self, asked: Asked, attempt: _Attempt, lost: _Lost) -> None:
        """Tell the coordinator which actors are gone; what else was lost may be had again."""
        serving, used = attempt.serving, set(attempt.devices.values())
        with self._coordinator.changed:
            known = {n: self._nodes.all[n] for n in used if n in self._nodes.all}
            current = {
                n: serving.actors[n] for n in used if self._nodes.is_current(n, serving.actors[n])
            }
            gone = {n: node.lost_by for n, node in known.items() if n not in current}
            dead = {n: str(lost) for n in current if known[n].actor_id == lost.actor}
        if current and not dead and not gone:
            left_s = max(0.0, asked.ends - time.monotonic())
            dead = self._without_a_sign(current, left_s)
        self._coordinator.lost(serving, dead)
        asked.lost |= {**gone, **dead}
        asked.crashes += self._is_a_crash(dead)
        if asked.crashes >= limits.CRASHES_PER_REQUEST:
            raise WorkerLost(
                f"processes ended over its tasks {asked.crashes} times",
                hint="see ray logs: the tasks may want more memory than the nodes have",
            )
        if asked.attempts >= limits.ATTEMPTS_PER_REQUEST:
            raise WorkerLost(
                f"its devices were lost {asked.attempts} times ({lost})",
                hint="look at ray status; the nodes or their network are failing",
            )

    def _without_a_sign(self, current: Mapping[str, Any], left_s: float) -> dict[str, str]:
        """Those of the actors that do not answer in time, if there is time for that; and why."""
        signs = {self._sign(actor): name for name, actor in current.items()}
        told, silent = self._ray.wait(
            list(signs), num_returns=len(signs), timeout=min(_SILENT_S, left_s)
        )
        silent = silent if left_s >= _SILENT_S else []
        dead = {signs[sign]: "it gives no sign of life" for sign in silent}
        for sign in told:
            try:
                self._ray.get(sign)
            except self._ray.exceptions.RayError as error:
                dead[signs[sign]] = type(error).__name__
        return dead

    def _sign(self, actor: Any) -> Any:
        return actor.echo.options(concurrency_group=SIGNS).remote()

    def _is_a_crash(self, dead: Mapping[str, str]) -> bool:
        """Whether all that is gone are processes of nodes that live: maybe this request's fault."""
        if not dead:
            return False
        try:
            alive = {info["NodeID"] for info in self._ray.nodes() if info["Alive"]}
        except Exception:
            return False
        ids = {self._nodes.all[name].id for name in dead if name in self._nodes.all}
        return bool(ids) and ids <= alive

    # --- the end

    def _result(
        self,
        asked: Asked,
        attempt: _Attempt,
        ran: Mapping[m.Place, Ran],
        outputs: Mapping[str, Array],
    ) -> Result:
        now, serving = time.monotonic(), attempt.serving
        assert asked.started is not None
        with self._coordinator.changed:
            for name in attempt.devices.values():
                if name in self._nodes.all:
                    self._nodes.all[name].tasks_done += 1
            reasons = [f"{n} was lost on the way: {why}" for n, why in asked.lost.items()]
        if asked.attempts > 1 and not reasons:
            reasons = [f"it took {asked.attempts} attempts"]
        rounded = any(send.half for call in _all(serving) for send in call.program.sends)
        reply = m.Reply(
            request=asked.header.request,
            version=asked.model.version,
            plan=serving.plan(attempt.devices),
            image=asked.model.image,
            attempts=asked.attempts,
            total_s=now - asked.begun,
            queue_s=asked.started - asked.begun,
            tasks=tuple(_time(call, attempt, ran[call.place]) for call in serving.calls.tasks),
            rounded=rounded,
            degraded=bool(reasons),
            reasons=tuple(reasons[: limits.REASONS]),
            lost=tuple(asked.lost),
            added_s=asked.hurt_s,
        )
        return results.result_of(asked.model.name, reply, outputs, asked.wanted)


def unavailable(error: Exception) -> ClusterUnavailable:
    """What Ray raises when it is gone itself."""
    return ClusterUnavailable(f"Ray fails: {error}", hint="look at ray status")


def _all(serving: Serving) -> tuple[Call, ...]:
    return (serving.calls.source, *serving.calls.tasks)


def _time(call: Call, attempt: _Attempt, ran: Ran) -> m.TaskTime:
    """Ray brings a result to each node once, however many tasks read it there."""
    own, sink = attempt.devices[call.place], attempt.serving.calls.sink.place
    sent = 0
    for nbytes, readers in zip(ran.nbytes, call.readers, strict=True):
        where = {attempt.devices[place] if place != sink else "" for place in readers}
        sent += nbytes * len(where - {own})
    return m.TaskTime(place=call.place, device=own, compute_s=ran.compute_s, sent_bytes=sent)


def _loss(errors: Any, error: BaseException) -> BaseException | None:
    """What says that an actor, its node or what it made is gone; also where that is why a task
    could not begin."""
    kinds = (
        errors.RayActorError, errors.ObjectLostError, errors.NodeDiedError,
        errors.WorkerCrashedError, errors.OutOfMemoryError, errors.TaskCancelledError,
    )  # fmt: skip
    found = (each for each in (getattr(error, "cause", None), error) if isinstance(each, kinds))
    return next(found, None)
