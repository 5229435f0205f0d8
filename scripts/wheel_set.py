"""Which wheels an install on a 64-bit Pi takes, as pip resolves them here, and what is wrong with
them. Downloads none: their metadata, and their sizes by HEAD.

pip chooses files for the target, but reads markers (``; python_version < "3.13"``) for the Python
that runs it; so what each wheel requires is gone through again with the target's own markers.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import tempfile
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
GLIBC = {"3.11": 36, "3.13": 41}
"""The Pythons of Debian 12 and 13 and of Raspberry Pi OS, with the minor version of their glibc."""

MOST_BYTES = 90_000_000
NOT_ON_A_PI = ("torch", "torchvision", "ray", "triton", "onnxscript", "tensorflow")
_ROUNDS = 5
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Wheel:
    """One file that would be installed. ``requires``: as its metadata says, markers and all."""

    name: str
    version: str
    url: str
    nbytes: int
    requires: tuple[str, ...] = ()


class Unresolved(Exception):
    """pip found no set of wheels; its own words."""


def requirements() -> list[str]:
    """Of the base install, without any extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(project["dependencies"])


def resolve(wanted: Iterable[str], python: str) -> list[Wheel]:
    """The wheels for aarch64 and this CPython, wheels only. Raises ``Unresolved``."""
    wanted = list(wanted)
    for _ in range(_ROUNDS):
        found = _report(wanted, python)
        lacking = missing(found, python)
        if not lacking:
            return sorted(found, key=lambda wheel: -wheel.nbytes)
        wanted += lacking
    raise Unresolved(f"markers of Python {python} ask for more, round after round: {wanted}")


def missing(wheels: Iterable[Wheel], python: str) -> list[str]:
    """Requirements that hold on the target, and that pip, with its own markers, has passed over."""
    wheels = list(wheels)
    names = {canonicalize_name(wheel.name) for wheel in wheels}
    here = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": "aarch64",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    lacking = []
    for text in sorted({text for wheel in wheels for text in wheel.requires}):
        needs = Requirement(text)
        if needs.marker is not None and not needs.marker.evaluate(here):
            continue
        if canonicalize_name(needs.name) not in names:
            lacking.append(f"{needs.name}{needs.specifier}")
    return lacking


def faults(wheels: Iterable[Wheel], most_bytes: int = MOST_BYTES) -> list[str]:
    """What keeps this set from a Pi, a line each."""
    wheels, found = list(wheels), []
    for wheel in wheels:
        if not urllib.parse.urlsplit(wheel.url).path.endswith(".whl"):
            found.append(f"{wheel.name} {wheel.version} would be built from source: {wheel.url}")
        name = canonicalize_name(wheel.name)
        if name in NOT_ON_A_PI or name.startswith("nvidia-"):
            found.append(f"{wheel.name} {wheel.version} has no place on a device")
    total = sum(wheel.nbytes for wheel in wheels)
    if total > most_bytes:
        largest = ", ".join(
            f"{wheel.name} {wheel.nbytes / 1e6:.1f}"
            for wheel in sorted(wheels, key=lambda wheel: -wheel.nbytes)[:5]
        )
        found.append(
            f"{total / 1e6:.1f} MB are more than {most_bytes / 1e6:.0f}; the largest: {largest}"
        )
    return found


def _report(wanted: list[str], python: str) -> list[Wheel]:
    tags = [f"manylinux_2_{minor}_aarch64" for minor in range(17, GLIBC[python] + 1)]
    platforms = [part for tag in (*tags, "manylinux2014_aarch64") for part in ("--platform", tag)]
    with tempfile.TemporaryDirectory(prefix="meshinfer-wheels-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-input"]
        command += ["--disable-pip-version-check", "--ignore-installed", "--only-binary=:all:"]
        command += ["--target", str(Path(folder) / "target"), "--report", str(report)]
        command += ["--implementation", "cp", "--python-version", python, *platforms, *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unresolved(done.stderr.strip() or f"pip ended with {done.returncode}")
        items = json.loads(report.read_text())["install"]
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(_nbytes, [item["download_info"]["url"] for item in items]))
    return [
        Wheel(
            name=item["metadata"]["name"],
            version=item["metadata"]["version"],
            url=item["download_info"]["url"],
            nbytes=nbytes,
            requires=tuple(item["metadata"].get("requires_dist", ())),
        )
        for item, nbytes in zip(items, sizes, strict=True)
    ]


def _nbytes(url: str) -> int:
    if url.startswith("file:"):
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path)).stat().st_size
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    request = urllib.request.Request(url, method="HEAD")
    for left in reversed(range(_TRIES)):
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                return int(answer.headers["content-length"])
        except OSError:
            if not left:
                raise
    raise AssertionError("the last try has raised")
