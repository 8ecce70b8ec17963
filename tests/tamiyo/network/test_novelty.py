"""Where training states lay, and what lies elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from policy_graphs import SMALL, random_graph

from esper.errors import ConfigError
from esper.tamiyo.geometric import Batch
from esper.tamiyo.graph.data import CandidateGraph
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.network.novelty import Novelty
from esper.tamiyo.network.weights import load_network, save_network


def graphs(seeds: range) -> list[CandidateGraph]:
    return [random_graph(3 + seed % 5, 4 + seed % 3, seed=seed) for seed in seeds]


@pytest.fixture(scope="module")
def fitted() -> Novelty:
    novelty = Novelty(SMALL)
    novelty.fit(graphs(range(400)), graphs(range(1000, 1200)))
    return novelty


def share_beyond(novelty: Novelty, found: list[CandidateGraph]) -> float:
    return float((novelty(Batch.from_data_list(found)) > SMALL.novelty_threshold).float().mean())


def changed(change: Callable[[CandidateGraph], None]) -> list[CandidateGraph]:
    found = graphs(range(2000, 2050))
    for graph in found:
        change(graph)
    return found


def test_nothing_is_novel_before_it_knows_anything() -> None:
    novelty = Novelty(SMALL)
    assert not novelty.fitted
    assert novelty(random_graph()).tolist() == [0.0]


def test_nearly_all_states_of_the_kind_it_was_fitted_on_are_known(fitted: Novelty) -> None:
    found = fitted(Batch.from_data_list(graphs(range(2000, 2100))))
    assert fitted.fitted
    assert float((found == 0).float().mean()) > 0.85
    assert share_beyond(fitted, graphs(range(2000, 2100))) == 0.0


def test_nodes_candidates_or_runs_of_another_kind_are_novel(fitted: Novelty) -> None:
    assert share_beyond(fitted, changed(lambda g: g.x.mul_(3))) > 0.9
    assert share_beyond(fitted, changed(lambda g: g.candidate_attr.add_(3))) > 0.9
    assert share_beyond(fitted, changed(lambda g: g.global_features.add_(3))) > 0.9


def test_a_feature_that_never_varied_is_novel_when_it_does() -> None:
    def still(seeds: range) -> list[CandidateGraph]:
        found = graphs(seeds)
        for graph in found:
            graph.global_features[:, 0] = 0.0
        return found

    novelty = Novelty(SMALL)
    novelty.fit(still(range(400)), still(range(1000, 1200)))
    known, other = still(range(2000, 2001))[0], still(range(2000, 2001))[0]
    other.global_features[:, 0] = 2.0
    assert float(novelty(other)) > float(novelty(known)) + 0.2


def test_the_order_of_nodes_and_the_company_do_not_matter(fitted: Novelty) -> None:
    one, two = random_graph(6, seed=7), random_graph(0, 2, seed=8)
    one.x *= 3
    flipped = one.clone()
    flipped.x = one.x.flip(0)
    together = fitted(Batch.from_data_list([one, two]))
    torch.testing.assert_close(together, torch.cat([fitted(flipped), fitted(two)]))


def test_few_states_are_enough_to_fit() -> None:
    novelty = Novelty(SMALL)
    novelty.fit(graphs(range(2)), graphs(range(10, 11)))
    assert bool(torch.isfinite(novelty(random_graph(seed=3))).all())


def test_it_travels_with_the_weights_and_reaches_the_decision(tmp_path: Path) -> None:
    network = TamiyoNetwork(SMALL)
    network.novelty.fit(graphs(range(100)), graphs(range(200, 220)))
    save_network(network, tmp_path / "a.safetensors", card="# A")
    loaded = load_network(tmp_path / "a.safetensors")
    strange = random_graph()
    strange.x *= 5
    assert loaded.read(strange)[0].novelty == pytest.approx(float(network.novelty(strange)))
    assert loaded.read(strange)[0].novelty > SMALL.novelty_threshold


@pytest.mark.parametrize(("train", "validation", "share"), [(1, 1, 0.9), (3, 0, 0.9), (3, 1, 1.0)])
def test_what_it_cannot_be_fitted_on(train: int, validation: int, share: float) -> None:
    with pytest.raises(ConfigError, match=r"Novelty.fit expects"):
        Novelty(SMALL).fit(graphs(range(train)), graphs(range(validation)), known_share=share)
