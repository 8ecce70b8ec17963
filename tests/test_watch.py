"""``esper watch`` against real runs in other processes, and how its picture looks."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from esper.errors import ConfigError
from esper.messages import (
    Decision,
    DecisionRecord,
    ErrorRecoveryEvent,
    GovernorRecord,
    HealthSignal,
    KernelPerformance,
    ModelPerformance,
    RunRecord,
    SignalBatch,
    TransitionRecord,
)
from esper.oona import Collector, Publisher, RunInfo, Subscriber
from esper.watch import pick_run, watch
from esper.watch_view import RunView

RUN = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_watch import story
from esper.oona import Publisher
run_id, ends = sys.argv[2], sys.argv[3] == "ends"
with Publisher(run_id) as publisher:
    print(publisher.addresses[1], flush=True)
    publisher.wait_for_subscriber("telemetry.growth.events", timeout_s=20)
    messages = story(run_id)
    if ends:
        for message in messages:
            publisher.publish(message)
    while not ends:
        for message in messages[:-1]:
            publisher.publish(message)
        time.sleep(0.02)
"""


def signal(layer_id: str, seed_id: str = "", **changes: object) -> HealthSignal:
    values: dict[str, object] = {
        "chunk_id": 0, "epoch": 3, "step": 1200, "activation_variance": 1.5, "dead_neuron_ratio": 0.22,
        "dormancy": 0.36, "avg_correlation": -0.25, "effective_rank": 7.5, "gradient_norm": 0.0123,
        "gradient_snr": 4.5, "update_ratio": 2.5e-4, "expressivity": 0.0, "is_ready_for_transition": False,
        "health_score": 0.8, "execution_latency": 0.31, "error_count": 0, "active_seeds": 0,
        "total_seeds": 0, "timestamp": 1.0,
    }  # fmt: skip
    return HealthSignal(layer_id=layer_id, seed_id=seed_id, **{**values, **changes})  # type: ignore[arg-type]


def decision(
    step: int, action: str, reason: str, run_id: str = "r", refused: str = "", **more: object
) -> DecisionRecord:
    what = Decision(action=action, reason=reason, policy="expressivity", **more)  # type: ignore[arg-type]
    return DecisionRecord(run_id, step, 1, what, action != "wait" and not refused, refused, "", 2310, 1.0)


def story(run_id: str = "r") -> list:  # type: ignore[type-arg]
    """One sampled step of a run, what led to it, and the end."""
    scored = SignalBatch.of(run_id, 1100, 3, [signal("model.fc2", expressivity=0.299)], 1.0)
    now = SignalBatch.of(
        run_id, 1200, 3,
        [signal("model.fc1"), signal("model.fc2", health_score=0.2, active_seeds=1, total_seeds=2),
         signal("model.fc2", "seed-1", is_ready_for_transition=True), signal("model.fc2", "seed-2"),
         signal("model.out", error_count=3)], 1.0,
    )  # fmt: skip
    place = ("bypass:fc1->fc2", "widen")
    return [
        decision(400, "germinate", "score 0.113 clears the floor 0.034", run_id, site=place[0],
                 blueprint="widen", size=8),
        TransitionRecord(run_id, 600, 1, "seed-1", *place, "training", "blending", "contribution 0.03", {},
                         2310, 1.0),
        TransitionRecord(run_id, 700, 1, "seed-2", *place, "training", "culled", "no contribution", {},
                         2310, 1.0),
        decision(900, "germinate", "score 0.2", run_id, "parameter budget spent", site="stack:b0",
                 blueprint="stack"),
        decision(1000, "wait", "score 0.01 below the floor", run_id),
        decision(1010, "wait", "score 0.02 below the floor", run_id),
        GovernorRecord(run_id, 1050, 2, "rollback", "seed-2", "loss 14.2 against 0.51", {}, 1.0),
        ErrorRecoveryEvent(run_id, 1060, "model.fc2", "nonfinite_seed", "NaN in seed-2", 1.0),
        scored,
        now,
        KernelPerformance(run_id, 1200, 1.23, 0.2, 1.0),
        ModelPerformance(run_id, 1200, 3, 4500, 0.4321, float("nan"), 2310, 3.4e9, 1, 1.0),
        RunRecord(run_id, "end", 1200, {}, 1.0),
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="esper-test-"))
    monkeypatch.setenv("ESPER_RUNTIME_DIR", str(directory))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def start_run() -> Iterator:  # type: ignore[type-arg]
    """Starts runs in processes of their own; gives the process and its address."""
    children: list[subprocess.Popen[str]] = []

    def start(run_id: str, how: str) -> tuple[subprocess.Popen[str], str]:
        here = str(Path(__file__).parent)
        child = subprocess.Popen(
            [sys.executable, "-c", RUN, here, run_id, how], stdout=subprocess.PIPE, text=True
        )
        children.append(child)
        assert child.stdout is not None
        return child, child.stdout.readline().strip()

    yield start
    for child in children:
        child.kill()
        child.communicate()


def plain_console(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, record=True, force_terminal=False)


@pytest.fixture
def view() -> Iterator[RunView]:
    """The picture after :func:`story`, without its end."""
    with Publisher("r") as publisher, Subscriber("r") as subscriber:
        view = RunView(RunInfo(run_id="digits-0", pid=0, started=0.0), Collector(subscriber))
        for message in story()[:-1]:
            publisher.publish(message)
        view.read(1.0)
        yield view


def picture(view: RunView, width: int, height: int = 60) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, record=True, force_terminal=True)
    console.print(view)
    return console.export_text().splitlines()


def test_follows_a_run_in_another_process_to_its_end(start_run) -> None:  # type: ignore[no-untyped-def]
    start_run("digits-0", "ends")
    console = plain_console()
    assert watch(console=console) == 0
    text = console.export_text()
    assert "step 1200/4500  epoch 3  loss 0.432  held-out nan  parameters 2,310  seeds 1" in text
    assert "step 400  germinate widen x8 at bypass:fc1->fc2  score 0.113 clears the floor 0.034" in text
    assert "step 600  training → blending widen at bypass:fc1->fc2  contribution 0.03" in text
    assert "step 900  germinate stack at stack:b0  refused: parameter budget spent" in text
    assert "the run has ended; messages 13   missed 0   refused 0" in text


def test_once_prints_a_complete_picture_and_returns(start_run) -> None:  # type: ignore[no-untyped-def]
    child, address = start_run("digits-0", "goes on")
    for target in ("digits-0", "dig", address):
        console = plain_console()
        assert watch(target, once=True, console=console) == 0
        text = console.export_text()
        assert "1,200/4,500" in text
        assert "model.fc1" in text
    assert child.poll() is None


def test_a_run_that_dies_is_noticed(start_run) -> None:  # type: ignore[no-untyped-def]
    child, _ = start_run("digits-0", "goes on")
    console = plain_console()
    timer = threading.Timer(0.6, child.kill)
    timer.start()
    assert watch(console=console, interval_s=0.1) == 0
    timer.join()
    assert "closed the bus without saying how the run ended" in console.export_text()


def test_without_a_run_it_says_what_to_do() -> None:
    console = plain_console()
    assert watch(console=console) == 1
    assert "found none on this machine for this user: start one with `esper train`" in console.export_text()


def test_a_silent_run_fails_once_in_time() -> None:
    with Publisher("quiet"):
        console = plain_console()
        assert watch(once=True, wait_s=0.2, console=console) == 1
        assert "sent no complete picture within 0.2 s" in console.export_text()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("tcp://10.0.0.1:5555", "loopback only"),
        ("tcp://127.0.0.1:*", "a port from 1"),
        ("udp://x", "begin with"),
    ],
)
def test_a_wrong_address_is_reported_not_raised(address: str, reason: str) -> None:
    console = plain_console()
    assert watch(address, console=console) == 1
    assert reason in console.export_text()


def test_choosing_among_runs() -> None:
    with Publisher("mlp-1"), Publisher("mlp-2"), Publisher("cnn"):
        run, note = pick_run(None)
        assert run.run_id == "cnn"
        assert "the newest of 3 runs" in note
        assert pick_run("mlp-2")[0].run_id == "mlp-2"
        assert pick_run("c")[0].run_id == "cnn"
        assert pick_run(run.telemetry)[0] == run
        with pytest.raises(ConfigError, match=r"named 'mlp', found 2; running: .*mlp-1"):
            pick_run("mlp")
        with pytest.raises(ConfigError, match=r"found none; running: .*cnn"):
            pick_run("gpt")


def test_the_log_supplies_what_happened_before(tmp_path: Path) -> None:
    events = [m for m in story() if isinstance(m, DecisionRecord | TransitionRecord | RunRecord)]
    lines = [msgspec.json.encode(event) for event in events]
    (tmp_path / "growth.jsonl").write_bytes(b"\n".join(lines) + b'\n{"type":"decis')
    with Publisher("r", run_dir=tmp_path) as publisher:
        run, _ = pick_run(None)
        with Subscriber(run) as subscriber:
            view = RunView(run, Collector(subscriber))
            view.read_log()
            assert not view.ended  # the end in the log is that of an earlier part of a resumed run
            text = "\n".join(picture(view, 120))
    assert publisher.closed
    assert "germinate widen x8 at bypass:fc1->fc2" in text
    assert "training → blending" in text


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_the_picture_fits_and_tells_the_essentials(view: RunView, width: int) -> None:
    lines = picture(view, width)
    assert max(len(line.rstrip()) for line in lines) <= width
    text = "\n".join(lines)
    for part in (
        "digits-0", "1,200/4,500", "train loss 0.432", "held-out loss nan", "parameters 2,310",
        "FLOPs 3.4e9", "a step takes 1.2 ms", "model.fc1", "model.out 3!", "blending ✓ widen", "0.299",
        "22%", "36%", "1/2",
        "germinate widen x8 at bypass:fc1->fc2", "refused: parameter budget spent",
        "governor: rollback seed-2",
        "nonfinite_seed model.fc2", "score 0.02 below", "missed 0",
    ):  # fmt: skip
        assert part in text, part
    assert "score 0.01 below" not in text  # a row of WAITs is one line
    assert ("snr" in text) == (width >= 120)
    layer_rows = [line for line in lines if "░" in line or "█" in line]
    assert len(layer_rows) == 4  # three layers and the living seed; the culled one is gone


def test_a_low_terminal_shows_the_least_healthy_layers() -> None:
    signals = [signal(f"net.layer{index}", health_score=index / 40) for index in range(40)]
    with Publisher("r") as publisher, Subscriber("r") as subscriber:
        view = RunView(RunInfo(run_id="r", pid=0, started=0.0), Collector(subscriber))
        publisher.publish(SignalBatch.of("r", 1, 1, signals, 1.0))
        view.read(1.0)
        assert len(picture(view, 80, height=24)) > 40
        view.fit_height = True
        lines = picture(view, 80, height=24)
    assert len(lines) <= 24
    text = "\n".join(lines)
    assert "net.layer0 " in text
    assert "net.layer39" not in text
    assert "healthier" in text


def test_long_layer_names_stay_distinct() -> None:
    names = [f"model.transformer.encoder.blocks.{index}.attention.projection_out" for index in range(12)]
    with Publisher("r") as publisher, Subscriber("r") as subscriber:
        view = RunView(RunInfo(run_id="r", pid=0, started=0.0), Collector(subscriber))
        publisher.publish(SignalBatch.of("r", 1, 1, [signal(name) for name in names], 1.0))
        view.read(1.0)
        shown = {line.split()[0] for line in picture(view, 80) if "█" in line}
    assert len(shown) == 12
