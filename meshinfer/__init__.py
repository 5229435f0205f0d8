"""MeshInfer: one vision model on many small computers. ``import meshinfer as mi``.

Nothing heavy is imported until it is used, so a worker stays small.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.async_client import AsyncClient as AsyncClient
    from cluster.client import Client as Client
    from cluster.client import Result as Result
    from cluster.local import LocalCluster as LocalCluster
    from cluster.ray_backend.batch import batch as batch
    from meshinfer.executor import run_plan as run_plan
    from meshinfer.image import ImageSpec as ImageSpec
    from meshinfer.importers import from_torch as from_torch
    from meshinfer.importers import load as load
    from meshinfer.legality import validate as validate
    from meshinfer.plan import Plan as Plan

__version__ = "0.1.0"

_HOMES = {
    "AsyncClient": "cluster.async_client",
    "Client": "cluster.client",
    "Result": "cluster.client",
    "LocalCluster": "cluster.local",
    "batch": "cluster.ray_backend.batch",
    "run_plan": "meshinfer.executor",
    "ImageSpec": "meshinfer.image",
    "load": "meshinfer.importers",
    "from_torch": "meshinfer.importers",
    "Plan": "meshinfer.plan",
    "validate": "meshinfer.legality",
    **dict.fromkeys(
        (
            "MeshInferError InvalidInput ModelNotFound QueueFull DeadlineExceeded NotEnoughMemory "
            "ClusterUnavailable WorkerLost AuthError ProtocolMismatch ConfigurationError"
        ).split(),
        "meshinfer.errors",
    ),
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'meshinfer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
