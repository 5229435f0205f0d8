"""The virtual lab: a shelf of small computers, emulated on one machine (DESIGN section 8).

``with Lab(preset("pi4", 4)) as lab, ...``: network namespaces on a bridge, CPU quotas, memory
limits and link rates, in which the real daemons run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.lab.lab import Lab, Usage
from cluster.lab.specs import ABOUT, PRESETS, DeviceSpec, preset

if TYPE_CHECKING:
    from cluster.lab.running import LabCluster

__all__ = ["ABOUT", "PRESETS", "DeviceSpec", "Lab", "LabCluster", "Usage", "preset"]


def __getattr__(name: str) -> Any:
    if name == "LabCluster":  # it imports the daemons: not for who only looks
        from cluster.lab.running import LabCluster

        return LabCluster
    raise AttributeError(name)
