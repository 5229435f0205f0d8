"""Live daemons: which device has which weights, who signed, and what is left on a disk."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from architectures import vgg16
from cores import _imported
from oracle import assert_exact
from processes import eventually, image, small_model
from shared import HEAD

import meshinfer as mi
from cluster import local, sealing
from cluster.blobs import BlobStore
from cluster.forgetting import remove_blobs
from cluster.signing import KEY_FILE, SIGNER_FILE
from cluster.worker import WorkerOptions
from meshinfer.cost import DeviceProfile
from meshinfer.graph import Graph
from meshinfer.identity import DeviceId
from meshinfer.plan import Plan, Shard, Stage, Task
from meshinfer.planner import find_spares, pins_of
from meshinfer.scheduler import events as e

WITHIN_S = 30.0


def stores(cluster: mi.LocalCluster) -> dict[str, set[str]]:
    """The blobs on each worker's disk."""
    return {
        name: {path.name for path in (cluster._folder / name / "blobs").glob("?" * 64)}
        for name in cluster.names()
    }


def _quarters(graph: Graph, names: tuple[str, ...]) -> Plan:
    """A stage a device, each with about as many operators."""
    count = len(graph.ops)
    cuts = [
        min(graph.cut_points, key=lambda cut, part=part: abs(cut - part * count // len(names)))
        for part in range(1, len(names))
    ]
    stages = []
    for start, stop, name in zip([0, *cuts], [*cuts, count], names, strict=True):
        shards = tuple(Shard(v, graph.whole(v)) for v in graph.live_outputs(start, stop))
        stages.append(Stage(start, stop, (Task((DeviceId(name),), shards),)))
    return Plan(graph.digest, HEAD, HEAD, tuple(stages))


def test_no_device_has_all_weights_and_the_log_says_who_has_which(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = vgg16(32, classifier_width=64, width=0.125)
    size = (1, 3, 32, 32)
    graph = _imported(model.SerializeToString(), None, e.Signature(False, (("image", size),)))
    inputs = {"image": np.random.default_rng(0).standard_normal(size).astype(np.float32)}
    names = tuple(f"worker-{i}" for i in range(6))  # a task has two that stand by for it
    with mi.LocalCluster(len(names), log_level="info") as cluster, cluster.client() as client:
        client.deploy("vgg", model, plan=_quarters(graph, names[:4]))
        assert_exact(model, inputs, client.infer("vgg", inputs).outputs)
        log, found = "", dict[str, set[str]]()
        handed: defaultdict[str, set[str]] = defaultdict(set)

        def settled() -> bool:
            """Those that stand by are prepared, and all that is stored is told of."""
            nonlocal log, found
            found = stores(cluster)
            log += capfd.readouterr().err
            handed.clear()
            for line in log.splitlines():
                if "blob handed out" in line:
                    fields = dict(re.findall(r"(\w+)=(\S+)", re.sub(r"\x1b\[[0-9;]*m", "", line)))
                    assert int(fields["bytes"]) > 0 and fields["model"] == "vgg"
                    handed[fields["device"]].add(fields["blob"])
            told = all({d[:12] for d in blobs} == handed[name] for name, blobs in found.items())
            heard = {d.device: d.blobs for d in client.devices()}
            counted = all(heard[name] == len(blobs) for name, blobs in found.items())
            return "fallbacks ready" in log and told and counted

        assert eventually(settled, WITHIN_S), (found, handed)
    weights = set().union(*found.values())
    assert len(weights) >= 16 + 4  # layers and submodels
    for name, blobs in found.items():
        assert blobs < weights, f"{name} has the whole model"
    assert len([name for name, blobs in found.items() if blobs]) >= 4


def test_a_coordinator_that_signs_with_another_key_is_not_believed() -> None:
    with mi.LocalCluster(1) as cluster:
        with cluster.client() as client:
            client.deploy("net", small_model())
            client.infer("net", image())
        state = cluster._folder / cluster.names()[0]
        assert any((state / "blobs").iterdir()) and (state / SIGNER_FILE).exists()
        supervisor = cluster._living()[0].supervisor
        cluster.restart_coordinator()  # with its own key: nothing happens
        with cluster.client() as client:
            assert eventually(lambda: len(client.devices()) == 2, WITHIN_S)
            client.infer("net", image())
        (cluster._folder / "coordinator" / KEY_FILE).unlink()
        cluster.restart_coordinator()
        assert supervisor.wait(timeout=WITHIN_S) == 77
        assert not (state / "blobs").exists(), "who is not admitted keeps nothing"
        assert (state / SIGNER_FILE).exists()


@pytest.fixture
def encrypting(monkeypatch: pytest.MonkeyPatch) -> None:
    made = partial(WorkerOptions, encrypt_blobs=True)
    monkeypatch.setattr(local, "WorkerOptions", made)


@pytest.mark.usefixtures("encrypting")
def test_a_cluster_computes_with_sealed_blobs() -> None:
    model = small_model()
    with mi.LocalCluster(2) as cluster, cluster.client() as client:
        folders = [cluster._folder / name for name in cluster.names()]
        try:
            client.deploy("net", model, spread=True)
            assert_exact(model, image(), client.infer("net", image()).outputs)
            for folder in folders:
                _check_sealed(folder, model)
            cluster.crash(0)  # its next process has another key, and fetches them again
            assert eventually(lambda: _computes(client, model), WITHIN_S)
            for folder in folders:
                _check_sealed(folder, model)
        finally:
            for folder in folders:
                remove_blobs(folder)  # what is in memory goes as well, though it was killed


def _computes(client: mi.Client, model: onnx.ModelProto) -> bool:
    """On both devices again."""
    answer = client.infer("net", image())
    assert_exact(model, image(), answer.outputs)
    return len({task.device for task in answer.timing.tasks}) == 2


def _in_memory(state: Path) -> Path:
    return next(filter(Path.is_dir, sealing.loading_folders(state)))


def _check_sealed(state: Path, model: onnx.ModelProto) -> None:
    files = [path for path in (state / "blobs").iterdir() if path.is_file()]
    assert files and not list(_in_memory(state).iterdir())
    largest = max((t.raw_data for t in model.graph.initializer), key=len)
    for path in files:
        data = path.read_bytes()
        assert data.startswith(sealing._MAGIC) and largest[:64] not in data
    assert BlobStore(state / "blobs", shared=True).missing(tuple(p.name for p in files))


def test_a_device_that_is_revoked_keeps_no_blobs() -> None:
    with mi.LocalCluster(1) as cluster, cluster.client() as client:
        client.deploy("net", small_model())
        (name,) = cluster.names()
        state = cluster._folder / name
        assert any((state / "blobs").iterdir())
        supervisor = cluster._living()[0].supervisor
        client.admitting.revoke(name)
        assert supervisor.wait(timeout=WITHIN_S) == 77
        assert not (state / "blobs").exists() and (state / "identity.json").exists()


def test_the_one_that_is_nearest_stands_by_for_all_but_not_with_the_whole_model() -> None:
    model = vgg16(32, classifier_width=64, width=0.125)
    size = (1, 3, 32, 32)
    graph = _imported(model.SerializeToString(), None, e.Signature(False, (("image", size),)))
    plan = _quarters(graph, ("pi-0", "pi-1", "pi-2", "pi-3"))
    names = [DeviceId(f"pi-{i}") for i in range(6)]
    profiles = [DeviceProfile(name, 1e9, bandwidth_bytes_per_s=1e5) for name in names[:5]]
    profiles.append(DeviceProfile(names[5], 1e10, bandwidth_bytes_per_s=1e9))
    spares = find_spares(graph, plan, profiles, pins_of(graph, plan, profiles, {})).devices
    assert len(spares) == 4
    (left,) = (ref for ref, devices in spares.items() if devices[0] != names[5])
    assert names[5] not in spares[left]
