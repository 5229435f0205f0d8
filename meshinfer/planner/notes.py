"""What a plan comes to and why it is this one, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from meshinfer.cost import DeviceProfile, Timeline
from meshinfer.errors import InvalidInput, NotEnoughMemory
from meshinfer.identity import DeviceId
from meshinfer.planner.bands import Block
from meshinfer.planner.candidates import Candidate, Choice
from meshinfer.planner.search import search

TRIED_APART = 8
"""Most devices that are tried in and out of the plan one by one."""
OTHERS = 4
"""Most plans of several devices that are told as alternatives."""


def notes_of(choice: Choice, best: Candidate, course: Timeline, spread: bool) -> Iterator[str]:
    """What is expected, what bounds it, bytes, who is idle and why, and what else was tried."""
    used, order = best.plan.devices(), choice.order
    yield (
        f"expected {course.total_s * 1e3:.1f} ms on {len(used)} of {len(order)} computing devices "
        f"in {_count(len(best.plan.stages), 'stage')}, bound by {course.bound}"
    )
    moved = sum(u.bytes_sent for u in course.devices)
    fullest = max(course.devices, key=lambda u: u.peak_bytes)
    yield (
        f"{mode_of(choice, best)}: {moved / 1e6:.2f} MB a request cross links; the fullest device, "
        f"{fullest.id}, holds {fullest.peak_bytes / 1e6:.1f} MB at most"
    )
    if choice.objective == "throughput":
        yield (
            f"one answer every {course.bottleneck_s * 1e3:.1f} ms with {best.plan.window} requests "
            "in flight"
        )
    if spread:
        short = "" if len(used) == len(order) else " as far as this model can be split"
        yield f"spread over all devices{short}, as was asked, even if fewer were faster"
        yield from _too_small(choice, best)
    else:
        yield from _idle(choice, best)
    kinds = sorted({p.numeric_class for p in order if p.id in used})
    if len(kinds) > 1:
        yield (
            f"devices of {len(kinds)} numeric classes compute ({', '.join(kinds)}): answers are as "
            "exact, but not bit for bit what one of them computes; strict uses one class"
        )
    for p in choice.profiles:
        if not p.able:
            if p.id not in choice.ends:  # of which nobody expects it
                yield f"{p.id} idle: it does not compute"
        elif p not in order:
            yield f"{p.id} idle: {p.numeric_class} may round differently, and strict was asked"
    yield from _alternatives(choice, best)


def _alternatives(choice: Choice, best: Candidate) -> Iterator[str]:
    """The best device alone, and the best of several; equals differ in names only."""
    told: set[str] = set()
    left = {True: 1, False: OTHERS}
    rivals = (c for c in choice.seen.values() if c.plan != best.plan and ";" not in c.name)
    for c in sorted(rivals, key=choice.key):
        line = f"alternative: {c.name}: {_worth(choice, c)}"
        alone = len(c.plan.devices()) == 1
        if left[alone] and line not in told:
            told.add(line)
            left[alone] -= 1
            yield line


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def mode_of(choice: Choice, c: Candidate) -> str:
    """The plan's mode; a device beside the source counts as the source."""
    devices = c.plan.devices()
    if c.blocks and any(block.others for block in c.blocks):
        return f"whole requests, each to one of {len(devices)} devices that is free"
    source = choice.profile(choice.ends[0])
    if len(devices) == 1 and choice.profile(devices[0]).beside(source):
        return "on-device"
    return c.plan.mode


def _worth(choice: Choice, c: Candidate) -> str:
    if c.breach:
        return "would move what is pinned"
    moved = sum(u.bytes_sent for u in c.timeline.devices) / 1e6
    unit = f"{c.timeline.total_s * 1e3:.1f} ms, {moved:.2f} MB"
    if choice.objective == "throughput":
        unit = f"an answer every {c.timeline.bottleneck_s * 1e3:.1f} ms, {moved:.2f} MB"
    if choice.objective == "memory":
        unit += f", at most {choice.value(c) / 1e6:.1f} MB a device"
    return unit + (", but exceeds what devices grant" if choice.excess(c) else "")


def idle(choice: Choice, c: Candidate) -> list[DeviceProfile]:
    """Devices that could compute and get nothing."""
    used = set(c.plan.devices())
    return [p for p in choice.order if p.id not in used]


def _idle(choice: Choice, best: Candidate) -> Iterator[str]:
    resting = idle(choice, best)
    for p in resting[:TRIED_APART]:
        more = including(choice, best, p)
        if more is None or p.id not in more.plan.devices():
            yield f"{p.id} idle: too slow for a share of its own"
        elif more.breach > best.breach:
            yield f"{p.id} idle: what is pinned may not reach it"
        elif p.id in choice.overfull(more):
            yield _no_room(choice, more, p)
        else:
            added = choice.value(more) - choice.value(best)
            if choice.objective == "memory":
                yield f"{p.id} idle: would add {added / 1e3:.0f} kB"
            elif added < 0:
                gain = f"{-added * 1e3:.0f} ms"
                yield f"{p.id} idle: would save {gain} at most, too little to be sure of"
            else:
                yield f"{p.id} idle: would add {added * 1e3:.0f} ms"
    if len(resting) > TRIED_APART:
        yield f"{len(resting) - TRIED_APART} more idle: the others do no better with them"


def _too_small(choice: Choice, best: Candidate) -> Iterator[str]:
    """Of a plan over all devices."""
    for p in idle(choice, best)[:TRIED_APART]:
        more = including(choice, best, p)
        if more is not None and p.id in choice.overfull(more):
            yield _no_room(choice, more, p)


def _no_room(choice: Choice, c: Candidate, p: DeviceProfile) -> str:
    needed = choice.overfull(c)[p.id]
    return (
        f"{p.id} idle: it grants {_size(p.memory_bytes)}, and a share would take "
        f"{_size(needed)}; give it more (--memory, or its group's limit)"
    )


def including(choice: Choice, c: Candidate, p: DeviceProfile) -> Candidate | None:
    """The plan with one device more: in its split stages, or cut anew where it has none."""
    name = f"{c.name.split(';')[0]}; with {p.id}"
    if any(b.others for b in c.blocks):
        blocks = [replace(b, others=(*b.others, p.id)) if b.others else b for b in c.blocks]
        return choice.candidate(name, blocks, {})
    if any(b.whole_on is None for b in c.blocks):
        blocks = [b if b.whole_on is not None else _with(choice, b, p) for b in c.blocks]
        return choice.candidate(name, blocks, {})
    members = [choice.profile(d) for d in c.plan.devices()] + [p]
    shares = {m.id: m.flops_per_s for m in members}
    chain = search(choice.space, choice.team(members, shares), spread=True)
    if chain is None:
        return None
    return choice.candidate(f"{len(members)} devices", chain.blocks, shares)


def _with(choice: Choice, block: Block, p: DeviceProfile) -> Block:
    speed = sum(choice.profile(d).flops_per_s for d, _ in block.shares)
    mean = sum(weight for _, weight in block.shares) / speed
    if p.id in block.devices:
        return block
    return replace(block, shares=(*block.shares, (p.id, p.flops_per_s * mean)))


def without(choice: Choice, c: Candidate, device: DeviceId) -> Candidate:
    """The plan with one device less in its split stages."""
    blocks = []
    for block in c.blocks:
        left = tuple((d, w) for d, w in block.shares if d != device)
        blocks.append(replace(block, shares=left) if left else block)
    return choice.candidate(f"{c.name.split(';')[0]}; without {device}", blocks, {})


def too_large(choice: Choice, best: Candidate) -> NotEnoughMemory:
    over = (
        f"{name} would need {_size(needed)} of {_size(choice.by_id[name].memory_bytes)}"
        for name, needed in choice.overfull(best).items()
    )
    return NotEnoughMemory(
        f"no plan fits the devices' memory: at best {', '.join(over)}",
        hint="add a device, grant more memory (--memory), or use a smaller model or image",
    )


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def pinned_fast(choice: Choice) -> InvalidInput:
    names = sorted(choice.space.pins.by_value)
    return InvalidInput(
        f"no plan keeps {names} on the devices that they are pinned to",
        hint="pin values to devices that compute, each operator's values to one of them at least",
    )
