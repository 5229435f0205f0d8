"""Every message of the protocol, on one screen each way. Unknown fields and types are refused.

Only ``Hello``, ``Join`` and ``Refused``, by which two releases find out, may carry fields of a
later one.
Messages carry no pickle and no code. Times are seconds that remain, never a wall clock's.
``device#incarnation`` is a peer; ids of requests are chosen by clients.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from meshinfer import limits

# isort: off
from meshinfer.protocol.board import Board as Board
from meshinfer.protocol.checks import (
    Check as Check, Checked as Checked, Doubtful as Doubtful, Sample as Sample,
)  # fmt: skip
from meshinfer.protocol.joining import (
    AddToken as AddToken, Admission as Admission, Admitted as Admitted, AdmittedNow as AdmittedNow,
    Approve as Approve, Expel as Expel, Join as Join, Joined as Joined,
    ListAdmitted as ListAdmitted, Wait as Wait, Waiting as Waiting,
)  # fmt: skip
from meshinfer.protocol.questions import (
    DeviceInfo as DeviceInfo, Devices as Devices, ListDevices as ListDevices,
    ListModels as ListModels, Models as Models,
)  # fmt: skip
from meshinfer.protocol.records import (
    Assigned as Assigned, Assignment as Assignment, Blob as Blob, Budgets as Budgets,
    Count as Count, Done as Done, Ended as Ended, Facts as Facts,
    Failure as Failure, Hash as Hash, Hex as Hex, Label as Label, Link as Link,
    Message as Message, ModelInfo as ModelInfo, Name as Name, Names as Names,
    Output as Output, Peer as Peer, Piece as Piece, Pins as Pins, Place as Place,
    Program as Program, Rate as Rate,
    Record as Record, Seconds as Seconds, Send as Send, Shape as Shape, Signature as Signature,
    TaskTime as TaskTime, Tensor as Tensor, Tensors as Tensors, Text as Text, UNSIGNED as UNSIGNED,
    Value as Value, Word as Word,
)  # fmt: skip
from meshinfer.protocol.recovery import Assign as Assign, Lacks as Lacks, NotKept as NotKept
from meshinfer.protocol.trying import Tried as Tried, Try as Try

# isort: on
from meshinfer.protocol.report import Report as Report

PROTOCOL = (5, 6)
"""Protocol versions that this release speaks, first and last (RELIABILITY: N-1 to N)."""
Acks = Annotated[tuple[Count, ...], Meta(max_length=limits.ACKS_AT_ONCE)]


# --- Joining and staying ------------------------------------------------------------------------


class Hello(Message, frozen=True, forbid_unknown_fields=False):
    """First message of a worker or client. ``protocol``: the versions it speaks; ``where``: a
    client's machine and address there, or ``BESIDE_COORDINATOR``. ``ended``: how this
    worker's last process ended."""

    role: Word
    device: Name
    incarnation: Name
    cluster: Name
    protocol: tuple[int, int]
    version: Word = ""
    bulk: Peer | None = None
    facts: Facts = Facts()
    where: Label = ""
    ended: Ended | None = None


class Welcome(Message, frozen=True):
    """The coordinator admits the peer. ``bulk``: the coordinator's; ``head``: the head device's.
    ``acts_as``: a client by a device is its requests' source and sink, as this device in plans.
    ``signer``: the Ed25519 public key of all manifests; its shell adds it."""

    coordinator: Name
    protocol: int
    bulk: Peer
    head: Peer | None = None
    acts_as: Word = ""
    signer: Hex | None = None


class Refused(Message, frozen=True, forbid_unknown_fields=False):
    """The coordinator does not admit the peer; both sides print the text. ``void``: the token that
    it showed is good for nothing, now and later."""

    failure: Failure
    void: bool = False


class Heartbeat(Message, frozen=True, omit_defaults=True):
    """Every 500 ms. ``computing``: what the compute thread does, for ``since_s`` seconds;
    ``wasted``: tasks so far that nobody wanted any more when they were done; ``board``: how warm it
    is, where something tells. ``said``: messages to the coordinator since the hello, and ``heard``
    from it since its welcome, before this one (protocol 6)."""

    computing: Label = ""
    since_s: Seconds = 0.0
    wasted: Count = 0
    board: Board | None = None
    said: Count | None = None
    heard: Count | None = None


class Alive(Message, frozen=True, omit_defaults=True):
    """The answer to a client's heartbeat, to one that has not heard all, and to one out of step:
    beat in ``beat_in_s`` again. ``said``: messages to this peer since its welcome (protocol 6)."""

    beat_in_s: Seconds = 0.0
    said: Count | None = None


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
    """Deploy a model that the client serves, with ``weights`` beside it, as blobs. ``shapes``: of
    dynamic inputs. ``pin``: values and the devices that they never leave; ``memory``: bytes of each
    device, or of all, that it may use. ``half_transfers``: float32 goes as float16."""

    call: Name
    name: Name
    digest: Hex
    nbytes: Count
    weights: Annotated[tuple[Blob, ...], Meta(max_length=limits.WEIGHT_FILES)] = ()
    plan: Text | None = None
    image: Text | None = None
    shapes: dict[Name, Shape] | None = None
    objective: Word = "latency"
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
    be. ``keep_bytes``: of what was made may be kept for devices that take over. ``makers``: the
    devices that may send what each task before these makes. ``signature``: of all this for this
    peer, as ``manifest`` says; whoever sends it has it signed at the last."""

    deployment: Count
    programs: Annotated[tuple[Program, ...], Meta(max_length=limits.LISTED)]
    peers: Annotated[tuple[Peer, ...], Meta(max_length=limits.LISTED)]
    head: Word = ""
    keep_bytes: Count = limits.KEPT_BYTES
    model: Annotated[str, Meta(max_length=limits.NAME_CHARS)] = ""
    makers: Annotated[tuple[tuple[Place, Names], ...], Meta(max_length=limits.LISTED)] = ()
    signature: Signature = UNSIGNED


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
    ``engine`` and as many ``threads`` only, so that the bits are the device's. ``signature``: as of
    ``Install``."""

    deployment: Count
    device: Name
    program: Program
    model: Name
    version: Count
    inputs: Tensors
    picture: bool = False
    outputs: Annotated[tuple[Name, ...], Meta(max_length=limits.OUTPUTS_ASKED)] | None = None
    image: Text | None = None
    plan: Text = ""
    engine: Word = ""
    threads: Count = 1
    signature: Signature = UNSIGNED


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
    """Header of a request; its tensors (``body``: their digest) go to the source. ``deadline_s``:
    remains; ``outputs``: None: all; ``turn``: how often the client has sent it, as in ``Feed``."""

    request: Name
    model: Name
    version: Count | None
    inputs: Tensors
    picture: bool
    deadline_s: Seconds
    turn: Count = 0
    outputs: Annotated[tuple[Name, ...], Meta(max_length=limits.OUTPUTS_ASKED)] | None = None
    body: Hash = ""


class Start(Message, frozen=True):
    """To all with a part in it: run this attempt (numbers go up); the answer goes to ``client``.
    ``assigned``: who takes tasks of several devices. ``head``: the peer in the head's place. Of
    nobody else's word an attempt begins, or has another head. ``again``: it may have been lost."""

    request: Name
    attempt: Count
    deployment: Count
    client: Name
    assigned: Assignment = ()
    head: Word = ""
    again: bool = False


class TasksDone(Message, frozen=True):
    """Tasks of an attempt that this device has done; those of one device are told together."""

    request: Name
    attempt: Count
    tasks: Annotated[tuple[Done, ...], Meta(max_length=limits.LISTED)]


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
    peer: Label


class Stalled(Message, frozen=True):
    """``peer`` is late to acknowledge: is there another way? ``over``: straight again."""

    peer: Name
    over: bool = False


class Detour(Message, frozen=True):
    """What goes to ``peer`` goes by ``via`` from now on, as a ``Relay``."""

    peer: Peer
    via: Peer


class Merged(Message, frozen=True):
    """The sink has merged and sent all outputs, of this digest."""

    request: Name
    attempt: Count
    digest: Hash = ""


class Release(Message, frozen=True):
    """The request is over: drop all that is held for it, up to this attempt and ``client``'s turn.
    What comes later for a later attempt or turn, or from another client, is the same id again."""

    request: Name
    attempt: Count = 0
    client: Label = ""
    turn: Count = 0


class Cancel(Message, frozen=True):
    """The client does not want the answer any more, nor the inputs held that it gave till now."""

    request: Name
    turn: Count = 0


class Reply(Message, frozen=True):
    """The outcome; the tensors come from the sink. ``rounded``: float32 went as float16.
    ``degraded``, for ``reasons``: something failed on the way or is kept out. ``lost``: devices
    that were, while it ran there; ``added_s``: from its start until lost work was begun again.
    ``since``: the first attempt whose tensors are the answer, not wrong, nor another version's."""

    request: Name
    version: Count = 0
    plan: Text = ""
    attempts: Count = 0
    total_s: Seconds = 0.0
    queue_s: Seconds = 0.0
    degraded: bool = False
    rounded: bool = False
    image: Text | None = None
    tasks: Annotated[tuple[TaskTime, ...], Meta(max_length=limits.LISTED)] = ()
    failure: Failure | None = None
    reasons: Annotated[tuple[Text, ...], Meta(max_length=limits.REASONS)] = ()
    lost: Annotated[tuple[Name, ...], Meta(max_length=limits.DEVICES)] = ()
    added_s: Seconds = 0.0
    since: Count = 0


# --- Tensors (bulk) -----------------------------------------------------------------------------


class Deliver(Message, frozen=True):
    """A piece for a task, by its ``slot`` there; raw bytes behind. ``id`` is acknowledged, once the
    receiver knows its attempt, and ``acks`` are."""

    id: Count
    request: Name
    attempt: Count
    deployment: Count
    consumer: Place
    slot: Count
    tensor: Tensor
    acks: Acks = ()


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
    """``Deliver``, ``Feed``, ``Answer`` or ``Sample`` with these ids have arrived."""

    ids: Acks


class Relay(Message, frozen=True):
    """Pass this on ``to`` a peer that ``origin`` does not reach; the payload is the message's."""

    to: Name
    origin: Name
    message: Deliver | Ack


AnyMessage = (
    Hello | Welcome | Refused | Heartbeat | Alive | Who | Probe | Goodbye | Dismiss | Closing
    | MeasureLink | LinkMeasured | Echo | Echoed
    | Want | Chunk | Gone | Deploy | Deployed | Install | Installed | Forget
    | Grant | Revoke | Ran
    | Submit | Start | Assign | NotKept | TasksDone | TaskFailed | Unreachable | Merged | Release
    | Cancel | Reply
    | Stalled | Detour | Relay
    | Deliver | Feed | Answer | Ack | ListDevices | Devices | ListModels | Models
    | Lacks | Check | Sample | Checked | Doubtful | Try | Tried
    | Join | Joined | Wait | Admitted | AddToken | Approve | Expel | ListAdmitted | AdmittedNow
)  # fmt: skip
