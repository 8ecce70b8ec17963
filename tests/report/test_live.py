from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from esper.messages import GovernorRecord
from esper.report.live import LiveDisplay
from esper.report.summary import ArmSummary

from .conftest import decision, life, transition

RESULT = ArmSummary(name="growth", accuracy=0.957, loss=0.16, parameters=3012, wall_time_s=12.3)


def _drive(display: LiveDisplay, events, epochs: int = 20) -> None:
    display.arm_started("growth", epochs, epochs * 10)
    waiting = list(events)
    for step in range(1, epochs * 10 + 1):
        display.step(step)
        while waiting and waiting[0].step <= step:
            display.event(waiting.pop(0))
        if step % 10 == 0:
            display.epoch_ended(step // 10 - 1, step, {"train_loss": 1.0, "val/loss": 0.9, "val_acc": 0.5})
    display.arm_ended(RESULT)


def _plain(events, **options) -> list[str]:
    file = io.StringIO()
    with LiveDisplay(Console(file=file, width=80)) as display:
        _drive(display, events, **options)
    return file.getvalue().splitlines()


def test_plain_lines_without_a_terminal(growth_events):
    lines = _plain(growth_events)
    assert not any("\x1b" in line or "\r" in line for line in lines)
    assert lines[0] == "growth  starts: 20 epochs, 200 steps"
    assert "step 40  germinated widen(16) at bypass:fc1->fc2 — score 3.1 against floor 1.2" in lines
    assert "step 130  fossilised widen at bypass:fc1->fc2" in lines
    assert sum("epoch " in line for line in lines) == 10
    assert sum("germinated" in line and "step" in line and "seeds:" not in line for line in lines) == 2
    assert sum(line.startswith("step 130  culled") for line in lines) == 1
    assert lines[-1] == "growth  done: accuracy 95.7 %, loss 0.1600, 3,012 parameters, 12.3 s, waited 1 time"


def test_seeds_are_counted_by_stage(growth_events):
    lines = _plain(growth_events)
    assert any(line.endswith("seeds: 1 holding, 1 training") for line in lines)
    assert any(line.endswith("seeds: 1 fossilised") for line in lines)


def test_waiting_is_not_told(growth_events):
    waits = [decision(step, action="wait", reason="floor", applied=False) for step in range(1, 100)]
    lines = _plain(waits)
    assert not any("floor" in line for line in lines)
    assert "waited 99 times" in lines[-1]


def test_one_germination_is_told_once_and_by_its_decision():
    events = life("s1", 10, 5, 100)
    events[0], events[1] = events[1], events[0]  # the transition first
    lines = [line for line in _plain(events) if "germinated" in line]
    assert lines == ["step 10  germinated widen(16) at bypass:fc1->fc2 — score 3.1 against floor 1.2"]


def test_a_seed_grown_by_hand_is_told_too():
    lines = _plain([transition(10, "s1", "dormant", "germinated")])
    assert "step 10  germinated widen at bypass:fc1->fc2" in lines


def test_one_cull_is_told_once():
    events = [
        GovernorRecord("run", 30, 0, "cull", "s1", "not finite", {}, 0.0),
        transition(30, "s1", "training", "culled", reason="not finite"),
    ]
    assert sum("culled" in line for line in _plain(events)) == 1


@pytest.mark.parametrize("width", [1, 2, 3, 7, 19, 20, 40, 59, 60, 80, 200])
def test_any_width_of_terminal(width, growth_events):
    file = io.StringIO()
    with LiveDisplay(Console(file=file, width=width, height=10, force_terminal=True)) as display:
        _drive(display, growth_events)
    assert "\x1b[?25l" in file.getvalue()  # the cursor was hidden
    assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l")  # and is shown again


def test_unknown_totals_and_odd_names():
    file = io.StringIO()
    with LiveDisplay(Console(file=file, width=80, force_terminal=True)) as display:
        display.arm_started("[b]x[/no]\x1b[2J", 0, 0)
        display.step(1)
        display.epoch_ended(0, 1, {})
        display.epoch_ended(1, 2, {"train_loss": float("nan")})
    assert "[b]x[/no] [2J" in file.getvalue()
    assert "nan" in file.getvalue()


def test_an_error_in_training_leaves_the_terminal_whole():
    file = io.StringIO()
    display = LiveDisplay(Console(file=file, width=80, force_terminal=True))

    def train():
        with display:
            display.arm_started("growth", 2, 20)
            raise KeyError("training")

    with pytest.raises(KeyError, match="training"):
        train()
    assert "\x1b[?25h" in file.getvalue()
    display.close()


def test_an_ascii_terminal_is_no_error(growth_events):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    with LiveDisplay(Console(file=file, width=100)) as display:
        _drive(display, growth_events)
    file.flush()
    assert b"bypass:fc1->fc2 ? score 3.1" in raw.getvalue()


def test_closed_output_silences_the_display_and_nothing_else(growth_events, caplog):
    file = io.StringIO()
    display = LiveDisplay(Console(file=file, width=80))
    display.arm_started("growth", 20, 200)
    file.close()
    with caplog.at_level(logging.WARNING), display:
        _drive(display, growth_events)
    assert caplog.text.count("training goes on without it") == 1


def test_a_closed_pipe_does_not_end_training():
    script = (
        "from esper.report import LiveDisplay\n"
        "with LiveDisplay() as display:\n"
        "    display.arm_started('growth', 2000, 2000)\n"
        "    for epoch in range(2000): display.epoch_ended(epoch, epoch, {'train_loss': 1.0})\n"
        "    for _ in range(5000): display.arm_started('x' * 100, 1, 1)\n"
        "import os, sys\n"
        "sys.stderr.write('trained')\n"
        "sys.stderr.flush()\n"
        "os._exit(0)\n"  # without Python's own complaint about the pipe at exit
    )
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    errors = child.stderr.read()
    child.stderr.close()
    assert child.wait(timeout=60) == 0
    assert "trained" in errors
    assert "Traceback" not in errors
