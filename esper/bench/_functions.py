"""Functions of installed libraries and what their docstrings say, taken apart: questions and their answers."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from esper.errors import ConfigError

__all__ = ["Function", "read_functions", "with_questions"]

_MIN_WORDS = 4
_MAX_CHARS = 4000
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__", "turtledemo"}


@dataclass(frozen=True)
class Function:
    """A function.

    Attributes:
        source: File.
        line: Where it begins.
        code: Without its docstring.
        question: First paragraph of its docstring, as one line; empty without one of four words.
    """

    source: str
    line: int
    code: str
    question: str


def read_functions(packages: Sequence[str], count: int, seed: int) -> list[Function]:
    """Return up to ``count`` functions and methods, from files in a random order.

    Args:
        packages: ``stdlib``, or names of installed packages' folders; tests are left out.
        count: How many.
        seed: Of the order.

    Raises:
        ConfigError: A package is not there.
    """
    files = [path for package in packages for path in _files(package)]
    random.Random(seed).shuffle(files)
    found: dict[str, Function] = {}
    for path in files:
        for function in _functions(path):
            found.setdefault(function.code, function)
        if len(found) >= count:
            break
    return list(found.values())[:count]


def with_questions(functions: Sequence[Function], count: int, seed: int) -> list[int]:
    """Return the numbers of up to ``count`` random functions whose question is asked for no other one."""
    times = Counter(function.question for function in functions)
    fit = [i for i, function in enumerate(functions) if function.question and times[function.question] == 1]
    return sorted(random.Random(seed).sample(fit, min(count, len(fit))))


def _files(package: str) -> list[Path]:
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
    else:
        root = Path(sysconfig.get_path("purelib")) / package
        if not package.isidentifier() or not root.is_dir():
            raise ConfigError(f"packages expects stdlib or folders of installed packages, got {package!r}")
    paths = sorted(root.rglob("*.py"))
    return [path for path in paths if not _NOT_LIBRARY.intersection(path.relative_to(root).parts)]


def _functions(path: Path) -> Iterator[Function]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):  # templates, and files of another version or encoding
        return
    lines = text.split("\n")
    scopes: list[ast.Module | ast.ClassDef] = [tree]
    while scopes:
        for node in scopes.pop().body:
            if isinstance(node, ast.ClassDef):
                scopes.append(node)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                function = _function(path, lines, node)
                if function is not None:
                    yield function


def _function(path: Path, lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function | None:
    own = lines[node.lineno - 1 : node.end_lineno]
    question = ""
    if docstring := ast.get_docstring(node):
        statement = node.body[0]
        if len(node.body) == 1 or statement.lineno == node.lineno:
            return None  # nothing else is left, or it cannot be cut out by lines
        del own[statement.lineno - node.lineno : (statement.end_lineno or statement.lineno) - node.lineno + 1]
        question = " ".join(docstring.split("\n\n")[0].split())
    code = "\n".join(own)
    if not code.strip() or len(code) > _MAX_CHARS:
        return None
    return Function(str(path), node.lineno, code, question if len(question.split()) >= _MIN_WORDS else "")
