"""The retrieval benchmark asks for functions that can be found, and not for what gives them away."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("faiss")
pytest.importorskip("bm25s")

from esper.bench import retrieval
from esper.bench._functions import read_functions, with_questions
from esper.errors import ConfigError


def test_functions_have_lost_their_docstrings() -> None:
    functions = read_functions(["networkx"], 200, 0)
    assert functions == read_functions(["networkx"], 200, 0)
    asked = with_questions(functions, 50, 0)
    assert len(asked) == len(set(asked)) == 50
    for i in asked:
        assert functions[i].question not in " ".join(functions[i].code.split())
        with open(functions[i].source, encoding="utf-8") as file:
            first = file.read().split("\n")[functions[i].line - 1]
        assert functions[i].code.split("\n")[0 if not first.lstrip().startswith("@") else 1].strip()
    assert len({functions[i].question for i in asked}) == 50


def test_benchmark_reports_what_it_promises() -> None:
    figures = retrieval.run(passages=120, questions=20, packages="networkx")
    assert set(retrieval.TARGETS) <= set(figures)
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["num_passages"] == 120
    assert figures["num_questions"] == 20
    assert 0.3 < figures["bm25_mrr"] <= 1
    assert figures["hybrid_gain_low"] <= figures["hybrid_gain"] <= figures["hybrid_gain_high"]
    assert figures["p50_ms"] <= figures["p99_ms"]


@pytest.mark.parametrize("packages", ["nothing_at_all", "../etc"])
def test_a_missing_package_is_named(packages: str) -> None:
    with pytest.raises(ConfigError, match="packages expects stdlib"):
        retrieval.run(packages=packages)
