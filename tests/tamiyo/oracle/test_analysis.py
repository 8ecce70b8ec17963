"""Utilities, the cross-scored oracle, reliability and judgements against numbers worked out by hand."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from oracle_states import make_record

from esper.errors import DataFormatError
from esper.tamiyo.oracle.analysis import (
    best_rule,
    half_splits,
    judge,
    judge_in_sample,
    judge_oracle,
    over_hosts,
    reliability,
    tune,
    wait_share,
)
from esper.tamiyo.oracle.records import restrict, uses_shortcut, utilities
from esper.tamiyo.oracle.rules import RULES


def test_utility_is_the_gain_over_waiting_less_the_price_of_parameters() -> None:
    sizes = [100, 100, 200, 100, 100, 100, 50]
    table = utilities(make_record(parameters=sizes), price=0.1)
    assert table.shape == (8, 2)
    np.testing.assert_allclose(table[0], 0.0)
    np.testing.assert_allclose(table[2], [0.2 - 0.1 * math.log(2), 0.3 - 0.1 * math.log(2)])
    np.testing.assert_allclose(table[6], 0.1 * math.log(2))
    assert np.isnan(table[7]).all()  # was not available


def test_a_failed_run_costs_what_waiting_ends_with() -> None:
    losses = [[1.0, 1.1], [math.inf, 1.0], *[[1.0, 1.1]] * 5]
    table = utilities(make_record(0, losses), price=0.3)
    assert table[1, 0] == pytest.approx(-1.0)
    assert math.isfinite(table[1, 1])


def test_the_oracle_is_scored_where_it_was_not_picked() -> None:
    # Candidate 1 looks best in repeat 0 (+.5) and is -.1 in repeat 1; candidate 2 is best there (+.3), +.2 in 0.
    losses = [[1.0, 1.0], [0.5, 1.1], [0.8, 0.7], *[[1.0, 1.0]] * 4]
    judgement = judge_oracle([make_record(0, losses)], price=0.0)
    assert judgement.utility.mean == pytest.approx((-0.1 + 0.2) / 2)
    assert judgement.regret.mean == 0.0
    assert judgement.strict.mean == 0.0  # neither is within 10 % of the best of the other half
    assert judgement.wait == 0.0
    upper = judge_in_sample([make_record(0, losses)], price=0.0)
    assert upper.utility.mean == pytest.approx(0.25)  # candidate 2 over both repeats
    assert upper.strict.mean == 1.0


def test_a_chooser_is_judged_by_all_repeats_and_against_the_oracle() -> None:
    losses = [[1.0, 1.0], [0.9, 0.9], [0.5, 0.5], [1.2, 1.2], [0.54, 0.54], [0.7, 0.7], [1.0, 1.0]]
    records = [make_record(0, losses), make_record(1, losses)]
    best = judge(records, lambda point: 2, 0.0)
    assert best.utility.mean == pytest.approx(0.5)
    assert best.regret.mean == pytest.approx(0.0)
    assert best.accuracy.mean == best.strict.mean == 1.0
    near = judge(records, lambda point: 4, 0.0)  # .46 of .5: within 10 %
    assert near.regret.mean == pytest.approx(0.04)
    assert near.accuracy.mean == 1.0
    far = judge(records, lambda point: 5, 0.0)
    assert far.accuracy.mean == 0.0
    mixed = judge(records, lambda point: 2 if point.run.run_id.endswith("/0") else 0, 0.0)
    assert (mixed.utility.mean, mixed.median, mixed.accuracy.mean, mixed.wait) == (0.25, 0.25, 0.5, 0.5)
    assert mixed.utility.interval == (0.0, 0.5)


def test_where_waiting_is_best_only_what_is_level_with_it_is_accurate() -> None:
    losses = [[1.0, 1.0], [1.0, 1.0], *[[1.1, 1.1]] * 5]
    records = [make_record(0, losses)]
    assert [judge(records, lambda point, i=i: i, 0.0).strict.mean for i in (0, 1, 2)] == [1.0, 1.0, 0.0]
    assert wait_share(records, 0.0) == 1.0
    assert judge_oracle(records, 0.0).wait == 1.0


def test_noise_is_allowed_for_in_accuracy_and_not_in_strict() -> None:
    # Rows 1 and 2 differ by .02 on average, and by +-.2 from repeat to repeat.
    losses = [[1.0, 1.0], [0.5, 0.9], [0.7, 0.66], *[[2.0, 2.0]] * 4]
    record = make_record(0, losses)
    means = utilities(record, 0.0).mean(axis=1)
    assert means[2] > means[1] > 0.9 * means[2]
    waiting = judge([record], lambda point: 0, 0.0)
    assert waiting.strict.mean == 0.0
    noisy = make_record(0, [[1.0, 1.0], [0.5, 1.45], *[[2.0, 2.0]] * 5])  # +.5 and -.45
    assert judge([noisy], lambda point: 0, 0.0).strict.mean == 0.0
    assert judge([noisy], lambda point: 0, 0.0).accuracy.mean == 1.0


def test_prices_reach_the_chooser() -> None:
    seen: list[float] = []
    judge([make_record()], lambda point: seen.append(point.run.price) or 0, 0.3)  # type: ignore[func-returns-value]
    assert seen == [0.3]


def test_reliability_is_stepped_up_to_all_repeats() -> None:
    same = [[1.0, 1.0], *[[1.0 - 0.1 * c, 1.0 - 0.1 * c] for c in range(1, 7)]]
    assert reliability([make_record(0, same)], 0.0) == pytest.approx(1.0)
    first, second = [0.5, 0.2, 0.4, 0.1, 0.3, 0.0], [0.4, 0.3, 0.5, 0.0, 0.1, 0.2]
    losses = [[1.0, 1.0], *[[1.0 - a, 1.0 - b] for a, b in zip(first, second, strict=True)]]
    r = float(np.corrcoef(first, second)[0, 1])
    assert reliability([make_record(0, losses)], 0.0) == pytest.approx(2 * r / (1 + r))
    # A shift of a whole state is agreement between halves, but not within the state.
    shifted = [[1.0, 1.0], *[[row[0] + 5, row[1] + 5] for row in losses[1:]]]
    both = [make_record(0, losses), make_record(1, shifted)]
    assert reliability(both, 0.0) > 0.99
    assert reliability(both, 0.0, within=True) == pytest.approx(2 * r / (1 + r))


def test_halves_of_repeats() -> None:
    assert half_splits(2) == [((0,), (1,)), ((1,), (0,))]
    assert len(half_splits(4)) == 6
    assert all(sorted(a + b) == [0, 1, 2, 3] for a, b in half_splits(4))
    with pytest.raises(DataFormatError, match="at least two repeats"):
        half_splits(1)


def test_hosts_count_alike_however_many_states_they_have() -> None:
    records = [make_record(0), make_record(0, state_id="a"), make_record(0, state_id="b"), make_record(1)]
    estimate = over_hosts(records, [0.0, 0.3, 0.6, 0.5])
    assert estimate.mean == pytest.approx(0.4)
    assert estimate.num == 2


def test_rules_are_tuned_where_they_may_be() -> None:
    # Large widening of the narrow layer is the best widening here, small and "both" are worse.
    losses = [[1.0, 1.0], [0.9, 0.9], [0.5, 0.5], [1.2, 1.2], [0.8, 0.8], [0.7, 0.7], [1.0, 1.0]]
    records = [make_record(n, losses, split="validation") for n in range(3)]
    tuned = tune(records, 0.0)
    assert tuned["narrowest"].options == "size=large"
    assert tuned["cond"].options.startswith("size=large, ratio=0.5")
    assert best_rule(records, 0.0, tuned).name in {"narrowest", "cond", "dimensions"}
    sizes = [100, 110, 100000, 100000, 100000, 100000, 100]
    costly = [make_record(n, losses, split="validation", parameters=sizes) for n in range(3)]
    assert tune(costly, 0.3, RULES)["narrowest"].options == "size=small"


def test_candidates_can_be_left_out() -> None:
    record = make_record()
    without = restrict(record, lambda candidate: not uses_shortcut(candidate))
    assert len(without.point.candidates) == 7
    table = utilities(without, 0.0)
    np.testing.assert_allclose(table[5], utilities(record, 0.0)[6])
    assert RULES["shortcut"][0].choose(without.point) == 0


def test_what_was_not_tried_may_not_be_chosen() -> None:
    with pytest.raises(DataFormatError, match="available, got 7"):
        judge([make_record()], lambda point: 7, 0.0)
    with pytest.raises(DataFormatError, match="at least one state"):
        judge([], lambda point: 0, 0.0)
    single = msgspec.structs.replace(
        make_record(), outcomes=tuple(o for o in make_record().outcomes if o.repeat == 0)
    )
    with pytest.raises(DataFormatError, match="at least two repeats"):
        judge([single], lambda point: 0, 0.0)
