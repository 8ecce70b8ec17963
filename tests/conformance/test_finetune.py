"""Fine-tuning: seeds as adapters on a frozen encoder, in Lightning, with checkpoints, mixed precision and export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import (
    QUICK,
    assert_registered,
    decisions,
    differing,
    fit,
    growing,
    trainer,
    transitions,
    weights,
)

pytest.importorskip("transformers", reason="the encoder comes with esper[finetune]")

from tiny_encoder import write_clinc, write_encoder

from esper import attach, export, load
from esper.callbacks import TamiyoCallback
from esper.errors import MissingExtraError
from esper.hosts import ClassifierModule, ClincData, Encoder, EncoderConfig, OptimConfig
from esper.hosts.pretrained import MINILM, find_pretrained
from esper.kasmina.export import export_with_report
from esper.report.summary import ArmSummary
from esper.report.table import comparison_markdown, comparison_text

HEAD = 16 * 150 + 150
ADAPTERS = 2 * 2 * 2 * (16 + 16)
"""Rank 2 beside query and value of two layers of width 16."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finetune")
    write_encoder(root / "encoder")
    write_clinc(root)
    return root


@pytest.fixture
def data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ClincData:
    monkeypatch.setenv("ESPER_DATA_DIR", str(folder))
    return fresh(folder)


def fresh(folder: Path) -> ClincData:
    return ClincData(
        weights=str(folder / "encoder"), max_length=8, batch_size=45, eval_batch_size=50, seed=3
    )  # ten steps an epoch


def encoder(folder: Path, **optim: Any) -> ClassifierModule:
    torch.manual_seed(0)
    config = EncoderConfig(weights=str(folder / "encoder"), max_length=8)
    return ClassifierModule(config, OptimConfig(**({"lr": 0.02, "weight_decay": 0.1} | optim)))


def adapting(
    journal: Path, *, layers: tuple[str, ...] = ("query", "value"), **settings: Any
) -> TamiyoCallback:
    given: dict[str, Any] = {
        "policy": "uniform",
        "policy_options": {"layers": layers},
        "lifecycle": QUICK | {"judged": "together"},
        "budget": {"max_parameters_ratio": 1.0 + (ADAPTERS + 9) / HEAD, "site_cooldown_steps": 0},
    }
    return growing(journal, **(given | settings))


def test_seeds_are_the_trainable_part_and_the_encoder_stays_as_it_was(
    folder: Path, data: ClincData, tmp_path: Path
) -> None:
    module, callback = encoder(folder), adapting(tmp_path)
    before = weights(module.host.bert)
    runner = trainer(tmp_path, callback, epochs=2)
    fit(runner, module, data)
    seeds = callback.body.seeds
    assert [(seed.blueprint, seed.size, seed.stage) for seed in seeds] == [("lowrank", 2, "fossilized")] * 4
    assert callback.summary()["trainable_parameters"] == HEAD + ADAPTERS
    assert callback.summary()["num_parameters"] == module.host.num_parameters
    assert_registered(runner, module)
    after = weights(module.host.bert)
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert all(float(seed.branch.B.weight.detach().abs().sum()) > 0 for seed in seeds)
    # Matrices decay and biases do not, as with the layers that are trained.
    decays, plain = runner.optimizers[0].param_groups
    assert {id(p) for seed in seeds for p in seed.parameters()} <= {id(p) for p in decays["params"]}
    assert [p.shape for p in plain["params"]] == [(150,)]
    assert {t.reason for t in transitions(tmp_path) if t.target == "fossilized"} != set()


def test_adapters_learn_what_the_head_alone_does_not(folder: Path, data: ClincData, tmp_path: Path) -> None:
    losses = {}
    for name, callback in (("adapted", adapting(tmp_path / "a")), ("probe", None)):
        module = encoder(folder, schedule="constant")
        runner = trainer(tmp_path / name, *([callback] if callback else []), epochs=6)
        fit(runner, module, fresh(folder))
        losses[name] = float(runner.callback_metrics["train_loss"])
    assert losses["adapted"] < losses["probe"] - 0.05


def test_a_run_resumed_across_the_birth_of_adapters_is_the_same_bit_for_bit(
    folder: Path, data: ClincData, tmp_path: Path
) -> None:
    options = {"policy_options": {"layers": ["query", "value"], "num_events": 2, "end": 0.4}}
    whole, part, rest = (encoder(folder) for _ in range(3))
    straight = trainer(tmp_path / "whole", adapting(tmp_path / "whole", **options), max_steps=26, epochs=-1)
    fit(straight, whole, fresh(folder))
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    settings = {"max_steps": 26, "epochs": -1, "enable_checkpointing": True}
    first = trainer(tmp_path / "part", adapting(tmp_path / "part", **options), saving, **settings)
    fit(first, part, fresh(folder))
    stop = tmp_path / "step=5.ckpt"
    second = trainer(tmp_path / "rest", adapting(tmp_path / "rest", **options), max_steps=26, epochs=-1)
    fit(second, rest, fresh(folder), ckpt_path=stop, weights_only=True)
    assert len(decisions(tmp_path / "whole", "germinate")) == 8
    assert (
        0 < len(decisions(tmp_path / "rest", "germinate")) < 8
    )  # the second event came after the checkpoint
    assert differing(weights(whole), weights(rest)) == []
    assert_registered(second, rest)
    states = [runner.optimizers[0].state_dict()["state"] for runner in (straight, second)]
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert torch.equal(states[0][key]["exp_avg_sq"], states[1][key]["exp_avg_sq"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_adapters_are_merged_on_export(folder: Path, data: ClincData, tmp_path: Path, precision: str) -> None:
    module, callback = encoder(folder), adapting(tmp_path)
    fit(trainer(tmp_path, callback, precision=precision), module, data)
    module.float().eval()
    ids = data.splits.test[torch.arange(60)][0]
    plain, report = export_with_report(module.host, ids[:2])
    assert report.folded == ("s1", "s2", "s3", "s4")
    assert report.branches == ()
    with torch.no_grad():
        grown, merged = module.host(ids), plain(ids)
    assert float((grown - merged).abs().max()) <= 1e-5 * max(1.0, float(grown.abs().max()))
    kept = callback.body.seeds[0].branch.B.weight.detach().float().abs().max()
    assert float(kept) > 1e-4  # what was merged is not nothing


def test_the_encoder_itself_comes_out_as_its_own_class(folder: Path, data: ClincData, tmp_path: Path) -> None:
    module = encoder(folder)
    fit(trainer(tmp_path, adapting(tmp_path)), module, data)
    module.eval()
    ids = data.splits.test[torch.arange(8)][0]
    example = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    plain = export(module.host.bert, example)
    assert type(plain).__module__.startswith("transformers.")
    assert set(plain.state_dict()) == set(encoder(folder).host.bert.state_dict())
    with torch.no_grad():
        gap = (plain(**example).last_hidden_state - module.host.bert(**example).last_hidden_state).abs().max()
    assert float(gap) <= 1e-5


def test_a_checkpoint_of_adapters_loads_into_a_fresh_encoder(
    folder: Path, data: ClincData, tmp_path: Path
) -> None:
    module, callback = encoder(folder), adapting(tmp_path)
    runner = trainer(tmp_path, callback)
    fit(runner, module, data)
    runner.save_checkpoint(tmp_path / "adapted.ckpt")
    loaded = encoder(folder)
    load(loaded, tmp_path / "adapted.ckpt")
    ids = data.splits.test[torch.arange(20)][0]
    assert torch.equal(loaded.eval()(ids), module.eval()(ids))
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in module.named_parameters() if p.requires_grad}


def test_scores_and_widening_work_on_a_frozen_encoder(folder: Path, data: ClincData, tmp_path: Path) -> None:
    module = encoder(folder)
    callback = adapting(
        tmp_path,
        policy="expressivity",
        policy_options={
            "num_events": 1, "start": 0.1, "min_z": 0.0, "min_share": 0.0, "min_tokens_per_parameter": 0.0,
            "recycle_above": 1.0, "min_size": 4,
        },
        budget={"max_parameters_ratio": 1.1, "site_cooldown_steps": 0, "max_scoring_fraction": 1.0},
    )  # fmt: skip
    runner = trainer(tmp_path, callback, epochs=2)
    fit(runner, module, data)
    scored = [
        key for record in decisions(tmp_path) for key in record.decision.numbers if key.startswith("score:")
    ]
    assert scored  # a frozen layer has a gradient at its output when it is asked for
    assert all(p.grad is None for p in module.host.bert.parameters() if not p.requires_grad)


def test_tables_tell_what_is_trained_from_all() -> None:
    adapted = ArmSummary(name="growth", policy="uniform", parameters=22_659_990, trainable_parameters=94_614)
    whole = ArmSummary(name="host", parameters=57_750, trainable_parameters=57_750)
    table = comparison_text([adapted, whole])
    assert "94,614" in table
    assert "of 22,659,990" in table
    assert "parameters: trained, of all" in table
    assert "| 94,614 of 22,659,990 |" in comparison_markdown([adapted, whole])
    assert "trained, of all" not in comparison_text([whole])


@pytest.mark.skipif(not os.environ.get("ESPER_DATA_DIR"), reason="reads CLINC150 from ESPER_DATA_DIR")
def test_minilm_carries_adapters_and_gives_them_back_merged() -> None:
    try:
        find_pretrained(MINILM, "model.safetensors")
    except MissingExtraError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    host = Encoder(EncoderConfig()).eval()
    ids = torch.randint(1000, 2000, (3, 9))
    with torch.no_grad():
        before = host(ids)
    body = attach(host, ids)
    assert torch.equal(host(ids), before)
    places = [site.name for site in body.sites if site.kind == "parallel" and "lowrank" in site.blueprints]
    assert len(places) == 36 + 1  # every Linear of six layers, and the head
    ends = ("layer.0.attention.self.query", "layer.5.output.dense")
    seeds = [body.germinate(name, "lowrank", 4) for name in places if name.endswith(ends)]
    assert torch.equal(host(ids), before)
    for seed in seeds:
        torch.nn.init.normal_(seed.branch.B.weight, std=0.02)
        for _ in range(3):
            seed.advance()
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain, report = export_with_report(host.bert, example)
    assert len(report.folded) == 2
    with torch.no_grad():
        grown, merged = (model(**example).last_hidden_state for model in (host.bert, plain))
    assert float((host(ids) - before).detach().abs().max()) > 1e-3
    assert float((grown - merged).abs().max()) <= 1e-5 * max(1.0, float(grown.abs().max()))
