"""Finding running trainings: living ones only, of this user only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from esper.errors import ConfigError
from esper.oona import CommandInbox, Publisher, Subscriber, find_runs
from esper.oona.runs import reserve

CHILD = """
import sys, time
from esper.oona import Publisher
with Publisher(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""


def start_run(run_id: str) -> subprocess.Popen[str]:
    """A process with an open publisher; it goes on until its standard input is closed."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, run_id], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_run_is_found_with_both_endpoints(tmp_path: Path) -> None:
    assert find_runs() == []
    with Publisher("digits/0", run_dir=tmp_path) as publisher, CommandInbox("digits/0") as inbox:
        (run,) = find_runs()
        assert (run.run_id, run.pid, run.run_dir) == ("digits/0", os.getpid(), str(tmp_path))
        assert (run.telemetry, run.commands) == (publisher.addresses[1], inbox.addresses[1])
    assert find_runs() == []


def test_newest_first_and_a_clean_end_withdraws(runtime_dir: Path) -> None:
    with Publisher("first"):
        child = start_run("second")
        assert [run.run_id for run in find_runs()] == ["second", "first"]
        assert find_runs()[0].pid == child.pid
        child.communicate()
        assert child.returncode == 0
        assert [run.run_id for run in find_runs()] == ["first"]
        assert len(list(runtime_dir.iterdir())) == 2


def test_a_killed_run_is_ignored_and_cleaned_up(runtime_dir: Path) -> None:
    child = start_run("killed")
    assert [run.run_id for run in find_runs()] == ["killed"]
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert len(list(runtime_dir.iterdir())) == 2
    assert find_runs() == []
    assert list(runtime_dir.iterdir()) == []


LAST_WORDS = """
import sys
from esper.messages import RunRecord
from esper.oona import Publisher
publisher = Publisher("r").open()
print(publisher.addresses[1], flush=True)
publisher.wait_for_subscriber("telemetry.growth.events", timeout_s=20)
for step in range(200):
    publisher.publish(RunRecord("r", "end", step, {"padding": "x" * 10_000}, 1.0))
"""


def test_the_last_messages_of_a_process_that_exits_without_close_arrive(runtime_dir: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", LAST_WORDS], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with Subscriber(child.stdout.readline().strip()) as subscriber:
        child.communicate()
        assert child.returncode == 0
        steps = [message.step for _ in range(20) for _, message in subscriber.poll(50)]  # type: ignore[union-attr]
    assert steps == list(range(200))
    assert list(runtime_dir.iterdir()) == []


def test_a_foreign_descriptor_is_passed_over(runtime_dir: Path) -> None:
    with Publisher("r"):
        (path,) = runtime_dir.glob("*.json")
        path.write_bytes(b"not json")  # another version's, say; its lock is held, so it is not removed
        assert find_runs() == []
        assert path.exists()


def test_descriptors_are_private(runtime_dir: Path) -> None:
    with Publisher("r"):
        assert runtime_dir.stat().st_mode & 0o077 == 0


def test_a_directory_open_to_others_is_neither_used_nor_trusted(runtime_dir: Path) -> None:
    with Publisher("r"):
        runtime_dir.chmod(0o777)
        assert find_runs() == []
        with pytest.raises(ConfigError, match="only you can enter"):
            reserve("other", "telemetry")
        runtime_dir.chmod(0o700)


def test_without_an_override_the_users_own_directories_are_used(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    monkeypatch.delenv("ESPER_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_dir))
    with Publisher("found-by-test") as publisher:
        assert publisher.addresses[1].startswith(f"ipc://{runtime_dir}/esper/found-by-test-")
        assert "found-by-test" in [run.run_id for run in find_runs()]
