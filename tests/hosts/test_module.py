"""The LightningModules: what they log and optimise, and runs that resume bit for bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from esper.errors import ConfigError
from esper.hosts import (
    ClassifierModule,
    CNNConfig,
    DigitsData,
    GPTConfig,
    LanguageModule,
    MLPConfig,
    OptimConfig,
    ShakespeareData,
)
from esper.hosts.optim import build_optimizer, warmup_cosine


def make_trainer(folder: Path, max_epochs: int = 2, **kwargs) -> L.Trainer:
    kwargs = {"callbacks": [], "enable_checkpointing": False, "num_sanity_val_steps": 0, **kwargs}
    return L.Trainer(
        max_epochs=max_epochs,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


# A resumed run saves into the folder it resumes from, as a user's would; Lightning remarks on that.
resumes = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class SeenBatches(L.Callback):
    """Record the labels of every training batch."""

    def __init__(self) -> None:
        self.labels: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.labels.append(batch[1].clone())


def assert_equal_states(first: L.Trainer, second: L.Trainer) -> None:
    states = [trainer.lightning_module.state_dict() for trainer in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    moments = [trainer.optimizers[0].state_dict()["state"] for trainer in (first, second)]
    for index, state in moments[0].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments[1][index][key])), (index, key)
    assert first.global_step == second.global_step
    assert first.callback_metrics.keys() == second.callback_metrics.keys()
    for key, value in first.callback_metrics.items():
        assert torch.equal(value, second.callback_metrics[key]), key


OPTIMS = {
    "adamw_cosine": OptimConfig(lr=0.01, weight_decay=0.1),
    "sgd_constant": OptimConfig(optimizer="sgd", lr=0.05, schedule="constant"),
}
# 1078 digits in batches of 200: 6 steps an epoch, 18 in all
SAVED_STEPS = {"early": 2, "end_of_first_epoch": 6, "in_second_epoch": 9, "before_the_last": 17}


@resumes
@pytest.mark.parametrize("step", SAVED_STEPS.values(), ids=SAVED_STEPS.keys())
@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS.keys())
def test_resume_equals_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, optim: OptimConfig, step: int
) -> None:
    def fit(ckpt_path: Path | None) -> tuple[L.Trainer, SeenBatches]:
        L.seed_everything(0 if ckpt_path is None else 99, verbose=False)
        seen = SeenBatches()
        saver = ModelCheckpoint(
            tmp_path / "saved",
            filename="{step}",
            every_n_train_steps=1,
            save_top_k=-1,
            save_on_train_epoch_end=False,
        )
        trainer = make_trainer(
            tmp_path,
            3,
            enable_checkpointing=True,
            callbacks=[seen, saver],
        )
        module = ClassifierModule(MLPConfig(), optim)
        trainer.fit(module, datamodule=DigitsData(batch_size=200), ckpt_path=ckpt_path, weights_only=True)
        return trainer, seen

    whole, whole_seen = fit(None)
    resumed, resumed_seen = fit(tmp_path / "saved" / f"step={step}.ckpt")

    assert len(whole_seen.labels) == 18
    assert len(resumed_seen.labels) == 18 - step
    for expected, got in zip(whole_seen.labels[step:], resumed_seen.labels, strict=True):
        assert torch.equal(expected, got)
    assert_equal_states(whole, resumed)


@resumes
def test_resume_in_mid_epoch_with_max_steps_and_validation_inside_the_epoch(tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None) -> L.Trainer:
        L.seed_everything(0 if ckpt_path is None else 99, verbose=False)
        saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", monitor="val_loss", save_top_k=-1)
        trainer = make_trainer(
            tmp_path,
            -1,
            max_steps=20,
            val_check_interval=4,
            enable_checkpointing=True,
            callbacks=[saver],
        )
        module = ClassifierModule(CNNConfig(widths=(4,), strides=(2,)), OptimConfig())
        data = DigitsData(batch_size=100, images=True)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    whole = fit(None)
    assert_equal_states(whole, fit(tmp_path / "saved" / "step=15.ckpt"))


@resumes
@pytest.mark.parametrize("monitor", [None, "val_loss"], ids=["at_epoch_end", "after_validation"])
def test_resume_at_an_epoch_boundary(tmp_path: Path, monitor: str | None) -> None:
    def fit(ckpt_path: Path | None) -> L.Trainer:
        L.seed_everything(0 if ckpt_path is None else 99, verbose=False)
        saver = ModelCheckpoint(
            tmp_path / "saved",
            filename="{epoch}",
            monitor=monitor,
            save_top_k=-1,
            save_on_train_epoch_end=monitor is None,
        )
        trainer = make_trainer(tmp_path, 3, enable_checkpointing=True, callbacks=[saver])
        module = ClassifierModule(MLPConfig(), OptimConfig())
        data = DigitsData(batch_size=200)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    whole = fit(None)
    assert_equal_states(whole, fit(tmp_path / "saved" / "epoch=1.ckpt"))


@resumes
def test_language_model_resumes_in_mid_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("to be or not to be " * 100)
    monkeypatch.setenv("ESPER_DATA_DIR", str(tmp_path))
    config = GPTConfig(vocab_size=9, context=8, d_model=8, depth=1, num_heads=2, mlp_ratio=1.0)

    def fit(ckpt_path: Path | None) -> L.Trainer:
        L.seed_everything(0 if ckpt_path is None else 99, verbose=False)
        saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(tmp_path, enable_checkpointing=True, callbacks=[saver])
        data = ShakespeareData(batch_size=4, context=8, tokens_per_epoch=256)
        module = LanguageModule(config, OptimConfig())
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    whole = fit(None)
    assert set(whole.callback_metrics) == {"train_loss", "train_acc", "val_loss", "val_acc"}
    assert_equal_states(whole, fit(tmp_path / "saved" / "step=12.ckpt"))


def test_testing_a_checkpoint_does_not_shorten_a_later_run(tmp_path: Path) -> None:
    data = DigitsData(batch_size=200)
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = make_trainer(tmp_path, 1, enable_checkpointing=True, callbacks=[saver])
    module = ClassifierModule(MLPConfig(), OptimConfig())
    trainer.fit(module, datamodule=data)
    path = tmp_path / "saved" / "step=2.ckpt"
    trainer.test(module, datamodule=data, ckpt_path=path, verbose=False, weights_only=True)
    seen = SeenBatches()
    make_trainer(tmp_path, 1, callbacks=[seen]).fit(module, datamodule=data)
    assert len(seen.labels) == 6


def test_runs_on_one_data_module_see_the_same_batches(tmp_path: Path) -> None:
    data = DigitsData(batch_size=200)
    records = []
    for hidden in ((4,), (9, 9)):
        seen = SeenBatches()
        trainer = make_trainer(tmp_path, callbacks=[seen])
        trainer.fit(ClassifierModule(MLPConfig(hidden=hidden), OptimConfig()), datamodule=data)
        records.append(torch.cat(seen.labels))
    assert torch.equal(records[0], records[1])


def test_overfitting_takes_the_same_batches_every_epoch(tmp_path: Path) -> None:
    seen = SeenBatches()
    trainer = make_trainer(tmp_path, callbacks=[seen], overfit_batches=2)
    trainer.fit(ClassifierModule(MLPConfig(), OptimConfig()), datamodule=DigitsData())
    assert len(seen.labels) == 4
    assert torch.equal(seen.labels[0], seen.labels[2])


def test_metrics_match_a_pass_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = DigitsData(eval_batch_size=100)
    module = ClassifierModule(MLPConfig(), OptimConfig())
    figures = make_trainer(tmp_path).test(module, datamodule=data, verbose=False)[0]
    x, labels = data.splits.test[:]
    with torch.no_grad():
        logits = module(x)
    assert figures["test_loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5
    )
    assert figures["test_acc"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()), rel=1e-6)


def test_module_is_rebuilt_from_a_weights_only_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1, limit_train_batches=1, limit_val_batches=0)
    config = MLPConfig(hidden=(7, 3), activation="tanh")
    module = ClassifierModule(config, OptimConfig(lr=0.5, betas=(0.8, 0.9)))
    trainer.fit(module, datamodule=DigitsData())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = ClassifierModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert loaded.host_config == config
    assert loaded.optim_config == module.optim_config
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), module(x))


def test_every_parameter_is_in_exactly_one_group_and_only_matrices_decay() -> None:
    module = LanguageModule(GPTConfig(depth=1, tied=True), OptimConfig(weight_decay=0.3))
    optimizer = build_optimizer(module, module.optim_config)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert {p.ndim for p in optimizer.param_groups[0]["params"]} == {2}
    assert {p.ndim for p in optimizer.param_groups[1]["params"]} == {1}


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_each_optimizer_lowers_the_loss(name: str) -> None:
    torch.manual_seed(0)
    module = ClassifierModule(MLPConfig(hidden=(16,)), OptimConfig(optimizer=name, lr=0.01))
    optimizer = build_optimizer(module, module.optim_config)
    x, labels = DigitsData().splits.train[:256]
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(module(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_warmup_cosine_rises_and_falls() -> None:
    factors = [warmup_cosine(s, num_steps=100, warmup_steps=9, final_fraction=0.1) for s in range(121)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert factors[100] == factors[120] == pytest.approx(0.1)
    assert all(a < b for a, b in pairwise(factors[:10]))
    assert all(a > b for a, b in pairwise(factors[9:101]))


def test_schedule_spans_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 2, limit_val_batches=0)
    module = ClassifierModule(MLPConfig(), OptimConfig(lr=0.2, final_lr_fraction=0.25))
    trainer.fit(module, datamodule=DigitsData(batch_size=400))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_schedule_refuses_a_run_without_end(tmp_path: Path) -> None:
    module = ClassifierModule(MLPConfig(), OptimConfig())
    with pytest.raises(ConfigError, match="needs a run of known length"):
        make_trainer(tmp_path, -1).fit(module, datamodule=DigitsData())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "lbfgs"}, "optimizer must be one of .* got 'lbfgs'"),
        ({"schedule": "linear"}, "schedule must be one of .* got 'linear'"),
        ({"lr": 0.0}, r"lr must be above 0, got 0\.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction must lie in \[0, 1\]"),
    ],
)
def test_optim_errors_say_what_was_expected(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**values)
