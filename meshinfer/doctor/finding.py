"""What a check comes to: a verdict in words, and for all that is not well what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from meshinfer.errors import MeshInferError


class Verdict(StrEnum):
    """Of a check. A warning is what works, but not as it might."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check. ``exit_code``: of ``meshinfer.errors``, 0 unless a problem."""

    check: str
    verdict: Verdict
    text: str
    hint: str = ""
    exit_code: int = 0


def exit_code(findings: Iterable[Finding]) -> int:
    """Of the first problem; 0 where there is none."""
    return next((f.exit_code for f in findings if f.verdict is Verdict.PROBLEM), 0)


def ok(check: str, text: str) -> Finding:
    return Finding(check, Verdict.OK, text)


def skipped(check: str, why: str) -> Finding:
    return Finding(check, Verdict.SKIPPED, why)


def warning(check: str, text: str, hint: str) -> Finding:
    return Finding(check, Verdict.WARNING, text, hint)


def problem(check: str, kind: type[MeshInferError], text: str, hint: str) -> Finding:
    return Finding(check, Verdict.PROBLEM, text, hint, kind.exit_code)


def of_error(check: str, error: MeshInferError) -> Finding:
    """A typed error is a problem in words already."""
    return problem(check, type(error), error.message, error.hint)
