"""What a policy is compared with on the same host, the same data in the same order and the same steps."""

from __future__ import annotations

from typing import Any

import msgspec
from torch import nn

from esper.kasmina.body import Body
from esper.tamiyo.environment.config import EpisodeConfig
from esper.tamiyo.environment.episode import Episode
from esper.tamiyo.environment.nets import build_network
from esper.tamiyo.environment.plain import Outcome, train_plain
from esper.tamiyo.environment.run import EpisodeRun
from esper.tamiyo.environment.specs import HostSpec
from esper.tamiyo.environment.stream import Stream, make_optimizer
from esper.tamiyo.policies import make_policy
from esper.tamiyo.retraining import Retraining

__all__ = ["run_double_rate", "run_from_scratch", "run_rule"]

_RULE_INTERVAL = 0.02


def run_rule(
    spec: HostSpec,
    policy: str,
    config: EpisodeConfig | None = None,
    *,
    repeat: int = 0,
    **options: Any,
) -> Outcome:
    """Let a policy of the registry grow the host: ``random``, ``narrowest``, ``cond``, ``shortcut``, ``tamiyo``, ...

    It is asked every 2 % of the run, as in a user's run.

    Args:
        spec: The host run.
        policy: Registered name.
        config: Budget of the run, and price where the policy knows one.
        repeat: Of the run.
        **options: Of the policy.

    Raises:
        ConfigError: There is no such policy or option.
    """
    settings = (config or EpisodeConfig()).with_settings(decision_interval=_RULE_INTERVAL)
    return Episode(spec, settings, repeat=repeat, policy=make_policy(policy, **options)).finish()


def run_double_rate(spec: HostSpec, *, repeat: int = 0) -> Outcome:
    """Train the ungrown host at twice its learning rate: what looks like growth is often that (GROWTH.md §6, §8)."""
    faster = msgspec.structs.replace(spec, learning_rate=2.0 * spec.learning_rate)
    return train_plain(faster, repeat=repeat)


def run_from_scratch(episode: Episode, spec: HostSpec | None = None) -> Outcome:
    """Train the shape that a finished episode arrived at from the first step.

    The host has its first weights again, and what was grown the weights that a new net's layers have.

    Args:
        episode: Finished.
        spec: The same run over another number of steps; the episode's own if None.
    """
    spec, repeat = spec or episode.spec, episode.repeat
    model = _fresh(episode, spec, repeat)
    return train_plain(spec, repeat=repeat, model=model, forward=float(episode.body.flops))


def _fresh(episode: Episode, spec: HostSpec, repeat: int) -> nn.Module:
    stream = Stream(spec, repeat)
    first = stream.phases[0]
    model = build_network(spec, first.input_shape, first.num_outputs, repeat=repeat)
    body = Body(model, episode.body.topology, seed=spec.seed)
    run = EpisodeRun(spec, model, make_optimizer(model, spec), stream)
    retraining = Retraining(body, run, spec.seed % 2**31)  # remembers the first weights, which are there now
    model.load_state_dict(episode.body.model.state_dict())
    for seed in body.seeds:
        seed.bind(body)
    retraining.apply()
    return model
