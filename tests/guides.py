"""Guides as programs: what a block in docs/ shows is run to the letter, and held to its output.

A block whose language is followed by ``run`` is run, in the order of the guide: ``sh run`` in one
bash, ``python run`` in one Python, both in an empty folder that has ``cluster/data`` as a checkout
has. A ``text`` block right after it is what it prints; numbers are not compared, ``...`` is
anything. `scripts/guides` writes those blocks, and the pictures, from such a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GUIDES = sorted(DOCS.glob("*.md"))
PAGES = [*GUIDES, *(ROOT / n for n in ("README.md", "SECURITY.md", "deploy/README.md"))]
"""Everything that shows commands to people who use MeshInfer."""

BLOCK_S = 120.0
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PICTURE = re.compile(r"\]\(pictures/([\w.-]+)\)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_DIGEST = re.compile(r"\b[0-9a-f]{12,}\b")
_DIRECTLY = ["```", "```text"]
_OPERATOR = re.compile(r"[;&|<>()]+|do|then|\\n")

_PYTHON = """
import json, linecache, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    asked = json.loads(line)
    code, where = 0, asked["where"]
    linecache.cache[where] = (1, None, asked["text"].splitlines(True), where)  # as of a file
    try:
        exec(compile(asked["text"], where, "exec"), names)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        code = 1
    print(f"\\n{asked['mark']} {code}", flush=True)
"""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. ``span``: of its text in the page; ``line``: of its first line."""

    language: str
    flags: frozenset[str]
    text: str
    span: tuple[int, int]
    line: int


@dataclass(frozen=True, slots=True)
class Ran:
    """A block as it was run, what it printed, and the block that says what it prints, if any."""

    block: Block
    code: int
    output: str
    shown: Block | None


def blocks(page: str) -> list[Block]:
    found = []
    for match in _FENCE.finditer(page):
        language, *flags = match[1].split() or [""]
        line = page.count("\n", 0, match.start()) + 2
        found.append(Block(language, frozenset(flags), match[2], match.span(2), line))
    return found


def pictures(page: str) -> list[str]:
    """File names of the pictures that a guide shows, which what it runs must make."""
    return _PICTURE.findall(page)


def masked(text: str) -> str:
    """Without numbers, digests and widths, which differ from run to run and between machines."""
    text = _NUMBER.sub("0", _DIGEST.sub("0", text.strip()))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "\n".join(lines)


def fits(shown: str, output: str) -> bool:
    pattern = re.escape(masked(shown)).replace(re.escape("..."), ".*")
    return re.fullmatch(pattern, masked(output), re.DOTALL) is not None


# --- running


class _Shell:
    """A bash or Python that is given one block after another."""

    def __init__(self, command: list[str], folder: Path, err: IO[str] | None) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MESHINFER_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if err is None else err,
            text=True,
            env={
                **kept,
                "PATH": path,
                "PYTHONPATH": str(ROOT),
                "PYTHONSAFEPATH": "1",
                "PYTHONUNBUFFERED": "1",
                "HOME": str(folder),
                "COLUMNS": "100",
                # Several of these may run on one machine, beside a real cluster.
                "MESHINFER_CLUSTER": f"guide-{secrets.token_hex(4)}",
                "MESHINFER_COORDINATOR_PORT": "0",
            },
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def run(self, what: str, mark: str) -> tuple[int, str]:
        """Its exit code and output. AssertionError where it does not end."""
        assert self._process.stdin is not None
        self._process.stdin.write(what)
        self._process.stdin.flush()
        out: list[str] = []
        deadline = time.monotonic() + BLOCK_S
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                line = self._lines.get(timeout=left)
                if line.startswith(mark):
                    return int(line.split()[1]), "".join(out).removesuffix("\n")
                assert line, f"it ended:\n{''.join(out)}"
                out.append(line)
        raise AssertionError(f"no end after {BLOCK_S:g} s:\n{''.join(out)}")

    def close(self) -> None:
        """End it and everything that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        self._process.kill()
        self._process.wait()
        self._reader.join(timeout=10)  # all that had its stdout has ended
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def run_guide(page: str, folder: Path, name: str) -> Iterator[Ran]:
    """Run a guide's blocks in a new folder."""
    data = folder / "cluster" / "data"
    data.mkdir(parents=True)
    for file in ("upscale.onnx", "photo.jpg"):
        shutil.copy(ROOT / "cluster" / "data" / file, data)
    shells: dict[str, _Shell] = {}
    commands = {"sh": ["bash"], "python": [sys.executable, "-c", _PYTHON]}
    found, log = blocks(page), folder / "log"
    opened = contextlib.ExitStack()
    try:
        for i, block in enumerate(found):
            if "run" not in block.flags:
                continue
            if block.language not in shells:
                # Logs come in between as they like; of a shell's commands stderr is a part.
                err = None if block.language == "sh" else opened.enter_context(log.open("w"))
                shells[block.language] = _Shell(commands[block.language], folder, err)
            mark = secrets.token_hex(12)
            where = f"{name}:{block.line}"
            if block.language == "python":
                what = json.dumps({"text": block.text, "where": where, "mark": mark}) + "\n"
            else:
                script = folder / ".block"
                script.write_text(block.text)
                what = f". ./{script.name} </dev/null; printf '\\n%s %d\\n' {mark} $?\n"
            code, output = shells[block.language].run(what, mark)
            after = found[i + 1] if i + 1 < len(found) else None
            shown = after if after is not None and after.language == "text" else None
            if shown is not None and page[block.span[1] : shown.span[0]].split() != _DIRECTLY:
                shown = None  # there is something said in between: it is not what this prints
            yield Ran(block, code, output, shown)
    finally:
        for shell in shells.values():
            shell.close()
        opened.close()


# --- commands that are shown


def commands_of(page: str) -> Iterator[tuple[list[str], bool]]:
    """The arguments of every ``meshinfer`` command line that a page shows, and whether it is whole:
    in a block it is; in a sentence it may be named only."""
    for block in blocks(page):
        if block.language in ("sh", "bash", "console"):
            for words in _split(block.text):
                yield words, True
    for code in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", _FENCE.sub("", page)):
        for words in _split(" ".join(code.split())):
            yield words, False


def _split(script: str) -> Iterator[list[str]]:
    script = re.sub(r"<<-?\s*'?(\w+)'?.*?^\1$", "", script, flags=re.MULTILINE | re.DOTALL)
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # prose, with an apostrophe
            continue
        yield from _in_words(words)


def _in_words(words: list[str]) -> Iterator[list[str]]:
    current: list[str] | None = None
    before = ""
    for word in words:
        if _OPERATOR.fullmatch(word):
            if current is not None:
                yield current[:-1] if word[0] in "<>" and before in ("1", "2") else current
            current, before = None, ""
            continue
        if current is None and _is_program(word) and _may_precede(before):
            current = []
        elif current is not None:
            if _is_program(word) and current[:2] == ["lab", "run"]:
                yield [*current, "true"]
                current = []
            else:
                current.append(re.sub(r"\$\{?\w+\}?", "1", word))
        elif " " in word:  # ssh pi@pi-2 'sudo meshinfer worker'
            yield from _split(word)
        before = word
    if current is not None:
        yield current


def _is_program(word: str) -> bool:
    return word == "meshinfer" or word.endswith("/bin/meshinfer")


def _may_precede(before: str) -> bool:
    """In the place of a command: first, after sudo, or after assignments."""
    return before in ("", "sudo", "exec", "--", "time") or "=" in before
