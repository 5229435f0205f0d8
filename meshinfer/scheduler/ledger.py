"""What the coordinator's journal holds: ids with bodies and outcomes, deployments, who is admitted;
no tensors and no secrets.

A value, and how entries change it. The file on disk is ``cluster.journal``, which is held to this.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.token import Role


@dataclass(frozen=True, slots=True)
class Signature:
    """What a plan is made for: pixels or tensors in, the inputs' shapes, and the outputs asked for.

    ``outputs`` is None for all of them; else what lies behind these is not computed.
    """

    picture: bool
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """An id belongs to this body from now on. ``body``: as ``admission.body_of`` has it."""

    request: str
    body: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The outcome of an id: ``outcome`` is the digest of its tensors, or there is a failure."""

    request: str
    body: str
    outcome: str = ""
    failure: m.Failure | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """A model is deployed as this version. ``deploy``: all that was asked, by ``peer``. ``inputs``,
    ``outputs`` and ``image``: as in ``ModelOpened``."""

    version: int
    peer: str
    deploy: m.Deploy
    inputs: Mapping[str, tuple[str, tuple[int | None, ...] | None]]
    outputs: Mapping[str, tuple[str, ...]]
    image: str | None = None

    @property
    def name(self) -> str:
        return self.deploy.name


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan that was ready, to be taken up again while its devices are as they were.

    ``grants``: bytes of memory that each of them granted. ``expected``: seconds of a task on a
    device. The rest is as in ``PlanReady`` and ``MakePlan``.
    """

    name: str
    version: int
    signature: Signature
    head: str
    candidates: tuple[str, ...]
    grants: Mapping[str, int]
    plan: str
    programs: Mapping[str, tuple[m.Program, ...]]
    report: m.Report | None
    window: int
    expected: tuple[tuple[m.Place, str, float], ...]

    @property
    def key(self) -> tuple[str, int, Signature]:
        return self.name, self.version, self.signature

    @property
    def blobs(self) -> frozenset[str]:
        """What its devices may have to fetch."""
        programs = [program for each in self.programs.values() for program in each]
        models = [program.model for program in programs if program.model is not None]
        return frozenset(models) | {w for program in programs for w in program.weights}


@dataclass(frozen=True, slots=True)
class TokenMade:
    """Whoever shows the secret with this hash is admitted in this role, for ``ttl_s`` from when
    this is written or read: the file keeps the wall clock's time, cores know none. ``maker``: the
    key of the admin; empty: the coordinator's user. ``instead_of``: the hash of one that is dropped
    for it."""

    hash: str
    role: Role
    ttl_s: float
    reusable: bool = False
    maker: str = ""
    instead_of: str = ""
    spent: bool = False


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A key is admitted, in place of what the same key was before. ``token``: the hash of the one
    that it showed, which is spent by this unless it is reusable."""

    admission: m.Admission
    token: str = ""


@dataclass(frozen=True, slots=True)
class Expelled:
    """A key is admitted no more; the tokens that it came by or made are void."""

    key: str


Entry = Accepted | Ended | Published | Planned | TokenMade | Enrolled | Expelled


@dataclass(slots=True)
class Ledger:
    """``starts``: how many coordinators have begun with it. ``requests``: the last entry of each
    id, oldest first. ``models``: by name, oldest version first. ``plans``: the last of each
    version and signature. ``tokens``: by their hashes. ``enrolled``: by key; the coordinator sees
    to the bounds of both."""

    starts: int = 0
    requests: OrderedDict[str, Accepted | Ended] = field(default_factory=OrderedDict)
    models: dict[str, list[Published]] = field(default_factory=dict)
    plans: dict[tuple[str, int, Signature], Planned] = field(default_factory=dict)
    tokens: dict[str, TokenMade] = field(default_factory=dict)
    enrolled: dict[str, Enrolled] = field(default_factory=dict)

    def apply(self, entries: Sequence[Entry]) -> None:
        """Add entries in their order. The oldest beyond the bounds are forgotten."""
        for entry in entries:
            match entry:
                case Published():
                    versions = self.models.setdefault(entry.name, [])
                    versions.append(entry)
                    del versions[: -limits.VERSIONS_PER_MODEL]
                case Planned():
                    self.plans.pop(entry.key, None)
                    self.plans[entry.key] = entry
                case TokenMade() | Enrolled() | Expelled():
                    self._admit(entry)
                case _:
                    self.requests.pop(entry.request, None)
                    self.requests[entry.request] = entry
        while len(self.requests) > limits.JOURNALED_IDS:
            self.requests.popitem(last=False)
        while len(self.plans) > limits.JOURNALED_PLANS:
            del self.plans[next(iter(self.plans))]

    def _admit(self, entry: TokenMade | Enrolled | Expelled) -> None:
        match entry:
            case TokenMade():
                for hash_ in (entry.instead_of, entry.hash):
                    self.tokens.pop(hash_, None)
                self.tokens[entry.hash] = replace(entry, instead_of="")
            case Enrolled(admission, token):
                self.enrolled[admission.key] = entry
                if token in self.tokens and not self.tokens[token].reusable:
                    self.tokens[token] = replace(self.tokens[token], spent=True)
            case Expelled(key):
                gone = self.enrolled.pop(key, None)
                by = "" if gone is None else gone.token
                for hash_, token_made in self.tokens.items():
                    if hash_ == by or token_made.maker == key:
                        self.tokens[hash_] = replace(token_made, spent=True)
