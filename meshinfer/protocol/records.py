"""What messages are made of: names, numbers within bounds, and records. See ``messages``."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from meshinfer import limits
from meshinfer.plan import Shard

Name = Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]
Text = Annotated[str, Meta(max_length=limits.PLAN_TEXT_BYTES)]
Word = Annotated[str, Meta(max_length=limits.NAME_CHARS)]
Label = Annotated[str, Meta(max_length=limits.LABEL_CHARS)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Hash = Annotated[str, Meta(max_length=32)]
"""xxh3-128 of tensors, against mistakes and not against malice; empty where nobody told it."""

Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
"""Ed25519, of what ``manifest`` says; zeros where nobody has signed yet, so that no signature makes
a message longer than it was found to be."""

UNSIGNED = bytes(64)

Seconds = Annotated[float, Meta(ge=0, le=1e9)]
"""No NaN and no infinity: a deadline that never comes would hold a request for ever."""

Rate = Annotated[float, Meta(ge=0, le=1e24)]
Shape = Annotated[tuple[Count, ...], Meta(max_length=limits.TENSOR_RANK)]
Names = Annotated[tuple[Name, ...], Meta(max_length=limits.DEVICES)]
Pins = Annotated[dict[Name, Names], Meta(max_length=limits.PINS)]
Budgets = Annotated[dict[Name, Count], Meta(max_length=limits.DEVICES)]
Place = tuple[int, int]
"""A task as (stage, task); the source is (-1, 0), the sink (number of stages, 0)."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of what messages are made of."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Base of all messages; the tag is the class name."""


BESIDE_COORDINATOR = "0.0.0.0"


class Peer(Record, frozen=True, forbid_unknown_fields=False):
    """Where a peer's bulk socket is bound, and the CURVE public key (Z85) that it serves with.

    ``host`` may be ``BESIDE_COORDINATOR``: the address by which the reader reached the coordinator,
    which alone knows no address that is right for all networks it is in.
    """

    device: Name
    incarnation: Name
    host: Name
    port: Annotated[int, Meta(ge=1, le=65535)]
    key: Annotated[str, Meta(min_length=40, max_length=40)]

    @property
    def id(self) -> str:
        return f"{self.device}#{self.incarnation}"


class Facts(Record, frozen=True, forbid_unknown_fields=False):
    """What a device says of itself. ``flops_per_s`` is measured on its engine.

    ``memory_bytes`` is what MeshInfer may use. ``cpu_quota``: processors granted, 0 for all.
    ``rates``: FLOP/s by ``cost.OpKind``, 0 where unknown; ``memory_bytes_per_s``, ``kernel_s``,
    ``overhead_s``, ``message_s`` and ``byte_s`` as in ``cost.DeviceProfile``, 0 where unknown.
    ``last_exit`` is why its worker process ended the last time, as its supervisor saw it.
    ``paced``: it sleeps to be as slow as it says.
    """

    host: Word = ""
    cores: Count = 0
    memory_bytes: Count = 0
    architecture: Word = ""
    processor: Word = ""
    system: Word = ""
    engine: Word = ""
    version: Word = ""
    threads: Count = 1
    last_exit: Label = ""
    flops_per_s: Rate = 0.0
    cpu_quota: Rate = 0.0
    rates: Annotated[tuple[Rate, ...], Meta(max_length=limits.OPERATOR_KINDS)] = ()
    memory_bytes_per_s: Rate = 0.0
    kernel_s: Seconds = 0.0
    overhead_s: Seconds = 0.0
    message_s: Seconds = 0.0
    byte_s: Seconds = 0.0
    computes: bool = True
    head: bool = False
    paced: bool = False


class Ended(Record, frozen=True, forbid_unknown_fields=False):
    """How a device's last worker process ended, as its supervisor saw it.

    ``killed``: somebody else ended it (a plain SIGKILL or SIGTERM), not a fault and not the want of
    memory. ``request`` and ``attempt``: whose task ``place`` it computed then; empty: of nobody.
    """

    cause: Annotated[str, Meta(max_length=limits.CAUSE_CHARS)]
    killed: bool = False
    request: Word = ""
    attempt: Count = 0
    place: Place = (0, 0)

    @property
    def text(self) -> str:
        """For people: the cause, and what was computed."""
        if not self.request:
            return self.cause
        return f"{self.cause}, computing task {self.place} of request {self.request}"


class Link(Record, frozen=True):
    """What transfers from one device to ``peer`` came to, encrypted and acknowledged.

    ``bytes_per_s``: of long messages; ``latency_s``: one way, of short ones. 0 where unknown.
    """

    peer: Name
    bytes_per_s: Rate = 0.0
    latency_s: Seconds = 0.0


class Failure(Record, frozen=True, forbid_unknown_fields=False):
    """An error of ``meshinfer.errors`` by its name."""

    error: Name
    message: Text
    hint: Text = ""
    retry_after_s: Seconds | None = None


class Blob(Record, frozen=True):
    """Bytes by their SHA-256."""

    digest: Hex
    nbytes: Count


class Tensor(Record, frozen=True):
    """Name, numpy type string and shape of a tensor."""

    name: Name
    dtype: Annotated[str, Meta(max_length=16)]
    shape: Shape


Tensors = Annotated[tuple[Tensor, ...], Meta(max_length=limits.LISTED)]


class Piece(Record, frozen=True):
    """One awaited part of an input value; ``slot`` is its number among all that its task awaits.
    ``half``: it may come as float16 of a float32 value."""

    shard: Shard
    producer: Place
    slot: Count
    half: bool = False


class Value(Record, frozen=True):
    """An input value of a task: its box, and the pieces that it is merged from. ``dtype``: of its
    elements, as a numpy type string; empty where nobody said."""

    name: Name
    box: Shard
    pieces: Annotated[tuple[Piece, ...], Meta(max_length=limits.LISTED)]
    dtype: Annotated[str, Meta(max_length=16)] = ""


Assigned = tuple[int, int, int]
"""A task (stage, task) of several devices, and which of them takes it for this attempt: its
position among the task's devices. Two entries of one task: both do."""

Assignment = Annotated[tuple[Assigned, ...], Meta(max_length=2 * limits.LISTED)]


class Send(Record, frozen=True):
    """A piece of what a task made, for a task on ``device``, which awaits it as number ``slot``.

    Where ``others`` may take that task as well, the attempt's assignment says which of them does;
    if they are ``spare``, it is ``device`` unless the assignment says otherwise. ``half``: it is
    rounded to float16, whichever device takes it, and travels so.
    """

    piece: Shard
    device: Name
    consumer: Place
    slot: Count
    others: Names = ()
    half: bool = False
    spare: bool = False


class Output(Record, frozen=True):
    """An output of a submodel: tensor name and what it holds."""

    name: Name
    shard: Shard


class Program(Record, frozen=True):
    """A task, lowered for its device. ``model`` and ``weights`` are blobs by SHA-256.

    The source and the sink are programs too, without a model. ``devices``: all that have this
    program, where the task may go to any of them; empty where it is this device's alone. If
    ``spare``, the first of them runs it, and one of the others only when that is lost.
    """

    place: Place
    devices: Names = ()
    model: Hex | None = None
    weights: Annotated[tuple[Hex, ...], Meta(max_length=limits.LISTED)] = ()
    inputs: Annotated[tuple[Value, ...], Meta(max_length=limits.LISTED)] = ()
    outputs: Annotated[tuple[Output, ...], Meta(max_length=limits.LISTED)] = ()
    sends: Annotated[tuple[Send, ...], Meta(max_length=limits.LISTED)] = ()
    spare: bool = False

    @property
    def free(self) -> bool:
        """Whether each request's task goes to whichever device is free."""
        return bool(self.devices) and not self.spare

    @property
    def spares(self) -> tuple[Name, ...]:
        """Who may run it if its own device is lost, the first one first."""
        return self.devices[1:] if self.spare else ()

    def is_own(self, device: str) -> bool:
        """Whether a device runs the task unless it is assigned otherwise."""
        return not self.devices or (self.spare and self.devices[0] == device)


class Done(Record, frozen=True, kw_only=True):
    """What one task took. ``sent_bytes`` left its device for others.

    ``waited_s``: its device had nothing to do until its last piece came. ``queued_s``: from then
    until its kernels' turn. ``handed_s``: to the compute thread and back, beside ``compute_s``.
    ``lasting_s``: what it would take on a device that goes on computing; 0 where not known.
    """

    place: Place
    compute_s: Seconds
    sent_bytes: Count
    waited_s: Seconds = 0.0
    queued_s: Seconds = 0.0
    handed_s: Seconds = 0.0
    lasting_s: Seconds = 0.0


class TaskTime(Done, frozen=True, kw_only=True):
    """What one task took, and on which device."""

    device: Name


class ModelInfo(Record, frozen=True):
    """A deployed model version."""

    name: Name
    version: Count
    digest: Hex
    current: bool
    inputs: Annotated[tuple[Name, ...], Meta(max_length=limits.LISTED)] = ()
    outputs: Annotated[tuple[Name, ...], Meta(max_length=limits.LISTED)] = ()
    image: Text | None = None
    plans: Annotated[tuple[Text, ...], Meta(max_length=limits.LISTED)] = ()
