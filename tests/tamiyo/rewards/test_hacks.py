"""What has been farmed in public systems (GROWTH.md §3.6) earns less here than honest play, on real trainings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from loop import EAGER, WIDE, Batch, Loop

from esper.messages import Decision
from esper.tamiyo.evaluation import contribution, mean_loss
from esper.tamiyo.graph.facts import Candidate, Placement
from esper.tamiyo.rewards import Branch, Outcome, Reward, RewardComputer
from esper.tamiyo.rewards.shaping import shape

STEPS = 300
PARALLEL = ("parallel:0", "parallel:2", "parallel:4")
GROW = Candidate(
    action="grow",
    placements=(Placement(site=WIDE, source="0", target="2", kind="bypass", blueprint="widen", size=16),),
)


class Teacher(Loop):
    """A host with a bottleneck on the labels of a wider teacher, with data enough not to be memorised."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(total_steps=STEPS, probes={"decision_interval": 0.01}, **settings)
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(2048, 8, generator=generator)
        first, second = torch.randn(8, 16, generator=generator), torch.randn(16, 4, generator=generator)
        y = ((x @ first).relu() @ second).argmax(1)
        parts = zip(x[:1536].split(64), y[:1536].split(64), strict=True)
        self.train = [Batch(self.model, a, b) for a, b in parts]
        self._held_out = [Batch(self.model, x[1536:], y[1536:])]


@dataclass
class Run:
    """A training, measured every ten steps from the first on."""

    loop: Teacher
    steps: list[int]
    losses: list[float]
    flops: list[float]

    def branch(self, start: int = 1, *, culls: int = 0) -> Branch:
        first = self.steps.index(start)
        return Branch(
            steps=tuple(self.steps[first:]),
            losses=tuple(self.losses[first:]),
            training_flops=tuple(flops - self.flops[first] for flops in self.flops[first:]),
            num_parameters=self.loop.body.num_parameters,
            culls=culls,
        )


def trained(*entries: tuple[float, str, str, int], prune_every: int = 0) -> Run:
    """Train with the seeds of ``entries``; every ``prune_every`` steps one to be culled soon."""
    options = {"entries": [list(entry) for entry in entries]} if entries else {"num_events": 0}
    # a seed that is to be culled must not have fossilised before
    lifecycle = EAGER | {"min_holding_steps": 20} if prune_every else EAGER
    loop = Teacher(policy_options=options, lifecycle=lifecycle)
    run = Run(loop, [], [], [])
    for _ in range(STEPS):
        if prune_every and loop.step % prune_every == 20:
            loop.controller.request(
                Decision(action="germinate", reason="", policy="", site=WIDE, blueprint="widen", size=4)
            )
        if prune_every and loop.step % prune_every == 25:
            loop.controller.request(
                Decision(action="cull", reason="", policy="", site=loop.body.seeds[-1].seed_id)
            )
        loop.run()
        if loop.step % 10 == 1:
            run.steps.append(loop.step)
            run.losses.append(mean_loss(loop.body, loop.held_out()))
            run.flops.append(loop.controller.ledger.training_flops)
    return run


@pytest.fixture(scope="module")
def control() -> Run:
    return trained()


@pytest.fixture(scope="module")
def widened() -> Run:
    """A narrow layer is widened a tenth into the run."""
    return trained((0.1, WIDE, "widen", 16))


@pytest.fixture(scope="module")
def honest(widened: Run, control: Run) -> Reward:
    return reward(widened.branch(31), control.branch(31))


@pytest.fixture(scope="module")
def greedy() -> Run:
    """Seeds that the host has no need of, everywhere, as soon as the run begins."""
    return trained(*((0.0, site, "lowrank", 2) for site in PARALLEL))


def reward(taken: Branch, control: Branch, *, price: float = 0.03, candidate: Candidate = GROW) -> Reward:
    made = RewardComputer().compute(
        Outcome(candidate=candidate, total_steps=STEPS, price=price, taken=taken, control=control)
    )
    assert made is not None
    return made


def test_honest_growth_is_worth_it(honest: Reward):
    assert honest.total > 0.05
    assert honest.utility > 0.08
    assert honest.new_kind == "grow:bypass/widen"


def test_germinating_everything_early_cannot_claim_the_hosts_own_progress(greedy, control, honest):
    claimed = greedy.losses[0] - greedy.losses[-1]
    assert claimed > 0.8  # what a reward of before minus after would have paid
    assert claimed == pytest.approx(control.losses[0] - control.losses[-1], abs=0.1)  # and whose it was
    earned = reward(greedy.branch(), control.branch())
    assert earned.total < 0 < honest.total
    assert earned.components["memory"] < 0


def test_seeds_that_are_indispensable_but_useless_earn_nothing(greedy, control, honest):
    loop = greedy.loop
    removed = contribution(loop.body, list(loop.body.seeds), loop.held_out())
    assert removed.mean > 0.3  # what a reward of off minus on would have paid
    assert reward(greedy.branch(), control.branch()).total < 0 < honest.total


def test_fossilising_at_a_peak_does_not_close_the_account(control, honest):
    # The loss dips far below the control's in mid-run, where the hacker fossilises, and ends above it.
    steady = control.branch(31)
    n = len(steady.losses)
    dip = [
        loss - 0.3 if n // 3 <= i < n // 2 else loss + 0.02 * (i > 0) for i, loss in enumerate(steady.losses)
    ]
    taken = Branch(
        steps=steady.steps, losses=tuple(dip), training_flops=steady.training_flops,
        num_parameters=control.loop.body.num_parameters + 20,
    )  # fmt: skip
    peak = taken.until(taken.steps[n // 2 - 1])
    assert reward(peak, steady.until(peak.steps[-1])).components["accuracy"] > 0.9
    earned = reward(taken, steady)
    assert earned.total < 0 < honest.total
    assert earned.components["speed"] <= 0  # the dip does not count as having got there


def test_a_loop_of_germinating_and_pruning_loses_at_every_turn(control, honest):
    looping = trained(prune_every=60)
    culled = looping.loop.controller.ledger.culled
    assert culled == 5
    assert looping.loop.body.num_parameters == control.loop.body.num_parameters
    earned = reward(looping.branch(culls=culled), control.branch())
    assert earned.total < 0 < honest.total
    assert earned.components["safety"] == -1.0
    assert earned.components["innovation"] == 0.0
    assert earned.components["memory"] == 0.0
    # Nor does shaping pay for going round: with what is discounted, it costs.
    around = shape([0.0] * 8, [0.2, 0.9] * 4 + [0.2], gamma=1.0, terminated=False)
    assert sum(around) == pytest.approx(0.0)


def test_the_cheapest_module_does_not_win_by_being_cheap(control, widened):
    cheap = trained((0.1, "parallel:4", "lowrank", 1))
    grown = cheap.loop.body.num_parameters - control.loop.body.num_parameters
    assert 0 < grown < 20
    for price in (0.0, 0.03, 0.1):
        assert (
            reward(cheap.branch(31), control.branch(31), price=price).total
            < reward(widened.branch(31), control.branch(31), price=price).total
        )
    # A tiny module with a tiny gain has the better gain per parameter, and still earns less.
    base = Branch(steps=(0, 100), losses=(1.0, 0.5), training_flops=(0.0, 1e6), num_parameters=1000)
    tiny = Branch(steps=(0, 100), losses=(1.0, 0.499), training_flops=(0.0, 1e6), num_parameters=1001)
    large = Branch(steps=(0, 100), losses=(1.0, 0.4), training_flops=(0.0, 1.2e6), num_parameters=1200)
    assert 0.001 / 1 > 0.1 / 200
    assert reward(tiny, base).total < reward(large, base).total
