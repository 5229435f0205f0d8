"""LocalCluster with real processes: it starts, is hurt in every way, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from architectures import squeezenet1_1
from oracle import assert_exact
from processes import alive, all_pids, eventually, image, none_alive, small_model, worker_pids

import meshinfer as mi
from meshinfer import limits

MODEL, IMAGE = small_model(), image()


@pytest.fixture(scope="module")
def cluster() -> Iterator[mi.LocalCluster]:
    """Shared by the tests that leave two healthy workers behind."""
    with mi.LocalCluster(2) as made:
        yield made


def devices(cluster: mi.LocalCluster) -> set[str]:
    with cluster.client() as client:
        return {each.device for each in client.devices()}


def last_exits(cluster: mi.LocalCluster) -> dict[str, str]:
    with cluster.client() as client:
        return {each.device: each.facts.last_exit for each in client.devices()}


@pytest.mark.parametrize(("count", "faults"), [(1, False), (3, True), (5, False)])
def test_a_cluster_of_n_workers_answers_and_leaves_nothing_behind(count: int, faults: bool) -> None:
    with mi.LocalCluster(count, faults=faults) as cluster:
        folder = cluster.keyring.parent.parent
        names = [f"worker-{i}" for i in range(count)]
        assert cluster.names() == names
        assert devices(cluster) == {"head", *names}
        pids = all_pids(cluster)
        assert len(pids) == 1 + 2 * count + faults and all(map(alive, pids))
        with cluster.client() as client:
            client.deploy("small", MODEL, spread=True)
            assert_exact(MODEL, IMAGE, client.infer("small", IMAGE).outputs)
    assert eventually(lambda: none_alive(pids), 3.0)
    assert not folder.exists()


def test_two_clusters_do_not_meet(cluster: mi.LocalCluster) -> None:
    with mi.LocalCluster(1) as other:
        assert other.cluster != cluster.cluster and other.address != cluster.address
        assert len(devices(other)) == 2 and len(devices(cluster)) == 3


def test_close_after_an_exception_leaves_nothing_behind() -> None:
    with contextlib.suppress(ZeroDivisionError), mi.LocalCluster(1) as cluster:
        pids, folder = all_pids(cluster), cluster.keyring.parent.parent
        raise ZeroDivisionError
    assert eventually(lambda: none_alive(pids), 3.0)
    assert not folder.exists()
    cluster.close()  # again: nothing happens


def test_close_does_not_wait_for_requests_in_flight() -> None:
    with mi.LocalCluster(1, speeds=[0.05]) as cluster, cluster.client() as client:
        model = squeezenet1_1()
        client.deploy("slow", model)
        x = {"image": np.zeros((1, 3, 64, 64), np.float32)}
        futures = [client.submit("slow", x) for _ in range(20)]
        started = time.monotonic()
        cluster.close()
        assert time.monotonic() - started < 8.0
        for future in futures:
            assert future.exception(timeout=10) is None or isinstance(
                future.exception(), mi.ClusterUnavailable
            )
        assert any(future.exception() for future in futures)


def test_a_killed_worker_is_gone_and_an_added_one_takes_work(cluster: mi.LocalCluster) -> None:
    with cluster.client() as client:
        client.deploy("small", MODEL, spread=True)
        pid = worker_pids(cluster)[0]
        killed = cluster.kill(0)
        assert killed not in cluster.names()
        assert eventually(lambda: not alive(pid), 2.0)
        assert_exact(MODEL, IMAGE, client.infer("small", IMAGE, deadline_s=20).outputs)
        added = cluster.add()
        assert added in cluster.names() and added in devices(cluster)

        def works() -> bool:
            return added in client.infer("small", IMAGE, deadline_s=20).timing.compute_s

        assert eventually(works, 10.0)
    with pytest.raises(mi.InvalidInput, match="no living worker 2"):
        cluster.kill(2)


def test_a_crashed_worker_is_started_again_and_says_why_it_died(cluster: mi.LocalCluster) -> None:
    pid = worker_pids(cluster)[1]
    name = cluster.crash(1)
    assert eventually(lambda: not alive(pid), 2.0)
    assert eventually(lambda: last_exits(cluster).get(name) == "SIGKILL", 10.0)
    assert cluster.names()[1] == name
    with cluster.client() as client:
        client.deploy("small", MODEL, spread=True)
        assert name in client.infer("small", IMAGE).timing.compute_s


def test_a_paused_worker_is_given_up_and_a_resumed_one_comes_back(
    cluster: mi.LocalCluster,
) -> None:
    with cluster.client() as client:
        client.deploy("small", MODEL, spread=True)
        name = cluster.pause(0)
        try:
            result = client.infer("small", IMAGE, deadline_s=20)
            assert_exact(MODEL, IMAGE, result.outputs)
            assert name not in result.timing.compute_s
        finally:
            assert cluster.resume(0) == name
        assert eventually(lambda: name in devices(cluster), 10.0)

        def works() -> bool:
            return name in client.infer("small", IMAGE, deadline_s=20).timing.compute_s

        assert eventually(works, 10.0)


@pytest.fixture(scope="module")
def gated() -> Iterator[mi.LocalCluster]:
    with mi.LocalCluster(3, faults=True) as made:
        yield made


def test_a_worker_that_is_cut_off_is_done_without_and_comes_back_when_healed(
    gated: mi.LocalCluster,
) -> None:
    with gated.client() as client:
        client.deploy("small", MODEL, spread=True)

        def workers() -> set[str]:
            result = client.infer("small", IMAGE, deadline_s=30)
            assert_exact(MODEL, IMAGE, result.outputs)
            return set(result.timing.compute_s)

        assert workers() == set(gated.names())
        name = gated.cut(1)
        assert name == gated.names()[1], "nothing has died"
        assert name not in workers()
        assert eventually(lambda: name not in devices(gated), 10.0)
        gated.heal(1)
        assert eventually(lambda: name in devices(gated), 10.0)
        assert eventually(lambda: name in workers(), 10.0)


def test_two_workers_that_are_cut_off_from_each_other_stay_in_the_cluster(
    gated: mi.LocalCluster,
) -> None:
    """A wait of more than what is dead: no heartbeat is lost."""
    gated.cut(0, 2)
    until = time.monotonic() + 1.5 * limits.DEAD_AFTER_S
    while time.monotonic() < until:
        assert devices(gated) == {"head", *gated.names()}
    gated.heal()
    with gated.client() as client:
        client.deploy("small", MODEL, spread=True)
        result = client.infer("small", IMAGE, deadline_s=30)
        assert set(result.timing.compute_s) == set(gated.names())
        assert_exact(MODEL, IMAGE, result.outputs)


def test_a_worker_added_or_restarted_behind_the_gate_works(gated: mi.LocalCluster) -> None:
    with gated.client() as client:
        before = worker_pids(gated)[0]
        crashed = gated.crash(0)
        added = gated.add()
        assert eventually(lambda: worker_pids(gated)[0] != before, 10.0)
        client.deploy("small", MODEL, spread=True)

        def all_work() -> bool:
            result = client.infer("small", IMAGE, deadline_s=30)
            return {crashed, added} <= set(result.timing.compute_s)

        assert eventually(all_work, 20.0)


def test_a_cut_that_cannot_be_says_what_to_do(
    cluster: mi.LocalCluster, gated: mi.LocalCluster
) -> None:
    for act in (cluster.cut, cluster.heal):
        with pytest.raises(mi.InvalidInput, match="cannot be cut") as caught:
            act(0)
        assert "faults=True" in caught.value.hint
    with pytest.raises(mi.InvalidInput, match="from itself"):
        gated.cut(1, 1)
    with pytest.raises(mi.InvalidInput, match="no living worker 9"):
        gated.cut(9)


def test_slower_workers_get_less_work_and_take_their_time() -> None:
    model = squeezenet1_1(96)
    x = {"image": np.random.default_rng(0).standard_normal((1, 3, 96, 96)).astype(np.float32)}
    with mi.LocalCluster(3, speeds=[1.0, 0.5, 0.25]) as cluster, cluster.client() as client:
        flops = {d.device: d.facts.flops_per_s for d in client.devices()}
        assert flops["worker-1"] == pytest.approx(flops["worker-0"] / 2)
        assert flops["worker-2"] == pytest.approx(flops["worker-0"] / 4)
        plan = mi.Plan.parse(client.deploy("net", model, spread=True).plan or "")
        rows: dict[str, int] = {}
        for task in plan.stages[0].tasks:
            box = task.outputs[0].box
            rows[task.devices[0]] = rows.get(task.devices[0], 0) + box[2].size
        assert rows["worker-0"] > rows["worker-1"] > rows["worker-2"]
        # The same task on the fast and on the slow device: a plan that is on one device.
        whole = {
            name: "\n".join(
                [
                    f"plan graph={plan.graph} source=head sink=head window=1",
                    f"stage 0:{plan.stages[-1].stop}",
                    f"  task {name}",
                    "    logits [0:1,0:1000]",
                ]
            )
            for name in ("worker-0", "worker-2")
        }
        took = {}
        for name, text in whole.items():
            client.deploy(name, model, plan=text)
            results = [client.infer(name, x) for _ in range(6)]
            took[name] = min(r.timing.compute_s[name] for r in results)
            assert_exact(model, x, results[0].outputs)
        # It sleeps three times the CPU time that it took: a fact, not a matter of speed.
        assert took["worker-2"] > 2 * took["worker-0"]


def test_workers_find_the_coordinator_over_mdns_on_loopback() -> None:
    with mi.LocalCluster(2, discovery=True) as cluster:
        assert devices(cluster) == {"head", "worker-0", "worker-1"}
        with mi.Client(
            keyring=cluster.keyring, cluster=cluster.cluster, interfaces=["127.0.0.1"]
        ) as client:
            client.deploy("small", MODEL)
            assert_exact(MODEL, IMAGE, client.infer("small", IMAGE).outputs)


@pytest.mark.parametrize(
    "options", [{"count": -1}, {"count": 2, "speeds": [1]}, {"count": 1, "speeds": [0]}]
)
def test_options_that_make_no_sense_are_refused(options: dict) -> None:
    with pytest.raises(mi.InvalidInput):
        mi.LocalCluster(**options)


OWNER = textwrap.dedent(
    """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    import meshinfer as mi
    from processes import all_pids
    with mi.LocalCluster(2) as cluster:
        print(cluster.keyring, *all_pids(cluster), flush=True)
        time.sleep(60)
    """
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_processes_of_a_cluster_die_with_their_owner(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        try:
            keyring, *rest = owner.stdout.readline().split()
            pids = [int(pid) for pid in rest]
            assert len(pids) == 5 and all(map(alive, pids))
            time.sleep(0.3)  # until it sleeps: Python drops a KeyboardInterrupt in a finaliser
        finally:
            owner.send_signal(number)
        owner.wait(timeout=30)  # processes stop one after another, each in its time
        assert eventually(lambda: none_alive(pids), 5.0)
        assert Path(keyring).exists() == (number == signal.SIGKILL)
        shutil.rmtree(Path(keyring).parent.parent, ignore_errors=True)


def test_the_processes_die_with_an_owner_that_was_killed_while_they_started() -> None:
    """The parent may be gone before the child asks who it is."""
    code = (
        "import os, subprocess, sys, time\n"
        "gone = subprocess.Popen(['true']); gone.wait()\n"
        "from cluster import processes\n"
        "processes.watch_parent(gone.pid, lambda: os._exit(7))\n"
        "time.sleep(20)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=15).returncode == 7


def test_sigterm_ends_a_supervisor_and_its_worker_at_any_moment() -> None:
    """The moments: before the worker is there, while it imports, when it runs."""
    with mi.LocalCluster(1) as cluster:
        for delay_s in (0.0, 0.05, 0.3, 1.5):
            cluster.add(wait=False)
            supervisor = cluster._living()[-1].supervisor
            time.sleep(delay_s)
            group = os.getpgid(supervisor.pid)
            supervisor.send_signal(signal.SIGTERM)
            # Before Python has set its handler the signal itself ends it.
            assert supervisor.wait(timeout=15) in (0, -signal.SIGTERM)
            assert eventually(lambda group=group: not group_alive(group), 3.0)


def group_alive(group: int) -> bool:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.getpgid(int(entry)) == group and alive(int(entry)):
                    return True
            except ProcessLookupError:
                continue
    return False
