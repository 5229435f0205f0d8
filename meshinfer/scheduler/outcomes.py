"""What a request is told in the end: an answer's reply with all that happened, and failures."""

from __future__ import annotations

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.scheduler.membership import Membership
from meshinfer.scheduler.request import Request, Try


def answered(request: Request, tried: Try, members: Membership, now: float) -> m.Reply:
    """Of what an attempt has merged."""
    assert request.started is not None and request.merged is not None
    reasons = _reasons(request, tried, members, now)
    return m.Reply(
        request=request.id,
        version=request.model.version,
        plan=tried.plan,
        image=request.model.image,
        attempts=len(request.tried),
        total_s=request.merged[0] - request.submitted,
        queue_s=request.started - request.submitted,
        tasks=tuple(sorted(tried.tasks.values(), key=lambda t: t.place)),
        rounded=tried.deployment.rounded,
        degraded=bool(reasons),
        reasons=reasons,
        lost=tuple(request.lost),
        since=request.since,
        added_s=max(0.0, tried.since - request.started, request.hurt_at - request.started),
    )


def failed(request: Request, failure: m.Failure, now: float) -> m.Reply:
    return m.Reply(
        request=request.id,
        version=request.model.version,
        attempts=len(request.tried),
        total_s=now - request.submitted,
        failure=failure,
        lost=tuple(request.lost),
    )


def _reasons(request: Request, tried: Try, members: Membership, now: float) -> tuple[str, ...]:
    """Why this answer was had with less than there is, or later than it might."""
    found = [f"{name} was lost on the way: {why}" for name, why in request.lost.items()]
    if tried.all_by and set(tried.moved.values()) == {tried.all_by}:
        found.append(f"requests waited for links of its plan: {tried.all_by} ran all tasks")
    if tried.moved and not found:
        takers = ", ".join(sorted(set(tried.moved.values())))
        slow = f"{' and '.join(tried.left)} had become slow"
        why = slow if tried.left else "devices of its plan are lost, silent or stuck"
        found.append(f"{why}: {takers} ran their tasks")
    if len(request.tried) > 1 and not found:
        found.append(f"it took {len(request.tried)} attempts")
    if request.alone:
        found.append(f"it ran on one device, since it ended others: {request.causes}")
    found += [f"{name} is {state}: {cause}" for name, state, cause in members.kept_out(now)]
    found += [
        f"{one} and {other} do not reach each other: their pieces went by the head"
        for one, other in members.apart
        if {one, other} <= set(tried.deployment.members)
    ]
    return tuple(each[: limits.CAUSE_CHARS] for each in found[: limits.REASONS])


def overdue(request: Request) -> m.Failure:
    lost = f"; lost on the way: {', '.join(request.lost)}" if request.lost else ""
    return m.Failure(
        error="DeadlineExceeded",
        message=f"no answer within {request.deadline - request.submitted:.3g} s{lost}",
        hint="give a longer deadline_s, add devices, or submit less at once",
    )


def lost_too_often(request: Request) -> m.Failure:
    return m.Failure(
        error="WorkerLost",
        message=f"its devices were lost {len(request.tried)} times",
        hint="look at meshinfer devices; the devices or their network are failing",
    )


def kernel_failed(request: Request, text: str) -> m.Failure:
    return m.Failure(
        error="InvalidInput",
        message=f"a task failed {request.kernel_failures} times: {text}",
        hint="if a kernel failed, plain onnxruntime should fail on this input, too",
    )
