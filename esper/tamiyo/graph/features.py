"""The features of a decision point by name: what each says, in the order of the columns.

All are finite for every input, clipped to [-LIMIT, LIMIT] and roughly of unit scale, and none depends on the
unit of the loss, the batch size or the order of layers. GROWTH.md §6, §8 and §9 say which facts predict
whether growth pays; raw gradient norms are not among them, so gradients count relative to other layers' alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CANDIDATE_FEATURES",
    "EDGE_FEATURES",
    "FAMILIES",
    "GLOBAL_FEATURES",
    "LIMIT",
    "NODE_FEATURES",
    "Column",
    "FeatureSpec",
    "columns",
    "log_ratio",
]

LIMIT = 8.0
"""Largest absolute value of any feature."""

Column = NDArray[np.float64]

FAMILIES = (
    "widen", "conv_widen", "shortcut", "stack", "bottleneck", "lowrank", "depthwise", "attention", "norm",
)  # fmt: skip
"""Blueprints that have a feature of their own; any further one is ``other``."""


class FeatureSpec(NamedTuple):
    """One column: its name, and what it says."""

    name: str
    meaning: str


NODE_FEATURES = (
    FeatureSpec("heard", "log share of the window's sampled steps at which the layer spoke; 0: never"),
    FeatureSpec("health", "mean health score over the window"),
    FeatureSpec("health_trend", "change of the health score along its line over the window"),
    FeatureSpec("dormancy", "last share of dormant units"),
    FeatureSpec("dead_ratio", "last share of dead units"),
    FeatureSpec("rank_share", "last effective rank over the layer's width"),
    FeatureSpec("correlation", "last mean correlation between units"),
    FeatureSpec("gradient_share", "log of the last gradient norm over the geometric mean of all layers'"),
    FeatureSpec("gradient_snr", "log of 1 + the last signal-to-noise ratio of the gradient"),
    FeatureSpec("update_ratio", "decades of the last relative weight change above 1e-3"),
    FeatureSpec("width", "log of the units, grown ones included"),
    FeatureSpec("width_over_median", "log of the units over the median layer's"),
    FeatureSpec("neck", "log of the units over the smaller of the widest before and the widest behind"),
    FeatureSpec("depth", "longest way from the input, over that of the deepest layer"),
    FeatureSpec("is_output", "reaches the loss without passing another layer"),
    FeatureSpec("seeds", "log of 1 + the seeds that start or end here"),
)

EDGE_FEATURES = (
    FeatureSpec("nonlinear", "an activation lies on the way"),
    FeatureSpec("mixed", "positions or units are pooled, moved or mixed on the way"),
    FeatureSpec("residual", "the way enters a sum: a residual stream"),
    FeatureSpec("passed", "log of 1 + the layers without seeds (norms) on the way"),
    FeatureSpec("width_change", "log of the target's units over the source's"),
    FeatureSpec("span", "log of the levels of depth between the two"),
    FeatureSpec("inflow", "one over the number of ways into the target"),
    FeatureSpec("grown", "log of 1 + the seeds that lie along it"),
)

GLOBAL_FEATURES = (
    FeatureSpec("stability", "1 - twice the mean standard deviation of the layers' health over the window"),
    FeatureSpec("health_trend", "mean change of the layers' health over the window"),
    FeatureSpec("health", "mean health over layers"),
    FeatureSpec("worst_health", "health of the worst layer"),
    FeatureSpec("dormancy", "mean dormancy over layers"),
    FeatureSpec("worst_dormancy", "dormancy of the sleepiest layer"),
    FeatureSpec("problems", "share of layers that are problematic"),
    FeatureSpec("sampled", "log of the sampled steps that are known"),
    FeatureSpec("loss", "log of the last training loss"),
    FeatureSpec("loss_drop", "log of the first known training loss over the last"),
    FeatureSpec(
        "loss_slope", "slope of the log loss over the last decision points, over the share of the run"
    ),
    FeatureSpec("loss_noise", "spread of the changes of the log loss between decision points"),
    FeatureSpec("held_out_known", "a held-out loss was measured"),
    FeatureSpec("gap", "log of the held-out loss over the training loss"),
    FeatureSpec("fraction", "share of the run that is over"),
    FeatureSpec("total_steps", "log of the length of the run in steps"),
    FeatureSpec("tokens_per_parameter", "log of the positions trained on over the run, a host parameter"),
    FeatureSpec("tokens_left_per_parameter", "log of those to come, a host parameter"),
    FeatureSpec("host_parameters", "log of the host's parameters"),
    FeatureSpec("growth", "log of the parameters now over the host's"),
    FeatureSpec("parameters_left", "log of 1 + the parameters that may be added over the host's"),
    FeatureSpec("flops_limited", "the budget of training FLOPs has an end"),
    FeatureSpec("flops_left", "log of 1 + the FLOPs that may be added over those the host still needs"),
    FeatureSpec("germinations_left", "log of 1 + the germinations left in this epoch"),
    FeatureSpec("window_open", "the run lies in its growth window"),
    FeatureSpec("price", "utility lost per unit of log parameters"),
    FeatureSpec("seeds_alive", "log of 1 + the seeds on their way"),
    FeatureSpec("seeds_settled", "log of 1 + the seeds that became part of the host"),
    FeatureSpec("transformer", "the host has attention and residual blocks"),
    FeatureSpec("images", "share of layers that give feature maps"),
    FeatureSpec("num_layers", "log of the number of seed layers"),
    FeatureSpec("layers_in_series", "log of the fewest layers between input and output"),
    FeatureSpec("bypassed", "a seed leads around at least one layer"),
    FeatureSpec("residual", "share of the edges that enter a sum"),
    FeatureSpec("narrowest", "log of the narrowest layer's units over the median's, outputs apart"),
    FeatureSpec("neck", "log of the tightest neck, outputs apart"),
)

CANDIDATE_FEATURES = (
    FeatureSpec("wait", "does nothing"),
    FeatureSpec("grow", "adds seeds"),
    FeatureSpec("cull", "removes a seed"),
    FeatureSpec("recycle", "draws dormant units of a layer anew"),
    FeatureSpec("hold", "keeps a seed under observation"),
    *(FeatureSpec(name, f"share of the placements whose blueprint is {name}") for name in FAMILIES),
    FeatureSpec("other", "share of the placements with any other blueprint"),
    FeatureSpec("open", "share of the placements that leave the blueprint open"),
    FeatureSpec("parallel", "share of the placements beside one layer"),
    FeatureSpec("bypass", "share of the placements over a non-linearity"),
    FeatureSpec("long", "share of the placements from the input, or an early layer, to an output"),
    FeatureSpec("placements", "log of the number of placements"),
    FeatureSpec("covered", "share of the seed layers that are a source of a placement"),
    FeatureSpec("size", "log of 1 + the mean size"),
    FeatureSpec("widening", "mean log of (width + size) / width of the source layer"),
    FeatureSpec("parameters", "log of the parameters afterwards over those now"),
    FeatureSpec("cost", "price times that log: the utility that the parameters lose"),
    FeatureSpec("flops", "signed log of 1 + the added forward FLOPs over the host's"),
    FeatureSpec("budget_share", "share of the parameters left that it takes"),
    FeatureSpec("source_width", "mean log of the source layer's units"),
    FeatureSpec("source_over_median", "smallest log of a source layer's units over the median"),
    FeatureSpec("neck", "tightest neck among the source layers"),
    FeatureSpec("source_depth", "mean depth of the source layers"),
    FeatureSpec("span", "mean difference in depth between target and source"),
    FeatureSpec("to_output", "share of the placements into an output layer"),
    FeatureSpec("health", "lowest health among source and target layers"),
    FeatureSpec("dormancy", "highest dormancy among source and target layers"),
    FeatureSpec("scored", "share of the placements whose site was scored; 0: not scored"),
    FeatureSpec("score", "mean log of 1 + the whitened expressivity of the scored"),
    FeatureSpec("score_excess", "mean share of the gradient's directions explained beyond noise"),
    FeatureSpec("score_z", "mean excess in standard deviations of the noise, saturating"),
    FeatureSpec("occupied", "share of the placements at a site that holds a seed already"),
    FeatureSpec("germinated", "the seed is germinated"),
    FeatureSpec("training", "the seed trains in isolation"),
    FeatureSpec("blending", "the seed is blended in"),
    FeatureSpec("holding", "the seed is observed at full strength"),
    FeatureSpec("measured", "the seed's contribution was measured"),
    FeatureSpec("contribution", "signed log of 1 + ten times the held-out loss it saves, over the loss"),
)


def columns(specs: tuple[FeatureSpec, ...], values: Mapping[str, Any], num: int) -> NDArray[np.float32]:
    """Stack named columns in the order of ``specs``; NaN counts as 0, "not known".

    Args:
        specs: Names wanted.
        values: Name -> numbers [num], or one number for all rows; exactly the names of ``specs``.
        num: Rows.

    Returns:
        [num, len(specs)], within [-LIMIT, LIMIT].
    """
    missing = {spec.name for spec in specs} ^ set(values)
    assert not missing, f"features and their names differ: {sorted(missing)}"
    table = np.empty((num, len(specs)), np.float64)
    for i, spec in enumerate(specs):
        table[:, i] = values[spec.name]
    table = np.nan_to_num(table, nan=0.0, posinf=LIMIT, neginf=-LIMIT)
    return np.clip(table, -LIMIT, LIMIT).astype(np.float32)


def log_ratio(above: Any, below: Any) -> Any:
    """log(above / below), 0 where either is not positive: there is nothing to compare."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    known = (above > 0) & (below > 0)
    ratio = np.log(np.where(known, above, 1.0)) - np.log(np.where(known, below, 1.0))
    return np.where(known, ratio, 0.0)
