"""The virtual lab: a shelf of small computers, emulated on one machine (DESIGN section 8).

``with Lab(preset("pi4", 4)) as lab, ...``: network namespaces on a bridge, CPU quotas, memory
limits and link rates, in which the real daemons run.
"""

from cluster.lab.lab import Lab, Usage
from cluster.lab.running import LabCluster
from cluster.lab.specs import ABOUT, PRESETS, DeviceSpec, preset

__all__ = ["ABOUT", "PRESETS", "DeviceSpec", "Lab", "LabCluster", "Usage", "preset"]
