"""A plan as one SVG picture that explains itself: who computes which tile, and reads what beyond.

One panel a stage, tiles in the device's colour. Hatching in a device's colour is its halo: what it
reads of the stage's input beyond its own tile, at the scale of the output. Needs no other file.
"""

from __future__ import annotations

import base64
import colorsys
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape

from meshinfer.cost.model import field_work
from meshinfer.draw.scene import Panel, Tile, panels_of
from meshinfer.errors import InvalidInput
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan
from meshinfer.transfers import Flow, derive

# Okabe and Ito 2008, "Color Universal Design": told apart by colour-blind readers.
PALETTE = "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #F0E442 #8C8C8C".split()
WIDEST = {1: 520, 2: 400, 3: 340, 4: 272}
PANEL, GAP, MARGIN, COLUMNS = 216, 16, 28, 5
LEGEND_ROW, LEGEND_COLUMN = 22, 340
FOOTER = (
    "Tile: what a device computes. Hatching in its colour: the halo that it reads beyond its tile.",
    "Bar: bytes that reach each device from others, on one scale for all stages.",
)
INK, FAINT, LINE = "#1c2330", "#667085", "#d6dae1"


def draw(graph: Graph, plan: Plan, *, picture: bytes | None = None) -> str:
    """The plan as the text of an SVG file. ``picture``: a PNG or JPEG file, shown under the first
    stage's tiles. Raises ``InvalidInput`` for another kind of picture."""
    flow = derive(graph, plan)
    names = tuple(dict.fromkeys((plan.source, *plan.devices(), plan.sink)))
    colours = {d: _colour(i) for i, d in enumerate(sorted(names, key=_natural))}
    panels = panels_of(graph, flow)
    columns = max(1, min(COLUMNS, len(panels)))
    width_each = WIDEST.get(columns, PANEL)
    height_each = round(0.7 * width_each) + 132
    width = max(660, columns * width_each + (columns - 1) * GAP + 2 * MARGIN)
    legend_columns = max(1, (width - 2 * MARGIN) // LEGEND_COLUMN)
    top = 88 + LEGEND_ROW * -(-len(colours) // legend_columns) + 14
    rows = -(-len(panels) // columns)
    height = top + rows * (height_each + GAP) + 12 + 16 * len(FOOTER)
    largest = max((sum(p.moved.values()) for p in panels), default=0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="system-ui, \'DejaVu Sans\', sans-serif" '
        f'font-size="12" fill="{INK}">',
        f"<title>Plan {_text(plan.graph[:12])}: {_text(plan.mode)}</title>",
        *_patterns(colours),
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_header(graph, flow, len(names)),
        *_legend(graph, flow, colours, legend_columns),
    ]
    for i, panel in enumerate(panels):
        x = MARGIN + i % columns * (width_each + GAP)
        y = top + i // columns * (height_each + GAP)
        parts.append(f'<g transform="translate({x},{y})">')
        behind = picture if i == 0 else None
        parts.extend(_draw_panel(panel, colours, width_each, height_each, largest, behind))
        parts.append("</g>")
    for i, line in enumerate(FOOTER):
        y = top + rows * (height_each + GAP) + 10 + 16 * i
        parts.append(f'<text x="{MARGIN}" y="{y}" font-size="10.5" fill="{FAINT}">{line}</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts pi-2 before pi-10."""
    parts = re.split(r"([0-9]+)", name)
    return tuple((int(p), "") if i % 2 else (0, p) for i, p in enumerate(parts))


def _colour(i: int) -> str:
    """The i-th device's: the palette, then hues a golden angle apart."""
    if i < len(PALETTE):
        return PALETTE[i]
    hue = (i * 0.61803398875) % 1.0
    rgb = colorsys.hls_to_rgb(hue, 0.38 + 0.2 * (i % 3) / 2, 0.62)
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)


def _text(text: str, most: int = 10_000) -> str:
    """Escaped, without what XML forbids, shortened to so many characters."""
    clean = "".join(c if c.isprintable() and c not in "\ufffe\uffff" else "\ufffd" for c in text)
    return escape(clean if len(clean) <= most else clean[: most - 1] + "…")


def _bytes(n: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f} B"


def _patterns(colours: Mapping[DeviceId, str]) -> Iterator[str]:
    yield "<defs>"
    for i, colour in enumerate(colours.values()):
        yield (
            f'<pattern id="halo{i}" width="6" height="6" patternUnits="userSpaceOnUse">'
            f'<path d="M-1,1 l2,-2 M0,6 l6,-6 M5,7 l2,-2" stroke="{colour}" stroke-width="1.7"/>'
            "</pattern>"
        )
    yield "</defs>"


def _header(graph: Graph, flow: Flow, devices: int) -> Iterator[str]:
    plan = flow.plan
    moved = sum(flow.bytes_between(graph).values())
    yield (
        f'<text x="{MARGIN}" y="40" font-size="22" font-weight="600">'
        f"{_text(plan.mode.capitalize())}</text>"
    )
    facts = (
        f"model {plan.graph[:12]} · {_count(len(plan.stages), 'stage')} · "
        f"{_count(devices, 'device')} · {_bytes(moved)} between devices a request"
    )
    yield f'<text x="{MARGIN}" y="62" fill="{FAINT}">{_text(facts)}</text>'


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _legend(
    graph: Graph, flow: Flow, colours: Mapping[DeviceId, str], columns: int
) -> Iterator[str]:
    flops: Counter[DeviceId] = Counter()
    for ref, found in flow.fields.items():
        flops[flow.device(ref)] += int(field_work(graph, found).flops)
    total = sum(flops.values()) or 1
    sent: Counter[DeviceId] = Counter()
    for (sender, _), n in flow.bytes_between(graph).items():
        sent[sender] += n
    for i, (device, colour) in enumerate(colours.items()):
        x = MARGIN + i % columns * LEGEND_COLUMN
        y = 80 + i // columns * LEGEND_ROW
        ends = [
            n for n, d in (("source", flow.plan.source), ("sink", flow.plan.sink)) if d == device
        ]
        work = f"{100 * flops[device] / total:.0f}% of work" if flops[device] else "no work"
        facts = " · ".join((work, f"sends {_bytes(sent[device])}", *ends))
        yield (
            f'<g><title>{_text(device)}</title><rect x="{x}" y="{y}" width="14" height="14" rx="3" '
            f'fill="{colour}"/><text x="{x + 20}" y="{y + 11.5}"><tspan font-weight="600">'
            f'{_text(device, 16)}</tspan><tspan dx="6" font-size="10.5" fill="{FAINT}">'
            f"{_text(facts)}</tspan></text></g>"
        )


def _draw_panel(
    panel: Panel,
    colours: Mapping[DeviceId, str],
    width: int,
    height: int,
    largest: int,
    picture: bytes | None,
) -> Iterator[str]:
    most = width // 7
    yield f'<rect width="{width}" height="{height}" rx="8" fill="#fafbfc" stroke="{LINE}"/>'
    yield f'<text x="12" y="21" font-weight="600">{_text(panel.title, most)}</text>'
    yield (
        f'<text x="12" y="37" font-size="10.5" fill="{FAINT}">{_text(panel.ops, most + 4)}'
        f"<title>{_text(panel.ops)}</title></text>"
    )
    room_w, room_h = width - 24, height - 132
    w = min(room_w, room_h / panel.aspect)
    h = w * panel.aspect
    x, y = 12 + (room_w - w) / 2, 48 + (room_h - h) / 2
    if picture is not None:
        yield (
            f'<image x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" '
            f'preserveAspectRatio="none" href="{_data(picture)}"/>'
        )
    yield from _draw_tiles(panel, colours, (x, y, w, h), 0.42 if picture is not None else 0.62)
    base = height - 70
    again = f" + {100 * panel.again:.0f}% recomputed" if panel.again >= 0.005 else ""
    for i, line in enumerate(
        (
            f"{panel.how}",
            f"{panel.shape}",
            f"{100 * panel.share:.1f}% of FLOPs{again}",
        )
    ):
        yield f'<text x="12" y="{base + 13 * i}" font-size="10.5">{_text(line, most + 4)}</text>'
    yield from _draw_bytes(panel, colours, base + 36, width - 24, largest)


def _draw_tiles(
    panel: Panel,
    colours: Mapping[DeviceId, str],
    area: tuple[float, float, float, float],
    opacity: float,
) -> Iterator[str]:
    x, y, w, h = area
    order = list(colours)
    places = []
    for tile in panel.tiles:
        left, top, right, bottom = tile.own
        tx, ty, tw, th = x + left * w, y + top * h, (right - left) * w, (bottom - top) * h
        places.append((tile, tx, ty, tw, th))
        yield (
            f'<rect x="{tx:.1f}" y="{ty:.1f}" width="{tw:.1f}" height="{th:.1f}" '
            f'fill="{colours[tile.device]}" fill-opacity="{opacity}" stroke="#ffffff">'
            f"<title>{_text(tile.device)}: {tile.rows}</title></rect>"
        )
    for tile in panel.tiles:
        fill = f"url(#halo{order.index(tile.device)})"
        for left, top, right, bottom in _beyond(tile):
            yield (
                f'<rect x="{x + left * w:.1f}" y="{y + top * h:.1f}" '
                f'width="{(right - left) * w:.1f}" height="{(bottom - top) * h:.1f}" '
                f'fill="{fill}"><title>halo of {_text(tile.device)}</title></rect>'
            )
    for tile, tx, ty, tw, th in places:
        if th >= 14 and tw >= 6 * min(len(tile.device), 8) + 4:
            name = _text(tile.device, max(3, int((tw - 4) / 6.2)))
            cx, cy = tx + tw / 2, ty + th / 2 + 3.5
            wide = 6.2 * min(len(tile.device), max(3, int((tw - 4) / 6.2))) + 6
            yield (
                f'<rect x="{cx - wide / 2:.1f}" y="{cy - 9.5:.1f}" width="{wide:.1f}" '
                f'height="12.5" rx="3" fill="#ffffff" fill-opacity="0.78"/>'
                f'<text x="{cx:.1f}" y="{cy:.1f}" font-size="10" text-anchor="middle">{name}</text>'
            )


def _beyond(tile: Tile) -> Iterator[tuple[float, float, float, float]]:
    """The strips around a tile that its device reads; none where it reads all: nothing to see."""
    if tile.reads is None or tile.reads == (0.0, 0.0, 1.0, 1.0):
        return
    left, top, right, bottom = tile.own
    a, b, c, d = (
        min(tile.reads[0], left),
        min(tile.reads[1], top),
        max(tile.reads[2], right),
        max(tile.reads[3], bottom),
    )
    strips = ((a, b, c, top), (a, bottom, c, d), (a, top, left, bottom), (right, top, c, bottom))
    yield from (s for s in strips if s[2] - s[0] > 1e-9 and s[3] - s[1] > 1e-9)


def _draw_bytes(
    panel: Panel, colours: Mapping[DeviceId, str], y: float, width: int, largest: int
) -> Iterator[str]:
    """A bar of what moves in from other devices, by receiver, on one scale for all stages."""
    total = sum(panel.moved.values())
    yield (f'<rect x="12" y="{y - 2:.1f}" width="{width}" height="7" rx="2" fill="#eceef2"/>')
    x = 12.0
    for device, n in panel.moved.items():
        w = width * n / largest if largest else 0.0
        yield (
            f'<rect x="{x:.1f}" y="{y - 2:.1f}" width="{w:.1f}" height="7" '
            f'fill="{colours[device]}">'
            f"<title>{_text(device)} receives {_bytes(n)}</title></rect>"
        )
        x += w
    words = f"{_bytes(total)} moved in" if total else "nothing moves in"
    yield f'<text x="12" y="{y + 18:.1f}" font-size="10.5" fill="{FAINT}">{words}</text>'


def _data(picture: bytes) -> str:
    if picture.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "png"
    elif picture.startswith(b"\xff\xd8\xff"):
        kind = "jpeg"
    else:
        raise InvalidInput("the picture is neither PNG nor JPEG", hint="save it as one of these")
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"
