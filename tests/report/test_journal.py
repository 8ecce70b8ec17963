from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import MessageError
from esper.messages import GovernorRecord, RunRecord
from esper.report.journal import Journal, decode_event, encode_event, last_run, read_journal

from .conftest import decision, transition

ROOT = Path(__file__).parents[2]

# Writes through the real Journal until the kernel kills it in mid-line: the file may not grow past the limit.
TORN_BY_KILL = """
import resource, signal, sys
from esper.messages import RunRecord
from esper.report.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
journal = Journal(sys.argv[1])
for step in range(1000):
    journal.write(RunRecord("run", "note", step, {"text": "x" * 50}, 0.0))
"""

KILLED_FROM_OUTSIDE = """
import sys
from esper.messages import RunRecord
from esper.report.journal import Journal
journal = Journal(sys.argv[1])
step = 0
while True:
    journal.write(RunRecord("run", "note", step, {}, 0.0))
    step += 1
    if step == 200:
        print("ready", flush=True)
"""


def _child(script: str, path: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_is_written_is_read_back(tmp_path, growth_events):
    with Journal(tmp_path / "growth.jsonl") as journal:
        for event in growth_events:
            journal.write(event)
    assert read_journal(tmp_path / "growth.jsonl") == growth_events


def test_every_line_is_on_disk_at_once(tmp_path):
    journal = Journal(tmp_path / "growth.jsonl")
    journal.write(transition(1, "s1", "dormant", "germinated"))
    assert len(read_journal(journal.path)) == 1
    journal.close()


@given(st.dictionaries(st.text(max_size=5), st.floats()))
def test_non_finite_measurements_survive(measurements):
    event = decode_event(encode_event(GovernorRecord("r", 1, 0, "rollback", "", "", measurements, 0.0)))
    assert event.measurements.keys() == measurements.keys()
    for key, value in measurements.items():
        got = event.measurements[key]
        assert got == value or (math.isnan(got) and math.isnan(value))


def test_non_finite_decision_numbers_are_strings_in_the_file():
    line = encode_event(decision(1, numbers={"score": math.inf, "floor": -math.inf}))
    assert b'"score":"inf"' in line
    assert decode_event(line).decision.numbers == {"score": math.inf, "floor": -math.inf}


def test_info_keeps_the_word_nan_apart_from_the_number():
    info = {"name": "nan", "loss": math.nan, "deep": [{"x": math.inf}]}
    back = decode_event(encode_event(RunRecord("r", "end", 3, info, 0.0))).info
    assert back["name"] == "nan"
    assert math.isnan(back["loss"])
    assert back["deep"] == [{"x": math.inf}]


@pytest.mark.parametrize(
    "event",
    [
        decision(1, confidence=math.nan),
        decision(1, risk=2.0),
        RunRecord("r", "start", 0, {"model": object()}, 0.0),
        RunRecord("r", "start", 0, {}, math.nan),
    ],
)
def test_an_event_that_would_not_read_back_is_refused(tmp_path, event):
    with (
        Journal(tmp_path / "growth.jsonl") as journal,
        pytest.raises(MessageError, match=r"growth\.jsonl can hold"),
    ):
        journal.write(event)
    assert journal.path.read_bytes() == b""


def test_a_damaged_line_is_named(tmp_path, growth_events):
    path = tmp_path / "growth.jsonl"
    lines = [encode_event(event) for event in growth_events[:3]]
    path.write_bytes(lines[0] + b"\n" + lines[1][:-9] + b"\n" + lines[2] + b"\n")
    with pytest.raises(MessageError, match=r"growth\.jsonl, line 2: expected one event as JSON"):
        read_journal(path)


@pytest.mark.parametrize(
    "line", [b"[]", b"3", b"{}", b'{"type":"signals"}', b"\xff\xfe", b'{"type":"run","step":-1}']
)
def test_foreign_lines_are_refused(line):
    with pytest.raises(MessageError, match="expected one event"):
        decode_event(line)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_raise_anything_else(line):
    with contextlib.suppress(MessageError):
        decode_event(line)


def test_a_line_torn_by_a_kill_is_dropped_with_a_note(tmp_path, caplog):
    path = tmp_path / "growth.jsonl"
    child = _child(TORN_BY_KILL, path)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGXFSZ
    content = path.read_bytes()
    assert len(content) == 1000
    assert not content.endswith(b"\n")
    whole = content.count(b"\n")

    with caplog.at_level(logging.WARNING):
        assert [event.step for event in read_journal(path)] == list(range(whole))
    assert "dropped a torn last line" in caplog.text

    with Journal(path) as journal:  # a resumed writer goes on with a line of its own
        journal.write(RunRecord("run", "resume", whole, {}, 0.0))
    assert [event.step for event in read_journal(path)] == list(range(whole + 1))


def test_a_kill_at_any_moment_loses_no_line(tmp_path):
    path = tmp_path / "growth.jsonl"
    child = _child(KILLED_FROM_OUTSIDE, path)
    assert child.stdout is not None
    child.stdout.readline()
    child.kill()
    child.communicate(timeout=60)
    steps = [event.step for event in read_journal(path)]
    assert len(steps) >= 200
    assert steps == list(range(len(steps)))


def test_a_last_line_without_newline_but_whole_is_kept(tmp_path, growth_events):
    path = tmp_path / "growth.jsonl"
    path.write_bytes(encode_event(growth_events[0]))
    with Journal(path) as journal:
        journal.write(growth_events[1])
    assert read_journal(path) == growth_events[:2]


@pytest.mark.parametrize("checkpoint", [0, 70, 71, 100, 1000])
def test_a_resumed_journal_equals_an_uninterrupted_one(tmp_path, growth_events, checkpoint):
    path = tmp_path / "growth.jsonl"
    another = [RunRecord("another", "start", 0, {}, 0.0), RunRecord("another", "end", 2000, {}, 0.0)]
    with Journal(path) as journal:
        for event in [*another, *growth_events]:
            journal.write(event)
        journal.write(RunRecord("run", "end", 60, {}, 0.0))
    with Journal(path) as journal:
        later = [event for event in growth_events if event.step > checkpoint]
        assert journal.truncate_after(checkpoint, "run") == len(later) + 1
        for event in later:
            journal.write(event)
    assert read_journal(path) == [*another, *growth_events]
    assert last_run(read_journal(path)) == growth_events
    assert [child.name for child in tmp_path.iterdir()] == ["growth.jsonl"]


def test_a_closed_journal_says_so(tmp_path):
    journal = Journal(tmp_path / "new" / "growth.jsonl")
    journal.close()
    journal.close()
    with pytest.raises(ValueError, match="is closed"):
        journal.write(RunRecord("run", "note", 0, {}, 0.0))
    assert repr(journal).endswith("closed)")
