"""Who may have which blob: a device those of its own tasks and of those that it stands by for, a
client that of the task that it was granted. Nobody else gets any, whatever it knows.
"""

from __future__ import annotations

from collections.abc import Iterator

from meshinfer.protocol import messages as m
from meshinfer.scheduler.catalogue import Catalogue
from meshinfer.scheduler.events import Effect, Note, Plane, Send, ServeBlob
from meshinfer.scheduler.heads import Heads
from meshinfer.scheduler.membership import Membership


def hand(
    catalogue: Catalogue, members: Membership, heads: Heads, peer: str, want: m.Want
) -> list[Effect]:
    """The bytes that a peer wants, or word that there are none for it."""
    device = members.by_peer(peer)
    if device is None:
        programs = heads.programs_granted(peer)
    else:
        programs = _programs(catalogue, device.name)
    for model, program in programs:
        if want.digest == program.model or want.digest in program.weights:
            if device is not None and not want.offset:
                device.blobs += 1
            return [ServeBlob(peer, want.digest, want.offset, want.length, model)]
    fields = {"peer": peer, "blob": want.digest[:12]}
    note = Note("info", "a blob is not handed out: no task of its peer needs it", fields)
    return [note, Send(Plane.BULK, peer, m.Gone(digest=want.digest))]


def _programs(catalogue: Catalogue, device: str) -> Iterator[tuple[str, m.Program]]:
    """All that a device was told to load, and its model's name."""
    for made in catalogue.deployments.values():
        for program in (*made.programs.get(device, ()), *made.spare_programs(device)):
            yield made.model.name, program
