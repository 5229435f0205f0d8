"""How a board feels: what the kernel's files say, in words, and how it reaches ``devices``."""

from __future__ import annotations

from pathlib import Path

import pytest
from cores import Cluster

from cluster.board import EACH_S, Watch, read_board
from meshinfer.protocol import messages as m
from meshinfer.protocol.board import Board, board_of, described
from meshinfer.protocol.codec import decode, encode
from meshinfer.scheduler import events as e

FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"
CLOCK = "sys/devices/system/cpu/cpu0/cpufreq"


def sysfs(root: Path, **more: str) -> Path:
    """As a Raspberry Pi 4 has it under 64-bit Raspberry Pi OS, with what a test adds."""
    files = {
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48312\n",
        FIRMWARE: "0\n",
        f"{CLOCK}/scaling_cur_freq": "1500000\n",
        f"{CLOCK}/cpuinfo_max_freq": "1800000\n",
        **{path.replace("__", "/"): text for path, text in more.items()},
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_pi_that_is_well(tmp_path: Path) -> None:
    board = read_board(sysfs(tmp_path))
    assert board == Board(temperature_c=48.312, clock_hz=1.5e9, clock_most_hz=1.8e9)
    assert described(board) == "48C"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("1", "48C undervoltage"),
        ("2", "48C throttled"),
        ("4", "48C throttled"),
        ("8", "48C throttled"),
        ("50005", "48C throttled undervoltage"),  # as weak supplies have it, most often
        ("50000", "48C was-throttled"),
        ("f0000", "48C was-throttled"),
        ("0x1", "48C undervoltage"),
    ],
)
def test_what_the_firmware_tells_of_throttling(tmp_path: Path, flags: str, words: str) -> None:
    assert described(read_board(sysfs(tmp_path, **{FIRMWARE: f"{flags}\n"}))) == words


def test_the_zone_of_the_processor_is_read_wherever_it_stands(tmp_path: Path) -> None:
    more = {
        "sys/class/thermal/thermal_zone0/type": "acpitz\n",
        "sys/class/thermal/thermal_zone0/temp": "20000\n",
        "sys/class/thermal/thermal_zone1/type": "x86_pkg_temp\n",
        "sys/class/thermal/thermal_zone1/temp": "86000\n",
    }
    assert described(read_board(sysfs(tmp_path, **more))) == "86C hot"


def test_a_pi_5_and_a_board_with_a_voltage_alarm_alone(tmp_path: Path) -> None:
    five = "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled"
    (tmp_path / "5").mkdir()
    root = sysfs(tmp_path / "5", **{five: "1\n"})
    (root / FIRMWARE).unlink()
    assert described(read_board(root)) == "48C undervoltage"
    alarm = {
        "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
        "sys/class/hwmon/hwmon1/name": "rpi_volt\n",
        "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n",
    }
    (tmp_path / "v").mkdir()
    root = sysfs(tmp_path / "v", **alarm)
    (root / FIRMWARE).unlink()
    assert described(read_board(root)) == "48C undervoltage"


def test_where_nothing_tells_nothing_is_known(tmp_path: Path) -> None:
    assert read_board(tmp_path) is None
    assert described(None) == "-"


@pytest.mark.parametrize("text", ["", "hot", "-274000", "9999999", "1e3", "\n"])
def test_what_cannot_be_a_temperature_is_none(text: str) -> None:
    assert board_of(temperature=text) is None
    board = board_of(temperature=text, throttled="1")
    assert board == Board(undervoltage=True)
    assert described(board) == "undervoltage"


def test_files_that_cannot_be_read_or_are_no_text_count_as_not_there(tmp_path: Path) -> None:
    root = sysfs(tmp_path)
    (root / FIRMWARE).write_bytes(b"\xff\xfe")
    zone = root / "sys/class/thermal/thermal_zone0/temp"
    zone.unlink()
    zone.mkdir()
    assert read_board(root) == Board(clock_hz=1.5e9, clock_most_hz=1.8e9)


def test_it_is_read_now_and_then(tmp_path: Path) -> None:
    read: list[Board] = []
    watch = Watch(read.append, sysfs(tmp_path))
    for now in (0.0, EACH_S / 2, EACH_S, EACH_S + 1.0, EACH_S * 2):
        watch.look(now)
    assert len(read) == 3


def test_a_board_goes_through_the_codec_and_a_heartbeat_without_one_does_too() -> None:
    for board in (None, Board(), Board(temperature_c=-5.5, throttled=True, before=True)):
        beat = m.Heartbeat(board=board)
        assert decode([bytes(frame) for frame in encode(beat, None)])[0] == beat


def test_how_a_board_feels_is_seen_at_the_coordinator() -> None:
    cluster = Cluster()
    pi = next(name for name in sorted(cluster.nodes) if name.startswith("pi"))
    assert shown(cluster) == {}
    cluster._handle(cluster.nodes[pi], e.BoardRead(Board(temperature_c=81.0)))
    cluster.settle(lambda: bool(shown(cluster)))
    assert shown(cluster) == {pi: Board(temperature_c=81.0)}


def shown(cluster: Cluster) -> dict[str, Board]:
    infos = cluster.core.members.infos(cluster.now)
    return {each.device: each.board for each in infos if each.board is not None}
