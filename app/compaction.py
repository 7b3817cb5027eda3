"""Compaction after an erasure: a database deletes rows by no longer showing them. Here the bytes leave its files, too."""

import asyncio
import time

import psycopg
from psycopg import Connection, sql
from redis.asyncio import Redis
from redis.exceptions import ResponseError

TABLES = ("stored_events", "result_documents", "dead_letters", "erasures", "erasure_jobs")
"""Written anew without what was deleted."""
ONLY_A_SUPERUSER = (
    "PostgreSQL's statistics and write-ahead log: a superuser's business. As one: VACUUM FULL pg_statistic; then, with"
    " wal_recycle = off, pg_switch_wal() and CHECKPOINT until pg_wal has only new files."
)
WAL_FILES_MAX = 1_000
REWRITTEN_WITHIN_S = 600.0
LOOK_S = 0.1


def compact_database(owner_url: str) -> list[str]:
    """Rewrite the tables, and as a superuser the write-ahead log; gives what could not be done. Raises `psycopg.Error`.

    Each table is locked while it is written anew.
    """
    with psycopg.connect(owner_url, autocommit=True, connect_timeout=5) as conn:
        for table in TABLES:
            conn.execute(sql.SQL("VACUUM (FULL, ANALYZE) {}").format(sql.Identifier(table)))
        row = conn.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
        if row != (True,):
            return [ONLY_A_SUPERUSER]
        _renew_statistics(conn)
        _renew_wal(conn)
    return []


def _renew_statistics(conn: Connection) -> None:
    """They hold samples of values, and those of a table that is empty now would stay: ANALYZE passes it over."""
    oids = [oid for (oid,) in conn.execute("SELECT oid FROM pg_class WHERE relname = ANY(%s)", (list(TABLES),))]
    conn.execute("DELETE FROM pg_statistic WHERE starelid = ANY(%s)", (oids,))
    conn.execute("VACUUM FULL pg_statistic")
    for table in TABLES:
        conn.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(table)))


def _renew_wal(conn: Connection) -> None:
    """Old files of the log are renamed and written over some day. With `wal_recycle` off they are removed instead; those that
    wait under a new name already are gone through first.
    """
    conn.execute("ALTER SYSTEM SET wal_recycle = off")
    conn.execute("SELECT pg_reload_conf()")
    try:
        found = conn.execute("SELECT count(*) FROM pg_ls_waldir()").fetchone()
        for _ in range(min(found[0] if found else 0, WAL_FILES_MAX) + 1):
            conn.execute("SELECT pg_logical_emit_message(false, 'lookup', 'compaction')")
            conn.execute("SELECT pg_switch_wal()")
        for _ in range(2):  # The first one still needs the files since the one before it.
            conn.execute("CHECKPOINT")
    finally:
        conn.execute("ALTER SYSTEM RESET wal_recycle")
        conn.execute("SELECT pg_reload_conf()")


async def compact_redis(redis: Redis) -> list[str]:
    """Write the append-only file anew; gives what could not be done. Raises `RedisError`."""
    try:
        told = await redis.info("persistence")
        if told["aof_enabled"]:
            await redis.bgrewriteaof()
            await _until_rewritten(redis)
        await redis.slowlog_reset()
    except (ResponseError, TimeoutError):
        return ["Redis' files: it does not let us write them anew. There: BGREWRITEAOF, and BGSAVE where snapshots are kept."]
    return (
        ["Redis' snapshots: BGSAVE writes a new one."] if told["rdb_last_save_time"] and await _keeps_snapshots(redis) else []
    )


async def _until_rewritten(redis: Redis) -> None:
    give_up_at = time.monotonic() + REWRITTEN_WITHIN_S
    while time.monotonic() < give_up_at:
        told = await redis.info("persistence")
        if not told["aof_rewrite_in_progress"] and not told["aof_rewrite_scheduled"]:
            return
        await asyncio.sleep(LOOK_S)
    raise TimeoutError


async def _keeps_snapshots(redis: Redis) -> bool:
    return bool((await redis.config_get("save")).get("save"))
