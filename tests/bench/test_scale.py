"""The scale benchmark measures what it says; its targets need the depths, and a quiet machine."""

from __future__ import annotations

import json
import math
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from esper.bench import scale
from esper.bench._overhead_arms import quiet
from esper.bench._scale_costs import costs, time_arms
from esper.bench._scale_device import SYNCHRONISING, SyncCounter, _fit, device_figures
from esper.bench._scale_hosts import ScaleModule, make_batches
from esper.errors import ConfigError
from esper.hosts import GPTConfig

TINY = GPTConfig(vocab_size=16, context=8, d_model=16, depth=1, num_heads=2)


@pytest.mark.parametrize("kind", ["mlp", "residual", "gpt"])
def test_a_gradient_reaches_the_first_layer_of_a_deep_host(kind: str) -> None:
    torch.manual_seed(0)
    module = ScaleModule(kind, 200)
    loss = module.training_step(make_batches(kind, 1)[0], 0)
    loss.backward()
    assert 0.5 < float(loss.detach()) < 10
    norms = [float(p.grad.norm()) for p in module.parameters() if p.grad is not None and p.dim() > 1]
    assert min(norms) > 1e-6
    assert max(norms) < 100


@pytest.mark.parametrize("kind", ["mlp", "residual", "gpt"])
def test_every_cost_of_a_host_is_told(kind: str) -> None:
    quiet()
    found = costs((kind, 12, 1))
    for name in ("step_ms", "attach_ms", "decision_ms", "idle_decision_ms", "signal_bytes", "decision_bytes"):
        assert found[name] > 0, name
    assert found["layers"] >= 12
    assert found["sites"] > 5
    if kind == "gpt":  # enough tokens are announced for its growth to pay
        assert found["seeds"] > 0
        assert found["germination_ms"] > 0
    assert json.loads(json.dumps(found)) == found


def test_dormant_steps_are_timed_beside_bare_ones() -> None:
    quiet()
    times = time_arms(("mlp", 6, 4, 2))
    assert {arm: [len(block) for block in blocks] for arm, blocks in times.items()} == {
        "without": [4, 4], "again": [4, 4], "callback": [4, 4],
    }  # fmt: skip
    ratios = scale._ratios("mlp_6", times)
    assert set(ratios) == {"mlp_6_ratio", "mlp_6_again_ratio"}
    assert all(0.2 < ratio < 5 for ratio in ratios.values())


def test_exponents_are_slopes_of_logarithms() -> None:
    assert scale.exponent([10, 100, 1000], [3, 30, 300]) == pytest.approx(1)
    assert scale.exponent([10, 100], [2, 200]) == pytest.approx(2)
    assert math.isnan(scale.exponent([10, 100], [0, 5]))
    host = {"attach_ms": 1.0, "probe_ms": 1.0, "decision_ms": 1.0, "signal_bytes": 9.0, "decision_bytes": 9.0}
    figures = scale._exponents(
        "mlp",
        [
            {**host, "layers": 10.0, "memory_mb": 0.1},
            {**host, "layers": 100.0, "memory_mb": 2.0},
            {**host, "layers": 1000.0, "memory_mb": 20.0, "attach_ms": 100.0},
        ],
    )
    assert figures["mlp_memory_mb_exponent"] == pytest.approx(1)  # what is lost in rounding does not count
    assert figures["mlp_attach_ms_exponent"] == pytest.approx(1)
    assert figures["mlp_attach_ms_exponent_deep"] == pytest.approx(2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kinds": ("cnn",)}, "kinds of host are mlp, residual, gpt"),
        ({"depths": (10, 10)}, "two depths or more"),
        ({"depths": (2, 10)}, "four layers at least"),
        ({"device": "tpu"}, "device should be cpu or cuda"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        scale.run(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="device=cuda expects a GPU that torch can use, and there is none"):
        scale.run(device="cuda")


class _Waits(L.Callback):
    """Reads a tensor on the host twice a step."""

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        module.host.head.weight.detach().sum().item()
        bool(module.host.head.weight.detach().isnan().any())


def test_synchronising_operations_are_counted_by_the_profiler() -> None:
    quiet()

    def counted(*callbacks: L.Callback) -> dict[str, int]:
        counter = SyncCounter(first=2, num_steps=3)
        _fit(TINY, 2, [*callbacks, counter], 7, "cpu", False, "32-true")
        assert set(counter.counts) <= set(SYNCHRONISING)
        return dict(counter.counts)

    bare, waiting = counted(), counted(_Waits())
    assert waiting.get("aten::_local_scalar_dense", 0) - bare.get("aten::_local_scalar_dense", 0) == 2 * 3


def test_the_rehearsal_of_the_gpu_part_grows_and_tells_every_figure() -> None:
    quiet()
    found = device_figures(
        device="cpu", host=TINY, batch_size=2, compiled=False, precision="bf16-mixed", block_steps=3, num_blocks=1
    )  # fmt: skip
    assert set(found) == {
        "device_parameters", "device_step_ms", "device_ratio", "device_again_ratio", "device_added_syncs",
        "device_growth_s", "device_recompile_s",
    }  # fmt: skip
    assert found["device_parameters"] == sum(p.numel() for p in _tiny().parameters())
    assert 0 < found["device_growth_s"] < 60
    assert {name for name in scale.TARGETS if name.startswith("device_")} <= set(found)


def _tiny() -> torch.nn.Module:
    from esper.hosts import build_host

    return build_host(TINY)
