"""One SQLite file in which every decision of every run is kept, with what came of it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from esper.errors import ConfigError, DataFormatError
from esper.tamiyo.experience.connection import StoreFile
from esper.tamiyo.experience.packing import (
    check_choice,
    check_decision,
    pack,
    unpack,
)
from esper.tamiyo.experience.parts import SharedParts
from esper.tamiyo.experience.records import DecisionFacts, Experience, Incident, Observation, OutcomeFacts
from esper.tamiyo.graph.facts import FACTS_VERSION

__all__ = ["ExperienceStore", "PolicyCount"]

_CHUNK = 64
_COLUMNS = """
    d.number, d.decision_id, d.policy, d.version, d.chosen, d.logprob, d.confidence, d.uncertainty, d.facts_version,
    d.point, d.seed_ids, d.refused, o.facts
    FROM decisions AS d LEFT JOIN outcomes AS o USING (decision_id)
"""


class PolicyCount(msgspec.Struct, frozen=True, kw_only=True):
    """What a store holds of one policy; means are over rewards there are, None where there are none."""

    policy: str
    version: str
    runs: int
    decisions: int
    waits: int
    refused: int
    rewarded: int
    mean_reward: float | None
    mean_reward_of_adaptations: float | None


class ExperienceStore:
    """Decisions and outcomes, durable before they are acknowledged.

    A method that writes returns after its transaction has reached the disk (write-ahead log, ``synchronous=FULL``),
    so what it has acknowledged survives a kill and a power failure. Several processes and threads may share
    a file on one machine; a network file system will not do (SQLite's log needs shared memory). A connection that
    was inherited over a fork is left alone, and a new one opened.

    Args:
        path: The file; made, with its folder, when it is not there.
        readonly: Look, and change nothing; the file has to be there, and of this version.
        busy_timeout_s: How long to wait for another writer.

    Raises:
        DataFormatError: The file is damaged, foreign, or of a newer version. Nothing of it was changed.
        DataNotFoundError: ``readonly``, and nothing is there.
        StoreError: It cannot be opened or is locked.

    Example::

        with ExperienceStore("experiences.sqlite") as store:
            store.add_decision(facts)
            for experience in store.iterate(policy="tamiyo"):
                ...
    """

    def __init__(
        self, path: str | os.PathLike[str], *, readonly: bool = False, busy_timeout_s: float = 30.0
    ) -> None:
        self.path = Path(path)
        self._file = StoreFile(self.path, readonly=readonly, busy_timeout_s=busy_timeout_s)
        self._parts = SharedParts(str(self.path))
        with self._file.reading():
            pass  # a wrong file is refused now, not at the first decision

    # ---------------------------------------------------------------- writing

    def add_decision(self, facts: DecisionFacts) -> bool:
        """Write a decision down.

        Returns:
            False when a decision of this id stands there already; the first one stays.

        Raises:
            ConfigError: It would not read back, or nobody could learn from it. Nothing is written.
            StoreError: It could not be written.
        """
        return bool(self.add_decisions([facts]))

    def add_decisions(self, several: Sequence[DecisionFacts]) -> int:
        """Write decisions down in one transaction, all or none; waiting for the disk takes most of the time.

        Returns:
            How many did not stand there already.

        Raises:
            ConfigError: One would not read back, or nobody could learn from it. Nothing is written.
            StoreError: They could not be written.
        """
        for facts in several:
            check_decision(facts)
        with self._file.writing() as db:
            return sum(self._add(db, facts) for facts in several)

    def note_applied(self, decision_id: str, *, seed_ids: Sequence[str] = (), refused: str = "") -> None:
        """Add what the run made of a decision; may come in several parts.

        Raises:
            ConfigError: There is no such decision.
            StoreError: It could not be written.
        """
        with self._file.writing() as db:
            row = db.execute(
                "SELECT seed_ids, refused FROM decisions WHERE decision_id = ?", (decision_id,)
            ).fetchone()
            if row is None:
                raise self._unknown(decision_id)
            known = self._seed_ids(row[0], decision_id)
            seeds = [*known, *(s for s in seed_ids if s not in known)]
            reasons = [r for r in (row[1], refused if refused not in row[1] else "") if r]
            db.execute(
                "UPDATE decisions SET seed_ids = ?, refused = ? WHERE decision_id = ?",
                (msgspec.json.encode(seeds).decode(), "; ".join(reasons), decision_id),
            )

    def add_outcome(self, decision_id: str, outcome: OutcomeFacts) -> bool:
        """Write down what came of a decision; a later one takes the place of one that was not final.

        Returns:
            False when a final outcome stands there already; it stays.

        Raises:
            ConfigError: There is no such decision, or the outcome would not read back.
            StoreError: It could not be written.
        """
        return bool(self.add_outcomes({decision_id: outcome}))

    def add_outcomes(self, several: Mapping[str, OutcomeFacts]) -> int:
        """Write down what came of decisions, by id, in one transaction: all or none.

        Returns:
            How many did not have a final outcome already.

        Raises:
            ConfigError: There is no such decision, or an outcome would not read back. Nothing is written.
            StoreError: They could not be written.
        """
        for decision_id, outcome in several.items():
            try:
                msgspec.convert(msgspec.to_builtins(outcome), OutcomeFacts)
            except (msgspec.MsgspecError, TypeError) as error:
                raise ConfigError(f"the outcome of {decision_id!r} cannot be stored: {error}") from error
        with self._file.writing() as db:
            return sum(self._add_outcome(db, *item) for item in several.items())

    def observe(self, run_id: str, observation: Observation) -> bool:
        """Write down how a run stood; False when that step of it stands there already."""
        with self._file.writing() as db:
            self._know_run(db, run_id, observation.timestamp)
            written = db.execute(
                "INSERT OR IGNORE INTO observations VALUES (?, ?, ?)",
                (run_id, observation.step, pack(observation)),
            )
            return bool(written.rowcount)

    def note_incident(self, run_id: str, incident: Incident, *, timestamp: float) -> None:
        """Write down that something was undone, or that the model was adapted."""
        with self._file.writing() as db:
            self._know_run(db, run_id, timestamp)
            db.execute(
                "INSERT INTO incidents (run_id, step, facts) VALUES (?, ?, ?)",
                (run_id, incident.step, pack(incident)),
            )

    def end_run(self, run_id: str, step: int) -> None:
        """Mark a run as ended after ``step`` optimizer steps."""
        with self._file.writing() as db:
            db.execute("UPDATE runs SET ended = ? WHERE run_id = ?", (step, run_id))

    def undo_after(self, run_id: str, step: int) -> int:
        """Make what is known of a run what it was at the checkpoint of ``step``: what came later will come once more.

        Decisions fall into a step before its checkpoint is written, so those *of* ``step`` stay.

        Returns:
            Decisions that were removed.
        """
        with self._file.writing() as db:
            gone = db.execute("DELETE FROM decisions WHERE run_id = ? AND step > ?", (run_id, step)).rowcount
            for table in ("observations", "incidents"):
                db.execute(f"DELETE FROM {table} WHERE run_id = ? AND step > ?", (run_id, step))
            db.execute(
                "DELETE FROM outcomes WHERE decision_id IN (SELECT decision_id FROM decisions WHERE run_id = ?)",
                (run_id,),
            )  # they reach to the end that this run has no longer had
            db.execute("UPDATE runs SET ended = NULL WHERE run_id = ?", (run_id,))
            return int(gone)

    # ---------------------------------------------------------------- reading

    def __len__(self) -> int:
        """Decisions."""
        with self._file.reading() as db:
            return int(db.execute("SELECT count(*) FROM decisions").fetchone()[0])

    def get(self, decision_id: str) -> Experience | None:
        """One experience by the id of its decision; None when there is none."""
        with self._file.reading() as db:
            row = db.execute(f"SELECT {_COLUMNS} WHERE d.decision_id = ?", (decision_id,)).fetchone()
            return None if row is None else self._experience(db, row)

    def iterate(
        self,
        *,
        run_id: str | None = None,
        policy: str | None = None,
        version: str | None = None,
        since: int = 0,
        rewarded: bool | None = None,
    ) -> Iterator[Experience]:
        """Experiences in the order in which they were decided, a few at a time; others may write meanwhile.

        Args:
            run_id: Of this run alone.
            policy: Of this policy alone.
            version: Of this version of it alone.
            since: Only those with a greater ``number``.
            rewarded: Only those that have a reward (True), or none (False).
        """
        conditions = ["d.number > ?"]
        given: list[Any] = []
        for column, value in (("d.run_id", run_id), ("d.policy", policy), ("d.version", version)):
            if value is not None:
                conditions.append(f"{column} = ?")
                given.append(value)
        if rewarded is not None:
            conditions.append(f"o.total IS {'NOT ' if rewarded else ''}NULL")
        query = f"SELECT {_COLUMNS} WHERE {' AND '.join(conditions)} ORDER BY d.number LIMIT {_CHUNK}"
        while True:
            with self._file.reading() as db:
                rows = db.execute(query, (since, *given)).fetchall()
                found = [self._experience(db, row) for row in rows]
            yield from found
            if len(found) < _CHUNK:
                return
            since = found[-1].number

    def runs(self) -> list[str]:
        """Ids of all runs, the earliest first."""
        with self._file.reading() as db:
            return [row[0] for row in db.execute("SELECT run_id FROM runs ORDER BY started, run_id")]

    def ended(self, run_id: str) -> int | None:
        """Optimizer steps after which a run ended; None while it goes on, was killed, or is not known."""
        with self._file.reading() as db:
            row = db.execute("SELECT ended FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            return None if row is None else row[0]

    def observations(self, run_id: str) -> list[Observation]:
        """How a run stood at its decision points, ascending by step."""
        return self._facts("observations", "step", run_id, Observation)

    def incidents(self, run_id: str) -> list[Incident]:
        """What was undone in a run, or adapted, in order."""
        return self._facts("incidents", "number", run_id, Incident)

    def counts(self) -> list[PolicyCount]:
        """What there is of each policy and version."""
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT policy, version, count(DISTINCT run_id), count(*), total(action = 'wait'), "
                "total(refused != ''), count(o.total), avg(o.total), avg(CASE WHEN action != 'wait' THEN o.total END) "
                "FROM decisions LEFT JOIN outcomes AS o USING (decision_id) "
                "GROUP BY policy, version ORDER BY policy, version"
            ).fetchall()
        return [
            PolicyCount(
                policy=row[0], version=row[1], runs=row[2], decisions=row[3], waits=int(row[4]), refused=int(row[5]),
                rewarded=row[6], mean_reward=row[7], mean_reward_of_adaptations=row[8],
            )
            for row in rows
        ]  # fmt: skip

    def check(self) -> None:
        """Read the whole file and compare it with itself; takes as long as that takes.

        Raises:
            DataFormatError: It is damaged; the text says where.
        """
        with self._file.reading() as db:
            found = [row[0] for row in db.execute("PRAGMA integrity_check(5)")]
        if found != ["ok"]:
            raise DataFormatError(f"{self.path}: the store is damaged: {'; '.join(found)}")
        for _ in self.iterate():
            pass

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()

    def __enter__(self) -> ExperienceStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ExperienceStore({str(self.path)!r}{', closed' if self._file.closed else ''})"

    # ---------------------------------------------------------------- inside

    def _add(self, db: sqlite3.Connection, facts: DecisionFacts) -> bool:
        if db.execute("SELECT 1 FROM decisions WHERE decision_id = ?", (facts.decision_id,)).fetchone():
            return False
        point = self._parts.write(db, facts.point)
        self._know_run(db, facts.run_id, facts.point.timestamp)
        db.execute(
            "INSERT INTO decisions (decision_id, run_id, step, policy, version, action, chosen, logprob, confidence, "
            "uncertainty, facts_version, point) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                facts.decision_id, facts.run_id, facts.point.run.step, facts.policy, facts.version,
                facts.candidate.action, facts.chosen, facts.logprob, facts.confidence, facts.uncertainty,
                FACTS_VERSION, point,
            ),
        )  # fmt: skip
        return True

    def _add_outcome(self, db: sqlite3.Connection, decision_id: str, outcome: OutcomeFacts) -> bool:
        if not db.execute("SELECT 1 FROM decisions WHERE decision_id = ?", (decision_id,)).fetchone():
            raise self._unknown(decision_id)
        reward = outcome.reward
        written = db.execute(
            "INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (decision_id) DO UPDATE SET "
            "provenance = excluded.provenance, final = excluded.final, total = excluded.total, "
            "utility = excluded.utility, facts = excluded.facts WHERE NOT final",
            (
                decision_id, outcome.measured.provenance, outcome.final, None if reward is None else reward.total,
                None if reward is None else reward.utility, pack(outcome),
            ),
        )  # fmt: skip
        return bool(written.rowcount)

    def _know_run(self, db: sqlite3.Connection, run_id: str, started: float) -> None:
        db.execute("INSERT OR IGNORE INTO runs (run_id, started) VALUES (?, ?)", (run_id, started))

    def _facts(self, table: str, order: str, run_id: str, kind: type[Any]) -> list[Any]:
        with self._file.reading() as db:
            rows = db.execute(
                f"SELECT facts, step FROM {table} WHERE run_id = ? ORDER BY {order}", (run_id,)
            ).fetchall()
        return [
            unpack(data, kind, f"{self.path}, {table} of run {run_id}, step {step}") for data, step in rows
        ]

    def _experience(self, db: sqlite3.Connection, row: Sequence[Any]) -> Experience:
        (number, decision_id, policy, version, chosen, logprob, confidence, uncertainty, facts_version, data,
         seed_ids, refused, outcome) = row  # fmt: skip
        where = f"{self.path}, decision {decision_id}"
        if facts_version != FACTS_VERSION:
            raise DataFormatError(
                f"{where}: expected facts of version {FACTS_VERSION}, got version {facts_version}; read it with the "
                "esper that wrote it"
            )
        point = self._parts.read(db, data, where)
        try:
            facts = msgspec.convert(
                {
                    "decision_id": decision_id, "point": point, "chosen": chosen, "policy": policy, "logprob": logprob,
                    "version": version, "confidence": confidence, "uncertainty": uncertainty,
                },
                DecisionFacts,
            )  # fmt: skip
            check_choice(facts)
        except (msgspec.ValidationError, ConfigError) as error:
            raise DataFormatError(f"{where}: the store is damaged: {error}") from error
        return Experience(
            number=number,
            decision=facts,
            seed_ids=self._seed_ids(seed_ids, decision_id),
            refused=refused,
            outcome=None if outcome is None else unpack(outcome, OutcomeFacts, where),
        )

    def _seed_ids(self, text: str, decision_id: str) -> tuple[str, ...]:
        try:
            return msgspec.json.decode(text, type=tuple[str, ...])
        except msgspec.MsgspecError as error:
            raise DataFormatError(
                f"{self.path}, decision {decision_id}: the store is damaged: {error}"
            ) from error

    def _unknown(self, decision_id: str) -> ConfigError:
        return ConfigError(
            f"{self.path}: expected the id of a decision that was stored, got {decision_id!r}; add_decision comes first"
        )
