"""The suite's own rules: small files first, two halves, two Hypothesis profiles, what is skipped.

`scripts/test` runs both halves at once: what only computes, and what starts processes or opens
sockets. A file is of the second half unless it is in PURE. A `root` test without root is skipped
with its reason, but fails in CI (CI=true): what CI must run is never skipped there. A `slow` test
runs only with --full.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from wires import Net

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests import onnxruntime, the oracle, plain

ORDER = (
    "test_style",
    "test_nothing_executes",
    "test_limits",
    "test_errors",
    "test_geometry",
    "test_graph",
    "test_plan",
    "test_ops",
    "test_halo",
    "test_transfers",
    "test_lower",
    "test_mapreduce",
    "test_engine",
    "test_tiles",
    "test_importers",
    "test_cost",
    "test_protocol",
    "test_token",
    "test_enrolment",
    "test_pictures",
    "test_scheduler",
    "test_draw",
    "test_planner",
    "test_executor",
    "test_exact",
    "test_simulator",
    "test_config",
    "test_telemetry",
    "test_key",
    "test_identity",
    "test_refusals",
    "test_gate",
    "test_transport",
    "test_discovery",
    "test_loop",
    "",  # every other file
    "test_worker",
    "test_coordinator",
    "test_local",
    "test_cluster",
    "test_client",
    "test_cli",
    "test_demo",
    "test_attack",
    "test_chaos",
    "test_ray",
    "test_lab",
    "test_zoo",
)
"""File name prefixes, smallest first: pure values, then whole cores, then sockets and processes."""

PURE = frozenset(
    """
    test_architectures test_architectures_exact test_arrays test_board test_calls test_checks
    test_client_core test_cluster_cores test_come_and_go test_coordinator_core test_counting
    test_cost test_credits
    test_deadlines test_detours test_draw test_drops test_enrolment test_exact test_fuzz_import
    test_fuzz_manifest test_geometry test_halves test_handing test_heads test_health test_hearing
    test_importers test_invented test_leaving test_links test_manifest test_nothing_executes
    test_onnx_operators test_ops_conv_transpose test_ops_gather test_ops_normalise test_ops_pad
    test_paces
    test_ops_pool test_ops_quant test_ops_resize test_pictures test_plan test_planner
    test_planner_adapts test_planner_borders test_planner_search test_planner_wishes test_planted
    test_poison
    test_found_by_seeds test_load test_processor test_takers
    test_protocol test_random_schedules test_recipe test_restart_core test_silence test_simulator
    test_retreat test_strict test_style test_token test_torch test_turns test_upscaler
    test_tiles test_worker_core
    """.split()
)
"""Files whose tests start no process of ours, open no socket and measure nothing: they may run, at
the lowest priority, beside those that do."""

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, print_blob=True)
settings.register_profile(
    "full",
    deadline=None,
    max_examples=1000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --full and --half, the options of the suite."""
    parser.addoption(
        "--full", action="store_true", help="also the slow suites, and many more random examples"
    )
    parser.addoption(
        "--half", choices=("pure", "processes"), help="what only computes, or all the rest"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the Hypothesis profile; its own --hypothesis-profile still wins. And let what tests
    start be interrupted: a shell has what it runs in the background ignore SIGINT, which processes
    inherit from it by us."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile("full" if config.getoption("--full") else "ci")


def rank(path: Path) -> int:
    """Place of a test file in ORDER: the longest prefix that its name starts with."""
    return max(
        (i for i, prefix in enumerate(ORDER) if path.name.startswith(prefix)),
        key=lambda i: len(ORDER[i]),
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the other half."""
    half = config.getoption("--half")
    if half is None or not collection_path.name.startswith("test_"):
        return None
    return True if (collection_path.stem in PURE) != (half == "pure") else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file; the sort is stable, so that a file keeps its own order."""
    items.sort(key=lambda item: (rank(item.path), str(item.path)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot or should not run here, saying why; in CI, lacking root is a failure."""
    if item.get_closest_marker("slow") and not item.config.getoption("--full"):
        pytest.skip("slow: runs only with --full")
    if item.get_closest_marker("root") and os.geteuid() != 0:
        reason = "needs root (network namespaces)"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}, and CI must run it", pytrace=False)
        pytest.skip(f"{reason}: sudo scripts/test")


@pytest.fixture
def net() -> Iterator[Net]:
    """Transports that a test connects; all are closed at its end."""
    from wires import Net

    made = Net()
    yield made
    for one in made.transports:
        one.close()


@pytest.fixture(scope="session")
def lab_here() -> None:
    """A lab can be on this machine; where CI lacks what it takes, that is a failure."""
    from cluster.lab.lab import available
    from meshinfer.errors import ConfigurationError

    try:
        available()
    except ConfigurationError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{error}, and CI must run it", pytrace=False)
        pytest.skip(str(error))
