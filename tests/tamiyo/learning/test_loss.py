"""Losses, by hand and as torchrl computes them on the same inputs."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss, HardUpdate

from esper.tamiyo.learning.loss import (
    clipped_policy_loss,
    decoupled_policy_loss,
    disagreement,
    masked_mean,
    normalised,
    risk_loss,
    urgency_loss,
)
from esper.tamiyo.network.distribution import CandidateDistribution

B, K, F = 12, 5, 3


def categorical(logits: Tensor, mask: Tensor | None = None) -> CandidateDistribution:
    """Of [graphs, K] logits."""
    num, width = logits.shape
    mask = torch.ones(num, width, dtype=torch.bool) if mask is None else mask
    return CandidateDistribution(
        logits.reshape(-1), mask.reshape(-1), torch.arange(num).repeat_interleave(width), num
    )


def inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "observation": torch.randn(B, F, generator=generator),
        "action": torch.randint(K, (B,), generator=generator),
        "behaviour": -torch.rand(B, generator=generator) * 3,
        "advantage": torch.randn(B, generator=generator),
        "target": torch.randn(B, generator=generator),
    }


def torchrl_loss(actor: nn.Linear, critic: nn.Linear, given: dict[str, Tensor], **kwargs: object) -> tuple:
    module = TensorDictModule(actor, in_keys=["observation"], out_keys=["logits"])
    loss = ClipPPOLoss(
        ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical),
        ValueOperator(critic, in_keys=["observation"]),
        clip_epsilon=0.2,
        entropy_coeff=0.01,
        critic_coeff=0.5,
        loss_critic_type="l2",
        **kwargs,
    )
    data = TensorDict(
        {
            "observation": given["observation"],
            "action": given["action"],
            "action_log_prob": given["behaviour"],
            "advantage": given["advantage"][:, None],
            "value_target": given["target"][:, None],
        },
        [B],
    )
    return loss, data


def weights(seed: int) -> tuple[nn.Linear, nn.Linear]:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Linear(F, K), nn.Linear(F, 1)


@pytest.mark.parametrize("normalise", [False, True])
def test_clipped_loss_entropy_and_value_are_torchrls(normalise: bool):
    given = inputs()
    actor, critic = weights(0)
    loss, data = torchrl_loss(actor, critic, given, normalize_advantage=normalise)
    theirs = loss(data)

    policy = categorical(actor(given["observation"]))
    advantages = normalised(given["advantage"]) if normalise else given["advantage"]
    ours = clipped_policy_loss(
        policy.log_prob(given["action"]), given["behaviour"], advantages, clip_ratio=0.2
    )
    value = 0.5 * (critic(given["observation"]).squeeze(1) - given["target"]).square().mean()
    torch.testing.assert_close(ours.loss.mean(), theirs["loss_objective"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(-0.01 * policy.entropy.mean(), theirs["loss_entropy"])
    torch.testing.assert_close(value, theirs["loss_critic"])
    mine = torch.autograd.grad(ours.loss.mean(), actor.weight)[0]
    other = torch.autograd.grad(theirs["loss_objective"], list(loss.actor_network_params.values(True, True)))
    torch.testing.assert_close(mine, next(g for g in other if g.shape == mine.shape), rtol=1e-4, atol=1e-6)


def test_decoupled_loss_is_torchrls_with_a_delayed_actor():
    given = inputs(1)
    actor, critic = weights(0)
    loss, data = torchrl_loss(actor, critic, given, delay_actor=True)
    HardUpdate(loss)  # without an updater torchrl warns; it is never stepped
    shift = weights(5)[0]
    proximal = nn.Linear(F, K)
    proximal.load_state_dict(
        {n: t + 0.3 * dict(shift.named_parameters())[n] for n, t in actor.state_dict().items()}
    )
    for name, held in loss.target_actor_network_params.items(True, True):
        held.data.copy_(proximal.state_dict()[name[-1]])
    theirs = loss(data)

    ours = decoupled_policy_loss(
        categorical(actor(given["observation"])).log_prob(given["action"]),
        categorical(proximal(given["observation"])).log_prob(given["action"]),
        given["behaviour"],
        given["advantage"],
        clip_ratio=0.2,
    )
    torch.testing.assert_close(ours.loss.mean(), theirs["loss_objective"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(-ours.log_ratio.mean(), theirs["kl_approx"], rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(ours.loss.mean(), actor.weight)[0]
    other = torch.autograd.grad(theirs["loss_objective"], list(loss.actor_network_params.values(True, True)))
    torch.testing.assert_close(mine, next(g for g in other if g.shape == mine.shape), rtol=1e-4, atol=1e-6)


def test_decoupled_is_ppo_where_the_proximal_policy_acted():
    given = inputs(2)
    logprobs = -torch.rand(B) * 2
    plain = clipped_policy_loss(logprobs, given["behaviour"], given["advantage"], clip_ratio=0.2)
    decoupled = decoupled_policy_loss(
        logprobs, given["behaviour"], given["behaviour"], given["advantage"], clip_ratio=0.2
    )
    assert torch.equal(plain.loss, decoupled.loss)
    assert (plain.importance == 1).all()


def test_clipping_is_around_the_proximal_policy_and_the_correction_is_truncated():
    prox, behaviour = torch.tensor([0.5, 0.5, 0.5]).log(), torch.tensor([0.5, 0.25, 0.01]).log()
    logprobs = torch.tensor([0.7, 0.7, 0.55]).log().requires_grad_()
    found = decoupled_policy_loss(
        logprobs, prox, behaviour, torch.tensor([1.0, -1.0, 1.0]), clip_ratio=0.2, max_importance_ratio=10.0
    )
    torch.testing.assert_close(found.loss, torch.tensor([-1.2, 2 * 1.4, -10 * 1.1]))
    assert found.clipped.tolist() == [True, False, False]
    torch.testing.assert_close(found.importance, torch.tensor([1.0, 2.0, 10.0]))
    found.loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 2.8, -11.0]))


def test_advantages_are_normalised_over_a_minibatch_and_one_is_left_alone():
    found = normalised(torch.tensor([1.0, 2.0, 6.0]))
    assert found.mean().abs() < 1e-6
    assert found.std() == pytest.approx(1, abs=1e-6)
    assert normalised(torch.tensor([3.0])).tolist() == [3.0]
    assert normalised(torch.full((4,), 2.0)).tolist() == [0.0] * 4


def test_only_what_was_measured_counts():
    nan = math.nan
    predicted = torch.tensor([0.9, 0.5, 0.2], requires_grad=True)
    loss = risk_loss(predicted, torch.tensor([1.0, nan, 0.0]))
    torch.testing.assert_close(loss, -(torch.tensor(0.9).log() + torch.tensor(0.8).log()) / 2)
    loss.backward()
    assert predicted.grad is not None
    assert predicted.grad[1] == 0
    assert risk_loss(predicted, torch.full((3,), nan)) == 0
    torch.testing.assert_close(
        urgency_loss(torch.tensor([0.05, 5.0]), torch.tensor([0.0, nan])), torch.tensor(0.5 * 0.05**2 / 0.1)
    )
    sure = torch.tensor([1.0, 0.0], requires_grad=True)
    assert risk_loss(sure, torch.tensor([0.0, 1.0])).isfinite()
    assert masked_mean(torch.tensor([nan, 2.0]), torch.tensor([False, True])) == 2


def test_disagreement_is_the_divergence_over_available_candidates():
    one, two = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[1.0, 0.5, -9.0]])
    mask = torch.tensor([[True, True, False]])
    p, q = one[:, :2].softmax(1), two[:, :2].softmax(1)
    expected = (p * (p / q).log()).sum() / math.log(2)
    found = disagreement(categorical(one, mask), categorical(two, mask))
    torch.testing.assert_close(found, expected[None])
    assert disagreement(categorical(one, mask), categorical(one, mask)).tolist() == [0.0]
