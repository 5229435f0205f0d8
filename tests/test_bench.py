"""scripts/bench: its arithmetic by other means, its processes on real models, its page."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnxruntime as ort
import oracle
import pytest
from bench_parts import figures, shapes
from bench_parts.answers import Answers, Wrong
from bench_parts.child import Broken, Peer
from bench_parts.fits import fits, holds
from bench_parts.measure import Effort, Job, Rigs, measure
from bench_parts.models import YOLO_LAYERS, Model, make, pictures, yolo
from bench_parts.page import page
from bench_parts.rig import OutOfTime, Patience, Setup, shared
from hypothesis import given
from hypothesis import strategies as st

import meshinfer as mi
from meshinfer.cost import DeviceProfile
from meshinfer.identity import DeviceId

ROOT = Path(__file__).resolve().parent.parent
PARTS = ROOT / "scripts" / "bench_parts"


# --------------------------------------------------------------------------------- figures


def test_on_equal_devices_and_a_fast_link_the_bound_is_an_even_share() -> None:
    assert figures.bound_s(1.2, [0.25] * 6, 0.25, 1e18, 10**6, 10**6) == pytest.approx(0.2)
    assert figures.bound_s(1.2, [0.25], 0.25, 1.0, 10**9, 10**9) == pytest.approx(1.2)
    mixed = figures.bound_s(1.0, [0.25, 0.25, 0.125, 0.0625], 0.25, 1e18, 1, 1)
    assert mixed == pytest.approx(1 / 2.75)


@given(
    cores=st.lists(st.floats(0.05, 2), min_size=1, max_size=5),
    link=st.floats(1e5, 1e9),
    sizes=st.tuples(st.integers(1, 10**7), st.integers(1, 10**7)),
)
def test_the_bound_is_the_best_division_of_the_work(
    cores: list[float], link: float, sizes: tuple[int, int]
) -> None:
    """Bisection over T: do the shares that the devices and links manage in T reach the whole?"""
    alone_s, reference = 2.0, 0.25
    work = alone_s * reference

    def is_enough(t: float) -> bool:
        others = sum(min(c * t / work, *(link * t / n for n in sizes)) for c in cores[1:])
        return cores[0] * t / work + min(others, *(link * t / n for n in sizes)) >= 1

    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    found = figures.bound_s(alone_s, cores, reference, link, *sizes)
    assert found == pytest.approx(high, rel=1e-6)


def streamed(frames: int, devices: int, slow: dict[int, float]) -> tuple[list[float], list[float]]:
    """When each frame is done, whole frames on whoever is free first, a second of work each and
    ``slow`` ones more; and when a map that keeps their order hands them out."""
    free = [0.0] * devices
    done = []
    for i in range(frames):
        device = min(range(devices), key=lambda d: (free[d], d))
        free[device] += slow.get(i, 1.0)
        done.append(free[device])
    return done, [max(done[: i + 1]) for i in range(frames)]


@given(
    devices=st.integers(1, 6),
    slow=st.dictionaries(st.integers(0, 80), st.floats(1.0, 3.0), max_size=4),
    frames=st.integers(6, 36),
)
def test_the_rate_of_a_stream_is_what_the_devices_can_do(
    devices: int, slow: dict[int, float], frames: int
) -> None:
    done, handed_out = streamed(3 * devices + frames + devices, devices, slow)
    found = figures.frame_s(done, frames, devices)
    assert found >= (1 - 1e-9) * (frames - devices) / frames / devices
    assert found == figures.frame_s(done[::-1], frames, devices), "in whatever order"
    if not slow:
        assert found == pytest.approx(1 / devices)
    assert figures.frame_s(handed_out, frames, 1) >= 0


def test_frames_that_waited_behind_a_slow_one_are_not_counted_as_its_moments_work() -> None:
    """The bench once told 8.18 × of 6: it timed what map hands out, which is in order."""
    done, handed_out = streamed(48, 6, {11: 2.6})
    span = (handed_out[23] - handed_out[11]) / 12
    assert 1 / span > 8, "12 frames in the time of 9"
    assert 5 < 1 / figures.frame_s(done, 18, 6) <= 6
    with pytest.raises(ValueError, match="too few"):
        figures.frame_s(done[:20], 18, 6)


def test_a_figure_that_cannot_be_true_is_doubted() -> None:
    measured = {"cpu_s": 1.4, "had_s": 1.5}
    assert figures.doubt(5.9, 6.0, **measured) == ""
    assert figures.doubt(6.2, 6.0, **measured) == "", "noise"
    assert "8.18 × is more than the bound" in figures.doubt(8.18, 6.0, **measured)
    assert "no quota held them" in figures.doubt(5.0, 6.0, cpu_s=3.0, had_s=1.5)
    frame = {"frame_cpu_s": 0.372, "frame_had_s": 1.5 * 0.2166}  # as a run of 2026-11-25 told
    assert "a frame takes 372 ms of CPU" in figures.doubt(6.18, 6.0, **measured, **frame)
    assert figures.doubt(5.4, 6.0, **measured, frame_cpu_s=0.372, frame_had_s=0.373) == ""


def test_a_spread_lies_within_what_was_measured() -> None:
    found = figures.spread([4.0, 1.0, 3.0, 2.0, 100.0])
    assert (found.low, found.median, found.high, found.count) == (2.0, 3.0, 4.0, 5)
    assert figures.spread([7.0]) == figures.Spread(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="no measurements"):
        figures.spread([])


def test_the_parts_of_a_request_add_up_to_its_time() -> None:
    timing = {
        "total_s": 0.9,
        "queue_s": 0.05,
        "tasks": [
            {"device": "a", "compute_s": 0.3, "wait_s": 0.1, "sent_bytes": 5},
            {"device": "a", "compute_s": 0.2, "wait_s": 0.05, "sent_bytes": 5},
            {"device": "b", "compute_s": 0.3, "wait_s": 0.4, "sent_bytes": 5},
        ],
    }
    found = figures.breakdown(1.0, timing, {"a": 0.25, "b": 0.25}, 0.7, 0.25).parts()
    assert sum(found.values()) == pytest.approx(1.0)
    assert found == pytest.approx(
        {
            "even share": 0.35,
            "overhead": 0.05,
            "unevenness": 0.1,
            "wait": 0.15,  # the busiest device's
            "rest": 0.2,
            "queue": 0.05,
            "client": 0.1,
        }
    )


def row(**changes: Any) -> dict[str, Any]:
    """A measured row as bench.json has it."""
    speed = changes.pop("speedup", 4.7)
    found = {
        "name": "VGG-16 · 6",
        "short": "VGG-16 · 6",
        "title": "VGG-16 & <more>",
        "model": "vgg16",
        "devices": "6",
        "link_bits_per_s": 1e9,
        "plaintext": False,
        "objective": "latency",
        "speedup": {"median": speed, "low": speed - 0.1, "high": speed + 0.1, "count": 3},
        "latency_s": {"median": 0.25, "low": 0.24, "high": 0.26, "count": 3},
        "baseline_s": {"median": 1.2, "low": 1.1, "high": 1.3, "count": 3},
        "bound_speedup": 6.0,
        "efficiency": speed / 6,
        "predicted_s": 0.24,
        "predicted_off": 0.04,
        "predicted_against_s": 0.25,
        "predicted_bound": "compute of pi-0",
        "breakdown": {"even share": 0.2, "rest": 0.04, "wait": 0.01},
        "payload_mb": 3.0,
        "wire_mb": 3.5,
        "cpu_s": [0.07] * 6,
        "cpu_even_s": 0.05,
        "used": 6,
        "stages": 8,
        "plans_seen": 1,
        "answers": 5,
        "wrong": 0,
        "identical": True,
        "memory": None,
        "memory_share": None,
        "worker_ratio": None,
    }
    return {**found, **changes}


def verdicts(*rows: dict[str, Any]) -> dict[str, figures.Verdict]:
    return {v.goal.what: v for v in figures.judge(rows)}


def test_a_figure_is_reached_missed_or_not_measured() -> None:
    what = "VGG-16, 6 devices, 1 Gbit/s"
    assert verdicts()[what].state == "not measured"
    assert verdicts(row())[what].state == "met"
    assert verdicts(row(speedup=5.5))[what].state == "aim"
    assert verdicts(row(speedup=4.5))[what].state == "missed"
    assert verdicts(row(speedup=9.9, plaintext=True))[what].state == "not measured"
    assert verdicts(row(link_bits_per_s=1e8))[what].state == "not measured"
    assert verdicts(row(doubt="it cannot be"))[what].state == "not measured"


def test_the_worst_row_decides_a_figure_of_many_rows() -> None:
    good, bad = row(predicted_off=0.05), row(name="bad", predicted_off=0.3)
    found = verdicts(good, bad)["predicted against measured"]
    assert (found.state, found.measured, found.row) == ("missed", 0.3, "bad")
    small = [row(model="mobilenet_v2", devices=d, speedup=s) for d, s in (("2", 1.3), ("4", 0.9))]
    found = verdicts(*small)["MobileNetV2, any number, any link"]
    assert (found.state, found.measured) == ("missed", 0.9)


def test_an_aim_that_is_the_bound_is_the_rows_own() -> None:
    slow = row(model="yolo608", link_bits_per_s=1e8, speedup=2.5, bound_speedup=3.0)
    found = verdicts(slow)["YOLOv2-16 608², 6, 100 Mbit/s"]
    assert (found.state, found.bound) == ("met", 3.0)


# --------------------------------------------------------------------------------- clusters


def test_setups_share_the_fewest_devices() -> None:
    one, six, mixed = (
        Setup(name, cores, 1e9)
        for name, cores in (("1", (0.25,)), ("6", (0.25,) * 6), ("m", (0.25, 0.25, 0.125, 0.0625)))
    )
    cores, members = shared([six, one, mixed])
    assert cores == [0.25] * 6 + [0.125, 0.0625]
    assert members == {six: (0, 1, 2, 3, 4, 5), one: (0,), mixed: (0, 1, 6, 7)}
    for setup, chosen in members.items():
        assert tuple(cores[i] for i in chosen) == setup.cores


def test_nothing_waits_longer_than_the_whole_run_may_take() -> None:
    patience = Patience(60.0, 75.0, 30.0, total_s=5.0)
    assert max(patience.start_s, patience.deploy_s, patience.answer_s) < 15
    assert Patience(60.0, 75.0, 30.0).deploy_s == 75.0
    with pytest.raises(OutOfTime):
        _ = Patience(60.0, 75.0, 30.0, total_s=0.0).answer_s


# --------------------------------------------------------------------------------- shapes


def board_and_server(mbit: float) -> list[DeviceProfile]:
    """1/4 core, the head beside it, and a server of 1 core."""
    near = DeviceProfile(DeviceId("pi-0"), 12e9, bandwidth_bytes_per_s=1e9, host="near")
    far = DeviceProfile(DeviceId("pi-1"), 48e9, bandwidth_bytes_per_s=mbit * 125e3, host="far")
    return [near, far, replace(near, id=DeviceId("head"), computes=False)]


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_each_of_the_five_shapes_is_forced_by_a_plan_that_is_exact(objective: str) -> None:
    model = yolo(96)
    graph, x = mi.load(model), np.random.default_rng(0).random((1, 3, 96, 96), np.float32)
    found = shapes.force(graph, board_and_server(20), objective)
    five = ["on-device", "offload", "split", "tiling", "pipeline"]
    assert [each.shape for each in found] == five[: 4 if objective == "latency" else 5]
    for each in found:
        answer = mi.run_plan(graph, each.plan, {"image": x})  # it validates the plan, too
        oracle.assert_exact(model, {"image": x}, answer)
        assert shapes.shape_of(each.plan) == each.shape
        assert each.expected_s > 0


# --------------------------------------------------------------------------------- models


def test_yolo_is_darknets_first_sixteen_layers() -> None:
    assert len(YOLO_LAYERS) == 16
    model = yolo(96)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"image": np.zeros((1, 3, 96, 96), np.float32)})
    assert answer.shape == (1, 256, 6, 6)
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("Conv"), kinds.count("LeakyRelu"), kinds.count("MaxPool")) == (12, 12, 4)
    assert yolo(96).SerializeToString() == model.SerializeToString(), "the seed gives the weights"


def test_yolos_values_neither_vanish_nor_explode() -> None:
    session = ort.InferenceSession(yolo(96).SerializeToString(), providers=["CPUExecutionProvider"])
    picture = pictures(96, 96)[0].astype(np.float32).transpose(2, 0, 1)[np.newaxis] / 255
    (answer,) = session.run(None, {"image": np.ascontiguousarray(picture)})
    assert 0.01 < float(answer.std()) < 100


def test_pictures_differ_and_have_the_size_asked_for() -> None:
    first, second = pictures(64, 48)
    assert first.shape == second.shape == (48, 64, 3)
    assert not np.array_equal(first, second)


# --------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, list[Path]]:
    """MobileNetV2 with its two pictures as files."""
    folder = tmp_path_factory.mktemp("bench")
    model = make("mobilenet_v2", folder)
    files = []
    for i, request in enumerate(model.requests):
        files.append(folder / f"{i}.npz")
        np.savez(files[-1], **dict(request.feeds))
    return model, files


def start(script: str, options: dict[str, Any], folder: Path) -> Peer:
    """One of the measured processes, here instead of in a lab."""
    log = folder / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, str(PARTS / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    return Peer(process, log, script)


def test_the_baseline_runs_so_many_times(small: tuple[Model, list[Path]], tmp_path: Path) -> None:
    model, files = small
    options = {"model": str(model.path), "inputs": [str(f) for f in files], "threads": 1}
    with start("plain.py", options, tmp_path) as peer:
        assert peer.hear(60) == "ready"
        found = peer.ask({"run": 3}, 60)
    assert len(found["wall_s"]) == len(found["cpu_s"]) == 3
    assert all(s > 0 for s in found["wall_s"])
    assert found["peak"] - found["idle"] > 10e6, "MobileNetV2 has 14 MB of weights"


def test_the_client_keeps_every_answer_and_they_are_the_oracles(
    small: tuple[Model, list[Path]], tmp_path: Path
) -> None:
    model, files = small
    with mi.LocalCluster(2) as cluster:
        place = {
            "address": cluster.address,
            "keyring": str(cluster.keyring),
            "cluster": cluster.cluster,
        }
        with start("session.py", {"folder": str(tmp_path)}, tmp_path) as peer:
            assert peer.hear(60) == "ready"
            peer.ask({"do": "connect", **place}, 60)
            assert peer.ask({"do": "settle", "timeout_s": 20}, 60) >= 0
            assert peer.ask({"do": "load", "inputs": [str(f) for f in files]}, 60) == 2
            deploy = {"name": "m", "path": str(model.path), "objective": "latency"}
            made = peer.ask({"do": "deploy", **deploy, "timeout_s": 60}, 90)
            assert made["expected_s"] > 0
            assert mi.Plan.parse(made["plan"]).devices()
            told = peer.ask({"do": "infer", "name": "m", "which": [0, 1], "deadline_s": 60}, 90)
            sizes = {"frames": 4, "around": 2, "in_flight": 2}
            plans = peer.ask({"do": "plans"}, 60)
            found = peer.ask({"do": "stream", "name": "m", **sizes, "deadline_s": 60}, 90)
    assert plans == {told[0]["plan"]: made["plan"]}
    assert found["frames"] == len(found["results"]) == 10
    assert found["frame_s"] > 0
    for result in (*told, *found["results"]):
        feeds = model.requests[result["request"]].feeds
        oracle.assert_exact(model.path, feeds, dict(np.load(tmp_path / result["answer"])))
        assert result["timing"]["tasks"][0]["compute_s"] > 0
    assert len({result["answer"] for result in told}) == 2


def test_an_answer_that_is_not_the_oracles_ends_the_run(
    small: tuple[Model, list[Path]], tmp_path: Path
) -> None:
    model, _ = small
    answers = Answers(model)
    truth = oracle.reference(model.path, model.requests[1].feeds)
    np.savez(tmp_path / "right.npz", **truth)
    np.savez(tmp_path / "wrong.npz", **{name: a * 1.001 for name, a in truth.items()})
    assert answers.check(tmp_path, [{"answer": "right.npz", "request": 1}])
    with pytest.raises(Wrong, match="MobileNetV2"):
        answers.check(tmp_path, [{"answer": "wrong.npz", "request": 1}])
    with pytest.raises(Wrong):  # the answer to another picture
        answers.check(tmp_path, [{"answer": "right.npz", "request": 0}])


def test_what_breaks_in_a_measured_process_is_told(tmp_path: Path) -> None:
    options = {"model": "/nowhere.onnx", "inputs": [], "threads": 1}
    with start("plain.py", options, tmp_path) as peer:
        with pytest.raises(Broken, match=r"(?s)plain.py has ended.*nowhere.onnx"):
            peer.hear(60)


def test_an_unknown_command_is_answered_with_its_error(
    small: tuple[Model, list[Path]], tmp_path: Path
) -> None:
    model, files = small
    options = {"model": str(model.path), "inputs": [str(files[0])], "threads": 1}
    with start("plain.py", options, tmp_path) as peer:
        assert peer.hear(60) == "ready"
        with pytest.raises(Broken, match="KeyError: 'run'"):
            peer.ask({"walk": 3}, 60)
        assert len(peer.ask({"run": 1}, 60)["wall_s"]) == 1, "it goes on"


# --------------------------------------------------------------------------------- the page


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    about = {
        "date": "2026-11-24",
        "commit": "abc",
        "machine": "a <machine> & more",
        "command": "scripts/bench",
        "notes": ["a note"],
    }
    return {"about": about, "rows": list(rows), "error": ""}


def test_the_page_needs_nothing_from_elsewhere_and_has_two_colour_schemes() -> None:
    text = page(results(row(), row(devices="2", speedup=1.9)))
    assert "prefers-color-scheme: dark" in text
    for word in ("<script", "http:", "https:", "<link", "<img", "@import", "url("):
        assert word not in text, word
    assert "a &lt;machine&gt; &amp; more" in text


def test_the_pages_drawings_are_well_formed_and_say_what_was_measured() -> None:
    text = page(results(row(), row(devices="2", speedup=1.93), row(devices="1", speedup=0.99)))
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 3  # speedups, bars, scatter
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert "4.70×" in drawings[0]
    assert "VGG-16 &amp; &lt;more&gt;" in drawings[0]


def test_the_page_says_what_failed_and_what_cannot_be_true() -> None:
    told = {
        **results(row(doubt="<9 of 6>")),
        "failed": [{"name": "VGG & 4", "failed": "Broken: x"}],
    }
    text = page(told)
    assert "VGG &amp; 4: Broken: x" in text
    assert "doubtful: &lt;9 of 6&gt;" in text
    assert "doubtful" not in page(results(row()))


def test_a_page_of_no_rows_is_a_page() -> None:
    assert "not in this run" in page(results())


# --------------------------------------------------------------------------------- the command


def bench(*words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench"), *words],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--models", "vgg99"), "vgg99: models are vgg16"),
        (("--links", "10g"), "10g: links are 1g, 100m"),
        (("--devices", "0"), "'0' is neither mixed nor a number"),
        (("--rounds", "0"), "not within 1 and 1000"),
        (("--shapes", "--mbit", "5,0"), "0 is not within 0.1 and 10000"),
        (("--memory", "--limit-mb", "8"), "8 is not within 64"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_starts(
    words: tuple[str, ...], said: str
) -> None:
    done = bench(*words)
    assert done.returncode == 2
    assert said in done.stderr


def test_the_page_can_be_written_again_from_what_was_measured(tmp_path: Path) -> None:
    measured, html = tmp_path / "bench.json", tmp_path / "bench.html"
    measured.write_text(json.dumps(results(row())))
    assert bench("--page", str(measured), "--html", str(html)).returncode == 0
    assert html.read_text() == page(results(row()))


def test_without_root_it_says_so_and_ends(tmp_path: Path) -> None:
    """In a user namespace of its own root is nobody, too."""
    leave = ["unshare", "--user"] if os.geteuid() == 0 else []
    if leave and subprocess.run([*leave, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    done = subprocess.run(
        [*leave, sys.executable, str(ROOT / "scripts" / "bench"), "--json", tmp_path / "no.json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78
    assert "needs root" in done.stderr
    assert "hint: run it with sudo" in done.stderr
    assert not (tmp_path / "no.json").exists()


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_run_in_the_lab_writes_exact_rows(tmp_path: Path) -> None:
    files = {kind: tmp_path / f"bench.{kind}" for kind in ("json", "html")}
    words = "--models mobilenet_v2 --links 1g --devices 1,2 --rounds 1 --stream-rounds 1 --frames 2"
    outputs = [w for kind, path in files.items() for w in (f"--{kind}", str(path))]
    done = bench(*words.split(), "--no-plaintext", *outputs, timeout_s=500)
    assert done.returncode == 0, done.stderr
    rows = json.loads(files["json"].read_text())["rows"]
    assert [(r["devices"], r["objective"]) for r in rows] == [
        ("1", "latency"),
        ("2", "latency"),
        ("2", "throughput"),
    ]
    assert all(r["answers"] > 0 and not r["wrong"] for r in rows)
    assert [bool(r["beside"]) for r in rows] == [False, True, True]
    assert all(0.2 < r["beside"]["median"] < 2.0 for r in rows[1:])
    assert all(text in files["html"].read_text() for text in ("MobileNetV2", "speedup beside"))


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cluster_that_hangs_costs_its_own_rows_only(tmp_path: Path) -> None:
    two = Setup("2", (0.5, 0.5), 1e9)
    effort = Effort(rounds=1, stream_rounds=1, frames=2, tries=1)
    patience = Patience(start_s=60, deploy_s=20, answer_s=20)
    rigs = Rigs(tmp_path, 0.5, 2.0, effort, patience, share=[two])
    try:
        ((rig, _),) = rigs.get([two])
        os.kill(rig.cluster.coordinator_pid, signal.SIGSTOP)
        (lost,) = measure(Job("mobilenet_v2", (two,)), rigs, effort)
        assert "in time" in lost["failed"] or "silent" in lost["failed"], lost
        (found,) = measure(Job("mobilenet_v2", (two,)), rigs, effort)
        assert found["answers"] > 0 and found["speedup"]["count"] == 1
    finally:
        rigs.close()


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_four_devices_hold_what_kills_one(tmp_path: Path) -> None:
    """VGG-16, 553 MB of weights, on devices of 384 MB."""
    found = fits("vgg16", 4, 384_000_000, 0.5, tmp_path, Patience(90, 180, 60))
    assert found["plain"]["kills"] >= 1, "plain onnxruntime needs more"
    assert not found["failed"], found["failed"]
    assert found["answers"] == 4, "each compared with the oracle"
    for held in found["held"][1:]:
        assert (held["kills"], held["last_exit"]) == (0, "")
        assert held["peak_bytes"] <= held["limit_bytes"] == 384_000_000
    assert holds(found)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_shapes_are_measured_beside_what_is_picked(tmp_path: Path) -> None:
    patience = Patience(60, 60, 30)
    rows = list(shapes.shapes(tmp_path, patience, 1, [100.0], ["mobilenet_v2"]))
    assert [row["objective"] for row in rows] == ["latency", "throughput"]
    for row in rows:
        assert row["ratio"] > 0 and row["best"] in row["measured"]
        assert not any(each["failed"] for each in row["measured"].values())
        assert {"picked", "split"} <= row["measured"].keys()
    assert len(shapes.said(rows).splitlines()) == 3
