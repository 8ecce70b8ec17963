"""Every type that crosses a boundary: the bus, ``growth.jsonl``, a checkpoint's manifest.

All are msgspec structs. On the bus a message travels inside a frame that
:mod:`esper.oona.codec` writes; in ``growth.jsonl`` each line is one :data:`Event` as tagged JSON.
Times are Unix seconds, latencies milliseconds, sizes parameters or floating-point operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

if TYPE_CHECKING:
    from esper.signal_table import SignalTable

__all__ = [
    "SCHEMA_VERSION",
    "STAGES",
    "TOPICS",
    "CacheHitRates",
    "Command",
    "CommandReply",
    "Decision",
    "DecisionRecord",
    "ErrorRecoveryEvent",
    "Event",
    "GovernorRecord",
    "HealthSignal",
    "KernelPerformance",
    "Message",
    "ModelPerformance",
    "RunRecord",
    "SignalBatch",
    "Stage",
    "TransitionRecord",
]

SCHEMA_VERSION = 2
"""Counts changes of what travels on the bus; 2 since a batch of signals travels as columns."""

Stage = Literal[
    "dormant", "germinated", "training", "blending", "holding", "fossilized", "culled", "embargoed"
]
STAGES: tuple[Stage, ...] = (
    "dormant", "germinated", "training", "blending", "holding", "fossilized", "culled", "embargoed",
)  # fmt: skip
Action = Literal["wait", "germinate", "cull", "recycle", "hold"]

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Correlation = Annotated[float, Meta(ge=-1.0, le=1.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]
Count = Annotated[int, Meta(ge=0)]

TOPICS = {
    "health": "telemetry.layer.health_signals",
    "kernel": "telemetry.execution.kernel_performance",
    "cache": "telemetry.cache.hit_rates",
    "errors": "telemetry.error_recovery.events",
    "performance": "telemetry.model.performance_metrics",
    "growth": "telemetry.growth.events",
    "commands": "control.kasmina.commands",
    "replies": "control.kasmina.replies",
}
"""Short name -> topic string; ``telemetry.*`` leaves a run, ``control.*`` is the way back into it.

``growth`` carries what ``growth.jsonl`` holds (:data:`Event`), as it happens.
"""


class HealthSignal(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """Health of one layer (``seed_id == ""``) or of one seed on one sampled step.

    Ratios lie in [0, 1], ``avg_correlation`` in [-1, 1], ``execution_latency`` is in milliseconds,
    ``gradient_snr`` is the norm of the mean output gradient over its standard error,
    ``expressivity`` is the whitened score of the site into this layer (0 when not scored).
    """

    layer_id: str
    seed_id: str
    chunk_id: Count
    epoch: Count
    step: Count
    activation_variance: NonNegative
    dead_neuron_ratio: Fraction
    dormancy: Fraction
    avg_correlation: Correlation
    effective_rank: NonNegative
    gradient_norm: NonNegative
    gradient_snr: NonNegative
    update_ratio: NonNegative
    expressivity: NonNegative
    is_ready_for_transition: bool
    health_score: Fraction
    execution_latency: NonNegative
    error_count: Count
    active_seeds: Count
    total_seeds: Count
    timestamp: float


class SignalBatch(msgspec.Struct, tag="signals", frozen=True, dict=True):
    """All health signals of one sampled step: one message on ``telemetry.layer.health_signals``.

    They travel as columns; :mod:`esper.signal_table` says how. Make one with :meth:`of`, read ``signals``.
    ``ids`` and ``columns`` of a batch that the bus delivered are valid; the bus has looked at them.
    """

    run_id: str
    step: Count
    epoch: Count
    ids: bytes
    columns: bytes
    timestamp: float

    @classmethod
    def of(
        cls, run_id: str, step: int, epoch: int, signals: Sequence[HealthSignal], timestamp: float
    ) -> SignalBatch:
        """The batch of some signals; costs least when ``signals`` is a :class:`SignalTable`.

        Raises:
            MessageError: a field of a signal has a value of another type.
        """
        from esper.signal_table import SignalTable  # imports NumPy

        table = SignalTable.of(signals)
        return cls(run_id, step, epoch, table.ids, table.columns, timestamp)

    @cached_property
    def table(self) -> SignalTable:
        """The signals as columns.

        Raises:
            MessageError: ``ids`` and ``columns`` are malformed, or a number is out of its range.
        """
        from esper.signal_table import SignalTable  # imports NumPy

        return SignalTable.read(self.ids, self.columns)

    @property
    def signals(self) -> list[HealthSignal]:
        """The signals as objects, built on first use; raises what :attr:`table` does."""
        return self.table.signals


class KernelPerformance(msgspec.Struct, tag="kernel", frozen=True):
    """Time of one sampled training step and of the probes on it."""

    run_id: str
    step: Count
    step_latency_ms: NonNegative
    probe_latency_ms: NonNegative
    timestamp: float


class CacheHitRates(msgspec.Struct, tag="cache", frozen=True):
    """Use of the expressivity score cache: a site is scored once per decision point and reused."""

    run_id: str
    step: Count
    hits: Count
    misses: Count
    timestamp: float


class ErrorRecoveryEvent(msgspec.Struct, tag="error", frozen=True):
    """Something went wrong and was handled: a culled non-finite seed, a rollback, a refused action."""

    run_id: str
    step: Count
    layer_id: str
    kind: str
    detail: str
    timestamp: float


class ModelPerformance(msgspec.Struct, tag="performance", frozen=True):
    """Loss, size and cost of the run so far."""

    run_id: str
    step: Count
    epoch: Count
    total_steps: Count
    train_loss: float
    held_out_loss: float | None
    num_parameters: Count
    training_flops: NonNegative
    seeds_alive: Count
    timestamp: float


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy answers at a decision point, and the numbers it was made from.

    ``site`` is a site name for ``germinate``, a seed id for ``cull`` and ``hold``, a layer name for ``recycle``.
    ``hold`` keeps a seed that is observed at full strength from fossilising before the next decision point.
    """

    action: Action
    reason: str
    policy: str
    site: str = ""
    blueprint: str = ""
    size: Count = 0
    confidence: Fraction = 1.0
    urgency: Fraction = 0.0
    risk: Fraction = 0.0
    numbers: dict[str, float] = msgspec.field(default_factory=dict)


class Command(msgspec.Struct, tag="command", frozen=True):
    """A decision sent back to a training run on ``control.kasmina.commands``."""

    run_id: str
    command_id: str
    decision: Decision
    timestamp: float


class CommandReply(msgspec.Struct, tag="reply", frozen=True):
    """A run's answer to a :class:`Command`: received and valid, or why not.

    ``accepted`` says that the command stands in the run's queue. Whether it was then applied is in the
    :class:`DecisionRecord` that follows on ``telemetry.growth.events``.
    """

    command_id: str
    accepted: bool
    reason: str


class DecisionRecord(msgspec.Struct, tag="decision", frozen=True):
    """One decision point: the answer, and whether the vetting let it through (``refused`` says why not)."""

    run_id: str
    step: Count
    epoch: Count
    decision: Decision
    applied: bool
    refused: str
    seed_id: str
    num_parameters: Count
    timestamp: float


class TransitionRecord(msgspec.Struct, tag="transition", frozen=True):
    """One stage transition of one seed, with the measurements of the gate that allowed it."""

    run_id: str
    step: Count
    epoch: Count
    seed_id: str
    site: str
    blueprint: str
    source: Stage
    target: Stage
    reason: str
    measurements: dict[str, float]
    num_parameters: Count
    timestamp: float


class GovernorRecord(msgspec.Struct, tag="governor", frozen=True):
    """An intervention of the governor: what it saw and what it did."""

    run_id: str
    step: Count
    epoch: Count
    action: Literal["cull", "rollback", "embargo", "halt_growth"]
    target: str
    reason: str
    measurements: dict[str, float]
    timestamp: float


class RunRecord(msgspec.Struct, tag="run", frozen=True):
    """Begin, resume or end of a run; ``info`` holds plain facts (versions, sites, refused layers)."""

    run_id: str
    event: Literal["start", "resume", "end", "note"]
    step: Count
    info: dict[str, Any]
    timestamp: float


Message = (
    SignalBatch
    | KernelPerformance
    | CacheHitRates
    | ErrorRecoveryEvent
    | ModelPerformance
    | Command
    | CommandReply
    | DecisionRecord
    | TransitionRecord
    | GovernorRecord
    | RunRecord
)
"""Everything that may travel on the bus."""

Event = DecisionRecord | TransitionRecord | GovernorRecord | RunRecord
"""Everything that may stand on a line of ``growth.jsonl``."""
