"""``Work``: what a task takes on any device, as a vector in which its seconds are linear.

Linear, so that prefix sums over a graph and differences of them are works too: the planner prices
a block on a device by subtracting two numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import add, sub

from meshinfer.cost.kinds import OpKind

KINDS = len(OpKind)
BYTES, KERNELS = KINDS, KINDS + 1
AMOUNTS = KINDS + 2
NOTHING: tuple[float, ...] = (0.0,) * AMOUNTS


@dataclass(frozen=True, slots=True)
class Work:
    """``amounts``: FLOPs by ``OpKind``, then bytes moved through memory, then kernels started.

    ``peak_bytes``: most bytes of values held at once; it does not add up, so sums and multiples
    have none.
    """

    amounts: tuple[float, ...] = NOTHING
    peak_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(tuple(map(add, self.amounts, other.amounts)))

    def __sub__(self, other: Work) -> Work:
        return Work(tuple(map(sub, self.amounts, other.amounts)))

    def __mul__(self, factor: float) -> Work:
        return Work(tuple([a * factor for a in self.amounts]))

    __rmul__ = __mul__

    @property
    def flops(self) -> float:
        """Operations of all kinds."""
        return sum(self.amounts[:KINDS])

    @property
    def nbytes(self) -> float:
        """Bytes read from and written to memory."""
        return self.amounts[BYTES]

    @property
    def kernels(self) -> float:
        """Kernels started."""
        return self.amounts[KERNELS]

    def of(self, kind: OpKind) -> float:
        """FLOPs of one kind."""
        return self.amounts[kind]


def work_of(kind: OpKind, flops: float, nbytes: float, kernels: float = 1.0) -> Work:
    """Work of one operator."""
    amounts = [0.0] * AMOUNTS
    amounts[kind], amounts[BYTES], amounts[KERNELS] = float(flops), float(nbytes), kernels
    return Work(tuple(amounts))
