"""What the callback costs a training step that has nothing to grow, in time and in memory.

Three small hosts under Lightning with a module that logs nothing. All arms of a host train in one process in
turns of 200 steps, which hold one sampled step and one decision point each. A step's time is processor time
of the training thread, which other programs on the machine do not add to. To leave out what noise they add
all the same, each of the 200 places in a turn is given the lower quartile of its steps over all turns, and an
arm's time is their sum: what happens every tenth or two hundredth step stays in. The interval is a bootstrap
over turns. Arm ``again`` is ``without`` once more: how far its ratio is from one is what the method cannot
see. Memory is that of a process of its own each: what it has allocated, and apart from it what it has mapped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.bench._record import write_record
from esper.bench._workers import run_all
from esper.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from esper.bench._turns import BlockTimes

__all__ = ["TARGETS", "TITLE", "run", "typical_step_us"]

TITLE = "Overhead: a training step with the callback attached and nothing to grow, over one without"
_HOSTS = ("mlp", "cnn", "gpt")
TARGETS: dict[str, tuple[str, float]] = {
    f"{host}_{figure}": ("<=", bound)
    for host in _HOSTS
    for figure, bound in (("ratio", 1.02), ("probes_off_ratio", 1.005), ("memory_ratio", 1.01))
}
BLOCK_STEPS = 200
_FIGURES = {"attached": "ratio", "watching": "watching_ratio", "probes_off": "probes_off_ratio",
            "empty": "empty_ratio", "again": "again_ratio"}  # fmt: skip
_WANDB_INTERVAL = 50
_RESAMPLES = 1000


def run(
    *,
    hosts: Sequence[str] = _HOSTS,
    num_blocks: int = 10,
    block_steps: int = BLOCK_STEPS,
    memory_repeats: int = 2,
    wandb: bool = True,
    quick: bool = False,
    out: str = "",
) -> dict[str, float]:
    """Measure time, memory, and the cost beside ``wandb.watch``.

    Args:
        hosts: Of ``mlp``, ``cnn`` and ``gpt``.
        num_blocks: Turns of each arm that count.
        block_steps: Steps a turn; less than 200 leaves sampled steps out of some turns.
        memory_repeats: Processes an arm; the smallest counts. 0 leaves memory out.
        wandb: Measure ``wandb.watch(log="all")`` as well, offline, where W&B is installed.
        quick: The MLP alone, three turns, no memory.
        out: Write the figures to this JSON file.

    Returns:
        For each host ``H``: ``H_step_us`` without a callback; over it ``H_ratio`` with the default callback, which
        decides, and waits; ``H_watching_ratio`` with policy ``off``; ``H_probes_off_ratio`` with policy ``off`` and
        no sampled step; ``H_empty_ratio`` with a callback whose hooks do nothing; ``H_again_ratio``; each with
        ``_low`` and ``_high``; of allocated memory ``H_memory_ratio``, ``H_memory_mb`` and
        ``H_memory_added_mb``; of library pages that were run ``H_mapped_mb`` and ``H_mapped_added_mb``. With W&B,
        for the MLP and a wide one,
        ``H_wandb_watch_us`` and ``H_esper_watch_us``, what either adds to a step at one sample in 50 steps, and
        ``H_wandb_sample_ms`` and ``H_esper_sample_ms``, what a sampled step takes longer than the others of its
        run, which is the better known figure on the wide one.

    Raises:
        ConfigError: An unknown host, or too few turns.
    """
    from esper.bench._overhead_arms import ARMS, HORIZON_STEPS, make_fit, memory_mb, quiet
    from esper.bench._turns import time_in_turns

    if quick:
        hosts, num_blocks, memory_repeats = ("mlp",), 3, 0
    if unknown := sorted(set(hosts) - set(_HOSTS)):
        raise ConfigError(f"hosts to time are {', '.join(_HOSTS)}, got also {unknown}")
    if num_blocks < 2 or (num_blocks + 2) * block_steps > HORIZON_STEPS:
        raise ConfigError(
            f"expected two turns or more that fit {HORIZON_STEPS} steps, got {num_blocks} of {block_steps}"
        )
    quiet()
    figures: dict[str, float] = {}
    for host in hosts:
        fits = {arm: make_fit(host, callbacks) for arm, callbacks in ARMS.items()}
        times = time_in_turns(fits, block_steps=block_steps, num_blocks=num_blocks)
        figures[f"{host}_step_us"] = typical_step_us(times["without"])
        for arm, name in _FIGURES.items():
            _ratio(figures, f"{host}_{name}", times, arm, "without")
    if wandb and find_spec("wandb") is not None:
        for host in ("mlp", "wide"):
            figures |= _beside_wandb(host, max(2, num_blocks // 2), block_steps)
    for host in hosts if memory_repeats else ():
        tasks = [
            (host, arm, 2 * BLOCK_STEPS) for arm in ("without", "attached") for _ in range(memory_repeats)
        ]
        held = [
            # a pool of its own for each, because a process that has trained before has its peak behind it
            run_all(memory_mb, [task], title=f"memory of {host}", num_workers=1, prepare=quiet)[0]
            for task in tasks
        ]
        without, attached = min(held[:memory_repeats]), min(held[memory_repeats:])
        figures[f"{host}_memory_ratio"] = attached[0] / without[0]
        figures[f"{host}_memory_mb"] = without[0]
        figures[f"{host}_memory_added_mb"] = attached[0] - without[0]
        figures[f"{host}_mapped_mb"] = without[1]
        figures[f"{host}_mapped_added_mb"] = attached[1] - without[1]
    if out:
        options: dict[str, Any] = {"hosts": list(hosts), "num_blocks": num_blocks, "block_steps": block_steps}
        write_record(out, benchmark="overhead", options=options, figures=figures, runs=[])
    return figures


def typical_step_us(blocks: Sequence[Sequence[float]]) -> float:
    """Mean over the places of a block of the lower quartile of that place's times; seconds in, µs out."""
    import numpy as np

    return float(1e6 * _typical(np.asarray(blocks)))


def _typical(blocks: NDArray[np.float64]) -> float:
    import numpy as np

    return float(np.quantile(blocks, 0.25, axis=0).mean())


def _ratio(figures: dict[str, float], name: str, times: BlockTimes, arm: str, base: str) -> None:
    """Put ``arm`` over ``base`` into ``figures``, with a bootstrap interval over blocks."""
    import numpy as np

    over, under = np.asarray(times[arm]), np.asarray(times[base])
    figures[name] = _typical(over) / _typical(under)
    draws = np.random.default_rng(0).integers(len(over), size=(_RESAMPLES, len(over)))
    ratios = [_typical(over[draw]) / _typical(under[draw]) for draw in draws]
    figures[f"{name}_low"], figures[f"{name}_high"] = (float(q) for q in np.quantile(ratios, [0.025, 0.975]))


def _beside_wandb(host: str, num_blocks: int, block_steps: int) -> dict[str, float]:
    """What watching ``host`` costs on top of a run with the same logger."""
    from esper.bench._overhead_arms import wandb_fits
    from esper.bench._turns import time_in_turns

    with tempfile.TemporaryDirectory() as folder:
        fits, finish = wandb_fits(host, Path(folder), _WANDB_INTERVAL)
        try:
            times = time_in_turns(fits, block_steps=block_steps, num_blocks=num_blocks)
        finally:
            finish()
    base = typical_step_us(times["logger"])
    figures = {f"{host}_logged_step_us": base}
    for arm in ("wandb", "esper"):
        figures[f"{host}_{arm}_watch_us"] = typical_step_us(times[arm]) - base
        figures[f"{host}_{arm}_sample_ms"] = _sample_ms(times[arm], block_steps)
    return figures


def _sample_ms(blocks: Sequence[Sequence[float]], block_steps: int) -> float:
    """What a sampled step takes longer than an ordinary one of the same run."""
    import numpy as np

    places = np.sort(np.quantile(np.asarray(blocks), 0.25, axis=0))
    sampled = max(1, block_steps // _WANDB_INTERVAL)
    return float(1e3 * (places[-sampled:].mean() - np.median(places)))
