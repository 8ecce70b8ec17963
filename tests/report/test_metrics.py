from __future__ import annotations

import math

import pytest
from lightning.pytorch.loggers import CSVLogger

from esper.errors import MessageError
from esper.report.metrics import EMPTY, Series, find_metric, read_metrics


def test_lightnings_own_file(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    for step in range(4):
        logger.log_metrics({"train_loss": 1.0 / (step + 1), "epoch": 0}, step)
    logger.save()
    logger.log_metrics(
        {"val_loss": math.nan, "val_acc": 0.5, "epoch": 0}, 3
    )  # new columns: the header is rewritten
    logger.save()

    columns = read_metrics(tmp_path / "metrics.csv")
    assert list(columns["train_loss"].steps) == [0, 1, 2, 3]
    assert columns["train_loss"].last == 0.25
    assert list(columns["val_acc"].steps) == [3]
    assert math.isnan(columns["val_loss"].last)


def test_a_torn_last_row_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train_loss\n0,0,0.5\n0,1,0.1")
    assert list(read_metrics(path)["train_loss"].values) == [0.5]


def test_of_two_rows_of_one_step_the_later_stands(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,a,b\n3,1,\n1,2,\n3,5,\n")
    columns = read_metrics(path)
    assert list(columns) == ["a"]
    assert list(zip(columns["a"].steps, columns["a"].values, strict=True)) == [(1, 2), (3, 5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "with 'step' among them"),
        ("step,a\n1,2\n2,two\n", "line 3: expected a number in column 'a', got 'two'"),
        ("step,a\n,2\n", "line 2: expected a number in column 'step', got an empty cell"),
    ],
)
def test_damage_is_named(tmp_path, text, message):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(MessageError, match=message):
        read_metrics(path)


def test_an_empty_file_holds_no_metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("")
    assert read_metrics(path) == {}


@pytest.mark.parametrize(
    ("names", "role", "found"),
    [
        (["train_loss", "val_loss"], "val_loss", "val_loss"),
        (["train/loss_step", "train/loss_epoch"], "train_loss", "train/loss_step"),
        (["Val.Accuracy"], "val_acc", "Val.Accuracy"),
        (["loss"], "train_loss", "loss"),
        (["test_acc", "lr"], "val_acc", None),
    ],
)
def test_metrics_are_found_under_usual_names(names, role, found):
    assert find_metric(dict.fromkeys(names, 0.0), role) == found


def test_series_describe_themselves():
    assert repr(EMPTY) == "Series(empty)"
    assert repr(Series.of([(5, 1.0), (2, 3.0)])) == "Series(2 values, steps 2 to 5)"
    assert EMPTY.last is None
