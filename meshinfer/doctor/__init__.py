"""What is wrong, judged from what was probed: each finding says what to do. Probing is cluster's.

The order of findings is that of causes: what the first problem breaks comes after it, so its exit
code is that of all.
"""

from meshinfer.doctor.finding import Finding, Verdict, exit_code, of_error, ok, skipped
from meshinfer.doctor.machine import EngineRun, Room, judge_engine, judge_room
from meshinfer.doctor.members import Member, judge_devices, judge_identity, judge_versions
from meshinfer.doctor.network import (
    Heard,
    Interface,
    Multicast,
    Reached,
    judge_interfaces,
    judge_multicast,
    judge_own_port,
    judge_port,
)

__all__ = [
    "EngineRun",
    "Finding",
    "Heard",
    "Interface",
    "Member",
    "Multicast",
    "Reached",
    "Room",
    "Verdict",
    "exit_code",
    "judge_devices",
    "judge_engine",
    "judge_identity",
    "judge_interfaces",
    "judge_multicast",
    "judge_own_port",
    "judge_port",
    "judge_room",
    "judge_versions",
    "of_error",
    "ok",
    "skipped",
]
