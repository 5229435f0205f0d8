"""A worker process whose results are other than what its engine computed: a broken device, or one
that means harm. All else in it is as on any device.

``python tests/liar.py KIND SHARE OPTIONS``: ``wrong``: one value of each output is; ``noise``: all
are by 1e-7 of themselves, as on a device of another numeric class. SHARE: of its tasks.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cluster import worker
from meshinfer.engine import Array
from meshinfer.engine.ort import OrtPrepared

Forge = Callable[[Array], Array]


def wrong(array: Array) -> Array:
    made = array.copy()
    made.flat[random.randrange(made.size)] += abs(made).max() + 1
    return made


def noise(array: Array) -> Array:
    factors = 1 + 1e-7 * np.random.default_rng().standard_normal(array.shape)
    return (array * factors).astype(array.dtype)


def forge(kind: Forge, share: float) -> None:
    """From now on, what this process's engine gives is not what it computed."""
    honest = OrtPrepared.run

    def run(self: OrtPrepared, inputs: Mapping[str, Array]) -> Sequence[Array]:
        outputs = honest(self, inputs)
        return [kind(a) for a in outputs] if random.random() < share else outputs

    OrtPrepared.run = run  # type: ignore[method-assign]


if __name__ == "__main__":
    forge({"wrong": wrong, "noise": noise}[sys.argv[1]], float(sys.argv[2]))
    sys.exit(worker.main(sys.argv[3:]))
