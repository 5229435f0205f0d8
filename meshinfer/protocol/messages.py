"""Every message of the protocol, on one screen each way. Unknown fields and types are refused.

Only ``Hello`` and ``Refused`` (and what they hold) may carry fields of a later release: they are
how two releases find out that they cannot work together.
Messages carry no pickle and no code. Times are seconds that remain, never a wall clock's.
``device#incarnation`` is a peer; ids of requests are chosen by clients.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from meshinfer import limits

# isort: off
from meshinfer.protocol.records import (
    Assigned as Assigned, Blob as Blob, Budgets as Budgets, Count as Count,
    DeviceInfo as DeviceInfo, Done as Done, Facts as Facts, Failure as Failure, Hex as Hex,
    Link as Link, Message as Message, ModelInfo as ModelInfo, Name as Name, Output as Output,
    Peer as Peer, Piece as Piece, Pins as Pins, Place as Place, Program as Program, Rate as Rate,
    Record as Record, Seconds as Seconds, Send as Send, Shape as Shape, TaskTime as TaskTime,
    Tensor as Tensor, Text as Text, Value as Value,
)  # fmt: skip
from meshinfer.protocol.recovery import Assign as Assign, Lacks as Lacks, NotKept as NotKept

# isort: on
from meshinfer.protocol.report import Report as Report

PROTOCOL = (3, 3)
"""Protocol versions that this release speaks, first and last (RELIABILITY: N-1 to N)."""
Acks = Annotated[tuple[Count, ...], Meta(max_length=limits.ACKS_AT_ONCE)]


# --- Joining and staying ------------------------------------------------------------------------


class Hello(Message, frozen=True, forbid_unknown_fields=False):
    """First message of a worker or client. ``protocol``: the versions it speaks; ``where``: a
    client's machine and address there, or ``BESIDE_COORDINATOR``."""

    role: str
    device: Name
    incarnation: Name
    cluster: Name
    protocol: tuple[int, int]
    version: str = ""
    bulk: Peer | None = None
    facts: Facts = Facts()
    where: str = ""


class Welcome(Message, frozen=True):
    """The coordinator admits the peer. ``bulk``: the coordinator's; ``head``: the head device's.
    ``acts_as``: a client by a device is its requests' source and sink, as this device in plans."""

    coordinator: Name
    protocol: int
    bulk: Peer
    head: Peer | None = None
    acts_as: str = ""


class Refused(Message, frozen=True, forbid_unknown_fields=False):
    """The coordinator does not admit the peer; both sides print the text."""

    failure: Failure


class Heartbeat(Message, frozen=True):
    """Every 500 ms. ``computing``: what the compute thread does, for ``since_s`` seconds."""

    computing: str = ""
    since_s: Seconds = 0.0


class Alive(Message, frozen=True):
    """The answer to a client's heartbeat, and to one out of step: beat in ``beat_in_s`` again."""

    beat_in_s: Seconds = 0.0


class Who(Message, frozen=True):
    """The coordinator does not know this peer: say hello again."""


class Probe(Message, frozen=True):
    """Sent to see whether a connection still stands; needs no answer."""


class Goodbye(Message, frozen=True):
    """A worker wants to leave: plan without it, then dismiss it."""


class Dismiss(Message, frozen=True):
    """The coordinator needs the worker no more."""


class MeasureLink(Message, frozen=True):
    """Measure the link to this peer: echoes over the bulk plane."""

    peer: Peer


class LinkMeasured(Message, frozen=True):
    """What a link came to, 0 where no echo came back; unasked: at most, by real transfers."""

    link: Link
    least_bytes_per_s: Rate = 0.0


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
    """Deploy a model that the client serves, with its external ``weights``, as blobs. ``shapes``
    fixes dynamic inputs. ``pin``: values and the devices that they never leave; ``memory``: bytes
    of each device, or of all, that it may use. ``half_transfers``: float32 goes as float16."""

    call: Name
    name: Name
    digest: Hex
    nbytes: Count
    weights: Annotated[tuple[Blob, ...], Meta(max_length=limits.WEIGHT_FILES)] = ()
    plan: Text | None = None
    image: Text | None = None
    shapes: dict[str, Shape] | None = None
    objective: str = "latency"
    spread: bool = False
    strict: bool = False
    half_transfers: bool = False
    pin: Pins | None = None
    memory: Budgets | Count | None = None


class Deployed(Message, frozen=True):
    """Answer to ``Deploy``."""

    call: Name
    name: Name = "?"
    version: Count = 0
    plan: Text | None = None
    report: Report | None = None
    image: Text | None = None
    failure: Failure | None = None


class Install(Message, frozen=True):
    """Prepare these programs, beside those of this deployment that are there already. ``peers``:
    where their sends go; ``head``: the plan's source and sink, in whose place a request's own may
    be. ``keep_bytes``: of what was made may be kept for devices that take over."""

    deployment: Count
    programs: tuple[Program, ...]
    peers: tuple[Peer, ...]
    head: str = ""
    keep_bytes: Count = limits.KEPT_BYTES


class Installed(Message, frozen=True):
    """The programs of a deployment are prepared, or why not."""

    deployment: Count
    failure: Failure | None = None


class Forget(Message, frozen=True):
    """The programs of a deployment are needed no more."""

    deployment: Count


class Grant(Message, frozen=True):
    """A client may answer itself what it submits like this to the model, or to this version: the
    plan is this one program, and ``device``, whose it is, lies on the client's host. With the same
    ``engine`` and as many ``threads`` only, so that the bits are the device's."""

    deployment: Count
    device: Name
    program: Program
    model: Name
    version: Count
    inputs: tuple[Tensor, ...]
    picture: bool = False
    outputs: tuple[Name, ...] | None = None
    image: Text | None = None
    plan: Text = ""
    engine: str = ""
    threads: Count = 1


class Revoke(Message, frozen=True):
    """It may no longer: another version is the model's now."""

    deployment: Count


class Ran(Message, frozen=True):
    """What a client answered itself since it last said so; ``done``: one request, on average."""

    deployment: Count
    count: Count
    done: Done


# --- Requests -----------------------------------------------------------------------------------


class Submit(Message, frozen=True):
    """Header of a request; its tensors go to the source. ``deadline_s``: what remains; ``outputs``:
    asked for, None: all; ``turn``: how often the client has sent it, as in its ``Feed``."""

    request: Name
    model: Name
    version: Count | None
    inputs: tuple[Tensor, ...]
    picture: bool
    deadline_s: Seconds
    turn: Count = 0
    outputs: Annotated[tuple[Name, ...], Meta(max_length=limits.OUTPUTS_ASKED)] | None = None


class Start(Message, frozen=True):
    """To source and sink: run this attempt (numbers go up over all requests); the answer goes to
    ``client``. ``assigned``: who takes tasks of several devices. ``head``: the peer that is source
    and sink of this request; empty: the plan's own device."""

    request: Name
    attempt: Count
    deployment: Count
    client: Name
    assigned: tuple[Assigned, ...] = ()
    head: str = ""


class TasksDone(Message, frozen=True):
    """Tasks of an attempt that this device has done; those of one device are told together."""

    request: Name
    attempt: Count
    tasks: tuple[Done, ...]


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
    What comes later for a later attempt or turn, or from another client, is the same id again."""

    request: Name
    attempt: Count = 0
    client: str = ""
    turn: Count = 0


class Cancel(Message, frozen=True):
    """The client does not want the answer any more, nor the inputs held that it gave till now."""

    request: Name
    turn: Count = 0


class Reply(Message, frozen=True):
    """The outcome; the tensors come from the sink. ``rounded``: float32 went as float16."""

    request: Name
    version: Count = 0
    plan: Text = ""
    attempts: Count = 0
    total_s: Seconds = 0.0
    queue_s: Seconds = 0.0
    degraded: bool = False
    rounded: bool = False
    image: Text | None = None
    tasks: tuple[TaskTime, ...] = ()
    failure: Failure | None = None


# --- Tensors (bulk) -----------------------------------------------------------------------------


class Deliver(Message, frozen=True):
    """A piece for a task, by its ``slot`` there; raw bytes behind. ``id`` is acknowledged, and
    ``acks`` are. ``assigned`` and ``head`` as in ``Start``, for the receiver's own sends."""

    id: Count
    request: Name
    attempt: Count
    deployment: Count
    consumer: Place
    slot: Count
    tensor: Tensor
    acks: Acks = ()
    assigned: tuple[Assigned, ...] = ()
    head: str = ""


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


class Echo(Message, frozen=True):
    """Say that this has arrived, with all that is behind it, at once."""

    id: Count


class Echoed(Message, frozen=True):
    """The ``Echo`` with this id has arrived."""

    id: Count


class Ack(Message, frozen=True):
    """``Deliver``, ``Feed`` or ``Answer`` with these ids have arrived."""

    ids: Acks


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
    | MeasureLink | LinkMeasured | Echo | Echoed
    | Want | Chunk | Gone | Deploy | Deployed | Install | Installed | Forget
    | Grant | Revoke | Ran
    | Submit | Start | Assign | NotKept | TasksDone | TaskFailed | Unreachable | Merged | Release
    | Cancel | Reply
    | Deliver | Feed | Answer | Ack | ListDevices | Devices | ListModels | Models
    | Lacks
)  # fmt: skip
