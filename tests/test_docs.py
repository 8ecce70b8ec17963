"""The pages on single topics: their examples run, and nothing they point to is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "esper" / "docs"
TABLES = ("works_with",)
"""Pages without an example."""
PAGES = {p.stem: p.read_text(encoding="utf-8") for p in sorted(DOCS.glob("*.md")) if p.stem not in TABLES}
PROCESSES = ("ddp", "sharding")
"""Pages whose example starts processes of itself, and so has to be a script."""
ELSEWHERE = ("export",)
"""Pages whose example ``tests/conformance`` runs, with more to look at."""
ENDS = {
    "compile": r"1 seed, [1-9]\d* recompilations",
    "ddp": r"1 seed, ranks equal: True",
    "fine_tuning": r"\d+ of \d+ parameters trained, in 4 seeds",
    "resume": r"the power went out",
    "sharding": r"1 seed, \w+, divided between the ranks: True",
    "service": r"\d+ decisions kept; [1-9]\d* to grow",
}
"""What the example of a page prints."""


def example(page: str) -> str:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL)
    return snippet


@pytest.mark.parametrize("page", sorted(set(PAGES) - {*PROCESSES, *ELSEWHERE}))
def test_the_example_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPER_RUNTIME_DIR", str(tmp_path / "runtime"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders and loggers is not about the example
        exec(compile(example(page), f"esper/docs/{page}.md", "exec"), {"__name__": "__main__"})
    assert re.search(ENDS[page], capsys.readouterr().out)


@pytest.mark.parametrize("page", PROCESSES)
def test_the_example_with_processes_runs(page: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(example(page), encoding="utf-8")
    environment = os.environ | {"ESPER_RUNTIME_DIR": str(tmp_path / "runtime"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(ENDS[page], done.stdout), done.stdout


def test_every_page_has_an_end_to_look_for() -> None:
    assert {*ENDS, *ELSEWHERE} == set(PAGES)


def test_readme_points_to_every_page() -> None:
    readme = (DOCS.parent.parent / "README.md").read_text(encoding="utf-8")
    for page in (*PAGES, *TABLES):
        assert f"esper/docs/{page}.md" in readme
