"""One run of ``esper bench depth``: a small GPT on tiny Shakespeare, of fixed depth or growing by blocks."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as L

from esper.arms import control_growth
from esper.bench._digits_arms import quiet_worker
from esper.callbacks import TamiyoCallback
from esper.hosts import GPT, GPTConfig, LanguageModule, OptimConfig, ShakespeareData

__all__ = ["DepthRun", "num_steps", "quiet_worker", "train_depth"]

Arm = Literal["shallow", "deep", "grown"]


@dataclass(frozen=True)
class DepthRun:
    """What to train.

    Attributes:
        arm: ``shallow`` and ``deep`` keep their depth, ``grown`` goes from one to the other.
        seed: Of weights and of the windows drawn.
        lr: Peak rate of the warm-up and cosine.
        deep_steps: The budget, in steps of the deep net; every arm spends the same training FLOPs.
        depths: Blocks of the shallow and of the deep net.
        grow_at: Share of the budget after which ``grown`` gets its blocks.
        batch_size: Windows a step.
        context: Characters a window.
        split: Where the loss is taken at the end.
    """

    arm: Arm
    seed: int
    lr: float
    deep_steps: int = 600
    depths: tuple[int, int] = (2, 6)
    grow_at: float = 0.2
    batch_size: int = 12
    context: int = 64
    split: Literal["val", "test"] = "test"


class _GrowBlocks(L.Callback):
    """Adds all missing blocks after one step, spread evenly over the old ones and there to stay.

    No policy and no gate has a say: the question here is what the added depth is worth, not when to add it.
    """

    def __init__(self, tamiyo: TamiyoCallback, at_step: int, copies: int, depth: int) -> None:
        self._tamiyo, self._at_step, self._copies, self._depth = tamiyo, at_step, copies, depth

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stack the copies between two optimizer steps."""
        if trainer.global_step != self._at_step:
            return
        body = self._tamiyo.body
        for copy in range(self._copies):
            seed = body.germinate(f"stack:host.blocks.{copy * self._depth // self._copies}", "stack", 1)
            seed.enter("fossilized", 1.0)
        body.register(*trainer.optimizers)


def num_steps(run: DepthRun, shallow_flops: int, deep_flops: int) -> tuple[int, int]:
    """Return the steps of the run, and the step after which it grows (0: never).

    Args:
        run: The run.
        shallow_flops: Forward FLOPs of a sample at the smaller depth.
        deep_flops: The same at the larger one.
    """
    ratio = deep_flops / shallow_flops
    if run.arm == "deep":
        return run.deep_steps, 0
    if run.arm == "shallow":
        return round(run.deep_steps * ratio), 0
    before = round(run.grow_at * run.deep_steps * ratio)
    return before + round((1.0 - run.grow_at) * run.deep_steps), before


def train_depth(run: DepthRun) -> dict[str, Any]:
    """Train one arm to the end of its budget.

    Returns:
        Plain values: the run's name, seed and rate, ``loss`` in nats a character on its split,
        ``parameters``, ``training_flops``, ``steps``, ``wall_time_s``.
    """
    started = time.perf_counter()
    data = ShakespeareData(batch_size=run.batch_size, context=run.context, seed=run.seed)
    shallow, deep = (
        GPTConfig(vocab_size=data.num_classes, context=run.context, depth=depth) for depth in run.depths
    )
    L.seed_everything(run.seed, workers=True, verbose=False)
    module = LanguageModule(deep if run.arm == "deep" else shallow, OptimConfig(lr=run.lr, weight_decay=0.1))
    steps, grow_step = num_steps(run, _forward_flops(shallow), _forward_flops(deep))
    callbacks: list[L.Callback] = [_watcher(run)]
    assert isinstance(callbacks[0], TamiyoCallback)
    if grow_step:
        missing = run.depths[1] - run.depths[0]
        callbacks.append(_GrowBlocks(callbacks[0], grow_step, missing, run.depths[0]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, default_root_dir=folder, logger=False, callbacks=callbacks,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, limit_val_batches=0 if run.split == "test" else 1.0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        evaluate = trainer.test if run.split == "test" else trainer.validate
        loss = evaluate(module, datamodule=data, verbose=False)[0][f"{run.split}_loss"]
    counts = callbacks[0].summary()
    return {
        "arm": run.arm,
        "seed": run.seed,
        "lr": run.lr,
        "loss": loss,
        "split": run.split,
        "parameters": int(counts["num_parameters"]),
        "training_flops": float(counts["training_flops"]),
        "steps": steps,
        "blocks": (deep if run.arm == "deep" else shallow).depth + len(callbacks[0].body.seeds),
        "wall_time_s": time.perf_counter() - started,
    }


def _watcher(run: DepthRun) -> TamiyoCallback:
    """Traces the host and keeps the account of FLOPs; decides nothing."""
    return TamiyoCallback(control_growth(run.seed))


def _forward_flops(config: GPTConfig) -> int:
    """Forward FLOPs of a sample as the callback counts them: two for each weight of a dense layer and position."""
    from torch import nn

    weights = sum(m.weight.numel() for m in GPT(config).modules() if isinstance(m, nn.Linear))
    return 2 * weights * config.context
