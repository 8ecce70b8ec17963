"""Through the callback: a real Lightning run leaves every decision with its outcome in the store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import STEPS_AN_EPOCH, decisions, fit, growing, journal, mlp, trainer

from esper.errors import DataFormatError
from esper.messages import RunRecord
from esper.tamiyo.experience import Experience, ExperienceStore
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.network.weights import save_network

WIDE = "bypass:host.layers.0->host.layers.1"
SETTINGS = {"probes": {"decision_interval": 0.06, "interval_steps": 4}}


def kept(path: Path) -> list[Experience]:
    with ExperienceStore(path, readonly=True) as store:
        store.check()
        return list(store.iterate())


def test_every_decision_stands_in_the_store_with_its_outcome(tmp_path):
    path = tmp_path / "experiences.sqlite"
    callback = growing(tmp_path, (0.6, WIDE, "widen", 8), experience=str(path), **SETTINGS)
    runner = trainer(tmp_path, callback, epochs=2)
    fit(runner, mlp(hidden=(16, 4)))
    found = kept(path)
    told = decisions(tmp_path)
    assert [e.decision.point.run.step for e in found] == sorted({d.step for d in told})
    assert {e.decision.run_id for e in found} == {callback.run_id}
    by_action = {
        action: [e for e in found if e.decision.candidate.action == action] for action in ("wait", "grow")
    }
    assert (len(by_action["wait"]), len(by_action["grow"])) == (len(found) - 1, 1)
    (grow,) = by_action["grow"]
    assert grow.seed_ids == ("s1",)
    assert all(e.outcome is not None for e in found)
    assert grow.outcome is not None
    assert grow.outcome.measured.held_out
    assert grow.outcome.reward is not None
    assert grow.outcome.reward.provenance.startswith("fitted ± ")
    assert grow.decision.point.signals
    start = next(e for e in journal(tmp_path) if isinstance(e, RunRecord) and e.event == "start")
    assert start.info["experience"] == str(path)


def test_a_resumed_run_records_what_an_uninterrupted_one_does(tmp_path):
    def run(folder: Path, epochs: int, checkpoint: Path | None = None) -> str:
        callback = growing(folder, (0.6, WIDE, "widen", 8), experience=str(folder / "store"), **SETTINGS)
        saving = ModelCheckpoint(
            dirpath=folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )
        runner = trainer(folder, callback, saving, epochs=epochs, enable_checkpointing=True)
        fit(runner, mlp(hidden=(16, 4)), ckpt_path=checkpoint, weights_only=True)
        return callback.run_id

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        run(folder, epochs=2)
    before = kept(broken / "store")
    run(broken, epochs=2, checkpoint=broken / "epoch=0.ckpt")  # as if it had been killed in the second epoch
    after = kept(broken / "store")

    def told(experiences: list[Experience]) -> list[tuple[object, ...]]:
        return [
            (
                e.decision.point.run.step, e.decision.candidate, e.decision.point.run.held_out_loss, e.seed_ids,
                e.outcome and e.outcome.reward and round(e.outcome.reward.utility, 9),
            )
            for e in experiences
        ]  # fmt: skip

    assert told(after) == told(kept(whole / "store")) == told(before)
    assert after[0].number == before[0].number
    assert after[-1].number > before[-1].number  # written anew
    assert any(e.decision.point.run.step > STEPS_AN_EPOCH for e in after)


def test_the_learned_policy_is_recorded_with_what_it_knew(tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "policy.safetensors"
    network = TamiyoNetwork(PolicyConfig(hidden_dim=16, num_gnn_layers=1, num_attention_heads=2))
    save_network(network, weights, card="untrained, for a test")
    path = tmp_path / "store"
    callback = growing(
        tmp_path, policy="tamiyo", experience=str(path),
        policy_options={"weights": str(weights), "price": 0.1, "uncertainty_threshold": 1.0,
                        "adaptation_confidence_threshold": 0.5, "safety_margin": 0.0},
        **SETTINGS,
    )  # fmt: skip
    fit(trainer(tmp_path, callback, epochs=1), mlp(hidden=(16, 4)))
    found = kept(path)
    assert [e.decision.point.run.step for e in found] == sorted({d.step for d in decisions(tmp_path)})
    asked = [e for e in found if e.decision.uncertainty is not None]
    assert asked
    assert {e.decision.point.run.price for e in asked} == {0.1}
    for e in asked:
        step = e.decision.point.run.step
        told = [d.decision for d in decisions(tmp_path) if d.step == step]
        assert e.decision.confidence == told[0].confidence
        assert (e.decision.candidate.action == "wait") == (told[0].action == "wait")


def test_a_file_that_is_no_store_is_refused_before_anything_is_trained(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("to do: train\n" * 400)
    module = mlp()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(DataFormatError, match=r"notes.txt: expected an experience store"):
        fit(trainer(tmp_path, growing(tmp_path, experience=str(path)), epochs=1), module)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert path.read_text().startswith("to do")


def test_nothing_is_kept_of_a_run_that_only_watches(tmp_path):
    path = tmp_path / "store"
    fit(
        trainer(tmp_path, growing(tmp_path, policy="off", policy_options={}, experience=str(path)), epochs=1),
        mlp(),
    )
    assert not path.exists()
