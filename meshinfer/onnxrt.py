"""onnxruntime, told before it is imported that it reports to nobody. Import it from here only.

From 1.29 on its official builds for Linux send Microsoft each session's graph name, producer and
hashes of graph and weights, how long runs take, and an id of the device that they leave in
~/.cache/Microsoft, unless ORT_DISABLE_TELEMETRY=1 stands in the environment before (microsoft/
onnxruntime pull request 27379). Whose pictures and models these are did not ask for that. Who sets
the variable means it, and it is left as it is. Seen of 1.32: a thread, three descriptors and 2 MB
less a process.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

__all__ = ["ort"]
