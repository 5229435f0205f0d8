"""Every message of the protocol, on one screen each way. Unknown fields and types are refused.

Only ``Hello`` and ``Refused`` (and what they hold) may carry fields of a later release: they are
how two releases find out that they cannot work together.

Messages carry no pickle and no code. Times are seconds; remaining time, never a wall clock.
``device#incarnation`` is a peer; ids of requests are chosen by clients.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from meshinfer import limits
from meshinfer.plan import Shard

PROTOCOL = (1, 1)
"""Protocol versions that this release speaks, first and last (RELIABILITY: N-1 to N)."""

Name = Annotated[str, Meta(min_length=1, max_length=limits.NAME_CHARS)]
Text = Annotated[str, Meta(max_length=limits.PLAN_TEXT_BYTES)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
"""No NaN and no infinity: a deadline that never comes would hold a request for ever."""

Rate = Annotated[float, Meta(ge=0, le=1e24)]
Shape = Annotated[tuple[Count, ...], Meta(max_length=limits.TENSOR_RANK)]
Place = tuple[int, int]
"""A task as (stage, task); the source is (-1, 0), the sink (number of stages, 0)."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Base of all messages; the tag is the class name."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of what messages are made of."""


# --- Records ------------------------------------------------------------------------------------


class Peer(Record, frozen=True, forbid_unknown_fields=False):
    """Where a peer's bulk socket is bound, and the CURVE public key (Z85) that it serves with."""

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

    ``last_exit`` is why its worker process ended the last time, as its supervisor saw it.
    """

    host: str = ""
    cores: Count = 0
    memory_bytes: Count = 0
    architecture: str = ""
    system: str = ""
    engine: str = ""
    version: str = ""
    threads: Count = 1
    last_exit: str = ""
    flops_per_s: Rate = 0.0
    computes: bool = True
    head: bool = False


class Failure(Record, frozen=True, forbid_unknown_fields=False):
    """An error of ``meshinfer.errors`` by its name."""

    error: Name
    message: Text
    hint: Text = ""
    retry_after_s: Seconds | None = None


class Tensor(Record, frozen=True):
    """Name, numpy type string and shape of a tensor."""

    name: Name
    dtype: Annotated[str, Meta(max_length=16)]
    shape: Shape


class Piece(Record, frozen=True):
    """One awaited part of an input value."""

    shard: Shard
    producer: Place


class Value(Record, frozen=True):
    """An input value of a task: its box, and the pieces that it is merged from."""

    name: Name
    box: Shard
    pieces: tuple[Piece, ...]


class Send(Record, frozen=True):
    """A piece of what a task made, for a task on ``device``."""

    piece: Shard
    device: Name
    consumer: Place


class Output(Record, frozen=True):
    """An output of a submodel: tensor name and what it holds."""

    name: Name
    shard: Shard


class Program(Record, frozen=True):
    """A task, lowered for its device. ``model`` and ``weights`` are blobs by SHA-256.

    The source and the sink are programs too, without a model.
    """

    place: Place
    model: Hex | None = None
    weights: tuple[Hex, ...] = ()
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Output, ...] = ()
    sends: tuple[Send, ...] = ()


class TaskTime(Record, frozen=True):
    """What one task took on its device. ``sent_bytes`` left the device for others."""

    device: Name
    place: Place
    compute_s: Seconds
    sent_bytes: Count


class DeviceInfo(Record, frozen=True):
    """A device as ``meshinfer devices`` shows it."""

    device: Name
    state: str
    facts: Facts
    heard_s: Seconds
    computing: str = ""
    tasks_done: Count = 0


class ModelInfo(Record, frozen=True):
    """A deployed model version."""

    name: Name
    version: Count
    digest: Hex
    current: bool
    inputs: tuple[Name, ...] = ()
    image: Text | None = None
    plans: tuple[Text, ...] = ()


# --- Joining and staying ------------------------------------------------------------------------


class Hello(Message, frozen=True, forbid_unknown_fields=False):
    """First message of a worker or client. ``protocol``: the versions it speaks."""

    role: str
    device: Name
    incarnation: Name
    cluster: Name
    protocol: tuple[int, int]
    version: str = ""
    bulk: Peer | None = None
    facts: Facts = Facts()


class Welcome(Message, frozen=True):
    """The coordinator admits the peer. ``bulk``: the coordinator's; ``head``: the head device's."""

    coordinator: Name
    protocol: int
    bulk: Peer
    head: Peer | None = None


class Refused(Message, frozen=True, forbid_unknown_fields=False):
    """The coordinator does not admit the peer; both sides print the text."""

    failure: Failure


class Heartbeat(Message, frozen=True):
    """Every 500 ms. ``computing``: what the compute thread does, for ``since_s`` seconds."""

    computing: str = ""
    since_s: Seconds = 0.0


class Alive(Message, frozen=True):
    """The coordinator's answer to a client's heartbeat."""


class Who(Message, frozen=True):
    """The coordinator does not know this peer: say hello again."""


class Probe(Message, frozen=True):
    """Sent to see whether a connection still stands; needs no answer."""


class Goodbye(Message, frozen=True):
    """A worker wants to leave: plan without it, then dismiss it."""


class Dismiss(Message, frozen=True):
    """The coordinator needs the worker no more."""


class Closing(Message, frozen=True):
    """The coordinator stops; workers look for it again, clients fail what is open."""


# --- Blobs --------------------------------------------------------------------------------------


class Want(Message, frozen=True):
    """Send me these bytes of a blob."""

    digest: Hex
    offset: Count
    length: Annotated[int, Meta(gt=0, le=limits.BLOB_CHUNK_BYTES)]


class Chunk(Message, frozen=True):
    """Bytes of a blob, behind the header. ``total`` is the blob's size."""

    digest: Hex
    offset: Count
    total: Count


class Gone(Message, frozen=True):
    """The wanted blob is not here."""

    digest: Hex


# --- Deploying ----------------------------------------------------------------------------------


class Deploy(Message, frozen=True):
    """Deploy a model whose bytes the client serves as a blob. ``shapes`` fixes dynamic inputs."""

    call: Name
    name: Name
    digest: Hex
    nbytes: Count
    plan: Text | None = None
    image: Text | None = None
    shapes: dict[str, Shape] | None = None
    spread: bool = False


class Deployed(Message, frozen=True):
    """Answer to ``Deploy``."""

    call: Name
    name: Name = "?"
    version: Count = 0
    plan: Text | None = None
    report: tuple[str, ...] = ()
    image: Text | None = None
    failure: Failure | None = None


class Install(Message, frozen=True):
    """Prepare these programs. ``peers``: where their sends go."""

    deployment: Count
    programs: tuple[Program, ...]
    peers: tuple[Peer, ...]


class Installed(Message, frozen=True):
    """The programs of a deployment are prepared, or why not."""

    deployment: Count
    failure: Failure | None = None


class Forget(Message, frozen=True):
    """The programs of a deployment are needed no more."""

    deployment: Count


# --- Requests -----------------------------------------------------------------------------------


class Submit(Message, frozen=True):
    """Header of a request; its tensors go to the source device. ``deadline_s`` is what remains.

    ``turn`` counts how often the client has sent this request; its ``Feed`` has the same.
    """

    request: Name
    model: Name
    version: Count | None
    inputs: tuple[Tensor, ...]
    picture: bool
    deadline_s: Seconds
    turn: Count = 0


class Start(Message, frozen=True):
    """To the source and the sink: run this attempt; the answer goes to ``client``.

    The coordinator numbers attempts upwards over all requests, so that none comes twice for an id.
    """

    request: Name
    attempt: Count
    deployment: Count
    client: Name


class TaskDone(Message, frozen=True):
    request: Name
    attempt: Count
    place: Place
    compute_s: Seconds
    sent_bytes: Count


class TaskFailed(Message, frozen=True):
    """A kernel failed; ``text`` is the engine's own."""

    request: Name
    attempt: Count
    place: Place
    text: Text


class Unreachable(Message, frozen=True):
    """``peer`` does not acknowledge the pieces of this attempt."""

    request: Name
    attempt: Count
    peer: str


class Merged(Message, frozen=True):
    """The sink has merged and sent all outputs."""

    request: Name
    attempt: Count


class Release(Message, frozen=True):
    """The request is over: drop all that is held for it, up to this attempt and ``client``'s turn.

    What comes later for a later attempt or turn, or from another client, is the same id again.
    """

    request: Name
    attempt: Count = 0
    client: str = ""
    turn: Count = 0


class Cancel(Message, frozen=True):
    """The client does not want the answer any more, nor the inputs held that it gave till now."""

    request: Name
    turn: Count = 0


class Reply(Message, frozen=True):
    """The outcome of a request; its tensors come from the sink."""

    request: Name
    version: Count = 0
    plan: Text = ""
    attempts: Count = 0
    total_s: Seconds = 0.0
    queue_s: Seconds = 0.0
    degraded: bool = False
    tasks: tuple[TaskTime, ...] = ()
    failure: Failure | None = None


# --- Tensors (bulk) -----------------------------------------------------------------------------


class Deliver(Message, frozen=True):
    """A piece of a value for a task; raw bytes behind. ``id`` is acknowledged."""

    id: Count
    request: Name
    attempt: Count
    deployment: Count
    consumer: Place
    piece: Shard
    tensor: Tensor


class Feed(Message, frozen=True):
    """An input of a request, from the client to the source."""

    id: Count
    request: Name
    tensor: Tensor
    turn: Count = 0


class Answer(Message, frozen=True):
    """An output of a request, from the sink to the client. ``last``: how many there are."""

    id: Count
    request: Name
    attempt: Count
    tensor: Tensor
    count: Count


class Ack(Message, frozen=True):
    """``Deliver``, ``Feed`` or ``Answer`` with this id has arrived."""

    id: Count


# --- Questions ----------------------------------------------------------------------------------


class ListDevices(Message, frozen=True):
    call: Name


class Devices(Message, frozen=True):
    call: Name
    devices: tuple[DeviceInfo, ...]


class ListModels(Message, frozen=True):
    call: Name


class Models(Message, frozen=True):
    call: Name
    models: tuple[ModelInfo, ...]


AnyMessage = (
    Hello | Welcome | Refused | Heartbeat | Alive | Who | Probe | Goodbye | Dismiss | Closing
    | Want | Chunk | Gone | Deploy | Deployed | Install | Installed | Forget
    | Submit | Start | TaskDone | TaskFailed | Unreachable | Merged | Release | Cancel | Reply
    | Deliver | Feed | Answer | Ack | ListDevices | Devices | ListModels | Models
)  # fmt: skip
