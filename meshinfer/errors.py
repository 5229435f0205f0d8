"""Every error a user can meet, each with a hint that says what to do next.

MeshInferError
├── InvalidInput        the caller's model, array, plan or option is wrong   (exit 2; of inputs 1)
├── ModelNotFound       no deployment of that name or version                    (exit 2)
├── QueueFull           the bounded queue is full; retry_after_s says when       (exit 75)
├── DeadlineExceeded    the request's deadline passed first                      (exit 75)
├── NotEnoughMemory     no plan fits the devices' memory                         (exit 75)
├── ClusterUnavailable  no coordinator, or no worker that can compute            (exit 69)
├── WorkerLost          the request's devices died more often than is allowed    (exit 75)
├── AuthError           a key was refused, or is missing                         (exit 77)
├── ProtocolMismatch    the two sides speak no common protocol version           (exit 76)
└── ConfigurationError  a setting, a port or a file of ours cannot be used       (exit 78)
"""

from __future__ import annotations

from typing import ClassVar


class MeshInferError(Exception):
    """Base of all errors raised by MeshInfer. ``hint`` says what to do next."""

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class InvalidInput(MeshInferError):
    """The model, array, plan or option given is wrong; nothing was changed."""

    exit_code = 2


class ModelNotFound(MeshInferError):
    """No deployment has this name (or this version)."""

    exit_code = 2


class QueueFull(MeshInferError):
    """The coordinator's bounded queue is full. ``retry_after_s`` is its estimate, in seconds."""

    exit_code = 75

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(MeshInferError):
    """The request's deadline passed before its answer was there."""

    exit_code = 75


class NotEnoughMemory(MeshInferError):
    """No plan fits into what the devices granted."""

    exit_code = 75


class ClusterUnavailable(MeshInferError):
    """No coordinator answers, or it has no worker that can compute."""

    exit_code = 69


class WorkerLost(MeshInferError):
    """The devices that computed this request were lost more often than is allowed."""

    exit_code = 75


class AuthError(MeshInferError):
    """A key was refused, or is missing."""

    exit_code = 77


class ProtocolMismatch(MeshInferError):
    """The two sides have no protocol version in common."""

    exit_code = 76


class ConfigurationError(MeshInferError):
    """A setting, a port or a file of MeshInfer's own cannot be used."""

    exit_code = 78


BY_NAME: dict[str, type[MeshInferError]] = {
    cls.__name__: cls
    for cls in (
        InvalidInput,
        ModelNotFound,
        QueueFull,
        DeadlineExceeded,
        NotEnoughMemory,
        ClusterUnavailable,
        WorkerLost,
        AuthError,
        ProtocolMismatch,
        ConfigurationError,
        MeshInferError,
    )
}
"""Error classes by their name on the wire; see ``meshinfer.protocol``."""
