"""The demo as people run it: its files, its numbers, its promise, and what it does without mDNS."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from cluster import demo

ROOT = Path(__file__).resolve().parent.parent


def test_the_demo_doubles_a_photograph_and_loses_nothing(tmp_path: Path) -> None:
    with Image.open(ROOT / "cluster" / "data" / "photo.jpg") as photo:
        photo.crop((100, 60, 340, 220)).save(tmp_path / "crop.png")
    options = ("--out", str(tmp_path / "out"), "--picture", str(tmp_path / "crop.png"))
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "demo", "--json", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    assert report["exact"] and report["largest_difference"] <= report["tolerance"]
    assert (report["answered"], report["lost"], report["wrong"]) == (demo.REQUESTS, 0, 0)
    assert report["killed"].startswith("worker-")
    assert report["set_back"] > 0, "nobody noticed the loss"
    assert len(report["devices"]) == 4
    assert sum(d["tasks"] for d in report["devices"]) == report["tasks"]
    assert report["stages"] > 1 and report["worker_to_worker_bytes"] > 0
    assert report["discovery"] == "mdns"
    with Image.open(report["picture"]) as image:
        assert (image.format, image.size) == ("PNG", (480, 320))
    root = ET.parse(report["drawing"]).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "worker-3" in "".join(root.itertext())


def test_without_mdns_the_demo_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "browse", lambda *_, **__: [])
    report = demo.Report()
    console = Console(stderr=True)
    with demo._cluster(2, "error", console, report) as (cluster, client):
        assert {d.device for d in client.devices()} == {"head", "worker-0", "worker-1"}
        assert len(cluster.names()) == 2
    assert report.discovery == "static"
    assert "no mDNS" in capsys.readouterr().err
