"""What people compute is nobody else's business: onnxruntime reports to nobody in our processes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_style import Finding, findings, package_files, script_files

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "meshinfer" / "onnxrt.py"

# ONNX's smallest: one Identity, of opset 13.
_RUN = """
from onnx import TensorProto, helper
import numpy as np
shape = [1]
ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xy"]
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
session.run(None, {"x": np.ones(1, np.float32)})
"""


def elsewhere_imported(tree: ast.Module) -> Iterator[Finding]:
    """Imports of onnxruntime, which only ``meshinfer.onnxrt`` may have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        if any(name.split(".")[0] == "onnxruntime" for name in names):
            yield node.lineno, "imports onnxruntime, not from meshinfer.onnxrt"


def test_onnxruntime_is_imported_in_one_place() -> None:
    files = [path for path in package_files() + script_files() if path != HOME]
    assert findings(files, elsewhere_imported) == []
    assert len(findings([HOME], elsewhere_imported)) == 1


@pytest.mark.parametrize(
    "code", ["import onnxruntime.capi as x", "def f():\n from onnxruntime import y"]
)
def test_an_import_elsewhere_is_found(code: str) -> None:
    assert len(list(elsewhere_imported(ast.parse(code)))) == 1


def left_behind(home: Path, code: str, **more: str) -> list[str]:
    """What a process of its own leaves in its home folder."""
    drop = {"ORT_DISABLE_TELEMETRY", "CI", "XDG_CACHE_HOME"} | {
        name for name in os.environ if name.startswith(("GITHUB_", "GITLAB_", "TF_BUILD"))
    }
    own = {name: value for name, value in os.environ.items() if name not in drop}
    subprocess.run(
        [sys.executable, "-c", code],
        env=own | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | more,
        check=True,
        timeout=60,
    )
    return [str(path.relative_to(home)) for path in home.rglob("*")]


def test_a_session_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    assert left_behind(tmp_path, f"from meshinfer.onnxrt import ort\n{_RUN}") == []


def test_who_wants_the_reports_may_have_them(tmp_path: Path) -> None:
    """And so the test above can fail: this onnxruntime does keep what it will report."""
    ours = f"from meshinfer.onnxrt import ort\n{_RUN}"
    if left_behind(tmp_path / "plain", f"import onnxruntime as ort\n{_RUN}") == []:
        pytest.skip("this onnxruntime reports nothing by itself (none does before 1.29)")
    assert left_behind(tmp_path / "asked", ours, ORT_DISABLE_TELEMETRY="0") != []
