"""``esper train``: one run folder from one composed config, with growth and with its controls."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from esper.arms import CHECKPOINT, Arm, ArmResult, control_growth, run_arm, saved_host
from esper.errors import EsperError, ExportError
from esper.hosts import HostConfig, HostData, fit_host, host_to_dict
from esper.interrupt import StopRequest
from esper.kasmina.export import save
from esper.quiet import quiet
from esper.report.comparison import compare
from esper.report.folder import SUMMARY, report
from esper.report.live import LiveDisplay
from esper.report.summary import (
    ArmSummary,
    RunSummary,
    collect_versions,
    hash_config,
    read_summary,
    write_summary,
)
from esper.resuming import find_checkpoint, newest_whole, recorded_overrides
from esper.settings import TrainSettings, parse_settings

__all__ = ["EXPORTED", "main", "train"]

_log = logging.getLogger(__name__)

EXPORTED = "grown.pt"
_INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
# These say where and beside what a run was made, not what was trained.
_NOT_HASHED = ("seed", "resume", "controls", "logger", "hydra")


@dataclass(frozen=True)
class _Run:
    settings: TrainSettings
    config: Mapping[str, Any]
    folder: Path
    data: HostData
    display: LiveDisplay
    stop: StopRequest
    resuming: bool
    finished: Mapping[str, ArmSummary]


def train(
    config: Mapping[str, Any],
    folder: Path,
    *,
    console: Console | None = None,
    stop: StopRequest | None = None,
) -> RunSummary | None:
    """Train the growing arm and its controls, and leave everything in ``folder``.

    Args:
        config: The composed config as plain values; ``resume`` names a checkpoint for the first arm, or
            is the run folder itself to continue every arm from its own.
        folder: The run folder.
        console: Where to show the run; standard output by default.
        stop: Asked after every step whether to stop; Ctrl-C by default.

    Returns:
        The run's summary, or None when it was stopped before its end.

    Raises:
        EsperError: Wrong settings, missing data, or a run that cannot be continued.
    """
    settings = parse_settings(config)
    console = Console(highlight=False) if console is None else console
    stop = StopRequest() if stop is None else stop
    folder.mkdir(parents=True, exist_ok=True)
    if settings.trainer.num_threads is not None:
        torch.set_num_threads(settings.trainer.num_threads)
    data = settings.data.build(settings.seed)
    host = fit_host(settings.host, data.input_shape, data.num_classes)
    if settings.controls == "all":
        host.uniform_like(
            host.num_parameters
        )  # a shape without a uniform relative fails here, not at the end
    digest = hash_config(config, _NOT_HASHED)
    resume = find_checkpoint(config.get("resume"), folder)
    in_place = resume is not None and resume.resolve().parent == (folder / CHECKPOINT).resolve().parent
    finished = _finished(folder, digest) if in_place else {}
    console.print(f"{settings.name}, seed {settings.seed} → {_shown(folder)}", style="bold", soft_wrap=True)
    started = time.time()
    whole = False
    try:
        with stop, LiveDisplay(console) as display, quiet():
            run = _Run(settings, config, folder, data, display, stop, in_place, finished)
            results: list[ArmSummary] = []
            for arm in _arms(run, host, resume, results):
                summary = _train_or_keep(run, arm)
                if summary is None:
                    break
                results.append(summary)
                # After every arm, so that whatever ends the run leaves the arms before it.
                write_summary(
                    folder / SUMMARY,
                    RunSummary(
                        run_id=folder.name,
                        experiment=settings.name,
                        seed=settings.seed,
                        config_hash=digest,
                        versions=collect_versions(),
                        started=started,
                        arms=results,
                    ),
                )
            else:
                whole = True
    except SystemExit:  # what Lightning makes of a second Ctrl-C
        if not stop.requested:
            raise
    _show(folder, console)
    if whole:
        return read_summary(folder / SUMMARY)
    console.print(f"stopped; to continue: esper train resume={_shown(folder)}", style="bold", soft_wrap=True)
    return None


def _arms(run: _Run, host: HostConfig, resume: Path | None, results: Sequence[ArmSummary]) -> Iterator[Arm]:
    """Yield the arms in order; the uniform net is sized after what the first arm has become."""
    settings = run.settings
    growing = settings.growth.policy != "off"
    # Without growth the first arm is the untouched host, which is what a sweep compares the others with.
    yield Arm("growth" if growing else "host", host, settings.growth, run.folder, resume)
    controls: list[tuple[str, HostConfig]] = []
    if settings.controls in ("host", "all") and growing:
        controls.append(("host", host))
    if settings.controls == "all":
        controls.append(("uniform", host.uniform_like(results[0].parameters)))
    for name, config in controls:
        folder = run.folder / "controls" / name
        checkpoint = newest_whole(folder) if run.resuming else None
        usable = checkpoint is not None and saved_host(checkpoint) == host_to_dict(config)
        yield Arm(name, config, control_growth(settings.seed), folder, checkpoint if usable else None)


def _train_or_keep(run: _Run, arm: Arm) -> ArmSummary | None:
    """Train an arm unless the run that is continued has finished it; None when it was stopped."""
    kept = run.finished.get(arm.name)
    if kept is not None and (arm.name != "uniform" or kept.initial_parameters == arm.host.num_parameters):
        return kept
    if run.stop.requested and arm.folder != run.folder:
        return None  # the Ctrl-C came too late for the arm before this one
    result = run_arm(arm, run.settings, run.data, run.display, run.stop, run=run.folder, config=run.config)
    if result.summary is None:
        return None
    run.display.arm_ended(result.summary)
    if arm.folder == run.folder:
        _export(run, result)
    return result.summary


def _export(run: _Run, result: ArmResult) -> None:
    """Write the grown network as plain PyTorch, proved on two validation samples."""
    # contiguous: a program that torch.export makes from a view of other strides takes no other input
    example = run.data.splits.val[torch.arange(2)][0].contiguous()
    try:
        made = save(result.module.host, run.folder / EXPORTED, example)
    except ExportError as error:  # hours of training must not end here; the checkpoint holds the network
        _log.warning("no %s: %s", EXPORTED, error)
    else:
        _log.info("%s: %s", EXPORTED, made)


def _finished(folder: Path, digest: str) -> dict[str, ArmSummary]:
    """Return the arms that this very config has finished in ``folder``."""
    if not (folder / SUMMARY).exists():
        return {}
    summary = read_summary(folder / SUMMARY)
    return {arm.name: arm for arm in summary.arms} if summary.config_hash == digest else {}


def _show(folder: Path, console: Console) -> None:
    """Draw the figure and print the table and where the files are."""
    made = report(folder)
    for table in (made.table, made.rewards):
        if table is not None:
            console.print()
            console.print(table)
    names = ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
    console.print(f"run folder: {_shown(folder)} ({names})", soft_wrap=True)


def _shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    with contextlib.suppress(ValueError):
        return str(path.resolve().relative_to(Path.cwd()))
    return str(path)


def main(arguments: Sequence[str]) -> int:
    """Run ``esper train`` with Hydra's command line.

    Returns:
        Exit status: 0, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    if os.environ.get("ESPER_DEBUG"):
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra cuts tracebacks short otherwise
    sweep: list[Path] = []

    def task(config: DictConfig) -> None:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        assert isinstance(plain, dict)
        job = HydraConfig.get()
        if job.mode == RunMode.MULTIRUN:
            sweep[:] = [Path(job.sweep.dir)]
        try:
            summary = train({str(k): v for k, v in plain.items()}, Path(job.runtime.output_dir))
        except EsperError as error:
            if os.environ.get("ESPER_DEBUG"):
                raise
            from esper.cli import print_error

            print_error(error)
            raise SystemExit(2) from error
        if summary is None:
            raise SystemExit(_INTERRUPTED)

    decorated = hydra.main(version_base="1.3", config_path="pkg://esper.conf", config_name="train")(task)
    previous = sys.argv
    sys.argv = ["esper train", *recorded_overrides(arguments)]
    try:
        decorated()
    finally:
        sys.argv = previous
    if sweep:
        console = Console(highlight=False)
        console.print(compare(sweep))
        console.print(f"sweep: {_shown(sweep[0])}; again: esper compare {_shown(sweep[0])}", soft_wrap=True)
    return 0
