"""The governor: decides what to undo when a run diverges, and keeps what is needed for it.

What it answers is decided without side effects; the caller culls or restores, and then reports back
by :meth:`Governor.applied`. Seeds that can still be removed go first, newest first. If that does not
help, the run goes back to the snapshot taken before its last adaptation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from torch import nn
from torch.optim import Optimizer

from esper.errors import CheckpointError
from esper.tamiyo.divergence import DivergenceDetector, GovernorConfig, Verdict
from esper.tamiyo.snapshot import Snapshot, capture, is_finite

__all__ = ["Cullable", "Governor", "GovernorConfig", "Response", "Verdict"]


class Cullable(Protocol):
    """A seed that may still be removed, as the governor sees it."""

    @property
    def seed_id(self) -> str:
        """Its name in the model."""


@dataclass(frozen=True)
class Response:
    """What to do about a verdict.

    Attributes:
        kind: ``cull`` the seed ``target`` and renew the optimizers' state (:func:`renew_optimizer_state`);
            ``rollback`` to the governor's snapshot and embargo the site ``target``; ``halt_growth``; or
            ``none``.
        reason: One sentence.
        target: Seed id or site name; empty otherwise.
        halts: Growth stops for the rest of the run.
        measurements: Of the verdict.
    """

    kind: Literal["none", "cull", "rollback", "halt_growth"]
    reason: str = ""
    target: str = ""
    halts: bool = False
    measurements: dict[str, float] = field(default_factory=dict)


class Governor:
    """Watches one run.

    Args:
        config: See :class:`GovernorConfig`.
    """

    def __init__(self, config: GovernorConfig | None = None) -> None:
        self.config = config or GovernorConfig()
        self.snapshot: Snapshot | None = None
        self.num_rollbacks = 0
        self.halted = ""
        """Why growth has been stopped; empty when it has not."""
        self._detector = DivergenceDetector(self.config)
        self._last = Verdict("ok")

    @property
    def snapshot_step(self) -> int | None:
        """Optimizer steps taken when the kept snapshot was made."""
        return None if self.snapshot is None else self.snapshot.step

    def check(self, step: int, loss: float, gradient_norm: float | None = None) -> Verdict:
        """Judge one sampled step, and drop the snapshot when its watch ends well.

        Args:
            step: Optimizer steps taken so far.
            loss: Training loss, of one batch or a mean since the last check.
            gradient_norm: See :meth:`DivergenceDetector.check`.
        """
        verdict = self._last = self._detector.check(loss, gradient_norm)
        kept = self.snapshot
        if verdict.kind == "ok" and kept is not None and step - kept.step >= self.config.watch_steps:
            self.snapshot = None
        return verdict

    def refusal(self) -> str:
        """Why nothing may be adapted now; empty when it may."""
        if self.halted:
            return self.halted
        return "" if self._last.kind == "ok" else f"the run is not known to be well: {self._last.reason}"

    def take_snapshot(
        self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], *, step: int, site: str = ""
    ) -> str:
        """Keep the state to come back to; call it immediately before an adaptation.

        Args:
            model: Host with its seeds.
            optimizers: All that train it.
            step: Optimizer steps taken so far.
            site: Where the adaptation takes place; embargoed after a rollback.

        Returns:
            Why the state was not kept (it is not known to be good, so the adaptation must not be
            made, and an earlier snapshot stays), or an empty string.
        """
        reason = self.refusal()
        if not reason and not is_finite(model):
            reason = "the model holds a NaN or an inf"
        if not reason:
            self.snapshot = capture(model, optimizers, step=step, site=site)
        return reason

    def respond(
        self, verdict: Verdict, cullable: Sequence[Cullable], *, host_finite: bool = True
    ) -> Response:
        """Decide what to do; changes nothing.

        Args:
            verdict: Of the latest check.
            cullable: Seeds that may still be removed, newest first.
            host_finite: Whether the host's own weights are finite; a cull cannot mend them otherwise.
        """
        if verdict.kind != "diverged":
            return Response("none", verdict.reason)
        why, measured = verdict.reason, verdict.measurements
        if cullable and host_finite:
            seed_id = cullable[0].seed_id
            return Response(
                "cull", f"{why}: the newest seed is removed first", seed_id, measurements=measured
            )
        broken = "" if host_finite else ", and the host's weights are not finite"
        if self.snapshot is not None and self.num_rollbacks < self.config.max_rollbacks:
            last = self.num_rollbacks + 1 == self.config.max_rollbacks
            reason = f"{why}{broken}: back to step {self.snapshot.step}, before the last adaptation"
            if last:
                reason += f"; growth stops, as this is the last of {self.config.max_rollbacks} rollbacks"
            return Response("rollback", reason, self.snapshot.site, last, measured)
        if verdict.finite and host_finite and self.snapshot is None:
            # A shift of the task looks like this too; the next checks are compared with the new level.
            return Response(
                "none", f"{why}, but nothing was grown lately that could be undone", measurements=measured
            )
        if self.halted:
            return Response("none", f"{why}{broken}, and growth has already stopped", measurements=measured)
        left = "there is no snapshot to go back to" if self.snapshot is None else "no rollback is left"
        return Response(
            "halt_growth",
            f"{why}{broken} and {left}; is the learning rate too high?",
            halts=True,
            measurements=measured,
        )

    def applied(self, response: Response) -> None:
        """Take note that ``response``, made from the latest verdict, has been carried out."""
        if self._last.kind != "diverged":
            return
        self._detector.pardon(new_level=response.kind in ("none", "halt_growth"))
        if response.kind == "rollback":
            self.num_rollbacks += 1
            self._last = Verdict("ok")  # the state is again the one that was found good
        else:
            self._last = Verdict("suspect", f"no good check yet since {response.reason}")
        if response.halts:
            self.halted = response.reason

    def state_dict(self) -> dict[str, Any]:
        """Everything the next verdict and response depend on; plain types and tensors."""
        return {
            "detector": self._detector.state_dict(),
            "last": asdict(self._last),
            "num_rollbacks": self.num_rollbacks,
            "halted": self.halted,
            "snapshot": None if self.snapshot is None else self.snapshot.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned.

        Raises:
            CheckpointError: A field is missing. Nothing was changed.
        """
        try:
            snapshot = state["snapshot"]
            loaded = None if snapshot is None else Snapshot.from_state_dict(snapshot)
            last = Verdict(**state["last"])
            num_rollbacks, halted = int(state["num_rollbacks"]), str(state["halted"])
            self._detector.load_state_dict(state["detector"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"the governor's state cannot be read ({error!r}); the checkpoint is damaged"
            ) from error
        self.snapshot, self._last = loaded, last
        self.num_rollbacks, self.halted = num_rollbacks, halted
