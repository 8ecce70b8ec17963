"""Features of the whole run, and the figures that people want to look at."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from esper.tamiyo.graph.features import GLOBAL_FEATURES, columns, log_ratio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.tamiyo.graph.facts import RunFacts
    from esper.tamiyo.graph.layout import Layout
    from esper.tamiyo.graph.structure_features import Grown
    from esper.tamiyo.graph.trends import SignalWindow

__all__ = ["global_features", "global_metrics"]

_RECENT = 6
"""Decision points over which the slope of the loss is taken."""
_SMALLEST = 1e-12


def global_features(
    run: RunFacts, layout: Layout, grown: Grown, window: SignalWindow, num_problems: int
) -> NDArray[np.float32]:
    """Features of the run [1, G], as :data:`~esper.tamiyo.graph.features.GLOBAL_FEATURES` names them."""
    values = _health(window, num_problems) | _losses(run) | _budget(run, layout) | _shape(run, layout, grown)
    return columns(GLOBAL_FEATURES, values, 1)


def global_metrics(run: RunFacts, window: SignalWindow, problems: Mapping[str, str]) -> dict[str, float]:
    """Name -> value, in plain units: means over the layers that spoke, the loss, and the size."""
    spoke = window.heard
    metrics = {
        "num_layers": float(len(window.names)),
        "layers_heard": float(spoke.sum()),
        "problematic_layers": float(len(problems)),
        "error_count": float(window.errors.sum()),
        "num_parameters": float(run.num_parameters),
        "seeds": float(len(run.seeds)),
        "step": float(run.step),
    }
    if spoke.any():
        metrics |= {
            "mean_health": float(window.mean_health[spoke].mean()),
            "min_health": float(window.mean_health[spoke].min()),
            "stability": _stability(window),
            "health_trend": float(window.slope[spoke].mean()),
            "mean_dormancy": float(window.last("dormancy")[spoke].mean()),
            "max_dormancy": float(window.last("dormancy")[spoke].max()),
            "mean_latency_ms": float(window.last("execution_latency")[spoke].mean()),
        }
    if run.train_losses:
        metrics["train_loss"] = run.train_losses[-1]
    if run.held_out_loss is not None:
        metrics["held_out_loss"] = run.held_out_loss
    return metrics


def _stability(window: SignalWindow) -> float:
    """A health in [0, 1] has a standard deviation of at most a half."""
    return 1.0 - 2.0 * float(window.spread[window.heard].mean()) if window.heard.any() else 0.0


def _health(window: SignalWindow, num_problems: int) -> dict[str, float]:
    spoke = window.heard
    known = bool(spoke.any())
    health, dormancy = window.mean_health[spoke], window.last("dormancy")[spoke]
    return {
        "stability": _stability(window),
        "health_trend": float(window.change[spoke].mean()) if known else 0.0,
        "health": float(health.mean()) if known else 0.0,
        "worst_health": float(health.min()) if known else 0.0,
        "dormancy": float(dormancy.mean()) if known else 0.0,
        "worst_dormancy": float(dormancy.max()) if known else 0.0,
        "problems": num_problems / max(1, len(window.names)),
        "sampled": math.log1p(int(window.count.max(initial=0))) / 4.0,
    }


def _losses(run: RunFacts) -> dict[str, float]:
    known = [(s, x) for s, x in zip(run.steps, run.train_losses, strict=True) if x > 0 and math.isfinite(x)]
    at = np.array([step for step, _ in known], np.float64) / max(1, run.total_steps)
    loss = np.log(np.maximum([x for _, x in known], _SMALLEST))
    recent_at, recent = at[-_RECENT:], loss[-_RECENT:]
    spread = float(((recent_at - recent_at.mean()) ** 2).sum()) if len(recent) > 1 else 0.0
    slope = float(((recent_at - recent_at.mean()) * recent).sum()) / spread if spread > 0 else 0.0
    held_out = run.held_out_loss
    measured = held_out is not None and math.isfinite(held_out)
    return {
        "loss": float(loss[-1]) / 2.0 if len(loss) else 0.0,
        "loss_drop": float(loss[0] - loss[-1]) / 2.0 if len(loss) else 0.0,
        "loss_slope": math.asinh(slope) / 3.0,
        "loss_noise": math.asinh(10.0 * float(np.diff(recent).std())) / 2.0 if len(recent) > 2 else 0.0,
        "held_out_known": float(measured),
        "gap": float(log_ratio(held_out, known[-1][1])) if measured and known else 0.0,
    }


def _budget(run: RunFacts, layout: Layout) -> dict[str, float]:
    left = 1.0 - run.fraction
    host = max(1, run.host_parameters)
    samples_left = run.tokens_per_parameter * run.host_parameters * left / max(1, layout.topology.positions)
    host_flops_left = 3.0 * layout.flops * samples_left
    limited = math.isfinite(run.flops_left)
    share = run.flops_left / max(1.0, host_flops_left) if limited else 0.0
    return {
        "fraction": run.fraction,
        "total_steps": math.log1p(run.total_steps) / 8.0,
        "tokens_per_parameter": math.log1p(run.tokens_per_parameter) / 5.0,
        "tokens_left_per_parameter": math.log1p(run.tokens_per_parameter * left) / 5.0,
        "host_parameters": math.log1p(run.host_parameters) / 12.0,
        "growth": float(log_ratio(run.num_parameters, run.host_parameters)),
        "parameters_left": math.log1p(run.parameters_left / host),
        "flops_limited": float(limited),
        "flops_left": math.log1p(share),
        "germinations_left": math.log1p(run.germinations_left) / 2.0,
        "window_open": float(run.window_open),
        "price": 3.0 * run.price,
        "seeds_alive": math.log1p(sum(seed.stage != "fossilized" for seed in run.seeds)),
        "seeds_settled": math.log1p(sum(seed.stage == "fossilized" for seed in run.seeds)),
    }


def _shape(run: RunFacts, layout: Layout, grown: Grown) -> dict[str, float]:
    inner = ~layout.is_output if layout.num_nodes else np.zeros(0, bool)
    any_inner = bool(inner.any())
    around = [pair for pair in grown.along if layout.depth[pair[1]] - layout.depth[pair[0]] >= 2]
    return {
        "transformer": float(run.transformer),
        "images": float(layout.image.mean()) if layout.num_nodes else 0.0,
        "num_layers": math.log1p(layout.num_nodes) / 4.0,
        "layers_in_series": math.log1p(layout.series) / 2.0,
        "bypassed": float(bool(around)),
        "residual": float(np.mean([way.residual for way in layout.ways])) if layout.ways else 0.0,
        "narrowest": float(grown.over_median[inner].min()) / 2.0 if any_inner else 0.0,
        "neck": float(grown.necks[inner].min()) / 2.0 if any_inner else 0.0,
    }
