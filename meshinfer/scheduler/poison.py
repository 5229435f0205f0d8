"""Requests that end the processes that compute them: who is to blame, and bodies that are refused.

A process counts only if it died, by no other's doing, while it computed that request's task. After
one such process the request runs alone on one device, so that it ends no more than one at a time,
and only a third death is proof.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.admission import body_of
from meshinfer.scheduler.membership import Device
from meshinfer.scheduler.request import Request


def suspect_of(open_: Mapping[str, Request], device: Device) -> Request | None:
    """The request whose task a device computed when it was last heard, if for several times as long
    as any of that plan takes: a kernel that takes all the memory needs its time to do so."""
    request = open_.get(device.computing.partition(" ")[0])
    if request is None or request.deployment is None:
        return None
    longest_s = request.deployment.longest_s
    late = device.computing_s > max(limits.SUSPECT_S, limits.LATE_TIMES * longest_s)
    return request if late else None


class Poison:
    """Mutable: owned by the coordinator's core. ``_bodies``: those that were proven, until when and
    what they did."""

    def __init__(self) -> None:
        self._bodies: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def refusal(self, message: m.Submit, now: float) -> m.Failure | None:
        """Why a request is refused at once: the same body has ended workers before."""
        if not self._bodies:  # as nearly always: a hash less for each request
            return None
        until, causes = self._bodies.get(body_of(message), (0.0, ""))
        return None if now >= until else _lost(causes, until - now)

    def lost(self, open_: Mapping[str, Request], device: Device, why: str, now: float) -> None:
        """A device is gone, maybe by a request's doing; its next process will say.

        Who may have ended so many waits for that, before it ends another; who is suspect, at once.
        """
        name, suspect = device.name, suspect_of(open_, device)
        for request in open_.values():
            made = request.deployment
            if (
                made is None
                or request.merged is not None
                or name not in made.members
                or made.only_spare(name)
            ):
                continue
            request.lost.setdefault(name, why)
            request.hurt_at = now
            if suspect not in (None, request) or device.dismissed:
                continue  # another's doing, or it was sent away
            request.losses += 1
            request.unheard.add(name)
            # A plan of one task leaves little doubt; of several, some devices die by chance.
            most = limits.CRASHES_PER_REQUEST - (made.tasks == 1)
            if made.alone or request.losses >= most or request is suspect:
                request.held_until, request.deployment = now + limits.EVIDENCE_S, None

    def heard(
        self, open_: Mapping[str, Request], hello: m.Hello, now: float
    ) -> tuple[Request | None, m.Failure | None]:
        """A process of a device says how the one before ended: the request that it computed, and
        its failure, once proven."""
        for each in open_.values():
            each.unheard.discard(hello.device)
            if not each.unheard:
                each.held_until = 0.0
        ended = hello.ended
        request = None if ended is None else open_.get(ended.request)
        if ended is None or request is None:
            return None, None
        failure = self._blame(request, ended, hello, now)
        if request.alone and request.deployment is not None and not request.deployment.alone:
            request.deployment = None  # before it ends more of them
        return request, failure

    def _blame(
        self, request: Request, ended: m.Ended, hello: m.Hello, now: float
    ) -> m.Failure | None:
        """A process has died as it computed this request. A plan of one task proves as much as one
        that was made for it alone."""
        tried = request.tried.get(ended.attempt)
        key = f"{hello.device}#{hello.incarnation}"
        if tried is None or ended.killed or key in request.crashes:
            return None
        request.crashes[key] = f"{hello.device}: {ended.cause}"
        again = request.together is not None and ended.attempt > request.together
        alone = tried.deployment.alone or tried.deployment.tasks == 1
        if not (alone or again) or len(request.crashes) < limits.CRASHES_PER_REQUEST:
            return None
        if request.header.body:  # else nobody can tell it from others of its shape
            self._bodies[body_of(request.header)] = (now + limits.POISON_S, request.causes)
            while len(self._bodies) > limits.POISON_BODIES:
                self._bodies.popitem(last=False)
        return _lost(request.causes, None)


def _lost(causes: str, retry_after_s: float | None) -> m.Failure:
    return m.Failure(
        error="WorkerLost",
        message=f"its tasks end the processes that compute them: {causes}",
        hint="try this input with plain onnxruntime on such a device; it may lack memory",
        retry_after_s=retry_after_s,
    )
