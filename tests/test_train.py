"""``esper train`` for real, on tiny budgets: what it leaves, how it resumes, how it stops."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console

from esper.cli import main
from esper.errors import CheckpointError, ConfigError, MissingExtraError
from esper.interrupt import StopRequest
from esper.metrics_file import MetricsFile
from esper.report.journal import read_journal
from esper.report.metrics import read_metrics
from esper.report.summary import RunSummary, read_summary
from esper.resuming import recorded_overrides
from esper.train import train

ROOT = Path(__file__).parent.parent
POLICIES = ("expressivity", "random", "off")
EXPERIMENTS = ("digits_mlp", "fashion_mlp", "fashion_cnn", "shakespeare_gpt")
STARTS = [(experiment, policy) for experiment in EXPERIMENTS for policy in POLICIES]
STARTS.append(("finetune_clinc", "adapters"))  # 22 M parameters take seconds: with its own policy only
# Growth within two short epochs: windows and gates as small as they go.
SMALL = (
    "trainer.max_epochs=2", "host.hidden=[12,4,8]", "kasmina.lifecycle.gate_interval_steps=2",
    "kasmina.lifecycle.min_holding_steps=4", "kasmina.budget.max_scoring_fraction=1",
    "kasmina.probes.interval_steps=5", "trainer.log_every_n_steps=1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_RUNTIME_DIR", str(tmp_path / "runtime"))


@pytest.fixture(scope="module", autouse=True)
def hydra_config() -> Iterator[None]:
    with initialize_config_module("esper.conf", version_base="1.3"):
        yield


def composed(*overrides: str) -> dict[str, Any]:
    config = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def run(folder: Path, *overrides: str, stop: StopRequest | None = None) -> RunSummary | None:
    with open(os.devnull, "w", encoding="utf-8") as sink:
        return train(composed(*overrides), folder, console=Console(file=sink), stop=stop)


@pytest.mark.parametrize(("experiment", "policy"), STARTS)
def test_every_experiment_runs_a_step(
    experiment: str, policy: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if experiment != "digits_mlp":
        request.getfixturevalue("data_dir")
    fewer = ["data.limit_train=2000"] if experiment.startswith("fashion") else []
    if experiment == "finetune_clinc":
        pytest.importorskip("transformers", reason="the encoder comes with esper[finetune]")
        pytest.importorskip("tokenizers", reason="the tokenizer comes with esper[finetune]")
        fewer = ["data.examples_per_intent=1"]
    summary = run(
        tmp_path / "run", f"experiment={experiment}", f"policy={policy}", "trainer.max_steps=1", "controls=none",
        "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", *fewer,
    )  # fmt: skip
    assert summary is not None
    assert [arm.steps for arm in summary.arms] == [1]
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small run with all controls."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    os.environ["ESPER_RUNTIME_DIR"] = str(folder.parent / "runtime")
    run(folder, *SMALL, "policy=random")
    return folder


def test_a_run_folder_holds_everything(finished: Path) -> None:
    for name in ("metrics.csv", "growth.jsonl", "growth.png", "summary.json", "checkpoints/last.ckpt", "grown.pt",
                 "controls/host/metrics.csv", "controls/uniform/metrics.csv"):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name


def test_the_arms_are_growth_host_and_a_uniform_net_of_the_grown_size(finished: Path) -> None:
    growth, host, uniform = read_summary(finished / "summary.json").arms
    assert [growth.name, host.name, uniform.name] == ["growth", "host", "uniform"]
    assert growth.policy == "random"
    assert growth.germinated
    assert growth.parameters > host.parameters == growth.initial_parameters == host.initial_parameters
    assert uniform.parameters == pytest.approx(growth.parameters, rel=0.15)
    assert host.germinated is None
    assert growth.training_flops is not None
    assert host.training_flops is not None
    assert growth.training_flops > host.training_flops > 0
    assert {arm.steps for arm in (growth, host, uniform)} == {34}


def test_growth_and_host_begin_from_the_same_weights_and_batches(finished: Path) -> None:
    growth, host = (read_metrics(finished / path) for path in ("metrics.csv", "controls/host/metrics.csv"))
    assert growth["train_loss"].values[0] == host["train_loss"].values[0]


def test_flops_of_a_control_are_three_forward_passes_a_sample(finished: Path) -> None:
    host = read_summary(finished / "summary.json").arms[1]
    forward = 2 * (64 * 12 + 12 * 4 + 4 * 8 + 8 * 10)
    assert host.training_flops == 3 * forward * 1078 * 2


def test_a_journal_tells_every_decision(finished: Path) -> None:
    kinds = {type(event).__name__ for event in read_journal(finished / "growth.jsonl")}
    assert {"DecisionRecord", "TransitionRecord", "RunRecord"} <= kinds


def test_report_and_compare_read_the_folder(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(finished), "--out", str(tmp_path / "figure.svg")]) == 0
    assert main(["compare", str(finished)]) == 0
    assert (tmp_path / "figure.svg").stat().st_size > 0
    assert "uniform" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_export_writes_the_grown_network(finished: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"plain.{suffix}"
    assert main(["export", str(finished / "checkpoints/last.ckpt"), str(out)]) == 0
    assert out.stat().st_size > 0


def test_export_finds_a_class_in_the_working_directory(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from esper.hosts import ClassifierModule as Mine\n")
    line = [
        sys.executable,
        "-P",
        "-m",
        "esper.cli",
        "export",
        str(finished / "checkpoints/last.ckpt"),
        "plain.pt",
    ]
    done = subprocess.run(
        [*line, "--model", "mine:Mine", "--input-shape", "64"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain.pt").stat().st_size > 0


def test_the_exported_network_scores_what_the_table_says(finished: Path) -> None:
    code = (
        "import sys, torch\n"
        "from esper.hosts import DigitsData\n"
        "x, y = DigitsData().splits.test[:]\n"
        f"net = torch.export.load({str(finished / 'grown.pt')!r}).module()\n"
        "print(float((net(x).argmax(-1) == y).float().mean()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) == pytest.approx(
        read_summary(finished / "summary.json").arms[0].accuracy, abs=1e-6
    )


def test_equal_seeds_give_equal_runs(finished: Path, tmp_path: Path) -> None:
    again = run(tmp_path / "run", *SMALL, "policy=random", "controls=none")
    assert again is not None
    first = read_summary(finished / "summary.json").arms[0]
    assert (again.arms[0].loss, again.arms[0].parameters) == (first.loss, first.parameters)


def test_policy_off_is_the_host_arm(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", *SMALL, "policy=off", "controls=host")
    assert summary is not None
    assert [arm.name for arm in summary.arms] == ["host"]


def test_logger_none_leaves_no_metrics(tmp_path: Path) -> None:
    run(tmp_path / "run", *SMALL, "logger=none", "controls=none", "trainer.max_steps=3")
    assert not (tmp_path / "run/metrics.csv").exists()
    assert (tmp_path / "run/growth.png").exists()


class _StopAfter(StopRequest):
    """Ctrl-C after a number of questions whether there was one."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self._left = questions

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        """The parent's own start value says nothing here."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    return {name: value for name, value in content["state_dict"].items() if not name.endswith("extra_state")}


@pytest.mark.parametrize("questions", [5, 24])
def test_a_stopped_run_resumes_as_if_it_had_not_been_stopped(
    questions: int, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = (*SMALL, "policy=random", "controls=none")
    assert run(folder, *arguments, stop=_StopAfter(questions)) is None
    assert not (folder / "summary.json").exists()
    assert (folder / "growth.png").exists()
    summary = run(folder, *arguments, f"resume={folder}")
    assert summary is not None
    assert summary.arms[0].loss == read_summary(finished / "summary.json").arms[0].loss
    expected = weights(finished)
    resumed = weights(folder)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    steps = read_metrics(folder / "metrics.csv")["train_loss"].steps
    assert list(steps) == list(read_metrics(finished / "metrics.csv")["train_loss"].steps)


def test_a_finished_run_resumes_to_its_result_at_once(finished: Path) -> None:
    before = read_summary(finished / "summary.json").arms
    summary = run(finished, *SMALL, "policy=random", f"resume={finished}")
    assert summary is not None
    assert summary.arms == before


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = (*SMALL, "controls=host", "policy=random")
    run(folder, *arguments)
    longer = run(folder, *arguments, "trainer.max_epochs=3", f"resume={folder}")
    assert longer is not None
    assert [arm.steps for arm in longer.arms] == [51, 51]


def test_resume_from_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a run folder with"):
        run(tmp_path / "run", "resume=nowhere")


def test_resume_brings_back_what_the_run_was_started_with(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/overrides.yaml").write_text("- policy=random\n- seed=3\n- trainer.max_epochs=4\n")
    assert recorded_overrides(["trainer.max_epochs=9", f"resume={folder}"]) == [
        "policy=random", "seed=3", "trainer.max_epochs=9", f"resume={folder}", f"hydra.run.dir={folder}",
    ]  # fmt: skip
    (folder / ".hydra/overrides.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match="expected a list of overrides"):
        recorded_overrides([f"resume={folder}"])


def test_metrics_file_keeps_rows_before_a_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsFile(path)
    logger.log_metrics({"train_loss": 3.0}, 0)
    logger.log_metrics({"train_loss": 2.0}, 1)
    logger.log_metrics({"val_loss": 2.5}, 1)
    logger.finalize("success")
    path.write_text(path.read_text() + "2,1.")  # torn by a kill
    again = MetricsFile(path)
    again.rewind(1)
    again.log_metrics({"val_loss": 2.25}, 1)
    again.finalize("success")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert rows == [
        {"step": "0", "train_loss": "3.0", "val_loss": ""},
        {"step": "1", "train_loss": "", "val_loss": "2.25"},
    ]


def test_a_logger_that_is_not_installed_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper.loggers.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "esper\[mlflow\]"'):
        run(tmp_path / "run", *SMALL, "logger=mlflow", "controls=none")


def test_tensorboard_gets_the_metrics_too(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path / "run", *SMALL, "logger=tensorboard", "controls=none", "trainer.max_steps=3")
    assert list((tmp_path / "run/tensorboard").glob("events.out.*"))
    assert (tmp_path / "run/metrics.csv").exists()


def command(cwd: Path, *arguments: str) -> tuple[list[str], dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        environment.pop(name, None)
    environment.update(HOME=str(cwd), WANDB_SILENT="true")
    return [sys.executable, "-m", "esper.cli", "train", *arguments], {"cwd": cwd, "env": environment}


def test_wandb_goes_offline_by_itself_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    line, options = command(
        tmp_path, *SMALL, "logger=wandb", "controls=none", "trainer.max_steps=3", "hydra.run.dir=run"
    )
    done = subprocess.run(line, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert "no key found, so this run is logged offline" in done.stderr
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))


def test_a_sweep_of_two_seeds_ends_with_their_comparison(tmp_path: Path) -> None:
    line, options = command(
        tmp_path,
        "-m",
        "seed=0,1",
        *SMALL,
        "controls=host",
        "policy=random",
        "trainer.max_steps=6",
        "hydra.sweep.dir=sweep",
    )
    done = subprocess.run(line, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert [read_summary(tmp_path / f"sweep/{job}/summary.json").seed for job in (0, 1)] == [0, 1]
    assert "paired by seed" in done.stdout
    assert (tmp_path / "sweep/0/.hydra/config.yaml").is_file()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_leaves_a_run_that_continues(tmp_path: Path) -> None:
    line, options = command(
        tmp_path, *SMALL, "trainer.max_epochs=400", "controls=host", "policy=random", "hydra.run.dir=run"
    )
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    metrics = tmp_path / "run/metrics.csv"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "esper train resume=run" in out
    assert "Traceback" not in err
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    step = content["global_step"]
    assert 0 < step < 400 * 17

    line, options = command(tmp_path, "resume=run", "controls=none", f"trainer.max_steps={step + 3}")
    done = subprocess.run(line, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert [arm.steps for arm in read_summary(tmp_path / "run/summary.json").arms] == [step + 3]
