"""The whole network: equivariance, batches, degenerate graphs, gradients, samples."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from policy_graphs import SMALL, random_graph

from esper.errors import ConfigError
from esper.tamiyo.geometric import Batch
from esper.tamiyo.graph.data import CandidateGraph
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import PolicyOutput, TamiyoNetwork
from esper.tamiyo.network.uncertainty import measure_uncertainty


def network(**changes: object) -> TamiyoNetwork:
    torch.manual_seed(0)
    return TamiyoNetwork(dataclasses.replace(SMALL, **changes)).eval()  # type: ignore[arg-type]


def permuted(graph: CandidateGraph, order: torch.Tensor) -> CandidateGraph:
    """The same graph with node ``order[i]`` in place ``i``, its edges and placements in reverse."""
    place = order.argsort()
    return CandidateGraph(
        x=graph.x[order],
        edge_index=place[graph.edge_index].flip(1),
        edge_attr=graph.edge_attr.flip(0),
        global_features=graph.global_features,
        candidate_attr=graph.candidate_attr,
        candidate_mask=graph.candidate_mask,
        candidate_batch=graph.candidate_batch,
        placement_index=place[graph.placement_index].flip(1),
        placement_candidate=graph.placement_candidate.flip(0),
    )


def close(a: PolicyOutput, b: PolicyOutput) -> None:
    torch.testing.assert_close(tuple(a), tuple(b), atol=1e-5, rtol=1e-4)


def test_the_order_of_nodes_edges_and_placements_does_not_matter() -> None:
    graph, net = random_graph(7, 6), network()
    other = permuted(graph, torch.randperm(7, generator=torch.Generator().manual_seed(4)))
    close(net(graph), net(other))
    torch.testing.assert_close(net.sample(graph)[1], net.sample(other)[1], atol=1e-5, rtol=1e-4)


def test_outputs_follow_the_order_of_candidates() -> None:
    graph, net = random_graph(5, 5), network()
    order = torch.tensor([0, 3, 1, 4, 2])
    other = graph.clone()
    other.candidate_attr = graph.candidate_attr[order]
    other.candidate_mask = graph.candidate_mask[order]
    other.placement_candidate = order.argsort()[graph.placement_candidate]
    one, two = net(graph), net(other)
    torch.testing.assert_close(two.logits, one.logits[order])
    torch.testing.assert_close(two.risk, one.risk[order])
    torch.testing.assert_close(two.value, one.value)


def test_a_batch_gives_what_its_graphs_give_alone() -> None:
    graphs = [random_graph(n, c, seed=n) for n, c in ((6, 5), (0, 2), (1, 1), (9, 12))]
    net, batch = network(), Batch.from_data_list(graphs)
    alone = [net(graph) for graph in graphs]
    close(net(batch), PolicyOutput(*(torch.cat(parts) for parts in zip(*alone, strict=True))))
    output, samples = net.sample(batch)
    torch.testing.assert_close(samples, torch.cat([net.sample(graph)[1] for graph in graphs], 1))
    distribution = net.distribution(output, batch)
    assert distribution.num_available.tolist() == [int(graph.candidate_mask.sum()) for graph in graphs]


@pytest.mark.parametrize(("num_nodes", "num_candidates"), [(0, 1), (1, 1), (1, 4), (2, 3)])
def test_degenerate_graphs_give_finite_outputs(num_nodes: int, num_candidates: int) -> None:
    output = network()(random_graph(num_nodes, num_candidates))
    assert output.logits.shape == output.risk.shape == (num_candidates,)
    assert output.value.shape == output.urgency.shape == (1,)
    assert all(bool(torch.isfinite(part).all()) for part in output)


def test_ten_thousand_nodes() -> None:
    graph = random_graph(10_000, 50)
    with torch.inference_mode():
        output, samples = network().sample(graph)
    assert samples.shape == (4, 50)
    assert torch.isfinite(output.logits).all()


def test_ranges() -> None:
    with torch.no_grad():
        output = network()(random_graph())
    assert float(output.risk[0]) == 0.0
    assert bool(((output.risk[1:] > 0) & (output.risk[1:] < 1)).all())
    assert float(output.urgency) >= 0


def test_gradients_reach_every_parameter() -> None:
    net = network().train()
    batch = Batch.from_data_list([random_graph(seed=seed) for seed in range(4)])
    torch.manual_seed(0)
    sum(part.sum() for part in net(batch)).backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())]
    # softmax over neighbours does not change with what is added to all of them
    assert [name for name in silent if not name.endswith("attention.key.bias")] == []


def test_what_is_available_is_part_of_the_value_and_not_of_the_logits() -> None:
    graph, net = random_graph(), network()
    other = graph.clone()
    other.candidate_mask = torch.tensor([True, False, False, False, False])
    torch.testing.assert_close(net(graph).logits, net(other).logits)
    assert not torch.allclose(net(graph).value, net(other).value)


def test_training_is_noisy_and_follows_the_seed() -> None:
    net, graph = network().train(), random_graph()
    torch.manual_seed(1)
    one, two = net(graph).logits, net(graph).logits
    torch.manual_seed(1)
    assert not torch.equal(one, two)
    assert torch.equal(net(graph).logits, one)


def test_sampling_is_deterministic_leaves_the_global_generator_alone_and_does_not_ask_the_mode() -> None:
    net, graph = network(), random_graph()
    before = torch.get_rng_state()
    output, samples = net.sample(graph)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(net.sample(graph)[1], samples)
    net.train()
    training_output, training_samples = net.sample(graph)
    assert torch.equal(training_samples, samples)
    assert torch.equal(training_output.logits, output.logits)
    assert not torch.equal(net.sample(graph, seed=1)[1], samples)
    torch.testing.assert_close(net.eval()(graph).logits, output.logits)


def test_more_sampled_layers_add_noise_of_their_own() -> None:
    graph = random_graph()
    samples = {n: network(num_sampled_layers=n).sample(graph)[1] for n in (0, 1, 2)}
    assert not torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[1], samples[2])


def test_without_dropout_the_samples_agree_and_nothing_is_uncertain() -> None:
    net, graph = network(feature_dropout=0.0, head_dropout=0.0), random_graph()
    output, samples = net.sample(graph)
    unsure = measure_uncertainty(samples.detach(), graph.candidate_mask, graph.candidate_batch, 1)
    assert float(unsure.epistemic) == pytest.approx(0.0, abs=1e-6)
    assert unsure.spread.tolist() == pytest.approx([0.0] * 5, abs=1e-6)
    distribution = net.distribution(output, graph)
    torch.testing.assert_close(unsure.aleatoric, distribution.normalised_entropy)


def test_samples_that_contradict_one_another_are_all_epistemic() -> None:
    samples = torch.tensor([[50.0, 0.0, 9.0], [0.0, 50.0, 9.0]])
    mask, batch = torch.tensor([True, True, False]), torch.zeros(3, dtype=torch.long)
    unsure = measure_uncertainty(samples, mask, batch, 1)
    assert float(unsure.epistemic) == pytest.approx(1.0)
    assert float(unsure.aleatoric) == pytest.approx(0.0, abs=1e-6)
    assert unsure.spread[1] == pytest.approx(50.0)


def test_one_candidate_leaves_nothing_to_be_uncertain_of() -> None:
    unsure = measure_uncertainty(torch.randn(4, 1), torch.tensor([True]), torch.tensor([0]), 1)
    assert (float(unsure.epistemic), float(unsure.aleatoric)) == (0.0, 0.0)


def test_a_graph_of_other_features_is_refused() -> None:
    config = dataclasses.replace(SMALL, global_feature_dim=3, node_feature_dim=5)
    with pytest.raises(ConfigError, match="5 node features instead of 16, 3 global features instead of 36"):
        network()(random_graph(config=config))


def test_sizes_of_the_config_shape_the_network() -> None:
    def count(**changes: object) -> int:
        return sum(p.numel() for p in network(**changes).parameters())

    assert count(num_gnn_layers=3) > count()
    assert count(hidden_dim=32) > count()
    assert network(uncertainty_samples=7).sample(random_graph())[1].shape[0] == 7
    heads = [network(num_attention_heads=n)(random_graph()).logits for n in (2, 4)]
    assert not torch.equal(*heads)
    assert len(TamiyoNetwork(PolicyConfig()).layers) == 4


@pytest.mark.parametrize("rate", ["attention_dropout", "feature_dropout", "head_dropout"])
def test_each_dropout_makes_training_noisy_by_itself(rate: str) -> None:
    silent = {"attention_dropout": 0.0, "feature_dropout": 0.0, "head_dropout": 0.0}
    graph = random_graph()
    quiet = network(**silent).train()
    assert torch.equal(quiet(graph).logits, quiet.eval()(graph).logits)
    noisy = network(**{**silent, rate: 0.5}).train()
    torch.manual_seed(1)
    assert not torch.equal(noisy(graph).logits, noisy.eval()(graph).logits)
