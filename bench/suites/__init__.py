"""The suites: each module says what to measure, and how; ``bench.worker`` runs it in a process of its own.

A suite has these names:

* ``points(quick)``: the :class:`Point` list, the most important first;
* ``groups(point)``: tuples of candidates to time together, each tuple in a process of its own and "dense" in each;
* ``problem(point)``: a problem as ``kron_kernels.testing.timing.compare`` takes it;
* ``candidate(problem, name)``: a candidate of that problem; raises :class:`Missing` where it cannot run here;
* ``columns(problem, candidate)``: columns of its own, named in ``COLUMNS``;
* ``SECONDS``: time for each candidate at each point;
* optional: ``beside(problem)``, variants to time in the same rounds; ``options()``, keyword arguments for ``compare``;
  ``memory_names(point)`` and ``memory(point, name)``, the peak growth of a fresh process in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

NAMES = ("layers", "ffn", "encoder", "distill", "adapters", "gpu")


class Missing(Exception):
    """The candidate cannot run here; the message says why."""


@dataclass(frozen=True)
class Point:
    """One measurement: everything but the candidate.

    ``input`` is a number of rows ("128") or batch and sequence ("8x128"); ``weights`` are "hot" (one layer, in cache)
    or "cold" (twelve layers in rotation, as in an encoder).
    """

    case: str
    direction: str
    dtype: str
    input: str
    weights: str = "hot"

    @property
    def backward(self) -> bool:
        return self.direction == "forward+backward"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of ``input``."""
        return tuple(map(int, self.input.split("x")))
