"""Everything that a learned policy is compared with, as plain values that travel to worker processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from esper.tamiyo.environment.config import EpisodeConfig
from esper.tamiyo.environment.episode import Episode
from esper.tamiyo.environment.families import tokens_per_parameter
from esper.tamiyo.environment.plain import Outcome, train_plain
from esper.tamiyo.environment.specs import GPTShape, HostSpec
from esper.tamiyo.judging.look_ahead import LookAhead
from esper.tamiyo.judging.matches import Match
from esper.tamiyo.judging.watched import Watched
from esper.tamiyo.policies import make_policy
from esper.tamiyo.policies.tamiyo import TamiyoPolicy, TamiyoPolicyConfig

__all__ = ["Arm", "Learned", "LookingAhead", "Plain", "Played", "Rule", "host_flops", "play"]

_INTERVAL = 0.02


class Plain(msgspec.Struct, frozen=True, tag="plain", kw_only=True):
    """The ungrown host, at ``factor`` times its learning rate."""

    factor: float = 1.0


class Rule(msgspec.Struct, frozen=True, tag="rule", kw_only=True):
    """A policy of the registry.

    Attributes:
        policy: Its name.
        options: Of it.
        least_tokens: Positions trained on per parameter that a host must see more of; others are left alone.
        transformers: Only they are grown.
    """

    policy: str
    options: dict[str, Any] = {}
    least_tokens: float = 0.0
    transformers: bool = False


class Learned(msgspec.Struct, frozen=True, tag="learned", kw_only=True):
    """The policy network of a file.

    Attributes:
        weights: Its path, or ``shipped``.
        digest: Of the file's content, so that runs of other weights are not taken for runs of these.
        options: Of policy ``tamiyo``.
        scratch: Train the shape that it arrived at from scratch too, which makes an arm of its own.
    """

    weights: str
    digest: str = ""
    options: dict[str, Any] = {}
    scratch: bool = False


class LookingAhead(msgspec.Struct, frozen=True, tag="look_ahead", kw_only=True):
    """:class:`~esper.tamiyo.judging.look_ahead.LookAhead` with so many candidates beside WAIT."""

    candidates: int = 4


Arm = Plain | Rule | Learned | LookingAhead


@dataclass
class Played:
    """A run and what it spent.

    Attributes:
        outcome: How it ended.
        flops: For training, statistics, measurements, culled seeds and look-ahead.
        watched: Counts of a learned policy's decisions.
        episode: The finished run; None where nothing could grow.
    """

    outcome: Outcome
    flops: float
    watched: Watched | None = None
    episode: Episode | None = field(default=None, repr=False)


def play(arm: Arm, match: Match, spec: HostSpec) -> Played:
    """Let an arm train a match's host.

    Args:
        arm: Who.
        match: Price, budget and repeat.
        spec: The match's host run, or the same over fewer steps.

    Raises:
        ConfigError: An option or a policy is not known, or the weights are missing.
    """
    if isinstance(arm, Plain):
        return _plain(arm, match, spec)
    config = EpisodeConfig(price=match.price, budget=match.budget, decision_interval=_INTERVAL)
    if isinstance(arm, LookingAhead):
        search = LookAhead(spec, config, repeat=match.repeat, candidates=arm.candidates)
        outcome = search.finish()
        return Played(outcome, outcome.training_flops + search.flops, episode=search.episode)
    if isinstance(arm, Learned):
        options = {"weights": arm.weights, "price": match.price, **arm.options}
        watched = Watched(TamiyoPolicy(TamiyoPolicyConfig(**options)))
        episode = Episode(spec, config, repeat=match.repeat, policy=watched)
        outcome = episode.finish()
        return Played(outcome, outcome.training_flops, watched, episode)
    # tokens are those of the planned run: a compressed schedule must not make another rule of it
    left_alone = arm.transformers and not isinstance(spec.architecture, GPTShape)
    if left_alone or tokens_per_parameter(match.spec) <= arm.least_tokens:
        return _plain(Plain(), match, spec)
    episode = Episode(spec, config, repeat=match.repeat, policy=make_policy(arm.policy, **arm.options))
    outcome = episode.finish()
    return Played(outcome, outcome.training_flops, episode=episode)


def host_flops(match: Match) -> float:
    """FLOPs of one forward pass of a sample through the ungrown host, as the ledger of a growing one has them."""
    with torch.random.fork_rng(devices=[]):
        return float(Episode(match.spec, repeat=match.repeat).body.flops)


def _plain(arm: Plain, match: Match, spec: HostSpec) -> Played:
    faster = msgspec.structs.replace(spec, learning_rate=arm.factor * spec.learning_rate)
    outcome = train_plain(faster, repeat=match.repeat, forward=host_flops(match))
    return Played(outcome, outcome.training_flops)
