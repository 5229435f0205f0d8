"""What must hold in every simulation. Each checker knows one promise, and raises ``Broken``."""

from __future__ import annotations

from collections.abc import Callable

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.codec import Array
from meshinfer.scheduler import events as e
from meshinfer.scheduler.client import LATE_S, ClientCore
from meshinfer.scheduler.worker import WorkerCore
from meshinfer.simulator.simulation import BAD_INPUT, POISON, Asked, Simulation

RECOVERY_S = 24.0
"""How long after a fault something may still be late because of it (a blob is asked for again
after 24 s at the latest)."""


HURRY_S = 1.0
"""A deadline up to this may be too short for what is well, too: links are slow in some seeds."""

CANCEL_S = 0.5
"""How long word of a cancellation takes in a calm seed, through the coordinator to all devices."""

AWAY = {
    "crash", "power", "partition", "partition of workers", "one way", "client away", "freeze",
    "freeze coordinator", "stop", "restart coordinator", "poison",
}  # fmt: skip
"""Faults that can leave no worker, or no coordinator, for so long that it is said."""


DEAF = {
    "cut", "client away", "client crash", "freeze coordinator", "restart coordinator", "cut bulk",
    "one way", "loss", "damage", "word lost",
}  # fmt: skip
"""Faults that keep a client from hearing that its time is over, or of the tensors of its answer."""


_QUIET_S = limits.HEARTBEAT_S * 2
"""What waited for a partition's end may come after the coordinator gave up waiting for it."""


class Broken(AssertionError):
    """A promise that was not kept; ``request``: of which request, if it is one's."""

    def __init__(self, why: str, request: str = "") -> None:
        super().__init__(why)
        self.request = request


Checker = Callable[[Simulation, bool], None]
"""Looks at a world, which is calm or not."""


def _replies(world: Simulation) -> list[tuple[Asked, float, m.Reply, dict[str, Array]]]:
    found = []
    for asked in world.asked:
        for at, outcome in asked.outcomes:
            assert isinstance(outcome.reply, m.Reply)
            found.append((asked, at, outcome.reply, dict(outcome.arrays)))
    return found


def one_outcome(world: Simulation, calm: bool) -> None:
    """Nobody is told twice, and nothing after having given up."""
    for asked in world.asked:
        if len(asked.outcomes) > (0 if asked.cancelled else 1):
            raise Broken(f"{asked.request} has {len(asked.outcomes)} outcomes", asked.request)


def right_or_typed(world: Simulation, calm: bool) -> None:
    """An answer is that of a model which served when it was asked, or of a later one: its header
    may take a while."""
    for asked, _, reply, arrays in _replies(world):
        if reply.failure is not None:
            continue
        data = world.data_of(reply.plan)
        oldest = min(map(world.datas.index, asked.datas))
        if data is None or world.datas.index(data) < oldest:
            which = None if data is None else world.datas.index(data) + 1
            raise Broken(f"{asked.request} is answered by version {which}", asked.request)
        if _may_be_wrong(world, asked):
            continue
        if not world.kernels.is_right(data, asked.seed, arrays):
            raise Broken(f"{asked.request} is answered wrong", asked.request)


def _may_be_wrong(world: Simulation, asked: Asked) -> bool:
    """Whether a device lies that was not found yet when this was asked first."""
    since = min(a.at for a in world.asked if a.request == asked.request)
    found = any(name == world.liar and at < since for at, name, _ in world.found)
    return bool(world.liar) and not found


def believed(world: Simulation, calm: bool) -> None:
    """Who is honest is never proven a liar; nor even suspected where nobody lies."""
    for name, proven in world.accused:
        if name != world.liar and (proven or not world.liar):
            raise Broken(f"{name} is taken for a liar, proven: {proven}")


def no_mixing(world: Simulation, calm: bool) -> None:
    """No kernel is ever given what belongs to another request, attempt or model; but for lies."""
    if world.wrong and not world.liar:
        raise Broken(*world.wrong[0])


def errors_explained(world: Simulation, calm: bool) -> None:
    """An error has a fault that explains it, of its kind and in its time."""
    for asked, at, reply, _ in _replies(world):
        if reply.failure is None:
            continue
        near = [f for f in world.mishaps if f.since <= at and f.until + RECOVERY_S >= asked.at]
        causes = {f.what for f in near}
        match reply.failure.error:
            case "DeadlineExceeded":
                explained = bool(causes) or asked.deadline_s <= HURRY_S
            case "ClusterUnavailable" if "its journal" in reply.failure.message:
                explained = "disk full" in causes
            case "ClusterUnavailable":
                explained = bool(causes & AWAY)
            case "InvalidInput":
                failed = world.kernel_failures[asked.request]
                explained = failed >= limits.KERNEL_FAILURES_PER_REQUEST
            case "WorkerLost":
                explained = asked.seed == POISON and _proven(world)
            case _:
                explained = False
        if calm or not explained:
            why = f"{asked.request} ends by {reply.failure}, faults were {sorted(causes)}"
            raise Broken(why, asked.request)


def _proven(world: Simulation) -> bool:
    """Whether any request has ended as many processes as it takes to blame it."""
    ended = (each.total() for each in world.deaths.values())
    return max(ended, default=0) >= limits.CRASHES_PER_REQUEST


def contained(world: Simulation, calm: bool) -> None:
    """What ends workers is tried a few times, then alone (RELIABILITY), and never answered; nor is
    what fails all kernels. All that have a part in a try may end; three may before any is heard."""
    most = limits.CRASHES_PER_REQUEST
    for (request, _), deaths in world.deaths.items():
        tries = [count for _, count in sorted(deaths.items())]
        if len(tries) > most + 1 or any(n > 1 for n in tries[most:]):
            raise Broken(f"{request} has ended workers in each try: {tries}", request)
    for asked, _, reply, _ in _replies(world):
        if asked.seed in (BAD_INPUT, POISON) and reply.failure is None:
            raise Broken(f"{asked.request} is answered", asked.request)


def written(world: Simulation, calm: bool) -> None:
    """What was answered is on disk; where it cannot be, the log says so."""
    if world.unwritten:
        raise Broken("was answered, and is not on disk", world.unwritten[0])
    core = world.coordinator
    loud = any(note.level == "error" and "journal" in note.text for note in core.notes)
    if core.id in world.disk_refused and not loud:
        raise Broken("the journal is not written, and the log does not say so")


def counted_once(world: Simulation, calm: bool) -> None:
    """What clients compute themselves counts once, and needs nobody else."""
    for process, count in world.granted.counted.items():
        if count > world.granted.ran[process]:
            raise Broken(f"{process} counts {count} of {world.granted.ran[process]} requests")
    for asked in world.asked:
        others = any(a.request == asked.request and not a.here for a in world.asked)
        if asked.here and not others and asked.request in world.computed:
            raise Broken("is computed here and there", asked.request)


def deadlines(world: Simulation, calm: bool) -> None:
    """DeadlineExceeded comes at the deadline: not before, and not long after."""
    for asked, at, reply, _ in _replies(world):
        if reply.failure is None or reply.failure.error != "DeadlineExceeded":
            continue
        took = at - min(a.at for a in world.asked if a.request == asked.request)
        if took < asked.deadline_s * 0.9 - 0.01:
            raise Broken(f"{asked.request} is late after {took:.3f} s", asked.request)
        frozen = sum(f.until - f.since for f in world.mishaps if "freeze" in f.what)
        near = [f for f in world.mishaps if f.since <= at and f.until + RECOVERY_S >= asked.at]
        deaf = any(f.what in DEAF for f in near)
        late_s = LATE_S if deaf else 0.0  # else the coordinator says so, not the client's own clock
        if took > (asked.deadline_s + late_s) * 1.12 + frozen + 1.0:
            raise Broken(f"{asked.request} is told late, after {took:.3f} s", asked.request)


def few_attempts(world: Simulation, calm: bool) -> None:
    """Retries are bounded, by the faults as well."""
    for asked, at, reply, _ in _replies(world):
        faults = sum(f.since <= at and f.until + RECOVERY_S >= asked.at for f in world.mishaps)
        most = 1 if calm else min(limits.ATTEMPTS_PER_REQUEST, 4 + 4 * faults)
        if reply.attempts > most:
            raise Broken(f"{asked.request} took {reply.attempts} attempts", asked.request)


def cancelled_stop(world: Simulation, calm: bool) -> None:
    """Nothing is begun for what was given up, once word of it is everywhere."""
    if not calm:
        return  # the word may be lost with a connection
    for asked in world.asked:
        late = world.cancelled_at.get(asked.request, world.now) + CANCEL_S
        begun = [at for at in world.computed.get(asked.request, ()) if at > late]
        if begun:
            raise Broken(f"{asked.request} was given up, and tasks begun later", asked.request)


def calm_never_resends(world: Simulation, calm: bool) -> None:
    """Where nothing fails, nothing is sent twice."""
    if calm and world.resent:
        raise Broken(f"{world.resent} messages were sent again")


def bounded(world: Simulation, calm: bool) -> None:
    """What cores hold has bounds: looked at as time passes."""
    asked = len(world.asked) + 1
    for node in world.living():
        if isinstance(node.core, WorkerCore | ClientCore):
            half = node.core._computing
            if (
                len(half._requests) > asked
                or len(half.holding._released) > limits.STALE_REQUESTS_KEPT
            ):
                raise Broken(f"{node} holds {len(half._requests)} requests of {asked}")
            if len(half.outbox) > 64 * asked or len(half.acks) > 64 * asked:
                raise Broken(f"{node} has {len(half.outbox)} messages to resend")
    core = world.core
    running: dict[int, int] = {}
    for request in core.requests.values():
        made = request.deployment
        if made is None:
            continue
        running[made.number] = running.get(made.number, 0) + 1
        if core.catalogue.deployments.get(made.number) is not made:
            raise Broken(f"{request.id} runs under a deployment that is retired", request.id)
        if running[made.number] > made.most_running + 1:
            raise Broken(f"{running[made.number]} requests run under {made.number}")
    for made in core.catalogue.deployments.values():
        for name, peer in made.members.items():
            device = core.members.devices.get(name)
            if device is None or device.peer != peer:
                raise Broken(f"deployment {made.number} has {name}, which has left")


def told(world: Simulation, calm: bool) -> None:
    """Who is to take a task hears of it at once: else the request waits until a silent device is
    back, or lost."""
    request = world.word.untold(world.core)
    if request:
        raise Broken("tasks go to others, and nobody was told", request)


def lost_rightly(world: Simulation, calm: bool) -> None:
    """No process is taken for lost because one before it was."""
    if world.word.mistaken:
        raise Broken(f"{world.word.mistaken[0]} is lost, by news of another process")


def empty(world: Simulation, calm: bool) -> None:
    """A while after the last outcome nothing is left of any request, anywhere."""
    if world.core.requests:
        raise Broken(f"the coordinator holds {list(world.core.requests)}")
    for node in world.living():
        if isinstance(node.core, WorkerCore | ClientCore):
            left = node.core._computing.outbox._under_way
            if left and not node.core._computing.outbox:
                raise Broken(f"{node} counts {left} bytes as under way, and nothing is")
        match node.core:
            case WorkerCore() as core if not _idle(core):
                half = core._computing
                if _only_orphans(core, world):
                    continue
                kept = sorted(half._requests), half.running and half.running[0].request
                raise Broken(
                    f"{node} still holds {kept}, {len(half.outbox)} messages to resend, "
                    f"{len(half.acks)} to acknowledge, {half.outbox._under_way} bytes under way"
                )
            case ClientCore() as core:
                if core._requests or core._questions or core._outbox or not core._computing.idle:
                    held = sorted({*core._requests, *core._computing._requests})
                    raise Broken(f"{node} still holds {held}")
            case _:
                pass


def forgotten(world: Simulation, calm: bool) -> None:
    """A while after the last outcome nobody keeps programs of which the coordinator does not know:
    each takes memory for as long as its process lives."""
    known = world.core.catalogue.deployments
    for node in world.living():
        core = node.core
        if not isinstance(core, WorkerCore | ClientCore):
            continue
        kept = {*core._installing.deployments, *node.prepared, *node.granted} - known.keys()
        if kept:
            raise Broken(f"{node} keeps what it has installed of {sorted(kept)}, which are retired")


def _idle(core: WorkerCore) -> bool:
    """Spares may still be loaded, gently: that is of no request."""
    half = core._computing
    return half.idle and not half.outbox and not half.acks


def _only_orphans(core: WorkerCore, world: Simulation) -> bool:
    """Whether all that is held are inputs of requests that nobody asks for: their client died or
    gave up before the header arrived. They are bounded in number, and dropped after ORPHAN_INPUT_S,
    longer than a simulation takes."""
    half = core._computing
    busy = half.running or half._queue or half.outbox or half.acks
    clients = {n.id for n in world.clients()}
    wanted = {(a.request, a.life) for a in world.asked if not a.cancelled and a.life in clients}
    return not busy and not any(
        held.client or (name, held.giver) in wanted for name, held in half._requests.items()
    )


def healthy(world: Simulation) -> bool:
    """Whether everybody who is there has joined, every device may get work, and none counts as
    silent, or will as soon as the coordinator looks; and the journal is written (a full disk is
    looked at again after a while)."""
    now = world.coordinator.last
    if any(now - d.heard > _QUIET_S for d in world.core.members.devices.values()):
        return False
    states = [d.state(now) for d in world.core.members.devices.values()]
    workers = world.workers()
    here = {n.id for n in workers} == {d.peer for d in world.core.members.devices.values()}
    if world.core.members.presence.silent or world.core._journal.broken is not None:
        return False
    return here and set(states) == {"ready"} and all(world.joined(n) for n in world.living())


ALWAYS: tuple[Checker, ...] = (bounded, told, lost_rightly)
AT_THE_END: tuple[Checker, ...] = (
    one_outcome, no_mixing, right_or_typed, errors_explained, deadlines, few_attempts,
    calm_never_resends, cancelled_stop, contained, written, counted_once, believed,
)  # fmt: skip


def outcome_of(effect: e.Resolve) -> str:
    """For stories."""
    reply = effect.reply
    assert isinstance(reply, m.Reply)
    return "answered" if reply.failure is None else str(reply.failure)
