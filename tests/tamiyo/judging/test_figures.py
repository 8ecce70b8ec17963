"""Utilities, pairing and what failed runs count for, on made-up numbers."""

from __future__ import annotations

import math

import pytest
from judged_trials import trial

from esper.errors import ConfigError
from esper.tamiyo.judging.figures import Board
from esper.tamiyo.judging.trial import LEAST_UTILITY, MOST_UTILITY, utility

ARMS = ("none", "grown")


def test_utility_is_the_loss_saved_less_the_price_of_parameters() -> None:
    grown = trial("grown", test_loss=0.6, num_parameters=200)
    assert utility(grown, trial("none")) == pytest.approx(0.4 - 0.1 * math.log(2.0))
    assert utility(grown, trial("none"), price=0.0) == pytest.approx(0.4)
    assert utility(trial("none"), trial("none")) == 0.0


def test_the_held_out_loss_plays_no_part() -> None:
    grown = trial("grown", held_out_loss=0.0)
    assert utility(grown, trial("none")) == 0.0


def test_a_failed_run_is_the_worst_and_no_better_than_another_failed_one() -> None:
    failed, diverged = trial("grown", error="RuntimeError: x"), trial("grown", test_loss=None)
    sound, dead = trial("none"), trial("none", test_loss=None)
    assert utility(failed, sound) == utility(diverged, sound) == LEAST_UTILITY
    assert utility(diverged, dead) == 0.0
    assert utility(trial("grown"), dead) == MOST_UTILITY
    assert utility(trial("grown", test_loss=99.0), sound) == LEAST_UTILITY


def board(**fields: float) -> Board:
    gains = (0.1, 0.2, 0.6)
    trials = [trial("none", host) for host in range(3)]
    trials += [trial("grown", host, test_loss=1.0 - gain, **fields) for host, gain in enumerate(gains)]
    return Board(trials, "fresh", "flops", ARMS)


def test_means_medians_and_intervals_are_over_hosts() -> None:
    found = board().arm("grown")
    assert found.utility.mean == pytest.approx(0.3)
    assert found.median == pytest.approx(0.2)
    assert found.utility.interval is not None
    low, high = found.utility.interval
    assert 0.1 - 1e-9 < low < 0.3 < high < 0.6 + 1e-9
    difference = board().difference("grown", "none")
    assert difference.estimate == found.utility
    assert difference.better == 1.0


def test_repeats_of_a_host_are_averaged_before_anything_else() -> None:
    trials = []
    for host, repeat, gain in ((0, 0, 0.0), (0, 1, 0.2), (1, 0, 0.3)):
        trials += [
            trial("none", host, repeat=repeat),
            trial("grown", host, repeat=repeat, test_loss=1 - gain),
        ]
    assert Board(trials, "fresh", "flops", ARMS).utilities("grown") == pytest.approx([0.1, 0.3])


def test_only_matches_that_all_arms_have_played_count() -> None:
    trials = [trial("none"), trial("grown"), trial("none", 1), trial("grown", 2, view="steps")]
    found = Board(trials, "fresh", "flops", ARMS)
    assert found.matches == ["digits_mlp/test/0#0"]
    assert found.missing == 1


def test_a_failed_run_is_counted_and_not_dropped() -> None:
    trials = [trial("none", host) for host in range(2)]
    trials += [trial("grown", 0, test_loss=0.5), trial("grown", 1, error="RuntimeError: x")]
    found = Board(trials, "fresh", "flops", ARMS).arm("grown")
    assert (found.failed, found.runs) == (1, 2)
    assert found.utility.mean == pytest.approx((0.5 + LEAST_UTILITY) / 2)
    assert found.loss == 0.5  # there is none of the other


def test_shares_of_decisions_and_of_runs() -> None:
    trials = [trial("none", host) for host in range(2)]
    trials += [
        trial("grown", 0, asked=3, waited=1, fell_back=2, germinated=1),
        trial("grown", 1, asked=1, waited=1),
    ]
    found = Board(trials, "fresh", "flops", ARMS).arm("grown")
    assert (found.waited, found.fell_back, found.idle) == (0.5, 0.5, 0.5)


def test_a_rival_may_depend_on_the_price() -> None:
    trials = []
    for host, price in enumerate((0.0, 0.3)):
        trials += [trial(arm, host, price=price) for arm in ("none", "grown")]
        trials.append(trial("other", host, price=price, test_loss=0.9))
    found = Board(trials, "fresh", "flops", (*ARMS, "other"))
    difference = found.difference("grown", {0.0: "none", 0.3: "other"})
    assert difference.estimate.mean == pytest.approx(-0.05)
    with pytest.raises(ConfigError, match=r"no arm was chosen for the price 0\.3"):
        found.difference("grown", {0.0: "none"})


def test_there_is_nothing_to_compare_with_without_the_ungrown_host() -> None:
    with pytest.raises(ConfigError, match="differences to the arm 'none'"):
        Board([], "fresh", "flops", ["grown"])
    with pytest.raises(ConfigError, match="no match of group fresh"):
        Board([], "fresh", "flops", ARMS).arm("grown")
