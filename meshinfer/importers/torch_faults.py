"""Which line of a model torch could not export, and what its author can do about it."""

from __future__ import annotations

import linecache
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

EXPORTERS = ("torch", "onnxscript", "onnx_ir")
"""The packages whose own lines, logs and deprecations say nothing of the model."""

_DOCS = "https://docs.pytorch.org/docs/stable/export.html"
_PLACE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_HERE = Path(__file__).parent


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def words(error: Exception) -> str:
    """The first line of the innermost error: torch's own say how to debug torch."""
    causes = [e for e in _chain(error) if str(e).strip()]
    if not causes:
        return type(error).__name__
    line = str(causes[-1]).strip().splitlines()[0]
    return line if len(line) <= 300 else f"{line[:300]}..."


def where(error: Exception) -> str:
    """The line of the model that the error comes from, the innermost that is not torch's own."""
    for each in reversed(list(_chain(error))):
        frames = list(traceback.walk_tb(each.__traceback__))
        for frame, line in reversed(frames):
            file = frame.f_code.co_filename
            if is_users(file):
                return _line(file, line, frame.f_code.co_name)
        for frame, _ in reversed(frames):  # the node that has no ONNX form knows its line
            trace = getattr(frame.f_locals.get("node"), "stack_trace", None) or ""
            for found in reversed(list(_PLACE.finditer(trace))):
                if is_users(found["file"]):
                    return _line(found["file"], int(found["line"]), found["function"])
    return ""


def _line(file: str, number: int, function: str) -> str:
    return f"\n  {file}:{number}, in {function}\n    {linecache.getline(file, number).strip()}"


def is_users(file: str) -> bool:
    """Whether a file may be the model's: not torch's, the exporter's, Python's or this one."""
    if file.startswith("<") and not file.startswith(("<stdin", "<ipython")):
        return False
    path = Path(file)
    for name in EXPORTERS:
        home = getattr(sys.modules.get(name), "__file__", None)
        if home is not None and path.is_relative_to(Path(home).parent):
            return False
    if path.is_relative_to(_HERE):
        return False
    library = Path(sysconfig.get_paths()["stdlib"])
    return not path.is_relative_to(library) or "site-packages" in path.parts


def advice(error: Exception) -> str:
    kinds = {type(e).__name__ for e in _chain(error)}
    if kinds & {"GuardOnDataDependentSymNode", "UserError"}:
        return (
            "Python may not decide by a tensor's values: use torch.where for a choice, and sizes "
            f"that depend on shapes alone; see {_DOCS}"
        )
    if kinds & {"DispatchError", "ConversionError"}:
        return "this operator has no ONNX form: write it with others, or take it out of the model"
    return f"torch.export must be able to follow this line: keep to torch operators; see {_DOCS}"
