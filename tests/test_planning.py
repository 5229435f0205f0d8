"""The process that plans for the coordinator: real models, searches, kills and pipes."""

from __future__ import annotations

import hashlib
import io
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from architectures import Builder, squeezenet1_1, yolov2
from onnx import ModelProto, TensorProto, helper
from processes import eventually, none_alive, small_model

from cluster import jobs
from cluster.blobs import BlobStore
from cluster.planning import PlanningThread
from meshinfer import ImageSpec, limits
from meshinfer.plan import Plan
from meshinfer.planner import ADAPTED
from meshinfer.protocol.messages import Facts, Failure, Link, Program
from meshinfer.scheduler.events import (
    Candidate,
    Discard,
    Effect,
    MakePlan,
    ModelOpened,
    OpenModel,
    PlanReady,
    Signature,
)

WITHIN_S = 120.0
SMALL = Signature(False, (("image", (1, 3, 24, 24)),))
LARGE = Signature(False, (("image", (1, 3, 64, 64)),))
NEVER = 1e-4
"""A share with which a search takes hours."""


class Planning:
    """A planning thread and all that it posts."""

    def __init__(self, folder: Path) -> None:
        self.store = BlobStore(folder)
        self.posted: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.thread = PlanningThread(self.store, self.posted.put, log_level="error")

    def put(self, *effects: Effect) -> None:
        for effect in effects:
            self.thread.put(effect)

    def next(self) -> object:
        return self.posted.get(timeout=WITHIN_S)

    def opened(self, model: ModelProto) -> str:
        data = model.SerializeToString()
        digest = hashlib.sha256(data).hexdigest()
        self.store.put(digest, data)
        self.put(OpenModel(1, digest, None))
        answer = self.next()
        assert isinstance(answer, ModelOpened) and answer.failure is None
        return digest

    def planned(self, effect: MakePlan) -> PlanReady:
        self.put(effect)
        answer = self.next()
        assert isinstance(answer, PlanReady) and answer.deployment == effect.deployment
        return answer

    @property
    def pid(self) -> int:
        """Of the process that plans, or of the last one until the next is there."""
        return self.thread._process._process.pid

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.pid)

    def family(self) -> list[int]:
        return [self.process.pid, *(p.pid for p in self.process.children(recursive=True))]

    def works(self, seconds: float = 0.3) -> bool:
        """Whether it gets to take so much of a processor from now on."""
        process = self.process
        start = sum(process.cpu_times()[:2])
        return eventually(lambda: sum(process.cpu_times()[:2]) > start + seconds, WITHIN_S)


@pytest.fixture
def planning(tmp_path: Path) -> Iterator[Planning]:
    made = Planning(tmp_path / "blobs")
    try:
        yield made
    finally:
        made.thread.close()


def devices(count: int) -> tuple[Candidate, ...]:
    facts = Facts(flops_per_s=1e8, memory_bytes=1 << 30)
    return tuple(Candidate(f"pi-{i}", facts, slowdown=1 + i / 50) for i in range(count))


def making(digest: str, number: int, count: int = 2, signature: Signature = SMALL) -> MakePlan:
    return MakePlan(
        deployment=number, digest=digest, image=None, signature=signature,
        candidates=devices(count), head="head", plan=None, objective="latency", spread=True,
        strict=False,
    )  # fmt: skip


def long_search(digest: str, number: int) -> MakePlan:
    """A second or two of a processor."""
    return making(digest, number, 32, LARGE)


# --- what is said ---------------------------------------------------------------------------------


def test_whatever_effects_and_answers_may_hold_comes_out_as_it_went_in() -> None:
    link = Link(peer="head", bytes_per_s=1e6, latency_s=0.01)
    making_all = MakePlan(
        deployment=7, digest="ab" * 32, image='{"input":"x"}',
        signature=Signature(True, (("x", (1, 3, 8, 8)), ("ü", ())), ("y", "z")),
        candidates=(Candidate("a", Facts(), link, (link, link), 1.5, "host"), *devices(1)),
        head="head", plan="text", objective="throughput", spread=True, strict=True, present="text",
        head_host="host", pin={"x": ("a", "head")}, memory={"a": 1 << 40}, share=0.1,
        half_transfers=True, tell_loss=True, paced=True,
    )  # fmt: skip
    failure = Failure(error="InvalidInput", message="no", hint="yes", retry_after_s=0.5)
    opened = ModelOpened(
        1 << 40, {"x": ("<f4", (1, None, 1 << 40)), "y": ("?", None), "z": ("<i8", ())},
        "{}", failure, {"y": ("x", "z"), "none": ()},
    )  # fmt: skip
    ready = PlanReady(
        3, "text", {}, None, failure, 4, True, {((-1, 0), "head"): 0.0, ((2, 3), "a"): 1e-9},
        True, 0.25, True,
    )  # fmt: skip
    for each in (making_all, opened, ready):
        told = [f.name for f in fields(each) if getattr(each, f.name) != f.default]
        assert set(told) >= {f.name for f in fields(each)} - {"programs", "report"}
    items = (
        jobs.Job(plan=making_all), jobs.Job(plan=replace(making_all, memory=5, signature=SMALL)),
        jobs.Job(open=OpenModel(1, "ab" * 32, "{}")), jobs.Answer(opened=opened, weights=("a",)),
        jobs.Answer(planned=ready), jobs.Begin("f", 1, {"a": ("b", "c")}, 1, "info", "text", 3),
    )  # fmt: skip
    stream = io.BytesIO()
    for item in items:
        jobs.write(stream, item)
    whole = stream.getvalue()
    stream.seek(0)
    for item in items:
        assert jobs.read(stream, type(item)) == item
    assert jobs.read(stream, jobs.Answer) is None
    assert jobs.read(io.BytesIO(whole[:-1][: len(whole) // 2]), jobs.Job) == items[0]
    assert jobs.read(io.BytesIO(whole[:50]), jobs.Job) is None, "cut amid a frame"


def test_a_model_is_opened_planned_and_its_programs_are_in_the_store(planning: Planning) -> None:
    digest = planning.opened(small_model())
    planning.put(OpenModel(2, digest, None))
    opened = planning.next()
    assert isinstance(opened, ModelOpened) and opened.key == 2
    assert opened.inputs == {"image": ("<f4", (1, 3, 24, 24))}
    assert opened.outputs == {"y": ("image",)}
    ready = planning.planned(making(digest, 5))
    plan = Plan.parse(ready.plan)
    assert ready.failure is None and ready.report is not None and ready.search_s > 0
    assert {*plan.devices(), "head"} == set(ready.programs)
    programs = [p for each in ready.programs.values() for p in each]
    assert all(isinstance(program, Program) for program in programs)
    wanted = {w for p in programs for w in (p.model, *p.weights) if w}
    assert wanted and planning.store.missing(tuple(wanted)) == ()
    assert ready.expected
    for (place, device), seconds in ready.expected.items():
        assert isinstance(place, tuple) and device in ready.programs and seconds >= 0
    kept = planning.planned(replace(making(digest, 6), present=ready.plan, share=0.5))
    assert kept.kept and not kept.dropped and kept.failure is None
    given = planning.planned(replace(making(digest, 7), plan=ready.plan))
    assert given.plan == ready.plan


def test_for_devices_of_other_paces_a_plan_is_made_from_those_of_before(
    planning: Planning,
) -> None:
    """The second of four becomes slow, and is back."""
    digest = planning.opened(yolov2(128, width=0.25))
    of = Signature(False, (("image", (1, 3, 128, 128)),))
    facts = Facts(flops_per_s=1e9, memory_bytes=1 << 30)
    paces = {"pi-1": 1.0, "pi-2": 1.0, "pi-3": 1.0, "pi-4": 1.0}

    def asked(number: int, **changes: object) -> PlanReady:
        found = tuple(Candidate(name, facts, slowdown=pace) for name, pace in paces.items())
        effect = replace(making(digest, number, signature=of), candidates=found, spread=False)
        return planning.planned(replace(effect, **changes))  # type: ignore[arg-type]

    def adapted(ready: PlanReady) -> bool:
        assert ready.failure is None and not ready.kept and ready.report is not None
        assert (ADAPTED in ready.report.notes) == ready.adapted
        return ready.adapted

    first = asked(1)
    assert not adapted(first) and len(Plan.parse(first.plan).devices()) == 4
    paces["pi-2"] = 6.0
    slow = asked(2, present=first.plan, paced=True)
    assert adapted(slow) and not adapted(asked(3, present=first.plan))
    paces["pi-2"] = 1.0
    back = asked(4, present=slow.plan, paced=True)
    assert adapted(back) and len(Plan.parse(back.plan).devices()) == 4
    assert asked(5, present=back.plan, paced=True).kept


def test_what_is_refused_is_refused_in_the_same_words(planning: Planning) -> None:
    data = b"no model"
    digest = hashlib.sha256(data).hexdigest()
    planning.store.put(digest, data)
    planning.put(OpenModel(9, digest, None))
    opened = planning.next()
    assert isinstance(opened, ModelOpened) and opened.key == 9
    assert opened.failure is not None and opened.failure.error == "InvalidInput"
    good = planning.opened(small_model())
    ready = planning.planned(replace(making(good, 1), memory={"nobody": 5}))
    assert ready.failure is not None and "'nobody'" in ready.failure.message
    for memory, word in (
        (1000, "pi-0 would need"),
        (0, "pi-0, pi-1"),
        ({"pi-0": 0, "pi-1": 0}, "pi-0, pi-1"),
    ):
        ready = planning.planned(replace(making(good, 2), memory=memory))
        assert ready.failure is not None and ready.failure.error == "NotEnoughMemory"
        assert word in ready.failure.message and ready.failure.hint
    picture = Signature(True, (("image", (1, 24, 24, 3)),))
    spec = ImageSpec(input="image", output="y").to_json()
    ready = planning.planned(replace(making(good, 3), image=spec, signature=picture))
    assert ready.failure is None, "and it goes on"


# --- killed ---------------------------------------------------------------------------------------


def test_a_search_whose_process_is_killed_is_made_by_another(planning: Planning) -> None:
    digest = planning.opened(squeezenet1_1(64))
    planning.put(long_search(digest, 1))
    assert planning.works()
    before = planning.family()
    os.kill(before[0], signal.SIGKILL)
    ready = planning.next()
    assert isinstance(ready, PlanReady) and ready.failure is None and ready.plan
    assert planning.process.pid != before[0]
    assert eventually(lambda: none_alive(before))
    assert not list(planning.store.folder.glob("*-*")), "nothing is left of what it was at"


def test_a_job_at_which_two_processes_were_killed_fails_and_the_next_is_done(
    planning: Planning,
) -> None:
    digest = planning.opened(squeezenet1_1(64))
    planning.put(long_search(digest, 1))
    killed: list[int] = []
    for _ in range(limits.PLANNING_TRIES):
        assert eventually(lambda: planning.pid not in killed, WITHIN_S)
        killed.append(planning.pid)
        assert planning.works(), "it starts"
        os.kill(killed[-1], signal.SIGKILL)
    failed = planning.next()
    assert isinstance(failed, PlanReady) and failed.deployment == 1
    assert failed.failure is not None and failed.failure.error == "ClusterUnavailable"
    assert "SIGKILL" in failed.failure.message and failed.failure.hint
    assert planning.planned(making(digest, 2, signature=LARGE)).failure is None


def test_one_that_was_killed_while_idle_is_there_again_and_knows_what_to_spare(
    tmp_path: Path,
) -> None:
    planning = Planning(tmp_path / "blobs")
    try:
        planning.store.max_bytes = 0
        digest = planning.opened(small_model())
        other = hashlib.sha256(b"other").hexdigest()
        planning.store.put(other, b"other")
        for path in planning.store.folder.iterdir():
            os.utime(path, (1, 1))  # long ago
        planning.process.kill()
        second = planning.opened(small_model(seed=1))
        assert planning.planned(making(second, 1)).failure is None
        assert planning.store.path(digest).exists(), "opened by one that is dead"
        assert not planning.store.path(other).exists()
    finally:
        planning.thread.close()


def test_closing_while_it_searches_ends_it_and_all_that_it_started(planning: Planning) -> None:
    digest = planning.opened(squeezenet1_1(64))
    planning.put(long_search(digest, 1))
    assert planning.works()
    family = planning.family()
    assert len(family) >= 2
    planning.thread.close()
    assert not any(thread.is_alive() for thread in planning.thread._threads)
    assert eventually(lambda: none_alive(family))
    assert planning.posted.empty()


def slow_to_import() -> ModelProto:
    """onnxruntime folds for seconds."""
    b = Builder(0)
    x = b.input("x", [1])
    shape = b.const(np.array([limits.FOLDED_BYTES // 4]))
    for i in range(40):
        value = helper.make_tensor("value", TensorProto.FLOAT, [1], [i])
        x = b.add(x, b.op("ReduceMax", b.op("ConstantOfShape", shape, value=value), keepdims=0))
    return b.model([b.rename(x, "y")])


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_no_fork_that_imports_outlives_it(planning: Planning, how: str) -> None:
    data = slow_to_import().SerializeToString()
    digest = hashlib.sha256(data).hexdigest()
    planning.store.put(digest, data)
    planning.put(OpenModel(1, digest, None))
    assert eventually(lambda: len(planning.family()) == 3, WITHIN_S), "it, and two that import"
    family = planning.family()
    if how == "closed":
        planning.thread.close()
    else:
        planning.process.kill()
    assert eventually(lambda: none_alive(family))


def test_what_imports_for_one_that_is_killed_is_ended_before_its_folder_is_removed(
    planning: Planning,
) -> None:
    """1. it imports; 2. what imports is held up; 3. it is killed, and so is the next one."""
    data = slow_to_import().SerializeToString()
    digest = hashlib.sha256(data).hexdigest()
    planning.store.put(digest, data)
    planning.put(OpenModel(1, digest, None))
    families: list[list[int]] = []
    for _ in range(limits.PLANNING_TRIES):
        known = [pids[0] for pids in families]
        assert eventually(lambda: planning.pid not in known, WITHIN_S)  # noqa: B023
        assert eventually(lambda: len(planning.family()) == 3, WITHIN_S), "it, and two that import"
        families.append(planning.family())
        for pid in families[-1][1:]:
            os.kill(pid, signal.SIGSTOP)  # they see nothing of what becomes of it
        os.kill(families[-1][0], signal.SIGKILL)
    opened = planning.next()
    assert isinstance(opened, ModelOpened) and opened.failure is not None
    assert none_alive([pid for family in families for pid in family]), "before it is told"
    assert [path.name for path in planning.store.folder.iterdir()] == [digest]


def test_it_ends_when_the_coordinator_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from cluster.blobs import BlobStore\n"
        "from cluster.planning import PlanningThread\n"
        "thread = PlanningThread(BlobStore(Path(sys.argv[1])), print)\n"
        "print(thread._process._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "blobs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert eventually(lambda: len(psutil.Process(pid).children()) == 1, 30.0)
        family = [pid, psutil.Process(pid).children()[0].pid]
        parent.kill()
    assert eventually(lambda: none_alive(family))


# --- what nobody waits for ------------------------------------------------------------------------


NICER = """
import sys
from pathlib import Path
from processes import small_model
from test_planning import Planning
planning = Planning(Path(sys.argv[1]))
planning.opened(small_model())
planning.thread.close()
"""


def test_a_coordinator_that_is_nicer_than_its_planning_plans_all_the_same(tmp_path: Path) -> None:
    """As a service with Nice=10, or under nice(1): nobody but root may take niceness back."""
    without = ["setpriv", "--bounding-set", "-sys_nice"] if os.geteuid() == 0 else []
    command = [*without, "nice", "-n", "15", sys.executable, "-c", NICER, str(tmp_path / "blobs")]
    here = Path(__file__).resolve().parent
    path = os.pathsep.join((str(here), str(here.parent), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def beside(effect: MakePlan, plan: str, share: float) -> MakePlan:
    return replace(effect, present=plan, share=share)


@pytest.fixture
def searching(planning: Planning) -> tuple[str, str]:
    """A model and a plan of it."""
    digest = planning.opened(squeezenet1_1(64))
    ready = planning.planned(making(digest, 1, signature=LARGE))
    assert ready.failure is None
    return digest, ready.plan


def test_what_is_urgent_overtakes_a_search_that_nobody_waits_for(
    planning: Planning, searching: tuple[str, str]
) -> None:
    digest, plan = searching
    pid = planning.process.pid
    for number, urgent in enumerate((making(digest, 3, 2, LARGE), OpenModel(4, digest, None))):
        planning.put(beside(long_search(digest, 20 + number), plan, NEVER))
        assert planning.works(0.002)
        planning.put(urgent)
        dropped = planning.next()
        assert dropped == PlanReady(20 + number, dropped=True, search_s=dropped.search_s)  # type: ignore[attr-defined]
        done = planning.next()
        assert isinstance(done, PlanReady | ModelOpened) and done.failure is None
    assert planning.process.pid == pid, "it went on"


def test_a_search_that_nobody_waits_for_does_not_begin_while_something_else_waits(
    planning: Planning, searching: tuple[str, str]
) -> None:
    digest, plan = searching
    planning.put(making(digest, 2, 8, LARGE), beside(long_search(digest, 3), plan, NEVER))
    planning.put(making(digest, 4, 2, LARGE))
    answers = [planning.next() for _ in range(3)]
    assert [a.deployment for a in answers if isinstance(a, PlanReady)] == [2, 3, 4]
    assert [a.dropped for a in answers if isinstance(a, PlanReady)] == [False, True, False]


def test_one_that_is_killed_at_such_a_search_is_hurried_all_the_same(
    planning: Planning, searching: tuple[str, str]
) -> None:
    digest, plan = searching
    planning.put(beside(long_search(digest, 2), plan, NEVER))
    assert planning.works(0.002)
    planning.process.kill()
    planning.put(making(digest, 3, 2, LARGE))  # the next process is just starting
    answers = [planning.next() for _ in range(2)]
    assert [a.dropped for a in answers if isinstance(a, PlanReady)] == [True, False]


def test_a_plan_that_nobody_wants_any_more_is_not_searched_on(planning: Planning) -> None:
    digest = planning.opened(squeezenet1_1(64))
    never = replace(long_search(digest, 1), share=NEVER, present=None)
    planning.put(never, replace(never, deployment=2, share=1.0))
    planning.put(Discard(2), Discard(7))
    answers = [planning.next() for _ in range(2)]
    assert [a.dropped for a in answers if isinstance(a, PlanReady)] == [True, True]
    planning.put(replace(never, deployment=3))
    assert planning.works(0.002)
    planning.put(Discard(3))
    dropped = planning.next()
    assert isinstance(dropped, PlanReady) and dropped.dropped and dropped.deployment == 3
    long = long_search(digest, 4)
    planning.put(long)
    assert planning.works(0.1)
    planning.put(Discard(4), replace(long, deployment=5))
    answers = [planning.next() for _ in range(2)]
    assert [(a.deployment, a.dropped) for a in answers if isinstance(a, PlanReady)] == [
        (4, True), (5, False),
    ]  # fmt: skip


def test_a_drop_meets_the_search_that_it_names_however_late_or_early_it_comes(
    planning: Planning, searching: tuple[str, str]
) -> None:
    digest, _ = searching  # by the first job, which has ended
    drop = planning.thread._process.drop
    drop(1)
    assert not planning.planned(making(digest, 2)).dropped
    drop(2)
    planning.put(long_search(digest, 3))
    assert planning.works()
    drop(2)
    assert not planning.next().dropped  # type: ignore[attr-defined]
    drop(4)
    assert planning.planned(long_search(digest, 4)).dropped, "told before it was read"
    for _ in range(20_000):
        drop(4)  # never waits
    assert not planning.planned(making(digest, 5)).dropped


def test_such_a_search_takes_no_more_than_its_share_and_says_what_it_took(
    planning: Planning, searching: tuple[str, str]
) -> None:
    digest, plan = searching
    effect = beside(long_search(digest, 2), plan, 0.2)
    before, start = sum(planning.process.cpu_times()[:2]), time.monotonic()
    ready = planning.planned(effect)
    wall, took = time.monotonic() - start, sum(planning.process.cpu_times()[:2]) - before
    assert ready.failure is None and not ready.dropped
    assert took > 20 * limits.SEARCH_SLICE_S, "long enough to tell"
    assert took / wall < 0.25
    assert ready.search_s >= 0.8 * took, "of a processor; more of one that is granted in part"


def test_a_plan_is_the_same_however_slowly_it_was_searched(
    planning: Planning, searching: tuple[str, str]
) -> None:
    digest, _ = searching
    urgent = making(digest, 2, 6, LARGE)
    fast, slow = planning.planned(urgent), planning.planned(replace(urgent, share=0.3))
    assert fast.failure is None and slow.plan == fast.plan and slow.expected == fast.expected


# --- one folder, two processes --------------------------------------------------------------------


def test_one_blob_may_be_put_and_written_by_many_at_once(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    digest = hashlib.sha256(data).hexdigest()
    stores = [BlobStore(tmp_path), *(BlobStore(tmp_path, shared=True) for _ in range(5))]
    failures: list[Exception] = []

    def put(store: BlobStore) -> None:
        try:
            store.put(digest, data)
        except Exception as error:
            failures.append(error)

    half = len(data) // 2
    stores[0].write(digest, 0, len(data), memoryview(data)[:half])
    threads = [threading.Thread(target=put, args=(store,)) for store in stores[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert stores[0].write(digest, half, len(data), memoryview(data)[half:])
    assert [path.name for path in tmp_path.iterdir()] == [digest]
    assert stores[0].path(digest).read_bytes() == data


def test_what_another_process_removed_or_put_is_seen(tmp_path: Path) -> None:
    one, other = BlobStore(tmp_path), BlobStore(tmp_path, 0, shared=True)
    digest = hashlib.sha256(b"a").hexdigest()
    one.put(digest, b"a")
    assert one.missing((digest,)) == other.missing((digest,)) == ()
    os.utime(one.path(digest), (1, 1))
    other.trim()
    assert one.missing((digest,)) == (digest,) == other.missing((digest,))
    other.put(digest, b"a")
    assert one.missing((digest,)) == ()
    other.trim()
    assert one.missing((digest,)) == (), "found just now, so it stays"


def test_what_is_found_while_another_trims_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. one looks at all times; 2. the other finds a blob; 3. the one removes what is old."""
    one, other = BlobStore(tmp_path, 0), BlobStore(tmp_path, shared=True)
    digests = [hashlib.sha256(text).hexdigest() for text in (b"a", b"b")]
    for digest, text in zip(digests, (b"a", b"b"), strict=True):
        one.put(digest, text)
        os.utime(one.path(digest), (1, 1))
    looked = one._remove_unused

    def remove(path: Path, since: float) -> bool:
        assert other.missing((digests[0],)) == ()
        return looked(path, since)

    monkeypatch.setattr(one, "_remove_unused", remove)
    one.trim()
    assert [path.name for path in tmp_path.iterdir()] == [digests[0]]


def test_opening_a_folder_that_is_shared_leaves_what_is_half_written(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.write("ab" * 32, 0, 10, memoryview(b"12345"))
    BlobStore(tmp_path, shared=True)
    assert len(list(tmp_path.iterdir())) == 1
    BlobStore(tmp_path)
    assert not list(tmp_path.iterdir())
