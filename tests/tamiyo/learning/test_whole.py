"""The parts together: the real network, real graph features, oracle records, decisions as they are made."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle_states import make_record
from policy_graphs import SMALL, random_graph

import esper.tamiyo.learning as learning
from esper.errors import CheckpointError
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.learning import checkpoint
from esper.tamiyo.learning.config import SupervisedConfig, TrainingConfig
from esper.tamiyo.learning.packed import PackedGraph
from esper.tamiyo.learning.rows import ValueRow, oracle_rows
from esper.tamiyo.learning.supervised import fit, predict
from esper.tamiyo.learning.trainer import PolicyTrainer
from esper.tamiyo.learning.trajectory import Trajectory, Transition
from esper.tamiyo.network.decision import AdaptationDecision
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.oracle.analysis import difference_stderr


def tamiyo_network(seed: int = 0) -> TamiyoNetwork:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return TamiyoNetwork(SMALL).eval()


def rows(num: int, group: str) -> list[ValueRow]:
    """A candidate is worth what its second feature says."""
    found = []
    for i in range(num):
        graph = PackedGraph.pack(random_graph(seed=i + 1000 * len(group)))
        utility = 0.2 * graph.parts["candidate_attr"][:, 1].astype(np.float64)
        utility[0] = 0.0
        found.append(ValueRow(graph, utility, group=f"{group}{i}"))
    return found


def test_the_network_is_fitted_and_goes_on_with_ppo():
    network = tamiyo_network()
    settings = SupervisedConfig(learning_rate=1e-2, max_epochs=12, batch_size=16)
    result = fit(network, rows(96, "train"), rows(32, "validation"), settings)
    assert result.metrics["regret"] < 0.4 * result.history[0]["regret"]
    trainer = PolicyTrainer(network, TrainingConfig(batch_size=16, uncertainty_regularization=1.0))
    judged = rows(16, "rollout")
    predicted = predict(network, judged, settings.temperature)
    trajectories = []
    for row, own in zip(judged, predicted, strict=True):
        logits = np.where(row.graph.mask, own / settings.temperature, -np.inf)
        logprobs = logits - np.log(np.exp(logits).sum())
        action = int(np.argmax(logits))
        step = Transition(row.graph, action, float(logprobs[action]), float(row.utility[action]), risk=0.0)
        trajectories.append(Trajectory([step]))
    metrics = trainer.update(trajectories)
    # stored log-probabilities are those that the update computes: no dropout, the same precision
    assert metrics["importance/mean"] == pytest.approx(1, abs=1e-3)
    assert metrics["loss/uncertainty"] >= 0
    assert all(math.isfinite(value) for value in metrics.values())


def test_states_of_the_oracle_table_become_rows():
    losses = [[1.0, 1.1], [0.9, 0.9], [0.5, 0.5], [1.2, 1.4], [0.54, 0.54], [math.inf, 1.0], [1.0, 1.1]]
    record = make_record(0, losses, parameters=[100, 100, 200, 100, 100, 100, 50])
    builder = ModelGraphBuilder()
    free, dear = oracle_rows([record], [0.0, 0.3], lambda point: builder.build(point).graph_data)
    np.testing.assert_allclose(free.utility[:5], [0.0, 0.15, 0.55, -0.25, 0.51])
    np.testing.assert_allclose(dear.utility[2], 0.55 - 0.3 * math.log(2))
    assert np.isnan(free.utility[7])
    assert not free.tried[7]
    assert free.stderr[1] == pytest.approx(0.05)
    assert free.noise > 0
    assert free.group == dear.group == record.host_key
    # only the candidate that failed in one of two repeats did harm
    assert math.isnan(free.harm[0])
    assert math.isnan(free.harm[7])
    assert free.harm[1:7].tolist() == [0.0, 0.0, 0.0, 0.0, 0.5, 0.0]
    assert not np.array_equal(free.graph.floats, dear.graph.floats)  # the network is told the price


def test_noise_of_a_difference_by_hand():
    assert difference_stderr(np.array([[0.0, 0.0], [1.0, 3.0], [np.nan, np.nan]])) == pytest.approx(1.0)
    assert difference_stderr(np.array([[0.0], [1.0]])) == 0.0


def test_a_decision_of_the_policy_goes_into_the_buffer_as_it_is():
    trainer = PolicyTrainer(tamiyo_network(), TrainingConfig(batch_size=4))
    decision = AdaptationDecision(
        action="grow",
        layer="0",
        candidate=1,
        confidence=0.9,
        urgency=0.0,
        risk=0.1,
        uncertainty=0.0,
        value=0.2,
        reason="",
        numbers={},
    )
    for reward in (0.5, -0.25):
        trainer.replay_buffer.add_experience(
            state=random_graph(), action=decision, reward=reward, next_state=None, td_error=abs(reward)
        )
    metrics = trainer.train_on_replay(1)
    assert metrics["reward/mean"] == pytest.approx(0.125)
    assert 0 < metrics["importance/max"] < 1  # it was certain to be made, and the network is less sure


def test_checkpoints_hold_plain_state_only(tmp_path):
    path = tmp_path / "state.safetensors"
    state = {"a": {"b/c": torch.arange(3), "d": [1, 2.5, None, "x", True, float("inf")]}, "big": 2**100}
    checkpoint.save(path, state)
    found = checkpoint.load(path)
    assert torch.equal(found["a"].pop("b/c"), state["a"].pop("b/c"))
    assert found == state
    with pytest.raises(CheckpointError, match="at a, got type"):
        checkpoint.save(path, {"a": ModuleNotFoundError})
    with pytest.raises(CheckpointError, match="got 3"):
        checkpoint.save(path, {"a": {3: 1}})
    assert checkpoint.load(path)["big"] == 2**100  # the old file is still there
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        checkpoint.load(path)


def test_public_names_load_on_first_use():
    assert all(getattr(learning, name) is not None for name in learning.__all__)
    assert dir(learning) == sorted(learning.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = learning.nothing
