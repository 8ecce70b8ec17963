"""The PPO stage: whole runs played from the value model on, and what that adds, by itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from esper.atomic import replacing
from esper.errors import DataFormatError
from esper.report.statistics import Estimate
from esper.tamiyo.environment.assignments import AssignmentConfig, numbered_assignments
from esper.tamiyo.environment.choosers import NetworkChooser
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

JUDGED: tuple[Split, ...] = ("validation", "test")


@dataclass(frozen=True)
class Played:
    """Whole runs of one split's hosts.

    Attributes:
        before: Played by the value model.
        after: Played by what PPO made of it.
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
        network: After PPO.
        rounds: Metrics of every update.
        num_episodes: Played to learn from.
        num_experiences: Decisions among them.
        played: By split.
        adopted: PPO is worth more on validation hosts, by more than a standard error of the difference.
    """

    network: TamiyoNetwork
    rounds: Sequence[Mapping[str, float]]
    num_episodes: int
    num_experiences: int
    played: Mapping[Split, Played]
    adopted: bool


def planned_episodes(config: LearnConfig) -> int:
    """How many runs will be played."""
    effort = config.effort
    return effort.ppo_rounds * effort.ppo_episodes + 3 * len(JUDGED) * effort.judged_episodes


def ppo_stage(
    config: LearnConfig,
    start: TamiyoNetwork,
    rules: Mapping[float, Rule],
    families: Sequence[str],
    rollouts: Rollouts,
    folder: Path,
    done: Callable[[str], None],
) -> Ppo:
    """Train on whole runs, and play hosts that were not trained on before and after.

    Args:
        config: Of the learning.
        start: The value model, with its thresholds.
        rules: Price -> the best fixed rule of the validation states.
        families: Of hosts, known ones.
        rollouts: Processes.
        folder: For checkpoints and finished runs.
        done: Told of each run.
    """
    assert set(families) <= set(KNOWN)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = _trainer(config, start)
    rounds = _train(config, trainer, families, rollouts, folder, done)
    network = copy.deepcopy(trainer.policy)
    assert isinstance(network, TamiyoNetwork)
    played = {}
    for split in JUDGED:
        runs = hosts_to_play(families, split, config.effort.judged_episodes, config.seed)
        by_chooser = {
            name: play_all(runs, make, folder / f"{split}-{name}.json", rollouts, done)
            for name, make in (
                ("before", PolicyChooser.of(start)),
                ("after", PolicyChooser.of(network)),
                ("rule", RuleChooser(rules)),
            )
        }
        played[split] = Played(**by_chooser)
    return Ppo(
        network=network,
        rounds=rounds,
        num_episodes=len(rounds) * config.effort.ppo_episodes,
        num_experiences=trainer.num_experiences,
        played=played,
        adopted=_pays(played["validation"]),
    )


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
