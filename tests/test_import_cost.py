"""Importing esper, and asking its command for help, has to be quick and must not load torch."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "lightning", "hydra", "matplotlib", "sklearn", "numpy", "zmq", "rich")

PUBLIC_NAMES = (
    "Body",
    "EsperError",
    "GrowableMixin",
    "Seed",
    "TamiyoCallback",
    "__version__",
    "attach",
    "blueprint",
    "detach",
    "export",
    "export_pretrained",
    "load",
)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def seconds(*arguments: str) -> float:
    """The best of several runs: other work on the machine only ever makes one slower."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("module", ["esper", "esper.cli", "esper.messages", "esper.report", "esper.hosts"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    loaded = run_python(f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])")
    assert loaded == ""


def test_import_takes_less_than_300_ms_beyond_python() -> None:
    assert seconds("-c", "import esper") - seconds("-c", "pass") < 0.3


def test_help_takes_less_than_half_a_second() -> None:
    assert seconds("-m", "esper.cli", "--help") < 0.5


def test_every_public_name_loads_and_is_listed() -> None:
    import esper

    for name in PUBLIC_NAMES:
        assert getattr(esper, name) is not None
    assert sorted(dir(esper)) == sorted(PUBLIC_NAMES)
    assert set(esper.__all__) == set(PUBLIC_NAMES) - {"__version__"}


def test_unknown_name_is_an_attribute_error() -> None:
    import esper

    with pytest.raises(AttributeError, match="no attribute 'grow'"):
        _ = esper.grow


def test_oona_and_cli_work_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import esper, esper.oona, esper.report\n"
        "from esper.cli import main\n"
        "raise SystemExit(main(['report', '/nonexistent']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected a run folder" in done.stderr
