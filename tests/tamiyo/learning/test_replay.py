"""Prioritised replay: who is drawn how often, with what weight, and what survives a state dict."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from learning_toys import Choice, graph
from torchrl.data import ListStorage, PrioritizedSampler
from torchrl.data.replay_buffers.samplers import prioritized

from esper.errors import CheckpointError, DataFormatError
from esper.tamiyo.geometric import Batch
from esper.tamiyo.learning.packed import PackedGraph, batch, pack_many, unpack_many
from esper.tamiyo.learning.replay import Experience, ReplayBuffer
from esper.tamiyo.learning.segment_tree import SegmentTree
from esper.tamiyo.learning.trajectory import Trajectory, Transition

GRAPH = PackedGraph.pack(graph([0.1, 0.2, 0.3]))


def experience(reward: float = 0.0, **more: object) -> Experience:
    return Experience(Transition(GRAPH, 1, -0.5, reward), **{"target": 0.0, **more})  # type: ignore[arg-type]


def filled(errors: list[float], **kwargs: float) -> ReplayBuffer:
    buffer = ReplayBuffer(8, **kwargs)  # type: ignore[arg-type]
    buffer.add([experience(reward=i) for i in range(len(errors))], errors)
    return buffer


def test_tree_sums_finds_and_never_lands_on_nothing():
    rng = np.random.default_rng(0)
    tree = SegmentTree(13)
    weights = rng.random(13) * (rng.random(13) > 0.4)
    tree.set(np.arange(13), weights)
    assert tree.total == pytest.approx(weights.sum())
    assert tree.minimum == weights[weights > 0].min()
    edges = np.cumsum(weights)
    mass = rng.random(2000) * tree.total
    np.testing.assert_array_equal(tree.find(mass), np.searchsorted(edges, mass, side="right"))
    assert weights[tree.find(np.array([0.0, tree.total, np.nextafter(tree.total, 0)]))].all()
    tree.set(np.array([4, 4]), np.array([1.0, 2.0]))
    assert tree[np.array([4])] == 2.0
    assert SegmentTree(1).find(np.zeros(2)).tolist() == [0, 0]


class FlatTree:
    """torchrl's segment trees as a plain array."""

    def __init__(self, capacity: int) -> None:
        self.leaves = np.zeros(capacity)

    def __getitem__(self, index: torch.Tensor) -> np.ndarray:
        return self.leaves[np.asarray(index)]

    def __setitem__(self, index: torch.Tensor, value: torch.Tensor) -> None:
        self.leaves[np.asarray(index)] = np.asarray(value)

    def scan_lower_bound(self, mass: np.ndarray) -> np.ndarray:
        return np.searchsorted(np.cumsum(self.leaves), mass, side="right")


class FlatSum(FlatTree):
    def query(self, start: int, end: int) -> float:
        return float(self.leaves[start:end].sum())


class FlatMin(FlatTree):
    def query(self, start: int, end: int) -> float:
        return float(self.leaves[start:end].min())


@pytest.fixture
def _torchrl_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins where torchrl's compiled trees were built for another torch, as 0.14's were under torch 2.13."""
    if prioritized.SumSegmentTreeFp64 is None:
        for kind, tree in (("Sum", FlatSum), ("Min", FlatMin)):
            for bits in (32, 64):
                monkeypatch.setattr(prioritized, f"{kind}SegmentTreeFp{bits}", tree)


@pytest.mark.usefixtures("_torchrl_trees")
def test_probabilities_and_weights_are_torchrls():
    np.random.seed(0)  # torchrl draws from the global generator
    errors = [0.1, 2.0, 0.0, 1.0, 0.5]
    buffer = filled(errors, alpha=0.7, epsilon=1e-2)
    theirs = PrioritizedSampler(8, alpha=0.7, beta=0.5, eps=1e-2, dtype=torch.float64)
    storage = ListStorage(8)
    for i in range(5):
        storage.set(i, i)
    theirs.extend(torch.arange(5))
    theirs.update_priority(torch.arange(5), torch.tensor(errors, dtype=torch.float64))
    drawn, info = theirs.sample(storage, 20_000)
    by_index = dict(zip(drawn.tolist(), info["priority_weight"].tolist(), strict=True))
    sample = buffer.sample(20_000, np.random.default_rng(0), beta=0.5)
    assert set(by_index) == set(range(5))
    for i, weight in zip(sample.index, sample.weights, strict=True):
        assert weight == pytest.approx(by_index[i], rel=1e-6)
    ours = np.bincount(sample.index, minlength=5) / 20_000
    np.testing.assert_allclose(ours, buffer.probabilities(), atol=2e-4)  # ranges of equal mass vary little
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 20_000, buffer.probabilities(), atol=0.012)


def test_the_published_formulas():
    buffer = filled([1.0, 3.0], alpha=0.5, epsilon=0.0)
    p = np.array([1.0, 3.0**0.5]) / (1 + 3.0**0.5)
    np.testing.assert_allclose(buffer.probabilities(), p)
    sample = buffer.sample(64, np.random.default_rng(0), beta=0.4)
    weights = (2 * p) ** -0.4
    np.testing.assert_allclose(sample.weights, (weights / weights.max())[sample.index])
    assert filled([1.0, 3.0], alpha=0.0).probabilities().tolist() == [0.5, 0.5]
    assert (buffer.sample(9, np.random.default_rng(0), beta=0.0).weights == 1).all()


def test_new_errors_change_what_is_drawn_and_the_same_seed_draws_the_same():
    buffer = filled([1.0] * 7)
    one, two, other = (buffer.sample(5, np.random.default_rng(s), beta=1.0).index.tolist() for s in (5, 5, 8))
    assert one == two
    assert one != other
    buffer.update_priorities(np.array([0, 2]), np.array([0.0, -5.0]))
    assert np.argmax(buffer.probabilities()) == 2


def test_the_oldest_goes_first():
    buffer = filled([1.0] * 11)
    assert len(buffer) == 8
    kept = {e.transition.reward for e in buffer.sample(64, np.random.default_rng(0), beta=1.0).experiences}
    assert kept == set(range(3, 11))


def test_a_next_state_left_open_is_filled_by_the_next_experience():
    buffer = ReplayBuffer(8)
    first, second = graph([0.5, 1.0]), graph([0.7, 1.0, 2.0])
    buffer.add_experience(state=first, action=Choice(1, -0.7), reward=1.0, next_state=None, td_error=1.0)
    buffer.add_experience(
        state=first, action=Choice(0, -0.7), reward=5.0, next_state=None, td_error=1.0, episode="other"
    )
    assert (len(buffer), buffer.num_ready, buffer.can_sample) == (2, 0, False)
    with pytest.raises(DataFormatError, match="got 2 of which none is complete"):
        buffer.sample(1, np.random.default_rng(0), beta=1.0)
    buffer.add_experience(state=second, action=Choice(2, -1.0), reward=2.0, next_state=None, td_error=2.0)
    assert buffer.num_ready == 1
    (drawn,) = buffer.sample(1, np.random.default_rng(0), beta=1.0).experiences
    assert drawn.transition.reward == 1.0
    assert drawn.next_graph is not None
    assert torch.equal(drawn.next_graph.unpack().x, second.x)
    buffer.close("other")
    buffer.close()
    buffer.close("nobody")
    assert buffer.num_ready == 3
    assert buffer.new_mean_reward() == pytest.approx(8 / 3)
    assert buffer.new_mean_reward() is None


def test_an_open_transition_that_was_overwritten_is_forgotten():
    buffer = ReplayBuffer(1)
    for reward in (1.0, 2.0, 3.0):
        buffer.add_experience(
            state=graph([reward, 0.0]), action=Choice(1, -1.0), reward=reward, next_state=None, td_error=1.0
        )
    assert buffer.num_ready == 0
    buffer.close()
    assert buffer.sample(1, np.random.default_rng(0), beta=1.0).experiences[0].transition.reward == 3.0


def test_state_dict_goes_on_where_it_was():
    buffer = filled([1.0, 2.0, 3.0])
    other = graph([1.0, 2.0], unavailable=[1])
    buffer.add_experience(state=other, action=Choice(2, -1.0), reward=4.0, next_state=other, td_error=0.3)
    buffer.add_experience(state=other, action=Choice(2, -1.0), reward=4.0, next_state=None, td_error=0.3)
    state = buffer.state_dict()
    again = ReplayBuffer(8)
    again.load_state_dict({"tensors": state["tensors"], "facts": json.loads(json.dumps(state["facts"]))})
    np.testing.assert_array_equal(again.probabilities(), buffer.probabilities())
    for it in (buffer, again):
        it.add_experience(
            state=graph([9.0, 8.0]), action=Choice(0, -1.0), reward=1.0, next_state=None, td_error=1.0
        )
    one, two = (it.sample(64, np.random.default_rng(1), beta=0.5) for it in (buffer, again))
    np.testing.assert_array_equal(one.index, two.index)
    np.testing.assert_array_equal(one.weights, two.weights)
    for a, b in zip(one.experiences, two.experiences, strict=True):
        assert (a.transition.reward, a.transition.action, a.target == a.target) == (
            b.transition.reward,
            b.transition.action,
            b.target == b.target,
        )
        assert torch.equal(a.transition.graph.unpack().x, b.transition.graph.unpack().x)
    assert buffer.new_mean_reward() == again.new_mean_reward() == 3.0
    empty = ReplayBuffer(8)
    empty.load_state_dict(ReplayBuffer(8).state_dict())
    assert len(empty) == 0


def test_a_damaged_state_is_refused_and_changes_nothing():
    buffer = filled([1.0])
    state = filled([1.0, 2.0]).state_dict()
    with pytest.raises(CheckpointError, match="capacity 4, the checkpoint's has 8"):
        ReplayBuffer(4).load_state_dict(state)
    short = {**state["tensors"], "graphs.floats": state["tensors"]["graphs.floats"][:-1]}
    with pytest.raises(CheckpointError, match="damaged"):
        buffer.load_state_dict({"tensors": short, "facts": state["facts"]})
    with pytest.raises(CheckpointError, match="damaged"):
        buffer.load_state_dict({"tensors": {}, "facts": state["facts"]})
    assert len(buffer) == 1


def test_graphs_survive_packing():
    graphs = [graph([1.0, 2.0, 3.0], unavailable=[2]), graph([4.0], context=0.5)]
    for original, packed in zip(
        graphs, unpack_many(pack_many([PackedGraph.pack(g) for g in graphs])), strict=True
    ):
        back = packed.unpack()
        assert set(back.keys()) == set(original.keys())
        for key in original.keys():  # noqa: SIM118 (Data iterates over pairs)
            assert torch.equal(back[key], original[key])
            assert back[key].dtype == original[key].dtype
        assert packed.mask.tolist() == original.candidate_mask.tolist()


def test_graphs_are_joined_as_torch_geometric_joins_them():
    graphs = [graph([1.0, 2.0, 3.0], unavailable=[2]), graph([4.0], context=0.5), graph([5.0, 6.0])]
    theirs, ours = Batch.from_data_list(graphs), batch([PackedGraph.pack(g) for g in graphs])
    assert set(ours.keys()) == set(theirs.keys())
    for key in theirs.keys():  # noqa: SIM118
        assert torch.equal(ours[key], theirs[key])
        assert ours[key].dtype == theirs[key].dtype


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("x", torch.full((2, 3), float("nan")), "x as a finite float32 matrix"),
        ("x", torch.zeros(2, 3, dtype=torch.float64), "torch.float64"),
        ("candidate_mask", torch.tensor([False, True, True]), "WAIT"),
        ("edge_index", torch.tensor([[0], [7]]), "edge_index within 2 nodes"),
        ("placement_candidate", torch.tensor([1, 3]), "within 3 candidates"),
        ("candidate_mask", torch.ones(2, dtype=torch.bool), r"candidate_mask \[3\]"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused(field: str, value: torch.Tensor, message: str):
    wrong = graph([1.0, 2.0])
    wrong[field] = value
    with pytest.raises(DataFormatError, match=message):
        PackedGraph.pack(wrong)


def test_transitions_and_trajectories_are_checked():
    masked = graph([1.0, 2.0], unavailable=[1])
    for action in (1, 3, -1):
        with pytest.raises(DataFormatError, match=rf"available candidates \[0, 2\] of 3, got {action}"):
            Transition.of(masked, action, -1.0, 0.0)
    with pytest.raises(DataFormatError, match="log-probability"):
        Transition.of(masked, 0, 0.5, 0.0)
    with pytest.raises(DataFormatError, match="log-probability"):
        Transition.of(masked, 0, float("-inf"), 0.0)
    with pytest.raises(DataFormatError, match="finite reward"):
        Transition.of(masked, 0, -1.0, float("nan"))
    with pytest.raises(DataFormatError, match="risk in"):
        Transition.of(masked, 0, -1.0, 0.0, risk=2.0)
    with pytest.raises(DataFormatError, match="at least one decision"):
        Trajectory([])
    with pytest.raises(DataFormatError, match="final_value 0"):
        Trajectory([Transition.of(masked, 0, -1.0, 0.0)], terminated=True, final_value=1.0)
    with pytest.raises(DataFormatError, match="finite TD error"):
        ReplayBuffer(2).add([experience()], [float("nan")])
    with pytest.raises(DataFormatError, match="drop one"):
        ReplayBuffer(2).add_experience(
            state=masked, action=Choice(0, 0.0), reward=0.0, next_state=masked, td_error=0.0, terminated=True
        )
