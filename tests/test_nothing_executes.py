"""Nothing that is read runs: no file of ours knows a way to run or load code that came as data.

The syntax tree of both packages and of the scripts is walked. Whatever is named in the tables below
may not even be referred to, under whatever name it was imported; what is allowed all the same is in
ALLOWED with its reason. Each table is shown to find what was planted.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_style import Finding, package_files, script_files

ROOT = Path(__file__).resolve().parent.parent

MODULES = frozenset(
    # They load objects, which means code, or run it.
    """
    _pickle cPickle cloudpickle copyreg dill joblib marshal multiprocessing pickle pickletools
    shelve bdb cProfile code codeop doctest imp pdb profile pty runpy timeit trace zipimport
    """.split()
    # Memory as the writer wants it; libraries by name.
    + "cffi ctypes _ctypes numpy.ctypeslib numba torch.utils.cpp_extension".split()
    # Their loaders make objects by the names in the file, or evaluate what is in it.
    + "yaml ruamel jsonpickle logging.config torch.package".split()
    + ["concurrent.futures.process", "concurrent.futures.ProcessPoolExecutor"]
    # Archives write where their members say; XML expands entities.
    + "tarfile zipfile xml xmlrpc".split()
)
"""Modules that may not be imported, nor any inside them."""

NAMES = frozenset(
    # Builtins.
    "eval exec compile __import__ breakpoint globals locals __builtins__ __loader__".split()
    + [f"builtins.{name}" for name in "eval exec compile __import__ breakpoint".split()]
    # Shells, and other programs by a string. (subprocess takes lists here, without a shell.)
    + "os.system os.popen os.startfile asyncio.create_subprocess_shell".split()
    + "subprocess.getoutput subprocess.getstatusoutput".split()
    + [f"os.{kind}{how}" for kind in ("exec", "spawn") for how in "l le lp lpe v ve vp vpe".split()]
    + "os.posix_spawn os.posix_spawnp".split()
    # Objects out of files.
    + "torch.load torch.jit.load torch.export.load torch.hub torch.classes.load_library".split()
    + "torch.ops.load_library pandas.read_pickle numpy.lib.format.read_array".split()
    + "ast.literal_eval typing.get_type_hints inspect.get_annotations".split()
    # Files that somebody else may have put there first; archives.
    + "tempfile.mktemp os.tmpnam shutil.unpack_archive".split()
)
"""What may not be referred to, by its full name; nor anything inside it."""

ATTRIBUTES = frozenset(
    "send_pyobj recv_pyobj".split()  # pyzmq's pickle
    + "extractall enable_load_extension load_extension register_custom_ops_library".split()
    + "__globals__ __subclasses__ __code__ __reduce__ __reduce_ex__ __setstate__".split()
    # Pillow's bounds: they hold for the whole process.
    + "LOAD_TRUNCATED_IMAGES MAX_IMAGE_PIXELS MAX_TEXT_CHUNK MAX_TEXT_MEMORY SAFEBLOCK".split()
)
"""Attributes that nothing may have, whatever it is an attribute of."""

FALSE_OR_ABSENT = frozenset({"shell", "allow_pickle"})
"""Keyword arguments that may only be False."""

NEEDED = {
    "numpy.load": ("allow_pickle", "a file that is no array would be unpickled"),
    "PIL.Image.open": ("formats", "it has some forty decoders, and one starts Ghostscript"),
}
"""Calls that must give a keyword argument, and why."""

PROGRAMS = frozenset(
    f"subprocess.{name}" for name in "run Popen call check_call check_output".split()
)
DYNAMIC = frozenset({"importlib.import_module", "importlib.__import__"})
LOOKUPS = frozenset(
    {"getattr", "setattr", "delattr", "operator.attrgetter", "operator.methodcaller"}
)

_OURS = "a name of a table in our own code, never one that was received"
_NEXT = "this program becomes the next one, by a list of arguments and without a shell"
_CHILDREN = "its own children, by pipes that nobody else has"
_LOOKED_UP = "calls what it looks up by a name that is not written here"
_AGAIN = (
    "bench",
    "bench_curve",
    "bench_links",
    "bench_messages",
    "bench_planner",
    "bench_profile",
    "chaos",
    "try_arm",
    "zoo",
)

ALLOWED = {
    ("meshinfer/__init__.py", "importlib.import_module of a name that is not written here"): _OURS,
    ("cluster/loop.py", _LOOKED_UP): "the level of a log line, which a core chose",
    ("cluster/gate.py", _LOOKED_UP): "lines on stdin of whoever started it, for tests",
    ("scripts/bench_parts/session.py", _LOOKED_UP): "lines on stdin of the bench, do_* only",
    ("cluster/simulate.py", "imports multiprocessing"): _CHILDREN,
    ("cluster/simulate.py", "imports concurrent.futures.ProcessPoolExecutor"): _CHILDREN,
    ("scripts/bench_curve", "imports multiprocessing"): _CHILDREN,
    ("scripts/bench_curve", "imports multiprocessing.connection.Connection"): _CHILDREN,
    ("cluster/cli/daemons.py", "refers to os.execv"): _NEXT,
    ("cluster/heap.py", "refers to os.execve"): _NEXT,
    ("cluster/heap.py", "imports ctypes"): "libc's mallopt and malloc_trim, of this very process",
    ("cluster/cli/lab.py", "refers to os.execvpe"): _NEXT,
    **{(f"scripts/{name}", "refers to os.execvp"): _NEXT for name in _AGAIN},
}
"""(file, what is found) and why it may be there. Every entry is still found."""


# --- the walk -------------------------------------------------------------------------------------


def executes(tree: ast.Module) -> Iterator[Finding]:
    """Whatever could run or load code that came as data."""
    names = imported_names(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        match node:
            case ast.Import() | ast.ImportFrom():
                yield from _of_import(node)
            case ast.Call():
                yield from _of_call(node, names)
            case ast.Attribute() | ast.Name():
                yield from _of_name(node, names, is_called=id(node) in called)


def _of_import(node: ast.Import | ast.ImportFrom) -> Iterator[Finding]:
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    elif node.level:
        return
    else:
        found = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in found:
        if within(name, MODULES) or within(name, NAMES):
            yield node.lineno, f"imports {name}"
        if name.endswith(".*"):
            yield node.lineno, f"imports {name}: nobody sees which names these are"


def _of_call(node: ast.Call, names: dict[str, str]) -> Iterator[Finding]:
    name, given = dotted(node.func, names), {k.arg or "": k.value for k in node.keywords}
    for word in FALSE_OR_ABSENT & given.keys():
        if not is_literal(given[word], False):
            yield node.lineno, f"gives {word}="
    if name in NEEDED and NEEDED[name][0] not in given:
        yield node.lineno, f"calls {name} without {NEEDED[name][0]}=: {NEEDED[name][1]}"
    if name in PROGRAMS and node.args and is_text(node.args[0]):
        yield node.lineno, f"{name} of a text, not of a list"
    if name in DYNAMIC:
        wanted = text_of(node.args[0]) if node.args else None
        if wanted is None:
            yield node.lineno, f"{name} of a name that is not written here"
        elif within(wanted, MODULES):
            yield node.lineno, f"imports {wanted}"
    if name in LOOKUPS:
        yield from _of_lookup(node, name, names)
    inner = node.func
    if (
        isinstance(inner, ast.Call)
        and dotted(inner.func, names) in LOOKUPS
        and len(inner.args) > 1
        and text_of(inner.args[1]) is None
    ):
        yield node.lineno, "calls what it looks up by a name that is not written here"


def _of_lookup(node: ast.Call, name: str, names: dict[str, str]) -> Iterator[Finding]:
    """``getattr(pickle, "loads")`` is ``pickle.loads``."""
    at = 0 if name.startswith("operator.") else 1
    wanted = text_of(node.args[at]) if len(node.args) > at else None
    of = dotted(node.args[0], names) if at else ""
    if wanted is None:
        if of.split(".")[0] in {full.split(".")[0] for full in names.values()}:
            yield node.lineno, f"looks up in {of} a name that is not written here"
        return
    for part in wanted.split("."):
        if part in ATTRIBUTES:
            yield node.lineno, f"refers to .{part}"
    if within(f"{of}.{wanted}", NAMES) or within(f"{of}.{wanted}", MODULES):
        yield node.lineno, f"refers to {of}.{wanted}"


def _of_name(
    node: ast.Attribute | ast.Name, names: dict[str, str], *, is_called: bool
) -> Iterator[Finding]:
    name = dotted(node, names)
    if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
        yield node.lineno, f"refers to .{node.attr}"
    elif name in NAMES:
        yield node.lineno, f"refers to {name}"
    elif name in DYNAMIC and not is_called:
        yield node.lineno, f"hands {name} on"


def imported_names(tree: ast.Module) -> dict[str, str]:
    """Local name to the full name that it was imported from, anywhere in the file; also through one
    assignment (``load = numpy.load``)."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                names[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            full, target = dotted(node.value, names), node.targets[0]
            if isinstance(target, ast.Name) and (full in NEEDED or full in PROGRAMS | LOOKUPS):
                names[target.id] = full
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of `a.b.c`, through the file's imports; empty for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def within(name: str, table: frozenset[str]) -> bool:
    """Whether the name, or what it lies in, is in the table."""
    parts = name.split(".")
    return any(".".join(parts[: i + 1]) in table for i in range(len(parts)))


def text_of(node: ast.expr) -> str | None:
    """A text that is written there as it is."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def is_text(node: ast.expr) -> bool:
    return text_of(node) is not None or isinstance(node, ast.JoinedStr)


def is_literal(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


# --- what holds -----------------------------------------------------------------------------------


def found_in(files: list[Path]) -> list[tuple[str, str, int]]:
    """File, finding and line."""
    assert files, "no files to check"
    return [
        (str(path.relative_to(ROOT)), text, line)
        for path in files
        for line, text in executes(ast.parse(path.read_text(), str(path)))
    ]


def test_nothing_runs_or_loads_code_from_data() -> None:
    found = found_in(package_files() + script_files())
    assert [each for each in found if each[:2] not in ALLOWED] == []
    assert set(ALLOWED) <= {each[:2] for each in found}, "what is allowed is not there any more"


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "exec(code)",
        "run = eval",
        "list(map(eval, texts))",
        "import builtins\nbuiltins.exec(text)",
        "compile(text, 'f', 'exec')",
        "__import__(name)",
        "globals()['ev' + 'al'](text)",
        "import pickle",
        "import pickle as p",
        "from pickle import loads as x",
        "from os import path, system as run",
        "def f():\n    import marshal",
        "import shelve",
        "import dill.source",
        "import cloudpickle, json",
        "import multiprocessing.connection",
        "from multiprocessing import Pool",
        "from concurrent.futures import ProcessPoolExecutor",
        "from importlib import import_module as load\nload(name)",
        "import importlib\nimportlib.import_module(f'{name}')",
        "import importlib\nimportlib.import_module('pickle')",
        "import importlib\nfind = importlib.import_module",
        "import numpy\ngetattr(numpy, name)",
        "import torch\ngetattr(torch, 'load')(path)",
        "import os\ngetattr(os, 'system')",
        "import operator\noperator.methodcaller('recv_pyobj')",
        "getattr(thing, name)(data)",
        "getattr(function, '__globals__')",
        "f.__globals__['x']",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path)",
        "import torch\ntorch.export.load(path)",
        "import torch\ntorch.jit.load(path)",
        "from torch import load as fetch",
        "import yaml",
        "from yaml import safe_load",
        "import os\nos.system('ls')",
        "import os\nos.execv(path, arguments)",
        "import subprocess\nsubprocess.run(['ls'], shell=True)",
        "import subprocess\nsubprocess.run(['ls'], shell=flag)",
        "import subprocess\nsubprocess.Popen('ls -l')",
        "from subprocess import run\nrun(f'ls {path}')",
        "import asyncio\nasyncio.create_subprocess_shell(text)",
        "socket.send_pyobj(x)",
        "receive = socket.recv_pyobj",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nload = np.load\nload(path)",
        "from numpy import load as read\nread(path)",
        "from numpy.lib.format import read_array",
        "import ctypes",
        "from ctypes import CDLL",
        "import numpy.ctypeslib",
        "import zipfile",
        "import tarfile as t",
        "archive.extractall(folder)",
        "import shutil\nshutil.unpack_archive(path)",
        "import tempfile\ntempfile.mktemp()",
        "from tempfile import mktemp",
        "from PIL import Image\nImage.open(path)",
        "import PIL.Image\nPIL.Image.open(path)",
        "from PIL import ImageFile\nImageFile.LOAD_TRUNCATED_IMAGES = True",
        "options.register_custom_ops_library(path)",
        "connection.enable_load_extension(True)",
        "import ast\nast.literal_eval(text)",
        "import xml.etree.ElementTree",
        "from os import *",
    ],
)
def test_a_planted_thing_is_found(text: str) -> None:
    assert len(list(executes(ast.parse(text)))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "import re\nre.compile(text)",
        "code = 1\nprint(code)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import onnx\nonnx.load(path)",
        "from .pickles import load\nload(path)",
        "from . import pickle",
        "from PIL import Image\nImage.open(path, formats=['PNG'])",
        "getattr(error, 'strerror', error)",
        "from importlib import import_module\nimport_module('json')",
        "import os\nos.fork()",
    ],
)
def test_an_innocent_thing_is_not_found(text: str) -> None:
    assert list(executes(ast.parse(text))) == []
