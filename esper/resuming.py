"""``esper train resume=...``: where a run continues, and with what it was started."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from esper.arms import CHECKPOINT
from esper.errors import CheckpointError, ConfigError
from esper.kasmina.loading import read_checkpoint
from esper.report.folder import JOURNAL

__all__ = ["find_checkpoint", "newest_whole", "recorded_overrides"]

_log = logging.getLogger(__name__)


def find_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """Return the checkpoint to begin from: of a run folder the last one that is whole.

    Raises:
        CheckpointError: There is none at ``resume``, or none that can be read.
    """
    if resume is None:
        return None
    path = Path(resume)
    if path.is_dir():
        found = newest_whole(path)
        if found is not None:
            return found
        if (path / JOURNAL).is_file():
            raise CheckpointError(
                f"expected {CHECKPOINT} in the run folder resume={resume}, which has none: the run was stopped before "
                "it wrote its first checkpoint; start it again without resume"
            )
    elif path.is_file():
        _require_whole(path)
        return path
    raise CheckpointError(
        f"expected a run folder with {CHECKPOINT} in it, or a checkpoint, at resume={resume}; found none "
        f"({path / CHECKPOINT if path.is_dir() else path} does not exist); give the folder that `esper train` named"
    )


def newest_whole(arm: Path) -> Path | None:
    """Return the last checkpoint in an arm's folder; where that is damaged, the one of most steps beside it.

    Falling back is told in the log.

    Args:
        arm: Folder of the arm.

    Returns:
        Its path, or None if there is no checkpoint.

    Raises:
        CheckpointError: There are some, and none is whole.
    """
    last = arm / CHECKPOINT
    others = sorted(p for p in last.parent.glob("*.ckpt") if p != last and not p.name.startswith("."))
    damaged: list[str] = []
    if last.is_file():
        try:
            _read_run(last)
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            return last
    whole: list[tuple[int, Path]] = []
    for path in others:
        try:
            whole.append((int(_read_run(path)["global_step"]), path))
        except CheckpointError as error:
            damaged.append(str(error))
    if whole:
        step, path = max(whole)
        why = "; ".join(damaged) or f"there is no {CHECKPOINT}"
        _log.warning("%s; continuing from %s instead, which holds step %d", why, path, step)
        return path
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {last.parent} is whole: {'; '.join(damaged)}; start the run again"
        )
    return None


def _require_whole(path: Path) -> None:
    try:
        _read_run(path)
    except CheckpointError as error:
        others = [p for p in path.parent.glob("*.ckpt") if p != path and not p.name.startswith(".")]
        if not others:
            raise
        named = ", ".join(sorted(p.name for p in others))
        raise CheckpointError(
            f"{error}; beside it lie {named}: give one of them, or the run folder"
        ) from error


def _read_run(path: Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    if "global_step" not in content:
        raise CheckpointError(
            f"expected a trainer's checkpoint at {path}, but it holds weights only, which no run continues from"
        )
    return content


def recorded_overrides(arguments: Sequence[str]) -> list[str]:
    """Add to the arguments of ``esper train resume=RUN ...`` what the run was started with.

    A run folder, or a checkpoint inside one, brings the overrides it was composed from, and the run goes on
    in that folder; arguments given now come last, so they win.

    Raises:
        ConfigError: The overrides that the folder holds cannot be read.
    """
    target = next((a.removeprefix("resume=") for a in reversed(arguments) if a.startswith("resume=")), None)
    if target is None or target in ("null", ""):
        return list(arguments)
    path = Path(target)
    folder = path if path.is_dir() else path.parent.parent
    recorded = folder / ".hydra" / "overrides.yaml"
    if not recorded.is_file():
        return list(arguments)
    try:
        stored = OmegaConf.to_container(OmegaConf.load(recorded))
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"expected Hydra's list of overrides in {recorded}, but: {error}") from error
    if not isinstance(stored, list):
        raise ConfigError(f"expected a list of overrides in {recorded}, got {type(stored).__name__}")
    given = {argument.split("=", 1)[0].lstrip("+~") for argument in arguments}
    kept = [str(o) for o in stored if str(o).split("=", 1)[0].lstrip("+~") not in given]
    return [*kept, *arguments, f"hydra.run.dir={folder}"]
