"""The chaos suite's selection: each case is run, and its history judged, as scripts/chaos does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.cases import CASES, Ring

SEED = 1


@pytest.fixture(scope="module")
def ring(lab_here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ring]:
    with Ring(tmp_path_factory.mktemp("chaos"), SEED) as made:
        yield made


@pytest.mark.root
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ci])
def test_the_goal_of_a_case_is_met(ring: Ring, name: str) -> None:
    verdict = ring.run(name)
    kept: Path = ring.folder
    assert verdict.met, f"{name}, seed {SEED}, missed {verdict.missed}; history in {kept}"
