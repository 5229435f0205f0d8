"""What ends with a member: it died, fell silent, is needed no more, or is admitted no more."""

from __future__ import annotations

from functools import partial

from meshinfer.protocol import messages as m
from meshinfer.scheduler import authority
from meshinfer.scheduler.answering import Answering
from meshinfer.scheduler.balance import Balance
from meshinfer.scheduler.catalogue import Catalogue
from meshinfer.scheduler.deploying import Deploying
from meshinfer.scheduler.enrolment import Enrolment
from meshinfer.scheduler.events import Effect, Note, Plane, Send
from meshinfer.scheduler.heads import Heads
from meshinfer.scheduler.membership import Device, Membership
from meshinfer.scheduler.turned_away import parted


class Parting:
    """Owned by the coordinator's core; has no state of its own."""

    def __init__(
        self,
        members: Membership,
        catalogue: Catalogue,
        balance: Balance,
        heads: Heads,
        answering: Answering,
        deploying: Deploying,
        enrolment: Enrolment,
    ) -> None:
        self._members, self._catalogue, self._balance = members, catalogue, balance
        self._heads, self._answering, self._deploying = heads, answering, deploying
        self._enrolment = enrolment

    def device_lost(self, device: Device, why: str, now: float) -> list[Effect]:
        head = self._members.head
        self._members.remove(device, why, now)
        self._answering.device_lost(device, why, now)
        self._balance.forget(device.name)
        effects: list[Effect] = [self._end_of(device, why)]
        effects += self._deploying.out_of_service(device.name, now)
        if device is head:  # inputs and answers were there: clients give theirs again
            self._answering.head_lost()
            effects += [_to(peer, m.Who()) for peer in sorted(self._members.clients)]
        return effects

    def _end_of(self, device: Device, why: str) -> Note:
        """Who said that it leaves is no loss: a fault only where others had yet to take over."""
        if device.draining and device.dismissed:
            return Note("info", "device left", device.ids)
        text = "device left with work in hand" if device.draining else "device lost"
        return self._members.faults.note("warning", text, {**device.ids, "why": why})

    def _client_gone(self, peer: str) -> list[Effect]:
        self._heads.gone(peer)
        effects = self._deploying.fetching.client_gone(peer)
        return effects + self._answering.client_gone(peer)

    # --- the rules

    def with_the_silent(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for device in self._members.overdue(now):
            if not self._answering.silence.bears(device, now):
                effects += self.device_lost(device, device.unheard(now), now)
        for peer in self._members.gone_clients(now):
            effects += self._client_gone(peer)
        return effects

    def with_the_drained(self) -> list[Effect]:
        here = self._members.devices.values()
        leaving = [device for device in here if device.draining and not device.dismissed]
        if not leaving:
            return []
        busy = {name for d in self._catalogue.deployments.values() for name in d.members}
        effects: list[Effect] = []
        for device in leaving:
            if device.name not in busy:
                device.dismissed = True
                effects.append(_to(device.peer, m.Dismiss()))
        return effects

    def with_those_not_admitted(self, now: float) -> list[Effect]:
        """Any more: a device is lost, a client's requests are over, and all others are told."""
        left = self._enrolment.take_left()
        effects: list[Effect] = []
        for admission, why in left:
            told = m.Refused(failure=parted(admission.name, why))
            for peer in self._members.everybody():
                if not authority.is_of(peer, admission):
                    continue
                effects.append(_to(peer, told))
                device = self._members.by_peer(peer)
                if device is not None:
                    device.dismissed, device.draining = True, False  # it has not died of anything
                    effects += self.device_lost(device, why, now)
            for peer in self._members.forget_clients(partial(_is_of, admission)):
                effects += self._client_gone(peer)
        return effects + (self._enrolment.spread() if left else [])


def _is_of(admission: m.Admission, peer: str) -> bool:
    return authority.is_of(peer, admission)


def _to(peer: str, message: m.AnyMessage) -> Send:
    return Send(Plane.CONTROL, peer, message)
