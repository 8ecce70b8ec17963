"""Moves seeds through their lifecycle: measures the facts, asks the gates, applies the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from esper.kasmina.body import Body
from esper.kasmina.lifecycle import (
    Facts,
    Lifecycle,
    LifecycleConfig,
    Transition,
    next_transition,
    stage_alpha,
)
from esper.kasmina.seed import Seed
from esper.kasmina.trace import preserved
from esper.messages import Stage
from esper.tamiyo.evaluation import contribution
from esper.tamiyo.host_run import HostRun, LossOnBatch
from esper.tamiyo.ledger import Ledger
from esper.tamiyo.recorder import Recorder

__all__ = ["Gatekeeper"]

_SPACING = 1.25
"""Held-out measurements of one stage lie this factor of its age apart, so that a long wait stays cheap."""


class Gatekeeper:
    """Ages seeds, blends them in, and applies the transitions that their gates allow.

    Args:
        config: Thresholds.
        body: The host.
        run: Gives held-out batches and optimizers.
        ledger: Charged for measurements; keeps embargoes.
        recorder: Told of every transition.
    """

    def __init__(
        self, config: LifecycleConfig, body: Body, run: HostRun, ledger: Ledger, recorder: Recorder
    ) -> None:
        self.config = config
        self._body = body
        self._run = run
        self._ledger = ledger
        self._recorder = recorder
        self._lifecycles: dict[str, Lifecycle] = {}
        self._resting: dict[str, tuple[str, str]] = {}

    @property
    def ready(self) -> list[str]:
        """Seeds that have reached the minimum age of their stage, so that their gate may open."""
        return [
            seed.seed_id
            for seed in self._body.seeds
            if seed.stage in ("training", "holding")
            and seed.state.stage_age_steps >= getattr(self.config, f"min_{seed.stage}_steps")
        ]

    def born(self, seed: Seed) -> None:
        """Take a new seed through its first gate, with the measured change that germination made."""
        errors = self._run.ranks.attempt("the change by a birth", lambda: self._preserved_error(seed))
        seed.state.facts["preserved_error"] = max(errors)
        self._note(seed, Transition("dormant", "germinated", "a decision put it there"))
        self._step_through(seed)

    def tick(self, step: int) -> None:
        """Age every seed by one optimizer step and move α along; lift embargoes that are over."""
        for seed in self._body.seeds:
            state = seed.record
            state.age_steps += 1
            state.stage_age_steps += 1
            if state.stage == "blending":
                seed.set_alpha(stage_alpha("blending", state.stage_age_steps, self.config))
        for site in self._ledger.lifted(step):
            seed_id, blueprint = self._resting.pop(site, ("", ""))
            self._recorder.transition(
                seed_id=seed_id, site=site, blueprint=blueprint, source="embargoed", target="dormant",
                reason="the embargo is over", measurements={"step": float(step)},
            )  # fmt: skip

    def review(self, step: int) -> None:
        """Look at every gate, when gates are due."""
        if not self.config.gate_due(step):
            return
        self._share_facts()
        for group in self._groups():
            if self._measurement_due(group[0]):
                self._measure(group)
            for seed in group:
                self._step_through(seed)

    def cull(
        self, seed_id: str, reason: str, step: int, measurements: Mapping[str, float] | None = None
    ) -> None:
        """Remove a seed by a decision from outside its gate."""
        seed = next(s for s in self._body.seeds if s.seed_id == seed_id)
        self._apply(seed, Transition(seed.stage, "culled", reason, dict(measurements or {})))

    def hold(self, seed_id: str, until_step: int) -> None:
        """Keep a seed that is holding from fossilising up to and including ``until_step``; it may still be culled."""
        seed = next(s for s in self._body.seeds if s.seed_id == seed_id)
        seed.state.facts["held_until_step"] = float(until_step)

    def forget(self, seed: Seed, reason: str) -> None:
        """Note that a rollback has to take a seed away, whatever its stage."""
        self._apply(seed, Transition(seed.stage, "culled", reason), force=True)

    def _groups(self) -> list[list[Seed]]:
        """Young seeds, those that are judged together side by side: born at one step, and in one stage since one."""
        young = [seed for seed in self._body.seeds if seed.stage != "fossilized"]
        if self.config.judged == "alone":
            return [[seed] for seed in young]
        groups: dict[tuple[str, int, int], list[Seed]] = {}
        for seed in young:
            record = seed.record
            groups.setdefault((record.stage, record.age_steps, record.stage_age_steps), []).append(seed)
        return list(groups.values())

    def _share_facts(self) -> None:
        """Let rank 0's facts about young seeds count on every rank, and what was not finite on any of them.

        A checkpoint holds rank 0's facts alone, and a resumed run has to see what this one sees.
        """
        young = [seed for seed in self._body.seeds if seed.stage != "fossilized"]
        ranks = self._run.ranks
        if ranks.size == 1 or not young:
            return
        known = ranks.exchange("facts of seeds", [[s.record.facts, int(s.non_finite)] for s in young])
        for i, seed in enumerate(young):
            seed.record.facts = dict(known[0][i][0])
            seed.non_finite.fill_(max(facts[i][1] for facts in known))

    def _step_through(self, seed: Seed) -> None:
        transition = next_transition(seed.stage, self._facts(seed), self.config)
        held = self._recorder.step <= seed.record.facts.get("held_until_step", -1.0)
        if transition is not None and not (held and transition.target == "fossilized"):
            self._apply(seed, transition)

    def _measurement_due(self, seed: Seed) -> bool:
        if seed.stage != "holding":
            return False
        age = seed.state.stage_age_steps
        first = self.config.min_holding_steps - self.config.num_measurements * self.config.gate_interval_steps
        last = seed.state.facts.get("measured_at_age", -1.0) if seed.state.contributions else -1.0
        few = len(seed.state.contributions) < self.config.num_measurements
        return age >= first and (few or age >= last * _SPACING)

    def _measure(self, seeds: Sequence[Seed]) -> None:
        batches = self._batches()

        def measure() -> tuple[float, float]:
            measured = contribution(self._body, seeds, batches)
            return measured.mean, measured.loss_on

        mean, loss_on = self._run.ranks.measure("a contribution", measure)
        assert mean is not None
        assert loss_on is not None
        for seed in seeds:
            state = seed.state
            state.contributions.append(mean)
            state.facts["held_out_loss"] = loss_on
            state.facts["num_judged"] = float(len(seeds))
            state.facts["measured_at_age"] = float(state.stage_age_steps)
        samples = sum(batch.num_samples for batch in batches)
        self._ledger.charge_measurement(2.0 * self._body.flops * samples)

    def _batches(self) -> Sequence[LossOnBatch]:
        return list(self._run.held_out()) or [self._run.recent()]

    def _facts(self, seed: Seed) -> Facts:
        state = seed.state
        known = state.facts.get
        return Facts(
            age_steps=state.age_steps,
            stage_age_steps=state.stage_age_steps,
            gradient_norm=known("gradient_norm"),
            gradient_snr=known("gradient_snr"),
            contributions=tuple(state.contributions),
            held_out_loss=known("held_out_loss"),
            output_ratio=known("output_ratio"),
            non_finite=state.non_finite,
            alpha=state.alpha,
            preserved_error=known("preserved_error"),
            registered=self._registered(seed),
            num_judged=int(state.facts.get("num_judged", 1)),
        )

    def _registered(self, seed: Seed) -> bool:
        counts: dict[int, int] = {}
        for optimizer in self._run.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    counts[id(parameter)] = counts.get(id(parameter), 0) + 1
        return all(counts.get(id(p), 0) == 1 for p in seed.parameters() if p.requires_grad)

    def _preserved_error(self, seed: Seed) -> float:
        """Largest entry of the contribution at full strength on one batch: what the output would change by."""
        with preserved(self._body.model), torch.no_grad(), seed.overridden(1.0):
            self._body.model.eval()
            seed.observing = True
            self._batches()[0]()
            seen, seed.observing, seed.observed = seed.observed, False, None
        self._ledger.charge_measurement(float(self._body.flops * self._batches()[0].num_samples))
        if seen is None:
            return math.inf
        largest = float(seen[0].abs().max())
        return largest if math.isfinite(largest) else math.inf

    def _apply(self, seed: Seed, transition: Transition, *, force: bool = False) -> None:
        if not force:
            self._note(seed, transition)
        else:
            self._record(seed, transition)
        if transition.target != "culled":
            seed.enter(transition.target, stage_alpha(transition.target, 0, self.config))
            self._ledger.fossilized += transition.target == "fossilized"
            return
        site, step = seed.site.name, self._recorder.step
        self._body.cull(seed, self._run.optimizers)
        self._recorder.num_parameters = self._body.num_parameters
        self._ledger.culled += 1
        until = step + self.config.embargo_steps
        self._ledger.embargo(site, until)
        self._resting[site] = (seed.seed_id, seed.blueprint)
        self._lifecycles.pop(seed.seed_id, None)
        self._recorder.transition(
            seed_id=seed.seed_id, site=site, blueprint=seed.blueprint, source="culled", target="embargoed",
            reason=f"the site rests until step {until}", measurements={"until_step": float(until)},
        )  # fmt: skip

    def _note(self, seed: Seed, transition: Transition) -> None:
        """Check a transition against the lifecycle, keep it in the seed's history and write it down."""
        stage: Stage = "dormant" if transition.source == "dormant" else seed.stage
        lifecycle = self._lifecycles.setdefault(seed.seed_id, Lifecycle(self.config, stage))
        lifecycle.stage = stage  # a user may have advanced the seed by hand
        lifecycle.apply(transition, self._recorder.step)
        self._record(seed, transition)

    def _record(self, seed: Seed, transition: Transition) -> None:
        self._recorder.num_parameters = self._body.num_parameters
        self._recorder.transition(
            seed_id=seed.seed_id, site=seed.site.name, blueprint=seed.blueprint, source=transition.source,
            target=transition.target, reason=transition.reason, measurements=dict(transition.measurements),
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Histories and resting sites as plain types."""
        return {
            "lifecycles": {
                seed_id: lifecycle.state_dict() for seed_id, lifecycle in self._lifecycles.items()
            },
            "resting": {site: list(value) for site, value in self._resting.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        self._lifecycles = {}
        for seed_id, value in state["lifecycles"].items():
            self._lifecycles[seed_id] = Lifecycle(self.config)
            self._lifecycles[seed_id].load_state_dict(value)
        self._resting = {site: (value[0], value[1]) for site, value in state["resting"].items()}
