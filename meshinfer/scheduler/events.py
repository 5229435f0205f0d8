"""Events (past tense) that the shells feed to a core, and effects (imperative) that it asks for.

One list for all three cores; each shell performs those that its core emits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from meshinfer.protocol.board import Board
from meshinfer.protocol.codec import Buffer
from meshinfer.protocol.messages import (
    Admission,
    AnyMessage,
    Facts,
    Failure,
    Join,
    Link,
    Peer,
    Place,
    Program,
    Report,
)
from meshinfer.scheduler.ledger import Entry
from meshinfer.scheduler.ledger import Signature as Signature

Array = np.ndarray[Any, Any]


class Plane(StrEnum):
    """Which socket a message takes: small and watched, or large."""

    CONTROL = "control"
    BULK = "bulk"
    JOIN = "join"


# --- Events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message came in; ``payload`` is what stood behind its header. ``ends``: of a hello that
    says where its peer is, the addresses of the connection it came by, the peer's and ours; empty
    where nobody knows."""

    peer: str
    message: AnyMessage
    payload: memoryview = field(default_factory=lambda: memoryview(b""))
    ends: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True)
class Knocked:
    """A stranger, whose connection to the join socket has this key, asks to be admitted."""

    peer: str
    key: str
    message: Join


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A connection broke or a peer refused us: a hint. ``peer`` is empty when it has no name.

    Only a broken control connection can mean a death; a bulk one is repaired by sending again.
    ``refused``: to try again is of no use; ``unadmitted``: since its gate does not admit our key.
    """

    peer: str
    reason: str
    refused: bool = False
    unadmitted: bool = False
    plane: Plane = Plane.CONTROL


@dataclass(frozen=True, slots=True)
class Ticked:
    """The time of ``next_deadline()`` has come, or the core has just started."""


@dataclass(frozen=True, slots=True)
class BoardRead:
    """How this device's board feels."""

    board: Board


@dataclass(frozen=True, slots=True)
class StopRequested:
    """SIGTERM or ``close()``: finish what runs, then stop."""


@dataclass(frozen=True, slots=True)
class BlobsFound:
    """Answer to ``FindBlobs``: which of them are not in the store, or damaged."""

    purpose: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlobWritten:
    """A blob is whole and verified in the store, or why not."""

    digest: str
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """Answer to ``Prepare``."""

    deployment: int
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Computed:
    """Answer to ``Compute``: the outputs in the program's order, or the engine's words.

    ``lasting_s``: what it takes on a device that goes on computing, which under a quota is longer
    than ``compute_s`` on one that has rested.
    """

    request: str
    attempt: int
    place: Place
    outputs: tuple[Array, ...]
    compute_s: float
    error: str | None = None
    again: bool = False
    lasting_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelOpened:
    """Answer to ``OpenModel``: what the model takes, or why it is refused.

    ``inputs``: name -> (numpy type string, dims with None where dynamic). ``outputs``: name -> the
    inputs that it depends on.
    """

    key: int
    inputs: Mapping[str, tuple[str, tuple[int | None, ...] | None]]
    image: str | None = None
    failure: Failure | None = None
    outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlanReady:
    """Answer to ``MakePlan``: the plan's text and each device's programs, or why there is none.

    ``expected``: seconds of each task on each device that may get it. ``kept``: the present plan is
    as good; there is no other. ``dropped``: the search for a better one was given up for what is
    more urgent. ``adapted``: made from plans of before, so that a search may find a better one.
    ``search_s``: of the coordinator's processor, as much as it is granted, that the
    search took.
    """

    deployment: int
    plan: str = ""
    programs: Mapping[str, tuple[Program, ...]] = field(default_factory=dict)
    report: Report | None = None
    failure: Failure | None = None
    window: int = 1
    kept: bool = False
    expected: Mapping[tuple[Place, str], float] = field(default_factory=dict)
    dropped: bool = False
    search_s: float = 0.0
    adapted: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """Answer to ``Record``: all entries up to this number are on disk."""

    number: int


@dataclass(frozen=True, slots=True)
class RecordFailed:
    """Answer to ``Record``: those up to this number that are not on disk yet never will be."""

    number: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Submitted:
    """The client's user asks for an answer: header and arrays."""

    request: str
    message: AnyMessage
    arrays: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Asked:
    """The client's user asks something of the coordinator; the answer has the same ``call``."""

    call: str
    message: AnyMessage
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client's user gave a request up."""

    request: str


@dataclass(frozen=True, slots=True)
class RanHere:
    """A client has answered ``count`` requests itself, each in ``compute_s`` on average."""

    deployment: int
    count: int
    compute_s: float


Event = (
    Arrived | PeerLost | Ticked | BoardRead | StopRequested | BlobsFound | BlobWritten | Prepared
    | Computed | Knocked | ModelOpened | PlanReady | Recorded | RecordFailed | Submitted | Asked
    | Cancelled | RanHere
)  # fmt: skip


# --- Effects ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Hand a message to a peer. It may be lost: cores resend what matters."""

    plane: Plane
    peer: str
    message: AnyMessage
    payload: Buffer | None = None


@dataclass(frozen=True, slots=True)
class Connect:
    """Be connected to a peer's bulk socket."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class Disconnect:
    peer: str


@dataclass(frozen=True, slots=True)
class Renew:
    """End the bulk connections with a peer, and have them made anew: what is on its way is lost. So
    not where much has come since this was last asked: what is missing may be behind that."""

    peer: str


@dataclass(frozen=True, slots=True)
class Admit:
    """From now on these keys may connect, each only under its name; all others are refused, and
    their connections end."""

    members: tuple[Admission, ...]


@dataclass(frozen=True, slots=True)
class FindBlobs:
    """Look which blobs are in the store -> ``BlobsFound``."""

    purpose: str
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WriteBlob:
    """Write bytes of a blob; when it is whole, verify it -> ``BlobWritten``."""

    digest: str
    offset: int
    total: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class ServeBlob:
    """Send a ``Chunk`` (or ``Gone``) from the store to a peer. ``model``: whose it is, where the
    peer is a device that computes with it or a client that may: that is logged."""

    peer: str
    digest: str
    offset: int
    length: int
    model: str = ""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Load the programs' submodels into the engine, beside those of this deployment that are there
    already -> ``Prepared``."""

    deployment: int
    programs: tuple[Program, ...]


@dataclass(frozen=True, slots=True)
class Discard:
    """Free the prepared programs of a deployment; nobody wants what is still being planned."""

    deployment: int


@dataclass(frozen=True, slots=True)
class Compute:
    """Run a prepared program in the compute thread -> ``Computed``. ``again``: to see whether
    another device was right; with no ``request``: how long it takes."""

    request: str
    attempt: int
    deployment: int
    place: Place
    inputs: Mapping[str, Array]
    again: bool = False


@dataclass(frozen=True, slots=True)
class OpenModel:
    """Check that the stored model loads -> ``ModelOpened``."""

    key: int
    digest: str
    image: str | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that may get work: what it said of itself, its link to the head if measured, and
    its links to other devices that it has sent to.

    ``slowdown``: how many times longer than its profile says it takes, as was measured of late.
    ``host``: the same for devices that share a machine and its address.
    """

    device: str
    facts: Facts
    link: Link | None = None
    links: tuple[Link, ...] = ()
    slowdown: float = 1.0
    host: str = ""


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Import for a signature, plan (or take ``plan``), lower, store the blobs -> ``PlanReady``.

    ``present``: the plan that serves; it is kept unless the new one is better by REPLAN_GAIN.
    ``paced``: since that was made, devices have only become faster or slower, so that what follows
    from plans made before will do. ``head_host``: as ``Candidate.host``. ``pin``, ``memory``,
    ``half_transfers``: as in ``Deploy``.
    ``tell_loss``: somebody awaits the report, with what rounding costs (and not the plan for a lost
    device's requests). ``share``: of the coordinator's processor that it may take. Below 1 nobody
    waits for it, and it is dropped as soon as anything else is to be opened or planned.
    """

    deployment: int
    digest: str
    image: str | None
    signature: Signature
    candidates: tuple[Candidate, ...]
    head: str
    plan: str | None
    objective: str
    spread: bool
    strict: bool
    present: str | None = None
    paced: bool = False
    head_host: str = ""
    pin: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    memory: Mapping[str, int] | int | None = None
    share: float = 1.0
    half_transfers: bool = False
    tell_loss: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """Write these to the journal, the last of them being this number -> ``Recorded`` or
    ``RecordFailed``. Unless ``awaited`` the answer may come with whatever comes next. Without
    entries: see whether anything can be written."""

    number: int
    entries: tuple[Entry, ...]
    awaited: bool = False


@dataclass(frozen=True, slots=True)
class Resolve:
    """Give the user of a client the outcome of a request."""

    request: str
    reply: AnyMessage
    arrays: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Settle:
    """Give the user of a client the answer to a question, or a failure."""

    call: str
    answer: AnyMessage | None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Granted:
    """This client may run a deployment, whose blobs are here, in its own process: a
    ``meshinfer.scheduler.on_device.OwnTask``. Until it is discarded, while a lease lasts."""

    deployment: int
    task: object


@dataclass(frozen=True, slots=True)
class Lease:
    """Until when what was granted may be used."""

    until: float


@dataclass(frozen=True, slots=True)
class Note:
    """Log an event with its fields; ``level`` is debug, info, warning or error."""

    level: str
    text: str
    fields: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process; a failure is printed and sets the exit code."""

    failure: Failure | None = None


Effect = (
    Send | Connect | Disconnect | Renew | Admit | FindBlobs | WriteBlob | ServeBlob | Prepare
    | Discard | Compute | OpenModel | MakePlan | Record | Resolve | Settle | Granted | Lease | Note
    | Stop
)  # fmt: skip
