"""Which addresses mean a Ray cluster. Ray itself is imported only when one is given."""

from __future__ import annotations

import os
from typing import Any

from cluster.locate import VARIABLE

SCHEME = "ray://"


class MayBeRay:
    """A client class whose ``address`` (or $MESHINFER_COORDINATOR) may be ``ray://auto`` or
    ``ray://HOST:PORT``: then a ``RayClient`` is made in its place."""

    def __new__(cls, address: str | None = None, *_: Any, **options: Any) -> Any:
        address = address or os.environ.get(VARIABLE)
        if not isinstance(address, str) or not address.startswith(SCHEME):
            return super().__new__(cls)
        from cluster.ray_backend.client import RayClient

        return RayClient(address, **options)
