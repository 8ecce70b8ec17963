"""Where the service writes decisions before anybody hears of them: answers for repeats, experiences for learning."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from esper.errors import DataFormatError
from esper.tamiyo.experience.records import DecisionFacts, Incident
from esper.tamiyo.experience.store import ExperienceStore
from esper.tamiyo.service.gates import adds
from esper.tamiyo.service.outcomes import write_outcomes
from esper.tamiyo.service.protocol import PROTOCOL_VERSION, Answer, Ask, Report

__all__ = ["ExperienceBook"]

_KIND = 0x45737041  # "EspA", the application id in the file's header
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    request_id TEXT PRIMARY KEY,
    run_id     TEXT NOT NULL,
    decided_at REAL NOT NULL,
    adds       INTEGER NOT NULL,
    undone     INTEGER NOT NULL DEFAULT 0,
    reported   INTEGER NOT NULL DEFAULT 0,
    flops      REAL NOT NULL,
    answer     BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_of_run ON answers (run_id, decided_at);
"""


class ExperienceBook:
    """Answers by request id in one file, experiences in the store beside it.

    An answer is written first, its experience second, and the experience is on the disk itself before the run hears
    of it. What a crash leaves between the two is an answer that nobody has heard: the run asks again, gets this very
    answer, and its experience is completed. The file of answers survives a kill, and is not waited for to reach the
    disk: what a power failure takes of it is put together again from the experience, without its words.

    Args:
        path: Of the experience store; the answers lie beside it, in ``NAME.answers``.

    Raises:
        DataFormatError: A file is damaged or is something else.
        StoreError: The store cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.store = ExperienceStore(path)
        self.path = Path(f"{path}.answers")
        self._settler = ThreadPoolExecutor(1, thread_name_prefix="esper-outcomes")
        self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self.close()
            raise DataFormatError(
                f"expected the answers of a service in {self.path}, but: {error}; move the file away: experiences are "
                "not in it"
            ) from error
        except DataFormatError:
            self.close()
            raise

    def _prepare(self) -> None:
        kind = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if (kind, version) not in ((0, 0), (_KIND, PROTOCOL_VERSION)):
            raise DataFormatError(
                f"expected the answers of a service of protocol version {PROTOCOL_VERSION} in {self.path}, got kind "
                f"{kind:#x} of version {version}; move the file away: experiences are not in it"
            )
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")  # waiting for the disk once a round is enough
        self._db.executescript(_TABLES)
        self._db.execute(f"PRAGMA application_id = {_KIND}")
        self._db.execute(f"PRAGMA user_version = {PROTOCOL_VERSION}")

    def answer(self, request_id: str) -> Answer | None:
        """The answer that a request got, if it got one.

        Raises:
            DataFormatError: It is damaged.
        """
        row = self._db.execute("SELECT answer FROM answers WHERE request_id = ?", (request_id,)).fetchone()
        if row is None:
            return self._from_experience(request_id)
        try:
            return msgspec.msgpack.decode(row[0], type=Answer)
        except msgspec.MsgspecError as error:
            raise DataFormatError(f"{self.path}: the answer to {request_id!r} is damaged: {error}") from error

    def _from_experience(self, request_id: str) -> Answer | None:
        stored = self.store.get(request_id)
        if stored is None:
            return None
        decision = stored.decision
        return Answer(
            run_id=decision.run_id,
            request_id=request_id,
            sequence=0,
            candidate=decision.chosen,
            confidence=decision.confidence,
            uncertainty=decision.uncertainty or 0.0,
            value=0.0,
            urgency=0.0,
            risk=0.0,
            reason="decided before; the words were lost",
            decider=decision.policy,
            preferred=decision.chosen,
            version=decision.version,
            logprob=decision.logprob,
        )

    def write(self, decided: Sequence[tuple[Ask, Answer]], now: float) -> None:
        """Write decisions down; they are on disk when this returns, and those that were there stay as they are.

        Args:
            decided: Requests with their answers.
            now: Unix seconds.

        Raises:
            StoreError: They could not be written.
        """
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(
                "INSERT OR IGNORE INTO answers (request_id, run_id, decided_at, adds, flops, answer) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (
                        answer.request_id,
                        answer.run_id,
                        now,
                        adds(ask.point.candidates[answer.candidate]),
                        ask.training_flops,
                        msgspec.msgpack.encode(answer),
                    )
                    for ask, answer in decided
                ],
            )
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self.store.add_decisions([_facts(ask, answer) for ask, answer in decided])

    def report(self, report: Report) -> bool:
        """Write down what became of a decision; False when there is no such decision of this run."""
        key = (report.request_id, report.run_id)
        row = self._db.execute(
            "SELECT reported FROM answers WHERE request_id = ? AND run_id = ?", key
        ).fetchone()
        if row is None:
            return False
        if row[0]:
            return True  # told again, because the run had not heard that it was noted
        self.store.note_applied(report.request_id, seed_ids=report.seed_ids, refused=report.refused)
        if report.applied:
            for target in report.seed_ids or ("",):
                incident = Incident(step=report.step, kind="adaptation", target=target)
                self.store.note_incident(report.run_id, incident, timestamp=time.time())
        self._db.execute(
            "UPDATE answers SET undone = ?, reported = 1 WHERE request_id = ? AND run_id = ?",
            (not report.applied, *key),
        )
        return True

    def ended(self, run_id: str) -> None:
        """Write the outcomes of a run's decisions down as far as they are known, in a thread: fits take a while."""
        rows = self._db.execute("SELECT request_id, flops FROM answers WHERE run_id = ?", (run_id,))
        if flops := dict(rows.fetchall()):
            self._settler.submit(write_outcomes, self.store, run_id, flops)

    def adapted_at(self, run_id: str, since: float) -> dict[str, float]:
        """Request id -> Unix seconds of what a run was told to add or renew, and has not reported as undone."""
        rows = self._db.execute(
            "SELECT request_id, decided_at FROM answers WHERE run_id = ? AND decided_at >= ? AND adds AND NOT undone "
            "ORDER BY decided_at",
            (run_id, since),
        )
        return dict(rows.fetchall())

    def close(self) -> None:
        """Finish the outcomes that are being written, and close both files. Idempotent."""
        self._settler.shutdown()
        self._db.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _facts(ask: Ask, answer: Answer) -> DecisionFacts:
    return DecisionFacts(
        decision_id=answer.request_id,
        point=ask.point,
        chosen=answer.candidate,
        policy=answer.decider,
        version=answer.version,
        logprob=answer.logprob,
        confidence=answer.confidence,
        uncertainty=answer.uncertainty,
    )
