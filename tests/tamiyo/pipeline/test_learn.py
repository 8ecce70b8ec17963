"""Whole learnings of seconds: killed and taken up again, the same for a seed, and what they leave behind."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from pipeline_tables import TINY, tiny_config
from rich.console import Console

from esper.cli import main
from esper.errors import ConfigError, LearningError
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.weights import load_network
from esper.tamiyo.pipeline.artefacts import CARD, FIGURE, METRICS, RESULT, WEIGHTS, write_weights
from esper.tamiyo.pipeline.config import Effort, LearnConfig, with_settings
from esper.tamiyo.pipeline.fits import make_network
from esper.tamiyo.pipeline.learn import learn
from esper.tamiyo.pipeline.ship import run

KILLED = """
import sys
from pathlib import Path
from pipeline_tables import tiny_config
from rich.console import Console
from esper.tamiyo.pipeline.ship import run
run(tiny_config(Path(sys.argv[1]), "killed"), Console())
"""


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_a_killed_learning_goes_on_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "killed")
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
    )
    fits = config.out / "fits"
    try:
        deadline = time.monotonic() + 120
        while not list(fits.glob("[!.]*")):
            assert process.poll() is None, "the learning ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in fits.glob("[!.]*")}
    assert run(config, quiet()) == 0
    assert all((fits / name).stat().st_mtime_ns == at for name, at in kept.items())
    whole = tiny_config(tmp_path, "whole")
    run(whole, quiet())
    assert (config.out / WEIGHTS).read_bytes() == (whole.out / WEIGHTS).read_bytes()
    assert (config.out / RESULT).read_bytes() == (whole.out / RESULT).read_bytes()
    assert (config.out / METRICS).read_bytes() == (whole.out / METRICS).read_bytes()


def test_what_a_learning_leaves_behind(tmp_path: Path) -> None:
    config, package = tiny_config(tmp_path), tmp_path / "package"
    console = Console(record=True, width=150, file=io.StringIO())
    status = run(config, console, install=True, package=package)
    said = console.export_text()
    result = json.loads((config.out / RESULT).read_text())
    pays = result["figures"]["validation_policy_over_rule"] >= 0
    # a network after two epochs is worth less than the rule, and then it may not ship
    assert status == (0 if pays else 1)
    assert (package / WEIGHTS).is_file() == pays
    assert ("not installed" in said) != pays
    assert "policy accuracy on test hosts" in said
    network = load_network(config.out / WEIGHTS)
    assert network.novelty.fitted
    assert network.config.adaptation_confidence_threshold == result["figures"]["confidence_threshold"]
    assert "## Limits" in (config.out / CARD).read_text()
    rows = list(csv.DictReader(io.StringIO((config.out / METRICS).read_text())))
    assert {row["part"] for row in rows} == {
        "member-8-0",
        "member-8-1",
        "student-8-0",
        "student-8-1",
        "curve-3",
    }
    picture = imread(config.out / FIGURE)
    assert picture.shape[1] > 1500
    assert np.std(picture[..., :3]) > 0.05
    assert {line["chooser"] for line in result["lines"]} == {
        "wait", "rule", "fallback", "boosting", "value model", "policy",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="another seed"):  # the folder belongs to one learning
        learn(tiny_config(tmp_path, seed=1), quiet())


def test_ppo_goes_on_after_its_last_whole_round(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, stages=("supervised", "ppo"), effort=TINY)
    whole = learn(config, quiet())
    assert whole.ppo is not None
    assert len(whole.ppo.rounds) == 2
    assert whole.ppo.num_experiences == whole.ppo.rounds[-1]["experiences"]
    assert whole.adopted == (whole.network is whole.ppo.network)
    assert [r.host for r in whole.ppo.played["test"].rule] == ["digits_mlp/test/0"]
    rewritten = (config.out / "ppo" / "rounds.json").read_bytes()
    again = tiny_config(tmp_path, "again", stages=("supervised", "ppo"), effort=TINY)

    class StopError(Exception):
        pass

    class Stopping(Console):
        def print(self, *objects: object, **options: object) -> None:
            if "return" in str(objects):
                raise StopError  # after the first round was written

    with pytest.raises(StopError):
        learn(again, Stopping(file=io.StringIO()))
    assert json.loads((again.out / "ppo" / "rounds.json").read_text()) == json.loads(rewritten)[:1]
    for path in (config.out / "ppo").glob("*-*.json"):  # runs that were played are not played again
        shutil.copy(path, again.out / "ppo")
    resumed = learn(again, quiet())
    assert resumed.ppo is not None
    assert resumed.ppo.rounds == whole.ppo.rounds
    ours, theirs = resumed.ppo.network.state_dict(), whole.ppo.network.state_dict()
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    assert resumed.ppo.played == whole.ppo.played


def test_weights_that_are_too_large_do_not_ship(tmp_path: Path) -> None:
    network = make_network(PolicyConfig(hidden_dim=128), 0)
    with pytest.raises(LearningError, match="choose smaller hidden_sizes than 128"):
        write_weights(network, "a card", tmp_path)


def test_effort_follows_minutes_alone() -> None:
    assert Effort.for_minutes(60) == Effort.for_minutes(50) == Effort()
    short = Effort.for_minutes(2)
    assert short.ppo_rounds < Effort.for_minutes(12).ppo_rounds < Effort().ppo_rounds
    assert with_settings(short, {"ppo_rounds": 7}).ppo_rounds == 7
    with pytest.raises(ConfigError, match="at least one minute"):
        Effort.for_minutes(0.5)
    with pytest.raises(ConfigError, match="no setting rounds"):
        with_settings(short, {"rounds": 1})
    with pytest.raises(ConfigError, match="multiples of 4"):
        Effort(hidden_sizes=(10,))
    with pytest.raises(ConfigError, match="supervised, or supervised and ppo"):
        LearnConfig(stages=("ppo",))


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--table", str(tmp_path)], "expected the oracle table's file"),
        (["--set", "ppo_rounds"], "--set expects KEY=VALUE"),
        (["--set", "ppo_rounds=many"], "expected a number, true, false or a list"),
        (["--stages", "supervised,magic"], "stages should be"),
        (["--minutes", "0"], "at least one minute"),
    ):
        assert main(["learn", "policy", *arguments]) == 2
        assert said in capsys.readouterr().err
