"""The overhead benchmark takes turns and reports ratios; the targets themselves need a quiet machine."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from esper.bench import overhead
from esper.bench._overhead_arms import ARMS, make_fit, quiet
from esper.bench._turns import Turn, time_in_turns
from esper.errors import ConfigError


def test_a_short_run_gives_flat_finite_figures() -> None:
    figures = overhead.run(hosts=("mlp",), num_blocks=2, block_steps=20, memory_repeats=0, wandb=False)
    assert json.loads(json.dumps(figures)) == figures
    assert figures["mlp_step_us"] > 0
    for name in ("ratio", "watching_ratio", "probes_off_ratio", "empty_ratio", "again_ratio"):
        assert 0.3 < figures[f"mlp_{name}"] < 3
        assert figures[f"mlp_{name}_low"] <= figures[f"mlp_{name}_high"]


def test_only_one_run_is_awake_at_a_time_and_each_gets_its_blocks() -> None:
    quiet()
    order: list[str] = []

    def noted(arm: str) -> Any:
        fit = make_fit("mlp", ARMS[arm])

        def start(turn: Turn) -> None:
            original = turn.on_train_batch_start

            def noting(*args: Any, **kwargs: Any) -> None:
                original(*args, **kwargs)
                order.append(arm)

            turn.on_train_batch_start = noting  # type: ignore[method-assign]
            fit(turn)

        return start

    times = time_in_turns({arm: noted(arm) for arm in ("without", "empty")}, block_steps=5, num_blocks=2)
    assert {arm: [len(block) for block in blocks] for arm, blocks in times.items()} == {
        "without": [5, 5],
        "empty": [5, 5],
    }
    changes = sum(a != b for a, b in pairwise(order))
    assert changes <= 2 * 3 + 3  # whole blocks, not steps, alternate


def test_an_error_in_one_run_ends_all() -> None:
    def broken(turn: Turn) -> None:
        raise ZeroDivisionError("of the arm")

    quiet()
    with pytest.raises(ZeroDivisionError, match="of the arm"):
        time_in_turns(
            {"fine": make_fit("mlp", ARMS["without"]), "broken": broken}, block_steps=5, num_blocks=2
        )


def test_rare_costs_count_and_noise_does_not() -> None:
    quiet_block = [1e-3] * 9 + [11e-3]  # every tenth step costs more
    noisy_block = [1e-3] * 8 + [0.5, 11e-3]
    assert overhead.typical_step_us([quiet_block] * 3 + [noisy_block]) == pytest.approx(2000)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="hosts to time"):
        overhead.run(hosts=("rnn",))
    with pytest.raises(ConfigError, match="two turns or more"):
        overhead.run(num_blocks=1)
