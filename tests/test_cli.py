"""The command line as people and shells meet it: output, exit codes, daemons that stop."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cli.options import parse_memory, settings
from cluster.keyring import new_keyring, write_keyring
from meshinfer.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
UPSCALER = ROOT / "cluster" / "data" / "upscale.onnx"
LONG_S = 30.0

Done = subprocess.CompletedProcess[str]


def environment(state: Path) -> dict[str, str]:
    """Ours, but with a state folder of the test, no settings of the user's, and this checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MESHINFER_")}
    here = {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(state / "config")}
    return {**kept, **here, "MESHINFER_STATE_DIR": str(state)}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", *map(str, arguments)]


def meshinfer(state: Path, *arguments: object, timeout_s: float = LONG_S) -> Done:
    """Run a command to its end."""
    return subprocess.run(
        command(*arguments),
        env=environment(state),
        cwd=state,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def at_once(*runs: Callable[[], Done]) -> list[Done]:
    """Run commands that do not disturb each other, two at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return [each.result() for each in [pool.submit(run) for run in runs]]


@contextlib.contextmanager
def daemon(state: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command that runs until the end of the block, at the longest."""
    with (state / f"{arguments[0]}-{secrets.token_hex(3)}.log").open("w") as log:
        process = subprocess.Popen(
            command(*arguments),
            env=environment(state),
            cwd=state,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=3)
        assert process.stdout is not None
        process.stdout.close()


def until(what: str, check: object) -> None:
    """Wait until the function says yes."""
    deadline = time.monotonic() + LONG_S
    while not check():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def address_of(state: Path, cluster: str, process: subprocess.Popen[str]) -> str:
    path = state / f"coordinator-{cluster}" / "address.json"

    def listening() -> bool:
        assert process.poll() is None, "the coordinator ended"
        return path.exists()

    until("the coordinator listens", listening)
    found = json.loads(path.read_text())
    return f"{found['host']}:{found['port']}"


@dataclass(frozen=True)
class Running:
    """A coordinator without a worker of its own, and one worker."""

    state: Path
    address: str
    cluster: str
    worker: str

    def __call__(self, *arguments: object) -> Done:
        to = ("--coordinator", self.address, "--cluster", self.cluster)
        return meshinfer(self.state, *arguments, *to)

    def refuses(self, *cases: tuple[tuple[object, ...], int, tuple[str, ...]]) -> None:
        """Each command ends with its code and its words."""
        runs = [functools.partial(self, *arguments) for arguments, *_ in cases]
        for done, (_, code, words) in zip(at_once(*runs), cases, strict=True):
            refused(done, code, *words)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def running(state: Path) -> Iterator[Running]:
    cluster = f"test-{secrets.token_hex(4)}"
    alone = ("--host", "127.0.0.1", "--port", 0, "--no-mdns", "--no-compute")
    with daemon(state, "coordinator", "--cluster", cluster, *alone) as coordinator:
        address = address_of(state, cluster, coordinator)
        options = ("--coordinator", address, "--name", "pi-0", "--threads", 1)
        with daemon(state, "worker", "--cluster", cluster, *options) as worker:
            found = Running(state, address, cluster, "pi-0")
            until("the worker joins", lambda: '"pi-0"' in found("devices", "--json").stdout)
            yield found
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(timeout=LONG_S) == 0, "a worker that is told to stop"
        coordinator.send_signal(signal.SIGTERM)
        assert coordinator.wait(timeout=LONG_S) == 0, "a coordinator that is told to stop"


@pytest.fixture(scope="module")
def small(state: Path) -> Path:
    """y = relu(conv(x)), x float32 [1, 3, 16, 16]."""
    weight = np.random.default_rng(1).normal(size=(4, 3, 3, 3)).astype(np.float32)
    return write_model(
        state / "small.onnx",
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["y"]),
        ],
        {"w": weight},
    )


def write_model(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> Path:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def refused(done: Done, code: int, *words: str) -> None:
    """It ended with this code, said these words and a hint on stderr, nothing on stdout."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr and "hint: " in done.stderr
    for word in words:
        assert word in done.stderr


# --- no cluster -----------------------------------------------------------------------------------


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, "meshinfer 0.1.0\n")


def test_every_command_explains_itself() -> None:
    for name in "coordinator worker devices deploy infer plan demo".split():
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0
        assert "Usage: " in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [["devices", "--colour"], ["deploy", "x"], ["fly"], ["devices", "--log-level", "x"]],
)
def test_a_misspelt_command_is_a_usage_error(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, cluster.cli as c\nfrom typer.testing import CliRunner\n"
        "assert CliRunner().invoke(c.app, ['--help']).exit_code == 0\n"
        "heavy = {'onnx', 'onnxruntime', 'numpy', 'zmq', 'zeroconf'} & {*sys.modules}\n"
        "sys.exit(','.join(heavy) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LONG_S
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_plan_is_printed_that_parses_and_is_drawn(tmp_path: Path, small: Path) -> None:
    drawing = tmp_path / "plan.svg"
    arguments = ["plan", str(small), "--speeds", "1,0.5", "--spread", "--svg", str(drawing)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    plan = Plan.parse(result.stdout)
    assert set(plan.devices()) == {"worker-0", "worker-1"}
    assert "expected" in result.stderr and "worker to worker" in result.stderr
    assert drawing.read_text().startswith("<svg")


def test_a_plan_as_json_says_what_is_expected_of_it(small: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(small), "--devices", "3", "--json"])
    fields = json.loads(result.stdout)
    assert fields["expected_s"] > 0
    assert fields["bound"] and fields["notes"]
    assert str(Plan.parse(fields["plan"])) == fields["plan"]


def test_a_small_model_stays_where_its_input_is_and_the_plan_says_what_others_would_cost(
    small: Path,
) -> None:
    arguments = ["plan", str(small), "--devices", "2", "--mbit", "1", "--head-computes"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "on-device: 0.00 MB a request cross links" in result.stderr
    assert "worker-1 idle: would add" in result.stderr
    lines = result.stderr.splitlines()
    assert len(set(lines)) == len(lines)
    assert not any(line.startswith("head idle") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["plan", "nowhere.onnx"], "nowhere.onnx"),
        (["plan", "upscale"], "--coordinator HOST:PORT"),
        (["plan", str(UPSCALER)], "dynamic shape"),
        (["plan", str(UPSCALER), "--shape", "image:1"], "no shape"),
        (["plan", str(UPSCALER), "--speeds", "1,x"], "no speeds"),
        (["plan", str(UPSCALER), "--speeds", "1,1", "--names", "a"], "names"),
        (["plan", str(UPSCALER), "--picture", __file__], "no picture"),
        (["plan", str(UPSCALER), "--memory", "384"], "write --memory 384MB"),
        (["plan", str(UPSCALER), "--memory", "=1MB"], "no amount of memory"),
        (["plan", str(UPSCALER), "--memory", "1MB", "--memory", "2MB"], "twice for all devices"),
        (["plan", str(UPSCALER), "--memory", "1MB", "--memory", "a=2MB"], "for all devices and"),
        (["plan", str(UPSCALER), "--memory", "a=1MB", "--memory", "a=2MB"], "twice for 'a'"),
        (["plan", str(UPSCALER), "--pin", "image"], "write --pin image=head"),
        (["plan", str(UPSCALER), "--pin", "image=a,,b"], "pins nothing"),
        (["plan", str(UPSCALER), "--pin", "image=a", "--pin", "image=b"], "pinned twice"),
    ],
)
def test_a_plan_of_what_is_wrong_is_refused(arguments: list[str], word: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert word in result.stderr and "hint: " in result.stderr


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("384MB", 384_000_000),
        ("1.5GiB", 3 << 29),
        ("0kb", 0),
        ("pi-0=2KiB", {"pi-0": 2048}),
        ("a=b=1gb", {"a=b": 10**9}),
    ],
)
def test_memory_is_read_in_the_units_that_people_write(text: str, nbytes: object) -> None:
    assert parse_memory([text]) == nbytes


def test_a_plan_keeps_to_the_memory_and_the_pins_given(small: Path) -> None:
    def devices(*flags: str) -> set[str]:
        result = CliRunner().invoke(app, ["plan", str(small), "--devices", "3", "--spread", *flags])
        assert result.exit_code == 0, result.stderr
        return set(Plan.parse(result.stdout).devices())

    assert devices() == {"worker-0", "worker-1", "worker-2"}
    assert devices("--memory", "worker-1=0MB") == {"worker-0", "worker-2"}
    assert devices("--pin", "c=worker-2") == {"worker-2"}  # c is all that there is to compute
    assert devices("--pin", "x=head") == {"worker-0"}, "the first one is on the head's host"
    for flags, word in (
        (("--memory", "1kB"), "would need"),
        (("--memory", "0MB"), "memory=0 is granted to every device"),
        (("--memory", "ghost=1MB"), "'ghost', which does not compute"),
        (("--pin", "nothing=worker-0"), "not in the model"),
        (("--pin", "x=worker-1"), "must hold it as an input"),
    ):
        result = CliRunner().invoke(app, ["plan", str(small), "--devices", "3", *flags])
        assert result.exit_code != 0
        assert word in result.stderr and "hint: " in result.stderr


def test_settings_come_from_flag_then_environment_then_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    def devices(*flags: str) -> int:
        result = CliRunner().invoke(app, ["plan", str(small), "--spread", *flags])
        assert result.exit_code == 0, result.stderr
        return len(Plan.parse(result.stdout).devices())

    monkeypatch.chdir(tmp_path)
    Path("meshinfer.toml").write_text('cluster = "home"\n[plan]\ndevices = 2\n')
    assert devices() == 2
    monkeypatch.setenv("MESHINFER_PLAN_DEVICES", "3")
    assert devices() == 3
    assert devices("--devices", "4") == 4


def test_settings_of_a_command_are_those_of_its_own_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    Path("meshinfer.toml").write_text('cluster = "home"\n[devices]\ntimeout = 3.0\nlost = true\n')
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = settings(commands)["devices"]
    assert found["lost"] is True and found["cluster"] == "home"
    assert found["approve"] == {"cluster": "home", "timeout": 3.0}


@pytest.mark.parametrize("text", ["[plan]\ndevicse = 2\n", "[fly]\n", "clutser = 'x'\n", "= 1"])
def test_a_wrong_settings_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("meshinfer.toml").write_text(text)
    result = CliRunner().invoke(app, ["plan", "x.onnx"])
    assert result.exit_code == 78
    assert "meshinfer.toml" in result.stderr


def test_a_bug_shows_its_traceback_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("planted")

    monkeypatch.setattr("cluster.cli.plans._graph", fail)
    quiet = CliRunner().invoke(app, ["plan", str(UPSCALER)])
    assert quiet.exit_code == 70
    assert "planted" in quiet.stderr and "Traceback" not in quiet.stderr
    loud = CliRunner().invoke(app, ["plan", str(UPSCALER), "--log-level", "debug"])
    assert loud.exit_code == 70
    assert "Traceback" in loud.stderr


def test_ctrl_c_ends_a_command_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.cli.plans._graph", interrupt)
    result = CliRunner().invoke(app, ["plan", str(UPSCALER)])
    assert (result.exit_code, result.output) == (130, "")


def test_without_a_coordinator_commands_end_with_69(tmp_path: Path) -> None:
    ring, _ = new_keyring("nobody")
    write_keyring(tmp_path / "ring.json", ring)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    to = ("--keyring", tmp_path / "ring.json", "--coordinator", f"127.0.0.1:{port}")
    refused(meshinfer(tmp_path, "devices", *to, "--timeout", 1), 69, "no coordinator")


def test_without_a_keyring_commands_end_with_77(tmp_path: Path) -> None:
    for done in at_once(
        lambda: meshinfer(tmp_path, "devices", "--cluster", "never"),
        lambda: meshinfer(tmp_path, "worker", "--keyring", tmp_path / "none.json"),
    ):
        refused(done, 77, "keyring")


# --- a cluster ------------------------------------------------------------------------------------


def test_devices_are_listed(running: Running) -> None:
    done = running("devices")
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split()[:2] == ["DEVICE", "STATE"]
    assert {row.split()[0] for row in rows} == {"head", "pi-0"}
    found = {d["device"]: d for d in json.loads(running("devices", "--json").stdout)}
    assert found["pi-0"]["facts"]["flops_per_s"] > 0
    assert found["pi-0"]["facts"]["threads"] == 1


def test_a_picture_comes_back_doubled(running: Running, tmp_path: Path) -> None:
    Image.effect_noise((37, 23), 64).convert("RGB").save(tmp_path / "noise.png")
    done = running("deploy", "upscale", UPSCALER)
    assert (done.returncode, done.stdout) == (0, "upscale version 1\n"), done.stderr
    done = running("infer", "upscale", tmp_path / "noise.png", "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)
    assert fields["attempts"] == 1 and fields["compute_s"]["pi-0"] > 0
    with Image.open(fields["files"][0]) as image:
        assert (image.format, image.size) == ("PNG", (74, 46))


def test_arrays_are_answered_and_bad_inputs_are_named(
    running: Running, small: Path, tmp_path: Path
) -> None:
    x = np.random.default_rng(2).normal(size=(1, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "good.npy", x)
    np.savez(tmp_path / "named.npz", x=x)
    np.save(tmp_path / "shape.npy", x[:, :, :8])
    np.save(tmp_path / "type.npy", x.astype(np.float64))
    (tmp_path / "text.npy").write_text("no array")
    assert running("deploy", "small", small).returncode == 0
    good, named = tmp_path / "good.npy", tmp_path / "named.npz"
    done = running("infer", "small", good, named, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    expected = ort.InferenceSession(str(small)).run(["y"], {"x": x})[0]
    for stem in ("good", "named"):
        with np.load(tmp_path / f"{stem}-small.npz") as answer:
            np.testing.assert_allclose(answer["y"], expected, rtol=1e-5, atol=1e-5)
    assert "largest: " in running("infer", "small", good).stdout
    bad = [tmp_path / f"{name}.npy" for name in ("shape", "type", "text")]
    done = running("infer", "small", bad[0], good, bad[1], bad[2])
    assert done.returncode == 1
    assert str(good) in done.stdout
    assert all(f"error: {path}: " in done.stderr for path in bad)
    for word in ("[1, 3, 8, 16]", "f8", "cannot read"):
        assert word in done.stderr
    refused(running("infer", "small", bad[0]), 2, "[1, 3, 8, 16]")


def test_a_printed_plan_is_deployed(running: Running, small: Path, tmp_path: Path) -> None:
    planned = running("plan", small)  # on the cluster's own devices
    assert planned.returncode == 0, planned.stderr
    file = tmp_path / "plan.txt"
    file.write_text(planned.stdout)
    done = running("deploy", "planned", small, "--plan", file, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"] == planned.stdout
    assert running("plan", "planned").stdout == planned.stdout
    stranger = meshinfer(running.state, "plan", small, "--devices", 1, "--names", "elsewhere")
    file.write_text(stranger.stdout)
    refused(running("deploy", "planned", small, "--plan", file), 2, "elsewhere")


def test_memory_and_pins_of_a_deployment_are_kept_or_refused(
    running: Running, small: Path, tmp_path: Path
) -> None:
    fits = ("deploy", "fits", small)
    running.refuses(
        ((*fits, "--memory", "1kB"), 75, ("would need", "of 1.0 kB")),
        ((*fits, "--memory", "ghost=1MB"), 2, ("'ghost'",)),
        ((*fits, "--memory", "much"), 2, ("write --memory 384MB",)),
        ((*fits, "--pin", "c=ghost"), 2, ("'ghost'",)),
        ((*fits, "--pin", "c:pi-0"), 2, ("write --pin",)),
        (("plan", small, "--pin", "x=ghost"), 2, ("'ghost'",)),
    )
    kept = ("--memory", "pi-0=64MB", "--pin", f"c={running.worker}")
    done = running("deploy", "fits", small, *kept, "--json")
    assert done.returncode == 0, done.stderr
    assert Plan.parse(json.loads(done.stdout)["plan"]).devices() == (running.worker,)
    planned = running("plan", small, "--pin", "x=head")
    assert planned.returncode == 0, planned.stderr
    assert Plan.parse(planned.stdout).devices() == (running.worker,), "it is on the head's host"


def test_a_plan_for_a_picture_is_used_for_pictures(running: Running, tmp_path: Path) -> None:
    Image.new("RGB", (20, 12), "teal").save(tmp_path / "teal.png")
    given = ("--devices", 1, "--names", running.worker)
    planned = meshinfer(running.state, "plan", UPSCALER, "--picture", tmp_path / "teal.png", *given)
    file = tmp_path / "plan.txt"
    file.write_text(planned.stdout)
    assert running("deploy", "teal", UPSCALER, "--plan", file).returncode == 0
    done = running("infer", "teal", tmp_path / "teal.png", "--out", tmp_path, "--json")
    assert json.loads(done.stdout)["plan"] == planned.stdout


def test_models_that_cannot_run_are_refused(running: Running, small: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(small.read_bytes()[:-40])
    unknown = write_model(
        tmp_path / "unknown.onnx", [helper.make_node("Frobnicate", ["x"], ["y"])], {}
    )
    running.refuses(
        (("deploy", "bad", cut), 2, ()),
        (("deploy", "bad", unknown), 2, ("Frobnicate",)),
        (("deploy", "bad", UPSCALER, "--shape", "image=1,4,8,8"), 2, ("image",)),
        (("deploy", "bad", tmp_path / "none.onnx"), 2, ("none.onnx",)),
    )


def test_an_unknown_model_is_refused(running: Running, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3, np.float32))
    running.refuses(
        (("infer", "nothing", tmp_path / "x.npy"), 2, ("nothing",)),
        (("plan", "nothing"), 2, ("nothing",)),
    )


def test_a_strange_keyring_is_refused(running: Running, tmp_path: Path) -> None:
    ring, _ = new_keyring(running.cluster)
    write_keyring(tmp_path / "ring.json", ring)
    refused(running("devices", "--keyring", tmp_path / "ring.json", "--timeout", 5), 77)


def test_a_port_in_use_and_a_folder_in_use_are_refused(running: Running, tmp_path: Path) -> None:
    port = running.address.rpartition(":")[2]
    alone = ("--host", "127.0.0.1", "--no-mdns", "--no-compute", "--port")
    again = ("coordinator", "--cluster", running.cluster, *alone, 0)
    to = ("--coordinator", running.address, "--cluster", running.cluster)
    taken, held, named = at_once(
        lambda: meshinfer(tmp_path, "coordinator", *alone, port),
        lambda: meshinfer(running.state, *again),
        lambda: meshinfer(running.state, "worker", *to, "--name", running.worker),
    )
    refused(taken, 78, port)
    refused(held, 78)
    assert named.returncode == 78
    assert "--name" in named.stderr


def test_a_second_coordinator_of_a_name_is_refused_and_no_worker_is_said(tmp_path: Path) -> None:
    name = f"test-{secrets.token_hex(4)}"
    alone = ("--host", "127.0.0.1", "--port", 0, "--interface", "127.0.0.1", "--no-compute")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with daemon(first, "coordinator", "--cluster", name, *alone) as process:
        address_of(first, name, process)
        here = ("--interface", "127.0.0.1", "--cluster", name)
        assert "head" in meshinfer(first, "devices", *here).stdout  # found over mDNS
        fixed = ("--shape", "image=1,3,8,8")
        other, deployed = at_once(
            lambda: meshinfer(second, "coordinator", "--cluster", name, *alone),
            lambda: meshinfer(first, "deploy", "x", UPSCALER, *fixed, *here),
        )
        refused(other, 78, name)
        refused(deployed, 69, "no worker")


LOOSE = ("--port", 0, "--no-mdns", "--cluster", "loose")


def test_a_cluster_without_encryption_stays_on_loopback_unless_asked_twice(
    tmp_path: Path,
) -> None:
    cases = (
        (["--insecure"], "at all addresses"),
        (["--insecure", "--host", "0.0.0.0"], "at 0.0.0.0"),
        (["--insecure", "--host", "10.0.0.7"], "at 10.0.0.7"),
        (["--insecure-anywhere"], "--insecure"),
    )
    begin = functools.partial(meshinfer, tmp_path, "coordinator", *LOOSE)
    done = at_once(*(functools.partial(begin, *arguments) for arguments, _ in cases))
    for each, (_, word) in zip(done, cases, strict=True):
        refused(each, 78, word)
    assert not (tmp_path / "coordinator-loose").exists(), "nothing was begun"


def test_a_cluster_without_encryption_works_says_so_and_meets_no_encrypted_one(
    running: Running, small: Path, tmp_path: Path
) -> None:
    here = ("--insecure", "--host", "127.0.0.1", "--name", "beside", "--threads", 1)
    with daemon(tmp_path, "coordinator", *LOOSE, *here) as process:
        to = ("--coordinator", address_of(tmp_path, "loose", process), "--cluster", "loose")
        until(
            "its worker joins",
            lambda: "beside" in meshinfer(tmp_path, "devices", *to).stdout,
        )
        assert meshinfer(tmp_path, "deploy", "small", small, *to).returncode == 0
        given = np.random.default_rng(3).normal(size=(1, 3, 16, 16)).astype(np.float32)
        np.savez(tmp_path / "in.npz", x=given)
        asked = meshinfer(
            tmp_path, "infer", "small", tmp_path / "in.npz", "--out", tmp_path / "out", *to
        )
        assert asked.returncode == 0, asked.stderr
        answers = list((tmp_path / "out").rglob("*.npz"))
        oracle = ort.InferenceSession(small, providers=["CPUExecutionProvider"])
        expected = oracle.run(["y"], {"x": given})[0]
        np.testing.assert_allclose(np.load(answers[0])["y"], expected, rtol=1e-5, atol=1e-5)
        rings = (
            tmp_path / "coordinator-loose" / "keyring.json",
            running.state / f"coordinator-{running.cluster}" / "keyring.json",
        )
        crossed = [
            functools.partial(
                meshinfer, tmp_path, "devices", "--coordinator", at, "--keyring", ring
            )
            for at, ring in zip((running.address, to[1]), rings, strict=True)
        ]
        for done in at_once(*crossed):
            refused(done, 77, "encrypt")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=LONG_S) == 0
    (log,) = tmp_path.glob("coordinator-*.log")
    warnings = [line for line in log.read_text().splitlines() if "NOT ENCRYPTED" in line]
    assert any("who=coordinator" in line for line in warnings)
    assert any("who=beside" in line for line in warnings)
    refused(meshinfer(tmp_path, "coordinator", *LOOSE, "--host", "127.0.0.1"), 78, "encrypt")


def test_a_coordinator_brings_a_worker_and_takes_it_along(tmp_path: Path) -> None:
    name = f"test-{secrets.token_hex(4)}"
    options = ("--host", "127.0.0.1", "--port", 0, "--no-mdns", "--name", "beside")
    with daemon(tmp_path, "coordinator", "--cluster", name, *options) as process:
        address = address_of(tmp_path, name, process)
        to = ("--coordinator", address, "--cluster", name)
        until(
            "its worker joins",
            lambda: "beside" in meshinfer(tmp_path, "devices", *to).stdout,
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=LONG_S) == 0
    # Its worker's folder is free again, so the worker has ended.
    from cluster.processes import hold_folder

    os.close(hold_folder(tmp_path / f"worker-{name}-beside"))
