from __future__ import annotations

import math

import msgspec
import pytest
from rich.console import Console

from esper.errors import MessageError
from esper.report.summary import (
    ArmSummary,
    RunSummary,
    collect_versions,
    hash_config,
    read_summary,
    write_summary,
)
from esper.report.table import comparison_markdown, comparison_table, comparison_text
from esper.report.units import DASH

ARMS = [
    ArmSummary(name="growth", policy="expressivity", accuracy=0.957, loss=0.1614, parameters=3012,
               training_flops=1.234e9, wall_time_s=12.31, germinated=3, fossilized=2, culled=1),
    ArmSummary(name="host", accuracy=0.901, loss=math.nan, parameters=1390, training_flops=6.3e8,
               wall_time_s=207.0),
]  # fmt: skip


def _run(arms=ARMS) -> RunSummary:
    return RunSummary(
        run_id="r",
        experiment="digits",
        seed=3,
        config_hash="abc",
        versions=collect_versions(),
        started=1.0,
        arms=arms,
    )


def test_a_summary_comes_back_as_it_was(tmp_path):
    diverged = msgspec.structs.replace(ARMS[0], name="nan", loss=math.inf, accuracy=None)
    write_summary(tmp_path / "summary.json", _run([diverged]))
    assert read_summary(tmp_path / "summary.json") == _run([diverged])
    assert [child.name for child in tmp_path.iterdir()] == ["summary.json"]


def test_a_loss_of_nan_is_not_a_missing_one(tmp_path):
    write_summary(tmp_path / "summary.json", _run())
    arm = read_summary(tmp_path / "summary.json").arms[1]
    assert math.isnan(arm.loss)
    assert arm.germinated is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"arms": [1]}', b"\xff"])
def test_a_damaged_summary_is_named(tmp_path, content):
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    with pytest.raises(MessageError, match=r"summary\.json: expected the summary\.json of an esper run"):
        read_summary(path)


def test_a_summary_of_a_later_version_is_refused(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, msgspec.structs.replace(_run(), schema_version=99))
    with pytest.raises(MessageError, match="schema_version"):
        read_summary(path)


def test_config_hashes_leave_out_the_seed():
    base = {"seed": 0, "policy": {"name": "random", "k": 16}}
    assert hash_config(base) == hash_config({"policy": {"k": 16, "name": "random"}, "seed": 7})
    assert hash_config(base) != hash_config({"seed": 0, "policy": {"name": "random", "k": 8}})


def test_versions_need_no_import():
    versions = collect_versions(("rich", "no-such-package-here"))
    assert versions["no-such-package-here"] == "not installed"
    assert versions["rich"][0].isdigit()


def test_the_table_fits_eighty_columns():
    text = comparison_text(ARMS, title="digits, seed 3", width=80)
    assert max(map(len, text.splitlines())) <= 80
    for part in (
        "digits, seed 3",
        "(expressivity)",
        "95.7 %",
        "3,012",
        "1.23 G",
        "12.3 s",
        "3 / 2 / 1",
        "3 m 27 s",
    ):
        assert part in text
    host = next(line for line in text.splitlines() if line.startswith(" host"))
    assert host.rstrip().endswith(DASH)
    assert "nan" in host


def test_the_best_is_bold_and_nan_never_is():
    console = Console(force_terminal=True, color_system="standard", width=100, record=True)
    with console.capture() as capture:
        console.print(comparison_table(ARMS))
    assert "\x1b[1m  95.7 %" in capture.get()
    assert "\x1b[1m     nan" not in capture.get()


def test_markdown():
    lines = comparison_markdown(ARMS).splitlines()
    assert lines[2] == "| growth (expressivity) | 95.7 % | 0.1614 | 3,012 | 1.23 G | 12.3 s | 3 | 2 | 1 |"
    assert lines[3] == f"| host | 90.1 % | nan | 1,390 | 630 M | 3 m 27 s | {DASH} | {DASH} | {DASH} |"


@pytest.mark.parametrize("width", [1, 5, 20, 40])
def test_narrow_terminals_do_not_raise(width):
    assert comparison_text(ARMS, width=width)
    assert comparison_text([], width=width) is not None
