"""``esper train resume=...``: where a run continues, and with what it was started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from esper.arms import CHECKPOINT
from esper.errors import CheckpointError, ConfigError

__all__ = ["find_checkpoint", "recorded_overrides"]


def find_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """Return the checkpoint to begin from.

    Raises:
        CheckpointError: There is none at ``resume``.
    """
    if resume is None:
        return None
    path = Path(resume)
    if path.is_dir():
        path = path / CHECKPOINT
    if not path.is_file():
        raise CheckpointError(
            f"expected a run folder with {CHECKPOINT} in it, or a checkpoint, at resume={resume}; found none "
            f"({path} does not exist); give the folder that `esper train` named"
        )
    return path


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
