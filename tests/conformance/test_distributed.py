"""Growth in two real processes under DDP (gloo): the ranks stay one model, decide as one, and fail as one.

What the processes do stands in :mod:`ddp_runs`. They are started once for all that ends well.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import ddp_runs
import pytest
import torch
from launching import Ended, launch_all
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from runs import (
    decisions,
    fit,
    growing,
    interventions,
    journal,
    mlp,
    plain_lines,
    stages,
    trainer,
    transitions,
)
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

from esper.callbacks import TamiyoCallback
from esper.callbacks.strategies import strategy_conflicts
from esper.errors import UnsupportedError
from esper.hosts import DigitsData
from esper.messages import RunRecord
from esper.tamiyo.ranks import Ranks, mean_of

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def launched(everywhere: Path) -> dict[str, list[Ended]]:
    """Every launch of this file, side by side."""
    alone = [ddp_runs.forked]
    pairs = [ddp_runs.everything, ddp_runs.step_fails_on_rank_0, ddp_runs.step_fails_on_rank_1]
    jobs = [(act, everywhere / act.__name__, 1 if act in alone else 2) for act in (*pairs, *alone)]
    ended = launch_all(jobs, timeout_s=200)
    return {act.__name__: group for (act, _, _), group in zip(jobs, ended, strict=True)}


@pytest.fixture(scope="module")
def ranks(launched: dict[str, list[Ended]]) -> list[dict[str, Any]]:
    """What the two processes of ``everything`` brought back."""
    for rank, ended in enumerate(launched["everything"]):
        assert not ended.error, f"rank {rank}: {ended.error}"
    return [ended.result for ended in launched["everything"]]


def unlike(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two results differ in a bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [p for key in a.keys() | b.keys() for p in unlike(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [p for i, (x, y) in enumerate(zip(a, b, strict=True)) for p in unlike(x, y, f"{path}/{i}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    return [] if repr(a) == repr(b) else [path]


@pytest.mark.parametrize(
    "case", ["direct", "isolated", "drawing", "scoring", "silent", "manual", "bad_loss", "bad_seed"]
)
def test_ranks_are_bit_for_bit_alike_after_growth(case, ranks):
    first, second = ({**of[case]["whole"], "heard": 0} for of in ranks)
    # Measurements that count are alike too: they stand in the seeds' records, among the weights.
    own = ["gradient_norm", "output_ratio"] if case == "isolated" else []
    assert unlike(_told(first, own), _told(second, own)) == []


def _told(found: dict[str, Any], own: list[str]) -> dict[str, Any]:
    """Without what only rank 0 samples, where it has been sampled since the ranks last told each other."""
    return {
        **found,
        "weights": {k: v for k, v in found["weights"].items() if not (own and "_extra_state" in k)},
    }


@pytest.mark.parametrize(("case", "steps"), [("direct", (15, 21)), ("isolated", (8, 16))])
def test_a_run_of_two_processes_resumes_bit_for_bit(case, steps, ranks, everywhere):
    folder = everywhere / "everything" / case
    for step in steps:
        for of in ranks:
            whole, resumed = ({**of[case][name], "heard": 0} for name in ("whole", f"from{step}"))
            assert unlike(whole, resumed) == []
        lines = [line for line in plain_lines(folder / "whole") if line["step"] > step]
        assert [line for line in plain_lines(folder / f"from{step}") if line["step"] > step] == lines


def test_what_grew_went_through_every_stage(everywhere, ranks):
    folder = everywhere / "everything"
    assert stages(folder / "direct" / "whole", "s1")[-1] == "fossilized"
    assert stages(folder / "isolated" / "whole", "s1") == [
        "dormant", "germinated", "training", "blending", "holding", "fossilized",
    ]  # fmt: skip
    assert ranks[0]["drawing"]["whole"]["summary"]["seeds_germinated"] == 4
    assert ranks[0]["scoring"]["whole"]["summary"]["scoring_flops"] > 0
    assert set(ranks[0]["manual"]["whole"]["stages"].values()) == {"fossilized"}


def test_requests_of_rank_0_count_at_the_next_common_step_and_no_others(everywhere):
    folder = everywhere / "everything" / "direct" / "whole"
    asked = [
        (r.step, r.decision.action, r.decision.site, r.applied)
        for r in decisions(folder)
        if r.decision.policy == "manual"
    ]
    assert asked == [(16, "cull", "s3", True), (22, "recycle", "host.layers.0", True)]
    assert [r.decision.numbers["units_recycled"] for r in decisions(folder, "recycle")] == [3.0]


def test_two_processes_on_half_batches_train_like_one_on_whole_ones(ranks, tmp_path):
    callback = growing(tmp_path, *ddp_runs.EVENTS)
    module = mlp(**ddp_runs.SGD)
    fit(trainer(tmp_path, callback), module, DigitsData(batch_size=64))
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ranks[0]["halves"]["weights"][name], value, rtol=1e-4, atol=1e-5)
    alone, both = callback.summary(), ranks[0]["halves"]["summary"]
    padded = both["num_samples"] / alone["num_samples"]  # the last batch of an epoch is filled up
    assert 1 <= padded < 1.001
    assert both["training_flops"] - both["measuring_flops"] == pytest.approx(
        padded * (alone["training_flops"] - alone["measuring_flops"]), rel=1e-3
    )
    assert both["measuring_flops"] == 2 * alone["measuring_flops"]  # each process measures for itself


def test_ddp_is_wrapped_once_a_change_and_the_old_wrapper_goes(ranks):
    for of in ranks:
        assert (of["halves"]["wrapped"], of["halves"]["alive"]) == (4, 1)  # three seeds, and the host alone


def test_ddp_does_not_wait_for_a_seed_without_gradients(ranks):
    assert ranks[0]["silent"]["stages"] == ["germinated", "holding"]


def test_records_are_rank_0s_alone(ranks, everywhere):
    for case in ("direct", "isolated", "drawing"):
        assert ranks[0][case]["whole"]["heard"] > 0
        assert ranks[1][case]["whole"]["heard"] == 0
    marks = [
        e.event for e in journal(everywhere / "everything" / "direct" / "whole") if isinstance(e, RunRecord)
    ]
    assert marks.count("start") == marks.count("end") == 1
    assert ranks[0]["watching"]["health"] > 0
    assert ranks[1]["watching"]["health"] == 0


def test_a_bad_loss_on_another_rank_is_everybodys(everywhere):
    (cull,) = interventions(everywhere / "everything" / "bad_loss" / "whole")
    assert (cull.action, cull.step) == ("cull", 16)
    assert "loss is nan" in cull.reason


def test_values_that_went_wrong_on_another_rank_open_the_gate_to_a_cull(everywhere):
    moves = transitions(everywhere / "everything" / "bad_seed" / "whole", "s1")
    culled = next(t for t in moves if t.target == "culled")
    assert culled.step == 12
    assert culled.measurements["non_finite"] == 3


def test_watching_has_no_collective_of_its_own_and_growth_none_at_ordinary_steps(ranks):
    for of in ranks:
        calls = of["watching"]["calls"]
        assert calls["watched"] == calls["plain"]
        # 50 steps: the first, five checks and two decision points.
        assert calls["idle"]["all_gather"] - calls["plain"]["all_gather"] <= 20
        assert unlike(of["watching"]["ends"]["watched"], of["watching"]["ends"]["plain"]) == []
        assert (
            of["watching"]["summary"]["num_samples"] == 50 * 64 - 20
        )  # of both processes, two batches short


def test_a_watched_run_of_several_processes_grows_nothing_by_hand(everywhere):
    (asked,) = decisions(everywhere / "everything" / "watching" / "watched", "germinate")
    assert not asked.applied
    assert "do not talk to each other" in asked.refused


def test_the_ranks_talk(ranks):
    first, second = (of["talk"] for of in ranks)
    assert first["exchange"][1] == {
        "rank": 1,
        "long": "x" * 3000,
        "none": None,
        "nan": first["exchange"][1]["nan"],
    }
    assert first["first"] == second["first"] == 10
    assert first["measure"] == second["measure"] == [1.5, 4.0, None, float("inf")]
    assert first["gather"].dtype == torch.bfloat16
    assert first["gather"].tolist() == second["gather"].tolist() == [[0, 1], [2, 3], [0, 1], [2, 3], [4, 5]]
    assert first["objection"] == second["objection"] == "too late (rank 1)"
    assert first["silence"] == second["silence"] == ""
    assert first["refused"] == second["refused"] == "GrowthError: not here (rank 1)"
    assert first["afterwards"] == second["afterwards"] == 0
    assert first["apart"].startswith("RankError: all ranks should be at the same point of the run")


def test_one_policy_decides_for_all_and_all_measure_for_it(ranks):
    first, second = (of["talk"] for of in ranks)
    assert (first["asked"], second["asked"]) == ([0.0], [])
    assert first["decided"] == second["decided"] == ["0.0, 0.5, GrowthError: not here (rank 1)"]
    assert torch.equal(first["drawn"], second["drawn"])


def test_one_process_agrees_with_itself():
    ranks = Ranks()
    rows = torch.ones(2, 3)
    assert ranks.gather(rows) is rows
    assert ranks.measure("figures", lambda: (1.0, None)) == [1.0, None]
    assert ranks.objection("a reason", "too late") == "too late"
    assert mean_of([[1e16, 1.0], [1.0, None], [-1e16, 3.0]]) == [1 / 3, 2.0]


def test_ranks_with_different_settings_stop_before_they_grow(ranks):
    for of in ranks:
        assert "rank 0 and rank 1 differ in lifecycle" in of["unlike"]["error"]


def test_growth_past_the_callback_is_refused(ranks):
    for of in ranks:
        assert "ask for it by germinate(...)" in of["by_hand"]["error"]


def test_a_measurement_that_fails_on_one_rank_stops_all_with_its_reason(ranks):
    assert ranks[1]["failing_measurement"]["error"] == "ValueError: no memory left to measure"
    assert ranks[0]["failing_measurement"]["error"] == (
        "RankError: rank 1 failed, so all ranks stop: ValueError: no memory left to measure"
    )
    assert ranks[0]["failing_measurement"]["step"] == ranks[1]["failing_measurement"]["step"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_step_that_fails_on_one_rank_ends_all_with_its_reason(failing, launched):
    ended = launched[f"step_fails_on_rank_{failing}"]
    assert [e.exit_code for e in ended] == [1, 1]  # neither hung until it was killed
    assert ended[failing].error.endswith("ValueError: the data has run out of ink\n")
    assert f"rank {failing} failed first: ValueError: the data has run out of ink" in ended[1 - failing].error


def test_forked_processes_need_a_module_that_takes_its_seeds_back(launched):
    (ended,) = launched["forked"]
    assert not ended.error, ended.error
    assert (
        "would drop its seeds without a word; class ClassifierModule(esper.GrowableMixin, ...)"
        in ended.result["refused"]
    )
    assert ended.result["seeds"] == 3
    assert unlike(ended.result["weights"], ended.result["saved"]) == []


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (
            DDPStrategy(ddp_comm_state=PowerSGDState(None)),
            "remembers gradients by their place in DDP's buckets",
        ),
        (DDPStrategy(start_method="spawn"), "would drop its seeds"),
        (
            ModelParallelStrategy(),
            "a seed that comes later would not be sharded with them; use strategy='ddp'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_out(strategy, reason, tmp_path):
    runner = trainer(tmp_path, strategy=strategy, devices=2)
    (conflict,) = strategy_conflicts(runner, mlp())
    assert reason in "; ".join(conflict)


def test_sharded_layers_cannot_be_watched_either(tmp_path):
    runner = trainer(tmp_path, strategy=ModelParallelStrategy(), devices=2)
    callback = growing(tmp_path, policy="off", policy_options={})
    with pytest.raises(
        UnsupportedError, match=r"ModelParallelStrategy: it gives each process a part.*leave the"
    ):
        callback.setup(runner, mlp(), "fit")


def test_the_callback_can_be_sent_to_spawned_processes():
    assert pickle.loads(pickle.dumps(TamiyoCallback(bus=None))).config.bus is None
