"""What is learned: toy tasks whose optimum is known, beside a random policy and that optimum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from learning_toys import (
    EARLY,
    LATE,
    bandit,
    bandit_reward,
    bandit_rollout,
    delayed_rollout,
    graph,
    network,
    probabilities,
    timing_rollout,
)
from torch import nn

from esper.tamiyo.learning.config import TrainingConfig
from esper.tamiyo.learning.loss import clipped_policy_loss, decoupled_policy_loss
from esper.tamiyo.learning.trainer import PolicyTrainer
from esper.tamiyo.learning.trajectory import Trajectory

Rollout = Callable[[nn.Module, int, np.random.Generator, torch.Generator], list[Trajectory]]
FAST = {
    "learning_rate": 2e-2,
    "target_update_freq": 1,
    "proximal_decay": 0.889,
    "batch_size": 128,
    "uncertainty_regularization": 0.0,
}


def learn(rollout: Rollout, policy: nn.Module, num_updates: int, **settings: float) -> PolicyTrainer:
    trainer = PolicyTrainer(policy, TrainingConfig(**{**FAST, **settings}))  # type: ignore[arg-type]
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for _ in range(num_updates):
        trainer.update(rollout(policy, 64, rng, generator))
    return trainer


def greedy(policy: nn.Module, states: Sequence) -> list[int]:
    return [int(probabilities(policy, state).argmax()) for state in states]


def test_the_layer_with_the_largest_number_is_found_on_unseen_graphs():
    policy = network()
    learn(bandit_rollout, policy, 15)
    states = bandit(200, np.random.default_rng(99))
    earned = np.mean([bandit_reward(s, a) for s, a in zip(states, greedy(policy, states), strict=True)])
    by_chance = np.mean([np.mean([bandit_reward(s, a) for a in range(len(s.x) + 1)]) for s in states])
    optimum = np.mean([max(0.0, float(s.x[:, 0].max())) for s in states])
    assert abs(by_chance) < 0.05
    assert earned > 0.95 * optimum


def test_when_to_act_is_learned_and_waiting_gets_its_later_worth():
    policy = network()
    rng, generator = np.random.default_rng(5), torch.Generator().manual_seed(5)
    before = np.mean([t.total_reward for t in timing_rollout(policy, 256, rng, generator)])
    learn(timing_rollout, policy, 20)
    after = np.mean([t.total_reward for t in timing_rollout(policy, 256, rng, generator)])
    assert before < 0.4
    assert after > 0.9  # the optimum is 1
    for ripe, context, best in ((-1, EARLY, 1), (1, EARLY, 0), (1, LATE, 1)):
        assert greedy(policy, [graph([float(ripe)], context=context)]) == [best]


def test_a_policy_that_likes_to_wait_does_not_collapse_to_it():
    policy = network(wait_bias=2.0)
    first, second = graph([0.5, 0.5], context=EARLY), graph([0.5, 0.5], context=LATE)
    assert probabilities(policy, first)[0] > 0.7
    trainer = learn(delayed_rollout, policy, 20)
    assert probabilities(policy, first)[0] < 0.1
    assert probabilities(policy, second)[0] > 0.9
    # two placements are equally good: the entropy bonus keeps both
    assert probabilities(policy, first)[1:].min() > 0.1
    assert trainer.get_training_statistics()["return/mean"] > 0.6  # the optimum is 0.8, WAIT earns 0


def test_old_data_teach_decoupled_ppo_what_they_do_not_teach_naive_ppo():
    arms, num = 8, 2000
    worth = torch.linspace(0, 1, arms)
    actions = torch.randint(arms, (num,), generator=torch.Generator().manual_seed(0))
    behaviour = torch.full((num,), 1 / arms).log()  # who collected them knew nothing
    advantages = worth[actions] - worth.mean()

    def train(decoupled: bool) -> float:
        logits = torch.zeros(arms, requires_grad=True)
        average = logits.detach().clone()
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(300):
            logprobs = logits.log_softmax(0)[actions]
            if decoupled:
                proximal = average.log_softmax(0)[actions]
                found = decoupled_policy_loss(
                    logprobs, proximal, behaviour, advantages, clip_ratio=0.2, max_importance_ratio=10.0
                )
            else:
                found = clipped_policy_loss(logprobs, behaviour, advantages, clip_ratio=0.2)
            optimizer.zero_grad()
            found.loss.mean().backward()
            optimizer.step()
            average.lerp_(logits.detach(), 1 - 0.889)
        return float((logits.detach().softmax(0) * worth).sum())

    naive, decoupled = train(decoupled=False), train(decoupled=True)
    assert naive < 0.7  # held near the policy that collected the data, which earns 0.5
    assert decoupled > 0.95


def test_replay_alone_learns_from_experiences_that_come_one_by_one():
    policy = network()
    trainer = PolicyTrainer(policy, TrainingConfig(**FAST))  # type: ignore[arg-type]
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for _ in range(15):
        for trajectory in bandit_rollout(policy, 64, rng, generator):
            (step,) = trajectory.steps
            trainer.replay_buffer.add_experience(
                state=step.graph.unpack(),
                action=_Chosen(step.action, step.logprob),
                reward=step.reward,
                next_state=None,
                td_error=abs(step.reward),
                terminated=True,
                born=trainer.num_steps,
            )
        metrics = trainer.train_on_replay(5)
    assert metrics["reward/mean"] > 0.4  # the optimum is 0.56
    assert trainer.num_steps == 75


class _Chosen:
    def __init__(self, candidate: int, logprob: float) -> None:
        self.candidate, self.logprob = candidate, logprob
