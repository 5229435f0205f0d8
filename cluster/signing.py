"""Manifests are signed as they leave the coordinator and verified before a device's core sees them.

Both are done around a core, which neither signs nor knows of it. The public key comes with the
first ``Welcome``, over the connection that CURVE has authenticated, and is kept from then on.

What this adds to CURVE: CURVE says whose connection it is; that what comes by it is the
coordinator's own word hangs on names and routing being right. A peer that gets itself taken for the
coordinator after a device has joined, by a defect there or with a stolen CURVE key of the
coordinator but not its signing key, has no device load anything, and every blob is what a signed
digest says, whoever stored or carried it. It does not help against the coordinator's host itself,
nor against one that is false when a device first joins, nor in a plaintext cluster before then.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from cluster.keys import read_private, write_private
from cluster.loop import Core
from meshinfer.errors import AuthError
from meshinfer.protocol import messages as m
from meshinfer.protocol.manifest import manifest
from meshinfer.scheduler.events import Arrived, Effect, Event, Note, Send, Stop
from meshinfer.scheduler.telling import COORDINATOR, told

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_FILE = "signing.json"
"""In the coordinator's state folder."""

SIGNER_FILE = "signer.json"
"""In a worker's: whose manifests it takes."""

_COMPLETED = frozenset((m.Install, m.Grant, m.Welcome))


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An Ed25519 pair; ``public`` in hexadecimal."""

    public: str
    private: Ed25519PrivateKey = field(repr=False)

    @staticmethod
    def of(secret: bytes) -> SigningKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        private = Ed25519PrivateKey.from_private_bytes(secret)
        return SigningKey(private.public_key().public_bytes_raw().hex(), private)

    @staticmethod
    def generate() -> SigningKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return SigningKey.of(Ed25519PrivateKey.generate().private_bytes_raw())


def load_or_create_key(state: Path) -> SigningKey:
    """The key pair of the coordinator in this state folder, which is made at its first start."""
    path = state / KEY_FILE
    hint = "restore it; or remove it, and have each device forget this cluster (worker --forget)"
    if not path.exists():
        made = SigningKey.generate()
        secret = made.private.private_bytes_raw().hex()
        write_private(path, {"public": made.public, "secret": secret})
        return made
    fields = read_private(path, "signing key", hint)
    key = SigningKey.of(bytes.fromhex(_hex(path, fields, "secret", hint)))
    if fields.get("public") != key.public:
        raise AuthError(f"the two halves of the key in {path} are of different pairs", hint=hint)
    return key


class Signing:
    """A coordinator's core, whose manifests leave it signed, and which tells who signs."""

    def __init__(self, core: Core, key: SigningKey, coordinator: str) -> None:
        self._core, self._key, self._coordinator = core, key, coordinator
        self.next_deadline = core.next_deadline

    def handle(self, event: Event, now: float) -> list[Effect]:
        effects = self._core.handle(event, now)
        for i, effect in enumerate(effects):
            if type(effect) is Send and type(effect.message) in _COMPLETED:  # isinstance: 1 us
                message = self._completed(effect.message, effect.peer)
                effects[i] = Send(effect.plane, effect.peer, message, effect.payload)
        return effects

    def _completed(self, message: m.AnyMessage, peer: str) -> m.AnyMessage:
        if isinstance(message, m.Welcome):
            return replace(message, signer=self._key.public)
        assert isinstance(message, m.Install | m.Grant)
        signature = self._key.private.sign(manifest(message, peer, self._coordinator))
        return replace(message, signature=signature)


class Verifying:
    """The core of a device or a client, which gets only manifests that the coordinator signed for
    it. ``me``: the peer that it is. ``signer``: the public key, where it is known already;
    ``keep``: is told when it is learnt."""

    def __init__(
        self, core: Core, me: str, signer: str = "", keep: Callable[[str], None] | None = None
    ) -> None:
        self._core, self._me, self._signer, self._keep = core, me, signer, keep
        self._coordinator = ""
        self.next_deadline = core.next_deadline

    def handle(self, event: Event, now: float) -> list[Effect]:
        if isinstance(event, Arrived) and event.peer == COORDINATOR:
            message = event.message
            if isinstance(message, m.Welcome):
                failure = self._learn(message)
                if failure is not None:
                    return [Stop(failure)]
            elif isinstance(message, m.Install | m.Grant) and not self._is_signed(message):
                counted = self._core.handle(Arrived(COORDINATOR, m.Probe()), now)  # it was heard
                return [*counted, *self._refused(message)]
        return self._core.handle(event, now)

    def _learn(self, message: m.Welcome) -> m.Failure | None:
        """From whom to take manifests; why not from this one."""
        if not message.signer or self._signer not in ("", message.signer):
            return m.Failure(
                error="AuthError",
                message="the coordinator signs what is to be loaded with "
                + ("another key than before" if message.signer else "no key"),
                hint="if its state folder was made anew, have this device forget the old cluster: "
                "meshinfer worker --forget; if not, somebody acts as the coordinator",
            )
        if not self._signer and self._keep is not None:
            self._keep(message.signer)
        self._signer, self._coordinator = message.signer, message.coordinator
        return None

    def _is_signed(self, message: m.Install | m.Grant) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        signed = manifest(message, self._me, self._coordinator)
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self._signer))
            key.verify(message.signature, signed)
        except (InvalidSignature, ValueError):  # no signer is known, or it is no key
            return False
        return True

    def _refused(self, message: m.Install | m.Grant) -> list[Effect]:
        """Nothing of it is loaded. A client goes on by the cluster without a grant."""
        text = "a manifest is not signed by the coordinator for this device: nothing is loaded"
        fields = {"deployment": message.deployment, "model": message.model}
        note = Note("error", text, fields)
        if isinstance(message, m.Grant):
            return [note]
        failure = m.Failure(
            error="AuthError",
            message=text,
            hint="somebody may act as the coordinator; look at its log and at meshinfer devices",
        )
        return [note, told(m.Installed(deployment=message.deployment, failure=failure))]


def verifying_in(state: Path, core: Core, me: str, coordinator: str) -> Verifying:
    """The core of a worker with this state folder, where it keeps who signs for the coordinator
    with this CURVE key."""
    keep = partial(keep_signer, state, coordinator)
    return Verifying(core, me, known_signer(state, coordinator), keep)


def known_signer(state: Path, coordinator: str) -> str:
    """Whose manifests this worker takes from the coordinator with this CURVE key; empty before it
    has joined."""
    path = state / SIGNER_FILE
    if not path.exists():
        return ""
    hint = f"remove {path}, if nobody else can have changed it"
    fields = read_private(path, "signer of manifests", hint)
    signer = _hex(path, fields, "signer", hint)
    return signer if fields.get("coordinator") == coordinator else ""  # it has joined another


def keep_signer(state: Path, coordinator: str, signer: str) -> None:
    """Remember it for the next starts."""
    write_private(state / SIGNER_FILE, {"coordinator": coordinator, "signer": signer})


def _hex(path: Path, fields: dict[str, Any], name: str, hint: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        # It may be a secret: it is not repeated.
        raise AuthError(f"{name} in {path} is not 64 hexadecimal digits", hint=hint)
    return value
