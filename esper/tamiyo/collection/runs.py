"""What is known of each run beside its health signals."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from esper.messages import CacheHitRates, ErrorRecoveryEvent, KernelPerformance, ModelPerformance

__all__ = ["RunStatus", "RunStatuses"]

_MAX_RUNS = 1024
_MAX_LAYERS = 4096


@dataclass(slots=True)
class RunStatus:
    """The last word of one run on each topic.

    Attributes:
        run_id: Of the run.
        num_signals: Health signals received.
        step: Highest step that a batch of signals was of.
        performance: Last model performance; None before the first, as the next three.
        kernel: Last times of a step and its probes.
        cache: Last use of the score cache.
        error: Last error-recovery event.
        num_errors: Error-recovery events by what they were about: a layer, a seed, a site, or ``""``, the run.
        heard_s: When something came last, by ``time.monotonic()``.
    """

    run_id: str
    num_signals: int = 0
    step: int = 0
    performance: ModelPerformance | None = None
    kernel: KernelPerformance | None = None
    cache: CacheHitRates | None = None
    error: ErrorRecoveryEvent | None = None
    num_errors: Counter[str] = field(default_factory=Counter)
    heard_s: float = 0.0

    def count_error(self, event: ErrorRecoveryEvent) -> None:
        """Note an event."""
        self.error = event
        if event.layer_id in self.num_errors or len(self.num_errors) < _MAX_LAYERS:
            self.num_errors[event.layer_id] += 1


class RunStatuses(Mapping[str, RunStatus]):
    """Run id -> status, of the 1,024 runs heard of last, the latest at the end."""

    def __init__(self) -> None:
        self._statuses: dict[str, RunStatus] = {}

    def heard(self, run_id: str) -> RunStatus:
        """The status of a run that has just sent something; a new one for a new run."""
        status = self._statuses.pop(run_id, None)
        if status is None:
            status = RunStatus(run_id)
            if len(self._statuses) >= _MAX_RUNS:
                del self._statuses[next(iter(self._statuses))]
        self._statuses[run_id] = status
        status.heard_s = time.monotonic()
        return status

    def __getitem__(self, run_id: str) -> RunStatus:
        return self._statuses[run_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statuses)

    def __len__(self) -> int:
        return len(self._statuses)
