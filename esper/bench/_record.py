"""Write down a benchmark's runs with the machine and the versions that made them."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esper.errors import ConfigError

__all__ = ["machine", "write_record"]


def machine() -> dict[str, Any]:
    """Describe the processor, as far as the operating system tells."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {"processor": model or "unknown", "cores": os.cpu_count(), "system": platform.system()}


def write_record(
    path: str,
    *,
    benchmark: str,
    options: Mapping[str, Any],
    figures: Mapping[str, float],
    runs: Sequence[Mapping[str, Any]],
) -> None:
    """Write one JSON file: machine, versions, options, figures, and every run with its seed.

    Args:
        path: Where to; its folder must exist.
        benchmark: Name of the benchmark.
        options: What it was run with.
        figures: What it returned.
        runs: One mapping a run, of plain values.

    Raises:
        ConfigError: The folder is not there.
    """
    from esper.report.summary import collect_versions

    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"out expects a path in a folder that exists, got {path!r}")
    content = {
        "benchmark": benchmark,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": collect_versions(),
        "options": dict(options),
        "figures": {name: _plain(value) for name, value in figures.items()},
        "runs": [{name: _plain(value) for name, value in run.items()} for run in runs],
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON has no infinities; five digits are more than any of these figures is good for."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
