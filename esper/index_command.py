"""``esper index`` and ``esper ask``: files become passages, and a question finds them again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from esper.errors import ConfigError, DataNotFoundError

if TYPE_CHECKING:
    from rich.console import Console

    from esper.cortex.encoder import Encoder
    from esper.cortex.retrieval.search import Hit

__all__ = ["add_ask", "add_index", "ask", "index"]

_STORE = Path(".esper/retrieval")
_COLLECTIONS = ("codebase", "documentation", "issues", "patterns")


def add_index(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``esper index``."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files and folders")
    _add_store(parser)
    parser.add_argument(
        "--collection", choices=_COLLECTIONS, default="codebase", help="where they belong (default: codebase)"
    )
    parser.add_argument(
        "--encoder",
        metavar="NAME",
        help="hashing, minilm, or MODULE:CLASS of LangChain's Embeddings; by default the store's own, or hashing",
    )
    parser.add_argument(
        "--max-bytes", type=int, default=1 << 20, metavar="N", help="largest file (default: 1 MiB)"
    )


def add_ask(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``esper ask``."""
    parser.add_argument("question", metavar="QUESTION")
    _add_store(parser)
    parser.add_argument("-k", type=int, default=5, metavar="N", help="passages to show (default: 5)")
    parser.add_argument("--collection", choices=_COLLECTIONS, help="from this one alone")
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="on source, language, start_line, ...; VALUE may hold * and ?",
    )
    parser.add_argument(
        "--mode",
        choices=("hybrid", "dense", "sparse"),
        default="hybrid",
        help="by vectors (dense), by words (sparse: BM25), or both (default)",
    )


def index(options: argparse.Namespace) -> int:
    """Run ``esper index``.

    Raises:
        EsperError: A path is missing, the store is another's, or a package of the extra ``cortex`` is.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from esper.cortex.retrieval import IndexingConfig, PassageStore, index_paths

    config = IndexingConfig(collection=options.collection, max_bytes=options.max_bytes)
    for path in options.paths:
        if not path.exists():
            raise DataNotFoundError(f"expected a file or folder at {path}, and there is none")
    console = Console(highlight=False)
    with PassageStore(options.store, _encoder(options.store, options.encoder)) as store:
        columns = (TextColumn("indexing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=None)
            report = index_paths(
                store,
                options.paths,
                config,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        rows = [
            ("new files", report.new),
            ("changed", report.changed),
            ("unchanged", report.unchanged),
            ("deleted", report.deleted),
            *((f"passed over: {reason}", count) for reason, count in sorted(report.skipped.items())),
            ("passages added", report.passages_added),
            ("passages removed", report.passages_removed),
            ("passages in the store", len(store)),
        ]
        _print_report(console, f"{options.store}: {options.collection}, {report.seconds:.1f} s", rows)
    return 0


def ask(options: argparse.Namespace) -> int:
    """Run ``esper ask``. Returns 1 when nothing was found.

    Raises:
        EsperError: There is no store, it is damaged, or the question or filter has no meaning.
    """
    from rich.console import Console

    from esper.cortex.retrieval import PassageStore, search_passages

    conditions: dict[str, str | int] = {"collection": options.collection} if options.collection else {}
    for text in options.filter:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--filter expects KEY=VALUE, got {text!r}")
        conditions[key] = int(value) if value.isdecimal() else value
    console = Console(highlight=False)
    with PassageStore.open(options.store) as store:
        hits = search_passages(store, options.question, options.k, mode=options.mode, filter=conditions)
        total = len(store)
    if not hits:
        console.print(f"nothing found among {total:,} passages")
        return 1
    console.print(
        f"{len(hits)} of {total:,} passages, best first. These are quotations, not an answer: "
        "no language model was asked.",
        style="bold",
        soft_wrap=True,
    )
    for number, hit in enumerate(hits, start=1):
        _print_hit(console, number, hit)
    return 0


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", type=Path, default=_STORE, metavar="DIR", help=f"folder of the store (default: {_STORE})"
    )


def _encoder(folder: Path, name: str | None) -> Encoder:
    """The encoder ``name``, or the one of the store, or the default of a new store."""
    from esper.cortex.encoder import build_encoder
    from esper.cortex.retrieval.passages import PassageTable

    if name is not None:
        return build_encoder(name)
    try:
        table = PassageTable(folder, readonly=True)
    except DataNotFoundError:
        return build_encoder("hashing")
    try:
        origin = table.origin()
    finally:
        table.database.close()
    return build_encoder(*origin.encoder) if origin and origin.encoder else build_encoder("hashing")


def _print_report(console: Console, title: str, rows: list[tuple[str, int]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="table.title"),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    for name, count in rows:
        table.add_row(name, f"{count:,}")
    console.print(table)


def _print_hit(console: Console, number: int, hit: Hit) -> None:
    from rich.text import Text

    from esper.cortex.retrieval import citation, visible

    parts = [f"score {hit.score:.4f}"]
    parts += [f"cosine {hit.cosine:.3f}"] if hit.cosine is not None else []
    parts += [f"BM25 {hit.bm25:.2f}"] if hit.bm25 is not None else []
    # Text objects, because a passage may hold what rich takes for markup.
    console.print()
    console.print(
        Text.assemble(
            f"[{number}] ", (citation(hit.document, Path.cwd()), "cyan"), f"  ({', '.join(parts)})"
        ),
        soft_wrap=True,
    )
    lines = visible(hit.document.page_content).split("\n")
    console.print(Text("\n".join(f"    {line}".rstrip() for line in lines)), soft_wrap=True)
