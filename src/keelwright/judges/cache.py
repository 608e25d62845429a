# SPDX-License-Identifier: Apache-2.0
"""Verdicts that were bought once: a cache on disk, shared by runs and by processes.

The key is the judge's id and the digest of everything the judge may see. What is kept is label, score and the judge's
short verdict; requests and answers are not stored. A verdict that could not be read, or that an engine failed to give,
is not kept: it is asked for again.

The file is SQLite with a write-ahead log: several processes may read and write it, and one that is killed loses at most
the verdicts it had not yet written. A damaged file is set aside under another name and noted; the run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from keelwright.core.errors import StorageError
from keelwright.core.files import storage_errors
from keelwright.core.protocols import BatchJudge, Judge, Progress, Silent
from keelwright.core.records import RESPONSE_CLASSES, Generation, Item, Judgement

T = TypeVar("T")

_WAIT_S: Final = 60.0
"""How long a process waits for another one's write."""
_AT_ONCE: Final = 500
"""Keys per query; SQLite allows 999 variables."""
_PAUSE_S: Final = 0.02
_TABLE: Final = """
CREATE TABLE IF NOT EXISTS verdicts (
    judge TEXT NOT NULL, seen TEXT NOT NULL, label TEXT NOT NULL, score REAL, raw TEXT, PRIMARY KEY (judge, seen)
) WITHOUT ROWID
"""


def seen_digest(item: Item, generation: Generation) -> str:
    """Return the SHA-256 of everything a judge may see of one answer; ids and seeds are not part of it."""
    seen = [
        *(item.kind, item.hazard, item.prompt, item.system, item.expected, item.scorer),
        *(dict(item.facts), dict(item.materials)),
        *(generation.output, generation.finish),
    ]
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


class VerdictCache:
    """Verdicts by judge and by what was judged, in one file.

    Args:
        path: The file; it and its folder are made.
        progress: Told when a damaged file was set aside.

    Raises:
        StorageError: The file cannot be opened or written.
    """

    def __init__(self, path: Path, *, progress: Progress = Silent()) -> None:  # noqa: B008 - it has no state
        self.path = path
        self._progress = progress
        self._connection: sqlite3.Connection | None = None
        self._process = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(path, str(error)) from error
        self._guarded(lambda connection: None)

    def get(self, judge_id: str, seen: Sequence[str]) -> dict[str, Judgement]:
        """Return the verdicts that are there, by digest.

        Args:
            judge_id: The judge.
            seen: Digests of what it would see.
        """
        found: dict[str, Judgement] = {}
        for start in range(0, len(seen), _AT_ONCE):
            part = list(seen[start : start + _AT_ONCE])
            for key, label, score, raw in self._guarded(functools.partial(_select, judge_id, part)) or ():
                if label in RESPONSE_CLASSES:
                    found[key] = Judgement(label, score, raw)
        return found

    def put(self, judge_id: str, verdicts: Mapping[str, Judgement]) -> None:
        """Keep verdicts by digest, all or none; those that are there already stay as they are.

        Args:
            judge_id: The judge.
            verdicts: By digest of what it saw.
        """
        rows = [(judge_id, seen, one.label, one.score, one.raw) for seen, one in verdicts.items()]
        if rows:
            self._guarded(lambda one: _insert(one, rows))

    def __len__(self) -> int:
        """Return the number of verdicts."""
        rows = self._guarded(lambda one: one.execute("SELECT count(*) FROM verdicts").fetchall())
        return int(rows[0][0]) if rows else 0

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        if self._connection is not None and self._process == os.getpid():
            self._connection.close()
        self._connection = None

    def _guarded(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Return what the work on the open file gives; None where the file was damaged and had to be set aside."""
        try:
            return work(self._open())
        except sqlite3.OperationalError as error:
            raise _unusable(self.path, str(error)) from error
        except sqlite3.DatabaseError as error:
            self._set_aside(str(error))
            self._open()
            return None

    def _open(self) -> sqlite3.Connection:
        # A connection must not cross a fork.
        if self._connection is None or self._process != os.getpid():
            connection = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
            try:
                _prepare(connection)
            except sqlite3.Error:
                connection.close()
                raise
            self._connection, self._process = connection, os.getpid()
        return self._connection

    def _set_aside(self, fault: str) -> None:
        self.close()
        if _is_sound(self.path):
            return
        aside = next(
            place
            for number in range(1, 10_000)
            if not (place := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists()
        )
        with storage_errors(self.path):
            self.path.replace(aside)
            for ending in ("-wal", "-shm"):
                self.path.with_name(self.path.name + ending).unlink(missing_ok=True)
        self._progress.note(f"The cache of verdicts was damaged ({fault}); set aside as '{aside.name}', begun anew.")


class CachedJudge:
    """A judge that remembers; meets `core.protocols.BatchJudge`.

    Args:
        judge: Who is asked for what is not there.
        cache: Where verdicts are kept.
        chunk: Answers that are judged before their verdicts are written.
    """

    def __init__(self, judge: Judge | BatchJudge, cache: VerdictCache, *, chunk: int = 256) -> None:
        self.inner = judge
        self.network: str | None = getattr(judge, "network", None)
        self.hits = 0
        """Verdicts that were there."""
        self.misses = 0
        """Verdicts that the judge was asked for."""
        self._cache = cache
        self._chunk = chunk

    @functools.cached_property
    def judge_id(self) -> str:
        """Of the judge that is asked; may open its model."""
        return self.inner.judge_id

    def judge(self, item: Item, generation: Generation) -> Judgement:
        """Return the verdict on one answer."""
        return self.judge_all([(item, generation)])[0]

    def judge_all(self, answers: Sequence[tuple[Item, Generation]]) -> list[Judgement]:
        """Return one verdict per answer, in order; those that are not there are asked for and kept as they come."""
        seen = [seen_digest(item, generation) for item, generation in answers]
        known = self._cache.get(self.judge_id, seen)
        missing = {key: answers[index] for index, key in enumerate(seen) if key not in known}
        self.misses += len(missing)
        self.hits += len(answers) - len(missing)
        waiting = list(missing.items())
        for start in range(0, len(waiting), self._chunk):
            part = waiting[start : start + self._chunk]
            verdicts = dict(zip((key for key, _ in part), self._ask([one for _, one in part]), strict=True))
            self._cache.put(self.judge_id, {key: one for key, one in verdicts.items() if one.label != "unparsed"})
            known.update(verdicts)
        return [dataclasses.replace(known[key]) for key in seen]

    def _ask(self, answers: Sequence[tuple[Item, Generation]]) -> list[Judgement]:
        together = getattr(self.inner, "judge_all", None)
        if together is not None:
            verdicts: list[Judgement] = together(answers)
            return verdicts
        return [self.inner.judge(item, generation) for item, generation in answers]


def _prepare(connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        _patiently(connection, "PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(_TABLE)


def _patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Execute a change of the journal, for which SQLite does not wait by itself while another process makes it."""
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            connection.execute(statement)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(_PAUSE_S)
        else:
            return


def _unusable(path: Path, found: str) -> StorageError:
    return StorageError(
        f"The cache of verdicts '{path}' cannot be used.",
        expected="a file that can be read and written",
        found=found,
        fix="choose another place for it, or free some space",
    )


def _select(judge_id: str, seen: Sequence[str], connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    marks = ", ".join("?" * len(seen))
    query = f"SELECT seen, label, score, raw FROM verdicts WHERE judge = ? AND seen IN ({marks})"
    return connection.execute(query, [judge_id, *seen]).fetchall()


def _insert(connection: sqlite3.Connection, rows: Sequence[tuple[str, str, str, float | None, str | None]]) -> None:
    with _transaction(connection):
        connection.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?)", rows)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    # Taking the write lock at once lets the time-out work; a read lock that is raised later would fail instead.
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _is_sound(path: Path) -> bool:
    """Whether the file is a whole database: another process may have begun it anew meanwhile."""
    try:
        connection = sqlite3.connect(path, timeout=_WAIT_S)
        try:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
        finally:
            connection.close()
    except sqlite3.DatabaseError:
        return False
