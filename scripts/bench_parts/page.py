"""One self-contained HTML page of a benchmark's results: no scripts, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench_parts.chart import Bar, Dot, Point, bars, duration, scatter, speedups
from bench_parts.figures import BOUND_TEXT, Verdict, judge

_STATES = {
    "aim": ("ok", "✓ aim reached"),
    "met": ("ok", "✓ reached"),
    "missed": ("bad", "✗ missed"),
    "not measured": ("none", "– not in this run"),
}
PART_KINDS = {
    "even share": "p-even",
    "overhead": "p-over",
    "unevenness": "p-uneven",
    "waited": "p-waited",
    "queued": "p-queued",
    "handed": "p-handed",
    "rest": "p-rest",
    "queue": "p-queue",
    "client": "p-client",
}
_PART_TEXTS = {
    "even share": "plain onnxruntime's work, divided evenly",
    "overhead": "computed beyond that: overlap, kernels of other sizes",
    "unevenness": "the busiest device beyond the average",
    "waited": "the busiest device had nothing to do until a piece came",
    "queued": "a task waited for its turn",
    "handed": "to the compute thread and back",
    "named": "other times that tasks tell of",
    "rest": "sending and merging, Python",
    "queue": "before the first task started",
    "client": "client to coordinator and back",
}
LOWER_BOUND = (
    "The devices are emulated, and these figures are a lower bound of what boards of this ratio "
    "would reach: a quota is kept by sleeping (at a quarter of a core a device runs 1 ms and "
    "sleeps 3 ms), so that an exchange that falls into a sleep waits for its end. Real boards do "
    "not sleep."
)

BESIDE_TEXT = (
    "Boards share nothing; devices of a lab share caches, memory and what a core has in common "
    "with others. Plain onnxruntime ran whole models on as many devices at once, in rounds with "
    "one alone. The speedup beside is against one that is disturbed as much. The figures to reach "
    "are held against the other, first one."
)


def page(results: Mapping[str, Any]) -> str:
    """The HTML of ``bench.json``'s content."""
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    about = results["about"]
    body = [
        "<header><h1>MeshInfer: benchmark</h1>",
        f'<p class="lead">{escape(_lead(rows))}</p>',
        f'<p class="meta">{_about(about)}</p></header>',
        _failed(results.get("failed", ()), rows),
        _goals(judge(rows)),
        _speedups(rows),
        _breakdown(rows),
        _predicted(rows),
        _memory(rows),
        _beside(rows),
        _all_rows(rows),
        _how(about),
    ]
    style = (Path(__file__).resolve().parent / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>MeshInfer: benchmark</title>'
        f"<style>{style}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _failed(failed: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """What could not be measured, and what counts for no figure."""
    said = [f"{row['name']}: {row['failed']}" for row in failed]
    said += [f"{row['name']}: doubtful: {row['doubt']}" for row in rows if row.get("doubt")]
    if shares := [row["plain_share"] for row in rows if row.get("plain_busy")]:
        said.append(f"The machine was busy: plain onnxruntime got {min(shares):.0%} of its share.")
    if not said:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in said)
    return f'<section><h2>Not measured, or doubtful</h2><ul class="bad">{lines}</ul></section>'


def link_name(bits_per_s: float) -> str:
    """1 Gbit/s, 100 Mbit/s."""
    if bits_per_s >= 1e9:
        return f"{bits_per_s / 1e9:g} Gbit/s"
    return f"{bits_per_s / 1e6:g} Mbit/s"


def _lead(rows: Sequence[Mapping[str, Any]]) -> str:
    asked = sum(row["answers"] for row in rows)
    wrong = sum(row["wrong"] for row in rows)
    exact = "every one the oracle's" if not wrong else f"{wrong} of them wrong"
    return (
        f"Speedup over plain onnxruntime on one of the same devices, for one picture at a time; "
        f"all answers in this run ({asked}) were compared with it, {exact}."
    )


def _about(about: Mapping[str, Any]) -> str:
    said = [f"{about['date']}", f"commit {about['commit']}", about["machine"]]
    return " · ".join(escape(s) for s in said) + f"<br><code>{escape(about['command'])}</code>"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in lines)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _goals(verdicts: Sequence[Verdict]) -> str:
    lines = []
    for v in verdicts:
        kind, word = _STATES[v.state]
        goal = v.goal

        def said(value: float | None, unit: str = goal.unit) -> str:
            if value is None:
                return "–"
            if not unit:
                return f"{value:.0%}"
            return f"{value:.2f} {unit}" if unit != "×" else f"{value:.2f}×"

        sign = "≤ " if goal.most else ""
        bound_is_aim = goal.aim is None and goal.figure == "speedup"
        lines.append(
            (
                escape(goal.what),
                sign + said(goal.least),
                "the bound" if bound_is_aim else sign + said(goal.aim) if goal.aim else "–",
                f"<b>{said(v.measured)}</b>",
                said(v.bound) if goal.figure == "speedup" else "–",
                f'<span class="{kind}">{word}</span>',
                escape(v.row),
            )
        )
    head = ("figure to reach", "at least", "aim", "measured", "bound", "", "row that decides")
    return f"<section><h2>Figures to reach</h2>{_table(head, lines, 'goals')}</section>"


def _equal(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of one picture at a time, encrypted, on equal devices."""
    return [
        r
        for r in rows
        if r["objective"] == "latency" and not r["plaintext"] and r["devices"].isdecimal()
    ]


def _speedups(rows: Sequence[Mapping[str, Any]]) -> str:
    equal = _equal(rows)
    links = sorted({r["link_bits_per_s"] for r in equal}, reverse=True)
    drawings = []
    for title in dict.fromkeys(r["title"] for r in equal):
        series = {}
        for link in links:
            series[link_name(link)] = [
                Point(
                    int(r["devices"]),
                    r["speedup"]["median"],
                    r["speedup"]["low"],
                    r["speedup"]["high"],
                    r["bound_speedup"],
                )
                for r in equal
                if r["title"] == title and r["link_bits_per_s"] == link
            ]
        found = {name: points for name, points in series.items() if points}
        if len({p.devices for points in found.values() for p in points}) > 1:
            drawings.append(f"<figure>{speedups(title, found)}</figure>")
    if not drawings:
        return ""
    legend = "".join(
        f'<span class="key s{i}"><i></i>{escape(link_name(link))}</span>'
        for i, link in enumerate(links)
    )
    legend += '<span class="key dashed"><i></i>its bound</span>'
    legend += '<span class="key thin"><i></i>ideal, N×</span>'
    return (
        f'<section><h2>Speedup against devices</h2><p class="legend">{legend}</p>'
        f'<div class="charts">{"".join(drawings)}</div>'
        "<p>Median of the ratios of each round; bars from quartile to quartile.</p></section>"
    )


def _breakdown(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [r for r in rows if r["objective"] == "latency" and r.get("breakdown")]
    if not shown:
        return ""
    found = {name for r in shown for name in r["breakdown"]}
    kinds = {name: kind for name, kind in PART_KINDS.items() if name in found}
    if found - PART_KINDS.keys():
        kinds["named"] = "p-named"
    keys = "".join(
        f'<span class="key {kind}"><i></i>{escape(name)}: {escape(_PART_TEXTS[name])}</span>'
        for name, kind in kinds.items()
    )
    drawn = bars([Bar(r["short"], r["breakdown"], r["latency_s"]["median"]) for r in shown], kinds)
    return (
        f'<section><h2>Where the time of one request goes</h2><p class="legend">{keys}</p>'
        f'<div class="scroll">{drawn}</div></section>'
    )


def _predicted(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [r for r in rows if r["predicted_off"] is not None]
    if not shown:
        return ""
    links = sorted({r["link_bits_per_s"] for r in shown}, reverse=True)
    dots = [
        Dot(
            r["short"],
            r["predicted_s"],
            r["predicted_against_s"],
            links.index(r["link_bits_per_s"]),
        )
        for r in shown
    ]
    worst = sorted(shown, key=lambda r: -r["predicted_off"])[:12]
    lines = [
        (
            escape(r["short"]),
            duration(r["predicted_s"]),
            duration(r["predicted_against_s"]),
            f"{r['predicted_s'] / r['predicted_against_s'] - 1:+.0%}",
            escape(r["predicted_bound"]),
        )
        for r in worst
    ]
    head = ("farthest off", "predicted", "measured", "", "expected to be bound by")
    return (
        "<section><h2>Predicted against measured</h2><p>The coloured band is within 20 %.</p>"
        f'<div class="pair"><figure>{scatter(dots, [link_name(x) for x in links])}</figure>'
        f"{_table(head, lines)}</div></section>"
    )


def _memory(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for r in rows:
        memory = r.get("memory")
        if not memory:
            continue
        above = [max(d["install"], d["serving"]) for d in memory["devices"]]
        lines.append(
            (
                escape(r["short"]),
                _mb(memory["plain"]["peak"] - memory["plain"]["idle"]),
                _mb(max(above)),
                f"<b>{r['memory_share']:.2f}</b>",
                _mb(max(d["serving"] for d in memory["devices"])),
                _mb(max(d["idle"] for d in memory["devices"])),
                _mb(memory["plain"]["idle"]),
                _mb(memory["weights_most"]) if memory.get("weights_most") is not None else "–",
            )
        )
    if not lines:
        return ""
    head = (
        "",
        "plain, above idle",
        "fullest worker, above idle",
        "share",
        "of it while serving",
        "an idle worker",
        "plain, idle",
        "its weights (expected)",
    )
    return (
        "<section><h2>Peak memory</h2><p>Resident memory of the processes (VmHWM). Idle: a worker "
        "that has joined; plain onnxruntime before its session. The coordinator and the client, on "
        "device 0 only, are not in it. Only rows whose cluster had deployed nothing before.</p>"
        f"{_table(head, lines)}</section>"
    )


def _beside(rows: Sequence[Mapping[str, Any]]) -> str:
    """The second figure of a row: against a device that is as disturbed as those of the cluster."""
    lines = [
        (
            escape(r["short"]),
            f"{r['beside']['median']:.2f} "
            f"<small>{r['beside']['low']:.2f}–{r['beside']['high']:.2f}</small>",
            f"{r['speedup']['median']:.2f}×",
            f"<b>{r['speedup_beside']:.2f}×</b>",
            f"{r['bound_speedup']:.2f}×",
        )
        for r in rows
        if r.get("beside")
    ]
    if not lines:
        return ""
    head = ("", "plain on all at once, of its speed alone", "speedup", "speedup beside", "bound")
    return (
        f"<section><h2>What the emulation takes</h2><p>{escape(BESIDE_TEXT)}</p>"
        f"{_table(head, lines)}</section>"
    )


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def _all_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for r in rows:
        s, t, b = r["speedup"], r["latency_s"], r["baseline_s"]
        lines.append(
            (
                escape(r["short"]),
                f"{duration(b['median'])}",
                f"{duration(t['median'])} "
                f"<small>{duration(t['low'])}–{duration(t['high'])}</small>",
                f"<b>{s['median']:.2f}×</b> <small>{s['low']:.2f}–{s['high']:.2f}</small>",
                f"{r['bound_speedup']:.2f}×",
                f"{r['efficiency']:.0%}",
                f"{r['payload_mb']:.2f} <small>/ {r['wire_mb']:.2f}</small>",
                " ".join(f"{c * 1e3:.0f}" for c in r["cpu_s"])
                + f" <small>{r['cpu_even_s'] * 1e3:.0f}</small>",
                f"{r['used']} in {r['stages']}"
                + (f", {r['plans_seen']} plans" if r["plans_seen"] > 1 else ""),
                str(s["count"]),
                "bits" if r["identical"] else "✓" if not r["wrong"] else f"{r['wrong']} wrong",
            )
        )
    head = (
        "",
        "plain",
        "latency, or a frame",
        "speedup",
        "bound",
        "efficiency",
        "MB a frame that tasks sent / all on the wire",
        "CPU ms a frame by device, even share",
        "devices, stages",
        "rounds",
        "exact",
    )
    return f"<section><h2>All rows</h2>{_table(head, lines, 'all')}</section>"


def _how(about: Mapping[str, Any]) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in about["notes"])
    return (
        f"<section><h2>How this was measured</h2><p>{escape(LOWER_BOUND)}</p><ul>{notes}</ul>"
        f"<p>The bound: {escape(BOUND_TEXT)}</p></section>"
    )
