"""Value models of tried candidates: what they learn, how they are judged, and the baseline beside them."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from learning_toys import bandit, graph, network
from lightning.pytorch.loggers import CSVLogger

from esper.errors import ConfigError, DataFormatError, LearningError
from esper.tamiyo.learning.boosting import BoostedValues, flat_features
from esper.tamiyo.learning.config import SupervisedConfig
from esper.tamiyo.learning.decision_metrics import decision_metrics, is_accurate
from esper.tamiyo.learning.packed import PackedGraph
from esper.tamiyo.learning.rows import ValueRow
from esper.tamiyo.learning.supervised import evaluate, fit, predict, supervised_loss

SETTINGS = SupervisedConfig(learning_rate=3e-2, batch_size=64, max_epochs=25, temperature=0.1)


def row(utility: list[float], *, numbers: list[float] | None = None, **more: object) -> ValueRow:
    state = graph(numbers or [0.1 * i for i in range(len(utility) - 1)])
    return ValueRow(PackedGraph.pack(state), np.array(utility), **more)  # type: ignore[arg-type]


def rows(num: int, seed: int) -> list[ValueRow]:
    """A layer's number is what growing there is worth, measured with noise; one in five was not tried."""
    rng = np.random.default_rng(seed)
    found = []
    for i, state in enumerate(bandit(num, rng)):
        worth = np.concatenate([[0.0], state.x[:, 0].numpy().astype(np.float64)])
        utility = worth + rng.normal(0, 0.02, size=worth.size)
        utility[rng.random(worth.size) < 0.2] = np.nan
        utility[0] = 0.0
        found.append(
            ValueRow(
                PackedGraph.pack(state),
                utility,
                stderr=np.where(np.arange(worth.size) > 0, 0.02, 0.0),
                harm=np.where(worth < -0.5, 1.0, 0.0),
                urgency=max(0.0, float(worth.max())),
                noise=0.03,
                group=f"host-{seed}-{i // 2}",
            )
        )
    return found


@pytest.fixture(scope="module")
def sets() -> tuple[list[ValueRow], list[ValueRow], list[ValueRow]]:
    return rows(256, 0), rows(64, 1), rows(200, 2)


def test_a_network_learns_what_candidates_are_worth(sets, tmp_path: Path):
    train, validation, test = sets
    model = network(1)
    logger = CSVLogger(tmp_path, name="", version="")
    before = evaluate(model, test, SETTINGS)
    result = fit(model, train, validation, SETTINGS, logger=logger)
    after = evaluate(model, test, SETTINGS)
    assert before["accuracy"] < 0.5
    assert after["accuracy"] > 0.9
    assert after["regret"] < 0.1 * before["regret"]
    assert after["rank_correlation"] > 0.95
    assert after["calibration/slope"] == pytest.approx(1, abs=0.1)
    assert after["calibration/error"] < 0.05
    assert after["utility"] > 0.95 * after["utility/best"]
    assert 0.05 < after["wait_share"] < 0.35
    assert result.metrics == result.history[result.best_epoch]
    assert evaluate(model, validation, SETTINGS).items() <= result.metrics.items()
    with (tmp_path / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert len(logged) == len(result.history) - 1
    assert float(logged[-1]["accuracy"]) == pytest.approx(result.history[-1]["accuracy"])
    # the other heads have learned too
    with torch.no_grad():
        output = model(graph([0.9, -0.9]))
    assert output.risk[2] > 0.7 > 0.3 > output.risk[1]
    assert output.value.item() == pytest.approx(0.9, abs=0.2)
    assert output.urgency.item() == pytest.approx(0.9, abs=0.3)


def test_boosting_is_judged_by_the_same_numbers(sets):
    train, validation, test = sets
    model = BoostedValues(max_iterations=80, learning_rate=0.1)
    metrics = model.fit(train, validation)
    assert set(metrics) < set(evaluate(network(), validation, SETTINGS))
    assert model.evaluate(test)["accuracy"] > 0.85
    assert 1 < model.num_iterations <= 80
    assert all(p[0] == 0 for p in model.predict(test))
    again = BoostedValues(max_iterations=80, learning_rate=0.1)
    assert again.fit(train, validation) == metrics
    with pytest.raises(DataFormatError, match="got none in 1 rows"):
        model.fit([row([0.0, np.nan])], validation)


def test_the_same_seed_fits_the_same_and_stops_early(sets):
    train, validation, _ = sets
    settings = dataclasses.replace(SETTINGS, max_epochs=30, patience=1, learning_rate=0.2)
    before = torch.random.get_rng_state()
    one, two = (fit(network(dropout=0.3), train[:64], validation, settings) for _ in range(2))
    assert one == two
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(one.history) < 31
    assert one.best_epoch == len(one.history) - 2


OTHER = {
    "temperature": 0.3,
    "learning_rate": 1e-2,
    "weight_decay": 1.0,
    "batch_size": 16,
    "max_epochs": 3,
    "keep": "last",
    "patience": 1,
    "gradient_clip_norm": 0.01,
    "huber_delta": 0.01,
    "stderr_floor": 1.0,
    "listwise_weight": 0.0,
    "value_weight": 0.0,
    "risk_weight": 5.0,
    "urgency_weight": 5.0,
    "seed": 3,
}


def test_every_setting_is_listed():
    assert set(OTHER) == {field.name for field in dataclasses.fields(SupervisedConfig)}


@pytest.mark.parametrize("name", sorted(set(OTHER) - {"max_epochs", "keep", "patience"}))
def test_every_setting_changes_the_fit(name: str, sets):
    train, validation, _ = sets

    def weights(**settings: float) -> list[float]:
        base = dataclasses.replace(SETTINGS, max_epochs=2)
        model = network(dropout=0.2)
        fit(model, train[:48], validation[:8], dataclasses.replace(base, **settings))  # type: ignore[arg-type]
        return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()

    assert weights(**{name: OTHER[name]}) != weights()


def test_epochs_and_patience_end_a_fit(sets):
    train, validation, _ = sets
    few = dataclasses.replace(SETTINGS, max_epochs=2)
    assert len(fit(network(), train[:32], validation, few).history) == 3
    frozen = dataclasses.replace(SETTINGS, learning_rate=1e-12, patience=4)
    result = fit(network(), train[:32], validation, frozen)
    assert len(result.history) - 1 - result.best_epoch == 4
    wild = dataclasses.replace(SETTINGS, learning_rate=0.2, patience=1, max_epochs=6)
    last = fit(network(), train[:32], validation, dataclasses.replace(wild, keep="last"))
    assert last.best_epoch == len(last.history) - 1 == 6
    assert fit(network(), train[:32], validation, wild).best_epoch < 6
    with pytest.raises(ConfigError, match="keep should be 'best' or 'last'"):
        SupervisedConfig(keep="worst")  # type: ignore[arg-type]


def test_settings_are_checked():
    with pytest.raises(
        ConfigError, match="temperature should be positive; risk_weight should not be negative"
    ):
        SupervisedConfig(temperature=0, risk_weight=-1)


def test_the_loss_is_smallest_at_the_truth_and_sees_only_what_was_tried():
    class Fixed(torch.nn.Module):
        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor(logits))
            self.toy = network()

        def forward(self, batch):
            return self.toy(batch)._replace(logits=self.logits)

    settings = SupervisedConfig(temperature=0.1, value_weight=0, risk_weight=0, urgency_weight=0)
    truth = row([0.0, 0.3, -0.2, np.nan])
    right = Fixed([5.0, 8.0, 3.0, 100.0])  # any offset: only differences from WAIT count
    loss = supervised_loss(right, [truth], settings)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    loss.backward()
    assert right.logits.grad is not None
    assert right.logits.grad.abs().max() < 1e-5
    wrong = supervised_loss(Fixed([5.0, 7.5, 3.0, 0.0]), [truth], settings)
    assert wrong > 0.05
    doubted = dataclasses.replace(truth, stderr=np.array([0.0, 0.1, 0.1, 0.0]))
    less = supervised_loss(
        Fixed([5.0, 7.5, 3.0, 0.0]), [doubted], dataclasses.replace(settings, listwise_weight=0)
    )
    assert 0 < less < 0.05 * wrong


def test_accuracy_is_ten_per_cent_of_the_best_or_the_noise_of_the_state():
    mixed = row([0.0, 1.0, 0.91, 0.89, np.nan])
    assert [is_accurate(mixed, c) for c in range(4)] == [False, True, True, False]
    assert is_accurate(mixed, 3, noise=0.12)
    waiting = row([0.0, -0.001, -0.2])
    assert [is_accurate(waiting, c) for c in range(3)] == [True, False, False]
    assert is_accurate(waiting, 1, noise=0.005)
    assert not is_accurate(waiting, 2, noise=0.005)


def test_metrics_by_hand():
    judged = [
        row([0.0, 1.0, 0.5], group="a"),
        row([0.0, -1.0, np.nan], group="a", noise=0.1),
        row([0.0, 0.2, 0.4], group="b"),
    ]
    # right; WAIT, right although something untried is predicted best; second best
    predicted = [np.array([0.0, 0.9, 0.1]), np.array([0.0, -0.5, 9.0]), np.array([0.0, 0.3, 0.1])]
    found = decision_metrics(predicted, judged)
    assert found == {
        "accuracy": 0.5,
        "accuracy/strict": 0.5,
        "regret": pytest.approx(0.1),
        "regret/median": 0.0,
        "utility": pytest.approx((0.5 + 0.2) / 2),
        "utility/median": 0.2,
        "utility/best": pytest.approx((0.5 + 0.4) / 2),
        "wait_share": 0.25,
        "num_decisions": 3.0,
        "rank_correlation": pytest.approx((1.0 + 0.5) / 2),
    }
    constant = decision_metrics([np.zeros(3)], [row([0.0, 1.0, 2.0])])
    assert constant["rank_correlation"] == 0


def test_calibration_tells_bold_predictions():
    rng = np.random.default_rng(0)
    judged = [row([0.0, *rng.normal(0, 1, 4)]) for _ in range(50)]
    bold = [2 * r.utility for r in judged]
    right = [r.utility.copy() for r in judged]
    assert decision_metrics(right, judged)["calibration/slope"] == pytest.approx(1)
    assert decision_metrics(right, judged)["calibration/error"] == pytest.approx(0)
    assert decision_metrics(bold, judged)["calibration/slope"] == pytest.approx(0.5)
    assert decision_metrics(bold, judged)["calibration/error"] > 0.3


def test_flat_features_average_over_placements():
    state = graph([1.0, 3.0])
    state.placement_candidate = torch.tensor([2, 2])
    features = flat_features(PackedGraph.pack(state))
    assert features.shape == (3, 2 + 2 + 3 + 3)
    assert np.isnan(features[:2, 4:]).all()
    assert features[2].tolist() == [0.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 2.0, 0.0, 0.0]


def test_predictions_are_utilities_against_wait(sets):
    model = network()
    judged = sets[2][:5]
    found = predict(model, judged, 0.5, batch_size=2)
    for own, judged_row in zip(found, judged, strict=True):
        with torch.no_grad():
            logits = model(judged_row.graph.unpack()).logits
        np.testing.assert_allclose(own, (0.5 * (logits - logits[0])).numpy(), atol=1e-6)


def test_what_cannot_be_learned_from_is_refused(sets):
    train, validation, _ = sets
    with pytest.raises(DataFormatError, match="got 0 and 64"):
        fit(network(), [], validation)
    with pytest.raises(DataFormatError, match="'host-0-0' and 1 more are in both"):
        fit(network(), train[:4], train[:4])
    with pytest.raises(DataFormatError, match="0 for WAIT"):
        row([0.1, 0.2])
    with pytest.raises(DataFormatError, match="finite or NaN"):
        row([0.0, math.inf])
    with pytest.raises(DataFormatError, match="of 2 candidates, got shapes"):
        row([0.0, 0.1], stderr=np.zeros(3))
    with pytest.raises(DataFormatError, match="standard errors"):
        row([0.0, 0.1], stderr=np.array([0.0, np.nan]))
    with pytest.raises(DataFormatError, match="got 0 of 1"):
        decision_metrics([], [row([0.0, 0.1])])
    with pytest.raises(DataFormatError, match="without NaN for decision 0"):
        decision_metrics([np.array([0.0, np.nan])], [row([0.0, 0.1])])
    broken = network()
    broken.body[0].weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(LearningError, match="finite loss and gradient in epoch 1"):
        fit(broken, train[:8], validation)
