"""``growth.jsonl``: one line of JSON for every decision, transition, intervention and mark of a run.

A line is a :data:`esper.messages.Event` as tagged JSON (``"type"`` is ``decision``, ``transition``,
``governor`` or ``run``). Non-finite numbers are spelt as :mod:`esper.report.nonfinite` says.

A process may die at any byte. Each line is therefore one ``write`` to an unbuffered file, so only the last
line can be incomplete; it is known by its missing newline, and dropped with a note in the log.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import msgspec

from esper.atomic import replacing
from esper.errors import MessageError
from esper.messages import Event, RunRecord
from esper.report.nonfinite import decode_any, decode_numbers, encode_any, encode_numbers

__all__ = ["Journal", "decode_event", "encode_event", "last_run", "read_journal"]

_log = logging.getLogger(__name__)


def encode_event(event: Event) -> bytes:
    """Return one line of JSON without its newline.

    Raises:
        MessageError: ``event`` would not read back, e.g. a confidence of NaN or an ``info`` value that JSON
            has no form for. Better known now than at the end of the run.
    """
    try:
        raw = msgspec.to_builtins(event)
        _translate(raw, encode_numbers, encode_any)
        line = msgspec.json.encode(raw)
        msgspec.convert(_decode_raw(line), Event)
    except (msgspec.MsgspecError, TypeError) as error:
        raise MessageError(
            f"expected an event that growth.jsonl can hold, got {event!r}: {error}; "
            "use plain values within the ranges given in esper/messages.py"
        ) from error
    return line


def decode_event(line: bytes) -> Event:
    """Return the event on one line of ``growth.jsonl``.

    Raises:
        MessageError: not JSON, or not an event of this schema.
    """
    try:
        return cast(Event, msgspec.convert(_decode_raw(line), Event))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MessageError(f"expected one event as JSON, got {_excerpt(line)}: {error}") from error


def read_journal(path: str | os.PathLike[str]) -> list[Event]:
    """Return the events of a ``growth.jsonl``, in the order written.

    A torn last line (the writer was killed, or is writing just now) is dropped with a log message.

    Raises:
        MessageError: any other line is not an event; the text names file and line.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    whole, torn = _split_torn(path.read_bytes())
    if torn:
        _log.warning("%s: dropped a torn last line of %d bytes; its writer was killed", path, len(torn))
    return [event for _, event in _events(path, whole)]


def last_run(events: Sequence[Event]) -> list[Event]:
    """Return the events of the run that was written to last: one file may hold several, as where a notebook's
    cell is run again, and their seeds have the same names.
    """
    return [event for event in events if event.run_id == events[-1].run_id]


class Journal:
    """Append-only writer of ``growth.jsonl``; each line reaches the operating system before `write` returns.

    Opening a journal that ends in a torn line cuts that line off, so the next one stands by itself.

    Example:
        >>> with Journal(folder / "growth.jsonl") as journal:
        ...     journal.write(event)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: io.FileIO | None = None
        self._open()

    def write(self, event: Event) -> None:
        """Append one event.

        Raises:
            MessageError: the event would not read back; nothing is written.
            ValueError: the journal is closed.
        """
        line = encode_event(event) + b"\n"
        file = self._require_open()
        written = file.write(line)
        while written < len(line):  # a raw write may take part of it, on a full pipe or a signal
            written += file.write(line[written:])

    def truncate_after(self, step: int, run_id: str) -> int:
        """Make the journal what it was when the checkpoint of ``step`` was written, for a resumed run.

        Removes the run's events of later steps (they will happen again) and its ``end`` marks (it has not ended
        after all). Growth precedes the checkpoint within a step, so events *of* ``step`` stay. The file is
        replaced in one move: a kill leaves the old journal or the new one.

        Args:
            step: Optimizer steps of the checkpoint.
            run_id: Of the run that is resumed; what other runs have written to the same file stays.

        Returns:
            The number of lines removed.
        """
        self._require_open()
        kept: list[bytes] = []
        removed = 0
        for line, event in _events(self.path, self.path.read_bytes()):
            is_end = isinstance(event, RunRecord) and event.event == "end"
            if event.run_id == run_id and (event.step > step or is_end):
                removed += 1
            else:
                kept.append(line + b"\n")
        if removed:
            self.close()
            with replacing(self.path) as temporary:
                temporary.write_bytes(b"".join(kept))
            self._open()
        return removed

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Journal({str(self.path)!r}{', closed' if self._file is None else ''})"

    def _require_open(self) -> io.FileIO:
        if self._file is None:
            raise ValueError(f"expected an open journal, {self.path} is closed; make a new Journal to go on")
        return self._file

    def _open(self) -> None:
        if self.path.exists():
            self._mend()
        self._file = self.path.open("ab", buffering=0)

    def _mend(self) -> None:
        content = self.path.read_bytes()
        whole, torn = _split_torn(content)
        if torn:
            _log.warning("%s: cut off a torn last line of %d bytes", self.path, len(torn))
            os.truncate(self.path, len(whole))
        elif whole and not whole.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")


def _split_torn(content: bytes) -> tuple[bytes, bytes]:
    """Split off an incomplete last line. One that merely lacks its newline (an editor's work) is complete."""
    cut = content.rfind(b"\n") + 1
    last = content[cut:]
    if not last:
        return content, b""
    try:
        decode_event(last)
    except MessageError:
        return content[:cut], last
    return content, b""


def _events(path: Path, content: bytes) -> Iterator[tuple[bytes, Event]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield line, decode_event(line)
        except MessageError as error:
            raise MessageError(
                f"{path}, line {number}: {error}; remove the line, or move the file away"
            ) from error


def _decode_raw(line: bytes) -> Any:
    raw = msgspec.json.decode(line)
    if isinstance(raw, dict):
        _translate(raw, decode_numbers, decode_any)
    return raw


def _translate(raw: dict[str, Any], numbers: Any, anything: Any) -> None:
    """Apply a codec to the places of an event's JSON form that hold free floats, in place."""
    holders = [(raw, "measurements"), (raw.get("decision"), "numbers")]
    for holder, key in holders:
        if isinstance(holder, dict) and isinstance(holder.get(key), dict):
            holder[key] = numbers(holder[key])
    if "info" in raw:
        raw["info"] = anything(raw["info"])


def _excerpt(line: bytes) -> str:
    return repr(line[:80]) + ("..." if len(line) > 80 else "")
