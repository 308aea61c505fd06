# webhook_outbox.py - webhooks from your SQLite transaction, signed and retried. One file: copy it into your app.
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.32.4"]
# ///
"""Send webhooks from a small app, without a broker: the event commits with your data, or not at all.

    outbox = Outbox("app.db")                                   # makes its own tables, prefix webhook_
    outbox.add_endpoint("https://example.com/hooks", events=["order.*"])

    with sqlite3.connect("app.db") as conn:                     # your transaction
        conn.execute("INSERT INTO orders (total) VALUES (49.99)")
        outbox.emit(conn, "order.created", {"total": 49.99})

    outbox.start()                                              # or: python -m webhook_outbox --db app.db drain

What holds
    If your commit returned, every matching endpoint gets the event until it answers 2xx or 410, the delivery
    lands in the table webhook_failed, or an operator says otherwise; across kill -9, and across power loss when
    you commit with PRAGMA synchronous=FULL. After a rollback nothing is ever sent. An event may arrive twice after
    a crash, a timeout or a replay, always with the same webhook-id and the same bytes: receivers deduplicate
    (Inbox does it for you). Bytes go only to addresses that the guard allows; one attempt ends within its timeout.

What does not hold
    No order between events, except between those of one endpoint with one key (or an endpoint that is ordered).
    No exactly-once on the wire: nobody has that. No delivery while no process drains.

Words
    event     what happened: a type and JSON data, written once, never changed
    endpoint  where to: a URL with its secret and its patterns of event types
    delivery  one event to one endpoint, the unit of state: pending, delivered or failed
    attempt   one HTTP try of a delivery; its result is an outcome
    failed row  a delivery that was given up, in webhook_failed, until somebody replays or discards it
    queue     deliveries of one endpoint that go out strictly one after the other
    host      the app whose file and process we live in; receiver: the server at the other end
    drain     to send what is due; one process per file drains, others stand by

Contents: defaults and schema, errors, types, signing, retry policy, network guard, transport, exchange, storage,
drain, outbox, receiving, doctor, dashboard, command line, licence. Each section uses only what stands above it.
"""

from __future__ import annotations

import atexit
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import email.utils
import errno
import functools
import hashlib
import hmac
import html
import ipaddress
import itertools
import json
import logging
import math
import mmap
import operator
import os
import queue
import random
import re
import secrets
import selectors
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
import urllib.parse
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypedDict

import requests
import requests.adapters
import requests.utils
import urllib3

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from typing_extensions import Unpack

__version__ = "0.1.0"
__all__ = [
    "Attempt",
    "Delivery",
    "DrainReport",
    "EmitOptions",
    "Endpoint",
    "EndpointOptions",
    "EndpointStats",
    "Event",
    "FailedDelivery",
    "Filters",
    "Inbox",
    "NotFound",
    "NotInTransaction",
    "Notice",
    "Outbox",
    "OutboxError",
    "PayloadError",
    "ReceivedEvent",
    "RetryPolicy",
    "SchemaError",
    "SignatureError",
    "Stats",
    "TimestampError",
    "TransactionLost",
    "UnsafeURL",
    "dashboard_app",
    "main",
    "schema_sql",
    "sign",
    "verify",
]

_log = logging.getLogger("webhook_outbox")

# ── defaults and schema ──────────────────────────────────────────────────────────────────────────────────────────
# Promises: the tables are the whole state; each trigger is one rule of the product, so that plain SQL (the sqlite3
# shell, another language) gets the same rules. Knows nothing about Python.

_SQLITE_NEEDED = (3, 34, 0)
_MAX_BODY = 262_144  # bytes
_WARN_BODY = 20_480  # bytes; Standard Webhooks asks for small bodies
_RETENTION = 30 * 86_400.0  # seconds
_KEPT_RESPONSE = 4_096  # bytes of the answer that are stored
_READ_RESPONSE = 65_536  # bytes of the answer that are read
_READ_HEAD = 16_384  # bytes of status line and headers that are read
_IDLE_CONNECTION = 60.0  # seconds until an idle connection is closed, so that DNS changes are followed
_REASONS = "dns blocked connect tls timeout protocol status gone aborted expired internal".split()

# In a queue (one key of one endpoint, or an ordered endpoint) only the oldest unfinished delivery is 'pending';
# those behind it are 'queued' and not in the index that the drain reads, so a long queue costs a pick nothing.
# {row} is NEW or OLD. The head is the oldest unfinished row, or a failed one that its endpoint holds on to.
_SETTLE = """
  UPDATE webhook_deliveries SET status = 'queued'
   WHERE endpoint_id = {row}.endpoint_id AND queue = {row}.queue AND status = 'pending' AND event > {head};
  UPDATE webhook_deliveries SET status = 'pending'
   WHERE endpoint_id = {row}.endpoint_id AND queue = {row}.queue AND status = 'queued' AND event = {head};"""
_HEAD = """(
     SELECT min(oldest) FROM (
       SELECT min(event) AS oldest FROM webhook_deliveries
        WHERE endpoint_id = {row}.endpoint_id AND queue = {row}.queue AND status = 'pending'
        UNION ALL
       SELECT min(event) FROM webhook_deliveries
        WHERE endpoint_id = {row}.endpoint_id AND queue = {row}.queue AND status = 'queued'
        UNION ALL
       SELECT min(event) FROM webhook_deliveries
        WHERE endpoint_id = {row}.endpoint_id AND queue = {row}.queue AND status = 'failed'
          AND EXISTS (SELECT 1 FROM webhook_endpoints WHERE id = {row}.endpoint_id AND on_dead = 'hold')))"""


def _settle(row: str) -> str:
    return _SETTLE.format(row=row, head=_HEAD.format(row=row))


# Patterns that another pattern of the same endpoint covers are left out, so that a type matches at most one row of
# an endpoint. GLOB is the matcher: '*' is everything except webhook.*, 'order.*' everything below order.
_SUBSCRIBE = """
  DELETE FROM webhook_patterns WHERE endpoint_id = NEW.id;
  INSERT INTO webhook_patterns (pattern, endpoint_id, ordered)
  SELECT DISTINCT one.value, NEW.id, NEW.ordered FROM json_each(NEW.events) AS one
   WHERE NEW.enabled AND NOT EXISTS (
     SELECT 1 FROM json_each(NEW.events) AS wider
      WHERE wider.value <> one.value AND one.value GLOB wider.value
        AND NOT (wider.value = '*' AND one.value GLOB 'webhook.*'));"""
_TOUCH = "UPDATE webhook_meta SET value = value + 1 WHERE key = 'endpoints_version';"
_NOW = "(julianday('now') - 2440587.5) * 86400.0"

_FIRST_SCHEMA = (
    """CREATE TABLE webhook_meta (key TEXT PRIMARY KEY NOT NULL, value) WITHOUT ROWID""",
    """CREATE TABLE webhook_endpoints (
  id TEXT PRIMARY KEY NOT NULL CHECK (id NOT GLOB '*[^A-Za-z0-9_-]*'),
  url TEXT NOT NULL,
  events TEXT NOT NULL DEFAULT '["*"]',        -- JSON list of patterns
  description TEXT NOT NULL DEFAULT '',
  headers TEXT NOT NULL DEFAULT '{}',          -- JSON object
  body TEXT NOT NULL DEFAULT 'standard',
  signing TEXT NOT NULL DEFAULT 'standard',
  secrets TEXT NOT NULL,                       -- JSON list of [secret, valid until or null], current first
  rate REAL,                                   -- deliveries per second
  max_in_flight INTEGER NOT NULL DEFAULT 16,
  ordered INTEGER NOT NULL DEFAULT 0,
  on_dead TEXT NOT NULL DEFAULT 'skip',
  timeout REAL,                                -- seconds
  cert TEXT,                                   -- JSON: a path, or [certificate, key]
  ca TEXT,
  enabled INTEGER NOT NULL DEFAULT 1,
  disabled_reason TEXT NOT NULL DEFAULT '',
  created_at REAL NOT NULL,
  failing_since REAL,                          -- first failure since the last success
  failures INTEGER NOT NULL DEFAULT 0,         -- failures in a row
  paused_until REAL NOT NULL DEFAULT 0,        -- Retry-After, or the pause before the next probe
  CHECK (typeof(rate) IN ('real', 'null') AND typeof(timeout) IN ('real', 'null')),
  CHECK (typeof(max_in_flight) = 'integer' AND max_in_flight > 0 AND typeof(failures) = 'integer'),
  CHECK (typeof(paused_until) = 'real' AND typeof(failing_since) IN ('real', 'null'))
)""",
    """CREATE TABLE webhook_patterns (          -- kept by triggers: what emit matches against
  pattern TEXT NOT NULL,
  endpoint_id TEXT NOT NULL,
  ordered INTEGER NOT NULL,
  PRIMARY KEY (pattern, endpoint_id)
) WITHOUT ROWID""",
    """CREATE TABLE webhook_events (
  seq INTEGER PRIMARY KEY,                     -- order of writing; never leaves the file
  id TEXT NOT NULL UNIQUE,
  type TEXT NOT NULL,
  data TEXT NOT NULL,                          -- JSON, sent byte for byte
  key TEXT,
  idempotency_key TEXT,
  headers TEXT,                                -- JSON object
  created_at REAL NOT NULL
)""",
    """CREATE UNIQUE INDEX webhook_events_once ON webhook_events (idempotency_key)
 WHERE idempotency_key IS NOT NULL""",
    """CREATE TABLE webhook_deliveries (
  event INTEGER NOT NULL,                      -- webhook_events.seq
  endpoint_id TEXT NOT NULL,
  status TEXT NOT NULL DEFAULT 'pending',      -- pending, queued, delivered, failed, discarded
  attempts INTEGER NOT NULL DEFAULT 0,
  due_at REAL NOT NULL,
  first_attempt_at REAL,
  delivered_at REAL,
  queue TEXT,                                  -- the event's key; '' on an ordered endpoint
  PRIMARY KEY (event, endpoint_id),
  CHECK (typeof(attempts) = 'integer' AND typeof(due_at) = 'real' AND typeof(first_attempt_at) IN ('real', 'null'))
) WITHOUT ROWID""",
    """CREATE INDEX webhook_deliveries_due ON webhook_deliveries (endpoint_id, due_at, event)
 WHERE status = 'pending'""",
    """CREATE INDEX webhook_deliveries_queue ON webhook_deliveries (endpoint_id, queue, status, event)
 WHERE queue IS NOT NULL""",
    """CREATE TABLE webhook_attempts (
  id INTEGER PRIMARY KEY,
  event INTEGER NOT NULL,
  endpoint_id TEXT NOT NULL,
  at REAL NOT NULL,
  duration REAL NOT NULL,                      -- seconds
  status_code INTEGER,
  reason TEXT,                                 -- NULL: delivered
  error TEXT,
  response TEXT
)""",
    """CREATE INDEX webhook_attempts_event ON webhook_attempts (event)""",
    """CREATE TABLE webhook_failed (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  event_id TEXT NOT NULL,
  endpoint_id TEXT NOT NULL,
  type TEXT NOT NULL,
  key TEXT,
  attempts INTEGER NOT NULL,
  reason TEXT NOT NULL,
  status_code INTEGER,
  error TEXT,
  response TEXT,
  first_attempt_at REAL,
  failed_at REAL NOT NULL,
  UNIQUE (event_id, endpoint_id)
)""",
    """CREATE TABLE webhook_inbox (id TEXT PRIMARY KEY NOT NULL, received_at REAL NOT NULL) WITHOUT ROWID""",
    """CREATE VIEW webhook_emit AS
SELECT type, data, key, idempotency_key, 0.0 AS delay, headers, id, created_at, NULL AS outbox FROM webhook_events""",
    f"""CREATE TRIGGER webhook_emit_insert INSTEAD OF INSERT ON webhook_emit BEGIN
  SELECT CASE
    WHEN NEW.outbox <> (SELECT value FROM webhook_meta WHERE key = 'outbox')
    THEN RAISE(ABORT, 'webhook_emit: this is another outbox')
    WHEN coalesce(json_valid(NEW.data), 0) = 0 OR instr(NEW.data, char(0))
    THEN RAISE(ABORT, 'webhook_emit: data must be JSON text, nested less than 1000 deep')
    WHEN NEW.outbox IS NOT NULL THEN NULL    -- the library checked the rest before it wrote
    WHEN typeof(NEW.type) <> 'text' OR NEW.type = '' OR length(NEW.type) > 256 OR instr(NEW.type, char(0))
      OR NEW.type GLOB '*[^A-Za-z0-9_.-]*' OR NEW.type GLOB '.*' OR NEW.type GLOB '*.' OR NEW.type GLOB '*..*'
    THEN RAISE(ABORT, 'webhook_emit: type must be letters, digits, _ and - in parts joined by dots, at most 256')
    WHEN length(CAST(NEW.data AS BLOB)) > {_MAX_BODY}
    THEN RAISE(ABORT, 'webhook_emit: data is too large; send a link instead')
    WHEN NEW.headers IS NOT NULL AND coalesce(json_valid(NEW.headers) AND json_type(NEW.headers) = 'object', 0) = 0
    THEN RAISE(ABORT, 'webhook_emit: headers must be a JSON object')
    WHEN NEW.id IS NOT NULL AND (typeof(NEW.id) <> 'text' OR NEW.id = '' OR length(NEW.id) > 128
      OR instr(NEW.id, char(0)) OR NEW.id GLOB '*[^A-Za-z0-9_-]*')
    THEN RAISE(ABORT, 'webhook_emit: id must be letters, digits, _ and -; leave it out to get one')
    WHEN NEW.created_at IS NOT NULL AND typeof(NEW.created_at) NOT IN ('real', 'integer')
    THEN RAISE(ABORT, 'webhook_emit: created_at must be UTC seconds; leave it out for now')
  END;
  SELECT CASE
    WHEN NOT EXISTS (SELECT 1 FROM webhook_events WHERE idempotency_key = NEW.idempotency_key) THEN NULL
    WHEN EXISTS (SELECT 1 FROM webhook_events
                  WHERE idempotency_key = NEW.idempotency_key AND type = NEW.type AND data = NEW.data)
    THEN RAISE(IGNORE)
    ELSE RAISE(ABORT, 'webhook_emit: this idempotency_key was used for another event')
  END WHERE NEW.idempotency_key IS NOT NULL;
  INSERT INTO webhook_events (id, type, data, key, idempotency_key, headers, created_at)
  VALUES (
    coalesce(NEW.id, 'msg_' || printf('%012x', CAST({_NOW} * 1000 AS INTEGER)) || lower(hex(randomblob(10)))),
    NEW.type, CAST(NEW.data AS TEXT), nullif(NEW.key, ''), NEW.idempotency_key, NEW.headers,
    coalesce(NEW.created_at, {_NOW}));
  INSERT INTO webhook_deliveries (event, endpoint_id, due_at, queue)
  SELECT last_insert_rowid(), endpoint_id, coalesce(NEW.created_at, {_NOW}) + coalesce(NEW.delay, 0.0),
         CASE WHEN ordered THEN '' ELSE nullif(NEW.key, '') END
    FROM webhook_patterns
   WHERE NEW.type GLOB pattern AND (pattern <> '*' OR NEW.type NOT GLOB 'webhook.*');
END""",
    f"""CREATE TRIGGER webhook_endpoints_insert AFTER INSERT ON webhook_endpoints BEGIN{_SUBSCRIBE}
  {_TOUCH}
END""",
    f"""CREATE TRIGGER webhook_endpoints_update
AFTER UPDATE OF url, events, headers, body, signing, secrets, rate, max_in_flight, ordered, timeout, cert, ca, enabled
ON webhook_endpoints BEGIN{_SUBSCRIBE}
  {_TOUCH}
END""",
    """CREATE TRIGGER webhook_endpoints_order AFTER UPDATE OF ordered ON webhook_endpoints
WHEN OLD.ordered <> NEW.ordered BEGIN
  UPDATE webhook_deliveries
     SET queue = CASE WHEN NEW.ordered THEN '' ELSE (SELECT key FROM webhook_events WHERE seq = event) END
   WHERE endpoint_id = NEW.id AND status IN ('pending', 'queued', 'failed');
END""",
    """CREATE TRIGGER webhook_endpoints_release AFTER UPDATE OF on_dead ON webhook_endpoints
WHEN OLD.on_dead = 'hold' AND NEW.on_dead <> 'hold' BEGIN
  UPDATE webhook_deliveries SET status = 'pending'
   WHERE endpoint_id = NEW.id AND queue IS NOT NULL AND status = 'queued'
     AND event = (SELECT min(o.event) FROM webhook_deliveries AS o
                   WHERE o.endpoint_id = NEW.id AND o.queue = webhook_deliveries.queue AND o.status = 'queued')
     AND NOT EXISTS (SELECT 1 FROM webhook_deliveries AS o
                      WHERE o.endpoint_id = NEW.id AND o.queue = webhook_deliveries.queue AND o.status = 'pending');
END""",
    f"""CREATE TRIGGER webhook_endpoints_delete AFTER DELETE ON webhook_endpoints BEGIN
  DELETE FROM webhook_patterns WHERE endpoint_id = OLD.id;
  DELETE FROM webhook_deliveries WHERE endpoint_id = OLD.id AND queue IS NOT NULL AND status = 'queued';
  DELETE FROM webhook_deliveries WHERE endpoint_id = OLD.id AND status = 'pending';
  DELETE FROM webhook_failed WHERE endpoint_id = OLD.id;
  {_TOUCH}
END""",
    f"""CREATE TRIGGER webhook_deliveries_insert AFTER INSERT ON webhook_deliveries
WHEN NEW.queue IS NOT NULL BEGIN{_settle("NEW")}
END""",
    f"""CREATE TRIGGER webhook_deliveries_finish AFTER UPDATE OF status ON webhook_deliveries
WHEN NEW.queue IS NOT NULL AND (NEW.status NOT IN ('pending', 'queued') OR OLD.status NOT IN ('pending', 'queued'))
BEGIN{_settle("NEW")}
END""",
    f"""CREATE TRIGGER webhook_deliveries_requeue AFTER UPDATE OF queue ON webhook_deliveries
WHEN OLD.queue IS NOT NEW.queue BEGIN
  UPDATE webhook_deliveries SET status = 'pending'
   WHERE event = NEW.event AND endpoint_id = NEW.endpoint_id
     AND NEW.queue IS NULL AND status = 'queued';{_settle("NEW")}
END""",
    f"""CREATE TRIGGER webhook_deliveries_delete AFTER DELETE ON webhook_deliveries
WHEN OLD.queue IS NOT NULL AND OLD.status = 'pending' BEGIN{_settle("OLD")}
END""",
    """CREATE TRIGGER webhook_failed_reopen AFTER UPDATE OF status ON webhook_deliveries
WHEN OLD.status = 'failed' AND NEW.status = 'pending' BEGIN
  DELETE FROM webhook_failed
   WHERE event_id = (SELECT id FROM webhook_events WHERE seq = NEW.event) AND endpoint_id = NEW.endpoint_id;
END""",
    """CREATE TRIGGER webhook_failed_discard AFTER DELETE ON webhook_failed BEGIN
  UPDATE webhook_deliveries SET status = 'discarded'
   WHERE event = (SELECT seq FROM webhook_events WHERE id = OLD.event_id)
     AND endpoint_id = OLD.endpoint_id AND status = 'failed';
END""",
    """CREATE TRIGGER webhook_events_delete AFTER DELETE ON webhook_events BEGIN
  DELETE FROM webhook_deliveries WHERE event = OLD.seq;
  DELETE FROM webhook_attempts WHERE event = OLD.seq;
END""",
    # What the drain writes: one row an outcome, and rows with event NULL for what it learned of an endpoint, in the
    # same columns: each more would cost a tenth of a microsecond an outcome.
    """CREATE VIEW webhook_record AS
SELECT event, endpoint_id, status, due_at, 0.0 AS at, 0.0 AS duration, NULL AS status_code, NULL AS reason,
       NULL AS error, NULL AS response FROM webhook_deliveries""",
    """CREATE TRIGGER webhook_record_outcome INSTEAD OF INSERT ON webhook_record WHEN NEW.event IS NOT NULL BEGIN
  UPDATE webhook_deliveries
     SET status = CASE WHEN NEW.status = 'pending' THEN status ELSE NEW.status END,
         due_at = NEW.due_at,
         attempts = attempts + 1,
         first_attempt_at = coalesce(first_attempt_at, NEW.at),
         delivered_at = CASE WHEN NEW.status = 'delivered' THEN NEW.at + NEW.duration ELSE delivered_at END
   WHERE event = NEW.event AND endpoint_id = NEW.endpoint_id AND status IN ('pending', 'queued');
  INSERT INTO webhook_attempts (event, endpoint_id, at, duration, status_code, reason, error, response)
  VALUES (NEW.event, NEW.endpoint_id, NEW.at, NEW.duration, NEW.status_code, NEW.reason, NEW.error, NEW.response);
  INSERT OR IGNORE INTO webhook_failed
         (event_id, endpoint_id, type, key, attempts, reason, status_code, error, response, first_attempt_at, failed_at)
  SELECT coalesce(e.id, 'missing_' || d.event), d.endpoint_id, coalesce(e.type, ''), e.key, d.attempts,
         NEW.reason, NEW.status_code, NEW.error, NEW.response, d.first_attempt_at, NEW.at + NEW.duration
    FROM webhook_deliveries AS d LEFT JOIN webhook_events AS e ON e.seq = d.event
   WHERE NEW.status = 'failed' AND d.status = 'failed' AND d.event = NEW.event AND d.endpoint_id = NEW.endpoint_id;
END""",
    """CREATE TRIGGER webhook_record_endpoint INSTEAD OF INSERT ON webhook_record
WHEN NEW.event IS NULL AND NEW.endpoint_id IS NOT NULL BEGIN
  UPDATE webhook_endpoints SET failures = NEW.duration, failing_since = NEW.at, paused_until = NEW.due_at
   WHERE id = NEW.endpoint_id;
  UPDATE webhook_endpoints SET enabled = 0, disabled_reason = NEW.error
   WHERE id = NEW.endpoint_id AND NEW.error IS NOT NULL AND enabled;
END""",
    """INSERT INTO webhook_meta VALUES ('outbox', lower(hex(randomblob(8)))), ('endpoints_version', 1)""",
    """INSERT INTO webhook_meta VALUES ('schema_version', 1)""",
)

# One entry a version, in one transaction each, only additions: a drain of an older copy goes on beside them.
_SCHEMA = (
    _FIRST_SCHEMA,
    (
        """CREATE INDEX webhook_failed_endpoint ON webhook_failed (endpoint_id, failed_at)""",
        """CREATE TABLE webhook_counts (           -- what metrics counts; the rows themselves leave after a while
  endpoint_id TEXT NOT NULL,
  name TEXT NOT NULL,
  value REAL NOT NULL,
  PRIMARY KEY (endpoint_id, name)
) WITHOUT ROWID""",
        """CREATE TRIGGER webhook_counts_delete AFTER DELETE ON webhook_endpoints BEGIN
  DELETE FROM webhook_counts WHERE endpoint_id = OLD.id;
END""",
        # What the drain counted since its last write: endpoint as status, JSON {name: increment} as response. Drains
        # that share a file count their commits under endpoint ''.
        """CREATE TRIGGER webhook_record_counts INSTEAD OF INSERT ON webhook_record
WHEN NEW.event IS NULL AND NEW.endpoint_id IS NULL AND NEW.reason = 'count' BEGIN
  INSERT INTO webhook_counts SELECT NEW.status, key, value FROM json_each(NEW.response)
   WHERE NEW.status = '' OR EXISTS (SELECT 1 FROM webhook_endpoints WHERE id = NEW.status)
      ON CONFLICT DO UPDATE SET value = value + excluded.value;
END""",
        # What the drain tells endpoints that subscribe to webhook.* by name: the event's type as status, its data as
        # response. Nobody subscribed: no event.
        """CREATE TRIGGER webhook_record_notice INSTEAD OF INSERT ON webhook_record
WHEN NEW.event IS NULL AND NEW.endpoint_id IS NULL AND NEW.reason = 'notice' BEGIN
  INSERT INTO webhook_emit (type, data, created_at) SELECT NEW.status, NEW.response, NEW.at
   WHERE EXISTS (SELECT 1 FROM webhook_patterns WHERE pattern <> '*' AND NEW.status GLOB pattern);
END""",
        """UPDATE webhook_meta SET value = 2 WHERE key = 'schema_version'""",
    ),
)


def schema_sql() -> str:
    """Return the SQL that makes the tables, for people who run migrations by hand."""
    return "".join(f"{statement};\n\n" for version in _SCHEMA for statement in version)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: one root; a message says what to do next and holds no secret.


class OutboxError(Exception):
    """Root of every error that this module raises on purpose."""


class NotInTransaction(OutboxError):
    """The connection has no open transaction, so the event could not commit together with your rows."""


class PayloadError(OutboxError, ValueError):
    """A value cannot be used as it is: data, type, key, header or an endpoint option. Nothing was written."""


class UnsafeURL(OutboxError, ValueError):
    """The URL of an endpoint is malformed or points where webhooks must not go."""


class NotFound(OutboxError, LookupError):
    """There is no endpoint, event or delivery of that name."""


class SchemaError(OutboxError):
    """The file is not the outbox's: missing, no database, without tables, of a newer version, or another file."""


class TransactionLost(OutboxError):
    """SQLite rolled your whole transaction back (disk full, I/O error): stop, do not go on writing in autocommit."""


class SignatureError(OutboxError):
    """A received request is not authentic, or not readable: answer 400 and do nothing else."""


class TimestampError(SignatureError):
    """The signature's time is too far from now: a replay, or a clock that is wrong."""


class _Unready(Exception):
    """The attempt cannot be made: a secret is not where it should be, a transform misbehaved, a row is damaged."""


# ── types ────────────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: frozen values. Times (*_at, at, since) are UTC seconds since 1970, durations are seconds.


def _one_line(text: str, most: int = 300) -> str:
    """Return printable text on one line; what came from outside may hold anything."""
    return "".join(c if c.isprintable() else " " for c in text)[:most].strip()


def _moment(value: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(value, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
    except (ValueError, OverflowError, OSError):  # plain SQL can store any number
        return f"{value:g}"


def _seconds(moment: datetime.datetime) -> float:
    """Return UTC seconds; a time that names no zone is UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp()


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _masked(url: str) -> str:
    """Return the URL with its query hidden: tokens live there."""
    head, mark, _ = url.partition("?")
    return head + ("?..." if mark else "")


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Endpoint:
    """Where events go. `secret` is set only on what add_endpoint and rotate_secret return."""

    id: str
    url: str
    events: tuple[str, ...] = ("*",)
    description: str = ""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: str = "standard"
    signing: str = "standard"
    rate: float | None = None  # deliveries per second
    max_in_flight: int = 16
    ordered: bool = False
    on_dead: str = "skip"  # skip or hold
    timeout: float | None = None  # None: the outbox's
    cert: str | tuple[str, str] | None = None
    ca: str | None = None
    enabled: bool = True
    disabled_reason: str = ""
    failing_since: float | None = None  # None: the last attempt was a success, or there was none
    created_at: float = 0.0
    secret: str | None = None

    def __repr__(self) -> str:  # no secret, no header value, no query
        state = "" if self.enabled else f", disabled: {self.disabled_reason!r}"
        return f"Endpoint(id={self.id!r}, url={_masked(self.url)!r}, events={list(self.events)!r}{state})"


class EndpointOptions(TypedDict, total=False):
    """What add_endpoint and update_endpoint take; the defaults are those of Endpoint."""

    events: Sequence[str]
    description: str
    headers: Mapping[str, str] | None
    body: str
    signing: str
    rate: float | None
    max_in_flight: int
    ordered: bool
    on_dead: str
    timeout: float | None
    cert: str | tuple[str, str] | None
    ca: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Delivery:
    """One event to one endpoint."""

    event_id: str
    endpoint_id: str
    status: str  # pending; held (its endpoint is disabled); delivered; failed (also after a discard)
    attempts: int  # since it was emitted or last replayed
    due_at: float
    delivered_at: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """What happened."""

    id: str
    type: str
    data: Any
    key: str | None
    created_at: float
    deliveries: tuple[Delivery, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One HTTP try. `reason` is None on success, else one of: dns blocked connect tls timeout protocol status gone
    aborted expired internal. `response` is the start of the answer's body, at most 4 KiB, undecoded but for UTF-8."""

    event_id: str
    endpoint_id: str
    at: float
    status_code: int | None
    reason: str | None
    error: str | None
    duration: float
    response: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class FailedDelivery:
    """A row of webhook_failed: a delivery that was given up."""

    id: int
    event_id: str
    endpoint_id: str
    type: str
    key: str | None
    attempts: int
    reason: str
    status_code: int | None
    error: str | None
    response: str | None
    first_attempt_at: float | None
    failed_at: float


@dataclasses.dataclass(frozen=True, slots=True)
class DrainReport:
    """What one drain did: outcomes by kind, and what is left."""

    delivered: int
    retried: int  # failed attempts that will be tried again
    failed: int
    pending: int


@dataclasses.dataclass(frozen=True, slots=True)
class EndpointStats:
    """One endpoint's numbers; rates and latencies are of the last hour."""

    id: str
    enabled: bool
    pending: int
    oldest_due_age: float | None  # seconds
    failed: int
    delivered: int
    attempts: int
    p50: float | None  # seconds
    p95: float | None
    last_error: str | None
    history: tuple[int, ...]  # deliveries in each twelfth of the last hour, oldest first
    failing_since: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """The outbox's numbers."""

    pending: int  # waiting for enabled endpoints
    due: int  # of these: due now
    held: int  # waiting for disabled endpoints
    failed: int
    oldest_due_age: float | None  # seconds
    endpoints: tuple[EndpointStats, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Notice:
    """What the observer gets. `kind`: delivered, attempt_failed, gave_up, failing, recovered, disabled."""

    kind: str
    endpoint_id: str
    event_id: str | None = None
    reason: str | None = None
    status_code: int | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ReceivedEvent:
    """What verify returns. `type` is empty and `data` the whole body where the body is no envelope."""

    id: str
    timestamp: int | None  # None for scheme "github", which signs none
    type: str
    data: Any
    body: bytes


# ── signing ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: pure functions of secret, id, time and bytes. Standard Webhooks 1.0 (standardwebhooks.com), Stripe's
# scheme and GitHub's. verify raises SignatureError and nothing else, whatever bytes arrive, and parses last.

_MAX_SIGNATURES = 16


def _key(secret: str | bytes, least: int = 16, most: int = 1 << 16) -> bytes:
    """Return the key bytes of a Standard Webhooks secret: `whsec_` and strict base64, or raw bytes.

    Lenient decoders drop foreign characters, so a typo would sign with another key: refuse it instead.
    """
    if isinstance(secret, bytes):
        key = secret
    elif isinstance(secret, str):
        try:
            key = base64.b64decode(secret.removeprefix("whsec_").encode("ascii"), validate=True)
        except ValueError:
            raise PayloadError("the secret is not base64; expected whsec_ followed by base64") from None
    else:  # bytes(32) would be 32 zeros: a key that everybody knows
        raise PayloadError("the secret must be text or bytes")
    if not least <= len(key) <= most:
        raise PayloadError(f"the secret holds {len(key)} bytes; it must hold {least} to {most}")
    return key


@functools.lru_cache(maxsize=256)
def _halves(scheme: str, secret: str | bytes) -> tuple[Any, Any]:
    """Return HMAC's inner and outer hash (RFC 2104), which have read a secret's key. To sign with copies of them is
    half the cost of hmac.digest, which prepares the key each time."""
    key = _key(secret) if scheme == "standard" else secret.encode() if isinstance(secret, str) else secret
    key = (key if len(key) <= 64 else hashlib.sha256(key).digest()).ljust(64, b"\0")
    inner, outer = (hashlib.sha256(bytes(byte ^ pad for byte in key)) for pad in (0x36, 0x5C))
    return inner, outer


def _signature(scheme: str, secret: str | bytes, id: str, timestamp: int, body: bytes) -> str:
    """Return the signature of a body as the scheme's header carries it."""
    inner, outer = [half.copy() for half in _halves(scheme, secret)]
    if scheme == "standard":
        inner.update(b"%b.%d." % (id.encode(), timestamp))
    elif scheme == "stripe":
        inner.update(b"%d." % timestamp)
    inner.update(body)
    outer.update(inner.digest())
    if scheme == "standard":
        return "v1," + base64.b64encode(outer.digest()).decode("ascii")
    return f"{'v1' if scheme == 'stripe' else 'sha256'}={outer.hexdigest()}"


def sign(secret: str | bytes, id: str, timestamp: int, body: bytes) -> str:
    """Return the Standard Webhooks signature `v1,...` of a body.

    secret: `whsec_...`, bare base64, or raw key bytes, of 16 bytes or more; PayloadError (a ValueError) otherwise.
    """
    _key(secret)  # also refuses what _halves cannot remember
    return _signature("standard", secret, id, timestamp, body)


def _signature_headers(
    schemes: Sequence[str], signing_secrets: Sequence[str], id: str, timestamp: int, body: bytes
) -> list[tuple[str, str]]:
    """Return the headers that sign a body with each secret, current first, for each scheme."""
    headers = []
    for scheme in schemes:
        signatures = [_signature(scheme, secret, id, timestamp, body) for secret in signing_secrets]
        if scheme == "standard":
            headers.append(("webhook-signature", " ".join(signatures)))
        elif scheme == "stripe":
            headers.append(("Stripe-Signature", ",".join([f"t={timestamp}", *signatures])))
        else:  # one header, one signature: GitHub has no rotation, the current secret signs
            headers.append(("X-Hub-Signature-256", signatures[0]))
    return headers


_SIGNING_HEADER = re.compile(r"webhook-|stripe-signature$|x-hub-signature-256$|x-github-delivery$", re.IGNORECASE)


def _received_headers(headers: Any) -> dict[str, str]:
    """Return the headers that sign, with lower-case names. One that comes twice with two values is refused, since
    whoever stands between may have looked at the other."""
    found: dict[str, str] = {}
    for name, value in headers.items() if hasattr(headers, "items") else headers:
        name, value = (x.decode("latin-1") if isinstance(x, bytes) else x for x in (name, value))
        if not isinstance(name, str) or not isinstance(value, str) or not _SIGNING_HEADER.match(name):
            continue
        if found.setdefault(name.lower(), value) != value:
            raise SignatureError("a header came twice with different values")
    return found


def _signed_at(text: str, tolerance: float, now: float | None) -> int:
    """Return the timestamp if it is a canonical decimal within `tolerance` seconds of now, before or after."""
    if not re.fullmatch(r"0|[1-9][0-9]{0,14}", text):
        raise SignatureError("the timestamp is not a decimal number of seconds")
    if not abs((time.time() if now is None else now) - int(text)) <= tolerance:
        raise TimestampError("the timestamp is too far from now: a replayed request, or a clock that is wrong")
    return int(text)


def _any_equal(expected: Iterable[str], received: Sequence[str]) -> bool:
    """Compare each pair in constant time, without stopping at the first match."""
    if len(received) > _MAX_SIGNATURES:
        raise SignatureError(f"more than {_MAX_SIGNATURES} signatures")
    found = False
    for want in expected:
        for have in received:
            found |= hmac.compare_digest(want.encode(), have.encode("utf-8", "surrogatepass"))
    return found


_SCHEMES = ("standard", "stripe", "github")


def _claims(scheme: str, headers: Mapping[str, str]) -> tuple[str, str | None, list[str]]:
    """Return what a request says of itself, unproven: its id, its timestamp and its signatures."""
    id = headers.get("webhook-id", "")
    if scheme == "github":
        signature = headers.get("x-hub-signature-256")
        if not signature:
            raise SignatureError("X-Hub-Signature-256 is missing")
        return id or headers.get("x-github-delivery", ""), None, [signature]
    if scheme == "stripe":
        parts = headers.get("stripe-signature", "").split(",", 2 * _MAX_SIGNATURES)
        times = [part[2:] for part in parts if part.startswith("t=")]
        if len(times) != 1:
            raise SignatureError("Stripe-Signature is missing, or does not hold exactly one t=")
        return id, times[0], [part for part in parts if part.startswith("v1=")]
    timestamp, signatures = headers.get("webhook-timestamp"), headers.get("webhook-signature")
    if not (id and timestamp and signatures):
        raise SignatureError("a header is missing: webhook-id, webhook-timestamp and webhook-signature are needed")
    if len(id) > 256 or not id.isascii() or not id.isprintable() or "." in id:
        raise SignatureError("webhook-id is not a plain identifier")
    return id, timestamp, signatures.split(" ", _MAX_SIGNATURES)


def _parsed(id: str, id_is_signed: bool, signed_at: int | None, body: bytes) -> ReceivedEvent:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):  # signed, so authentic; a transform may send something else than JSON
        return ReceivedEvent(id, signed_at, "", None, body)
    if isinstance(data, dict) and isinstance(data.get("type"), str):
        # Stripe's own events: their id is signed with the body, a webhook-id beside it would not be.
        if isinstance(data.get("id"), str) and (not id or (not id_is_signed and data.get("object") == "event")):
            id = data["id"]
        return ReceivedEvent(id, signed_at, data["type"], data.get("data"), body)
    return ReceivedEvent(id, signed_at, "", data, body)


def verify(
    body: bytes,
    headers: Mapping[str, str] | Iterable[tuple[str, str]],
    secret: str | bytes | Sequence[str | bytes],
    *,
    tolerance: float = 300.0,
    now: float | None = None,
    scheme: str = "standard",
) -> ReceivedEvent:
    """Check a received request and return its event; raise SignatureError for every bad input, and nothing else.

    body: the raw bytes as received, before any JSON or text handling. headers: any mapping, names in any case.
    secret: one or several, while you rotate. tolerance: seconds, before and after. scheme: standard (Standard
    Webhooks 1.0), stripe, or github, which signs neither time nor id: there a replay cannot be told from the original.
    Not a guarantee against duplicates: pass the id to Inbox.accept.
    """
    try:
        if not isinstance(body, (bytes, bytearray, memoryview)):
            raise SignatureError("the body must be the raw bytes of the request, not text or parsed JSON")
        body = bytes(body)
        keys = [secret] if isinstance(secret, (str, bytes)) else list(secret)
        if not keys or not all(keys) or scheme not in _SCHEMES:
            raise SignatureError("verify needs a secret, and a scheme of: " + ", ".join(_SCHEMES))
        id, timestamp, signatures = _claims(scheme, _received_headers(headers))
        signed_at = None if timestamp is None else _signed_at(timestamp, tolerance, now)
        if not _any_equal((_signature(scheme, key, id, signed_at or 0, body) for key in keys), signatures):
            raise SignatureError("no signature matches: another secret, or the body was changed (use the raw bytes)")
    except SignatureError:
        raise
    except Exception as error:  # hostile headers reach odd corners; a receiver answers 400, never 500
        why = str(error) if isinstance(error, OutboxError) else type(error).__name__
        raise SignatureError(f"the request cannot be verified: {why}") from None
    return _parsed(id, scheme == "standard", signed_at, body)


# ── retry policy ─────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: an immutable value; decisions are functions of values. Knows no clock and no database.

_STANDARD_DELAYS = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
_LONGEST_HINT = 86_400.0  # seconds; a Retry-After beyond a day is cut
_STRUGGLING = 10  # failures in a row
_LONGEST_PROBE = 60.0  # seconds
_HOPELESS = 5 * 86_400.0, 3  # seconds without a success, and failed rows in that time: the endpoint is disabled


@dataclasses.dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again.

    delays: seconds before each attempt, one attempt an entry; the standard ten take about 75 hours.
    jitter: share of its delay that an attempt is moved back at random, 0.2 for up to 20 %.
    overload_delay: least seconds to wait after 429, 502, 504 and timeouts; None means 60 with the standard delays
    and 0 with your own.
    """

    delays: tuple[float, ...] = _STANDARD_DELAYS
    jitter: float = 0.2
    overload_delay: float | None = None

    def __post_init__(self) -> None:
        delays = tuple(self.delays) if isinstance(self.delays, (list, tuple)) else ()
        numbers = [*delays, self.jitter, 0.0 if self.overload_delay is None else self.overload_delay]
        sound = all(isinstance(n, (int, float)) and 0 <= n < math.inf for n in numbers)
        if not delays or not sound or self.jitter > 10:
            raise PayloadError("RetryPolicy: delays must be one or more numbers of seconds, jitter a share up to 10")
        delays = tuple(map(float, delays))
        if self.overload_delay is None:
            object.__setattr__(self, "overload_delay", 60.0 if delays == _STANDARD_DELAYS else 0.0)
        object.__setattr__(self, "delays", delays)

    @classmethod
    def exponential(cls, base: float, factor: float = 2.0, cap: float = 86_400.0, attempts: int = 10) -> RetryPolicy:
        """Return a policy that tries at once, then after base, base * factor, ... seconds, none over cap."""
        if not (0 < base < math.inf and 1 <= factor < math.inf and 0 < cap < math.inf and 1 <= attempts <= 1000):
            raise PayloadError("exponential needs base > 0, factor >= 1, cap > 0 and 1 to 1000 attempts")
        delays = [0.0]
        while len(delays) < attempts:
            delays.append(min(cap, delays[-1] * factor or base))
        return cls(tuple(delays))

    @property
    def longest(self) -> float:
        """The most seconds that an attempt, or an endpoint that asks for it, can put the next one off."""
        return max(max(self.delays) * (1 + self.jitter), self.overload_delay or 0.0, _LONGEST_HINT)

    @property
    def window(self) -> float:
        """The most seconds that the schedule lets pass between a delivery's first attempt and its last."""
        return sum(self.delays) * (1 + self.jitter)

    def wait(self, attempts: int, overloaded: bool, rng: Callable[[], float]) -> float | None:
        """Return the seconds until the next try after `attempts` failed ones, or None when there is none left."""
        if attempts >= len(self.delays):
            return None
        delay = self.delays[attempts]
        return max(delay * (1 + self.jitter * rng()), (self.overload_delay or 0.0) if overloaded else 0.0)

    def probe_pause(self, failures: int) -> float:
        """Return the seconds that a struggling endpoint rests after `failures` in a row; 0 below ten."""
        if failures < _STRUGGLING:
            return 0.0
        return min(2.0 ** min(failures - _STRUGGLING, 30), _LONGEST_PROBE, max(self.delays))


def _retry_after(values: Sequence[str], now: float) -> float | None:
    """Return the seconds of Retry-After (RFC 9110, 10.2.3), 0 to a day; None when absent or not well-formed."""
    hints: list[float] = []
    for value in values:
        if re.fullmatch(r"[0-9]+", value, re.ASCII):
            hints.append(float(value))
        with contextlib.suppress(ValueError, TypeError, OverflowError, IndexError):
            if re.match(r"[A-Z][a-z]{2,8},? ", value):  # each of RFC 9110's three date formats is GMT
                hints.append(_seconds(email.utils.parsedate_to_datetime(value)) - now)
    return min(max(0.0, *hints), _LONGEST_HINT) if hints else None


# ── network guard ────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: values in, verdict out; no lookup, no socket. The table is ours: ipaddress.is_global changes by patch
# release, allows multicast and NAT64-wrapped loopback. Sources: IANA special-purpose registries, WHATWG bad ports.

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_DENIED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 "
        "192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 "
        "198.51.100.0/24 203.0.113.0/24 224.0.0.0/3 "
        "::/3 4000::/2 8000::/1 "  # all but 2000::/3, the global addresses; and of these:
        "2001::/23 2001:db8::/32 2002::/16 2620:4f:8000::/48 3ffe::/16 3fff::/20"
    ).split()
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NO_HTTP = "plain http is refused; use https, or admit it with allow_networks (--allow-network) or allow_http"
_BAD_PORTS = frozenset(
    (1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, *range(6665, 6670), 6679, 6697, 10080)
)


def _unwrapped(address: _Address) -> _Address:
    """Return the IPv4 address inside an IPv4-mapped or NAT64 one: that is what is really reached."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


@dataclasses.dataclass(frozen=True, slots=True)
class _Guard:
    """Which addresses webhooks may reach."""

    allow_networks: tuple[_Network, ...] = ()
    allow_http: bool = False

    def refusal(self, text: str, scheme: str) -> str | None:
        """Return why this address must not be dialled, or None. `text` is what the resolver answered."""
        try:
            if "%" in text:
                return f"{text} carries a zone id"
            address = _unwrapped(ipaddress.ip_address(text))
        except ValueError:
            return f"{text!r} is no IP address"
        if any(address in network for network in self.allow_networks):  # never where one is IPv4 and the other IPv6
            return None
        if any(address in network for network in _DENIED):
            return f"{address} is a private or special-purpose address; allow_networks (--allow-network) can admit it"
        return None if scheme == "https" or self.allow_http else _NO_HTTP


def _literal(host: str) -> str | None:
    """Return the address that a host spells in any form which getaddrinfo takes without a lookup, or None."""
    bare = host.strip("[]").rstrip(".")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(bare))
    if re.fullmatch(r"(0[xX][0-9a-fA-F]*|[0-9]+)(\.(0[xX][0-9a-fA-F]*|[0-9]+)){0,3}", bare):
        with contextlib.suppress(OSError):
            return str(ipaddress.IPv4Address(socket.inet_aton(bare)))
    return None


def _refuse_url(why: str) -> NoReturn:
    raise UnsafeURL(f"the URL is refused: {why}")


def _check_authority(url: str) -> str:
    """Return the scheme of a URL whose spelling is beyond doubt; parsers disagree on everything else."""
    if not isinstance(url, str) or not 1 <= len(url) <= 2048:
        _refuse_url("it must be text of at most 2048 characters")
    if re.search(r"[\x00-\x20\x7f-\x9f\\]", url):
        _refuse_url("it contains a space, a control character or a backslash")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        _refuse_url(f"{_one_line(str(error).split(':')[0])}; write https://host/path")
    _, colon, port_text = parts.netloc.rpartition("]")[2].rpartition(":")
    if parts.scheme not in ("https", "http") or not parts.netloc:
        _refuse_url("it must start with https://")
    if "@" in parts.netloc or "%" in parts.netloc:
        _refuse_url("user names and percent signs do not belong in the host; send credentials in headers")
    if "#" in url:
        _refuse_url("a fragment (#...) is never sent; remove it")
    if colon and not re.fullmatch(r"[0-9]{1,5}", port_text):
        _refuse_url("its port is not a number")
    if port is not None and (port in _BAD_PORTS or (port not in (80, 443) and port < 1024)):
        _refuse_url(f"port {port} belongs to another protocol; use 443, 80 or one from 1024 up")
    return parts.scheme


def _prepare_url(url: str, guard: _Guard) -> requests.PreparedRequest:
    """Return the request for an endpoint's URL; raise UnsafeURL with the reason.

    This is for a good message at registration. What protects is the judgement of the address really dialled.
    """
    scheme = _check_authority(url)
    try:
        prepared = requests.Request("POST", url).prepare()
        host = urllib.parse.urlsplit(prepared.url or "").hostname or ""
    except (ValueError, OSError):  # requests' exceptions are OSErrors; they may quote the URL
        _refuse_url("requests cannot parse it")
    if len(host) > 253 or not all(0 < len(label) < 64 for label in host.removesuffix(".").split(".")):
        _refuse_url("its host has an empty or over-long label")
    address = _literal(host)
    if address and (why := guard.refusal(address, scheme)):
        _refuse_url(why)
    if scheme == "http" and not (address or guard.allow_http or guard.allow_networks):
        _refuse_url(_NO_HTTP)
    return prepared


# ── transport ────────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: a connected, judged, TLS-checked socket, or one exception, within the deadline. requests prepares the
# URL, owns proxies and the pool; urllib3 does TLS. Blocks: the drain calls it from short-lived threads only.
# Environment proxies, .netrc, cookies and CA variables play no part: those live in requests.Session, not used here.

_MAX_LOOKUPS = 32
_LOOKUP_TIMEOUT = 5.0  # seconds

_Resolver = Callable[[str, int], list[str]]


class _Blocked(Exception):
    """The guard refused. No OSError, so that urllib3 neither retries nor rewraps it."""


class _NoAddress(Exception):
    """The name did not resolve in time."""


def _getaddrinfo(host: str, port: int) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


_THREAD_ROOM = 16 << 20  # bytes of memory that a new thread may need
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


def _start_thread(run: Callable[..., Any], *args: Any, name: str | None = None) -> threading.Thread:
    """Start a daemon thread; raise what _is_exhaustion knows when there is no room for one. Look for memory first:
    start() waits for ever when the new thread finds none for its first step (CPython issue 140746)."""
    mmap.mmap(-1, _THREAD_ROOM).close()
    thread = threading.Thread(target=run, args=args, name=name, daemon=True)
    thread.start()
    return thread


def _is_exhaustion(error: BaseException) -> bool:
    """Say whether this process ran out of descriptors, memory or threads, which is no receiver's fault."""
    if isinstance(error, OSError):
        return error.errno in _EXHAUSTED
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "new thread" in str(error)


class _Lookups:
    """Name lookups with a time limit. They cannot be interrupted, so a stuck one keeps a thread of its own: at most
    one a host (who else asks for it waits for the same answer) and 32 in all."""

    def __init__(self, resolver: _Resolver | None) -> None:
        self._resolver = resolver or _getaddrinfo
        self._lock = threading.Lock()  # guards _running; held for dictionary work only
        self._running: dict[tuple[str, int], concurrent.futures.Future[list[str]]] = {}

    def find(self, host: str, port: int, deadline: float) -> list[str]:
        """Return the host's addresses; raise _NoAddress."""
        with self._lock:
            answer = self._running.get((host, port))
            if answer is None:
                if len(self._running) >= _MAX_LOOKUPS:
                    raise _NoAddress(f"{_MAX_LOOKUPS} name lookups are stuck; is the resolver down?")
                answer = concurrent.futures.Future()
                _start_thread(self._look_up, host, port, answer)
                self._running[host, port] = answer
        try:
            addresses = answer.result(max(0.0, min(_LOOKUP_TIMEOUT, deadline - time.monotonic())))
        except concurrent.futures.TimeoutError:
            raise _NoAddress(f"looking up {host} took too long") from None
        except Exception as error:  # OSError by contract; UnicodeError from names that cannot be encoded
            if _is_exhaustion(error):
                raise
            why = getattr(error, "strerror", None) or type(error).__name__
            raise _NoAddress(f"{host} does not resolve: {why}") from None
        if not addresses:
            raise _NoAddress(f"{host} has no address")
        return list(dict.fromkeys(addresses))

    def _look_up(self, host: str, port: int, answer: concurrent.futures.Future[list[str]]) -> None:
        try:
            answer.set_result(self._resolver(host, port))
        except BaseException as error:
            answer.set_exception(error)
        finally:
            with self._lock:
                self._running.pop((host, port), None)


@dataclasses.dataclass(slots=True)
class _Opening:
    """What one connection attempt may do; `dialled` proves that the guard was asked."""

    guard: _Guard
    lookups: _Lookups
    scheme: str
    deadline: float  # monotonic: of the whole attempt
    connect_deadline: float  # monotonic: of lookup and connect
    dialled: str | None = None

    def dial(self, host: str, port: int, options: Iterable[Any]) -> socket.socket:
        """Resolve once, judge every answer, connect to a judged one. One refused answer refuses the name: a DNS
        that mixes inside and outside addresses is lying about one of them."""
        address = _literal(host)
        addresses = [address] if address else self.lookups.find(host, port, self.connect_deadline)
        for address in addresses:
            if why := self.guard.refusal(address, self.scheme):
                raise _Blocked(why if address == host else f"{host} resolves to {address}: {why}")
        failure: OSError = TimeoutError("no time left to connect")
        for tried, address in enumerate(addresses):
            patience = (self.connect_deadline - time.monotonic()) / (len(addresses) - tried)
            if patience <= 0:
                break
            try:
                return self._connect(address, port, options, patience)
            except OSError as error:
                failure = error
        raise failure

    def _connect(self, address: str, port: int, options: Iterable[Any], patience: float) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            for option in options:
                sock.setsockopt(*option)
            sock.settimeout(patience)
            sock.connect((address, port))
            if ipaddress.ip_address(sock.getpeername()[0]) != ipaddress.ip_address(address):
                raise _Blocked(f"connected to another address than {address}")
            sock.settimeout(max(0.001, self.deadline - time.monotonic()))  # do_handshake takes it as a total
        except BaseException:
            sock.close()
            raise
        self.dialled = address
        return sock


# urllib3 1.26 gives Python no name to check where the host is an address; it then compares the certificate itself,
# provided that the context does not ask Python to.
_OLD_URLLIB3 = getattr(urllib3, "__version__", "").startswith("1.")


class _Opener(requests.adapters.HTTPAdapter):
    """Opens connections for endpoints: requests' adapter, with the guard where its connections dial."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self.guard, self.lookups = outbox._guard, _Lookups(outbox.resolver)
        self.proxy, self.connect_timeout = outbox.proxy, outbox.connect_timeout
        self._lock = threading.Lock()  # guards _contexts
        self._contexts: dict[tuple[Any, ...], ssl.SSLContext] = {}

    def open(self, prepared: requests.PreparedRequest, endpoint: Endpoint, deadline: float) -> socket.socket:
        """Return a connected socket, past TLS; raise what _explain understands. deadline: monotonic."""
        scheme = (prepared.url or "").partition(":")[0]
        proxies = {"http": self.proxy, "https": self.proxy} if self.proxy else None
        pool: Any = self.get_connection_with_tls_context(prepared, verify=True, proxies=proxies)
        connection = pool._new_conn()
        now = time.monotonic()
        opening = _Opening(self.guard, self.lookups, scheme, deadline, min(deadline, now + self.connect_timeout))
        if not self.proxy:
            # _new_conn is the seam that urllib3's own SOCKS support overrides, in 1.26 and in 2.x. A release without
            # it would dial by itself: then `dialled` is unset, and the connection refused.
            where = connection.host.strip("[]"), connection.port, connection.socket_options or ()
            connection._new_conn = functools.partial(opening.dial, *where)
        connection.timeout = max(0.001, deadline - now)
        if scheme == "https":
            connection.ssl_context = self._context(endpoint, urllib3_checks=_OLD_URLLIB3 and bool(_literal(pool.host)))
        try:
            if self.proxy and scheme == "https":
                self._tunnel(pool, connection, deadline)
            else:
                connection.connect()
            if opening.dialled is None and not self.proxy:
                raise _Blocked("this urllib3 dialled without asking the guard; use urllib3 1.26 or 2.x")
            sock: socket.socket = connection.sock
            connection.sock = None  # ours now
            sock.setblocking(False)
            return sock
        finally:
            connection.close()

    def _tunnel(self, pool: Any, connection: Any, deadline: float) -> None:
        """CONNECT through the proxy, then TLS with the endpoint. http.client's timeout is for each read, so a proxy
        that drips is cut off from outside."""

        def cut() -> None:
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(max(0.001, deadline - time.monotonic()), cut)
        timer.daemon = True
        timer.start()
        try:
            pool._prepare_proxy(connection)
        except Exception:
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()

    def _context(self, endpoint: Endpoint, urllib3_checks: bool) -> ssl.SSLContext:
        """Return the TLS context for an endpoint's CA and certificate, read again when the files change. One context
        serves all: loading the CA bundle for each connection costs more than the handshake."""
        ca = endpoint.ca or requests.utils.DEFAULT_CA_BUNDLE_PATH
        chain = (endpoint.cert,) if isinstance(endpoint.cert, str) else endpoint.cert or ()
        key = (ca, chain, urllib3_checks, *(os.stat(path).st_mtime_ns for path in (ca, *chain)))
        with self._lock:
            if key not in self._contexts:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # create_default_context reads SSLKEYLOGFILE
                context.minimum_version = ssl.TLSVersion.TLSv1_2
                context.load_verify_locations(cafile=ca)
                context.check_hostname = not urllib3_checks
                if chain:
                    context.load_cert_chain(chain[0], chain[-1], password="")  # never ask on a terminal
                self._contexts = {k: v for k, v in self._contexts.items() if k[:3] != key[:3]} | {key: context}
            return self._contexts[key]


def _explain(error: BaseException) -> tuple[str, str]:
    """Return the reason (SPEC 5) and one line for an exception of an attempt. The one place that maps them."""
    text = _one_line(getattr(error, "strerror", None) or str(error)) or type(error).__name__
    if isinstance(error, (_Blocked, UnsafeURL)):
        return "blocked", text
    if isinstance(error, _NoAddress):
        return "dns", text
    if isinstance(error, (TimeoutError, socket.timeout)):
        return "timeout", "no time left: the receiver did not connect or answer in time"
    if isinstance(error, (ssl.SSLError, urllib3.exceptions.SSLError)) or type(error).__name__ == "CertificateError":
        return "tls", getattr(error, "verify_message", "") or text
    if isinstance(error, (OSError, urllib3.exceptions.HTTPError)):
        return "connect", text
    if isinstance(error, (OutboxError, _Unready)):
        return "internal", text
    return "internal", f"{type(error).__name__}: {text}"


# ── exchange ─────────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: the exact bytes of one POST, and the strict reading of its answer. Values in, values out; the sockets
# are the caller's. HTTP/1.1 by RFC 9112; redirects are never followed, nothing is decoded.

_BODIES = ("standard", "data", "cloudevents")
_TYPE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@functools.lru_cache(maxsize=64)
def _iso_second(second: int) -> str:
    return datetime.datetime.fromtimestamp(second, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def _iso(at: float) -> str:
    second, milli = divmod(int(at * 1000), 1000)
    return f"{_iso_second(second)}.{milli:03d}Z"


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class _Picked(NamedTuple):
    """A delivery that is due, with its event, as storage reads it."""

    event: int
    attempts: int
    first_attempt_at: float | None
    queue: str | None
    id: str | None  # None: the event's row is missing
    type: str
    data: str
    valid: int | None  # 1: data is JSON
    key: str | None
    headers: str | None
    created_at: float


def _standard_body(picked: _Picked) -> bytes:
    """Return the Standard Webhooks envelope. A pure function of the stored row, for ever: retries must be equal."""
    stamp = _iso(picked.created_at)
    return f'{{"type":"{picked.type}","timestamp":"{stamp}","data":{picked.data}}}'.encode()


def _cloudevents_body(picked: _Picked, source: str) -> bytes:
    """Return CloudEvents 1.0 in structured mode."""
    context = {"specversion": "1.0", "id": picked.id, "source": urllib.parse.quote(source) or "webhook-outbox"}
    context |= {"type": picked.type, "time": _iso(picked.created_at), "datacontenttype": "application/json"}
    return f'{_dumps(context)[:-1]},"data":{picked.data}}}'.encode()


def _slack_body(event: Event) -> bytes:
    """Return a Slack message. Escaped as Slack wants it, so that data cannot mention a channel."""
    text = f"{event.type} {_dumps(event.data)}"[:3000]
    return _dumps({"text": html.escape(text, quote=False)}).encode()


def _discord_body(event: Event) -> bytes:
    """Return a Discord message, which may be 2,000 characters long (of UTF-16, to be safe) and mentions nobody."""
    text = f"{event.type} {_dumps(event.data)}".encode("utf-16-le")[:4000].decode("utf-16-le", "ignore")
    return _dumps({"content": text, "allowed_mentions": {"parse": []}}).encode()


_TRANSFORMS: dict[str, Callable[[Event], Any]] = {"slack": _slack_body, "discord": _discord_body}


def _resolve_value(value: str) -> str:
    """Return a secret or header value, read from the environment or a file where it says so."""
    kind, _, name = value.partition(":")
    found = value
    if kind == "env":
        found = os.environ.get(name, "")
    elif kind == "file":
        try:
            with open(name, encoding="utf-8") as file:
                found = file.read(65_536).strip()
        except (OSError, ValueError) as error:
            raise _Unready(f"the file {name} cannot be read ({type(error).__name__})") from None
    if not found:
        raise _Unready(f"the {'environment variable' if kind == 'env' else 'file'} {name} is not set or empty")
    return found


_RESERVED_HEADER = re.compile(
    r"(connection|keep-alive|te|trailer|transfer-encoding|upgrade|expect|host|accept-encoding|user-agent"
    r"|stripe-signature|x-hub-signature-256|proxy-.*|content-.*|webhook-.*)",
    re.IGNORECASE,
)


def _checked_headers(headers: Any) -> dict[str, str]:
    """Return custom headers as a dict; raise PayloadError, which never quotes a value."""
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise PayloadError("headers must be a mapping of names to text")
    for name, value in headers.items():
        if not isinstance(name, str) or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}", name):
            raise PayloadError("a header name must be 1 to 128 letters, digits and -; no spaces or line breaks")
        if _RESERVED_HEADER.fullmatch(name):
            raise PayloadError(f"the header {name} is set by the outbox or the connection; leave it out")
        if not isinstance(value, str) or not re.fullmatch(
            r"[!-~\xa1-\xac\xae-\xff]([ -~\xa1-\xac\xae-\xff]{0,8190}[!-~\xa1-\xac\xae-\xff])?", value
        ):
            raise PayloadError(f"the value of header {name} must be one line of printable Latin-1 text")
    if len({name.lower() for name in headers}) != len(headers):
        raise PayloadError("a header is given twice, in different case")
    return dict(headers)


def _clean(value: str) -> str:
    """Return a header value that came from outside the file; a line break would start a header of its own."""
    if not value.isprintable():
        raise _Unready("a header value holds a control character")
    return value


def _stored_headers(text: str | None) -> dict[str, str]:
    """Return an event's headers; rows may have been written in plain SQL, so they are checked again."""
    if text is None:
        return {}
    try:
        return _checked_headers(json.loads(text))
    except (ValueError, RecursionError):
        raise _Unready("the event's headers are not usable") from None


_Secrets = list[tuple[str, float | None]]  # (secret, valid until), current first
_LEAST_HIDDEN = 6  # characters; shorter ones would blacken words that mean nothing


@dataclasses.dataclass(slots=True)
class _Wire:
    """How requests for one endpoint are written; made once for each version of its row."""

    endpoint: Endpoint
    secrets: _Secrets
    prepared: requests.PreparedRequest
    start: bytes  # request line and the headers that never change
    schemes: tuple[str, ...]
    transform: Callable[[Event], Any] | None
    source: str
    hidden: list[str]  # of the URL and the secrets: what an echo must not carry into the tables
    slow: bool  # building a request may block or run the host's code: the loop hands it to a thread

    @classmethod
    def make(cls, endpoint: Endpoint, secrets: _Secrets, outbox: Outbox, opener: _Opener) -> _Wire:
        prepared = _prepare_url(endpoint.url, outbox._guard)
        parts = urllib.parse.urlsplit(prepared.url or "")
        proxied = opener.proxy and parts.scheme == "http"
        login = opener.proxy_headers(opener.proxy) if opener.proxy else {}
        target = prepared.url if proxied else prepared.path_url
        agent = f"webhook-outbox/{__version__}" + (f" ({outbox.app_name})" if outbox.app_name else "")
        lines = [f"POST {target} HTTP/1.1", f"Host: {parts.netloc}", f"User-Agent: {agent}"]
        lines += ["Accept: */*", "Accept-Encoding: identity"]
        lines += [f"{name}: {value}" for name, value in login.items() if proxied]
        transform = outbox.transforms.get(endpoint.body)
        if transform is None and endpoint.body not in _BODIES:
            raise _Unready(f"no transform is called {endpoint.body!r}; run the drain with --app")
        slow = transform is not None or any(secret.startswith("file:") for secret, _ in secrets)
        start = "\r\n".join(lines).encode("latin-1") + b"\r\n"
        schemes = tuple(dict.fromkeys(endpoint.signing.split("+")))
        if not set(schemes) <= set(_SCHEMES):
            raise _Unready(f"no signing is called {endpoint.signing!r}; update the endpoint")
        query = parts.query  # as it goes over the wire, percent-encoded
        hidden = [query, *query.split("&"), *(part.rpartition("=")[2] for part in query.split("&"))]
        hidden += [value for _, value in urllib.parse.parse_qsl(query)]
        hidden += [secret for secret, _ in secrets]
        hidden += [value.rpartition(" ")[2] for value in login.values()]
        hidden = [value for value in hidden if len(value) >= _LEAST_HIDDEN]
        return cls(endpoint, secrets, prepared, start, schemes, transform, outbox.app_name, hidden, slow)

    def body(self, picked: _Picked) -> tuple[bytes, str]:
        """Return the body bytes and their content type."""
        if self.transform is not None:
            event = Event(picked.id or "", picked.type, json.loads(picked.data), picked.key, picked.created_at)
            made = self.transform(event)
            body, content_type = made if isinstance(made, tuple) and len(made) == 2 else (made, "application/json")
            if not isinstance(body, bytes) or not isinstance(content_type, str) or not content_type.isprintable():
                raise _Unready(f"the transform {self.endpoint.body!r} must return bytes, or (bytes, content type)")
            return body, content_type
        if self.endpoint.body == "data":
            return picked.data.encode(), "application/json"
        if self.endpoint.body == "cloudevents":
            return _cloudevents_body(picked, self.source), "application/cloudevents+json"
        return _standard_body(picked), "application/json"

    def keys(self, now: float) -> list[str]:
        """Return the secrets that sign now, current first."""
        valid = [
            s if s.startswith("whsec_") else _resolve_value(s)
            for s, until in self.secrets
            if until is None or until > now
        ]
        if not valid:
            raise _Unready("the endpoint has no valid secret; rotate it")
        return valid

    def own_headers(self) -> dict[str, str]:
        """Return the endpoint's headers; only these may name the environment, an event's may not."""
        return {
            name: _resolve_value(value) if value.startswith("env:") else value
            for name, value in self.endpoint.headers.items()
        }

    def _custom_headers(self, picked: _Picked) -> list[tuple[str, str]]:
        """Return the endpoint's headers and the event's; the endpoint's win: an event must not replace credentials."""
        own = self.own_headers()
        taken = {name.lower() for name in own}
        of_event = {n: v for n, v in _stored_headers(picked.headers).items() if n.lower() not in taken}
        return [(name, _clean(value)) for name, value in {**own, **of_event}.items()]

    def request(self, picked: _Picked, now: float) -> tuple[bytes, list[str]]:
        """Return the bytes of one attempt, and what must not be stored if the receiver echoes it."""
        if picked.id is None or picked.valid != 1:
            raise _Unready("the event's row is missing" if picked.id is None else "the event's data is not JSON")
        if not _TYPE.fullmatch(picked.type) or not picked.id.isprintable():
            raise _Unready("the event's row is damaged")
        body, content_type = self.body(picked)
        valid = self.keys(now)
        signed = _signature_headers(self.schemes, valid, picked.id, int(now), body)
        custom = self._custom_headers(picked) if self.endpoint.headers or picked.headers is not None else []
        extra = "".join([f"{name}: {value}\r\n" for name, value in custom + signed])
        head = (
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
            f"webhook-id: {picked.id}\r\nwebhook-timestamp: {int(now)}\r\n{extra}\r\n"
        )
        hidden = [*self.hidden, *valid, *[value for _, value in signed]]
        hidden += [part for _, value in custom for part in (value, value.rpartition(" ")[2])]
        return self.start + head.encode("latin-1") + body, hidden


_RUN = re.compile(r"[A-Za-z0-9]+")


def _redacted(text: str, hidden: Iterable[str]) -> str:
    """Return text without the secrets that a receiver echoed, as they are or as JSON and URLs spell them. Not a
    guarantee against other encodings, or against a part of a secret."""
    if len(text) < _LEAST_HIDDEN:
        return text
    for value in hidden:
        value = value.removeprefix("whsec_")
        # No spelling changes letters and digits; they rule most values out at little cost.
        if _LEAST_HIDDEN <= len(value) <= len(text) and all(run in text for run in _RUN.findall(value)):
            in_json = json.dumps(value)[1:-1]
            in_url = urllib.parse.quote(value, errors="replace")
            for spelling in (value, in_json, in_json.replace("/", "\\/"), in_url, in_url.replace("/", "%2F")):
                text = text.replace(spelling, "[redacted]")
    return text


_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n]*)?\r?\n")
_HEAD_END = re.compile(rb"\n\r?\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
_WELL_FORMED = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r?\n)*\r?\n")
_OURS = re.compile(
    rb"^(content-length|transfer-encoding|connection|retry-after|location|webhook-delivery):[ \t]*([^\r\n]*)",
    re.I | re.M,
)


@functools.lru_cache(maxsize=64)  # most receivers send the same head for a second, or for ever
def _read_fields(block: bytes, keep: bool, bodiless: bool) -> tuple[Mapping[bytes, list[bytes]], bool, str, int]:
    """Return the headers that matter of a head (to be read only), whether the connection may be used again, and the
    body's framing and length. keep: HTTP/1.1."""
    headers: dict[bytes, list[bytes]] = {}
    for name, value in _OURS.findall(block):
        headers.setdefault(name.lower(), []).append(value.rstrip(b" \t"))
    tokens = b",".join(headers.get(b"connection", [])).lower()
    reusable = bool(_WELL_FORMED.fullmatch(block)) and b"close" not in tokens and (keep or b"keep-alive" in tokens)
    lengths, coding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
    if bodiless:
        return headers, reusable, "length", 0
    if coding is not None:
        chunked = [c.lower() for c in coding] == [b"chunked"] and not lengths
        return headers, reusable, "chunked" if chunked else "close", -1
    if lengths and len(set(lengths)) == 1 and re.fullmatch(rb"[0-9]{1,18}", lengths[0]):
        return headers, reusable, "length", int(lengths[0])
    return headers, reusable, "close", 0


class _Answer:
    """Reads one answer, byte by byte if need be, at a cost that grows with what arrived.

    feed() returns True when the outcome is known. `status` is None where no valid answer came. `reusable`: the
    connection may carry another request; anything odd (no framing, two lengths, a bad chunk, bytes after the end,
    a body over the cap) makes it False, and the outcome is then what a valid status says.
    """

    __slots__ = ("body", "buffer", "error", "headers", "reusable", "status", "_at", "_framing", "_left")

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.body = bytearray()
        self.status: int | None = None
        self.headers: Mapping[bytes, list[bytes]] = {}
        self.error = ""
        self.reusable = True
        self._framing = ""  # "", then length, chunked or close
        self._left = 0  # bytes of this body or chunk that are to come; -1: a chunk size is next
        self._at = 0  # what was searched already

    def feed(self, data: bytes) -> bool:
        self.buffer += data
        if not self._framing and not self._read_head():
            return bool(self.error)
        return self._read_body()

    def end(self) -> None:
        """The receiver closed the connection."""
        self.reusable = False
        if self.status is None and not self.error:
            self.error = "the connection was closed before an answer" + (" was complete" if self.buffer else "")

    def _fail(self, error: str) -> bool:
        self.status, self.error, self.reusable = None, error, False
        return False

    def _odd(self) -> bool:
        self.reusable = False
        return True

    def _read_head(self) -> bool:
        while True:
            line = _STATUS_LINE.match(self.buffer)
            if line is None and (b"\n" in self.buffer or not b"HTTP/1.".startswith(bytes(self.buffer[:7]))):
                return self._fail("the answer is not HTTP/1.1")
            end = _HEAD_END.search(self.buffer, max(0, self._at - 2))
            if end is None or line is None:
                self._at = len(self.buffer)
                return self._fail("the answer's head is too large") if self._at > _READ_HEAD else False
            if end.end() > _READ_HEAD:
                return self._fail("the answer's head is too large")
            if line[2] != b"100":
                break
            del self.buffer[: end.end()]  # 100 Continue: skipped, but what it costs counts against the cap
            self._left += end.end()
            self._at = 0
            if self._left > _READ_HEAD:
                return self._fail("endless 100 Continue answers")
        status = int(line[2])
        if status < 200:  # 101 or an early hint: whatever follows belongs to a protocol that we do not speak
            return self._fail(f"the answer was {status}, which is not final")
        self.status = status
        block = bytes(self.buffer[line.end() : end.end()])
        fields = _read_fields(block, line[1] == b"1", status in (204, 304))
        self.headers, self.reusable, self._framing, self._left = fields
        del self.buffer[: end.end()]
        return True

    def _read_body(self) -> bool:
        if self._framing == "close":  # to the end of the connection; a success needs no waiting for it
            self.reusable = False
            self._take(len(self.buffer))
            return len(self.body) >= _READ_RESPONSE or 200 <= (self.status or 0) < 300
        if self._framing == "chunked":
            return self._read_chunks()
        self._left -= self._take(min(self._left, len(self.buffer)))
        if self._left and len(self.body) < _READ_RESPONSE:
            return False
        return self._odd() if self._left or self.buffer else True

    def _take(self, count: int) -> int:
        self.body += self.buffer[:count]
        del self.buffer[:count]
        return count

    def _read_chunks(self) -> bool:
        while len(self.body) < _READ_RESPONSE:
            if self._left == -1:
                size = _CHUNK.match(self.buffer)
                if size is None:
                    return self._odd() if b"\n" in self.buffer or len(self.buffer) > 256 else False
                self._left = int(size[1], 16)
                if self._left == 0:
                    return self._read_trailer(size.end())
                del self.buffer[: size.end()]
            self._left -= self._take(min(self._left, len(self.buffer)))
            if self._left:
                return False
            end = re.match(rb"\r?\n", self.buffer)
            if end is None:
                return self._odd() if self.buffer not in (bytearray(), bytearray(b"\r")) else False
            del self.buffer[: end.end()]
            self._left = -1
        return self._odd()

    def _read_trailer(self, start: int) -> bool:
        self._left = -1  # the size line is still there: come back when more has arrived
        end = re.match(rb"\r?\n", memoryview(self.buffer)[start:])
        if end is not None:
            return True if start + end.end() == len(self.buffer) else self._odd()
        return self._odd() if len(self.buffer) > start + 1 else False  # trailers: nobody sends them; close


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class _Outcome(NamedTuple):
    """What one attempt came to."""

    status_code: int | None = None
    reason: str | None = None  # None: delivered
    error: str | None = None
    response: str | None = None
    hint: float | None = None  # seconds of Retry-After on 429 and 503
    disable: bool = False

    @property
    def overloaded(self) -> bool:
        return self.reason == "timeout" or self.status_code in (429, 502, 504)


def _judge(answer: _Answer, hidden: Iterable[str], now: float) -> _Outcome:
    """Return the outcome that a read answer means (SPEC 4)."""
    if answer.status is None:
        return _Outcome(reason="protocol", error=answer.error)
    status, header = answer.status, answer.headers
    response = None
    if answer.body:
        text = _redacted(bytes(answer.body).decode("utf-8", "backslashreplace"), hidden)[:_KEPT_RESPONSE]
        text = text if text.isprintable() else _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
        response = text.encode()[:_KEPT_RESPONSE].decode("utf-8", "ignore")
    order = header.get(b"webhook-delivery", [b""])[-1].lower()
    if 200 <= status < 300:
        return _Outcome(status, None, None, response, disable=order == b"disable")
    error = f"HTTP {status}"
    if 300 <= status < 400 and b"location" in header:
        location = header[b"location"][0].decode("latin-1")
        error += f": redirects are not followed (Location: {_one_line(_redacted(_masked(location), hidden), 200)})"
    reason = "gone" if status == 410 else "aborted" if order == b"abort-message" else "status"
    hint = None
    if status in (429, 503):
        hint = _retry_after([v.decode("latin-1") for v in header.get(b"retry-after", [])], now)
    return _Outcome(status, reason, error, response, hint, disable=status == 410 or order == b"disable")


def _failure(error: BaseException, hidden: Iterable[str] = ()) -> _Outcome:
    reason, text = _explain(error)
    return _Outcome(reason=reason, error=_redacted(text, hidden))


def _exchange(sock: socket.socket, request: bytes, deadline: float) -> _Answer:
    """Send a request and read its answer, blocking, until the deadline; the drain has its own loop for many."""
    answer, out = _Answer(), memoryview(request)
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        if out:
            out = out[sock.send(out) :]
            continue
        data = sock.recv(65_536)
        if not data:
            answer.end()
        if not data or answer.feed(data):
            return answer
    raise TimeoutError


# ── storage ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: our own connections are autocommit and short-lived but for the drain's one; each write is one statement.
# On the host's connection only our own statements run; no pragma, no commit, no rollback (SPEC P8).
# Never opens the database, -wal or -shm as plain files: closing such a descriptor drops SQLite's locks.

# Every connection that this module has open. SQLite remembers in the process which locks it holds, and a forked child
# inherits the memory without the locks: if the child closed such a connection, it would delete a journal that is in
# use. So the child keeps them for ever, and a drain closes its own for the moment of a fork (_Drain.park).
_PINNED: dict[int, sqlite3.Connection] = {}
_FORK = threading.RLock()  # held by a thread that forks, and by a drain that begins: no fork falls into its opening
_DRAINS: set[_Drain] = set()  # running in this process
_OUTBOXES: weakref.WeakSet[Outbox] = weakref.WeakSet()  # in a child they start with no drain
_HELD: dict[str, _Lock] = {}  # held by this process: record locks do not keep its own threads apart
_hooked: list[int] = []  # not empty: the hooks are set; they cannot be taken back, so they are set when first needed


def _before_fork() -> None:
    _FORK.acquire()
    for drain in list(_DRAINS):
        drain.park()


def _after_fork_in_parent() -> None:
    for drain in list(_DRAINS):
        drain.unpark()
    _FORK.release()


def _after_fork_in_child() -> None:
    import ctypes

    _FORK.release()
    for db in _PINNED.values():  # one reference that is never given back: the interpreter's end would close it
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))
    for kept in (_PINNED, _DRAINS, _HELD):
        kept.clear()
    for outbox in list(_OUTBOXES):
        outbox._forget_drains()


def _hook_forks() -> None:
    if not _hooked and hasattr(os, "register_at_fork"):
        _hooked.append(1)
        os.register_at_fork(
            before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
        )


# Decodes what SQLite calls text: plain SQL can store any bytes, and one such row must not stop every reader. What is no
# UTF-8 becomes lone surrogates, which cannot be encoded, so that the attempt fails and not the drain.
_lenient_text = operator.methodcaller("decode", "utf-8", "surrogateescape")


def _open(path: str, patience: float = 5.0, create: bool = False) -> sqlite3.Connection:
    """Open a connection of our own, autocommit. patience: seconds that SQLite waits for a lock."""
    if not create and not os.path.exists(path):  # SQLite would put an empty file there
        raise SchemaError(f"{path} does not exist; `python -m webhook_outbox --db {path} init` makes it")
    try:
        db = sqlite3.connect(path, timeout=patience, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise SchemaError(f"{path} cannot be opened ({error}); does its folder exist?") from None
    db.text_factory = _lenient_text
    _hook_forks()
    _PINNED[id(db)] = db
    return db


def _ours(db: sqlite3.Connection) -> bool:
    """Say whether this process opened the connection, and not one that forked it."""
    return id(db) in _PINNED


def _close(db: sqlite3.Connection) -> None:
    if _PINNED.pop(id(db), None) is not None:
        db.close()


@contextlib.contextmanager
def _session(path: str, create: bool = False) -> Iterator[sqlite3.Connection]:
    db = _open(path, create=create)
    try:
        yield db
    finally:
        _close(db)


@contextlib.contextmanager
def _transaction(path: str) -> Iterator[sqlite3.Connection]:
    """BEGIN IMMEDIATE on a connection of our own; commit, or roll back when the block raises."""
    with _session(path) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            if _ours(db):
                db.execute("COMMIT")
        except BaseException:
            if _ours(db) and db.in_transaction:
                db.execute("ROLLBACK")
            raise


def _is_busy(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)  # since Python 3.11
    return code & 0xFF in (5, 6) if code is not None else "locked" in str(error)  # SQLITE_BUSY, SQLITE_LOCKED


@contextlib.contextmanager
def _plain_text(db: sqlite3.Connection) -> Iterator[None]:
    """Read text as str, whatever text_factory the host set on its connection; it is set back."""
    factory = getattr(db, "text_factory", None)  # apsw's has none
    if factory is not None:
        db.text_factory = str
    try:
        yield
    finally:
        if factory is not None:
            db.text_factory = factory


def _meta(db: sqlite3.Connection, key: str) -> Any:
    row = sqlite3.Cursor(db).execute("SELECT value FROM webhook_meta WHERE key = ?", (key,)).fetchone()
    return row and row[0]


def _version(db: sqlite3.Connection, path: str) -> int:
    """Return the schema version of a file, 0 when it has no tables of ours; refuse what is not ours to touch."""
    try:
        exists = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'webhook_meta'").fetchone()
        version = int(_meta(db, "schema_version") or 0) if exists else 0
    except sqlite3.OperationalError:
        raise
    except (sqlite3.DatabaseError, ValueError) as error:
        raise SchemaError(f"{path} cannot be read as a SQLite database ({error})") from None
    if version > len(_SCHEMA):
        raise SchemaError(
            f"{path} was written by a newer webhook_outbox (schema {version}, this file knows {len(_SCHEMA)}); "
            "update your copy of webhook_outbox.py"
        )
    return version


def _prepare_file(path: str, create: bool) -> str:
    """Make or check the tables of a file; return the outbox's identity, which emit compares."""
    if sqlite3.sqlite_version_info < _SQLITE_NEEDED:
        raise SchemaError(f"SQLite {sqlite3.sqlite_version} is too old; 3.34 or newer is needed")
    try:
        with _session(path, create) as db:
            version = _version(db, path)
            if not create and version < len(_SCHEMA):
                what = (
                    f"has tables of an older webhook_outbox (schema {version})" if version else "has no webhook tables"
                )
                raise SchemaError(f"{path} {what}; `python -m webhook_outbox --db {path} init` makes them")
            while version < len(_SCHEMA):
                with _transaction(path) as own:
                    if _version(own, path) == version:  # another process may have been first
                        for statement in _SCHEMA[version]:
                            own.execute(statement)
                version += 1
            return str(_meta(db, "outbox"))
    except sqlite3.Error as error:
        raise SchemaError(f"{path} cannot be used: {error}") from None


def _driver(conn: Any) -> Any:
    """Return the connection that a driver made, under what a framework hands out: SQLAlchemy's Connection or Session,
    Django's connection or its alias, peewee's Database, a cursor. Known by what they have; nothing is imported."""
    if isinstance(conn, sqlite3.Connection):
        return conn
    django = sys.modules.get("django.db")
    if isinstance(conn, str) and django and conn in django.connections:
        conn = django.connections[conn]
    if hasattr(conn, "ensure_connection"):  # Django's may not be open yet
        conn.ensure_connection()
    for _ in range(4):  # a Session has a Connection, that has a pooled one, that has the driver's
        inner = getattr(conn, "driver_connection", None) or getattr(conn, "connection", None)
        if isinstance(conn, sqlite3.Connection) or inner is None:
            break
        conn = inner if isinstance(inner, sqlite3.Connection) or not callable(inner) else inner()
    return conn


def _host(conn: Any) -> sqlite3.Connection:
    """Return the connection under what a host hands us, once we know that what we write commits with its rows."""
    db = _driver(conn)
    if not isinstance(db, sqlite3.Connection) and not (hasattr(db, "execute") and hasattr(db, "in_transaction")):
        raise PayloadError(f"expected a connection to the outbox's SQLite file, not {type(conn).__name__}")
    legacy = getattr(db, "autocommit", -1) == -1  # sqlite3.LEGACY_TRANSACTION_CONTROL, or Python before 3.12
    opens_itself = legacy and getattr(db, "isolation_level", None) is not None  # the driver begins before our INSERT
    if not db.in_transaction and not opens_itself:
        raise NotInTransaction(
            "the connection is in autocommit mode with no transaction open: begin one first (BEGIN, Django's atomic(), "
            "SQLAlchemy's begin(), peewee's atomic()), or use `with outbox.transaction() as conn`"
        )
    return db  # type: ignore[no-any-return]


def _cursor(db: Any) -> sqlite3.Cursor:
    """Return a cursor without the host's row_factory; a driver's look-alike has only its own."""
    return sqlite3.Cursor(db) if isinstance(db, sqlite3.Connection) else db.cursor()


def _in_its_thread(conn: Any, do: Callable[[Any], str]) -> str:
    """Call do with the driver's connection: at once, or, under the synchronous side of SQLAlchemy's AsyncSession, in
    the thread that aiosqlite keeps for it."""
    db = _driver(conn)
    if not hasattr(db, "_execute"):
        return do(conn)
    util = sys.modules["sqlalchemy.util"]
    wait = getattr(util, "await_only", None) or util.concurrency.await_
    return str(wait(db._execute(do, db._conn)))


@contextlib.contextmanager
def _host_errors(db: sqlite3.Connection, path: str) -> Iterator[None]:
    """Turn SQLite's errors inside the host's transaction into ours; what is the host's business (busy) passes."""
    before = db.in_transaction
    try:
        yield
    except (sqlite3.Error, SchemaError) as error:
        text = str(error)
        if not before and db.in_transaction:
            db.rollback()  # the driver began it for our statement alone: nothing of the host's is in it
        if before and not db.in_transaction:
            raise TransactionLost(
                f"SQLite rolled your transaction back ({text}): nothing of it is stored; do not go on, begin again"
            ) from error
        if "another outbox" in text:
            raise SchemaError(f"this connection is open on another file than the outbox's, {path}") from None
        if text.startswith("webhook_emit: "):
            raise PayloadError(text.removeprefix("webhook_emit: ")) from None
        if "no such table: main.webhook" in text or "unknown database" in text:
            raise SchemaError(
                f"this connection's main file has no webhook tables; the outbox is in {path}: connect to that file "
                "(an attached file cannot commit atomically in WAL mode)"
            ) from None
        raise


def _check_identity(cursor: sqlite3.Cursor, identity: str, path: str) -> None:
    """Refuse a host's connection to another file that has our tables too."""
    cursor.execute("SELECT value = ? FROM main.webhook_meta WHERE key = 'outbox'", (identity,))
    if cursor.fetchone() != (1,):
        raise SchemaError(f"this connection is open on another file than the outbox's, {path}")


def _file_id(path: str) -> tuple[int, int] | None:
    """Return what tells the file at a path from one that takes its place; None when there is none."""
    with contextlib.suppress(OSError):
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino
    return None


class _Share(NamedTuple):
    """A part of the endpoints: those whose id falls to `number` of `parts`; 1 of 1 is all of them."""

    number: int
    parts: int

    def has(self, endpoint_id: str) -> bool:
        return (
            self.parts == 1
            or zlib.crc32(endpoint_id.encode("utf-8", "surrogateescape")) % self.parts == self.number - 1
        )


_ALL = _Share(1, 1)
_LOCK_BYTES = 720_720  # divides by 1 to 16: shares of different counts lock overlapping ranges where they overlap


class _Lock:
    """The right to drain one share of a file: a POSIX record lock on its part of the bytes of a small file beside it,
    which dies with its process, however it dies, and is not inherited by a fork. (An exclusive SQLite transaction there
    would do for the whole, but SQLite in a forked child believes for ever that its parent's lock is held.)"""

    def __init__(self, path: str, share: _Share = _ALL) -> None:
        self.path, self.share = path + "-webhooks", share
        self._fd = -1

    def acquire(self) -> bool:
        """Take the lock if it is free."""
        if _HELD.setdefault(self.path, self) is not self:
            return False
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            length = _LOCK_BYTES // self.share.parts
            start = length * (self.share.number - 1)
            if sys.platform == "win32":
                os.lseek(self._fd, start, os.SEEK_SET)
                msvcrt.locking(self._fd, msvcrt.LK_NBLCK, length)
            else:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            return True
        except OSError as error:
            opened = self._fd >= 0
            self.release()
            if not opened or error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise OutboxError(f"the lock file {self.path} cannot be used: {error.strerror}") from None
            return False

    def lost(self) -> bool:
        """Say whether somebody deleted the file: then another process can lock a new one."""
        there = os.fstat(self._fd)
        return _file_id(self.path) != (there.st_dev, there.st_ino)

    def release(self) -> None:
        if _HELD.get(self.path) is self:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1
            del _HELD[self.path]


_ENDPOINT_COLUMNS = (
    "id, url, events, description, headers, body, signing, rate, max_in_flight, ordered, on_dead, timeout, cert, ca, "
    "enabled, disabled_reason, failing_since, created_at"
)


def _endpoint(row: Sequence[Any]) -> Endpoint:
    """Return the Endpoint of a row of _ENDPOINT_COLUMNS."""
    values = dict(zip(_ENDPOINT_COLUMNS.split(", "), row, strict=True))
    cert = json.loads(values["cert"]) if values["cert"] else None
    values.update(
        events=tuple(json.loads(values["events"])),
        headers=json.loads(values["headers"]),
        cert=tuple(cert) if cert and len(cert) == 2 else cert and cert[0],
        ordered=bool(values["ordered"]),
        enabled=bool(values["enabled"]),
    )
    return Endpoint(**values)


class _Live(NamedTuple):
    """What an endpoint's row says of its state; survives a restart."""

    failures: int
    failing_since: float | None
    paused_until: float


def _load_endpoints(db: sqlite3.Connection) -> list[tuple[Endpoint | str, Any, _Live]]:
    """Return every enabled endpoint with its secrets and state; its id alone where the row is damaged."""
    rows = db.execute(
        f"""SELECT {_ENDPOINT_COLUMNS}, secrets, failures, failing_since, paused_until
              FROM webhook_endpoints WHERE enabled"""
    )
    found: list[tuple[Endpoint | str, Any, _Live]] = []
    for row in rows.fetchall():
        try:
            found.append((_endpoint(row[:-4]), [(s, until) for s, until in json.loads(row[-4])], _Live(*row[-3:])))
        except (ValueError, TypeError):
            found.append((row[0], [], _Live(*row[-3:])))
    return found


def _earliest(db: sqlite3.Connection) -> list[tuple[str, float]]:
    """Return each endpoint that has pending rows, with the first due time: two seeks an endpoint, however many rows."""
    return db.execute(
        """WITH RECURSIVE waiting(id) AS (
             SELECT min(endpoint_id) FROM webhook_deliveries WHERE status = 'pending'
              UNION ALL
             SELECT (SELECT min(endpoint_id) FROM webhook_deliveries
                      WHERE status = 'pending' AND endpoint_id > waiting.id)
               FROM waiting WHERE waiting.id IS NOT NULL)
           SELECT id, (SELECT due_at FROM webhook_deliveries
                        WHERE status = 'pending' AND endpoint_id = waiting.id ORDER BY due_at LIMIT 1)
             FROM waiting WHERE id IS NOT NULL"""
    ).fetchall()


_PICK = """SELECT d.event, d.attempts, d.first_attempt_at, d.queue, e.id, e.type, e.data, json_valid(e.data),
       e.key, e.headers, e.created_at
  FROM webhook_deliveries AS d LEFT JOIN webhook_events AS e ON e.seq = d.event
 WHERE d.endpoint_id = ? AND d.status = 'pending' AND d.due_at <= ?
   AND d.event NOT IN (SELECT value FROM json_each(?))
 ORDER BY d.due_at, d.event LIMIT ?"""
_PICK_ROWS, _PICK_BYTES = 128, 1 << 20


def _pick(db: sqlite3.Connection, endpoint_id: str, now: float, known: Iterable[int]) -> tuple[list[_Picked], bool]:
    """Return due deliveries of an endpoint, oldest first, without the known ones; and whether that is all of them."""
    picked: list[_Picked] = []
    size = 0
    cursor = db.execute(_PICK, (endpoint_id, now, json.dumps(list(known)), _PICK_ROWS))
    try:
        for row in cursor:
            picked.append(_Picked._make(row))
            size += len(row[6] or "")
            if size > _PICK_BYTES:
                return picked, False
    finally:
        cursor.close()  # a half-read cursor would pin the WAL
    return picked, len(picked) < _PICK_ROWS


def _still_pending(db: sqlite3.Connection, event: int, endpoint_id: str) -> bool:
    """Say whether a delivery of a queue is still its head: a replay may have put an older one before it."""
    row = db.execute(
        "SELECT 1 FROM webhook_deliveries WHERE event = ? AND endpoint_id = ? AND status = 'pending'",
        (event, endpoint_id),
    ).fetchone()
    return row is not None


def _next_due(db: sqlite3.Connection, endpoint_id: str, now: float) -> float:
    """Return when the endpoint's first delivery after now is due; inf when there is none."""
    row = db.execute(
        """SELECT due_at FROM webhook_deliveries
            WHERE endpoint_id = ? AND status = 'pending' AND due_at > ? ORDER BY due_at LIMIT 1""",
        (endpoint_id, now),
    ).fetchone()
    return float(row[0]) if row else math.inf


# What was put off, or emitted, while the clock was far ahead. An event of the past that nobody tried is not among it:
# the host may have asked for a long delay.
_AHEAD = """ FROM webhook_endpoints AS p CROSS JOIN webhook_deliveries AS d ON d.endpoint_id = p.id
  LEFT JOIN webhook_events AS e ON e.seq = d.event
 WHERE (d.status = 'pending' OR d.queue IS NOT NULL AND d.status = 'queued')
   AND d.due_at > :latest AND (d.attempts > 0 OR e.created_at > :now)"""


def _pull_back(db: sqlite3.Connection, now: float, longest: float) -> None:
    """Make a try due now, and an event as it was meant, `longest` from now at most, that an earlier clock put later."""
    values = {"now": now, "longest": longest, "latest": now + longest}
    if db.execute(f"SELECT 1 {_AHEAD} LIMIT 1", values).fetchone():  # read first: an UPDATE locks while it looks
        db.execute(
            f"""UPDATE webhook_deliveries
                   SET due_at = :now + CASE WHEN attempts THEN 0.0 ELSE min(:longest, due_at -
                                (SELECT created_at FROM webhook_events WHERE seq = event)) END
                 WHERE (event, endpoint_id) IN (SELECT d.event, d.endpoint_id {_AHEAD})""",
            values,
        )


_RECORD_COLUMNS = "event, endpoint_id, status, due_at, at, duration, status_code, reason, error, response"
_NO_ROW = (None,) * 10
_BATCH, _MOST_ROWS = 1_536, 2_048  # outcomes, and rows, of one statement; SQLite takes 32,766 parameters
_BATCH_BUSY = 768  # outcomes of one statement while the host writes, which waits for them: 5 to 8 ms


@functools.lru_cache(maxsize=16)
def _record_sql(rows: int) -> str:
    return f"INSERT INTO webhook_record ({_RECORD_COLUMNS}) VALUES " + ", ".join([f"({', '.join('?' * 10)})"] * rows)


def _write_outcomes(db: sqlite3.Connection, rows: list[tuple[Any, ...]]) -> None:
    """Record outcomes in one autocommit statement. BEGIN ... COMMIT from Python would hand over the interpreter
    lock at each row with SQLite's write lock held: beside busy host threads that is tens of milliseconds.

    Rows are filled up to a power of two with rows that the triggers ignore, so that a dozen prepared statements serve
    all batches; json_each over one parameter costs a third more CPU.
    """
    size = 1 << (len(rows) - 1).bit_length()
    filled = rows + [_NO_ROW] * (size - len(rows))
    db.execute(_record_sql(size), list(itertools.chain.from_iterable(filled)))


_PRUNE_ROWS = 500


def _prune_some(db: sqlite3.Connection, after: int, cutoff: float) -> tuple[int, int | None]:
    """Delete finished events older than cutoff among the 500 that follow `after`; return how many, and where to go
    on (None: the end). Events with a failed row stay: somebody has to act on it."""
    seqs = db.execute(  # SQL compares, because a damaged row may hold text
        "SELECT seq, created_at < ? FROM webhook_events WHERE seq > ? ORDER BY seq LIMIT ?",
        (cutoff, after, _PRUNE_ROWS),
    ).fetchall()
    if not any(old for _, old in seqs):
        return 0, None
    cursor = db.execute(
        """DELETE FROM webhook_events
            WHERE seq BETWEEN ? AND ? AND created_at < ?
              AND NOT EXISTS (SELECT 1 FROM webhook_deliveries
                               WHERE event = seq
                                 AND (status IN ('pending', 'queued', 'failed') OR delivered_at >= ?))""",
        (seqs[0][0], seqs[-1][0], cutoff, cutoff),
    )
    return cursor.rowcount, seqs[-1][0] if len(seqs) == _PRUNE_ROWS else None


# ── drain ────────────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: one process per file drains; one loop in one thread owns the database connection and every decision, so
# order, rates, fair turns and breakers are plain state, exact by construction. Threads only open connections (and
# run what may block: transforms, secrets from files) and hand back a result.

_TOGETHER = 8  # requests that are sent one right after the other; more would leave receivers idle meanwhile
_OPENERS = 16  # connections being opened at once, in all
_OPENERS_EACH = 2  # and for one endpoint, so that those which cannot be reached do not fill the pool
_PROVEN = 600.0  # seconds since its last success in which an endpoint may use all places
_SHARES = 1.0, 0.5, 0.375  # of places and openers that endpoints of each rank may fill, and of the ranks after it
_FIRST_LIMIT = 8  # exchanges at once with an endpoint that nothing is known about
_UNOBSERVED = 1_000  # notices that may wait for the observer; more are dropped
_UNRECORDED = 2_000  # outcomes that may wait for the write lock before sending pauses
_TAKEOVER_POLL = 0.1  # seconds between two looks at a lock that another process holds
_HOST_BUSY = 0.5  # seconds since somebody else's commit in which the host counts as writing
_GAP_BUSY, _GAP_SENDING, _GAP_IDLE = 0.1, 0.01, 0.001  # seconds between two commits of ours
_GAP_SHARE = 110  # a commit that took a while is followed by a gap so many times as long, while the host writes
_BUCKETS = tuple(map(float, "0.01 0.05 0.1 0.5 1 5 30 60 300 3600 21600 86400 inf".split()))  # seconds, of metrics
_BUCKET_NAMES = tuple(f"le {bound:g}" for bound in _BUCKETS)
_PRUNE_PAUSE = 3_600.0  # seconds between two rounds of retention
_NOTICE_TYPES = {
    "gave_up": "webhook.delivery.failed",
    "failing": "webhook.endpoint.failing",
    "recovered": "webhook.endpoint.recovered",
    "disabled": "webhook.endpoint.disabled",
}


_NOTHING = memoryview(b"")


@dataclasses.dataclass(slots=True, eq=False)
class _Connection:
    """A connection to a receiver, idle in its lane or carrying one attempt. Only the loop touches it."""

    sock: socket.socket
    lane: _Lane
    wire: _Wire | None  # what it was opened for: not reused once the endpoint's row has changed
    attempt: _Attempt | None = None
    answer: _Answer = dataclasses.field(default_factory=_Answer)
    out: memoryview = _NOTHING  # what of the request is still to be sent
    writing: bool = False  # the selector watches for room to write
    used: bool = False  # carried an attempt before
    idle_since: float = 0.0  # monotonic


@dataclasses.dataclass(slots=True, eq=False)
class _Attempt:
    """One try under way. The loop owns it, except while a thread opens its connection."""

    lane: _Lane
    wire: _Wire | None  # of the endpoint's row as it was then: request and connection belong together
    picked: _Picked
    wall: float  # when it began, by the outbox's clock
    started: float  # the same, monotonic
    deadline: float  # monotonic
    request: bytes | None = None
    hidden: list[str] = dataclasses.field(default_factory=list)
    sock: socket.socket | None = None  # what the opener made
    error: BaseException | None = None  # why it made none
    connection: _Connection | None = None
    resent: bool = False  # its kept-alive connection turned out to be dead; this is the second, fresh one
    lost: bool = False  # its thread did not come back in time, and may never


class _Lane:
    """What the loop knows of one endpoint."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.wire: _Wire | None = None
        self.broken: BaseException | None = None  # why there is no wire: each attempt fails with it
        self.endpoint = Endpoint(id, "")
        self.enabled = True
        self.buffer: collections.deque[_Picked] = collections.deque()  # read, not yet tried
        self.known: set[int] = set()  # in buffer, under way, or waiting to be recorded
        self.idle: list[_Connection] = []
        self.active = 0  # attempts under way
        self.opening = 0  # of these: with a thread
        self.lost = 0  # threads in a transform, or at a file, that did not come back in time
        self.limit = float(_FIRST_LIMIT)  # exchanges at once; up by one on success, halved on overload
        self.next_due = 0.0  # wall clock: when reading the table makes sense again
        self.next_slot = 0.0  # monotonic: the rate limit's next place
        self.proven_until = 0.0  # monotonic
        self.failures = 0
        self.failing_since: float | None = None
        self.paused_until = 0.0  # wall clock
        self.hinted_until = 0.0  # wall clock: the part of it that Retry-After asked for
        self.dirty = False  # the four above differ from the endpoint's row
        self.disable: str | None = None
        self.line: collections.deque[_Lane] | None = None  # where it waits for its turn

    def configure(self, endpoint: Endpoint | str, secrets: Any, live: _Live, outbox: Outbox, opener: _Opener) -> None:
        """Take over what the endpoint's row says."""
        try:
            if isinstance(endpoint, str):
                raise _Unready("the endpoint's row is damaged; update or remove the endpoint")
            self.endpoint = endpoint
            self.wire, self.broken = _Wire.make(endpoint, secrets, outbox, opener), None
        except Exception as error:
            self.wire, self.broken = None, error
        self.limit = min(self.limit, self.endpoint.max_in_flight)
        if not self.dirty:
            self.failures, self.failing_since, self.paused_until = live
        if self.endpoint.rate:  # a predecessor may just have used the current place
            self.next_slot = min(self.next_slot or math.inf, time.monotonic() + 1 / self.endpoint.rate)

    def may_start(self, now: float, mono: float) -> bool:
        """Say whether one more attempt may start now, as far as this endpoint alone is concerned."""
        most = 1 if self.failures >= _STRUGGLING else int(self.limit)
        return (
            self.enabled
            and self.active < most
            and (bool(self.buffer) or self.next_due <= now)
            and self.paused_until <= now
            and (not self.endpoint.rate or self.next_slot <= mono)
            and (self.has_idle() or self.opening < _OPENERS_EACH)
        )

    def rank(self, mono: float) -> int:
        """Return 0 for an endpoint that answered lately, 1 where nothing is known and the first attempt will find out,
        2 for one that failed, or has not answered yet."""
        return 0 if self.proven_until > mono else 1 if self.failing_since is None and not self.active else 2

    def has_idle(self) -> bool:
        """Say whether an attempt could start without a thread."""
        return bool(self.idle) and not (self.wire and self.wire.slow)

    def take_slot(self, mono: float) -> None:
        if self.endpoint.rate:  # a late loop may catch up on 50 ms, so that the average is exact
            self.next_slot = max(self.next_slot, mono - 0.05) + 1 / self.endpoint.rate

    def learn(self, outcome: _Outcome, now: float, mono: float, policy: RetryPolicy) -> str | None:
        """Adapt to an outcome; return failing or recovered when that changed."""
        if outcome.disable:
            self.disable = (
                "410 Gone" if outcome.status_code == 410 else "the receiver asked for it (webhook-delivery: disable)"
            )
            self.enabled, self.dirty = False, True
        if outcome.reason is None:
            self.limit = min(self.limit + 1, self.endpoint.max_in_flight)
            self.proven_until = mono + _PROVEN
            recovered = self.failing_since is not None
            self.dirty |= recovered or self.failures > 0
            self.failures, self.failing_since = 0, None
            self.paused_until = min(self.paused_until, self.hinted_until)  # this answer may be older than the hint
            return "recovered" if recovered else None
        if outcome.overloaded or (outcome.status_code or 0) >= 500:
            self.limit = max(1.0, self.limit / 2)
        started = self.failing_since is None
        self.failures, self.dirty = self.failures + 1, True
        self.failing_since = now if self.failing_since is None else min(self.failing_since, now)
        self.hinted_until = max(self.hinted_until, now + (outcome.hint or 0.0))
        pause = max(outcome.hint or 0.0, policy.probe_pause(self.failures))
        self.paused_until = max(self.paused_until, now + pause) if pause else self.paused_until
        return "failing" if started else None


def _verdict(
    attempts: int,
    first_at: float,
    failing_since: float | None,
    outcome: _Outcome,
    policy: RetryPolicy,
    now: float,
    rng: Callable[[], float],
) -> tuple[str, float, str | None]:
    """Return status, due time and reason of a delivery after its `attempts`-th attempt (SPEC 4)."""
    if outcome.reason is None:
        return "delivered", now, None
    if outcome.reason in ("gone", "aborted"):
        return "failed", now, outcome.reason
    wait = policy.wait(attempts, outcome.overloaded, rng)
    if wait is None:
        return "failed", now, outcome.reason
    # Expired: the endpoint failed without a break for this delivery's whole window. Time alone expires nothing.
    if failing_since is not None and 0 < policy.window <= now - max(first_at, failing_since):
        return "failed", now, "expired"
    return "pending", now + max(wait, outcome.hint or 0.0), outcome.reason


class _Observing:
    """Calls the host's observer in a thread of its own, in order: one that blocks must not hold deliveries up."""

    def __init__(self, observer: Callable[[Notice], Any] | None) -> None:
        self._observer = observer
        self._notices: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def tell(self, notice: Notice) -> None:
        if self._notices.qsize() >= _UNOBSERVED:
            return _log.error("the observer is %d behind; it misses %s", _UNOBSERVED, notice)
        self._notices.put(notice)
        if self._thread is None:
            with contextlib.suppress(RuntimeError, OSError):  # no room for a thread: the next notice tries again
                self._thread = _start_thread(self._run, name="webhook_outbox observer")

    def _run(self) -> None:
        for notice in iter(self._notices.get, None):
            try:
                self._observer(notice)  # type: ignore[misc]
            except BaseException:  # its SystemExit ends neither this thread nor the process
                _log.exception("the observer failed")

    def close(self) -> None:
        """Let it see what it was told, for a second at most."""
        self._notices.put(None)
        if self._thread is not None:
            self._thread.join(1.0)


def _no_tally() -> dict[str, dict[str, float]]:
    return collections.defaultdict(lambda: collections.defaultdict(float))


class _Drain:
    """One run of the loop: stand by for the lock, then send until told to stop or nothing is left."""

    def __init__(
        self, outbox: Outbox, mode: str, progress: Callable[[DrainReport], Any] | None = None, share: _Share = _ALL
    ) -> None:
        self.outbox, self.mode, self.progress = outbox, mode, progress  # mode: forever, once, until_empty
        self.share = share
        self.pid = os.getpid()
        self.thread = 0  # that runs the loop
        self.forking = threading.Condition()  # guards the next two; its waiters are woken when one changes
        self.forks = 0  # threads that are forking now: close the file
        self.parked = False  # it is closed, and stays so until forks is 0
        self.lock = _Lock(outbox.path, share)
        self.opener = _Opener(outbox)
        self.db: sqlite3.Connection = None  # type: ignore[assignment]  # opened by run, in the loop's thread
        self.file: tuple[int, int] | None = None  # which db is open on
        self.selector = selectors.DefaultSelector()
        self.wake_in, self.wake_out = socket.socketpair()
        self.woken = False  # a byte is on its way: no need for another
        self.hand = threading.Lock()  # guards handed and closed; held for a few instructions
        self.handed: list[_Attempt] = []  # by threads, to the loop
        self.closed = False
        self.stopping = False
        self.stop_by = math.inf  # monotonic: when to leave attempts under way
        self.lanes: dict[str, _Lane] = {}
        # Endpoints that may start an attempt, a line for each rank; whose turn comes first. Who starts one goes to the
        # end. Standing here costs nothing, so a turn costs what it starts.
        self.lines: list[collections.deque[_Lane]] = [collections.deque() for _ in _SHARES]
        self.attempts: set[_Attempt] = set()
        self.unsent: list[_Connection] = []  # with a request that the end of this turn sends
        self.openers = 0
        self.outcomes: list[tuple[Any, ...]] = []  # rows for webhook_record
        self.dirty: dict[str, _Lane] = {}  # whose state is not in their rows yet; some may be disabled by now
        self.tally: dict[str, dict[str, float]] = _no_tally()  # per endpoint, for metrics; not written yet
        self.commits = 0.0  # of all drains that share the file, as far as we saw
        self.monitored = False  # an endpoint subscribes to webhook.*
        self.moved: set[str] = set()  # endpoints with a queue whose head ended
        self.observing = _Observing(outbox.observer)
        self.notices: list[Notice] = []  # for the observer, after the rows are recorded
        self.record_at = 0.0  # monotonic: not before
        self.storing = True  # False: the last write failed for another reason than a lock; send nothing until one works
        self.starved_until = 0.0  # monotonic: before it, no room for a thread or a connection
        self.delivered = self.retried = self.failed = 0
        self.data_version = self.endpoints_version = -1
        self.look = True  # somebody committed: read who has work
        self.host_wrote_at = self.lively_at = self.heard_at = -math.inf
        # Monotonic: when to look whether somebody committed, who has work, whose time has come, and so on.
        self.poll_at = self.look_at = self.sweep_at = self.chores_at = self.progress_at = self.prune_at = 0.0
        self.prune_from: int | None = None
        self.seen = math.inf  # wall clock at the last look; above now at the start and when the clock was set back

    # What other threads and signal handlers may call.

    def stop(self, grace: float) -> None:
        """Take no new work; leave when what is under way has ended, at the latest after `grace` seconds."""
        self.stop_by = time.monotonic() + grace
        self.stopping = True
        self.wake()

    def wake(self) -> None:
        if not self.woken:
            self.woken = True
            with contextlib.suppress(OSError):  # closed, or full, which wakes as well
                self.wake_in.send(b"\0")

    def park(self) -> None:
        """Before a fork: have the loop close its connection, so that the child inherits none of SQLite's notes."""
        with self.forking:
            self.forks += 1
            if threading.get_ident() == self.thread:  # forked by a callback of ours
                self._close_db()
            else:
                self.wake()
                self.forking.wait_for(lambda: self.parked, 5.0)

    def unpark(self) -> None:
        with self.forking:
            self.forks -= 1
            self.forking.notify_all()
            if self.forks:
                return
        if threading.get_ident() == self.thread:
            self._open_db()

    def _close_db(self) -> None:
        if self.db is not None:
            _close(self.db)

    def _open_db(self) -> None:
        self.file = _file_id(self.outbox.path)
        self.db = _open(self.outbox.path, patience=0.0)
        self.data_version, self.look = -1, True
        self._patiently(self._set_up_db)

    def _let_fork(self) -> None:
        """In the loop, when a thread of this process is about to fork."""
        self._close_db()
        with self.forking:
            self.parked = True
            self.forking.notify_all()
            self.forking.wait_for(lambda: not self.forks, 60.0)
            self.parked = False
        self._open_db()

    # The run.

    def run(self) -> DrainReport:
        """Drain until the mode's end, or stop()."""
        try:
            self.wake_in.setblocking(False)
            self.wake_out.setblocking(False)
            self.selector.register(self.wake_out, selectors.EVENT_READ)
            self.thread = threading.get_ident()
            with _FORK:
                _DRAINS.add(self)
                self._open_db()
            if self._await_lock():
                self._check_writable()
                self._loop()
            return self.report()
        finally:
            self._leave()

    def report(self) -> DrainReport:
        return DrainReport(self.delivered, self.retried, self.failed, self._patiently(self._count_pending))

    def _count_pending(self) -> int:
        rows = self.db.execute(
            """SELECT id, (SELECT count(*) FROM webhook_deliveries WHERE endpoint_id = id AND status = 'pending')
                        + (SELECT count(*) FROM webhook_deliveries
                            WHERE endpoint_id = id AND queue IS NOT NULL AND status = 'queued')
                 FROM webhook_endpoints WHERE enabled"""
        )
        return sum(count for id, count in rows.fetchall() if self.share.has(id))

    def _patiently(self, read: Callable[[], Any]) -> Any:
        """Read outside the loop's rhythm, where waiting for a lock is fine."""
        for _ in range(500):
            try:
                return read()
            except sqlite3.OperationalError as error:
                if not _is_busy(error):
                    raise
                time.sleep(0.01)
        return read()

    def _await_lock(self) -> bool:
        """Stand by until the lock is ours (True), or there is no reason to go on."""
        told = False
        while not self.stopping:
            if self.lock.acquire():
                return True
            if not told:
                _log.info("another drain has %s; standing by", self.outbox.path)
                told = True
            if self.mode != "forever" and not self._patiently(self._work_left):
                return False  # whoever drains has done it
            if self.selector.select(_TAKEOVER_POLL):
                self._hear()
            if self.forks:
                self._let_fork()
        return False

    def _work_left(self) -> bool:
        until = math.inf if self.mode == "until_empty" else self.outbox.clock()
        rows = self.db.execute("SELECT id FROM webhook_endpoints WHERE enabled AND paused_until <= ?", (until,))
        enabled = {row[0] for row in rows.fetchall()}
        return any(id in enabled and due_at <= until and self.share.has(id) for id, due_at in _earliest(self.db))

    def _set_up_db(self) -> None:
        (mode,) = self.db.execute("PRAGMA journal_mode").fetchone()
        if mode == "wal":  # losing the last outcomes in a power cut repeats deliveries, which P3 allows
            self.db.execute("PRAGMA synchronous = NORMAL")

    def _check_writable(self) -> None:
        """Find out before anything is sent whether outcomes can be recorded: a drain that cron starts every minute
        would otherwise send the same rows every minute while the disk is full."""
        try:
            self.db.execute(_TOUCH)  # what changes no page, BEGIN IMMEDIATE or setting a value to itself, does not tell
        except sqlite3.OperationalError as error:
            if not _is_busy(error):
                raise OutboxError(f"{self.outbox.path} cannot be written ({error}); nothing is sent") from None

    def _loop(self) -> None:
        while True:
            self._wait()
            if self.forks:
                self._let_fork()
            mono, now = time.monotonic(), self.outbox.clock()
            try:
                self._notice(mono)
                if not self.stopping:
                    self._start_attempts(now, mono)
                if mono >= self.chores_at:
                    self._chores(now, mono)
            except sqlite3.OperationalError as error:
                if not _is_busy(error):
                    raise
                self.look = True  # a rollback-mode host is committing: look again in a moment
            self._flush()
            self._record(time.monotonic())
            if self._finished(now):
                return

    def _finished(self, now: float) -> bool:
        # 1. told to stop, and everything that came back is recorded (or the grace is over)
        # 2. `once`: nothing under way, nothing unrecorded, no endpoint has something due that it may send
        # 3. `until_empty`: the same, and nothing pending for an enabled endpoint
        if self.stopping and time.monotonic() >= self.stop_by:
            return True
        if self.attempts or self.outcomes or self.dirty or self.handed:
            return False
        if self.stopping:
            return True
        if self.mode == "forever" or self.look or self.seen > now + 1.0:
            return False
        until = math.inf if self.mode == "until_empty" else now
        return not any(
            lane.enabled
            and (lane.buffer or lane.next_due <= now or lane.next_due < until)
            and (self.mode == "until_empty" or lane.paused_until <= now)
            for lane in self.lanes.values()
        )

    # Waiting and noticing.

    def _pause(self, mono: float) -> float:
        """Return the seconds until something may need doing."""
        quiet = mono - self.lively_at
        pause = 0.001 if quiet < 0.1 or self.look else 0.005 if quiet < 60 else 0.018
        if self.outcomes:
            pause = min(pause, max(0.0, self.record_at - mono))
        return pause

    def _wait(self) -> None:
        """Sleep until a socket has news or the next poll is due; handle the sockets."""
        mono = time.monotonic()
        pause = self._pause(mono)
        if not self.attempts and mono - self.heard_at < 0.005:  # emitted here a moment ago, so committed in a moment
            time.sleep(0.0002)  # the selector knows milliseconds only
            pause = 0.0
        for key, mask in self.selector.select(pause):
            connection: _Connection | None = key.data
            if connection is None:
                self._hear()
            elif connection.sock.fileno() < 0:
                continue  # idle, and closed by an earlier one of this round that disabled the endpoint
            elif mask & selectors.EVENT_WRITE and connection.out:
                self._send(connection)
            else:
                self._receive(connection)
        if self.handed:
            self._take_handed()

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.wake_out.recv(4096)
        self.woken = False  # after it: the byte of a wake in between would be gone, and all later ones suppressed
        self.heard_at = self.lively_at = time.monotonic()
        self.poll_at = 0.0

    def _notice(self, mono: float) -> None:
        """See what others committed: data_version moves for everybody's commits but our own."""
        if mono >= self.poll_at:
            self.poll_at = mono + (0.001 if self.attempts else 0.0)
            (version,) = self.db.execute("PRAGMA data_version").fetchone()
            if version != self.data_version:
                if self.data_version != -1 and not self._peer_wrote():
                    self.host_wrote_at = mono
                self.data_version, self.lively_at, self.look = version, mono, True
        if self.look and mono >= self.look_at:
            self.look, begun = False, time.thread_time()
            try:
                self._look()
            except BaseException:
                self.look = True
                raise
            # With a thousand endpoints a look takes milliseconds: a fifth of the time at most.
            self.look_at = time.monotonic() + 4 * (time.thread_time() - begun)

    def _host_writes(self, mono: float) -> bool:
        return mono - self.host_wrote_at < _HOST_BUSY

    def _peer_wrote(self) -> bool:
        """Say whether the drain of another share wrote since we looked last: it can wait, unlike a host."""
        if self.share.parts == 1:
            return False
        row = self.db.execute("SELECT value FROM webhook_counts WHERE endpoint_id = ''").fetchone()
        before, self.commits = self.commits, row[0] if row else 0.0
        return bool(self.commits != before)

    def _look(self) -> None:
        """Read which endpoints there are and which have work."""
        self.sweep_at = 0.0
        version = _meta(self.db, "endpoints_version")
        if version != self.endpoints_version:
            self._load_lanes()
            self.endpoints_version = version
        for id, due_at in _earliest(self.db):
            lane = self.lanes.get(id)
            if lane is not None:
                lane.next_due = min(lane.next_due, due_at)
            elif not self.share.has(id) or not id.isprintable():  # or written in SQL, no UTF-8: it cannot be asked for
                continue
            elif not self.db.execute("SELECT 1 FROM webhook_endpoints WHERE id = ?", (id,)).fetchone():
                self._give_up_orphans(id)

    def _load_lanes(self) -> None:
        rows = _load_endpoints(self.db)
        found = {row[0] if isinstance(row[0], str) else row[0].id: row for row in rows}
        found = {id: row for id, row in found.items() if self.share.has(id)}
        for id, leaving in self.dirty.items():
            if leaving.disable:  # our word is not in the row yet
                found.pop(id, None)
        for id, lane in list(self.lanes.items()):
            if id not in found:
                self._drop(lane)
        patterns = [pattern for row in rows if isinstance(row[0], Endpoint) for pattern in row[0].events]
        self.monitored = any(str(pattern).startswith("webhook.") for pattern in patterns)  # damaged: not text
        for id, row in found.items():
            old = self.lanes.get(id)
            lane = old or _Lane(id)
            if old is not None:  # all may have changed: connections, and what is due in which order
                self._close_idle(old, math.inf)
                old.known.difference_update(picked.event for picked in old.buffer)
                old.buffer.clear()
                old.next_due = 0.0
            lane.configure(*row, self.outbox, self.opener)
            if old is None:
                lane.known.update(attempt.picked.event for attempt in self.attempts if attempt.lane.id == id)
                lane.known.update(outcome[0] for outcome in self.outcomes if outcome[1] == id)
                self.lanes[id] = lane

    def _drop(self, lane: _Lane) -> None:
        """Forget a disabled or removed endpoint: what it has not tried stays in the table as it is."""
        lane.enabled = False
        lane.buffer.clear()
        self._close_idle(lane, math.inf)
        del self.lanes[lane.id]

    def _give_up_orphans(self, id: str) -> None:
        """Rows for an endpoint that does not exist (written in SQL, restored) go to the failed table."""
        now = self.outbox.clock()
        waiting = {row[0] for row in self.outcomes if row[1] == id}
        for picked in _pick(self.db, id, math.inf, waiting)[0]:
            self._add_row(
                picked.event, id, "failed", now, now, 0.0, _Outcome(None, "internal", "there is no such endpoint")
            )
            self.failed += 1
            self.look = True

    # Starting attempts.

    def _line_up(self, lane: _Lane, mono: float) -> None:
        """Have an endpoint wait for its turn, at the end, unless it does."""
        line = self.lines[lane.rank(mono)]
        if lane.line is not line:
            if lane.line is not None:
                lane.line.remove(lane)
            lane.line = line
            line.append(lane)

    def _sweep(self, now: float, mono: float) -> None:
        """Line up every endpoint whose time has come: retries, rate limits, pauses. Takes a twentieth of the time."""
        begun = time.thread_time()  # not of the wall: a host that computes keeps us waiting for the interpreter
        for lane in self.lanes.values():
            if lane.may_start(now, mono):
                self._line_up(lane, mono)
        self.sweep_at = time.monotonic() + max(0.002, 20 * (time.thread_time() - begun))

    def _start_attempts(self, now: float, mono: float) -> None:
        """Give each endpoint one attempt a turn until places, work or openers run out. Endpoints that have not answered
        lately get a share of places and openers only: those that hang would fill them all."""
        if not self.storing:
            return
        if mono >= self.sweep_at:
            self._sweep(now, mono)
        for rank in (1, 2, 0):  # proven ones fill what is left: first, they would leave nothing
            if self.lines[rank]:
                self._serve(rank, now, mono)

    def _serve(self, rank: int, now: float, mono: float) -> None:
        """Start attempts of the endpoints in the line of a rank, as far as its share goes."""
        line, share = self.lines[rank], _SHARES[rank]
        # What proven ones hold takes nothing from the share of the others, who would wait for the end of a backlog.
        proven = [attempt for attempt in self.attempts if attempt.lane.proven_until > mono] if rank else []
        most = min(self.outbox.workers, max(1, int(self.outbox.workers * share)) + len(proven))
        openers = min(_OPENERS, _OPENERS * share + sum(attempt.connection is None for attempt in proven))
        stuck = 0  # endpoints in a row that found no opener
        while stuck < min(len(line), 8) and len(self.attempts) < most and len(self.outcomes) < _UNRECORDED:
            lane = line.popleft()
            lane.line = None
            if not lane.may_start(now, mono):  # lined up before that changed; what changes it back lines it up again
                continue
            if not lane.has_idle() and (self.openers >= openers or self.starved_until > mono):
                lane.line = line
                if rank == 1:  # nobody in this line has a connection: the first goes on being the first
                    line.appendleft(lane)
                    return
                line.append(lane)
                stuck += 1
            elif self._start(lane, now, mono):
                stuck = 0
                if lane.may_start(now, mono):
                    self._line_up(lane, mono)

    def _start(self, lane: _Lane, now: float, mono: float) -> bool:
        """Start the endpoint's next attempt; False when it has nothing due."""
        if not lane.buffer:
            try:
                picked, complete = _pick(self.db, lane.id, now, lane.known)
            except sqlite3.Error as error:
                if _is_busy(error) or self.mode != "forever":
                    raise
                lane.paused_until = now + _LONGEST_PROBE  # a damaged page is not the others' fault
                _log.error("deliveries of endpoint %s cannot be read (%s)", lane.id, error)
                return False
            lane.buffer.extend(picked)
            lane.known.update(row.event for row in picked)
            lane.next_due = _next_due(self.db, lane.id, now) if complete else now
            if not picked:
                return False
        first = lane.buffer[0]
        if first.queue is not None and not _still_pending(self.db, first.event, lane.id):
            lane.known.discard(lane.buffer.popleft().event)
            return True  # an older one of its queue came back meanwhile
        lane.take_slot(mono)
        started = time.monotonic()
        deadline = started + (lane.endpoint.timeout or self.outbox.timeout)
        attempt = _Attempt(lane, lane.wire, lane.buffer.popleft(), now, started, deadline)
        self.attempts.add(attempt)
        lane.active += 1
        try:
            if lane.wire is None:
                raise lane.broken or _Unready("the endpoint is not configured")
            if lane.wire.slow:
                if lane.lost >= _OPENERS_EACH:
                    raise _Unready("its transform, or reading its secret, never ends; mend it, restart the drain")
                self._delegate(attempt, connect=not lane.idle)
                return True
            attempt.request, attempt.hidden = lane.wire.request(attempt.picked, now)
        except Exception as error:
            self._end(attempt, _failure(error))
            return True
        self._place(attempt)
        return True

    def _place(self, attempt: _Attempt) -> None:
        """Put an attempt whose request is ready onto an idle connection, or have one opened."""
        current = attempt.wire is attempt.lane.wire
        if attempt.lane.idle and attempt.request is not None and current and not attempt.resent:
            self._carry(attempt.lane.idle.pop(), attempt)
        else:
            self._delegate(attempt)

    def _delegate(self, attempt: _Attempt, connect: bool = True) -> None:
        """Hand what may block to a thread of its own. A pool would not survive a fork, and a stuck lookup would keep
        its place in it; starting a thread costs a tenth of opening a connection."""
        attempt.lane.opening += 1
        self.openers += 1
        try:
            _start_thread(self._open_for, attempt, attempt.wire, connect)
        except (RuntimeError, OSError) as error:
            self._undelegate(attempt)
            self._starve(attempt, error)

    def _starve(self, attempt: _Attempt, error: BaseException) -> None:
        """This process ran out of something: not the receiver's fault, so not an attempt. Open nothing for a second."""
        mono = time.monotonic()
        if "shutdown" in str(error):  # RuntimeError of an interpreter that is ending: no thread will ever start again
            self.stop(10.0)
        elif self.starved_until <= mono:
            _log.warning("no connection can be opened (%s: %s); trying again in 1 s", type(error).__name__, error)
        self.starved_until = mono + 1.0
        self._hand_back(attempt)

    def _undelegate(self, attempt: _Attempt) -> None:
        attempt.lane.opening -= 1
        self.openers -= 1
        self._line_up(attempt.lane, time.monotonic())

    def _hand_back(self, attempt: _Attempt) -> None:
        """Untried: it goes first again."""
        self.attempts.discard(attempt)
        attempt.lane.active -= 1
        lane = self.lanes.get(attempt.lane.id)
        if lane is attempt.lane:
            lane.buffer.appendleft(attempt.picked)
        elif lane is not None:
            lane.known.discard(attempt.picked.event)
            lane.next_due = 0.0

    def _open_for(self, attempt: _Attempt, wire: _Wire, connect: bool) -> None:
        """In a thread: make the request if that may block, open the connection, hand both back."""
        try:
            if attempt.request is None:
                attempt.request, attempt.hidden = wire.request(attempt.picked, attempt.wall)
            if connect:
                attempt.sock = self.opener.open(wire.prepared, wire.endpoint, attempt.deadline)
        except BaseException as error:
            attempt.error = error
        with self.hand:
            if not self.closed:
                self.handed.append(attempt)
            elif attempt.sock is not None:
                attempt.sock.close()
        self.wake()

    def _take_handed(self) -> None:
        with self.hand:
            handed, self.handed = self.handed, []
        for attempt in handed:
            if attempt.lost:
                attempt.lane.lost -= 1
            else:
                self._undelegate(attempt)
            late = attempt not in self.attempts  # its deadline passed meanwhile
            if attempt.error is not None:
                if late:
                    continue
                if attempt.request is not None and _is_exhaustion(attempt.error):  # and not of a transform's making
                    self._starve(attempt, attempt.error)
                else:
                    self._end(attempt, _failure(attempt.error, attempt.hidden))
                continue
            if attempt.sock is None:
                if not late:
                    self._place(attempt)
                continue
            connection = _Connection(attempt.sock, attempt.lane, attempt.wire)
            self.selector.register(connection.sock, selectors.EVENT_READ, connection)
            if late or self.stopping and not attempt.resent:
                self._shut(connection)
                if not late:
                    self._hand_back(attempt)
            else:
                self._carry(connection, attempt)

    # Exchanges.

    def _carry(self, connection: _Connection, attempt: _Attempt) -> None:
        connection.attempt, attempt.connection = attempt, connection
        connection.answer = _Answer()
        connection.out = memoryview(attempt.request or b"")
        self.unsent.append(connection)
        if len(self.unsent) >= _TOGETHER:
            self._flush()

    def _flush(self) -> None:
        """Send what was prepared, one right after the other: a receiver that is busy with the first is not woken for
        the second, and waking it costs more than the rest of send()."""
        unsent, self.unsent = self.unsent, []
        for connection in unsent:
            if connection.attempt is not None:
                self._send(connection)

    def _send(self, connection: _Connection) -> None:
        try:
            while connection.out:
                connection.out = connection.out[connection.sock.send(connection.out) :]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        except OSError as error:
            if not self._resend(connection):
                # An answer may have come before the receiver stopped reading: 413, say.
                self._receive(connection, error)
            return
        if connection.writing != bool(connection.out):
            connection.writing = bool(connection.out)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.writing else 0)
            self.selector.modify(connection.sock, events, connection)

    def _receive(self, connection: _Connection, failed: OSError | None = None) -> None:
        try:
            data = connection.sock.recv(65_536)
            while data and isinstance(connection.sock, ssl.SSLSocket) and connection.sock.pending():
                data += connection.sock.recv(65_536)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if failed is None:
                return
            data = b""
        except OSError as error:
            data, failed = b"", failed or error
        attempt = connection.attempt
        if attempt is None:  # idle: closed by the receiver, or it speaks out of turn
            connection.lane.idle.remove(connection)
            self._shut(connection)
        elif not data and self._resend(connection):
            pass
        elif not data and failed is not None and connection.answer.status is None:
            self._shut(connection)
            self._end(attempt, _failure(failed, attempt.hidden))
        else:
            if not data:
                connection.answer.end()
            if not data or connection.answer.feed(data):
                self._answered(connection, attempt)

    def _resend(self, connection: _Connection) -> bool:
        """A kept-alive connection that ends before a byte of the answer was most likely closed before our request
        came: try once more on a fresh one, as every HTTP client does. If it was not, the receiver gets a duplicate
        with the same id (P3)."""
        attempt = connection.attempt
        if (
            attempt is None
            or not connection.used
            or attempt.resent
            or connection.answer.buffer
            or connection.answer.status
        ):
            return False
        self._shut(connection)
        attempt.resent, attempt.connection = True, None
        self._delegate(attempt)
        return True

    def _answered(self, connection: _Connection, attempt: _Attempt) -> None:
        answer = connection.answer
        keep = answer.reusable and not connection.out and attempt.lane.enabled and not self.stopping
        keep = keep and connection.wire is attempt.lane.wire
        if keep:
            connection.attempt, connection.used = None, True
            connection.idle_since = time.monotonic()
            attempt.lane.idle.append(connection)
        else:
            self._shut(connection)
        self._end(attempt, _judge(answer, attempt.hidden, self.outbox.clock()))

    def _shut(self, connection: _Connection) -> None:
        connection.attempt = None
        self.selector.unregister(connection.sock)
        connection.sock.close()

    def _close_idle(self, lane: _Lane, before: float) -> None:
        for connection in [c for c in lane.idle if c.idle_since < before]:
            lane.idle.remove(connection)
            self._shut(connection)

    # Outcomes.

    def _end(self, attempt: _Attempt, outcome: _Outcome) -> None:
        """Decide what an attempt's outcome means for its delivery and its endpoint."""
        lane, picked, outbox = attempt.lane, attempt.picked, self.outbox
        was_enabled = lane.enabled
        self.attempts.discard(attempt)
        lane.active -= 1
        now, mono = outbox.clock(), time.monotonic()
        change = lane.learn(outcome, now, mono, outbox.retry)
        first_at = attempt.wall if picked.first_attempt_at is None else picked.first_attempt_at
        status, due_at, reason = _verdict(
            picked.attempts + 1, first_at, lane.failing_since, outcome, outbox.retry, now, outbox.rng
        )
        if picked.id is None or picked.valid != 1:  # a damaged row does not heal
            status = "failed"
        if reason is not outcome.reason:
            outcome = outcome._replace(reason=reason)
        self._add_row(picked.event, lane.id, status, due_at, attempt.wall, mono - attempt.started, outcome)
        if status == "failed" and lane.enabled and self._hopeless(lane, now):
            lane.disable, lane.enabled, lane.dirty = "no success for 5 days", False, True
        self._count(status, lane, picked, outcome, now)
        disabled = "disabled" if was_enabled and not lane.enabled else None
        told = outbox.observer is not None or _log.isEnabledFor(logging.DEBUG)
        if status != "delivered" or change or disabled or told:
            what = {"delivered": "delivered", "failed": "gave_up"}.get(status, "attempt_failed")
            self._tell([what, change, disabled], lane, picked, outcome, now)
        if lane.dirty:
            self.dirty[lane.id] = lane
        if lane.buffer or lane.next_due <= now:
            self._line_up(lane, mono)
        if picked.queue is not None or lane.endpoint.ordered:
            self.moved.add(lane.id)
        if not lane.enabled and self.lanes.get(lane.id) is lane:
            self._drop(lane)

    def _add_row(
        self, event: int, endpoint_id: str, status: str, due_at: float, at: float, duration: float, outcome: _Outcome
    ) -> None:
        if not self.outcomes:
            mono = time.monotonic()
            self.record_at = max(self.record_at, mono)
        answer = (outcome.status_code, outcome.reason, outcome.error, outcome.response)
        self.outcomes.append((event, endpoint_id, status, due_at, at, duration, *answer))

    def _hopeless(self, lane: _Lane, now: float) -> bool:
        """Say whether an endpoint has failed for so long and given up so much that it is to be disabled (SPEC 4)."""
        patience, most = _HOPELESS
        if lane.failing_since is None or now - lane.failing_since < patience:
            return False
        count = sum(row[1] == lane.id and row[2] == "failed" for row in self.outcomes)
        with contextlib.suppress(sqlite3.OperationalError):  # a host is committing: the next failed row asks again
            count += self.db.execute(
                "SELECT count(*) FROM webhook_failed WHERE endpoint_id = ? AND failed_at >= ?",
                (lane.id, lane.failing_since),
            ).fetchone()[0]
        return bool(count >= most)

    def _count(self, status: str, lane: _Lane, picked: _Picked, outcome: _Outcome, now: float) -> None:
        tally = self.tally[lane.id]
        if status == "delivered":
            self.delivered += 1
            took = now - picked.created_at
            tally["seconds"] += max(0.0, took)
            tally[_BUCKET_NAMES[bisect.bisect_left(_BUCKETS, took)]] += 1.0
            return
        tally[outcome.reason or ""] += 1.0
        if status == "failed":
            self.failed += 1
            tally["given up"] += 1.0
        else:
            self.retried += 1

    def _tell(self, kinds: list[str | None], lane: _Lane, picked: _Picked, outcome: _Outcome, now: float) -> None:
        """Log what happened; tell the observer, and who subscribes to webhook.* events."""
        extra = {"event": picked.id, "endpoint": lane.id, "attempt": picked.attempts + 1, "reason": outcome.reason}
        if outcome.reason is not None:
            gave_up = "gave_up" in kinds
            text = "%s to %s: %s (%s)" + ("; given up" if gave_up else "")
            level = logging.WARNING if gave_up else logging.INFO
            _log.log(level, text, picked.id, lane.id, outcome.error, outcome.reason, extra=extra)
        else:
            _log.debug("%s to %s: delivered", picked.id, lane.id, extra=extra)
        if "disabled" in kinds:
            _log.warning("endpoint %s is disabled: %s", lane.id, lane.disable, extra=extra)
        for kind in filter(None, kinds):
            notice = Notice(kind, lane.id, picked.id, outcome.reason, outcome.status_code, outcome.error)
            if self.outbox.observer is not None:
                self.notices.append(notice)
            # Events about deliveries of such events would go on for ever between two endpoints that fail now and then.
            if kind in _NOTICE_TYPES and self.monitored and not str(picked.type).startswith("webhook."):
                data = json.dumps(dataclasses.asdict(notice), default=repr)  # a damaged row may hold anything
                self.outcomes.append((None, None, _NOTICE_TYPES[kind], None, now, None, None, "notice", None, data))

    def _record(self, mono: float) -> None:
        """Write what came back, in one statement, within the commit budget: commits a second are what a host feels."""
        if not (self.outcomes or self.dirty) or mono < self.record_at:
            return
        begun = time.thread_time()
        try:
            batch = self._write(_BATCH_BUSY if self._host_writes(mono) else _BATCH)
        except sqlite3.Error as error:
            if not _is_busy(error):
                if self.storing:
                    _log.error("outcomes cannot be recorded (%s); sending pauses until they can", error)
                self.storing = False
                if self.stopping or self.mode != "forever":
                    raise
            # Our own short retries: SQLite's busy handler sleeps up to 100 ms and starves beside a busy host. A refused
            # try of a big batch costs milliseconds, so tries take at most a fifth of the time.
            pause = max(0.0005, 4 * (time.thread_time() - begun)) if self.storing else 1.0
            self.record_at = time.monotonic() + pause
            return
        self.storing = True
        self._recorded(batch, time.thread_time() - begun)

    def _write(self, most: int = _BATCH) -> list[tuple[Any, ...]]:
        """Write outcomes, and what was learned of their endpoints; return the outcomes written."""
        batch, lanes = self.outcomes[:most], list(self.dirty.values())[: _MOST_ROWS - _BATCH]
        if self.share.parts > 1:
            self.tally[""]["commits"] = 1.0
        states = [
            (None, a.id, None, a.paused_until, a.failing_since, a.failures, None, None, a.disable, None) for a in lanes
        ]
        tally = list(self.tally.items())[: _MOST_ROWS - len(batch) - len(states)]
        counts = [(None, None, id, *_NO_ROW[:4], "count", None, json.dumps(n)) for id, n in tally]
        _write_outcomes(self.db, batch + states + counts)
        del self.outcomes[: len(batch)]
        for lane in lanes:
            lane.dirty, lane.disable = False, None
            del self.dirty[lane.id]
        for id, _ in tally:
            self.commits += id == ""
            del self.tally[id]
        return batch

    def _recorded(self, batch: list[tuple[Any, ...]], took: float) -> None:
        """Our own commits do not move data_version: note here what they made due, and when the next may come. A host
        waits where it meets one; where it read before and writes after it, it is refused: about 1 % at most."""
        mono = time.monotonic()
        for event, id, status, due_at, *_ in batch:
            lane = self.lanes.get(id)
            if lane is not None:
                lane.known.discard(event)
                if status == "pending":
                    lane.next_due = min(lane.next_due, due_at)
        for id in self.moved & self.lanes.keys():  # a trigger made the next one of a queue pending
            self.lanes[id].next_due = 0.0
            self._line_up(self.lanes[id], mono)
        if not self.outcomes:
            self.moved.clear()
        if self.stopping or self.mode != "forever" and not self.attempts:
            gap = _GAP_IDLE
        elif self._host_writes(mono):
            gap = _GAP_BUSY + _GAP_SHARE * took
        else:
            gap = _GAP_SENDING if self.attempts else _GAP_IDLE
        self.record_at = mono + gap
        self.look |= any(row[1] is None for row in batch)  # our own webhook.* events
        for notice in self.notices:
            self.observing.tell(notice)
        self.notices = []

    # Chores, about forty times a second, ten while idle.

    def _chores(self, now: float, mono: float) -> None:
        self.chores_at = mono + (0.025 if self.attempts else 0.1)
        if _file_id(self.outbox.path) != self.file:  # a restore, say; what we know is not about the file there now
            self.outcomes, self.dirty, self.tally = [], {}, _no_tally()
            raise OutboxError(f"{self.outbox.path} was deleted or replaced while it was drained")
        if self.lock.lost():
            raise OutboxError(f"the lock file {self.lock.path} was deleted; leave it to the drain")
        for attempt in [a for a in self.attempts if a.deadline + (0 if a.connection else 0.25) <= mono]:
            if attempt.connection is not None:
                self._shut(attempt.connection)
            elif attempt.request is None:  # opening a connection ends in time, the host's own code need not
                attempt.lost, attempt.lane.lost = True, attempt.lane.lost + 1
                self._undelegate(attempt)
            waited = "for a connection" if attempt.connection is None else "for the answer"
            self._end(
                attempt,
                _Outcome(
                    reason="timeout", error=f"no time left after {mono - attempt.started:.1f} s, waiting {waited}"
                ),
            )
        for lane in self.lanes.values():
            if lane.idle:
                self._close_idle(lane, mono - _IDLE_CONNECTION)
        if self.progress is not None and mono >= self.progress_at:
            self.progress_at = mono + 0.25
            self.progress(self.report())
        idle = not self.outcomes and not self._host_writes(mono)
        if self.share.number == 1 and mono >= self.prune_at and idle:
            self._prune(now, mono)
        if self.seen > now + 1.0:
            if self.outcomes:  # whose due times may still be of the old time
                self.chores_at = mono
                return
            self._turn_back(now)
        self.seen = now

    def _turn_back(self, now: float) -> None:
        """The wall clock may have been years ahead: nothing is to wait until it gets there again."""
        longest = self.outbox.retry.longest
        _pull_back(self.db, now, longest)
        for lane in self.lanes.values():
            if lane.paused_until > now + longest:
                lane.paused_until = lane.hinted_until = 0.0
                lane.dirty, self.dirty[lane.id] = True, lane
        self.look = True

    def _prune(self, now: float, mono: float) -> None:
        self.prune_at = mono + 60.0  # should it fail: a full disk, a damaged page, which must not end the loop
        try:
            removed, self.prune_from = _prune_some(self.db, self.prune_from or 0, now - self.outbox.retention)
        except sqlite3.Error as error:
            _log.debug("pruning failed (%s), later again", error)
            return
        self.prune_at = mono + (_PRUNE_PAUSE if self.prune_from is None else 0.2 if removed else 0.02)

    # Leaving.

    def _leave(self) -> None:
        """Close everything, in the process that opened it. Deliveries that are not recorded stay pending."""
        with self.hand:
            self.closed = True
            left, self.handed = self.handed, []
        if os.getpid() != self.pid:
            return
        for attempt in left:
            if attempt.sock is not None:
                attempt.sock.close()
        for key in list(self.selector.get_map().values()):
            if key.data is not None:
                self._shut(key.data)
        if self.outcomes or self.dirty or self.tally:  # the grace ran out, say: what is known is not thrown away
            with contextlib.suppress(Exception):  # MemoryError too: the lock below must go whatever happens
                self.db.execute("PRAGMA busy_timeout = 1000")
                while self.outcomes or self.dirty or self.tally:
                    self._write()
        self.selector.close()
        self.wake_in.close()
        self.wake_out.close()
        self.lock.release()
        self._close_db()
        _DRAINS.discard(self)
        with self.forking:
            self.parked = True  # for good
            self.forking.notify_all()
        self.opener.close()
        self.observing.close()


# ── outbox ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: everything is checked before anything is written; each verb once, in the caller's transaction when `conn`
# is given, else in one of its own. Reads and writes tables; knows nothing of sockets.

_PATTERN = re.compile(r"\*|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(\.\*)?")
_EMIT = """INSERT INTO main.webhook_emit (type, data, key, idempotency_key, delay, headers, id, created_at, outbox)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"""


def _number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise PayloadError(f"{name} must be a number from {least:g} to {most:g}")
    return float(value)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if _number(name, value, least, most) != int(value):
        raise PayloadError(f"{name} must be a whole number")
    return int(value)


def _line(name: str, value: Any, most: int, least: int = 0) -> str:
    if not isinstance(value, str) or not least <= len(value) <= most or not all(c.isprintable() for c in value):
        raise PayloadError(f"{name} must be one line of printable text, {least} to {most} characters")
    return value


def _choice(name: str, value: Any, choices: Sequence[Any]) -> str:
    if value not in choices:
        raise PayloadError(f"{name} must be one of {', '.join(map(str, choices))}")
    return str(value)


def _new_id(now: float) -> str:
    """Return an event's id: random, sorted by time."""
    return f"msg_{int(now * 1000):012x}{secrets.token_hex(10)}"


def _checked_type(type: Any) -> str:
    if not isinstance(type, str) or len(type) > 256 or not _TYPE.fullmatch(type):
        raise PayloadError("the type is not valid: letters, digits, _ and - in parts joined by dots (order.created)")
    return type


def _checked_patterns(events: Any) -> list[str]:
    patterns = [events] if isinstance(events, str) else list(events) if isinstance(events, Iterable) else []
    if not patterns:
        raise PayloadError("events must hold at least one pattern; '*' means all")
    for pattern in patterns:
        if not isinstance(pattern, str) or len(pattern) > 256 or not _PATTERN.fullmatch(pattern):
            raise PayloadError("each of events must be a type (order.created), a group (order.*) or *")
    return list(dict.fromkeys(patterns))


def _checked_secret(secret: Any) -> str:
    """Return a secret as it is stored; strict, because a typo here shows only as failing signatures later."""
    if secret is None:
        return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode("ascii")
    if not isinstance(secret, str):
        raise PayloadError("secret must be text: whsec_ and base64, env:NAME or file:PATH")
    if re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*", secret) or re.fullmatch(r"file:[^\x00-\x1f]+", secret):
        return secret
    if not secret.startswith("whsec_"):
        raise PayloadError("secret must start with whsec_, env: or file:; leave it out to get a good one")
    _key(secret, 24, 64)
    return secret


def _checked_files(name: str, value: Any, most: int = 2) -> list[str]:
    paths = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else []
    if not 1 <= len(paths) <= most or not all(isinstance(path, str) for path in paths):
        raise PayloadError(f"{name} must be a path, or a pair of paths (certificate, key)")
    for path in paths:
        if not os.path.isfile(path):
            raise PayloadError(f"{name}: there is no file {path}")
    return paths


def _checked_data(data: Any) -> str:
    """Return data as JSON text that every receiver can parse and that will be sent as it is."""
    try:
        text = _dumps(data)
        text.encode()
    except UnicodeEncodeError:
        raise PayloadError("data holds half a surrogate pair, which is no Unicode text") from None
    except RecursionError:
        raise PayloadError("data is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise PayloadError(f"data is not plain JSON: {_one_line(str(error), 120)}") from None
    return text


def _path(database: str | os.PathLike[str]) -> str:
    path = os.fsdecode(os.fspath(database))
    if path in ("", ":memory:") or path.startswith("file:"):
        raise SchemaError("this needs the path of a file: a database in memory is one connection's own, and forgets")
    return os.path.realpath(path)


def _networks(networks: Iterable[str | _Network]) -> tuple[_Network, ...]:
    if isinstance(networks, str):
        networks = [networks]
    try:
        return tuple(ipaddress.ip_network(n) if isinstance(n, str) else n for n in networks)
    except ValueError as error:
        raise PayloadError(f"allow_networks must hold networks such as 10.1.0.0/16: {error}") from None


def _where(*terms: tuple[str, Any]) -> tuple[str, list[Any]]:
    """Return the conditions whose value is given, joined, and their values; '1' when there is none."""
    given = [(sql, value) for sql, value in terms if value is not None]
    values = [v for _, value in given for v in (value if isinstance(value, tuple) else (value,))]
    return " AND ".join(sql for sql, _ in given) or "1", values


class EmitOptions(TypedDict, total=False):
    """What aemit takes beside connection, type and data, as emit does."""

    key: str | None
    idempotency_key: str | None
    delay: float
    headers: Mapping[str, str] | None


class Filters(TypedDict, total=False):
    """What failed, replay and discard take to choose failed rows."""

    ids: Iterable[int] | None
    endpoint: str | None
    type: str | None  # a type, or a group: order.*
    reason: str | None
    since: float | None  # of failed_at, UTC seconds
    until: float | None


def _seconds_or_none(name: str, value: Any) -> float | None:
    """Return a time; text would compare greater than every number in SQLite, so `until` would mean everything."""
    return None if value is None else _number(name, value, -1e12, 1e12)


def _row_ids(ids: Any) -> str | None:
    if ids is None:
        return None
    found = [ids] if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable) else list(ids)
    if not all(type(id) is int for id in found) or not isinstance(ids, Iterable):
        raise PayloadError("ids must be a list of row numbers")
    return _dumps(found)


def _failed_where(
    *,
    ids: Iterable[int] | None = None,
    endpoint: str | None = None,
    type: str | None = None,
    reason: str | None = None,
    since: float | None = None,
    until: float | None = None,
) -> tuple[str, list[Any]]:
    if reason is not None:
        _choice("reason", reason, _REASONS)
    return _where(
        ("id IN (SELECT value FROM json_each(?))", _row_ids(ids)),
        ("endpoint_id = ?", endpoint),
        ("type GLOB ?", type),
        ("reason = ?", reason),
        ("failed_at >= ?", _seconds_or_none("since", since)),
        ("failed_at < ?", _seconds_or_none("until", until)),
    )


def _endpoint_stats(row: Sequence[Any], tried: Sequence[Sequence[Any]], now: float) -> EndpointStats:
    id, failed, enabled, failing_since, later, due, oldest = row
    good = sorted(duration for _, duration, reason, _ in tried if reason is None)
    p50, p95 = (good[len(good) * share // 100] if good else None for share in (50, 95))
    age = now - oldest if due else None
    error = next((error for _, _, reason, error in reversed(tried) if reason is not None), None)
    twelfths = collections.Counter(
        min(11, int((at - now + 3600) / 300)) for at, _, reason, _ in tried if reason is None
    )
    history = tuple(twelfths[n] for n in range(12))
    counts = failed, len(good), len(tried)
    return EndpointStats(id, bool(enabled), due + later, age, *counts, p50, p95, error, history, failing_since)


_GAUGES = (
    ("pending", "Deliveries that wait, held ones too.", "pending"),
    ("failed", "Rows of webhook_failed.", "failed"),
    ("oldest_due_age_seconds", "Age of the oldest due delivery.", "oldest_due_age"),
    ("enabled", "1 for an enabled endpoint.", "enabled"),
    ("failing_since_seconds", "UTC of the first failure in a row; 0: none.", "failing_since"),
)


def _family(name: str, kind: str, help: str, samples: Iterable[tuple[str, str, float]]) -> list[str]:
    """Return one metric in Prometheus' text format; samples are (suffix, labels, value)."""
    name = "webhook_outbox_" + name
    lines = [f"{name}{suffix}{{{labels}}} {value:.15g}" for suffix, labels, value in samples]
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}", *lines]


def _histogram(labels: str, counts: Mapping[str, float]) -> Iterator[tuple[str, str, float]]:
    total = 0.0
    for name in _BUCKET_NAMES:
        total += counts.get(name, 0.0)
        edge = name.removeprefix("le ").replace("inf", "+Inf")
        yield "_bucket", f'{labels},le="{edge}"', total
    yield "_sum", labels, counts.get("seconds", 0.0)
    yield "_count", labels, total


class Outbox:
    """The webhooks of one SQLite file.

    database: the app's file; its tables are made or upgraded here (`create=False`: only checked). retry: RetryPolicy.
    timeout, connect_timeout: seconds of wall clock an attempt, or its lookup and connect, may last. workers: attempts
    under way at once, in all. allow_networks: CIDR texts that may be reached although private, also over http.
    max_body: bytes. retention: seconds that delivered events are kept. proxy: http://host:port; the network guard then
    is the proxy's duty. app_name: put into User-Agent. transforms: name -> callable(Event) -> bytes or (bytes,
    content type), a pure function, for endpoints whose `body` names it. observer: called with each Notice, in order,
    after it was recorded, in a thread of its own; one that falls 1,000 notices behind misses some. clock, rng,
    resolver: seams for tests.

    Safe to share between threads. Holds no connection, but for a drain that runs.
    """

    def __init__(
        self,
        database: str | os.PathLike[str],
        *,
        create: bool = True,
        retry: RetryPolicy | None = None,
        timeout: float = 15.0,
        connect_timeout: float = 5.0,
        workers: int = 64,
        allow_networks: Iterable[str | _Network] = (),
        allow_http: bool = False,
        max_body: int = _MAX_BODY,
        retention: float = _RETENTION,
        proxy: str | None = None,
        app_name: str = "",
        transforms: Mapping[str, Callable[[Event], Any]] | None = None,
        observer: Callable[[Notice], Any] | None = None,
        clock: Callable[[], float] = time.time,
        rng: Callable[[], float] = random.random,
        resolver: _Resolver | None = None,
    ) -> None:
        if proxy is not None and not re.fullmatch(r"http://[^/\s]+/?", proxy):
            raise PayloadError("proxy must be http://host:port")
        self.path = _path(database)
        self.retry = retry or RetryPolicy()
        self.timeout = _number("timeout", timeout, 0.01, 3600)
        self.connect_timeout = _number("connect_timeout", connect_timeout, 0.01, 3600)
        self.workers = int(_number("workers", workers, 1, 10_000))
        self.max_body = int(_number("max_body", max_body, 1, 1 << 30))
        self.retention = _number("retention", retention, 0, 1e11)
        self.app_name = _line("app_name", app_name, 100)
        self.proxy, self.transforms, self.observer = proxy, {**_TRANSFORMS, **(transforms or {})}, observer
        self.clock, self.rng, self.resolver = clock, rng, resolver
        self._guard = _Guard(_networks(allow_networks), allow_http)
        self._identity = _prepare_file(self.path, create)
        self._forget_drains()
        _OUTBOXES.add(self)

    def _forget_drains(self) -> None:
        self._lock = threading.RLock()  # guards the three below; a signal handler may call stop while we hold it
        self._drains: set[_Drain] = set()  # running in this process
        self._thread: threading.Thread | None = None
        self._halt = threading.Event()

    def __repr__(self) -> str:
        return f"Outbox({self.path!r})"

    def __enter__(self) -> Outbox:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Events.

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Begin a transaction on a connection of its own; commit at the end, roll back when the block raises."""
        with _transaction(self.path) as db:
            yield db
        self._wake()

    def emit(
        self,
        conn: Any,
        type: str,
        data: Any,
        *,
        key: str | None = None,
        idempotency_key: str | None = None,
        delay: float = 0.0,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Record an event for every enabled endpoint whose patterns match, in the transaction open on conn.

        conn: a sqlite3 Connection or Cursor in any transaction mode, SQLAlchemy's Connection or Session (also the
        synchronous side of the async ones), Django's connection or its alias, peewee's Database, apsw's Connection.
        Returns the event's id. Nothing is sent before you commit, nothing if you roll back. key: events with the same
        key reach an endpoint in this order. idempotency_key: a second emit with it, and the same type and data, returns
        the first id. delay: seconds. headers: sent with the event (traceparent); not for credentials, which belong to
        endpoints.

        Raises PayloadError before anything is written, NotInTransaction, SchemaError (another file), TransactionLost
        when SQLite itself rolled your transaction back; sqlite3 errors such as "database is locked" pass through.
        """
        _checked_type(type)
        text = _checked_data(data)
        size = len(text.encode())
        if size > self.max_body:
            raise PayloadError(f"data is {size:,} bytes, the limit is {self.max_body:,}; send a link instead")
        if size > _WARN_BODY:
            _log.warning("%s carries %d bytes; receivers expect less than 20 KiB, consider sending a link", type, size)
        if key is not None:
            _line("key", key, 256, 1)
        if idempotency_key is not None:
            _line("idempotency_key", idempotency_key, 256, 1)
        delay = _number("delay", delay, 0, 1e9)
        header_text = _dumps(_checked_headers(headers)) if headers else None
        now = self.clock()
        id = _new_id(now)
        delay += self.retry.delays[0]
        row = (type, text, key, idempotency_key, delay, header_text, id, now, self._identity)
        if isinstance(conn, sqlite3.Connection):
            return self._insert(row, conn)
        return _in_its_thread(conn, functools.partial(self._insert, row))

    def _insert(self, row: tuple[Any, ...], conn: Any) -> str:
        db = _host(conn)
        cursor = _cursor(db)
        idempotency_key, id = row[3], row[6]
        with _host_errors(db, self.path):
            cursor.execute(_EMIT, row)
            if idempotency_key is not None:
                with _plain_text(db):
                    cursor.execute("SELECT id FROM main.webhook_events WHERE idempotency_key = ?", (idempotency_key,))
                    (id,) = cursor.fetchone()
        self._wake()
        return str(id)

    async def aemit(self, conn: Any, type: str, data: Any, **options: Unpack[EmitOptions]) -> str:
        """Emit on an aiosqlite Connection, or a SQLAlchemy AsyncSession or AsyncConnection on aiosqlite; as emit."""
        if hasattr(conn, "sync_session"):
            conn = await conn.connection()
        if hasattr(conn, "get_raw_connection"):
            conn = (await conn.get_raw_connection()).driver_connection
        if not hasattr(conn, "_execute"):
            raise PayloadError("aemit takes an aiosqlite Connection or SQLAlchemy's AsyncSession; others take emit")
        return str(await conn._execute(functools.partial(self.emit, conn._conn, type, data, **options)))

    # Endpoints.

    @contextlib.contextmanager
    def _writing(self, conn: Any) -> Iterator[sqlite3.Cursor]:
        """Yield a cursor in the caller's transaction, or in one of our own."""
        if conn is None:
            with _transaction(self.path) as db:
                yield sqlite3.Cursor(db)
        else:
            db = _host(conn)
            with _host_errors(db, self.path), _plain_text(db):
                cursor = _cursor(db)
                _check_identity(cursor, self._identity, self.path)
                yield cursor
        self._wake()

    @contextlib.contextmanager
    def _reading(self, conn: Any = None) -> Iterator[sqlite3.Cursor]:
        if conn is not None:
            db = _driver(conn)
            with _plain_text(db):
                yield _cursor(db)
        else:
            with _session(self.path) as db:
                yield sqlite3.Cursor(db)

    def _select(self, sql: str, *values: Any) -> list[Any]:
        with self._reading() as cursor:
            return cursor.execute(sql, values).fetchall()

    def _columns(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return checked column values for endpoint options."""
        bodies = (*_BODIES, *self.transforms)
        checks: dict[str, Callable[[Any], Any]] = {
            "url": lambda v: (_prepare_url(v, self._guard), v)[1],
            "events": lambda v: _dumps(_checked_patterns(v)),
            "description": lambda v: _line("description", v, 1000),
            "headers": lambda v: _dumps(_checked_headers(v)),
            "body": lambda v: _choice("body", v, bodies),
            "signing": lambda v: "+".join({_choice("signing", part, _SCHEMES): 0 for part in str(v).split("+")}),
            "rate": lambda v: None if v is None else _number("rate", v, 1e-6, 1e6),
            "max_in_flight": lambda v: _whole("max_in_flight", v, 1, 10_000),
            "ordered": lambda v: (_choice("ordered", v, (True, False)), int(v))[1],
            "on_dead": lambda v: _choice("on_dead", v, ("skip", "hold")),
            "timeout": lambda v: None if v is None else _number("timeout", v, 0.01, 3600),
            "cert": lambda v: None if v is None else _dumps(_checked_files("cert", v)),
            "ca": lambda v: None if v is None else _checked_files("ca", v, 1)[0],
        }
        unknown = sorted(set(options) - set(checks))
        if unknown:
            hint = "; use rotate_secret" if unknown == ["secret"] else ""
            raise PayloadError(f"endpoints have no option {', '.join(unknown)}{hint}; there are {', '.join(checks)}")
        return {name: checks[name](value) for name, value in options.items()}

    def add_endpoint(
        self,
        url: str,
        *,
        id: str | None = None,
        secret: str | None = None,
        conn: Any = None,
        **options: Unpack[EndpointOptions],
    ) -> Endpoint:
        """Register where events go; the returned Endpoint is one of two places that show the secret.

        events: types (order.created), groups (order.*) or *. secret: whsec_ and base64 of 24 to 64 bytes, generated
        when None; env:NAME and file:PATH are read at send time. headers: values may be env:NAME. body: standard,
        data, cloudevents, slack, discord or the name of a transform. signing: standard, stripe, github, joined by + to
        send several. rate: deliveries a second. on_dead: what a queue does when its head fails for good, skip or hold.
        timeout: seconds. cert, ca: paths, for mutual TLS and a private authority. Raises UnsafeURL, PayloadError.
        """
        columns = self._columns({**options, "url": url})
        if id is not None and not (isinstance(id, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", id)):
            raise PayloadError("id must be 1 to 64 letters, digits, _ and -")
        secret = _checked_secret(secret)
        id = id or "ep_" + secrets.token_hex(8)
        columns |= {"id": id, "secrets": _dumps([[secret, None]]), "created_at": self.clock()}
        with self._writing(conn) as cursor:
            names, marks = ", ".join(columns), ", ".join("?" * len(columns))
            try:
                statement = f"INSERT INTO main.webhook_endpoints ({names}) VALUES ({marks})"
                cursor.execute(statement, tuple(columns.values()))
            except sqlite3.IntegrityError:
                raise PayloadError(f"there is an endpoint {id} already; update it, or choose another id") from None
            return dataclasses.replace(self._endpoint_on(cursor, id), secret=secret)

    def _endpoint_on(self, cursor: sqlite3.Cursor, id: str) -> Endpoint:
        cursor.execute(f"SELECT {_ENDPOINT_COLUMNS} FROM main.webhook_endpoints WHERE id = ?", (id,))
        rows = cursor.fetchall()
        if not rows:
            raise NotFound(f"there is no endpoint {_one_line(str(id), 64)}; `endpoint list` shows those there are")
        return _endpoint(rows[0])

    def endpoint(self, id: str, *, conn: Any = None) -> Endpoint:
        """Return an endpoint; raise NotFound."""
        with self._reading(conn) as cursor:
            return self._endpoint_on(cursor, id)

    def endpoints(self, *, conn: Any = None) -> list[Endpoint]:
        """Return all endpoints, oldest first."""
        with self._reading(conn) as cursor:
            cursor.execute(f"SELECT {_ENDPOINT_COLUMNS} FROM main.webhook_endpoints ORDER BY created_at, id")
            return [_endpoint(row) for row in cursor.fetchall()]

    def _set(self, conn: Any, id: str, columns: Mapping[str, Any]) -> Endpoint:
        with self._writing(conn) as cursor:
            self._endpoint_on(cursor, id)
            if columns:
                changes = ", ".join(f"{name} = ?" for name in columns)
                cursor.execute(f"UPDATE main.webhook_endpoints SET {changes} WHERE id = ?", (*columns.values(), id))
            return self._endpoint_on(cursor, id)

    def update_endpoint(
        self, id: str, *, url: str | None = None, conn: Any = None, **changes: Unpack[EndpointOptions]
    ) -> Endpoint:
        """Change options of an endpoint, or its url, named as in add_endpoint; deliveries that wait follow them."""
        return self._set(conn, id, self._columns(changes if url is None else {**changes, "url": url}))

    def disable_endpoint(self, id: str, reason: str = "", *, conn: Any = None) -> Endpoint:
        """Hold an endpoint's deliveries. Events emitted meanwhile are recorded, and backfill can deliver them."""
        return self._set(conn, id, {"enabled": 0, "disabled_reason": _line("reason", reason, 1000)})

    def enable_endpoint(self, id: str, *, conn: Any = None) -> Endpoint:
        """Resume an endpoint's held deliveries, with its failures forgotten."""
        fresh = {"enabled": 1, "disabled_reason": "", "failures": 0, "failing_since": None, "paused_until": 0.0}
        return self._set(conn, id, fresh)

    def remove_endpoint(self, id: str, *, conn: Any = None) -> None:
        """Delete an endpoint with its waiting and failed deliveries. What was delivered stays on record."""
        if conn is None:  # what waits goes first, in batches, so that no commit of the host waits long
            self.disable_endpoint(id, "being removed")
            for waiting in ("queue IS NOT NULL AND status = 'queued'", "status = 'pending'"):
                batch = f"""DELETE FROM webhook_deliveries WHERE (event, endpoint_id) IN (
                              SELECT event, endpoint_id FROM webhook_deliveries
                               WHERE endpoint_id = ? AND {waiting} LIMIT 1000)"""
                while self._write_batch(batch, (id,)):
                    pass
        with self._writing(conn) as cursor:
            self._endpoint_on(cursor, id)
            cursor.execute("DELETE FROM main.webhook_endpoints WHERE id = ?", (id,))

    def _write_batch(self, statement: str, values: Sequence[Any], conn: Any = None) -> int:
        """Run one of several statements; return how many rows it changed. Then rest as long as it took: a host that
        waits in SQLite's busy handler looks only now and then whether the file is free."""
        started = time.monotonic()
        with self._writing(conn) as cursor:
            count = cursor.execute(statement, values).rowcount
        if conn is None:
            time.sleep(time.monotonic() - started)
        return count

    def rotate_secret(
        self, id: str, *, secret: str | None = None, grace: float = 86_400.0, conn: Any = None
    ) -> Endpoint:
        """Give an endpoint a new secret; for `grace` seconds requests carry signatures of the old ones too."""
        secret = _checked_secret(secret)
        until = self.clock() + _number("grace", grace, 0, 1e9)
        with self._writing(conn) as cursor:
            self._endpoint_on(cursor, id)
            old = [(s, min(end or until, until)) for s, end in self._secrets_on(cursor, id) if s != secret]
            valid = [(secret, None), *(pair for pair in old if pair[1] > self.clock())]
            cursor.execute("UPDATE main.webhook_endpoints SET secrets = ? WHERE id = ?", (_dumps(valid), id))
            return dataclasses.replace(self._endpoint_on(cursor, id), secret=secret)

    def _secrets_on(self, cursor: sqlite3.Cursor, id: str) -> _Secrets:
        cursor.execute("SELECT secrets FROM main.webhook_endpoints WHERE id = ?", (id,))
        return [(secret, until) for secret, until in json.loads(cursor.fetchall()[0][0])]

    def _secret(self, id: str) -> str:
        """Return an endpoint's current secret, for the command `endpoint secret`."""
        with self._reading() as cursor:
            self._endpoint_on(cursor, id)
            return self._secrets_on(cursor, id)[0][0]

    def ping(self, id: str) -> Attempt:
        """Send a signed webhook.ping to an endpoint at once, enabled or not, and return what happened."""
        with self._reading() as cursor:
            endpoint, endpoint_secrets = self._endpoint_on(cursor, id), self._secrets_on(cursor, id)
        now, started = self.clock(), time.monotonic()
        event_id = _new_id(now)
        picked = _Picked(0, 0, None, None, event_id, "webhook.ping", "{}", 1, None, None, now)
        opener, hidden = _Opener(self), list[str]()
        try:
            wire = _Wire.make(endpoint, endpoint_secrets, self, opener)
            request, hidden = wire.request(picked, now)
            deadline = started + (endpoint.timeout or self.timeout)
            with opener.open(wire.prepared, endpoint, deadline) as sock:
                outcome = _judge(_exchange(sock, request, deadline), hidden, now)
        except Exception as error:
            outcome = _failure(error, hidden)
        finally:
            opener.close()
        status, seconds = outcome.status_code, time.monotonic() - started
        return Attempt(event_id, id, now, status, outcome.reason, outcome.error, seconds, outcome.response)

    # Draining.

    @property
    def running(self) -> bool:
        """True while the background thread of this process drains or stands by."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def start(self) -> None:
        """Drain in a background thread, until stop(). Does nothing when it runs already.

        Every process of an app may call it: one drains, the others stand by and take over when it dies. Call it
        after forking (in a web server's worker), since threads do not survive a fork.
        """
        with self._lock:
            if self.running and not self._halt.is_set():  # one that is stopping does not count
                return
            self._halt = threading.Event()
            self._thread = _start_thread(self._background, self._halt, name="webhook_outbox")
        atexit.unregister(self._at_exit)
        atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        self.stop(1.0)

    def stop(self, timeout: float = 10.0) -> None:
        """Stop draining in this process: take no new work, let attempts under way end within `timeout` seconds,
        record what came back. What is not finished then is delivered again by the next drain."""
        with self._lock:
            self._halt.set()
            thread, drains = self._thread, list(self._drains)
        for drain in drains:
            drain.stop(timeout)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout + 5.0)
            with self._lock:
                if self._thread is thread and not thread.is_alive():
                    self._thread = None
            atexit.unregister(self._at_exit)

    def _background(self, halt: threading.Event) -> None:
        pause = 0.5
        while not halt.is_set():
            try:
                self._run(_Drain(self, "forever"), halt)
                return
            except Exception as error:
                pause = min(pause * 2, 30.0)
                _log.error("draining stopped (%s: %s); trying again in %g s", type(error).__name__, error, pause)
            halt.wait(pause)

    def _run(self, drain: _Drain, halt: threading.Event | None = None) -> DrainReport:
        with self._lock:
            self._drains.add(drain)
        try:
            if halt is not None and halt.is_set():
                drain.stop(0.0)
            return drain.run()
        finally:
            with self._lock:
                self._drains.discard(drain)

    def drain(
        self, *, once: bool = False, until_empty: bool = False, progress: Callable[[DrainReport], Any] | None = None
    ) -> DrainReport:
        """Drain in the calling thread: for ever; `once`: until nothing is due now; `until_empty`: until nothing is
        pending for enabled endpoints, retries included. stop() from another thread or a signal handler ends it.

        Where another process drains this file, wait for it: to take over, or until it has done the work. progress:
        called about four times a second with a DrainReport.
        """
        mode = "until_empty" if until_empty else "once" if once else "forever"
        return self._run(_Drain(self, mode, progress))

    def _wake(self) -> None:
        for drain in tuple(self._drains):
            drain.wake()

    # Failed rows.

    def failed(self, *, limit: int = 100, after: int | None = None, **filters: Unpack[Filters]) -> list[FailedDelivery]:
        """Return failed rows, oldest first. after: the id of the last row of the page before. Filters: ids, endpoint,
        type (or a group: order.*), reason, since and until (of failed_at)."""
        where, values = _failed_where(**filters)
        names = ", ".join(field.name for field in dataclasses.fields(FailedDelivery))
        sql = f"SELECT {names} FROM webhook_failed WHERE id > ? AND {where} ORDER BY id LIMIT ?"
        rows = self._select(sql, after or 0, *values, _whole("limit", limit, 0, 10**9))
        return [FailedDelivery(*row) for row in rows]

    def replay(self, *, all: bool = False, dry_run: bool = False, conn: Any = None, **filters: Unpack[Filters]) -> int:
        """Make failed rows pending again, with a fresh retry budget: same id, same body, the current secret.

        Filters as in failed(); all=True says that you mean every row. dry_run only counts. Without conn it works in
        batches, so that no commit of the host waits long. Returns how many.
        """
        return self._act_on_failed(
            """UPDATE main.webhook_deliveries
                  SET status = 'pending', attempts = 0, first_attempt_at = NULL, due_at = {now}
                WHERE status = 'failed' AND (event, endpoint_id) IN (
                  SELECT (SELECT seq FROM main.webhook_events WHERE id = event_id), endpoint_id
                    FROM main.webhook_failed WHERE id BETWEEN ? AND ? AND {where})""",
            all, dry_run, conn, filters,
        )  # fmt: skip

    def discard(self, *, all: bool = False, dry_run: bool = False, conn: Any = None, **filters: Unpack[Filters]) -> int:
        """Delete failed rows; their events are not delivered. Filters as in failed(). Returns how many."""
        statement = "DELETE FROM main.webhook_failed WHERE id BETWEEN ? AND ? AND {where}"
        return self._act_on_failed(statement, all, dry_run, conn, filters)

    def _act_on_failed(self, statement: str, all: bool, dry_run: bool, conn: Any, filters: Filters) -> int:
        where, values = _failed_where(**filters)
        if where == "1" and not all:
            raise PayloadError("say which failed rows: ids, endpoint, type, reason, since, until or --all (all=True)")
        statement = statement.format(where=where, now=repr(float(self.clock())))
        with self._reading(conn) as cursor:
            cursor.execute(f"SELECT count(*), max(id) FROM main.webhook_failed WHERE {where}", values)
            count, end = cursor.fetchone()
        if dry_run or not count:
            return int(count)
        done = last = 0
        while last < end:  # rows that fail again meanwhile are not for this call
            batch = f"SELECT id FROM main.webhook_failed WHERE id > ? AND {where} ORDER BY id LIMIT 1000"
            with self._reading(conn) as cursor:
                (upto,) = cursor.execute(f"SELECT max(id) FROM ({batch})", (last, *values)).fetchone()
            upto = min(end, upto or end)
            done += self._write_batch(statement, (last + 1, upto, *values), conn)
            last = upto
        return done

    def resend(self, event_id: str, *, endpoint: str | None = None, conn: Any = None) -> int:
        """Deliver a recorded event again, delivered or not: to each endpoint that had it, or to `endpoint`, which
        need not have had it. Returns to how many. Raises NotFound."""
        now = self.clock()
        with self._writing(conn) as cursor:
            seq = self._seq_on(cursor, event_id)
            if endpoint is not None:
                self._endpoint_on(cursor, endpoint)
                cursor.execute(
                    """INSERT OR IGNORE INTO main.webhook_deliveries (event, endpoint_id, due_at, queue)
                       SELECT e.seq, p.id, ?, CASE WHEN p.ordered THEN '' ELSE e.key END
                         FROM main.webhook_events AS e, main.webhook_endpoints AS p WHERE e.seq = ? AND p.id = ?""",
                    (now, seq, endpoint),
                )
            cursor.execute(
                """UPDATE main.webhook_deliveries
                      SET status = CASE WHEN status = 'queued' THEN status ELSE 'pending' END,
                          attempts = 0, first_attempt_at = NULL, due_at = ?, delivered_at = NULL,
                          queue = (SELECT CASE WHEN p.ordered THEN '' ELSE e.key END
                                     FROM main.webhook_events AS e, main.webhook_endpoints AS p
                                    WHERE e.seq = event AND p.id = endpoint_id)
                    WHERE event = ? AND endpoint_id IN (SELECT id FROM main.webhook_endpoints WHERE ? IN ('', id))""",
                (now, seq, endpoint or ""),
            )
            return cursor.rowcount

    def backfill(
        self,
        endpoint: str,
        *,
        since: float,
        until: float | None = None,
        type: str | None = None,
        dry_run: bool = False,
        conn: Any = None,
    ) -> int:
        """Give an endpoint the recorded events of a time that match it and that it has no delivery for: a new
        endpoint, or one that was disabled. since, until: UTC seconds of emission. Returns how many."""
        now = self.clock()
        source = """
              FROM main.webhook_events AS e, main.webhook_endpoints AS p
             WHERE p.id = ? AND e.created_at >= ? AND e.created_at < ? AND e.type GLOB ?
               AND EXISTS (SELECT 1 FROM json_each(p.events) AS one
                            WHERE e.type GLOB one.value AND (one.value <> '*' OR e.type NOT GLOB 'webhook.*'))
               AND NOT EXISTS (SELECT 1 FROM main.webhook_deliveries WHERE event = e.seq AND endpoint_id = p.id)"""
        since = _number("since", since, -1e12, 1e12)
        values = (endpoint, since, math.inf if until is None else _seconds_or_none("until", until), type or "*")
        with self._reading(conn) as cursor:
            self._endpoint_on(cursor, endpoint)
            if dry_run:
                return int(cursor.execute("SELECT count(*)" + source, values).fetchone()[0])
            end = cursor.execute("SELECT max(seq) FROM main.webhook_events").fetchone()[0] or 0
        statement = f"""INSERT INTO main.webhook_deliveries (event, endpoint_id, due_at, queue)
                        SELECT e.seq, p.id, {now!r}, CASE WHEN p.ordered THEN '' ELSE e.key END {source}
                           AND e.seq BETWEEN ? AND ? ORDER BY e.seq"""
        step = 2_000 if conn is None else end  # in the caller's transaction there is nothing to be gained
        return sum(self._write_batch(statement, (*values, n, n + step - 1), conn) for n in range(1, end + 1, step or 1))

    # The record.

    def _seq_on(self, cursor: sqlite3.Cursor, event_id: str) -> int:
        cursor.execute("SELECT seq FROM main.webhook_events WHERE id = ?", (event_id,))
        row = cursor.fetchone()
        if row is None:
            raise NotFound(f"there is no event {_one_line(str(event_id), 64)}; it may have been pruned")
        return int(row[0])

    def event(self, id: str) -> Event:
        """Return an event with its deliveries; raise NotFound."""
        found = self.events(ids=[id])
        if not found:
            raise NotFound(f"there is no event {_one_line(str(id), 64)}; it may have been pruned")
        return dataclasses.replace(found[0], deliveries=tuple(self.deliveries(event_id=id, limit=10_000)))

    def events(
        self,
        *,
        ids: Iterable[str] | None = None,
        type: str | None = None,
        since: float | None = None,
        until: float | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> list[Event]:
        """Return events without their deliveries, newest first. after: the id of the last one of the page before."""
        where, values = _where(
            ("id IN (SELECT value FROM json_each(?))", None if ids is None else _dumps(list(ids))),
            ("type GLOB ?", type),
            ("created_at >= ?", _seconds_or_none("since", since)),
            ("created_at < ?", _seconds_or_none("until", until)),
            ("seq < (SELECT seq FROM webhook_events WHERE id = ?)", after),
        )
        sql = f"SELECT id, type, data, key, created_at FROM webhook_events WHERE {where} ORDER BY seq DESC LIMIT ?"
        rows = self._select(sql, *values, _whole("limit", limit, 0, 10**9))
        return [Event(id, type, json.loads(data), key, at) for id, type, data, key, at in rows]

    def deliveries(
        self,
        *,
        event_id: str | None = None,
        endpoint: str | None = None,
        type: str | None = None,
        status: str | None = None,
        since: float | None = None,
        until: float | None = None,
        limit: int = 100,
        after: tuple[str, str] | None = None,
    ) -> list[Delivery]:
        """Return deliveries, newest event first. status: pending, held, delivered or failed. since, until: of the
        event's emission. after: (event_id, endpoint_id) of the last one of the page before."""
        public = """CASE WHEN d.status IN ('pending', 'queued')
                         THEN CASE WHEN p.enabled = 0 THEN 'held' ELSE 'pending' END
                         WHEN d.status = 'discarded' THEN 'failed' ELSE d.status END"""
        if status is not None:
            _choice("status", status, ("pending", "held", "delivered", "failed"))
        if after is not None and not (isinstance(after, tuple) and len(after) == 2):
            raise PayloadError("after must be (event_id, endpoint_id) of the last delivery of the page before")
        where, values = _where(
            ("e.id = ?", event_id),
            ("d.endpoint_id = ?", endpoint),
            ("e.type GLOB ?", type),
            (f"{public} = ?", status),
            ("e.created_at >= ?", _seconds_or_none("since", since)),
            ("e.created_at < ?", _seconds_or_none("until", until)),
            ("(d.event, d.endpoint_id) < ((SELECT seq FROM webhook_events WHERE id = ?), ?)", after),
        )
        sql = f"""SELECT e.id, d.endpoint_id, {public}, d.attempts, d.due_at, d.delivered_at
                    FROM webhook_deliveries AS d JOIN webhook_events AS e ON e.seq = d.event
                    LEFT JOIN webhook_endpoints AS p ON p.id = d.endpoint_id
                   WHERE {where} ORDER BY d.event DESC, d.endpoint_id DESC LIMIT ?"""
        return [Delivery(*row) for row in self._select(sql, *values, _whole("limit", limit, 0, 10**9))]

    def attempts(self, event_id: str, endpoint: str | None = None) -> list[Attempt]:
        """Return what was tried for an event, oldest first."""
        with self._reading() as cursor:
            seq = self._seq_on(cursor, event_id)
        sql = """SELECT ?, endpoint_id, at, status_code, reason, error, duration, response FROM webhook_attempts
                  WHERE event = ? AND ? IN ('', endpoint_id) ORDER BY id"""
        return [Attempt(*row) for row in self._select(sql, event_id, seq, endpoint or "")]

    def stats(self) -> Stats:
        """Return the outbox's numbers. Reads indexes, so it is quick beside a large backlog."""
        now = self.clock()
        tried: dict[str, list[Any]] = collections.defaultdict(list)
        with self._reading() as cursor:
            cursor.execute(
                """SELECT p.id, (SELECT count(*) FROM webhook_failed WHERE endpoint_id = p.id),
                          p.enabled, p.failing_since,
                          (SELECT count(*) FROM webhook_deliveries
                            WHERE endpoint_id = p.id AND status = 'pending' AND due_at > :now) +
                          (SELECT count(*) FROM webhook_deliveries
                            WHERE endpoint_id = p.id AND queue IS NOT NULL AND status = 'queued'),
                          (SELECT count(*) FROM webhook_deliveries
                            WHERE endpoint_id = p.id AND status = 'pending' AND due_at <= :now),
                          (SELECT due_at FROM webhook_deliveries
                            WHERE endpoint_id = p.id AND status = 'pending' ORDER BY due_at LIMIT 1)
                     FROM webhook_endpoints AS p ORDER BY p.created_at, p.id""",
                {"now": now},
            )
            rows = cursor.fetchall()
            attempts = """SELECT endpoint_id, at, duration, reason, error FROM
                            (SELECT * FROM webhook_attempts ORDER BY id DESC LIMIT 20000) WHERE at >= ? ORDER BY id"""
            for id, *attempt in cursor.execute(attempts, (now - 3600.0,)):
                tried[id].append(attempt)
            (failed,) = cursor.execute("SELECT count(*) FROM webhook_failed").fetchone()
        endpoints = tuple(_endpoint_stats(row, tried[row[0]], now) for row in rows)
        enabled = [e for e in endpoints if e.enabled]
        return Stats(
            pending=sum(e.pending for e in enabled),
            due=sum(due for _, _, on, _, _, due, _ in rows if on),
            held=sum(e.pending for e in endpoints if not e.enabled),
            failed=failed,
            oldest_due_age=max((e.oldest_due_age for e in enabled if e.oldest_due_age is not None), default=None),
            endpoints=endpoints,
        )

    def metrics(self) -> str:
        """Return the numbers in Prometheus' text format. Counters and the histogram (seconds from emit to 2xx) are
        kept in the file, so they survive restarts; several processes show the same."""
        counts: dict[str, dict[str, float]] = {}
        for id, name, value in self._select("SELECT endpoint_id, name, value FROM webhook_counts"):
            counts.setdefault(id, {})[name] = value
        lines = []
        attempts, given_up, seconds = (list[tuple[str, str, float]]() for _ in range(3))
        endpoints = [(f'endpoint="{e.id}"', e) for e in self.stats().endpoints]
        for name, help, field in _GAUGES:
            lines += _family(name, "gauge", help, (("", labels, getattr(e, field) or 0) for labels, e in endpoints))
        for labels, endpoint in endpoints:
            of = counts.get(endpoint.id, {})
            of["delivered"] = sum(of.get(name, 0.0) for name in _BUCKET_NAMES)
            attempts += [("", f'{labels},result="{name}"', of[name]) for name in ("delivered", *_REASONS) if name in of]
            given_up.append(("", labels, of.get("given up", 0)))
            seconds += _histogram(labels, of)
        lines += _family("attempts_total", "counter", "Attempts by result: delivered, or why not.", attempts)
        lines += _family("given_up_total", "counter", "Deliveries that went to webhook_failed.", given_up)
        lines += _family("delivery_seconds", "histogram", "Seconds from emit to 2xx.", seconds)
        return "\n".join(lines) + "\n"

    def prune(self, older_than: float | None = None) -> int:
        """Delete events, with their deliveries and attempts, that were finished longer than `older_than` seconds ago
        (None: the retention). Events with failed rows stay. A drain does this by itself. Returns how many."""
        age = self.retention if older_than is None else _number("older_than", older_than, 0, 1e11)
        cutoff = self.clock() - age
        removed = 0
        position: int | None = 0
        with _session(self.path) as db:
            while position is not None:
                count, position = _prune_some(db, position, cutoff)
                removed += count
                time.sleep(0.002)  # let the host in
        return removed


# ── receiving ────────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: the receiver's half. verify stands under signing; this remembers which events were handled.


class Inbox:
    """Remembers received event ids in the receiver's own SQLite file, so that duplicates are harmless.

        event = verify(request_body, request_headers, secret)
        with conn:                                # your transaction
            if inbox.accept(conn, event.id):
                ...                               # your writes, committed together with the id

    Ids are kept for ever unless you call prune: a failed row may be replayed after months.
    """

    def __init__(self, database: str | os.PathLike[str]) -> None:
        self._path = _path(database)
        self._identity = _prepare_file(self._path, create=True)
        self._warned = False

    def accept(self, conn: Any, event_id: str) -> bool:
        """Return True the first time an id is seen, in the transaction open on conn; False for a duplicate.

        A handler that fails and rolls back leaves no trace, so the event may come again. Answer 2xx after your
        commit, not before; with PRAGMA synchronous below FULL a power cut may undo that commit, and a warning says so.
        """
        _line("event_id", event_id, 256, 1)
        db = _host(conn)
        cursor = _cursor(db)
        with _host_errors(db, self._path):
            # The write comes first: a transaction that has read does not wait for another writer, it fails at once.
            cursor.execute(
                """INSERT OR IGNORE INTO main.webhook_inbox
                   SELECT ?, ? FROM main.webhook_meta WHERE key = 'outbox' AND value = ?""",
                (event_id, time.time(), self._identity),
            )
            first = cursor.rowcount == 1
            _check_identity(cursor, self._identity, self._path)
            cursor.execute("PRAGMA main.synchronous")  # reads it
            (level,) = cursor.fetchone()
        if int(level) < 2 and not self._warned:
            self._warned = True
            _log.warning("PRAGMA synchronous is below FULL: a power cut can lose an event after you answered 200")
        return first

    def prune(self, older_than: float) -> int:
        """Forget ids received more than `older_than` seconds ago; return how many."""
        with _session(self._path) as db:
            return db.execute("DELETE FROM webhook_inbox WHERE received_at < ?", (time.time() - older_than,)).rowcount


# ── doctor ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: says in plain words what is wrong with a file and its machine, and what to do; repairs nothing. Looks from
# outside: what the app's own connections set, PRAGMA synchronous for one, cannot be seen from here.

_WAL_RESET_FIXED = ((3, 51, 3), (3, 50, 7), (3, 44, 6))  # sqlite.org/wal.html#walresetbug; the last two are backports
_NETWORK_FILE_SYSTEM = re.compile(r"nfs|cifs|smb|afs|ceph|9p$|lustre|gluster|fuse\.(sshfs|s3|rclone|gcs|gluster|ceph)")
_LONG_WAL = 4_000  # pages that SQLite could not move into the file; it tries after 1,000
_BEHIND = 600.0  # seconds
_MOST_CHECKED = 1 << 28  # bytes; in rollback mode the search keeps writers waiting


class _Finding(NamedTuple):
    level: str  # problem, or note
    text: str


_problem = functools.partial(_Finding, "problem")
_note = functools.partial(_Finding, "note")


def _file_system(path: str) -> str:
    """Return the type of the file system that holds a path; '' where /proc does not tell."""
    found, longest = "", 0
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            mount, kind = line.split()[4].replace("\\040", " "), line.partition(" - ")[2].split()[0]
            if os.path.commonpath([path, mount]) == mount and len(mount) >= longest:
                found, longest = kind, len(mount)
    return found


def _wal_reset_bug(version: tuple[int, ...]) -> bool:
    newest, *backports = _WAL_RESET_FIXED
    return version < newest and not any(version[:2] == fixed[:2] and version >= fixed for fixed in backports)


def _look_at_file(path: str, db: sqlite3.Connection) -> Iterator[_Finding]:
    (journal,) = db.execute("PRAGMA journal_mode").fetchone()
    (synchronous,) = db.execute("PRAGMA synchronous").fetchone()
    if os.stat(path).st_size > _MOST_CHECKED:
        yield _note("too large to search for damage beside a live app; run PRAGMA quick_check on a copy")
    elif (damage := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        yield _problem(f"the file is damaged ({_one_line(damage, 120)}); restore a backup, or try sqlite3's .recover")
    if journal != "wal":
        yield _problem(f"not WAL but journal_mode {journal}: readers and writers wait for each other; use `init --wal`")
    if synchronous < 2:
        yield _problem("synchronous is below FULL by default here: a power cut loses commits; have the app set FULL")
    if journal == "wal" and _wal_reset_bug(sqlite3.sqlite_version_info):
        bug = "has the WAL-reset bug: beside the app a drain writes, which may, very rarely, damage the file"
        yield _note(f"SQLite {sqlite3.sqlite_version} {bug}; upgrade SQLite to 3.51.3")
    if journal == "wal":
        _, pages, moved = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if pages - moved > _LONG_WAL:
            kept = f"a reader that stays open keeps {pages - moved:,} pages in {path}-wal, which grows"
            yield _problem(f"{kept}: find a connection with a half-read cursor or a transaction that never ends")
    kind = _file_system(path)
    if _NETWORK_FILE_SYSTEM.match(kind):
        yield _problem(f"on {kind}, a network file system: SQLite's locks fail there; move the file to a local disk")


def _look_at_owners(path: str) -> Iterator[_Finding]:
    owner = os.stat(path).st_uid
    for suffix in ("-wal", "-shm", "-journal", "-webhooks"):
        with contextlib.suppress(OSError):
            other = os.stat(path + suffix).st_uid
            if other != owner:
                theirs = f"{path}{suffix} belongs to user {other}, the file to {owner}"
                yield _problem(f"{theirs}: run app and drain as one user, and hand it over with chown")
    if not os.access(os.path.dirname(path), os.W_OK):
        yield _problem(f"the folder of {path} cannot be written: it must hold the journal and the drain's lock")


def _look_at_drain(outbox: Outbox, stats: Stats) -> Iterator[_Finding]:
    lock, drained = _Lock(outbox.path), False
    try:
        drained = os.path.exists(lock.path) and not lock.acquire()
    except OutboxError as error:
        yield _problem(f"{error}; no drain can start")
    finally:
        lock.release()
    oldest = stats.oldest_due_age or 0.0
    if stats.due and not drained:
        yield _problem(f"{stats.due} deliveries are due and nobody drains; call outbox.start(), or run `drain`")
    elif drained and oldest > _BEHIND:
        yield _problem(f"the oldest due delivery has waited {_age(oldest)}; `status` shows for whom")


def _look_at_clock(now: float, db: sqlite3.Connection) -> Iterator[_Finding]:
    (newest,) = db.execute(
        """SELECT max(coalesce((SELECT created_at FROM webhook_events ORDER BY seq DESC LIMIT 1), 0),
                      coalesce((SELECT at FROM webhook_attempts ORDER BY id DESC LIMIT 1), 0))"""
    ).fetchone()
    if newest > now + 60:
        yield _problem(f"the clock says {_moment(now)}, the file knows of {_moment(newest)}: set the clock")
    elif now < 1_750_000_000:
        yield _problem(f"the clock says {_moment(now)}: signatures made now are refused; set the clock")


def _look_at_endpoints(outbox: Outbox, stats: Stats, db: sqlite3.Connection) -> Iterator[_Finding]:
    rows = {e.id: e for e in outbox.endpoints()}
    for e in stats.endpoints:
        if not e.enabled and e.pending:
            why = rows[e.id].disabled_reason or "by hand"
            yield _problem(f"{e.id} is disabled ({why}) and {e.pending} deliveries are held; `endpoint enable {e.id}`")
        if e.enabled and e.failing_since is not None:
            yield _problem(f"{e.id} fails since {_moment(e.failing_since)}: {e.last_error or 'see `events show`'}")
    if stats.failed:
        yield _note(f"{stats.failed} failed rows wait for somebody: `failed list`, then replay or discard")
    if not stats.endpoints:
        yield _note("there are no endpoints: events are recorded and go nowhere; `endpoint add URL`")
    with contextlib.closing(_Opener(outbox)) as opener:
        for endpoint, secrets, _ in _load_endpoints(db):
            id = endpoint if isinstance(endpoint, str) else endpoint.id
            try:
                if isinstance(endpoint, str):
                    raise _Unready("its row is damaged; update or remove it")
                wire = _Wire.make(endpoint, secrets, outbox, opener)
                wire.keys(outbox.clock())
                wire.own_headers()
                if endpoint.url.startswith("https:"):
                    opener._context(endpoint, False)
            except Exception as error:
                yield _problem(f"{id} cannot be sent to from here: {_one_line(str(error))}")


def _findings(outbox: Outbox) -> Iterator[_Finding]:
    """Look everywhere; what is damaged so that a look fails is a finding too."""
    with _session(outbox.path) as db:
        try:
            yield from _look_at_file(outbox.path, db)
            yield from _look_at_owners(outbox.path)
            yield from _look_at_clock(outbox.clock(), db)
            stats = outbox.stats()
            yield from _look_at_drain(outbox, stats)
            yield from _look_at_endpoints(outbox, stats, db)
        except (sqlite3.Error, ValueError) as error:
            yield _problem(f"the file cannot be read to the end: {_one_line(str(error))}; restore a backup")


# ── dashboard ────────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: pages without script or foreign asset. GET only reads; a POST counts only if a form of ours sent it. What
# receivers and events say is escaped by _fill, which lets nothing but _Html through. No secret, header value or query.

_LONGEST_FORM = 16_384  # bytes
_ON_A_PAGE = 25  # failed rows
_STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --text: #1a1e26; --soft: #566072; --line: #dde1e8;
  --link: #0b57d0; --bar: #4c8df6; --good: #0b6138; --good-back: #dcf3e6; --bad: #a01c16; --bad-back: #fde5e3 }
@media (prefers-color-scheme: dark) { :root { --page: #0f1217; --card: #181c23; --text: #e7eaf0; --soft: #9da8ba;
  --line: #2c323d; --link: #8ab4f8; --bar: #6ea2f7; --good: #83dcab; --good-back: #123524; --bad: #ffaca6;
  --bad-back: #45191a } }
* { box-sizing: border-box; margin: 0 } body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem;
  background: var(--page); color: var(--text); font: 0.9375rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.3 } h2 { font-size: 1.0625rem; margin: 2.25rem 0 0.75rem } h3 { font-size: 1em }
a { color: var(--link) } small, .soft, dt { color: var(--soft) } small { font-size: 0.8125rem; display: block }
.row { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: center } .ends { justify-content: space-between }
.card, table, .tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 0.75rem }
.card { padding: 0.875rem 1rem; margin-bottom: 0.75rem } .card pre { max-height: 9.5rem; background: var(--page) }
.tiles { display: flex; flex-wrap: wrap; gap: 0.75rem; margin-top: 1.25rem } dd { font-size: 1.625rem }
.tiles > div { padding: 0.625rem 1rem; flex: 1 1 6rem } h2 + .row { margin-bottom: 0.75rem; align-self: end }
table { width: 100%; border-spacing: 0 } th, td { text-align: left; vertical-align: top; padding: 0.75rem }
tbody > * > * { border-top: 1px solid var(--line); font-weight: 400 } tbody th { min-width: 13rem }
thead th { color: var(--soft); font-size: 0.8125rem; font-weight: 500 } th, .line, .pill, button { white-space: nowrap }
tbody th { white-space: normal } .good { color: var(--good); background: var(--good-back) }
.bad { color: var(--bad); background: var(--bad-back) } .off { color: var(--soft); background: var(--line) }
.pill { border-radius: 1rem; padding: 0.0625rem 0.5625rem; font-size: 0.8125rem; font-weight: 500 }
pre { margin-top: 0.5rem; padding: 0.625rem 0.75rem; max-height: 24rem; overflow: auto; white-space: pre-wrap;
  background: var(--card); border-radius: 0.5rem; font: 0.8125rem/1.5 ui-monospace, monospace }
svg { display: block; max-width: 100%; fill: var(--bar) } .none { fill: var(--line) }
summary { cursor: pointer; color: var(--soft); padding: 0.375rem 0 }
button { font: inherit; font-size: 0.875rem; min-height: 2.25rem; padding: 0.25rem 0.875rem; border-radius: 0.5rem;
  border: 1px solid var(--line); background: var(--card); color: var(--text); cursor: pointer }
button.bad { color: var(--bad); background: var(--bad-back) } ol { padding: 0 0 0 0.375rem; list-style: none }
li { padding: 0 0 1.25rem 1.25rem; border-left: 2px solid var(--line); position: relative }
li::before { content: ""; position: absolute; left: -0.4375rem; top: 0.375rem; width: 0.75rem; height: 0.75rem;
  border-radius: 50%; background: var(--good) } li.miss::before { background: var(--bad) }
@media (max-width: 52rem) { thead { display: none } table, tbody, tbody th { display: block }
  tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: 0.5rem 1rem; padding: 1rem }
  tbody th { grid-column: 1 / -1 } tbody > * > * { border: 0; padding: 0 } tr + tr { border-top: 1px solid var(--line) }
  td::before { content: attr(data-name); color: var(--soft); display: block; font-size: 0.8125rem } }
"""


class _Html(str):
    """Text that is HTML already."""

    __slots__ = ()


class _Refusal(Exception):
    """A request that is not served: status line, what to tell, further headers."""


def _shown(value: object) -> str:
    import html

    if isinstance(value, list):
        return "".join(map(_shown, value))
    return value if isinstance(value, _Html) else html.escape(str(value))


def _fill(template: str, *values: object) -> _Html:
    """Put values into a template of ours. What is not _Html is escaped, so forgetting lets nothing through."""
    return _Html(template.format(*map(_shown, values)))


def _pill(text: object, kind: str) -> _Html:
    return _fill('<span class="pill {}">{}</span>', kind, text)


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> _Html:
    """Return a table whose rows become blocks on a phone; the first cell of a row is its head."""
    head = [_fill('<th scope="col">{}</th>', name) for name in names]
    body = []
    for first, *rest in rows:
        cells = [_fill('<td data-name="{}">{}</td>', *pair) for pair in zip(names[1:], rest, strict=True)]
        body.append(_fill('<tr><th scope="row">{}</th>{}</tr>', first, cells))
    nothing = _Html('<p class="card soft">There are none.</p>')
    return _fill("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>", head, body) if body else nothing


def _time(at: float | None, now: float) -> _Html:
    if at is None:
        return _Html("-")
    words = f"in {_age(at - now)}" if at > now else f"{_age(now - at)} ago"
    return _fill('<time title="{}">{}</time>', _moment(at), words)


def _judged(row: FailedDelivery | Attempt) -> _Html:
    words = [row.reason or "", f"HTTP {row.status_code}" if row.status_code is not None else ""]
    return _pill(" · ".join(filter(None, words)), "bad" if row.reason else "good")


def _answer_of(row: FailedDelivery | Attempt) -> _Html:
    """Return the error, where the status does not say it all, and the start of the receiver's answer."""
    error = _fill("<p>{}</p>", row.error) if row.error and row.error != f"HTTP {row.status_code}" else ""
    return _fill("{}{}", error, _fill('<pre tabindex="0">{}</pre>', row.response) if row.response else "")


def _bars(e: EndpointStats) -> _Html:
    """Draw the deliveries of the last hour, a bar for each five minutes."""
    most, bar = max(e.history) or 1, '<rect class="{}" x="{}" y="{}" width="8" height="{}" rx="1"/>'
    heights = [-(-count * 28 // most) or 2 for count in e.history]
    bars = [_fill(bar, "" if e.history[n] else "none", 10 * n, 28 - h, h) for n, h in enumerate(heights)]
    title = f"{e.delivered} deliveries in the last hour; in each five minutes: {', '.join(map(str, e.history))}"
    svg = '<div><svg role="img" viewBox="0 0 118 28" width="118" height="28"><title>{}</title>{}</svg>'
    return _fill(svg + "<small>{} delivered</small></div>", title, bars, e.delivered)


def _pretty(data: Any) -> str:
    """Return data as indented JSON; deep nesting makes that many times longer, so it is cut."""
    parts = list(itertools.islice(json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(data), 20_000))
    return "".join(parts) + ("\n…" if len(parts) == 20_000 else "")


@dataclasses.dataclass(frozen=True, slots=True)
class _Pages:
    """The pages as one request gets them."""

    outbox: Outbox
    base: str  # the path that we are mounted under, percent-encoded
    filters: Mapping[str, str]  # of the failed rows: endpoint, after
    token: str  # what the browser's cookie holds and each form repeats

    def place(self, path: str = "", **filters: object) -> str:
        return f"{self.base}/{urllib.parse.quote(path)}" + ("?" + urllib.parse.urlencode(filters) if filters else "")

    def link(self, text: object, path: str = "", **filters: object) -> _Html:
        return _fill('<a href="{}">{}</a>', self.place(path, **filters), text)

    def button(self, verb: str, name: str, value: object, text: str, kind: str = "") -> _Html:
        return _fill(
            '<form method="post" action="{}"><input type="hidden" name="token" value="{}"><input type="hidden" '
            'name="{}" value="{}"><button class="{}" aria-label="{}: {}">{}</button></form>',
            self.place(verb, **self.filters), self.token, name, value, kind, text, value, text,
        )  # fmt: skip

    def page(self, title: str, *parts: _Html) -> _Html:
        return _fill(
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{}</title><meta name="viewport" '
            'content="width=device-width, initial-scale=1"><style>{}</style></head><body><main>{}</main></body></html>',
            title, _Html(_STYLE), list(parts),
        )  # fmt: skip

    def overview(self) -> _Html:
        stats, now, rows = self.outbox.stats(), self.outbox.clock(), {e.id: e for e in self.outbox.endpoints()}
        tiles = {"Pending": stats.pending, "Due now": stats.due, "Oldest due": _age(stats.oldest_due_age)}
        tiles |= {"Held": stats.held, "Failed": stats.failed}
        names = ("Endpoint", "Last hour", "Success", "p50 / p95", "Waiting", "Failed", "Action")
        endpoints = _table(names, [self.endpoint(e, rows[e.id], now) for e in stats.endpoints if e.id in rows])
        events = [
            (self.link(e.id, f"event/{e.id}"), e.type, e.key or "-", _time(e.created_at, now))
            for e in self.outbox.events(limit=10)
        ]
        return self.page(
            f"Webhooks: {stats.failed} failed",
            _fill('<header class="row ends"><h1>Webhooks</h1><p class="soft">{} {}</p></header>', _moment(now),
                  self.link("Refresh", **self.filters)),
            _fill('<dl class="tiles">{}</dl>', [_fill("<div><dt>{}</dt><dd>{}</dd></div>", *t) for t in tiles.items()]),
            _fill("<h2>Endpoints</h2>{}{}", endpoints, self.failed(now)),
            _fill("<h2>Latest events</h2>{}", _table(("Event", "Type", "Key", "Emitted"), events)),
        )  # fmt: skip

    def endpoint(self, e: EndpointStats, endpoint: Endpoint, now: float) -> tuple[object, ...]:
        state = _pill("active", "good") if e.enabled else _pill("disabled", "off")
        if e.enabled and e.failing_since is not None:
            state = _pill(f"failing for {_age(now - e.failing_since)}", "bad")
        about = " · ".join(filter(None, (_masked(endpoint.url), endpoint.description, endpoint.disabled_reason)))
        return (
            _fill('<div class="row"><strong>{}</strong>{}</div><small>{}</small><small>{}</small>', e.id, state, about,
                  f"Last error: {e.last_error}" if e.last_error else ""),
            _bars(e),
            f"{100 * e.delivered // e.attempts}%" if e.attempts else "-",
            _fill('<span class="line">{} / {}</span>', _age(e.p50), _age(e.p95)),
            f"{e.pending}, oldest {_age(e.oldest_due_age)}" if e.oldest_due_age is not None else e.pending,
            self.link(e.failed, endpoint=e.id) if e.failed else 0,
            self.button("disable", "id", e.id, "Disable") if e.enabled else self.button("enable", "id", e.id, "Enable"),
        )  # fmt: skip

    def failed(self, now: float) -> _Html:
        endpoint, after = self.filters.get("endpoint"), int(self.filters.get("after", 0))
        found = self.outbox.failed(limit=_ON_A_PAGE + 1, after=after, endpoint=endpoint)
        rows = found[:_ON_A_PAGE]
        links = [self.link("All failed rows")] if self.filters else []
        if len(found) > len(rows):
            links.append(self.link("Next page", **{**self.filters, "after": str(rows[-1].id)}))
        if len(rows) > 1:
            ids = ",".join(str(row.id) for row in rows)
            links.append(self.button("replay", "ids", ids, f"Replay these {len(rows)}"))
        return _fill(
            '<div class="row ends"><h2>Failed rows{}, oldest first</h2><div class="row">{}</div></div>{}',
            f" of {endpoint}" if endpoint else "", links, [self.failed_row(row, now) for row in rows] or _table((), ()),
        )  # fmt: skip

    def failed_row(self, row: FailedDelivery, now: float) -> _Html:
        return _fill(
            '<article class="card"><div class="row ends"><div class="row">{}<h3>{}</h3><span>to {}</span></div>'
            '<div class="row">{}<details><summary>Discard</summary>{}</details></div></div>'
            '<p class="soft">Given up {}, attempts: {}</p>{}</article>',
            _judged(row), self.link(row.type, f"event/{row.event_id}"), row.endpoint_id,
            self.button("replay", "ids", row.id, "Replay"),
            self.button("discard", "ids", row.id, "Delete for good", "bad"),
            _time(row.failed_at, now), row.attempts, _answer_of(row),
        )  # fmt: skip

    def event(self, id: str) -> _Html:
        event, attempts, now = self.outbox.event(id), self.outbox.attempts(id), self.outbox.clock()
        kinds = {"delivered": "good", "failed": "bad"}
        deliveries = [
            (d.endpoint_id, _pill(d.status, kinds.get(d.status, "off")), d.attempts,
             _time(d.due_at, now) if d.status == "pending" else "-", _time(d.delivered_at, now))
            for d in event.deliveries
        ]  # fmt: skip
        step = '<li class="{}"><div class="row"><strong>{}</strong>{}<span>{}, after {}</span></div>{}</li>'
        steps = [
            _fill(step, "miss" if a.reason else "", _moment(a.at), _judged(a), a.endpoint_id, _age(a.duration),
                  _answer_of(a))
            for a in attempts[-200:]
        ]  # fmt: skip
        about = f"{event.id}, emitted {_moment(event.created_at)}" + (f", key {event.key}" if event.key else "")
        return self.page(
            f"{event.type} {event.id}",
            _fill('<p>{}</p><h1>{}</h1><p class="soft">{}</p>', self.link("← Webhooks"), event.type, about),
            _fill('<h2>Data</h2><pre tabindex="0" class="card">{}</pre>', _pretty(event.data)),
            _fill("<h2>Deliveries</h2>{}", _table(("Endpoint", "Status", "Attempts", "Next", "Delivered"), deliveries)),
            _fill("<h2>Attempts{}</h2><ol>{}</ol>", ": the last 200" if len(attempts) > 200 else "", steps),
        )


def _row_numbers(form: Mapping[str, str]) -> list[int]:
    return [int(id) for id in form["ids"].split(",")]


_ACTIONS: dict[str, Callable[[Outbox, Mapping[str, str]], object]] = {
    "replay": lambda outbox, form: outbox.replay(ids=_row_numbers(form)),
    "discard": lambda outbox, form: outbox.discard(ids=_row_numbers(form)),
    "enable": lambda outbox, form: outbox.enable_endpoint(form["id"]),
    "disable": lambda outbox, form: outbox.disable_endpoint(form["id"], "on the dashboard"),
}


# Two things show that a form is ours, and both must hold. Sec-Fetch-Site, or else Origin: browsers vouch for these, but
# very old ones send neither. And a random cookie that the form repeats: alone it is not enough, as other ports of
# localhost and sibling domains can set it. Any worker process can check both. Rejected: a token signed with a random
# key of the process, which the other workers do not have. Lax, not Strict: a link in a chat would come without the
# cookie, and the new one would make the forms in open tabs void; a foreign POST carries neither kind.
def _is_ours(environ: WSGIEnvironment, token: str, form: Mapping[str, str]) -> bool:
    site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
    if site is None and origin is not None:
        site = "same-origin" if urllib.parse.urlsplit(origin).netloc == environ.get("HTTP_HOST") else "cross-site"
    return site in (None, "same-origin") and hmac.compare_digest(token.encode(), form.get("token", "").encode())


def _read_form(environ: WSGIEnvironment, token: str) -> dict[str, str]:
    length = int(environ.get("CONTENT_LENGTH") or "x")
    if length > _LONGEST_FORM:
        raise _Refusal("413 Content Too Large", "The form is too long.")
    body = environ["wsgi.input"].read(max(0, length)).decode("ascii")
    form = dict(urllib.parse.parse_qsl(body, strict_parsing=True, errors="strict", max_num_fields=9))
    if not _is_ours(environ, token, form):
        raise _Refusal("403 Forbidden", "This did not come from a form of this page: load the page again.")
    return form


def _serve(pages: _Pages, environ: WSGIEnvironment) -> tuple[str, _Html, list[tuple[str, str]]]:
    """Do what a request asks for; return status, page and further headers, or raise what is wrong with it."""
    verb, _, id = environ.get("PATH_INFO", "").strip("/").partition("/")
    if verb not in ("", "event", *_ACTIONS) or bool(id) != (verb == "event"):
        raise _Refusal("404 Not Found", "There is no such page.")
    methods = ["POST"] if verb in _ACTIONS else ["GET", "HEAD"]
    if environ["REQUEST_METHOD"] not in methods:
        raise _Refusal("405 Method Not Allowed", "This is not done this way.", ("Allow", ", ".join(methods)))
    if verb not in _ACTIONS:
        secure = "; Secure" if environ["wsgi.url_scheme"] == "https" else ""
        cookie = f"webhook_outbox={pages.token}; Path={pages.base or '/'}; HttpOnly; SameSite=Lax{secure}"
        return "200 OK", pages.event(id) if id else pages.overview(), [("Set-Cookie", cookie)]
    try:
        _ACTIONS[verb](pages.outbox, _read_form(environ, pages.token))
    except (ValueError, KeyError):
        raise _Refusal("400 Bad Request", "The form cannot be understood.") from None
    return "303 See Other", pages.page("Done"), [("Location", pages.place(**pages.filters))]


def _pages_for(outbox: Outbox, environ: WSGIEnvironment) -> _Pages:
    mount = environ.get("SCRIPT_NAME", "").strip("/")
    base = "/" + urllib.parse.quote(mount, encoding="latin-1") if mount else ""
    query = urllib.parse.parse_qsl(environ.get("QUERY_STRING", ""))
    filters = {k: v for k, v in query if k == "endpoint" or (k == "after" and re.fullmatch("[0-9]{1,18}", v))}
    cookie = re.search(r"(?:^|; ?)webhook_outbox=([A-Za-z0-9_-]{22})(?:;|$)", environ.get("HTTP_COOKIE", ""))
    return _Pages(outbox, base, filters, cookie[1] if cookie else secrets.token_urlsafe(16))


def dashboard_app(outbox: Outbox) -> WSGIApplication:
    """Return the dashboard as a WSGI application: endpoints with their last hour, failed rows with the receiver's
    answer, an event's timeline; replay, discard, enable, disable.

    Works under any SCRIPT_NAME. Keeps no state, so any number of workers may serve it. Other sites cannot make a
    visitor's browser act; what receivers sent is escaped; secrets and header values are not shown, queries of URLs
    are masked. It asks for no login: whoever reaches it sees the events' data, and can replay, discard and disable.
    Mount it behind the login of your app, which also answers for the Host header.
    """
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = "default-src 'none'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; style-src "
    always = [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", f"{policy}'sha256-{style}'"),
        ("Cache-Control", "no-store"),
        ("Referrer-Policy", "same-origin"),  # with no-referrer our own forms would come with Origin: null
        ("X-Content-Type-Options", "nosniff"),
    ]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        pages = _pages_for(outbox, environ)
        told: Any = None
        try:
            status, page, headers = _serve(pages, environ)
        except _Refusal as refusal:
            told = refusal.args
        except NotFound as error:
            told = "404 Not Found", error
        except Exception:  # a browser sees no traceback
            _log.exception("the dashboard failed")
            told = "500 Internal Server Error", "It did not work; the app's log tells why."
        if told:
            status, text, *headers = told
            back = pages.link("Back to the overview")
            page = pages.page(status, _fill("<h1>{}</h1><p>{}</p><p>{}</p>", status, text, back))
        body = page.encode("utf-8", "replace")
        start_response(status, [*always, *headers, ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return app


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────
# Promises: the library's verbs with the library's names; errors are one line; the only section that prints.
# Exit codes: 0 done, 1 the thing asked for failed or did not hold, 2 usage.


_PLAIN = str.maketrans("·▁▂▃▄▅▆▇█…", ".12345678~")


def _say(text: str = "") -> None:
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:  # a terminal may lack our bars, a row may hold what is no Unicode
        text = text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    print(text, flush=True)


def _cut(text: str, most: int) -> str:
    line = _one_line(text, most + 1)
    return line if len(line) <= most else line[: most - 1] + "…"


def _cell(name: str, value: Any) -> str:
    if value is None or value == "" or value == {}:
        return "-"
    if name == "at" or name.endswith(("_at", "_since")):
        return _moment(value)
    if name == "duration":
        return _age(value)
    if name == "data":
        return _cut(_dumps(value), 80)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return _cut(" ".join(value) if isinstance(value, tuple) else str(value), 80)


def _record(row: Any) -> dict[str, Any]:
    """Return a dataclass as a dict that may be shown: no secret, no header value, no query of a URL."""
    record = dataclasses.asdict(row)
    if isinstance(row, Endpoint):
        del record["secret"]
        record.update(url=_masked(row.url), headers=dict.fromkeys(row.headers, "..."))
    return record


def _show(rows: Sequence[Any], columns: str, as_json: bool, empty: str, without: str = "") -> None:
    """Print dataclasses as a table of some columns, or as JSON with all fields but `without`."""
    records = [{name: value for name, value in _record(row).items() if name != without} for row in rows]
    if as_json:
        return _say(json.dumps(records, indent=2))
    if not records:
        return _say(empty)
    cells = [[name.upper().replace("_", " ") for name in columns.split()]]
    cells += [[_cell(name, record[name]) for name in columns.split()] for record in records]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show_one(row: Any, as_json: bool) -> None:
    if as_json:
        return _say(json.dumps(_record(row), indent=2))
    for name, value in _record(row).items():
        _say(f"{name:16} {_cell(name, value)}")


def _status_text(stats: Stats) -> str:
    """Return a table for the terminal's width (200 in a pipe); where little is left, errors have lines of their own."""
    import shutil

    oldest = f", oldest {_age(stats.oldest_due_age)}" if stats.due else ""
    first = f"{stats.pending} pending ({stats.due} due now{oldest}), {stats.held} held, {stats.failed} failed"
    if not stats.endpoints:
        return first + "\nno endpoints yet: `endpoint add URL` makes one"
    columns = shutil.get_terminal_size((200, 0)).columns
    width = max(8, min(max(len(e.id) for e in stats.endpoints), columns - 61))
    room = columns - width - 63
    last = "     LAST ERROR" if room >= 30 else ""
    lines = [first, f"{'ENDPOINT':{width}} SUCCESS    P50    P95  WAITING  OLDEST  FAILED  LAST HOUR{last}"]
    for e in stats.endpoints:
        share = f"{100 * e.delivered // e.attempts} %" if e.attempts else "-"  # 100 % only without a failure
        most = max(e.history) or 1
        bars = "".join("▁▂▃▄▅▆▇█"[-(-count * 7 // most)] if count else "·" for count in e.history)
        p50, p95, oldest = (_age(age).replace(" ", "") for age in (e.p50, e.p95, e.oldest_due_age))
        row = f"{_cut(e.id, width):{width}} {share:>7}  {p50:>5}  {p95:>5}  "
        row += f"{e.pending:>7}  {oldest:>6}  {e.failed:>6}  {bars}"
        note = (e.last_error or "") if e.enabled else "disabled, deliveries are held"
        lines.append(f"{row}  {_cut(note, room)}".rstrip() if last else row)
        if note and not last:
            lines.append("  " + _cut(note, max(20, columns - 2)))
    return "\n".join(lines)


def _status(outbox: Outbox, options: Any) -> None:
    while True:
        stats = outbox.stats()
        text = json.dumps(dataclasses.asdict(stats), indent=2) if options.json else _status_text(stats)
        if options.watch and sys.stdout.isatty() and not options.json:  # over the last one, without a flicker
            text = "\x1b[H" + text.replace("\n", "\x1b[K\n") + "\x1b[K\x1b[J"
        _say(text)
        if not options.watch:
            return
        time.sleep(2)


def _doctor(outbox: Outbox, options: Any) -> int:
    found = list(_findings(outbox))
    healthy = all(finding.level != "problem" for finding in found)
    if options.json:
        _say(json.dumps([finding._asdict() for finding in found], indent=2))
    else:
        for finding in found:
            _say(f"{finding.level:8} {finding.text}")
        if healthy:
            _say(f"no problem found in {outbox.path}")
    return 0 if healthy else 1


def _check(outbox: Outbox, options: Any) -> int:
    stats = outbox.stats()
    failing = [e.id for e in stats.endpoints if e.failing_since is not None or not e.enabled]
    wrong = []
    if (stats.oldest_due_age or 0) > options.max_age:
        wrong.append(f"the oldest due delivery has waited {_age(stats.oldest_due_age)}")
    if stats.failed > options.max_failed:
        wrong.append(f"{stats.failed} failed rows")
    if len(failing) > options.max_failing_endpoints:
        wrong.append(f"failing or disabled: {', '.join(failing)}")
    _say("; ".join(wrong) or f"ok: {stats.pending} pending, {stats.failed} failed rows")
    return 1 if wrong else 0


def _init(outbox: Outbox, options: Any) -> None:
    next_step = "" if outbox.endpoints() else "; `endpoint add URL` comes next"
    _say(f"{outbox.path} is ready{next_step}")


def _given(options: Any, names: str) -> dict[str, Any]:
    """Return those of some options that were given, as the library takes them."""
    given = {name: value for name in names.split() if (value := getattr(options, name)) is not None}
    if "headers" in given:
        pairs = [text.partition(":") for text in given["headers"]]
        if not all(colon for _, colon, _ in pairs):
            raise PayloadError("a header is written 'Name: value'")
        given["headers"] = {name.strip(): value.strip() for name, _, value in pairs}
    if "cert" in given:
        given["cert"] = given["cert"][0] if len(given["cert"]) == 1 else tuple(given["cert"])
    return given


def _emit_by_hand(outbox: Outbox, options: Any) -> None:
    try:
        data = json.loads(sys.stdin.read() if options.data == "-" else options.data)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"the data is not JSON: {_one_line(str(error), 100)}") from None
    with outbox.transaction() as conn:
        id = outbox.emit(conn, options.type, data, **_given(options, "key idempotency_key delay headers"))
    _say(id)
    if not outbox.event(id).deliveries:
        print("no enabled endpoint takes it; `endpoint list` shows their patterns", file=sys.stderr)


def _drain_here(outbox: Outbox, options: Any) -> None:
    if options.once and options.until_empty:
        raise PayloadError("say --once or --until-empty, not both")
    terminal = sys.stderr.isatty()
    started = time.monotonic()
    line = "\r\x1b[K%(message)s" if terminal else "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=line, stream=sys.stderr)

    logged = DrainReport(0, 0, 0, 0), started

    def log(report: DrainReport) -> None:
        nonlocal logged
        if time.monotonic() - logged[1] >= 10 and report != logged[0]:
            logged = report, time.monotonic()
            _log.info("delivered %d, failed %d, waiting %d", report.delivered, report.failed, report.pending)

    def show(report: DrainReport) -> None:
        rate = report.delivered / max(0.001, time.monotonic() - started)
        left = f"  {_age(report.pending / rate)} left" if rate >= 1 and report.pending else ""
        counts = f"delivered {report.delivered:,}  failed {report.failed:,}  waiting {report.pending:,}"
        counts += f"  retried {report.retried:,}" if report.retried else ""
        print(f"\r\x1b[K{counts}  {rate:,.0f}/s{left}", end="", file=sys.stderr, flush=True)

    def on_signal(number: int, frame: Any) -> None:
        first = not drain.stopping
        drain.stop(10.0 if first else 0.0)
        if first and drain.attempts:
            _log.info("finishing %d under way; once more to stop at once", len(drain.attempts))

    mode = "until_empty" if options.until_empty else "once" if options.once else "forever"
    drain = _Drain(outbox, mode, show if terminal else log, options.shard)
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        report = outbox._run(drain)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    counts = f"delivered {report.delivered}, failed {report.failed}, retried {report.retried}"
    _say(f"{counts}, still pending {report.pending}")


_ENDPOINT_OPTIONS = " ".join(EndpointOptions.__annotations__)


def _endpoint_add(outbox: Outbox, options: Any) -> None:
    endpoint = outbox.add_endpoint(options.url, **_given(options, f"id secret {_ENDPOINT_OPTIONS}"))
    _say(f"{endpoint.id}\nsecret {endpoint.secret}\nGive the secret to the receiver; `endpoint secret` shows it again.")


def _endpoint_update(outbox: Outbox, options: Any) -> None:
    _show_one(outbox.update_endpoint(options.id, **_given(options, f"url {_ENDPOINT_OPTIONS}")), False)


def _endpoint_list(outbox: Outbox, options: Any) -> None:
    columns = "id url events enabled disabled_reason failing_since"
    _show(outbox.endpoints(), columns, options.json, "no endpoints yet: `endpoint add URL` makes one")


def _endpoint_set(outbox: Outbox, options: Any) -> None:
    if options.verb == "disable":
        outbox.disable_endpoint(options.id, options.reason)
    elif options.verb == "enable":
        outbox.enable_endpoint(options.id)
    else:
        waiting = {e.id: e.pending for e in outbox.stats().endpoints}.get(options.id, 0)
        outbox.remove_endpoint(options.id)
        return _say(f"removed {options.id} and {waiting} deliveries that waited for it")
    _say(f"{options.verb}d {options.id}")


def _endpoint_rotate(outbox: Outbox, options: Any) -> None:
    _say(f"secret {outbox.rotate_secret(options.id, **_given(options, 'secret grace')).secret}")


def _endpoint_ping(outbox: Outbox, options: Any) -> int:
    attempt = outbox.ping(options.id)
    answer = attempt.error or f"HTTP {attempt.status_code}"
    _say(f"{attempt.reason or 'delivered'}: {answer}, after {_age(attempt.duration)}")
    return 1 if attempt.reason else 0


def _backfill(outbox: Outbox, options: Any) -> None:
    count = outbox.backfill(options.id, since=options.since or 0.0, **_given(options, "until type dry_run"))
    _say(f"{count} deliveries {'would be ' if options.dry_run else ''}added")


def _events_list(outbox: Outbox, options: Any) -> None:
    rows = outbox.events(**_given(options, "type since until limit after"))
    _show(rows, "id type key created_at data", options.json, "no events", without="deliveries")


def _events_show(outbox: Outbox, options: Any) -> None:
    event, attempts = outbox.event(options.id), outbox.attempts(options.id)
    if options.json:
        record = _record(event) | {"attempts": [_record(attempt) for attempt in attempts]}
        return _say(json.dumps(record, indent=2))
    _say(f"{event.id}  {event.type}  {_moment(event.created_at)}\n{_dumps(event.data)}\n")
    _show(event.deliveries, "endpoint_id status attempts due_at delivered_at", False, "no deliveries")
    _say()
    _show(attempts, "at endpoint_id status_code reason error duration", False, "no attempts yet")


def _failed_filters(options: Any) -> Any:
    return _given(options, "endpoint type reason since until") | {"ids": [*options.ids, *options.more_ids] or None}


def _refuse_typo(outbox: Outbox, options: Any, found: bool) -> None:
    """Raise NotFound where nothing was found for an endpoint that does not exist: that must not look like good news."""
    if options.endpoint and not found:
        outbox.endpoint(options.endpoint)


def _failed_list(outbox: Outbox, options: Any) -> None:
    rows = outbox.failed(**_given(options, "limit after"), **_failed_filters(options))
    _refuse_typo(outbox, options, bool(rows))
    _show(rows, "id event_id endpoint_id type attempts reason error failed_at", options.json, "nothing failed")


def _failed_show(outbox: Outbox, options: Any) -> None:
    rows = outbox.failed(ids=[options.id])
    if not rows:
        raise NotFound(f"there is no failed row {options.id}; `failed list` shows those there are")
    _show_one(rows[0], options.json)


def _failed_act(outbox: Outbox, options: Any) -> None:
    act = outbox.replay if options.verb == "replay" else outbox.discard
    count = act(all=options.all, dry_run=options.dry_run, **_failed_filters(options))
    _refuse_typo(outbox, options, count > 0)
    if not count and (options.ids or options.more_ids):
        raise NotFound("there are no such failed rows; `failed list` shows those there are")
    _say(f"{count} failed rows {'would be ' if options.dry_run else ''}{options.verb}ed")


def _resend(outbox: Outbox, options: Any) -> None:
    _say(f"{outbox.resend(options.id, endpoint=options.endpoint)} deliveries are pending again")


def _local_receiver(port: int, answer: Callable[[Mapping[str, str], bytes], int]) -> Any:
    """Return a loopback HTTP server that answers each POST with the status that `answer` returns; not yet serving."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not re.fullmatch(r"[0-9]{1,7}", length):
                return self.send_error(411)
            status = answer(dict(self.headers.items()), self.rfile.read(int(length)))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:  # a sender that breaks off
            pass

    try:
        return Server(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise OutboxError(f"cannot listen on port {port}: {error}") from None


def _listen(_: None, options: Any) -> None:
    if options.secret:
        _key(options.secret)
    _number("status", options.status, 200, 599)

    def answer(headers: Mapping[str, str], body: bytes) -> int:
        verdict = "not verified (give --secret)"
        if options.secret:
            try:
                event = verify(body, headers, options.secret)
                verdict = f"verified  {event.id}  {event.type}"
            except SignatureError as error:
                _say(f"refused, answered 400: {error}")
                return 400
        _say(f"{verdict}  answered {options.status}\n  {_one_line(body.decode('utf-8', 'replace'), 2000)}")
        return int(options.status)

    with _local_receiver(options.port, answer) as server:
        _say(f"listening on http://127.0.0.1:{server.server_port}/ (Ctrl-C ends)")
        server.serve_forever()


def _dashboard(outbox: Outbox, options: Any) -> None:
    import socketserver
    import wsgiref.simple_server

    class Handler(wsgiref.simple_server.WSGIRequestHandler):
        timeout = 60

        def log_message(self, *_: Any) -> None:
            pass

    class Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
        address_family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:  # a browser that breaks off
            pass

    page, own = dashboard_app(outbox), {"localhost", "127.0.0.1", "::1", options.host}

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve only under our own names: a foreign name may be made to point here (DNS rebinding), an address not."""
        host = re.sub(r":[0-9]+$", "", environ.get("HTTP_HOST", "")).strip("[]").lower()
        if host in own or (options.host in ("0.0.0.0", "::") and _literal(host)):
            return page(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [b"This name is not the dashboard's; use the address that the command printed.\n"]

    try:
        server = wsgiref.simple_server.make_server(options.host, options.port, guarded, Server, Handler)
    except (OSError, OverflowError) as error:
        raise OutboxError(f"cannot listen on {options.host} port {options.port}: {error}") from None
    with server:
        host = f"[{options.host}]" if ":" in options.host else options.host
        _say(
            f"dashboard on http://{host}:{server.server_port}/ (Ctrl-C ends); whoever reaches it can replay and disable"
        )
        server.serve_forever()


class _Demo:
    """The invoice story on temporary files: a shop with its outbox, and three real receivers on this machine."""

    def __init__(self, folder: str, stack: contextlib.ExitStack) -> None:
        self.stack, self.seen, self.received = stack, list[bool](), list[str]()
        self.shop, self.billing = os.path.join(folder, "shop.db"), os.path.join(folder, "billing.db")
        self.run_sql(self.shop, "CREATE TABLE orders (id INTEGER PRIMARY KEY, total REAL)")
        self.run_sql(self.billing, "CREATE TABLE invoices (order_id INTEGER, total REAL)")
        self.inbox = Inbox(self.billing)
        quick = RetryPolicy((0, 0.2, 0.2))
        self.outbox = Outbox(self.shop, allow_networks=["127.0.0.0/8"], retry=quick, app_name="demo")
        self.secret = self.add("billing", self.invoice).secret or ""
        answers = iter([503, 503])
        self.add("flaky", lambda headers, body: next(answers, 200))
        self.broken = True
        self.add("dead", lambda headers, body: 500 if self.broken else 200)

    def add(self, id: str, answer: Callable[[Mapping[str, str], bytes], int]) -> Endpoint:
        server = self.stack.enter_context(_local_receiver(0, answer))
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.stack.callback(server.shutdown)
        return self.outbox.add_endpoint(f"http://127.0.0.1:{server.server_port}/hooks", events=["order.*"], id=id)

    def run_sql(self, path: str, sql: str) -> Any:
        with contextlib.closing(sqlite3.connect(path)) as conn:
            return conn.execute(sql).fetchone()

    def invoice(self, headers: Mapping[str, str], body: bytes) -> int:
        """The receiver's side: verify, then the invoice and the event's id in one transaction."""
        try:
            event = verify(body, headers, self.secret)
        except SignatureError:
            return 400
        self.received.append(event.id)
        with contextlib.closing(sqlite3.connect(self.billing)) as conn, conn:
            if self.inbox.accept(conn, event.id):
                conn.execute("INSERT INTO invoices VALUES (?, ?)", (event.data["order_id"], event.data["total"]))
        return 200

    def order(self, total: float, refused: bool = False) -> str:
        """The app's side: the order and its event in one transaction."""
        with contextlib.closing(sqlite3.connect(self.shop)) as conn, conn:
            row = conn.execute("INSERT INTO orders (total) VALUES (?)", (total,)).lastrowid
            id = self.outbox.emit(conn, "order.created", {"order_id": row, "total": total})
            if refused:
                raise ValueError("the card was refused")
            return id

    def step(self, text: str, held: bool) -> None:
        self.seen.append(held)
        _say(f"   {'seen    ' if held else 'NOT SEEN'}  {text}")

    def invoices(self) -> int:
        return int(self.run_sql(self.billing, "SELECT count(*) FROM invoices")[0])

    def play(self) -> None:
        _say("1. An order and its event commit together; the webhook arrives, signed.")
        id = self.order(49.99)
        self.outbox.drain(once=True)
        self.step(f"billing verified {id}", self.received == [id])
        self.step("and made one invoice", self.invoices() == 1)
        _say("2. The same event is delivered once more: the inbox makes the duplicate harmless.")
        self.outbox.resend(id, endpoint="billing")
        self.outbox.drain(once=True)
        self.step("it arrived twice", self.received == [id, id])
        self.step("there is still one invoice", self.invoices() == 1)
        _say("3. An order that is rolled back sends nothing.")
        with contextlib.suppress(ValueError):
            self.order(13.37, refused=True)
        self.outbox.drain(once=True)
        orders = self.run_sql(self.shop, "SELECT count(*) FROM orders")
        self.step("no order, no event, no request", orders == (1,) and len(self.received) == 2)
        _say("4. A flaky receiver is retried; a dead one ends in the failed table.")
        self.outbox.drain(until_empty=True)
        codes = [attempt.status_code for attempt in self.outbox.attempts(id, "flaky")]
        self.step(f"flaky answered {', '.join(map(str, codes))}", codes == [503, 503, 200])
        rows = self.outbox.failed(endpoint="dead")
        self.step("dead answered HTTP 500 three times and is in webhook_failed", [r.attempts for r in rows] == [3])
        _say("5. Somebody mends the dead receiver and replays.")
        self.broken = False
        replayed = self.outbox.replay(endpoint="dead")
        self.outbox.drain(until_empty=True)
        ended = {delivery.endpoint_id: delivery.status for delivery in self.outbox.event(id).deliveries}
        self.step("replay delivered it", replayed == 1 and ended["dead"] == "delivered" and not self.outbox.failed())
        _say("\n" + _status_text(self.outbox.stats()))


def _demo(_: None, options: Any) -> int:
    """Play the story; 0 only if every step was seen."""
    import tempfile

    logging.getLogger("webhook_outbox").addHandler(logging.NullHandler())  # the story itself tells what fails
    _say("A shop with an orders table, its outbox in the same file, and three receivers on this machine.\n")
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            demo = _Demo(folder, stack)
            demo.play()
    except OSError as error:
        raise OutboxError(f"the demo cannot run here: {error}") from None
    _say(f"\n{sum(demo.seen)} of {len(demo.seen)} checks seen.")
    return 0 if all(demo.seen) else 1


def _load_app(name: str) -> Outbox:
    """Return the host's own Outbox, MODULE:NAME. The module may be this file under another name (vendored, or run
    with -m), so the object is known by what it can do."""
    import importlib

    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute or "outbox")
    except Exception as error:  # whatever the app's module raises
        raise OutboxError(f"--app {name}: {type(error).__name__}: {error}; write MODULE:NAME of your Outbox") from None
    if not all(callable(getattr(found, verb, None)) for verb in ("emit", "drain", "add_endpoint")):
        raise OutboxError(f"--app {name} is no Outbox; write MODULE:NAME of your Outbox")
    return found  # type: ignore[no-any-return]


def _when(text: str) -> float:
    """UTC seconds, or an ISO date and time (UTC where it names no zone)."""
    import argparse

    with contextlib.suppress(ValueError):
        return float(text)
    try:
        moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise argparse.ArgumentTypeError("write UTC seconds, or 2026-01-31T12:00") from None
    return _seconds(moment)


def _shard(text: str) -> _Share:
    import argparse

    match = re.fullmatch(r"([0-9]{1,2})/([0-9]{1,2})", text, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 16:
        raise argparse.ArgumentTypeError("write 1/4 for the first of four shares; there are at most 16")
    return _Share(int(match[1]), int(match[2]))


_FLAG = {"action": "store_true"}
# The arguments of all commands. One that differs in a command stands under that command's words too; one that is a
# plain text and says enough by its name is left out.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "--json": _FLAG,
    "--dry-run": dict(_FLAG, help="only count"),
    "--all": _FLAG,
    "--limit": dict(type=int),
    "--type": dict(help="a type, or a group: 'order.*'"),
    "--since": dict(type=_when, help="UTC seconds, or 2026-01-31T12:00"),
    "--until": dict(type=_when),
    "init --wal": dict(_FLAG, help="also switch to WAL"),
    "endpoint add url": dict(metavar="URL"),
    "--secret": dict(help="whsec_..., env:NAME or file:PATH; one is made when it is left out"),
    "--events": dict(nargs="+", metavar="PATTERN", help="order.created, 'order.*' or '*'"),
    "--headers": dict(nargs="+", action="extend", metavar="'NAME: VALUE'"),
    "--body": dict(help="standard, data, cloudevents, slack, discord, or a transform of --app"),
    "--signing": dict(help="standard, stripe, github, joined by + to send several"),
    "--rate": dict(type=float, help="deliveries per second"),
    "--timeout": dict(type=float, help="seconds an attempt may last (15)"),
    "--max-in-flight": dict(type=int, help="attempts at once at the most (16)"),
    "--ordered": dict(action="store_const", const=True, help="one after the other"),
    "--no-ordered": dict(action="store_const", const=False, dest="ordered"),
    "--on-dead": dict(choices=("skip", "hold"), help="what a queue does after a failed row"),
    "--cert": dict(nargs="+", metavar="PATH", help="client certificate, and its key"),
    "--ca": dict(metavar="PATH", help="certificates of a private authority"),
    "endpoint disable --reason": dict(default=""),
    "--grace": dict(type=float, help="seconds that the old one signs too"),
    "emit data": dict(metavar="JSON", help="- reads standard input"),
    "--key": dict(help="events with one key go out in order"),
    "--idempotency-key": dict(help="a second event with it is the first one"),
    "--delay": dict(type=float, help="seconds"),
    "--once": dict(_FLAG, help="until nothing is due now"),
    "--until-empty": dict(_FLAG, help="until nothing is pending, retries included"),
    "--workers": dict(type=int, help="attempts under way at once"),
    "--shard": dict(type=_shard, default=_ALL, metavar="K/N", help="only this share of the endpoints, like 1/4"),
    "--watch": dict(_FLAG, help="again every two seconds"),
    "--max-age": dict(type=float, default=300.0, metavar="S", help="seconds that a due delivery may wait (300)"),
    "--max-failed": dict(type=int, default=0, metavar="N", help="failed rows allowed (0)"),
    "--max-failing-endpoints": dict(type=int, default=0, metavar="N", help="failing or disabled ones allowed (0)"),
    "--after": dict(metavar="ID"),
    "failed list --after": dict(type=int, metavar="ID"),
    "ids": dict(nargs="*", type=int, metavar="ID"),
    "--ids": dict(dest="more_ids", nargs="+", type=int, default=[], metavar="ID"),
    "--endpoint": dict(metavar="ID"),
    "--reason": dict(help=", ".join(_REASONS)),
    "failed show id": dict(type=int),
    "resend --endpoint": dict(help="only to this one, which need not have had it"),
    "--older-than": dict(type=float, metavar="SECONDS"),
    "dashboard --port": dict(type=int, default=8001),
    "--host": dict(default="127.0.0.1", help="the address to listen on (127.0.0.1); there is no login"),
    "--port": dict(type=int, default=8000),
    "listen --secret": dict(help="whsec_...: verify with it"),
    "--status": dict(type=int, default=200, metavar="N", help="what to answer (200)"),
}
_OPTIONS = " ".join(f"--{name.replace('_', '-')}" for name in EndpointOptions.__annotations__) + " --no-ordered"
_LIMITS = "--max-age --max-failed --max-failing-endpoints"
_DRAINING = "--once --until-empty --workers --shard"
_FILTERS = "ids --ids --endpoint --type --reason --since --until"
_GROUPS = {"endpoint": "where events go", "events": "the record of events", "failed": "deliveries that were given up"}
# Each command: its words, what runs it with (outbox, options), its help, its arguments.
_COMMANDS: tuple[tuple[str, Callable[[Any, Any], Any], str, str], ...] = (
    ("demo", _demo, "show the whole story on temporary files", ""),
    ("init", _init, "make the tables", "--wal"),
    ("schema", lambda o, a: _say(schema_sql().rstrip()), "print the SQL of the tables", ""),
    ("doctor", _doctor, "say what is wrong with this file and machine", "--json"),
    ("endpoint add", _endpoint_add, "register an endpoint", f"url --id --secret {_OPTIONS}"),
    ("endpoint list", _endpoint_list, "list endpoints", "--json"),
    ("endpoint show", lambda o, a: _show_one(o.endpoint(a.id), a.json), "show one endpoint", "id --json"),
    ("endpoint update", _endpoint_update, "change options", f"id --url {_OPTIONS}"),
    ("endpoint disable", _endpoint_set, "hold its deliveries", "id --reason"),
    ("endpoint enable", _endpoint_set, "resume its deliveries", "id"),
    ("endpoint remove", _endpoint_set, "delete it with its waiting deliveries", "id"),
    ("endpoint rotate", _endpoint_rotate, "give it a new secret", "id --secret --grace"),
    ("endpoint secret", lambda o, a: _say(o._secret(a.id)), "print its secret", "id"),
    ("endpoint ping", _endpoint_ping, "send it a webhook.ping now", "id"),
    ("endpoint backfill", _backfill, "deliver recorded events that it missed", "id --since --until --type --dry-run"),
    ("emit", _emit_by_hand, "record an event by hand", "type data --key --idempotency-key --delay --headers"),
    ("drain", _drain_here, "deliver what is due; for ever unless told otherwise", _DRAINING),
    ("status", _status, "show endpoints and what waits", "--json --watch"),
    ("metrics", lambda o, a: _say(o.metrics().rstrip()), "print the numbers for Prometheus", ""),
    ("check", _check, "one line, and exit code 1 if something is wrong: for cron and monitoring", _LIMITS),
    ("events list", _events_list, "list events, newest first", "--type --since --until --limit --after --json"),
    ("events show", _events_show, "show an event, its deliveries and attempts", "id --json"),
    ("failed list", _failed_list, "list failed rows, oldest first", f"{_FILTERS} --limit --after --json"),
    ("failed show", _failed_show, "show one failed row", "id --json"),
    ("failed replay", _failed_act, "deliver failed rows again", f"{_FILTERS} --all --dry-run"),
    ("failed discard", _failed_act, "delete failed rows", f"{_FILTERS} --all --dry-run"),
    ("resend", _resend, "deliver a recorded event again", "id --endpoint"),
    ("prune", lambda o, a: _say(f"{o.prune(a.older_than)} events pruned"), "delete old events", "--older-than"),
    ("dashboard", _dashboard, "a page in the browser: what failed and why, replay, disable", "--port --host"),
    ("listen", _listen, "a local receiver that verifies and prints what arrives", "--port --secret --status"),
)


def _parser() -> Any:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            message = re.sub(r"whsec_\S+", "whsec_...", message)  # a secret without its --secret
            self.exit(2, f"webhook_outbox: {_cut(message, 200)}; see --help\n")

    parser = Parser(
        prog="python -m webhook_outbox",
        description="Webhooks from your SQLite transaction, signed, retried, delivered. `demo` shows the whole story.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--db", metavar="PATH", help="the app's file; else the variable WEBHOOK_OUTBOX_DB")
    parser.add_argument("--app", metavar="MODULE:NAME", help="use the app's own Outbox instead of --db")
    parser.add_argument("--allow-network", action="append", default=[], metavar="CIDR", help="admit a private network")
    places = {"": parser.add_subparsers(dest="command", required=True, metavar="COMMAND")}
    for words, run, help, arguments in _COMMANDS:
        group, _, name = words.rpartition(" ")
        if group not in places:
            made = places[""].add_parser(group, help=_GROUPS[group], description=_GROUPS[group])
            places[group] = made.add_subparsers(dest="verb", required=True, metavar="VERB")
        made = places[group].add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        for argument in arguments.split():
            made.add_argument(argument, **_ARGUMENTS.get(f"{words} {argument}", _ARGUMENTS.get(argument, {})))
    return parser


def _open_outbox(options: Any) -> Outbox:
    making = options.run is _init
    if options.app:
        outbox = _load_app(options.app)
        if options.allow_network or (options.db and os.path.realpath(options.db) != outbox.path):
            _parser().error(f"--app has its own networks and file, {outbox.path}: leave out --db and --allow-network")
    elif path := options.db or os.environ.get("WEBHOOK_OUTBOX_DB"):
        outbox = Outbox(path, create=making, allow_networks=options.allow_network)
    else:
        _parser().error("which file? say --db PATH before the command, or set WEBHOOK_OUTBOX_DB")
    if getattr(options, "workers", None) is not None:
        outbox.workers = int(_number("workers", options.workers, 1, 10_000))
    if making and options.wal:
        with _session(outbox.path) as db:
            db.execute("PRAGMA journal_mode = WAL")
    return outbox


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        options = _parser().parse_args(argv)
        alone = options.command in ("demo", "schema", "listen")  # needs no database
        return options.run(None if alone else _open_outbox(options), options) or 0
    except SystemExit as stop:  # argparse: 2 on usage, 0 after --help
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OutboxError, sqlite3.Error, OSError, OverflowError) as error:
        print(f"webhook_outbox: {_one_line(str(error), 500)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    if __spec__ is not None:  # python -m: run the module as the app imports it, so that --app has the same classes
        import importlib

        main = importlib.import_module(__spec__.name).main
    sys.exit(main())

# MIT License
#
# Copyright (c) 2026 the webhook_outbox authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
# documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
# rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
# permit persons to whom the Software is furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
# Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
# WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
# COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
# OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
