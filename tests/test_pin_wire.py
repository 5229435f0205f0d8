"""What is pinned never crosses a cable of the lab, in any form: every packet is read and searched.

Pixels and weights are small integers (or such over a power of two), so that no kernel rounds: a
feature has the same bytes whoever computes it, and can be looked for like the pixels.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from architectures import Builder
from onnx import ModelProto, TensorProto, helper

import meshinfer as mi
from cluster.lab import DeviceSpec, Lab, LabCluster

LONG_S = 60.0
RUN_BYTES = 32
"""So many bytes in a row, wherever they begin, are recognised."""
DIFFERENT = 8
"""Bytes of so few values are no secret: what a Relu left is zeros."""
SIZE = 48
CAPTURE_BYTES = 128 << 20
PIN = {"image": ["head"]}

USER = """
import json, sys
import numpy as np
import meshinfer as mi
folder, name, deploy, image = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
spec = mi.ImageSpec.from_json(image) if image else None
with mi.Client() as client:
    client.deploy(name, f"{folder}/{name}.onnx", spread=True, image=spec, **deploy)
    data = dict(np.load(f"{folder}/in.npz"))
    for _ in range(2):
        result = client.infer(name, data["image"] if spec else data)
    np.savez(f"{folder}/out.npz", **result.outputs)
    print(result.plan)
"""

LISTENER = """
import select, socket, struct, sys
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
wire.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE
wire.bind(("eth0", 0))
print("ready", flush=True)
most, left, over = int(sys.argv[2]), int(sys.argv[2]), False
with open(sys.argv[1], "wb") as file:
    while left > 0:
        awaited, wait_s = ([wire], 0.0) if over else ([wire, sys.stdin], None)
        ready = select.select(awaited, [], [], wait_s)[0]
        if wire in ready:
            packet = wire.recv(1 << 17)
            left -= len(packet)
            file.write(struct.pack("<I", len(packet)) + packet)
        elif over:
            break
        over = over or sys.stdin in ready
seen, dropped = struct.unpack("II", wire.getsockopt(263, 6, 8))  # PACKET_STATISTICS
print(dropped if left > 0 else "full", flush=True)
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its input, and all values that are nothing but the input in another form."""

    model: ModelProto
    inputs: Mapping[str, np.ndarray]
    rewritten: tuple[str, ...] = ()
    image: mi.ImageSpec | None = None


def features(b: Builder, x: str) -> ModelProto:
    """Two convolutions whose sums float32 holds exactly: 12 + 5 + 6 bits."""

    def weights(shape: tuple[int, ...]) -> str:
        return b.const(b.rng.integers(-1, 2, shape).astype(np.float32))

    x = b.op("Relu", b.op("Conv", [x, weights((4, 3, 3, 3))], kernel_shape=[3, 3], pads=[1] * 4))
    x = b.op("Conv", [x, weights((4, 4, 3, 3))], kernel_shape=[3, 3], pads=[1] * 4)
    return b.model([b.rename(x, "y")])


def pixels(*shape: int, bits: int = 12) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 1 << bits, shape)


def plain() -> Case:
    """The first operator is a convolution."""
    b = Builder(0)
    x = b.input("image", [1, 3, SIZE, SIZE])
    return Case(features(b, x), {"image": pixels(1, 3, SIZE, SIZE).astype(np.float32)})


def rewriting() -> Case:
    """uint8 with channels last, made a tensor as models do: cast, scaled, transposed."""
    b = Builder(0)
    x = b.input("image", [1, SIZE, SIZE, 3], TensorProto.UINT8)
    cast = b.op("Cast", x, to=TensorProto.FLOAT)
    turned = b.op("Transpose", cast, perm=[0, 3, 1, 2])
    scaled = b.op("Mul", [turned, b.const(np.float32(0.5))])
    moved = b.op("Sub", [scaled, b.const(np.float32([3, 5, 7]).reshape(1, 3, 1, 1))])
    values = {"image": pixels(1, SIZE, SIZE, 3, bits=8).astype(np.uint8)}
    return Case(features(b, moved), values, (cast, turned, scaled, moved))


def rearranging() -> Case:
    """Blue and red change places: only copies."""
    b = Builder(0)
    x = b.input("image", [1, 3, SIZE, SIZE])
    red, green, blue = b.op("Split", [x, b.const(np.int64([1, 1, 1]))], 3, axis=1)
    bgr = b.op("Concat", [blue, green, red], axis=1)
    values = {"image": pixels(1, 3, SIZE, SIZE).astype(np.float32)}
    return Case(features(b, bgr), values, (red, green, blue, bgr))


def picture() -> Case:
    """A picture, by an ImageSpec: uint8 travels, and is scaled on the devices."""
    b = Builder(0)
    spec = mi.ImageSpec(b.input("image", [1, 3, SIZE, SIZE]), scale=1 / 4, mean=(1.0, 2.0, 3.0))
    return Case(features(b, "image"), {"image": pixels(SIZE, SIZE, 3, bits=8).astype(np.uint8)},
                image=spec)  # fmt: skip


CASES = {each.__name__: each for each in (plain, rewriting, rearranging, picture)}


def as_tensor(case: Case) -> dict[str, np.ndarray]:
    """What the model itself reads: of a picture, what the spec says in words."""
    if case.image is None:
        return dict(case.inputs)
    scaled = case.inputs["image"].astype(np.float32) * np.float32(case.image.scale)
    moved = scaled - np.float32(case.image.mean)
    return {"image": np.ascontiguousarray(moved.transpose(2, 0, 1)[None])}


def all_values(case: Case) -> dict[str, np.ndarray]:
    """Every value of the model, as plain onnxruntime computes it."""
    names = [name for node in case.model.graph.node for name in node.output]
    every = ModelProto()
    every.CopyFrom(case.model)
    del every.graph.output[:]
    every.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(
        every.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return dict(zip(names, session.run(None, as_tensor(case)), strict=True))


def forms_of_the_image(case: Case) -> list[np.ndarray]:
    """The image and what was rewritten from it, with channels first and last."""
    values = all_values(case)
    found = [*case.inputs.values(), *as_tensor(case).values(), *(values[n] for n in case.rewritten)]
    return [*found, *(v.transpose(0, 2, 3, 1) for v in found if v.ndim == 4)]


# --- the wire -------------------------------------------------------------------------------------


@contextmanager
def captured(lab: Lab, folder: Path) -> Iterator[list[bytes]]:
    """All that crosses any device's cable meanwhile: the list is filled with TCP streams."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    files = [folder / f"wire-{i}" for i in range(len(lab.devices))]
    listeners = []
    for i, file in enumerate(files):
        script = [sys.executable, "-c", LISTENER, str(file), str(CAPTURE_BYTES)]
        listeners.append(lab.spawn(i, script, limits=False, **pipes))
        assert listeners[-1].stdout is not None and listeners[-1].stdout.readline() == "ready\n"
    found: list[bytes] = []
    yield found
    said = [listener.communicate(timeout=LONG_S)[0] for listener in listeners]
    assert said == ["0\n"] * len(files), "no packet was missed"
    # Both ends of a cable have seen the same.
    found += sorted({stream for file in files for stream in streams(file.read_bytes())})


def streams(capture: bytes) -> list[bytes]:
    """The bytes of each direction of each TCP connection, in order; what is missing, left out."""
    flows: dict[bytes, list[tuple[int, bytes]]] = defaultdict(list)
    at = 0
    while at < len(capture):
        (length,) = struct.unpack_from("<I", capture, at)
        packet, at = capture[at + 4 : at + 4 + length], at + 4 + length
        if packet[12:14] != b"\x08\x00" or packet[23] != socket.IPPROTO_TCP:
            continue
        ip = 14
        tcp = ip + 4 * (packet[ip] & 15)
        end = ip + struct.unpack_from(">H", packet, ip + 2)[0]  # short frames are padded
        body = packet[tcp + 4 * (packet[tcp + 12] >> 4) : end]
        flow = packet[ip + 12 : ip + 20] + packet[tcp : tcp + 4]
        if body:
            flows[flow].append((struct.unpack_from(">I", packet, tcp + 4)[0], body))
    return [joined(segments) for segments in flows.values()]


def joined(segments: list[tuple[int, bytes]]) -> bytes:
    first = segments[0][0]
    # Within 2 GB of the first, before it or after: sequence numbers begin anywhere and wrap.
    placed = sorted(((seq - first + (1 << 31)) % (1 << 32), body) for seq, body in segments)
    stream, reached = bytearray(), 0
    for begin, body in placed:
        if begin + len(body) > reached:
            stream += body[max(0, reached - begin) :]
            reached = begin + len(body)
    return bytes(stream)


def runs_found(values: list[np.ndarray], wire: list[bytes]) -> int:
    """How many times ``RUN_BYTES`` bytes that stand in a row in a value do so on the wire."""
    wanted = set()
    for value in values:
        data = np.ascontiguousarray(value).tobytes()
        wanted |= {data[i : i + RUN_BYTES] for i in range(len(data) - RUN_BYTES + 1)}
    wanted = {run for run in wanted if len(set(run)) >= DIFFERENT}
    return sum(
        stream[i : i + RUN_BYTES] in wanted
        for stream in wire
        for i in range(len(stream) - RUN_BYTES + 1)
    )


def test_a_stream_is_put_together_whatever_came_late_twice_or_over_the_end_of_numbers() -> None:
    data = bytes(range(100))
    start = (1 << 32) - 40
    pieces = [(0, 30), (50, 80), (30, 50), (20, 60), (0, 30), (80, 100)]
    assert joined([((start + a) % (1 << 32), data[a:b]) for a, b in pieces]) == data
    assert runs_found([np.frombuffer(data, np.uint8)], [b"x" + data[3:35] + b"y"]) == 1
    assert runs_found([np.frombuffer(data, np.uint8)], [b"x" + data[3:34] + b"y"]) == 0


# --- the cluster ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(lab_here: None) -> Iterator[Lab]:
    with Lab([DeviceSpec(name, 1.0) for name in ("a", "b", "c")]) as made:
        yield made


@pytest.fixture(scope="module")
def readable(lab: Lab) -> LabCluster:
    return lab.start_cluster(plaintext=True)


@dataclass(frozen=True, slots=True)
class Asked:
    """What was planned, and how often the image and its features were seen on the wire."""

    plan: mi.Plan
    images: int
    features: int


def ask(lab: Lab, running: LabCluster, folder: Path, case: Case, **deploy: object) -> Asked:
    """Deploy and infer on device 0, whose host is the coordinator's; the answer is exact."""
    onnx.save(case.model, folder / "net.onnx")
    np.savez(folder / "in.npz", **case.inputs)
    image = "" if case.image is None else case.image.to_json()
    script = [sys.executable, "-c", USER, str(folder), "net", json.dumps(deploy), image]
    with captured(lab, folder) as wire:
        user = lab.spawn(0, script, env=running.environment, stdout=subprocess.PIPE, text=True)
        said, _ = user.communicate(timeout=LONG_S)
    assert user.returncode == 0
    values = all_values(case)
    np.testing.assert_array_equal(np.load(folder / "out.npz")["y"], values["y"])
    assert sum(map(len, wire)) > 10_000, "it was listened to"
    inner = [value for name, value in values.items() if name not in {"y", *case.rewritten}]
    plan = mi.Plan.parse(said)
    return Asked(plan, runs_found(forms_of_the_image(case), wire), runs_found(inner, wire))


def others_at_first(plan: mi.Plan) -> set[str]:
    """Devices that read the input, and are not on its host."""
    return {device for task in plan.stages[0].tasks for device in task.devices} - {"a"}


@pytest.mark.root
@pytest.mark.parametrize("name", CASES)
def test_a_pinned_image_crosses_no_cable_in_any_form_and_features_do(
    lab: Lab, readable: LabCluster, tmp_path: Path, name: str
) -> None:
    asked = ask(lab, readable, tmp_path, CASES[name](), pin=PIN)
    assert {"b", "c"} & set(asked.plan.devices()) and not others_at_first(asked.plan), "a split"
    assert asked.images == 0
    assert asked.features > 0


@pytest.mark.root
@pytest.mark.parametrize("name", CASES)
def test_without_a_pin_the_same_image_is_found(
    lab: Lab, readable: LabCluster, tmp_path: Path, name: str
) -> None:
    asked = ask(lab, readable, tmp_path, CASES[name]())
    assert others_at_first(asked.plan)
    assert asked.images > 0


@pytest.mark.root
def test_of_what_is_encrypted_neither_is_found_pinned_or_not(lab: Lab, tmp_path: Path) -> None:
    cluster = lab.start_cluster()
    case = picture()
    free = ask(lab, cluster, tmp_path, case)
    assert others_at_first(free.plan) and (free.images, free.features) == (0, 0)
    pinned = ask(lab, cluster, tmp_path, case, pin=PIN)
    assert set(pinned.plan.devices()) > {"a"} and (pinned.images, pinned.features) == (0, 0)
