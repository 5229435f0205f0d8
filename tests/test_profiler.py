"""A device measures itself: a rate for each kind, within what the kernel grants, once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cluster import granted, profiler
from meshinfer import limits
from meshinfer.cost import DeviceProfile, OpKind
from meshinfer.identity import DeviceId
from meshinfer.protocol import messages as m
from meshinfer.scheduler.profiles import profile_of, slowed, with_head

UNMEASURED = {OpKind.OTHER}
"""What is bound by bytes has no probe of its own."""


def test_there_is_a_probe_for_each_kind_in_their_order() -> None:
    names = [p.name for p in profiler.probes()]
    assert names == [k.name for k in OpKind if k not in UNMEASURED] + ["BYTES", "KERNELS"]


def test_a_device_measures_every_kind_and_the_fixed_costs() -> None:
    found = profiler.measure(1)
    assert len(found.rates) == len(OpKind) - len(UNMEASURED)
    assert all(rate > 0 for rate in found.rates)
    assert found.flops_per_s == found.rates[OpKind.DENSE]
    assert found.memory_bytes_per_s > 0 and found.kernel_s > 0
    # A task is handed over and back; a message wakes threads; its bytes are encrypted and copied.
    assert found.overhead_s > found.message_s > 1000 * found.byte_s > 0
    half = found.slowed(0.5)
    assert half.rates[OpKind.DENSE] == found.rates[OpKind.DENSE] / 2
    assert (half.kernel_s, half.message_s) == (found.kernel_s * 2, found.message_s * 2)


def test_a_quota_stretches_what_was_measured_by_what_it_grants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for cores, threads, stretch, alone in ((0.25, 1, 4.0, 4.0), (2.0, 4, 2.0, 1.0), (8.0, 4, 1, 1)):
        quota = granted.Quota(cores, 0.1)
        monkeypatch.setattr(granted, "cpu_quota", lambda quota=quota: quota)
        measuring = profiler._Measuring(threads)
        assert (measuring.stretch(), measuring.stretch(1)) == (stretch, alone)
    assert profiler.measure(1).cpu_cores == 0.0, "a quota of more than it uses does not bind"


def test_what_is_measured_travels_and_becomes_the_planners_profile() -> None:
    measured = profiler.Measured(tuple(range(1, 12)), 5.0, 1e-6, 2e-3, 3e-4, 4e-9)
    facts = profiler.facts(threads=1, engine="onnxruntime", measured=measured, memory_bytes=1 << 30)
    again = msgspec.json.decode(msgspec.json.encode(facts), type=m.Facts)
    profile = profile_of("pi", again, m.Link(peer="head", bytes_per_s=7.0))
    assert [profile.rate(kind) for kind in OpKind][:11] == list(measured.rates)
    assert profile.memory_bytes == (1 << 30) - limits.WORKER_BYTES
    assert profile.memory_bytes_per_s == 5.0
    assert (profile.kernel_s, profile.overhead_s) == (1e-6, 2e-3)
    assert (profile.message_s, profile.byte_s) == (3e-4, 4e-9)
    assert profile.bandwidth_bytes_per_s == 7.0
    assert profile.latency_s > 0, "what was not measured is assumed"
    silent = profiler.facts(threads=0, engine="none", measured=None)
    assert not silent.computes and not profile_of("head", silent).able


def test_a_slowdown_is_of_what_was_planned_with_and_counts_once() -> None:
    """Two that measured 8 % apart were planned as equals; one now takes a tenth longer."""
    measured = [DeviceProfile(DeviceId(d), s, rates=(s,)) for d, s in (("a", 1.0e9), ("b", 1.08e9))]
    a, b, head = slowed(with_head(measured, "head"), {"a": 1.1})
    assert b.flops_per_s / a.flops_per_s == pytest.approx(1.1)
    assert b.rates[0] / a.rates[0] == pytest.approx(1.1)
    assert not head.able


@pytest.mark.root
def test_a_device_whose_loopback_is_down_measures_the_rest() -> None:
    code = (
        "from cluster import profiler; m = profiler.measure(1); print(m.flops_per_s, m.message_s)"
    )
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    flops_per_s, message_s = map(float, done.stdout.split()[-2:])
    assert flops_per_s > 1e8 and message_s == 0.0, "0 is unknown: the planner assumes something"


def test_the_head_has_the_processor_of_the_device_on_its_host() -> None:
    near = DeviceProfile(DeviceId("near"), 1e9, message_s=4e-4, byte_s=4e-9, host="one")
    far = DeviceProfile(
        DeviceId("far"), 4e9, message_s=1e-4, byte_s=1e-9, host="two", bandwidth_bytes_per_s=1e8
    )
    for host, base in (("one", near), ("two", far), ("three", far)):
        *devices, head = with_head([near, far], "head", host)
        assert [p.id for p in devices] == ["near", "far"]
        assert (head.id, head.host, head.able) == ("head", host, False)
        assert head.request_s > head.message_s > base.message_s > head.report_s > 0
        assert head.message_s / base.message_s == pytest.approx(head_factor(near, "one"))
        assert head.byte_s > base.byte_s
        assert head.bandwidth_bytes_per_s == 1e8, "its link is as good as the best"


def head_factor(device: DeviceProfile, host: str) -> float:
    return with_head([device], "head", host)[-1].message_s / device.message_s


def test_a_device_measures_once_and_again_when_the_numbers_are_of_another_machine(
    tmp_path: Path,
) -> None:
    first = profiler.measured_once(tmp_path, "engine", 1)
    path = tmp_path / "profile.json"
    kept = msgspec.json.decode(path.read_bytes())
    kept["measured"]["kernel_s"] = 123.0
    kept["dense_flops_per_s"] = 1e-9  # so that the check finds a drift
    path.write_bytes(msgspec.json.encode(kept))
    assert profiler.measured_once(tmp_path, "engine", 1).kernel_s != 123.0
    kept = msgspec.json.decode(path.read_bytes())
    kept["measured"]["kernel_s"] = 123.0
    path.write_bytes(msgspec.json.encode(kept))
    assert profiler.measured_once(tmp_path, "another engine", 1).kernel_s != 123.0
    path.write_bytes(b"{broken")
    assert len(profiler.measured_once(tmp_path, "engine", 1).rates) == len(first.rates)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_group_or_its_parent_grants_less_than_the_machine_has(
    tmp_path: Path, version: str
) -> None:
    own, root = tmp_path / "own", tmp_path / "groups"
    if version == "v2":
        own.write_text("0::/lab/pi-1\n")
        group = root / "lab" / "pi-1"
        group.mkdir(parents=True)
        (group / "cpu.max").write_text("1000 4000\n")
        (group / "memory.max").write_text("max\n")
        (root / "lab" / "memory.max").write_text("400000000\n")
        (root / "lab" / "cpu.max").write_text("max 100000\n")
    else:
        own.write_text("2:cpu,cpuacct:/lab/pi-1\n1:memory:/lab/pi-1\n")
        group = root / "cpu" / "lab" / "pi-1"
        group.mkdir(parents=True)
        (group / "cpu.cfs_quota_us").write_text("1000\n")
        (group / "cpu.cfs_period_us").write_text("4000\n")
        (root / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
        memory = root / "memory" / "lab"
        (memory / "pi-1").mkdir(parents=True)
        (memory / "pi-1" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
        (memory / "memory.limit_in_bytes").write_text("400000000\n")
    assert granted.cpu_quota(root, own) == granted.Quota(0.25, 0.004)
    assert granted.memory_limit(root, own) == 400_000_000


def test_from_where_a_group_is_slowed_down_is_its_limit(tmp_path: Path) -> None:
    """MemoryHigh= of a service: beyond it every allocation waits for memory to be taken back."""
    own, group = tmp_path / "own", tmp_path / "groups" / "service"
    own.write_text("0::/service\n")
    group.mkdir(parents=True)
    (group / "memory.max").write_text("400000000\n")
    (group / "memory.high").write_text("300000000\n")
    assert granted.memory_limit(tmp_path / "groups", own) == 300_000_000


def test_a_worker_grants_what_it_has_less_what_it_takes_itself() -> None:
    """Of 200 MiB it once granted 136 MB, and was killed: tests/test_lab_memory.py."""
    assert granted.memory_for_shares(200 << 20) == (200 << 20) - limits.WORKER_BYTES < 26e6
    assert granted.memory_for_shares(100 << 20) == 1, "0 would mean that nobody said"


def test_without_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert granted.cpu_quota(tmp_path, tmp_path / "nothing") is None
    assert granted.memory_limit(tmp_path, tmp_path / "nothing") > 0
    assert granted.memory_left(1) == 0


def test_what_a_task_takes_for_long_is_by_the_quota_as_it_is_now() -> None:
    quota: granted.Quota | None = None
    one, four = (granted.Lasting(threads, lambda: quota) for threads in (1, 4))
    assert one.seconds(0.1, 0.0) == four.seconds(0.1, 0.0) == 0.1
    quota = granted.Quota(0.25, 0.1)
    assert one.seconds(0.1, 0.5 * granted.LOOK_S) == 0.1, "not looked at each time"
    assert one.seconds(0.1, granted.LOOK_S) == pytest.approx(0.4)
    assert four.seconds(0.1, granted.LOOK_S) == pytest.approx(1.6)
    quota = granted.Quota(2.0, 0.1)
    assert one.seconds(0.1, 3 * granted.LOOK_S) == 0.1
    assert four.seconds(0.1, 3 * granted.LOOK_S) == pytest.approx(0.2)
