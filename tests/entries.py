"""Counts what an object holds: the entries of every container that is reachable from it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping

_OURS = ("meshinfer.", "cluster.")


def entries(root: object) -> Counter[str]:
    """By the attribute that a container is held by. Followed are the attributes of objects of ours
    and what lies in containers; functions are not, since who calls back is not held for that."""
    found: Counter[str] = Counter()
    seen: dict[int, object] = {}  # kept, or another could get its number
    todo: list[tuple[str, object]] = [(type(root).__name__, root)]
    while todo:
        name, each = todo.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        if isinstance(each, Mapping):
            found[name] += len(each)
            todo += [(name, one) for pair in each.items() for one in pair]
        elif isinstance(each, list | tuple | set | frozenset | deque):
            found[name] += len(each)
            todo += [(name, one) for one in each]
        elif type(each).__module__.startswith(_OURS) and not isinstance(each, type):
            todo += [(f"{type(each).__name__}.{attribute}", one) for attribute, one in _of(each)]
    return found


def _of(each: object) -> Iterator[tuple[str, object]]:
    names = {*getattr(each, "__dict__", ()), *getattr(type(each), "__struct_fields__", ())}
    for kind in type(each).__mro__:
        names.update(kind.__dict__.get("__slots__", ()))
    for name in names:
        if hasattr(each, name):
            yield name, getattr(each, name)
