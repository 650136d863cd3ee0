"""A block store in one SQLite file: all that a third party writes to give every engine a new kind of cache."""

import sqlite3

from kvconnect import BlockStore, Options, StoreCapabilities, hookimpl


class SQLiteOptions(Options, frozen=True):
    path: str


class SQLiteStore(BlockStore):
    """One SQLite file (examples/custom_connector)."""

    Options = SQLiteOptions
    capabilities = StoreCapabilities(durable=True, shared=True)  # concurrency=1: every call comes on one thread

    def __init__(self, options, context):
        self.db = sqlite3.connect(options.path, timeout=context.timeout_s)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("CREATE TABLE IF NOT EXISTS blocks (key BLOB PRIMARY KEY, frame BLOB NOT NULL) WITHOUT ROWID")

    def contains(self, keys):
        return [self.db.execute("SELECT 1 FROM blocks WHERE key = ?", (key,)).fetchone() is not None for key in keys]

    def read(self, keys, buffers):
        lengths = []
        for key, buffer in zip(keys, buffers, strict=True):
            row = self.db.execute("SELECT frame FROM blocks WHERE key = ?", (key,)).fetchone()
            fits = row is not None and len(row[0]) <= len(buffer)
            if fits:
                buffer[: len(row[0])] = row[0]
            lengths.append(len(row[0]) if fits else None)
        return lengths

    def write(self, keys, frames):
        with self.db:  # one transaction: after a crash all of the batch is there, or none
            self.db.executemany("INSERT OR REPLACE INTO blocks VALUES (?, ?)", zip(keys, frames, strict=True))
        return [True] * len(keys)

    def remove(self, keys):
        with self.db:
            self.db.executemany("DELETE FROM blocks WHERE key = ?", [(key,) for key in keys])

    def close(self):
        self.db.close()


@hookimpl
def kvconnect_register(registry):
    registry.add("sqlite", "kvconnect_sqlite:SQLiteStore")
