"""The table that README shows has a row for every host that the tests grow."""

from __future__ import annotations

from hosts import HOSTS
from table import host_rows, markdown


def test_every_host_has_a_row_of_what_is_asserted_of_it() -> None:
    rows = host_rows()
    assert len(rows) == len(HOSTS) == len({row.host for row in rows})
    for case, row in zip(HOSTS, rows, strict=True):
        assert row.host == f"{case.library} {case.model}"
        assert all(name in row.grows for names in case.grows.values() for name in names)
        assert all(name in row.exports or row.exports == "a torch graph" for name in case.as_graph)
        assert all(layer in row.left_alone for layer in case.left_alone)


def test_the_table_is_markdown_of_four_columns() -> None:
    _, blank, *table = markdown().splitlines()
    assert blank == ""
    assert [line.count(" | ") for line in table] == [3, 0, *[3] * len(HOSTS)]
    assert all(line.startswith("|") and line.endswith("|") for line in table)
