"""The ``esper`` command as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.benchmarks import find_benchmarks, read_options
from esper.cli import main
from esper.errors import ConfigError

ROOT = Path(__file__).parent.parent


def esper(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "esper.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for command in ("train", "compare", "report", "watch", "export", "bench"):
        assert f"\n    {command} " in text


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: esper" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("esper ")


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["grow"])
    assert ended.value.code == 2
    assert "invalid choice: 'grow'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "expected a run folder"),
        (["compare", "nowhere"], "expected a run folder"),
        (["export", "nowhere.ckpt", "out.pt"], "expected a checkpoint at nowhere.ckpt"),
        (["bench", "nothing"], "there is no benchmark 'nothing'"),
        (["bench", "bus", "--set", "colour=1"], "benchmark 'bus' has the options: seconds"),
        (["bench", "bus", "--seeds", "3"], "got also"),
        (["bench", "bus", "--set", "seconds"], "KEY=VALUE"),
        (["watch", "no-such-run"], "no-such-run"),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ESPER_DEBUG", raising=False)
    monkeypatch.setenv("ESPER_RUNTIME_DIR", str(tmp_path / "runtime"))
    assert main(arguments) in (1, 2)
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).split())
    assert "Traceback" not in captured.err


def test_debug_variable_brings_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_DEBUG", "1")
    with pytest.raises(ConfigError, match="expected a run folder"):
        main(["report", "nowhere"])


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "last.ckpt"
    wrong.write_bytes(b"not a checkpoint")
    assert main(["export", str(wrong), str(tmp_path / "out.pt")]) == 2
    assert "does not load" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


def test_bench_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == find_benchmarks()
    assert "bus" in names


def test_bench_json_is_one_flat_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "bus", "--json", "--set", "seconds=0.4"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"ipc_ratio", "tcp_ratio"} <= figures.keys()
    assert all(isinstance(value, int | float) for value in figures.values())


def test_bench_options_are_read_as_json_or_text() -> None:
    def run(*, seconds: float = 1.0, arms: str = "all", hosts: tuple[int, ...] = ()) -> None:
        """Has some options."""

    found = read_options(run, "x", {}, ["seconds=2.5", "arms=host", "hosts=[1,2]"])
    assert found == {"seconds": 2.5, "arms": "host", "hosts": [1, 2]}


def test_train_help_is_hydras() -> None:
    done = esper("train", "--help")
    assert done.returncode == 0
    assert "experiment: digits_mlp, fashion_cnn, fashion_mlp, finetune_clinc, shakespeare_gpt" in done.stdout


def test_missing_data_are_named_with_the_fix(tmp_path: Path) -> None:
    done = esper(
        "train", "experiment=fashion_mlp", cwd=tmp_path, ESPER_DATA_DIR=str(tmp_path), ESPER_DEBUG=""
    )
    assert done.returncode == 2
    assert "fashion-mnist" in done.stderr
    assert "ESPER_DATA_DIR" in done.stderr
    assert "Traceback" not in done.stderr
