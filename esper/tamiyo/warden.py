"""Carries out what the governor says: feeds it, culls, rolls back, embargoes, and writes it down."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.errors import GrowthError
from esper.kasmina.body import Body
from esper.kasmina.layer import SEEDS
from esper.kasmina.sharded import is_sharded, own_part, whole
from esper.kasmina.structure import seed_states_in
from esper.messages import GovernorRecord
from esper.tamiyo.gatekeeper import Gatekeeper
from esper.tamiyo.governor import Governor, GovernorConfig, Response
from esper.tamiyo.host_run import HostRun
from esper.tamiyo.ledger import Ledger
from esper.tamiyo.recorder import Recorder
from esper.tamiyo.snapshot import is_finite, renew_optimizer_state, restore

__all__ = ["Warden"]


class Warden:
    """Applies a :class:`~esper.tamiyo.governor.Governor` to one run.

    Args:
        config: The governor's settings.
        body: The host.
        run: Gives the optimizers.
        ledger: Keeps embargoes.
        gatekeeper: Culls seeds.
        recorder: Told of every intervention.
        grows: Whether the policy may grow anything; else the run is watched only once something was grown by
            hand.
    """

    def __init__(
        self, config: GovernorConfig, body: Body, run: HostRun, ledger: Ledger, gatekeeper: Gatekeeper,
        recorder: Recorder, *, grows: bool = True,
    ) -> None:  # fmt: skip
        self.governor = Governor(config)
        self._body = body
        self._run = run
        self._ledger = ledger
        self._gatekeeper = gatekeeper
        self._recorder = recorder
        self._grows = grows
        self._loss: Tensor | None = None
        self._unjudged: list[Tensor] = []
        self._gradient_norm: Tensor | None = None

    @property
    def halted(self) -> str:
        """Why growth has been stopped for good; empty when it has not."""
        return self.governor.halted

    def note_loss(self, loss: Tensor) -> None:
        """Remember the latest loss, detached; it is read from its device only when a check is due."""
        self._loss = loss

    def wants_gradients(self, step: int) -> bool:
        """Whether the gradients of optimizer step ``step`` will be judged."""
        return self._watching() and step % self._gradient_interval() == 0

    def next_gradients(self, step: int) -> int:
        """First step after ``step`` whose gradients will be judged, if nothing is adapted before."""
        interval = self._gradient_interval()
        return (step // interval + 1) * interval if self._watching() else sys.maxsize

    def check_due(self, step: int) -> bool:
        """Whether a check after optimizer step ``step`` has to be judged there and then."""
        return self._watching() and step % self._judging_interval() == 0

    def next_check(self, step: int) -> int:
        """First step after ``step`` at which a check has to be judged, if nothing is adapted before."""
        interval = self._judging_interval()
        return (step // interval + 1) * interval if self._watching() else sys.maxsize

    def pass_by(self, step: int) -> None:
        """Take note of a check that falls on a step at which nothing is due: :meth:`inspect` judges it later.

        While nothing can be undone a verdict has time: it has to be known before the next adaptation.
        """
        if self._loss is not None and self.governor.config.check_due(step) and self._watching():
            self._unjudged.append(self._loss)

    def _watching(self) -> bool:
        """Whether there is, or may come, anything that could be undone."""
        return self._grows or bool(self._body.seeds)

    def _gradient_interval(self) -> int:
        """Every check while something can be undone; else seldom, to know what is usual."""
        config, body = self.governor.config, self._body
        undoable = self.governor.snapshot is not None or any(s.stage != "fossilized" for s in body.seeds)
        return config.check_interval_steps * (1 if undoable else config.idle_gradient_checks)

    def _judging_interval(self) -> int:
        """Several processes judge every check at once, as they do it together."""
        alone = self._run.ranks.size == 1
        return self._gradient_interval() if alone else self.governor.config.check_interval_steps

    def note_gradients(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Take the norm of the host's gradients, seeds left out, before they are clipped."""
        grads = [
            p.grad for name, p in named_parameters if p.grad is not None and SEEDS not in name.split(".")
        ]
        self._gradient_norm = whole(nn.utils.get_total_norm(grads)) if grads else None

    def inspect(self, step: int) -> None:
        """Judge the checks that were passed by, and that of this step if one falls on it; act on the answers."""
        if self._unjudged:
            passed_by, self._unjudged = self._unjudged, []
            for value in passed_by:
                self._judge(step, float(value), None)
        if not (self._watching() and self.governor.config.check_due(step)):
            return
        seen = [None if x is None else float(x) for x in (self._loss, self._gradient_norm)]
        loss, norm = self._run.ranks.measure("the training loss", lambda: seen)
        self._loss = self._gradient_norm = None
        if loss is not None:
            self._judge(step, loss, norm)

    def _judge(self, step: int, loss: float, norm: float | None) -> None:
        verdict = self.governor.check(step, loss, norm)
        if verdict.kind != "diverged":
            return
        young = [seed for seed in self._body.seeds if seed.stage != "fossilized"]
        newest_first = sorted(young, key=lambda seed: seed.record.age_steps)
        response = self.governor.respond(verdict, newest_first, host_finite=self._host_finite())
        self._act(response, step)
        self.governor.applied(response)

    def before_adaptation(self, step: int, site: str) -> None:
        """Keep the state to come back to.

        Raises:
            GrowthError: The run is not known to be well, so nothing may be adapted now.
        """
        if self.governor.snapshot_step == step:
            return  # several adaptations between the same two steps share the state before the first
        ranks, model = self._run.ranks, self._body.model
        reason = ""
        if ranks.size > 1:  # running statistics differ, and no rank may keep a state that another does not
            own = "" if is_finite(model) else "the model holds a NaN or an inf"
            reason = ranks.objection("the state before an adaptation", own)
        reason = reason or self.governor.take_snapshot(
            model, list(self._run.optimizers), step=step, site=site
        )
        if reason:
            raise GrowthError(f"the governor allows no adaptation now: {reason}")

    def start_afresh(self) -> None:
        """Forget losses and snapshot, because the network is about to begin again from fresh weights."""
        previous = self.governor
        self.governor = Governor(previous.config)
        self.governor.num_rollbacks, self.governor.halted = previous.num_rollbacks, previous.halted

    def _act(self, response: Response, step: int) -> None:
        if response.kind == "none":
            return
        if response.kind == "cull":
            self._gatekeeper.cull(response.target, response.reason, step, response.measurements)
            # The explosion is still in the moments: Adam would hardly move the host again.
            renew_optimizer_state(self._body.model, list(self._run.optimizers), self.governor.snapshot)
        elif response.kind == "rollback":
            self._roll_back(response, step)
        self._recorder.governor(
            GovernorRecord(
                self._recorder.run_id, step, self._recorder.epoch, response.kind, response.target, response.reason,
                dict(response.measurements), time.time(),
            )
        )  # fmt: skip

    def _roll_back(self, response: Response, step: int) -> None:
        snapshot = self.governor.snapshot
        assert snapshot is not None
        kept = {state.seed_id for state in seed_states_in(snapshot.model)}
        for seed in self._body.seeds:
            if seed.seed_id not in kept:
                self._gatekeeper.forget(seed, response.reason)
        restore(self._body.model, list(self._run.optimizers), snapshot)
        for seed in self._body.seeds:
            seed.bind(self._body)
        if response.target:
            self._ledger.embargo(response.target, step + self.governor.config.embargo_steps)

    def _host_finite(self) -> bool:
        model = self._body.model
        checks = [
            torch.isfinite(own_part(p)).all()
            for name, p in model.named_parameters()
            if SEEDS not in name.split(".")
        ]
        finite = all(bool(check) for check in checks)
        if is_sharded(model):  # each process has looked at its parts
            finite = not self._run.ranks.objection("the host's weights", "" if finite else "not finite")
        return finite

    def state_dict(self) -> dict[str, Any]:
        """Everything the next check depends on; plain types and tensors."""
        return {"governor": self.governor.state_dict(), "unjudged": [float(loss) for loss in self._unjudged]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        self.governor.load_state_dict(state["governor"])
        self._unjudged = [torch.tensor(loss, dtype=torch.float64) for loss in state["unjudged"]]
