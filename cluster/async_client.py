"""``AsyncClient``: the public client for asyncio, thin over ``Client`` and its one I/O thread."""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.admitting import Admitting
from cluster.client import Client
from cluster.results import Deployment, Result, closed_error
from meshinfer.protocol import messages as m
from meshinfer.protocol.token import Role, Token


class AsyncAdmitting:
    """``Admitting`` for asyncio: the same methods, awaited."""

    def __init__(self, admitting: Admitting) -> None:
        self._admitting = admitting

    async def token(self, role: Role = "worker", **options: Any) -> Token:
        """See ``Admitting.token``, with ``ttl_s=`` and ``reusable=`` as there."""
        return await asyncio.to_thread(self._admitting.token, role, **options)

    async def approve(self, who: str) -> tuple[m.Admission, ...]:
        return await asyncio.to_thread(self._admitting.approve, who)

    async def revoke(self, who: str) -> tuple[m.Admission, ...]:
        return await asyncio.to_thread(self._admitting.revoke, who)

    async def listed(self) -> m.AdmittedNow:
        return await asyncio.to_thread(self._admitting.listed)


class AsyncClient:
    """``Client`` for asyncio: the same methods, awaited; the same one I/O thread behind them."""

    def __init__(self, address: str | None = None, **options: Any) -> None:
        self._address, self._options = address, options
        self._client: Client | None = None

    async def __aenter__(self) -> AsyncClient:
        self._client = await asyncio.to_thread(Client, self._address, **self._options)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await asyncio.to_thread(self._client.close)

    @property
    def _open(self) -> Client:
        if self._client is None:
            raise closed_error()
        return self._client

    @property
    def admitting(self) -> AsyncAdmitting:
        """Tokens, and who may connect; for admins. See ``Client.admitting``."""
        return AsyncAdmitting(self._open.admitting)

    async def deploy(self, name: str, model: object, **options: Any) -> Deployment:
        return await asyncio.to_thread(self._open.deploy, name, model, **options)

    async def infer(self, model: str, data: object, **options: Any) -> Result:
        """See ``Client.submit``, with ``outputs=``, ``version=`` and ``deadline_s=`` as there;
        cancelling the task cancels the request."""
        future = await asyncio.to_thread(self._open.submit, model, data, **options)
        return await asyncio.wrap_future(future)

    async def devices(self, *, lost: bool = False) -> tuple[m.DeviceInfo, ...]:
        return await asyncio.to_thread(self._open.devices, lost=lost)

    async def models(self) -> tuple[m.ModelInfo, ...]:
        return await asyncio.to_thread(self._open.models)
