"""Who is admitted: a key, by a token or by an admin's approval, under one name and in one role.

Nobody is told that they are in before it is on disk; who is expelled is out at once. The gate's
list that goes to the sockets is made here alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from meshinfer import limits
from meshinfer.protocol import messages as m
from meshinfer.protocol.token import client_name, device_id, hash_of, short_id
from meshinfer.scheduler import authority
from meshinfer.scheduler.events import Admit, Effect, Knocked, Note, Plane, Send
from meshinfer.scheduler.journal import Journal
from meshinfer.scheduler.ledger import Enrolled, Expelled, Ledger, TokenMade
from meshinfer.scheduler.membership import Membership, foreign
from meshinfer.scheduler.tokens import Tokens
from meshinfer.scheduler.turned_away import (
    ambiguous,
    full,
    made_before,
    name_refusal,
    needs_token,
    not_ours,
    taken,
    token_refused,
    unwritten,
    without_keys,
)
from meshinfer.scheduler.waiting import WaitingRoom, one_of, plain

AdminCall = m.AddToken | m.Approve | m.Expel | m.ListAdmitted
Then = Callable[[], list[Effect]]
Otherwise = Callable[[m.Failure], list[Effect]]


@dataclass(frozen=True, slots=True)
class Door:
    """How keys come in. ``port``: of the control socket, for those that are admitted. ``always``:
    admitted whatever happens: the coordinator's own device and its user's key. ``tokens``: good
    from the start, unless an earlier start has spent them. ``join_port``: of the socket for
    strangers; ``key``: the coordinator's public key."""

    port: int
    always: tuple[m.Admission, ...] = ()
    tokens: tuple[TokenMade, ...] = ()
    join_port: int = 0
    key: str = ""


class Enrolment:
    """Mutable: owned by the coordinator's core. ``door``: None where nobody has a key: all names
    are believed, and everybody may say everything. (In plaintext there is one: keys are said.)"""

    def __init__(
        self, door: Door | None, ledger: Ledger | None, journal: Journal, members: Membership
    ) -> None:
        self._door, self._journal, self._members = door, journal, members
        self._always = {a.key: a for a in (() if door is None else door.always)}
        self._held: dict[str, Enrolled] = {} if ledger is None else dict(ledger.enrolled)
        self._made = {} if ledger is None else dict(ledger.tokens)
        for key in self._always:
            self._held.pop(key, None)
        self._pending: dict[str, m.Admission] = {}
        """Being written to disk."""
        self._waiting = WaitingRoom()
        self._tokens = Tokens()
        self._calls: OrderedDict[tuple[str, str], m.AdmittedNow | None] = OrderedDict()
        self._noted: float | None = None
        self._left: list[tuple[m.Admission, str]] = []
        self._owed: list[Expelled] = []
        """Expulsions that could not be written: they are as soon as anything can be."""
        self._by_name: dict[str, m.Admission] = {}
        self._index()

    # --- the list

    @property
    def admitted(self) -> tuple[m.Admission, ...]:
        return (*self._always.values(), *(entry.admission for entry in self._held.values()))

    def _index(self) -> None:
        self._by_name = {admission.name: admission for admission in self.admitted}

    def begin(self, now: float) -> list[Effect]:
        """With the first tick: tokens go on where they were, and who was admitted is."""
        if self._door is None:
            return []
        self._tokens.restore(self._made.values(), now)
        effects: list[Effect] = [Admit(self.admitted)]
        for entry in self._door.tokens:
            room = self._tokens.room(now)
            if entry.hash in self._tokens:
                continue  # an earlier start was given it, too
            if room is None:
                effects.append(Note("warning", "no room for a token", {"role": entry.role}))
                continue
            added = replace(entry, instead_of=room)
            self._tokens.add(added, now)
            effects += self._journal.first_write(added, list, lambda failure: [])
        return effects

    def spread(self) -> list[Effect]:
        """The list has changed: the coordinator's sockets go by it, and so do the devices'."""
        self._index()
        members = self.admitted
        told = m.Admitted(members=members)
        peers = [device.peer for device in self._members.devices.values()]
        return [Admit(members), *(_to(peer, told) for peer in sorted(peers))]

    def greeting(self, peer: str) -> list[Effect]:
        """To a device that joins: whom it may let in."""
        return [] if self._door is None else [_to(peer, m.Admitted(members=self.admitted))]

    def take_left(self) -> list[tuple[m.Admission, str]]:
        """Whom the coordinator has to part with, and why."""
        left, self._left = self._left, []
        return left

    def due(self) -> list[Effect]:
        """Write down what is owed, now that the disk writes again."""
        if not self._owed or self._journal.broken is not None:
            return []
        owed, self._owed = self._owed, []
        return [effect for entry in owed for effect in self._write_expelled(entry)]

    # --- authority

    def denied(self, peer: str, message: m.AnyMessage) -> list[Effect] | None:
        """What becomes of what a peer may not say; None for what it may."""
        if self._door is None:
            return None
        admission = self._of(peer)
        if admission is None:  # its key was taken away, and this was on its way
            return []
        if isinstance(message, m.Hello):
            may = admission.key in self._always
            failure = authority.not_itself(peer, admission, message, may_be_head=may)
            if failure is None:
                return None
            note = Note("warning", failure.message, {"peer": peer, "hint": failure.hint})
            return [_to(peer, m.Refused(failure=failure)), note]
        return authority.denied(peer, admission, message)

    def _of(self, peer: str) -> m.Admission | None:
        for name in authority.names_of(peer):
            admission = self._by_name.get(name)
            if admission is not None and authority.is_of(peer, admission):
                return admission
        return None

    # --- strangers

    def knocked(self, event: Knocked, now: float) -> list[Effect]:
        """A stranger asks to be let in. What it is told says nothing of tokens but yes or no."""
        door, key, join = self._door, event.key, event.message
        if door is None:
            return self._refuse(event, without_keys(), now)
        worker = join.role == "worker"
        failure = (name_refusal(join.name) if worker else None) or foreign(
            join, join.name, self._members.cluster, self._members.version
        )
        if failure is not None:
            return self._refuse(event, failure, now)
        if key in self._pending:
            return []  # it is told as soon as that is written
        name = join.name if worker else client_name(key)
        admission = m.Admission(key=key, name=name, role=join.role)
        joined = m.Joined(name=name, role=join.role, port=door.port, key=door.key)
        if admission in (self._always.get(key), self._entry(key)):
            return [_join(event.peer, joined)]  # it did not hear so
        by = hash_of(join.secret) if join.secret else ""
        if by and self._tokens.role_of(by, now) != join.role:
            return self._refuse(event, token_refused(), now, void=True)
        failure = self._unfit(admission)
        if failure is not None:
            return self._refuse(event, failure, now)
        if not by:
            return self._wait(event, now)
        return self._enrol(
            Enrolled(admission, by),
            lambda: [_join(event.peer, joined)],
            lambda failure: self._refuse(event, failure, now),
        )

    def _refuse(
        self, event: Knocked, failure: m.Failure, now: float, *, void: bool = False
    ) -> list[Effect]:
        """Strangers may knock often; the log says so now and then. ``void``: its token is."""
        told = _join(event.peer, m.Refused(failure=failure, void=void))
        if self._noted is not None and now < self._noted + limits.JOIN_AGAIN_S:
            return [told]
        self._noted = now
        fields = {"id": short_id(event.key), "why": failure.message, "hint": failure.hint}
        return [told, Note("warning", "a stranger is refused", fields)]

    def _entry(self, key: str) -> m.Admission | None:
        entry = self._held.get(key)
        return None if entry is None else entry.admission

    def _unfit(self, admission: m.Admission) -> m.Failure | None:
        """Why a key cannot be admitted so, whoever says that it may."""
        if admission.key in self._always:
            return not_ours(self._always[admission.key].name)
        others = (*self.admitted, *self._pending.values())
        if any(a.name == admission.name and a.key != admission.key for a in others):
            return taken(admission.name)
        if admission.key not in self._held and len(others) >= limits.ADMITTED_KEYS:
            return full("keys are admitted", "revoke those that are not used: meshinfer devices")
        return None

    def _wait(self, event: Knocked, now: float) -> list[Effect]:
        """Without a token: somebody has to approve."""
        if event.message.role != "worker":
            return self._refuse(event, needs_token(event.message.role), now)
        key, name = event.key, event.message.name
        new = key not in self._waiting
        if not self._waiting.asks(key, name, now):
            hint = "approve or wait until they give up, or start it with a token"
            return self._refuse(event, full("devices wait to be approved", hint), now)
        told = _join(event.peer, m.Wait(id=device_id(key), again_s=limits.JOIN_AGAIN_S))
        fields = {"device": name, "id": device_id(key)}
        return [told, Note("info", "a device waits to be approved", fields)] if new else [told]

    def _enrol(self, entry: Enrolled, then: Then, otherwise: Otherwise) -> list[Effect]:
        """Admit a key, from when it is written."""
        admission, by = entry.admission, entry.token
        key = admission.key
        self._pending[key] = admission
        self._waiting.leave(key)
        if by:
            self._tokens.use(by)

        def ends() -> bool:
            mine = self._pending.get(key) is admission
            if mine:
                del self._pending[key]
            return mine

        def written() -> list[Effect]:
            if not ends():
                return []  # it was expelled meanwhile
            before = self._entry(key)
            self._held[key] = entry
            if before is not None and before.name != admission.name:
                self._left.append((before, f"its key is now that of {admission.name}"))
            fields = {"name": admission.name, "role": admission.role, "id": device_id(key)}
            note = Note("info", "admitted", {**fields, "by": "token" if by else "approval"})
            return [note, *self.spread(), *then()]

        def not_written(failure: m.Failure) -> list[Effect]:
            ends()
            if by:
                self._tokens.unuse(by)
            return otherwise(failure)

        return self._journal.first_write(entry, written, not_written)

    # --- admins

    def told(self, peer: str, message: AdminCall, now: float) -> list[Effect]:
        """By an admin; asked again, the answer is the same."""
        call = peer, message.call
        if self._door is None:
            return self._answer(call, failure=without_keys())
        if isinstance(message, m.ListAdmitted):
            waiting = self._waiting.listed(now)
            listed = m.AdmittedNow(call=message.call, members=self.admitted, waiting=waiting)
            return [_to(peer, listed)]
        if call in self._calls:
            answer = self._calls[call]
            return [] if answer is None else [_to(peer, answer)]
        self._calls[call] = None
        while len(self._calls) > limits.ADMIN_CALLS_KEPT:
            self._calls.popitem(last=False)
        match message:
            case m.AddToken():
                return self._add_token(call, message, now)
            case m.Approve():
                return self._approve(call, message, now)
            case m.Expel():
                return self._expel(call, message)

    def _answer(
        self, call: tuple[str, str], *members: m.Admission, failure: m.Failure | None = None
    ) -> list[Effect]:
        port = 0 if self._door is None else self._door.join_port
        answer = m.AdmittedNow(call=call[1], members=members, join_port=port, failure=failure)
        if call in self._calls:
            self._calls[call] = answer
        return [_to(call[0], answer)]

    def _add_token(self, call: tuple[str, str], message: m.AddToken, now: float) -> list[Effect]:
        hash_, room = message.hash, self._tokens.room(now)
        if hash_ in self._tokens:  # an earlier coordinator was asked, and its answer lost
            good = self._tokens.role_of(hash_, now) == message.role
            return self._answer(call, failure=None if good else made_before())
        if room is None:
            hint = "wait until some expire, or make one --reusable"
            return self._answer(call, failure=full("tokens are good", hint))
        maker = self._of(call[0])
        entry = TokenMade(
            hash=hash_,
            role=message.role,
            ttl_s=message.ttl_s,
            reusable=message.reusable,
            maker="" if maker is None or maker.key in self._always else maker.key,
            instead_of=room,
        )
        self._tokens.add(entry, now)

        def not_written(failure: m.Failure) -> list[Effect]:
            self._tokens.remove(hash_)
            return self._answer(call, failure=failure)

        return self._journal.first_write(entry, lambda: self._answer(call), not_written)

    def _approve(self, call: tuple[str, str], message: m.Approve, now: float) -> list[Effect]:
        waiting = self._waiting.names(now)
        key = one_of(message.id, waiting)
        if isinstance(key, m.Failure):
            done = one_of(message.id, self._held)
            if not isinstance(done, m.Failure):  # twice, or by two admins
                return self._answer(call, self._held[done].admission)
            return self._answer(call, failure=key)
        admission = m.Admission(key=key, name=waiting[key], role="worker")
        failure = self._unfit(admission)
        if failure is not None:
            return self._answer(call, failure=failure)
        return self._enrol(
            Enrolled(admission),
            lambda: self._answer(call, admission),
            lambda failure: self._answer(call, failure=failure),
        )

    def _expel(self, call: tuple[str, str], message: m.Expel) -> list[Effect]:
        named = {a.key for a in self.admitted if a.name == message.id}
        by_id = one_of(message.id, {a.key: a for a in self.admitted})
        keys = named | (set() if isinstance(by_id, m.Failure) else {by_id})
        if not keys:
            assert isinstance(by_id, m.Failure)
            return self._answer(call, failure=by_id)
        whole = {key for key in keys if plain(device_id(key)) == plain(message.id)}
        keys = whole or keys
        if len(keys) > 1:
            return self._answer(call, failure=ambiguous(message.id, map(device_id, keys)))
        (key,) = keys
        if key in self._always:
            return self._answer(call, failure=not_ours(self._always[key].name))
        gone = self._held.pop(key)
        self._pending.pop(key, None)
        self._tokens.void(gone.token, maker=key)
        self._left.append((gone.admission, "revoked"))
        self._index()
        fields = {"name": gone.admission.name, "id": device_id(key), "by": call[0]}
        note = Note("warning", "revoked", fields)
        return [note, *self._write_expelled(Expelled(key), call, gone.admission)]

    def _write_expelled(
        self,
        entry: Expelled,
        call: tuple[str, str] | None = None,
        whom: m.Admission | None = None,
    ) -> list[Effect]:
        def written() -> list[Effect]:
            return [] if call is None or whom is None else self._answer(call, whom)

        def not_written(failure: m.Failure) -> list[Effect]:
            self._owed.append(entry)
            return [] if call is None else self._answer(call, failure=unwritten(failure))

        return self._journal.first_write(entry, written, not_written)


def _to(peer: str, message: m.AnyMessage) -> Send:
    return Send(Plane.CONTROL, peer, message)


def _join(peer: str, message: m.AnyMessage) -> Send:
    return Send(Plane.JOIN, peer, message)
