"""What each process of the tests of several processes does; :mod:`launching` starts them."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import QUICK, Every, Script, Tokens, assert_registered, fit, gpt, growing, mlp, trainer, weights
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from esper.callbacks import TamiyoCallback
from esper.callbacks.distributed import ProcessRanks, wrap_again
from esper.errors import UnsupportedError
from esper.hosts import ClassifierModule, DigitsData, MLPConfig, OptimConfig
from esper.kasmina.loading import GrowableMixin
from esper.kasmina.structure import all_seeds
from esper.messages import Decision
from esper.tamiyo.council import decide_together
from esper.tamiyo.state import GrowthState

WIDE = "bypass:host.layers.0->host.layers.1"
NEXT = "bypass:host.layers.1->host.layers.2"
LONG = "bypass:host.layers.0->host.head"
RANK = "parallel:host.layers.0"

EVENTS = ((0.06, WIDE, "widen", 6), (0.2, LONG, "shortcut", 4), (0.3, RANK, "lowrank", 2))
SGD = {"optimizer": "sgd", "lr": 0.05}

Acts = Mapping[int, Callable[[TamiyoCallback, L.LightningModule], object]]


class Case:
    """One way to train in every process; :meth:`run` starts it or takes it up."""

    def __init__(
        self,
        folder: Path,
        *,
        events: tuple[Any, ...] = EVENTS,
        make: Callable[[], L.LightningModule] = mlp,
        data: Callable[[], L.LightningDataModule] = lambda: DigitsData(batch_size=32),
        acts: Acts | None = None,
        strategy: Any = "ddp",
        options: Mapping[str, Any] | None = None,
        save: bool = True,
        **settings: Any,
    ) -> None:
        self.folder, self.events, self.make, self.data = folder, events, make, data
        self.acts, self.strategy, self.options = acts or {}, strategy, dict(options or {})
        self.settings, self.save = settings, save
        self.heard = 0

    def run(self, name: str, checkpoint: Path | None = None) -> dict[str, Any]:
        folder = self.folder / name
        self.callback = growing(folder, *self.events, **self.settings)
        self.callback.listeners.append(lambda event: self._hear())
        self.module = self.make()
        script = Script(
            {step: lambda *_, act=act: act(self.callback, self.module) for step, act in self.acts.items()}
        )
        savers = [ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)] * self.save
        self.heard = 0
        runner = trainer(
            folder, self.callback, script, *savers, strategy=self.strategy, devices=2,
            enable_checkpointing=self.save, **self.options,
        )  # fmt: skip
        fit(runner, self.module, self.data(), ckpt_path=checkpoint)
        assert_registered(runner, self.module)
        self.runner = runner
        return self.found()

    def found(self) -> dict[str, Any]:
        """What all ranks have to have alike after training, and what only some may have."""
        seeds = all_seeds(self.module)
        return {
            "weights": weights(self.module),
            "moments": [o.state_dict() for o in self.runner.optimizers],
            "counters": {s.seed_id: [float(s.alpha), int(s.non_finite)] for s in seeds},
            "stages": {s.seed_id: s.stage for s in seeds},
            "sites": {s.seed_id: s.site.name for s in seeds},
            "summary": dict(self.callback.summary()),
            "drawn": self.callback._controller.generator.get_state(),
            "heard": self.heard,
        }

    def _hear(self) -> None:
        self.heard += 1


# ---------------------------------------------------------------- growth in place


def direct(rank: int, folder: Path) -> dict[str, Any]:
    """Growth, a recycled layer and a cull that rank 0 alone is asked for; resumed while a request waits."""

    def switch_off_units(callback: TamiyoCallback, module: L.LightningModule) -> None:
        with torch.no_grad():
            module.host.layers[0].weight[:3] *= 1e-3  # dormant, but not silent: their mean hangs on the data
            module.host.layers[0].bias[:3] = 1e-3
        if rank == 0:
            callback.recycle("host.layers.0")
        else:
            callback.cull("s1")  # nobody listens to rank 1

    acts: Acts = {20: switch_off_units, 14: lambda callback, _: callback.cull("s3") if rank == 0 else None}
    # The ranks meet after steps 1, 4, 6, 7, 10, 12, 13, 16, 18, 19, 22, ...; nothing changes DDP after 16.
    apart = {"governor": {"check_interval_steps": 6}, "probes": {"decision_interval": 0.1}}
    # Slow, so that the units are still dormant when their turn comes.
    case = Case(folder, make=lambda: mlp(lr=5e-4), data=SharedOut, acts=acts, **apart)
    whole = case.run("whole")
    return {
        "whole": whole,
        **{f"from{step}": case.run(f"from{step}", _at(folder, step)) for step in (15, 21)},
    }


def isolated(rank: int, folder: Path) -> dict[str, Any]:
    """Isolated seeds with accumulated gradients and clipping; resumed while one trains and one blends."""
    case = Case(
        folder,
        events=((0.06, WIDE, "widen", 6), (0.4, LONG, "shortcut", 4)),
        lifecycle=QUICK | {"mode": "isolated"},
        probes={"interval_steps": 3},
        options={"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 3},
    )
    whole = case.run("whole")
    return {
        "whole": whole,
        "from8": case.run("from8", _at(folder, 8)),
        "from16": case.run("from16", _at(folder, 16)),
    }


def drawing(rank: int, folder: Path) -> dict[str, Any]:
    """A policy that draws, on a host with dropout, whose loaders Lightning shares out among the processes."""
    case = Case(
        folder,
        make=gpt,
        data=Tokens,
        strategy="ddp_find_unused_parameters_true",
        policy="random",
        policy_options={"num_events": 4, "min_size": 2},
        options={"max_epochs": 4},
        save=False,
    )
    return {"whole": case.run("whole")}


def scoring(rank: int, folder: Path) -> dict[str, Any]:
    """A policy that scores sites, with computed starts, on validation batches that differ between the ranks."""
    case = Case(
        folder,
        make=lambda: mlp(hidden=(16, 3, 16)),
        data=SharedOut,
        policy="expressivity",
        policy_options={},
        widen_start="closed_form",
        probes={"decision_interval": 0.04, "held_out_batches": 1, "max_samples": 64},
        budget={"max_parameters_ratio": 4.0, "site_cooldown_steps": 0, "max_scoring_fraction": 1.0},
    )
    return {"whole": case.run("whole")}


class SharedOut(DigitsData):
    """Validates by a loader that Lightning shares out among the processes, so that each measures on its part."""

    def __init__(self) -> None:
        super().__init__(batch_size=32)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*self.splits.val[:]), batch_size=64)


def halves(rank: int, folder: Path) -> dict[str, Any]:
    """Half of each batch: the same run as one process with whole batches. Old wrappers must not pile up."""
    wrappers: list[weakref.ref[Any]] = []
    most = 0

    def look(runner: L.Trainer, module: L.LightningModule) -> None:
        nonlocal most
        model = runner.strategy.model
        assert isinstance(model, DistributedDataParallel)
        if not any(wrapper() is model for wrapper in wrappers):
            wrappers.append(weakref.ref(model))
        most = max(most, sum(wrapper() is not None for wrapper in wrappers))

    callback = growing(folder, *EVENTS)
    module = mlp(**SGD)
    runner = trainer(folder, callback, Every(look), strategy="ddp", devices=2)
    fit(runner, module, DigitsData(batch_size=32))
    return {
        "weights": weights(module),
        "summary": callback.summary(),
        "wrapped": len(wrappers),
        "alive": most,
    }


def silent(rank: int, folder: Path) -> dict[str, Any]:
    """A seed whose parameters get no gradient for some steps; DDP must not wait for them."""

    def silence(callback: TamiyoCallback, module: L.LightningModule) -> None:
        all_seeds(module)[0].enter("germinated", 0.0)
        wrap_again(module.trainer.strategy, module)

    def speak_up(callback: TamiyoCallback, module: L.LightningModule) -> None:
        stages.append(all_seeds(module)[0].stage)

    stages: list[str] = []
    case = Case(
        folder,
        events=((0.1, WIDE, "widen", 6),),
        acts={7: silence, 9: speak_up, 13: speak_up},
        lifecycle=QUICK | {"gate_interval_steps": 6, "min_holding_steps": 30},
        options={"max_epochs": 1},
        save=False,
    )
    return {"whole": case.run("whole"), "stages": stages}


def by_hand(rank: int, folder: Path) -> dict[str, Any]:
    """Past the callback, nobody knows whether all ranks do the same."""
    callback = growing(folder)
    script = Script({5: lambda *_: callback.body.germinate(WIDE, "widen", 4)})
    runner = trainer(folder, callback, script, strategy="ddp", devices=2)
    return {"error": _error(lambda: fit(runner, mlp(), DigitsData(batch_size=32)))}


def talk(rank: int, folder: Path) -> dict[str, Any]:
    """The ranks' talk itself, without a training run."""
    ranks = ProcessRanks()
    rows = torch.arange(6.0).reshape(3, 2)[: 2 + rank].to(torch.bfloat16)
    told = {
        "exchange": ranks.exchange(
            "words", {"rank": rank, "long": "x" * 3000 * rank, "none": None, "nan": float("nan")}
        ),
        "first": ranks.first("a number", 10 + rank),
        "measure": ranks.measure(
            "figures", lambda: [1.0 + rank, None if rank else 4.0, None, float("inf") if rank else 1.0]
        ),
        "gather": ranks.gather(rows),
        "objection": ranks.objection("a reason", "too late" if rank else ""),
        "silence": ranks.objection("a reason", ""),
        "refused": _error(lambda: ranks.attempt("a try", lambda: _refuse("not here") if rank else 1)),
        "afterwards": ranks.first("a number", rank),
        "apart": _error(lambda: ranks.exchange(f"subject {rank}", 0)),
    }
    told |= _council(ranks)
    ranks.close()
    return told


def _council(ranks: ProcessRanks) -> dict[str, Any]:
    """A policy that looks at figures that its rank alone has, measures, fails to measure, and draws."""

    def ask(state: GrowthState) -> list[Decision]:
        asked.append(state.train_loss)
        loss = state.measure_held_out_loss()
        refused = _error(lambda: state.score(["here"], 4))
        torch.rand(3, generator=state.generator)
        return [Decision(action="wait", reason=f"{state.train_loss}, {loss}, {refused}", policy="mine")]

    asked: list[float] = []
    known = dict.fromkeys(field.name for field in dataclasses.fields(GrowthState))
    known |= {
        "train_loss": float(ranks.rank),
        "generator": torch.Generator().manual_seed(5),
        "measure_held_out_loss": lambda: ranks.measure("a loss", lambda: [float(ranks.rank)])[0],
        "score": lambda names, size: ranks.attempt(
            "a score", lambda: _refuse(f"not {names[0]}") if ranks.rank else {}
        ),
    }
    state = GrowthState(**known)
    decisions = decide_together(ranks, state, ask)
    return {"asked": asked, "decided": [d.reason for d in decisions], "drawn": state.generator.get_state()}


def _refuse(reason: str) -> None:
    raise UnsupportedError(reason)


# ---------------------------------------------------------------- what one rank alone sees


def _bad_loss_on_rank_1(module: L.LightningModule, step: int) -> L.LightningModule:
    """From one step on for one step, rank 1's loss is NaN while all gradients stay finite."""
    inner = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        loss = inner(batch, batch_idx)
        wrong = module.training and dist.get_rank() == 1 and module.trainer.global_step == step
        return loss + float("nan") if wrong else loss

    module.training_step = training_step
    return module


def bad_loss(rank: int, folder: Path) -> dict[str, Any]:
    case = Case(
        folder,
        events=((0.2, WIDE, "widen", 6),),
        make=lambda: _bad_loss_on_rank_1(mlp(), 15),
        lifecycle=QUICK | {"min_holding_steps": 30},
        governor={"check_interval_steps": 2, "min_checks": 2},
        options={"max_epochs": 1},
    )
    return {"whole": case.run("whole")}


def bad_seed(rank: int, folder: Path) -> dict[str, Any]:
    """Rank 1 alone has seen its seed's values go wrong, some steps before a gate looks."""

    def spoil(_: TamiyoCallback, module: L.LightningModule) -> None:
        if rank == 1:
            all_seeds(module)[0].non_finite += 3

    case = Case(
        folder,
        events=((0.1, WIDE, "widen", 6),),
        acts={9: spoil},
        lifecycle=QUICK | {"gate_interval_steps": 6, "min_holding_steps": 30},
        options={"max_epochs": 1},
    )
    return {"whole": case.run("whole")}


# ---------------------------------------------------------------- watching, and its price


class Counted:
    """Counts the collectives that are called by name while the block runs."""

    NAMES = (
        "all_gather",
        "all_gather_object",
        "all_reduce",
        "broadcast",
        "broadcast_object_list",
        "barrier",
        "new_group",
    )

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> Counted:
        self._before = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self._before.items():
            setattr(dist, name, lambda *a, _n=name, _f=function, **k: self.calls.update([_n]) or _f(*a, **k))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._before.items():
            setattr(dist, name, function)


def watching(rank: int, folder: Path) -> dict[str, Any]:
    """The collectives of a plain run, of a watched one, and of a growing one that has nothing to grow."""
    calls, ends = {}, {}
    watch = growing(folder / "watched", policy="off", policy_options={}, probes={"interval_steps": 4})
    idle = growing(folder / "idle", governor={"check_interval_steps": 10}, probes={"decision_interval": 0.5})
    ask = Script({5: lambda *_: watch.germinate(WIDE, "widen", 4)})
    for name, callbacks in (("plain", []), ("watched", [watch, ask]), ("idle", [idle])):
        module = mlp()
        runner = trainer(folder / name, *callbacks, strategy="ddp", devices=2, max_steps=50, epochs=3)
        with Counted() as counted:
            fit(runner, module, DigitsData(batch_size=32))
        calls[name], ends[name] = dict(counted.calls), weights(module)
    return {"calls": calls, "ends": ends, "health": len(watch.health()), "summary": watch.summary()}


# ---------------------------------------------------------------- ranks that are not alike, and failures


def unlike(rank: int, folder: Path) -> dict[str, Any]:
    """Each rank has another idea of when gates are looked at."""
    callback = growing(folder, *EVENTS, lifecycle=QUICK | {"gate_interval_steps": 2 + rank})
    return {
        "error": _error(
            lambda: fit(trainer(folder, callback, strategy="ddp", devices=2), mlp(), DigitsData())
        )
    }


def failing_measurement(rank: int, folder: Path) -> dict[str, Any]:
    """Rank 1 cannot measure its held-out loss, some time into the run; both ranks live on."""
    module = mlp()
    inner = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        if not module.training and rank == 1 and module.trainer.global_step > 8:
            raise ValueError("no memory left to measure")
        return inner(batch, batch_idx)

    module.training_step = training_step
    callback = growing(folder, *EVENTS)
    runner = trainer(folder, callback, strategy="ddp", devices=2)
    return {
        "error": _error(lambda: fit(runner, module, DigitsData(batch_size=32))),
        "step": runner.global_step,
    }


def _error(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def manual(rank: int, folder: Path) -> dict[str, Any]:
    """Manual optimization: DDP prepares its backward in ``manual_backward``."""
    case = Case(folder, make=ByHand, options={"max_epochs": 2}, save=False)
    return {"whole": case.run("whole")}


class ByHand(ClassifierModule):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(MLPConfig(hidden=(16, 4, 12)), OptimConfig())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)


def everything(rank: int, folder: Path) -> dict[str, Any]:
    acts = (
        direct, isolated, drawing, scoring, halves, silent, manual, talk, bad_loss, bad_seed, watching, unlike,
        by_hand, failing_measurement,
    )  # fmt: skip
    return {act.__name__: act(rank, folder / act.__name__) for act in acts}


class Growable(GrowableMixin, ClassifierModule):
    """Loads what it is given, seeds and all."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(MLPConfig(hidden=(16, 4, 12)), OptimConfig())


def forked(rank: int, folder: Path) -> dict[str, Any]:
    """Lightning forks the processes from this one, as in a notebook, and loads the weights back into it."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK"):
        os.environ.pop(name, None)
    refused = _error(lambda: fit(_forking(folder / "refused"), mlp(), DigitsData()))
    module = Growable()
    saver = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, save_top_k=1)
    fit(_forking(folder, saver, enable_checkpointing=True), module, DigitsData(batch_size=32))
    saved = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return {"refused": refused, "weights": weights(module), "saved": saved, "seeds": len(all_seeds(module))}


def _forking(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return trainer(folder, growing(folder, *EVENTS), *callbacks, strategy="ddp_fork", devices=2, **options)


def talk_alone(rank: int, folder: Path) -> dict[str, Any]:
    dist.init_process_group("gloo")
    return talk(rank, folder)


def step_fails_on_rank_1(rank: int, folder: Path) -> None:
    _fail_in_the_host(rank, folder, 1)


def step_fails_on_rank_0(rank: int, folder: Path) -> None:
    _fail_in_the_host(rank, folder, 0)


def _fail_in_the_host(rank: int, folder: Path, failing: int) -> None:
    module = mlp()
    inner = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        if rank == failing and module.trainer.global_step == 13:
            raise ValueError("the data has run out of ink")
        return inner(batch, batch_idx)

    module.training_step = training_step
    runner = trainer(folder, growing(folder, *EVENTS), strategy="ddp", devices=2)
    fit(runner, module, DigitsData(batch_size=32))


def _at(folder: Path, step: int) -> Path:
    return folder / "whole" / f"step={step}.ckpt"
