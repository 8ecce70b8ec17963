"""The loop of a growing run: measure, decide, vet, apply, watch over it. Runs between optimizer steps."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from esper.errors import ConfigError, EsperError, GrowthError
from esper.kasmina.body import Body
from esper.kasmina.renewal import recycle_layer
from esper.kasmina.seed import Seed
from esper.messages import Decision, HealthSignal, ModelPerformance
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.council import decide_together
from esper.tamiyo.evaluation import contribution, mean_loss
from esper.tamiyo.gatekeeper import Gatekeeper
from esper.tamiyo.host_run import HostRun
from esper.tamiyo.ledger import Ledger
from esper.tamiyo.open_requests import is_open, settle
from esper.tamiyo.recorder import Recorder
from esper.tamiyo.retraining import Retraining
from esper.tamiyo.scorer import Scorer
from esper.tamiyo.state import GrowthState, LatePolicy, Policy, SeedView, SiteView
from esper.tamiyo.vetting import refusal
from esper.tamiyo.warden import Warden

__all__ = ["Controller"]

_MANY_LOSSES = 64
"""Losses that are read at once."""


class Controller:
    """Grows one body over one run.

    Args:
        config: All settings.
        body: The attached host.
        run: Who trains it.
        policy: Who decides.
        recorder: Where it is written down.
    """

    def __init__(
        self, config: TamiyoConfig, body: Body, run: HostRun, policy: Policy, recorder: Recorder
    ) -> None:
        self.config = config
        self.body = body
        self.run = run
        self.policy = policy
        inner = getattr(policy, "policy", policy)  # of one whose decisions are recorded
        self._late = inner if isinstance(inner, LatePolicy) else None
        self.recorder = recorder
        host_flops = sum(layer.flops for layer in body.topology.layers if not layer.block)
        self.ledger = Ledger(
            config.budget,
            body.topology.num_parameters,
            host_flops,
            num_processes=run.ranks.num_processes,
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.gatekeeper = Gatekeeper(config.lifecycle, body, run, self.ledger, recorder)
        self.warden = Warden(
            config.governor, body, run, self.ledger, self.gatekeeper, recorder, grows=config.policy != "off"
        )
        self.health: dict[str, HealthSignal] = {}
        self.pending: list[Decision] = []
        self._loss_sum: Tensor | float = 0.0
        self._loss_count = 0
        self._losses: list[Tensor] = []
        self._next_decision = 0
        self._total_steps = run.total_steps
        self._scorer = Scorer(config, body, run, self.ledger, recorder, self.generator)
        self._retraining = Retraining(body, run, config.seed) if config.finish == "retrain" else None

    @property
    def scores(self) -> dict[str, float]:
        """Last whitened expressivity into each layer, by name."""
        return self._scorer.last

    @property
    def retrained(self) -> bool:
        """Whether the found shape has been started afresh."""
        return self._retraining is not None and self._retraining.done

    def note_batch(self, loss: Tensor | None, num_samples: int) -> None:
        """Take note of one batch of training (several may make one optimizer step)."""
        self.ledger.charge_step(self.body.flops, num_samples)
        if loss is not None:
            if loss.requires_grad:
                loss = loss.detach()
            if loss.is_cpu:  # read later, many at once, but added in their order: reading one takes 2 µs
                self._losses.append(loss if loss.dim() == 0 else loss.reshape(()))
                if len(self._losses) == _MANY_LOSSES:
                    self._add_losses()
            else:  # elsewhere the sum stays on its device, as reading it would wait for the step
                self._loss_sum = self._loss_sum + loss.float()
            self._loss_count += 1
            self.warden.note_loss(loss)

    def _add_losses(self) -> None:
        for loss in torch.stack(self._losses).tolist() if self._losses else ():
            self._loss_sum = self._loss_sum + loss
        self._losses.clear()

    def note_health(self, signals: Sequence[HealthSignal]) -> None:
        """Take the signals of a sampled step; they are published as one message."""
        for signal in signals:
            self.health[signal.layer_id if not signal.seed_id else f"{signal.layer_id}/{signal.seed_id}"] = (
                signal
            )
        self.recorder.signals(signals)

    def request(self, decision: Decision) -> None:
        """Ask for ``decision`` at the next safe point; it is vetted like any other."""
        self.pending.append(decision)

    def follow_length(self, total_steps: int) -> None:
        """Plan over another length than was known at the start: how many steps a batch takes shows as they go by."""
        self._total_steps = total_steps

    def safe_point(self, step: int, epoch: int) -> None:
        """Do everything that is due after optimizer step number ``step``.

        Args:
            step: Optimizer steps taken so far.
            epoch: Current epoch.
        """
        self.recorder.step, self.recorder.epoch = step, epoch
        if self._nothing_due(step):
            self.warden.pass_by(step)
            return
        with self.run.ranks.together():
            self._act(step, epoch)

    def _act(self, step: int, epoch: int) -> None:
        before = self._structure()
        self.gatekeeper.tick(step)
        self.warden.inspect(step)
        self.gatekeeper.review(step)
        for decision in self._requests(step):
            self._carry_out(decision, step, epoch, asked_for=True)
        if step >= self._next_decision:
            self._next_decision = step + max(
                1, round(self.config.probes.decision_interval * self._total_steps)
            )
            self.recorder.num_parameters = self.body.num_parameters
            if self.config.policy != "off":
                self._decide(step, epoch)
            self._publish_performance(step, epoch)
            self._loss_sum, self._loss_count = 0.0, 0
        self._retrain_if_due(step)
        if self._structure() != before:
            self.run.structure_changed()

    def next_due(self, step: int) -> int:
        """First step after ``step`` at which :meth:`safe_point` has anything to do.

        Until then the warden may be asked to :meth:`~Warden.pass_by` each step instead.
        """
        if self._always_due() or (self._late is not None and self._alone and self._late.expecting):
            return step + 1
        return max(step + 1, min(self._next_decision, self.warden.next_check(step)))

    def _nothing_due(self, step: int) -> bool:
        """Whether this is one of the many steps of an ungrown host at which there is nothing to do."""
        return not (self._always_due() or step >= self._next_decision or self.warden.check_due(step))

    def _always_due(self) -> bool:
        return bool(
            self.pending
            or (self._late is not None and self._alone and self._late.answered)
            or self.body.seeds
            or self.ledger.embargoes
            or (self._retraining is not None and not self._retraining.done)
        )

    @property
    def _alone(self) -> bool:
        """Whether this is the only process; several act at steps alone at which all of them look."""
        return self.run.ranks.size == 1

    def _structure(self) -> list[tuple[str, bool]]:
        """Every seed, and whether it takes part in the loss."""
        return [(seed.seed_id, seed.stage != "germinated") for seed in self.body.seeds]

    def _requests(self, step: int) -> list[Decision]:
        """What was asked for from outside; on several ranks rank 0 is asked, at steps at which all of them look."""
        ranks = self.run.ranks
        if ranks.size > 1 and not (step >= self._next_decision or self.warden.check_due(step)):
            return []
        pending, self.pending = (
            [*self.pending, *(self._late.collect(step) if self._late is not None else ())],
            [],
        )
        if ranks.size == 1:
            return pending
        asked = ranks.first("requests", [msgspec.to_builtins(decision) for decision in pending])
        return [msgspec.convert(decision, Decision) for decision in asked]

    def _decide(self, step: int, epoch: int) -> None:
        state, ranks = self._state(step, epoch), self.run.ranks
        decisions = self._ask(state) if ranks.size == 1 else decide_together(ranks, state, self._ask)
        for decision in decisions:
            self._carry_out(decision, step, epoch)

    def _ask(self, state: GrowthState) -> list[Decision]:
        try:
            return self.policy.decide(state)
        except ConfigError:
            raise  # a site or blueprint that this host does not have
        except EsperError as error:  # a measurement that cannot be taken now must not end the run
            self.recorder.error("", "policy", str(error))
            reason = f"the policy could not decide: {error}"
            return [Decision(action="wait", reason=reason, policy=self.policy.name)]

    def _state(self, step: int, epoch: int) -> GrowthState:
        self._add_losses()
        begin, end = self.config.window
        fraction = step / max(1, self._total_steps)
        ledger, body = self.ledger, self.body
        alive = {seed.site.name for seed in body.seeds if seed.stage != "fossilized"}
        views = [
            SiteView(site, ledger.unavailable(site.name, step) or ("occupied" if site.name in alive else ""))
            for site in body.sites
        ]
        samples_per_step = ledger.num_samples / max(1, step)
        tokens = samples_per_step * self._total_steps * body.topology.positions
        return GrowthState(
            step=step,
            total_steps=self._total_steps,
            epoch=epoch,
            window_open=begin <= fraction <= end,
            topology=body.topology,
            sites=views,
            seeds=[_seed_view(seed) for seed in body.seeds],
            health=dict(self.health),
            host_parameters=ledger.host_parameters,
            num_parameters=body.num_parameters,
            parameters_left=max(0, ledger.parameters_left(body)),
            flops_left=ledger.flops_left(step, self._total_steps),
            germinations_left=ledger.germinations_left(epoch),
            train_loss=float(self._loss_sum) / self._loss_count if self._loss_count else math.nan,
            measure_held_out_loss=functools.cache(self._held_out_loss),
            tokens_per_parameter=tokens / max(1, ledger.host_parameters),
            transformer=body.topology.transformer,
            cost=body.cost,
            score=functools.partial(self._scorer.score, step=step, total_steps=self._total_steps),
            generator=self.generator,
            measure_saving=self._saving,
            seeds_left=max(0, self.config.budget.max_seeds_alive - len(alive)),
            training_flops=ledger.training_flops,
            run_id=self.recorder.run_id,
        )

    def _saving(self, seed_ids: Sequence[str]) -> float | None:
        def measure() -> tuple[float | None, float | None]:
            batches = self.run.held_out()
            if not batches:
                return None, None
            named = [seed for seed in self.body.seeds if seed.seed_id in seed_ids]
            samples = sum(batch.num_samples for batch in batches)
            self.ledger.charge_measurement(2.0 * self.body.flops * samples)
            measured = contribution(self.body, named, batches)
            return measured.mean, measured.loss_on

        mean, loss_on = self.run.ranks.measure("a saving", measure)
        return None if mean is None or loss_on is None else mean / loss_on

    def _held_out_loss(self) -> float | None:
        def measure() -> list[float | None]:
            batches = self.run.held_out()
            if not batches:
                return [None]
            samples = sum(batch.num_samples for batch in batches)
            self.ledger.charge_measurement(float(self.body.flops * samples))
            return [mean_loss(self.body, batches)]

        return self.run.ranks.measure("the held-out loss", measure)[0]

    def _carry_out(self, decision: Decision, step: int, epoch: int, *, asked_for: bool = False) -> None:
        ranks = self.run.ranks
        reason = ""
        if asked_for and is_open(decision, self.body.topology):
            decision, reason = self._settle(decision, step, epoch)
        if not reason and decision.action != "wait":
            reason = self._refusal(decision, step, epoch)
        if ranks.size > 1 and decision.action != "wait":  # books may differ, where batches do
            reason = ranks.first("what speaks against a decision", reason)
        seed_id = ""
        if not reason:
            try:
                decision, seed_id = self._apply(decision, step, epoch)
            except EsperError as error:
                reason = str(error)
        self.recorder.num_parameters = self.body.num_parameters
        applied = not reason and decision.action != "wait"
        self.recorder.decision(decision, applied=applied, refused=reason, seed_id=seed_id)
        if self._late is not None:
            self._late.note(decision, refused=reason, seed_id=seed_id)

    def _settle(self, decision: Decision, step: int, epoch: int) -> tuple[Decision, str]:
        """Fill in what a request leaves open, on rank 0 for all; returns it with why that cannot be done."""
        reason = ""
        try:
            decision = settle(decision, self._state(step, epoch))
        except EsperError as error:
            reason = str(error)
        if self.run.ranks.size > 1:
            found = self.run.ranks.first("an open request", [msgspec.to_builtins(decision), reason])
            decision, reason = msgspec.convert(found[0], Decision), str(found[1])
        return decision, reason

    def _refusal(self, decision: Decision, step: int, epoch: int) -> str:
        return self.run.ranks.closed or refusal(
            decision,
            body=self.body,
            ledger=self.ledger,
            step=step,
            total_steps=self._total_steps,
            epoch=epoch,
            halted=self.warden.halted,
        )

    def _apply(self, decision: Decision, step: int, epoch: int) -> tuple[Decision, str]:
        """Carry ``decision`` out; returns it with what was measured, and the id of the seed it is about."""
        if decision.action == "germinate":
            return decision, self._germinate(decision, step, epoch).seed_id
        if decision.action == "cull":
            self.gatekeeper.cull(decision.site, decision.reason, step)
            return decision, decision.site
        if decision.action == "hold":
            self.gatekeeper.hold(decision.site, self._next_decision)
            return decision, decision.site
        if decision.action == "recycle":
            decision = self._recycle(decision, step)
        return decision, ""

    def _recycle(self, decision: Decision, step: int) -> Decision:
        self.warden.before_adaptation(step, decision.site)
        batches = self._scorer.batches()
        report = recycle_layer(
            self.body,
            decision.site,
            batches,
            optimizers=self.run.optimizers,
            generator=self.generator,
            gather=self.run.ranks.gather,
        )
        self.ledger.charge_measurement(float(self.body.flops * sum(batch.num_samples for batch in batches)))
        if not report.units:
            raise GrowthError(
                f"no unit of layer {decision.site!r} is dormant, so there is nothing to recycle"
            )
        self.ledger.recycled += 1
        found = {"units_recycled": float(len(report.units)), "max_output_change": report.max_change}
        return msgspec.structs.replace(decision, numbers={**decision.numbers, **found})

    def _germinate(self, decision: Decision, step: int, epoch: int) -> Seed:
        self.warden.before_adaptation(step, decision.site)
        size = decision.size or None
        seed = self.body.germinate(decision.site, decision.blueprint, size)
        try:
            if self.config.widen_start == "closed_form" and seed.blueprint in ("widen", "conv_widen"):
                self._scorer.compute_start(seed)
            self.body.register(*self.run.optimizers)
            self.ledger.note_germination(seed.site.name, step, epoch)
            self.gatekeeper.born(seed)
        except EsperError:
            if any(planted is seed for planted in self.body.seeds):
                self.body.cull(seed, self.run.optimizers)
            raise
        return seed

    def _publish_performance(self, step: int, epoch: int) -> None:
        self._add_losses()
        loss = float(self._loss_sum) / self._loss_count if self._loss_count else math.nan
        self.recorder.performance(
            ModelPerformance(
                self.recorder.run_id, step, epoch, self._total_steps, loss if math.isfinite(loss) else math.nan, None,
                self.body.num_parameters, self.ledger.training_flops,
                sum(seed.stage != "fossilized" for seed in self.body.seeds), time.time(),
            )
        )  # fmt: skip

    def _retrain_if_due(self, step: int) -> None:
        retraining = self._retraining
        if retraining is None or not retraining.due(step / max(1, self._total_steps), self.config.window[1]):
            return
        retraining.apply()
        self.warden.start_afresh()
        reason = f"the search is over: the found shape of {self.body.num_parameters} parameters starts afresh"
        self.recorder.decision(Decision(action="wait", reason=reason, policy="finish=retrain"), applied=True)

    def close(self) -> None:
        """Hang up, where somebody elsewhere decides; the next decision point would open the line again."""
        if self._late is not None:
            self._late.close()

    def follow(self, previous: Controller, *, same_run: bool) -> None:
        """Take over from the controller of an earlier ``fit`` of the same model.

        Args:
            previous: Of the earlier fit.
            same_run: Steps go on being counted from where they were. Otherwise a run of its own begins:
                with budgets, schedule and policy anew, but no seed id is used twice.
        """
        if same_run:
            self.load_state_dict(previous.state_dict())
        else:
            self.body.load_state_dict(previous.body.state_dict())
            self.pending = list(previous.pending)

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of the run depends on besides model and optimizers; plain types and tensors."""
        self._add_losses()
        return {
            "body": self.body.state_dict(),
            "ledger": self.ledger.state_dict(),
            "policy": self.policy.state_dict(),
            "gatekeeper": self.gatekeeper.state_dict(),
            "warden": self.warden.state_dict(),
            "generator": self.generator.get_state(),
            "pending": [msgspec.to_builtins(decision) for decision in self.pending],
            "next_decision": self._next_decision,
            "loss_sum": float(self._loss_sum),
            "loss_count": self._loss_count,
            "scores": dict(self._scorer.last),
            "health": {key: msgspec.to_builtins(signal) for key, signal in self.health.items()},
            "retraining": None if self._retraining is None else self._retraining.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned; the body's seeds are there already."""
        self.body.load_state_dict(state["body"])
        self.ledger.load_state_dict(state["ledger"])
        self.policy.load_state_dict(state["policy"])
        self.gatekeeper.load_state_dict(state["gatekeeper"])
        self.warden.load_state_dict(state["warden"])
        self.generator.set_state(state["generator"])
        self.pending = [msgspec.convert(item, Decision) for item in state["pending"]]
        self._next_decision = int(state["next_decision"])
        self._loss_sum, self._loss_count = float(state["loss_sum"]), int(state["loss_count"])
        self._scorer.last = dict(state["scores"])
        self.health = {key: msgspec.convert(item, HealthSignal) for key, item in state["health"].items()}
        if self._retraining is not None and state["retraining"] is not None:
            self._retraining.load_state_dict(state["retraining"])


def _seed_view(seed: Seed) -> SeedView:
    measured = seed.state.contributions
    return SeedView(
        seed.seed_id,
        seed.site.name,
        seed.blueprint,
        seed.size,
        seed.stage,
        measured[-1] if measured else None,
    )
