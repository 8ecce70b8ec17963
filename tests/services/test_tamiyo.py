"""The design document's integration example runs as it stands there, against a live training."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import Loop
from service_points import make_signal, make_topology
from service_threads import wait_for

from esper.errors import CheckpointError, ConfigError
from esper.kasmina.probes import ProbeRunner
from esper.messages import RunRecord
from esper.oona import CommandInbox, Publisher, find_runs
from esper.services.tamiyo import (
    EnhancedTamiyoPolicyGNN,
    ModelGraphAnalyzer,
    ModelGraphBuilder,
    PolicyConfig,
    ProductionHealthCollector,
    ProductionPolicyTrainer,
    ProductionTrainingConfig,
    TamiyoService,
)
from esper.tamiyo.network.weights import save_network
from esper.tamiyo.service.run_link import RunLink

CONTENTS = """
from .health_collector import ProductionHealthCollector
from .model_graph_builder import ModelGraphBuilder, ModelGraphState, ModelTopology  
from .policy import EnhancedTamiyoPolicyGNN, PolicyConfig
from .policy_trainer import ProductionPolicyTrainer, ProductionTrainingConfig
from .analyzer import ModelGraphAnalyzer, LayerNode
from .main import TamiyoService

__all__ = [
    "ProductionHealthCollector",
    "ModelGraphBuilder", 
    "ModelGraphState",
    "ModelTopology",
    "EnhancedTamiyoPolicyGNN",
    "PolicyConfig", 
    "ProductionPolicyTrainer",
    "ProductionTrainingConfig",
    "ModelGraphAnalyzer",
    "LayerNode",
    "TamiyoService",
]
"""
"""What the document says stands in ``esper.services.tamiyo``."""

EXAMPLE = """
# Initialize Phase 2 components
from esper.services.tamiyo import (
    ProductionHealthCollector,
    ModelGraphBuilder, 
    EnhancedTamiyoPolicyGNN,
    ProductionPolicyTrainer,
    PolicyConfig,
    ProductionTrainingConfig
)

# Setup health collection
health_collector = ProductionHealthCollector(oona_client, buffer_size=50000)
await health_collector.start_intelligent_collection()

# Setup graph builder
graph_builder = ModelGraphBuilder(node_feature_dim=16, edge_feature_dim=8)

# Setup enhanced policy
policy_config = PolicyConfig(
    num_attention_heads=4,
    enable_uncertainty=True,
    safety_margin=0.1
)
policy = EnhancedTamiyoPolicyGNN(policy_config)

# Setup production trainer
training_config = ProductionTrainingConfig(
    batch_size=64,
    ppo_epochs=4,
    safety_loss_weight=1.0
)
trainer = ProductionPolicyTrainer(policy, policy_config, training_config)

# Real-time autonomous operation
async def autonomous_adaptation_loop():
    while True:
        # Collect health signals
        health_signals = await health_collector.get_recent_signals(count=500)
        
        # Build graph state
        graph_state = graph_builder.build_model_graph(health_signals)
        
        # Make policy decision
        decision = policy.make_decision(graph_state)
        
        if decision:
            # Execute adaptation (Phase 1 integration)
            result = await execute_adaptation(decision)
            
            # Store experience for training
            reward = compute_reward(result)
            trainer.replay_buffer.add_experience(
                state=graph_state,
                action=decision,
                reward=reward,
                next_state=None,  # Filled by next iteration
                td_error=abs(reward)
            )
        
        await asyncio.sleep(0.1)  # 100ms decision cycle

# Start autonomous operation
await autonomous_adaptation_loop()
"""
"""The document's integration example, to the letter."""

PIPELINE = """
# Initialize trainer
trainer = ProductionPolicyTrainer(policy, policy_config, training_config)

# Train with real-time experience collection
training_summary = await trainer.train_with_experience_collection(
    health_collector=health_collector,
    graph_builder=graph_builder,
    num_episodes=1000
)

# Monitor training progress
stats = trainer.get_training_statistics()
print(f"Training progress: {stats}")
"""
"""The document's training pipeline, to the letter."""

CYCLES = 50


class EnoughError(Exception):
    """So many cycles have been seen."""


async def execute(code: str, namespace: dict[str, Any]) -> None:
    """Run a text that awaits at its top level, as a notebook does."""
    compiled = compile(code, "tamiyo-service.txt", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    outcome = eval(compiled, namespace)
    if inspect.iscoroutine(outcome):
        await outcome


class LiveRun:
    """A plain training with growth in a thread, on the bus like any other; it lasts until it is told to stop."""

    def __init__(self) -> None:
        self.loop = Loop(
            total_steps=400,
            probes={"interval_steps": 4, "decision_interval": 5e-3},
            budget={"max_parameters_ratio": 2.0, "max_germinations_per_epoch": 1, "site_cooldown_steps": 0},
        )
        self.stopping = False
        self.failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._train)

    def _train(self) -> None:
        try:
            with Publisher("run") as publisher, CommandInbox("run") as inbox:
                self.loop.sink.publish = publisher.publish  # type: ignore[method-assign]
                self._steps(inbox)
                self.loop.controller.recorder.run(RunRecord("run", "end", self.loop.step, {}, time.time()))
        except BaseException as error:
            self.failures.append(error)

    def _steps(self, inbox: CommandInbox) -> None:
        loop, controller = self.loop, self.loop.controller
        probes = ProbeRunner(loop.body)
        while not self.stopping:
            batch, sampled = loop.train[loop.step % len(loop.train)], loop.step % 4 == 0
            if sampled:
                probes.begin()
            loop.optimizers[0].zero_grad()
            loss = batch()
            loss.backward()
            controller.warden.note_gradients(loop.model.named_parameters())
            if sampled:
                probes.note_gradients()
            loop.optimizers[0].step()
            loop.step += 1
            controller.note_batch(loss, batch.num_samples)
            epoch = loop.step // 20
            if sampled:
                ready, scores = controller.gatekeeper.ready, controller.scores
                controller.note_health(probes.end(step=loop.step, epoch=epoch, ready=ready, scores=scores))
            for command in inbox.poll():
                controller.request(command.decision)
            controller.safe_point(loop.step, epoch)
            time.sleep(1e-3)  # the other thread has things to do

    def __enter__(self) -> LiveRun:
        self._thread.start()
        wait_for(lambda: self.failures or len(find_runs()) == 1, "the run")
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self.failures:
            raise self.failures[0]


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="esper-test-") as short:
        monkeypatch.setenv("ESPER_RUNTIME_DIR", short)
        yield tmp_path


@pytest.fixture(scope="module")
def willing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network that has learned to grow anything that speaks."""
    torch.manual_seed(0)
    network = EnhancedTamiyoPolicyGNN(PolicyConfig())
    names = ["0", "2", "4"]
    signals = [make_signal(name, step) for step in range(4, 40, 4) for name in names]
    state = ModelGraphBuilder().build_model_graph(signals)
    grows = torch.tensor([candidate.action == "grow" for candidate in state.candidates])
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(60):
        logits = network(state.graph_data).logits
        margin = logits[grows] - logits[~grows].max()
        if float(margin.detach().min()) > 8:
            break
        optimizer.zero_grad()
        (8.5 - margin).relu().mean().backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "willing.safetensors"
    save_network(network, path, card="Made by a test.")
    return path


def test_the_document_s_names_are_there() -> None:
    namespace: dict[str, Any] = {"__package__": "esper.services.tamiyo", "__name__": "esper.services.tamiyo"}
    exec(CONTENTS, namespace)
    import esper.services.tamiyo as ours

    assert set(namespace["__all__"]) == set(ours.__all__)
    for name in ours.__all__:
        assert getattr(ours, name) is namespace[name]


def test_the_integration_example_runs_as_it_stands(
    runtime_dir: Path, willing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_TAMIYO_WEIGHTS", str(willing))
    cycles, results = 0, []

    async def sleep(seconds: float) -> None:
        nonlocal cycles
        assert seconds == 0.1
        cycles += 1
        if cycles >= CYCLES:
            raise EnoughError
        await asyncio.sleep(0.01)

    async def main(live: LiveRun) -> dict[str, Any]:
        with RunLink("run", horizon_timeout_s=40.0) as link:

            async def execute_adaptation(decision: Any) -> Any:
                results.append(await link.execute_adaptation(decision))
                return results[-1]

            namespace: dict[str, Any] = {
                "asyncio": types.SimpleNamespace(sleep=sleep),
                "oona_client": link.oona_client,
                "execute_adaptation": execute_adaptation,
                "compute_reward": link.compute_reward,
            }
            try:
                with contextlib.suppress(EnoughError):
                    await execute(EXAMPLE, namespace)
            finally:
                await namespace["health_collector"].stop()
            return namespace

    with LiveRun() as live:
        namespace = asyncio.run(main(live))
        applied = [result for result in results if result.applied]
        assert cycles == CYCLES
        assert applied, results
        planted = {event.seed_id for event in live.loop.transitions if event.target == "germinated"}
        assert {result.record.seed_id for result in applied} == planted
        record = applied[0].record
        assert record.decision.policy == "tamiyo-service"
        assert record.decision.site.startswith(("bypass:", "parallel:", "stack:"))
        assert record.decision.size > 0
    buffer = namespace["trainer"].replay_buffer
    assert len(buffer) == len(results)
    kept = [experience.transition for experience in buffer._kept]
    assert [transition.action for transition in kept] == [result.decision.candidate for result in results]
    assert all(-1.0 <= transition.reward <= 1.0 for transition in kept)


def test_the_training_pipeline_runs_as_it_stands(runtime_dir: Path, willing: Path) -> None:
    async def main(live: LiveRun) -> dict[str, Any]:
        async with TamiyoService("run", weights=willing, horizon_timeout_s=20.0) as service:
            namespace: dict[str, Any] = {
                "ProductionPolicyTrainer": ProductionPolicyTrainer,
                "policy": service.policy,
                "policy_config": service.policy.config,
                "training_config": ProductionTrainingConfig(batch_size=2),
                "health_collector": service.health_collector,
                "graph_builder": service.graph_builder,
            }
            pipeline = asyncio.create_task(execute(PIPELINE, namespace))
            trainer = await _soon(lambda: namespace.get("trainer"))
            await _soon(lambda: len(trainer.replay_buffer) >= 1)
            live.stopping = True  # a thousand episodes end with the run
            await pipeline
            return namespace

    with LiveRun() as live:
        namespace = asyncio.run(main(live))
    assert namespace["stats"] == namespace["trainer"].get_training_statistics()
    assert namespace["training_summary"]["replay_size"] >= 1


async def _soon(condition: Any) -> Any:
    for _ in range(3000):
        if found := condition():
            return found
        await asyncio.sleep(0.01)
    raise AssertionError("waited 30 s")


def test_the_service_waits_for_its_cooldown(runtime_dir: Path, willing: Path) -> None:
    async def main(live: LiveRun) -> Any:
        settings = {"cycle_s": 0.01, "cooldown_s": 60.0, "horizon_timeout_s": 0.1}
        async with TamiyoService("run", weights=willing, **settings) as service:
            while not (cycle := await service.run(20)).num_adaptations:
                pass
            reward = service.compute_reward(cycle.last)
            return await service.run(0), cycle, reward

    with LiveRun() as live:
        _, cycle, reward = asyncio.run(main(live))
    assert cycle.num_adaptations == 1
    assert cycle.num_cycles == 20
    assert -1.0 <= reward <= 1.0


def test_a_trainer_wants_the_policy_s_own_config_and_a_way_back_into_the_run() -> None:
    policy = EnhancedTamiyoPolicyGNN(PolicyConfig(hidden_dim=16, num_gnn_layers=1))
    with pytest.raises(ConfigError, match="expected the policy's own config"):
        ProductionPolicyTrainer(policy, PolicyConfig(), ProductionTrainingConfig())
    learner = ProductionPolicyTrainer(policy, policy.config)

    class Silent:
        closed = False

    collector = ProductionHealthCollector(Silent())  # type: ignore[arg-type]
    assert collector.oona_client is collector.client
    with pytest.raises(ConfigError, match="RunLink's oona_client"):
        asyncio.run(learner.train_with_experience_collection(collector, ModelGraphBuilder(), 1))


def test_weights_of_another_size_are_refused(willing: Path) -> None:
    with pytest.raises(CheckpointError, match="hidden_dim 128 instead of 16"):
        EnhancedTamiyoPolicyGNN(PolicyConfig(hidden_dim=16), willing)


def test_the_analyzer_tells_of_every_layer() -> None:
    topology = make_topology()
    signals = [make_signal(name, step, health=0.1 if name == "net.1" else 0.9)
               for step in range(12) for name in topology.layer_names]  # fmt: skip
    nodes = ModelGraphAnalyzer().analyze(signals, topology)
    assert list(nodes) == topology.layer_names
    middle = nodes["net.1"]
    assert (middle.layer_type, middle.num_signals) == ("Linear", 12)
    assert middle.health == pytest.approx(0.1)
    assert (middle.inputs, middle.outputs) == (("net.0",), ("net.2",))
    assert [node.layer_id for node in ModelGraphAnalyzer().problematic(signals, topology)] == ["net.1"]
    assert ModelGraphAnalyzer().analyze(signals)["net.0"].layer_type == ""
