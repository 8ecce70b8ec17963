"""Divergence, responses, snapshots, and a seed that explodes for real."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.errors import CheckpointError, ConfigError
from esper.kasmina.body import attach
from esper.kasmina.layer import SEEDS, get_slot, swap_class
from esper.kasmina.optimizer import register_parameters, unregister_parameters
from esper.kasmina.seed import Seed, SeedState
from esper.kasmina.sites import Site
from esper.tamiyo.divergence import DivergenceDetector, Verdict
from esper.tamiyo.governor import Governor, GovernorConfig
from esper.tamiyo.snapshot import capture, is_finite, renew_optimizer_state, restore

CONFIG = GovernorConfig(check_interval_steps=1, min_checks=3, window=8, patience=2, watch_steps=20)


@dataclass(frozen=True)
class AliveSeed:
    seed_id: str


# --- config and divergence --------------------------------------------------------------------


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        GovernorConfig(patience=0, loss_factor=0.5, deviations=math.nan, window=2.5)  # type: ignore[arg-type]
    for piece in (
        "patience must be a whole number of at least 1, got 0",
        "loss_factor must be a finite number of at least 1, got 0.5",
        "deviations must be a finite number of at least 0, got nan",
        "window must be a whole number of at least 3, got 2.5",
    ):
        assert piece in str(error.value)
    with pytest.raises(ConfigError, match=r"min_checks \(9\) must not exceed window \(8\)"):
        GovernorConfig(min_checks=9, window=8)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(GovernorConfig)])
def test_every_setting_is_checked(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        GovernorConfig(**{field: -1})


def test_checks_are_due_at_their_interval() -> None:
    assert [s for s in range(1, 13) if GovernorConfig(check_interval_steps=4).check_due(s)] == [4, 8, 12]


def kinds(losses: list[float], config: GovernorConfig = CONFIG) -> list[str]:
    detector = DivergenceDetector(config)
    return [detector.check(loss).kind for loss in losses]


def test_an_explosion_needs_patience_and_one_bad_batch_is_forgiven() -> None:
    good = [2.0, 2.1, 1.9, 2.0]
    assert kinds([*good, 50.0, 2.0, 50.0, 60.0]) == ["ok"] * 4 + ["suspect", "ok", "suspect", "diverged"]


def test_exploding_values_do_not_become_the_new_normal() -> None:
    patient = dataclasses.replace(CONFIG, patience=30)
    assert kinds([2.0, 2.1, 1.9] + [50.0] * 30, patient)[-1] == "diverged"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_counts_at_once(bad: float) -> None:
    detector = DivergenceDetector(CONFIG)
    verdict = detector.check(bad)
    assert verdict.kind == "diverged"
    assert f"the loss is {bad}" in verdict.reason
    assert not verdict.finite
    assert detector.check(1.0, gradient_norm=bad).reason == f"the gradient norm is {bad}"


def test_noise_falling_losses_and_small_rises_are_fine() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, generator=generator).exp()
    assert set(kinds([3.0 * 0.98**i * float(n) ** 0.3 for i, n in enumerate(noise)])) == {"ok"}
    # Near zero a factor alone would cry wolf: .001 -> .05 is nothing against the 2.0 it began with.
    assert set(kinds([2.0, 2.0, 2.0] + [0.001] * 10 + [0.05] * 5)) == {"ok"}
    # Spikes that were forgiven count as noise from then on.
    spread = kinds([1.0, 9.0, 0.5, 8.0, 1.0, 7.0, 2.0, 18.0, 18.0])
    assert spread[3] == "suspect"
    assert spread[-3:] == ["ok"] * 3


def test_negative_losses_explode_upwards() -> None:
    assert kinds([-5.0, -5.1, -4.9, -5.0, -3.0, 40.0, 41.0])[-3:] == ["ok", "suspect", "diverged"]


def test_gradient_norms_are_watched_too() -> None:
    detector = DivergenceDetector(CONFIG)
    for _ in range(4):
        detector.check(1.0, 0.5)
    assert detector.check(1.0, 20.0).kind == "ok"
    assert detector.check(1.0, 90.0).kind == "suspect"
    verdict = detector.check(1.0, 90.0)
    assert verdict.kind == "diverged"
    assert "the gradient norm of 90 is far above its recent median of 0.5" in verdict.reason
    assert verdict.measurements["gradient_norm_median"] == 0.5


# --- responses --------------------------------------------------------------------------------

NAN = Verdict("diverged", "the loss is nan", {"loss": math.nan})
HIGH = Verdict("diverged", "the loss of 50 is far above", {"loss": 50.0})


def with_snapshot(config: GovernorConfig = CONFIG) -> Governor:
    governor = Governor(config)
    model = nn.Linear(2, 2)
    assert (
        governor.take_snapshot(model, torch.optim.SGD(model.parameters()), step=7, site="bypass:a->b") == ""
    )
    return governor


def test_seeds_go_first_newest_first_then_the_run_goes_back() -> None:
    governor = with_snapshot()
    seeds = [AliveSeed("s2"), AliveSeed("s1")]
    targets = []
    while True:
        verdict = governor.check(10, math.nan)
        response = governor.respond(verdict, seeds)
        assert response == governor.respond(verdict, seeds), "a decision has no side effects"
        governor.applied(response)
        targets.append((response.kind, response.target))
        if response.kind == "rollback":
            break
        seeds = seeds[1:]
        assert "no good check yet" in governor.refusal()
    assert targets == [("cull", "s2"), ("cull", "s1"), ("rollback", "bypass:a->b")]
    assert governor.refusal() == ""
    assert governor.snapshot_step == 7


def test_broken_host_weights_cannot_be_mended_by_a_cull() -> None:
    response = with_snapshot().respond(NAN, [AliveSeed("s1")], host_finite=False)
    assert response.kind == "rollback"
    assert "the host's weights are not finite: back to step 7" in response.reason


def test_nothing_is_done_about_a_shift_when_nothing_was_grown() -> None:
    governor = Governor(CONFIG)
    outcomes = []
    for step, loss in enumerate([1.0, 1.1, 0.9, 1.0, 20.0, 21.0, 20.0, 19.0, 20.0, 21.0]):
        verdict = governor.check(step, loss)
        response = governor.respond(verdict, [])
        governor.applied(response)
        outcomes.append((verdict.kind, response.kind))
    assert outcomes[5] == ("diverged", "none")
    assert {kind for kind, _ in outcomes[6:]} == {"ok"}, "the new level should be the new normal"
    assert governor.halted == ""


def test_a_host_that_breaks_by_itself_stops_growth_once() -> None:
    governor = Governor(CONFIG)
    response = governor.respond(governor.check(1, math.nan), [])
    assert response.kind == "halt_growth"
    assert "there is no snapshot to go back to; is the learning rate too high?" in response.reason
    governor.applied(response)
    assert governor.refusal() == governor.halted == response.reason
    assert governor.respond(governor.check(2, math.nan), []).kind == "none"


def test_growth_stops_with_the_last_rollback() -> None:
    governor = with_snapshot(dataclasses.replace(CONFIG, max_rollbacks=2))
    seen = []
    for step in range(8, 12):
        response = governor.respond(governor.check(step, math.nan), [])
        governor.applied(response)
        seen.append((response.kind, response.halts))
    assert seen == [("rollback", False), ("rollback", True), ("none", False), ("none", False)]
    assert governor.num_rollbacks == 2
    assert "the last of 2 rollbacks" in governor.halted


def test_a_response_to_a_good_check_changes_nothing() -> None:
    governor = with_snapshot()
    response = governor.respond(governor.check(8, 1.0), [AliveSeed("s1")])
    before = governor.state_dict()
    governor.applied(response)
    assert response.kind == "none"
    assert governor.state_dict()["last"] == before["last"]


# --- snapshots --------------------------------------------------------------------------------


def test_a_state_that_is_not_known_good_is_never_kept() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    governor = Governor(CONFIG)
    for loss in (1.0, 1.1, 0.9):
        governor.check(1, loss)
    assert governor.take_snapshot(model, optimizer, step=2) == ""
    good = governor.snapshot
    governor.check(3, 50.0)
    assert "not known to be well: the loss of 50" in governor.take_snapshot(model, optimizer, step=3)
    governor.check(4, 1.0)
    with torch.no_grad():
        model.bias[0] = math.nan
    assert "holds a NaN" in governor.take_snapshot(model, optimizer, step=4)
    assert governor.snapshot is good


def test_the_snapshot_goes_when_its_watch_ends_well() -> None:
    governor = with_snapshot()
    for step in range(8, 27):
        governor.check(step, 1.0)
    assert governor.snapshot is not None
    governor.check(27, 90.0)
    assert governor.snapshot is not None, "not while the run is suspect"
    governor.check(28, 1.0)
    assert governor.snapshot is None
    assert governor.snapshot_step is None


def test_finiteness_covers_buffers_and_integers() -> None:
    model = nn.BatchNorm1d(2)
    assert is_finite(model)
    assert model.running_var is not None
    model.running_var[0] = math.inf
    assert not is_finite(model)


class Grown(nn.Module):
    """Host with a real seed layer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result

    def plant(self, optimizer: Optimizer) -> Seed:
        layer = self.net[2]
        swap_class(layer)
        get_slot(layer)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            branch = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))
        nn.init.zeros_(branch[2].weight)
        nn.init.zeros_(branch[2].bias)
        site = Site("parallel:net.2", "parallel", "net.2", "net.2", (8,), (8,))
        seed = Seed(SeedState("s0", site, "bottleneck", 4), branch, "source", None)
        layer.add_module(SEEDS, nn.ModuleDict({"s0": seed}))
        seed.enter("holding", 1.0)
        named = list(branch.named_parameters(prefix="net.2.esper_seeds.s0.branch"))
        register_parameters(optimizer, named, [layer.weight] * len(named))
        return seed

    def uproot(self, seed: Seed, optimizer: Optimizer) -> None:
        unregister_parameters(optimizer, list(seed.parameters()))
        del self.net[2]._modules[SEEDS]


def data(num: int = 256) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num, 6, generator=generator)
    return x, (x[:, :3] + 0.5 * x[:, 3:].sin()).argmax(1)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    x, y = data()
    for step in steps:
        rows = slice(step % 8 * 32, step % 8 * 32 + 32)
        optimizer.zero_grad()
        loss_of(model, x[rows], y[rows]).backward()
        optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("through_disk", [False, True])
def test_restored_training_repeats_bit_for_bit(name: str, through_disk: bool) -> None:
    model = Grown()
    optimizer = MAKERS[name](model.named_parameters())
    train(model, optimizer, range(3))
    seed = model.plant(optimizer)
    train(model, optimizer, range(3, 6))
    governor = Governor(CONFIG)
    assert governor.take_snapshot(model, optimizer, step=6) == ""
    if through_disk:
        file = io.BytesIO()
        torch.save(governor.state_dict(), file)
        file.seek(0)
        governor = Governor(CONFIG)
        governor.load_state_dict(torch.load(file, weights_only=True))
    identities = [id(p) for p in model.parameters()]
    train(model, optimizer, range(6, 12))
    expected = copy.deepcopy(model.state_dict())

    seed.enter("fossilized", 1.0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1e20)
    train(model, optimizer, range(2))
    assert governor.snapshot is not None
    for _ in range(2):  # a snapshot can serve more than once
        restore(model, optimizer, governor.snapshot)
        assert seed.stage == "holding"
        train(model, optimizer, range(6, 12))
    assert [id(p) for p in model.parameters()] == identities
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_restoring_clears_what_was_grown_after_the_snapshot() -> None:
    model = Grown()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    train(model, optimizer, range(3))
    snapshot = capture(model, optimizer, step=3, site="parallel:net.2")
    learning_rate = optimizer.param_groups[0]["lr"] = 0.002
    seed = model.plant(optimizer)
    train(model, optimizer, range(3, 6))
    model.uproot(seed, optimizer)
    restore(model, [optimizer], snapshot)
    assert len(optimizer.state) == len(optimizer.param_groups[0]["params"]) == 6
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}
    assert optimizer.param_groups[0]["lr"] == learning_rate, "the schedule goes on from where it is"


@pytest.mark.parametrize("name", MAKERS)
def test_seeds_culled_since_the_snapshot_are_grown_again_and_later_ones_leave(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    body = attach(model, torch.zeros(2, 6))
    optimizer = MAKERS[name](model.named_parameters())
    early = body.germinate("bypass:0->2", "widen", 4)
    body.register(optimizer)
    early.enter("holding", 1.0)
    train(model, optimizer, range(4))
    snapshot = capture(model, optimizer, step=4)
    train(model, optimizer, range(4, 8))
    expected = copy.deepcopy(model.state_dict())
    late = body.germinate("bypass:2->4", "widen", 4)
    body.register(optimizer)
    late.enter("holding", 1.0)
    train(model, optimizer, range(8, 10))
    body.cull(early, [optimizer])

    restore(model, optimizer, snapshot)
    assert [seed.seed_id for seed in body.seeds] == [early.seed_id]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(optimizer.state)
    train(model, optimizer, range(4, 8))
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_renewed_optimizer_state_leaves_weights_alone_and_unknown_parameters_afresh() -> None:
    model = Grown()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    snapshot = capture(model, optimizer, step=3)
    moment = optimizer.state[model.net[0].weight]["exp_avg_sq"].clone()
    seed = model.plant(optimizer)
    train(model, optimizer, range(3, 6))
    weight = model.net[0].weight.detach().clone()
    renew_optimizer_state(model, optimizer, snapshot)
    assert torch.equal(optimizer.state[model.net[0].weight]["exp_avg_sq"], moment)
    assert torch.equal(model.net[0].weight, weight)
    assert not any(p in optimizer.state for p in seed.parameters())
    renew_optimizer_state(model, optimizer, None)
    assert not optimizer.state
    train(model, optimizer, range(6, 8))


def test_fused_momentum_survives_a_renewal() -> None:
    model = Grown()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    train(model, optimizer, range(3))
    snapshot = capture(model, optimizer, step=3)
    model.plant(optimizer)
    renew_optimizer_state(model, optimizer, snapshot)
    train(model, optimizer, range(3, 6))
    assert is_finite(model)


def test_what_no_longer_fits_is_refused() -> None:
    model = Grown()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snapshot = capture(model, optimizer, step=3)
    model.plant(optimizer)
    with pytest.raises(CheckpointError, match=r"(?s)cannot roll back to step 3: .*esper_seeds.s0"):
        restore(model, optimizer, snapshot)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(
        CheckpointError, match=r"it had \[1\] parameter groups by optimizer, now there are \[2\]"
    ):
        restore(model, optimizer, snapshot)


@pytest.mark.parametrize("state", [{}, {"snapshot": {"step": 1}}, {"snapshot": None, "last": {"what": 1}}])
def test_damaged_state_is_refused(state: dict[str, Any]) -> None:
    governor = with_snapshot()
    with pytest.raises(CheckpointError, match="damaged"):
        governor.load_state_dict(state)
    assert governor.snapshot_step == 7


def test_a_resumed_governor_goes_on_alike() -> None:
    losses = [1.0, 1.1, 0.9, 1.0, 30.0, 31.0, 1.0, 30.0, math.nan, 1.0]

    def go_on(governor: Governor, losses: list[float]) -> list[tuple[str, str, str]]:
        seen = []
        for step, loss in enumerate(losses, 10):
            verdict = governor.check(step, loss, loss)
            response = governor.respond(verdict, [])
            governor.applied(response)
            seen.append((verdict.kind, response.kind, governor.refusal()))
        return seen

    whole = go_on(with_snapshot(), losses)
    for cut in range(len(losses)):
        first = with_snapshot()
        begun = go_on(first, losses[:cut])
        second = Governor(CONFIG)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        rest = go_on(second, losses[cut:])
        assert begun + rest == whole


# --- a seed explodes for real -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cullable", "expected"),
    [
        ("adamw", True, ["cull"]),  # Adam's bounded steps do little harm before the seed is gone
        ("adamw", False, ["rollback"]),
        ("sgd", True, ["cull", "rollback"]),  # one step ruins the host's weights, so a cull does not help
        ("sgd", False, ["rollback"]),
    ],
)
def test_a_run_whose_seed_explodes_ends_as_good_as_the_control(
    name: str, cullable: bool, expected: list[str]
) -> None:
    """The seed's last weights are multiplied by 1e20: its output stays finite, so no guard catches it.

    With ``cullable`` false the seed counts as part of the host, so that only the rollback can help.
    """
    x, y = data()

    def run(grow: bool) -> tuple[float, list[str]]:
        model = Grown()
        optimizer = MAKERS[name](model.parameters())
        governor = Governor(CONFIG)
        seed: Seed | None = None
        actions: list[str] = []
        for step in range(1, 201):
            rows = slice(step % 8 * 32, step % 8 * 32 + 32)
            optimizer.zero_grad()
            loss = loss_of(model, x[rows], y[rows])
            loss.backward()
            optimizer.step()
            verdict = governor.check(step, loss.item())
            host = [p for n, p in model.named_parameters() if SEEDS not in n]
            finite = all(bool(torch.isfinite(p).all()) for p in host)
            response = governor.respond(verdict, [seed] if seed and cullable else [], host_finite=finite)
            if response.kind in ("cull", "rollback"):
                if seed is not None:
                    model.uproot(seed, optimizer)
                    seed = None
                if response.kind == "rollback":
                    assert governor.snapshot is not None
                    restore(model, optimizer, governor.snapshot)
                else:
                    renew_optimizer_state(model, optimizer, governor.snapshot)
                actions.append(response.kind)
            governor.applied(response)
            if grow and step == 40:
                assert governor.take_snapshot(model, optimizer, step=step, site="parallel:net.2") == ""
                seed = model.plant(optimizer)
            if grow and step == 45:
                assert seed is not None
                with torch.no_grad():
                    for p in seed.branch[2].parameters():
                        p.mul_(1e20)
        assert governor.halted == ""
        with torch.no_grad():
            return float(loss_of(model, x, y)), actions

    control, no_actions = run(grow=False)
    final, actions = run(grow=True)
    assert no_actions == []
    assert actions == expected
    assert control < 0.5
    assert final < control + 0.05
