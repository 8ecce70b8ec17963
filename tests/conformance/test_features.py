"""The table of features names, for every row, a test that there is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from features import Feature, markdown
from works_with import PAGE, README, TOPICS, page, with_section

TESTS = Path(__file__).parents[1]
ROWS = [row for rows in TOPICS.values() for row in rows]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.feature)
def test_the_test_of_a_row_is_there(row: Feature) -> None:
    path, _, name = row.test.partition("::")
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_table_is_markdown_of_three_columns() -> None:
    lines = markdown(ROWS).splitlines()
    assert len(lines) == 2 + len({row.feature for row in ROWS})
    assert all(line.count(" | ") == 2 for line in lines[2:])


def test_readme_and_page_are_what_the_tables_say() -> None:
    told = "run python tests/conformance/works_with.py and commit what it writes"
    assert PAGE.read_text(encoding="utf-8") == page(), told
    readme = README.read_text(encoding="utf-8")
    assert readme == with_section(readme), told
