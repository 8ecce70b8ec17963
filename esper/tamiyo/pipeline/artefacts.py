"""What a learning leaves behind: weights with their card, ``result.json``, ``metrics.csv`` and ``learning.png``."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper.atomic import replacing
from esper.errors import LearningError
from esper.report.statistics import Estimate
from esper.report.summary import collect_versions
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.network.weights import card_path, save_network
from esper.tamiyo.pipeline.config import LearnConfig
from esper.tamiyo.pipeline.episodes import paired
from esper.tamiyo.pipeline.ppo import Ppo
from esper.tamiyo.pipeline.report import Tabled
from esper.tamiyo.pipeline.supervised import Supervised

__all__ = ["CARD", "FIGURE", "METRICS", "MOST_BYTES", "RESULT", "WEIGHTS", "install", "write_metrics", "write_result",
           "write_weights"]  # fmt: skip

WEIGHTS, CARD, RESULT, METRICS, FIGURE = (
    "tamiyo.safetensors", "tamiyo.md", "result.json", "metrics.csv", "learning.png",
)  # fmt: skip

MOST_BYTES = 2_000_000
"""Of the weights that ship."""


def write_weights(network: TamiyoNetwork, card: str, folder: Path) -> Path:
    """Write weights and card.

    Raises:
        LearningError: The file is too large to ship.
    """
    path = folder / WEIGHTS
    save_network(network, path, card=card)
    if (size := path.stat().st_size) >= MOST_BYTES:
        raise LearningError(
            f"{path} has {size:,} bytes, {MOST_BYTES:,} or more; choose smaller hidden_sizes than "
            f"{network.config.hidden_dim}"
        )
    return path


def write_result(
    config: LearnConfig,
    digest: str,
    found: Supervised,
    tabled: Tabled,
    ppo: Ppo | None,
    name: str,
    path: Path,
) -> dict[str, float]:
    """Write all figures as JSON; returns the flat ones, name -> number."""
    figures = _figures(found, tabled, ppo)
    content = {
        "versions": collect_versions(),
        "options": {"stages": config.stages, **config.decides()},
        "table": digest,
        "network": name,
        "rules": {f"{price:g}": str(rule) for price, rule in tabled.rules.items()},
        "figures": figures,
        "validation_utility": found.validation,
        "gate": [
            {"uncertainty": t.uncertainty, "novelty": t.novelty, "known": t.known, "unknown": t.unknown,
             "coverage": t.coverage, "coverage_unknown": t.coverage_unknown} for t in found.gate.trials
        ],
        "lines": [line.plain() for line in tabled.lines],
    }  # fmt: skip
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_plain(content), indent=1) + "\n", encoding="utf-8")
    return figures


def write_metrics(found: Supervised, ppo: Ppo | None, path: Path) -> None:
    """Every metric of every epoch and update: ``part, step, metric, value``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("part", "step", "metric", "value"))
    fits = {f.name: f.history for f in [*found.members, *found.students, *(p.fit for p in found.curve)]}
    parts = [*fits.items(), *([("ppo", ppo.rounds)] if ppo else [])]
    for part, history in parts:
        for step, metrics in enumerate(history):
            writer.writerows((part, step, name, f"{value:.6g}") for name, value in metrics.items())
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def install(folder: Path, package: Path) -> Path:
    """Copy weights and card into the package."""
    package.mkdir(parents=True, exist_ok=True)
    source = folder / WEIGHTS
    for path in (card_path(source), source):
        with replacing(package / path.name) as temporary:
            shutil.copyfile(path, temporary)
    return package / WEIGHTS


def _figures(found: Supervised, tabled: Tabled, ppo: Ppo | None) -> dict[str, float]:
    figures: dict[str, float] = {}
    for line in tabled.lines:
        if line.price is None:
            start = f"{line.split}_{line.chooser.replace(' ', '_')}"
            figures |= {
                **_estimate(f"{start}_utility", line.score.utility),
                **_estimate(f"{start}_over_rule", line.above_rule),
                **_estimate(f"{start}_accuracy", line.score.accuracy),
                f"{start}_strict": line.score.strict.mean,
                f"{start}_regret": line.score.regret.mean,
                f"{start}_wait_where_best": math.nan
                if line.score.wait_where_best is None
                else line.score.wait_where_best,
            }
    chosen = found.gate.chosen
    figures |= {
        "experiences_to_80": math.nan if tabled.experiences is None else tabled.experiences,
        "confidence_threshold": found.gate.confidence,
        "uncertainty_threshold": chosen.uncertainty,
        "novelty_threshold": chosen.novelty,
        "coverage": chosen.coverage,
        "coverage_unknown": chosen.coverage_unknown,
        "unknown_families_policy": chosen.unknown,
        "unknown_families_ungated": found.gate.never.unknown,
        "unknown_families_fallback": found.gate.always.unknown,
    }
    if ppo is not None:
        figures |= {"ppo_episodes": ppo.num_episodes, "ppo_experiences": ppo.num_experiences,
                    "ppo_adopted": float(ppo.adopted), "ppo_share": ppo.share}  # fmt: skip
        for share, (runs, single) in ppo.shares.items():
            figures |= {f"ppo_share_{share:g}_runs": runs, f"ppo_share_{share:g}_one_decision": single}
        for split, played in ppo.played.items():
            figures |= _estimate(f"ppo_adds_{split}", played.added)
            figures |= _estimate(f"episodes_{split}_over_rule", paired(played.after, played.rule))
            for name in ("before", "after", "rule"):
                own = [result.utility for result in getattr(played, name)]
                figures[f"episodes_{split}_{name}"] = math.fsum(own) / len(own)
    return figures


def _estimate(name: str, estimate: Estimate) -> dict[str, float]:
    low, high = estimate.interval or (math.nan, math.nan)
    return {name: estimate.mean, f"{name}_low": low, f"{name}_high": high}


def _plain(value: Any) -> Any:
    """JSON has no infinities; five digits are more than any of these figures is good for."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
