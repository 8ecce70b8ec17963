"""From the facts of a decision point, or from health signals alone, to the graph that a policy network reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from esper.errors import ConfigError
from esper.kasmina.topology import Edge, LayerInfo, ModelTopology
from esper.tamiyo.graph.candidate_features import Places, candidate_features
from esper.tamiyo.graph.data import CandidateGraph, ModelGraphState
from esper.tamiyo.graph.facts import WAIT, Candidate, DecisionPoint, Placement, RunFacts
from esper.tamiyo.graph.features import EDGE_FEATURES, NODE_FEATURES
from esper.tamiyo.graph.global_features import global_features, global_metrics
from esper.tamiyo.graph.layout import Layout
from esper.tamiyo.graph.structure_features import Grown, edge_features, node_features
from esper.tamiyo.graph.trends import SignalWindow, problems

if TYPE_CHECKING:
    from esper.messages import HealthSignal

__all__ = ["ModelGraphBuilder"]

_LAYOUTS_KEPT = 32


class ModelGraphBuilder:
    """Builds the graph of a decision point: seed layers as nodes, data flow as edges, candidates beside them.

    The features are those that :mod:`esper.tamiyo.graph.features` names; nothing depends on the order in which
    layers are listed but the order of the rows. Empty graphs and single nodes work.

    Args:
        node_feature_dim: Features of a node; there are 16.
        edge_feature_dim: Features of an edge; there are 8.
        window_size: Signals of one layer that count: the last so many.

    Raises:
        ConfigError: Another number of features, or no window.
    """

    def __init__(
        self, node_feature_dim: int = 16, edge_feature_dim: int = 8, *, window_size: int = 100
    ) -> None:
        wanted, given = (len(NODE_FEATURES), len(EDGE_FEATURES)), (node_feature_dim, edge_feature_dim)
        if given != wanted:
            raise ConfigError(
                f"ModelGraphBuilder expects node_feature_dim={wanted[0]} and edge_feature_dim={wanted[1]}, got "
                f"{given[0]} and {given[1]}: every feature is named and measured (esper.tamiyo.graph.features), "
                "so their number is no setting; leave both out"
            )
        _check_window(window_size)
        self.node_feature_dim = node_feature_dim
        self.edge_feature_dim = edge_feature_dim
        self.window_size = window_size
        self._layouts: dict[int, Layout] = {}

    def build(self, point: DecisionPoint) -> ModelGraphState:
        """Build the graph of a decision point.

        Raises:
            MessageError: A candidate or a seed lies at a layer that the topology does not have.
        """
        with np.errstate(all="ignore"):  # what is beyond all measure ends at the features' limit
            return self._build(point, self.window_size, point.topology, point)

    def build_model_graph(
        self,
        health_signals: Sequence[HealthSignal],
        model_topology: ModelTopology | None = None,
        window_size: int = 100,
        *,
        run: RunFacts | None = None,
    ) -> ModelGraphState:
        """Build a graph from health signals, as a service does that was sent nothing else.

        Args:
            health_signals: Of layers and seeds, in any order.
            model_topology: The traced host. Without it the nodes are the layers that spoke, in the order in
                which they first did, one after another in a chain; what depends on shapes is then 0.
            window_size: Signals of one layer that count.
            run: What is known of the run; features that depend on it are 0 without.

        Returns:
            A state whose candidates are, besides WAIT, for every node one that grows there (site, blueprint
            and size left open: see :func:`esper.tamiyo.graph.carry_out.settled`) and one that recycles it,
            and for every seed that spoke one that culls and one that holds it.
        """
        _check_window(window_size)
        topology = model_topology or _chain(health_signals)
        layout = self._layout(topology)
        point = DecisionPoint(
            run=run or _unknown_run(health_signals, topology),
            topology=topology,
            signals=tuple(health_signals),
            candidates=_candidates(layout, health_signals),
            timestamp=max((signal.timestamp for signal in health_signals), default=time.time()),
        )
        with np.errstate(all="ignore"):
            return self._build(point, window_size, model_topology, None)

    def _build(
        self, point: DecisionPoint, size: int, topology: ModelTopology | None, facts: DecisionPoint | None
    ) -> ModelGraphState:
        layout, run = self._layout(point.topology), point.run
        window = SignalWindow(point.signals, layout.names, size)
        grown = Grown.of(layout, run.seeds)
        places = Places.of(point.candidates, layout)
        wrong = problems(window)
        edge_index, edge_attr = edge_features(layout, grown)
        found = candidate_features(point.candidates, places, run, layout, grown, window)
        graph = CandidateGraph(
            x=torch.from_numpy(node_features(layout, grown, window, size)),
            edge_index=torch.from_numpy(np.ascontiguousarray(edge_index)),
            edge_attr=torch.from_numpy(edge_attr),
            global_features=torch.from_numpy(global_features(run, layout, grown, window, len(wrong))),
            candidate_attr=torch.from_numpy(found),
            candidate_mask=torch.tensor([not c.unavailable for c in point.candidates], dtype=torch.bool),
            candidate_batch=torch.zeros(len(point.candidates), dtype=torch.long),
            placement_index=torch.from_numpy(np.ascontiguousarray(places.nodes)),
            placement_candidate=torch.from_numpy(places.candidate),
            num_nodes=layout.num_nodes,
        )
        return ModelGraphState(
            graph_data=graph,
            candidates=point.candidates,
            node_names=layout.names,
            timestamp=point.timestamp,
            health_signals=point.signals,
            topology=topology,
            global_metrics=global_metrics(run, window, wrong),
            health_trends=window.trends(),
            problematic_layers=wrong,
            point=facts,
        )

    def _layout(self, topology: ModelTopology) -> Layout:
        """The topology as arrays; a run sends the same one again and again."""
        found = self._layouts.get(id(topology))
        if found is None or found.topology is not topology:
            found = Layout(topology)
            if len(self._layouts) >= _LAYOUTS_KEPT:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[id(topology)] = found
        return found


def _check_window(size: int) -> None:
    if size < 1:
        raise ConfigError(f"window_size expects at least 1 signal, got {size}")


def _chain(signals: Sequence[HealthSignal]) -> ModelTopology:
    """The layers that spoke, one after another: as good a guess as the order of signals allows."""
    names = list(dict.fromkeys(signal.layer_id for signal in signals))
    layers = tuple(
        LayerInfo(
            name=name, type="", input_shape=(), output_shape=(), num_parameters=0, flops=0, num_calls=1,
            is_output=name == names[-1], reads_input=name == names[0],
        )
        for name in names
    )  # fmt: skip
    edges = tuple(Edge(first, second) for first, second in pairwise(names))
    return ModelTopology(layers=layers, edges=edges, refused={}, num_parameters=0)


def _unknown_run(signals: Sequence[HealthSignal], topology: ModelTopology) -> RunFacts:
    """What signals tell of their run: how far it is, and nothing of its length, budget or loss."""
    last = max(signals, key=lambda signal: signal.step, default=None)
    return RunFacts(
        run_id="",
        step=0 if last is None else last.step,
        total_steps=0,
        epoch=0 if last is None else last.epoch,
        host_parameters=topology.num_parameters,
        num_parameters=topology.num_parameters,
        parameters_left=0,
        flops_left=float("inf"),
        germinations_left=0,
        tokens_per_parameter=0.0,
        transformer=topology.transformer,
        window_open=True,
    )


def _candidates(layout: Layout, signals: Sequence[HealthSignal]) -> tuple[Candidate, ...]:
    found = [WAIT]
    for name in layout.names:
        place = (Placement(site="", source=name, target=name),)
        found += [Candidate(action="grow", placements=place), Candidate(action="recycle", placements=place)]
    seeds = {signal.seed_id: signal.layer_id for signal in signals if signal.seed_id}
    for seed_id, layer in seeds.items():
        if layer in layout.index:
            place = (Placement(site="", source=layer, target=layer),)
            found += [Candidate(action="cull", placements=place, seed_id=seed_id)]
            found += [Candidate(action="hold", placements=place, seed_id=seed_id)]
    return tuple(found)
