"""``esper learn policy``: make the weights that policy ``tamiyo`` decides with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper.errors import ConfigError

__all__ = ["add_learn", "learn"]


def add_learn(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their arguments."""
    commands = parser.add_subparsers(dest="learn", metavar="WHAT", required=True)
    policy = commands.add_parser(
        "policy",
        help="the network that decides when, where and what to grow",
        description="Fits value models to the table of tried candidates, goes on with PPO on whole runs, judges both "
        "on hosts that neither has seen, and writes weights with a model card. The same command goes on after a stop.",
    )
    policy.add_argument(
        "--table", type=Path, metavar="FOLDER", help="oracle table (default: experiments/oracle/table)"
    )
    policy.add_argument(
        "--out", type=Path, metavar="FOLDER", help="what comes of it (default: runs/learn_policy)"
    )
    policy.add_argument(
        "--minutes", type=float, default=50.0, metavar="N", help="how much work, on two cores (default: 50)"
    )
    policy.add_argument("--seed", type=int, default=0, metavar="S")
    policy.add_argument(
        "--stages", default="supervised,ppo", metavar="A,B", help="supervised, or supervised,ppo (default)"
    )
    policy.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
    policy.add_argument(
        "--rollout", choices=("local", "ray"), default="local", help="where whole runs are played"
    )
    policy.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any part of the work: ppo_rounds=10"
    )
    policy.add_argument(
        "--install", action="store_true", help="ship the weights with this package, if they are worth it"
    )


def learn(options: argparse.Namespace) -> int:
    """Run ``esper learn policy``.

    Raises:
        EsperError: Wrong options, no table, or a learning that failed.
    """
    from rich.console import Console

    from esper.tamiyo.pipeline.config import Effort, LearnConfig, with_settings
    from esper.tamiyo.pipeline.ship import run

    given: dict[str, Any] = {
        name: getattr(options, name) for name in ("table", "out") if getattr(options, name) is not None
    }
    config = LearnConfig(
        seed=options.seed,
        stages=tuple(stage.strip() for stage in options.stages.split(",") if stage.strip()),
        num_workers=options.workers,
        rollout=options.rollout,
        effort=with_settings(Effort.for_minutes(options.minutes), _settings(options.set)),
        **given,
    )
    return run(config, Console(highlight=False), install=options.install)


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ConfigError(f"--set expects KEY=VALUE, got {pair!r}")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"--set {key}: expected a number, true, false or a list such as [64,96], got {value!r}"
            ) from error
    return settings
