"""Drawings as SVG text: speedup against devices, stacked bars, a scatter; colours by CSS class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_LINK_CLASSES = ("s0", "s1", "s2", "s3")


@dataclass(frozen=True, slots=True)
class Point:
    """One measured speedup on so many equal devices, with its quartiles and its bound."""

    devices: int
    median: float
    low: float
    high: float
    bound: float


@dataclass(frozen=True, slots=True)
class Bar:
    """One request's parts in seconds, in order; its label at the left, its whole at the right."""

    label: str
    parts: Mapping[str, float]
    whole: float


@dataclass(frozen=True, slots=True)
class Dot:
    """One row in the scatter, in seconds. ``link``: index of its series."""

    label: str
    predicted: float
    measured: float
    link: int


def _text(x: float, y: float, what: str, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(what)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _path(points: Iterable[tuple[float, float]], kind: str) -> str:
    steps = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    return f'<path d="{steps}" class="{kind}"/>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'style="max-width:{width:.0f}px">{"".join(parts)}</svg>'
    )


def speedups(title: str, series: Mapping[str, Sequence[Point]]) -> str:
    """Speedup against the number of devices; a line a link, its bound dashed, quartiles as bars."""
    width, height, left, right, top, bottom = 352, 268, 30, 50, 30, 32
    most = max(p.devices for points in series.values() for p in points)
    highest = max([most, *(p.high for points in series.values() for p in points)])
    wide, tall = width - left - right, height - top - bottom

    def at(devices: float, speedup: float) -> tuple[float, float]:
        x = left + wide * (devices - 1) / max(1, most - 1)
        return x, top + tall * (1 - speedup / (highest * 1.03))

    parts = [_text(left, 16, title, "title")]
    for n in range(0, math.floor(highest) + 1):
        _, y = at(1, n)
        parts += [
            _line(left, y, width - right, y, "grid"),
            _text(left - 6, y + 4, f"{n}", "tick", "end"),
        ]
    for n in sorted({p.devices for points in series.values() for p in points}):
        x, _ = at(n, 0)
        parts.append(_text(x, height - bottom + 16, f"{n}", "tick", "middle"))
    parts.append(_text(left + wide / 2, height - 2, "devices", "tick", "middle"))
    parts.append(_path([at(1, 1), at(most, most)], "ideal"))
    ends: list[float] = []
    for kind, points in zip(_LINK_CLASSES, series.values(), strict=False):
        ordered = sorted(points, key=lambda p: p.devices)
        parts.append(_path([at(p.devices, p.bound) for p in ordered], f"{kind} bound"))
        parts.append(_path([at(p.devices, p.median) for p in ordered], f"{kind} line"))
        for p in ordered:
            x, y = at(p.devices, p.median)
            parts.append(_line(x, at(1, p.low)[1], x, at(1, p.high)[1], f"{kind} whisker"))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="{kind} dot"/>')
        x, y = at(ordered[-1].devices, ordered[-1].median)
        y = _apart(y, ends)
        parts.append(_text(x + 8, y + 4, f"{ordered[-1].median:.2f}×", f"{kind} value"))
    return _svg(width, height, f"{title}: speedup against devices", parts)


def _apart(y: float, taken: list[float], least: float = 14) -> float:
    """Moved down until no label that is there already is nearer than ``least``."""
    for other in sorted(taken):
        if abs(y - other) < least:
            y = other + least
    taken.append(y)
    return y


def bars(rows: Sequence[Bar], kinds: Mapping[str, str]) -> str:
    """Each request as one bar of equal length, its parts as shares; the total at the right.

    ``kinds``: CSS class by part. Negative parts (the devices computed less than an even share) are
    not drawn; what is drawn is scaled to the whole bar.
    """
    width, left, right, tall, gap = 1060, 250, 84, 16, 8
    wide = width - left - right
    parts = []
    for i, row in enumerate(rows):
        y = i * (tall + gap)
        drawn = {name: max(0.0, value) for name, value in row.parts.items()}
        total = sum(drawn.values()) or 1.0
        parts.append(_text(left - 10, y + 12.5, row.label, "label", "end"))
        x = float(left)
        for name, value in drawn.items():
            long = wide * value / total
            tip = escape(f"{name}: {row.parts[name] * 1e3:.1f} ms, {value / total:.0%}")
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(0.0, long - 1):.1f}" height="{tall}" '
                f'class="{kinds.get(name, "p-named")}"><title>{tip}</title></rect>'
            )
            if long > 40:
                parts.append(_text(x + long / 2, y + 12, f"{value / total:.0%}", "inbar", "middle"))
            x += long
        parts.append(_text(width - right + 8, y + 12.5, duration(row.whole), "label"))
    return _svg(width, len(rows) * (tall + gap), "where the time goes", parts)


def scatter(dots: Sequence[Dot], links: Sequence[str]) -> str:
    """Predicted against measured latency, both logarithmic, with the band of 20 % either way."""
    width, height, left, right, top, bottom = 520, 420, 76, 24, 14, 46
    values = [v for d in dots for v in (d.predicted, d.measured) if v > 0]
    low, high = math.log10(min(values) / 1.3), math.log10(max(values) * 1.3)
    wide, tall = width - left - right, height - top - bottom

    def at(predicted: float, measured: float) -> tuple[float, float]:
        x = left + wide * (math.log10(predicted) - low) / (high - low)
        return x, top + tall * (1 - (math.log10(measured) - low) / (high - low))

    first, last = 10**low, 10**high
    corners = ((first, first * 1.2), (last / 1.2, last), (last, last), (last, last / 1.2))
    band = [at(p, m) for p, m in (*corners, (first * 1.2, first), (first, first))]
    parts = ['<path d="M' + " L".join(f"{x:.1f} {y:.1f}" for x, y in band) + 'Z" class="band"/>']
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5) if high - low > 1 else (1, 1.5, 2, 3, 4, 5, 6, 8):
            value = digit * 10**exponent
            if not first <= value <= last:
                continue
            x, y = at(value, value)
            parts += [
                _line(x, top, x, height - bottom, "grid"),
                _line(left, y, width - right, y, "grid"),
                _text(x, height - bottom + 16, duration(value), "tick", "middle"),
                _text(left - 8, y + 4, duration(value), "tick", "end"),
            ]
    parts.append(_path([at(first, first), at(last, last)], "ideal"))
    for d in dots:
        if d.predicted > 0 and d.measured > 0:
            x, y = at(d.predicted, d.measured)
            off = f"{d.label}: predicted {duration(d.predicted)}, measured {duration(d.measured)}"
            kind = _LINK_CLASSES[d.link % len(_LINK_CLASSES)]
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="{kind} dot">'
                f"<title>{escape(off)}</title></circle>"
            )
    parts.append(_text(left + wide / 2, height - 6, "predicted", "axis", "middle"))
    parts.append(
        f'<text x="14" y="{top + tall / 2:.1f}" class="axis" text-anchor="middle" '
        f'transform="rotate(-90 14 {top + tall / 2:.1f})">measured</text>'
    )
    return _svg(width, height, "predicted against measured latency", parts)


def duration(seconds: float) -> str:
    """For people: milliseconds below a second."""
    if seconds < 0.0095:
        return f"{seconds * 1e3:.2g} ms"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.3g} s"
