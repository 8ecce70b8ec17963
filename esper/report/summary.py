"""``summary.json``: the result of a run folder, one entry for each arm that was trained."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from esper.atomic import replacing
from esper.errors import MessageError
from esper.messages import Count
from esper.report.nonfinite import decode_numbers, encode_numbers

__all__ = ["ArmSummary", "RunSummary", "collect_versions", "hash_config", "read_summary", "write_summary"]

SUMMARY_VERSION = 1


class ArmSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Result of one arm. ``None`` means that a figure does not apply, and is shown as a dash.

    Args:
        name: ``growth``, ``host``, ``uniform``, ...
        policy: the growth policy, empty for an arm that does not grow.
        accuracy: in [0, 1], on the split ``split``.
        loss: mean loss on the split ``split``; may be non-finite.
        split: the held-out split that accuracy and loss were measured on.
        parameters: at the end.
        trainable_parameters: those of them that are trained, at the end.
        initial_parameters: before the first step.
        training_flops: all training, scoring and culled seeds charged.
        wall_time_s: of the training loop, in seconds.
        germinated, fossilized, culled: seeds; None for an arm that cannot grow.
        metrics: path of the arm's ``metrics.csv`` relative to the run folder, or None without one.
    """

    name: str
    policy: str = ""
    accuracy: float | None = None
    loss: float | None = None
    split: str = "test"
    parameters: Count
    trainable_parameters: Count | None = None
    initial_parameters: Count | None = None
    training_flops: float | None = None
    wall_time_s: float | None = None
    steps: Count | None = None
    epochs: Count | None = None
    germinated: Count | None = None
    fossilized: Count | None = None
    culled: Count | None = None
    metrics: str | None = None


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Everything ``summary.json`` holds: how the run was made, and what each arm came to.

    Args:
        experiment: name of the task; runs of different experiments are not compared with each other.
        seed: of initialisation and data order.
        config_hash: of the composed config without what differs between repeats (:func:`hash_config`).
        versions: package -> version (:func:`collect_versions`).
        started: Unix seconds.
        arms: results, the growing arm first.
    """

    run_id: str
    experiment: str
    seed: int
    config_hash: str
    versions: dict[str, str]
    started: float
    arms: list[ArmSummary]
    schema_version: Annotated[int, Meta(ge=1, le=SUMMARY_VERSION)] = SUMMARY_VERSION


def write_summary(path: str | os.PathLike[str], summary: RunSummary) -> None:
    """Write ``summary.json`` in one move: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    raw = msgspec.to_builtins(summary)
    raw["arms"] = [encode_numbers(arm) for arm in raw["arms"]]
    with replacing(path) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(raw), indent=2) + b"\n")


def read_summary(path: str | os.PathLike[str]) -> RunSummary:
    """Read a ``summary.json``.

    Raises:
        MessageError: not a summary, or one of a later version of esper.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    figures = {"accuracy", "loss", "training_flops", "wall_time_s"}
    try:
        raw = msgspec.json.decode(path.read_bytes())
        if isinstance(raw, dict) and isinstance(raw.get("arms"), list):
            for arm in raw["arms"]:
                if isinstance(arm, dict):  # names stay as they are: an arm may be called "nan"
                    arm.update(decode_numbers({key: arm[key] for key in figures & arm.keys()}))
        return msgspec.convert(raw, RunSummary)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MessageError(
            f"{path}: expected the summary.json of an esper run, got something else: {error}"
        ) from error


def hash_config(config: Mapping[str, Any], ignore: tuple[str, ...] = ("seed", "paths", "hydra")) -> str:
    """Return 12 hex digits that are equal for configs that differ only in the top-level keys ``ignore``.

    Args:
        config: plain nested dicts, lists and scalars; the order of keys does not matter.
        ignore: what may differ between repeats of one experiment.
    """
    kept = {key: value for key, value in config.items() if key not in ignore}
    return hashlib.sha256(msgspec.json.encode(kept, order="sorted")).hexdigest()[:12]


def collect_versions(packages: tuple[str, ...] = ("esper", "torch", "lightning", "numpy")) -> dict[str, str]:
    """Return versions of Python and of the installed ones of ``packages``, without importing them."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
