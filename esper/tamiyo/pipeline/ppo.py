"""The PPO stage: whole runs played from the value model on, and what that adds, by itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import nn

from esper.atomic import replacing
from esper.errors import DataFormatError
from esper.report.statistics import Estimate
from esper.tamiyo.environment.assignments import AssignmentConfig, numbered_assignments
from esper.tamiyo.environment.choosers import MakeChooser, NetworkChooser
from esper.tamiyo.environment.families import KNOWN
from esper.tamiyo.environment.rollout import Rollouts
from esper.tamiyo.environment.specs import Split, derived_seed
from esper.tamiyo.learning.config import TrainingConfig
from esper.tamiyo.learning.trainer import PolicyTrainer
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.oracle.rules import Rule
from esper.tamiyo.pipeline.config import LearnConfig
from esper.tamiyo.pipeline.deciding import PolicyChooser, RuleChooser
from esper.tamiyo.pipeline.episodes import EpisodeResult, hosts_to_play, paired, play_all

__all__ = ["Played", "Ppo", "planned_episodes", "ppo_stage"]

_DECISIONS = 5
"""Of an episode, about."""

_SHARES = (0.5, 1.0)
"""Of the way from the value model's weights to PPO's, where networks are tried."""


@dataclass(frozen=True)
class Played:
    """Whole runs of one split's hosts.

    Attributes:
        before: Played by the value model.
        after: Played by the network with the share of what PPO changed that is best on validation hosts.
        rule: Played by the best fixed rules, which act once.
    """

    before: Sequence[EpisodeResult]
    after: Sequence[EpisodeResult]
    rule: Sequence[EpisodeResult]

    @property
    def added(self) -> Estimate:
        """What PPO adds, in nats."""
        return paired(self.after, self.before)


@dataclass(frozen=True)
class Ppo:
    """What the stage leaves behind.

    Attributes:
        network: With the share of what PPO changed that is best on validation hosts.
        share: That share.
        shares: Share -> utility of whole runs of validation hosts, and of single decisions of the table's.
        rounds: Metrics of every update.
        num_episodes: Played to learn from.
        num_experiences: Decisions among them.
        played: By split.
        adopted: That network is worth more than the value model in whole runs of validation hosts, by more than a
            standard error of the difference, and not less when their single decisions are counted too.
    """

    network: TamiyoNetwork
    share: float
    shares: Mapping[float, tuple[float, float]]
    rounds: Sequence[Mapping[str, float]]
    num_episodes: int
    num_experiences: int
    played: Mapping[Split, Played]
    adopted: bool


def planned_episodes(config: LearnConfig) -> int:
    """How many runs will be played."""
    effort = config.effort
    return effort.ppo_rounds * effort.ppo_episodes + (len(_SHARES) + 5) * effort.judged_episodes


def ppo_stage(
    config: LearnConfig,
    start: TamiyoNetwork,
    rules: Mapping[float, Rule],
    families: Sequence[str],
    rollouts: Rollouts,
    folder: Path,
    done: Callable[[str], None],
    one_decision: Callable[[TamiyoNetwork], float],
) -> Ppo:
    """Train on whole runs, and play hosts that were not trained on before and after.

    A few hundred decisions of whole runs teach when to stop, and make a network forget some of what thousands of
    tried candidates had taught. Weights between the two keep both (Wortsman et al. 2022, arXiv 2109.01903), so
    networks on the way are tried as well, by whole runs and single decisions alike.

    Args:
        config: Of the learning.
        start: The value model, with its thresholds.
        rules: Price -> the best fixed rule of the validation states.
        families: Of hosts, known ones.
        rollouts: Processes.
        folder: For checkpoints and finished runs.
        done: Told of each run.
        one_decision: Utility of a network's single decisions on the table's validation states.
    """
    assert set(families) <= set(KNOWN)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = _trainer(config, start)
    rounds = _train(config, trainer, families, rollouts, folder, done)
    runs = {
        split: hosts_to_play(families, split, config.effort.judged_episodes, config.seed)
        for split in ("validation", "test")
    }

    def play(split: Split, name: str, make: MakeChooser) -> list[EpisodeResult]:
        return play_all(runs[split], make, folder / f"{split}-{name}.json", rollouts, done)

    validation = play("validation", "before", PolicyChooser.of(start))
    shares = {0.0: (_mean(validation), one_decision(start))}
    networks, results = {}, {}
    for share in _SHARES:
        networks[share] = _between(start, trainer.policy, share)
        results[share] = play("validation", f"share-{share:g}", PolicyChooser.of(networks[share]))
        shares[share] = _mean(results[share]), one_decision(networks[share])
    best = max(_SHARES, key=lambda share: sum(shares[share]))
    network = networks[best]
    rule = RuleChooser(rules)
    played: dict[Split, Played] = {
        "validation": Played(validation, results[best], play("validation", "rule", rule)),
        "test": Played(
            play("test", "before", PolicyChooser.of(start)),
            play("test", f"share-{best:g}", PolicyChooser.of(network)),
            play("test", "rule", rule),
        ),
    }
    return Ppo(
        network=network,
        share=best,
        shares=shares,
        rounds=rounds,
        num_episodes=len(rounds) * config.effort.ppo_episodes,
        num_experiences=trainer.num_experiences,
        played=played,
        adopted=_pays(played["validation"]) and sum(shares[best]) >= sum(shares[0.0]),
    )


def _between(start: TamiyoNetwork, end: nn.Module, share: float) -> TamiyoNetwork:
    """A network with weights between those of two others; thresholds and memory are those of ``start``."""
    network = copy.deepcopy(start)
    target = dict(end.named_parameters())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.lerp_(target[name], share)
    return network


def _mean(results: Sequence[EpisodeResult]) -> float:
    return math.fsum(result.utility for result in results) / len(results)


def _train(
    config: LearnConfig,
    trainer: PolicyTrainer,
    families: Sequence[str],
    rollouts: Rollouts,
    folder: Path,
    done: Callable[[str], None],
) -> list[dict[str, float]]:
    """Play and update for all rounds; goes on after the last round that is whole."""
    effort, checkpoint, log = config.effort, folder / "trainer.safetensors", folder / "rounds.json"
    if checkpoint.is_file():
        trainer.load_checkpoint(checkpoint)
    # the log is written first, so it may be a round ahead of the checkpoint
    rounds = _read_rounds(log)[: trainer.num_updates]
    for _ in range(trainer.num_updates * effort.ppo_episodes):
        done("kept")
    assert isinstance(trainer.policy, TamiyoNetwork)
    hosts = AssignmentConfig(families=tuple(families), split="train")
    while trainer.num_updates < effort.ppo_rounds:
        seed = derived_seed("ppo", config.seed, trainer.num_updates)
        played = rollouts.play(
            numbered_assignments(hosts, seed, effort.ppo_episodes),
            NetworkChooser.of(trainer.policy),
            seed=seed,
        )
        metrics = trainer.update([p.trajectory for p in played])
        rounds.append({**metrics, "experiences": float(trainer.num_experiences)})
        with replacing(log) as temporary:
            temporary.write_bytes(msgspec.json.encode(rounds))
        trainer.save_checkpoint(checkpoint)
        for p in played:
            done(f"return {metrics['return/mean']:+.3f}, {p.assignment.spec.family}")
    return rounds


def _trainer(config: LearnConfig, start: TamiyoNetwork) -> PolicyTrainer:
    """Small steps from a policy that is good already; the proximal policy follows about once a round."""
    effort = config.effort
    settings = TrainingConfig(
        learning_rate=1e-4,
        seed=config.seed,
        num_training_steps=effort.ppo_rounds * 4 * math.ceil(effort.ppo_episodes * _DECISIONS / 32),
        target_update_freq=max(1, 4 * math.ceil(effort.ppo_episodes * _DECISIONS / 32)),
        gamma=1.0,
    )
    return PolicyTrainer(copy.deepcopy(start), settings)


def _pays(played: Played) -> bool:
    gaps = [a.utility - b.utility for a, b in zip(played.after, played.before, strict=True)]
    mean = math.fsum(gaps) / len(gaps)
    if len(gaps) < 2:
        return False
    spread = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))
    return mean > spread


def _read_rounds(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[dict[str, float]])
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise DataFormatError(f"{path} holds no metrics of PPO: {error}; delete the folder") from error
