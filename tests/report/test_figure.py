from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from esper.messages import Event
from esper.report.figure import STYLE, _draw, growth_figure
from esper.report.metrics import ArmCurves, Series
from esper.report.panels import _smoothed, _spread

from .conftest import in_order, life


def _arm(name: str, steps: int = 400, *, accuracy: bool = True, final: float = 0.2) -> ArmCurves:
    at = np.arange(0, steps, 5, dtype=float)
    loss = final + 2 * np.exp(-at / 60)
    return ArmCurves(
        name,
        loss=Series(at, loss),
        val_loss=Series(at[::8], loss[::8] + 0.05),
        val_acc=Series(at[::8], 1 - loss[::8] / 4) if accuracy else Series.of(()),
        parameters=[(0, 100)],
    )


def _many(number: int) -> list[Event]:
    return in_order(
        *(life(f"s{i}", 5 + 10 * i, 8, 100, culled=i % 3 == 0, site=f"bypass:blocks.{i}.fc1->blocks.{i}.fc2")
          for i in range(number))
    )  # fmt: skip


POINT = ArmCurves("growth", Series.of([(0, 2.3)]), Series.of([(1, 2.2)]), Series.of([(1, 0.1)]), [(0, 100)])
DIVERGED = ArmCurves("growth", Series.of([(0, math.nan), (1, math.inf)]), parameters=[(0, 100)])
ZERO = ArmCurves("growth", Series.of([(0, 0.0), (1, 5.0)]), parameters=[(0, 100)])

CASES = {
    "no seeds": ([_arm("growth"), _arm("host")], []),
    "one seed": ([_arm("growth")], life("s1", 40, 30, 100)),
    "thirty seeds": ([_arm("growth"), _arm("host"), _arm("uniform")], _many(30)),
    "sixty seeds": ([_arm("growth")], _many(60)),
    "no accuracy": ([_arm("growth", accuracy=False), _arm("host", accuracy=False)], _many(2)),
    "nine arms": ([_arm(f"an arm with a long name {i}") for i in range(9)], _many(3)),
    "one step": ([POINT], life("s1", 1, 1, 100)[:2]),
    "nothing measured": ([ArmCurves("growth")], []),
    "diverged": ([DIVERGED], []),
    "a loss of zero": ([ZERO], []),
}


@pytest.mark.parametrize("case", CASES)
def test_every_shape_of_run_is_drawn(tmp_path, case):
    arms, events = CASES[case]
    out = growth_figure(arms, events, tmp_path / "growth.png", title=case)
    image = imread(out)
    assert image.shape[1] == 2080
    assert image.std() > 0.01


def test_legends_and_words_do_not_overlap(growth_events):
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = _draw([_arm("growth"), _arm("host, not grown"), _arm("uniform")], growth_events, "A title")
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        panels = [axes.get_window_extent(renderer) for axes in figure.axes]
        for legend in figure.legends:
            box = legend.get_window_extent(renderer)
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.width
            assert not any(box.overlaps(panel) for panel in panels)
        for axes in figure.axes:
            words = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
            assert all(word.x0 >= 0 and word.x1 <= figure.bbox.width for word in words)
            assert not any(a.overlaps(b) for i, a in enumerate(words) for b in words[:i])


def test_the_axis_of_loss_fits_its_range():
    wide, narrow = _draw([_arm("growth", final=0.05)], [], None), _draw([_arm("growth", final=4.0)], [], None)
    assert wide.axes[0].get_yscale() == "log"
    assert narrow.axes[0].get_yscale() == "linear"


def test_other_formats_and_the_global_style_untouched(tmp_path, growth_events):
    import matplotlib

    before = dict(matplotlib.rcParams)
    out = growth_figure([_arm("growth")], growth_events, tmp_path / "growth.svg")
    assert out.read_text().startswith("<?xml")
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in _modules_after_drawing()


def _modules_after_drawing() -> str:
    import subprocess
    import sys

    script = (
        "import sys; from esper.report import growth_figure, ArmCurves, describe, LiveDisplay, compare; "
        "import tempfile; growth_figure([ArmCurves('growth')], [], tempfile.mkdtemp() + '/g.svg'); "
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    names = done.stdout.split()
    assert "torch" not in names
    assert "lightning" not in names
    return done.stdout


def test_no_arms_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one arm"):
        growth_figure([], [], tmp_path / "growth.png")


def test_labels_are_moved_apart_as_little_as_needed():
    assert _spread([0.2, 0.8], 0.1) == [0.2, 0.8]
    assert _spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    spread = _spread([0.1, 0.5, 0.52, 0.58], 0.1)
    assert np.diff(spread).min() == pytest.approx(0.1)
    assert spread[0] == 0.1


def test_smoothing_keeps_ends_and_skips_what_is_not_finite():
    steps = np.arange(200.0)
    line = _smoothed(Series(steps, 3.0 * steps))
    assert line.values[0] == 0.0
    assert line.values[100] == pytest.approx(300.0)
    broken = _smoothed(Series(steps, np.where(steps == 50, np.nan, 1.0)))
    assert len(broken) == 199
    assert broken.values == pytest.approx(1.0)


def test_a_vanishing_training_loss_does_not_flatten_the_held_out_one():
    at = np.arange(50.0)
    arm = ArmCurves(
        "growth", loss=Series(at, 2.0 * np.exp(-at)), val_loss=Series(at, 0.5 + 1.5 * np.exp(-at))
    )
    low, high = _draw([arm], [], None).axes[0].get_ylim()
    assert low == pytest.approx(0.05 / 1.2)
    assert high > 2.0
