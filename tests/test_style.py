"""Style as a test: what no linter here checks. Each check is shown to find what it forbids."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from conftest import PURE

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("meshinfer", "cluster")
FILE_LINES = 400
FUNCTION_LINES = 60

LONGER_FILES: dict[str, str] = {
    "meshinfer/scheduler/events.py": "every event and effect of the three cores, in one list each",
    "meshinfer/protocol/messages.py": "every message of the wire, in the one union that is decoded",
}
"""Files that may exceed FILE_LINES, each with its reason."""

Finding = tuple[int, str]


def package_files() -> list[Path]:
    """Every Python file of the two packages."""
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def script_files() -> list[Path]:
    """The scripts that are Python, by their extension or their first line."""
    return sorted(
        path
        for path in (ROOT / "scripts").rglob("*")
        if path.is_file() and (path.suffix == ".py" or is_python_script(path))
    )


def is_python_script(path: Path) -> bool:
    """Whether the file opens with a Python shebang."""
    with path.open("rb") as file:
        first = file.readline(200)
    return first.startswith(b"#!") and b"python" in first


def all_files() -> list[Path]:
    """Everything written in Python here."""
    return package_files() + sorted((ROOT / "tests").rglob("*.py")) + script_files()


def missing_docstring(tree: ast.Module) -> Iterator[Finding]:
    """A file that does not open with its rule."""
    if not (ast.get_docstring(tree) or "").strip():
        yield 1, "does not open with a docstring"


def long_functions(tree: ast.Module) -> Iterator[Finding]:
    """Functions whose body, without the docstring, has more than FUNCTION_LINES lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {lines} lines, at most {FUNCTION_LINES}"


def findings(files: list[Path], check: Callable[[ast.Module], Iterator[Finding]]) -> list[str]:
    """What a check finds in files, one line each."""
    assert files, "no files to check"
    return [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in files
        for line, text in check(ast.parse(path.read_text(), str(path)))
    ]


def test_every_python_file_opens_with_its_rule() -> None:
    assert findings(all_files(), missing_docstring) == []


def test_no_function_is_too_long() -> None:
    assert findings(all_files(), long_functions) == []


def test_no_package_file_is_too_long_without_a_reason() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in package_files()
    }
    long = {name: length for name, length in lengths.items() if length > FILE_LINES}
    assert lengths
    assert {name: long[name] for name in long if not LONGER_FILES.get(name)} == {}
    assert set(LONGER_FILES) <= set(long), "a listed file is short now: take it off the list"


def test_no_package_file_is_empty() -> None:
    files = [
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    empty = [path for path in files if path.name != "py.typed" and not path.read_bytes().strip()]
    assert files
    assert empty == []


@pytest.mark.parametrize(("lines", "found"), [(FUNCTION_LINES, 0), (FUNCTION_LINES + 1, 1)])
def test_a_function_may_have_just_so_many_lines(lines: int, found: int) -> None:
    text = 'def f():\n    """Says."""\n' + "    x = 1\n" * lines
    assert len(list(long_functions(ast.parse(text)))) == found


PROBE = """
import importlib, importlib.abc, sys
wanted, heavy = sys.argv[1], sys.argv[2].split(",")

class Witness(importlib.abc.MetaPathFinder):
    seen = []
    def find_spec(self, name, path=None, target=None):
        if name in heavy:
            self.seen.append(name)

sys.meta_path.insert(0, Witness())
importlib.import_module(wanted)
print(",".join(sorted({*Witness.seen, *(name for name in heavy if name in sys.modules)})))
"""


def heavy_imports(module: str, heavy: str) -> str:
    """Which of the heavy modules a fresh interpreter loads, or tries to, to import `module`."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, module, heavy],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("meshinfer", "torch,onnxscript,ray"),
        ("cluster", "torch,onnxscript,ray"),
        ("cluster.worker", "torch,onnxscript,ray,onnx,onnx_ir"),
        ("cluster.coordinator", "torch,onnxscript,ray,onnx,onnx_ir,onnxruntime,meshinfer.planner"),
    ],
)
def test_importing_a_module_leaves_the_heavy_ones_alone(module: str, heavy: str) -> None:
    assert heavy_imports(module, heavy) == ""


def test_a_heavy_import_would_be_noticed() -> None:
    assert heavy_imports("onnx", "torch,onnx") == "onnx"


STARTS = ("LocalCluster(", "Lab(", "daemon(", "Clusters(")


def starters(names: Iterable[str]) -> list[str]:
    """Those of the test files that start a cluster, or are not there."""
    paths = {name: ROOT / "tests" / f"{name}.py" for name in names}
    return [
        name
        for name, path in sorted(paths.items())
        if not path.exists() or any(word in path.read_text() for word in STARTS)
    ]


def test_what_runs_beside_the_rest_starts_no_cluster() -> None:
    assert starters(PURE - {"test_style"}) == []  # which names them


def test_a_cluster_or_a_stale_name_among_it_would_be_noticed() -> None:
    assert starters(["test_kills", "test_gone", "test_plan"]) == ["test_gone", "test_kills"]
