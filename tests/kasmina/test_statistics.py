"""Layer statistics against naive references, and on every degenerate input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from esper.kasmina import statistics
from esper.kasmina.statistics import LayerSample, LayerStatistics, drain, summarise


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def naive(sample: LayerSample) -> LayerStatistics:
    """The definitions, a layer at a time in numpy."""
    x = sample.activation.double().numpy()
    n, units = x.shape
    magnitude = np.abs(x).mean(0)
    pick = [i * units // 32 for i in range(32)] if units > 32 else list(range(units))
    chosen = x[:, pick]
    varying = chosen[:, chosen.std(0) > 0]
    count = varying.shape[1]
    correlation = np.abs(np.corrcoef(varying.T)).sum() - count if count > 1 else 0.0
    singular = np.linalg.svd(chosen - chosen.mean(0), compute_uv=False)
    p = singular / singular.sum()
    rank = math.exp(-(p[p > 0] * np.log(p[p > 0])).sum())
    assert sample.output_gradient is not None
    assert sample.weight_before is not None
    assert sample.weight_after is not None
    g = sample.output_gradient.double().numpy()
    before, after = sample.weight_before.double().numpy(), sample.weight_after.double().numpy()
    return LayerStatistics(
        activation_variance=x.var(0).mean(),
        dead_neuron_ratio=(x == 0).all(0).mean(),
        dormancy=(magnitude <= 0.1 * magnitude.mean()).mean(),
        avg_correlation=correlation / max(1, count * (count - 1)),
        effective_rank=rank,
        rank_fraction=rank / min(n - 1, units, 32),
        gradient_norm=math.sqrt(sum(float(t.double().square().sum()) for t in sample.gradients)),
        gradient_snr=np.linalg.norm(g.mean(0)) / math.sqrt(g.var(0, ddof=1).sum() / len(g)),
        update_ratio=np.linalg.norm(after - before) / max(np.linalg.norm(before), np.linalg.norm(after)),
        error_count=0,
    )


def layer(rows: int, units: int) -> LayerSample:
    activation = (torch.randn(rows, 3) @ torch.randn(3, units) + 0.3 * torch.randn(rows, units)).relu()
    activation[:, units // 2] = 0.0
    activation[:, 0] *= 0.01
    before = torch.randn(50)
    return LayerSample(
        activation,
        output_gradient=torch.randn(rows, units) + 0.2,
        gradients=(torch.randn(units, 4), torch.randn(units)),
        weight_before=before,
        weight_after=before + 0.01 * torch.randn(50),
    )


def test_all_layers_agree_with_the_definitions_whatever_their_sizes() -> None:
    samples = [layer(*size) for size in [(64, 16), (64, 4), (40, 100), (10, 64), (64, 30)]]
    table = drain(summarise(samples))
    for sample, row in zip(samples, table, strict=True):
        for name, expected, value in zip(row._fields, naive(sample), row, strict=True):
            assert value == pytest.approx(expected, rel=1e-5, abs=1e-9), name
    assert 0.0 < table[0].dormancy < 1.0


def test_functions_for_one_layer_equal_the_table() -> None:
    sample = layer(64, 100)
    assert sample.output_gradient is not None
    assert sample.weight_before is not None
    assert sample.weight_after is not None
    x = sample.activation
    single = [
        statistics.activation_variance(x),
        statistics.dead_unit_ratio(x),
        statistics.dormancy(x),
        statistics.mean_absolute_correlation(x),
        statistics.effective_rank(x),
        statistics.rank_fraction(x),
        statistics.gradient_norm(*sample.gradients),
        statistics.gradient_snr(sample.output_gradient),
        statistics.update_ratio(sample.weight_before, sample.weight_after),
    ]
    assert all(value.ndim == 0 for value in single)
    torch.testing.assert_close(torch.stack(single), summarise([sample])[0, :-1])


def test_inputs_are_left_alone_and_no_graph_is_kept() -> None:
    x = torch.randn(64, 8, requires_grad=True)
    before = x.detach().clone()
    table = summarise([LayerSample(x, output_gradient=x)])
    assert not table.requires_grad
    assert torch.equal(x, before)


def test_many_layers_are_computed_in_chunks_alike() -> None:
    samples = [layer(16, 4 + i % 3) for i in range(40)]
    alone = torch.cat([summarise([sample]) for sample in samples])
    torch.testing.assert_close(summarise(samples), alone, rtol=1e-5, atol=1e-6)


def test_no_layers() -> None:
    assert drain(summarise([])) == []


NAN, INF = float("nan"), float("inf")
DEGENERATE = {
    "zero": torch.zeros(8, 5),
    "constant": torch.full((8, 5), 3.3),
    "nan": torch.full((8, 5), NAN),
    "inf": torch.full((8, 5), INF),
    "mixed": torch.tensor([[NAN, 1.0], [-INF, 2.0], [0.5, INF]]),
    "one row": torch.randn(1, 5),
    "one unit": torch.randn(8, 1),
    "one element": torch.randn(1, 1),
    "empty": torch.zeros(0, 5),
    "huge": torch.full((8, 5), 3e38) * torch.tensor([1.0, -1.0] * 4)[:, None],
    "tiny": torch.randn(8, 5) * 1e-40,
    "float64 huge": torch.randn(8, 5, dtype=torch.float64) * 1e300,
    "half": torch.randn(8, 5).bfloat16(),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_input_gives_finite_figures_in_range(name: str) -> None:
    x = DEGENERATE[name]
    sample = LayerSample(x, x, (x,), x.flatten(), x.flatten() * 0.5)
    # Beside a layer of another size: padding must not leak.
    row, other = drain(summarise([sample, layer(64, 16)]))
    for value in row:
        assert math.isfinite(value)
        assert value >= 0.0
    for value in (row.dead_neuron_ratio, row.dormancy, row.avg_correlation, row.rank_fraction):
        assert value <= 1.0
    assert other.error_count == 0
    assert row.effective_rank <= max(0, min(x.shape[0] - 1, x.shape[1])) + 1e-9


def test_what_zero_constant_and_one_row_mean() -> None:
    zero, constant, one_row = drain(
        summarise([LayerSample(DEGENERATE[k], DEGENERATE[k]) for k in ("zero", "constant", "one row")])
    )
    assert (zero.dead_neuron_ratio, zero.dormancy) == (1.0, 1.0)
    assert (constant.dead_neuron_ratio, constant.dormancy, constant.effective_rank) == (0.0, 0.0, 0.0)
    assert constant.avg_correlation == 0.0
    assert constant.gradient_snr == statistics.MAX_RATIO
    assert one_row.gradient_snr == 0.0
    assert one_row.activation_variance == 0.0


def test_nonfinite_elements_are_counted_wherever_they_are() -> None:
    x = torch.ones(4, 3)
    x[0, 0], x[1, 1] = NAN, -INF
    assert int(statistics.nonfinite_count(x)) == 2
    clean = torch.ones(4, 3)
    rows = [
        LayerSample(x),
        LayerSample(clean, output_gradient=x),
        LayerSample(clean, gradients=(clean, x)),
        LayerSample(clean, weight_before=clean.flatten(), weight_after=x.flatten()),
        LayerSample(clean),
    ]
    assert [row.error_count for row in drain(summarise(rows))] == [2, 2, 1, 1, 0]


def test_effective_rank_counts_directions() -> None:
    basis = torch.linalg.qr(torch.randn(64, 64))[0]
    centred = basis - basis.mean(0)
    x = torch.linalg.qr(centred[:, :5])[0] @ torch.linalg.qr(torch.randn(20, 5))[0].T
    assert float(statistics.effective_rank(x)) == pytest.approx(5.0, rel=1e-4)
    assert float(statistics.effective_rank(1e-20 * x)) == pytest.approx(5.0, rel=1e-4)


def test_snr_of_noise_is_one_and_a_signal_grows_with_the_rows() -> None:
    noise = torch.randn(400, 50)
    assert float(statistics.gradient_snr(noise)) == pytest.approx(1.0, abs=0.3)
    few, many = (float(statistics.gradient_snr(noise[:n] + 1.0)) for n in (50, 200))
    assert many / few == pytest.approx(2.0, rel=0.1)


def test_update_ratio_of_a_newborn_weight_is_one() -> None:
    zero, weight = torch.zeros(9), torch.ones(9)
    assert float(statistics.update_ratio(zero, weight)) == 1.0
    assert float(statistics.update_ratio(zero, zero)) == 0.0
    assert float(statistics.update_ratio(weight, weight * 1.01)) == pytest.approx(0.01 / 1.01, rel=1e-3)


def test_figures_fit_a_health_signal() -> None:
    import msgspec

    from esper.messages import HealthSignal

    def signal(row: LayerStatistics) -> HealthSignal:
        return HealthSignal(
            "fc", "", 0, 0, 1, *row[:5], *row[6:9], 0.0, False, 0.5, 0.0, row.error_count, 0, 0, 0.0
        )

    def figures(x: Tensor) -> LayerStatistics:
        return drain(summarise([LayerSample(x, x, (x,), x.flatten(), -x.flatten())]))[0]

    for x in DEGENERATE.values():
        encoded = msgspec.json.encode(signal(figures(x)))
        msgspec.json.decode(encoded, type=HealthSignal)  # checks the ranges
