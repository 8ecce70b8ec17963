"""How what growth costs depends on the depth of the host, from ten layers to ten thousand.

Every host is narrow, so that the number of its layers is what is seen, and is measured in a process of its
own. Times are processor times of one thread. The exponent of growth with the number of layers is told over
all depths (least squares of the logarithms), and between the two deepest hosts, where constant costs no
longer hide it.

``--set device=cuda`` measures a GPT of 98 million parameters in bf16, compiled, on a GPU instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from esper.bench._record import write_record
from esper.bench._workers import run_all
from esper.bench.overhead import typical_step_us
from esper.errors import ConfigError

if TYPE_CHECKING:
    from esper.bench._turns import BlockTimes

__all__ = ["TARGETS", "TITLE", "exponent", "run"]

TITLE = "Scale: attaching, watching and deciding on hosts of 10 to 10,000 layers"
_KINDS = ("mlp", "residual", "gpt")
_DEEPEST_GPT = 1000
_GROWING = ("attach_ms", "probe_ms", "decision_ms", "signal_bytes", "decision_bytes", "memory_mb")
_LEAST_MB = 1.0
"""Memory below this is the allocator's rounding."""
TARGETS: dict[str, tuple[str, float]] = {
    **{f"{kind}_{figure}_exponent_deep": ("<=", 1.1) for kind in _KINDS for figure in _GROWING},
    **{f"{kind}_1000_decision_ms": ("<=", 100.0) for kind in _KINDS},
    **{f"{kind}_{depth}_ratio": ("<=", 1.02) for kind in _KINDS for depth in (10, 100, 1000)},
    **{f"{kind}_10000_ratio": ("<=", 1.02) for kind in ("mlp", "residual")},
    "device_ratio": ("<=", 1.01),
    "device_added_syncs": ("<=", 0.0),
    "device_growth_s": ("<", 2.0),
}


def run(
    *,
    kinds: Sequence[str] = _KINDS,
    depths: Sequence[int] = (10, 100, 1000, 10_000),
    repeats: int = 3,
    ratios: bool = True,
    device: str = "cpu",
    quick: bool = False,
    out: str = "",
) -> dict[str, float]:
    """Measure hosts of every kind and depth.

    Args:
        kinds: Of ``mlp`` (one layer after the other), ``residual`` (blocks of two) and ``gpt`` (blocks of four).
        depths: Dense layers; a GPT is measured up to 1,000.
        repeats: Of each sampled step and decision; the deepest hosts have two.
        ratios: Measure the dormant step ratio under Lightning as well, which takes most of the time.
        device: ``cuda`` measures the large GPT on a GPU, and no depths.
        quick: Two depths, 10 and 100, of the MLP, without ratios.
        out: Write the figures to this JSON file.

    Returns:
        For each host ``H`` (such as ``mlp_100``): ``H_step_ms`` without anything, ``H_attach_ms``, ``H_probe_ms``
        that a sampled step takes longer, ``H_decision_ms`` of the round of a growth event up to the policy's answer,
        ``H_idle_decision_ms`` of other rounds, ``H_germination_ms`` of a seed, ``H_signal_bytes`` and
        ``H_decision_bytes`` of a message, ``H_memory_mb`` added, ``H_ratio`` of a step with the dormant callback over
        one without, and ``H_again_ratio``, what the method cannot see. For each kind and each figure that grows:
        ``_exponent`` over all depths, and ``_exponent_deep`` between the two deepest.

    Raises:
        ConfigError: An unknown kind or device, or fewer than two depths.
    """
    if device == "cuda":
        figures = _on_gpu()
    elif device == "cpu":
        if quick:
            kinds, depths, ratios = ("mlp",), (10, 100), False
        if unknown := sorted(set(kinds) - set(_KINDS)):
            raise ConfigError(f"kinds of host are {', '.join(_KINDS)}, got also {unknown}")
        if len(set(depths)) < 2 or min(depths) < 4:
            raise ConfigError(
                f"expected two depths or more, each of four layers at least, got {list(depths)}"
            )
        figures = _on_cpu(kinds, sorted(set(depths)), repeats, ratios)
    else:
        raise ConfigError(f"device should be cpu or cuda, got {device!r}")
    if out:
        options = {"kinds": list(kinds), "depths": list(depths), "repeats": repeats, "device": device}
        write_record(out, benchmark="scale", options=options, figures=figures, runs=[])
    return figures


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent of growth: the slope of log ``values`` over log ``sizes``, by least squares; NaN of one point."""
    points = [(math.log(s), math.log(v)) for s, v in zip(sizes, values, strict=True) if v > 0]
    if len(points) < 2:
        return math.nan
    x = [p[0] for p in points]
    y = [p[1] for p in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in points) / spread if spread else math.nan


def _on_cpu(kinds: Sequence[str], depths: Sequence[int], repeats: int, ratios: bool) -> dict[str, float]:
    from esper.bench._scale_costs import costs, quiet, time_arms

    figures: dict[str, float] = {}
    for kind in kinds:
        measured: list[dict[str, float]] = []
        for depth in depths:
            if kind == "gpt" and depth > _DEEPEST_GPT:
                continue
            # A pool of its own for each: a process that has held another host has its memory behind it.
            count = repeats if depth <= 1000 else min(2, repeats)
            title = f"{kind} of {depth} layers"
            (found,) = run_all(costs, [(kind, depth, count)], title=title, num_workers=1, prepare=quiet)
            measured.append(found)
            figures |= {f"{kind}_{depth}_{name}": value for name, value in found.items()}
            if ratios:
                task = (kind, depth, *_blocks(depth))
                (times,) = run_all(time_arms, [task], title=f"{title}: steps", num_workers=1, prepare=quiet)
                figures |= _ratios(f"{kind}_{depth}", times)
        figures |= _exponents(kind, measured)
    return figures


def _blocks(depth: int) -> tuple[int, int]:
    """Steps a block, and blocks; all of them within the 200 steps before the first sampled one."""
    if depth <= 100:
        return 20, 8
    return (10, 6) if depth <= 1000 else (10, 2)


def _ratios(host: str, times: BlockTimes) -> dict[str, float]:
    base = typical_step_us(times["without"])
    return {
        f"{host}_ratio": typical_step_us(times["callback"]) / base,
        f"{host}_again_ratio": typical_step_us(times["again"]) / base,
    }


def _exponents(kind: str, measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    figures = {}
    for name in _GROWING:
        least = _LEAST_MB if name == "memory_mb" else 0.0
        points = [(found["layers"], found[name]) for found in measured if found[name] > least]
        sizes, values = [p[0] for p in points], [p[1] for p in points]
        if len(points) > 1:
            figures[f"{kind}_{name}_exponent"] = exponent(sizes, values)
            figures[f"{kind}_{name}_exponent_deep"] = exponent(sizes[-2:], values[-2:])
    return figures


def _on_gpu() -> dict[str, float]:
    import torch

    from esper.bench._overhead_arms import quiet
    from esper.bench._scale_device import device_figures

    if not torch.cuda.is_available():
        raise ConfigError("device=cuda expects a GPU that torch can use, and there is none; leave it out")
    quiet()
    return device_figures(device="cuda")
