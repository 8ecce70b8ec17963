"""Adapters by one callback beside PEFT's on a frozen MiniLM: CLINC150, equal parameters, steps and rate search.

    ESPER_DATA_DIR=... OMP_NUM_THREADS=1 python experiments/finetune/run.py [phase ...]

Phases: search, final, time, memory, full, summary (all of them by default). Every finished run is a line of
``runs.jsonl`` in the folder ``--out``; a run that is there already is not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import arms
import lightning.pytorch as L
import torch
from hydra import initialize_config_module

from esper.bench._record import machine
from esper.bench._turns import Turn, time_in_turns
from esper.hosts import ClincData
from esper.report.statistics import paired_difference
from esper.report.summary import collect_versions

MAIN = (
    "LoRA", "uniform", "AdaLoRA", "uniform, slower", "LoRA, slower", "random",
    "random, slower", "uniform while it pays", "probe",
)  # fmt: skip
VARIANTS = ("expressivity", "uniform, all layers", "uniform, bottleneck", "uniform, isolated")
SEARCHED = ("probe", "LoRA", "AdaLoRA", "uniform", "LoRA, slower", "uniform, slower")
BORROWED = {
    "expressivity": "probe",
    "random, slower": "uniform, slower",
    "uniform, bottleneck": "uniform, slower",
    "uniform, isolated": "uniform, slower",
}
"""Arms that are not searched take the rate of ``uniform``: theirs are the same adapters elsewhere, or later.
``expressivity`` finds no site that clears its noise floor here, so that its head is all that it trains."""
RATES = (0.004, 0.008, 0.016)
SLOWER_RATES = (0.008, 0.016, 0.032)
"""Where the adapters have a quarter of the rate, it is the head that sets it."""
SEEDS = (0, 1, 2, 3, 4)
SEARCH_SEED = 100
FEW = 10
STEPS = 94
"""Two epochs of 1500 sentences in batches of 32."""
FULL_STEPS = 469
TIMED = ("LoRA", "AdaLoRA", "uniform, slower", "probe")


class Runs:
    """Finished runs by what they were, kept in a file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def get(self, **key: Any) -> dict[str, Any] | None:
        return next((r for r in self.records if all(r.get(k) == v for k, v in key.items())), None)

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
        return record

    def train(
        self, phase: str, arm: str, lr: float, seed: int, steps: int, split: str, data: Data
    ) -> dict[str, Any]:
        key = {"phase": phase, "arm": arm, "lr": lr, "seed": seed}
        known = self.get(**key)
        if known is not None:
            return known
        with tempfile.TemporaryDirectory() as folder:
            return self.add(key | arms.train(arm, lr, seed, steps, data.of, Path(folder), split))


class Data:
    """One reading of the sentences, for all seeds."""

    def __init__(self, few: int | None) -> None:
        self._few, self._first = few, ClincData(examples_per_intent=few, batch_size=arms.BATCH)

    def of(self, seed: int) -> ClincData:
        made = ClincData(examples_per_intent=self._few, batch_size=arms.BATCH, seed=seed)
        made._splits = self._first.splits
        return made


def search(runs: Runs, data: Data, names: Sequence[str]) -> dict[str, float]:
    """The best rate of each arm on the validation split; where it lies at the edge, one further."""
    best = {}
    for arm in names:
        rates = SLOWER_RATES if arm.endswith("slower") else RATES
        tried = {lr: runs.train("search", arm, lr, SEARCH_SEED, STEPS, "val", data) for lr in rates}
        chosen = max(tried, key=lambda lr: (tried[lr]["accuracy"], -tried[lr]["loss"]))
        while chosen in (min(tried), max(tried)):
            further = chosen * 2 if chosen == max(tried) else chosen / 2
            tried[further] = runs.train("search", arm, further, SEARCH_SEED, STEPS, "val", data)
            chosen = max(tried, key=lambda lr: (tried[lr]["accuracy"], -tried[lr]["loss"]))
        best[arm] = chosen
    return best


def timing(
    runs: Runs, data: Data, rates: dict[str, float], block_steps: int = 10, num_blocks: int = 8
) -> None:
    """CPU time of steps, the arms in turns within this process: ours young in blocks 1-2, fossilised after."""
    if runs.get(phase="time") is not None:
        return

    def fit(arm: str, folder: Path) -> Any:
        def run(turn: Turn) -> None:
            built = arms.build(arm, rates[arm], 0, STEPS, folder)
            arms.trainer(built, folder, STEPS, [turn]).fit(built.module, datamodule=data.of(0))

        return run

    with contextlib.ExitStack() as stack:
        folders = {arm: Path(stack.enter_context(tempfile.TemporaryDirectory())) for arm in TIMED}
        times = time_in_turns(
            {arm: fit(arm, folders[arm]) for arm in TIMED}, block_steps=block_steps, num_blocks=num_blocks
        )
    runs.add({"phase": "time", "blocks": times})


def memory(runs: Runs, names: Sequence[str]) -> None:
    """Peak resident size of a fresh process that trains 25 steps."""
    for arm in names:
        if runs.get(phase="memory", arm=arm) is None:
            done = subprocess.run(
                [sys.executable, __file__, "--child-memory", arm], capture_output=True, text=True, check=True
            )
            runs.add({"phase": "memory", "arm": arm, "peak_mb": float(done.stdout.strip().splitlines()[-1])})


def child_memory(arm: str) -> None:
    data = Data(FEW)
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        built = arms.build(arm, 0.004, 0, STEPS, Path(folder))
        trainer = arms.trainer(built, Path(folder), STEPS, [_StopAfter(25)])
        trainer.fit(built.module, datamodule=data.of(0))
    print(arms.peak_memory_mb())


class _StopAfter(L.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def summarise(runs: Runs) -> dict[str, Any]:
    """Means, spreads, and differences to LoRA paired by seed, in points of accuracy."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for record in runs.records:
        if record["phase"] == "final":
            by_arm.setdefault(record["arm"], {})[record["seed"]] = record
    points = {arm: {seed: 100 * r["accuracy"] for seed, r in found.items()} for arm, found in by_arm.items()}
    result: dict[str, Any] = {}
    for arm, found in by_arm.items():
        figures = list(points[arm].values())
        row: dict[str, Any] = {
            "lr": next(iter(found.values()))["lr"],
            "seeds": len(figures),
            "accuracy": mean(figures),
            "spread": stdev(figures) if len(figures) > 1 else None,
            "loss": mean(r["loss"] for r in found.values()),
            "adapter_parameters": sorted({r["adapter_parameters"] for r in found.values()}),
            "cpu_s": mean(r["cpu_s"] for r in found.values()),
        }
        for other in ("LoRA", "AdaLoRA", "probe"):
            difference = paired_difference(points[arm], points.get(other, {}))
            if arm != other and difference is not None:
                row[f"minus {other}"] = [difference.mean, difference.interval]
        if any("merge_difference" in r for r in found.values()):
            row["merge_difference"] = max(r.get("merge_difference", 0.0) for r in found.values())
        kept = runs.get(phase="memory", arm=arm)
        if kept is not None:
            row["peak_mb"] = kept["peak_mb"]
        result[arm] = row
    return {"arms": result, "step_ratio_to_lora": _step_ratios(runs)}


def _step_ratios(runs: Runs) -> dict[str, dict[str, float]]:
    """Ratios to LoRA of the median steps of neighbouring blocks: their median; and of all steps' sums.

    ``young`` is before fossilisation (steps 10 to 30), ``later`` after it (from step 40), ``all`` has the gates'
    measurements in it, but not the first ten steps with trace and births.
    """
    record = runs.get(phase="time")
    if record is None:
        return {}
    blocks: dict[str, list[list[float]]] = record["blocks"]

    def ratio(arm: str, chosen: slice) -> float:
        pairs = zip(blocks[arm][chosen], blocks["LoRA"][chosen], strict=True)
        return median(median(a) / median(b) for a, b in pairs)

    found = {
        arm: {
            "young": ratio(arm, slice(0, 2)),
            "later": ratio(arm, slice(3, None)),
            "all": sum(map(sum, times)) / sum(map(sum, blocks["LoRA"])),
            "step_ms": 1e3 * median(median(block) for block in times),
        }
        for arm, times in blocks.items()
    }
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(), initialize_config_module("esper.conf", version_base="1.3"):
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phases", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument(
        "--arms", default="", help="only these, by semicolons: several processes may share the work"
    )
    parser.add_argument("--child-memory", default="")
    given = parser.parse_args()
    with _quiet():
        if given.child_memory:
            child_memory(given.child_memory)
            return
        phases = given.phases or ["search", "final", "time", "memory", "variants", "full", "summary"]
        runs = Runs(given.out / "runs.jsonl")
        few = Data(FEW)
        chosen = given.arms.split(";") if given.arms else [*MAIN, *VARIANTS]
        wanted = {c if c in SEARCHED else BORROWED.get(c, "uniform") for c in chosen}
        rates = search(runs, few, [arm for arm in SEARCHED if arm in wanted])
        rates |= {c: rates[BORROWED.get(c, "uniform")] for c in chosen if c not in rates}
        for seed in SEEDS if "final" in phases else ():
            for arm in (a for a in MAIN if a in chosen):
                runs.train("final", arm, rates[arm], seed, STEPS, "test", few)
        if "time" in phases:
            timing(runs, Data(None), rates)  # one long epoch: turns are told by the number of the batch
        if "memory" in phases:
            memory(runs, TIMED)
        if "variants" in phases:
            for seed in SEEDS:
                for arm in (v for v in VARIANTS if v in chosen):
                    runs.train("final", arm, rates[arm], seed, STEPS, "test", few)
        if "full" in phases:
            everything = Data(None)
            for arm in (a for a in ("uniform, slower", "LoRA, slower", "AdaLoRA", "probe") if a in chosen):
                runs.train("full", arm, rates[arm], 0, FULL_STEPS, "test", everything)
        if "summary" in phases:
            content = {
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "machine": machine(),
                "versions": collect_versions(("esper", "torch", "lightning", "transformers", "peft")),
                "summary": summarise(runs),
                "runs": runs.records,
            }
            (given.out / "result.json").write_text(json.dumps(content, indent=1) + "\n")
            print(json.dumps(content["summary"], indent=1))


if __name__ == "__main__":
    main()
