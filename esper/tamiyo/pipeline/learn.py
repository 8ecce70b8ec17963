"""One learning from the table to weights; what is finished is kept, so that a killed one goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from esper.atomic import replacing
from esper.errors import ConfigError
from esper.tamiyo.environment.rollout import Rollouts
from esper.tamiyo.environment.workers import LocalWorkers
from esper.tamiyo.learning.config import SupervisedConfig
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.pipeline.config import LearnConfig
from esper.tamiyo.pipeline.dataset import Dataset, make_dataset, open_records, spread
from esper.tamiyo.pipeline.deciding import choices, readings
from esper.tamiyo.pipeline.fresh import fresh_graphs, fresh_plans
from esper.tamiyo.pipeline.judging import best_rules, utility
from esper.tamiyo.pipeline.ppo import Ppo, planned_episodes, ppo_stage
from esper.tamiyo.pipeline.progress import Parts
from esper.tamiyo.pipeline.report import Tabled, tabled
from esper.tamiyo.pipeline.supervised import Supervised, planned_fits, supervised_stage
from esper.tamiyo.pipeline.urgency import measure_urgency

__all__ = ["Learned", "learn"]

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Learned:
    """What came of a learning.

    Attributes:
        data: What was learned from.
        supervised: Value models and thresholds.
        tabled: How good the choices of the network that ships are on the table.
        ppo: What PPO made of the value model; None where that was not asked for.
        network: What ships: the value model, or what PPO made of it where that was adopted.
    """

    data: Dataset
    supervised: Supervised
    tabled: Tabled
    ppo: Ppo | None
    network: TamiyoNetwork

    @property
    def adopted(self) -> bool:
        """Whether what PPO made ships."""
        return self.ppo is not None and self.ppo.adopted


def learn(config: LearnConfig, console: Console) -> Learned:
    """Learn a policy; the same config and table give the same weights.

    Args:
        config: Of the learning.
        console: Shows how far it is.

    Raises:
        ConfigError: ``config.out`` holds another learning.
        DataNotFoundError: There is no table.
        DataFormatError: The table will not do.
    """
    parts, effort, out = Parts(console), config.effort, config.out
    records = open_records(config.table)
    data = make_dataset(records, config.prices)
    _claim(config, data)
    with LocalWorkers(config.num_workers) as workers:
        if effort.urgency_states:
            chosen = spread(data.train)[: effort.urgency_states]
            some = [record for record in records if record.state_id in chosen]
            with parts.part("cost of waiting", len(some)) as done:
                urgency = measure_urgency(some, out / "urgency.json", workers, done, config.candidates)
            data = make_dataset(records, config.prices, urgency)
        plans = fresh_plans(records, effort.fresh_states) if effort.fresh_states else []
        with parts.part("fresh states", -(-len(plans) // 8)) as done:
            fresh = fresh_graphs(plans, config.prices, out / "fresh", workers, done, config.candidates)
        with parts.part("value models", planned_fits(config, data)) as done:
            found = supervised_stage(config, data, fresh, workers, out / "fits", done)
    temperature = SupervisedConfig().temperature
    if "ppo" not in config.stages:
        return Learned(data, found, tabled(data, found, found.network, temperature), None, found.network)
    families = sorted({case.record.family for case in data.train})
    rules = best_rules(data.validation)
    with (
        Rollouts(config.num_workers, where=config.rollout) as rollouts,
        parts.part("whole runs", planned_episodes(config)) as done,
    ):
        ppo = ppo_stage(
            config, found.network, rules, families, rollouts, out / "ppo", done, partial(_one_decision, data)
        )
    network = ppo.network if ppo.adopted else found.network
    return Learned(data, found, tabled(data, found, network, temperature), ppo, network)


def _one_decision(data: Dataset, network: TamiyoNetwork) -> float:
    """Utility of single decisions on validation states, thresholds and fallback included."""
    cases = data.validation
    return utility(cases, choices(network.config, cases, readings(network, cases)).candidates)


def _claim(config: LearnConfig, data: Dataset) -> None:
    """Note whose folder this is, or check that it is this learning's."""
    config.out.mkdir(parents=True, exist_ok=True)
    path: Path = config.out / SETTINGS
    mine = json.loads(json.dumps({"table": data.digest, **config.decides()}))
    if path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != mine:
            names = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
            raise ConfigError(
                f"{config.out} holds a learning with another {', '.join(names)}; give another --out, or delete it"
            )
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
