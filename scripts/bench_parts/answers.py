"""Whether answers are the oracle's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle

from bench_parts.models import Model


class Wrong(Exception):
    """An answer is not the oracle's."""


class Answers:
    """Holds answers against the oracle, each file of answers once."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[tuple[Path, int], bool] = {}
        self._truths: dict[int, dict[str, Any]] = {}

    def check(self, folder: Path, results: Sequence[Mapping[str, Any]]) -> bool:
        """Whether they are the oracle's bit for bit. Raises ``Wrong``."""
        identical = True
        for result in results:
            key = (folder / result["answer"], result["request"])
            if key not in self._known:
                self._known[key] = self._is_identical(
                    key[1], dict(np.load(key[0], allow_pickle=False))
                )
            identical &= self._known[key]
        return identical

    def _is_identical(self, request: int, outputs: Mapping[str, Any]) -> bool:
        path, feeds = self._model.path, self._model.requests[request].feeds
        if request not in self._truths:
            self._truths[request] = oracle.reference(path, feeds)
        try:
            return oracle.assert_exact(path, feeds, outputs, truth=self._truths[request])
        except AssertionError as error:
            raise Wrong(f"{self._model.title}: {error}") from error
