"""What the service knows of each run: who it is, what it waits for, when it was last heard and adapted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from esper.tamiyo.service.gates import Cadence
from esper.tamiyo.service.protocol import Ask

__all__ = ["RunEntry", "RunTable", "Waiting"]


@dataclass(frozen=True)
class Waiting:
    """A request in the queue; ``arrived_s`` on the service's monotonic clock."""

    ask: Ask
    arrived_s: float
    order: int


@dataclass
class RunEntry:
    """One registered run.

    Attributes:
        run_id: Of the run.
        sender: ZeroMQ routing id by which it was last heard.
        topology: Hash of its traced host.
        heard_s: When it was last heard, monotonic seconds.
        cadence: Its earlier adaptations.
        waiting: Its requests, oldest first.
        last_sequence: Of the last request that was taken into the queue.
        decided_s: When it was last decided on, monotonic seconds.
        num_decisions: Since it registered.
    """

    run_id: str
    sender: bytes
    topology: str
    heard_s: float
    cadence: Cadence = field(default_factory=Cadence)
    waiting: deque[Waiting] = field(default_factory=deque)
    last_sequence: int = -1
    decided_s: float = float("-inf")
    num_decisions: int = 0


class RunTable:
    """All registered runs, and the one queue that their requests make together."""

    def __init__(self) -> None:
        self._runs: dict[str, RunEntry] = {}
        self._order = 0
        self.num_waiting = 0

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[RunEntry]:
        return iter(list(self._runs.values()))

    def get(self, run_id: str) -> RunEntry | None:
        """The run, when it is registered."""
        return self._runs.get(run_id)

    def register(self, run_id: str, sender: bytes, topology: str, now: float) -> RunEntry:
        """Take a run in; of one that was known before, what waits and its cadence are kept."""
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = RunEntry(run_id, sender, topology, now)
        run.sender, run.topology, run.heard_s, run.last_sequence = sender, topology, now, -1
        return run

    def remove(self, run_id: str) -> None:
        """Forget a run, and what waits of it."""
        run = self._runs.pop(run_id, None)
        if run is not None:
            self.num_waiting -= len(run.waiting)

    def expire(self, silent_since_s: float) -> list[str]:
        """Forget the runs that were last heard before a moment; returns their names."""
        silent = [run.run_id for run in self if run.heard_s < silent_since_s]
        for run_id in silent:
            self.remove(run_id)
        return silent

    def put(self, run: RunEntry, ask: Ask, now: float) -> None:
        """Add a request to the queue."""
        run.waiting.append(Waiting(ask, now, self._order))
        run.last_sequence = ask.sequence
        self._order += 1
        self.num_waiting += 1

    def take(self, now: float, cycle_s: float, most: int) -> list[tuple[RunEntry, Waiting]]:
        """Take the oldest request of each run whose cycle is over, in the order of arrival.

        Args:
            now: Monotonic seconds.
            cycle_s: Least time between two decisions of one run.
            most: How many to take.
        """
        due = [run for run in self if run.waiting and now >= run.decided_s + cycle_s]
        due.sort(key=lambda run: run.waiting[0].order)
        taken = [(run, run.waiting.popleft()) for run in due[:most]]
        self.num_waiting -= len(taken)
        return taken

    def next_due_s(self, cycle_s: float) -> float:
        """When a next request may be taken, monotonic seconds; inf when none waits."""
        return min((run.decided_s + cycle_s for run in self if run.waiting), default=float("inf"))
