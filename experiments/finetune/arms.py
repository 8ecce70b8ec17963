"""The arms: one frozen encoder with a head, and adapters by esper, by PEFT, or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from hydra import compose
from omegaconf import OmegaConf
from torch import Tensor

from esper import TamiyoCallback, export
from esper.hosts import ClassifierModule, ClincData, EncoderConfig, OptimConfig
from esper.hosts.optim import build_optimizer, build_schedule
from esper.settings import TrainSettings, parse_settings

RANK = 4
LAYERS = ["query", "value"]
BATCH = 32
WARMUP = 0.1

# Rank by rank, one seed a step, until the budget is used up.
RANDOM = [
    "policy=random", "kasmina.budget.max_parameters_ratio=1.6494", "policy.window=[0,0.6]",
    "policy.options.num_events=60", "policy.options.start=0", "policy.options.end=0",
    "policy.options.blueprints=[lowrank]", "kasmina.probes.decision_interval=0.005",
    "kasmina.lifecycle.min_holding_steps=400",  # 34 births, each judged apart, would take twice the training
]  # fmt: skip

# What each esper arm changes of conf/experiment/finetune_clinc.yaml.
ESPER = {
    "probe": ["policy=off"],
    "uniform, slower": ["kasmina.seed_lr_multiplier=0.25"],  # as the file has it
    "uniform": [],
    "uniform while it pays": [
        "policy.options.num_events=4", "policy.options.end=0.4", "policy.options.min_saved=0.02",
        "kasmina.lifecycle.min_holding_steps=10", "kasmina.lifecycle.gate_interval_steps=5",
        "kasmina.probes.decision_interval=0.01",
    ],
    "uniform, all layers": ["policy=uniform", "kasmina.budget.max_parameters_ratio=1.7185"],
    "uniform, bottleneck": ["policy.options.blueprints=[bottleneck]", "policy.options.layers=[attention.output.dense]",
                            "kasmina.budget.max_parameters_ratio=1.6393", "kasmina.seed_lr_multiplier=0.25"],
    "uniform, isolated": ["kasmina.lifecycle.mode=isolated", "kasmina.seed_lr_multiplier=0.25",
                          "+kasmina.lifecycle.min_training_steps=20",
                          "+kasmina.lifecycle.blend_steps=20"],
    "random": RANDOM,
    "random, slower": [*RANDOM, "kasmina.seed_lr_multiplier=0.25"],
    "expressivity": [
        "policy=expressivity", "policy.window=[0,0.5]", "policy.options.num_events=2", "policy.options.start=0",
        "policy.options.end=0.1", "policy.options.min_tokens_per_parameter=0",
        "kasmina.budget.max_scoring_fraction=1.0", "kasmina.probes.decision_interval=0.02",
    ],
}  # fmt: skip
PEFT = ("LoRA", "LoRA, slower", "AdaLoRA")


class Clock(L.Callback):
    """CPU seconds of the training thread and seconds on the wall, of the fit alone."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._cpu, self._wall = time.thread_time(), time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.cpu_s, self.wall_s = time.thread_time() - self._cpu, time.perf_counter() - self._wall


class AdaLoraLoop(L.Callback):
    """What AdaLoRA's user has to remember: allocate after the step, before the next ``zero_grad``."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.host.bert.base_model.update_and_allocate(trainer.global_step)


class SlowerModule(ClassifierModule):
    """Gives the adapters a quarter of the head's rate in a group of their own, as a careful user of PEFT can."""

    def configure_optimizers(self) -> Any:
        config = self.optim_config
        optimizer = build_optimizer(self.host.head, config)
        adapters = [p for p in self.host.bert.parameters() if p.requires_grad]
        optimizer.add_param_group({"params": adapters, "lr": 0.25 * config.lr, "weight_decay": 0.0})
        schedule = build_schedule(optimizer, config, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AdaLoraModule(ClassifierModule):
    """Adds the orthogonality term that PEFT adds itself where the model returns its own loss."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        bert = self.host.bert
        terms = []
        for name, p in bert.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                terms.append(torch.norm(gram - torch.eye(len(gram)), p="fro"))
        return loss + bert.peft_config["default"].orth_reg_weight * sum(terms) / len(terms)


@dataclass
class Built:
    """An arm, ready to be trained."""

    module: ClassifierModule
    callbacks: list[L.Callback]
    tamiyo: TamiyoCallback | None
    settings: TrainSettings


def build(arm: str, lr: float, seed: int, steps: int, folder: Path) -> Built:
    """Make module and callbacks of an arm; the same seed gives every arm the same head and data order."""
    # One rate for head and adapters unless an arm says otherwise, as PEFT's arms have it.
    overrides = ["experiment=finetune_clinc", f"seed={seed}", "kasmina.seed_lr_multiplier=1.0"]
    overrides += ESPER.get(arm, ["policy=off"])
    config = OmegaConf.to_container(compose("train", overrides), resolve=True)
    settings = parse_settings({str(k): v for k, v in config.items()})
    L.seed_everything(seed, verbose=False)
    module_class = {"AdaLoRA": AdaLoraModule, "LoRA, slower": SlowerModule}.get(arm, ClassifierModule)
    optim = OptimConfig(lr=lr, warmup_fraction=WARMUP)
    module = module_class(EncoderConfig(), optim)
    if arm in PEFT:
        adapt(module, arm, steps)
        return Built(module, [AdaLoraLoop()] if arm == "AdaLoRA" else [], None, settings)
    if arm == "probe":
        return Built(module, [], None, settings)
    tamiyo = TamiyoCallback(settings.growth, journal=str(folder / "growth.jsonl"))
    return Built(module, [tamiyo], tamiyo, settings)


def adapt(module: ClassifierModule, arm: str, steps: int) -> None:
    """Put PEFT's adapters into the encoder, as PEFT's documentation does it."""
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    if arm.startswith("LoRA"):
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LAYERS)
    else:
        config = AdaLoraConfig(
            init_r=RANK, target_r=RANK // 2, lora_alpha=2 * RANK, target_modules=LAYERS, total_step=steps,
            tinit=steps // 10, tfinal=2 * steps // 5, deltaT=5,
        )  # fmt: skip
    module.host.bert = get_peft_model(module.host.bert, config)


def trainer(built: Built, folder: Path, steps: int, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    """A trainer as the experiment's configuration has it, which neither logs nor validates while it trains."""
    arguments = built.settings.trainer.lightning_arguments()
    arguments |= {
        "max_epochs": -1,
        "max_steps": steps,
        "check_val_every_n_epoch": 10_000,
        "log_every_n_steps": 10,
    }
    return L.Trainer(
        **arguments, default_root_dir=folder, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[*callbacks, *built.callbacks],
    )  # fmt: skip


def trained_parameters(module: ClassifierModule) -> int:
    """Trainable parameters beside the head."""
    head = sum(p.numel() for p in module.host.head.parameters())
    return sum(p.numel() for p in module.parameters() if p.requires_grad) - head


def train(
    arm: str, lr: float, seed: int, steps: int, data: Callable[[int], ClincData], folder: Path, split: str
) -> dict[str, Any]:
    """Train one arm once, and measure it once on ``split``."""
    torch.set_num_threads(1)
    built = build(arm, lr, seed, steps, folder)
    clock, source = Clock(), data(seed)
    runner = trainer(built, folder, steps, [clock])
    runner.fit(built.module, datamodule=source)
    steps_taken = runner.global_step
    evaluate = runner.validate if split == "val" else runner.test
    figures = evaluate(built.module, datamodule=source, verbose=False)[0]
    record: dict[str, Any] = {
        "accuracy": figures[f"{split}_acc"], "loss": figures[f"{split}_loss"], "steps": steps_taken,
        "adapter_parameters": trained_parameters(built.module), "cpu_s": clock.cpu_s, "wall_s": clock.wall_s,
    }  # fmt: skip
    if built.tamiyo is not None:
        counts = built.tamiyo.summary()
        record |= {key: int(counts[f"seeds_{key}"]) for key in ("germinated", "fossilized", "culled")}
        if seed == 0 and split == "test":
            record["merge_difference"] = merge_difference(built.module, source)
    if arm == "AdaLoRA":
        record["adapter_parameters_used"] = used_by_adalora(built.module)
    return record


def merge_difference(module: ClassifierModule, data: ClincData) -> float:
    """Largest change of a logit by export, relative to the largest where that is above one; in float32."""
    ids = data.splits.test[torch.arange(64)][0]
    module.eval()
    plain = export(module.host, ids[:2])
    with torch.no_grad():
        grown, merged = module.host(ids), plain(ids)
    return float((grown - merged).abs().max() / max(1.0, float(grown.abs().max())))


def used_by_adalora(module: ClassifierModule) -> int:
    """Parameters of the ranks that AdaLoRA has not masked."""
    used = 0
    for name, e in module.host.bert.named_parameters():
        if "lora_E" in name:
            layer = module.host.bert.get_submodule(name.split(".lora_E")[0])
            used += int((e != 0).sum()) * (1 + layer.in_features + layer.out_features)
    return used


def peak_memory_mb() -> float:
    """Largest resident size of this process so far (Linux).

    Not ``ru_maxrss``: a child process begins with its parent's.
    """
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024.0
