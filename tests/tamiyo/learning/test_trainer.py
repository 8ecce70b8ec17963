"""The trainer: what goes into an update, that every setting counts, and that a resumed training is the same one."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_toys import Choice, ToyNetwork, bandit_rollout, choose, graph, network, timing_rollout
from lightning.pytorch.loggers import CSVLogger

from esper.errors import CheckpointError, ConfigError, DataFormatError, LearningError
from esper.tamiyo.learning.config import TrainingConfig
from esper.tamiyo.learning.proximal import ProximalPolicy
from esper.tamiyo.learning.trainer import PolicyTrainer
from esper.tamiyo.learning.trajectory import Trajectory, Transition

BASE: dict[str, Any] = {
    "learning_rate": 1e-2,
    "batch_size": 16,
    "num_training_steps": 200,
    "target_update_freq": 2,
    "ppo_epochs": 2,
    "replay_capacity": 64,
    "lr_scheduler_patience": 1,
    "return_smoothing": 0.5,
    "early_stopping_patience": 3,
    "epistemic_threshold": 0.0,
    "max_importance_ratio": 1.5,
}


def config(**settings: Any) -> TrainingConfig:
    return TrainingConfig(**{**BASE, **settings})


def episodes(seed: int, policy: torch.nn.Module, num: int = 12) -> list[Trajectory]:
    """Cut-off episodes of two decisions, with measured urgency and harm for some."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    found = []
    for trajectory in timing_rollout(policy, num, rng, generator):
        steps = [
            dataclasses.replace(
                step, urgency=float(rng.random()) if i else math.nan, risk=float(rng.integers(2))
            )
            for i, step in enumerate(trajectory.steps)
        ]
        found.append(Trajectory(steps, terminated=False, final_value=0.3))
    return found


def run(trainer: PolicyTrainer, num_updates: int, start: int = 0) -> list[dict[str, float]]:
    """Updates on rollouts of a fixed policy, so that only the trainer differs between two runs."""
    rollout_policy = network(7)
    metrics = [trainer.update(episodes(start + i, rollout_policy)) for i in range(num_updates)]
    for i in range(3):
        trainer.replay_buffer.add_experience(
            state=graph([0.1 * i, 1.0]), action=Choice(1, -2.0), reward=i - 3.0, next_state=None, td_error=1.0
        )
    metrics.append(trainer.train_on_replay(2))
    for measured in (5.0, -10.0):
        trainer.observe(measured)
    return metrics


def fingerprint(trainer: PolicyTrainer) -> dict[str, Any]:
    """Everything that a setting could have changed."""
    drawn = trainer.replay_buffer.sample(8, np.random.default_rng(0), beta=trainer.importance_exponent)
    return {
        "weights": torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]).tolist(),
        "proximal": torch.cat([p.flatten() for p in trainer.proximal.network.parameters()]).tolist(),
        "priorities": trainer.replay_buffer.probabilities().tolist(),
        "drawn": drawn.weights.tolist(),
        "statistics": {
            k: v for k, v in trainer.get_training_statistics().items() if k.split("/")[0] not in ("loss",)
        },
    }


OTHER: dict[str, Any] = {
    "learning_rate": 2e-2,
    "weight_decay": 0.5,
    "adam_epsilon": 1e-2,
    "batch_size": 8,
    "num_training_steps": 100,
    "gradient_clip_norm": 0.05,
    "target_update_freq": 3,
    "proximal_decay": 0.0,
    "ppo_epochs": 3,
    "clip_ratio": 0.01,
    "max_importance_ratio": 1.01,
    "value_loss_coeff": 0.1,
    "entropy_bonus_coeff": 0.3,
    "gamma": 0.5,
    "gae_lambda": 0.1,
    "urgency_loss_weight": 1.0,
    "safety_loss_weight": 0.1,
    "safety_penalty_weight": 0.5,
    "risk_threshold": 0.1,
    "uncertainty_regularization": 5.0,
    "epistemic_threshold": 0.9,
    "replay_capacity": 16,
    "replay_fraction": 0.1,
    "priority_exponent": 0.0,
    "priority_epsilon": 1.0,
    "importance_exponent": 1.0,
    "lr_scheduler_factor": 0.1,
    "lr_scheduler_patience": 2,
    "return_smoothing": 0.0,
    "early_stopping_patience": 1,
    "min_improvement": 10.0,
    "seed": 1,
}


@pytest.fixture(scope="module")
def base_fingerprint() -> dict[str, Any]:
    trainer = PolicyTrainer(network(dropout=0.5), config())
    run(trainer, 3)
    return fingerprint(trainer)


def test_every_setting_is_listed():
    assert set(OTHER) == {field.name for field in dataclasses.fields(TrainingConfig)}


@pytest.mark.parametrize("name", sorted(OTHER))
def test_every_setting_changes_something(name: str, base_fingerprint: dict[str, Any]):
    trainer = PolicyTrainer(network(dropout=0.5), config(**{name: OTHER[name]}))
    run(trainer, 3)
    assert fingerprint(trainer) != base_fingerprint


def test_the_same_seed_gives_the_same_run_and_global_random_numbers_stay(base_fingerprint: dict[str, Any]):
    before = torch.random.get_rng_state()
    trainer = PolicyTrainer(network(dropout=0.5), config())
    run(trainer, 3)
    assert fingerprint(trainer) == base_fingerprint
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_ratio": 1.5}, "clip_ratio should be below 1"),
        ({"learning_rate": 0.0, "gamma": 2.0}, "learning_rate should be positive; gamma should lie in"),
        ({"replay_fraction": 1.0}, r"replay_fraction should lie in \[0, 1\)"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_are_checked_together(settings: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**settings)  # type: ignore[arg-type]


def test_the_defaults_are_the_documents():
    documented = {
        "learning_rate": 3e-4,
        "batch_size": 64,
        "num_training_steps": 100_000,
        "gradient_clip_norm": 0.5,
        "target_update_freq": 100,
        "ppo_epochs": 4,
        "clip_ratio": 0.2,
        "value_loss_coeff": 0.5,
        "entropy_bonus_coeff": 0.01,
        "gae_lambda": 0.95,
        "safety_loss_weight": 1.0,
        "uncertainty_regularization": 0.1,
        "epistemic_threshold": 0.2,
        "safety_penalty_weight": 2.0,
    }
    defaults = dataclasses.asdict(TrainingConfig())
    assert {name: defaults[name] for name in documented} == documented


def test_metrics_have_their_standard_names_and_the_first_step_is_on_policy():
    policy = network()
    trainer = PolicyTrainer(policy, config(ppo_epochs=1, batch_size=64, target_update_freq=10))
    metrics = trainer.update(episodes(0, policy))
    names = ["policy", "value", "urgency", "risk", "safety", "uncertainty", "total"]
    assert set(metrics) == {
        *(f"loss/{name}" for name in names),
        *[
            "entropy",
            "approx_kl",
            "clip_fraction",
            "explained_variance",
            "grad_norm",
            "learning_rate",
            "wait_fraction",
        ],
        *["importance/mean", "importance/max", "importance/truncated"],
        *["return/mean", "return/std", "advantage/mean", "replay/size", "replay/beta"],
    }
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert metrics["importance/max"] == pytest.approx(1, abs=1e-5)
    assert metrics["replay/size"] == 24
    later = trainer.update(episodes(1, policy))
    assert later["replay/age"] == pytest.approx(1.0)
    assert 0.9 < later["importance/mean"] < 1.1
    assert later["importance/mean"] != 1  # it is one step away from the proximal policy that acted now


def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path: Path):
    path = tmp_path / "deep" / "training.safetensors"
    trainer = PolicyTrainer(network(dropout=0.5), config())
    run(trainer, 2)
    trainer.save_checkpoint(path)
    expected = run(trainer, 2, start=10)
    again = PolicyTrainer(network(3, dropout=0.5), config())
    again.load_checkpoint(path)
    assert run(again, 2, start=10) == expected
    assert fingerprint(again) == fingerprint(trainer)
    again.restore_best()
    trainer.restore_best()
    assert fingerprint(again) == fingerprint(trainer)
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path):
    path = tmp_path / "training.safetensors"
    trainer = PolicyTrainer(network(), config())
    run(trainer, 1)
    trainer.save_checkpoint(path)
    other = PolicyTrainer(network(), config(clip_ratio=0.1))
    with pytest.raises(CheckpointError, match=r"clip_ratio is 0\.1 here and 0\.2"):
        other.load_checkpoint(path)
    larger = PolicyTrainer(network(hidden=8), config())
    before = fingerprint_weights(larger)
    with pytest.raises(CheckpointError, match="expected weights of this policy"):
        larger.load_checkpoint(path)
    assert fingerprint_weights(larger) == before
    assert larger.num_steps == 0
    with pytest.raises(CheckpointError, match="no file"):
        trainer.load_checkpoint(tmp_path / "nowhere.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        trainer.load_checkpoint(path)
    longer = PolicyTrainer(network(), config(num_training_steps=999))
    trainer.save_checkpoint(path)
    longer.load_checkpoint(path)
    assert longer.num_steps == trainer.num_steps


def fingerprint_weights(trainer: PolicyTrainer) -> list[float]:
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]).tolist()


def test_a_loss_that_is_not_finite_is_refused_before_any_weight_changes():
    trainer = PolicyTrainer(network(), config())
    before = fingerprint_weights(trainer)
    state = graph([0.5, 1.0])
    huge = Trajectory([Transition.of(state, 1, -1.0, 1e30, value=0.0)])
    with pytest.raises(LearningError, match="at step 0, but value is not; no weight was changed"):
        trainer.update([huge, *episodes(0, network(), 1)])
    assert fingerprint_weights(trainer) == before
    assert trainer.num_steps == 0


def test_a_gradient_that_is_not_finite_is_refused_before_any_weight_changes():
    trainer = PolicyTrainer(network(), config())
    before = fingerprint_weights(trainer)
    trainer.policy.get_parameter("graph.0.weight").register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(LearningError, match="finite gradient at step 0, but its norm is"):
        trainer.update(episodes(0, network()))
    assert fingerprint_weights(trainer) == before


def test_what_cannot_be_learned_from_is_refused():
    trainer = PolicyTrainer(network(), config())
    with pytest.raises(DataFormatError, match="at least one trajectory"):
        trainer.update([])
    with pytest.raises(DataFormatError, match="NaN or inf at decision 0 of 1"):
        trainer.update([Trajectory([Transition.of(graph([0.5, 1.0]), 1, -1.0, 1.0, value=math.inf)])])
    with pytest.raises(DataFormatError, match="none is complete"):
        trainer.train_on_replay(1)
    with pytest.raises(DataFormatError, match="at least one step"):
        trainer.train_on_replay(0)
    with pytest.raises(DataFormatError, match="finite return"):
        trainer.observe(math.nan)


def test_autocast_around_an_update_changes_nothing():
    one, two = (PolicyTrainer(network(), config()) for _ in range(2))
    data = episodes(0, network())
    one.update(data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        two.update(data)
    assert fingerprint_weights(one) == fingerprint_weights(two)


def test_the_proximal_policy_is_the_weighted_mean_of_all_weights_so_far():
    policy = network()
    proximal = ProximalPolicy(policy, 0.5)
    history = [policy.graph[0].bias.detach().clone()]
    for i in range(3):
        with torch.no_grad():
            policy.graph[0].bias.add_(i + 1.0)
        history.append(policy.graph[0].bias.detach().clone())
        proximal.average(policy)
    weights = torch.tensor([0.5**3, 0.5**2, 0.5, 1.0])
    expected = (torch.stack(history) * (weights / weights.sum())[:, None]).sum(0)
    torch.testing.assert_close(proximal.network.get_parameter("graph.0.bias").data, expected)
    assert not any(p.requires_grad for p in proximal.network.parameters())
    copied = ProximalPolicy(policy, 0.0)
    with torch.no_grad():
        policy.graph[0].bias.zero_()
    copied.average(policy)
    assert (copied.network.get_parameter("graph.0.bias") == 0).all()


def test_the_averaged_policy_moves_as_often_as_said():
    trainer = PolicyTrainer(network(), config(ppo_epochs=1, batch_size=64, target_update_freq=2))
    start = trainer.proximal.network.get_parameter("graph.0.bias").clone()
    trainer.update(episodes(0, network()))
    assert torch.equal(trainer.proximal.network.get_parameter("graph.0.bias"), start)
    trainer.update(episodes(1, network()))
    assert trainer.num_steps == 2
    assert not torch.equal(trainer.proximal.network.get_parameter("graph.0.bias"), start)


def test_rate_and_stopping_follow_the_measured_return_and_the_best_weights_are_kept():
    trainer = PolicyTrainer(network(), config(lr_scheduler_patience=1, early_stopping_patience=4))
    trainer.observe(1.0)
    best = fingerprint_weights(trainer)
    trainer.update(episodes(0, network()))  # earns less
    for _ in range(2):
        trainer.observe(0.0)
    assert trainer.learning_rate == pytest.approx(0.5e-2)
    assert not trainer.should_stop
    trainer.observe(0.0)
    assert trainer.should_stop
    assert fingerprint_weights(trainer) != best
    trainer.restore_best()
    assert fingerprint_weights(trainer) == best
    statistics = trainer.get_training_statistics()
    assert (statistics["best_return"], statistics["since_best"]) == (1.0, 4)


def test_importance_exponent_rises_to_one_with_the_last_step():
    trainer = PolicyTrainer(network(), config(num_training_steps=8, importance_exponent=0.4))
    assert trainer.importance_exponent == pytest.approx(0.4)
    trainer.num_steps = 4
    assert trainer.importance_exponent == pytest.approx(0.7)
    trainer.num_steps = 80
    assert trainer.importance_exponent == 1.0
    assert trainer.should_stop


def test_a_whole_training_shows_progress_logs_its_metrics_and_ends_with_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    policy = network()
    logger = CSVLogger(tmp_path, name="", version="")
    settings = config(num_training_steps=24, early_stopping_patience=100)
    trainer = PolicyTrainer(policy, settings, logger=logger)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    statistics = trainer.train(lambda p: bandit_rollout(p, 16, rng, generator), progress=True)
    assert 24 <= statistics["num_steps"] <= 28
    assert statistics["num_experiences"] == 16 * statistics["num_updates"]
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == statistics["num_updates"]
    assert float(rows[-1]["loss/policy"]) == pytest.approx(statistics["loss/policy"])
    assert int(rows[-1]["step"]) == statistics["num_steps"]
    assert "learning_rate: 0.01" in (tmp_path / "hparams.yaml").read_text()
    assert "learning" in capsys.readouterr().out


def test_a_transition_on_its_own_is_worth_what_follows_by_the_target_network():
    policy = network()
    trainer = PolicyTrainer(policy, config(gamma=0.5, priority_exponent=1.0, priority_epsilon=1e-6))
    before, after = graph([0.3, 0.6]), graph([0.9, 0.2])
    trainer.replay_buffer.add_experience(
        state=before, action=Choice(1, -1.0), reward=2.0, next_state=after, td_error=0.0
    )
    trainer.replay_buffer.add_experience(
        state=before, action=Choice(1, -1.0), reward=2.0, next_state=None, td_error=0.0, terminated=True
    )
    (_, _, now), (_, _, then) = choose(policy, [before, after], torch.Generator())
    trainer.train_on_replay(1)
    errors = np.abs([2.0 + 0.5 * then - now, 2.0 - now])
    np.testing.assert_allclose(trainer.replay_buffer.probabilities(), errors / errors.sum(), rtol=1e-4)


def test_the_network_never_trains_in_the_mode_it_is_not_used_in():
    policy = ToyNetwork(dropout=0.5).train()
    trainer = PolicyTrainer(policy, config())
    assert not policy.training
    metrics = trainer.update(episodes(0, policy))
    assert not policy.training
    assert metrics["loss/uncertainty"] > 0


def test_decisions_made_without_a_critic_get_the_values_of_ours():
    policy = network(7)
    valued = episodes(0, policy)
    bare = [
        dataclasses.replace(t, steps=[dataclasses.replace(s, value=math.nan) for s in t.steps])
        for t in valued
    ]
    one, two = (PolicyTrainer(network(7), config()) for _ in range(2))
    assert one.update(valued)["advantage/mean"] == pytest.approx(two.update(bare)["advantage/mean"], abs=1e-6)
    torch.testing.assert_close(torch.tensor(fingerprint_weights(one)), torch.tensor(fingerprint_weights(two)))
