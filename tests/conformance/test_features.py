"""The table of features names, for every row, a test that there is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from features import FEATURES, Feature, markdown

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("row", FEATURES, ids=lambda row: row.feature)
def test_the_test_of_a_row_is_there(row: Feature) -> None:
    path, _, name = row.test.partition("::")
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_table_is_markdown_of_three_columns() -> None:
    lines = markdown().splitlines()
    assert len(lines) == 2 + len({row.feature for row in FEATURES})
    assert all(line.count(" | ") == 2 for line in lines[2:])
