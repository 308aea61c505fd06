# webhook_outbox.py - webhooks from your SQLite transaction, signed and retried.
# Do this first: copy this file into your app, pip install requests, python webhook_outbox.py demo
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["requests>=2.32.4"]
# ///
"""Send webhooks from a small app without a broker: the event commits with your data or not at all.

    outbox = Outbox("app.db")                      # makes its own tables, prefix webhook_
    outbox.ensure_endpoint("https://example.com/hooks", id="crm", events=["order.*"])

    with sqlite3.connect("app.db") as conn:        # your transaction
        conn.execute("INSERT INTO orders (total) VALUES (49.99)")
        outbox.emit(conn, "order.created", {"total": 49.99})

    outbox.start()                                 # or: python -m webhook_outbox --db app.db drain

How it works
    emit inserts one row on your connection; a trigger makes of it the event and a delivery for each
    endpoint that wants it. One thread of one process drains: it picks what is due, signs and sends
    it, and records what came back, many outcomes in one commit. The tables are the whole state.

What holds
    If your commit returned, every matching endpoint gets the event until it answers 2xx or 410, the
    delivery lands in the table webhook_failed, or an operator says otherwise; across kill -9, and
    across power loss when you commit with PRAGMA synchronous=FULL. After a rollback nothing is ever
    sent. An event may arrive twice after a crash, a timeout or a replay, always with the same id
    (the header webhook-id) and the same bytes: receivers deduplicate (Inbox does it for you). Bytes
    go only to addresses that the guard allows. An attempt ends half a second after its timeout at
    the latest. An endpoint that hangs, fails or is slow costs the others little.

What does not hold
    No order between events, except between those of one endpoint with one key (or an endpoint that
    is ordered). No exactly-once on the wire: nobody has that. No delivery while no process drains.
    Secrets stand in the file as plain text, except those that are given as env:NAME or file:PATH
    and those that are derived from a master key.

Words
    event       what happened: a type and JSON data, written once, never changed
    seq         an event's number in the tables, made of time and chance; each is higher than all
                before it. Its public id spells it (msg_...)
    key         what emit's key= gives an event: events with one key go out in order. It is not seq
    endpoint    where to: a URL, or a sender, with its secret and its patterns of types
    sender      a function of the host's that takes events instead of a URL
    delivery    one event to one endpoint, the unit of state; its states stand above the schema
    attempt     one HTTP try of a delivery, or one call of a sender; its result is an outcome
    failed row  a delivery that was given up, in webhook_failed, until somebody replays or discards
                it. gave_up names that moment, on_dead what its queue does then
    queue       deliveries of one endpoint that go out strictly one after the other, from its head:
                those with one key, or all of an endpoint that is ordered
    held        said of a delivery that waits while its endpoint is disabled. Two other things have
                a like name: an endpoint is on hold while it pauses (Retry-After, or after failures
                in a row); and a queue with on_dead=hold waits behind a failed row
    host        the app whose file and process we live in; receiver: the server at the other end
    tenant      a customer of the host; an endpoint of a tenant gets that tenant's events only
    origin      scheme, host, port, certificate and CA: what connections belong to
    door        an object of the class Tenant: the outbox's verbs, for one customer's things only
    home        the name of the place where a file is used (production, say): no other place sends
                from it, so a copy is harmless
    guard       decides which addresses may be reached: public ones, and those of allow_networks
    place       the right to have one attempt under way; there are `workers` of them. (Where the
                text is about homes, a place is a machine or a deployment.)
    drain       to send what is due; one process per file drains, others stand by

Contents, each section using only what stands above it, except in annotations: defaults and schema,
errors, types (values); signing, retry policy, network guard (pure functions); transport, exchange
(one attempt); catalogue, endpoint options; storage; drain, its rooms, then its loop; outbox, tenant
(the verbs); receiving; doctor, pages, command line (what people look at); licence, at the end.
"""

from __future__ import annotations

import atexit
import base64
import binascii
import bisect
import codecs
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import email.utils
import errno
import functools
import hashlib
import heapq
import hmac
import html
import inspect
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
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import sys
import threading
import time
import urllib.parse
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TypedDict, TypeVar

import requests
import requests.adapters
import requests.utils

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
    "EventType",
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
    "Tenant",
    "TenantOptions",
    "TimestampError",
    "TransactionLost",
    "UnsafeURL",
    "dashboard_app",
    "main",
    "portal_app",
    "schema_sql",
    "sign",
    "verify",
]

_log = logging.getLogger("webhook_outbox")


def _utc() -> float:
    """Return UTC seconds since 1970: the clock of an Outbox that was given none.

    time.time is looked up at each call. freezegun puts its own function there while a test of the
    host runs, and events and signatures have the frozen time then, as that test expects.
    """
    return time.time()


# Seconds that only grow, for deadlines and pauses. freezegun replaces time.monotonic too, and with
# a frozen one no deadline would ever come. It leaves clock_gettime alone, so that is asked.
_monotonic = (
    functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
    if hasattr(time, "CLOCK_MONOTONIC")
    else functools.partial(time.monotonic)
)

# ── defaults and schema ───────────────────────────────────────────────────────────────────────────
# Promises: the tables are the whole state; each trigger is one rule of the product, so that plain
# SQL (the sqlite3 shell, another language) gets the same rules. The SQL knows nothing about Python.
# The numbers that several sections use stand first.

_SQLITE_NEEDED = (3, 34, 0)
_MAX_BODY = 262_144  # bytes of an event's data
_WARN_BODY = 20_480  # bytes; Standard Webhooks (Payload size) recommends less than 20 kB
_RETENTION = 30 * 86_400.0  # seconds
_KEPT_RESPONSE = 4_096  # bytes of an answer that are stored
_KEPT_SUCCESS = 512  # the same of a 2xx: nobody looks at those, and there are many
# What reading one answer may cost. A receiver may send without end, so the bytes that are read have
# a limit. It may also send one byte at a time, and a read costs time whatever it brings: so each
# read, and each chunk, counts as _READ_COST bytes more.
_READ_AT_ONCE = 1_024  # bytes that are read of one answer in one turn of the loop
_READ_TIME = 0.002  # seconds of CPU in one turn for answers that took more than one read
_READ_RESPONSE = 65_536  # bytes that are read of an answer in all, with its heads and framing
_READ_HEAD = 16_384  # bytes of status line and headers that are read
_READ_COST = 64  # bytes
# So many bytes of an answer, counted like that, cost the other endpoints as much as an attempt that
# holds its place for a second more: see _Places.
_READ_SECOND = 16_384
# Seconds until an idle connection is closed, so that DNS changes are followed.
_IDLE_CONNECTION = 60.0
# Why an attempt failed, or a delivery was given up: the column `reason`.
_REASONS = (
    "dns",  # the host's name did not resolve in time
    "blocked",  # the guard refuses the URL, or the address that the name resolved to
    "connect",  # there is no connection, or it broke
    "tls",  # the handshake failed, or the certificate is not good
    "timeout",  # the attempt's time was over
    "protocol",  # what came back is no HTTP answer that can be read
    "status",  # the answer is no success
    "gone",  # the answer is 410: the endpoint is disabled
    "aborted",  # the answer says webhook-delivery: abort-message: this delivery is given up
    # The event is worth nothing any more (emit's expires), or its endpoint has failed for as long
    # as the retry schedule lasts.
    "expired",
    "sender",  # a sender of the host's raised
    "internal",  # our side: a secret is missing, a transform misbehaves, a row is damaged
)

# A delivery's states (webhook_deliveries.status):
#
#   pending    waits to be tried; due_at says from when on
#   queued     waits behind the head of its queue; people are shown "pending"
#   delivered  a 2xx came, or a sender returned
#   failed     given up; it has a row in webhook_failed
#   discarded  was failed, and that row was deleted; people are shown "failed"
#   cancelled  was taken back while it waited
#
# A disabled endpoint changes no state; people are shown "held" for what waits for it.
#
# What leads from one state to another. _SETTLE is SQL that several triggers run, see below; names
# with webhook_ are triggers. The other names are verbs of Outbox; attempts are the drain's.
#
#   from                to         by
#   (none)              pending    emit; backfill; resend to an endpoint that had none of it
#   (none)              queued     emit, where its queue has a head already
#   queued              pending    _SETTLE: the head of its queue ended or was deleted
#                                  webhook_endpoints_release: its endpoint holds queues no longer
#                                  webhook_deliveries_requeue: its endpoint is not ordered any more
#   pending             queued     _SETTLE: an older one of its queue waits again, or it was put
#                                  into a queue (backfill; its endpoint was made ordered)
#   pending, queued     the same   an attempt failed and another one will follow, at due_at
#                                  retry_now: due_at is now
#   pending, queued,    delivered  an attempt succeeded. Also after cancel: that is what happened
#     cancelled
#   pending, queued     failed     the last attempt of the schedule failed; 410; abort-message;
#                                  expired; its endpoint is not there
#   pending, queued     cancelled  cancel; erase; adopt and neutralize, in a file that was copied
#   failed              pending    replay (webhook_deliveries_tell deletes the failed row)
#   failed              discarded  webhook_failed_discard: its failed row was deleted, by discard,
#                                  failed_retention, remove_endpoint or plain SQL
#   any but queued      pending    resend, unless the event was erased; _SETTLE may queue it at once
#   pending, queued     (none)     remove_endpoint
#   delivered,          (none)     prune, with the event, when nothing of it waits or is failed;
#     discarded,                   webhook_endpoints_again: another endpoint gets the id of one
#     cancelled                    that was removed
#   any                 (none)     forget, with all that was a customer's
#
# erase leaves a failed row failed, and takes it out of its queue.

# The triggers below use iif() instead of CASE: tools that cut SQL into statements (sqlparse, which
# Django uses) take the END of a CASE for that of the trigger.

# A queue is one key of one endpoint, or a whole ordered endpoint. Its head is its oldest delivery
# that has not ended; or a failed one, where that is older and the endpoint holds on to it (on_dead
# = 'hold'). Only the head may be 'pending'. Those behind it are 'queued' and so not in the index
# that the drain reads: a queue of a million costs a pick no more than one of two.
#
# _SETTLE makes that so again, for the queue of one row, {row}: NEW or OLD of a trigger. Where the
# head is a failed one, nothing of the queue stays pending.
_SETTLE = """
  UPDATE webhook_deliveries SET status = 'queued'
   WHERE endpoint_id = {row}.endpoint_id AND queue = {row}.queue AND status = 'pending'
     AND event > {head};
  UPDATE webhook_deliveries SET status = 'pending'
   WHERE endpoint_id = {row}.endpoint_id AND queue = {row}.queue AND status = 'queued'
     AND event = {head};"""
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
          AND EXISTS (SELECT 1 FROM webhook_endpoints
                       WHERE id = {row}.endpoint_id AND on_dead = 'hold')))"""


def _settle(row: str) -> str:
    """Return the statements of a trigger that put the queue of NEW, or of OLD, in order."""
    return _SETTLE.format(row=row, head=_HEAD.format(row=row))


# What emit matches against is webhook_patterns, one row for a pattern of an endpoint, made from the
# JSON list in webhook_endpoints.events whenever that changes. A disabled endpoint has no rows
# there, so new events make no deliveries for it.
#
# GLOB is the matcher: '*' is everything except webhook.*, 'order.*' everything below order. A
# pattern that another one of the same endpoint covers is left out, so that a type matches at most
# one row of an endpoint and makes one delivery.
#
# The first two statements are for what plain SQL writes; add_endpoint checks the same in Python.
_SUBSCRIBE = """
  SELECT RAISE(ABORT, 'webhook_endpoints: at most 100 patterns an endpoint')
   WHERE json_array_length(NEW.events) > 100;
  SELECT RAISE(ABORT, 'webhook_endpoints: filter must be a JSON object, paths to lists of values')
   WHERE NEW.filter IS NOT NULL
     AND iif(json_valid(NEW.filter), json_type(NEW.filter) <> 'object', 1);
  DELETE FROM webhook_patterns WHERE endpoint_id = NEW.id;
  INSERT INTO webhook_patterns (tenant, pattern, endpoint_id, ordered, filter)
  SELECT DISTINCT coalesce(NEW.tenant, ''), one.value, NEW.id, NEW.ordered, nullif(NEW.filter, '{}')
    FROM json_each(NEW.events) AS one
   WHERE NEW.enabled AND NOT EXISTS (
     SELECT 1 FROM json_each(NEW.events) AS wider
      WHERE wider.value <> one.value AND one.value GLOB wider.value
        AND NOT (wider.value = '*' AND one.value GLOB 'webhook.*'));"""
# How a running drain learns of changes, whichever process makes them: it keeps the numbers that it
# saw last and compares. _TOUCH gives a changed endpoint the next version; the drain reads those
# endpoints again whose version is higher than the highest it knows.
_TOUCH = """
  UPDATE webhook_meta SET value = value + 1 WHERE key = 'endpoints_version';
  UPDATE webhook_endpoints
     SET version = (SELECT value FROM webhook_meta WHERE key = 'endpoints_version')
   WHERE id = NEW.id;"""
# A drain finds new deliveries behind the newest event that it has seen. Where a delivery of an
# older event becomes due (a replay, say), this counts up, and the drain looks over all that wait.
_WORK = "UPDATE webhook_meta SET value = value + 1 WHERE key = 'work'"
# The time now in SQL, in seconds since 1970. Where 000 is written behind it, its last factor is
# 86400000, and it is in milliseconds.
_NOW = "(julianday('now') - 2440587.5) * 86400"
_EVENT_ID = "printf('msg_%016x', {})"
_CHANCE_BITS = 20  # the lowest bits of a seq, which are random; above them stand the milliseconds
_CHANCE = f"abs(random() % {1 << _CHANCE_BITS})"
# The latest time that a seq can hold, in the year 2109. A later clock (one that gives milliseconds
# instead of seconds, say) is taken for it: its seq would not fit into SQLite's 63 bits. From then
# on each seq is the one before and a random step, with room for trillions of events.
_LAST_MILLISECOND = (1 << 42) - 1
# Likewise the latest time of an event, in seconds. The CHECKs of the tables below have room above
# it for the longest delay, after which a delivery may be due.
_LAST_SECOND = 1e12


def _refuse(why: str, when: str) -> str:
    """Return a statement of a trigger that refuses a row, with a message for whoever wrote it.

    One statement a rule: a chain of conditions in one expression would be too deep for hosts that
    set SQLITE_LIMIT_EXPR_DEPTH as SQLite recommends. A condition that is NULL refuses nothing.
    """
    return f"\n  SELECT RAISE(ABORT, 'webhook_emit: {why}') WHERE {when};"


_DEEPEST = 500  # levels of nested data; Python and SQLite give up at a thousand
# Whether data is nested deeper. The levels are only walked where the text has more brackets than
# that, which hardly any data has. Braces stand double: this is an f-string.
_TOO_DEEP = f"""
     iif(length(NEW.data) - length(replace(replace(NEW.data, '[', ''), '{{', '')) > {_DEEPEST},
     EXISTS (
       WITH RECURSIVE level(part, depth) AS (
         SELECT NEW.data, 1
          UNION ALL
         SELECT value, depth + 1 FROM level, json_each(part)
          WHERE type IN ('array', 'object') AND depth <= {_DEEPEST})
       SELECT 1 FROM level WHERE depth > {_DEEPEST}), 0)"""
# What plain SQL inserts into webhook_emit is checked here, as emit checks it in Python. SQL knows
# nothing of the host's Outbox: the default of max_body holds, there is no catalogue, and the first
# attempt comes at once, whatever the RetryPolicy says. Headers may hold 16 KiB; 20,000 leaves room
# for the JSON around them.
_EMIT_CHECKS = "".join(
    _refuse(why, when)
    for when, why in (
        (
            "coalesce(json_valid(NEW.data), 0) = 0 OR instr(NEW.data, char(0))",
            "data must be JSON text",
        ),
        (_TOO_DEEP, f"data is nested too deeply, more than {_DEEPEST} levels"),
        (f"length(CAST(NEW.data AS BLOB)) > {_MAX_BODY}", "data is too large; send a link instead"),
        (
            "typeof(NEW.type) <> 'text' OR length(NEW.type) NOT BETWEEN 1 AND 256"
            " OR instr(NEW.type, char(0))",
            "type must be text of 1 to 256 characters",
        ),
        (
            "NEW.type GLOB '*[^A-Za-z0-9_.-]*' OR NEW.type GLOB '.*'"
            " OR NEW.type GLOB '*.' OR NEW.type GLOB '*..*'",
            "type must be letters, digits, _ and - in parts joined by dots, at most 256",
        ),
        (
            "length(NEW.tenant) NOT BETWEEN 1 AND 64 OR NEW.tenant GLOB '*[^A-Za-z0-9_-]*'",
            "tenant must be 1 to 64 letters, digits, _ and -;"
            " leave it out for an event of your own",
        ),
        (
            "typeof(NEW.tenant) NOT IN ('text', 'integer', 'null') OR instr(NEW.tenant, char(0))",
            "tenant must be text",
        ),
        (
            "NEW.tenant IS NOT NULL AND NEW.type GLOB 'webhook.*'",
            "events of type webhook.* have no tenant; leave it out",
        ),
        (
            "NEW.headers IS NOT NULL"
            " AND coalesce(json_valid(NEW.headers) AND json_type(NEW.headers) = 'object', 0) = 0",
            "headers must be a JSON object",
        ),
        ("length(CAST(NEW.headers AS BLOB)) > 20000", "headers must hold at most 16 KiB in all"),
        (
            "NEW.created_at IS NOT NULL AND (typeof(NEW.created_at) NOT IN ('real', 'integer')"
            " OR NEW.created_at NOT BETWEEN 0 AND 1e11)",
            "created_at must be UTC seconds; leave it out for now",
        ),
        (
            "NEW.delay IS NOT NULL AND (typeof(NEW.delay) NOT IN ('real', 'integer')"
            " OR NEW.delay NOT BETWEEN 0 AND 1e9)",
            "delay must be seconds, 0 to 1e9",
        ),
        (
            "NEW.expires IS NOT NULL AND (typeof(NEW.expires) NOT IN ('real', 'integer')"
            " OR NEW.expires NOT BETWEEN 0.001 AND 1e9)",
            "expires must be seconds, 0.001 to 1e9",
        ),
        (
            "length(NEW.key) > 256 OR instr(NEW.key, char(0))",
            "key must be text of at most 256 characters",
        ),
        (
            "length(NEW.idempotency_key) > 256 OR instr(NEW.idempotency_key, char(0))",
            "idempotency_key must be text of at most 256 characters",
        ),
    )
)

# The deliveries of a new event, NEW being its row of webhook_accept, to the endpoints of one
# tenant, for whom {} stands. The trigger has this twice, for the event's own tenant and for '*': an
# IN of both would build a table for two values.
#
# A new event is the newest of its queue. So it is the head where nothing else of that queue is
# unfinished, or failed and held, and queued otherwise. This is decided here: a trigger that looked
# at each new delivery would cost an eighth of an emit, also where there is no queue.
#
# `matched` says which endpoints with a filter let the event through. Where it is NULL and there is
# such an endpoint, the insert is refused; the library then decides and inserts again.
_MATCH = """
  SELECT NEW.seq, endpoint_id, NEW.due_at, NEW.expires_at, iif(ordered, '', NEW.key),
         iif(EXISTS (
           SELECT 1 FROM webhook_deliveries
            WHERE (endpoint_id = p.endpoint_id AND queue = iif(ordered, '', NEW.key))
              AND ((status = 'pending' OR status = 'queued' OR status = 'failed')
                   AND (ordered OR NEW.key IS NOT NULL))
              AND (status <> 'failed'
                   OR EXISTS (SELECT 1 FROM webhook_endpoints
                               WHERE id = endpoint_id AND on_dead = 'hold'))),
           'queued', 'pending')
    FROM webhook_patterns AS p
   WHERE tenant = {} AND NEW.type GLOB pattern AND (pattern <> '*' OR NEW.type NOT GLOB 'webhook.*')
     AND (filter IS NULL
          OR iif(NEW.matched IS NULL, RAISE(ABORT, 'webhook_emit: filters decide'),
                 instr(NEW.matched, ' ' || endpoint_id || ' ')))"""
# The patterns with a filter that match an event's type. {0} is NEW. in a trigger, or : where type
# and tenant are parameters.
_FILTERED = """SELECT endpoint_id, filter FROM webhook_patterns
   WHERE tenant IN (coalesce({0}tenant, ''), '*') AND filter IS NOT NULL
     AND {0}type GLOB pattern AND (pattern <> '*' OR {0}type NOT GLOB 'webhook.*')"""


def _met(filter: str, data: str) -> tuple[str, str]:
    """Return the SQL, a FROM and a WHERE, that finds which paths of a filter an event's data meets.

    A path is met where data has one of the wanted values there, or an array with one of them; its
    name is `wanted.key`. The event passes when all paths of the filter are met: the caller counts
    those that were found. _lets_through says the same in Python. filter, data: SQL expressions of
    JSON text.

    Values compare as JSON values: SQL alone would take true for 1. SQLite before 3.45 ends a text
    at a NUL, so a text with \\u0000 in its JSON meets nothing. In JSON two backslashes stand for
    one, and u0000 behind those is plain text: so each two are taken out before \\u0000 is looked
    for.
    """
    path = """'$."' || replace(wanted.key, '.', '"."') || '"'"""
    return (
        f"""json_each({filter}) AS wanted, json_each({data}, {path}) AS found,
                  json_each({filter}, wanted.fullkey) AS value""",
        f"""found.value IS value.value
             AND replace(found.type, 'integer', 'real') = replace(value.type, 'integer', 'real')
             AND json_type({data}, {path}) <> 'object'
             AND iif(found.type = 'text',
                     instr(replace(json_extract({data}, found.fullkey, found.fullkey),
                                   char(92, 92), ''), '\\u0000'),
                     0) = 0""",
    )


_MATCH_OWN = _MATCH.format("coalesce(NEW.tenant, '')")
_MET_BY_NEW = _met("p.filter", "CAST(NEW.data AS TEXT)")
# Whether the event of an answer was erased. Then the answer is not kept: it may repeat the data.
_ERASED = "EXISTS (SELECT 1 FROM webhook_erased WHERE event = NEW.event)"
# What an attempt does to its delivery, NEW being a row of webhook_record. Its status is what the
# drain decided: delivered, failed, or pending for "there will be another attempt".
#
# What was cancelled while its attempt was under way stays cancelled, unless that brought a success:
# then it is delivered, because that is what happened. A delivery that has ended otherwise meanwhile
# is left alone. {}: a further status in which it is changed.
_AFTER_TRY = """
  UPDATE webhook_deliveries
     SET status = iif(NEW.status = 'pending' OR NEW.status = 'failed' AND status = 'cancelled',
                      status, NEW.status),
         due_at = NEW.due_at,
         attempts = attempts + 1,
         first_attempt_at = coalesce(first_attempt_at, NEW.at),
         delivered_at = iif(NEW.status = 'delivered', NEW.at + NEW.duration, delivered_at)
   WHERE event = NEW.event AND endpoint_id = NEW.endpoint_id
     AND (status = 'pending' OR status = 'queued'{});"""
_AFTER_ANY_TRY = _AFTER_TRY.format(" OR status = 'cancelled'")
# Said where the drain writes and has not heard yet that an endpoint was removed.
_UNHEARD = "webhook_record: an endpoint was removed meanwhile"
# The row of webhook_failed, after the delivery became 'failed'. Its event may be missing: somebody
# may have deleted rows by hand.
_GIVE_UP = """
  INSERT OR IGNORE INTO webhook_failed
         (event, endpoint_id, type, key, attempts, reason, status_code, error, response,
          first_attempt_at, failed_at)
  SELECT d.event, d.endpoint_id, coalesce(e.type, ''), e.key, d.attempts, NEW.reason,
         NEW.status_code, NEW.error, NEW.response, d.first_attempt_at, NEW.at + NEW.duration
    FROM webhook_deliveries AS d LEFT JOIN webhook_events AS e ON e.seq = d.event
   WHERE NEW.status = 'failed' AND d.status = 'failed'
     AND d.event = NEW.event AND d.endpoint_id = NEW.endpoint_id;"""


def _checks(condition: str, columns: str) -> str:
    """Return a CHECK of a condition for each of some columns; a column that is NULL passes.

    SQLite stores values of any type in any column. The drain calculates with these columns, so one
    row in which plain SQL wrote a text instead of a number would stop it.
    """
    return ",\n".join(f"  CHECK ({condition.format(name)})" for name in columns.split())


# In SQLite text and blobs are greater than every number, so a range of numbers refuses them too.
_numbers = functools.partial(_checks, "{} BETWEEN -1e15 AND 1e15")
_wholes = functools.partial(_checks, "typeof({0}) <> 'real' AND {0} BETWEEN -1e12 AND 1e12")
# OR and not IN: sqlacodegen takes an IN in a CHECK for an enumeration.
_texts = functools.partial(_checks, "{0} IS NULL OR typeof({0}) = 'text'")

# The statements that make the tables, in their order: tables with their indexes, then the ways in
# (the views webhook_accept and webhook_emit, whose triggers make events and deliveries), then the
# rules (triggers of the tables), then webhook_record, through which the drain writes.
_FIRST_SCHEMA = (
    # Keys of webhook_meta, one row each:
    #   outbox             the identity of this outbox, so that emit notices another file
    #   schema_version     how many entries of _SCHEMA were run
    #   endpoints_version, endpoints_removed, work, cancelled
    #                      count up when something changes that a drain must look at (see _TOUCH)
    #   drains             counts up when a drain starts: so it finds out whether it can write
    #   home               whose file it is, where the host gives a home: a copy must not send
    #   master_check, last_secret
    #                      of a master key: what tells it from a wrong one, and the last number used
    """CREATE TABLE webhook_meta (key TEXT PRIMARY KEY NOT NULL, value) WITHOUT ROWID""",
    # From failing_since to paused_until the drain keeps the endpoint's health here (see _Health),
    # so that a restart forgets nothing of it.
    f"""CREATE TABLE webhook_endpoints (
  id TEXT PRIMARY KEY NOT NULL CHECK (id NOT GLOB '*[^A-Za-z0-9_-]*'),
  url TEXT NOT NULL,
  events TEXT NOT NULL DEFAULT '["*"]',        -- JSON list of patterns
  tenant TEXT                                  -- for life; '*' sees all
    CHECK (tenant = '*' OR length(tenant) BETWEEN 1 AND 64 AND tenant NOT GLOB '*[^A-Za-z0-9_-]*'),
  filter TEXT,                                 -- JSON object: path -> list of values
  description TEXT NOT NULL DEFAULT '',
  headers TEXT NOT NULL DEFAULT '{{}}',          -- JSON object
  body TEXT NOT NULL DEFAULT 'standard',
  signing TEXT NOT NULL DEFAULT 'standard',
  secrets TEXT NOT NULL,                       -- JSON: [[secret, until/null], ...], current first
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
  unsteady_since REAL,                         -- first failure since ten successes in a row
  good INTEGER NOT NULL DEFAULT 0,             -- attempts since then: successes
  bad INTEGER NOT NULL DEFAULT 0,              -- and failures
  paused_until REAL NOT NULL DEFAULT 0,        -- Retry-After, or the pause before the next probe
  version INTEGER NOT NULL DEFAULT 0,          -- kept by triggers: of what the drain must know
  registered INTEGER NOT NULL DEFAULT 0,       -- kept by a trigger: its first version, for life
{_numbers("rate timeout created_at failing_since unsteady_since paused_until")},
{_wholes("max_in_flight ordered enabled failures good bad version registered")},
{_texts("id url events body signing secrets on_dead disabled_reason description headers")},
  CHECK (max_in_flight > 0)
)""",
    """CREATE INDEX webhook_endpoints_version ON webhook_endpoints (version)""",
    # The endpoints of one tenant: a customer's page costs what that customer has, however much the
    # others have.
    """CREATE INDEX webhook_endpoints_of ON webhook_endpoints (tenant) WHERE tenant IS NOT NULL""",
    # An event looks up its own tenant and '*': what other tenants registered costs it nothing.
    """CREATE TABLE webhook_patterns (          -- kept by triggers: what emit matches against
  tenant TEXT NOT NULL,                        -- '' for none
  pattern TEXT NOT NULL,
  endpoint_id TEXT NOT NULL,
  ordered INTEGER NOT NULL,
  filter TEXT,
  PRIMARY KEY (tenant, pattern, endpoint_id),
  CHECK (length(pattern) <= 256)
) WITHOUT ROWID""",
    """CREATE INDEX webhook_patterns_filter ON webhook_patterns (tenant)
 WHERE filter IS NOT NULL""",
    """CREATE INDEX webhook_patterns_endpoint ON webhook_patterns (endpoint_id)""",
    # An event's number, seq, is made of the time and of chance. Each is higher than all before it,
    # which is checked under the write lock, so a drain finds what is new behind the newest that it
    # has seen. SQLite's own numbers would be issued again after the newest event was deleted or a
    # backup restored, and an outcome would meet another event's delivery. The column key is another
    # thing: it names the event's queue.
    f"""CREATE TABLE webhook_events (
  seq INTEGER PRIMARY KEY,                     -- milliseconds since 1970 << 20, plus chance
  id TEXT GENERATED ALWAYS AS ({_EVENT_ID.format("seq")}) VIRTUAL,
  type TEXT NOT NULL,
  tenant TEXT,
  data TEXT NOT NULL,                          -- JSON, sent byte for byte
  key TEXT,
  idempotency_key TEXT,
  headers TEXT,                                -- JSON object
  created_at REAL NOT NULL,
  expires_at REAL,                             -- from then on it is worth nothing
{_numbers("created_at")},
{_texts("type tenant data key idempotency_key headers")},
  CHECK (seq BETWEEN 0 AND 6900000000000000000)  -- beyond it there would soon be no key left
)""",
    """CREATE INDEX webhook_events_of ON webhook_events (tenant, seq) WHERE tenant IS NOT NULL""",
    """CREATE INDEX webhook_events_key ON webhook_events (key) WHERE key IS NOT NULL""",
    # Which events were erased. It is looked into for each answer that is recorded, and is mostly
    # empty. To look at a column of webhook_events instead would cost three times as much, since it
    # would read the event's row.
    """CREATE TABLE webhook_erased (            -- events whose data is gone: never delivered again
  event INTEGER PRIMARY KEY,                   -- webhook_events.seq
  erased_at REAL NOT NULL
)""",
    """CREATE UNIQUE INDEX webhook_events_once
 ON webhook_events (idempotency_key, coalesce(tenant, '')) WHERE idempotency_key IS NOT NULL""",
    # In the order of the events, so that a drain finds what is new at the end of the table.
    f"""CREATE TABLE webhook_deliveries (
  event INTEGER NOT NULL,                      -- webhook_events.seq
  endpoint_id TEXT NOT NULL,
  status TEXT NOT NULL DEFAULT 'pending',      -- queued, delivered, failed, discarded, cancelled
  attempts INTEGER NOT NULL DEFAULT 0,         -- since it was emitted, replayed or resent
  due_at REAL NOT NULL,                        -- of the next attempt
  expires_at REAL,                             -- the event's, until somebody replays or resends it
  first_attempt_at REAL,
  delivered_at REAL,
  queue TEXT,                                  -- the event's key; '' on an ordered endpoint
  PRIMARY KEY (event, endpoint_id),
{_numbers("due_at expires_at first_attempt_at delivered_at")},
{_wholes("attempts")},
{_texts("endpoint_id")}
) WITHOUT ROWID""",
    # What the drain picks from: of one endpoint, the oldest due first.
    """CREATE INDEX webhook_deliveries_due ON webhook_deliveries (endpoint_id, due_at, event)
 WHERE status = 'pending'""",
    # Only rows that have not ended, or are failed: what was delivered stays for a month, and must
    # cost neither a count nor a look. SQLite uses such an index only for a query whose own
    # conditions imply those of the index, so queries of queues say `queue IS NOT NULL` and one
    # status.
    """CREATE INDEX webhook_deliveries_queue
 ON webhook_deliveries (endpoint_id, queue, status, event)
 WHERE queue IS NOT NULL AND (status = 'pending' OR status = 'queued' OR status = 'failed')""",
    f"""CREATE TABLE webhook_attempts (
  id INTEGER PRIMARY KEY,
  event INTEGER NOT NULL,                      -- webhook_events.seq
  endpoint_id TEXT NOT NULL,
  at REAL NOT NULL,                            -- when it began
  duration REAL NOT NULL,                      -- seconds
  status_code INTEGER,
  reason TEXT,                                 -- NULL: delivered
  error TEXT,
  response TEXT,
{_numbers("at duration")},
{_wholes("id status_code")},
{_texts("endpoint_id reason error response")}
)""",
    """CREATE INDEX webhook_attempts_event ON webhook_attempts (event)""",
    # An endpoint's last hour (stats) is counted in this index alone, without a look at the rows.
    # Each endpoint is counted for itself: among the newest attempts of all, a busy one would hide
    # the others. Half a million attempts of one cost a few hundredths of a second.
    """CREATE INDEX webhook_attempts_endpoint ON webhook_attempts (endpoint_id, at, reason)""",
    # Deliveries that were given up. Hosts read this table in their own SQL, so its columns are part
    # of what we promise. AUTOINCREMENT: no id comes again, so pages can go by it.
    f"""CREATE TABLE webhook_failed (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  event INTEGER NOT NULL,                      -- webhook_events.seq
  event_id TEXT GENERATED ALWAYS AS ({_EVENT_ID.format("event")}) VIRTUAL,
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
  UNIQUE (event, endpoint_id),
{_numbers("first_attempt_at failed_at")},
{_wholes("id attempts status_code")},
{_texts("endpoint_id type key reason error response")}
)""",
    """CREATE INDEX webhook_failed_endpoint ON webhook_failed (endpoint_id, failed_at)""",
    # Ids of removed endpoints, of which there may still be rows: see webhook_endpoints_again.
    """CREATE TABLE webhook_removed (           -- endpoints that were there once
  id TEXT PRIMARY KEY NOT NULL
) WITHOUT ROWID""",
    # Prometheus wants counters that only grow, and the rows that were counted leave after a while.
    f"""CREATE TABLE webhook_counts (            -- what metrics counts, by endpoint and name
  endpoint_id TEXT NOT NULL,
  name TEXT NOT NULL,
  value REAL NOT NULL,
  PRIMARY KEY (endpoint_id, name),
{_numbers("value")},
{_texts("endpoint_id name")}
) WITHOUT ROWID""",
    # The receiver's half: ids that Inbox has accepted.
    """CREATE TABLE webhook_inbox (
  id TEXT PRIMARY KEY NOT NULL, received_at REAL NOT NULL
) WITHOUT ROWID""",
    # The library's own way in. It has checked the row already, so this trigger needs no JSON
    # function, which hosts with PRAGMA trusted_schema = OFF refuse in some versions of SQLite. For
    # the same reason filters are decided outside. The columns that are not the event's:
    #   due_at    of its deliveries
    #   outbox    the identity of the file that the host means; NULL: not compared
    #   internal  1: customers get this type only where the operator subscribed by its name; the
    #             catalogue, which only the library knows, says so
    #   matched   the endpoints whose filter lets it through, each between blanks; NULL: not known
    """CREATE VIEW webhook_accept AS
SELECT seq, type, tenant, data, key, idempotency_key, headers, created_at, expires_at,
       0.0 AS due_at, NULL AS outbox, NULL AS internal, NULL AS matched FROM webhook_events""",
    # In this order: another file is an error; an event with this idempotency_key that is there is
    # the answer (RAISE(IGNORE) ends the insert without an error), or an error where it is another
    # event; a seq that is not new is an error, on which the library chooses a higher one; then the
    # rows.
    f"""CREATE TRIGGER webhook_accept_insert INSTEAD OF INSERT ON webhook_accept BEGIN
  SELECT RAISE(ABORT, 'webhook_emit: this is another outbox')
   WHERE NEW.outbox <> (SELECT value FROM webhook_meta WHERE key = 'outbox');
  SELECT iif(type = NEW.type AND data = NEW.data, RAISE(IGNORE),
             RAISE(ABORT, 'webhook_emit: this idempotency_key was used for another event'))
    FROM webhook_events
   WHERE idempotency_key = NEW.idempotency_key AND coalesce(tenant, '') = coalesce(NEW.tenant, '');
  SELECT RAISE(ABORT, 'webhook_emit: the seq is not new')
   WHERE NEW.seq <= (SELECT max(seq) FROM webhook_events);
  INSERT INTO webhook_events
         (seq, type, tenant, data, key, idempotency_key, headers, created_at, expires_at)
  VALUES (NEW.seq, NEW.type, NEW.tenant, NEW.data, NEW.key, NEW.idempotency_key, NEW.headers,
          NEW.created_at, NEW.expires_at);
  INSERT INTO webhook_deliveries
         (event, endpoint_id, due_at, expires_at, queue, status){_MATCH_OWN}
     AND (NEW.internal IS NULL OR pattern = NEW.type)
   UNION ALL{_MATCH.format("'*'")};
END""",
    # The way in for plain SQL, for triggers on the host's tables and other languages. It checks the
    # row, makes the seq as _Seqs does, decides filters, and hands over to webhook_accept.
    """CREATE VIEW webhook_emit AS
SELECT type, data, tenant, key, idempotency_key, 0.0 AS delay, 0.0 AS expires, headers, created_at
  FROM webhook_events""",
    f"""CREATE TRIGGER webhook_emit_insert INSTEAD OF INSERT ON webhook_emit BEGIN{_EMIT_CHECKS}
  INSERT INTO webhook_accept
         (seq, type, tenant, data, key, idempotency_key, headers, created_at, due_at, expires_at,
          matched)
  SELECT max((min(CAST({_NOW}000 AS INTEGER), {_LAST_MILLISECOND}) << {_CHANCE_BITS}) | {_CHANCE},
             coalesce((SELECT max(seq) FROM webhook_events), 0) + 1 + {_CHANCE}),
         NEW.type, CAST(NEW.tenant AS TEXT), CAST(NEW.data AS TEXT), nullif(NEW.key, ''),
         NEW.idempotency_key, NEW.headers, coalesce(NEW.created_at, {_NOW}),
         coalesce(NEW.created_at, {_NOW})
         + min(coalesce(NEW.delay, 0.0), coalesce(NEW.expires, 1e9)),
         coalesce(NEW.created_at, {_NOW}) + NEW.expires,
         coalesce(' ' || group_concat(endpoint_id, ' ') || ' ', ' ')
    FROM (SELECT endpoint_id FROM ({_FILTERED.format("NEW.")}) AS p,
                  {_MET_BY_NEW[0]}
           WHERE {_MET_BY_NEW[1]}
           GROUP BY endpoint_id, filter
          HAVING count(DISTINCT wanted.key) = (SELECT count(*) FROM json_each(filter)));
END""",
    f"""CREATE TRIGGER webhook_endpoints_insert AFTER INSERT ON webhook_endpoints
BEGIN{_SUBSCRIBE}{_TOUCH}
  UPDATE webhook_endpoints SET registered = version WHERE id = NEW.id;
END""",
    f"""CREATE TRIGGER webhook_endpoints_subscribe AFTER UPDATE OF events, filter, ordered, enabled
ON webhook_endpoints WHEN OLD.events <> NEW.events OR OLD.filter IS NOT NEW.filter
 OR OLD.ordered <> NEW.ordered OR OLD.enabled <> NEW.enabled BEGIN{_SUBSCRIBE}
END""",
    # What a drain must know of an endpoint. Its health is not among it: the drain wrote that
    # itself.
    f"""CREATE TRIGGER webhook_endpoints_update AFTER UPDATE OF url, events, headers, body, signing,
  secrets, rate, max_in_flight, ordered, on_dead, timeout, cert, ca, enabled
ON webhook_endpoints BEGIN{_TOUCH}
END""",
    """CREATE TRIGGER webhook_endpoints_tenant BEFORE UPDATE OF tenant ON webhook_endpoints
WHEN OLD.tenant IS NOT NEW.tenant BEGIN
  SELECT RAISE(ABORT,
    'webhook_endpoints: the tenant of an endpoint is fixed; add another endpoint');
END""",
    # A whole endpoint becomes one queue, or a queue for each key again; webhook_deliveries_requeue
    # then settles each queue that a row came into.
    """CREATE TRIGGER webhook_endpoints_order AFTER UPDATE OF ordered ON webhook_endpoints
WHEN OLD.ordered <> NEW.ordered BEGIN
  UPDATE webhook_deliveries
     SET queue = iif(NEW.ordered, '', (SELECT key FROM webhook_events WHERE seq = event))
   WHERE endpoint_id = NEW.id AND status IN ('pending', 'queued', 'failed');
END""",
    # An endpoint that no longer holds queues: where a failed delivery was the head of one, the
    # oldest that is queued behind it becomes the head.
    """CREATE TRIGGER webhook_endpoints_release AFTER UPDATE OF on_dead ON webhook_endpoints
WHEN OLD.on_dead = 'hold' AND NEW.on_dead <> 'hold' BEGIN
  UPDATE webhook_deliveries SET status = 'pending'
   WHERE endpoint_id = NEW.id AND queue IS NOT NULL AND status = 'queued'
     AND event = (SELECT min(o.event) FROM webhook_deliveries AS o
                   WHERE o.endpoint_id = NEW.id AND o.queue = webhook_deliveries.queue
                     AND o.status = 'queued')
     AND NOT EXISTS (SELECT 1 FROM webhook_deliveries AS o
                      WHERE o.endpoint_id = NEW.id AND o.queue = webhook_deliveries.queue
                        AND o.status = 'pending');
END""",
    # Queued rows are deleted before pending ones: each pending one that is deleted would make a
    # queued one the head, a write for nothing.
    """CREATE TRIGGER webhook_endpoints_delete AFTER DELETE ON webhook_endpoints BEGIN
  DELETE FROM webhook_patterns WHERE endpoint_id = OLD.id;
  DELETE FROM webhook_deliveries
   WHERE endpoint_id = OLD.id AND queue IS NOT NULL AND status = 'queued';
  DELETE FROM webhook_deliveries WHERE endpoint_id = OLD.id AND status = 'pending';
  DELETE FROM webhook_failed WHERE endpoint_id = OLD.id;
  DELETE FROM webhook_counts WHERE endpoint_id = OLD.id;
  INSERT OR IGNORE INTO webhook_removed VALUES (OLD.id);
  UPDATE webhook_meta SET value = value + 1 WHERE key IN ('endpoints_version', 'endpoints_removed');
END""",
    # What was delivered stays on record when its endpoint is removed, until another endpoint gets
    # the id, which may be another customer's. It is seldom, so no index serves the search.
    """CREATE TRIGGER webhook_endpoints_again AFTER INSERT ON webhook_endpoints
WHEN EXISTS (SELECT 1 FROM webhook_removed WHERE id = NEW.id) BEGIN
  DELETE FROM webhook_deliveries WHERE endpoint_id = NEW.id;
  DELETE FROM webhook_attempts WHERE endpoint_id = NEW.id;
  DELETE FROM webhook_failed WHERE endpoint_id = NEW.id;
  DELETE FROM webhook_counts WHERE endpoint_id = NEW.id;
  DELETE FROM webhook_removed WHERE id = NEW.id;
END""",
    # A delivery of a queue ended, or waits again after it had ended: the queue may have another
    # head. Two changes are left out: the end of one that was 'queued', and so not the head (a drain
    # that goes through a queue from memory may record a delivery before those ahead of it); and
    # pending to queued, or back, which is what _SETTLE itself does.
    f"""CREATE TRIGGER webhook_deliveries_finish AFTER UPDATE OF status ON webhook_deliveries
WHEN NEW.queue IS NOT NULL AND OLD.status <> 'queued'
 AND (NEW.status NOT IN ('pending', 'queued') OR OLD.status <> 'pending') BEGIN{_settle("NEW")}
END""",
    # A delivery came into a queue, or out of one (queue NULL), where nobody is ahead of it.
    f"""CREATE TRIGGER webhook_deliveries_requeue AFTER UPDATE OF queue ON webhook_deliveries
WHEN OLD.queue IS NOT NEW.queue BEGIN
  UPDATE webhook_deliveries SET status = 'pending'
   WHERE event = NEW.event AND endpoint_id = NEW.endpoint_id
     AND NEW.queue IS NULL AND status = 'queued';{_settle("NEW")}
END""",
    # The head of a queue was deleted, by plain SQL say: the next one becomes the head. A drain
    # would not find it among what is new.
    f"""CREATE TRIGGER webhook_deliveries_delete AFTER DELETE ON webhook_deliveries
WHEN OLD.queue IS NOT NULL AND OLD.status IN ('pending', 'failed') BEGIN{_settle("OLD")}
  {_WORK};
END""",
    # What a running drain must be told of, by a counter. Where a delivery that had ended waits
    # again, `work` has it look over all that wait. Where one was cancelled, `cancelled` has it
    # forget what it read ahead; in a queue another one became the head, so `work` counts up too. A
    # failed delivery that waits again (replay, resend) also loses its row of webhook_failed.
    """CREATE TRIGGER webhook_deliveries_tell AFTER UPDATE OF status ON webhook_deliveries
WHEN OLD.status <> 'pending' AND OLD.status <> 'queued' OR NEW.status = 'cancelled' BEGIN
  UPDATE webhook_meta SET value = value + 1
   WHERE key IN (iif(NEW.status = 'cancelled', 'cancelled', NULL),
                 iif(NEW.status <> 'cancelled' OR NEW.queue IS NOT NULL, 'work', NULL));
  DELETE FROM webhook_failed
   WHERE event = NEW.event AND endpoint_id = NEW.endpoint_id
     AND OLD.status = 'failed' AND NEW.status = 'pending';
END""",
    # Whoever deletes a failed row, discard or plain SQL, gives its delivery up for good: it stays
    # on record, and a queue that it held goes on. Where the row goes because its delivery waits
    # again, the delivery is not 'failed' any more, and this leaves it alone.
    """CREATE TRIGGER webhook_failed_discard AFTER DELETE ON webhook_failed BEGIN
  UPDATE webhook_deliveries SET status = 'discarded'
   WHERE event = OLD.event AND endpoint_id = OLD.endpoint_id AND status = 'failed';
END""",
    # All of an event goes with it, except its failed rows. Where the newest event is deleted, the
    # next one may get a lower seq, which a drain would not find behind the newest that it has seen:
    # so `work` has it look over all that wait.
    f"""CREATE TRIGGER webhook_events_delete AFTER DELETE ON webhook_events BEGIN
  DELETE FROM webhook_deliveries WHERE event = OLD.seq;
  DELETE FROM webhook_attempts WHERE event = OLD.seq;
  DELETE FROM webhook_erased WHERE event = OLD.seq;
  {_WORK} AND NOT EXISTS (SELECT 1 FROM webhook_events WHERE seq > OLD.seq);
END""",
    # What the drain writes, in one statement a batch. `kind` says how the columns are to be read
    # (_Row has the table of them) and which of the triggers below acts. A row whose kind is NULL
    # does nothing: it only fills the statement up. One view, because several statements would need
    # a transaction, and to hold that from Python costs the host time: see _write_record.
    """CREATE VIEW webhook_record AS
SELECT '' AS kind, event, endpoint_id, status, due_at, 0.0 AS at, 0.0 AS duration,
       NULL AS status_code, NULL AS reason, NULL AS error, NULL AS response
  FROM webhook_deliveries""",
    # An attempt and what came of it. Nothing is recorded of a delivery that is gone by now. Of a
    # delivery's failures the first and the last answer are kept: else one endpoint that always
    # fails with a long answer would fill the disk. Before the third attempt there is hardly any
    # answer between those two, and `attempts > 2` spares the search for one.
    f"""CREATE TRIGGER webhook_record_outcome INSTEAD OF INSERT ON webhook_record
WHEN NEW.kind = 'outcome' BEGIN
  INSERT INTO webhook_attempts
         (event, endpoint_id, at, duration, status_code, reason, error, response)
  SELECT NEW.event, NEW.endpoint_id, NEW.at, NEW.duration, NEW.status_code, NEW.reason,
         iif(NEW.error IS NULL OR {_ERASED}, NULL, NEW.error),
         iif(NEW.response IS NULL OR {_ERASED}, NULL, NEW.response)
   WHERE EXISTS (SELECT 1 FROM webhook_deliveries
                  WHERE event = NEW.event AND endpoint_id = NEW.endpoint_id);{_AFTER_ANY_TRY}
  UPDATE webhook_attempts SET response = NULL
   WHERE NEW.reason IS NOT NULL
     AND event = NEW.event AND endpoint_id = NEW.endpoint_id AND response IS NOT NULL
     AND id < (SELECT max(id) FROM webhook_attempts
                WHERE event = NEW.event AND endpoint_id = NEW.endpoint_id)
     AND id > (SELECT min(id) FROM webhook_attempts
                WHERE event = NEW.event AND endpoint_id = NEW.endpoint_id)
     AND (SELECT attempts FROM webhook_deliveries
           WHERE event = NEW.event AND endpoint_id = NEW.endpoint_id) > 2;
{_GIVE_UP}
END""",
    # The first row of a batch. Its column event says how many removals of endpoints the drain has
    # heard of. Where there were more, nothing of the batch is written: it may be about an endpoint
    # whose id another one has by now, and the drain has to look first.
    f"""CREATE TRIGGER webhook_record_heard INSTEAD OF INSERT ON webhook_record
WHEN NEW.kind = 'heard' BEGIN
  SELECT RAISE(ABORT, '{_UNHEARD}')
   WHERE NEW.event <> (SELECT value FROM webhook_meta WHERE key = 'endpoints_removed');
END""",
    # What had expired when its turn came: given up without an attempt, because its own time was
    # over or, untried, that of an endpoint that fails. Where somebody has replayed or resent it
    # since it was picked, expires_at is NULL and due_at another one, and it is left alone.
    f"""CREATE TRIGGER webhook_record_expired INSTEAD OF INSERT ON webhook_record
WHEN NEW.kind = 'expired' BEGIN
  UPDATE webhook_deliveries SET status = 'failed'
   WHERE event = NEW.event AND endpoint_id = NEW.endpoint_id
     AND (expires_at <= NEW.at OR attempts = 0 AND due_at = NEW.due_at)
     AND (status = 'pending' OR status = 'queued');{_GIVE_UP}
END""",
    # Only the delivery's part of an outcome, written ahead of the outcomes of a batch, the newest
    # first. A drain goes through a queue from memory, so a batch may hold many successes of one
    # queue. Recorded oldest first, each would make the next one the head, a write that is wasted
    # when that one is delivered too; marked newest first, only the last mark moves the head.
    f"""CREATE TRIGGER webhook_record_mark INSTEAD OF INSERT ON webhook_record
WHEN NEW.kind = 'mark' BEGIN{_AFTER_TRY.format("")}
END""",
    # An endpoint's health: due_at is paused_until, at is failing_since, duration is failures, error
    # is why it is to be disabled, or NULL; response is unsteady_since, event is good, status_code
    # is bad.
    """CREATE TRIGGER webhook_record_endpoint INSTEAD OF INSERT ON webhook_record
WHEN NEW.kind = 'endpoint' BEGIN
  UPDATE webhook_endpoints
     SET failures = NEW.duration, failing_since = NEW.at, paused_until = NEW.due_at,
         unsteady_since = NEW.response, good = NEW.event, bad = NEW.status_code
   WHERE id = NEW.endpoint_id;
  UPDATE webhook_endpoints SET enabled = 0, disabled_reason = NEW.error
   WHERE id = NEW.endpoint_id AND NEW.error IS NOT NULL AND enabled;
END""",
    # What was counted of an endpoint since the last write: JSON {name: increment} as response.
    """CREATE TRIGGER webhook_record_counts INSTEAD OF INSERT ON webhook_record
WHEN NEW.kind = 'count' BEGIN
  INSERT INTO webhook_counts SELECT NEW.endpoint_id, key, value FROM json_each(NEW.response)
   WHERE EXISTS (SELECT 1 FROM webhook_endpoints WHERE id = NEW.endpoint_id)
      ON CONFLICT (endpoint_id, name) DO UPDATE SET value = value + excluded.value;
END""",
    # An event about deliveries and endpoints, for endpoints that subscribe to webhook.* by name:
    # its type as status, its data as response. Where nobody subscribed, there is no event.
    """CREATE TRIGGER webhook_record_notice INSTEAD OF INSERT ON webhook_record
WHEN NEW.kind = 'notice' BEGIN
  INSERT INTO webhook_emit (type, data, created_at) SELECT NEW.status, NEW.response, NEW.at
   WHERE EXISTS (SELECT 1 FROM webhook_patterns
                  WHERE tenant IN ('', '*') AND pattern <> '*' AND NEW.status GLOB pattern);
END""",
    # Test suites empty every table of a file between two tests. Nothing of ours works without these
    # rows, so a row that somebody deletes is there again at once. (A drain and emit read them;
    # what belongs to a home or a master key may go.)
    """CREATE TRIGGER webhook_meta_delete AFTER DELETE ON webhook_meta
WHEN OLD.key NOT IN ('home', 'master_check', 'last_secret') BEGIN
  INSERT OR IGNORE INTO webhook_meta VALUES (OLD.key, OLD.value);
END""",
    """INSERT INTO webhook_meta VALUES
  ('outbox', lower(hex(randomblob(8)))), ('endpoints_version', 1), ('endpoints_removed', 0),
  ('work', 0), ('cancelled', 0), ('drains', 0), ('schema_version', 1)""",
)

# One entry for each version of the schema, its statements run in one transaction. To change the
# tables append an entry that ends by setting schema_version; never edit one that was released,
# whose statements will not run again in files that have it. Only add: a drain of an older copy of
# this file may still run beside the new tables.
_SCHEMA: tuple[tuple[str, ...], ...] = (_FIRST_SCHEMA,)


def schema_sql() -> str:
    """Return the SQL that makes the tables, for people who run migrations by hand.

    It is run once, in a file that has no tables of ours; Outbox() does the same by itself, in one
    transaction, and also upgrades older tables.
    """
    return "".join(f"{statement};\n\n" for version in _SCHEMA for statement in version)


# ── errors ────────────────────────────────────────────────────────────────────────────────────────
# Promises: one root; a message says what to do next and holds no secret. sqlite3's own errors
# ("database is locked") pass through as they are: a host has its own way with those.


class OutboxError(Exception):
    """Root of every error that this module raises on purpose."""


class NotInTransaction(OutboxError):
    """The connection has no open transaction, so the event could not commit together with your
    rows."""


class PayloadError(OutboxError, ValueError):
    """A value cannot be used as it is: data, type, key, header or an endpoint option. Nothing was
    written."""


class _Unclear(PayloadError):
    """The arguments say nothing, or two things. At the command line that is a usage error."""


class UnsafeURL(OutboxError, ValueError):
    """The URL of an endpoint is malformed or points where webhooks must not go."""


class NotFound(OutboxError, LookupError):
    """There is no endpoint, event or delivery of that name."""


class SchemaError(OutboxError):
    """The file is not the outbox's: missing, no database, without tables, of a newer version, or
    another file."""


class TransactionLost(OutboxError):
    """SQLite rolled your whole transaction back (disk full, I/O error): stop, do not go on writing
    in autocommit."""


class SignatureError(OutboxError):
    """A received request is not authentic, or not readable: answer 400 and do nothing else."""


class TimestampError(SignatureError):
    """The signature's time is too far from now: a replay, or a clock that is wrong."""


# These end an attempt, and _explain makes a reason of each. They are no OutboxErrors: the host
# called nothing that failed.


def _raised(error: BaseException) -> str:
    """Return the kind and text of an exception that the host's own code raised. It may be of any
    kind, SystemExit too, and its text may raise itself."""
    text = ""
    with contextlib.suppress(Exception):
        text = f": {error}"
    return type(error).__name__ + text


class _SenderFailed(Exception):
    """A sender of the host's raised; the text says what."""


class _Unready(Exception):
    """The attempt cannot be made: a secret is not where it should be, a transform misbehaved, a row
    is damaged. It counts as an attempt, with reason internal, and is tried again."""


class _NoMasterKey(_Unready):
    """The master key is missing, or is another one than the file's secrets were made with."""


# ── types ─────────────────────────────────────────────────────────────────────────────────────────
# Promises: frozen values. Times (*_at, at, since) are UTC seconds since 1970, durations are
# seconds.


def _one_line(text: str, most: int = 300) -> str:
    """Return text as one printable line of at most so many characters.

    What came from outside may hold line breaks, which forge log records, and escape sequences,
    which change what a terminal shows.
    """
    return "".join(c if c.isprintable() else " " for c in text)[:most].strip()


def _moment(value: float) -> str:
    """Return UTC seconds as people read them, 2026-01-01 00:00:00Z."""
    try:
        return datetime.datetime.fromtimestamp(value, datetime.timezone.utc).strftime(
            "%Y-%m-%d %H:%M:%SZ"
        )
    except (ValueError, OverflowError, OSError):  # plain SQL can store any number
        return f"{value:g}"


def _seconds(moment: datetime.datetime) -> float:
    """Return UTC seconds; a time that names no zone is UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).timestamp()


def _age(seconds: float | None) -> str:
    """Return a duration as people read it, in the largest unit of which there are two: 90 m."""
    if seconds is None:
        return "-"
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


class _Seqs:
    """Makes the seq of events: milliseconds, then 20 bits of chance, each higher than the one
    before. It is the primary key of webhook_events.

    It works without the write lock, so that an emit holds that as short as can be. Two threads may
    therefore make the same seq, and another process a higher one: the file refuses a seq that is
    not higher than its newest, and emit makes another one that follows it.

    The random bits come from a generator of our own. The host's tests seed the global one, which
    then gives the same bits again; after a restore a seq could be another event's. They are no
    secret.
    """

    __slots__ = ("_chance", "_last")

    def __init__(self) -> None:
        self._chance, self._last = random.Random(), 0

    def new(self, now: float, newest: int = 0) -> int:
        """Return a seq for an event of `now` (UTC seconds); newest: the highest that the file has.

        Where the clock went back, or a second event falls into the same millisecond with a lower
        chance, the seq follows the last one instead of the time.
        """
        seq = int(
            min(max(now * 1000, 0), _LAST_MILLISECOND)
        ) << _CHANCE_BITS | self._chance.getrandbits(_CHANCE_BITS)
        last = max(self._last, newest)
        if seq <= last:
            seq = last + 1 + self._chance.getrandbits(_CHANCE_BITS)
        self._last = seq
        return seq


def _event_id(seq: int) -> str:
    """Return the public id of an event; the generated columns of the schema say the same in SQL."""
    return f"msg_{seq:016x}"


def _event_seq(id: object) -> int | None:
    """Return the seq in an event's id; None where it is no id of ours, so no event has it."""
    if not isinstance(id, str) or not re.fullmatch("msg_[0-7][0-9a-f]{15}", id):
        return None
    return int(id[4:], 16)


def _masked_part(part: str) -> str:
    """Return a part of a URL's path, or its first three characters where it may be a token.

    It may be one from seven characters on where it mixes letters with digits; from forty on where
    it is words of small letters, joined by - _ or a dot; and from twenty on otherwise.
    """
    words = re.fullmatch("[a-z]{1,20}([-_.][a-z]{1,20})*", part)
    mixed = re.search("[0-9]", part) and re.search("[A-Za-z]", part)
    least = 7 if mixed else 40 if words else 20
    return part if len(part) < least else part[:3] + "..."


def _masked(url: str) -> str:
    """Return the URL without what may be a token: its query, and parts of the path (_masked_part).
    Slack, Discord and Zapier give out URLs that are all one needs to post there."""
    head, mark, _ = url.partition("?")
    parts, host = head.split("/"), 3 if "://" in head else 0
    shown = [*parts[:host], *map(_masked_part, parts[host:])]
    return "/".join(shown) + ("?..." if mark else "")


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Endpoint:
    """Where events go, its options, and how it has fared.

    A value of the moment in which it was read: it does not follow the file. `secret` is set only on
    what add_endpoint, rotate_secret, and ensure_endpoint for a new endpoint return; show it once.
    """

    id: str
    url: str  # of a receiver, or what names a sender; see add_endpoint
    # Its options with their defaults; EndpointOptions explains each.
    events: tuple[str, ...] = ("*",)
    tenant: str | None = None
    filter: Mapping[str, Sequence[Any]] | None = None
    description: str = ""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: str = "standard"
    signing: str = "standard"
    rate: float | None = None
    max_in_flight: int = 16
    ordered: bool = False
    on_dead: str = "skip"
    timeout: float | None = None
    cert: str | tuple[str, str] | None = None
    ca: str | None = None
    enabled: bool = True
    # How it has fared.
    disabled_reason: str = ""  # "" while enabled, or where nobody gave one
    failing_since: float | None = None  # None: the last attempt was a success, or there was none
    failures: int = 0  # in a row
    paused_until: float = 0.0  # on hold until then: a pause before the next probe, or Retry-After
    created_at: float = 0.0
    secret: str | None = None  # None: not shown here

    def __repr__(self) -> str:  # no secret, no header value, no query
        tenant = f", tenant={self.tenant!r}" if self.tenant else ""
        state = "" if self.enabled else f", disabled: {self.disabled_reason!r}"
        return (
            f"Endpoint(id={self.id!r}, url={_masked(self.url)!r}, events={list(self.events)!r}"
            f"{tenant}{state})"
        )


class TenantOptions(TypedDict, total=False):
    """What a customer may choose for an endpoint: Tenant.add_endpoint and update_endpoint take
    it."""

    events: Sequence[str]
    description: str
    filter: Mapping[str, Any] | None


class EndpointOptions(TypedDict, total=False):
    """The options of an endpoint: add_endpoint takes all, update_endpoint all but tenant; the
    defaults are those of Endpoint."""

    # Types (order.created), groups (order.*) or *, at most 100; * does not match webhook.*, events
    # about deliveries and endpoints.
    events: Sequence[str]
    # Your customer whose events it gets, for life; None gets those without one, "*" those of all.
    tenant: str | None
    # Paths in the data and values, {"status": ["paid"], "shop.region": ["eu"]}: it gets the events
    # that have one of the values at each of the paths, an array counting as its elements.
    filter: Mapping[str, Any] | None
    enabled: bool  # False: what waits is held, and new events make no delivery
    description: str  # one line for people
    headers: Mapping[str, str] | None  # sent with each request; a value may be env:NAME
    # standard (Standard Webhooks), data (the data alone), cloudevents, slack, discord, or the name
    # of a transform.
    body: str
    signing: str  # standard, or another scheme that verify knows; joined by + to send several
    rate: float | None  # attempts per second at the most, retries among them; None: no limit
    max_in_flight: int  # attempts at once at the most; fewer while it is slow or fails
    ordered: bool  # True: its deliveries go out strictly one after the other, as with one key
    # What a queue does when its head ends in the failed table: skip (go on with the next) or hold
    # (wait until somebody replays or discards it).
    on_dead: str
    timeout: float | None  # seconds that an attempt may last; None: the outbox's
    cert: str | tuple[str, str] | None  # for mutual TLS: path of a file with both, or (cert, key)
    ca: str | None  # path, for a receiver whose authority is private


@dataclasses.dataclass(frozen=True, slots=True)
class Delivery:
    """One event to one endpoint, as people see it.

    status is one of:
        pending    it waits for its time, for its turn, or behind another one of its queue
        held       it waits, and its endpoint is disabled
        delivered  a 2xx came, or the sender returned
        failed     it was given up; also once its failed row was discarded
        cancelled  it was taken back while it waited
    """

    event_id: str
    endpoint_id: str
    status: str
    attempts: int  # since it was emitted, or last replayed or resent
    due_at: float  # pending: when the next attempt is due
    delivered_at: float | None  # None: not delivered


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """What happened. Transforms and senders get one; Outbox.event() and events() return it."""

    id: str
    type: str
    data: Any  # as json.loads gives it; text where Python cannot parse what plain SQL stored
    tenant: str | None  # None: it concerns no customer
    key: str | None  # events of one key reach an endpoint in order; None: no order
    created_at: float
    deliveries: tuple[Delivery, ...] = ()  # filled by Outbox.event() only
    erased_at: float | None = None  # then its data is None


@dataclasses.dataclass(frozen=True, slots=True)
class EventType:
    """A type in the host's catalogue, Outbox(event_types=).

    It describes and is no schema: data is never compared with it.
    """

    description: str = ""
    example: Any = dataclasses.field(default_factory=dict)  # data; ping(type=) sends it
    group: str = ""  # a heading under which the portal shows it
    internal: bool = False  # never for customers; the portal does not show it
    deprecated: bool = False  # on its way out; it works as before


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One HTTP try, or one call of a sender.

    `reason` is None on success, else a word of _REASONS (timeout, say), where each is explained.
    Secrets of the endpoint that a receiver sent back are masked in `error` and `response`, as far
    as they are found.
    """

    event_id: str
    endpoint_id: str
    at: float  # when it began
    status_code: int | None  # None: no answer came
    reason: str | None
    error: str | None  # one line about what went wrong; None on success, or once erased
    duration: float  # seconds
    # The start of the answer's body: at most 4 KiB, of a 2xx 512 bytes; read as UTF-8, and never
    # decompressed. None: there was no body, or it is not kept any more: of a delivery's failures
    # only the first and the last keep it.
    response: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class FailedDelivery:
    """A row of webhook_failed: a delivery that was given up, until it is replayed or discarded.

    reason, status_code, error and response are those of its last attempt: see Attempt.
    """

    id: int  # grows with the time; failed() pages by it
    event_id: str
    endpoint_id: str
    type: str  # of the event
    key: str | None
    attempts: int  # 0: it expired before the first
    reason: str
    status_code: int | None
    error: str | None
    response: str | None
    first_attempt_at: float | None  # None: there was no attempt
    failed_at: float


@dataclasses.dataclass(frozen=True, slots=True)
class DrainReport:
    """What one drain did since it began: outcomes by kind, and what is left."""

    delivered: int
    retried: int  # failed attempts that will be tried again
    failed: int  # deliveries that were given up
    pending: int  # what still waits, for enabled endpoints


@dataclasses.dataclass(frozen=True, slots=True)
class EndpointStats:
    """One endpoint's numbers, of the moment in which they were read."""

    id: str
    enabled: bool
    pending: int  # what waits for it, also while it is disabled
    oldest_due_age: float | None  # seconds since the oldest became due; None: nothing is due
    failed: int  # rows in webhook_failed
    # The following six are of the last hour.
    delivered: int
    attempts: int
    p50: float | None  # seconds that a success took, in the median; None: there was none
    p95: float | None
    last_error: str | None
    history: tuple[int, ...]  # deliveries in each twelfth of the last hour, oldest first
    failing_since: float | None  # None: the last attempt was a success, or there was none
    failures: int  # in a row
    failing: bool  # enabled, and three failures in a row or a minute of them
    paused_until: float | None  # None: not on hold
    disabled_reason: str
    tenant: str | None = None  # whose it is; None: the host's own


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """The outbox's numbers."""

    pending: int  # waiting for enabled endpoints
    due: int  # of these: due now
    held: int  # waiting for disabled endpoints
    failed: int  # rows in webhook_failed
    oldest_due_age: float | None  # seconds since the oldest became due; None: nothing is due
    endpoints: tuple[EndpointStats, ...]
    refusal: str | None = None  # why nothing may be sent from here, and what to do; None: it may


@dataclasses.dataclass(frozen=True, slots=True)
class Notice:
    """What the observer gets, after the outcome was recorded. kind is one of:

        delivered       an attempt succeeded
        attempt_failed  one failed, and there will be another one
        gave_up         a delivery ended in webhook_failed
        failing         its endpoint has failed three times in a row, or for a minute
        recovered       a success after that; one such pair in ten minutes at the most
        disabled        the drain disabled its endpoint

    tenant is that of the endpoint, the other fields are those of the attempt that led to it. As
    events (webhook.endpoint.failing and so on) these fields are the data.
    """

    kind: str
    endpoint_id: str
    event_id: str | None = None
    reason: str | None = None
    status_code: int | None = None
    error: str | None = None
    tenant: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ReceivedEvent:
    """What verify returns: a request that is authentic, though perhaps a duplicate."""

    id: str  # the same each time this event is sent: what Inbox.accept asks for
    timestamp: int | None  # when it was signed; None where the scheme (github) signs none
    type: str  # "" where the body is no envelope with type and data
    data: Any  # the envelope's, else the whole body; None where that is no JSON
    body: bytes  # as received


# ── signing ───────────────────────────────────────────────────────────────────────────────────────
# Promises: pure functions of secret, id, time and bytes. verify raises SignatureError and nothing
# else, whatever bytes arrive, and parses last.


class _Scheme(NamedTuple):
    """One way to sign, with HMAC-SHA256: what is signed, and the header that says so."""

    header: str  # carries the signature
    begins: str  # the signature's first characters; base64 (standard) or hexadecimal digits follow
    lead: Callable[[str, int], str]  # id, timestamp -> what is signed before the body


# All schemes. Custom headers, the command line and verify know a header or a name from here. A new
# one whose header holds one signature and nothing else needs its row only.
#
# standard is Standard Webhooks 1.0 (standardwebhooks.com: Signature scheme, Webhook headers). While
# a secret is rotated, the old one and the new one both sign, and the header holds both signatures.
_SCHEMES = {
    # In the header: v1,BASE64 v1,BASE64
    "standard": _Scheme("webhook-signature", "v1,", lambda id, at: f"{id}.{at}."),
    # In the header: t=TIME,v1=HEX,v1=HEX
    "stripe": _Scheme("Stripe-Signature", "v1=", lambda id, at: f"{at}."),
    # In the header: sha256=HEX
    "github": _Scheme("X-Hub-Signature-256", "sha256=", lambda id, at: ""),
}
_MAX_SIGNATURES = 16  # of a request; verify compares each with what each secret gives
_MAX_SECRETS = 10  # that sign one request: the newest ones


def _secret_bytes(secret: str | bytes, least: int = 16, most: int = 1 << 16) -> bytes:
    """Return the key bytes of a Standard Webhooks secret: `whsec_` and strict base64, or raw bytes.

    Lenient decoders drop foreign characters, so a typo would sign with another key: it is refused
    instead. least, most: bytes of key. Raises PayloadError, which never quotes the secret.
    """
    if isinstance(secret, bytes):
        key = secret
    elif isinstance(secret, str):
        try:
            key = base64.b64decode(secret.removeprefix("whsec_").encode("ascii"), validate=True)
        except ValueError:
            raise PayloadError(
                "the secret is not base64; expected whsec_ followed by base64"
            ) from None
    else:  # bytes(32) would be 32 zeros: a key that everybody knows
        raise PayloadError("the secret must be text or bytes")
    if not least <= len(key) <= most:
        raise PayloadError(f"the secret holds {len(key)} bytes; it must hold {least} to {most}")
    return key


# Tables for bytes.translate: XOR of each byte with RFC 2104's ipad and opad.
_INNER, _OUTER = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5C))


@functools.lru_cache(maxsize=1_024)
def _halves(scheme: str, secret: str | bytes) -> tuple[Any, Any]:
    """Return HMAC's inner and outer hash (RFC 2104, 2), which have read a secret's key.

    Both are remembered, so whoever signs updates copies of them. That is half the cost of
    hmac.digest, which prepares the key each time. A test compares the two.
    """
    key = (
        _secret_bytes(secret)
        if scheme == "standard"
        else secret.encode()
        if isinstance(secret, str)
        else secret
    )
    key = (key if len(key) <= 64 else hashlib.sha256(key).digest()).ljust(64, b"\0")
    return hashlib.sha256(key.translate(_INNER)), hashlib.sha256(key.translate(_OUTER))


def _signature(scheme: str, secret: str | bytes, id: str, timestamp: int, body: bytes) -> str:
    """Return the signature of a body as the scheme's header carries it."""
    of = _SCHEMES[scheme]
    inner, outer = _halves(scheme, secret)
    inner, outer = inner.copy(), outer.copy()
    inner.update(of.lead(id, timestamp).encode())
    inner.update(body)
    outer.update(inner.digest())
    if scheme == "standard":
        return of.begins + binascii.b2a_base64(outer.digest(), newline=False).decode("ascii")
    return f"{of.begins}{outer.hexdigest()}"


def sign(secret: str | bytes, id: str, timestamp: int, body: bytes) -> str:
    """Return the Standard Webhooks signature `v1,...` of a body.

    secret: `whsec_...`, bare base64, or raw key bytes, of 16 bytes or more; PayloadError (a
    ValueError) otherwise. id: goes into webhook-id; it must hold no dot. timestamp: UTC seconds of
    this attempt. body: the exact bytes that are sent. Standard Webhooks, Signature scheme.
    """
    _secret_bytes(secret)  # refuses what is neither text nor bytes: _halves could not remember that
    return _signature("standard", secret, id, timestamp, body)


def _signature_headers(
    schemes: Sequence[str], signing_secrets: Sequence[str], id: str, timestamp: int, body: bytes
) -> list[tuple[str, str]]:
    """Return the headers that sign a body for each scheme; the secrets: current first.

    A receiver that moves from one scheme to another gets the headers of both.
    """
    headers = []
    for scheme in schemes:
        signatures = [_signature(scheme, secret, id, timestamp, body) for secret in signing_secrets]
        if scheme == "standard":
            value = " ".join(signatures)
        elif scheme == "stripe":
            value = ",".join([f"t={timestamp}", *signatures])
        else:  # one header, one signature: GitHub has no rotation, the current secret signs
            value = signatures[0]
        headers.append((_SCHEMES[scheme].header, value))
    return headers


_SIGNING_HEADER = re.compile(
    "|".join(["(webhook|svix)-", *(f"{of.header}$" for of in _SCHEMES.values())]), re.IGNORECASE
)


def _received_headers(headers: Any) -> dict[str, str]:
    """Return those headers that carry a signature, with lower-case names.

    headers: a mapping, or pairs, of text or bytes, as the frameworks give them. One that comes
    twice with two values is refused: a proxy may have checked the one, and we would take the other.
    """
    found: dict[str, str] = {}
    for name, value in headers.items() if hasattr(headers, "items") else headers:
        name, value = (x.decode("latin-1") if isinstance(x, bytes) else x for x in (name, value))
        if (
            not isinstance(name, str)
            or not isinstance(value, str)
            or not _SIGNING_HEADER.match(name)
        ):
            continue
        if found.setdefault(name.lower(), value) != value:
            raise SignatureError("a header came twice with different values")
    return found


def _signed_at(text: str, tolerance: float, now: float | None) -> int:
    """Return the timestamp if it is a canonical decimal within `tolerance` seconds of now, before
    or after; raise SignatureError or TimestampError (Standard Webhooks, Verifying signatures).

    Canonical, because the signature is checked over the number as we write it; "07" is another
    text.
    """
    if not re.fullmatch(r"0|[1-9][0-9]{0,14}", text):
        raise SignatureError("the timestamp is not a decimal number of seconds")
    if not abs((time.time() if now is None else now) - int(text)) <= tolerance:
        raise TimestampError(
            "the timestamp is too far from now: a replayed request, or a clock that is wrong"
        )
    return int(text)


def _any_equal(expected: Iterable[str], received: Sequence[str]) -> bool:
    """Say whether one of the signatures is one of those expected.

    Each pair is compared in constant time, and none is left out after a match, so that the time
    tells nothing of how near a forged signature came.
    """
    if len(received) > _MAX_SIGNATURES:
        raise SignatureError(f"more than {_MAX_SIGNATURES} signatures")
    found = False
    for want in expected:
        for have in received:
            found |= hmac.compare_digest(want.encode(), have.encode("utf-8", "surrogatepass"))
    return found


def _claims(scheme: str, headers: Mapping[str, str]) -> tuple[str, str | None, list[str]]:
    """Return what a request says of itself, unproven: its id, its timestamp and its signatures.

    The timestamp is None where none is signed, as with github. Signatures of versions that are not
    known stay in the list, and match nothing. Raises SignatureError where a header is missing.
    """
    if scheme == "stripe":
        # Beside signatures the header may hold others of older schemes (v0=), hence twice as many.
        parts = headers.get("stripe-signature", "").split(",", 2 * _MAX_SIGNATURES)
        times = [part[2:] for part in parts if part.startswith("t=")]
        if len(times) != 1:
            raise SignatureError("Stripe-Signature is missing, or does not hold exactly one t=")
        signatures = [part for part in parts if part.startswith("v1=")]
        return headers.get("webhook-id", ""), times[0], signatures
    if scheme != "standard":  # one header, one signature
        header = _SCHEMES[scheme].header
        if not (only := headers.get(header.lower())):
            raise SignatureError(f"{header} is missing")
        return headers.get("webhook-id", ""), None, [only]
    names = ("id", "timestamp", "signature")
    # Svix's older names of the same three count only where none of today's is there. Mixed, a
    # forger could add a webhook-id of his own to a request that was signed under the older names.
    brand = "webhook" if any(f"webhook-{name}" in headers for name in names) else "svix"
    id, timestamp, signature = (headers.get(f"{brand}-{name}") for name in names)
    if not (id and timestamp and signature):
        raise SignatureError(
            "a header is missing: webhook-id, webhook-timestamp and webhook-signature are needed"
        )
    return id, timestamp, signature.split(" ", _MAX_SIGNATURES)


def _is_stripe_event(data: Mapping[str, Any]) -> bool:
    """Say whether a body is an event as Stripe sends it, with its id, in version 1 or 2."""
    return data.get("object") in ("event", "v2.core.event") and isinstance(data.get("id"), str)


def _signed_id(data: Any, body: bytes) -> str:
    """Return an event's id where the scheme does not sign the header webhook-id: all but standard.

    Whoever overheard a request could change that header and send it again, and the Inbox would let
    it in each time. So the id is taken from what is signed. A Stripe event and a CloudEvent say
    theirs in the body. Of other bodies it is the hash: a retry has the same one, but so have two
    events whose bodies are equal to the byte, and the second of them counts as a duplicate.
    """
    if isinstance(data, dict) and (_is_stripe_event(data) or "specversion" in data):
        id = data.get("id")
        if isinstance(id, str) and 1 <= len(id) <= 256 and id.isprintable():
            return id
    return "sha256_" + hashlib.sha256(body).hexdigest()


def _parsed(scheme: str, id: str, signed_at: int | None, body: bytes) -> ReceivedEvent:
    """Return the event of a body that is genuine.

    It is an envelope only with both type and data: what an app sends as the data alone may well
    have a field `type` of its own. A Stripe event has a type, and is its data as a whole.
    """
    try:
        whole = json.loads(body)
    except (ValueError, RecursionError):  # a transform may send something else than JSON
        whole = None
    type, data = "", whole
    typed = isinstance(whole, dict) and isinstance(whole.get("type"), str)
    if typed and ("data" in whole or _is_stripe_event(whole)):
        type, data = whole["type"], whole.get("data", whole)
    if scheme != "standard":
        id = _signed_id(whole, body)
    return ReceivedEvent(id, signed_at, type, data, body)


def _candidate_keys(scheme: str, secret: Any) -> list[str | bytes]:
    """Return the keys that verify tries for a secret, or for several.

    People copy secrets with a line break at the end, or without the = at the end of base64. In the
    scheme standard both are put right. In the others a secret is any text, white space too: it is
    tried as it is, and without white space at its ends.
    """
    given = [secret] if isinstance(secret, (str, bytes)) else list(secret)
    keys: list[str | bytes] = []
    for each in given:
        if isinstance(each, str):
            bare = each.strip()
            if scheme == "standard":
                bare = bare.rstrip("=")
                each = bare = bare + "=" * (-len(bare.removeprefix("whsec_")) % 4)
            keys += [each, bare] if bare else [""]
        else:
            keys.append(each)
    if not keys or not all(keys):
        raise SignatureError("verify needs a secret")
    return list(dict.fromkeys(keys))


def verify(
    body: bytes,
    headers: Mapping[str, str] | Iterable[tuple[str, str]],
    secret: str | bytes | Sequence[str | bytes],
    *,
    tolerance: float = 300.0,
    now: float | None = None,
    scheme: str = "standard",
) -> ReceivedEvent:
    """Check a received request and return its event; raise SignatureError for every bad input, and
    nothing else.

    Answer 400 to what raises it, and do nothing else. Nothing of a body is parsed before a
    signature matched. TimestampError, a kind of SignatureError, says that the time is too far from
    now.

    body       the raw bytes as received, before any JSON or text handling
    headers    any mapping, names in any case, or pairs of name and value
    secret     whsec_ and base64, bare base64, or raw key bytes, of 16 bytes or more; several while
               you rotate, of which one has to match. Of another scheme: the text that you were
               given
    tolerance  seconds that the signed time may be before or after now
    now        UTC seconds, for tests; None: the clock
    scheme     standard (Standard Webhooks 1.0, with Svix's names of the headers too), stripe, or
               github

    Stripe and GitHub sign the body and not the header webhook-id, so the event's id is then taken
    from the body: what a Stripe event or a CloudEvent says there, or the hash of the body. GitHub
    signs no time either: a replay cannot be told from the original.

    It is no guarantee against duplicates: a genuine event may come again, as a retry or sent by
    whoever overheard it. Pass the id to Inbox.accept.
    """
    try:
        if not isinstance(body, (bytes, bytearray, memoryview)):
            raise SignatureError(
                "the body must be the raw bytes of the request, not text or parsed JSON"
            )
        body = bytes(body)
        if scheme not in _SCHEMES:
            raise SignatureError("verify knows the schemes " + ", ".join(_SCHEMES))
        keys = _candidate_keys(scheme, secret)
        id, timestamp, signatures = _claims(scheme, _received_headers(headers))
        if len(id) > 256 or not id.isascii() or not id.isprintable() or "." in id:
            raise SignatureError("webhook-id is not a plain identifier")
        signed_at = None if timestamp is None else _signed_at(timestamp, tolerance, now)
        if not _any_equal(
            (_signature(scheme, key, id, signed_at or 0, body) for key in keys), signatures
        ):
            raise SignatureError(
                "no signature matches: another secret, or the body was changed (use the raw bytes)"
            )
    except SignatureError:
        raise
    # Hostile headers, and headers of a framework that raise, reach odd corners. Whoever calls this
    # answers 400 then, and never 500. Only our own errors say what they hold.
    except Exception as error:
        why = str(error) if isinstance(error, OutboxError) else type(error).__name__
        raise SignatureError(f"the request cannot be verified: {why}") from None
    return _parsed(scheme, id, signed_at, body)


# ── retry policy ──────────────────────────────────────────────────────────────────────────────────
# Promises: an immutable value; decisions are functions of values. Knows no clock and no database.
# What these numbers mean for an endpoint is kept in _Health, by the drain.

# Standard Webhooks, Deliverability and reliability: at once, 5 s, 5 min, 30 min, 2 h, ..., 24 h.
_STANDARD_DELAYS = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
_LONGEST_HINT = 86_400.0  # seconds; a Retry-After beyond a day is cut
# An endpoint that failed so many times in a row gets one attempt at a time, a probe, with growing
# pauses of at most so many seconds, until one succeeds.
_STRUGGLING = 10
_LONGEST_PROBE = 60.0
# An endpoint is disabled when it had no success for so many seconds, or when three of four attempts
# failed in that time; but only where so many of its deliveries were given up meanwhile.
_HOPELESS = 5 * 86_400.0, 3
_STEADY_AGAIN = 10  # successes in a row after which earlier failures are forgotten
# An endpoint counts as failing after so many failures in a row, or so many seconds of them.
_FAILING = 3, 60.0
_TELL_AGAIN = 600.0  # seconds from one notice that an endpoint is failing to the next
# Why a drain disabled an endpoint; any other reason is an operator's.
_GONE, _ASKED = "410 Gone", "the receiver asked for it (webhook-delivery: disable)"
_NO_SUCCESS, _HARDLY_ANY = "no success for 5 days", "three of four attempts failed for 5 days"
_DISABLED_BY_DRAIN = (_GONE, _ASKED, _NO_SUCCESS, _HARDLY_ANY)


@dataclasses.dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again.

    delays: one entry for each attempt, the seconds from the attempt before to it (for the first:
    from the emit); after the last the delivery is given up. The standard ten take about 75 hours.
    jitter: share of its delay by which an attempt comes later, at random, 0.2 for up to 20 %, so
    that what failed together does not come back together. overload_delay: least seconds to wait
    after 429, 502, 504 and timeouts, which say that the receiver has too much to do; None means 60
    with the standard delays and 0 with your own. Raises PayloadError.
    """

    delays: tuple[float, ...] = _STANDARD_DELAYS
    jitter: float = 0.2
    overload_delay: float | None = None

    def __post_init__(self) -> None:
        """Check the fields, and put numbers in the place of None. A frozen dataclass is written by
        object.__setattr__."""
        delays = tuple(self.delays) if isinstance(self.delays, (list, tuple)) else ()
        numbers = [
            *delays,
            self.jitter,
            0.0 if self.overload_delay is None else self.overload_delay,
        ]
        sound = all(isinstance(n, (int, float)) and 0 <= n < math.inf for n in numbers)
        if not delays or not sound or self.jitter > 10:
            raise PayloadError(
                "RetryPolicy: delays must be one or more numbers of seconds,"
                " jitter a share up to 10"
            )
        delays = tuple(map(float, delays))
        if self.overload_delay is None:
            object.__setattr__(self, "overload_delay", 60.0 if delays == _STANDARD_DELAYS else 0.0)
        object.__setattr__(self, "delays", delays)

    @classmethod
    def exponential(
        cls, base: float, factor: float = 2.0, cap: float = 86_400.0, attempts: int = 10
    ) -> RetryPolicy:
        """Return a policy that tries at once, then after base, base * factor, ... seconds, none
        over cap. attempts: how many in all, 1 to 1,000. Raises PayloadError."""
        if not (
            0 < base < math.inf
            and 1 <= factor < math.inf
            and 0 < cap < math.inf
            and 1 <= attempts <= 1000
        ):
            raise PayloadError(
                "exponential needs base > 0, factor >= 1, cap > 0 and 1 to 1000 attempts"
            )
        delays = [0.0]
        while len(delays) < attempts:
            delays.append(min(cap, delays[-1] * factor or base))
        return cls(tuple(delays))

    @property
    def longest(self) -> float:
        """The most seconds that a failed attempt, or a Retry-After, can put the next one off. A
        retry that is due later than that was put there by a clock that was wrong."""
        return max(max(self.delays) * (1 + self.jitter), self.overload_delay or 0.0, _LONGEST_HINT)

    @property
    def window(self) -> float:
        """The most seconds that the schedule lets pass between a delivery's first attempt and its
        last. A delivery whose endpoint has failed for as long as that is given up, reason expired:
        pauses between probes may have kept it from using up its attempts, or from a first one. Time
        in which no drain ran does not count."""
        return sum(self.delays) * (1 + self.jitter)

    def wait(self, attempts: int, overloaded: bool, rng: Callable[[], float]) -> float | None:
        """Return the seconds until the next try after `attempts` failed ones, or None when there is
        none left. rng: returns 0 to 1."""
        if attempts >= len(self.delays):
            return None
        delay = self.delays[attempts]
        return max(
            delay * (1 + self.jitter * rng()), (self.overload_delay or 0.0) if overloaded else 0.0
        )

    def probe_pause(self, failures: int) -> float:
        """Return the seconds that a struggling endpoint rests after `failures` in a row: 0 below
        ten, then 1, 2, 4, ..., at most a minute and never more than the longest delay."""
        if failures < _STRUGGLING:
            return 0.0
        return min(2.0 ** min(failures - _STRUGGLING, 30), _LONGEST_PROBE, max(self.delays))


def _held(failures: int, paused_until: float, now: float) -> str:
    """Return words for people: why an endpoint is on hold, and for how long; '' where it is not.

    paused_until, now: UTC seconds. Ten failures in a row make it wait for its next probe; before
    that only its own Retry-After does.
    """
    left = paused_until - now
    if left <= 0:
        return ""
    rest = f"{math.ceil(left)} s" if left < 120 else _age(left)
    if failures >= _STRUGGLING:
        return f"held after {failures} failures, next probe in {rest}"
    return f"held by its Retry-After, next try in {rest}"


_MOST_HINTS = 16  # of one answer that are looked at
_DAY_AND_DATE = r"[A-Z][a-z]{2,8},? "  # each of the three date formats of RFC 9110 begins like this
_HINT = re.compile(rf"\s*({_DAY_AND_DATE}[^,]*|[^,]+)")


def _retry_after(values: Sequence[str], now: float) -> float | None:
    """Return the seconds of Retry-After (RFC 9110, 10.2.3), 0 to a day; None when absent or not
    well-formed.

    It is a number of seconds or a date, and a date holds a comma itself. A proxy on the way may
    have joined two headers with another comma; the latest of them holds. now: UTC seconds.
    """
    hints: list[float] = []
    for value in itertools.islice(_HINT.findall(",".join(values)), _MOST_HINTS):
        value = value.strip()
        if re.fullmatch(r"[0-9]+", value, re.ASCII):
            hints.append(float(value))
        elif re.match(_DAY_AND_DATE, value):
            with contextlib.suppress(ValueError, TypeError, OverflowError, IndexError):
                hints.append(_seconds(email.utils.parsedate_to_datetime(value)) - now)
    return min(max(0.0, *hints), _LONGEST_HINT) if hints else None


# ── network guard ─────────────────────────────────────────────────────────────────────────────────
# Promises: values in, verdict out; no lookup, no socket.
#
# Whoever registers an endpoint chooses where our machine connects to, and could choose what only
# our machine reaches: the cloud's metadata, a database, a neighbour (Standard Webhooks, Server side
# request forgery). So each address is judged right before it is dialled, by _Guard.refusal. The
# checks of a URL are for a good message when it is registered, and protect nothing by themselves: a
# name may resolve to something else later.

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Addresses that are no public host, from IANA's registries of special-purpose addresses. The table
# is ours, because ipaddress.is_global changes with patch releases of Python, and lets multicast and
# loopback inside NAT64 pass.
_DENIED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 "  # this host, private, carriers, loopback
        "168.63.129.16/32 169.254.0.0/16 "  # Azure's own services; link-local, with metadata
        "172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "  # private, protocols, documentation
        "192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 "  # AS112, AMT, 6to4 relays
        "192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 "  # private, AS112, benchmarks
        "198.51.100.0/24 203.0.113.0/24 224.0.0.0/3 "  # documentation; multicast and all above it
        "::/3 4000::/2 8000::/1 "  # all but 2000::/3, the global addresses; and of these:
        "2001::/23 2001:db8::/32 2002::/16 "  # protocols (Teredo), documentation, 6to4
        "2620:4f:8000::/48 3ffe::/16 3fff::/20"  # AS112, 6bone, documentation
    ).split()
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address stands at its end
_NO_HTTP = (
    "plain http is refused, use https; allow_networks (--allow-network) or allow_http can admit it"
)
# Ports of other protocols that could take a request for commands of their own: the "bad ports" of
# the Fetch standard (WHATWG) from 1024 up. Below 1024 only 80 and 443 are taken.
_BAD_PORTS = frozenset(
    (
        1719,
        1720,
        1723,
        2049,
        3659,
        4045,
        4190,
        5060,
        5061,
        6000,
        6566,
        *range(6665, 6670),
        6679,
        6697,
        10080,
    )
)


def _unwrapped(address: _Address) -> _Address:
    """Return the IPv4 address inside an IPv4-mapped or NAT64 one: that is what is really
    reached."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


@dataclasses.dataclass(frozen=True, slots=True)
class _Guard:
    """Which addresses webhooks may reach."""

    allow_networks: tuple[_Network, ...] = ()  # these may be reached, and by plain http too
    allow_http: bool = False  # plain http to public addresses
    provisional: bool = False  # the command line's own: the app's Outbox may admit more

    def refusal(self, text: str, scheme: str) -> str | None:
        """Return why this address must not be dialled, or None. text: what the resolver answered.

        In this order: an address with a zone id, or that is none, is refused; one in allow_networks
        may be dialled; one that is not public is refused; plain http is, where it is not allowed.
        """
        try:
            if "%" in text:
                return f"{text} carries a zone id"
            address = _unwrapped(ipaddress.ip_address(text))
        except ValueError:
            return f"{text!r} is no IP address"
        # `in` is never true where one is IPv4 and the other IPv6.
        if any(address in network for network in self.allow_networks):
            return None
        if any(address in network for network in _DENIED):
            return (
                f"{address} is not a public address; allow_networks (--allow-network) can admit it"
            )
        return None if scheme == "https" or self.allow_http else _NO_HTTP


def _literal(host: str) -> str | None:
    """Return the address that a host spells, in any form that the system takes for one, or None.

    127.1, 0x7f000001 and 2130706433 are all 127.0.0.1 to the C library, and none to ipaddress.
    """
    bare = host.strip("[]").rstrip(".")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(bare))
    if re.fullmatch(r"(0[xX][0-9a-fA-F]*|[0-9]+)(\.(0[xX][0-9a-fA-F]*|[0-9]+)){0,3}", bare):
        with contextlib.suppress(OSError):
            return str(ipaddress.IPv4Address(socket.inet_aton(bare)))
    return None


def _refuse_url(why: str) -> NoReturn:
    raise UnsafeURL(f"the URL is refused: {why}")


def _check_port(port: int) -> None:
    """Refuse a port on which a webhook receiver does not listen, but another protocol may."""
    if port > 65_535:
        _refuse_url("there is no such port; write https://host/path")
    if port in _BAD_PORTS or (port not in (80, 443) and port < 1024):
        _refuse_url(f"port {port} belongs to another protocol; use 443, 80 or one from 1024 up")


def _check_authority(url: str) -> str:
    """Return the scheme of a URL whose spelling is beyond doubt; raise UnsafeURL otherwise.

    Parsers disagree on where the host ends in a URL with a backslash, a control character, a user
    name or a percent sign in the host. What was judged would not be what is connected to.
    """
    if not isinstance(url, str) or not 1 <= len(url) <= 2048:
        _refuse_url("it must be text of at most 2048 characters")
    if re.search(r"[\x00-\x20\x7f-\x9f\\\ud800-\udfff]", url):
        _refuse_url("it contains a space, a control character, a backslash or half a character")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        _refuse_url(f"{_one_line(str(error).split(':')[0])}; write https://host/path")
    _, colon, port_text = parts.netloc.rpartition("]")[2].rpartition(":")
    if parts.scheme not in ("https", "http") or not parts.netloc:
        _refuse_url("it must start with https://")
    if "@" in parts.netloc or "%" in parts.netloc:
        _refuse_url(
            "user names and percent signs do not belong in the host; write https://host/path"
        )
    if "#" in url:
        _refuse_url("a fragment (#...) is never sent; remove it")
    if colon and not re.fullmatch(r"[0-9]{1,5}", port_text):
        _refuse_url("its port is not a number")
    if port is not None:
        _check_port(port)
    return parts.scheme


class _Target(NamedTuple):
    """An endpoint's URL as it goes over the wire."""

    url: str  # the whole, which a proxy is asked for
    scheme: str
    host: str  # without brackets
    port: int
    netloc: str  # what the Host header says; it leaves out the scheme's own port (RFC 9110, 7.2)
    path: str  # with the query


# requests would leave a URL that matches this as it is, so it is not asked. Most endpoints have
# such a URL, and requests takes longer to prepare one than a delivery takes.
_PLAIN_URL = re.compile(
    r"(https?)://([a-z0-9-]+(?:\.[a-z0-9-]+)*)(?::([1-9][0-9]{0,4}))?"
    r"(/(?!\.)(?:[A-Za-z0-9_~!$&'()*+,;=:@.-]|/(?!\.))*)?(\?[A-Za-z0-9._~!$&'()*+,;=:@/?-]+)?"
)


def _spelled(url: str) -> str:
    """Return a URL as requests spells it: IDNA for the host, percent-encoding, no dot segments.

    Raises UnsafeURL, whose text does not quote the URL: it may hold a token.
    """
    try:
        return requests.Request("POST", url).prepare().url or ""
    except (ValueError, OSError):  # requests' exceptions are OSErrors; they may quote the URL
        _refuse_url("requests cannot parse it")


@functools.lru_cache(maxsize=1_024)  # many endpoints have one host
def _check_host(host: str, scheme: str, guard: _Guard) -> str | None:
    """Return why a host is refused as far as its name tells, or None.

    Where there are allow_networks, plain http is not refused yet: the name may lead into them.
    """
    if len(host) > 253 or not all(
        0 < len(label) < 64 for label in host.removesuffix(".").split(".")
    ):
        return "its host has an empty or over-long label"
    if address := _literal(host):
        return guard.refusal(address, scheme)
    return _NO_HTTP if scheme == "http" and not (guard.allow_http or guard.allow_networks) else None


def _prepare_url(url: str, guard: _Guard) -> _Target:
    """Return the target of an endpoint's URL; raise UnsafeURL with the reason.

    The registration of an endpoint calls it for a good message, and _Wire to know what to connect
    to and what to ask for. What protects is the judgement of the address really dialled.
    """
    plain = _PLAIN_URL.fullmatch(url) if isinstance(url, str) and len(url) <= 2048 else None
    if plain:
        scheme, host, named_port, path, query = plain.groups()
    else:
        scheme = _check_authority(url)
        parts = urllib.parse.urlsplit(_spelled(url))
        host, named_port = parts.hostname or "", parts.port
        path, query = parts.path, "?" + parts.query if parts.query else ""
    port = int(named_port or (443 if scheme == "https" else 80))
    _check_port(port)
    if why := _check_host(host, scheme, guard):
        _refuse_url(why)
    netloc = f"[{host}]" if ":" in host else host
    netloc += "" if port == (443 if scheme == "https" else 80) else f":{port}"
    path = (path or "/") + (query or "")
    return _Target(f"{scheme}://{netloc}{path}", scheme, host, port, netloc, path)


_CALL = "call:"  # begins the url of an endpoint that is a function of the host's, a sender
_Sender = Callable[[Event], Any]


def _is_called(url: str) -> bool:
    """Say whether an endpoint is a sender: it is called with each event, and no request is made.
    Whoever treats the two kinds of endpoints differently asks this, or _sender."""
    return url.startswith(_CALL)


def _sender(url: str, senders: Mapping[str, _Sender]) -> _Sender | None:
    """Return the function that an endpoint's URL names; None where it is not known here."""
    return senders.get(url.removeprefix(_CALL)) if _is_called(url) else None


def _barred(url: str, guard: _Guard) -> str | None:
    """Return why an endpoint is not even tried, or None.

    `drain --db` runs without the app's Outbox, and so without its allow_networks. It may refuse a
    URL that the app admits. An attempt would fail then, and count, for an option that somebody
    forgot on the command line; so what is for such an endpoint is left waiting.
    """
    if guard.provisional and not _is_called(url):
        try:
            _prepare_url(url, guard)
        except UnsafeURL as error:
            why = str(error).removeprefix("the URL is refused: ").partition(";")[0]
            how = "--allow-network or WEBHOOK_OUTBOX_ALLOW_NETWORKS"
            own = "use the app's own Outbox with --app MODULE:NAME"
            return f"{why}; admit it with {how}, or {own}"
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class _Settings:
    """What the Outbox was given, as the parts that send need it. They get this value and not the
    Outbox itself, of which they know nothing.

    Outbox._settings fills it by the names of the fields, so each but guard is an attribute of the
    Outbox.
    """

    path: str  # of the database file
    retry: RetryPolicy
    timeout: float  # seconds, of an attempt
    connect_timeout: float  # seconds, of its lookup and connect
    workers: int  # attempts under way at once
    guard: _Guard
    retention: float  # seconds that delivered events are kept
    failed_retention: float | None  # seconds; None: failed rows stay until somebody acts
    proxy: str | None  # http://host:port; it then has the guard's duty
    app_name: str  # goes into User-Agent, and is the source of a CloudEvent
    home: str | None  # whose file it is; a drain with another one sends nothing
    master: _MasterKey
    transforms: Mapping[str, Callable[[Event], Any]]  # by the name that an endpoint's body gives
    senders: Mapping[str, _Sender]  # by the name in call:NAME
    observer: Callable[[Notice], Any] | None
    clock: Callable[[], float]  # UTC seconds
    rng: Callable[[], float]  # 0 to 1
    resolver: Callable[[str, int], list[str]] | None  # host, port -> addresses; None: the system's


# ── transport ─────────────────────────────────────────────────────────────────────────────────────
# Promises: a connected, judged, TLS-checked socket, or one exception, within the deadline. Blocks:
# the drain calls it from threads only.
#
# We dial ourselves and have the standard library do TLS. Through urllib3 the opening of a
# connection took 630 us, 450 of them for pools that nobody used. Proxies of the environment,
# .netrc, cookies and CA variables play no part: those live in requests.Session, which is not used
# here.

_MAX_LOOKUPS = 32  # under way at once; each that is stuck keeps a thread
_LOOKUP_TIMEOUT = 5.0  # seconds that an asker waits

_Resolver = Callable[[str, int], list[str]]


class _Blocked(Exception):
    """The guard refused. It is no OSError, so that nothing takes it for a connect that failed and
    goes on with the next address."""


class _NoAddress(Exception):
    """The name did not resolve, or not in time."""


class _NoRoom(_NoAddress):
    """The name was not looked up, because too many lookups are stuck. That is a lack of room on our
    side, so it counts as no attempt."""


class _OriginKey(NamedTuple):
    """What tells one origin from another.

    Endpoints whose keys are equal share their connections. The certificate and the CA belong to it
    because a connection is proven by them once, in its handshake.
    """

    scheme: str
    host: str  # without brackets
    port: int
    ca: str | None  # path; None: the bundle that requests ships
    cert: tuple[str, ...]  # paths: certificate, or certificate and key


def _getaddrinfo(host: str, port: int) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


_THREAD_ROOM = 16 << 20  # bytes of memory that a new thread may need: its stack, and its first step
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
# What _start_thread raises when there is no room for one. A RuntimeError is that also where the
# interpreter is ending.
_NO_THREAD = (RuntimeError, OSError, MemoryError)


def _start_thread(run: Callable[..., Any], *args: Any, name: str | None = None) -> threading.Thread:
    """Start a daemon thread; raise one of _NO_THREAD when there is no room for one.

    Where the new thread finds no memory for its first step, start() waits for ever (CPython issue
    140746). So as much is asked of the system first, and given back.
    """
    mmap.mmap(-1, _THREAD_ROOM).close()
    thread = threading.Thread(target=run, args=args, name=name, daemon=True)
    thread.start()
    return thread


def _is_exhaustion(error: BaseException) -> bool:
    """Say whether this process ran out of descriptors, memory or threads.

    That is no receiver's fault, so it counts as no attempt; the drain opens nothing for a second.
    """
    if isinstance(error, OSError):
        return error.errno in _EXHAUSTED
    return (
        isinstance(error, MemoryError)
        or isinstance(error, RuntimeError)
        and "new thread" in str(error)
    )


class _Lookups:
    """Name lookups with a time limit, shared by the threads that open connections.

    A lookup cannot be interrupted, so each runs in a thread of its own, which sets a Future that
    the askers wait for. There is at most one lookup a host (all who ask for it wait for the same
    answer) and 32 in all, of which half are for hosts that resolved before: strangers whose names
    hang cannot use them up. A host whose lookup hung rests for a minute, in which asking for it
    costs nothing.

    What find() does with what a lookup came to:
        addresses                        returns them
        there is no such name            _NoAddress, whatever the host had before
        it hangs, there is no room, or   returns the addresses that the host had last; where it had
          the resolver cannot say now      none, _NoAddress or _NoRoom
        this process ran out of memory   raises that, as no fault of the host

    Addresses that serve again are judged again by whoever dials.
    """

    _REMEMBERED = 4_096  # hosts
    _RESTS = 60.0  # seconds
    _PATIENCE = 1.0  # seconds for a host whose last addresses can serve

    def __init__(self, resolver: _Resolver | None) -> None:
        self._resolver = resolver or _getaddrinfo
        # Guards the three below: a host whose addresses are found anew leaves _last for a moment.
        # Askers and lookups hold it for dictionary work only.
        self._lock = threading.Lock()
        self._running: dict[str, concurrent.futures.Future[list[str]]] = {}
        self._last: dict[str, list[str]] = {}  # addresses of hosts, the one found last at the end
        self._rests: dict[str, float] = {}  # hosts whose lookup hung; monotonic, until when

    def find(self, host: str, port: int, deadline: float) -> list[str]:
        """Return the host's addresses, five seconds from now at the latest, and not after the
        deadline (monotonic); raise _NoAddress, or _NoRoom."""
        host = host.lower()
        try:
            answer = self._ask(host, port)
            patience = _LOOKUP_TIMEOUT if self._had(host) is None else self._PATIENCE
            addresses = answer.result(max(0.0, min(patience, deadline - _monotonic())))
        except concurrent.futures.TimeoutError:
            with self._lock:
                self._rests[host] = _monotonic() + self._RESTS
            return self._again(host, _NoAddress(f"looking up {host} took too long"))
        except _NoAddress as error:
            return self._again(host, error)
        except Exception as error:  # OSError by contract; UnicodeError where a name is none
            if _is_exhaustion(error):
                raise
            why = getattr(error, "strerror", None) or type(error).__name__
            failure = _NoAddress(f"{host} does not resolve: {why}")
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
                return self._again(host, failure)
            raise failure from None
        if not addresses:
            raise _NoAddress(f"{host} has no address")
        return addresses

    def _ask(self, host: str, port: int) -> concurrent.futures.Future[list[str]]:
        """Return the answer to come to a lookup, begun now unless one is under way; raise
        _NoAddress while the host rests, _NoRoom where too many lookups are under way."""
        with self._lock:
            if _monotonic() < self._rests.get(host, 0.0):
                raise _NoAddress(f"looking up {host} took too long lately; it rests for a minute")
            answer = self._running.get(host)
            if answer is None:
                room = _MAX_LOOKUPS if host in self._last else _MAX_LOOKUPS // 2
                if len(self._running) >= room:
                    stuck = f"{len(self._running)} name lookups are stuck; is the resolver down?"
                    raise _NoRoom(stuck)
                answer = concurrent.futures.Future()
                _start_thread(self._look_up, host, port, answer)
                self._running[host] = answer
            return answer

    def _again(self, host: str, failure: _NoAddress) -> list[str]:
        """Return the addresses that a host had last; raise the failure where it had none."""
        addresses = self._had(host)
        if addresses is None:
            raise failure from None
        return addresses

    def _had(self, host: str) -> list[str] | None:
        with self._lock:
            return self._last.get(host)

    def _look_up(self, host: str, port: int, answer: concurrent.futures.Future[list[str]]) -> None:
        """Run one lookup, in its own thread; wake those who wait for the answer.

        What it found is remembered even if nobody waits any more. The Future is set last and
        outside the lock, so that whoever is woken finds the lookup gone from those under way.
        """
        addresses, failure = list[str](), None
        try:
            addresses = list(dict.fromkeys(self._resolver(host, port)))
        except BaseException as error:
            failure = error
        with self._lock:
            self._running.pop(host, None)
            self._rests.pop(host, None)
            if addresses:
                self._last.pop(host, None)
                self._last[host] = addresses
                if len(self._last) > self._REMEMBERED:
                    del self._last[next(iter(self._last))]
        if failure is None:
            answer.set_result(addresses)
        else:
            answer.set_exception(failure)


_NEXT_ADDRESS = 0.25  # seconds after which the next address of a name is tried too (RFC 8305, 8)
_REMEMBERED_HOSTS = 1_024  # of which we know the address that answered last


def _check_peer(sock: socket.socket, address: str) -> None:
    """Raise _Blocked unless a socket is connected to the address that was judged. A system may take
    one address for another: Linux connects 0.0.0.0 to 127.0.0.1."""
    peer = sock.getpeername()[0]
    if peer != address and ipaddress.ip_address(peer) != ipaddress.ip_address(address):
        raise _Blocked("connected to another address than the one that was dialled")


def _new_socket(address: str) -> socket.socket:
    """Return a socket for an address's family. TCP_NODELAY: else the end of a request, a part of a
    packet, waits until the receiver has acknowledged what came before."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect(address: str, port: int, patience: float) -> socket.socket:
    """Return a socket that is connected to an address, and to no other; patience: seconds.

    Raises OSError where it cannot be, _Blocked where the peer is another one.
    """
    sock = _new_socket(address)
    try:
        sock.settimeout(patience)
        sock.connect((address, port))
        _check_peer(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


class _Race:
    """Connections under way to the addresses of one name; one thread runs it and closes it.

    start() adds one, wait() returns a winner. Either takes away those that failed, and the caller
    sees by `under_way` that there were some. The selector has all that are under way.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        # What to raise where nobody wins: why the last one failed.
        self.failure: OSError = TimeoutError("no time left to connect")
        self.selector = selectors.DefaultSelector()
        self.under_way = 0

    def start(self, address: str) -> None:
        """Begin to connect to one more address."""
        try:
            sock = _new_socket(address)
        except OSError as error:
            self.failure = error
            return
        sock.setblocking(False)
        error_number = sock.connect_ex((address, self.port))
        self.selector.register(sock, selectors.EVENT_WRITE, address)
        self.under_way += 1
        if error_number not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            self._fail(sock, error_number)

    def _fail(self, sock: socket.socket, error_number: int) -> None:
        """Take a loser away, and remember why."""
        self.failure = OSError(error_number, os.strerror(error_number))
        self.selector.unregister(sock)
        self.under_way -= 1
        sock.close()

    def wait(self, pause: float) -> tuple[socket.socket, str] | None:
        """Return a socket that is connected, and to which address, if one is within so many
        seconds; None after a failure too, so that the next address is tried at once."""
        for key, _ in self.selector.select(max(0.0, pause)):
            sock: Any = key.fileobj
            if error_number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._fail(sock, error_number)
                continue
            _check_peer(sock, key.data)
            self.selector.unregister(sock)
            return sock, key.data
        return None

    def close(self) -> None:
        """Close those that are still under way."""
        for key in list(self.selector.get_map().values()):
            loser: Any = key.fileobj
            loser.close()
        self.selector.close()


def _connect_to_one(addresses: Sequence[str], port: int, until: float) -> tuple[socket.socket, str]:
    """Return a socket that is connected to one of the addresses, and to which; until: monotonic.

    The next address is tried beside those before when one has failed, or after a quarter of a
    second, and whichever answers first is taken (RFC 8305, 5). To wait for each in turn would make
    a name whose first address is a black hole cost seconds at each new connection. Raises the last
    failure where none answers.
    """
    race, left, next_at = _Race(port), collections.deque(addresses), 0.0
    try:
        while (now := _monotonic()) < until and (left or race.under_way):
            before = race.under_way
            if left and (now >= next_at or not before):
                race.start(left.popleft())
                next_at = now + _NEXT_ADDRESS
            elif winner := race.wait((min(until, next_at) if left else until) - now):
                return winner
            if race.under_way < before:
                next_at = now  # one has failed
        raise race.failure
    finally:
        race.close()


def _in_turn(addresses: Sequence[str], last: str | None) -> list[str]:
    """Return addresses in the order in which they are tried: the one that worked last, then one of
    each family in turn, so that a host whose IPv6 is broken costs one wait (RFC 8305, 4)."""
    families: tuple[list[str], list[str]] = [], []
    for address in addresses:
        families[(":" in address) != (":" in addresses[0])].append(address)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*families))
    return sorted((address for address in turns if address), key=lambda address: address != last)


def _dial(
    guard: _Guard,
    lookups: _Lookups,
    origin: _OriginKey,
    until: float,
    worked: dict[str, str] | None = None,
) -> socket.socket:
    """Resolve once, judge every answer, connect to a judged one; until: monotonic.

    The addresses that are judged are those that are dialled: a second lookup could say something
    else. One refused answer refuses the name: a DNS that mixes inside and outside addresses is
    lying about one of them. worked: which address of each host answered last; the caller keeps it,
    and several threads write to it. Raises _Blocked, _NoAddress, _NoRoom, or an OSError.
    """
    literal = _literal(origin.host)
    addresses = [literal] if literal else lookups.find(origin.host, origin.port, until)
    for address in addresses:
        if why := guard.refusal(address, origin.scheme):
            if address == origin.host or why == _NO_HTTP:
                raise _Blocked(why)
            # A customer reads the error, and must not learn from it what is inside our network.
            _log.warning("%s resolves to %s: %s", origin.host, address, why)
            raise _Blocked(f"{origin.host} is not a public address")
    patience = until - _monotonic()
    if patience <= 0:
        raise TimeoutError("no time left to connect")
    if len(addresses) == 1:
        return _connect(addresses[0], origin.port, patience)
    worked = {} if worked is None else worked
    ordered = _in_turn(addresses, worked.get(origin.host))
    sock, worked[origin.host] = _connect_to_one(ordered, origin.port, until)
    while len(worked) > _REMEMBERED_HOSTS:
        worked.pop(next(iter(list(worked))), None)  # list: other threads write to it too
    return sock


class _Contexts:
    """TLS contexts by CA and certificate, made again when the files change. One serves all
    connections: loading the CA bundle for each costs more than the handshake."""

    def __init__(self) -> None:
        # Guards _made; held while files are read, so that they are read once. Threads that open
        # connections wait for it, the loop never does.
        self._lock = threading.Lock()
        self._made: dict[tuple[Any, ...], ssl.SSLContext] = {}  # the key ends with the files' times

    def get(self, ca: str | None, cert: tuple[str, ...]) -> ssl.SSLContext:
        """Return the context for a CA and a certificate; ca None: the bundle that requests ships.

        Certificates are renewed while we run, so the files' times of change are looked at each
        time, and what was made of the older files is dropped. Raises OSError where a file cannot be
        read or holds no certificate.
        """
        bundle = ca or requests.utils.DEFAULT_CA_BUNDLE_PATH
        key = (ca, cert, *(os.stat(path).st_mtime_ns for path in (bundle, *cert)))
        with self._lock:
            if key not in self._made:
                context = self._make(bundle, ca is not None, cert)
                kept = {k: v for k, v in self._made.items() if k[:2] != key[:2]}
                self._made = kept | {key: context}
            return self._made[key]

    def _make(self, bundle: str, is_own: bool, cert: tuple[str, ...]) -> ssl.SSLContext:
        """Return a new context; is_own: the bundle is the endpoint's ca, not the public one."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the default one reads SSLKEYLOGFILE
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_verify_locations(cafile=bundle)
        if is_own:  # it may hold an intermediate, or the receiver's own certificate, and no root
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if cert:
            context.load_cert_chain(cert[0], cert[-1], password="")  # never ask on a terminal
            context.post_handshake_auth = True  # receivers may ask when they have seen the path
        else:
            context.options |= ssl.OP_NO_RENEGOTIATION  # we would have nothing new to say
        return context


def _time_left(until: float) -> float:
    """Return the seconds until a monotonic time; TimeoutError when it has passed."""
    left = until - _monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Tls:
    """TLS over a connected socket, through memory.

    An SSLSocket reads from its socket by itself, and goes on for as long as messages of TLS's own
    arrive (key updates, session tickets). A receiver that sends those without end held the loop in
    one recv(). Here each recv() takes 16 KiB off the socket at the most, and says in `beside` how
    many bytes came that were no data, so that they count against what an answer may hold.

        socket ── recv ──> _in  ──┐                 one thread at a time has it: an opener's
                                  ├── _tls, data    during the handshake, when the socket blocks;
        socket <── send ── _out <─┘                 the loop's after it, when the socket never does

    `unsent` is what did not fit into the socket: flush() goes on with that, and nothing else is
    sent before it.
    """

    __slots__ = ("_in", "_out", "_sock", "_tls", "beside", "unsent")
    _AT_ONCE = 16_384  # bytes: a TLS record holds as many
    _HANDSHAKE = 131_072  # bytes that a handshake may take; each read counts _READ_COST more

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str) -> None:
        self._sock, self._in, self._out = sock, ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host)
        self.unsent = b""  # encrypted
        self.beside = 0  # bytes; whoever counts them sets it back to 0

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def shake_hands(self, until: float) -> None:
        """Do the handshake; until: monotonic. Raises ssl.SSLError, TimeoutError or OSError."""
        room, done = self._HANDSHAKE, False
        while not done:
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._say(until)  # the alert, so that the receiver knows why
                raise
            self._say(until)
            if not done:
                self._sock.settimeout(_time_left(until))
                data = self._sock.recv(self._AT_ONCE)
                room -= len(data) + _READ_COST
                if room < 0:
                    raise ssl.SSLError("the handshake takes too long")
                self._in.write(data) if data else self._in.write_eof()

    def _say(self, until: float) -> None:
        """Send what the handshake has to say."""
        if self._out.pending:
            self._sock.settimeout(_time_left(until))
            self._sock.sendall(self._out.read())

    def flush(self) -> None:
        """Send what is waiting; BlockingIOError where there is no room for all of it."""
        self.unsent += self._out.read()
        while self.unsent:
            self.unsent = self.unsent[self._sock.send(self.unsent) :]

    def send(self, data: memoryview) -> int:
        """Take some of the data, and return how much; BlockingIOError where there is no room.

        What was taken counts as sent for the caller, though a part of it may wait in `unsent`.
        """
        if self.unsent:
            self.flush()
        count = self._tls.write(data[:65_536])
        made = self._out.read()
        try:
            self.unsent = made[self._sock.send(made) :]
        except BlockingIOError:
            self.unsent = made
        return count

    def recv(self, size: int) -> bytes:
        """Return the data that one read of the socket brings, b"" at the end of the connection;
        SSLWantReadError where it brings none, BlockingIOError where the socket has nothing.

        TLS may have to say something in reply (a key update): that is sent here.
        """
        raw = self._sock.recv(size if size < self._AT_ONCE else self._AT_ONCE)
        self._in.write(raw) if raw else self._in.write_eof()
        data = b""
        try:
            data = self._tls.read(self._AT_ONCE)
            while self._in.pending and (more := self._tls.read(self._AT_ONCE)):
                data += more
        except ssl.SSLError:  # also where the next record is not whole
            if raw and not data:
                raise
        finally:
            self.beside += len(raw) - len(data)
            if self._out.pending:
                with contextlib.suppress(OSError):  # else the next write, or read, tells
                    self.flush()
        return data


_Stream = socket.socket | _Tls


def _proxy_login(proxy: str | None) -> dict[str, str]:
    """Return the header that logs in at the proxy; none where its URL names no user."""
    return dict(requests.adapters.HTTPAdapter().proxy_headers(proxy)) if proxy else {}


class _Opener:
    """Opens connections. One for each drain, and one for each ping; the drain's opener threads
    share it, and call open() at the same time."""

    def __init__(self, settings: _Settings) -> None:
        self.guard, self.connect_timeout, self.proxy = (
            settings.guard,
            settings.connect_timeout,
            settings.proxy,
        )
        self.lookups, self.contexts = _Lookups(settings.resolver), _Contexts()
        # Host -> the address that answered last. Threads read and write it without a lock: what is
        # lost is a hint.
        self.worked: dict[str, str] = {}

    def open(self, origin: _OriginKey, deadline: float) -> _Stream:
        """Return a connection to an origin, past TLS; raise what _explain understands.

        deadline: the attempt's, monotonic. Lookup and connect have the connect timeout, TLS all
        that is left. With a proxy, which does the lookup and the connect, all has until the
        deadline; and the guard judges nothing, for that is the proxy's duty then. The socket that
        is returned never blocks, and is the caller's to close.
        """
        until = min(deadline, _monotonic() + self.connect_timeout)
        if self.proxy:
            sock = self._by_proxy(self.proxy, origin, deadline)
        else:
            sock = _dial(self.guard, self.lookups, origin, until, self.worked)
        try:
            made: _Stream = sock
            if origin.scheme == "https":
                context = self.contexts.get(origin.ca, origin.cert)
                made = tls = _Tls(sock, context, origin.host.rstrip("."))
                tls.shake_hands(deadline)
            sock.setblocking(False)
            return made
        except BaseException:
            sock.close()
            raise

    def _by_proxy(self, proxy: str, origin: _OriginKey, until: float) -> socket.socket:
        """Return a socket that the proxy has connected to an origin, or one to the proxy itself for
        plain http, which is asked for whole URLs; until: monotonic.

        What went wrong there goes to the log: a customer reads the error, and must not learn from
        it what is inside our network.
        """
        parts = urllib.parse.urlsplit(proxy)
        address = parts.hostname, parts.port or 80
        try:
            sock = socket.create_connection(address, timeout=_time_left(until))
        except OSError as error:
            if _is_exhaustion(error) or isinstance(error, TimeoutError):
                raise
            _log.warning("the proxy %s:%d: %s", *address, _one_line(str(error)))
            raise ConnectionError("the proxy cannot be reached") from None
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if origin.scheme == "https":
                self._tunnel(sock, proxy, origin, until)
        except BaseException:
            sock.close()
            raise
        return sock

    def _tunnel(self, sock: socket.socket, proxy: str, origin: _OriginKey, until: float) -> None:
        """Have the proxy connect to an origin (RFC 9110, 9.3.6); until: monotonic."""
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        lines = [f"CONNECT {host}:{origin.port} HTTP/1.1", f"Host: {host}:{origin.port}"]
        lines += [f"{name}: {value}" for name, value in _proxy_login(proxy).items()]
        sock.settimeout(_time_left(until))
        sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        head = b""
        while not re.search(rb"\n\r?\n", head):
            sock.settimeout(_time_left(until))
            data = sock.recv(_READ_HEAD - len(head))
            if not data:  # closed, or there is no room left
                raise ConnectionError("the proxy gave no answer that can be read")
            head += data
        status = re.match(rb"HTTP/1\.[01] ([0-9]{3})", head)
        if status is None or status[1][:1] != b"2":
            _log.warning("the proxy: %s", _one_line(head.partition(b"\n")[0].decode("latin-1")))
            said = "nothing of HTTP" if status is None else f"HTTP {status[1].decode()}"
            raise ConnectionError(f"the proxy answered {said}")


def _explain(error: BaseException) -> tuple[str, str]:
    """Return the reason, of _REASONS, and one line for an exception of an attempt.

    No other function makes a reason of an exception. The order matters: a TimeoutError and an
    SSLError are OSErrors too.
    """
    text = _one_line(getattr(error, "strerror", None) or str(error)) or type(error).__name__
    if isinstance(error, _SenderFailed):
        return "sender", text
    if isinstance(error, (_Blocked, UnsafeURL)):
        return "blocked", text
    if isinstance(error, _NoAddress):
        return "dns", text
    if isinstance(error, (TimeoutError, socket.timeout)):
        return "timeout", "no time left: the receiver did not connect or answer in time"
    if isinstance(error, ssl.SSLError):
        return "tls", getattr(error, "verify_message", "") or text
    if isinstance(error, OSError):
        return "connect", text
    if isinstance(error, (OutboxError, _Unready)):
        return "internal", text
    return "internal", f"{type(error).__name__}: {text}"


# ── exchange ──────────────────────────────────────────────────────────────────────────────────────
# Promises: the exact bytes of one POST, and the strict reading of its answer. Values in, values
# out; the sockets are the caller's. HTTP/1.1 by RFC 9112; redirects are never followed, bodies
# never decompressed.
#
# A delivery that is due (_Picked) and the way to write for its endpoint (_Wire) make the bytes of
# an attempt; the bytes that come back go into an _Answer; _judge makes an _Outcome of that, or
# _failure of an exception.

_BODIES = ("standard", "data", "cloudevents")  # bodies that are no transforms
_TYPE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@functools.lru_cache(maxsize=64)  # many events are of one second
def _iso_second(second: int) -> str:
    """Return a whole second of _iso, which is the expensive part of it."""
    return datetime.datetime.fromtimestamp(second, datetime.timezone.utc).strftime(
        "%Y-%m-%dT%H:%M:%S"
    )


def _iso(at: float) -> str:
    """Return UTC seconds as 2026-01-01T00:00:00.000Z (RFC 3339), cut to milliseconds."""
    second, milli = divmod(int(at * 1000), 1000)
    return f"{_iso_second(second)}.{milli:03d}Z"


_AS_JSON: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
_ENCODER = json.JSONEncoder(**_AS_JSON)  # json.dumps makes one each time


def _dumps(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Return JSON without white space; NaN and Infinity, which JSON has not, raise ValueError."""
    if default is None:
        return _ENCODER.encode(value)
    return json.dumps(value, default=default, **_AS_JSON)


class _Picked(NamedTuple):
    """A delivery that is due, with its event, as storage reads it.

    It is read ahead, so the file may have changed since: what comes of it is recorded by triggers
    that look at the file again.
    """

    event: int  # webhook_events.seq
    due_at: float
    attempts: int  # before this one
    first_attempt_at: float | None  # None: there was none yet
    queue: str | None  # None: it may overtake and be overtaken
    type: str | None  # None: the event's row is missing
    data: str | None  # None: it is large, and read when the attempt starts
    valid: int | None  # 1: data is JSON
    key: str | None
    headers: str | None  # JSON object; plain SQL may have written it
    created_at: float
    tenant: str | None
    expires_at: float | None = None  # None: never, or somebody has replayed or resent it

    @property
    def id(self) -> str:
        return _event_id(self.event)

    def check(self) -> None:
        """Raise _Unready where the event's row is useless; it may have been damaged, or deleted by
        hand. emit and the triggers let none of this in."""
        if self.type is None:
            raise _Unready("the event's row is missing")
        if self.valid != 1:
            raise _Unready("the event's data is not JSON")
        if not _TYPE.fullmatch(self.type):
            raise _Unready("the event's row is damaged")

    def as_event(self) -> Event:
        """Return the event as transforms and senders get it."""
        data, type = json.loads(self.data or ""), self.type or ""
        return Event(self.id, type, data, self.tenant, self.key, self.created_at)


def _standard_body(picked: _Picked, sees_all: bool) -> bytes:
    """Return the envelope of Standard Webhooks (Payload structure).

    A pure function of the stored row, and for ever the same: each attempt must send the same bytes,
    also after an upgrade of this file. data stands in it as it was stored, never parsed again.
    sees_all: for an endpoint of tenant '*', which has to be told whose event it is.
    """
    whose = f'"tenant":"{picked.tenant}",' if sees_all and picked.tenant else ""
    stamp = _iso(picked.created_at)
    return f'{{"type":"{picked.type}","timestamp":"{stamp}",{whose}"data":{picked.data}}}'.encode()


def _cloudevents_body(picked: _Picked, source: str, sees_all: bool) -> bytes:
    """Return a CloudEvent 1.0 in JSON (structured mode); sees_all adds the extension attribute
    tenant. source: names the sender, and with the id tells an event from all others. It must not be
    empty, so an empty one becomes webhook-outbox."""
    context = {
        "specversion": "1.0",
        "id": picked.id,
        "source": urllib.parse.quote(source) or "webhook-outbox",
    }
    context |= {
        "type": picked.type or "",
        "time": _iso(picked.created_at),
        "datacontenttype": "application/json",
    }
    if sees_all and picked.tenant:
        context["tenant"] = picked.tenant
    return f'{_dumps(context)[:-1]},"data":{picked.data}}}'.encode()


def _slack_body(event: Event) -> bytes:
    """Return a Slack message. Escaped as Slack wants it, so that data cannot mention a channel."""
    text = f"{event.type} {_dumps(event.data)}"[:3000]
    return _dumps({"text": html.escape(text, quote=False)}).encode()


def _discord_body(event: Event) -> bytes:
    """Return a Discord message, which may be 2,000 characters long (of UTF-16, to be safe) and
    mentions nobody."""
    text = f"{event.type} {_dumps(event.data)}".encode("utf-16-le")[:4000].decode(
        "utf-16-le", "ignore"
    )
    return _dumps({"content": text, "allowed_mentions": {"parse": []}}).encode()


# The transforms that are built in; one of the host's with the same name is taken instead.
_TRANSFORMS: dict[str, Callable[[Event], Any]] = {"slack": _slack_body, "discord": _discord_body}


def _resolve_value(value: str) -> str:
    """Return a secret or header value, read from the environment (env:NAME) or a file (file:PATH)
    where it says so. Raises _Unready, which names the source and never what it holds."""
    kind, _, name = value.partition(":")
    found = value
    if kind == "env":
        found = os.environ.get(name, "").strip()
    elif kind == "file":
        try:
            with open(name, encoding="utf-8") as file:
                found = file.read(65_536).strip()
        except (OSError, ValueError) as error:
            raise _Unready(f"the file {name} cannot be read ({type(error).__name__})") from None
    if not found:
        raise _Unready(
            f"the {'environment variable' if kind == 'env' else 'file'} {name} is not set or empty"
        )
    return found


_DERIVED = "master:"  # begins a secret of which the file holds the number only


class _MasterKey:
    """The key from which secrets are derived, where the host gives one: then the file, a backup or
    a copy holds nothing that could sign.

    A secret is HMAC-SHA256 of the key over the outbox's identity, the endpoint's id and a number.
    The file holds `master:NUMBER`, and a check value of the key; whoever loads an endpoint makes of
    these `master:NUMBER:IDENTITY:CHECK`. The check value tells a wrong key before it signs
    anything.

    The key is read when it is first needed and kept, unless it turns out to be a wrong one: then it
    is read again each time, so that mending a file is enough. Threads share it without a lock: they
    would read the same key.
    """

    __slots__ = ("_key", "source")

    def __init__(self, source: Any) -> None:
        """Take what Outbox(master_key=) got: None, env:NAME or file:PATH. Raises PayloadError where
        it is something else, or the key is too short; one that is not there yet is no error."""
        if source is not None and not (
            isinstance(source, str) and re.fullmatch(r"env:[A-Za-z_]\w*|file:[^\x00-\x1f]+", source)
        ):
            raise PayloadError(
                "master_key must be env:NAME or file:PATH, where the key itself stands"
            )
        self.source: str | None = source
        self._key: bytes | None = None
        with contextlib.suppress(_NoMasterKey):  # a process that only emits may be without it
            self.check_value()

    @property
    def slow(self) -> bool:
        """True where the next look reads a file, which the loop must leave to a thread."""
        return self._key is None and (self.source or "").startswith("file:")

    def _sign(self, text: str) -> bytes:
        """Return HMAC-SHA256 of a text; raise _NoMasterKey where there is no key."""
        if self._key is None:
            if self.source is None:
                raise _NoMasterKey(
                    "the secret is derived from a master key, which is not here: "
                    "give master_key= or set WEBHOOK_OUTBOX_MASTER_KEY"
                )
            try:
                key = _resolve_value(self.source).strip()
            except _Unready as error:
                raise _NoMasterKey(f"the master key is not here: {error}") from None
            if len(key) < 32:
                raise PayloadError("the master key must have 32 characters at least")
            self._key = key.encode("utf-8", "surrogateescape")
        return hmac.digest(self._key, text.encode(), "sha256")

    def check_value(self) -> str:
        """Return what tells this key from another one, and tells nothing of it."""
        return self._sign("check").hex()[:16]

    def secret(self, derived: str, endpoint_id: str) -> str:
        """Return the secret that `derived`, completed as above, stands for at an endpoint; raise
        _NoMasterKey where the key is not here or is another one."""
        number, identity, check = derived.removeprefix(_DERIVED).split(":")
        if self.check_value() != check:
            self._key = None
            raise _NoMasterKey(
                "the master key is not the one that this file's secrets were made with"
            )
        made = self._sign(f"secret\0{identity}\0{endpoint_id}\0{number}")
        return "whsec_" + base64.b64encode(made).decode("ascii")


# Headers that belong to the connection (RFC 9110, 7.6.1), to the body, or to the signature.
_RESERVED_HEADER = re.compile(
    r"(connection|keep-alive|te|trailer|transfer-encoding|upgrade|expect|host|accept-encoding"
    r"|user-agent|x-github-(event|delivery)|proxy-.*|content-.*|webhook-.*|"
    + "|".join(of.header for of in _SCHEMES.values())
    + ")",
    re.IGNORECASE,
)
_MOST_HEADERS = 16_384  # characters of custom headers in all; receivers refuse more
# Printable Latin-1 on one line, at most 8,192 characters, no space at its ends (RFC 9110, 5.5).
_HEADER_VALUE = re.compile(
    r"[!-~\xa1-\xac\xae-\xff]([ -~\xa1-\xac\xae-\xff]{0,8190}[!-~\xa1-\xac\xae-\xff])?"
)


def _checked_headers(headers: Any) -> dict[str, str]:
    """Return custom headers as a dict; raise PayloadError, which never quotes a value.

    A value may be a credential. headers None: there are none. A name may stand there once, whatever
    its case.
    """
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise PayloadError("headers must be a mapping of names to text")
    for name, value in headers.items():
        if not isinstance(name, str) or not re.fullmatch(
            r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}", name
        ):
            raise PayloadError(
                "a header name must be 1 to 128 letters, digits and -; no spaces or line breaks"
            )
        if _RESERVED_HEADER.fullmatch(name):
            raise PayloadError(
                f"the header {name} is set by the outbox or the connection; leave it out"
            )
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise PayloadError(
                f"the value of header {name} must be one line of printable Latin-1 text"
            )
    if len({name.lower() for name in headers}) != len(headers):
        raise PayloadError("a header is given twice, in different case")
    if sum(map(len, itertools.chain(headers, headers.values()))) > _MOST_HEADERS:
        raise PayloadError(f"headers hold more than {_MOST_HEADERS:,} characters in all")
    return dict(headers)


def _clean(what: str, value: str) -> str:
    """Return text for a header that came from outside the file: from a variable of the environment,
    or a transform's content type.

    A line break would start a header of its own, and there is no agreed way to write letters beyond
    ASCII. Raises _Unready with `what` in its text, and not the value.
    """
    if not (value.isascii() and value.isprintable()):
        raise _Unready(f"{what} must be one line of printable ASCII")
    return value


def _stored_headers(text: str | None) -> dict[str, str]:
    """Return an event's headers; rows may have been written in plain SQL, so they are checked
    again."""
    if text is None:
        return {}
    try:
        return _checked_headers(json.loads(text))
    except (ValueError, RecursionError):
        raise _Unready("the event's headers are not usable") from None


_Secrets = list[tuple[str, float | None]]  # (secret, valid until or None for always), current first
_LEAST_HIDDEN = 6  # characters; shorter ones would blacken words that mean nothing


def _hidden_of(target: _Target, secrets: _Secrets, login: Mapping[str, str]) -> list[str]:
    """Return what must be hidden where a receiver sends it back, in an error page say: the tables
    keep what it sent, and people read it in listings.

    That is the URL's query as a whole, each of its parts and each value, as written and decoded;
    the secrets; and the login at the proxy.
    """
    query = target.path.partition("?")[2]  # as it goes over the wire, percent-encoded
    hidden = (
        [query, *query.split("&"), *(part.rpartition("=")[2] for part in query.split("&"))]
        if query
        else []
    )
    hidden += [value for _, value in urllib.parse.parse_qsl(query)] if query else []
    hidden += [secret for secret, _ in secrets]
    hidden += [value.rpartition(" ")[2] for value in login.values()]
    return [value for value in hidden if len(value) >= _LEAST_HIDDEN]


def _reads_files(secrets: _Secrets, master: _MasterKey) -> bool:
    """Say whether getting at the secrets may read a file. That may block, so the loop hands such
    requests to a thread."""
    return any(
        s.startswith("file:") or (master.slow and s.startswith(_DERIVED)) for s, _ in secrets
    )


def _is_plain(secrets: _Secrets) -> bool:
    """Say whether an endpoint has one secret, which stands in its row and is valid for ever. Most
    endpoints are so, and need no look at each attempt."""
    return len(secrets) == 1 and secrets[0][1] is None and secrets[0][0].startswith("whsec_")


@dataclasses.dataclass(slots=True)
class _Wire:
    """How requests for one endpoint are written; made once for each version of its row.

    An attempt keeps the wire that it began with, so what is signed and where it goes belong
    together, also where the endpoint is changed meanwhile. The loop builds requests with it, or,
    where it is slow, a thread does. What changes in it is `origin`, which only the loop touches,
    and `derived`, which remembers values that never change.
    """

    endpoint: Endpoint
    secrets: _Secrets
    origin_key: _OriginKey  # for a sender ("call", its name), and no connection belongs to it
    start: bytes  # request line and the headers that never change
    schemes: tuple[str, ...]  # of _SCHEMES: each signs
    transform: Callable[[Event], Any] | None  # None: the body is one of _BODIES
    source: str  # of a CloudEvent
    hidden: list[str]  # of the URL and the secrets: see _hidden_of
    slow: bool  # building a request may block or run the host's code: the loop hands it to a thread
    call: _Sender | None = None  # the sender that is called instead of a request
    origin: _Origin | None = None  # kept here by the carrier, so that it is looked up once
    master: _MasterKey | None = None  # None: a sender, which signs nothing
    derived: dict[str, str] = dataclasses.field(default_factory=dict)  # secrets made of it so far
    only: list[str] | None = None  # the one secret that always signs; None: looked up each time

    @classmethod
    def make(cls, endpoint: Endpoint, secrets: _Secrets, settings: _Settings) -> _Wire:
        """Return the wire of an endpoint; raise UnsafeURL or _Unready where it is unusable.

        A row may be unusable though it was checked when it was written: plain SQL wrote it, or this
        process has other transforms, senders or allow_networks than the one that registered it.
        """
        if _is_called(endpoint.url):
            return cls._of_sender(endpoint, secrets, settings)
        target = _prepare_url(endpoint.url, settings.guard)
        cert = (endpoint.cert,) if isinstance(endpoint.cert, str) else tuple(endpoint.cert or ())
        origin_key = _OriginKey(target.scheme, target.host, target.port, endpoint.ca, cert)
        login = _proxy_login(settings.proxy)
        proxied = settings.proxy and target.scheme == "http"
        agent = f"webhook-outbox/{__version__}" + (
            f" ({settings.app_name})" if settings.app_name else ""
        )
        lines = [
            f"POST {target.url if proxied else target.path} HTTP/1.1",
            f"Host: {target.netloc}",
        ]
        lines += [f"User-Agent: {agent}", "Accept: */*", "Accept-Encoding: identity"]
        lines += [f"{name}: {value}" for name, value in login.items() if proxied]
        transform = settings.transforms.get(endpoint.body)
        if transform is None and endpoint.body not in _BODIES:
            raise _Unready(f"no transform is called {endpoint.body!r}; run the drain with --app")
        schemes = tuple(dict.fromkeys(endpoint.signing.split("+")))
        if not set(schemes) <= set(_SCHEMES):
            raise _Unready(f"no signing is called {endpoint.signing!r}; update the endpoint")
        return cls(
            endpoint,
            secrets,
            origin_key,
            start="\r\n".join(lines).encode("latin-1") + b"\r\n",
            schemes=schemes,
            transform=transform,
            source=settings.app_name,
            hidden=_hidden_of(target, secrets, login),
            slow=transform is not None or _reads_files(secrets, settings.master),
            master=settings.master,
            only=[secrets[0][0]] if _is_plain(secrets) else None,
        )

    @classmethod
    def _of_sender(cls, endpoint: Endpoint, secrets: _Secrets, settings: _Settings) -> _Wire:
        """Return the wire of an endpoint that is a sender: nothing of HTTP plays a part."""
        name, call = endpoint.url.removeprefix(_CALL), _sender(endpoint.url, settings.senders)
        if call is None:
            raise _Unready(f"no sender is called {name!r} here; run the drain with --app")
        origin_key = _OriginKey("call", name, 0, None, ())
        hidden = [secret for secret, _ in secrets]
        return cls(endpoint, secrets, origin_key, b"", (), None, "", hidden, slow=True, call=call)

    def deliver(self, picked: _Picked) -> None:
        """Have the sender deliver an event: to return is success, to raise is _SenderFailed.

        It is the host's own code, and runs in a thread of the drain: whatever it raises ends this
        attempt and nothing else, and it may take as long as it likes.
        """
        picked.check()
        event = picked.as_event()
        try:
            returned = self.call(event)  # type: ignore[misc]
        except BaseException as error:  # its SystemExit is a failed attempt like any other
            raise _SenderFailed(_raised(error)) from None
        if inspect.isawaitable(returned):  # a lambda around an async function
            if inspect.iscoroutine(returned):
                returned.close()  # else Python warns that nobody awaited it
            raise _SenderFailed(
                f"{self.endpoint.url} is async, and nobody awaits it; call asyncio.run in it"
            )

    def body(self, picked: _Picked) -> tuple[bytes, str]:
        """Return the body bytes and their content type; raise _Unready where the transform raises,
        or returns something else than bytes, or (bytes, content type).

        What it raises is not passed on: an OSError of its own, a TimeoutError say, would read as
        one of the connection to the receiver.
        """
        sees_all = self.endpoint.tenant == "*"
        if self.transform is not None:
            try:
                made = self.transform(picked.as_event())
            except BaseException as error:  # its SystemExit is a failed attempt like any other
                raise _Unready(_raised(error)) from None
            body, content_type = (
                made if isinstance(made, tuple) and len(made) == 2 else (made, "application/json")
            )
            if not isinstance(body, bytes) or not isinstance(content_type, str):
                raise _Unready(
                    f"the transform {self.endpoint.body!r} must return bytes,"
                    " or (bytes, content type)"
                )
            return body, _clean(
                f"the content type of transform {self.endpoint.body!r}", content_type
            )
        if self.endpoint.body == "data":
            return (picked.data or "").encode(), "application/json"
        if self.endpoint.body == "cloudevents":
            return _cloudevents_body(picked, self.source, sees_all), "application/cloudevents+json"
        return _standard_body(picked, sees_all), "application/json"

    def signing_secrets(self, now: float) -> list[str]:
        """Return the secrets that sign now (UTC seconds), current first, ten at the most; raise
        _Unready where there is none. An old one signs until its grace is over."""
        if self.only is not None:
            return self.only
        valid = [s for s, until in self.secrets if until is None or until > now]
        valid = [s if s.startswith("whsec_") else self._resolved(s) for s in valid[:_MAX_SECRETS]]
        if not valid:
            raise _Unready("the endpoint has no valid secret; rotate it")
        return valid

    def _resolved(self, secret: str) -> str:
        """Return a secret that is not in the file: from the environment, a file, or derived."""
        if not secret.startswith(_DERIVED) or self.master is None:
            return _resolve_value(secret)
        if secret not in self.derived:
            self.derived[secret] = self.master.secret(secret, self.endpoint.id)
        return self.derived[secret]

    def own_headers(self) -> dict[str, str]:
        """Return the endpoint's headers, with what env:NAME stands for. In an event's headers such
        a value is sent as it is: else whoever emits could send out any variable."""
        return {
            name: _clean(f"the value of header {name} ({value})", _resolve_value(value))
            if value.startswith("env:")
            else value
            for name, value in self.endpoint.headers.items()
        }

    def _custom_headers(self, picked: _Picked) -> list[tuple[str, str]]:
        """Return the endpoint's headers and the event's; the endpoint's win: an event must not
        replace credentials."""
        own = self.own_headers()
        taken = {name.lower() for name in own}
        of_event = {
            n: v for n, v in _stored_headers(picked.headers).items() if n.lower() not in taken
        }
        return list({**own, **of_event}.items())

    def request(self, picked: _Picked, now: float) -> tuple[bytes, list[str]]:
        """Return the bytes of one attempt, and what must not be stored if the receiver echoes it.

        now: UTC seconds, which are signed. The body is the same at each attempt, the timestamp and
        so the signature are not (Standard Webhooks, Webhook metadata). Raises what _explain knows.
        """
        picked.check()
        id = picked.id
        body, content_type = self.body(picked)
        valid = self.signing_secrets(now)
        signed = _signature_headers(self.schemes, valid, id, int(now), body)
        custom = (
            self._custom_headers(picked)
            if self.endpoint.headers or picked.headers is not None
            else []
        )
        extra = "".join([f"{name}: {value}\r\n" for name, value in [*custom, *signed]])
        if "github" in self.schemes:  # its receivers want these two before they verify
            extra += f"X-GitHub-Event: {picked.type}\r\nX-GitHub-Delivery: {id}\r\n"
        head = (
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
            f"webhook-id: {id}\r\nwebhook-timestamp: {int(now)}\r\n{extra}\r\n"
        )
        hidden = [*self.hidden, *valid, *[value for _, value in signed]]
        if custom:
            hidden += [part for _, value in custom for part in (value, value.rpartition(" ")[2])]
        return self.start + head.encode("latin-1") + body, hidden


_RUN = re.compile(r"[A-Za-z0-9]+")
_MOST_HIDDEN = 128  # values that a text is searched for


def _redacted(text: str, hidden: Iterable[str]) -> str:
    """Return text without the secrets that a receiver echoed, as they are or as JSON and URLs spell
    them. Not a guarantee against other encodings, or against a part of a secret.

    Each value costs a search through the text, and a URL may hold three hundred. Where there are
    more than can be searched for, nothing of the text is shown. The loop calls this for each
    answer, so what cannot be in the text is ruled out first: values that are longer than it, and
    values of which a run of letters or digits is missing.
    """
    if len(text) < _LEAST_HIDDEN:
        return text
    longest = len(text) + len("whsec_")
    fitting = [value for value in hidden if len(value) <= longest]
    if not fitting:
        return text
    values = {value.removeprefix("whsec_") for value in fitting}
    if len(values) > _MOST_HIDDEN:
        return "[redacted]"
    for value in sorted(values, key=len, reverse=True):  # a value may be a part of another
        # No spelling changes letters and digits; they rule most values out at little cost.
        if _LEAST_HIDDEN <= len(value) <= len(text) and all(
            run in text for run in _RUN.findall(value)
        ):
            in_json = json.dumps(value)[1:-1]
            in_url = urllib.parse.quote(value, errors="replace")
            spellings = [value, in_json, in_json.replace("/", "\\/")]
            for spelling in {*spellings, in_url, in_url.replace("/", "%2F")}:
                text = text.replace(spelling, "[redacted]")
    return text


_SUCCESS = range(200, 300)
# What an answer is made of (RFC 9112, 4 and 7.1). A bare line feed ends a line too (2.2).
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n]*)?\r?\n")
_HEAD_END = re.compile(rb"\n\r?\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
# The headers of a head and the empty line behind them. Where they are something else, the answer
# still counts, but what comes next on this connection may not be what it seems.
_WELL_FORMED = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*\r?\n)*\r?\n")
_OURS = re.compile(  # the headers that mean something to us
    rb"^(content-length|transfer-encoding|connection|retry-after|location|webhook-delivery)"
    rb":[ \t]*([^\r\n]*)",
    re.I | re.M,
)


@functools.lru_cache(maxsize=64)  # most receivers send the same head for a second, or for ever
def _read_fields(
    block: bytes, keep: bool, bodiless: bool
) -> tuple[Mapping[bytes, list[bytes]], bool, str, int]:
    """Return what a head says: the headers that matter (to be read only: they are remembered),
    whether the connection may be used again, the body's framing and its length.

    block: the bytes behind the status line. keep: HTTP/1.1, whose connections stay open unless it
    says close. bodiless: the status allows no body. The framing by RFC 9112, 6.3, in this order:

        no body allowed               "length", 0 bytes
        a transfer coding             "chunked" where it is that alone and there is no length
        one length, or equal ones     "length"
        anything else                 "close": the body ends with the connection
    """
    headers: dict[bytes, list[bytes]] = {}
    for name, value in _OURS.findall(block):
        headers.setdefault(name.lower(), []).append(value.rstrip(b" \t"))
    tokens = b",".join(headers.get(b"connection", [])).lower()
    reusable = (
        bool(_WELL_FORMED.fullmatch(block))
        and b"close" not in tokens
        and (keep or b"keep-alive" in tokens)
    )
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
    """Reads one answer, byte by byte if need be, at a bounded cost.

    Whoever has the socket calls feed() with what came, until that returns True: then the outcome is
    known. `status` is None until the head of a final answer has come whole; interim ones (1xx) are
    dropped. `reusable`: the connection may carry another request. Anything odd (no framing, two
    lengths, a bad chunk, bytes after the end, a body beyond what is read) makes it False, and the
    outcome is then what a valid status says.

        _framing   what comes next                          the outcome is known
        ""         the head                                 when it is no HTTP/1.1, or too large
        length     _left bytes of the body                  when they have come
        chunked    _left bytes of a chunk; -1: a size line  when a chunk of size 0 has come
        close      a body to the end of the connection      at once, where the status is a success

    room is what may still be read. All that arrives counts, heads, framing and interim answers too,
    and each read and each chunk counts as 64 bytes more. So a receiver that sends single bytes gets
    a thousand reads, which take 0.03 s; if bytes alone counted, it would get 65,536.
    """

    __slots__ = (
        "body",
        "buffer",
        "error",
        "headers",
        "outcome",
        "reusable",
        "room",
        "status",
        "_at",
        "_framing",
        "_left",
    )
    _BODY = 2 * _KEPT_RESPONSE  # bytes that are kept here: see _kept

    def __init__(self) -> None:
        """Begin before the first byte, for one attempt."""
        self.buffer = bytearray()  # what came and was not understood yet
        self.body = bytearray()  # the beginning of the body; what is beyond _BODY is dropped
        self.status: int | None = None
        self.headers: Mapping[bytes, list[bytes]] = {}  # those that matter, in lower case
        self.error = ""  # why no outcome can be read: then status is None
        # Set by _read_whole, for an answer that many attempts share, where the body is too short to
        # hold a secret of theirs. None: _judge makes it for the attempt.
        self.outcome: _Outcome | None = None
        self.reusable = True
        self.room = _READ_RESPONSE
        self._framing = ""
        # Bytes of this body or chunk that are to come; before that, bytes of interim answers.
        self._left = 0
        self._at = 0  # how far the head was searched: no byte is looked at twice

    def feed(self, data: bytes) -> bool:
        """Take what one read brought; say whether the outcome is known, an error being one too."""
        self.room -= len(data) + _READ_COST
        self.buffer += data
        if not self._framing and not self._read_head():
            known = bool(self.error)
        else:
            known = self._read_body()
        return self._spent() if self.room <= 0 else known

    def read_nothing(self) -> bool:
        """Count a read that brought no byte, as TLS makes them; True when that was the last."""
        self.room -= _READ_COST
        return self.room <= 0 and self._spent()

    def started(self) -> bool:
        """Say whether a byte has come."""
        return bool(self.buffer) or self.status is not None or self._left > 0

    def cut(self) -> _Answer:
        """Do without the rest of the body, for which there is no time left; what the status says
        holds."""
        self.reusable = False
        return self

    def end(self) -> None:
        """Take note that the receiver closed the connection. With a status that was read, this is
        the end of the body, or the body is cut; without one it is an error."""
        self.reusable = False
        if self.status is None and not self.error:
            self.error = "the connection was closed before an answer" + (
                " was complete" if self.started() else ""
            )

    def _spent(self) -> bool:
        """Take note that there is no room left: what the status says holds, if there is one."""
        if self.status is None and not self.error:
            self._fail("the answer came in too many pieces")
        return self._odd()

    def _fail(self, error: str) -> bool:
        """Take note that this is no answer; return False, as there is no head to go on with."""
        self.status, self.error, self.reusable = None, error, False
        return False

    def _odd(self) -> bool:
        """Give the connection up; return True, as the status decides."""
        self.reusable = False
        return True

    def _read_head(self) -> bool:
        """Say whether the head of a final answer is there. Interim answers (RFC 9110, 15.2) are
        dropped, except 101: what follows that is of a protocol that we do not speak."""
        while True:
            end = _HEAD_END.search(self.buffer, max(0, self._at - 2))
            if end is None:
                return self._await_head()
            line = _STATUS_LINE.match(self.buffer)
            if line is None:
                return self._fail("the answer is not HTTP/1.1")
            if end.end() > _READ_HEAD:
                return self._fail("the answer's head is too large")
            status = int(line[2])
            if status >= 200:
                break
            if status == 101:
                return self._fail("the answer was 101, another protocol")
            del self.buffer[: end.end()]
            self._left += end.end()
            self._at = 0
            if self._left > _READ_HEAD:
                return self._fail("endless interim answers")
        self.status = status
        block = bytes(self.buffer[line.end() : end.end()])
        fields = _read_fields(block, line[1] == b"1", status in (204, 304))
        self.headers, self.reusable, self._framing, self._left = fields
        del self.buffer[: end.end()]
        return True

    def _await_head(self) -> bool:
        """Return False, as the head is not whole yet; take note of an error where it cannot become
        one. Only the status line tells: as a whole when its end has come, before that by its first
        seven bytes."""
        if self.buffer.find(b"\n", self._at) >= 0:
            sound = _STATUS_LINE.match(self.buffer) is not None
        else:
            sound = b"HTTP/1.".startswith(bytes(self.buffer[:7]))
        self._at = len(self.buffer)
        if not sound:
            return self._fail("the answer is not HTTP/1.1")
        return self._fail("the answer's head is too large") if self._at > _READ_HEAD else False

    def _read_body(self) -> bool:
        """Take what came of the body; say whether the outcome is known."""
        if self._framing == "close":
            # A success needs no waiting for the end; of a failure people want to read the text.
            self.reusable = False
            self._take(len(self.buffer))
            return 200 <= (self.status or 0) < 300
        if self._framing == "chunked":
            return self._read_chunks()
        self._left -= self._take(min(self._left, len(self.buffer)))
        if self._left:
            return False
        return self._odd() if self.buffer else True

    def _take(self, count: int) -> int:
        """Move bytes from the buffer to the body, which keeps only its beginning."""
        self.body += self.buffer[: min(count, self._BODY - len(self.body))]
        del self.buffer[:count]
        return count

    def _read_chunks(self) -> bool:
        """Read chunks as far as they have come (RFC 9112, 7.1); say whether the outcome is known:
        with the last chunk, with one that is malformed, or when the room is spent."""
        while self.room > 0:
            if self._left == -1:
                size = _CHUNK.match(self.buffer)
                if size is None:
                    return self._odd() if b"\n" in self.buffer or len(self.buffer) > 256 else False
                self._left = int(size[1], 16)
                if self._left == 0:
                    return self._read_trailer(size.end())
                del self.buffer[: size.end()]
                self.room -= _READ_COST
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
        """Read what follows the last chunk, whose size line ends at `start`: an empty line."""
        self._left = -1  # the size line is still there: come back when more has arrived
        end = re.match(rb"\r?\n", memoryview(self.buffer)[start:])
        if end is not None:
            return True if start + end.end() == len(self.buffer) else self._odd()
        # Trailers: nobody sends them, so the connection is closed.
        return self._odd() if len(self.buffer) > start + 1 else False


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class _Outcome(NamedTuple):
    """What one attempt came to. What that means for the delivery is _verdict's to say."""

    status_code: int | None = None  # None: no answer
    reason: str | None = None  # None: success; else one of _REASONS
    error: str | None = None  # one line for people; None: success
    response: str | None = None  # what is kept of the answer's body; None: nothing
    hint: float | None = None  # seconds of Retry-After on 429 and 503
    disable: bool = False  # the receiver wants nothing more: 410, or webhook-delivery: disable

    @property
    def overloaded(self) -> bool:
        """Say whether it means that the receiver has too much to do (Standard Webhooks, Delivery
        success and failure)."""
        return self.reason == "timeout" or self.status_code in (429, 502, 504)

    def of_old_url(self) -> _Outcome:
        """Return what it means where the endpoint has another URL by now. A success stays one: the
        host wanted it sent there then. A failure is one that is tried again, whatever the receiver
        there asked for, since it may not speak for the endpoint any more."""
        reason = "status" if self.reason in ("gone", "aborted") else self.reason
        return self._replace(reason=reason, hint=None, disable=False)


def _as_text(body: bytearray, most: int) -> str:
    """Return what bytes say; those that are no text are spelled out. Each of these costs as much as
    200 others, so where there are any, only what can be shown is read: about `most` characters."""
    try:
        return body.decode()
    except UnicodeDecodeError:
        decoder, text = codecs.getincrementaldecoder("utf-8")("backslashreplace"), ""
    for start in range(0, len(body), 512):
        text += decoder.decode(body[start : start + 512], start + 512 >= len(body))
        if len(text) >= most:
            break
    return text


def _kept(body: bytearray, most: int, hidden: Iterable[str]) -> str | None:
    """Return what is stored of an answer's body: at most so many bytes, as one printable text.

    A receiver may send 64 KiB of echoed secrets. Only what can be kept is searched for them, and
    4 KiB more. Where the body was longer, those 4 KiB are thrown away again, because a secret may
    have been cut at their end.
    """
    if not body:
        return None
    searched = most + _KEPT_RESPONSE
    text = _as_text(body, searched)
    if len(text) < searched and len(body) < searched:
        text = _redacted(text, hidden)
    else:
        cut = len(text[:searched]) * _KEPT_RESPONSE // searched
        text = _redacted(text[:searched], hidden)
        text = text[: max(0, len(text) - cut)]
    text = text if text.isprintable() else _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) * 4 <= most else text.encode()[:most].decode("utf-8", "ignore")


def _judge(answer: _Answer, hidden: Iterable[str], now: float) -> _Outcome:
    """Return the outcome that a read answer means; now: UTC seconds, for a Retry-After date.

    In this order: no answer that can be read; a success, 200 to 299; a failure with its status,
    where 3xx names its Location, 410 and webhook-delivery say that it is final, and 429 and 503
    may say when to come again.
    """
    if answer.status is None:
        return _Outcome(reason="protocol", error=answer.error)
    status, header = answer.status, answer.headers
    success = status in _SUCCESS
    response = _kept(answer.body, _KEPT_SUCCESS if success else _KEPT_RESPONSE, hidden)
    order = header.get(b"webhook-delivery", [b""])[-1].lower()
    if success:
        return _Outcome(status, None, None, response, disable=order == b"disable")
    error = f"HTTP {status}"
    if 300 <= status < 400 and b"location" in header:
        location = _masked(header[b"location"][0].decode("latin-1")[: 200 + _KEPT_RESPONSE])
        location = _one_line(_redacted(location, hidden), 200)
        error += f": redirects are not followed (Location: {location})"
    reason = "gone" if status == 410 else "aborted" if order == b"abort-message" else "status"
    hint = None
    if status in (429, 503):
        hint = _retry_after([v.decode("latin-1") for v in header.get(b"retry-after", [])], now)
    return _Outcome(
        status, reason, error, response, hint, disable=status == 410 or order == b"disable"
    )


@functools.lru_cache(maxsize=64)
def _read_whole(data: bytes) -> _Answer | None:
    """Return the answer that bytes are, when they are exactly one, after which the connection may
    carry another request; None otherwise: then they are to be fed to an answer of their own.

    A receiver answers its events with the same bytes, for a second at least (the Date header), so
    most answers were read before, and to find them here costs a thirtieth of reading them. What
    is returned is shared by all who ask: nobody may change it. A 408 is left out, since it may be
    about the connection and not about the request (see _Exchanges._receive).
    """
    answer = _Answer()
    if not answer.feed(data) or answer.status in (None, 408) or not answer.reusable:
        return None
    if answer.status in _SUCCESS and len(answer.body) < _LEAST_HIDDEN:
        answer.outcome = _judge(answer, (), 0.0)
    return answer


def _failure(error: BaseException, hidden: Iterable[str] = ()) -> _Outcome:
    """Return the outcome of an attempt that ended with an exception."""
    reason, text = _explain(error)
    return _Outcome(reason=reason, error=_redacted(text, hidden))


def _result(
    end: _Answer | BaseException, hidden: Iterable[str], clock: Callable[[], float]
) -> _Outcome:
    """Return the outcome of an exchange that ended with an answer, or with an error."""
    if isinstance(end, _Answer):
        return end.outcome or _judge(end, hidden, clock())
    return _failure(end, hidden)


# ── catalogue ─────────────────────────────────────────────────────────────────────────────────────
# Promises: says which event types there are, where the host named them, and prints them. Values in,
# values out. Data is never validated: an example is what a receiver may expect, not a schema. Plain
# SQL does not know the catalogue.


def _covers(pattern: str, type: str) -> bool:
    """Say whether a pattern matches a type of the catalogue. For events that are emitted, the GLOB
    in the schema decides, by the same rule."""
    if pattern == "*":
        return not type.startswith("webhook.")
    return type == pattern or (pattern.endswith(".*") and type.startswith(pattern[:-1]))


def _checked_event_type(name: Any, given: Any) -> EventType:
    """Return one entry of the catalogue; raise PayloadError where it is none, or could never be
    emitted: a type of the outbox's own, an example that is no JSON."""
    if not isinstance(name, str) or len(name) > 256 or not _TYPE.fullmatch(name):
        raise PayloadError(
            f"event_types: {_one_line(str(name), 60)!r} is no type; write order.created"
        )
    if name.startswith("webhook."):
        raise PayloadError(f"event_types: {name} is the outbox's own; leave it out")
    if not isinstance(given, EventType):
        raise PayloadError(f"event_types: {name} must be described by an EventType")
    if not isinstance(given.description, str) or not isinstance(given.group, str):
        raise PayloadError(f"event_types: description and group of {name} must be text")
    try:
        _dumps(given.example)
    except (TypeError, ValueError, RecursionError):
        raise PayloadError(f"event_types: the example of {name} is not plain JSON") from None
    return given


class _Catalogue:
    """The event types that the host named. Where it named none, every type and pattern is good.

    types is None then, and no empty mapping: that would refuse every type.
    """

    __slots__ = ("internal", "types")

    def __init__(self, given: Any) -> None:
        """Take what Outbox(event_types=) got: None, names, or a mapping of names to EventType.
        Raises PayloadError."""
        self.types: dict[str, EventType] | None = None
        self.internal: frozenset[str] = frozenset()  # types that are not for customers
        if given is None:
            return
        if not isinstance(given, Mapping):
            if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
                raise PayloadError("event_types must be names, or a mapping of names to EventType")
            given = [(name, EventType()) for name in given]
        items = given.items() if isinstance(given, Mapping) else given
        self.types = {name: _checked_event_type(name, of) for name, of in items}
        if not self.types:
            raise PayloadError("event_types names no type; leave it out to allow every type")
        self.internal = frozenset(name for name, of in self.types.items() if of.internal)

    def public(self) -> _Catalogue:
        """Return the catalogue as customers see it: without internal types."""
        seen = _Catalogue(None)
        if self.types is not None:
            seen.types = {name: of for name, of in self.types.items() if not of.internal}
        return seen

    def is_operators(self, pattern: str) -> bool:
        """Say whether only the operator may give an endpoint of a customer's this pattern: it
        matches internal types alone, or the outbox's own."""
        matched = {type for type in self.types or () if _covers(pattern, type)}
        return pattern.startswith("webhook.") or bool(matched) and matched <= self.internal

    def check(self, type: str) -> None:
        """Raise PayloadError for a type that is not in the catalogue, and name the nearest. The
        outbox's own types (webhook.*) need not be in it."""
        if self.types is None or type in self.types or type.startswith("webhook."):
            return
        import difflib  # only for people who mistyped

        near = difflib.get_close_matches(type, self.types, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "`types` lists those there are"
        raise PayloadError(
            f"there is no event type {_one_line(type, 256)} in the catalogue; {hint}"
        )

    def check_patterns(self, patterns: Iterable[str]) -> None:
        """Raise PayloadError for a pattern that matches no type there is: nothing would ever
        come."""
        for pattern in patterns:
            if self.types is None or pattern.startswith("webhook."):
                continue
            if not pattern.endswith("*"):
                self.check(pattern)
            elif not any(_covers(pattern, type) for type in self.types):
                raise PayloadError(
                    f"the pattern {pattern} matches no event type of the catalogue; "
                    "`types` lists those there are"
                )

    def example(self, type: Any) -> Any:
        """Return the example of a type, for ping(type=); raise PayloadError where there is none."""
        if self.types is None:
            raise PayloadError("there are no examples to send: the outbox has no event_types")
        self.check(str(type))
        if type not in self.types:
            raise PayloadError(f"there is no example of {_one_line(str(type), 256)}")
        return self.types[type].example


# The three headers of Standard Webhooks (Webhook headers), as the document explains them.
_OPENAPI_HEADERS = {
    "webhook-id": "The event's id, the same at each attempt: what was seen before is a duplicate.",
    "webhook-timestamp": "When this attempt was signed, in seconds since 1970.",
    "webhook-signature": "v1, and the base64 HMAC-SHA256 of `id.timestamp.body`; several while "
    "a secret is rotated, with spaces between them.",
}


def _openapi_of(name: str, of: EventType) -> dict[str, Any]:
    """Return what OpenAPI 3.1 calls a Path Item Object: the request that a receiver of this type
    gets. It describes the body `standard` only."""
    envelope = {
        "type": "object",
        "required": ["type", "timestamp", "data"],
        "properties": {
            "type": {"const": name},
            "timestamp": {"type": "string", "format": "date-time"},
            "data": {"examples": [of.example]},
        },
    }
    example = {"type": name, "timestamp": _iso(1_767_225_600.0), "data": of.example}
    request = {
        "operationId": name,
        "summary": name,
        "description": of.description,
        **({"tags": [of.group]} if of.group else {}),
        **({"deprecated": True} if of.deprecated else {}),
        "parameters": [
            {"$ref": f"#/components/parameters/{header}"} for header in _OPENAPI_HEADERS
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": envelope, "example": example}},
        },
        "responses": {
            "2XX": {"description": "It was taken. Any other answer: the event comes again."},
            "410": {"description": "This endpoint is gone: it is disabled."},
        },
    }
    return {"post": request}


def _openapi(catalogue: _Catalogue, title: str) -> dict[str, Any]:
    """Return the types that customers may have as an OpenAPI 3.1 document with `webhooks`. Without
    a catalogue there are none in it."""
    types = sorted((catalogue.public().types or {}).items())
    parameters = {
        name: {
            "name": name,
            "in": "header",
            "required": True,
            "description": text,
            "schema": {"type": "string"},
        }
        for name, text in _OPENAPI_HEADERS.items()
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": title or "Webhooks", "version": "1"},
        "webhooks": {name: _openapi_of(name, of) for name, of in types},
        "components": {"parameters": parameters},
    }


# ── endpoint options ──────────────────────────────────────────────────────────────────────────────
# Promises: one row of _OPTIONS for each option of an endpoint. It is a field of Endpoint, a column,
# a keyword of add_endpoint and an argument of the command line of the same name. Knows nothing of
# files and connections.
#
# A function _checked_x takes what somebody gave for x and returns it as it is stored, or raises
# PayloadError, whose text says what is allowed. A function _loaded_x goes back from what is stored
# to the field of Endpoint, and raises ValueError where plain SQL stored something else. Checks see
# the value alone: whether an endpoint of that id exists, say, is decided where the row is written.

_MOST_PATTERNS = 100  # of an endpoint; the schema says so too
# Everything; or a type; or a group, which is a type followed by '.*'.
_PATTERN = re.compile(r"\*|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(\.\*)?")
_TENANT = re.compile("[A-Za-z0-9_-]{1,64}")  # also an endpoint's id


def _number(name: str, value: Any, least: float, most: float) -> float:
    """Return a number within bounds as a float; True and False are no numbers, NaN is in none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise PayloadError(f"{name} must be a number from {least:g} to {most:g}")
    return float(value)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    """Return a whole number within bounds as an int; 5.0 counts as 5, 5.5 is refused."""
    if _number(name, value, least, most) != int(value):
        raise PayloadError(f"{name} must be a whole number")
    return int(value)


def _line(name: str, value: Any, most: int, least: int = 0) -> str:
    """Return text that is one printable line of `least` to `most` characters.

    Such texts are shown in logs, listings and pages, where a line break or a control character of
    somebody else's could look like a line of ours. Lone surrogates are refused too, since they
    cannot be stored as UTF-8.
    """
    if (
        not isinstance(value, str)
        or not least <= len(value) <= most
        or not all(c.isprintable() for c in value)
    ):
        raise PayloadError(
            f"{name} must be one line of printable text, {least} to {most} characters"
        )
    return value


def _choice(name: str, value: Any, choices: Sequence[Any]) -> str:
    """Return the text of a value that is one of some choices."""
    if value not in choices:
        raise PayloadError(f"{name} must be one of {', '.join(map(str, choices))}")
    return str(value)


def _checked_tenant(tenant: Any, or_all: bool = False) -> str | None:
    """Return a tenant, the host's own id of a customer; None is what belongs to the host itself.
    or_all: it may be '*', as an endpoint's may; an event has at most one tenant."""
    if tenant is None or (or_all and tenant == "*"):
        return tenant  # type: ignore[no-any-return]
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise PayloadError(
            "tenant must be 1 to 64 letters, digits, _ and -; "
            "leave it out for what is the app's own"
        )
    return tenant


def _checked_id(id: Any) -> str:
    """Return the id of an endpoint; the check of its column says the same in SQL."""
    if not isinstance(id, str) or not _TENANT.fullmatch(id):
        raise PayloadError("id must be 1 to 64 letters, digits, _ and -")
    return id


def _checked_patterns(events: Any) -> list[str]:
    """Return the patterns of an endpoint as a list, each of them once; one text is one pattern.

    Refused: no pattern at all, one that is no type, group or '*', and more than the schema takes.
    Patterns that a wider one of the same list covers are kept here, so that the endpoint shows what
    was asked for; the trigger that fills webhook_patterns leaves them out.
    """
    patterns = [events] if isinstance(events, str) else events
    patterns = list(patterns) if isinstance(patterns, Iterable) else []
    if not patterns:
        raise PayloadError("events must hold at least one pattern; '*' means all")
    for pattern in patterns:
        if not isinstance(pattern, str) or len(pattern) > 256 or not _PATTERN.fullmatch(pattern):
            raise PayloadError(
                "each of events must be a type (order.created), a group (order.*) or *"
            )
    if len(found := list(dict.fromkeys(patterns))) > _MOST_PATTERNS:
        raise PayloadError(
            f"events may hold {_MOST_PATTERNS} patterns; a group (order.*) holds many types"
        )
    return found


# An emit decides each filter of the patterns that match its type, in the host's transaction: these
# bound what one of them can cost. Bytes are those of the filter as JSON.
_FILTER_PATHS, _FILTER_VALUES, _FILTER_BYTES = 20, 100, 8_192
_EXACT = 1 << 53  # beyond it SQLite, Python and receivers differ on which numbers are equal


def _is_comparable(value: Any) -> bool:
    """Say whether a value of a filter compares alike in Python and in SQL.

    Text with a NUL does not (SQLite before 3.45 ends it there), nor do NaN, infinity and numbers
    beyond 2^53, and lists and objects are not compared at all. True and False are ints here.
    """
    if isinstance(value, str):
        return "\0" not in value
    if isinstance(value, (int, float)):
        return -_EXACT <= value <= _EXACT
    return value is None


def _checked_filter(filter: Any) -> str | None:
    """Return a filter as it is stored, as JSON text; None where it asks for nothing.

    It maps a path in the data, "shop.region", to the values one of which must stand there; a single
    value is stored as a list of one. Names in a path hold no quote and no backslash: the path is
    put together from them in SQL (_met), where such a character would change its meaning.
    """
    if filter is None or filter == {}:
        return None
    if not isinstance(filter, Mapping) or len(filter) > _FILTER_PATHS:
        raise PayloadError(
            f"filter must be a mapping of at most {_FILTER_PATHS} paths to values: "
            '{"status": ["paid"], "shop.region": ["eu"]}'
        )
    checked = {}
    for path, given in filter.items():
        values = list(given) if isinstance(given, (list, tuple, set, frozenset)) else [given]
        good = isinstance(path, str) and path.isprintable() and not re.search(r'["\\]', path)
        if not good or not all(path.split(".")):
            raise PayloadError(
                "filter: a path is names joined by dots, without quotes and backslashes: "
                '"shop.region"'
            )
        if not 1 <= len(values) <= _FILTER_VALUES or not all(map(_is_comparable, values)):
            raise PayloadError(
                f"filter: {_one_line(path, 50)} needs 1 to {_FILTER_VALUES} values: "
                "text without NUL, numbers up to 2^53, true, false or null"
            )
        checked[path] = values
    text = _dumps(checked)
    with contextlib.suppress(UnicodeEncodeError):  # a lone surrogate: refused below
        if len(text.encode()) <= _FILTER_BYTES:
            return text
    raise PayloadError(f"filter must be Unicode text of at most {_FILTER_BYTES} bytes as JSON")


def _values_at(data: Any, path: str) -> list[Any]:
    """Return the values that data has at a path: one, those of an array, or none.

    A dot in the path always separates names, so a name that itself holds a dot cannot be reached,
    and an array counts as its elements only at the end of the path, not on the way there.
    """
    for name in path.split("."):
        if not isinstance(data, dict) or name not in data:
            return []
        data = data[name]
    return data if isinstance(data, list) else [data]


def _is_same(one: Any, other: Any) -> bool:
    """Compare as JSON does: 5 and 5.0 are equal, true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _lets_through(filter: str, data: str) -> bool:
    """Say whether a filter lets an event's data through: at all of its paths, one of the values.

    emit asks it for the endpoints that have a filter, because the trigger of the library's own way
    in uses no JSON function. It is the rule that _met says in SQL; of two members of an object that
    have one name the first counts, since SQLite finds that one and Python would keep the last. A
    filter that plain SQL damaged lets nothing through, and never makes an emit fail.
    """
    try:
        wanted = json.loads(filter)
        value = json.loads(data, object_pairs_hook=lambda pairs: dict(reversed(pairs)))
        return all(
            any(_is_same(one, v) for one in _values_at(value, path) for v in values)
            for path, values in wanted.items()
        )
    except (ValueError, AttributeError, TypeError, RecursionError):
        return False


def _json_argument(text: str) -> Any:
    """Return what an argument of the command line says as JSON.

    argparse is imported where the command line needs it, so that an app that imports the module
    does not load it.
    """
    import argparse

    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError("it is not JSON") from None


def _checked_secret(secret: Any) -> str:
    """Return a secret as it is stored: whsec_ and base64, or the env:NAME or file:PATH where it
    will be read when a delivery is signed. None makes a new one, of 32 bytes.

    It is strict because a typo would show only later, as signatures that the receiver refuses:
    whsec_ needs base64 without a fault, of 24 to 64 bytes, as the Standard Webhooks text asks.
    Whether the variable or the file exists is not asked: this process may be one that only emits.
    """
    if secret is None:
        return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode("ascii")
    if not isinstance(secret, str):
        raise PayloadError("secret must be text: whsec_ and base64, env:NAME or file:PATH")
    if re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*", secret) or re.fullmatch(
        r"file:[^\x00-\x1f]+", secret
    ):
        return secret
    if not secret.startswith("whsec_"):
        raise PayloadError(
            "secret must start with whsec_, env: or file:; leave it out to get a good one"
        )
    _secret_bytes(secret, 24, 64)
    return secret


def _checked_files(name: str, value: Any, most: int = 2) -> list[str]:
    """Return one path, or up to `most`, as a list; each must be a file now.

    What the files hold is not read here. They are read when a connection is opened, and again when
    they changed: an attempt for which one is missing or damaged fails then.
    """
    paths = (
        [value]
        if isinstance(value, str)
        else list(value)
        if isinstance(value, (list, tuple))
        else []
    )
    if not 1 <= len(paths) <= most or not all(isinstance(path, str) for path in paths):
        raise PayloadError(f"{name} must be a path, or a pair of paths (certificate, key)")
    for path in paths:
        if not os.path.isfile(path):
            raise PayloadError(f"{name}: there is no file {path}")
    return paths


class _Known(NamedTuple):
    """What the constructor was given that options are checked against."""

    guard: _Guard  # which URLs are allowed
    bodies: tuple[str, ...]  # values of `body`: those built in, and the host's transforms by name
    catalogue: _Catalogue  # which event types patterns may name
    senders: Mapping[str, _Sender]  # by the names that may follow call: in a URL


def _checked_url(url: Any, known: _Known) -> str:
    """Return a URL that may be sent to, or the call:NAME of a sender that is known here.

    A URL is stored as it was given. The guard looks at the host that it names, and raises UnsafeURL
    for a good message at once; what counts is its look at the address of each connection.
    """
    if isinstance(url, str) and _is_called(url):
        if _sender(url, known.senders) is None:
            there = f"there are {', '.join(known.senders)}" if known.senders else "there is none"
            raise PayloadError(
                f"no sender has the name in {_line('url', url, 200)}: {there}; name it in "
                "Outbox(senders={...}), and on the command line use --app"
            )
        return url
    _prepare_url(url, known.guard)
    return str(url)


def _checked_events(events: Any, known: _Known) -> str:
    """Return patterns as JSON text; with a catalogue, each must match one of its types."""
    patterns = _checked_patterns(events)
    known.catalogue.check_patterns(patterns)
    return _dumps(patterns)


# Options of the constructor, checked in the same way; no endpoint has them.


def _checked_retention(seconds: Any) -> float | None:
    """Return the seconds after which failed rows are deleted; None: never."""
    return None if seconds is None else _number("failed_retention", seconds, 0, 1e11)


def _checked_proxy(proxy: Any) -> str | None:
    """Return the URL of the proxy that all connections go through; None: there is none."""
    if proxy is not None and not (
        isinstance(proxy, str) and re.fullmatch(r"http://[^/\s]+/?", proxy)
    ):
        raise PayloadError("proxy must be http://host:port")
    return proxy


def _checked_app_name(name: Any) -> str:
    """Return the host's name: in the User-Agent of every request, and the source of CloudEvents."""
    if not _line("app_name", name, 100).isascii():
        raise PayloadError("app_name goes into a header: write it in ASCII letters")
    return str(name)


def _checked_home(home: Any) -> str | None:
    """Return the name of this place: what was given, else the variable, else none.

    A file remembers the name of the first place that drained it, and is drained in no other: see
    _refusal. An empty variable counts as none.
    """
    if home is None and (home := os.environ.get("WEBHOOK_OUTBOX_HOME") or None) is None:
        return None
    return _line("home", home, 100, 1)


def _checked_retry(policy: Any) -> RetryPolicy:
    """Return the policy; None: the standard one."""
    if policy is None:
        return RetryPolicy()
    if not isinstance(policy, RetryPolicy):
        raise PayloadError("retry must be a RetryPolicy, such as RetryPolicy((0, 5, 300))")
    return policy


def _checked_function(what: str, call: Any, takes: str) -> Any:
    """Return a function of the host's. takes: the names of its arguments. One that is async is
    refused: to call it only makes a coroutine, which nobody awaits, and what it raises is never
    seen."""
    if not callable(call):
        raise PayloadError(f"{what} must be a function f({takes})")
    if any(map(inspect.iscoroutinefunction, (call, type(call).__call__))):
        name = what.rpartition(" ")[2]
        raise PayloadError(
            f"{what} is async; give a function that runs it: "
            f"lambda {takes}: asyncio.run({name}({takes}))"
        )
    return call


# Options that are one function each: the names of its arguments, and whether None may be given.
_FUNCTIONS = {
    "json_default": ("value", True),
    "observer": ("notice", True),
    "clock": ("", False),
    "rng": ("", False),
    "resolver": ("host, port", True),
}


def _function(option: str, call: Any) -> Any:
    """Return what was given for one of these options."""
    takes, or_none = _FUNCTIONS[option]
    return None if call is None and or_none else _checked_function(option, call, takes)


def _checked_functions(option: str, given: Any) -> dict[str, Callable[[Event], Any]]:
    """Return functions by name, transforms or senders, as a dict; None: there are none."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise PayloadError(f"{option} must map names to functions f(event)")
    kind = option.removesuffix("s")
    for name, call in given.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
            raise PayloadError(f"the name of a {kind} must be 1 to 64 letters, digits, _, . and -")
        if kind == "transform" and name in _BODIES:
            raise PayloadError(f"{name} is a body of its own; give the transform another name")
        _checked_function(f"the {kind} {name}", call, "event")
    return dict(given)


def _checked_signing(signing: Any) -> str:
    """Return the schemes to sign with, joined by +, each of them once, in the order given."""
    return "+".join(
        dict.fromkeys(_choice("signing", part, list(_SCHEMES)) for part in str(signing).split("+"))
    )


def _checked_switch(name: str, value: Any) -> int:
    """Return True or False as SQLite stores it: 1 or 0."""
    _choice(name, value, (True, False))
    return int(value)


def _loaded_text(value: Any) -> str:
    """Return a column that is a text; ValueError for a blob, which only a host that switches CHECKs
    off can have written."""
    if not isinstance(value, str):
        raise ValueError("it is no text")
    return value


def _loaded_texts(text: str) -> tuple[str, ...]:
    """Return the texts of a JSON list; ValueError where plain SQL wrote something else."""
    found = json.loads(text)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ValueError("not a list of texts")
    return tuple(found)


# Thousands of customers subscribe to the same few patterns, so a listing of them all parses each
# text once and shares the tuple.
_loaded_patterns = functools.lru_cache(maxsize=1_024)(_loaded_texts)


def _loaded_headers(text: str) -> dict[str, str]:
    """Return an endpoint's headers. They are checked again, because plain SQL can store any: a
    line break in one would add a header of its own to each request."""
    return {} if text == "{}" else _checked_headers(json.loads(text))


def _loaded_cert(text: str) -> str | tuple[str, str]:
    """Return the path of a file that holds certificate and key, or the pair of their paths."""
    paths = _loaded_texts(text)
    if not 1 <= len(paths) <= 2:
        raise ValueError("not one path, or two")
    return paths[0] if len(paths) == 1 else (paths[0], paths[1])


def _optional(check: Callable[[Any, _Known], Any]) -> Callable[[Any, _Known], Any]:
    """Return a check that lets None through, which means: none, or what the outbox has."""
    return lambda value, known: None if value is None else check(value, known)


class _Option(NamedTuple):
    """One option of an endpoint."""

    # A value -> what is stored; raises PayloadError or UnsafeURL.
    check: Callable[[Any, _Known], Any]
    argument: dict[str, Any]  # of the command line, as argparse takes it
    # What is stored, unless NULL -> the field of Endpoint; None: the same.
    load: Callable[[Any], Any] | None = None
    fixed: bool = False  # add_endpoint takes it, update_endpoint does not


# All options. A new one is a row here, a column of webhook_endpoints (with its default), a field of
# Endpoint and a key of EndpointOptions, which explains it, all of the same name; reading, writing
# and the command line follow from the row. The column comes with a new entry of _SCHEMA. Where the
# drain heeds the option, that entry makes webhook_endpoints_update anew, with the column; else a
# drain that runs does not see that it changed. Where an option is not given nothing is stored, so
# its default is the column's. The action "switch" is --name and --no-name; the command line's
# parser defines it.
_OPTIONS: dict[str, _Option] = {
    "url": _Option(
        _checked_url, dict(metavar="URL", help="where events go from now on"), _loaded_text
    ),
    "events": _Option(
        _checked_events,
        dict(nargs="+", metavar="PATTERN", help="order.created, 'order.*' or '*'"),
        _loaded_patterns,
    ),
    "tenant": _Option(
        lambda v, known: _checked_tenant(v, or_all=True),
        dict(metavar="ID", help="the tenant whose events it gets; '*' for those of all"),
        fixed=True,
    ),
    "filter": _Option(
        lambda v, known: _checked_filter(v),
        dict(
            type=_json_argument,
            metavar="JSON",
            help="""only events with such data: '{"status": ["paid"]}'; {} for all""",
        ),
        json.loads,
    ),
    "enabled": _Option(
        lambda v, known: _checked_switch("enabled", v),
        dict(
            action="switch", help="a disabled one gets no new deliveries; backfill adds them later"
        ),
        bool,
    ),
    "description": _Option(
        lambda v, known: _line("description", v, 1000), dict(metavar="TEXT", help="for people")
    ),
    "headers": _Option(
        lambda v, known: _dumps(_checked_headers(v)),
        dict(
            nargs="+",
            action="extend",
            metavar="'NAME: VALUE'",
            help="sent with each attempt; a value may be env:NAME",
        ),
        _loaded_headers,
    ),
    "body": _Option(
        lambda v, known: _choice("body", v, known.bodies),
        dict(help="standard, data, cloudevents, slack, discord, or a transform of --app"),
    ),
    "signing": _Option(
        lambda v, known: _checked_signing(v),
        dict(help=f"{', '.join(_SCHEMES)}, joined by + to send several"),
    ),
    "rate": _Option(
        _optional(lambda v, known: _number("rate", v, 1e-6, 1e6)),
        dict(type=float, metavar="N", help="deliveries per second at the most"),
    ),
    "max_in_flight": _Option(
        lambda v, known: _whole("max_in_flight", v, 1, 10_000),
        dict(type=int, metavar="N", help="attempts under way at the most (16)"),
    ),
    "ordered": _Option(
        lambda v, known: _checked_switch("ordered", v),
        dict(action="switch", help="one delivery after the other"),
        bool,
    ),
    "on_dead": _Option(
        lambda v, known: _choice("on_dead", v, ("skip", "hold")),
        dict(choices=("skip", "hold"), help="after a failed row its queue goes on, or waits"),
    ),
    "timeout": _Option(
        _optional(lambda v, known: _number("timeout", v, 0.01, 3600)),
        dict(type=float, metavar="S", help="seconds an attempt may last (15)"),
    ),
    "cert": _Option(
        _optional(lambda v, known: _dumps(_checked_files("cert", v))),
        dict(nargs="+", metavar="PATH", help="client certificate, and its key"),
        _loaded_cert,
    ),
    "ca": _Option(
        _optional(lambda v, known: _checked_files("ca", v, 1)[0]),
        dict(metavar="PATH", help="certificates of a private authority"),
    ),
}
# The other columns that Endpoint shows, which nobody gives as options.
_STATE_FIELDS = ("disabled_reason", "failing_since", "failures", "paused_until", "created_at")
# Each is a column and a field of Endpoint; a row is read in this order.
_ENDPOINT_FIELDS = ("id", *_OPTIONS, *_STATE_FIELDS)
_ENDPOINT_COLUMNS = ", ".join(f"+{name}" for name in _ENDPOINT_FIELDS)  # plus: see _cursor
_LOADS = [(name, option.load) for name, option in _OPTIONS.items() if option.load is not None]


def _checked_options(options: Mapping[str, Any], known: _Known, update: bool) -> dict[str, Any]:
    """Return the column values of options; refuse one that does not exist, and in an update one
    that is fixed for life.

    Nothing is written before all of them are checked, so an error leaves the endpoint as it is.
    """
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        hint = "; use rotate_secret" if unknown == ["secret"] else ""
        raise PayloadError(
            f"endpoints have no option {', '.join(unknown)}{hint}; there are {', '.join(_OPTIONS)}"
        )
    for name in options:
        if update and _OPTIONS[name].fixed:
            raise PayloadError(f"the {name} of an endpoint is fixed for life: add another endpoint")
    return {name: _OPTIONS[name].check(value, known) for name, value in options.items()}


# What stands in a field that could not be read, where None would not fit its type.
_EMPTY: dict[str, Any] = {"url": "", "events": (), "headers": {}}


def _endpoint(row: Sequence[Any], lenient: bool = False) -> Endpoint:
    """Return the Endpoint of a row of _ENDPOINT_COLUMNS; ValueError where plain SQL damaged it.

    lenient: for listings and pages, where one damaged row must not hide the others. A field that
    cannot be read is then empty. The drain is never lenient: without a header, say, it would send
    something else than what was asked for, so each attempt fails and says why.
    """
    values = dict(zip(_ENDPOINT_FIELDS, row, strict=True))
    for name, load in _LOADS:
        if values[name] is not None:
            try:
                values[name] = load(values[name])
            except (ValueError, RecursionError):
                if not lenient:
                    raise ValueError(f"{name} is damaged") from None
                values[name] = _EMPTY.get(name)
    return Endpoint(**values)


# ── storage ───────────────────────────────────────────────────────────────────────────────────────
# Promises: our own connections are autocommit, and all but the drain's are short-lived. The drain
# writes in single statements; verbs write in transactions that take the write lock first. On the
# host's connection only our own statements run: no pragma that sets anything, no commit, and no
# rollback but of a transaction that the driver began for our statement alone. Never opens the
# database, -wal or -shm as plain files: closing such a descriptor drops SQLite's locks.


class _Process:
    """What there is once in a process, and the story of its forks. A reload keeps the object.

    SQLite remembers in the process which locks it holds, and a forked child inherits the memory
    without the locks: if the child closed such a connection, it would delete a journal that is in
    use. The lock of a drain is inherited as well, and would outlive the parent in the child. So:

    1. Before a fork, its thread takes `forking`: no drain is in the middle of opening a file then.
    2. Before it, each drain closes its connection (park): the child inherits none of the memory.
    3. In the parent, each drain opens the file again (unpark), and `forking` is given back.
    4. In the child, a connection that was open all the same (of a transaction, say) stays
       referenced for ever and unused; copies of lock files are closed, so that only the parent's
       are left.
    5. In the child, no drain runs; its outboxes may start their own.

    A child that was forked in C, as uWSGI forks its workers, has run no hook: it does steps 4 and 5
    when it first opens the file or starts a drain (settle). Until then it keeps the parent's lock,
    and if the parent dies nobody takes over.

    Any thread may open and close connections, and so change the sets below; each change is one
    step of the interpreter. `forking` is for what takes several steps: a thread that forks holds it
    from step 1 to step 3, a drain while it opens its file for the first time and while it opens its
    lock file, and either waits for the other. A drain that wants its lock waits for a moment only:
    see _Lock.acquire.
    """

    def __init__(self) -> None:
        self.pid = 0  # of the process that the rest is about; 0: nothing was opened, no hook is set
        self.forking = threading.RLock()  # held by a thread that forks, and by one that opens
        # Connections of ours that are open, by id: the reference keeps the id from being reused.
        self.pinned: dict[int, sqlite3.Connection] = {}
        self.descriptors: set[int] = set()  # open lock files, of which a child closes its copies
        self.drains: set[_DrainFile] = set()  # that drains have open
        # All that were made here and are still in use: a child has them forget their drains.
        self.outboxes: weakref.WeakSet[Outbox] = weakref.WeakSet()
        self.sqlite_only: set[str] = set()  # files that no other SQLite library opens here: _alone

    def pin(self, db: sqlite3.Connection) -> None:
        """Note a connection that was just opened."""
        self.settle()
        self.pinned[id(db)] = db

    def unpin(self, db: sqlite3.Connection) -> bool:
        """Forget a connection; say whether it is this process that has to close it."""
        return self.ours(db) and self.pinned.pop(id(db), None) is not None

    def ours(self, db: sqlite3.Connection) -> bool:
        """Say whether this process opened the connection, and not one that forked it."""
        return id(db) in self.pinned and self.pid == os.getpid()

    def settle(self) -> None:
        """Set the hooks at the first use; in a child that ran none of them, do what they would have
        done. Not at import: hooks cannot be taken back, and an import does nothing."""
        before, self.pid = self.pid, os.getpid()
        if not before and hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._before, after_in_parent=self._in_parent)
            os.register_at_fork(after_in_child=self._in_child)
        elif before not in (0, self.pid):
            self._in_child()

    def _before(self) -> None:
        """Steps 1 and 2, in the thread that forks: it waits until each drain has closed its file,
        for each of them five seconds at most."""
        self.forking.acquire()
        for drain in list(self.drains):
            drain.park()

    def _in_parent(self) -> None:
        """Step 3, in the thread that forked. A drain whose file cannot be opened again, because it
        is gone, say, fails at its next read; that keeps neither the other drains closed nor
        `forking` locked."""
        try:
            for drain in list(self.drains):
                try:
                    drain.unpark()
                except Exception as error:
                    _log.error("%s cannot be opened again after a fork (%s)", drain.path, error)
        finally:
            with contextlib.suppress(RuntimeError):  # a server in C may run this hook alone
                self.forking.release()

    def _in_child(self) -> None:
        """Steps 4 and 5: right after the fork, or when settle() finds out."""
        import ctypes

        self.pid = os.getpid()
        self.forking = threading.RLock()  # the old one may belong to a thread that is not here
        for db in self.pinned.values():  # never given back: the interpreter's end would close it
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        for kept in (self.pinned, self.descriptors, self.drains):
            kept.clear()
        for outbox in list(self.outboxes):
            outbox._forget_drains()


# importlib.reload runs the module again in the namespace that it had. The object of the first time
# stays: its hooks are set, and it knows which connections are open.
_PROCESS: _Process = globals().get("_PROCESS") or _Process()


# SQLite libraries that Python can load, as modules that have a Connection. The standard library's
# own, _sqlite3, is among them: where pysqlite3 was put in its place (sys.modules["sqlite3"]), we
# use that, and _sqlite3 is the other one.
_LIBRARIES = (
    *("_sqlite3", "apsw", "cysqlite", "libsql", "libsql_experimental", "pysqlcipher3.dbapi2"),
    *("pysqlite3.dbapi2", "sqlcipher3.dbapi2", "sqlean.dbapi2", "turso"),
)


def _other_library() -> str | None:
    """Name a SQLite library that is loaded in this process beside the one that we use; else None.

    A module whose Connection is ours, or a base class of ours, is no other library.
    """
    for name in _LIBRARIES:
        module = sys.modules.get(name)
        if module is not None:
            theirs = getattr(module, "Connection", None)
            if not isinstance(theirs, type) or not issubclass(sqlite3.Connection, theirs):
                return name.partition(".")[0]
    return None


def _alone(path: str) -> bool:
    """Say whether we may open and close a file in this process.

    SQLite's locks are POSIX locks, and those belong to the process: when one SQLite library closes
    a file, or unlocks it, the locks that another one has on it there are gone too, in the middle of
    a transaction, and the file is damaged within seconds (sqlite.org/howtocorrupt.html, 2.2.1).
    What a library will open is not known before it does, so its presence is enough, unless the host
    said `sqlite_only=True`.
    """
    return path in _PROCESS.sqlite_only or _other_library() is None


def _check_alone(path: str) -> None:
    """Raise OutboxError, with what to do instead, where a connection of ours would be a danger."""
    if not _alone(path):
        raise OutboxError(
            f"{_other_library()} is loaded in this process, and two SQLite libraries in one "
            f"process damage a file that both open: drain and look in another process "
            f"(`python -m webhook_outbox --db {path} drain`), pass conn= here, or, if nothing but "
            "sqlite3 opens this file here, say Outbox(..., sqlite_only=True)"
        )


# The text_factory of our own connections: how the bytes of a column of type text become a str.
# Plain SQL can store any bytes there, and one such row must not stop every reader. What is no UTF-8
# becomes lone surrogates, which cannot be encoded, so that the attempt fails and not the drain.
_lenient_text = operator.methodcaller("decode", "utf-8", "surrogateescape")


# Said where an emit failed for that reason, and by the doctor.
_NO_TEMPORARY_FOLDER = (
    "SQLite finds no folder for temporary files that can be written (of /var/tmp, /tmp and the "
    "current one): mount one, or name one in the variable SQLITE_TMPDIR, or say "
    "PRAGMA temp_store = MEMORY on your connection"
)


def _temporary_folder() -> str | None:
    """Return where SQLite puts temporary files, by its own order; None where it finds no folder: in
    a container whose root is read-only, say.

    A statement that fires triggers keeps a journal of the pages it touches, to be able to undo
    itself. Beyond 64 KiB that is a temporary file, so without a folder an emit to a few endpoints
    works while the tables are small and fails one day. The doctor tells of it before that.
    """
    chosen = os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR")
    if sys.platform == "win32":
        return "there is one"
    for folder in (*chosen, "/var/tmp", "/usr/tmp", "/tmp", "."):
        if folder and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


def _check_there(path: str) -> None:
    """Raise SchemaError where there is no file: to open it, SQLite would put an empty one there."""
    if not os.path.exists(path):
        raise SchemaError(
            f"{path} does not exist; `python -m webhook_outbox --db {path} init` makes it"
        )


def _open(path: str, patience: float = 5.0, create: bool = False) -> sqlite3.Connection:
    """Open a connection of our own, autocommit. patience: seconds that SQLite waits for a lock.

    The caller closes it with _close. The class is called, because tracing agents replace
    sqlite3.connect by a function that returns a proxy. Raises SchemaError where the file is not
    there or cannot be opened, OutboxError beside another SQLite library.
    """
    _check_alone(path)
    if not create:
        _check_there(path)
    try:
        db = sqlite3.Connection(
            path, timeout=patience, isolation_level=None, check_same_thread=False
        )
    except sqlite3.Error as error:
        hint = "is it a folder?" if os.path.isdir(path) else "does its folder exist?"
        raise SchemaError(f"{path} cannot be opened ({error}); {hint}") from None
    db.text_factory = _lenient_text
    _PROCESS.pin(db)
    if not _temporary_folder():  # or a statement of ours would fail there
        db.execute("PRAGMA temp_store = MEMORY")
    return db


def _close(db: sqlite3.Connection, path: str) -> None:
    """Close a connection of our own. It stays open to the end of the process where to close it
    would do harm: beside a SQLite library that was loaded since it was opened, whose locks on the
    file would be gone, and in a child of the process that opened it."""
    if _alone(path) and _PROCESS.unpin(db):
        db.close()


@contextlib.contextmanager
def _texts_can_be_stored() -> Iterator[None]:
    """Refuse a text that is not Unicode in one sentence: a file name or an argument in bytes that
    are no UTF-8 has half characters in it, which SQLite cannot take."""
    try:
        yield
    except UnicodeEncodeError as error:
        text = _one_line(ascii(error.object), 80)
        raise PayloadError(f"{text} is no text in UTF-8; write it anew") from None


@contextlib.contextmanager
def _session(path: str, create: bool = False) -> Iterator[sqlite3.Connection]:
    """Yield a connection of our own, for a few reads or single statements, and close it."""
    db = _open(path, create=create)
    try:
        yield db
    finally:
        _close(db, path)


@contextlib.contextmanager
def _transaction(path: str) -> Iterator[sqlite3.Connection]:
    """BEGIN IMMEDIATE on a connection of our own; commit, or roll back when the block raises.

    The write lock is taken at once, and waited for as long as _open says. A transaction that begins
    with a read can be refused at its first write, without waiting, if somebody wrote in between.
    A block that forks comes to its end twice: what the child does there must not touch the file.
    """
    with _session(path) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            if _PROCESS.ours(db):
                db.execute("COMMIT")
        except BaseException:
            if _PROCESS.ours(db) and db.in_transaction:
                db.execute("ROLLBACK")
            raise


def _is_busy(error: sqlite3.Error) -> bool:
    """Say whether an error means that somebody else has the file locked: try again in a moment.

    Codes 5 and 6 are SQLITE_BUSY and SQLITE_LOCKED; the higher bits only say which kind of it.
    """
    code = getattr(error, "sqlite_errorcode", None)  # since Python 3.11
    return code & 0xFF in (5, 6) if code is not None else "locked" in str(error)


@contextlib.contextmanager
def _plain_text(db: sqlite3.Connection) -> Iterator[None]:
    """Read text as str in the block, whatever text_factory the host set on its connection; after
    it the host's is set back."""
    factory = getattr(db, "text_factory", None)  # apsw's has none
    if factory is not None:
        db.text_factory = str
    try:
        yield
    finally:
        if factory is not None:
            db.text_factory = factory


# Our tables, views, indexes and triggers in a file; not the indexes that SQLite makes by itself,
# whose names begin with sqlite_.
_OUR_OBJECTS = "SELECT type, name, sql FROM sqlite_master WHERE name GLOB 'webhook_*'"


# SQLite's numbers of the limits that its page on security advises to lower, those of lengths aside.
_LIMITED = (3, 4, 5, 6, 8, 9)  # expression, compound, opcodes, arguments, pattern, variables
# What SQLite says when a statement is beyond one of them.
_BEYOND_LIMIT = re.compile("Expression tree is too large|too many|pattern too complex")


@contextlib.contextmanager
def _without_limits(db: Any) -> Iterator[None]:
    """Run statements of ours where the host lowered SQLite's limits on its connection; after the
    block they are as the host set them.

    Our triggers and views are written so that they fit within the limits which SQLite advises: the
    host's own statements on our tables have to be prepared without this. Statements of ours with
    queries in their expressions do not: the depth of an expression counts together with that of all
    that stand around its query. Where the driver has no way to set limits nothing is done.
    """
    set_limit = getattr(db, "setlimit", None) or getattr(db, "limit", None)  # the latter: apsw's
    if set_limit is None:  # sqlite3 has it since Python 3.11
        yield
        return
    # Beyond what SQLite was built for: it takes its own maximum then.
    before = [(limit, set_limit(limit, 1 << 30)) for limit in _LIMITED]
    try:
        yield
    finally:
        for limit, value in before:
            set_limit(limit, value)


def _meta(db: sqlite3.Connection, key: str) -> Any:
    """Return a value of webhook_meta; None where there is none."""
    row = (
        sqlite3.Cursor(db)
        .execute("SELECT value FROM webhook_meta WHERE key = ?", (key,))
        .fetchone()
    )
    return row and row[0]


def _check_version(version: int, path: str, make: bool = True) -> None:
    """Refuse the tables of a newer version, and, where we must not make any, of an older one.

    version: as webhook_meta has it, 0 where there are no tables. This copy of the module knows as
    many versions as _SCHEMA has entries. make: older tables are no error, the caller upgrades them.
    """
    if version > len(_SCHEMA):
        raise SchemaError(
            f"{path} was written by a newer webhook_outbox (schema {version}, this file knows "
            f"{len(_SCHEMA)}); update your copy of webhook_outbox.py"
        )
    if version < len(_SCHEMA) and not make:
        older = f"has tables of an older webhook_outbox (schema {version})"
        raise SchemaError(
            f"{path} {older if version else 'has no webhook tables'}; "
            f"`python -m webhook_outbox --db {path} init` makes them"
        )


def _version(db: sqlite3.Connection, path: str) -> int:
    """Return the schema version of a file, 0 when it has no tables of ours; raise SchemaError for
    what is not ours to touch.

    That is a file which is no database, and one of a newer version. That the file is locked or the
    disk fails is nothing about the file: such an OperationalError passes.
    """
    try:
        exists = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'webhook_meta'").fetchone()
        version = int(_meta(db, "schema_version") or 0) if exists else 0
    except sqlite3.OperationalError:
        raise
    except (sqlite3.DatabaseError, ValueError) as error:
        raise SchemaError(f"{path} cannot be read as a SQLite database ({error})") from None
    _check_version(version, path)
    return version


class _Plan(NamedTuple):
    """What the tables of the newest version look like, as SQLite itself tells."""

    objects: dict[tuple[str, str], str]  # type (table, view, ...) and name -> SQL, in their order
    meta: tuple[tuple[str, Any], ...]  # rows of webhook_meta


@functools.lru_cache(maxsize=2)
def _plan(schema: tuple[tuple[str, ...], ...]) -> _Plan:
    """Make the tables in memory, once in a process, and read off what came of it.

    No list of names says it, because later versions may change what earlier ones made. The schema
    is an argument so that another one (a test's) gets another plan.
    """
    with contextlib.closing(sqlite3.Connection(":memory:", isolation_level=None)) as db:
        for statement in itertools.chain.from_iterable(schema):
            db.execute(statement)
        objects = {(type, name): sql for type, name, sql in db.execute(_OUR_OBJECTS)}
        return _Plan(objects, tuple(db.execute("SELECT key, value FROM webhook_meta")))


def _lacking(db: sqlite3.Connection) -> list[tuple[str, str]]:
    """Return type and name of what is missing of our tables, views, indexes and triggers, in the
    order in which they have to be made."""
    there = set(db.execute("SELECT type, name FROM sqlite_master"))
    return [key for key in _plan(_SCHEMA).objects if key not in there]


def _repair(db: sqlite3.Connection) -> None:
    """Make again what is missing, in the caller's transaction. Other tools drop tables that they do
    not know (Alembic's autogenerate), and leave the views that stand on them.

    What triggers keep, such as webhook_patterns, is reckoned anew: each endpoint is switched off
    and on, or on and off, so that its triggers run and it ends as it was. Rows of a table that was
    dropped are lost. A file whose webhook_meta was lost has a new identity from now on, as after
    `adopt`.
    """
    plan = _plan(_SCHEMA)
    for key in _lacking(db):
        db.execute(plan.objects[key])
    for name, value in plan.meta:
        value = secrets.token_hex(8) if name == "outbox" else value
        db.execute("INSERT OR IGNORE INTO webhook_meta VALUES (?, ?)", (name, value))
    for _ in range(2):
        db.execute("UPDATE webhook_endpoints SET enabled = NOT enabled")


def _make_tables(db: sqlite3.Connection, path: str, version: int) -> None:
    """Bring the tables to the newest version, and repair what is missing then.

    version: what the file had when it was looked at, without a lock. Each version is a transaction
    of its own, so an upgrade that dies leaves the file at a version that is whole. Several
    processes may come here at once: each looks again under the write lock, and goes on where
    another was first. db, on which the caller looked, is used for reading only.
    """
    while version < len(_SCHEMA):
        with _transaction(path) as own:
            if _version(own, path) == version:
                # No version, and yet tables: webhook_meta was dropped, the others stayed.
                if version == 0 and own.execute(_OUR_OBJECTS).fetchone():
                    _repair(own)
                    return
                for statement in _SCHEMA[version]:
                    own.execute(statement)
        version += 1
    if _lacking(db):
        with _transaction(path) as own:
            _repair(own)


def _prepare_file(path: str, create: bool) -> str | None:
    """Make or check the tables of a file; return the outbox's identity.

    The identity is a random text in webhook_meta. emit compares it with that of the file which the
    host's connection is open on. It is None where another SQLite library is loaded and we may not
    open the file: then the first connection of the host's shows what is there. create: make tables,
    upgrade or repair them; else they must be there and whole. Whatever is wrong is a SchemaError.
    """
    if sqlite3.sqlite_version_info < _SQLITE_NEEDED:
        raise SchemaError(f"SQLite {sqlite3.sqlite_version} is too old; 3.34 or newer is needed")
    if not _alone(path):
        if not create:
            _check_there(path)
        return None
    try:
        with _session(path, create) as db:
            version = _version(db, path)
            _check_version(version, path, make=create)
            if create:
                _make_tables(db, path, version)
            elif lacking := _lacking(db):
                names = ", ".join(f"the {type} {name}" for type, name in lacking)
                raise SchemaError(
                    f"{path} lacks {_one_line(names, 200)}; "
                    f"`python -m webhook_outbox --db {path} init` makes it again"
                )
            return str(_meta(db, "outbox"))
    except sqlite3.Error as error:
        raise SchemaError(f"{path} cannot be used: {error}") from None


def _is_sqlite3(conn: Any) -> bool:
    """Say whether this is a connection of the standard library, and not a proxy of one, for which
    isinstance says yes too."""
    return type(conn) is sqlite3.Connection or issubclass(type(conn), sqlite3.Connection)


def _unproxied(conn: Any) -> Any:
    """Return the object under the proxies of a tracing agent, or under Flask's LocalProxy: a
    sqlite3.Cursor cannot be made of them. What is no proxy is returned as it is."""
    for _ in range(8):  # proxies of proxies, but not for ever
        if _is_sqlite3(conn):
            break
        if hasattr(conn, "_get_current_object"):
            conn = conn._get_current_object()
        elif hasattr(conn, "__wrapped__"):
            conn = conn.__wrapped__
        else:
            break
    return conn


def _driver(conn: Any) -> Any:
    """Return the connection that a driver made, under what a framework hands out: SQLAlchemy's
    Connection or Session, Django's connection or its alias, peewee's Database, a cursor; under an
    agent's proxies, too.

    They are known by what they have, and none of them is imported. What is none of these is
    returned as it is: _host judges it. PayloadError for an asynchronous one.
    """
    conn = _unproxied(conn)
    django = sys.modules.get("django.db")
    if isinstance(conn, str) and django and conn in django.connections:
        conn = django.connections[conn]
    if hasattr(conn, "run_sync"):
        raise PayloadError(f"{type(conn).__name__} is asynchronous: await outbox.aemit(...)")
    if hasattr(conn, "ensure_connection"):  # Django's may not be open yet
        conn.ensure_connection()
    for _ in range(4):  # a Session has a Connection, that has a pooled one, that has the driver's
        if _is_sqlite3(conn):
            break
        inner = getattr(conn, "driver_connection", None) or getattr(conn, "connection", None)
        if inner is None:
            break
        inner = _unproxied(inner)
        conn = inner if hasattr(inner, "execute") else _unproxied(inner())
    return conn


@contextlib.contextmanager
def _begun(conn: Any) -> Iterator[None]:
    """Begin the transaction of SQLAlchemy's Connection, if it has none, as a statement that goes
    through it would.

    We write on the driver's connection under it, which SQLAlchemy does not see: without this its
    commit() would find no transaction, do nothing, and the event would be lost. A Session needs no
    help, since it begins when it is asked for its connection; other wrappers hand commit() to the
    driver. When the block raises, what was begun here is rolled back.
    """
    conn = _unproxied(conn)
    wanted = hasattr(conn, "exec_driver_sql") and not hasattr(conn, "run_sync")
    if not wanted or conn.in_transaction():
        yield
        return
    if not hasattr(conn, "commit"):  # SQLAlchemy 1.4 commits only a transaction that one began
        raise NotInTransaction("the connection has no transaction: begin one first (begin())")
    transaction = conn.begin()
    try:
        yield
    except BaseException:
        transaction.rollback()
        raise


def _host(conn: Any) -> sqlite3.Connection:
    """Return the connection under what a host hands us, once we know that what we write commits
    with its rows.

    It is good in two cases: a transaction is open, or the driver will open one before our INSERT as
    it does before one of the host's (sqlite3's legacy mode, with an isolation_level). Otherwise the
    event would commit by itself, whatever becomes of the host's rows: NotInTransaction. That it is
    open on our file is checked later, by _check_identity.
    """
    db = conn if _is_sqlite3(conn) else _driver(conn)
    if not _is_sqlite3(db) and not (hasattr(db, "execute") and hasattr(db, "in_transaction")):
        raise PayloadError(
            f"expected a connection to the outbox's SQLite file, not {type(conn).__name__}"
        )
    # sqlite3.LEGACY_TRANSACTION_CONTROL, or Python before 3.12.
    legacy = getattr(db, "autocommit", -1) == -1
    opens_itself = legacy and getattr(db, "isolation_level", None) is not None
    if not db.in_transaction and not opens_itself:
        raise NotInTransaction(
            "the connection is in autocommit mode with no transaction open: begin one first "
            "(BEGIN, Django's atomic(), SQLAlchemy's begin(), peewee's atomic()), or use "
            "`with outbox.transaction() as conn`"
        )
    return db  # type: ignore[no-any-return]


def _check_uwsgi() -> None:
    """Refuse a thread where uWSGI is about to fork: it loads the app before it makes its workers,
    and makes them in C, past Python's hooks, so that each inherits the locks of a thread that it
    does not have.

    A thread may run where uWSGI is not, in a worker or a mule of it, and where it has neither a
    master nor several processes.
    """
    uwsgi: Any = sys.modules.get("uwsgi")
    if not hasattr(uwsgi, "masterpid") or uwsgi.worker_id() or uwsgi.mule_id():
        return
    if uwsgi.masterpid() == os.getpid() or (uwsgi.masterpid() == 0 and uwsgi.numproc > 1):
        raise OutboxError(
            "uWSGI has not made its workers yet, and threads do not survive that: call start() in "
            "a function under @uwsgidecorators.postfork, or set lazy-apps = true"
        )


def _as_they_are(cursor: Any, row: Any) -> Any:
    """Return a row as it is: the row_trace of a cursor of apsw."""
    return row


def _cursor(db: Any) -> sqlite3.Cursor:
    """Return a cursor without the host's row_factory, so that rows are tuples.

    A sqlite3.Cursor is made past the host's own class of cursors; of another driver's connection
    only its own cursor is to be had. Where the host has converters for declared types
    (detect_types), they would read our columns too: what is read on a host's connection is an
    expression (`+id`), which has no declared type.
    """
    if _is_sqlite3(db):
        return sqlite3.Cursor(db)
    cursor = db.cursor()
    for name, value in (("row_factory", None), ("row_trace", _as_they_are)):  # the latter: apsw's
        with contextlib.suppress(AttributeError):
            setattr(cursor, name, value)
    return cursor  # type: ignore[no-any-return]


def _changed(db: Any) -> int:
    """Return how many rows a connection has changed since it was opened; 0 for other drivers' ones,
    which do not say it in this way."""
    count = getattr(db, "total_changes", 0)
    return count if isinstance(count, int) else 0


def _changes(cursor: sqlite3.Cursor) -> int:
    """Return how many rows the statement before changed. Not the cursor's rowcount: apsw has none,
    and under PRAGMA count_changes the driver's is wrong."""
    cursor.execute("SELECT changes()")
    return int(cursor.fetchall()[0][0])


def _in_its_thread(conn: Any, do: Callable[[Any], Any]) -> Any:
    """Call do with a connection that it can write on: at once with the one given, or, under the
    synchronous side of SQLAlchemy's AsyncSession, with sqlite3's in the thread that aiosqlite keeps
    for it.

    A sqlite3 connection may be used by the thread alone that made it. `_execute` and `_conn` are
    private names of aiosqlite's; it has no public way to run a function of ours in its thread.
    """
    with _begun(conn):
        db = _driver(conn)
        if not hasattr(db, "_execute"):
            return do(conn)
        if db is conn:
            raise PayloadError("aiosqlite's Connection is asynchronous: await outbox.aemit(...)")
        util = sys.modules["sqlalchemy.util"]
        wait = getattr(util, "await_only", None) or util.concurrency.await_
        return wait(db._execute(do, db._conn))


def _on_connection(
    method: Any, args: Sequence[Any], options: Mapping[str, Any]
) -> Callable[[Any], Any]:
    """Return the call of a method that lacks its connection: its first argument (emit, accept), or
    one by name (the verbs). PayloadError where the method takes none."""
    import inspect

    names = list(inspect.signature(method).parameters) if callable(method) else []
    if "conn" not in names:
        raise PayloadError("arun takes a bound method that has conn, such as outbox.cancel")
    if names[0] == "conn":
        return lambda conn: method(conn, *args, **options)
    return lambda conn: method(*args, conn=conn, **options)


def _note_home(db: sqlite3.Connection, home: str) -> None:
    """Write the name of the place into a file that has none yet."""
    db.execute("INSERT OR IGNORE INTO webhook_meta VALUES ('home', ?)", (home,))


def _refusal(db: sqlite3.Connection, path: str, home: str | None) -> str | None:
    """Return why nothing may be sent from a file, and what to do; None when it may.

    A file that was copied from another home holds deliveries that the original sends as well. It
    may be sent from where the file has no home yet, and where its home is ours. Where we have no
    name and the file has one, it may be a copy on a developer's machine: nothing is sent either.
    """
    theirs = _meta(db, "home")
    if theirs is None or theirs == home:
        return None
    if home is None:
        cure = f"if it is that place, say home={theirs!r} or set WEBHOOK_OUTBOX_HOME={theirs}; "
        cure += "if it is a copy, give this place a name of its own in the same way and run `adopt`"
        return (
            f"nothing is sent: the home of {path} is {theirs!r}, and this place has no name; {cure}"
        )
    cure = "if it is a copy, run `adopt`, which cancels what waits; if it was moved, `adopt --keep`"
    return f"nothing is sent: the home of {path} is {theirs!r}, and this is {home!r}; {cure}"


def _file_id(path: str) -> tuple[int, int] | None:
    """Return what tells the file at a path from one that takes its place; None when there is
    none."""
    with contextlib.suppress(OSError):
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino
    return None


# The path of the file that a connection is open on, as bytes: the host may read text as it likes.
_FILE_OF = "SELECT CAST(file AS BLOB) FROM pragma_database_list WHERE name = 'main' AND file <> ''"


def _main_file(db: Any) -> str:
    """Return the path of the file that a connection is open on; '' for a database in memory."""
    cursor = _cursor(db)
    cursor.execute(_FILE_OF)
    return next((os.fsdecode(path) for (path,) in cursor.fetchall()), "")


def _is_open_on(db: Any, path: str) -> bool:
    """Say whether a connection is open on the file at a path, by whatever name it was opened."""
    there = _main_file(db)
    return bool(there) and _file_id(there) == _file_id(path) is not None


def _other_file(db: Any, path: str, why: str) -> SchemaError:
    """Say what is wrong with a connection to a file that is not the outbox's. Both paths are in it:
    one is often relative to another folder (Flask-SQLAlchemy's is `instance`)."""
    return SchemaError(
        f"this connection is open on {_main_file(db) or 'a database in memory'}, {why}; the outbox "
        f"is in {path}: give it the path of the file that your app writes to"
    )


def _explained(db: Any, text: str, path: str) -> OutboxError | None:
    """Return our error for what SQLite said of a statement of ours on a host's connection; None
    where it is the host's business.

    In the order of the code:

    1. a trigger of ours refused the row: its text says why
    2. the main file of the connection has no tables of ours: it is our file, or it is another
    3. PRAGMA trusted_schema is OFF, and this SQLite does not let a trigger use what ours need
    4. there is no folder for temporary files
    """
    if found := re.search("webhook_emit: (.*)", text):
        return PayloadError(found[1])
    if "no such table: main.webhook" in text or "unknown database" in text:
        if _is_open_on(db, path):
            return SchemaError(
                f"{path} has no webhook tables; "
                f"`python -m webhook_outbox --db {path} init` makes them"
            )
        why = "whose main file has no webhook tables (an attached file cannot commit atomically in "
        return _other_file(db, path, f"{why}WAL mode)")
    if "unsafe use of" in text:
        return OutboxError(
            f"{text}: SQLite 3.39.4 to 3.40.1 refuse it under PRAGMA trusted_schema = OFF; call it "
            "without conn=, or upgrade SQLite"
        )
    if re.search("disk I/O error|unable to open database", text) and not _temporary_folder():
        return OutboxError(f"{text}: {_NO_TEMPORARY_FOLDER}")
    return None


class _HostErrors:
    """Turns SQLite's errors inside the host's transaction into ours; what is the host's business
    (busy) passes. A class: a generator costs half a microsecond more, and an emit takes fifteen.

    They are known by what they say, since apsw and others have classes of their own. After an error
    the transaction is as it was before our statement, which SQLite undoes by itself. There are two
    exceptions: the driver began a transaction for our statement, which is rolled back, since
    nothing of the host's is in it; and SQLite rolled back the host's. Then the host must know: it
    believes to be in a transaction, and each further statement would commit by itself.
    """

    __slots__ = ("_before", "_db", "_path")

    def __init__(self, db: sqlite3.Connection, path: str) -> None:
        self._db, self._path = db, path

    def __enter__(self) -> None:
        self._before = self._db.in_transaction

    def __exit__(self, _: Any, error: BaseException | None, trace: Any) -> None:
        """Let an error pass as it is, or raise what it means: TransactionLost where the host's
        transaction is gone, else an error of ours where there are words for it."""
        if not isinstance(error, Exception):
            return
        db, text = self._db, str(error)
        ours = None if isinstance(error, OutboxError) else _explained(db, text, self._path)
        if not self._before and db.in_transaction:
            db.rollback()
        if self._before and not db.in_transaction:
            raise TransactionLost(
                f"SQLite rolled your transaction back ({ours or text}): nothing of it is stored; "
                "do not go on, begin again"
            ) from error
        if ours is not None:
            raise ours from error


def _check_identity(db: Any, cursor: sqlite3.Cursor, identity: str | None, path: str) -> str:
    """Return the identity of the outbox on a host's connection; refuse one to another file.

    identity: what we know of the file at `path`; the caller keeps what is returned. Mostly the file
    has it, and nothing more is looked at. It may have another: where we open no connection of our
    own it is not known yet (None), and `adopt`, `neutralize` and a repair give a file a new one
    while other processes have an Outbox of it. Then the path decides: a connection to the file at
    our path is taken, one to another, the original of this copy for one, is not. Rejected: to keep
    the old identities in the file; the original's is among them.
    """
    if identity is not None:
        cursor.execute("SELECT value = ? FROM main.webhook_meta WHERE key = 'outbox'", (identity,))
        if cursor.fetchone() == (1,):
            return identity
    if not _is_open_on(db, path):
        raise _other_file(db, path, "another file that has webhook tables")
    with _plain_text(db):
        cursor.execute("SELECT +key, value FROM main.webhook_meta")
        meta = dict(cursor.fetchall())
    _check_version(int(meta["schema_version"]), path, make=False)
    return str(meta["outbox"])


def _mounts() -> Iterator[tuple[str, str]]:
    """Yield where each file system is mounted, and its type; nothing where /proc does not tell.

    In a line of mountinfo (proc(5)) the fifth field is the place, in which a blank stands as \\040,
    and the type follows the field that is a single dash.
    """
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields, _, kind = os.fsdecode(line).partition(" - ")
            place = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields.split(" ")[4])
            yield place, kind.split(" ")[0]


def _warn_of_links(path: str) -> str | None:
    """Say, if it is so, that the database may be open under another name too; else None.

    SQLite puts the WAL, and we put the lock, beside the name by which the file was opened:
    processes that use different names do not see each other's commits, and each has a drain. It
    cannot be told whether anybody uses the other name, so it is a warning and no error.
    """
    links = os.stat(path).st_nlink
    if any(place == path for place, _ in _mounts()):
        what = "is a mount point of its own"
        cure = "mount its folder into each container, not the file"
    elif links > 1:
        what, cure = f"has {links} names (hard links)", "keep one name"
    else:
        return None
    danger = "whoever opens it by another path has another journal and another drain beside it"
    return f"{path} {what}: {danger}, which can damage the file and sends events twice; {cure}"


# C's struct flock, as Linux lays it out: type, whence, start, length, process id.
_FLOCK = struct.Struct("hhqqi0q")


def _lock_error(path: str, error: OSError) -> OutboxError:
    """Return our error for a lock file that cannot be opened or locked, with what to do then."""
    why = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
    cure = ""
    if error.errno in (errno.ELOOP, errno.EISDIR):
        cure = "; remove it"
    elif error.errno in (errno.EACCES, errno.EPERM):
        cure = "; hand it and its folder over, with chown, to the user who drains"
    return OutboxError(f"the lock file {path}-webhooks cannot be used: {why}{cure}")


def _open_lock(path: str, flags: int = 0) -> int:
    """Open the lock file of a database, for reading and writing; flags: further ones of os.open.

    Not where a symbolic link stands in its place: whoever may write in the folder could lead a
    drain that runs as root to another file, which would get the database's owner then. A program
    that the process starts does not inherit it, since os.open sets O_CLOEXEC.
    """
    try:
        flags |= os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
        return os.open(path + "-webhooks", flags, 0o600)  # until _adopt_mode
    except OSError as error:
        raise _lock_error(path, error) from None


def _adopt_mode(path: str, fd: int) -> None:
    """Give the lock file owner and mode of the database, as SQLite does with its own side files.

    Else one `drain --once` by root would lock the app's user out, and a user who may not read the
    database could lock the file and so keep every drain away. What is not permitted is left as it
    is: whoever cannot open the file then is told so by _lock_error.
    """
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        database, lock = os.stat(path), os.fstat(fd)
        if lock.st_nlink > 1:  # somebody may have put a link to a file of root's there
            return
        if (lock.st_uid, lock.st_gid) != (database.st_uid, database.st_gid):
            with contextlib.suppress(OSError):  # only root may give a file away
                os.fchown(fd, database.st_uid if os.geteuid() == 0 else -1, database.st_gid)
        if (lock.st_mode ^ database.st_mode) & 0o666:
            os.fchmod(fd, database.st_mode & 0o666)


def _look_at_lock(fd: int) -> tuple[bool, int] | None:
    """Say whether somebody else has the open file locked, and which process, if the kernel tells.

    None where it has no open-file-description locks: elsewhere than on Linux, and in some sandboxes
    there. The kernel names no process for a lock that belongs to an open file, as a drain's does
    (0 here), only for a record lock of other code.
    """
    if sys.platform != "linux" or not hasattr(fcntl, "F_OFD_GETLK"):
        return None
    try:
        asked = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 1, 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
    kind, _, _, _, pid = _FLOCK.unpack(asked)
    return kind != fcntl.F_UNLCK, max(0, pid)


def _set_lock(fd: int, locked: bool) -> bool:
    """Lock an open file exclusively, or unlock it, without waiting; False when somebody else has it
    locked."""
    try:
        if sys.platform == "win32":
            os.lseek(fd, 1 << 20, os.SEEK_SET)  # not the process id: nobody could read it
            msvcrt.locking(fd, msvcrt.LK_NBLCK if locked else msvcrt.LK_UNLCK, 1)
        elif _look_at_lock(fd) is None:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB if locked else fcntl.LOCK_UN)
        else:
            kind = fcntl.F_WRLCK if locked else fcntl.F_UNLCK
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, 0, 1, 0))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise
        return False
    return True


class _Lock:
    """The right to drain a file: an exclusive lock on a small file beside it, `app.db-webhooks`.

    The lock belongs to our open file and not to the process. So it holds when other code of the
    process opens and closes the lock file, as a backup of the folder does (a POSIX record lock is
    gone then), and it keeps all drains of one process apart: those of a reload, of a second copy of
    this file, of a subinterpreter. It ends with the process, however that dies, unless a child
    inherited the open file: see _Process. (An exclusive SQLite transaction on the lock file would
    not do: SQLite in a forked child believes for ever that its parent's lock is held.)

    On Linux it is an open-file-description lock, which one can look at without taking it, and which
    works wherever SQLite's own locks work; elsewhere it is flock, on Windows a locked byte. Whoever
    holds it writes its process id into the file, for people to read: nothing is decided by that.

    Nobody is woken when the lock becomes free: a drain that stands by tries again ten times a
    second. The file stays when the lock is given back. To delete it would let two drains in: one
    that opened the old file just before, and one that makes a new file.
    """

    def __init__(self, path: str) -> None:
        self.database, self.path = path, path + "-webhooks"
        self._fd = -1  # the lock file while the lock is ours, else -1

    def acquire(self) -> bool:
        """Take the lock if it is free, without waiting for it; say whether it is ours now.

        In the order of the code: False while a thread of this process forks; OutboxError where the
        file cannot be opened; False where another drain has the lock; OutboxError where it cannot
        be locked at all; True.
        """
        _PROCESS.settle()
        # If a fork fell between opening the file and noting that, the child would keep a copy. But
        # a fork that has begun may be waiting for this drain to close its database, so it is not
        # waited for in turn: the lock counts as taken, and is tried again in a moment.
        if not _PROCESS.forking.acquire(timeout=0.05):
            return False
        try:
            self._fd = _open_lock(self.database, os.O_CREAT)
            _PROCESS.descriptors.add(self._fd)
        finally:
            _PROCESS.forking.release()
        try:
            _adopt_mode(self.database, self._fd)
            if not _set_lock(self._fd, True):
                self._close()
                return False
        except OSError as error:
            self._close()
            raise _lock_error(self.database, error) from None
        with contextlib.suppress(OSError):  # a full disk, say: the lock holds without the number
            os.lseek(self._fd, 0, os.SEEK_SET)
            os.ftruncate(self._fd, os.write(self._fd, b"%d\n" % os.getpid()))
        return True

    def lost(self) -> bool:
        """Say whether the file was deleted or replaced: then another process can lock a new one, so
        the drain that holds the old one must end."""
        there = os.fstat(self._fd)
        return _file_id(self.path) != (there.st_dev, there.st_ino)

    def release(self) -> None:
        """Give the lock back, in the process that took it; without it, do nothing."""
        if self._fd in _PROCESS.descriptors:
            with contextlib.suppress(OSError):
                _set_lock(self._fd, False)  # a child forked in C may still have the file open
            self._close()

    def _close(self) -> None:
        """Close the file, and with it give back the lock. It is taken off the list first: the
        number may be another file's a moment after."""
        _PROCESS.descriptors.discard(self._fd)
        os.close(self._fd)
        self._fd = -1


def _drainer(path: str) -> int | None:
    """Say which process drains a file, without taking the lock: None when nobody does, 0 when it is
    not known who. OutboxError when the lock file cannot be used.

    Where a lock cannot be looked at, it is taken for an instant; a drain that asks for it just then
    finds it taken, and asks again. The number is what the holder wrote into the file: of a process
    in another container it is the number that the process has there.
    """
    if not os.path.lexists(path + "-webhooks"):
        return None
    fd = _open_lock(path)
    try:
        look = _look_at_lock(fd)
        held, pid = (not _set_lock(fd, True), 0) if look is None else look
        if held and not pid:
            os.lseek(fd, 0, os.SEEK_SET)
            with contextlib.suppress(ValueError):
                pid = int(os.read(fd, 20))
        elif look is None:
            _set_lock(fd, False)
        return pid if held else None
    except OSError as error:
        raise _lock_error(path, error) from None
    finally:
        os.close(fd)


class _EndpointRow(NamedTuple):
    """An endpoint's row as the drain needs it."""

    endpoint: Endpoint | str  # its id alone where the row is damaged
    secrets: Any  # _Secrets; none where the row is damaged
    enabled: bool
    version: int  # the number of its last change, of all changes of endpoints
    # Its health when that was last recorded; _Health says what it means.
    failures: int
    failing_since: float | None
    paused_until: float
    unsteady_since: float | None = None
    good: int = 0
    bad: int = 0
    registered: int = 0  # tells it from another endpoint that had the id before, or gets it later
    tried_at: float | None = None  # its newest attempt, where it was not steady then

    @property
    def id(self) -> str:
        """The endpoint's id, which is there in a damaged row too."""
        return self.endpoint if isinstance(self.endpoint, str) else self.endpoint.id


# Endpoints whose ids are in a JSON list. After an ANALYZE with few endpoints, `id IN` the list
# would read all of them for ever, however many there are by then; CROSS JOIN says what comes first.
_LISTED = "(SELECT value AS listed FROM json_each(?)) CROSS JOIN webhook_endpoints ON id = listed"


def _read_secrets(cursor: sqlite3.Cursor, stored: str) -> _Secrets:
    """Return the secrets of a row; derived ones with what they are derived from beside the key.

    Of those the row holds master:NUMBER, and this returns master:NUMBER:IDENTITY:CHECK, where
    IDENTITY is the outbox's ('outbox' comes first in the order below) and CHECK tells a wrong key:
    see _MasterKey. Where plain SQL damaged the column, one of the errors that _load_endpoints
    catches is raised.
    """
    pairs = [(secret, until) for secret, until in json.loads(stored)]
    if _DERIVED not in stored:
        return pairs
    cursor.execute(
        """SELECT value FROM main.webhook_meta
            WHERE key IN ('outbox', 'master_check') ORDER BY key DESC"""
    )
    of = ":".join(str(row[0]) for row in cursor.fetchall())
    return [(f"{s}:{of}" if s.startswith(_DERIVED) else s, until) for s, until in pairs]


def _load_endpoints(db: sqlite3.Connection, source: str, *values: Any) -> list[_EndpointRow]:
    """Return the rows of endpoints with their secrets and state; source: what stands after FROM,
    of our own making, with `values` for its parameters. A damaged row is one of them, without its
    options and secrets, so that it keeps nobody from reading the others."""
    rows = db.execute(
        f"""SELECT {_ENDPOINT_COLUMNS}, secrets, enabled, version, failures, failing_since,
                   paused_until, unsteady_since, good, bad, registered,
                   CASE WHEN unsteady_since IS NOT NULL THEN
                     (SELECT max(at) FROM webhook_attempts
                       WHERE endpoint_id = webhook_endpoints.id) END
              FROM {source}""",
        values,
    )
    found, fields = [], len(_ENDPOINT_FIELDS)
    for row in rows.fetchall():
        columns, (stored, enabled, *rest) = row[:fields], row[fields:]
        state = bool(enabled), *rest
        try:
            pairs = _read_secrets(db.cursor(), stored)
            found.append(_EndpointRow(_endpoint(columns), pairs, *state))
        except (ValueError, TypeError, AttributeError, RecursionError):
            found.append(_EndpointRow(columns[0], [], *state))
    return found


# Deliveries are read ahead, many in one query, and kept in memory until their attempts begin. Large
# bodies are left out and read when their attempt starts: two hundred endpoints that hang and share
# eight events of 250 kB would hold hundreds of megabytes.
_LARGE = 4_096  # characters
_PICK_ROWS = 128  # deliveries of one query
_READ_AHEAD = 8 << 20  # characters of data read ahead; the endpoints that have work share them
# The columns of a _Picked, in its order, and the tables that they come from.
_PICK_COLUMNS = f"""d.event, d.due_at, d.attempts, d.first_attempt_at, d.queue, e.type,
       CASE WHEN length(e.data) <= {_LARGE} THEN e.data END,
       CASE WHEN length(e.data) <= {_LARGE} THEN json_valid(e.data) END,
       e.key, e.headers, e.created_at, e.tenant, d.expires_at
  FROM webhook_deliveries AS d LEFT JOIN webhook_events AS e ON e.seq = d.event"""


def _read_ahead(
    db: sqlite3.Connection, sql: str, values: Sequence[Any], now: float, most: int
) -> tuple[list[_Picked], float]:
    """Return the deliveries that a query finds, from the first one on, until one is not due or they
    hold more than `most` characters of data; and when the next one is due.

    sql: with _PICK_COLUMNS, oldest first, _PICK_ROWS at most. It ends, in the order of the code:

    1. at the first delivery that is not due yet: the time when it is
    2. with the first that goes beyond `most`: -inf, since more may be due
    3. with the last row: -inf where the query may have cut off others, else inf: there is none
    """
    picked: list[_Picked] = []
    size = 0
    cursor = db.execute(sql, values)
    try:
        for row in cursor:
            if row[1] > now:  # due_at
                return picked, float(row[1])
            picked.append(_Picked._make(row))
            size += len(row[6] or "")  # data
            if size > most:
                return picked, -math.inf
    finally:
        cursor.close()  # a half-read cursor would pin the WAL
    return picked, -math.inf if len(picked) == _PICK_ROWS else math.inf


def _pick(
    db: sqlite3.Connection,
    endpoint_id: str,
    now: float,
    after: tuple[float, int] = (-math.inf, 0),
    most: int = _READ_AHEAD,
) -> tuple[list[_Picked], float]:
    """Return due deliveries of an endpoint behind a place, oldest first; and when the next one is
    due, as _read_ahead says it.

    after: due_at and event of the last one read before. So what was read and waits in memory, or is
    under way, is not read again, though the file calls it pending until its outcome is recorded.
    """
    return _read_ahead(
        db,
        f"""SELECT {_PICK_COLUMNS}
             WHERE d.endpoint_id = ? AND d.status = 'pending' AND (d.due_at, d.event) > (?, ?)
             ORDER BY d.due_at, d.event LIMIT {_PICK_ROWS}""",
        (endpoint_id, *after),
        now,
        most,
    )


def _as_bytes(text: str) -> bytes:
    """Return text that SQLite gave us as it can be handed back, even if somebody stored bytes that
    are no UTF-8. It goes into a query as CAST(? AS TEXT), which gives the same bytes as text."""
    return text.encode("utf-8", "surrogateescape")


def _pick_queue(
    db: sqlite3.Connection, endpoint_id: str, queue: str, event: int, now: float
) -> list[_Picked]:
    """Return what follows an event in a queue, in its order, up to the first that is not due yet:
    nobody may overtake it.

    The file calls them queued: their turn comes when the event before them is delivered, which the
    drain knows before it is recorded. That the queue is not NULL is said for the index, which holds
    no others.
    """
    return _read_ahead(
        db,
        f"""SELECT {_PICK_COLUMNS}
             WHERE d.endpoint_id = ? AND d.queue = CAST(? AS TEXT) AND d.queue IS NOT NULL
               AND d.status = 'queued' AND d.event > ?
             ORDER BY d.event LIMIT {_PICK_ROWS}""",
        (endpoint_id, _as_bytes(queue), event),
        now,
        _READ_AHEAD // _PICK_ROWS,
    )[0]


def _with_data(db: sqlite3.Connection, picked: _Picked) -> _Picked:
    """Return a delivery with the data of its event, which was not read ahead if it is large. The
    event may have been deleted since: then its type is None, as if it had been missing before."""
    if picked.data is not None or picked.type is None:
        return picked
    row = db.execute(
        "SELECT data, json_valid(data) FROM webhook_events WHERE seq = ?", (picked.event,)
    ).fetchone()
    data, valid = row or (None, None)
    return picked._replace(data=data, valid=valid, type=picked.type if row else None)


def _first_due(db: sqlite3.Connection, endpoint_id: str) -> float:
    """Return when the endpoint's first delivery is due; inf when there is none."""
    row = db.execute(
        """SELECT due_at FROM webhook_deliveries
            WHERE endpoint_id = ? AND status = 'pending' ORDER BY due_at LIMIT 1""",
        (endpoint_id,),
    ).fetchone()
    return float(row[0]) if row else math.inf


class _Waiting(NamedTuple):
    """An endpoint that has pending deliveries."""

    id: str
    due_at: float  # of the first of them
    enabled: int | None  # 0 or 1; None: there is no such endpoint


# Endpoints of one look at those that wait, and new deliveries of one read: so many that a read is
# worth it, and so few that the loop soon does something else.
_LOOK_ROWS, _NEW_ROWS = 256, 1_000


def _endpoints_with(kind: str, after: str = "", limit: str = "") -> str:
    """Return the SQL of a table waiting(id): the endpoints that have deliveries (d) of a kind, and
    a NULL at the end.

    Each is found with one seek in an index behind the one before, however many rows it has. kind: a
    condition on d that an index serves. after, limit: a further condition of the first, and a
    LIMIT.
    """
    first = f"SELECT min(d.endpoint_id) FROM main.webhook_deliveries AS d WHERE {kind}"
    return f"""WITH RECURSIVE waiting(id) AS (
             {first}{after}
              UNION ALL
             SELECT ({first} AND d.endpoint_id > waiting.id)
               FROM waiting WHERE waiting.id IS NOT NULL{limit})"""


def _waiting(db: sqlite3.Connection, after: str = "") -> list[_Waiting]:
    """Return the endpoints with pending deliveries whose ids follow `after`, 256 at most, by id.
    It costs three seeks an endpoint, however many rows it has; the last id is where to go on."""
    after_id, some = " AND d.endpoint_id > CAST(? AS TEXT)", f" LIMIT {_LOOK_ROWS}"
    rows = db.execute(
        f"""{_endpoints_with("d.status = 'pending'", after_id, some)}
           SELECT waiting.id,
                  (SELECT due_at FROM webhook_deliveries
                    WHERE status = 'pending' AND endpoint_id = waiting.id
                    ORDER BY due_at LIMIT 1),
                  p.enabled
             FROM waiting LEFT JOIN webhook_endpoints AS p ON p.id = waiting.id
            WHERE waiting.id IS NOT NULL""",
        (_as_bytes(after),),
    )
    return [_Waiting._make(row) for row in rows.fetchall()]


def _left_to_the_app(url: Any, body: Any, settings: _Settings) -> str | None:
    """Return why a drain does not send to an endpoint, and leaves that to a drain of the app's own
    Outbox; None: it sends.

    A drain that was started at the command line does not know the senders and transforms of the
    app, nor the networks that it allows. If it tried, each attempt would fail, and in the end all
    of the endpoint's deliveries. Whoever asks what a drain can send, or has left to send, asks
    this.
    """
    if not isinstance(url, str):
        return None  # damaged: to try it tells what is wrong with it
    what = ""
    if _is_called(url) and _sender(url, settings.senders) is None:
        what = f"{url} is a sender"
    elif settings.guard.provisional and body not in (*_BODIES, *settings.transforms):
        what = f"{body} is a transform"
    if what:
        return (
            f"{_one_line(what)} that is not known here; its deliveries wait for a drain of the "
            "app's own Outbox (outbox.start(), or drain with --app)"
        )
    return _barred(url, settings.guard)


def _work_left(db: sqlite3.Connection, until: float, settings: _Settings) -> bool:
    """Say whether an enabled endpoint that does not pause, and that is not left to the app, has a
    delivery due by `until`.

    A drain that ends by itself asks it: while another one has the lock and may do the work for it,
    and at its end, where what is on its agenda may be gone. until: UTC seconds, inf for any time.
    """
    rows = _waiting(db)
    while rows:
        # An id that is not printable was written in plain SQL, and no endpoint can be asked for it.
        ids = [
            row.id for row in rows if row.enabled and row.due_at <= until and row.id.isprintable()
        ]
        found = f"SELECT url, body FROM {_LISTED} WHERE paused_until <= ?"
        for url, body in db.execute(found, (json.dumps(ids), until)).fetchall():
            if _left_to_the_app(url, body, settings) is None:
                return True
        rows = _waiting(db, rows[-1].id)
    return False


class _News:
    """Finds what is new in the file, at a cost that follows what is new and not what waits.

    That somebody committed does not say what. But each kind of change leaves a trace:

    what happened                      its trace                          what is done
    an event was emitted               a seq above the newest seen        its deliveries are read
    an endpoint was added or changed   counter endpoints_version,         its row is read again
                                       and a newer version in its row
    an endpoint was removed            counter endpoints_removed          it is forgotten
    an older delivery became due       counter work                       all that wait are looked
    (replay, resend, a queue's head                                       at, 256 endpoints a time
    deleted)
    a delivery was cancelled           counter cancelled                  what was read ahead is
                                                                          read again

    The counters are rows of webhook_meta; triggers and our own statements count them up, and this
    object keeps what they were when the change was taken in. seq only grows, so nothing new stands
    before the newest one seen. The loop's thread alone uses it; _Finder does what is to be done.

    A look at all that wait is under way while `at` is an id, that of the last endpoint looked at;
    it begins while `at` is '', and None means that there is none. One that is under way is never
    begun anew, or it would never end beside a host that replays row by row: all are looked at once
    more after it.
    """

    __slots__ = ("_again", "at", "cancelled", "removed", "seen", "stale", "version", "work")

    def __init__(self) -> None:
        self.stale = True  # somebody committed: read again
        self.seen: tuple[int, str] = (0, "")  # event and endpoint of the newest delivery read
        # What counters() said when it was last taken in; -1: nothing was yet.
        self.version = self.removed = self.work = self.cancelled = -1
        self.at: str | None = ""
        self._again = False  # look at all once more when this look has ended

    def begin(self, db: sqlite3.Connection) -> None:
        """Take the baseline: what is newer is news, what is older is found by looking at all that
        wait. It comes first in a run, when the lock is held."""
        self.seen, self.at, self.stale = self._newest(db), "", True
        self.version, self.removed, self.work, self.cancelled = self.counters(db)

    def mark(self) -> tuple[Any, ...]:
        """Return how far was read, for turn_back: all but `stale`."""
        counters = self.version, self.removed, self.work, self.cancelled
        return self.seen, *counters, self.at, self._again

    def turn_back(self, mark: tuple[Any, ...]) -> None:
        """Read again what was read since a mark: an error, a lock mostly, came before all of it had
        got to where it belongs. What did get there is found twice, which does no harm."""
        self.seen, self.version, self.removed, self.work, self.cancelled, self.at, self._again = (
            mark
        )
        self.stale = True

    def counters(self, db: sqlite3.Connection) -> tuple[int, int, int, int]:
        """Return what counts up when endpoints change, when one is removed, when an old delivery
        becomes due, and when one is cancelled."""
        rows = db.execute(
            """SELECT key, value FROM webhook_meta
                WHERE key IN ('endpoints_version', 'endpoints_removed', 'work', 'cancelled')"""
        )
        found = dict(rows.fetchall())
        changes = found["endpoints_version"], found["endpoints_removed"]
        return *changes, found["work"], found["cancelled"]

    def look_at_all(self, db: sqlite3.Connection) -> None:
        """Have all that wait looked at, or once more after the look that is under way. The newest
        event may have been deleted: then the next seq may be lower, so `seen` goes back to what
        there is."""
        self.seen = min(self.seen, self._newest(db))
        self._again = self.at is not None and self.at != ""
        self.at = self.at or ""

    def _newest(self, db: sqlite3.Connection) -> tuple[int, str]:
        """Return the place behind all deliveries of the newest event; where it cannot be read,
        which a damaged page may cause, the place behind all that there can ever be."""
        try:
            (newest,) = db.execute("SELECT max(seq) FROM webhook_events").fetchone()
        except sqlite3.DatabaseError as error:
            if _is_busy(error):
                raise
            return (1 << 63) - 1, ""
        return newest or 0, "\U0010ffff"  # no endpoint's id sorts behind it

    def new(self, db: sqlite3.Connection) -> list[tuple[int, str, float, str, str | None]]:
        """Return new deliveries as (event, endpoint, due, status, queue), a thousand at most, and
        count them as seen. Where it is a thousand there may be more.

        A stray row beyond the newest event is none of them: everything up to it would count as seen
        then. Where a page is damaged, those whose rows are elsewhere are found by looking at all.
        """
        try:
            rows = db.execute(
                f"""SELECT event, endpoint_id, due_at, status, queue FROM webhook_deliveries
                     WHERE (event, endpoint_id) > (?, CAST(? AS TEXT))
                       AND event <= (SELECT max(seq) FROM webhook_events)
                     ORDER BY event, endpoint_id LIMIT {_NEW_ROWS}""",
                (self.seen[0], _as_bytes(self.seen[1])),
            ).fetchall()
        except sqlite3.DatabaseError as error:
            if _is_busy(error):
                raise
            self.look_at_all(db)
            return []
        if rows:
            self.seen = rows[-1][0], rows[-1][1]
        return rows

    def waiting(self, db: sqlite3.Connection) -> list[_Waiting]:
        """Return the next of all that wait, 256 endpoints at most; only while `at` is not None."""
        assert self.at is not None
        rows = _waiting(db, self.at)
        self.at = rows[-1].id if len(rows) == _LOOK_ROWS else None
        if self.at is None and self._again:
            self.at, self._again = "", False
        return rows


def _monitored(db: sqlite3.Connection) -> bool:
    """Say whether an endpoint subscribes to events about deliveries and endpoints, webhook.*; where
    none does, the drain writes none. ('/' follows '.': the range is all that begins with
    "webhook.".)"""
    (found,) = db.execute(
        """SELECT EXISTS (SELECT 1 FROM webhook_patterns
                           WHERE tenant IN ('', '*')
                             AND pattern >= 'webhook.' AND pattern < 'webhook/')"""
    ).fetchone()
    return bool(found)


# Deliveries that were put off, or emitted, while the clock was far ahead, and that are due later
# than :latest. One that nobody tried, of an event that is not from the future, is not among them:
# the host may have asked for a long delay.
_AHEAD = """ FROM webhook_endpoints AS p CROSS JOIN webhook_deliveries AS d ON d.endpoint_id = p.id
  LEFT JOIN webhook_events AS e ON e.seq = d.event
 WHERE (d.status = 'pending' OR d.queue IS NOT NULL AND d.status = 'queued')
   AND d.due_at > :latest AND (d.attempts > 0 OR e.created_at > :now)"""


def _pull_back(db: sqlite3.Connection, now: float, longest: float) -> None:
    """Put right what was put off by a clock that has been set back since.

    It may have been years ahead for a moment, and what it put off would wait until it gets there
    again. So nothing waits longer than `longest` from now, the most seconds that the retry policy
    can ask for: a pause that lasts longer is ended; a delivery that was tried before is due now;
    one that was not is due after the delay that it was emitted with, counted from now.
    """
    long = "FROM webhook_endpoints WHERE paused_until > ?"
    if db.execute(f"SELECT 1 {long} LIMIT 1", (now + longest,)).fetchone():
        db.execute(
            f"UPDATE webhook_endpoints SET paused_until = 0.0 WHERE id IN (SELECT id {long})",
            (now + longest,),
        )
    values = {"now": now, "longest": longest, "latest": now + longest}
    # Read first: an UPDATE holds the write lock while it looks for rows, and mostly there are none.
    if db.execute(f"SELECT 1 {_AHEAD} LIMIT 1", values).fetchone():
        db.execute(
            f"""UPDATE webhook_deliveries
                   SET due_at = :now + CASE WHEN attempts THEN 0.0 ELSE min(:longest, due_at -
                                (SELECT created_at FROM webhook_events WHERE seq = event)) END
                 WHERE (event, endpoint_id) IN (SELECT d.event, d.endpoint_id {_AHEAD})""",
            values,
        )


# Columns of the view webhook_record, through which the drain writes; what they mean depends on the
# kind of a row: see _Row. A row without a kind is ignored.
_RECORD_COLUMNS = (
    "kind, event, endpoint_id, status, due_at, at, duration, status_code, reason, error, response"
)
_NO_ROW = ("", *[0] * 10)
# The values of a row. The texts of an outcome, the last three, are mostly missing, and are written
# as '' then: to bind None costs as much as four texts in Python 3.10 and 3.11, whose sqlite3 looks
# for an adapter of it each time.
_ROW_VALUES = "(?, ?, ?, ?, ?, ?, ?, ?, nullif(?, ''), nullif(?, ''), nullif(?, ''))"


@functools.lru_cache(maxsize=16)
def _record_sql(rows: int) -> str:
    """Return the statement that inserts so many rows."""
    values = ", ".join([_ROW_VALUES] * rows)
    return f"INSERT INTO webhook_record ({_RECORD_COLUMNS}) VALUES {values}"


def _write_record(db: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Record rows in one autocommit statement: all of them, or none where it raises.

    BEGIN ... COMMIT from Python would hand over the interpreter lock at each row with SQLite's
    write lock held: beside busy host threads that is tens of milliseconds. Rows are filled up to a
    power of two with rows that the triggers ignore, so that a dozen prepared statements serve all
    batches. Rejected: json_each over one parameter, which costs a third more CPU.
    """
    size = 1 << (len(rows) - 1).bit_length()
    filled = [*rows, *[_NO_ROW] * (size - len(rows))]
    db.execute(_record_sql(size), list(itertools.chain.from_iterable(filled)))


# Events of one statement. A host that writes waits for it, so it is kept short.
_PRUNE_ROWS = 500
# Deletes the finished events of a range of seq that are older than a time; triggers take their
# deliveries and attempts along. Those stay of which a delivery waits, or has a failed row that
# somebody has to act on, or was delivered later than that time. Parameters: the first seq, the
# last, and the time twice.
_PRUNE = """DELETE FROM main.webhook_events
 WHERE seq BETWEEN ? AND ? AND created_at < ?
   AND NOT EXISTS (SELECT 1 FROM main.webhook_deliveries
                    WHERE event = seq
                      AND (status IN ('pending', 'queued', 'failed') OR delivered_at >= ?))"""


def _prune_range(cursor: sqlite3.Cursor, after: int, cutoff: float) -> tuple[int, int] | None:
    """Return the first and last seq of the 500 events behind `after`; None when none of them is
    old: seq follows the time, so the rest need not be read.

    after: the last seq of the range before, 0 at the beginning. cutoff: UTC seconds; an event is
    old that was created before it. Events that stay are passed over in this way, and are not looked
    at again before the next beginning.
    """
    cursor.execute(  # SQL compares, because a damaged row may hold text
        "SELECT seq, created_at < ? FROM main.webhook_events WHERE seq > ? ORDER BY seq LIMIT ?",
        (cutoff, after, _PRUNE_ROWS),
    )
    rows = cursor.fetchall()
    return (rows[0][0], rows[-1][0]) if any(old for _, old in rows) else None


def _prune_some(db: sqlite3.Connection, after: int, cutoff: float) -> tuple[int, int | None]:
    """Delete old finished events among the 500 behind `after`; return how many, and where to go on
    (None: the end). One autocommit statement, by the drain, when it has nothing to record."""
    found = _prune_range(db.cursor(), after, cutoff)
    return (db.execute(_PRUNE, (*found, cutoff, cutoff)).rowcount, found[1]) if found else (0, None)


def _discard_some(db: sqlite3.Connection, cutoff: float) -> int:
    """Delete failed rows that are older than a time, 500 at most; return how many.

    Only the 500 with the lowest numbers are looked at: numbers follow the time, so where none of
    those is old the others are not either. 0 means that there is nothing more to do.
    """
    return db.execute(
        """DELETE FROM webhook_failed WHERE id IN (
             SELECT id FROM webhook_failed WHERE id <= (
               SELECT max(id) FROM (SELECT id FROM webhook_failed ORDER BY id LIMIT ?))
             AND failed_at < ?)""",
        (_PRUNE_ROWS, cutoff),
    ).rowcount


class _Bell:
    """Wakes a loop that sleeps in select, from any thread and from signal handlers.

    The loop's selector waits for `inside` to be readable; whoever rings sends a byte to `outside`:
    an emit in this process, a thread that opened a connection or ran the host's code, stop(), a
    thread that is about to fork. There is no lock, since a signal handler may ring in the middle of
    another ring and would wait for itself. A ring is never lost; several of them before the loop
    wakes are heard as one.
    """

    __slots__ = ("_committed", "_rung", "inside", "outside")

    def __init__(self) -> None:
        self.inside, self.outside = socket.socketpair()
        self.inside.setblocking(False)
        self.outside.setblocking(False)
        self._rung = False  # a byte is on its way: no need for another
        self._committed = False  # one of those who rang emitted

    def ring(self, committed: bool = False) -> None:
        """Wake the loop; committed: because somebody emitted in this process."""
        self._committed |= committed
        if not self._rung:
            self._rung = True
            with contextlib.suppress(OSError):  # closed, or full, which wakes as well
                self.outside.send(b"\0")

    def hear(self) -> bool:
        """Take the ring; return whether somebody emitted. In the loop's thread."""
        with contextlib.suppress(BlockingIOError):
            self.inside.recv(4096)
        # Only now. Before the read, a ring in between would set it again, the read would take that
        # ring's byte away, and every later ring would believe that a byte is on its way.
        self._rung = False
        committed, self._committed = self._committed, False
        return committed

    def close(self) -> None:
        """Close both ends; a later ring does nothing."""
        self.inside.close()
        self.outside.close()


class _Inotify:
    """Linux's news of writes to the database's files: the file itself, its -wal and its -journal.

    It opens none of them, so no lock of SQLite's is dropped. The files are watched for writes. The
    folder is watched as well, since a -wal and a -journal come and go, and a watch belongs to the
    file that stood there when it was set. Python has no call for it, so it is the C library's.
    Without it (another system, no descriptor left) `fd` is -1 and nothing is ever heard.
    """

    __slots__ = ("_folder", "_libc", "_names", "_path", "fd")
    # Constants of <sys/inotify.h>.
    _MODIFY = 0x2
    _GONE = 0x400 | 0x800  # IN_DELETE_SELF, IN_MOVE_SELF
    # Of a folder: IN_MOVED_TO, IN_CREATE, IN_DELETE (a journal's end is the commit).
    _MADE = 0x80 | 0x100 | 0x200
    _CLOEXEC_NONBLOCK = 0o2000000 | 0o4000

    def __init__(self, path: str) -> None:
        """Begin to watch; path: of the database."""
        self._path, self._folder = path, -1  # of the folder: the number of its watch
        self._names = [
            os.fsencode(os.path.basename(path) + suffix) for suffix in ("", "-wal", "-journal")
        ]
        self.fd = -1
        with contextlib.suppress(OSError, AttributeError, ImportError):
            import ctypes

            self._libc = ctypes.CDLL(None, use_errno=True)
            self.fd = self._libc.inotify_init1(self._CLOEXEC_NONBLOCK)
        if self.fd >= 0:
            folder = os.fsencode(os.path.dirname(path) or ".")
            self._folder = self._libc.inotify_add_watch(self.fd, folder, self._MADE)
            self._watch()

    def _watch(self) -> None:
        """Watch those of the files that are there; one that is watched already stays so."""
        for suffix in ("", "-wal", "-journal"):
            self._libc.inotify_add_watch(
                self.fd, os.fsencode(self._path + suffix), self._MODIFY | self._GONE
            )

    def heard(self) -> bool:
        """Say whether a file was written, made or deleted since the last call."""
        if self.fd < 0:
            return False
        found = False
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.fd, 65_536):
                found |= self._read(data)
        return found

    def _read(self, data: bytes) -> bool:
        """Say whether one of the records in `data` (struct inotify_event: watch, mask, cookie,
        length of the name, name) is about our files. Those of the folder are about any file in it,
        and name it."""
        found, at = False, 0
        while at < len(data):
            watch, mask, _, length = struct.unpack_from("iIII", data, at)
            name = data[at + 16 : at + 16 + length].rstrip(b"\0")
            at += 16 + length
            ours = watch != self._folder or name in self._names
            found |= ours
            # A file was made or deleted: another one may stand there now.
            if ours and mask & ~self._MODIFY:
                self._watch()
        return found

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is news, for a selector."""
        return self.fd

    def close(self) -> None:
        """End all watches; nothing is heard from now on."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class _Watch:
    """Notices what others commit, and says how long the loop may sleep without looking.

    PRAGMA data_version on our connection moves for everybody's commits but our own; to poll it
    costs 3 us. Where it has moved the tables are read, after the poll, so that no commit is missed;
    that they hold nothing new for us happens. Nothing wakes us when it moves. But there are hints:
    the bell after an emit in this process, inotify after a write of any process. They come a little
    before the commit shows, so the version is polled several times after one:

    situation                           polls come
    attempts are under way              every millisecond
    a hint came                         at once, then 0.2, 0.4, 0.8 ... 51 ms apart: a slow disk may
                                        hold the commit up after its writes
    a commit was seen                   0.4, 0.8, 1.6 ... 6.4 ms apart: the writes of the next one
                                        may have been heard with it
    we committed, which makes hints     within 1.6 ms, then as above: a host's may be among them
    none of these, and hints work       every 100 ms, in case that one was lost
    none of these, and they do not      every millisecond for a tenth of a second after the last
                                        commit, every 5 ms for a minute, then every 18 ms

    Hints work if inotify told of the commit that was last seen; some file systems know no events.
    The last row trades time against CPU: so late may a commit be seen, and so often does an idle
    drain wake up. The loop's thread alone uses this; times are monotonic seconds.
    """

    __slots__ = (
        "_inotify", "_last_nap", "_nap", "_poll_at", "_seen_at", "_version", "hints",
    )  # fmt: skip
    # Seconds: what naps are doubled from, and the longest one after a commit, and after a hint.
    _FIRST_NAP, _LAST_NAP, _LAST_UNSEEN = 0.0001, 0.0064, 0.0512

    def __init__(self) -> None:
        self._version = -1  # what data_version was; -1: not asked yet
        self._poll_at = 0.0  # monotonic: when it is time again
        self._seen_at = -math.inf  # monotonic: when a commit was seen, or hinted at
        self._nap = 0.0  # until the next poll after a hint; 0: no hint is fresh
        self._last_nap = self._LAST_NAP  # the longest of them
        self._inotify: _Inotify | None = None
        self.hints = False  # inotify told of what was seen last

    def open(self, path: str) -> None:
        """Begin anew, on a connection that was just opened."""
        self.close()
        self._inotify = _Inotify(path)
        self._version, self._poll_at, self.hints = -1, 0.0, False

    def close(self) -> None:
        """Stop listening for hints; open() begins again."""
        if self._inotify is not None:
            self._inotify.close()
        self._inotify = None

    @property
    def source(self) -> _Inotify | None:
        """What is readable when a hint has come; another object after each open(), None where
        inotify is not to be had."""
        return self._inotify if self._inotify is not None and self._inotify.fd >= 0 else None

    def hint(self, mono: float) -> None:
        """Poll soon: somebody committed, or is about to."""
        self._nap, self._poll_at, self._seen_at = self._FIRST_NAP, mono, mono
        self._last_nap = self._LAST_UNSEEN

    def listen(self, mono: float) -> None:
        """Take the hints that have come from inotify."""
        if self._inotify is not None and self._inotify.heard():
            self.hints = True
            self.hint(mono)

    def wrote(self, mono: float) -> None:
        """Note a commit of our own, which makes hints too. A host's may be among them, so poll a
        few times."""
        if self._inotify is not None and self._inotify.heard():
            self._nap = max(self._nap, 0.0016)
            self._poll_at = min(self._poll_at, mono + self._nap)

    def poll(
        self, db: sqlite3.Connection, mono: float, sending: bool, early: bool = False
    ) -> str | None:
        """Return who committed since the last poll: "host" for anybody else, "first" for the first
        look at all, or None, also where it is not time for a poll. sending: attempts are under way.
        early: poll now, whether it is time or not; where nothing is seen, the time of the next poll
        stays."""
        if mono < self._poll_at and not early:
            return None
        (version,) = db.execute("PRAGMA data_version").fetchone()
        if version == self._version:
            if mono < self._poll_at:
                return None
            # The next nap after the hint; after the longest one the hint counts as used up.
            self._nap = 0.0 if self._nap >= self._last_nap else 2 * self._nap
            self._poll_at = mono + (0.001 if sending else self._pause(mono))
            return None
        # No hint told of this commit before it was seen. So hints do not work, unless inotify has
        # news of it that were not read yet.
        if self._version != -1 and not self._nap:
            self.hints = self._inotify is not None and self._inotify.heard()
        first, self._version, self._seen_at = self._version == -1, version, mono
        self._nap, self._last_nap = 4 * self._FIRST_NAP, self._LAST_NAP
        self._poll_at = mono + (0.001 if sending else self._nap)
        return "first" if first else "host"

    def _pause(self, mono: float) -> float:
        """Return the seconds between two polls while nothing is under way."""
        quiet = mono - self._seen_at
        often = 0.1 if self.hints else 0.001 if quiet < 0.1 else 0.005 if quiet < 60 else 0.018
        return self._nap or often

    def rest(self, mono: float) -> float:
        """Return the seconds until the next poll."""
        return max(0.0, self._poll_at - mono)


class _DrainFile:
    """The drain's connection to the database, and what it watches there. Both are closed while a
    thread of this process forks (_Process tells why):

    the thread that forks                      the loop's thread
    park: forks + 1, rings the bell, waits     wakes up
                                               let_fork: closes; _parked, wakes the other; waits
    forks
    unpark: forks - 1, wakes the loop          let_fork: not _parked; opens again

    Neither waits for ever: the fork goes on after five seconds, and the child keeps a connection
    that it never uses; the loop goes on after a minute. Where the loop's own thread forks, in a
    callback of the host's, it does both sides itself. The connection belongs to the loop's thread.
    `forks` and `_parked` change under the condition. The other side waits there for `_parked` to be
    set, or for `forks` to be 0; whoever brings that about wakes it.
    """

    __slots__ = (
        "_changed",
        "_owner",
        "_parked",
        "_pid",
        "_ring",
        "db",
        "forks",
        "identity",
        "path",
        "watch",
    )

    def __init__(self, path: str, ring: Callable[[], None]) -> None:
        """Note the path; open() opens it. ring: of the loop's bell, for a thread that forks."""
        self.path, self._ring, self._pid = path, ring, os.getpid()
        # Opened by run, in the loop's thread.
        self.db: sqlite3.Connection = None  # type: ignore[assignment]
        self.watch = _Watch()
        self.identity: tuple[int, int] | None = None  # of the file that db is open on
        self.forks = 0  # threads that are forking now
        self._parked = False  # closed, and stays so until forks is 0
        self._owner = 0  # the thread that opened it, the loop's
        self._changed = threading.Condition()

    def open(self) -> None:
        """Open the file and watch it, in the loop's thread. Which file it is is noted before: one
        that takes its place in between counts as another."""
        self._owner = threading.get_ident()
        self.identity = _file_id(self.path)
        self.db = _open(self.path, patience=0.0)
        self.watch.open(self.path)
        self.patiently(self._set_up)

    def _set_up(self) -> None:
        """Set what is set on our connection alone; the host's own settings stay as they are."""
        (mode,) = self.db.execute("PRAGMA journal_mode").fetchone()
        # Losing the last outcomes in a power cut repeats deliveries, which is allowed: the same id
        # and the same bytes. Not in rollback mode, where a power cut could damage the file then.
        if mode == "wal":
            self.db.execute("PRAGMA synchronous = NORMAL")

    def close(self) -> None:
        """Stop watching and close the connection; open() may come again."""
        self.watch.close()
        if self.db is not None:
            _close(self.db, self.path)

    def check(self) -> None:
        """Touch the file no more, not even to close it, once another SQLite library was loaded
        here: raise OutboxError. What is not recorded is sent again by the next drain."""
        if not _alone(self.path):
            self.db = None  # type: ignore[assignment]  # _Process keeps it
            _check_alone(self.path)

    def replaced(self) -> bool:
        """Say whether the file at our path is another one than we opened, or gone: a restore of a
        backup, say. Then what is in memory is not about the file there."""
        return _file_id(self.path) != self.identity

    def patiently(self, read: Callable[[], Any]) -> Any:
        """Read outside the loop's rhythm, where waiting for a lock is fine: about five seconds,
        then the error passes. Our connection itself does not wait (patience 0), for in the loop a
        wait would hold up every endpoint."""
        for _ in range(500):
            try:
                return read()
            except sqlite3.OperationalError as error:
                if not _is_busy(error):
                    raise
                time.sleep(0.01)
        return read()

    def park(self) -> None:
        """Have the file closed before a fork, in the thread that forks."""
        with self._changed:
            self.forks += 1
            if threading.get_ident() == self._owner:  # a callback of the host's forks
                self.close()
            else:
                self._ring()
                self._changed.wait_for(lambda: self._parked, 5.0)

    def unpark(self) -> None:
        """Have it open again after the fork, in the parent; while other threads are forking too,
        the last of them does that."""
        with self._changed:
            self.forks -= 1
            self._changed.notify_all()
            if self.forks:
                return
        if threading.get_ident() == self._owner:
            self.open()

    def let_fork(self) -> bool:
        """Stand aside while a thread forks, in the loop; return True when the file was opened anew,
        after which everything has to be looked at again."""
        if not self.forks:
            return False
        self.close()
        with self._changed:
            self._parked = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self.forks, 60.0)
            self._parked = False
        self.open()
        return True

    def forked(self) -> bool:
        """Say whether this is a child's copy: nothing in it may be used or closed."""
        return os.getpid() != self._pid

    def leave(self) -> None:
        """Close for good. Whoever waits in park(), now or later, goes on at once."""
        self.close()
        with self._changed:
            self._parked = True
            self._changed.notify_all()


# ── drain: its rooms ──────────────────────────────────────────────────────────────────────────────
# The drain is one loop in one thread (the next section). It calls the classes of this section, its
# rooms. Each room owns one thing, says what always holds of it, and knows nothing of the loop.
#
# The way of a delivery, which is also the order in which one turn of the loop calls the rooms:
#
#     1  wait     _Carrier   sleeps until a socket, the bell or a time wakes it; reads and sends
#     2  poll     _Watch     has anybody committed since the last look at the file?
#     3  end      _Outcomes  of attempts that ended: what becomes of the delivery and its endpoint;
#                            the rows that say so go to the _Ledger
#     4  find     _Finder    which endpoints have something to send? Each has a _Lane, which the
#                            _Schedule puts in a round (now) or on an agenda (later)
#     5  start    _Places    who may begin an attempt? The lane's _Backlog gives its next delivery,
#                            and _Carrier.begin() writes the request and finds a connection
#     6  chores   _Carrier   every 25 ms while it sends: timeouts, idle connections, retention
#     7  flush    _Exchanges sends the requests of step 5
#     8  record   _Ledger    writes what waits in it, in one statement, when the _Budget allows it
#     9  finish   _Drain     is there a reason to leave the loop?
#
# What each room owns, from the bottom up, and what is always true of it:
#
#     _Agenda     when a key comes up          a key has one time at most
#     _Health     an endpoint's failures       failures is 0 exactly when failing_since is None
#     _Backlog    what was read ahead          every delivery that is read, under way or not yet
#                                              recorded is in `known`, and so is not read again
#     _Lane       an endpoint with work        `active` is the number of its attempts under way
#     _Turns      who is next, by rank         a lane stands in one round at most
#     _Origin     connections to one origin    `open` counts them, the idle ones too
#     _Openers    threads for what may block   an errand is in the hands of one thread, or of the
#                                              loop, never of both
#     _Exchanges  sockets that never block     a connection carries one attempt at most
#     _Ledger     what the file lacks          a row leaves memory after its statement committed
#     _Budget     the distance of commits      -
#     _Teller     the observer's thread        it hears of nothing that is not in the file
#     _Carrier    attempts under way           what begin() was given, ended() returns exactly once
#     _Schedule   where a lane waits           a lane that is full or parked waits nowhere: the end
#                                              of an attempt, a request that a thread has made, or
#                                              a connection brings it back
#     _Places     the places, `workers`        no more attempts are under way than there are places
#     _Finder     the lanes, the file's news   an endpoint has one lane at most
#     _Outcomes   what an outcome means        an outcome is in the ledger until it is recorded
#
# Threads: all of this belongs to the loop's thread, so most of it needs no lock. What other threads
# touch is little. The threads of _Openers each own one errand, which they give back under a lock.
# The observer's thread gets notices through a SimpleQueue. Any thread, and a signal handler, may
# call stop() and wake() of the loop, which ring its bell. A thread that forks and the loop wait for
# each other in _DrainFile.

# When many attempts begin in one turn, their requests are sent in groups of so many. Sent one by
# one, each would wake the receiver for itself; all at the end, receivers would be idle till then.
_TOGETHER = 8
_OPENERS = 16  # threads that open connections or run the host's transforms at once, in all
# The same for one origin or one endpoint: receivers that cannot be reached hold each thread until
# the connect timeout, and would fill all sixteen.
_OPENERS_EACH = 2
_OPENER_RESTS = 0.5  # seconds that a thread waits for more work before it ends
_PROVEN = 600.0  # seconds after a success in which an endpoint counts as one that answers
# Seconds for which the attempts of a quick endpoint hold their places on average, at the most.
_QUICK = 1.0
# An endpoint is steady after so many quick answers in a row, with at most so many seconds from each
# to the next, and from the last one to now.
_STEADY = 3, 10.0
_FIRST_LIMIT = 8  # attempts at once to an endpoint that nothing is known about
# So many notices may wait for the observer, and as many again of the seldom ones: see _Teller. They
# are a few megabytes. What one commit tells of is at most 2,000 outcomes and what they led to, so
# an observer that keeps up on average misses nothing.
_UNOBSERVED = 10_000
_EACH_ATTEMPT = ("delivered", "attempt_failed")  # kinds of which each attempt brings one
_UNRECORDED = 2_000  # outcomes that may wait for the write lock; with more, nothing is started
# The last eighth of that is kept for endpoints of which at most so many deliveries are known: read,
# under way or unrecorded. One with a backlog has more. Beside a host that writes, our commits take
# 2,500 outcomes a second. Endpoints with backlogs bring more, and without this the others waited
# with them for half of each gap between two commits (p50 0.15 s).
_LITTLE = 16
# Upper bounds in seconds, from emit to success, of the histogram that metrics() prints.
_BUCKETS = tuple(map(float, "0.01 0.05 0.1 0.5 1 5 30 60 300 3600 21600 86400 inf".split()))
_BUCKET_NAMES = tuple(f"le {bound:g}" for bound in _BUCKETS)
_GAP = 3_600.0  # seconds without an attempt, from which on they do not count as failing
# Of the kinds of notices that the observer gets, those that are events too, and their types.
_NOTICE_TYPES = {
    "gave_up": "webhook.delivery.failed",
    "failing": "webhook.endpoint.failing",
    "recovered": "webhook.endpoint.recovered",
    "disabled": "webhook.endpoint.disabled",
}


class _Paced:
    """Work that may take a share of the loop's time, because its cost grows with the tables.

    After each time that it was done it rests `rest` times as long as that took: with 4 it takes a
    fifth of the time at most. It rests `least` seconds at least. What counts is the CPU time of our
    thread, not the time that passed: a host that computes in another thread keeps ours waiting for
    the interpreter lock, and that is no work of ours.
    """

    __slots__ = ("at", "least", "rest")

    def __init__(self, rest: float, least: float = 0.0) -> None:
        self.rest, self.least, self.at = rest, least, 0.0  # at, monotonic: not before

    def due(self, mono: float) -> bool:
        return mono >= self.at

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Do the work in this context; it is measured, and the next time is set."""
        begun = time.thread_time()
        try:
            yield
        finally:
            self.at = _monotonic() + max(self.least, self.rest * (time.thread_time() - begun))


class _Agenda:
    """What is to be looked at, and when: one time for each key, in any clock that its owner uses.

    Ten thousand endpoints may wait for a retry. So that a turn costs only what is due in it, the
    times are in a heap (heapq: the earliest is first). An entry in the middle of a heap cannot be
    changed or removed cheaply, so it stays when its key gets another time or is dropped. The
    dictionary is the truth: an entry of the heap whose time differs from it is a leftover, which
    is thrown away when it comes up.
    """

    __slots__ = ("_heap", "_times")

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._times)

    def set(self, key: str, when: float) -> None:
        """Have key come up at `when`, and at no other time."""
        if self._times.get(key) != when:
            self._times[key] = when
            heapq.heappush(self._heap, (when, key))
            # A key that is set again and again leaves an entry each time. Where most of the heap is
            # leftovers, it is made anew; else it would grow without end.
            if len(self._heap) > 64 + 4 * len(self._times):
                self._heap = [(when, key) for key, when in self._times.items()]
                heapq.heapify(self._heap)

    def at_latest(self, key: str, when: float) -> None:
        """Have key come up at `when`, unless it does so earlier."""
        if when < self._times.get(key, math.inf):
            self.set(key, when)

    def drop(self, key: str) -> None:
        self._times.pop(key, None)

    def next(self) -> float:
        """Return the earliest time, inf when there is none."""
        while self._heap and self._times.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def due(self, now: float) -> list[str]:
        """Return the keys whose time has come, and forget them."""
        keys = []
        while self.next() <= now:
            key = heapq.heappop(self._heap)[1]
            del self._times[key]
            keys.append(key)
        return keys


class _Health(NamedTuple):
    """What is remembered of an endpoint's attempts. A value: after() returns the next one.

    failures is 0 exactly when failing_since is None. Most of it is in the endpoint's row too, and
    so survives a restart of the drain.

    An endpoint that answers one request of nine never fails for long without a break, and yet is of
    no use to anybody. So there are two accounts. failures and failing_since are about the failures
    since its last success. unsteady_since, good and bad are about everything since it last had ten
    successes in a row.
    """

    failures: int = 0  # in a row, up to now
    failing_since: float | None = None  # wall clock: the first of them
    # Wall clock: no attempt before it, because the receiver asked for that (Retry-After) or failed
    # ten times in a row.
    paused_until: float = 0.0
    hinted_until: float = 0.0  # wall clock: what of it the receiver asked for; not in the row
    # Wall clock: the first failure since ten successes in a row; None: there was none.
    unsteady_since: float | None = None
    good: int = 0  # attempts since unsteady_since that succeeded
    bad: int = 0  # and those that failed
    in_a_row: int = 0  # successes up to now, while unsteady; not in the row

    def after(self, outcome: _Outcome, now: float, policy: RetryPolicy) -> _Health:
        """Return the health after one more outcome.

        A success ends the failures in a row, and the pauses between probes with them. A pause that
        the receiver asked for stays: several attempts are under way at once, and this success may
        have been answered before the 429 that asked.
        """
        if outcome.reason is None:
            well = _Health(0, None, min(self.paused_until, self.hinted_until), self.hinted_until)
            if self.unsteady_since is None or self.in_a_row + 1 >= _STEADY_AGAIN:
                return well
            return well._replace(
                unsteady_since=self.unsteady_since,
                good=self.good + 1,
                bad=self.bad,
                in_a_row=self.in_a_row + 1,
            )
        failures = self.failures + 1
        since = now if self.failing_since is None else min(self.failing_since, now)
        hinted = max(self.hinted_until, now + (outcome.hint or 0.0))
        pause = max(outcome.hint or 0.0, policy.probe_pause(failures))
        paused = max(self.paused_until, now + pause) if pause else self.paused_until
        unsteady = now if self.unsteady_since is None else min(self.unsteady_since, now)
        return _Health(failures, since, paused, hinted, unsteady, self.good, self.bad + 1)

    def after_gap(self, seconds: float) -> _Health:
        """Return the health after so many seconds in which nobody tried: no drain ran, say. They do
        not count as failing: time alone neither expires a delivery nor disables an endpoint."""
        since, unsteady = self.failing_since, self.unsteady_since
        return self._replace(
            failing_since=None if since is None else since + seconds,
            unsteady_since=None if unsteady is None else unsteady + seconds,
        )

    def failing(self, now: float) -> bool:
        """Say whether it failed so often or for so long that people want to know."""
        often, long = _FAILING
        return self.failing_since is not None and (
            self.failures >= often or now - self.failing_since >= long
        )

    def hopeless(self, now: float) -> tuple[float, str] | None:
        """Return since when hardly anything came through, and why an endpoint is to be disabled
        for that; None where it is not.

        It is so when it has failed for five days without a break; or when it has been unsteady for
        five days, and three of four attempts failed in that time, at least twenty in all.
        """
        patience, _ = _HOPELESS
        if self.failing_since is not None and now - self.failing_since >= patience:
            return self.failing_since, _NO_SUCCESS
        if self.unsteady_since is None or now - self.unsteady_since < patience:
            return None
        mostly = self.bad >= max(20, 3 * self.good)
        return (self.unsteady_since, _HARDLY_ANY) if mostly else None

    def stored(self) -> tuple[Any, ...]:
        """Return what the endpoint's row must say soon. The counts of good and bad attempts are
        left out: else each success of an unsteady endpoint would write its row. They are written
        whenever one of these changes, at the next failure at the latest."""
        return self.failures, self.failing_since, self.paused_until, self.unsteady_since


# The health of most endpoints at most times. It is then this very object, so that `is` tells at no
# cost that there is nothing to do.
_WELL = _Health()


def _is_over(since: float, failing_since: float | None, policy: RetryPolicy, now: float) -> bool:
    """Say whether a delivery has expired: its endpoint has failed without a break for as long as
    the policy's delays take in all, counted from `since`. That is the delivery's first attempt, or
    when it was due where it had none. Time alone expires nothing: see _Health.after_gap."""
    return failing_since is not None and 0 < policy.window <= now - max(since, failing_since)


def _verdict(
    attempts: int,
    first_at: float,
    failing_since: float | None,
    outcome: _Outcome,
    policy: RetryPolicy,
    now: float,
    rng: Callable[[], float],
) -> tuple[str, float, str | None]:
    """Return status, due time and reason of a delivery after its `attempts`-th attempt.

    1. a 2xx: delivered
    2. 410 Gone, or the receiver asked to give this one up: failed
    3. no attempt is left in the policy: failed
    4. expired: failed, see _is_over. first_at: the delivery's first attempt
    5. else pending, until the policy's delay has passed and the receiver's Retry-After
    """
    if outcome.reason is None:
        return "delivered", now, None
    if outcome.reason in ("gone", "aborted"):
        return "failed", now, outcome.reason
    wait = policy.wait(attempts, outcome.overloaded, rng)
    if wait is None:
        return "failed", now, outcome.reason
    if _is_over(first_at, failing_since, policy, now):
        return "failed", now, "expired"
    return "pending", now + max(wait, outcome.hint or 0.0), outcome.reason


class _Backlog:
    """Deliveries of one endpoint that were read ahead, in the order in which they will be tried.

    Up to 128 deliveries are read at a time, because a query costs more than a row. The file says
    pending of each until its outcome is recorded, so reading again would find it again. `known` has
    the events that must not be taken from the file once more: those read, those under way, and
    those whose outcome is in the ledger. A delivery leaves it when its outcome is recorded, or when
    what was read is forgotten (reread, leave).

    Reading goes on behind the last row read (`after`, in the order of due time and event), so that
    a row is not read twice. A delivery that turns up before that place, or behind it after all was
    read, must be announced: appeared().

    A queue (deliveries with one key, or all of an ordered endpoint) goes out one after the other.
    The file calls the oldest open one `pending`, that is the head, and those behind it `queued`;
    when the outcome of the head is recorded, a trigger makes the next one the head. A queue that
    waited for that would wait for the disk after each delivery. So after a success it goes on from
    memory, and the outcomes follow into the file in the same order. The states of a queue, and what
    the file holds meanwhile:

        state       here                                the file
        at rest     nothing of it is known              the head is pending, or there is none
        up          its next one is in `read`           that one is pending; if the queue went on
                                                        from memory, queued
        under way   its next one is being tried; what   that one is what it was when it came up
                    was read behind it is in `queues`
        at its end  the last one, in `ends`, was        that one is what it was: its success is not
                    delivered; none behind it is due    recorded. An event that comes now is queued
        left        the last one is in `known` alone    that one is what it was, until its outcome
                                                        is recorded
        held        nothing of it is known              the head is failed, and the endpoint's
                                                        on_dead is hold: those behind stay queued

        at rest    ──> up          take() read it from the file
        up         ──> under way   take() gave it away
        under way  ──> up          put_back(): it was not tried; or follow(): it was delivered, and
                                   the next one is there
        under way  ──> at its end  follow(): it was delivered, and no other is due
        under way  ──> left        leave(): it failed, or too much is unrecorded, or the file
                                   changed so that the file has to say who is next
        at its end ──> up          follow(), called by the finder that read a new event
        at its end, left ──> at rest, held    recorded(); who is next is pending in the file now
        held       ──> at rest     somebody replays or discards the failed row, or ends on_dead
        up, at its end ──> at rest or left    reread(): the file changed

    After a crash the file says which ones were recorded, and the rest goes out again, in order.
    """

    __slots__ = ("after", "doubtful", "due", "ends", "id", "known", "queues", "read")
    _START = (-math.inf, 0)

    def __init__(self, id: str) -> None:
        """Begin with nothing to read; appeared() says that there is something."""
        self.id = id  # the endpoint's
        self.read: collections.deque[_Picked] = collections.deque()  # read and not given out
        self.known: set[int] = set()  # events; see above
        # Wall clock: when reading makes sense again. -inf: now; inf: when something appears.
        self.due = math.inf
        self.after: tuple[float, int] = self._START  # due time and event of the last row read
        # By the queue's name: what was read behind the one that is up or under way.
        self.queues: dict[str, collections.deque[_Picked]] = {}
        # By the queue's name: the last event, where all that was due is delivered and unrecorded.
        self.ends: dict[str, int] = {}
        # Those of the known for which the file may have changed since they were read (a delivery
        # was replayed, say): the queue does not go on from memory behind them.
        self.doubtful: set[int] = set()

    def when(self) -> float:
        """Return the time of the wall clock from which there is something to try, or to read."""
        return -math.inf if self.read else self.due

    def appeared(self, due_at: float, event: int = 0) -> None:
        """Note that a delivery has become due, or will be; event 0: which one is not known."""
        if (due_at, event) <= self.after:
            self.after = self._START
        self.due = min(self.due, due_at)

    def take(self, db: sqlite3.Connection, now: float, most: int = _READ_AHEAD) -> _Picked | None:
        """Return the next delivery to try, read from the file where none is left here; None where
        none is due. It stays known. most: characters of data to read ahead."""
        while not self.read and self.due <= now:
            rows, self.due = _pick(db, self.id, now, self.after, most)
            if rows:
                self.after = rows[-1].due_at, rows[-1].event
            fresh = [row for row in rows if row.event not in self.known]
            self.read.extend(fresh)
            self.known.update([row.event for row in fresh])
        if not self.read:
            return None
        picked = self.read.popleft()
        if picked.data is not None:
            return picked
        try:  # a large one, whose data was not read ahead
            return _with_data(db, picked)
        except sqlite3.Error:
            self.read.appendleft(picked)
            raise

    def put_back(self, picked: _Picked) -> None:
        """Take back a delivery that was not tried: it goes first again. Large data is read anew
        then, so that many that wait do not hold it. Where the file may have changed while it was
        under way (it was cancelled, say), it is forgotten, and the file is asked."""
        if picked.event in self.doubtful:
            self.recorded(picked.event, None)
            if picked.queue is not None:
                self.leave(picked.queue)
            return self.appeared(-math.inf)
        if picked.data is not None and len(picked.data) > _LARGE:
            picked = picked._replace(data=None, valid=None)
        self.read.appendleft(picked)

    def follow(self, db: sqlite3.Connection, queue: str, event: int, now: float) -> None:
        """Bring up what comes after a delivered event of a queue, before anything else that was
        read.

        1. the file may have changed since the event was read: leave it to the file
        2. the next one was read already: it is up
        3. else the file is read behind the event, up to the first row that is known already. Such a
           row is being tried or unrecorded (only a change by hand can bring that about): it must
           not go out twice, and nothing may overtake it. Where it is the first, the queue is left
        4. nothing is due behind it: the queue is at its end
        """
        if event in self.doubtful:
            return self.leave(queue)
        behind = self.queues.get(queue)
        if not behind:
            rows = _pick_queue(db, self.id, queue, event, now)
            fresh = list(itertools.takewhile(lambda row: row.event not in self.known, rows))
            if rows and not fresh:
                return self.leave(queue)
            self.known.update([row.event for row in fresh])
            behind = self.queues[queue] = collections.deque(fresh)
        if behind:
            self.ends.pop(queue, None)
            self.read.appendleft(behind.popleft())
        else:
            del self.queues[queue]
            self.ends[queue] = event

    def leave(self, queue: str) -> None:
        """Forget what was read along a queue: after a failure, say, the file has to say who is
        next. The last one that was tried stays known until its outcome is recorded."""
        self.known.difference_update([row.event for row in self.queues.pop(queue, ())])
        self.ends.pop(queue, None)

    def recorded(self, event: int, queue: str | None) -> None:
        """Note that an outcome is in the file: it tells the truth about that delivery again."""
        self.known.discard(event)
        self.doubtful.discard(event)
        if queue is not None and self.ends.get(queue) == event:
            del self.ends[queue]

    def reread(self, queues_only: bool = False) -> None:
        """Forget what was read and not tried, because the file changed: all of it, or what is in
        queues. What stays known is under way or unrecorded; all of that is doubtful now. Reading
        begins at the start again, once `due` allows it."""
        for name in list(self.queues):
            self.leave(name)
        self.ends.clear()
        kept = [row for row in self.read if queues_only and row.queue is None]
        self.known.difference_update([row.event for row in self.read])
        self.doubtful = set(self.known)
        self.known.update([row.event for row in kept])
        self.read = collections.deque(kept)
        self.after = self._START

    def recalled(self) -> None:
        """Read again what was read and not tried: some of it may be cancelled. Called after any
        cancel in the file, for each lane, so one that read nothing ahead reads nothing now; what it
        has under way is doubtful all the same, for it may come back untried."""
        if self.read or self.queues or self.ends:
            self.reread()
            self.appeared(-math.inf)
        else:
            self.doubtful |= self.known


class _Lane:
    """One endpoint that has work, or had some lately: what the drain knows of it.

    A lane is made when its endpoint has a delivery that is due, and forgotten when there is nothing
    to do and there are many (_Finder). So what is registered costs nothing, and all that must
    survive stands in the endpoint's row.

    Three questions are answered here. May one more attempt start, as far as this endpoint alone is
    concerned (may_start)? It may, if the endpoint is enabled, has something to send, is not paused,
    stays within its rate, and has fewer attempts under way than `limit`. How trusted is it (rank)?
    What was learned from an outcome (learn)?

    `limit` is what the receiver seems to bear: one more after each success, up to the endpoint's
    max_in_flight, and half after a timeout, 429 or 5xx. A lane that is not enabled starts nothing,
    and stays only until what it had under way is recorded.
    """

    __slots__ = (
        "active", "answered_at", "backlog", "broken", "disable", "enabled", "endpoint", "health",
        "id", "limit", "lost", "making", "next_slot", "occupies", "proven_until", "registered",
        "round", "streak", "tell_at", "told", "tried_at", "usual", "wire",
    )  # fmt: skip

    def __init__(self, id: str) -> None:
        """Begin with nothing known; configure() takes over what the endpoint's row says."""
        self.id = id
        self.endpoint = Endpoint(id, "")
        self.registered = 0  # as the row says; 0: the endpoint was removed
        self.enabled = True
        self.wire: _Wire | None = None
        self.broken: BaseException | None = None  # why there is no wire: each attempt fails with it
        self.backlog = _Backlog(id)
        self.health = _Health()
        # Attempts under way. Up in _Carrier.begin, down in _Carrier._finish, nowhere else.
        self.active = 0
        self.making = 0  # of these: whose request a thread makes
        # Threads that are past their time in the host's code, or at a secret's file. They cannot be
        # stopped; while there are two of them, attempts of this endpoint fail at once.
        self.lost = 0
        self.limit = float(_FIRST_LIMIT)
        self.round: int | None = None  # the rank in whose round it stands; None: in none
        self.next_slot = 0.0  # monotonic: from when the endpoint's rate allows an attempt
        self.tried_at = 0.0  # wall clock: when its newest attempt began, by this drain or another
        self.proven_until = 0.0  # monotonic: until then it is known to answer; a timeout ends it
        self.occupies = 0.0  # seconds that its attempts lately held their places, on average
        self.answered_at = -math.inf  # monotonic: the last success
        self.streak = 0  # quick answers in a row that came within ten seconds of each other
        self.usual = 0.0  # seconds that an answer takes, on average; 0: not known
        self.disable: str | None = None  # why it is to be disabled, until that is recorded
        # The observer was told that it is failing, and is to be told when it recovers.
        self.told = False
        self.tell_at = 0.0  # monotonic: no notice that it is failing before

    def configure(self, row: _EndpointRow, settings: _Settings, mono: float) -> None:
        """Take over what the endpoint's row says. Where that is useless (a transform that is not
        known here, a damaged row), each attempt fails, and is made again as the policy says:
        somebody may mend it meanwhile."""
        try:
            if isinstance(row.endpoint, str):
                raise _Unready("the endpoint's row is damaged; update or remove the endpoint")
            self.endpoint = row.endpoint
            self.wire, self.broken = _Wire.make(row.endpoint, row.secrets, settings), None
        except Exception as error:
            self.wire, self.broken = None, error
        self.registered = row.registered
        self.limit = min(self.limit, self.endpoint.max_in_flight)
        # This may be a new lane, or a new drain: one before it may have used the rate's slot of
        # this moment, so the first attempt waits for the next.
        if self.endpoint.rate:
            self.next_slot = min(self.next_slot or math.inf, mono + 1 / self.endpoint.rate)
        else:
            self.next_slot = 0.0

    def note_gap(self, due_at: float, now: float, policy: RetryPolicy) -> None:
        """Where nobody tried this endpoint for long, though a delivery was due at `due_at` and no
        pause kept it back, take that time out of its health: no drain ran, the machine slept, or
        the file was locked. Called when an attempt begins.

        Long is an hour, or half of a policy that takes less than two in all: cron may start a drain
        every few minutes, and what fails each time is failing all the time.
        """
        if self.health is not _WELL:
            gap = now - max(due_at, self.health.paused_until, self.tried_at)
            gap -= 1 / self.endpoint.rate if self.endpoint.rate else 0.0
            if gap > min(_GAP, policy.window / 2 or _GAP):
                self.health = self.health.after_gap(gap)
        self.tried_at = now

    def is_at(self, wire: _Wire | None) -> bool:
        """Say whether requests that `wire` writes go to the endpoint's URL as it is now."""
        return wire is None or wire.endpoint.url == self.endpoint.url

    def full(self) -> bool:
        """Say whether something of its own must end before one more may begin: an attempt, where as
        many are under way as `limit` says; or, where two threads make its requests (one, while
        another is stuck), one of those. While it struggles (ten failures in a row), one attempt at
        a time finds out whether it is well again."""
        most = 1 if self.health.failures >= _STRUGGLING else self.limit
        return self.active + 1 > most or self.making + bool(self.lost) >= _OPENERS_EACH

    def may_start(self, now: float, mono: float) -> bool:
        """Say whether one more attempt may start now, as far as this endpoint alone is
        concerned."""
        return (
            self.enabled
            and not self.full()
            and self.backlog.when() <= now
            and self.health.paused_until <= now
            and self.next_slot <= mono
        )

    def quick(self, mono: float) -> bool:
        """Say whether it answered lately, and its attempts hold their places for a second at
        most, on average."""
        return self.proven_until > mono and self.occupies <= _QUICK

    def steady(self, mono: float) -> bool:
        """Say whether it is quick right now: it answered several times in a row, a moment ago."""
        answers, seconds = _STEADY
        return self.streak >= answers and mono - self.answered_at <= seconds

    def rank(self, mono: float) -> int:
        """Return in which round it takes its turns: 0 for a quick endpoint; 1 where nothing is
        known, so that its first attempt will find out; 2 for one that is slow, or failing, or whose
        first attempt is under way. What the ranks get: see _Places."""
        if self.quick(mono):
            return 0
        untried = self.health.failing_since is None and self.occupies <= _QUICK and not self.active
        return 1 if untried else 2

    def occupied(self, seconds: float, ended: bool = True) -> None:
        """Note how long an attempt has held its place, and what reading its answer counts for; it
        may be still under way. The average rises by a quarter and falls by half, so that a receiver
        that hangs at every second request stays slow, and one that hung once is quick again after
        two or three answers."""
        if seconds > _QUICK:
            self.streak = 0
        if not ended:
            self.occupies = max(self.occupies, seconds)
        else:
            self.occupies += (seconds - self.occupies) / (4 if seconds > self.occupies else 2)

    def take_slot(self, mono: float) -> None:
        """Use the rate's slot for an attempt that begins, and say when the next one is."""
        if self.endpoint.rate:  # a late loop may catch up on 50 ms, so that the average is exact
            self.next_slot = max(self.next_slot, mono - 0.05) + 1 / self.endpoint.rate

    def learn(self, outcome: _Outcome, now: float, mono: float, policy: RetryPolicy) -> str | None:
        """Adapt to an outcome; return "failing" or "recovered" when that is to be told.

        1. the receiver wants no more: 410, or the header webhook-delivery: disable
        2. health: failures in a row, pauses
        3. a success: the limit goes up, it counts as proven for ten minutes, and as steady if such
           answers come close together; an overload or a 5xx: the limit is halved
        4. a timeout: it is not proven any more
        """
        if outcome.disable:
            self.disable, self.enabled = _GONE if outcome.status_code == 410 else _ASKED, False
        if outcome.reason is not None or self.health is not _WELL:
            after = self.health.after(outcome, now, policy)
            self.health = _WELL if after == _WELL else after
        if outcome.reason is None:
            self.streak = self.streak + 1 if mono - self.answered_at <= _STEADY[1] else 1
            self.answered_at, self.proven_until = mono, mono + _PROVEN
            if self.limit < self.endpoint.max_in_flight:
                self.limit = min(self.limit + 1, self.endpoint.max_in_flight)
        elif outcome.overloaded or (outcome.status_code or 0) >= 500:
            self.limit = max(1.0, self.limit / 2)
        if outcome.reason is not None:
            self.streak = 0
        if outcome.reason == "timeout":
            self.proven_until = 0.0
        return self._news(now, mono)

    def _news(self, now: float, mono: float) -> str | None:
        """Return failing or recovered, where that is to be told. An endpoint that answers and fails
        in turn would be told of with each answer: so it must have failed three times in a row or
        for a minute, and there is one pair of notices in ten minutes at most."""
        if self.health.failing_since is None:
            told, self.told = self.told, False
            return "recovered" if told else None
        if self.told or mono < self.tell_at or not self.health.failing(now):
            return None
        self.told, self.tell_at = True, mono + _TELL_AGAIN
        return "failing"


class _Turns:
    """Whose turn it is: a round for each rank, in which the lanes that could start an attempt at
    once take turns. A lane stands in one round at most, and joins at the end.

    A round is an OrderedDict used as a set in order: a lane that stands in it costs nothing until
    its turn comes, and may leave from the middle at the same cost as from the front.
    """

    __slots__ = ("rounds",)

    def __init__(self) -> None:
        self.rounds: tuple[collections.OrderedDict[_Lane, None], ...] = tuple(
            collections.OrderedDict() for _ in range(3)
        )

    def __bool__(self) -> bool:
        return any(self.rounds)

    def join(self, lane: _Lane, rank: int) -> None:
        """Have a lane wait for its turn in the round of its rank. Where it stands there already, it
        keeps its turn."""
        if lane.round != rank:
            self.leave(lane)
            self.rounds[rank][lane], lane.round = None, rank

    def leave(self, lane: _Lane) -> None:
        if lane.round is not None:
            del self.rounds[lane.round][lane]
            lane.round = None


_NOTHING = memoryview(b"")
# Numbers of _Origin, which tells how it deals with a receiver that has fewer workers than we have
# connections. All in seconds. They trade how soon such a receiver is noticed against how often one
# that is merely slow is taken for one.
#
# Of two connections opened so soon after each other nobody knows which one reached the receiver
# first.
_ORDER_KNOWN = 0.1
# An attempt that has waited so long for the first byte of its answer has other connections make
# room. When it has waited as long again, and room did not help, it counts as one that hangs.
_CROWDED = 1.0
_ROOM_HELPS = 0.25  # an answer so soon after room was made proves that room was lacking
_CROWDED_FOR = 30.0  # the origin then gets no more connections than brought answers, for so long
# Not of _Origin: seconds that an endpoint rests when its name could not be looked up, because as
# many lookups as there may be are under way. That is no failure of the receiver's.
_ROOM_MAY_COME = 0.5


@dataclasses.dataclass(slots=True, eq=False)
class _Connection:
    """A connection to a receiver, idle at its origin or carrying one attempt. Only the loop's
    thread touches it; while it exists, the selector watches it for something to read."""

    sock: _Stream
    origin: _Origin
    attempt: _Attempt | None = None  # None: it is idle
    answer: _Answer = dataclasses.field(default_factory=_Answer)  # to that attempt, so far
    out: memoryview = _NOTHING  # what of the request is still to be sent
    # Sending or reading failed with it. An answer may have come before that, so reading goes on
    # until there is nothing more.
    failed: OSError | None = None
    writing: bool = False  # the selector watches for room to write, too
    used: bool = False  # it was idle before, so the receiver may have closed it meanwhile
    proven: bool = False  # has brought an answer
    # The exchange has ended, and the carrier has not decided yet whether to keep the connection.
    ended: bool = False
    since: float = 0.0  # monotonic: when it became idle, or was given its attempt
    opened: float = dataclasses.field(default_factory=_monotonic)  # monotonic


@dataclasses.dataclass(slots=True, eq=False)
class _Attempt:
    """One try under way. Its steps:

        making ──> waiting ──> exchanging ──> ended
                      ^             │           ^
                      └─────────────┘           │
        calling ────────────────────────────────┘

    The way back, from exchanging to waiting, is taken once at most: the connection had been kept
    alive and turned out to be dead.

    making      a thread makes the request, since the host's transform, or a file that holds the
                secret, may block; the thread reads the attempt and changes nothing of it
    waiting     it waits for a connection: one that becomes idle at its origin, or that a thread
                opens for it (`opening`), whichever is first
    exchanging  a connection carries it: the request is sent and the answer read
    calling     a thread calls a sender of the host's, instead of all this
    ended       it has an outcome, or came back untried. A thread may still be busy with it; what
                that one brings is thrown away

    Every step may end it: making and calling when the host's code raises, waiting when no
    connection can be opened, exchanging with the answer; and each of them when its time is over.
    Where a thread is needed it begins with making or calling, else with waiting.
    """

    lane: _Lane
    # Of the endpoint's row as it was then: what was signed and where it goes belong together.
    wire: _Wire | None
    origin: _Origin | None
    picked: _Picked
    wall: float  # when it began, by the outbox's clock
    started: float  # the same, monotonic
    deadline: float  # monotonic
    step: str = "waiting"
    request: bytes | None = None  # None: not made yet
    hidden: Sequence[str] = ()  # what must not be stored of an answer or an error: secrets, say
    connection: _Connection | None = None  # that carries it
    opening: bool = False  # a thread opens a connection for it
    resent: bool = False  # its kept-alive connection turned out to be dead; this is the second try
    hangs: bool = False  # it takes long, and room that others made did not help
    look_at: float = 0.0  # monotonic: when the loop looks at it again, its deadline at the latest
    registered: int = 0  # the lane's when it began: for which endpoint of that id it is
    reading: float = 0.0  # seconds that reading its answer counts for, beside those that it took


class _Origin:
    """Connections to one origin. Two thousand customers may have their endpoints at one host: any
    of them may use an idle connection; each connection carries one attempt at a time.

    open counts the connections there are, idle ones too; proven those of them that have brought an
    answer; hanging those whose attempt takes far longer than usual; opening the threads that open
    one.

    A receiver may have fewer workers than we have connections (a single-threaded server, Apache's
    prefork with few processes). A worker stays with a connection until that is closed, even while
    it is idle, and requests on the others wait for a worker until their time is over: a timeout,
    and a duplicate when the worker comes to read the request after all. So an attempt that waits
    for its first byte for a second, and for twice as long as its endpoint usually takes, presses
    for room:

        patient ──> pressing    press(): it is on a connection that brought no answer yet, and there
                                are others. Of the idle ones those that brought no answer are closed
                                at once, and one that did; where none is idle, the next connection
                                that brings an answer is closed and not kept
        pressing ──> has room   closed(): one was closed, so a worker may be free
        has room ──> pressing   answered(): somebody who waited longer got that worker
        any ──> hangs           press(): its connection has a worker, is the only one, or room was
                                made and nothing came of it within a second: the endpoint is slow.
                                The connection counts as hanging, and stands in nobody's way
        any ──> (gone)          relax(): it ended

    When an answer comes within a quarter of a second after room was made, room was what lacked:
    for half a minute the origin gets no more connections than have brought an answer.

    Where no connection is idle and none may be opened, lanes of the origin are parked here instead
    of starting attempts that would only wait.
    """

    __slots__ = (
        "_limit", "_limit_until", "_newest", "_served_at", "forgotten", "hanging", "idle", "key",
        "open", "opening", "parked", "pressing", "proven", "waiting",
    )  # fmt: skip

    def __init__(self, key: _OriginKey) -> None:
        """Begin without connections."""
        self.key = key
        self.idle: list[_Connection] = []  # the one that was used last is used next
        self.open = self.proven = self.hanging = self.opening = 0
        self.waiting: dict[_Attempt, None] = {}  # in the step waiting, oldest first
        # Lanes that could start an attempt if there were a connection, by rank.
        self.parked: tuple[dict[_Lane, None], ...] = ({}, {}, {})
        # Attempts that press for room: when it was made (monotonic); None: not yet.
        self.pressing: dict[_Attempt, float | None] = {}
        # How many connections there may be, hanging ones apart, and until when (monotonic).
        self._limit, self._limit_until = (math.inf, -math.inf)
        self._served_at = -math.inf  # monotonic: when a new connection brought its first answer
        self._newest = -math.inf  # monotonic: when the newest one that did was opened
        self.forgotten = False  # another object stands for the origin by now

    def _most(self, mono: float) -> float:
        return self._limit if mono < self._limit_until else math.inf

    def has_room(self, mono: float) -> bool:
        """Say whether an attempt more would find a connection, or a thread to open one."""
        if self.idle:
            return True
        return (
            self.opening < _OPENERS_EACH
            and self.open - self.hanging + self.opening < self._most(mono)
        )

    def keeps(self, mono: float) -> bool:
        """Say whether a connection that has brought an answer may be kept; not while an attempt
        presses for room, or where there are more connections than the limit of a crowded
        receiver."""
        return None not in self.pressing.values() and self.open - self.hanging <= self._most(mono)

    def first_waiting(self) -> _Attempt:
        """Take the attempt that has waited longest."""
        attempt = next(iter(self.waiting))
        del self.waiting[attempt]
        return attempt

    def unused(self) -> bool:
        return not (self.open or self.opening or self.waiting or any(self.parked))

    def press(self, connection: _Connection, attempt: _Attempt, mono: float) -> bool:
        """Have another connection make room for an attempt that takes long; False where that does
        not help, was tried, or there is none: then it hangs.

        Workers take the oldest connection first. So its connection has a worker if it has brought
        an answer before, or if one that was opened later has.

        1. it pressed already, and others on new connections were served in the last second: they
           stood before it, so it waits on
        2. it has a worker, or pressed already in vain, or no other connection could make room: it
           hangs
        3. else it presses from now on
        """
        has_worker = connection.proven or self._newest > connection.opened + _ORDER_KNOWN
        if attempt in self.pressing and mono - self._served_at < _CROWDED and not has_worker:
            return True
        if has_worker or attempt in self.pressing or self.open - self.hanging < 2:
            self.relax(attempt)
            attempt.hangs = True
            self.hanging += 1
            return False
        self.pressing[attempt] = None
        return True

    def relax(self, attempt: _Attempt) -> None:
        """Forget that an attempt presses or hangs: it has ended, or is judged anew."""
        if self.pressing:
            self.pressing.pop(attempt, None)
        self.hanging -= attempt.hangs
        attempt.hangs = False

    def closed(self, connection: _Connection, mono: float) -> None:
        """Note that a connection was closed: that is room for the attempt that has pressed for the
        longest time and has none yet."""
        self.open -= 1
        self.proven -= connection.proven
        for attempt, at in self.pressing.items():
            if at is None:
                self.pressing[attempt] = mono
                break

    def answered(self, connection: _Connection, attempt: _Attempt, mono: float) -> None:
        """Learn from an answer, before its connection is kept or closed.

        1. it came right after room was made for it: connections are limited for a while
        2. its connection is proven: it has a worker
        3. how long the endpoint usually takes, a mean that falls fast and rises slowly. An answer
           that most likely had to wait for a worker is left out
        """
        made, lane = self.pressing.get(attempt), attempt.lane
        quick = 0 < lane.usual < _ROOM_HELPS  # else it may just take that long
        if quick and made is not None and mono - made <= _ROOM_HELPS:
            self._limit, self._limit_until = max(1, self.proven), mono + _CROWDED_FOR
        self.relax(attempt)
        took, waited = mono - connection.since, False
        if not connection.proven:
            waited = took >= _CROWDED and lane.usual > 0  # for a worker, most likely
            connection.proven, self.proven = True, self.proven + 1
            self._served_at, self._newest = mono, max(self._newest, connection.opened)
            # It stood before one that room was made for: that one needs it still.
            other = next((other for other, at in self.pressing.items() if at is not None), None)
            if made is None and other is not None:
                self.pressing[other] = None
        if not waited:
            lane.usual += (
                (took - lane.usual) / (8 if took > lane.usual else 2) if lane.usual else took
            )


class _Errand(NamedTuple):
    """What a thread does for an attempt: make its request, open a connection to its origin, or call
    its sender. It belongs to that thread until it stands in _Openers' list of those that are done;
    the thread changes nothing but `result`."""

    attempt: _Attempt
    does: str  # make, open or call
    result: list[Any]  # filled by the thread: [(request, hidden)], [socket], [None] or [exception]


class _Openers:
    """Threads that do what may block: open a connection (lookup, connect, TLS), make a request with
    the host's transform or a secret's file, or call a sender.

    The way of an errand. The loop gives it to submit(). `_errands` takes it to a thread that waits
    there, or a new thread begins with it. The thread owns it until it has put it into `_done`,
    under the lock, and rings the loop's bell. The loop takes it from there with take().

    `spare` is how many threads wait, less the errands that are on their way to them. So where it is
    above 0, a thread waits for this errand for sure; else one is started. A thread that has waited
    for half a second ends, but only if it can take itself off that count: at 0 an errand is on its
    way to it. While nothing is sent there is no thread at all.

    `busy` is how many errands are out. Two kinds are not counted: those that the loop gave up
    (their thread is stuck in the host's code, and may be for ever), and calls of senders: a call is
    the whole attempt, so calls are bounded as exchanges are, by the places.
    """

    __slots__ = (
        "_closed",
        "_done",
        "_errands",
        "_lock",
        "_open",
        "_ring",
        "busy",
        "spare",
        "starved_until",
    )

    def __init__(
        self, open: Callable[[_OriginKey, float], _Stream], ring: Callable[[], None]
    ) -> None:
        """open: opens a connection, for as long as a deadline allows; ring: wakes the loop."""
        self._open, self._ring = open, ring
        # Spare threads wait here; the loop wakes one with an errand, or with None to end it.
        self._errands: queue.SimpleQueue[_Errand | None] = queue.SimpleQueue()
        # Guards spare, _done and _closed. Whoever holds it, the loop or a thread, does so for a few
        # instructions, and waits for nothing meanwhile.
        self._lock = threading.Lock()
        self._done: list[_Errand] = []  # errands that the loop is to take
        self._closed = False  # nobody will take them: what is open in them is closed
        self.spare = 0
        self.busy = 0
        self.starved_until = 0.0  # monotonic: before it, no room for a thread or a connection

    def free(self, share: float, proven: int, mono: float) -> bool:
        """Say whether a rank may give out one more errand. share: of the openers, what its rank may
        hold; proven: how many errands are those of quick endpoints. These are not counted against
        the share of the others, who would otherwise wait until a backlog of the quick has ended."""
        return self.busy < min(_OPENERS, _OPENERS * share + proven) and self.starved_until <= mono

    def submit(self, errand: _Errand) -> None:
        """Give an errand to a thread. Where none waits and none can be started, raise one of
        _NO_THREAD; the errand is the caller's again then."""
        with self._lock:
            waits = self.spare > 0
            self.spare -= waits
        if waits:
            self._errands.put(errand)
        else:
            _start_thread(self._work, errand, name="webhook_outbox opener")
        self.busy += errand.does != "call"

    def _work(self, errand: _Errand | None) -> None:
        """Do errands until none has come for a while, or close(). What a thread runs."""
        while errand is not None:
            self._do(errand)
            with self._lock:
                if self._closed:
                    return
                self.spare += 1
            errand = self._wait()

    def _wait(self) -> _Errand | None:
        """Return the next errand; None: this thread is to end. It may do so only as one that is
        counted as spare: at 0 the loop has just given it an errand, which it takes."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._errands.get(timeout=_OPENER_RESTS)
            with self._lock:
                if self._closed:
                    return None
                if self.spare > 0:
                    self.spare -= 1
                    return None

    def _do(self, errand: _Errand) -> None:
        """Do one errand and hand it over, with what was made or with the exception. All of them are
        caught, SystemExit of the host's code too: else the attempt would never end."""
        attempt, wire = errand.attempt, errand.attempt.wire
        try:
            assert wire is not None
            result: Any = None
            if errand.does == "call":
                wire.deliver(attempt.picked)
            elif errand.does == "make":
                result = wire.request(attempt.picked, attempt.wall)
            else:
                result = self._open(wire.origin_key, attempt.deadline)
        except BaseException as error:
            result = error
        errand.result.append(result)
        with self._lock:
            if not self._closed:
                self._done.append(errand)
            elif isinstance(result, _Stream):
                result.close()
        self._ring()

    def take(self) -> list[_Errand]:
        """Return the errands that are done; they are the caller's now."""
        if not self._done:  # as most often; looked at without the lock, since a ring follows
            return []
        with self._lock:
            done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Have the threads end; connections that they bring back are closed. Nobody waits for them:
        one may be stuck in the host's code."""
        with self._lock:
            self._closed = True
            left, self._done = self._done, []
            for _ in range(self.spare):
                self._errands.put(None)
        for errand in left:
            if isinstance(errand.result[0], _Stream):
                errand.result[0].close()


class _Exchanges:
    """Sends requests and reads answers, on sockets that never block.

    One selector watches all sockets: those of connections, the bell, and what tells of writes to
    the file. wait() sleeps in it, does what is ready, and returns the exchanges that ended, each as
    (connection, attempt, what came of it):

        an _Answer     read whole, or as far as it came before the connection was closed
        an Exception   the connection broke before a status was read
        None           the connection had been kept idle and was dead: the attempt may be made once
                       more, on another one. This comes once for an attempt at most

    The connection is still open then, and in nobody's hands: the caller keeps it or shuts it.
    Knows no deadlines; its caller looks at those.
    """

    __slots__ = ("_ended", "_hints", "_unsent", "idle", "selector")

    def __init__(self) -> None:
        # What is registered is a connection, or a function to call, as `data` of its key.
        self.selector = selectors.DefaultSelector()
        self._hints: _Inotify | None = None  # what listen_to_hints registered
        self.idle: dict[_Connection, None] = {}  # of all origins, the longest idle one first
        self._unsent: list[_Connection] = []  # given an attempt, and not sent by flush() yet
        # What wait() will return next.
        self._ended: list[tuple[_Connection, _Attempt, _Answer | Exception | None]] = []

    def listen(self, sock: socket.socket, call: Callable[[], None]) -> None:
        """Have wait() call something when a socket of ours, which carries no attempts, is
        readable."""
        self.selector.register(sock, selectors.EVENT_READ, call)

    def listen_to_hints(self, source: _Inotify | None, call: Callable[[], None]) -> None:
        """The same for what tells of writes to the database; it is another object after each
        fork."""
        if source is not self._hints:
            if self._hints is not None:
                self.selector.unregister(self._hints)
            if source is not None:
                self.selector.register(source, selectors.EVENT_READ, call)
            self._hints = source

    def add(self, sock: _Stream, origin: _Origin) -> _Connection:
        """Take over a socket that was opened, as a connection of an origin that carries nothing
        yet."""
        connection = _Connection(sock, origin)
        self.selector.register(sock, selectors.EVENT_READ, connection)
        origin.open += 1
        return connection

    def begin(self, connection: _Connection, attempt: _Attempt, mono: float) -> None:
        """Have a connection carry an attempt; flush() sends it."""
        connection.attempt, attempt.connection, attempt.step = attempt, connection, "exchanging"
        # Something was read into this answer; one that is untouched serves again.
        if connection.answer.room < _READ_RESPONSE:
            connection.answer = _Answer()
        connection.ended, connection.since = False, mono
        connection.out = memoryview(attempt.request or b"")
        self._unsent.append(connection)
        if len(self._unsent) >= _TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Send what began, one right after the other: a receiver that is busy with the first is not
        woken for the second, and waking it costs more than the rest of send()."""
        unsent, self._unsent = self._unsent, []
        for connection in unsent:
            if connection.attempt is not None:
                self._send(connection)

    def wait(self, pause: float) -> list[tuple[_Connection, _Attempt, _Answer | Exception | None]]:
        """Sleep until something is ready, `pause` seconds at most; do it, and return what ended.

        Each socket gets one read. Answers of which nothing has come before are read at once: most
        are complete with that read. Those that have begun are read after them, for two milliseconds
        in all, so that many that are expensive to read keep nobody waiting. What is left is ready
        in the next turn again.
        """
        begun: list[_Connection] = []
        for key, mask in self.selector.select(0.0 if self._ended else pause):
            connection = key.data
            if not isinstance(connection, _Connection):
                connection()  # the bell, or the watch
            elif connection.ended:  # by what was read before in this turn
                continue
            elif mask & selectors.EVENT_WRITE and connection.writing:
                self._send(connection)
            elif connection.answer.room < _READ_RESPONSE:
                begun.append(connection)
            else:
                self._receive(connection)
        if begun:
            self._read_on(begun)
        ended, self._ended = self._ended, []
        return ended

    def _read_on(self, begun: list[_Connection]) -> None:
        """Read answers that have begun, those first that have cost the least, until the turn has
        taken its time."""
        end = time.thread_time() + _READ_TIME
        for connection in sorted(begun, key=lambda c: -c.answer.room):
            if not connection.ended:
                self._receive(connection)
            if time.thread_time() > end:
                return

    def _send(self, connection: _Connection) -> None:
        """Send what there is room for. The rest, or what TLS has made of it, waits until the
        selector says that there is room."""
        sock, blocked = connection.sock, False
        try:
            while connection.out:
                connection.out = connection.out[sock.send(connection.out) :]
            if isinstance(sock, _Tls) and sock.unsent:
                sock.flush()
        except BlockingIOError:
            blocked = True
        except ssl.SSLWantReadError:  # a new handshake, which the next read goes on with
            pass
        except OSError as error:
            # A receiver may have answered before it stopped reading: 413, say. Its answer is
            # looked for before the request, which may be large, goes out once more.
            connection.failed, connection.out = error, _NOTHING
            self._watch(connection, False)
            return self._receive(connection)
        if connection.writing != blocked:
            self._watch(connection, blocked)

    def _watch(self, connection: _Connection, writing: bool) -> None:
        """Have wait() look at a connection when there is something to read, and room to write if
        that is asked."""
        connection.writing = writing
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
        self.selector.modify(connection.sock, events, connection)

    def _receive(self, connection: _Connection) -> None:
        """Read once from a connection: a receiver that sends without end gets one read a turn, and
        what one answer may hold in all.

        1. nothing came, and the answer may go on: wait for more
        2. the connection is idle: the receiver closed it, or speaks out of turn; it is shut
        3. nothing came, as TLS does it, once too often: the answer ends with what is there
        4. the answer came whole, and was read before: see _read_whole
        5. the answer is complete, or useless; a 408 on a connection that was idle before means that
           the receiver had given up the connection, so the attempt is made again
        6. the connection is at its end, or broke: see _closed
        """
        attempt, answer, sock = connection.attempt, connection.answer, connection.sock
        fresh = answer.room == _READ_RESPONSE
        try:
            data = sock.recv(min(answer.room, _READ_AT_ONCE))
        except (BlockingIOError, ssl.SSLWantReadError):
            data = None
        except OSError as error:
            data, connection.failed = b"", connection.failed or error
        if isinstance(sock, _Tls):
            answer.room, sock.beside = answer.room - sock.beside, 0
            if not connection.writing and (sock.unsent or connection.out):
                self._watch(connection, True)
        if data is None and not answer.read_nothing():
            return
        if attempt is None:  # idle: closed by the receiver, or it speaks out of turn
            self.shut(connection)
        elif data is None:
            self._end(connection, attempt, answer)
        elif data:
            if fresh and (whole := _read_whole(data)) is not None:
                self._end(connection, attempt, whole)
            elif answer.feed(data):
                again = answer.status == 408 and self._may_try_again(connection)
                self._end(connection, attempt, None if again else answer)
        else:
            self._closed(connection, attempt, answer)

    def _closed(self, connection: _Connection, attempt: _Attempt, answer: _Answer) -> None:
        """The receiver closed the connection, or it broke.

        1. before any byte of an answer, on one that was idle before: the attempt is made again
        2. sending or reading failed, and no status was read: the attempt ends with that error
        3. else the answer ends with what is there
        """
        if not answer.started() and self._may_try_again(connection):
            self._end(connection, attempt, None)
        elif connection.failed is not None and answer.status is None:
            self._end(connection, attempt, connection.failed)
        else:
            answer.end()
            self._end(connection, attempt, answer)

    def _end(
        self, connection: _Connection, attempt: _Attempt, result: _Answer | Exception | None
    ) -> None:
        """Note what came of an exchange, for wait() to return."""
        connection.ended = True
        self._ended.append((connection, attempt, result))

    def _may_try_again(self, connection: _Connection) -> bool:
        """Say whether an attempt whose first news is the end of its connection, or a 408, is tried
        once more, as every HTTP client does: on a connection used before, the receiver most likely
        closed it, or had lost patience, before the request came. If it had not, it gets a duplicate
        with the same id."""
        attempt = connection.attempt
        if attempt is None or not connection.used or attempt.resent:
            return False
        attempt.resent = True
        return True

    def keep(self, connection: _Connection, mono: float) -> None:
        """Let a connection rest at its origin, for whoever needs one next. The selector still
        watches it: what is read from it now means that the receiver closed it."""
        connection.attempt, connection.used, connection.ended, connection.since = (
            None,
            True,
            False,
            mono,
        )
        connection.origin.idle.append(connection)
        self.idle[connection] = None

    def reuse(self, origin: _Origin) -> _Connection:
        """Return an idle connection of an origin that has one: the one that was used last, which is
        the least likely to be closed by the receiver at this moment."""
        connection = origin.idle.pop()
        del self.idle[connection]
        return connection

    def shut(self, connection: _Connection) -> None:
        """Close a connection, idle or not. An attempt that it carries is the caller's to end."""
        if connection in self.idle:
            del self.idle[connection]
            connection.origin.idle.remove(connection)
        connection.attempt = None
        connection.origin.closed(connection, _monotonic())
        self.selector.unregister(connection.sock)
        connection.sock.close()

    def shut_idle(self, most: int, before: float) -> list[_Origin]:
        """Close the longest idle connections: what is more than `most`, and what has been idle
        since `before` (monotonic). Return their origins."""
        origins = []
        while self.idle and (len(self.idle) > most or next(iter(self.idle)).since < before):
            connection = next(iter(self.idle))
            origins.append(connection.origin)
            self.shut(connection)
        return origins

    def close(self) -> None:
        """Shut all connections, at the end of the drain."""
        for key in list(self.selector.get_map().values()):
            if isinstance(key.data, _Connection):
                self.shut(key.data)
        self.selector.close()


class _Row(NamedTuple):
    """A row that the drain writes into the view webhook_record. All that goes into the file in one
    batch is rows of this one view, because only one statement is atomic without BEGIN (see
    _write_record). A trigger for each kind says what becomes of it:

        kind      written for              what its trigger does
        heard     each batch, first        refuses all of the batch, where an endpoint was removed
                                           of which the drain has not heard
        outcome   an attempt; a delivery   adds a row to webhook_attempts; updates the delivery
                  whose endpoint is gone   (status, due_at, attempts + 1, first_attempt_at,
                                           delivered_at); adds a row to webhook_failed, where the
                                           delivery is failed now
        expired   a delivery that had      the delivery becomes failed and a row is added to
                  expired when its turn    webhook_failed, if it is pending or queued and has still
                  came                     expired; no attempt is counted
        mark      a success in a queue,    updates the delivery as its outcome will, which then
                  ahead of its outcome     adds the attempt alone: see _Ledger
        endpoint  an endpoint whose        updates the endpoint's health; where it is to be
                  health changed           disabled and is not, disables it and says why
        count     what metrics() counts    adds the increments in webhook_counts
        notice    what webhook.* events    emits an event without a tenant, if anybody subscribes
                  tell                     to its type by name
        None      filling                  there is no trigger: nothing

    An outcome respects what somebody did meanwhile: "pending" leaves the status as it is, and what
    was cancelled stays so after a failure. When a delivery of a queue gets another status, the
    triggers of webhook_deliveries make the next one the head.

    What a column means depends on the kind. Of heard there is only the event: the counter
    endpoints_removed, as the drain knows it.

        kind         outcome, mark,     endpoint        count               notice
                     expired
        event        of the delivery    good            -                   -
        endpoint_id  of the delivery    its id          its id              -
        status       the delivery's     -               -                   type of the event
        due_at       of the next try    paused_until    -                   -
        at           of the attempt     failing_since   -                   now
        duration     of the attempt     failures        -                   -
        status_code  of the answer      bad             -                   -
        reason       of the attempt     -               -                   -
        error        of the attempt     why disabled    -                   -
        response     of the answer      unsteady_since  JSON of increments  JSON data of the event
    """

    # heard, outcome, expired, mark, endpoint, count or notice; None: filling
    kind: str | None = None
    event: int | None = None
    endpoint_id: str | None = None
    status: str | None = None
    due_at: float | None = None
    at: float | None = None
    duration: float | None = None
    status_code: int | None = None
    reason: str | None = None
    error: str | None = None
    response: str | float | None = None


# The most outcomes, with their marks, and the most rows in all of one statement, which are filled
# up to 2,048 (one is of the kind heard). A row has 11 parameters, and SQLite takes 32,766 of them.
_BATCH, _MOST_ROWS = (1_536, 2_047)


class _Ledger:
    """What came back and is not in the file yet: outcomes, states of endpoints, counts, notices.

    write() takes the oldest, in one statement, all or nothing: a row leaves memory only after its
    statement committed. If the process dies before, the deliveries are still pending in the file
    and go out once more, with the same ids: that is the promise. What is told to the observer waits
    here too, each notice until what it tells of is written, so that the observer hears of nothing
    that a crash could undo.

    Successes of a queue that went on from memory need care. Recorded in their order, each would be
    the head of its queue, and the trigger would make the next one the head: a write that is wasted,
    because that one is delivered too. So the batch begins with marks: the deliveries' part of these
    outcomes alone, the last one first. Those behind the head are `queued`, and to finish a queued
    row leaves the head as it is; the head itself comes last and makes the next one the head, once.
    """

    __slots__ = ("_untold", "_written", "counts", "queues", "rows", "states")

    def __init__(self) -> None:
        self.rows: list[_Row] = []  # outcomes and notices, in the order in which they came
        # Of the outcomes that are of a queue: its name, by endpoint and event.
        self.queues: dict[tuple[str, int], str] = {}
        # By id: endpoints whose health, or that they are disabled, is not in their row yet.
        self.states: dict[str, _Lane] = {}
        self.counts: dict[str, dict[str, float]] = {}  # by endpoint: increments
        self._written = 0  # how many of the rows that there ever were are in the file
        # Notices for the observer, oldest first, each with the number of the row that it waits for.
        self._untold: collections.deque[tuple[int, Notice]] = collections.deque()

    def __bool__(self) -> bool:
        """Say whether there is a reason to write. Counts alone are none: they go with the next
        outcome, or when the drain leaves."""
        return bool(self.rows or self.states)

    def forget(self) -> None:
        """Throw everything away: the file that it is about is gone."""
        self.rows, self.queues, self.states, self.counts = [], {}, {}, {}
        self._untold.clear()

    def drop(self, ids: set[str]) -> None:
        """Throw away what is about endpoints that were removed, of all of them at once. Their rows
        become ones that do nothing, since notices count on the places of the others."""
        self.rows = [_Row() if row.endpoint_id in ids else row for row in self.rows]
        self.queues = {key: queue for key, queue in self.queues.items() if key[0] not in ids}
        for id in ids:
            self.states.pop(id, None)
            self.counts.pop(id, None)
        untold = [each for each in self._untold if each[1].endpoint_id not in ids]
        self._untold = collections.deque(untold)

    def note(self, notice: Notice) -> None:
        """Keep a notice until all the rows that there are now are written."""
        self._untold.append((self._written + len(self.rows), notice))

    def told(self) -> list[Notice]:
        """Return the notices of what is written by now, in their order, and forget them. That an
        endpoint is disabled stands in its state, which may be written after the outcome."""
        told: list[Notice] = []
        while self._untold and self._untold[0][0] <= self._written:
            notice = self._untold[0][1]
            state = self.states.get(notice.endpoint_id)
            if notice.kind == "disabled" and state is not None and state.disable:
                break
            told.append(self._untold.popleft()[1])
        return told

    def count(self, id: str, name: str, seconds: float | None = None) -> None:
        """Count one more of `name` for an endpoint, and the seconds of a success."""
        of = self.counts.get(id)
        if of is None:
            of = self.counts[id] = {}
        of[name] = of.get(name, 0.0) + 1.0
        if seconds is not None:
            of["seconds"] = of.get("seconds", 0.0) + seconds

    def write(self, db: sqlite3.Connection, heard: int, most: int = _BATCH) -> list[_Row]:
        """Write at most so many outcomes and what goes with them; return those written. Raise
        sqlite3.Error where the file is locked or cannot be written, or says _UNHEARD: then nothing
        has changed. heard: the counter endpoints_removed, as it was last taken in."""
        batch, marks = self._batch(most)
        lanes = list(self.states.values())[: _MOST_ROWS - _BATCH]
        states = [
            _Row(
                "endpoint", lane.health.good, lane.id, None, lane.health.paused_until,
                lane.health.failing_since, lane.health.failures, lane.health.bad,
                error=lane.disable, response=lane.health.unsteady_since,
            )
            for lane in lanes
        ]  # fmt: skip
        counts = list(self.counts.items())[: _MOST_ROWS - len(batch) - len(marks) - len(states)]
        written = [_Row("count", endpoint_id=id, response=json.dumps(n)) for id, n in counts]
        _write_record(db, [_Row("heard", heard), *marks, *batch, *states, *written])
        del self.rows[: len(batch)]
        self._written += len(batch)
        for lane in lanes:
            lane.disable = None
            del self.states[lane.id]
        for id, _ in counts:
            del self.counts[id]
        return batch

    def _batch(self, most: int) -> tuple[list[_Row], list[_Row]]:
        """Return the oldest outcomes, and the marks of those that are successes of queues, the last
        one first. Outcomes and marks are at most `most` together; one outcome at the least."""
        if not self.queues:
            return self.rows[:most], []
        count, marks = 0, list[_Row]()
        for row in self.rows:
            marked = row.status == "delivered" and (row.endpoint_id, row.event) in self.queues
            if count + len(marks) + 1 + marked > most and count:
                break
            count += 1
            if marked:
                marks.append(row._replace(kind="mark"))
        return self.rows[:count], marks[::-1]


class _Budget:
    """How large our next commit may be, and how far from the last one, so that the host hardly
    notices that somebody else writes its file. The rule, in one place:

    A host meets our commits in two ways. Where it writes while we hold the lock, it waits: at most
    as long as one statement of ours, which is cut to about six milliseconds. Where it has read
    before and writes after us, in a deferred transaction, SQLite refuses its write ("database is
    locked", at once); each commit of ours can do that, however short.

    The host writes: somebody else committed within the last second, h times. Then our commits stand
    at least a tenth of a second apart, and hold the lock for such a share of the time that the host
    waits twice a second, or in one of 110 of its commits if those are more: share = max(1/110,
    2/h). Beside 3 commits a second that is no bound, beside 100 it is two hundredths of the time.

    The host is quiet: 10 ms between two commits while we send, so that outcomes gather, else 1 ms.
    Shorter distances starve a host that begins to write, in SQLite's busy handler, which sleeps
    between its tries (p99 of its commits 35 to 160 ms, instead of 1.2).
    """

    __slots__ = ("_cost", "hosts")
    _HELD = 0.006  # seconds for which one statement may hold the lock
    _LEAST_GAP = 0.1  # seconds between two commits
    _WAITS = 2.0  # times a second that the host may have to wait
    _SELDOM = 110.0  # or it may have to in one of so many of its commits

    def __init__(self) -> None:
        # Monotonic: the host's commits.
        self.hosts: collections.deque[float] = collections.deque(maxlen=256)
        self._cost = 8e-6  # seconds of CPU that a row takes, on average

    def host_rate(self, mono: float) -> int:
        """Return the host's commits within the last second, as far as we saw them."""
        while self.hosts and self.hosts[0] < mono - 1.0:
            self.hosts.popleft()
        return len(self.hosts)

    def most(self, mono: float) -> int:
        """Return how many outcomes the next statement may record: beside a host that writes, what
        takes six milliseconds by what a row took lately, and 32 at the least."""
        if not self.host_rate(mono):
            return _BATCH
        return max(32, min(_BATCH, int(self._HELD / self._cost)))

    def gap(self, mono: float, took: float, rows: int, sending: bool) -> float:
        """Return the seconds until the next commit, after one of `rows` outcomes that took so many
        seconds of CPU; learn what a row costs. sending: attempts are under way, so that more
        outcomes will come."""
        if rows >= 32:
            self._cost += (took / rows - self._cost) / 4
        rate = self.host_rate(mono)
        if not rate:
            return 0.01 if sending else 0.001
        share = max(1 / self._SELDOM, self._WAITS / rate)
        return max(self._LEAST_GAP, took * (1 / share - 1))


class _Teller:
    """Calls the host's observer, in a thread of its own and in order: one that blocks must not hold
    up deliveries. The thread is started with the first notice. It waits at `_notices`, the loop
    wakes it with a notice, or with None for the end. What an observer raises is logged.

    What is told is recorded already. What is recorded may stay untold: when the process dies,
    notices that wait here are lost; an observer that falls behind misses some, which is logged; and
    what is recorded only when the drain leaves (_Outcomes.leave) is never told.

    An observer that falls 10,000 behind first misses what each attempt brings: such notices come by
    the thousand, and whoever counts is better served by metrics(). Those that somebody has to act
    upon (gave_up, failing, recovered, disabled) are few, and have room of their own behind that.
    """

    __slots__ = ("_missed", "_notices", "_observer", "_thread")

    def __init__(self, observer: Callable[[Notice], Any] | None) -> None:
        self._observer = observer
        self._notices: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._missed = 0  # notices, since it last kept up

    def tell(self, notice: Notice) -> None:
        """Pass a notice on, without waiting. Where the observer misses some, the first is logged,
        and when it has half caught up, how many they were."""
        behind = self._notices.qsize()
        if behind >= _UNOBSERVED * (1 if notice.kind in _EACH_ATTEMPT else 2):
            self._missed += 1
            if self._missed == 1:
                _log.error("the observer is %d behind; it misses %s", behind, notice)
            return
        if self._missed and behind <= _UNOBSERVED // 2:
            _log.error("the observer missed %d notices", self._missed)
            self._missed = 0
        self._notices.put(notice)
        if self._thread is None:
            # No room for a thread: the next notice tries again.
            with contextlib.suppress(*_NO_THREAD):
                self._thread = _start_thread(self._run, name="webhook_outbox observer")

    def _run(self) -> None:
        """Call the observer with each notice until None comes. What the thread runs."""
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


def _log_outcome(
    lane: _Lane, picked: _Picked, outcome: _Outcome, gave_up: bool, disabled: bool
) -> None:
    """Log what one attempt came to: a success for debugging, a failure for information, a delivery
    that is given up and an endpoint that is disabled as warnings. It is logged when it is known,
    which is before it is recorded. `extra` gives log processors the same as fields."""
    extra = {
        "event": picked.id,
        "endpoint": lane.id,
        "attempt": picked.attempts + 1,
        "reason": outcome.reason,
    }
    if outcome.reason is not None:
        text = "%s to %s: %s (%s)" + ("; given up" if gave_up else "")
        level = logging.WARNING if gave_up else logging.INFO
        _log.log(level, text, picked.id, lane.id, outcome.error, outcome.reason, extra=extra)
    else:
        _log.debug("%s to %s: delivered", picked.id, lane.id, extra=extra)
    if disabled:
        _log.warning("endpoint %s is disabled: %s", lane.id, lane.disable, extra=extra)


# What an attempt has waited for when its time is over, by its step.
_WAITED_FOR = {
    "making": "its request",
    "calling": "its sender",
    "waiting": "a connection",
    "exchanging": "the answer",
}


class _Carrier:
    """Carries attempts out: from a delivery to an outcome, with origins, openers and exchanges.

    Each attempt that begin() was given comes back from ended() exactly once: with its outcome, or
    with None when it was not tried, through no fault of the receiver (the drain stops; this process
    has no descriptor left). In between it is in `attempts`. Nothing here blocks: what may block is
    given to a thread of the openers. A sender of the host's is called by such a thread, and that
    call is the whole attempt.

    The functions below, along the steps of an attempt (see _Attempt):

        begin, then _made if a thread made the request
          ──> _await_connection, then _serve, or _opened if a thread opened a connection
          ──> _carry, then _carried when the exchange ended ──> _finish
        begin ──> _called, when the sender has returned ──> _finish
        look ──> _press and _expire, for one that takes long, and one whose time is over
    """

    __slots__ = (
        "_look_at", "_opener", "attempts", "crowded", "done", "exchanges", "freed", "held_up",
        "openers", "origins", "settings", "shutdown", "stopping", "tight",
    )  # fmt: skip
    _ORIGINS = 1_024  # more are remembered only while they are in use

    def __init__(self, settings: _Settings, ring: Callable[[], None]) -> None:
        """ring: wakes the loop, from any thread."""
        self.settings = settings
        self._opener = _Opener(settings)
        self.openers, self.exchanges = _Openers(self._opener.open, ring), _Exchanges()
        self.origins: dict[_OriginKey, _Origin] = {}
        self.attempts: set[_Attempt] = set()
        # Lanes that may have room again though none of their attempts ended: parked ones whose
        # origin has room, and those for which a thread has made a request. The loop takes them.
        self.freed: list[_Lane] = []
        self.crowded: dict[_Origin, None] = {}  # where lanes are parked, or were
        self.tight = False  # there is little room left for outcomes: see hold_up
        self.held_up: dict[_Lane, None] = {}  # lanes that were parked for that
        self.stopping = False  # no connection is kept, nothing is begun on a new one
        self.shutdown = False  # the interpreter is ending: no thread will ever start again
        self.done: list[tuple[_Attempt, _Outcome | None]] = []  # until ended() is asked
        self._look_at = math.inf  # monotonic: the earliest look_at of the attempts, or before it

    def origin(self, wire: _Wire) -> _Origin:
        """Return the origin that an endpoint's connections belong to. The wire remembers it."""
        found = wire.origin
        if found is None or found.forgotten:
            found = wire.origin = self.origins.get(wire.origin_key) or self._new_origin(
                wire.origin_key
            )
        return found

    def _new_origin(self, key: _OriginKey) -> _Origin:
        if len(self.origins) >= self._ORIGINS:
            for origin in [origin for origin in self.origins.values() if origin.unused()]:
                origin.forgotten = True
                del self.origins[origin.key]
        self.origins[key] = _Origin(key)
        return self.origins[key]

    # Beginning.

    def may_begin(self, lane: _Lane, share: float, proven: int, mono: float) -> bool | None:
        """Say whether an attempt of a lane could go on at once, so that none begins which would
        only wait, with its time running. share, proven: see _Openers.free.

        True: it could, or would fail at once. None: there is no connection for it, nor may one be
        opened, or the room for outcomes is tight; the lane is parked and comes back as freed.
        False: no thread is free.
        """
        if self.tight and len(lane.backlog.known) > _LITTLE:
            self.held_up[lane] = None
            return None
        if lane.wire is None:
            return True
        if lane.wire.call is not None:
            return self.openers.starved_until <= mono
        if not lane.wire.slow:
            origin = self.origin(lane.wire)
            if origin.idle:
                return True
            if not origin.has_room(mono):
                origin.parked[lane.round or 0][lane] = None
                self.crowded[origin] = None
                return None
        return self.openers.free(share, proven, mono)

    def begin(self, lane: _Lane, picked: _Picked, now: float) -> None:
        """Begin an attempt of a delivery. It may have ended when this returns: see `done`.

        1. there is no wire, or the request cannot be made: it fails
        2. no host's code is needed: the request is made here, and waits for a connection
        3. two threads of the endpoint are stuck in the host's code: it fails, before it takes a
           third from the others
        4. else a thread calls the sender, or makes the request
        """
        mono, wire = _monotonic(), lane.wire
        deadline = mono + (lane.endpoint.timeout or self.settings.timeout)
        origin = None if wire is None or wire.call is not None else self.origin(wire)
        attempt = _Attempt(lane, wire, origin, picked, now, mono, deadline)
        attempt.look_at, attempt.registered = min(deadline, mono + _QUICK), lane.registered
        self.attempts.add(attempt)
        self._look_at = min(self._look_at, attempt.look_at)
        lane.active += 1
        lane.take_slot(mono)
        try:
            if wire is None:
                raise lane.broken or _Unready("the endpoint is not configured")
            if not wire.slow:
                attempt.request, attempt.hidden = wire.request(picked, now)
                return self._await_connection(attempt, mono)
            if lane.lost >= _OPENERS_EACH and wire.call is not None:
                raise _SenderFailed("calls of it never end; mend it, restart the drain")
            if lane.lost >= _OPENERS_EACH:
                raise _Unready(
                    "its transform, or reading its secret, never ends; mend it, restart the drain"
                )
        except Exception as error:
            return self._finish(attempt, _failure(error))
        attempt.hidden = wire.hidden  # the host's code may tell them in its error
        if wire.call is not None:
            attempt.step = "calling"
            self._submit(_Errand(attempt, "call", []))
            return
        attempt.step = "making"
        lane.making += 1
        if not self._submit(_Errand(attempt, "make", [])):
            lane.making -= 1

    def _submit(self, errand: _Errand) -> bool:
        """Give an errand to a thread; where there is none, the attempt ends untried (False)."""
        try:
            self.openers.submit(errand)
            return True
        except _NO_THREAD as error:
            self._starve(errand.attempt, error)
            return False

    def _starve(self, attempt: _Attempt, error: BaseException) -> None:
        """End an attempt untried, since this process ran out of descriptors, memory or threads: not
        the receiver's fault, so it counts as no attempt. Idle connections are closed, since the
        host may need the descriptors more than we do, and nothing is opened for a second."""
        mono = _monotonic()
        self.exchanges.shut_idle(0, mono)
        if "shutdown" in str(error):  # RuntimeError of an interpreter that is ending
            self.shutdown = True
        elif self.openers.starved_until <= mono:
            _log.warning(
                "no connection can be opened (%s: %s); trying again in 1 s",
                type(error).__name__,
                error,
            )
        self.openers.starved_until = mono + 1.0
        self._finish(attempt, None)

    def _await_connection(self, attempt: _Attempt, mono: float) -> None:
        """Have an attempt whose request is ready wait for a connection, which may be there
        already."""
        origin = attempt.origin
        assert origin is not None
        attempt.step, attempt.connection = "waiting", None
        if origin.idle:
            return self._carry(self.exchanges.reuse(origin), attempt, mono)
        origin.waiting[attempt] = None
        self._serve(origin, mono)

    def _serve(self, origin: _Origin, mono: float) -> None:
        """Give an origin's connections, and the right to open more, to those who wait there: first
        idle connections to attempts; then a thread each to two attempts at the most, to open one;
        then, if there is still room, parked lanes go back to the loop. Called whenever there may be
        room: a connection was closed, kept or opened, an attempt ended."""
        while origin.idle and origin.waiting:
            self._carry(self.exchanges.reuse(origin), origin.first_waiting(), mono)
        for attempt in (
            [a for a in origin.waiting if not a.opening][:_OPENERS_EACH] if origin.waiting else ()
        ):
            if not origin.has_room(mono):
                break
            attempt.opening = True
            origin.opening += 1
            if not self._submit(_Errand(attempt, "open", [])):
                attempt.opening = False
                origin.opening -= 1
        if origin in self.crowded and not origin.waiting and origin.has_room(mono):
            # One lane of each rank, for one connection: the first one may get no place now, because
            # its rank has its share, and must not keep the others from the connection.
            for parked in filter(None, origin.parked):
                lane = next(iter(parked))
                del parked[lane]
                self.freed.append(lane)

    def _carry(self, connection: _Connection, attempt: _Attempt, mono: float) -> None:
        """Have a connection carry an attempt, which waits nowhere any more."""
        self.exchanges.begin(connection, attempt, mono)
        attempt.look_at = min(attempt.deadline, mono + max(_CROWDED, 2 * attempt.lane.usual))
        self._look_at = min(self._look_at, attempt.look_at)

    def hold_up(self, tight: bool) -> None:
        """Take note whether there is little room left for outcomes (_Outcomes.tight). As long as it
        is so, endpoints with a backlog are parked; when it ends they come back as freed."""
        self.tight = tight
        if self.held_up and not tight:
            self.freed += self.held_up
            self.held_up = {}

    # Ending.

    def wait(self, pause: float) -> bool:
        """Sleep until a socket has news, `pause` seconds at most; say whether something came of
        it."""
        ended = self.exchanges.wait(pause)
        mono = _monotonic()
        for connection, attempt, result in ended:
            self._carried(connection, attempt, result, mono)
        errands = self.openers.take()
        for errand in errands:
            if errand.does == "call":
                self._called(errand.attempt, errand.result[0])
            else:
                done = self._made if errand.does == "make" else self._opened
                done(errand.attempt, errand.result[0], mono)
        return bool(ended or errands)

    def ended(self) -> list[tuple[_Attempt, _Outcome | None]]:
        """Return the attempts that ended since the last call, each with its outcome; None: it was
        not tried."""
        done, self.done = self.done, []
        return done

    def _finish(self, attempt: _Attempt, outcome: _Outcome | None) -> None:
        """End an attempt, wherever it is; None: untried. All ends come here, once. The connection,
        if any, is the caller's to keep or shut."""
        if attempt.origin is not None:
            if attempt.step == "waiting":
                attempt.origin.waiting.pop(attempt, None)
            attempt.origin.relax(attempt)
        attempt.step = "ended"
        attempt.lane.active -= 1
        self.attempts.discard(attempt)
        self.done.append((attempt, outcome))

    def _carried(
        self,
        connection: _Connection,
        attempt: _Attempt,
        result: _Answer | Exception | None,
        mono: float,
    ) -> None:
        """An exchange has ended: keep the connection or not, and judge the answer.

        Where a connection that had been idle was dead, the origin's other idle ones are most likely
        dead as well (the receiver was restarted, say): all are shut, and the attempt waits for
        another one. While stopping it ends untried instead.

        A connection is kept if the answer ended where it said (reusable), the request was sent
        whole, and the origin has use for it. Kept or not, others who wait are served.
        """
        origin = connection.origin
        if result is None:
            for dead in [connection, *origin.idle]:
                self.exchanges.shut(dead)
            if self.stopping:
                return self._finish(attempt, None)
            return self._await_connection(attempt, mono)
        if isinstance(result, _Answer):
            origin.answered(connection, attempt, mono)
            attempt.reading = (_READ_RESPONSE - result.room) / _READ_SECOND
        outcome = _result(result, attempt.hidden, self.settings.clock)
        busy = connection.out or connection.writing or connection.failed
        fits = not (self.stopping or busy) and origin.keeps(mono)
        if fits and isinstance(result, _Answer) and result.reusable:
            self._keep(connection, mono)
        else:
            self.exchanges.shut(connection)
        self._finish(attempt, outcome)
        if origin.waiting or origin in self.crowded:
            self._serve(origin, mono)

    def _keep(self, connection: _Connection, mono: float) -> None:
        """Let a connection rest. As many are kept as there are places (`workers`), of all origins
        together; beyond that the longest idle one is closed."""
        self.exchanges.keep(connection, mono)
        if len(self.exchanges.idle) > self.settings.workers:
            self._shut_idle(-math.inf, mono)

    def _shut_idle(self, before: float, mono: float) -> None:
        """Close idle connections: what is more than may be kept, and what has been idle since
        `before`."""
        for origin in self.exchanges.shut_idle(self.settings.workers, before):
            self._serve(origin, mono)

    def _made(self, attempt: _Attempt, result: Any, mono: float) -> None:
        """A thread has made a request, or could not. Where the attempt's time was over before, the
        thread is lost no more, and what it made is thrown away. A lane was full where two threads
        made its requests, so it is freed."""
        if attempt.step == "ended":  # its time was over before
            attempt.lane.lost -= 1
            return
        attempt.lane.making -= 1
        self.openers.busy -= 1
        if isinstance(result, BaseException):
            self._finish(attempt, _failure(result, attempt.hidden))
        else:
            attempt.request, attempt.hidden = result
            self.freed.append(attempt.lane)
            self._await_connection(attempt, mono)

    def _called(self, attempt: _Attempt, result: Any) -> None:
        """A sender has returned, which is a success, or raised; or did so after the time was over.
        That attempt failed then, and the event will be delivered again."""
        if attempt.step == "ended":  # its time was over before
            attempt.lane.lost -= 1
        elif isinstance(result, BaseException):
            self._finish(attempt, _failure(result, attempt.hidden))
        else:
            self._finish(attempt, _Outcome())

    def _opened(self, attempt: _Attempt, result: Any, mono: float) -> None:
        """A thread has opened a connection for an attempt, or could not. The attempt may have found
        another one meanwhile, or ended (it does not wait any more).

        It could not. Where the attempt still waits, it ends: untried, if this process ran out of
        something or all lookups were taken; else with the error as its outcome.

        It could. In this order: the attempt gets the connection, if it still waits; another one
        that waits gets it; it is kept, where lanes are parked here or connections of the origin do
        bring answers; it is shut. A drain that is stopping shuts it, as nothing waits any more.
        """
        origin = attempt.origin
        assert origin is not None
        origin.opening -= 1
        self.openers.busy -= 1
        attempt.opening = False
        waits = attempt in origin.waiting
        if isinstance(result, BaseException):
            if waits and _is_exhaustion(result):
                self._starve(attempt, result)
            elif waits and isinstance(result, _NoRoom):
                attempt.lane.next_slot = max(attempt.lane.next_slot, mono + _ROOM_MAY_COME)
                self._finish(attempt, None)
            elif waits:
                self._finish(attempt, _failure(result, attempt.hidden))
        else:
            connection = self.exchanges.add(result, origin)
            if waits:
                del origin.waiting[attempt]
                self._carry(connection, attempt, mono)
            elif origin.waiting:
                self._carry(connection, origin.first_waiting(), mono)
            elif not self.stopping and (
                any(origin.parked) or (origin.proven and origin.keeps(mono))
            ):
                self._keep(connection, mono)  # shut, one would be opened again in a moment
            else:
                self.exchanges.shut(connection)
        self._serve(origin, mono)

    # Time.

    def look(self, mono: float) -> None:
        """Look at attempts that have been under way for long: those that began first come first.

        Each is looked at when its `look_at` has come: after a second, and then at its deadline. Its
        lane learns how long the place is held already, so that an endpoint that hangs loses its
        rank after a second. Before the deadline, the attempt may press for room. At the deadline it
        ends; while it has no connection it gets another quarter of a second, for a thread that
        opens one ends by then, and says better what went wrong.
        """
        if mono < self._look_at:
            return
        for attempt in sorted(
            (a for a in self.attempts if a.look_at <= mono), key=lambda a: a.started
        ):
            attempt.lane.occupied(mono - attempt.started, ended=False)
            if mono < attempt.deadline:
                self._press(attempt, mono)
            elif attempt.connection is None and mono < attempt.deadline + 0.25:
                attempt.look_at = attempt.deadline + 0.25
            else:
                self._expire(attempt, mono)
        self._look_at = min((attempt.look_at for attempt in self.attempts), default=math.inf)

    def _press(self, attempt: _Attempt, mono: float) -> None:
        """Have others at its origin make room for an attempt that takes long, where that may help:
        see _Origin. Idle connections make it at once."""
        origin, connection = attempt.origin, attempt.connection
        attempt.look_at = attempt.deadline
        if origin is not None and connection is not None and not connection.answer.started():
            if origin.press(connection, attempt, mono):
                attempt.look_at = min(attempt.deadline, mono + _CROWDED)
                # An idle connection may keep a worker from us. One that brought an answer has one,
                # so closing one of these frees a worker. Of the others that is not known: all go.
                proven = [idle for idle in origin.idle if idle.proven]
                for idle in [idle for idle in origin.idle if not idle.proven] + proven[:1]:
                    self.exchanges.shut(idle)
            self._serve(origin, mono)

    def _expire(self, attempt: _Attempt, mono: float) -> None:
        """End an attempt whose time is over. Where a status was read, of an answer that never ends,
        that decides; else it is a timeout, which says what it waited for."""
        connection = attempt.connection
        if connection is not None and connection.ended:
            return  # the next wait() tells what came of it
        if connection is not None and connection.answer.status is not None:
            return self._carried(connection, attempt, connection.answer.cut(), mono)
        if connection is not None:
            self.exchanges.shut(connection)
        waited = _WAITED_FOR[attempt.step]
        self._lose_thread(attempt)
        error = f"no time left after {mono - attempt.started:.1f} s, waiting for {waited}"
        self._finish(attempt, _Outcome(reason="timeout", error=error))
        if attempt.origin is not None:
            self._serve(attempt.origin, mono)

    def _lose_thread(self, attempt: _Attempt) -> None:
        """Go on without the thread that makes an attempt's request, or calls its sender, if there
        is one. A thread in the host's code cannot be stopped: it counts as lost until it comes
        back."""
        if attempt.step in ("making", "calling"):
            attempt.lane.lost += 1
        if attempt.step == "making":
            attempt.lane.making -= 1
            self.openers.busy -= 1

    def chores(self, mono: float) -> None:
        """Close connections that were idle for a minute. Free parked lanes where there is room by
        now: nobody else notices room that comes with time, when a crowded origin's limit ends."""
        self._shut_idle(mono - _IDLE_CONNECTION, mono)
        for origin in list(self.crowded):
            if any(origin.parked):
                self._serve(origin, mono)
            else:
                del self.crowded[origin]

    def stop(self) -> None:
        """Begin nothing more. What has no connection comes back untried, at once: also where a
        thread opens one for it or makes its request, and where it was sent on a connection that
        was dead, for then it would be sent again in any case. What a connection carries, and a
        sender that was called, goes on. From now on nothing waits for a connection."""
        if not self.stopping:
            self.stopping = True
            for attempt in [a for a in self.attempts if a.step in ("making", "waiting")]:
                self._lose_thread(attempt)
                self._finish(attempt, None)

    def close(self) -> None:
        """Shut everything, whatever is under way: those deliveries stay pending in the file."""
        self.openers.close()
        self.exchanges.close()


def _make_once(
    wire: _Wire, picked: _Picked, now: float, deadline: float
) -> tuple[bytes, list[str]] | _Outcome:
    """Make a request, or call a sender, outside any drain. Return the request and what it hides; or
    an outcome, where the attempt ends here.

    The host's code runs in a thread of its own, as in a drain: its SystemExit is a failed attempt
    and does not end the caller, and at the deadline (monotonic) the thread is left alone.
    """
    if not wire.slow:
        return wire.request(picked, now)
    does: Callable[[], Any] = functools.partial(wire.request, picked, now)
    if wire.call is not None:
        does = functools.partial(wire.deliver, picked)
    done: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(does())
        except BaseException as error:
            done.set_result(error)

    _start_thread(run, name="webhook_outbox ping")
    try:
        made = done.result(deadline - _monotonic())
    except concurrent.futures.TimeoutError:
        what = "request" if wire.call is None else "sender"
        return _Outcome(reason="timeout", error=f"no time left, waiting for its {what}")
    if isinstance(made, BaseException):
        return _failure(made, wire.hidden)
    return _Outcome() if wire.call is not None else made


def _send_once(
    settings: _Settings, endpoint: Endpoint, secrets: _Secrets, picked: _Picked
) -> _Outcome:
    """Make one attempt at once, outside any drain, on the same parts: for ping(). It blocks its
    caller, and what goes wrong is in the outcome, as in the drain."""
    opener, exchanges, now, mono = (_Opener(settings), _Exchanges(), settings.clock(), _monotonic())
    deadline = mono + (endpoint.timeout or settings.timeout)
    hidden: Sequence[str] = ()
    try:
        wire = _Wire.make(endpoint, secrets, settings)
        made = _make_once(wire, picked, now, deadline)
        if isinstance(made, _Outcome):
            return made
        attempt = _Attempt(_Lane(endpoint.id), wire, None, picked, now, mono, deadline)
        attempt.request, hidden = made
        connection = exchanges.add(opener.open(wire.origin_key, deadline), _Origin(wire.origin_key))
        exchanges.begin(connection, attempt, mono)
        exchanges.flush()
        while (left := deadline - _monotonic()) > 0:
            for _, _, end in exchanges.wait(left):
                # None would ask for a second try, which a new connection never gets.
                return _result(end or OSError(), hidden, settings.clock)
        if connection.answer.status is not None:
            return _result(connection.answer.cut(), hidden, settings.clock)
        raise TimeoutError
    except Exception as error:
        return _failure(error, hidden)
    finally:
        exchanges.close()


class _Schedule:
    """Which lane may start an attempt, and when. A lane waits in one of these places:

        turns    it could start one at once: in the round of its rank
        due      until its next delivery is due, or its pause ends. By the outbox's clock, since the
                 file says so, and a clock may be set
        slots    until its rate allows the next attempt. Monotonic: a rate has nothing to do with
                 what the clock says
        nowhere  it is disabled; or full, and the end of one of its attempts brings it back, or a
                 request that a thread has made; or it has nothing to do, and news does; or its
                 origin parked it, and a connection does; or it is held up, and our next commit does

    put() finds out which. Whoever changes what that depends on calls it: it is cheap, and to call
    it once too often changes nothing.
    """

    __slots__ = ("due", "slots", "turns")

    def __init__(self) -> None:
        self.turns, self.due, self.slots = _Turns(), _Agenda(), _Agenda()

    def put(self, lane: _Lane, now: float, mono: float) -> None:
        """Have a lane wait where it belongs now: for its time, then its rate, then its turn. One
        that stands in a round already stays there, and leaves it when its turn comes and it may not
        start."""
        if not lane.enabled or lane.full():
            return
        when = max(lane.backlog.when(), lane.health.paused_until)
        if when > now:
            if when < math.inf:
                self.due.set(lane.id, when)
            else:
                self.due.drop(lane.id)
        elif lane.next_slot > mono:
            self.slots.set(lane.id, lane.next_slot)
        else:
            self.turns.join(lane, lane.rank(mono))

    def drop(self, lane: _Lane) -> None:
        """Have a lane wait nowhere, for good."""
        self.turns.leave(lane)
        self.due.drop(lane.id)
        self.slots.drop(lane.id)

    def next(self, now: float, mono: float) -> float:
        """Return the seconds until a lane is due."""
        return max(0.0, min(self.due.next() - now, self.slots.next() - mono))


# One in so many places is kept for steady endpoints that have nothing under way. An endpoint that
# holds as large a share of the places already comes after those that hold less.
_KEPT = 8
# By rank (see _Lane.rank): the part of places and openers that endpoints of it may fill, all
# together. 1 and 2 are counted together: the part of rank 2 is within that of rank 1.
_SHARES = (1.0, 0.5, 0.375)


def _common(workers: int) -> int:
    """Return how many of the places are not kept for steady endpoints."""
    return workers - workers // _KEPT


def _no_place(
    rank: int, idle: bool, under_way: int, slow: int, workers: int, alone: bool
) -> str | None:
    """Return why an endpoint may not have one more place, or None.

    "full": there is none. "share": the part of its rank is used up. "kept": what is left is kept
    for steady endpoints that have nothing under way. The first two are so for its whole rank.

    rank, idle: the endpoint's rank; whether it is steady and has nothing under way. under_way,
    slow: all attempts that are, and those of endpoints that are not quick. alone: no other endpoint
    began an attempt lately.
    """
    if under_way >= workers:
        return "full"
    if rank and slow >= max(1, int(workers * _SHARES[rank])):
        return "share"
    if not (alone or idle) and under_way >= _common(workers):
        return "kept"
    return None


class _Places:
    """Who may begin an attempt, and in which order. A place is one attempt under way; there are
    `workers` of them.

    A place is lost to the others for as long as an attempt holds it, whatever comes of it. So they
    are given by how long an endpoint holds them, and not by whether it succeeds: one that answers
    200 after fourteen seconds costs the others as much as one that hangs.

    The loop's time is lost to them too. An answer of 64 KiB, or one in a thousand chunks, takes as
    much of it as fifty short ones, and mostly a new connection after it. Forty endpoints with a
    backlog that answered like that counted as quick, took all places and openers, and the others
    waited 0.2 seconds for them. So each 16 KiB that are read count as a second more: one answer
    that is read to the limit makes an endpoint slow, until it has given a short one.

    1. Endpoints that are not quick (see _Lane) share a part of the places: they start one only
       while all of them together hold less than half, where nothing is known about the endpoint
       and its first attempt will find out, and less than three eighths otherwise. Those that hang,
       drip, or answer late cannot fill more, however many they are.
    2. The last eighth is kept for endpoints that have nothing under way and are steady: quick
       several times in a row, and just now. When many that were quick begin to hang at the same
       moment, the others still get through.
    3. An endpoint that has an eighth of the places already comes after those that have less.
    4. An endpoint that is alone, because no other began an attempt within a minute, gets all that
       its rank may have, the last eighth too.

    Endpoints that are quick are served last: served first, they would take every place that becomes
    free and leave none to the others. The others cannot take much before them, by the first rule.
    """

    __slots__ = ("_last", "_mixed_until", "common", "workers")
    _LATELY = 60.0  # seconds
    # Lanes in a row that may be passed over before a round is left for this turn: where thousands
    # wait for a thread, a turn must not ask for each of them.
    _TRIES = 32

    def __init__(self, workers: int) -> None:
        self.workers, self.common = workers, _common(workers)
        self._last: _Lane | None = None  # that began the latest attempt
        self._mixed_until = 0.0  # monotonic: until then more than one endpoint counts as at work

    def serve(
        self,
        schedule: _Schedule,
        carrier: _Carrier,
        now: float,
        mono: float,
        start: Callable[[_Lane], bool],
    ) -> None:
        """Start attempts of the lanes that stand in rounds, one each time it is a lane's turn,
        until places, work or threads run out. start: begins an attempt of a lane, and returns False
        when nothing more may begin, of any lane."""
        for rank in (1, 2, 0):
            round = schedule.turns.rounds[rank]
            if round and not self._serve(rank, len(round) > 1, schedule, carrier, now, mono, start):
                return

    def _serve(
        self,
        rank: int,
        lean: bool,
        schedule: _Schedule,
        carrier: _Carrier,
        now: float,
        mono: float,
        start: Callable[[_Lane], bool],
    ) -> bool:
        """Serve the round of a rank; lean: only lanes that hold less than an eighth of the places,
        and after that the others (fat). False: stop altogether.

        What may become of the first lane of the round, in the order of the code:

        1. it may not start now, or is quick no more: it waits where it belongs now
        2. no place is free for its rank: the round is left, and all keep their turns
        3. none is free for this lane, it is too fat, or no thread is free: it is passed over, to
           the end of the round
        4. its origin has no connection for it: it was parked there, and leaves the round
        5. it starts an attempt. A quick lane that may start another goes to the end of the round;
           any other waits where it belongs now, by the rank that it has now
        """
        turns, round = schedule.turns, schedule.turns.rounds[rank]
        quick = [a for a in carrier.attempts if a.lane.quick(mono)] if rank else ()
        openings = sum(a.connection is None and a.step != "calling" for a in quick)
        passed, fat = 0, False  # lanes passed over in a row; one of them for what it holds
        while passed < min(len(round), self._TRIES):
            lane = next(iter(round))
            if not lane.may_start(now, mono) or (rank == 0 and lane.occupies > _QUICK):
                turns.leave(lane)
                schedule.put(lane, now, mono)
                continue
            why = self._why_not(lane, rank, len(carrier.attempts), len(quick), mono)
            if why in ("full", "share"):  # for the whole round
                break
            may_begin: bool | None = False
            if why is None and lean and lane.active >= max(1, self.workers // _KEPT):
                fat = True
            elif why is None:
                may_begin = carrier.may_begin(lane, _SHARES[rank], openings, mono)
            if may_begin is False:
                round.move_to_end(lane)
                passed += 1
                continue
            if may_begin:
                passed = 0
                self._note(lane, mono)
                if not start(lane):
                    return False
                if rank == lane.round == 0:  # to the end of its round, where it is looked at again
                    round.move_to_end(lane)
                    continue
            turns.leave(lane)
            if may_begin:
                schedule.put(lane, now, mono)
        return not fat or self._serve(rank, False, schedule, carrier, now, mono, start)

    def _why_not(
        self, lane: _Lane, rank: int, under_way: int, quick: int, mono: float
    ) -> str | None:
        """Return why a lane of a rank gets no place now, or None. quick: how many of the attempts
        under way are those of quick endpoints."""
        if not rank and under_way < self.common:  # as most often
            return None
        idle = not lane.active and lane.steady(mono)
        slow = under_way - quick if rank else 0
        return _no_place(rank, idle, under_way, slow, self.workers, mono >= self._mixed_until)

    def _note(self, lane: _Lane, mono: float) -> None:
        """Remember who begins an attempt: an endpoint is alone when no other did for a minute."""
        if lane is not self._last:
            self._mixed_until = mono + self._LATELY if self._last else 0.0
            self._last = lane


class _Finder:
    """Finds the endpoints that have something to do, and keeps a lane for each of them.

    A lane is made when its endpoint has something due, and is forgotten when it has nothing left
    and there are many; what must survive that stands in the endpoint's row. While something of it
    is under way or unrecorded, or a thread of it is stuck, it stays, also when the endpoint is
    disabled or removed: one endpoint, one lane. Were there two, each would hold a half of what must
    not go out twice. An endpoint that is added under the id of a removed one takes over the lane,
    without its deliveries and its health.

    What it reads, and how it learns that there is something to read (see _News):

        new deliveries       behind the newest that it has seen, after any commit of others
        endpoints changed    counted by a trigger; read by the version in their rows
        endpoints removed    counted; the lanes that there are are compared with the file
        old ones due again   counted (a replay, a resend, a backfill): all that wait are looked at
        cancelled            counted: what was read ahead is read again
        our own outcomes     recorded(): our commits do not show as those of others
        anything missed      all that wait are looked at once a minute, as long as that is cheap

    Each of these ends in a lane that is told (appeared, reread) and put into the schedule.
    """

    __slots__ = (
        "_elsewhere", "_file", "_ledger", "_looking", "_net", "_settings", "lanes", "monitored",
        "news", "orphans", "schedule",
    )  # fmt: skip
    _LANES = 2_048  # lanes that are remembered before those without work are forgotten
    _TOLD = 4  # endpoints that the log names of those which are left to the app
    # Seconds: then all that wait are looked at once more, in case something was missed.
    _LOOK_AGAIN = 60.0

    def __init__(self, settings: _Settings, file: _DrainFile, ledger: _Ledger) -> None:
        """ledger: tells what is not recorded yet."""
        self._settings, self._file, self._ledger = settings, file, ledger
        self._looking = _Paced(4)  # looking at all that wait takes a fifth of the time at most
        # Looking once more, unasked: a thousandth.
        self._net = _Paced(1_000, self._LOOK_AGAIN)
        self.lanes: dict[str, _Lane] = {}
        self.schedule, self.news = _Schedule(), _News()
        # Endpoints that this drain cannot send to, which was said: see _ours.
        self._elsewhere: set[str] = set()
        self.monitored = False  # an endpoint subscribes to webhook.*
        # Ids with deliveries that are no endpoints: written in SQL, or restored.
        self.orphans: list[str] = []

    def begin(self) -> None:
        """Take what the file holds at the start of a run."""
        self.news.begin(self._file.db)
        self.monitored = _monitored(self._file.db)

    def looking(self) -> bool:
        """Say whether there may be work that was not found yet."""
        return self.news.stale or self.news.at is not None

    def rest(self, now: float, mono: float) -> float:
        """Return the seconds until find() has something to do. The look once a minute needs no time
        of its own: a turn comes several times a second."""
        if self.news.stale:
            return 0.0
        rest = self.schedule.next(now, mono)
        return rest if self.news.at is None else min(rest, max(0.0, self._looking.at - mono))

    def find(self, freed: Iterable[_Lane], now: float, mono: float) -> None:
        """Put lanes into the schedule that have something to do: those that may have room again
        (freed), those whose time has come, and those for which there is something new in the file.

        Any of the reads may fail, in rollback mode while the host commits, say. Then nothing may be
        lost: what was read of the news in this call counts as unread, what was due stays due, and
        the error goes to the loop, which calls again.
        """
        schedule, news = self.schedule, self.news
        for lane in freed:
            schedule.put(lane, now, mono)
        due = [*schedule.due.due(now), *schedule.slots.due(mono)]
        mark = news.mark()
        try:
            for lane in self._lanes_of(due, mono):
                schedule.put(lane, now, mono)
            due = []
            if news.stale:
                news.stale = False
                self._read_news(now, mono)
                mark = news.mark()
            if news.at is None and self._net.due(mono):
                news.look_at_all(self._file.db)
            if news.at is not None and self._looking.due(mono):
                self._look_at_some(now, mono)
        except BaseException:
            news.turn_back(mark)
            for id in due:
                schedule.due.at_latest(id, now)
            raise

    def _read_changes(self, now: float, mono: float) -> None:
        """Take in what the counters in webhook_meta tell of: endpoints that changed or are gone,
        old deliveries that are due again, others that were cancelled."""
        db, news = self._file.db, self.news
        version, removed, work, cancelled = news.counters(db)
        if removed != news.removed:
            self.drop_removed()
        if version != news.version:
            if refusal := _refusal(db, self._settings.path, self._settings.home):
                raise OutboxError(refusal)  # adopted meanwhile, by another home
            self._reconfigure(version, now, mono)
        if work != news.work:
            for lane in self.lanes.values():
                lane.backlog.reread(queues_only=True)
            news.look_at_all(db)
            news.work = work
        if cancelled != news.cancelled:
            for lane in self.lanes.values():
                lane.backlog.recalled()
            news.cancelled = cancelled

    def _read_news(self, now: float, mono: float) -> None:
        """Read what others committed: first what changed, then new deliveries, a thousand at most;
        where there are more, the next turn goes on.

        A pending one is told to its lane, if there is one, else the endpoint is looked at when it
        is due. A queued one stands behind others of its queue, and is nobody's business, unless
        its queue was delivered to the end in memory: then it follows at once.
        """
        db, news = self._file.db, self.news
        self._read_changes(now, mono)
        rows = news.new(db)
        news.stale |= len(rows) == _NEW_ROWS
        due: dict[str, float] = {}
        for event, id, due_at, status, name in rows:
            known = self.lanes.get(id)
            if status == "pending":
                if known is not None:
                    known.backlog.appeared(due_at, event)
                due[id] = min(due_at, due.get(id, math.inf))
            elif status != "queued" or name is None or known is None:
                continue
            elif known.enabled and name in known.backlog.ends:
                known.backlog.follow(db, name, known.backlog.ends[name], now)
                due[id] = -math.inf
        self._work_for(due, now, mono)

    def _look_at_some(self, now: float, mono: float) -> None:
        """Look at the next 256 endpoints with something that waits. Where one does not exist, its
        deliveries are given up (orphans): plain SQL wrote them, or a restore left them."""
        due: dict[str, float] = {}
        with self._looking.turn(), self._net.turn():
            rows = self.news.waiting(self._file.db)
        for row in rows:
            if not row.id.isprintable():  # written in SQL, no UTF-8: it cannot be asked for
                continue
            if row.enabled:
                if row.id in self.lanes:
                    self.lanes[row.id].backlog.appeared(row.due_at)
                due[row.id] = row.due_at
            elif row.enabled is None:
                self.orphans.append(row.id)
        self._work_for(due, now, mono, oldest_first=True)

    def _work_for(
        self, due: Mapping[str, float], now: float, mono: float, oldest_first: bool = False
    ) -> None:
        """Put endpoints into the schedule that have deliveries which are due at a time. One without
        a lane gets none before that time. oldest_first: in the order of registration, for after a
        restart nothing is known about any, and those that are there for long are more likely to
        answer."""
        for id, due_at in due.items():
            if id not in self.lanes and due_at > now:
                self.schedule.due.at_latest(id, due_at)
        lanes = self._lanes_of(
            [id for id, due_at in due.items() if id in self.lanes or due_at <= now], mono
        )
        if oldest_first:
            lanes.sort(key=lambda lane: lane.endpoint.created_at)
        for lane in lanes:
            self.schedule.put(lane, now, mono)

    def _lanes_of(self, ids: Sequence[str], mono: float) -> list[_Lane]:
        """Return the lanes of those of some endpoints that are enabled and ours, made where there
        are none; a new one looks for what it has to send."""
        missing = [id for id in ids if id not in self.lanes]
        if missing:
            for row in _load_endpoints(self._file.db, _LISTED, json.dumps(missing)):
                if row.enabled and self._ours(row):
                    lane = _Lane(row.id)
                    lane.backlog.due = -math.inf
                    self._configure(lane, row, mono)
            if len(self.lanes) > self._LANES:
                self._shed(mono)
        return [self.lanes[id] for id in ids if id in self.lanes]

    def _ours(self, row: _EndpointRow) -> bool:
        """Say whether this drain sends to an endpoint; why it leaves one to the app is logged once,
        for the first few. A damaged row counts as ours: to try it tells what is wrong with it."""
        why = isinstance(row.endpoint, Endpoint) and _left_to_the_app(
            row.endpoint.url, row.endpoint.body, self._settings
        )
        if why and row.id not in self._elsewhere:
            self._elsewhere.add(row.id)
            if len(self._elsewhere) <= self._TOLD:
                _log.warning("nothing is sent to %s: %s", row.id, why)
            elif len(self._elsewhere) == self._TOLD + 1:
                _log.warning("nor to others; `doctor` names them")
        return not why

    def _configure(self, lane: _Lane, row: _EndpointRow, mono: float) -> None:
        """Take over an endpoint's row, for a new lane or one whose endpoint changed. The row's
        health is taken, unless the ledger has a newer one. It is taken in any case where the row
        says that a struggle ended (a ping was answered, say) or has another URL."""
        url = lane.endpoint.url
        lane.configure(row, self._settings, mono)
        lane.tried_at = max(lane.tried_at, row.tried_at or 0.0)
        ended = row.failures == 0 and (
            lane.health.failures >= _STRUGGLING or url not in ("", lane.endpoint.url)
        )
        if ended or lane.id not in self._ledger.states:
            health = _Health(
                row.failures,
                row.failing_since,
                row.paused_until,
                unsteady_since=row.unsteady_since,
                good=row.good,
                bad=row.bad,
            )
            lane.health = _WELL if health == _WELL else health
            lane.told |= health.failures >= _FAILING[0]  # by an earlier drain
        self.lanes[lane.id] = lane

    def _shed(self, mono: float) -> None:
        """Forget lanes until half as many are left as may be remembered, older ones first. Those
        stay that have something to do now, under way or unrecorded, or a thread that is stuck. What
        is due later comes up in time, and makes a lane again."""
        now = self._settings.clock()
        spare = [
            lane
            for lane in self.lanes.values()
            if not self._keeps(lane) and lane.backlog.due > now and lane.next_slot <= mono
        ]
        for lane in spare[: len(self.lanes) - self._LANES // 2]:
            if lane.backlog.due < math.inf and lane.enabled:
                self.schedule.due.at_latest(lane.id, lane.backlog.due)
            del self.lanes[lane.id]

    def _reconfigure(self, version: int, now: float, mono: float) -> None:
        """Read endpoints that changed since we looked, 256 at a time; the lanes of others keep
        their connections and what they read ahead. version: the newest there was when this
        began."""
        newer = f"webhook_endpoints WHERE version > ? ORDER BY version LIMIT {_LOOK_ROWS}"
        rows = _load_endpoints(self._file.db, newer, self.news.version)
        due: dict[str, float] = {}
        for row in rows:
            lane = self.lanes.get(row.id)
            if lane is not None and lane.registered != row.registered:
                self._forget([lane])
            # That we disabled it may not be in the row yet.
            if not row.enabled or (lane is not None and lane.disable) or not self._ours(row):
                self.retire(row.id)
                continue
            due[row.id] = _first_due(self._file.db, row.id)
            if lane is not None:
                lane.enabled = True
                lane.backlog.reread()
                lane.backlog.appeared(due[row.id])
                self._configure(lane, row, mono)
                self.schedule.slots.drop(row.id)  # of the rate it had
        full = len(rows) == _LOOK_ROWS
        self.news.version = rows[-1].version if full else version
        self.news.stale |= full
        self.monitored = _monitored(self._file.db)
        self._work_for(due, now, mono)

    def drop_removed(self) -> None:
        """Retire lanes whose endpoints are gone, also where another endpoint has the id by now: it
        is news too, and takes the lane over then. The counter is read first: what is removed after
        that counts it up once more."""
        _, removed, _, _ = self.news.counters(self._file.db)
        there = dict(
            self._file.db.execute(
                f"SELECT id, registered FROM {_LISTED}", (json.dumps(list(self.lanes)),)
            ).fetchall()
        )
        gone = [lane for lane in self.lanes.values() if there.get(lane.id) != lane.registered]
        self._forget(gone)
        for lane in gone:
            self.retire(lane.id)
        self.news.removed = removed

    def _forget(self, lanes: Sequence[_Lane]) -> None:
        """Forget what was of endpoints that were removed, here and in the ledger. What is under way
        goes on, and what comes of it is thrown away (_Drain._take_ended): it would be taken for an
        outcome of the endpoint that gets the id next. That one gets the lane, which counts what
        still holds a place or a thread."""
        for lane in lanes:
            lane.registered, lane.disable, lane.told = 0, None, False
            lane.backlog = _Backlog(lane.id)
        self._ledger.drop({lane.id for lane in lanes})

    def retire(self, id: str) -> None:
        """Start nothing more for a disabled or removed endpoint. What was not tried stays in the
        table as it is. What is under way goes on and is recorded; for that the lane stays, and
        while a thread of it is stuck."""
        self.schedule.due.drop(id)
        lane = self.lanes.get(id)
        if lane is not None:
            lane.enabled = False
            lane.backlog.reread()
            lane.backlog.due = math.inf
            self.schedule.drop(lane)
            if not self._keeps(lane):
                del self.lanes[id]

    def _keeps(self, lane: _Lane) -> bool:
        """Say whether a lane must stay though nothing more is to begin: something of it is under
        way or unrecorded, or a thread is stuck in the host's code. Were that forgotten with it,
        each lane that the endpoint gets after it would let two more threads get stuck."""
        return bool(
            lane.active or lane.backlog.known or lane.lost or lane.id in self._ledger.states
        )

    def recorded(self, batch: Iterable[_Row], now: float, mono: float) -> None:
        """Note what our own commit made due, which the watch on commits of others does not tell: a
        retry, the next one of a queue, our own webhook.* events."""
        touched = set()
        for row in batch:
            self.news.stale |= row.kind == "notice"  # our own webhook.* events
            lane = self.lanes.get(row.endpoint_id or "")
            if lane is None or row.event is None:
                continue
            queue = (
                self._ledger.queues.pop((lane.id, row.event), None) if self._ledger.queues else None
            )
            lane.backlog.recorded(row.event, queue)
            if row.status == "pending":
                lane.backlog.appeared(row.due_at or 0.0, row.event)
                touched.add(lane)
            if queue is not None:  # a trigger made the next one of the queue pending
                lane.backlog.appeared(-math.inf)
                touched.add(lane)
        for lane in touched:
            self.schedule.put(lane, now, mono)

    def turned_back(self, latest: float) -> None:
        """The clock was set back: read everything anew, and end pauses that go on beyond `latest`,
        the latest time that one can be set to by the clock as it is now."""
        for lane in self.lanes.values():
            lane.backlog.reread()
            if lane.health.paused_until > latest:
                lane.health = lane.health._replace(paused_until=0.0, hinted_until=0.0)
                self._ledger.states[lane.id] = lane
        self.news.look_at_all(self._file.db)


@dataclasses.dataclass(slots=True)
class _Counts:
    """What a run came to, for its report and for whoever watches it: `progress` of drain(), the
    live line on a terminal.

    To count what waits takes a time that grows with it: with 300,000 rows, counted four times a
    second, it was a fifth of the drain's speed. So it is done for a fiftieth of the time at most,
    and what waits now is reckoned from the last count and the outcomes since.
    """

    delivered: int = 0  # outcomes of this run
    retried: int = 0
    failed: int = 0
    counted: int = 0  # what waited at the last count
    ended: int = 0  # how much had been delivered or had failed by then, as far as the file knew
    ready: int = 0  # of what waited: due, and of endpoints that are not on hold
    retried_then: int = 0  # the retries by then, as far as the file knew
    pace: _Paced = dataclasses.field(default_factory=lambda: _Paced(50))
    progress_at: float = 0.0  # monotonic
    locked_at: float | None = None  # monotonic: since when another process has kept the file locked

    def count(
        self, db: sqlite3.Connection, now: float = math.inf, unrecorded: Sequence[_Row] = ()
    ) -> None:
        """Count what waits for enabled endpoints, and how much of it could go out now. The file
        does not know yet of what is unrecorded."""
        rows = db.execute(
            """SELECT paused_until <= :now,
                      sum((SELECT count(*) FROM webhook_deliveries
                            WHERE endpoint_id = id AND status = 'pending' AND due_at <= :now)
                        + (SELECT count(*) FROM webhook_deliveries
                            WHERE endpoint_id = id AND queue IS NOT NULL AND status = 'queued')),
                      sum((SELECT count(*) FROM webhook_deliveries
                            WHERE endpoint_id = id AND status = 'pending' AND due_at > :now))
                 FROM webhook_endpoints WHERE enabled GROUP BY 1""",
            {"now": now},
        ).fetchall()
        self.counted = sum(due + later for _, due, later in rows)
        self.ready = sum(due for free, due, _ in rows if free)
        again = sum(row.kind == "outcome" and row.status == "pending" for row in unrecorded)
        over = sum(row.kind == "outcome" for row in unrecorded) - again
        self.ended, self.retried_then = self.delivered + self.failed - over, self.retried - again

    def to_send(self) -> int:
        """Return how much of what waits could go out now: what was ready at the last count, less
        what was tried since."""
        tried = self.delivered + self.failed - self.ended + self.retried - self.retried_then
        return max(0, self.ready - tried)

    def locked(self, mono: float) -> None:
        """Note that the file is locked by another process; the first of such notes holds."""
        self.locked_at = mono if self.locked_at is None else self.locked_at

    def report(self) -> DrainReport:
        """Return the numbers so far; pending is reckoned from the last count."""
        pending = max(0, self.counted + self.ended - self.delivered - self.failed)
        return DrainReport(self.delivered, self.retried, self.failed, pending)


class _Pruning:
    """Retention: deletes old failed rows and old events, 500 at a time, so that the host never
    waits long; and rests for an hour when all of them are gone."""

    __slots__ = ("_from", "at")
    _REST, _RETRY = 3_600.0, 60.0  # seconds

    def __init__(self) -> None:
        self.at = 0.0  # monotonic: not before
        # The seq of the last event looked at; None: begin with the oldest.
        self._from: int | None = None

    def some(self, db: sqlite3.Connection, settings: _Settings, now: float, mono: float) -> None:
        """Delete some of what is old, and set when to go on: in a fifth of a second where something
        was deleted, sooner where nothing was, in an hour at the end. Where it fails (a full disk,
        say), try again in a minute: that must not end the drain."""
        self.at = mono + self._RETRY  # should it fail
        try:
            removed = 0
            if settings.failed_retention is not None:
                removed = _discard_some(db, now - settings.failed_retention)
            if not removed:
                removed, self._from = _prune_some(db, self._from or 0, now - settings.retention)
        except sqlite3.Error as error:
            _log.debug("pruning failed (%s), later again", error)
            return
        done = self._from is None and not removed
        self.at = mono + (self._REST if done else 0.2 if removed else 0.02)


class _Outcomes:
    """Decides what outcomes mean for deliveries and endpoints, and brings them into the file.

    There are three kinds: an attempt ended (end), a delivery was worth nothing any more when its
    turn came (expire), and its endpoint does not exist (give_up_orphans). Each is in the ledger
    until a statement that holds it has committed; record() writes when the budget allows.

    Where the file is locked, outcomes gather, and at two thousand nothing more may begin; the last
    eighth of that is kept for endpoints without a backlog. Where writing fails for another reason
    (a full disk: `storing` is False), nothing may begin from then on: every answer would be
    forgotten, and every delivery be sent again.
    """

    __slots__ = (
        "_file", "_finder", "_ledger", "_settings", "_teller", "budget", "counts", "ends",
        "record_at", "storing",
    )  # fmt: skip

    def __init__(
        self, settings: _Settings, file: _DrainFile, finder: _Finder, ledger: _Ledger, ends: bool
    ) -> None:
        """ends: the drain is one that ends by itself, and not before all is recorded."""
        self._settings, self._file, self._finder, self._ledger = settings, file, finder, ledger
        self._teller = _Teller(settings.observer)
        self.budget, self.counts = _Budget(), _Counts()
        self.ends = ends
        self.record_at = 0.0  # monotonic: no commit before it
        self.storing = True  # False: the last write failed, and not because of a lock

    def full(self) -> bool:
        """Say whether so much waits to be recorded, or cannot be, that nothing more may begin."""
        return not self.storing or len(self._ledger.rows) >= _UNRECORDED

    def tight(self) -> bool:
        """Say whether only an eighth is left of what may wait to be recorded."""
        return len(self._ledger.rows) >= _UNRECORDED - _UNRECORDED // _KEPT

    def end(self, attempt: _Attempt, outcome: _Outcome, now: float, mono: float) -> None:
        """Decide what an attempt's outcome means for its delivery and its endpoint.

        1. the lane learns from it: how long it held its place, health, limit, rank. Where the
           endpoint got another URL meanwhile, it learns only about the place
        2. the verdict: delivered, pending (again later) or failed. Three rules stand above it:
           a row that is damaged does not heal, so it fails at once; what was cancelled meanwhile is
           not given up (pending, in the words of the ledger, leaves its status as it is); and what
           expires is due again by then at the latest, so that it ends in time and holds up nobody
        3. that is a row for the ledger
        4. where the delivery was given up, the endpoint may be hopeless, and is disabled
        5. the delivery's queue goes on
        6. it is counted; and logged and told to the observer, where anybody wants to know
        7. the endpoint's new state is for the ledger too; a disabled one is retired
        """
        lane, picked, policy = attempt.lane, attempt.picked, self._settings.retry
        was_enabled, health, change = lane.enabled, lane.health, None
        lane.occupied(mono - attempt.started + attempt.reading)
        if current := attempt.wire is lane.wire or lane.is_at(attempt.wire):
            change = lane.learn(outcome, now, mono, policy)
        else:
            outcome = outcome.of_old_url()
        first_at = attempt.wall if picked.first_attempt_at is None else picked.first_attempt_at
        status, due_at, reason = _verdict(
            picked.attempts + 1,
            first_at,
            lane.health.failing_since,
            outcome,
            policy,
            now,
            self._settings.rng,
        )
        if picked.type is None or picked.valid != 1:
            status = "failed"
        if status == "failed" and self._is_cancelled(lane, picked):
            status = "pending"
        if status == "pending" and picked.expires_at is not None:
            due_at = min(due_at, picked.expires_at)
        if reason is not outcome.reason:
            outcome = outcome._replace(reason=reason)
        self._add_row(
            picked, lane.id, status, due_at, attempt.wall, mono - attempt.started, outcome
        )
        if status == "failed" and current and lane.enabled and (why := self._hopeless(lane, now)):
            lane.disable, lane.enabled = why, False
        self._next_of_queue(lane, picked, status == "delivered", now)
        self._count(status, lane, picked, outcome, now)
        disabled = "disabled" if was_enabled and not lane.enabled else None
        told = self._settings.observer is not None or _log.isEnabledFor(logging.DEBUG)
        if status != "delivered" or change or disabled or told:
            what = {"delivered": "delivered", "failed": "gave_up"}.get(status, "attempt_failed")
            self._tell([what, change, disabled], lane, picked, outcome, now)
        if lane.disable or (lane.health is not health and lane.health.stored() != health.stored()):
            self._ledger.states[lane.id] = lane
        if not lane.enabled:
            self._finder.retire(lane.id)

    def expire(self, lane: _Lane, picked: _Picked, why: str, now: float) -> None:
        """A delivery that has expired goes to the failed table without an attempt. Its queue goes
        on at once, unless the endpoint holds queues."""
        outcome = _Outcome(None, "expired", why)
        self._add_row(picked, lane.id, "failed", picked.due_at, now, 0.0, outcome, "expired")
        self.counts.failed += 1
        self._ledger.count(lane.id, "given up")
        self._tell(["gave_up"], lane, picked, outcome, now)
        self._next_of_queue(lane, picked, lane.endpoint.on_dead == "skip", now)

    def give_up_orphans(self, now: float) -> None:
        """Deliveries to an endpoint that does not exist go to the failed table, a pick at a time;
        somebody can see them there. They have no lane, so the ledger alone tells which are on their
        way into the file already."""
        outcome = _Outcome(None, "internal", "there is no such endpoint")
        while self._finder.orphans:
            id = self._finder.orphans[-1]
            waiting = {row.event for row in self._ledger.rows if row.endpoint_id == id}
            for picked in _pick(self._file.db, id, math.inf)[0]:
                if picked.event not in waiting:
                    self._add_row(picked, id, "failed", now, now, 0.0, outcome)
                    self.counts.failed += 1
            self._finder.news.look_at_all(self._file.db)  # there may be more of them
            self._finder.orphans.pop()

    def _is_cancelled(self, lane: _Lane, picked: _Picked) -> bool:
        """Say whether a delivery was cancelled while its attempt was under way: it is not given
        up. Asked only where one is to fail. Where the file cannot be read the answer is no: the
        trigger knows the same rule, so only counts and notices are wrong then."""
        sql = "SELECT status FROM webhook_deliveries WHERE event = ? AND endpoint_id = ?"
        with contextlib.suppress(sqlite3.Error):
            row = self._file.db.execute(sql, (picked.event, lane.id)).fetchone()
            return bool(row == ("cancelled",))
        return False

    def _next_of_queue(self, lane: _Lane, picked: _Picked, at_once: bool, now: float) -> None:
        """Have the queue of a delivery go on. at_once: from memory, after a success. After a
        failure the file says who is next, once that is recorded (the same delivery again, or the
        one behind it); so it does where too much is unrecorded, or the next one cannot be read."""
        queue = picked.queue
        if queue is None:
            if lane.endpoint.ordered:  # it was not yet, when this delivery was read
                self._ledger.queues[lane.id, picked.event] = ""
            return
        self._ledger.queues[lane.id, picked.event] = queue
        if at_once and lane.enabled and len(self._ledger.rows) < _UNRECORDED:
            with contextlib.suppress(sqlite3.Error):
                return lane.backlog.follow(self._file.db, queue, picked.event, now)
        lane.backlog.leave(queue)

    def _add_row(
        self,
        picked: _Picked,
        id: str,
        status: str,
        due_at: float,
        at: float,
        duration: float,
        outcome: _Outcome,
        kind: str = "outcome",
    ) -> None:
        """Put an outcome into the ledger, to be recorded with those that are there already; the
        first one as soon as the distance to the last commit allows."""
        if not self._ledger.rows:
            self.record_at = max(self.record_at, _monotonic())
        self._ledger.rows.append(
            _Row(
                kind, picked.event, id, status, due_at, at, duration,
                outcome.status_code, outcome.reason or "", outcome.error or "",
                outcome.response or "",
            )
        )  # fmt: skip

    def _hopeless(self, lane: _Lane, now: float) -> str | None:
        """Return why an endpoint is to be disabled, because hardly anything came through for five
        days and three deliveries or more were given up in that time; None where it is not. What was
        given up is in the file or, unrecorded, in the ledger."""
        hopeless = lane.health.hopeless(now)
        if hopeless is None:
            return None
        since, why = hopeless
        count = sum(
            row.endpoint_id == lane.id and row.status == "failed" for row in self._ledger.rows
        )
        with contextlib.suppress(sqlite3.OperationalError):  # a host commits: asked again later
            count += self._file.db.execute(
                "SELECT count(*) FROM webhook_failed WHERE endpoint_id = ? AND failed_at >= ?",
                (lane.id, since),
            ).fetchone()[0]
        return why if count >= _HOPELESS[1] else None

    def _count(
        self, status: str, lane: _Lane, picked: _Picked, outcome: _Outcome, now: float
    ) -> None:
        """Count an outcome, for the run's report and for metrics(): a success by how long ago the
        event was emitted, a failure by its reason."""
        counts, ledger = self.counts, self._ledger
        if status == "delivered":
            counts.delivered += 1
            took = now - picked.created_at
            return ledger.count(
                lane.id, _BUCKET_NAMES[bisect.bisect_left(_BUCKETS, took)], seconds=max(0.0, took)
            )
        ledger.count(lane.id, outcome.reason or "")
        if status == "failed":
            counts.failed += 1
            ledger.count(lane.id, "given up")
        else:
            counts.retried += 1

    def _tell(
        self, kinds: list[str | None], lane: _Lane, picked: _Picked, outcome: _Outcome, now: float
    ) -> None:
        """Log what happened; note it for the observer, who is told when it is recorded, and as a
        row for endpoints that subscribe to webhook.* events."""
        _log_outcome(lane, picked, outcome, "gave_up" in kinds, "disabled" in kinds)
        for kind in filter(None, kinds):
            notice = Notice(
                kind, lane.id, picked.id, outcome.reason, outcome.status_code, outcome.error,
                lane.endpoint.tenant,
            )  # fmt: skip
            if self._settings.observer is not None:
                self._ledger.note(notice)
            # Events about deliveries of such events would go on for ever between two endpoints that
            # fail now and then.
            if (
                kind in _NOTICE_TYPES
                and self._finder.monitored
                and not str(picked.type).startswith("webhook.")
            ):
                # repr, because a damaged row may hold anything, bytes too.
                data = json.dumps(dataclasses.asdict(notice), default=repr)
                self._ledger.rows.append(
                    _Row("notice", status=_NOTICE_TYPES[kind], at=now, response=data)
                )

    def record(self, mono: float, sending: bool, stopping: bool) -> None:
        """Write what came back, in one statement, if the budget allows a commit now.

        1. it is too early, or there is nothing: later
        2. the file is locked: try again soon
        3. it cannot be written: log that once, and try again in a second; a drain that is stopping
           or ends by itself raises instead, for it would never end
        4. it is written: set the time of the next commit (in a millisecond, whatever the budget
           says, where the drain only waits for this to end), take the rows out of the backlogs,
           find what became due by this, and tell the observer
        """
        if not self._ledger or mono < self.record_at:
            return
        begun = time.thread_time()
        try:
            batch = self._write(self.budget.most(mono))
        except sqlite3.Error as error:
            if not _is_busy(error):
                if self.storing:
                    _log.error(
                        "outcomes cannot be recorded (%s); sending pauses until they can", error
                    )
                self.storing = False
                if stopping or self.ends:
                    raise
            else:
                self.counts.locked(mono)
            # SQLite's busy handler would sleep up to 100 ms between its tries, and hardly ever find
            # a moment between the commits of a busy host. So our connection has none, and we try
            # often. A refused try of a big batch costs milliseconds of CPU, so tries take a fifth
            # of the time at most.
            pause = max(0.0005, 4 * (time.thread_time() - begun)) if self.storing else 1.0
            self.record_at = _monotonic() + pause
            return
        self.storing, self.counts.locked_at = True, None
        took, mono = time.thread_time() - begun, _monotonic()
        hurry = stopping or (self.ends and not sending)
        gap = self.budget.gap(mono, took, len(batch), sending)
        self.record_at = mono + (0.001 if hurry else gap)
        self._file.watch.wrote(mono)
        self._finder.recorded(batch, self._settings.clock(), mono)
        for notice in self._ledger.told():
            self._teller.tell(notice)

    def _write(self, most: int = _BATCH) -> list[_Row]:
        """Write what waits, `most` outcomes at most; return them. Where an endpoint was removed of
        which the drain has not heard, what is of it is forgotten first: it would be written about
        another one that has the id by now."""
        while True:
            try:
                return self._ledger.write(self._file.db, self._finder.news.removed, most)
            except sqlite3.IntegrityError as error:
                if _UNHEARD not in str(error):
                    raise
                self._finder.drop_removed()

    def leave(self) -> None:
        """Write what is known and not written yet: the grace ran out, say, or the loop ended with
        an error. Here a second of waiting for the lock is fine. What cannot be written now is
        delivered once more. The observer is told of none of it."""
        if self._ledger or self._ledger.counts:
            # Any error, MemoryError too: the lock must be released, whatever happens here.
            with contextlib.suppress(Exception):
                self._file.db.execute("PRAGMA busy_timeout = 1000")
                while self._ledger or self._ledger.counts:
                    self._write()

    def close(self) -> None:
        """Let the observer see what it was told."""
        self._teller.close()


# ── drain: the loop ───────────────────────────────────────────────────────────────────────────────
# Promises: one process per file drains; one loop in one thread owns the database connection and
# every decision, so order, rates, fair turns and pauses are plain state, exact by construction. The
# rooms that it calls, and in which order, stand at the head of the section before.
#
# The loop sleeps in select, in _Carrier.wait(). What wakes it, and what it does then:
#
#     a socket is readable         an answer, or a receiver that closed: read. If that ends an
#                                  exchange, there is a turn
#     a socket has room            the rest of a request: sent on
#     the bell, by
#       wake(), an emit here       the commit is about to come: poll the file at short distances
#       a thread of the openers    its errand is done: take it
#       stop()                     begin nothing more
#       a fork in another thread   close the file until it is over (_DrainFile.let_fork)
#     inotify                      somebody writes the file: poll it at short distances
#     a time, the earliest of
#       the next poll              has anybody committed? Only if so, there is a turn
#       the next commit            outcomes wait, and the budget allows it
#       a delivery, a pause, a rate's slot is due    its lane joins a round
#       the next look              while all that wait are looked at, 256 endpoints at a time
#       chores                     every 25 ms while attempts are under way, else every 250 ms.
#                                  They end attempts whose time is over, so up to 25 ms late
#
# A lane that stands in a round and got no place, or no thread, wakes nobody. It is asked again in
# each turn; and the end of an attempt, which makes its place free, makes a turn.

_TAKEOVER_POLL = 0.1  # seconds between two looks at a lock that another process holds


class _Drain:
    """One run of the drain: stand by for the lock, then send until told to stop or nothing is left.

    run() does all of it, in the thread that calls it; a drain runs once. Other threads may call
    what stands first below. The mode says when it ends by itself:

        forever      never (start(), `drain` at the command line)
        once         when nothing that could be sent is due now; retries are left to the next drain
        until_empty  when nothing is left that it could send, retries included. It does not wait for
                     what is queued behind a failed row that holds its queue, nor for endpoints
                     that are disabled
    """

    def __init__(
        self, settings: _Settings, mode: str, progress: Callable[[DrainReport], Any] | None = None
    ) -> None:
        """progress: called about four times a second, in the loop's thread."""
        self.settings, self.progress = settings, progress
        self.mode = mode  # forever, once, until_empty
        self.bell = _Bell()
        self.file = _DrainFile(settings.path, self.bell.ring)
        self.lock = _Lock(settings.path)
        # Monotonic. inf: go on. Else stop() was called: begin nothing, and leave what is under way
        # at this time at the latest.
        self.leave_at = math.inf
        self.ledger = _Ledger()
        self.carrier = _Carrier(settings, self.bell.ring)
        self.finder = _Finder(settings, self.file, self.ledger)
        self.places = _Places(settings.workers)
        ends = mode != "forever"
        self.outcomes = _Outcomes(settings, self.file, self.finder, self.ledger, ends)
        self.counts, self.pruning = self.outcomes.counts, _Pruning()
        self.asking = _Paced(10)  # whether nothing is left takes a tenth of the time at most
        self.chores_at = 0.0  # monotonic: not before
        # What the outbox's clock said at the last chores. Where it is above now, the clock was set
        # back; inf at the start, as if that had happened: see _chores.
        self.clock_seen = math.inf

    # What other threads and signal handlers may call.

    @property
    def stopping(self) -> bool:
        """Whether stop() was called."""
        return self.leave_at < math.inf

    def stop(self, grace: float) -> None:
        """Take no new work; leave when what is under way has ended and is recorded, at the latest
        after `grace` seconds. Returns at once. A second call sets another grace: 0 to leave now."""
        self.leave_at = _monotonic() + grace
        self.bell.ring()

    def wake(self) -> None:
        """Say that something was emitted in this process, and is about to be committed."""
        self.bell.ring(committed=True)

    def under_way(self) -> int:
        """Return how many attempts are under way."""
        return len(self.carrier.attempts)

    # The run.

    def run(self) -> DrainReport:
        """Drain until the mode's end, or stop(). Raise OutboxError where draining makes no sense
        (the file was replaced, cannot be written, is another home's), sqlite3.Error where the file
        fails. Whatever happens, the lock is released and everything is closed."""
        try:
            self.carrier.exchanges.listen(self.bell.inside, self._hear)
            with _PROCESS.forking:
                _PROCESS.drains.add(self.file)
                self.file.open()
            if self._await_lock() and self._await_home():
                if warning := _warn_of_links(self.settings.path):
                    _log.warning("%s", warning)
                self._check_writable()
                self._loop()
            self.file.patiently(lambda: self.counts.count(self.file.db))
            return self.counts.report()
        finally:
            self._leave()

    def _hear(self) -> None:
        """The bell rang; the exchanges call this from wait()."""
        if self.bell.hear():
            self.file.watch.hint(_monotonic())

    def _listen(self) -> None:
        """Something was written to the file; the exchanges call this from wait()."""
        self.file.watch.listen(_monotonic())

    def _await_lock(self) -> bool:
        """Stand by until the lock is ours (True), or there is no reason to go on (False).

        The lock belongs to one process for each file, and is gone when that dies, however it does;
        so a look ten times a second is all that it takes to follow. A drain that ends by itself
        waits only as long as the other one has work left of the kind that its mode is about.
        """
        told, path = False, self.settings.path
        while not self.stopping:
            if self.lock.acquire():
                _log.info("process %d drains %s", os.getpid(), path)
                return True
            if not told:
                _log.info("process %s drains %s; standing by", _drainer(path) or "?", path)
                told = True
            self.file.check()
            self._refused()
            until = math.inf if self.mode == "until_empty" else self.settings.clock()
            if self.mode != "forever" and not self.file.patiently(
                functools.partial(_work_left, self.file.db, until, self.settings)
            ):
                return False  # whoever drains has done it
            self.carrier.wait(_TAKEOVER_POLL)
            self.file.let_fork()
        return False

    def _await_home(self) -> bool:
        """Stand still while the file is another home's: a copy of it would send once more what the
        original sends. It goes on by itself when somebody adopts the file; False when told to stop.
        The lock is kept meanwhile, so that of all processes one says so, and says it once."""
        told = False
        while not self.stopping:
            refusal = self._refused()
            if refusal is None:
                return True
            if not told:
                _log.error("%s", refusal)
                told = True
            self.carrier.wait(_TAKEOVER_POLL)
            self.file.let_fork()
            self._check_file_and_lock()
        return False

    def _refused(self) -> str | None:
        """Return why nothing may be sent. A drain that ends by itself says and raises it: it would
        never come to its end."""
        look = functools.partial(_refusal, self.file.db, self.settings.path, self.settings.home)
        refusal: str | None = self.file.patiently(look)
        if refusal is not None and self.mode != "forever":
            _log.error("%s", refusal)
            raise OutboxError(refusal)
        return refusal

    def _check_file_and_lock(self) -> None:
        """Raise where the file or its lock is not the one that this drain took."""
        if self.file.replaced():  # what we know is not about the file there now
            self.ledger.forget()
            raise OutboxError(f"{self.settings.path} was deleted or replaced while it was drained")
        if self.lock.lost():
            raise OutboxError(f"the lock file {self.lock.path} was deleted; leave it to the drain")

    def _check_writable(self) -> None:
        """Find out before anything is sent whether outcomes can be recorded: a drain that cron
        starts every minute would otherwise send the same rows every minute while the disk is
        full."""
        try:  # what changes no page, BEGIN IMMEDIATE or setting a value to itself, does not tell
            if self.settings.home is not None:
                self.file.patiently(functools.partial(_note_home, self.file.db, self.settings.home))
            self.file.db.execute("UPDATE webhook_meta SET value = value + 1 WHERE key = 'drains'")
        except sqlite3.OperationalError as error:
            if not _is_busy(error):
                raise OutboxError(
                    f"{self.settings.path} cannot be written ({error}); nothing is sent"
                ) from None

    def _loop(self) -> None:
        """Turn until there is a reason to leave; see the head of the section before for one turn.

        In rollback mode any read may find the file locked, while the host commits. Then the rest of
        the turn is left out, and the next one reads the news once more. Nothing is lost by that:
        what reads the file changes its own state after it has read, or turns it back. What must
        not wait for the file is done all the same: timeouts, sending, outcomes.
        """
        self.file.patiently(self.finder.begin)
        while True:
            try:
                self._wait()
                mono, now = _monotonic(), self.settings.clock()
                self._poll(early=True)
                self._take_ended(now, mono)
                if self.carrier.shutdown and not self.stopping:
                    self.stop(10.0)
                if self.stopping:
                    self.carrier.stop()
                else:
                    freed, self.carrier.freed = self.carrier.freed, []
                    self.finder.find(freed, now, mono)
                    self.outcomes.give_up_orphans(now)
                    self._start_attempts(now, mono)
                if mono >= self.chores_at:
                    self._chores(now, mono)
            except sqlite3.OperationalError as error:
                if not _is_busy(error):
                    raise
                self.finder.news.stale = True
                mono = _monotonic()
                self.carrier.look(mono)  # the lock may last for minutes, but timeouts hold
                self.counts.locked(mono)
                self._show_progress(self.settings.clock(), mono)
                time.sleep(0.0005)
            self.carrier.exchanges.flush()
            self._take_ended(self.settings.clock(), _monotonic())
            self.outcomes.record(_monotonic(), bool(self.carrier.attempts), self.stopping)
            self.carrier.hold_up(self.outcomes.tight())
            if self._finished(self.settings.clock()):
                return

    def _finished(self, now: float) -> bool:
        """Say whether to leave the loop.

        1. told to stop, and the grace is over: yes
        2. something is under way or unrecorded: no
        3. told to stop: yes
        4. forever; or there may be work that was not found yet; or a lane waits for its turn, its
           rate or a connection; or the clock was set back, or may have been before the first
           chores, so that due times in the file may change: no
        5. until_empty: if nothing is left to send, now or later
        6. once: if nothing is due now of what waits for a time
        """
        if self.stopping and _monotonic() >= self.leave_at:
            return True
        if self.carrier.attempts or self.ledger:
            return False
        if self.stopping:
            return True
        schedule, looking = (
            self.finder.schedule,
            self.finder.looking() or self.clock_seen > now + 1.0,
        )
        waits = schedule.turns or schedule.slots or self.carrier.freed or self.carrier.crowded
        if self.mode == "forever" or looking or waits:
            return False
        return self._is_empty() if self.mode == "until_empty" else schedule.due.next() > now

    def _is_empty(self) -> bool:
        """Say whether nothing is left to send, now or later. What the agenda has for later is what
        waits; but it may be gone meanwhile (cancelled, removed with its endpoint, deleted in plain
        SQL) or be for an endpoint that is left to the app. So the file is asked, and not in each
        turn: beside thousands of endpoints that are left to the app an answer takes 40 ms."""
        if not self.finder.schedule.due:
            return True
        if self.asking.due(_monotonic()):
            # Locked: asked again in a later turn, as there are four a second.
            with self.asking.turn(), contextlib.suppress(sqlite3.OperationalError):
                return not _work_left(self.file.db, math.inf, self.settings)
        return False

    # Waiting.

    def _wait(self) -> None:
        """Sleep until there is something to do: a socket has news, a time has come, somebody
        committed. A poll that finds nothing costs only itself, and no turn: there may be hundreds a
        second."""
        while True:
            if self.file.let_fork():
                self.finder.news.stale = True
            self.carrier.exchanges.listen_to_hints(self.file.watch.source, self._listen)
            mono = _monotonic()
            until = self._until_work(mono)
            pause = min(until, self.file.watch.rest(mono))
            # The selector rounds up to whole milliseconds; a poll after a hint is sooner. While
            # attempts are under way their answers must wake us, so then it sleeps there.
            if 0 < pause < 0.001 and not self.carrier.attempts:
                time.sleep(pause)
                pause = 0.0
            if self.carrier.wait(pause) or until <= pause or self.stopping:
                return
            self._poll()
            if self.finder.news.stale:
                return

    def _until_work(self, mono: float) -> float:
        """Return the seconds until the loop has something to do that nobody will wake it for; the
        next poll is not among it."""
        until = self.chores_at - mono
        if not self.stopping:  # else nothing is begun
            rest = 0.0 if self.carrier.freed else self.finder.rest(self.settings.clock(), mono)
            until = min(until, rest)
        if self.ledger:
            until = min(until, self.outcomes.record_at - mono)
        return max(0.0, until)

    def _poll(self, early: bool = False) -> None:
        """See whether somebody committed, if it is time for that, or attempts are about to begin
        (early): none may begin that was cancelled before. A commit of the host's is noted for the
        budget. Another SQLite library is looked for less often, since that costs as much."""
        mono = _monotonic()
        if not self.file.watch.rest(mono):
            self.file.check()
        elif not early:
            return
        who = self.file.watch.poll(self.file.db, mono, bool(self.carrier.attempts), early)
        if who is not None:
            self.finder.news.stale = True
        if who == "host":
            self.outcomes.budget.hosts.append(mono)

    # Starting attempts.

    def _start_attempts(self, now: float, mono: float) -> None:
        """Start what may be started, unless too many outcomes wait to be recorded."""
        if not self.outcomes.full():
            start = functools.partial(self._start, now)
            self.places.serve(self.finder.schedule, self.carrier, now, mono, start)

    def _start(self, now: float, lane: _Lane) -> bool:
        """Start the endpoint's next attempt, if it has something due. False: no more for now, since
        too many outcomes wait to be recorded."""
        try:
            picked = self._take(lane, now)
        except sqlite3.Error as error:
            if _is_busy(error) or self.mode != "forever":
                self.finder.schedule.turns.join(lane, lane.rank(_monotonic()))
                raise
            # A page of the file is damaged, say. The others go on, this one rests for a minute;
            # but a drain that ends by itself would never end, and raises.
            lane.health = lane.health._replace(paused_until=now + _LONGEST_PROBE)
            _log.error("deliveries of endpoint %s cannot be read (%s)", lane.id, error)
            return True
        if picked is not None:
            self.carrier.begin(lane, picked, now)
            if self.carrier.done:  # it failed at once: to be learned before the next is tried
                self._take_ended(now, _monotonic())
        return not self.outcomes.full()

    def _take(self, lane: _Lane, now: float) -> _Picked | None:
        """Return the endpoint's next delivery that is worth an attempt. Those before it that have
        expired end here, until too many outcomes wait to be recorded. The lanes share the
        characters of data that may be read ahead, so that two thousand do not fill the memory."""
        most = 0 if lane.backlog.read else max(_LARGE, _READ_AHEAD // len(self.finder.lanes))
        picked = lane.backlog.take(self.file.db, now, most)
        failed_at = min(lane.tried_at, now)  # a clock may have been ahead then
        if picked is not None:
            lane.note_gap(picked.due_at, now, self.settings.retry)
        while picked is not None and (why := self._expired(lane, picked, failed_at, now)):
            self.outcomes.expire(lane, picked, why, now)
            if self.outcomes.full():
                return None
            picked = lane.backlog.take(self.file.db, now, max(most, _LARGE))
        return picked

    def _expired(self, lane: _Lane, picked: _Picked, failed_at: float, now: float) -> str:
        """Return why a delivery has expired before an attempt; '' where it has not.

        1. its own time is over
        2. it was never tried, because the endpoint struggles and gets one probe at a time, and the
           endpoint has failed for the whole of the policy. Without this such deliveries would wait
           for a probe of their own for ever, while new events come. In a queue it waited for those
           before it, and is tried

        failed_at: when the endpoint's newest attempt began. For how long it has failed is counted
        up to then and not up to now: a receiver that asks for a pause may be well after it.
        """
        if picked.expires_at is not None and picked.expires_at <= now:
            return f"it was worth nothing after {_moment(picked.expires_at)}"
        since = lane.health.failing_since
        if since is None or lane.health.failures < _STRUGGLING:  # as most often
            return ""
        if picked.attempts or picked.queue is not None:
            return ""
        over = _is_over(picked.due_at, since, self.settings.retry, failed_at)
        return f"its endpoint has failed since {_moment(since)}" if over else ""

    # Outcomes.

    def _take_ended(self, now: float, mono: float) -> None:
        """Take the attempts that ended: what was of an endpoint that is removed by now is thrown
        away, whoever has its id; outcomes are judged; what was not tried goes back to the front of
        its backlog, or is forgotten if the endpoint is disabled by now. Then the lane waits where
        it belongs now; one that is well and stands in the round of the quick belongs there still,
        as most do, and that saves the call."""
        for attempt, outcome in self.carrier.ended():
            if attempt.registered != attempt.lane.registered:
                if not attempt.lane.enabled:
                    self.finder.retire(attempt.lane.id)
            elif outcome is not None:
                self.outcomes.end(attempt, outcome, now, mono)
            elif attempt.lane.enabled:
                attempt.lane.backlog.put_back(attempt.picked)
            else:
                attempt.lane.backlog.known.discard(attempt.picked.event)
            if attempt.lane.round != 0 or attempt.lane.health is not _WELL:
                self.finder.schedule.put(attempt.lane, now, mono)

    # Chores, about forty times a second, four while idle.

    def _chores(self, now: float, mono: float) -> None:
        """Do what has to be done now and then:

        1. stop where the file or the lock was replaced
        2. end attempts whose time is over, close connections that were idle for long
        3. show progress
        4. delete what is old, when nobody writes
        5. notice that the clock was set back by more than a second. Times in the file may be years
           ahead then, so they are pulled back; but first what the ledger holds has to be written,
           since it has such times too, and so chores come again at once until it is. At the start
           of a run the same is done once: the clock may have been set back while no drain ran
        """
        self.chores_at = mono + (0.025 if self.carrier.attempts else 0.25)
        self._check_file_and_lock()
        self.carrier.look(mono)
        self.carrier.chores(mono)
        if not self.ledger:
            self.counts.locked_at = None
        self._show_progress(now, mono)
        if (
            mono >= self.pruning.at
            and not self.ledger.rows
            and not self.outcomes.budget.host_rate(mono)
        ):
            self.pruning.some(self.file.db, self.settings, now, mono)
        if self.clock_seen > now + 1.0:
            if self.ledger.rows:
                self.chores_at = mono
                return
            longest = self.settings.retry.longest
            try:
                _pull_back(self.file.db, now, longest)
            except sqlite3.Error as error:
                if _is_busy(error):
                    raise
                _log.error("times of before the clock was set back stay as they are (%s)", error)
            self.finder.turned_back(now + longest)
        self.clock_seen = now

    def _show_progress(self, now: float, mono: float) -> None:
        """Call `progress` four times a second, with what is counted or reckoned by now."""
        if self.progress is not None and mono >= self.counts.progress_at:
            self.counts.progress_at = mono + 0.25
            if self.counts.pace.due(mono):
                # Where the file is locked, what was counted last still tells something.
                with self.counts.pace.turn(), contextlib.suppress(sqlite3.OperationalError):
                    self.counts.count(self.file.db, now, self.ledger.rows)
            self.progress(self.counts.report())

    # Leaving.

    def _leave(self) -> None:
        """Close everything, in this order: nothing more is sent; what came back is recorded; then
        another process may drain. What could not be recorded stays pending and is sent again. A
        child process that was forked out of the loop owns nothing of it and closes nothing."""
        if self.file.forked():
            return
        self.carrier.close()
        self.outcomes.leave()
        self.bell.close()
        self.lock.release()
        _PROCESS.drains.discard(self.file)
        self.file.leave()
        self.outcomes.close()


# ── outbox ────────────────────────────────────────────────────────────────────────────────────────
# Promises: everything is checked before anything is written; each verb once, in the caller's
# transaction when `conn` is given, else in one of its own. Reads and writes tables; knows nothing
# of sockets.

# The INSERT of emit; the trigger of webhook_accept makes of it the event and its deliveries. Some
# values are taken by their position (in _insert_event and _matched): the first four, from seq to
# data; idempotency_key, the sixth; and the last two, `matched`, which _insert_event fills in, and
# `outbox`. What is not given is '' or 0: to bind None costs four times as much (see _ROW_VALUES),
# which was an eighth of an emit.
_EMIT = """INSERT INTO main.webhook_accept
       (seq, type, tenant, data, key, idempotency_key, headers, created_at, due_at, expires_at,
        internal, matched, outbox)
VALUES (?, ?, nullif(?, ''), ?, nullif(?, ''), nullif(?, ''), nullif(?, ''), ?, ?,
        nullif(?, 0), nullif(?, 0), nullif(?, ''), ?)"""
# The endpoints with a filter whose patterns match; parameters :type and :tenant, of an event.
_FILTERS_OF = _FILTERED.replace("webhook_p", "main.webhook_p").format(":")
# Whether the filter of an endpoint p lets the data of an event e through: all of its paths are met.
# Data that is no JSON gives NULL, which chooses nothing. For backfill, which decides in SQL.
_MET = _met("p.filter", "e.data")
_LETS_THROUGH = f"""CASE WHEN p.filter IS NULL THEN 1
                   WHEN json_valid(e.data) THEN (SELECT count(*) FROM json_each(p.filter)) = (
                     SELECT count(DISTINCT wanted.key) FROM {_MET[0]} WHERE {_MET[1]}) END"""
_NEWEST = "SELECT max(seq) FROM main.webhook_events"
# The event of an idempotency key and a tenant; there is at most one (index webhook_events_once).
_EMITTED_ONCE = """SELECT +seq FROM main.webhook_events
 WHERE idempotency_key = ? AND coalesce(tenant, '') = coalesce(?, '')"""
_UNDO = "DELETE FROM main.webhook_events WHERE seq = ?"
# For a write that makes a delivery due sooner, or adds one of an event that a drain may have seen
# already: the drain looks for what is new behind the newest event, and elsewhere only when this
# says so.
_SAY_WORK = _WORK.replace("webhook_meta", "main.webhook_meta")
# The queue that a row of webhook_deliveries belongs in: '' on an ordered endpoint, else the event's
# key, which is NULL where it has none: then it is in no queue. The trigger of webhook_accept says
# the same.
_QUEUE_OF = """(SELECT CASE WHEN p.ordered THEN '' ELSE e.key END
                  FROM main.webhook_events AS e, main.webhook_endpoints AS p
                 WHERE e.seq = event AND p.id = endpoint_id)"""
# Whether an endpoint p may have an event e at all, whatever its patterns: the table of tenants. The
# trigger of webhook_accept says the same.
_MAY_HAVE = "coalesce(p.tenant, '') IN (coalesce(e.tenant, ''), '*')"
# The parts of JSON text that say how deep it is nested. Texts are among them so that the brackets
# in them do not count.
_NESTING = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]')


def _matched(cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> str:
    """Return the endpoints whose filter lets an event through, as the column `matched` wants them:
    their ids with a blank before and after each.

    row: the values of _EMIT. The trigger cannot decide it: it would need a JSON function, which
    hosts with PRAGMA trusted_schema = OFF refuse in some versions of SQLite.
    """
    _, type, tenant, data, *_ = row
    cursor.execute(_FILTERS_OF, {"type": type, "tenant": tenant})
    found = [endpoint for endpoint, filter in cursor.fetchall() if _lets_through(filter, data)]
    return f" {' '.join(found)} "


def _insert_event(
    db: Any, cursor: sqlite3.Cursor, row: tuple[Any, ...], seqs: _Seqs, now: float
) -> int:
    """Insert an event; return its seq, or that of the event which had its idempotency_key before.

    The trigger may refuse the row with one of two texts that ask for a second try:

        the seq is not new   the seq was made before we had the write lock, and another process made
                             a higher one since: make one that follows the newest
        filters decide       endpoints with a filter are concerned: say which of them get it

    No event may stay behind an emit that raised. SQLite undoes an INSERT that fails, except in two
    cases, in which we delete the event ourselves. Both are interruptions (Connection.interrupt, or
    a progress handler of the host's): of the read after the INSERT, and of the INSERT itself when
    all of it was done, since SQLite asks the handler once more when a statement ends. Where the
    deletion is interrupted as well, SQLite rolls the host's transaction back, and emit raises
    TransactionLost.
    """
    written, inserted = getattr(db, "total_changes", None), False
    try:
        while not inserted:
            try:
                cursor.execute(_EMIT, row)
                inserted = True
            except Exception as error:
                if "the seq is not new" in str(error):
                    cursor.execute(_NEWEST)
                    row = (seqs.new(now, cursor.fetchone()[0]), *row[1:])
                elif "filters decide" in str(error):
                    row = (*row[:-2], _matched(cursor, row), row[-1])
                else:
                    raise
        if row[5]:
            cursor.execute(_EMITTED_ONCE, (row[5], row[2]))
            return int(cursor.fetchone()[0])
    except Exception as error:
        # Where the idempotency key was known, nothing was written though `inserted` is true, and
        # our seq was never compared: it may be another event's. The count of changes tells.
        done = inserted or "interrupted" in str(error)
        if done and db.in_transaction and getattr(db, "total_changes", None) != written:
            cursor.execute(_UNDO, row[:1])
        raise
    return int(row[0])


def _checked_type(type: Any) -> str:
    """Return the type of an event to emit; PayloadError where it is none."""
    if not isinstance(type, str) or len(type) > 256 or not _TYPE.fullmatch(type):
        raise PayloadError(
            "the type is not valid: letters, digits, _ and - in parts joined by dots "
            "(order.created)"
        )
    return type


def _depth(text: str) -> int:
    """Return how deep JSON text is nested: 0 for a number, 1 for a flat object."""
    deepest = depth = 0
    for match in _NESTING.finditer(text):
        if match[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in "]}":
            depth -= 1
    return deepest


def _path_of_fault(data: Any, default: Callable[[Any], Any] | None) -> str:
    """Return where in data the part is that cannot be JSON: data.items[2].price.

    For the text of an error, so it may take its time: each part is encoded by itself, and the
    first that cannot be is looked into in turn, until it has no parts or all of them are good.
    """
    path = "data"
    while len(path) < 200:  # a circle has no end
        steps: Iterable[tuple[str, Any]] = ()
        if isinstance(data, dict):
            steps = (
                (f".{key}" if str(key).isidentifier() else f"[{key!r}]", part)
                for key, part in data.items()
            )
        elif isinstance(data, (list, tuple)):
            steps = ((f"[{n}]", part) for n, part in enumerate(data))
        for step, part in steps:
            try:
                _dumps(part, default).encode()
            except (TypeError, ValueError):
                path, data = path + step, part
                break
        else:
            break
    return _one_line(path, 200)


def _checked_data(data: Any, default: Callable[[Any], Any] | None) -> tuple[str, int]:
    """Return data as JSON text that every receiver can parse and that will be sent as it is, and
    its size in bytes. PayloadError names the place of what cannot be JSON.

    Refused beside what json.dumps refuses: NaN and Infinity, which are no JSON; half a surrogate
    pair, which is no UTF-8; and nesting beyond 500 levels, since Python and SQLite give up at a
    thousand.
    """
    try:
        text = _dumps(data, default)
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        where = _path_of_fault(data, default)
        raise PayloadError(
            f"{where} holds half a surrogate pair, which is no Unicode text"
        ) from None
    except RecursionError:
        raise PayloadError(f"data is nested too deeply, more than {_DEEPEST} levels") from None
    except (TypeError, ValueError) as error:
        where, why = _path_of_fault(data, default), _one_line(str(error), 120)
        cure = "convert it, or give the Outbox a json_default" if default is None else "convert it"
        raise PayloadError(f"{where} is not plain JSON: {why}; {cure}") from None
    # First a cheap look: without that many brackets it cannot be so deep.
    if size > _DEEPEST and text.count("[") + text.count("{") > _DEEPEST < _depth(text):
        raise PayloadError(f"data is nested too deeply, more than {_DEEPEST} levels")
    return text, size


class _Unparsed(str):
    """The text of data that Python cannot parse: an integer of 4,301 digits, a thousand levels.

    It stands where an event's parsed data would. A class of its own, so that the pages show it as
    it is, and not as a JSON text in quotes.
    """

    __slots__ = ()


def _finite(text: str) -> float:
    """Return a number of JSON text that JSON text can hold again."""
    if not math.isfinite(value := float(text)):
        raise ValueError("not finite")
    return value


def _data_of(text: str) -> Any:
    """Return the value of stored data; where Python cannot parse it, its text. Plain SQL can write
    what SQLite takes for JSON and Python does not, and nobody who only looks at an event should
    fail over it."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return _Unparsed(text)


def _is_json_already(data: Any) -> bool:
    """Say whether data is the JSON text of an object or array, which would be encoded twice."""
    if not isinstance(data, str) or data.lstrip()[:1] not in ("{", "["):
        return False
    try:
        return isinstance(json.loads(data), (dict, list))
    except (ValueError, RecursionError):
        return False


def _warn_of(type: str, data: Any, size: int) -> None:
    """Log what receivers will not like about an event's data. size: bytes, as JSON. The event is
    emitted all the same."""
    if size > _WARN_BODY:
        _log.warning(
            "%s carries %d bytes; receivers expect less than 20 KiB, consider sending a link",
            type,
            size,
        )
    if _is_json_already(data):
        _log.warning(
            "%s carries text that is JSON already, so receivers get it encoded twice: pass the "
            "object itself (json.loads)",
            type,
        )


def _emit_times(
    now: float, delay: float, expires: float | None, first: float
) -> tuple[float, float, float]:
    """Return when an event is emitted, due and worth nothing any more, all in UTC seconds; the last
    is 0 where it does not expire. first: seconds, the first delay of the retry policy.

    An event that is worth nothing before it is due becomes due when it expires: it ends then, and
    does not hold up what is behind it in its queue until the end of its delay.
    """
    due_at = now + _number("delay", delay, 0, 1e9) + first
    if expires is None:
        return now, due_at, 0.0
    expires_at = now + _number("expires", expires, 0.001, 1e9)
    return now, min(due_at, expires_at), expires_at


def _path(database: str | os.PathLike[str]) -> str:
    """Return the one name by which we open a database, with symbolic links followed, as SQLite does
    it: the lock of the drain stands beside the file of that name."""
    if not isinstance(database, (str, bytes, os.PathLike)):
        raise PayloadError("database must be the path of a file")
    path = os.fsdecode(os.fspath(database))
    if path in ("", ":memory:") or path.startswith("file:"):
        raise SchemaError(
            "this needs the path of a file: a database in memory is one connection's own, "
            "and forgets"
        )
    return os.path.realpath(path)


def _guard(networks: Any, http: Any) -> _Guard:
    """Return the guard that two options of the constructor make. Networks may be texts; a single
    one is taken as that, and not as a list of its characters, or of its addresses."""
    if isinstance(networks, (str, _Network)):
        networks = [networks]
    try:
        for network in (networks := tuple(networks)):
            if not isinstance(network, (str, _Network)):
                raise TypeError(f"{_one_line(repr(network), 60)} is none")
        admitted = tuple(ipaddress.ip_network(n) if isinstance(n, str) else n for n in networks)
    except (TypeError, ValueError) as error:
        raise PayloadError(
            f"allow_networks must hold networks such as 10.1.0.0/16: {error}"
        ) from None
    return _Guard(admitted, bool(_checked_switch("allow_http", http)))


# Returns an endpoint as the cursor's transaction sees it; raises NotFound, also where there is one
# that is not for whoever asks.
_Find = Callable[[sqlite3.Cursor, str], Endpoint]


class EmitOptions(TypedDict, total=False):
    """What aemit takes beside connection, type and data; each means what it means in emit."""

    tenant: str | None
    key: str | None
    idempotency_key: str | None
    delay: float
    expires: float | None
    headers: Mapping[str, str] | None


class Filters(TypedDict, total=False):
    """What failed, replay and discard take to choose failed rows. A row must meet all that are
    given; None is as good as left out."""

    ids: Iterable[int] | None  # FailedDelivery.id
    endpoint: str | None
    tenant: str | None  # of the event
    type: str | None  # a type, or a group: order.*
    reason: str | None
    since: float | None  # of failed_at, UTC seconds, itself included
    until: float | None  # the same, itself not included


def _row_ids(ids: Any) -> str:
    """Return the numbers of rows as a JSON list, for json_each. One number, or text, is a mistake
    and not a list."""
    found = [ids] if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable) else list(ids)
    if not all(type(id) is int for id in found) or not isinstance(ids, Iterable):
        raise PayloadError("ids must be a list of row numbers")
    return _dumps(found)


def _event_seqs(ids: Iterable[str]) -> str:
    """Return the seq of each of some events as a JSON list; null, which finds nothing, for an id
    that is no event's."""
    return _dumps([_event_seq(id) for id in ids])


_STATUSES = ("pending", "held", "delivered", "failed", "cancelled")
# Filters, as verbs take them by keyword: what each asks of its column ({}), and the check that
# makes of the value given what SQL compares. The check matters: a time that is text would compare
# greater than every number in SQLite, so that `until` meant everything.
_FILTERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "ids": ("{} IN (SELECT value FROM json_each(?))", _row_ids),
    "events": ("{} IN (SELECT value FROM json_each(?))", _event_seqs),
    # No event has the seq -1.
    "event_id": ("{} = ?", lambda id: -1 if (seq := _event_seq(id)) is None else seq),
    "endpoint": ("{} = ?", str),
    "tenant": ("{} = ?", _checked_tenant),
    "type": ("{} GLOB ?", str),
    "reason": ("{} = ?", lambda reason: _choice("reason", reason, _REASONS)),
    "status": ("{} = ?", lambda status: _choice("status", status, _STATUSES)),
    "key": ("{} = ?", lambda key: _line("key", key, 256, 1)),
    "since": ("{} >= ?", lambda since: _number("since", since, -1e12, 1e12)),
    "until": ("{} < ?", lambda until: _number("until", until, -1e12, 1e12)),
    # No keywords of a verb. The door of a customer adds them: endpoints of this tenant only, and
    # none of these types.
    "_of": ("{} IN (SELECT id FROM main.webhook_endpoints WHERE tenant = ?)", str),
    "_but": ("{} NOT IN (SELECT value FROM json_each(?))", _dumps),
}
# Which filters a verb takes, and the column, or SQL, that each looks at there. For failed rows:
_OF_FAILED = {name: name for name in ("type", "reason")} | {
    "ids": "webhook_failed.id",
    "endpoint": "endpoint_id",
    "tenant": "(SELECT tenant FROM main.webhook_events WHERE seq = webhook_failed.event)",
    "since": "failed_at",
    "until": "failed_at",
    "_of": "endpoint_id",
    "_but": "type",
}
# Whether an event was erased; {} is SQL of its seq.
_WAS_ERASED = "EXISTS (SELECT 1 FROM main.webhook_erased WHERE event = {})"
# The failed table for batches by id: without the hint SQLite may take the index by endpoint where
# an endpoint is chosen, and read it from its beginning for each batch.
_FAILED = "main.webhook_failed NOT INDEXED"
# The filters of verbs about events, and what each looks at; e is the event:
_OF_EVENT = {
    "events": "e.seq",
    "tenant": "e.tenant",
    "type": "e.type",
    "since": "e.created_at",
    "until": "e.created_at",
    "_but": "e.type",
}
# What people are told of the status of a delivery d to an endpoint p:
#
#     in the file         told
#     pending, queued     pending, or held while the endpoint is disabled
#     delivered           delivered
#     failed, discarded   failed; `discarded` is one whose failed row somebody deleted
#     cancelled           cancelled
_PUBLIC_STATUS = """CASE WHEN d.status IN ('pending', 'queued')
       THEN CASE WHEN p.enabled = 0 THEN 'held' ELSE 'pending' END
       WHEN d.status = 'discarded' THEN 'failed' ELSE d.status END"""
# The filters of verbs about deliveries, and what each looks at; d is the delivery, e its event:
_OF_DELIVERY = {
    **_OF_EVENT,
    "event_id": "d.event",
    "endpoint": "d.endpoint_id",
    "status": _PUBLIC_STATUS,
}
# What stats tells of each endpoint besides its last hour. Each number is read from one index: rows
# that wait are counted, and what was delivered is not read.
_NUMBERS = """SELECT p.id, (SELECT count(*) FROM webhook_failed WHERE endpoint_id = p.id),
       p.enabled, p.failing_since, p.failures, p.paused_until, p.disabled_reason, p.tenant,
       (SELECT count(*) FROM webhook_deliveries
         WHERE endpoint_id = p.id AND status = 'pending' AND due_at > :now) +
       (SELECT count(*) FROM webhook_deliveries
         WHERE endpoint_id = p.id AND queue IS NOT NULL AND status = 'queued'),
       (SELECT count(*) FROM webhook_deliveries
         WHERE endpoint_id = p.id AND status = 'pending' AND due_at <= :now),
       (SELECT due_at FROM webhook_deliveries
         WHERE endpoint_id = p.id AND status = 'pending' ORDER BY due_at LIMIT 1)
  FROM webhook_endpoints AS p"""
# The last hour of each endpoint that was tried in it, from :since on: for each twelfth, 0 the
# oldest, the attempts and the failures in it, as 'ATTEMPTS FAILURES'. The newest twelfth has no
# end, so that what was tried since the clock was read counts too.
_HOUR = """SELECT p.id, one.value,
       (SELECT count(*) || ' ' || count(reason) FROM webhook_attempts
         WHERE endpoint_id = p.id AND at >= :since + 300 * one.value
           AND at < CASE one.value WHEN 11 THEN 9e99 ELSE :since + 300 * (one.value + 1) END)
  FROM webhook_endpoints AS p CROSS JOIN json_each('[0,1,2,3,4,5,6,7,8,9,10,11]') AS one
 WHERE (SELECT max(at) FROM webhook_attempts WHERE endpoint_id = p.id) >= :since"""
# The seconds that the newest successes of that hour took, :most of each endpoint.
_TOOK = """SELECT p.id, a.duration FROM webhook_endpoints AS p CROSS JOIN webhook_attempts AS a
 WHERE a.id IN (SELECT id FROM webhook_attempts
                 WHERE endpoint_id = p.id AND at >= :since AND reason IS NULL
                 ORDER BY at DESC LIMIT :most)"""
# The last failure of that hour, of the endpoints in the JSON list :failed.
_LAST_ERRORS = """SELECT endpoint_id, reason, error FROM webhook_attempts
 WHERE id IN (SELECT (SELECT id FROM webhook_attempts
                       WHERE endpoint_id = found.value AND at >= :since AND reason IS NOT NULL
                       ORDER BY at DESC, id DESC LIMIT 1) FROM json_each(:failed) AS found)"""
# What `deliveries` reads. An endpoint that was removed has no row; its deliveries are on record.
_DELIVERIES = """webhook_deliveries AS d JOIN webhook_events AS e ON e.seq = d.event
                    LEFT JOIN webhook_endpoints AS p ON p.id = d.endpoint_id"""
_OUR_SIDE = ("internal", "sender")  # reasons that are about our side, and not the receiver's
_NOT_SENT = "it could not be sent"  # what a customer is told of these
# What `deliveries` of a tenant's door reads: CROSS JOIN has SQLite begin with the tenant's events,
# whatever ANALYZE has counted. What '*' endpoints got of them, and what removed endpoints
# had, is not among these.
_DELIVERIES_OF_TENANT = """webhook_events AS e CROSS JOIN webhook_deliveries AS d ON d.event = e.seq
                    CROSS JOIN webhook_endpoints AS p
                            ON p.id = d.endpoint_id AND p.tenant = e.tenant"""
# The filters of cancel and retry_now, which are about deliveries that wait:
_OF_WAITING = {**_OF_EVENT, "event_id": "e.seq", "endpoint": "d.endpoint_id", "key": "e.key"}
_OF_WAITING["_of"] = "d.endpoint_id"
# What erase does to the event :seq, in this order:
#
#     1. what waits is cancelled
#     2. a failed row that holds its queue lets it go on, since it can never be replayed:
#        `discarded` holds nothing
#     3. the event's key, which may say who it is about, leaves the names of queues; then what has a
#        failed row is `failed` again, and in no queue
#     4. answers and errors go, from attempts and failed rows; then what the app itself gave
#     5. the event is entered as erased: from then on triggers keep no answer to it, and no verb
#        delivers it
_ERASE = (
    """UPDATE main.webhook_deliveries SET status = 'cancelled'
        WHERE event = :seq AND status IN ('pending', 'queued')""",
    """UPDATE main.webhook_deliveries SET status = 'discarded'
        WHERE event = :seq AND status = 'failed' AND queue IS NOT NULL""",
    """UPDATE main.webhook_deliveries
          SET queue = NULL,
              status = CASE WHEN EXISTS (SELECT 1 FROM main.webhook_failed AS f
                                          WHERE f.event = :seq
                                            AND f.endpoint_id = webhook_deliveries.endpoint_id)
                            THEN 'failed' ELSE status END
        WHERE event = :seq AND queue IS NOT NULL""",
    """UPDATE main.webhook_attempts SET error = NULL, response = NULL WHERE event = :seq""",
    """UPDATE main.webhook_failed SET key = NULL, error = NULL, response = NULL
        WHERE event = :seq""",
    """UPDATE main.webhook_events
          SET data = 'null', headers = NULL, key = NULL, idempotency_key = NULL
        WHERE seq = :seq""",
    "INSERT OR IGNORE INTO main.webhook_erased VALUES (:seq, :now)",
)
# Deliveries that wait are read a thousand at a time, in two passes over two indexes. Of each pass:
# which rows it reads, the column that orders them (before the event), and what is below all of its
# values. Queued rows come first: one that becomes pending meanwhile, because the head of its queue
# ended, is then met in the second pass. The other way round it would be missed.
_WAITING_ROWS = (
    ("d.queue IS NOT NULL AND d.status = 'queued'", "d.queue", ""),
    ("d.status = 'pending'", "d.due_at", -math.inf),
)


def _chosen(columns: Mapping[str, str], filters: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return the SQL condition of some filters and the values of its parameters; '1', which is
    always true, where all of them are None. columns: filter -> SQL of what it looks at.

    A filter that is not among the columns is a TypeError, as for any keyword that there is not; to
    ignore it would act on more rows than meant. PayloadError where a value cannot be one.
    """
    terms, values = list[str](), list[Any]()
    for name, value in filters.items():
        if name not in columns:
            public = ", ".join(column for column in columns if column[0] != "_")
            raise TypeError(f"there is no filter {name}; there are {public}")
        if value is not None:
            condition, check = _FILTERS[name]
            terms.append(condition.format(columns[name]))
            values.append(check(value))
    return " AND ".join(terms) or "1", values


def _drain_mode(once: bool, until_empty: bool) -> str:
    """Return the mode of a _Drain that two switches ask for."""
    if once and until_empty:
        raise _Unclear("say once (--once) or until_empty (--until-empty), not both")
    return "until_empty" if until_empty else "once" if once else "forever"


class _Hour(NamedTuple):
    """What an endpoint's attempts of the last hour came to."""

    tried: list[int]  # attempts in each twelfth (five minutes), oldest first
    failed: list[int]  # of these
    took: list[float]  # seconds of its newest successes, in no order


def _endpoint_stats(
    row: Sequence[Any], hour: _Hour, last_error: str | None, now: float
) -> EndpointStats:
    """Return an endpoint's numbers. row: of _NUMBERS. What waits is what is due and what is due
    later, queued rows among the latter. A pause that is over counts as none."""
    id, failed, enabled, failing_since, failures, paused_until, reason, tenant, *waits = row
    later, due, oldest = waits
    good = sorted(hour.took)
    p50, p95 = (good[len(good) * share // 100] if good else None for share in (50, 95))
    history = tuple(map(operator.sub, hour.tried, hour.failed))
    return EndpointStats(
        id=id,
        enabled=bool(enabled),
        pending=due + later,
        oldest_due_age=now - oldest if due else None,
        failed=failed,
        delivered=sum(history),
        attempts=sum(hour.tried),
        p50=p50,
        p95=p95,
        last_error=last_error,
        history=history,
        failing_since=failing_since,
        failures=failures,
        failing=bool(enabled) and _Health(failures, failing_since).failing(now),
        paused_until=paused_until if paused_until > now else None,
        disabled_reason=reason,
        tenant=tenant,
    )


# The gauges of metrics(), one sample an endpoint: name, help, field of EndpointStats.
_GAUGES = (
    ("pending", "Deliveries that wait, held ones too.", "pending"),
    ("failed", "Rows of webhook_failed.", "failed"),
    ("oldest_due_age_seconds", "Age of the oldest due delivery.", "oldest_due_age"),
    ("enabled", "1 for an enabled endpoint.", "enabled"),
    ("failing_since_seconds", "UTC of the first failure in a row; 0: none.", "failing_since"),
)


def _family(
    name: str, kind: str, help: str, samples: Iterable[tuple[str, str, float]]
) -> list[str]:
    """Return one metric in Prometheus' text format; samples are (suffix, labels, value)."""
    name = "webhook_outbox_" + name
    lines = [f"{name}{suffix}{{{labels}}} {value:.15g}" for suffix, labels, value in samples]
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}", *lines]


def _histogram(labels: str, counts: Mapping[str, float]) -> Iterator[tuple[str, str, float]]:
    """Yield the samples of an endpoint's seconds to delivery, for _family. The file counts each
    bucket by itself; Prometheus wants each to hold the smaller ones too, and writes +Inf."""
    total = 0.0
    for name in _BUCKET_NAMES:
        total += counts.get(name, 0.0)
        edge = name.removeprefix("le ").replace("inf", "+Inf")
        yield "_bucket", f'{labels},le="{edge}"', total
    yield "_sum", labels, counts.get("seconds", 0.0)
    yield "_count", labels, total


# What an endpoint's row holds when it gets another URL, or is enabled by hand. Its failures are
# forgotten: else the next failed row could disable it again at once, for what was before.
_UNTRIED = {
    "failures": 0,
    "failing_since": None,
    "paused_until": 0.0,
    "unsteady_since": None,
    "good": 0,
    "bad": 0,
}
_FRESH = {"disabled_reason": "", **_UNTRIED}


class Outbox:
    """The webhooks of one SQLite file: its endpoints, its events, and what became of them.

    The constructor makes or upgrades the tables, and starts nothing. Only a drain that runs holds
    a connection. Threads may share an Outbox. After a fork the child may use it too: no drain runs
    there until the child calls start() or drain().

    database          path of the app's file; a database in memory is refused
    create            False: only check that the tables are there
    retry             a RetryPolicy; None: ten attempts in about 75 hours
    timeout           seconds of wall clock that an attempt may last, from the lookup of the name to
                      the end of the answer
    connect_timeout   seconds of these that lookup and connect may take; not used with a proxy
    workers           attempts under way at once, in all; at most as many idle connections are kept
    allow_networks    CIDR texts (10.1.0.0/16) that may be reached although they are private, and
                      over http
    allow_http        True: public addresses may be reached over http too
    max_body          bytes of an event's data as JSON; emit refuses more
    retention         seconds that finished events are kept
    failed_retention  seconds that failed rows are kept; None: until somebody acts
    json_default      makes JSON of values that are none (Decimal, datetime), as json.dumps' default
    sqlite_only       True: in this process nothing but the standard library's sqlite3 opens this
                      file, although apsw, pysqlite3 or the like is loaded
    proxy             http://host:port that connects for us; to refuse private addresses is its
                      duty then, and not ours
    app_name          ASCII text that is put into User-Agent, and is the source of CloudEvents
    transforms        name -> callable(Event) that returns bytes, or (bytes, content type): a pure
                      function, for endpoints whose `body` names it, called for each attempt
    senders           name -> callable(Event), for endpoints whose url is call:NAME: to return is
                      success, to raise is a failed attempt. An async function is refused
    event_types       the catalogue, names or name -> EventType: emit refuses other types, and each
                      pattern of an endpoint must match one; None: every type is good
    home              the name of this place (production, say); None: the variable
                      WEBHOOK_OUTBOX_HOME, if it is set. The first drain writes it into the file,
                      and no drain of another place sends from a copy of it until `adopt`
    master_key        env:NAME or file:PATH of a key of 32 characters at least. Secrets are derived
                      from it, so that neither the file nor a copy of it holds one
    observer          called with each Notice, in order, after it was recorded, in a thread of its
                      own. What it raises is logged and ignored. One that falls 10,000 behind misses
                      some, first of delivered and attempt_failed; that is logged
    clock             for tests: a function that returns UTC seconds
    rng               for tests: a function that returns a number from 0 to 1
    resolver          for tests: (host, port) -> list of addresses; raises OSError where there is
                      none

    SchemaError: the file is not usable (no database, or tables of a newer version; with
    create=False also none, or older ones), or SQLite is older than 3.34. PayloadError: an option
    cannot be used as it is.

    Verbs that take `conn` are part of the transaction that is open there when it is given, and take
    effect when you commit. Those that write raise NotInTransaction where none is open and the
    driver begins none; all raise SchemaError where conn is open on another file, and
    TransactionLost where SQLite rolled your transaction back. Without conn a verb uses a connection
    of its own, and waits for the write lock up to 5 seconds (sqlite3.OperationalError, "database is
    locked"). So do not leave conn out between a write of yours and your commit: the verb would wait
    for you.
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
        failed_retention: float | None = None,
        json_default: Callable[[Any], Any] | None = None,
        sqlite_only: bool = False,
        proxy: str | None = None,
        app_name: str = "",
        transforms: Mapping[str, Callable[[Event], Any]] | None = None,
        event_types: Mapping[str, EventType] | Iterable[str] | None = None,
        senders: Mapping[str, Callable[[Event], Any]] | None = None,
        home: str | None = None,
        master_key: str | None = None,
        observer: Callable[[Notice], Any] | None = None,
        clock: Callable[[], float] = _utc,
        rng: Callable[[], float] = random.random,
        resolver: _Resolver | None = None,
    ) -> None:
        """Check the options, and make or check the tables. The class says what each option is."""
        self.path, self.retry = _path(database), _checked_retry(retry)
        self.timeout = _number("timeout", timeout, 0.01, 3600)
        self.connect_timeout = _number("connect_timeout", connect_timeout, 0.01, 3600)
        self.workers = _whole("workers", workers, 1, 10_000)
        self.max_body = _whole("max_body", max_body, 1, 1 << 30)
        self.retention = _number("retention", retention, 0, 1e11)
        self.failed_retention = _checked_retention(failed_retention)
        self.app_name, self.proxy = _checked_app_name(app_name), _checked_proxy(proxy)
        self.home, self.master = _checked_home(home), _MasterKey(master_key)
        self.observer = _function("observer", observer)
        self.json_default = _function("json_default", json_default)
        self.transforms = {**_TRANSFORMS, **_checked_functions("transforms", transforms)}
        self.senders = _checked_functions("senders", senders)
        self.clock, self.rng = _function("clock", clock), _function("rng", rng)
        self.resolver = _function("resolver", resolver)
        self._guard, self._catalogue = _guard(allow_networks, allow_http), _Catalogue(event_types)
        self._open(create, sqlite_only)

    def _open(self, create: bool, sqlite_only: bool) -> None:
        """Make or check the tables; have the process know of this outbox, for its forks."""
        _checked_switch("create", create)
        if _checked_switch("sqlite_only", sqlite_only):
            _PROCESS.sqlite_only.add(self.path)
        self._identity = _prepare_file(self.path, create)
        # id() of a connection that emit was given -> how many changes it had made then.
        self._emitted: dict[int, int] = {}
        self._forget_drains()
        _PROCESS.outboxes.add(self)

    def _settings(self) -> _Settings:
        """Return what those who send need, as it is now. A drain keeps what it was given: an
        attribute that is changed later is for the next one."""
        names = (field.name for field in dataclasses.fields(_Settings) if field.name != "guard")
        return _Settings(guard=self._guard, **{name: getattr(self, name) for name in names})

    def _forget_drains(self) -> None:
        """Begin with no drain; also called in a child after a fork, where none runs.

        `_lock` guards changes of the three below it; _wake() and `running` read without it.
        start(), stop() and each drain at its begin and end hold it for a moment, and never while
        they wait for a thread. It can be taken twice by one thread because a signal handler may
        call stop() while start() of the same thread has it.
        """
        self._seqs = _Seqs()  # a child makes other ones than its parent
        self._lock = threading.RLock()
        self._drains: set[_Drain] = set()  # running in this process, in whatever thread
        self._thread: threading.Thread | None = None  # the background thread that start() made last
        self._halt = threading.Event()  # that thread's: set by stop(), it begins no drain any more

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
        """Begin a transaction on a connection of its own; commit at the end, roll back when the
        block raises.

        For apps without connection code. Yields a sqlite3.Connection that is closed at the end. It
        begins with BEGIN IMMEDIATE, so it has the write lock from the start, and waits up to 5
        seconds for it (sqlite3.OperationalError).
        """
        with _transaction(self.path) as db:
            yield db
        self._wake()

    def emit(
        self,
        conn: Any,
        type: str,
        data: Any,
        *,
        tenant: str | None = None,
        key: str | None = None,
        idempotency_key: str | None = None,
        delay: float = 0.0,
        expires: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Record an event for every enabled endpoint of its tenant whose patterns and filter match,
        in the transaction open on conn; return the event's id.

        Nothing is sent before you commit, and nothing if you roll back; both are yours to do. Your
        last_insert_rowid() stays as it was. The data is stored as JSON text, and this text is what
        each attempt sends, byte for byte, in the form that the endpoint's `body` says. Where no
        endpoint matches, the event is recorded all the same, and backfill can deliver it later.

        conn             a sqlite3 Connection or Cursor in any transaction mode, SQLAlchemy's
                         Connection or Session (also the synchronous side of the async ones),
                         Django's connection or its alias, peewee's Database, apsw's or pysqlite3's
                         Connection. Where the driver begins a transaction before an INSERT of
                         yours, it does so before ours
        type             parts of letters, digits, _ and -, joined by dots; at most 256 characters
        tenant           your customer whom it concerns: endpoints of that tenant get it, and those
                         of tenant '*'; None: those without a tenant, and those of '*'
        key              1 to 256 characters; events with the same key reach an endpoint in the
                         order of their emission, each after the one before has ended
        idempotency_key  1 to 256 characters; as long as the event is on record, a second emit with
                         it for that tenant, with the same type and data (as JSON text), returns
                         the first id and does nothing else; with others it is a PayloadError
        delay            seconds until the first attempt
        expires          seconds from now after which it is worth nothing: a delivery whose turn
                         comes later ends in the failed table, reason expired, without an attempt
        headers          sent with the event (traceparent), 16,384 characters in all at the most;
                         not for credentials, which belong to endpoints

        PayloadError: something cannot be used as it is; nothing was written, and your transaction
        is as it was. NotInTransaction: conn is in autocommit mode and no transaction is open.
        SchemaError: conn is open on another file. TransactionLost: SQLite itself rolled your
        transaction back (disk full, I/O error), so stop. Errors of sqlite3 such as "database is
        locked" pass through. Data over 20 KiB, and text that is JSON already, are logged as a
        warning.
        """
        self._catalogue.check(_checked_type(type))
        text, size = _checked_data(data, self.json_default)
        if size > self.max_body:
            raise PayloadError(
                f"data is {size:,} bytes, the limit is {self.max_body:,}; send a link instead"
            )
        _warn_of(type, data, size)
        if _checked_tenant(tenant) is not None and type.startswith("webhook."):
            raise PayloadError("events of type webhook.* have no tenant; leave it out")
        if key is not None:
            _line("key", key, 256, 1)
        if idempotency_key is not None:
            _line("idempotency_key", idempotency_key, 256, 1)
        header_text = _dumps(_checked_headers(headers)) if headers else ""
        # A clock may be wrong beyond all measure; the host's transaction is not to fail over it.
        now = min(max(self.clock(), 0.0), _LAST_SECOND)
        # Of an internal type a customer gets only what the operator subscribed to by name.
        internal = tenant is not None and type in self._catalogue.internal
        times = _emit_times(now, delay, expires, self.retry.delays[0])
        kept = (key or "", idempotency_key or "", header_text, *times, int(internal), "")
        # What _EMIT takes, without the identity of the file.
        row = (self._seqs.new(now), type, tenant or "", text, *kept)
        if _is_sqlite3(conn):
            return self._insert(row, now, conn)
        return str(_in_its_thread(conn, functools.partial(self._insert, row, now)))

    def _insert(self, row: tuple[Any, ...], now: float, conn: Any) -> str:
        """Write an event in the host's transaction, wake our drains, and return its id.

        For speed it goes the short way, one INSERT, which checks the identity of the file too, and
        sets nothing on the connection. What may stand in its way shows as an error of that INSERT
        and is dealt with then: a file that got a new identity (`adopt`, a repair), and limits that
        the host lowered on its connection. Any other error is raised, in words of ours where
        _HostErrors has some.
        """
        db = _host(conn)
        cursor = _cursor(db)
        with _HostErrors(db, self.path):
            # Which file it is open on costs two fifths of an emit, so it is asked once for each
            # connection. One that has made fewer changes than the one that we remember by this id()
            # is another one, which got the id() when that was closed.
            if self._emitted.get(id(db), 1 << 62) > _changed(db):
                self._check_file(db)
            if self._identity is None:
                self._identity = _check_identity(db, cursor, None, self.path)
            try:
                seq = _insert_event(db, cursor, (*row, self._identity), self._seqs, now)
            except Exception as error:
                if "another outbox" in str(error):  # raises where it is really another one
                    self._identity = _check_identity(db, cursor, self._identity, self.path)
                elif not _BEYOND_LIMIT.search(str(error)):
                    raise
                with _without_limits(db):
                    seq = _insert_event(db, cursor, (*row, self._identity), self._seqs, now)
        if len(self._emitted) >= 1_000:
            self._emitted.clear()
        self._emitted[id(db)] = _changed(db)
        self._wake()
        return _event_id(seq)

    async def aemit(self, conn: Any, type: str, data: Any, **options: Unpack[EmitOptions]) -> str:
        """Emit on an asynchronous connection, as emit does: an aiosqlite Connection, or
        SQLAlchemy's AsyncSession or AsyncConnection on aiosqlite. Options and errors are those of
        emit. On another object it is a PayloadError."""
        return str(await self.arun(conn, self.emit, type, data, **options))

    async def arun(self, conn: Any, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a verb that takes a connection in the transaction of an asynchronous one, and return
        what it returns.

            await outbox.arun(session, outbox.cancel, key="order-17")

        conn: as aemit takes it. method: a bound method with a parameter `conn`, of this Outbox, of
        a Tenant or of an Inbox; args and options are what it takes besides. It runs in the thread
        that aiosqlite keeps for the connection, so the event loop is not held up.
        """
        do = _on_connection(method, args, options)
        if hasattr(conn, "run_sync"):
            return await conn.run_sync(functools.partial(_in_its_thread, do=do))
        if not hasattr(conn, "_execute"):
            raise PayloadError(
                "this takes an aiosqlite Connection, or SQLAlchemy's AsyncSession or "
                "AsyncConnection; on others call the method itself"
            )
        return await conn._execute(do, conn._conn)

    # What the verbs read and write with.

    def _check_file(self, db: Any) -> None:
        """Refuse a connection that is open on a copy of our file, which has the same identity.
        Where SQLite does not tell the file, the identity alone decides."""
        theirs, ours = None, _file_id(self.path)
        with contextlib.suppress(Exception):  # an authorizer of the host's may forbid to ask
            theirs = _file_id(_main_file(db))
        if theirs and ours and theirs != ours:
            cursor = _cursor(db)
            cursor.execute("SELECT 1 FROM main.sqlite_master WHERE name = 'webhook_meta'")
            if cursor.fetchall():  # else what comes next says what is wrong
                raise _other_file(db, self.path, "another file that has webhook tables")

    @contextlib.contextmanager
    def _on_host(self, db: Any) -> Iterator[sqlite3.Cursor]:
        """Yield a cursor on a host's connection, once we know that it is to our file. In the block
        text is read as str, SQLite's limits are off, and its errors become ours; afterwards the
        connection is as the host had it."""
        with _HostErrors(db, self.path), _plain_text(db), _without_limits(db):
            cursor = _cursor(db)
            self._check_file(db)
            self._identity = _check_identity(db, cursor, self._identity, self.path)
            yield cursor

    @contextlib.contextmanager
    def _writing(self, conn: Any) -> Iterator[sqlite3.Cursor]:
        """Yield a cursor in the caller's transaction, or in one of our own, which is committed at
        the end of the block. Then wake the drains of this process: what they find they learn from
        the file, so to wake them for nothing, or before the host commits, does no harm."""
        if conn is None:
            with _texts_can_be_stored(), _transaction(self.path) as db:
                yield sqlite3.Cursor(db)
        else:
            with _texts_can_be_stored(), _begun(conn), self._on_host(_host(conn)) as cursor:
                yield cursor
        self._wake()

    @contextlib.contextmanager
    def _reading(self, conn: Any = None) -> Iterator[sqlite3.Cursor]:
        """Yield a cursor to read with, on the caller's connection, which need not have a
        transaction open, or on one of our own. Each statement of the latter sees the newest state
        by itself."""
        if conn is not None:
            with _texts_can_be_stored(), self._on_host(_driver(conn)) as cursor:
                yield cursor
        else:
            with _texts_can_be_stored(), _session(self.path) as db:
                yield sqlite3.Cursor(db)

    @contextlib.contextmanager
    def _looking(self, conn: Any = None) -> Iterator[sqlite3.Cursor]:
        """The same, but all statements see one state of the file: for what belongs together."""
        with self._reading(conn) as cursor:
            if conn is None:
                cursor.execute("BEGIN")
            yield cursor

    def _select(self, sql: str, *values: Any) -> list[Any]:
        """Return the rows of a query, read on a connection of our own."""
        with self._reading() as cursor:
            return cursor.execute(sql, values).fetchall()

    # Endpoints.

    def _columns(self, options: Mapping[str, Any], update: bool = False) -> dict[str, Any]:
        """Return checked column values for endpoint options, the url among them. update: refuse
        those that are fixed for life."""
        known = _Known(self._guard, (*_BODIES, *self.transforms), self._catalogue, self.senders)
        return _checked_options(options, known, update)

    def add_endpoint(
        self,
        url: str,
        *,
        id: str | None = None,
        secret: str | None = None,
        conn: Any = None,
        **options: Unpack[EndpointOptions],
    ) -> Endpoint:
        """Register where events go; return the Endpoint, with its secret.

        The receiver needs the secret to verify, and only this, rotate_secret and the command
        `endpoint secret` show it. Events that were emitted before are not delivered; backfill can
        do that.

        url            https://..., or call:NAME, a function of Outbox(senders=...) that is called
                       with each Event; what shapes a request (body, signing, headers, cert, ca)
                       plays no part for the latter
        id             1 to 64 letters, digits, _ and -; None: one is made
        secret         whsec_ and base64 of 24 to 64 bytes; of env:NAME and file:PATH the name is
                       stored, and read at send time; None: one is made, or derived from the
                       master key
        options        those of EndpointOptions, which explains each; Endpoint has their defaults

        UnsafeURL: the url is malformed, or points where webhooks must not go. Its name is not
        looked up here; what counts is the address at each attempt. PayloadError: an option cannot
        be used as it is, or the id is taken.
        """
        columns = self._columns({**options, "url": url})
        id = "ep_" + secrets.token_hex(8) if id is None else _checked_id(id)
        secret = self._given_secret(secret)
        columns |= {"id": id, "created_at": self.clock()}
        if conn is None:  # with conn a trigger does it, in the caller's transaction
            self._clear_removed(id)
        with self._writing(conn) as cursor:
            stored, secret = self._new_secret(cursor, id, secret)
            columns["secrets"] = _dumps([[stored, None]])
            names, marks = ", ".join(columns), ", ".join("?" * len(columns))
            try:
                statement = f"INSERT INTO main.webhook_endpoints ({names}) VALUES ({marks})"
                cursor.execute(statement, tuple(columns.values()))
            except Exception as error:  # apsw's and pysqlite3's are classes of their own
                if "UNIQUE constraint failed: webhook_endpoints.id" not in str(error):
                    raise
                raise PayloadError(
                    f"there is an endpoint {id} already; update it, or choose another id"
                ) from None
            return dataclasses.replace(self._endpoint_on(cursor, id), secret=secret)

    def ensure_endpoint(
        self,
        url: str,
        *,
        id: str,
        secret: str | None = None,
        conn: Any = None,
        **options: Unpack[EndpointOptions],
    ) -> Endpoint:
        """Add an endpoint, or update what differs, and return it: for code that registers at every
        start, in several processes.

        Options are those of add_endpoint, and errors too. One that is left out keeps its value, so
        an endpoint that was disabled stays so unless enabled=True is said. The secret is set when
        the endpoint is added; only then is it on the returned Endpoint. Later it stays as it is,
        whatever is given here: rotate_secret changes it. Where nothing differs nothing is written.
        An id of another tenant is a PayloadError.
        """
        given: dict[str, Any] = dict(options)
        tenant = _checked_tenant(given.pop("tenant", None), or_all=True)
        columns = self._columns({**given, "url": url})
        _checked_id(id)
        if secret is not None:
            _checked_secret(secret)
        # A first look without the write lock, for which others may have to wait. Another process
        # may be as far as we are, so it is looked once more with the lock.
        if conn is None:
            with self._reading() as cursor:
                changes = self._differing(cursor, id, tenant, columns)
                if changes == {}:
                    return self._endpoint_on(cursor, id)
            if changes is None:
                self._clear_removed(id)
        with self._writing(conn) as cursor:
            changes = self._differing(cursor, id, tenant, columns)
            if changes is None:
                return self.add_endpoint(url, id=id, secret=secret, conn=cursor, **options)
            return self._set(cursor, id, changes)

    def _differing(
        self, cursor: sqlite3.Cursor, id: str, tenant: str | None, columns: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Return those of some columns in which an endpoint differs; None where there is no such
        endpoint, and PayloadError where it is another tenant's."""
        cursor.execute(
            f"SELECT +tenant, +{', +'.join(columns)} FROM main.webhook_endpoints WHERE id = ?",
            (id,),
        )
        rows = cursor.fetchall()
        if not rows:
            return None
        if rows[0][0] != tenant:
            raise PayloadError(f"there is an endpoint {id} of another tenant; choose another id")
        stored = dict(zip(columns, rows[0][1:], strict=True))
        return {name: value for name, value in columns.items() if stored[name] != value}

    def _endpoint_on(self, cursor: sqlite3.Cursor, id: str) -> Endpoint:
        """Return an endpoint as the cursor's transaction sees it; raise NotFound."""
        sql = f"SELECT {_ENDPOINT_COLUMNS} FROM main.webhook_endpoints WHERE id = ?"
        with contextlib.suppress(UnicodeEncodeError):  # such a text is no id
            cursor.execute(sql, (id,))
        rows = cursor.fetchall()
        if not rows:
            raise self._no_endpoint(id)
        return _endpoint(rows[0], lenient=True)

    def _no_endpoint(self, id: object) -> NotFound:
        return NotFound(
            f"there is no endpoint {_one_line(str(id), 64)}; `endpoint list` shows those there are"
        )

    def endpoint(self, id: str, *, conn: Any = None) -> Endpoint:
        """Return an endpoint, without its secret; raise NotFound."""
        with self._reading(conn) as cursor:
            return self._endpoint_on(cursor, id)

    def endpoints(self, *, tenant: str | None = None, conn: Any = None) -> list[Endpoint]:
        """Return all endpoints, or those of a tenant, oldest first, without their secrets. tenant:
        '*' for those that see all; None does not choose, so it gives those of all tenants."""
        of = _checked_tenant(tenant, or_all=True)
        where, values = ("1", ()) if of is None else ("tenant = ?", (of,))
        with self._reading(conn) as cursor:
            cursor.execute(
                f"""SELECT {_ENDPOINT_COLUMNS} FROM main.webhook_endpoints
                     WHERE {where} ORDER BY created_at, id""",
                values,
            )
            return [_endpoint(row, lenient=True) for row in cursor.fetchall()]

    def _set(self, conn: Any, id: str, columns: Mapping[str, Any]) -> Endpoint:
        """Change columns of an endpoint and return it; raise NotFound. To enable it forgets its
        failures. Triggers have the drain read it again. conn: a cursor of ours serves too."""
        with self._writing(conn) as cursor:
            before = self._endpoint_on(cursor, id)
            if columns.get("url", before.url) != before.url:  # another receiver, which did not fail
                columns = {**columns, **_UNTRIED}
            columns = {**columns, **(_FRESH if columns.get("enabled") else {})}
            if columns:
                changes = ", ".join(f"{name} = ?" for name in columns)
                cursor.execute(
                    f"UPDATE main.webhook_endpoints SET {changes} WHERE id = ?",
                    (*columns.values(), id),
                )
            return self._endpoint_on(cursor, id)

    def update_endpoint(
        self,
        id: str,
        *,
        url: str | None = None,
        conn: Any = None,
        **changes: Unpack[EndpointOptions],
    ) -> Endpoint:
        """Change options of an endpoint, or its url, named as in add_endpoint; return it.

        What is left out stays; url=None leaves it too. Deliveries that wait go out under the new
        options. An attempt that is under way to another url counts for its delivery alone: a 410
        there disables nothing, and is tried again at the new one. Which events are given to the
        endpoint changes for those emitted from now on. Its tenant is for life: add another
        endpoint. The secret is rotate_secret's. enabled: as enable_endpoint and disable_endpoint
        do. Raises NotFound, UnsafeURL, PayloadError.
        """
        columns = self._columns(changes if url is None else {**changes, "url": url}, update=True)
        return self._set(conn, id, columns)

    def disable_endpoint(self, id: str, reason: str = "", *, conn: Any = None) -> Endpoint:
        """Hold an endpoint's deliveries; return it. What waits for it is kept, and goes out once it
        is enabled. Events emitted meanwhile are recorded but not given to it: backfill does that
        later. reason: one line, shown to people. Raises NotFound."""
        return self._set(conn, id, {"enabled": 0, "disabled_reason": _line("reason", reason, 1000)})

    def enable_endpoint(self, id: str, *, conn: Any = None) -> Endpoint:
        """Resume an endpoint's held deliveries, with its failures forgotten; return it. Raises
        NotFound."""
        return self.update_endpoint(id, enabled=True, conn=conn)

    def remove_endpoint(self, id: str, *, conn: Any = None) -> None:
        """Delete an endpoint with its waiting deliveries and its failed rows. What has ended stays
        on record, until another endpoint gets the id: that one starts empty. Without conn it works
        in batches, so that no commit of the host waits long; cut off between, it leaves the
        endpoint disabled (reason "being removed"). Raises NotFound."""
        self._remove(id, conn, self._endpoint_on)

    def _remove(self, id: str, conn: Any, find: _Find) -> None:
        """Remove the endpoint that `find` returns; raise what it raises. Where that takes several
        transactions, each of them makes sure that the endpoint is the one that was found."""
        with self._writing(conn) as cursor:
            find(cursor, id)
            same = self._registered(cursor, id)
            if conn is None:  # so that no new delivery comes meanwhile
                self._set(cursor, id, {"enabled": 0, "disabled_reason": "being removed"})
        for waiting in ("queue IS NOT NULL AND status = 'queued'", "status = 'pending'"):
            batch = f"""DELETE FROM main.webhook_deliveries WHERE (event, endpoint_id) IN (
                          SELECT event, endpoint_id FROM main.webhook_deliveries
                           WHERE endpoint_id = ? AND {waiting} LIMIT 1000)
                           AND EXISTS (SELECT 1 FROM main.webhook_endpoints
                                        WHERE id = ? AND registered = ?)"""
            if conn is None:
                self._in_batches(batch, (id, id, same))
        with self._writing(conn) as cursor:
            of = "id = ? AND registered = ?"
            cursor.execute(f"DELETE FROM main.webhook_endpoints WHERE {of}", (id, same))
            if not _changes(cursor):
                raise self._no_endpoint(id)

    def _registered(self, cursor: sqlite3.Cursor, id: str) -> int:
        """Return what tells an endpoint that is there from another one that gets its id later."""
        cursor.execute("SELECT +registered FROM main.webhook_endpoints WHERE id = ?", (id,))
        return int(cursor.fetchone()[0])

    def _clear_removed(self, id: str) -> None:
        """Delete what a removed endpoint left on record, before another one gets its id. A trigger
        does it too, in the transaction that adds it; here it goes in batches, so that no commit of
        the host waits long. Each batch makes sure that nobody added the endpoint meanwhile: from
        then on the rows are the new one's."""
        gone = "NOT EXISTS (SELECT 1 FROM main.webhook_endpoints WHERE id = ?)"
        with self._reading() as cursor:
            cursor.execute("SELECT 1 FROM main.webhook_removed WHERE id = ?", (id,))
            if cursor.fetchone() is None:
                return
        deliveries = "main.webhook_deliveries"
        ranges = self._ranges(deliveries, "event", "endpoint_id = ?", (id,), 1000, None)
        self._in_batches(
            f"DELETE FROM {deliveries} WHERE event BETWEEN ? AND ? AND endpoint_id = ? AND {gone}",
            (id, id),
            ranges,
        )
        batch = f"""DELETE FROM main.webhook_attempts WHERE id IN (
                      SELECT id FROM main.webhook_attempts
                       WHERE endpoint_id = ? AND {gone} LIMIT 1000)"""
        self._in_batches(batch, (id, id))
        with self._writing(None) as cursor:
            cursor.execute(f"DELETE FROM main.webhook_removed WHERE id = ? AND {gone}", (id, id))

    def _in_batches(
        self,
        statement: str,
        values: Sequence[Any],
        ranges: Iterable[Sequence[Any]] | None = None,
        conn: Any = None,
        also: Mapping[str, Sequence[Any] | None] | None = None,
    ) -> int:
        """Run a statement for each of `ranges`, whose ends come first among its values, or, without
        ranges, until it changes nothing. Return how many rows it changed. also: statements for the
        same transaction, run where the first changed something; their values follow the ends of the
        range, and None stands for neither ends nor values.

        Without conn each run is a transaction of its own, and then rests as long as it took: a host
        that waits in SQLite's busy handler looks only now and then whether the file is free, and
        would often miss a shorter gap. Where it is cut off between, what was done stays done; each
        caller says what that means. With conn all is one transaction, the host's, and there are no
        rests.
        """
        done = 0
        for ends in itertools.repeat(()) if ranges is None else ranges:
            started = _monotonic()
            with self._writing(conn) as cursor:
                cursor.execute(statement, (*ends, *values))
                count = _changes(cursor)
                for other, given in (also or {}).items() if count else ():
                    cursor.execute(other, () if given is None else (*ends, *given))
            done += count
            if ranges is None and not count:
                break
            if conn is None:
                time.sleep(_monotonic() - started)
        return done

    def _ranges(
        self, rows: str, key: str, where: str, values: Sequence[Any], size: int, conn: Any
    ) -> Iterator[tuple[int, int]]:
        """Yield the first and last key of ranges of a table that together hold every row there is
        now that `where` chooses. A range begins at such a row and holds at most `size` rows, chosen
        or not, so that a statement over it looks at no more. Rows that come later are not for this
        call: its end is fixed at the beginning, else a busy app would keep it going.

        rows: the table, as FROM has it. key: its growing key. Keys may be far apart, so a range is
        found by counting rows and not by adding to a key. Without conn each range is read on a
        connection of its own, which holds no lock while the caller works.
        """
        last = -1
        with self._reading(conn) as cursor:
            (end,) = cursor.execute(f"SELECT max({key}) FROM {rows}").fetchone()
        while end is not None:
            with self._reading(conn) as cursor:
                found = cursor.execute(
                    f"""SELECT +{key} FROM {rows} WHERE {key} > ? AND {key} <= ? AND {where}
                         ORDER BY {key} LIMIT 1""",
                    (last, end, *values),
                ).fetchone()
                if found is None:
                    return
                (last,) = cursor.execute(
                    f"""SELECT max(k) FROM (
                          SELECT {key} AS k FROM {rows}
                           WHERE {key} >= ? AND {key} <= ? ORDER BY {key} LIMIT ?)""",
                    (found[0], end, size),
                ).fetchone()
            yield found[0], last

    def rotate_secret(
        self, id: str, *, secret: str | None = None, grace: float = 86_400.0, conn: Any = None
    ) -> Endpoint:
        """Give an endpoint a new secret; return the Endpoint, with it.

        For `grace` seconds requests carry signatures of the old secrets too, of the newest ten in
        all, so that the receiver can change over in that time; 0: the old ones end at once. An old
        secret's own end is never put off. A GitHub signature is made with the new secret only: its
        header holds one. secret: as add_endpoint takes it. Raises NotFound, PayloadError.
        """
        secret = self._given_secret(secret)
        until = self.clock() + _number("grace", grace, 0, 1e9)
        with self._writing(conn) as cursor:
            self._endpoint_on(cursor, id)
            stored, secret = self._new_secret(cursor, id, secret)
            old = [
                (s, min(end or until, until))
                for s, end in self._stored_secrets(cursor, id)
                if s != stored
            ]
            valid = [(stored, None), *(pair for pair in old if pair[1] > self.clock())]
            valid = valid[:_MAX_SECRETS]
            cursor.execute(
                "UPDATE main.webhook_endpoints SET secrets = ? WHERE id = ?", (_dumps(valid), id)
            )
            return dataclasses.replace(self._endpoint_on(cursor, id), secret=secret)

    def _given_secret(self, secret: str | None) -> str | None:
        """Return a checked secret; a random one where none is given and there is no master key;
        None where it is to be derived, once it is clear that the key is here."""
        if secret is not None or self.master.source is None:
            return _checked_secret(secret)
        try:
            self.master.check_value()
        except _NoMasterKey as error:
            raise PayloadError(str(error)) from None
        return None

    def _new_secret(self, cursor: sqlite3.Cursor, id: str, given: str | None) -> tuple[str, str]:
        """Return a secret as it is stored, and as it is shown. given: None to derive one. Where a
        derived one is given back (rotating back, say), its number is stored, and not its text."""
        if given is None:
            return self._derive(cursor, id)
        pairs = zip(self._stored_secrets(cursor, id), self._secrets_on(cursor, id), strict=True)
        for (stored, _), (secret, _) in pairs:
            with contextlib.suppress(PayloadError):  # without the key nobody can tell
                if stored.startswith(_DERIVED) and self._shown(id, secret) == given:
                    return stored, given
        return given, given

    def _derive(self, cursor: sqlite3.Cursor, id: str) -> tuple[str, str]:
        """Return a new derived secret, as it is stored and as it is shown. Its number is the next
        one of a counter that only grows, for all endpoints: neither rotating nor an id that is
        added again brings an old secret back. The first one stores the check value of the key; with
        another key than that it is a PayloadError."""
        cursor.execute(
            "INSERT OR IGNORE INTO main.webhook_meta VALUES ('master_check', ?)",
            (self.master.check_value(),),
        )
        cursor.execute(
            """INSERT INTO main.webhook_meta VALUES ('last_secret', 1)
                   ON CONFLICT (key) DO UPDATE SET value = value + 1"""
        )
        cursor.execute("SELECT value FROM main.webhook_meta WHERE key = 'last_secret'")
        stored = f"{_DERIVED}{cursor.fetchall()[0][0]}"
        ((secret, _),) = _read_secrets(cursor, _dumps([[stored, None]]))
        return stored, self._shown(id, secret)

    def _stored_secrets(self, cursor: sqlite3.Cursor, id: str) -> _Secrets:
        """Return the secrets of an endpoint as its row holds them; none where there is no row
        yet."""
        cursor.execute("SELECT +secrets FROM main.webhook_endpoints WHERE id = ?", (id,))
        return [(s, until) for (stored,) in cursor.fetchall() for s, until in json.loads(stored)]

    def _secrets_on(self, cursor: sqlite3.Cursor, id: str) -> _Secrets:
        """Return the secrets of an endpoint as those who sign need them, current first."""
        return _read_secrets(cursor, _dumps(self._stored_secrets(cursor, id)))

    def _shown(self, id: str, secret: str) -> str:
        """Return a secret of an endpoint as people are shown it: of a derived one its text, which
        is made from the master key; of env:NAME and file:PATH just that."""
        try:
            return self.master.secret(secret, id) if secret.startswith(_DERIVED) else secret
        except _NoMasterKey as error:
            raise PayloadError(str(error)) from None

    def _secret(self, id: str) -> str:
        """Return an endpoint's current secret, for the command `endpoint secret`."""
        with self._reading() as cursor:
            self._endpoint_on(cursor, id)
            return self._shown(id, self._secrets_on(cursor, id)[0][0])

    @property
    def event_types(self) -> Mapping[str, EventType] | None:
        """The catalogue, name -> EventType; None: there is none, and every type is good."""
        return self._catalogue.types

    def ping(self, id: str, *, type: str | None = None) -> Attempt:
        """Send a signed webhook.ping, or the catalogue's example of `type`, to an endpoint at once,
        and return what happened.

        This thread sends it, and waits for the answer as long as the endpoint's timeout allows. No
        drain is needed; a disabled endpoint gets it too, and neither a queue nor a rate holds it
        back. It is not recorded, and does not count as a failure; a 2xx ends the endpoint's hold. A
        receiver's refusal is no error: look at the `reason` of the Attempt. Raises NotFound,
        PayloadError where there is no such example, and OutboxError, with nothing sent, from a file
        of another home.
        """
        return self._ping(id, type, self._endpoint_on)

    def _ping(self, id: str, type: str | None, find: _Find) -> Attempt:
        """Ping the endpoint that `find` returns; raise what it raises."""
        data = "{}" if type is None else _dumps(self._catalogue.example(type))
        if refusal := self._refusal():
            raise OutboxError(refusal)
        with self._looking() as cursor:
            endpoint, endpoint_secrets = find(cursor, id), self._secrets_on(cursor, id)
            same = self._registered(cursor, id)
        now, started = self.clock(), _monotonic()
        key = self._seqs.new(now)
        # A delivery that is in no table: due now, never tried, in no queue.
        picked = _Picked(
            event=key, due_at=now, attempts=0, first_attempt_at=None, queue=None,
            type=type or "webhook.ping", data=data, valid=1, key=None, headers=None, created_at=now,
            tenant=None if endpoint.tenant == "*" else endpoint.tenant,
        )  # fmt: skip
        outcome = _send_once(self._settings(), endpoint, endpoint_secrets, picked)
        status, seconds = outcome.status_code, _monotonic() - started
        if outcome.reason is None:
            self._end_hold({"endpoint": id}, same=same)
        return Attempt(
            picked.id, id, now, status, outcome.reason, outcome.error, seconds, outcome.response
        )

    # Customers.

    # The class Tenant, which stands below because it uses all verbs, and is set under it.
    _door: ClassVar[type[Tenant]]

    def tenant(self, id: str, *, max_endpoints: int = 20) -> Tenant:
        """Return the door of a customer, whose verbs know only what is that customer's.

        id: the host's own id of the customer, 1 to 64 letters, digits, _ and -. max_endpoints: how
        many endpoints the customer may have when one is added through the door; what is there
        already stays. Nothing is written: a customer is known by what it has.
        """
        return self._door(self, id, max_endpoints)

    # Draining.

    @property
    def running(self) -> bool:
        """True while the background thread of this process drains or stands by; a drain() in
        another thread does not count."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def start(self) -> None:
        """Drain in a background thread, until stop(). Does nothing when it runs already.

        Every process of an app may call it: one drains, the others stand by, and one of them takes
        over within half a second when it dies. Call it after forking (in a web server's worker),
        since threads do not survive a fork. The thread is a daemon; at the interpreter's exit it
        gets one second to end. What ends a drain (the file was replaced, the disk is full) is
        logged, and it begins again after 1 to 30 seconds. OutboxError where another SQLite library
        is loaded, or uWSGI has not forked its workers yet.
        """
        _check_alone(self.path)
        _check_uwsgi()
        _PROCESS.settle()  # a child forked in C believes that its parent's thread runs here
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
        """Stop draining in this process: take no new work, let attempts under way end within
        `timeout` seconds, record what came back.

        Waits for the background thread to end, 5 seconds longer at the most. A drain() in another
        thread is told to end too, and is not waited for. What is not finished then is delivered
        again by the next drain. It may be called from a signal handler, and more than once: a
        shorter timeout cuts an earlier one short. start() begins anew.
        """
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
        """Drain in the background thread until `halt` is set; begin again, after longer and longer
        pauses, where a drain fails. It gives up only where another SQLite library was loaded: then
        nothing here may touch the file again."""
        pause = 0.5
        while not halt.is_set():
            try:
                self._run(_Drain(self._settings(), "forever"), halt)
                return
            except Exception as error:
                name, pause = type(error).__name__, min(pause * 2, 30.0)
                if not _alone(self.path):
                    _log.error("draining stopped (%s: %s)", name, error)
                    return
                _log.error("draining stopped (%s: %s); trying again in %g s", name, error, pause)
            halt.wait(pause)

    def _run(self, drain: _Drain, halt: threading.Event | None = None) -> DrainReport:
        """Run a drain in this thread, where stop() and _wake() find it. halt: that of the
        background thread. stop() sets it, and then stops the drains that it finds; one that came
        just after is stopped here."""
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
        self,
        *,
        once: bool = False,
        until_empty: bool = False,
        progress: Callable[[DrainReport], Any] | None = None,
    ) -> DrainReport:
        """Drain in the calling thread, and return what came of it.

        Without a switch it drains for ever; `once`: until nothing is due now; `until_empty`: until
        nothing is left to send, retries included, which may take days; what a disabled endpoint or
        a failed row (on_dead='hold') holds back is left. stop() from another thread or a signal
        handler ends each of them. Where another process drains this file it waits: to take over,
        or, with a switch, until the work is done by whoever does it.

        progress: called in this thread about four times a second with a DrainReport; what it raises
        ends the drain. PayloadError: both switches. OutboxError: another SQLite library is loaded,
        the file was replaced meanwhile or cannot be written, its lock file cannot be used; with a
        switch also where the file is another home's (without one it waits for `adopt`).
        """
        return self._run(_Drain(self._settings(), _drain_mode(once, until_empty), progress))

    def _wake(self) -> None:
        """Have the drains of this process look for what was written. Those of other processes see
        it by themselves, a little later."""
        for drain in tuple(self._drains):
            drain.wake()

    # A copied file.

    def _home(self) -> str | None:
        """Return the home that the file names; None where it names none."""
        with _session(self.path) as db:
            return _meta(db, "home")  # type: ignore[no-any-return]

    def _refusal(self) -> str | None:
        """Return why nothing may be sent from here, and what to do; None when it may."""
        with _session(self.path) as db:
            return _refusal(db, self.path, self.home)

    def adopt(self, *, keep: bool = False) -> int:
        """Make a file that was copied here this home's own, so that it may send. Return how many
        deliveries were cancelled.

        What waits is cancelled, since the original sends it; all endpoints are disabled (reason
        "copied from production"); the file takes a new identity, and with it secrets that are
        derived from a master key change. Failed rows stay. It works in batches; cut off between,
        nothing is sent, and it is to be run again.

        keep: the file was moved, not copied. Everything stays as it is, and drains that wait go on.
        A file that is this home's already is left alone. PayloadError where this Outbox has no
        `home`; `neutralize` does without.
        """
        if self.home is None:
            raise PayloadError(
                "adopt gives the file the name of this place: say home= or set "
                "WEBHOOK_OUTBOX_HOME; `neutralize` makes a copy harmless without a name"
            )
        if self._home() == self.home:
            return 0
        if not keep:
            return self._disarm(self.home)
        with self._writing(None) as cursor:
            self._move_in(cursor, self.home)
        return 0

    def neutralize(self) -> int:
        """Do what adopt does, without a name: for scripts that sanitise a copy. Return how many
        deliveries were cancelled. The file belongs to no place afterwards, whatever it was before;
        the first drain with a `home` writes its own into it."""
        return self._disarm(None)

    def _disarm(self, home: str | None) -> int:
        """Cancel what waits, disable all endpoints, take a new identity. Endpoints come first, so
        that nothing goes out and nothing new waits; what waits is cancelled in batches, for an app
        that writes; the name comes last. Cut off between, it sends nothing, and is run again."""
        with self._writing(None) as cursor:
            cursor.execute(
                """UPDATE main.webhook_endpoints
                      SET enabled = 0, disabled_reason = 'copied from production'"""
            )
        count = self.cancel(all=True)
        with self._writing(None) as cursor:
            cursor.execute(
                "UPDATE main.webhook_meta SET value = lower(hex(randomblob(8))) "
                "WHERE key = 'outbox'"
            )
            self._move_in(cursor, home)
        self._identity = None  # the next connection that we are given shows the new one
        return count

    def _move_in(self, cursor: sqlite3.Cursor, home: str | None) -> None:
        """Write whose file it is, and have a drain that runs look at that."""
        cursor.execute("DELETE FROM main.webhook_meta WHERE key = 'home'")
        if home is not None:
            cursor.execute("INSERT INTO main.webhook_meta VALUES ('home', ?)", (home,))
        cursor.execute(
            "UPDATE main.webhook_meta SET value = value + 1 WHERE key = 'endpoints_version'"
        )

    # Failed rows.

    def failed(
        self, *, limit: int = 100, after: int | None = None, **filters: Unpack[Filters]
    ) -> list[FailedDelivery]:
        """Return failed rows, oldest first, at most `limit`.

        after: the id of the last row of the page before. Filters, which a row must all meet: ids
        (numbers of rows), endpoint, tenant (of the event), type (or a group: order.*), reason (see
        Attempt), since and until (UTC seconds of failed_at, from since on and before until).
        PayloadError where one cannot be read; TypeError where there is no such filter.
        """
        return self._failed("webhook_failed", filters, limit, after)

    def _failed(
        self, source: str, filters: Mapping[str, Any], limit: int, after: int | None
    ) -> list[FailedDelivery]:
        """Read failed rows. source: what stands after FROM, webhook_failed among it; a tenant's
        brings the scope in."""
        where, values = _chosen(_OF_FAILED, filters)
        names = ", webhook_failed.".join(f.name for f in dataclasses.fields(FailedDelivery))
        sql = f"""SELECT webhook_failed.{names} FROM {source}
                   WHERE webhook_failed.id > ? AND {where} ORDER BY webhook_failed.id LIMIT ?"""
        rows = self._select(sql, after or 0, *values, _whole("limit", limit, 0, 10**9))
        return [FailedDelivery(*row) for row in rows]

    def replay(
        self,
        *,
        all: bool = False,
        dry_run: bool = False,
        conn: Any = None,
        **filters: Unpack[Filters],
    ) -> int:
        """Make failed rows pending again, with a fresh retry budget; return how many.

        They are due at once, as fast as the endpoint's rate allows: same id and same data, the
        endpoint's current secret and options. `expires` holds no more: somebody wants it sent. For
        a disabled endpoint they are held. Rows of events that were erased stay as they are.

        Filters as in failed(); all=True says that you mean every row, and PayloadError comes where
        neither is given. dry_run only counts. Without conn it works in batches, so that no commit
        of the host waits long; cut off between, some are replayed, and it can be run again.
        """
        return self._replay(all, dry_run, conn, filters, {})

    def _replay(
        self,
        all: bool,
        dry_run: bool,
        conn: Any,
        filters: Mapping[str, Any],
        scope: Mapping[str, Any],
    ) -> int:
        """Replay what filters choose in a scope. scope: filters that the caller did not give, as a
        tenant's door adds them. They are no choice: with these alone, and not `all`, it is
        refused."""
        now = float(self.clock())
        return self._act_on_failed(
            f"""UPDATE main.webhook_deliveries
                   SET status = 'pending', attempts = 0, first_attempt_at = NULL, due_at = {now!r},
                       expires_at = NULL
                 WHERE status = 'failed' AND (event, endpoint_id) IN (
                   SELECT event, endpoint_id FROM {_FAILED}
                    WHERE id BETWEEN ? AND ?
                      AND {{where}})""",
            all, dry_run, conn, filters, scope, but=_WAS_ERASED.format("webhook_failed.event"),
        )  # fmt: skip

    def discard(
        self,
        *,
        all: bool = False,
        dry_run: bool = False,
        conn: Any = None,
        **filters: Unpack[Filters],
    ) -> int:
        """Delete failed rows: what they stand for is not delivered. Return how many. Filters, all,
        dry_run and conn as in replay(). The event, and the delivery as `failed`, stay on record
        until they are pruned; a queue that such a row held goes on."""
        statement = f"DELETE FROM {_FAILED} WHERE id BETWEEN ? AND ? AND {{where}}"
        return self._act_on_failed(statement, all, dry_run, conn, filters)

    def _act_on_failed(
        self,
        statement: str,
        all: bool,
        dry_run: bool,
        conn: Any,
        filters: Mapping[str, Any],
        scope: Mapping[str, Any] | None = None,
        but: str = "0",
    ) -> int:
        """Run a statement for the failed rows that filters choose in a scope (see _replay); return
        how many rows it changed. statement: with places for the first and last id of a range, and
        for {where}. but: a condition of rows that are left as they are."""
        if _chosen(_OF_FAILED, filters)[0] == "1" and not all:
            raise _Unclear(
                "say which failed rows: ids, endpoint, tenant, type, reason, since, until or --all "
                "(all=True)"
            )
        where, values = _chosen(_OF_FAILED, {**filters, **(scope or {})})
        where = f"{where} AND NOT {but}"
        if dry_run:
            with self._reading(conn) as cursor:
                cursor.execute(f"SELECT count(*) FROM main.webhook_failed WHERE {where}", values)
                return int(cursor.fetchone()[0])
        ranges = self._ranges(_FAILED, "id", where, values, 1000, conn)
        return self._in_batches(statement.format(where=where), values, ranges, conn)

    # What waits.

    def cancel(
        self,
        *,
        event_id: str | None = None,
        endpoint: str | None = None,
        tenant: str | None = None,
        key: str | None = None,
        type: str | None = None,
        since: float | None = None,
        until: float | None = None,
        all: bool = False,
        dry_run: bool = False,
        conn: Any = None,
    ) -> int:
        """Have deliveries that wait not be sent: they end as cancelled, and stay on record. Return
        how many.

        They must meet all filters that are given. tenant, key, type (or a group: order.*), since
        and until (UTC seconds of emission, from since on and before until): of the event. all=True
        says that you mean everything that waits. dry_run only counts. With conn it is part of your
        transaction: a reminder that was emitted with a delay is cancelled by its key when the order
        is paid. Without, it works in batches, so that no commit of the host waits long; what is
        emitted meanwhile may be left out.

        What is on the wire is not recalled, but not tried again; if a 2xx comes, it is delivered,
        because that is what happened. resend() sends it after all. NotFound: there is no such event
        or endpoint. PayloadError: neither a filter nor all is given.
        """
        filters = {
            "event_id": event_id,
            "endpoint": endpoint,
            "tenant": tenant,
            "key": key,
            "type": type,
            "since": since,
            "until": until,
        }
        if not all and set(filters.values()) == {None}:
            raise _Unclear(
                "say which deliveries: event_id, endpoint, tenant, key, type, since, until "
                "or --all (all=True)"
            )
        return self._change_waiting("status = 'cancelled'", filters, "1", dry_run, conn)

    def _change_waiting(
        self,
        change: str,
        filters: Mapping[str, Any],
        which: str,
        dry_run: bool,
        conn: Any,
        also: Mapping[str, Sequence[Any] | None] | None = None,
    ) -> int:
        """Change those deliveries that wait which filters, and the condition `which`, choose;
        return how many. change: what the UPDATE sets. Whether they still wait is looked at once
        more when they are changed: they were read before. NotFound where a filter names what there
        is not.

        Pending ones are read in the order of due_at, a thousand at a time, each thousand after the
        one before was changed. So a change that makes due_at later needs a `which` that changed
        rows do not meet: else they are read again and again, for ever. also: see _in_batches; a
        counter that tells a drain of the change (see _News) is counted up there."""
        with self._reading(conn) as cursor:
            if filters.get("event_id") is not None:
                self._seq_on(cursor, filters["event_id"])
            if filters.get("endpoint") is not None:
                self._endpoint_on(cursor, filters["endpoint"])
        rows = self._waiting(filters, which, conn)
        if dry_run:
            return sum(len(some) for some in rows)
        statement = f"""UPDATE main.webhook_deliveries SET {change}
                         WHERE status IN ('pending', 'queued') AND (event, endpoint_id) IN (
                           SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]')
                             FROM json_each(?))"""
        batches = ((_dumps(some),) for some in rows)
        return self._in_batches(statement, (), batches, conn, also)

    def _waiting(
        self, filters: Mapping[str, Any], which: str, conn: Any
    ) -> Iterator[list[tuple[int, str]]]:
        """Yield deliveries that wait and are chosen, as (event, endpoint), a thousand at a time.

        By the event or its key they are found from the event, else from each endpoint in question,
        through the indexes of what waits: however much was delivered, it is not read. Rows are read
        outside any write lock, so the caller looks at their status once more when it changes them.
        Of events that are emitted while it runs none is found: else a busy app would keep it going.
        """
        where, values = _chosen(_OF_WAITING, filters)
        tables = (
            "main.webhook_events AS e CROSS JOIN main.webhook_deliveries AS d ON d.event = e.seq"
        )
        if filters.get("event_id") is not None or filters.get("key") is not None:
            with self._reading(conn) as cursor:
                cursor.execute(
                    f"""SELECT +d.event, +d.endpoint_id FROM {tables}
                         WHERE {where} AND {which} AND d.status IN ('pending', 'queued')""",
                    values,
                )
                rows = cursor.fetchall()
            yield from (rows[n : n + 1_000] for n in range(0, len(rows), 1_000))
            return
        with self._reading(conn) as cursor:
            (newest,) = cursor.execute(_NEWEST).fetchone()
            for kind, column, start in _WAITING_ROWS:
                sql = f"""SELECT +d.event, +d.endpoint_id, +{column}
                            FROM main.webhook_deliveries AS d
                            LEFT JOIN main.webhook_events AS e ON e.seq = d.event
                           WHERE d.endpoint_id = ? AND {kind} AND ({column}, d.event) > (?, ?)
                             AND d.event <= ? AND {where} AND {which}
                           ORDER BY {column}, d.event LIMIT 1000"""
                for id in self._who_waits(cursor, kind, filters):
                    last: tuple[Any, int] = (start, 0)
                    while found := cursor.execute(sql, (id, *last, newest, *values)).fetchall():
                        yield [row[:2] for row in found]
                        last = found[-1][2], found[-1][0]

    def _who_waits(
        self, cursor: sqlite3.Cursor, kind: str, filters: Mapping[str, Any]
    ) -> list[str]:
        """Return the endpoints that have rows of a kind and may have some that filters choose."""
        if filters.get("endpoint") is not None:
            return [filters["endpoint"]]
        cursor.execute(
            f"""{_endpoints_with(kind)}
                SELECT +waiting.id FROM waiting
                  LEFT JOIN main.webhook_endpoints AS p ON p.id = waiting.id
                 WHERE waiting.id IS NOT NULL AND (? IS NULL OR p.tenant IN (?, '*'))""",
            (filters.get("tenant"),) * 2,
        )
        # An id that is not printable was written in plain SQL, and may hold bytes that are no
        # UTF-8: as a parameter it could not be given back to SQLite.
        return [id for (id,) in cursor.fetchall() if id.isprintable()]

    def retry_now(
        self,
        *,
        endpoint: str | None = None,
        tenant: str | None = None,
        event_id: str | None = None,
        type: str | None = None,
        dry_run: bool = False,
        conn: Any = None,
    ) -> int:
        """Make deliveries that wait for their next try due now, and end the hold of their
        endpoints: for a receiver that was mended. Return how many become due.

        They must meet all filters that are given. tenant, type (or a group: order.*): of the event.
        What was emitted with a delay and was never tried becomes due only where its event is named.
        Attempts that were made still count, and rates still hold. dry_run only counts. NotFound:
        there is no such event or endpoint. PayloadError: no filter is given.
        """
        filters = {"endpoint": endpoint, "tenant": tenant, "event_id": event_id, "type": type}
        if set(filters.values()) == {None}:
            raise PayloadError("say what to retry: endpoint, tenant, event_id or type")
        now = float(self.clock())
        which = f"d.due_at > {now!r}" + ("" if event_id is not None else " AND d.attempts > 0")
        count = self._change_waiting(
            f"due_at = {now!r}", filters, which, dry_run, conn, {_SAY_WORK: None}
        )
        if not dry_run:
            self._end_hold(filters, conn)
        return count

    def _end_hold(
        self, filters: Mapping[str, Any], conn: Any = None, same: int | None = None
    ) -> None:
        """Forget the failures of endpoints, so that they are not on hold any more: of a named one,
        or of those for which something waits that filters choose. same: `registered` of the named
        one, else it is left alone. The drain writes these columns itself and does not read them
        back. So `enabled` is set too, to what it is: a trigger on it has a drain read the row
        again."""
        where, values = _chosen(_OF_WAITING, filters)
        waits = f"""EXISTS (SELECT 1 FROM main.webhook_deliveries AS d
                              JOIN main.webhook_events AS e ON e.seq = d.event
                             WHERE d.endpoint_id = p.id AND d.status = 'pending' AND {where})"""
        if filters.get("endpoint") is not None:
            waits = "p.id = ? AND p.registered = coalesce(?, p.registered)"
            values = [filters["endpoint"], same]
        with self._reading(conn) as cursor:
            cursor.execute(
                f"""SELECT +p.id FROM main.webhook_endpoints AS p
                     WHERE (p.failures > 0 OR p.paused_until > ?) AND {waits}""",
                (self.clock(), *values),
            )
            held = _dumps([id for (id,) in cursor.fetchall()])
        if held != "[]":
            with self._writing(conn) as cursor:
                cursor.execute(
                    """UPDATE main.webhook_endpoints
                          SET failures = 0, failing_since = NULL, paused_until = 0.0,
                              enabled = enabled
                        WHERE id IN (SELECT value FROM json_each(?))""",
                    (held,),
                )

    def erase(self, event_id: str, *, conn: Any = None) -> int:
        """Empty an event, for privacy law: its data, headers and keys, and what receivers answered
        to it. Return 1.

        What waits is cancelled. An attempt under way is not recalled, but its answer is not kept.
        The event stays on record, empty (its data is None), and is never delivered again: resend is
        NotFound. Its idempotency_key is free again. Not reached: what receivers have, backups, and
        the free pages of the file, which SQLite clears only under PRAGMA secure_delete. Raises
        NotFound.
        """
        with self._writing(conn) as cursor:
            seq = self._seq_on(cursor, event_id)
            for statement in _ERASE:
                cursor.execute(statement, {"seq": seq, "now": self.clock()})
        return 1

    def resend(self, event_id: str, *, endpoint: str | None = None, conn: Any = None) -> int:
        """Deliver a recorded event again, delivered or not; return to how many endpoints.

        It goes to each endpoint that had it and is still there, or to `endpoint`, which need not
        have had it but must be of the event's tenant, or of '*'. It has the same id and data and a
        fresh retry budget, and goes out although `expires` has passed; for a disabled endpoint it
        is held. Its failed row is deleted. NotFound: there is no such event or endpoint, the two
        are of different tenants, or the event was erased.
        """
        with self._writing(conn) as cursor:
            return self._resend_on(cursor, event_id, endpoint)

    def _resend_on(
        self, cursor: sqlite3.Cursor, event_id: str, endpoint: str | None, of: str | None = None
    ) -> int:
        """Resend in a transaction. of: only to endpoints of this tenant, and not to those of '*'.
        One that waits behind others in its queue stays there."""
        now, seq = self.clock(), self._seq_on(cursor, event_id, whole=True)
        if endpoint is not None:
            self._add_delivery(cursor, seq, endpoint, now)
        cursor.execute(
            f"""UPDATE main.webhook_deliveries
                   SET status = CASE WHEN status = 'queued' THEN status ELSE 'pending' END,
                       attempts = 0, first_attempt_at = NULL, due_at = ?, delivered_at = NULL,
                       expires_at = NULL,
                       queue = {_QUEUE_OF}
                 WHERE event = ? AND ? IN ('', endpoint_id) AND EXISTS (
                   SELECT 1 FROM main.webhook_events AS e, main.webhook_endpoints AS p
                    WHERE e.seq = event AND p.id = endpoint_id
                      AND ? IN ('', p.tenant) AND {_MAY_HAVE})""",
            (now, seq, endpoint or "", of or ""),
        )
        count = _changes(cursor)
        cursor.execute(_SAY_WORK)
        return count

    def _add_delivery(self, cursor: sqlite3.Cursor, seq: int, endpoint: str, now: float) -> None:
        """Add a delivery of an event to an endpoint, in no queue yet, unless there is one; raise
        NotFound where there is no such endpoint for its tenant."""
        tenant = self._endpoint_on(cursor, endpoint).tenant
        cursor.execute("SELECT +tenant FROM main.webhook_events WHERE seq = ?", (seq,))
        if tenant not in (cursor.fetchone()[0], "*"):
            raise NotFound(
                f"the endpoint {endpoint} is not of the tenant of event {_event_id(seq)}, and "
                "events never go from one tenant to another; emit it again for the other tenant"
            )
        cursor.execute(
            "INSERT OR IGNORE INTO main.webhook_deliveries (event, endpoint_id, due_at) "
            "VALUES (?, ?, ?)",
            (seq, endpoint, now),
        )

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
        """Give an endpoint the recorded events of a time that match it and that it has no delivery
        for: a new endpoint, or one that was disabled. Return how many.

        since, until: UTC seconds of emission, from since on and before until. type: or a group
        (order.*). They are due at once, in the order of their emission. Not among them: events of
        other tenants, events that were erased or have expired, and those that retention has
        deleted. dry_run only counts. Without conn it works in batches; cut off between, run it
        again. Raises NotFound, PayloadError.
        """
        chosen = {"since": since, "until": until, "type": type}
        return self._backfill(endpoint, chosen, dry_run, conn, self._endpoint_on)

    def _backfill(
        self, endpoint: str, filters: Mapping[str, Any], dry_run: bool, conn: Any, find: _Find
    ) -> int:
        """Backfill the endpoint that `find` returns; raise what it raises. Each batch makes sure
        that the endpoint is the one that was found."""
        since, now = _number("since", filters["since"], -1e12, 1e12), float(self.clock())
        where, chosen = _chosen(_OF_EVENT, {**filters, "since": since})
        values = list(chosen)
        with self._looking(conn) as cursor:
            tenant = find(cursor, endpoint).tenant
            same = self._registered(cursor, endpoint)
            events = self._events_for(tenant)
            rows = f"main.webhook_endpoints AS p, {events}"
            missed = f"""p.id = ? AND p.registered = {same} AND {where} AND {_MAY_HAVE}
              AND NOT {_WAS_ERASED.format("e.seq")}
              AND {_LETS_THROUGH} AND coalesce(e.expires_at > {now!r}, 1)
              AND EXISTS (SELECT 1 FROM json_each(p.events) AS one
                           WHERE e.type GLOB one.value
                             AND (one.value <> '*' OR e.type NOT GLOB 'webhook.*'))
              AND NOT EXISTS (SELECT 1 FROM main.webhook_deliveries
                               WHERE event = e.seq AND endpoint_id = p.id)"""
            # Of internal types a customer's endpoint gets those that the operator named in it.
            if self._catalogue.internal and tenant not in (None, "*"):
                missed += (
                    " AND (e.type NOT IN (SELECT value FROM json_each(?))"
                    " OR e.type IN (SELECT value FROM json_each(p.events)))"
                )
                values.append(_dumps(sorted(self._catalogue.internal)))
            if dry_run:
                cursor.execute(f"SELECT count(*) FROM {rows} WHERE {missed}", (endpoint, *values))
                return int(cursor.fetchone()[0])
        statement = f"""INSERT INTO main.webhook_deliveries (event, endpoint_id, due_at, expires_at)
                        SELECT e.seq, p.id, {now!r}, e.expires_at
                          FROM {rows} WHERE e.seq BETWEEN ? AND ? AND {missed} ORDER BY e.seq"""
        # Then they enter their queues: a trigger gives each its place, in the order of emission.
        line_up = f"""UPDATE main.webhook_deliveries SET queue = {_QUEUE_OF}
                       WHERE event BETWEEN ? AND ? AND endpoint_id = ? AND queue IS NULL
                         AND status = 'pending' AND {_QUEUE_OF} IS NOT NULL"""
        ranges = self._ranges(events, "e.seq", where, chosen, 2_000, conn)
        return self._in_batches(
            statement, (endpoint, *values), ranges, conn, {line_up: (endpoint,), _SAY_WORK: None}
        )

    def _events_for(self, tenant: str | None) -> str:
        """Return what stands after FROM for the events that an endpoint of this tenant may have. A
        customer's are looked up by the tenant: to read those of all others costs the more, the more
        of them there are."""
        if tenant in (None, "*"):
            return "main.webhook_events AS e"
        return (
            f"(SELECT * FROM main.webhook_events WHERE tenant = '{_checked_tenant(tenant)}') AS e"
        )

    # The record.

    def _seq_on(self, cursor: sqlite3.Cursor, event_id: str, whole: bool = False) -> int:
        """Return the seq of an event that is there; raise NotFound. whole: it must not have been
        erased either."""
        seq = _event_seq(event_id)
        erased = _WAS_ERASED.format("seq")
        cursor.execute(f"SELECT {erased} FROM main.webhook_events WHERE seq = ?", (seq,))
        found = cursor.fetchone()
        if seq is None or found is None:
            raise self._no_event(event_id)
        if whole and found[0]:
            raise NotFound(f"event {event_id} was erased; there is nothing left of it to deliver")
        return seq

    def _no_event(self, id: object) -> NotFound:
        return NotFound(f"there is no event {_one_line(str(id), 64)}; it may have been pruned")

    def event(self, id: str) -> Event:
        """Return an event with its deliveries, 10,000 at the most; raise NotFound."""
        found = self.events(ids=[id])
        if not found:
            raise self._no_event(id)
        return dataclasses.replace(
            found[0], deliveries=tuple(self.deliveries(event_id=id, limit=10_000))
        )

    def events(
        self,
        *,
        ids: Iterable[str] | None = None,
        tenant: str | None = None,
        type: str | None = None,
        since: float | None = None,
        until: float | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> list[Event]:
        """Return events without their deliveries, newest first, at most `limit`.

        after: the id of the last one of the page before. ids: only these; tenant: the event's;
        type: or a group (order.*); since, until: UTC seconds of emission, from since on and before
        until. An event must meet all that are given. What retention deleted is not there any more.
        PayloadError where a filter cannot be read.
        """
        chosen = {"events": ids, "tenant": tenant, "type": type, "since": since, "until": until}
        return self._events(chosen, limit, after)

    def _events(self, chosen: Mapping[str, Any], limit: int, after: str | None) -> list[Event]:
        """Read the events that filters choose, newest first: seq follows the time."""
        where, values = _chosen(_OF_EVENT, chosen)
        if after is not None:
            where, values = f"{where} AND e.seq < ?", [*values, self._after(after)]
        sql = f"""SELECT e.id, e.type, e.data, e.tenant, e.key, e.created_at, x.erased_at
                    FROM webhook_events AS e LEFT JOIN webhook_erased AS x ON x.event = e.seq
                   WHERE {where} ORDER BY e.seq DESC LIMIT ?"""
        rows = self._select(sql, *values, _whole("limit", limit, 0, 10**9))
        return [
            Event(id, type, _data_of(data), tenant, key, created_at, (), erased_at)
            for id, type, data, tenant, key, created_at, erased_at in rows
        ]

    def _after(self, event_id: Any) -> int:
        """Return the seq of the last event of the page before. The event itself may be pruned by
        now: only its id is looked at."""
        if (seq := _event_seq(event_id)) is None:
            raise PayloadError("after must be the id of the last event of the page before")
        return seq

    def deliveries(
        self,
        *,
        event_id: str | None = None,
        endpoint: str | None = None,
        tenant: str | None = None,
        type: str | None = None,
        status: str | None = None,
        since: float | None = None,
        until: float | None = None,
        limit: int = 100,
        after: tuple[str, str] | None = None,
    ) -> list[Delivery]:
        """Return deliveries, newest event first, at most `limit`.

        status: pending, held (its endpoint is disabled), delivered, failed (or discarded since) or
        cancelled. tenant, type (or a group: order.*), since and until (UTC seconds of emission,
        from since on and before until): of the event. after: (event_id, endpoint_id) of the last
        one of the page before. An event or endpoint that there is not has no deliveries.
        PayloadError where a filter cannot be read.
        """
        chosen = {
            "event_id": event_id,
            "endpoint": endpoint,
            "tenant": tenant,
            "type": type,
            "status": status,
        }
        chosen |= {"since": since, "until": until}  # type: ignore[dict-item]
        return self._deliveries(_DELIVERIES, chosen, limit, after)

    def _deliveries(
        self, source: str, chosen: Mapping[str, Any], limit: int, after: tuple[str, str] | None
    ) -> list[Delivery]:
        """Read the deliveries that filters choose. source: what stands after FROM, with d, e and p
        for delivery, event and endpoint."""
        if after is not None and not (isinstance(after, tuple) and len(after) == 2):
            raise PayloadError(
                "after must be (event_id, endpoint_id) of the last delivery of the page before"
            )
        where, values = _chosen(_OF_DELIVERY, chosen)
        if after is not None:
            where += " AND e.seq <= ? AND (e.seq, d.endpoint_id) < (?, ?)"
            values += [self._after(after[0]), self._after(after[0]), after[1]]
        sql = f"""SELECT e.id, d.endpoint_id, {_PUBLIC_STATUS}, d.attempts, d.due_at, d.delivered_at
                    FROM {source}
                   WHERE {where} ORDER BY e.seq DESC, d.endpoint_id DESC LIMIT ?"""
        return [
            Delivery(*row) for row in self._select(sql, *values, _whole("limit", limit, 0, 10**9))
        ]

    def attempts(self, event_id: str, endpoint: str | None = None) -> list[Attempt]:
        """Return what was tried for an event, to all endpoints or to one, oldest first; raise
        NotFound where there is no such event. Each attempt is there until retention deletes the
        event; of a delivery's many failures only the first and the last keep the answer. A ping,
        and an attempt whose outcome a crash took, are not recorded."""
        return self._attempts(event_id, endpoint)

    def _attempts(self, event_id: str, endpoint: str | None, scope: str = "1") -> list[Attempt]:
        """Read attempts. scope: an SQL condition more, that of a tenant's door."""
        with self._reading() as cursor:
            seq = self._seq_on(cursor, event_id)
        sql = f"""SELECT ?, endpoint_id, at, status_code, reason, error, duration, response
                    FROM webhook_attempts
                  WHERE event = ? AND ? IN ('', endpoint_id) AND {scope} ORDER BY id"""
        return [Attempt(*row) for row in self._select(sql, event_id, seq, endpoint or "")]

    def stats(self) -> Stats:
        """Return the outbox's numbers, as they are now.

        It reads indexes, so a long record costs it little; what waits is counted, which takes the
        longer the more it is. What an endpoint did in the last hour is counted in full; p50 and
        p95, seconds of its successes, are of the newest ones, 20,000 for all endpoints together but
        20 at least for each.
        """
        return self._stats()

    # What pages show besides.

    def _heads_of(self, ids: Sequence[str]) -> dict[str, tuple[str, float, float | None]]:
        """Return type and time of events, and when they were erased, without their data. Events
        that are pruned are left out."""
        sql = """SELECT id, type, created_at, erased_at
                   FROM webhook_events LEFT JOIN webhook_erased ON event = seq
                  WHERE seq IN (SELECT value FROM json_each(?))"""
        return {
            id: (type, at, erased) for id, type, at, erased in self._select(sql, _event_seqs(ids))
        }

    def _tenants_of(self, ids: Sequence[str]) -> dict[str, str]:
        """Return the tenants of endpoints, by the endpoints' ids. Those that are no
        tenant's, or were removed, are left out."""
        sql = f"SELECT id, tenant FROM {_LISTED} WHERE tenant IS NOT NULL"
        # Escaped, since SQLite takes no text with an id that plain SQL wrote and that is no UTF-8.
        return dict(self._select(sql, json.dumps(ids)))

    def _picked(self, event_id: str) -> _Picked:
        """Return an event as a drain picks it, so that a page can show the body as it is sent;
        raise NotFound."""
        sql = """SELECT type, data, json_valid(data), key, headers, created_at, tenant
                   FROM webhook_events WHERE seq = ?"""
        for row in self._select(sql, _event_seq(event_id)):
            return _Picked(_event_seq(event_id) or 0, 0.0, 0, None, None, *row)
        raise self._no_event(event_id)

    # Numbers, and the deletion of what is old.

    def _stats(self, tenant: str | None = None) -> Stats:
        """Return the numbers of all endpoints, or of a tenant's. A tenant is told neither what went
        wrong on our side nor why nothing is sent from here: both name files and servers of ours.
        Failed rows whose endpoint is not there any more count for the operator only."""
        of, now = "1" if tenant is None else "p.tenant = :tenant", self.clock()
        values = {"now": now, "since": now - 3600.0, "tenant": tenant}
        with self._reading() as cursor:
            cursor.execute(f"{_NUMBERS} WHERE {of} ORDER BY p.created_at, p.id", values)
            rows = cursor.fetchall()
            hours = self._hours(cursor, of, values, [row[0] for row in rows])
            failed = json.dumps([id for id, hour in hours.items() if any(hour.failed)])
            cursor.execute(_LAST_ERRORS, {"since": values["since"], "failed": failed})
            errors = {
                id: _NOT_SENT if tenant is not None and why in _OUR_SIDE else error
                for id, why, error in cursor.fetchall()
            }
            given_up = sum(row[1] for row in rows)
            if tenant is None:
                (given_up,) = cursor.execute("SELECT count(*) FROM webhook_failed").fetchone()
        endpoints = tuple(
            _endpoint_stats(row, hours[row[0]], errors.get(row[0]), now) for row in rows
        )
        enabled = [e for e in endpoints if e.enabled]
        return Stats(
            pending=sum(e.pending for e in enabled),
            due=sum(row[-2] for row in rows if row[2]),
            held=sum(e.pending for e in endpoints if not e.enabled),
            failed=given_up,
            oldest_due_age=max(
                (e.oldest_due_age for e in enabled if e.oldest_due_age is not None), default=None
            ),
            endpoints=endpoints,
            refusal=self._refusal() if tenant is None else None,
        )

    def _hours(
        self, cursor: sqlite3.Cursor, of: str, values: Mapping[str, Any], ids: Sequence[str]
    ) -> dict[str, _Hour]:
        """Return the last hour of each endpoint. ids: all of them, since the queries leave out
        those that were not tried in it."""
        hours = {id: _Hour([0] * 12, [0] * 12, []) for id in ids}
        cursor.execute(f"{_HOUR} AND {of}", values)
        for id, twelfth, counts in cursor.fetchall():
            hours[id].tried[twelfth], hours[id].failed[twelfth] = map(int, counts.split())
        tried = sum(any(hour.tried) for hour in hours.values())
        most = max(20, 20_000 // (tried or 1))
        cursor.execute(f"{_TOOK} AND {of}", {**values, "most": most})
        for id, seconds in cursor.fetchall():
            hours[id].took.append(seconds)
        return hours

    def metrics(self) -> str:
        """Return the numbers in Prometheus' text format, each labelled with its endpoint.

        Counters and the histogram (seconds from emit to 2xx) are kept in the file, so they survive
        restarts, and several processes show the same: scrape one of them. A drain writes them with
        its outcomes. An endpoint's numbers end when it is removed.
        """
        counts: dict[str, dict[str, float]] = {}
        for id, name, value in self._select("SELECT endpoint_id, name, value FROM webhook_counts"):
            counts.setdefault(id, {})[name] = value
        lines = []
        attempts, given_up, seconds = (list[tuple[str, str, float]]() for _ in range(3))
        endpoints = [(f'endpoint="{e.id}"', e) for e in self.stats().endpoints]
        for name, help, field in _GAUGES:
            lines += _family(
                name,
                "gauge",
                help,
                (("", labels, getattr(e, field) or 0) for labels, e in endpoints),
            )
        for labels, endpoint in endpoints:
            of = counts.get(endpoint.id, {})
            of["delivered"] = sum(of.get(name, 0.0) for name in _BUCKET_NAMES)
            attempts += [
                ("", f'{labels},result="{name}"', of[name])
                for name in ("delivered", *_REASONS)
                if name in of
            ]
            given_up.append(("", labels, of.get("given up", 0)))
            seconds += _histogram(labels, of)
        lines += _family(
            "attempts_total", "counter", "Attempts by result: delivered, or why not.", attempts
        )
        lines += _family(
            "given_up_total", "counter", "Deliveries that went to webhook_failed.", given_up
        )
        lines += _family("delivery_seconds", "histogram", "Seconds from emit to 2xx.", seconds)
        return "\n".join(lines) + "\n"

    def prune(self, older_than: float | None = None) -> int:
        """Delete old events with their deliveries and attempts; return how many. A drain does it by
        itself.

        Old: emitted more than `older_than` seconds ago (None: the retention), with nothing that
        waits, no failed row, and nothing that was delivered since then. Failed rows older than
        failed_retention are deleted first, if that is set; younger ones keep their events. In
        batches; cut off between, the rest goes the next time. Ids of the Inbox are not touched.
        """
        age = self.retention if older_than is None else _number("older_than", older_than, 0, 1e11)
        cutoff = self.clock() - age
        if self.failed_retention is not None:
            self.discard(until=self.clock() - self.failed_retention)

        def ranges() -> Iterator[tuple[int, int]]:
            # From the oldest event on, as long as a range has an old event in it.
            found: tuple[int, int] | None = (0, 0)
            while found is not None:
                with self._reading() as cursor:
                    found = _prune_range(cursor, found[1], cutoff)
                if found is not None:
                    yield found

        return self._in_batches(_PRUNE, (cutoff, cutoff), ranges())


# ── tenant ────────────────────────────────────────────────────────────────────────────────────────
# Promises: whoever holds a customer's door reaches nothing of anybody else. Each verb looks in one
# transaction whose it is, then does what the outbox's verb of that name does. Knows no SQL but its
# own scope.
#
# Two ways lead there. A verb about one endpoint or event looks up whose it is (_own_endpoint,
# _check_own_event) before the outbox's verb. One that chooses rows by filters adds filters that the
# caller cannot give (_scope): the tenant, and, where rows of '*' endpoints would be among them,
# that the endpoint is the tenant's (`_of`). Event types that the catalogue calls internal are not
# there for a customer.


_Tried = TypeVar("_Tried", Attempt, FailedDelivery)


def _for_customer(row: _Tried) -> _Tried:
    """Return an attempt or a failed row as its customer may read it. What went wrong on our side (a
    secret that is not there, a sender) names our files, variables and servers, so that the customer
    reads only that it could not be sent."""
    if row.reason not in _OUR_SIDE:
        return row
    return dataclasses.replace(row, error=_NOT_SENT, response=None)


def _without_credentials(endpoint: Endpoint) -> Endpoint:
    """Return an endpoint as its customer may have it: "..." stands for the value of each header and
    for the paths of certificates."""
    headers = dict.fromkeys(endpoint.headers, "...")
    cert, ca = ("..." if path else None for path in (endpoint.cert, endpoint.ca))
    return dataclasses.replace(endpoint, headers=headers, cert=cert, ca=ca)


class Tenant:
    """The door of one customer: the outbox's verbs, in the scope of that tenant. Made by
    Outbox.tenant(id).

    For code that acts for a customer: a settings page, an API. Each verb means, takes and raises
    what the Outbox's verb of that name does; below stands what is different.

    What belongs to somebody else is NotFound, in the words for what does not exist; that holds for
    each id that a verb is given, also as a filter. (One exception: an id for a new endpoint that
    somebody else has is refused as taken.) What a customer chose is never a reference: no env:, no
    file:, no headers, only http and https addresses, and no event types that are the operator's
    (webhook.*, internal ones); PayloadError otherwise. What the operator gave an endpoint to log in
    with is left out of the Endpoints returned, and errors name no address inside our network. What
    endpoints of tenant '*' got of the customer's events is neither shown nor touched.

    id: the customer. max_endpoints: how many it may have when it adds one.
    """

    __slots__ = ("_outbox", "id", "max_endpoints")

    def __init__(self, outbox: Outbox, id: str, max_endpoints: int = 20) -> None:
        if id is None or _checked_tenant(id) is None:
            raise PayloadError("tenant must be the id of a customer: 1 to 64 letters, digits, _, -")
        self._outbox, self.id = outbox, id
        self.max_endpoints = _whole("max_endpoints", max_endpoints, 0, 10**9)

    def __repr__(self) -> str:
        return f"Tenant({self.id!r} of {self._outbox.path!r})"

    # Endpoints.

    @contextlib.contextmanager
    def _at_own_endpoint(self, id: str, conn: Any) -> Iterator[tuple[Any, Endpoint]]:
        """Yield a connection in the caller's transaction, or in one of our own, and an endpoint of
        this tenant; raise NotFound. Whose it is and what is done to it is one transaction: between
        two, the endpoint could be removed, and another customer add one of its id."""
        with self._outbox._writing(conn) as cursor:
            yield cursor if conn is None else conn, self._own_endpoint(cursor, id)

    def _own_endpoint(self, cursor: sqlite3.Cursor, id: str) -> Endpoint:
        """Return an endpoint of this tenant; raise NotFound for any other."""
        endpoint = self._outbox._endpoint_on(cursor, id)
        if endpoint.tenant != self.id:
            raise self._outbox._no_endpoint(id)
        return endpoint

    def _checked(
        self, url: str | None, options: Mapping[str, Any], secret: str | None = None
    ) -> Any:
        """Return the options of an endpoint that a customer chose; raise what is wrong with them.

        Forms and APIs of the host hand on what came from outside, so the list is of what is
        allowed: an option that is added to Outbox some day is refused here until somebody thought
        about it. Only what a customer may not say is looked at here; the rest is the outbox's to
        check.
        """
        allowed = TenantOptions.__annotations__
        if unknown := sorted(set(options) - set(allowed)):
            raise PayloadError(
                f"a customer's endpoint has no option {', '.join(unknown)}; "
                f"there are url, {', '.join(allowed)}"
            )
        if url is not None and not (isinstance(url, str) and re.match("https?://", url, re.I)):
            _refuse_url("write https://host/path")
        if secret is not None and not (isinstance(secret, str) and secret.startswith("whsec_")):
            raise PayloadError("secret must start with whsec_; leave it out to get a good one")
        if "events" not in options:
            return dict(options)
        patterns = _checked_patterns(options["events"])
        if own := [pattern for pattern in patterns if pattern.startswith("webhook.")]:
            raise PayloadError(f"events: there is no event type {own[0]} for customers")
        self._outbox._catalogue.public().check_patterns(patterns)
        return {**options, "events": patterns}

    @contextlib.contextmanager
    def _customers_words(self) -> Iterator[None]:
        """Leave out of an error what only the operator can do: admit a network."""
        try:
            yield
        except UnsafeURL as error:
            raise UnsafeURL(str(error).partition("; allow_networks")[0]) from None

    def add_endpoint(
        self,
        url: str,
        *,
        id: str | None = None,
        secret: str | None = None,
        conn: Any = None,
        **options: Unpack[TenantOptions],
    ) -> Endpoint:
        """Register where this customer's events go, as Outbox.add_endpoint; return the Endpoint,
        with its secret. Options: events, description, filter. secret: whsec_ and base64, or None.
        PayloadError where the customer has max_endpoints already."""
        checked = self._checked(url, options, secret)
        outbox = self._outbox
        with self._customers_words(), outbox._writing(conn) as cursor:
            of = "SELECT count(*) FROM main.webhook_endpoints WHERE tenant = ?"
            if cursor.execute(of, (self.id,)).fetchone()[0] >= self.max_endpoints:
                raise PayloadError(
                    f"there are {self.max_endpoints} endpoints, as many as may be; remove one first"
                )
            own = cursor if conn is None else conn
            return outbox.add_endpoint(
                url, id=id, secret=secret, tenant=self.id, conn=own, **checked
            )

    def ensure_endpoint(
        self,
        url: str,
        *,
        id: str,
        secret: str | None = None,
        conn: Any = None,
        **options: Unpack[TenantOptions],
    ) -> Endpoint:
        """Add an endpoint, or update what differs, as Outbox.ensure_endpoint. An id that somebody
        else has is refused as add_endpoint refuses it, as taken."""
        checked = self._checked(url, options, secret)
        with self._customers_words(), self._outbox._writing(conn) as cursor:
            own = cursor if conn is None else conn
            try:
                endpoint = self._own_endpoint(cursor, id)
            except NotFound:  # it may be somebody else's: then it ends in add_endpoint
                return self.add_endpoint(url, id=id, secret=secret, conn=own, **options)
            self._keep_credentials(endpoint, url)
            checked = self._keep_patterns(endpoint, checked)
            return _without_credentials(
                self._outbox.ensure_endpoint(
                    url, id=id, secret=secret, tenant=self.id, conn=own, **checked
                )
            )

    def update_endpoint(
        self, id: str, *, url: str | None = None, conn: Any = None, **changes: Unpack[TenantOptions]
    ) -> Endpoint:
        """Change an endpoint's url, events, description or filter; return it. Where the operator
        gave it headers or a certificate, its url stays (PayloadError): another receiver would get
        them. Patterns that only the operator may give stay beside the new ones."""
        checked = self._checked(url, changes)
        with self._customers_words(), self._at_own_endpoint(id, conn) as (own, endpoint):
            self._keep_credentials(endpoint, url)
            return _without_credentials(
                self._outbox.update_endpoint(
                    id, url=url, conn=own, **self._keep_patterns(endpoint, checked)
                )
            )

    def _keep_patterns(self, endpoint: Endpoint, checked: Mapping[str, Any]) -> Any:
        """Return options that a customer chose for an endpoint; among its events, those patterns
        too that the customer may neither give nor, therefore, take away."""
        if "events" not in checked:
            return checked
        own = self._outbox._catalogue.is_operators
        kept = [pattern for pattern in endpoint.events if own(pattern)]
        if kept and len(checked["events"]) + len(kept) > _MOST_PATTERNS:
            most = _MOST_PATTERNS - len(kept)
            raise PayloadError(
                f"events may hold {most} patterns here; a group (order.*) holds many types"
            )
        return {**checked, "events": [*checked["events"], *kept]}

    def _keep_credentials(self, endpoint: Endpoint, url: str | None) -> None:
        """Refuse a new url where the endpoint's credentials would go there."""
        if url not in (None, endpoint.url) and (endpoint.headers or endpoint.cert):
            raise PayloadError(
                "the url of this endpoint cannot be changed here: credentials were set for it"
            )

    def endpoint(self, id: str, *, conn: Any = None) -> Endpoint:
        """Return an endpoint of this customer, without its secret; raise NotFound."""
        with self._outbox._reading(conn) as cursor:
            return _without_credentials(self._own_endpoint(cursor, id))

    def endpoints(self, *, conn: Any = None) -> list[Endpoint]:
        """Return the customer's endpoints, oldest first, without their secrets."""
        return [_without_credentials(e) for e in self._outbox.endpoints(tenant=self.id, conn=conn)]

    def enable_endpoint(self, id: str, *, conn: Any = None) -> Endpoint:
        """Resume an endpoint's held deliveries, with its failures forgotten; return it. It does
        not matter who disabled it: a host that wants to keep a customer's endpoint off must not
        offer this verb, nor the portal with manage=True."""
        with self._at_own_endpoint(id, conn) as (own, _):
            return _without_credentials(self._outbox.enable_endpoint(id, conn=own))

    def disable_endpoint(self, id: str, reason: str = "", *, conn: Any = None) -> Endpoint:
        """Hold an endpoint's deliveries; return it. See Outbox.disable_endpoint."""
        with self._at_own_endpoint(id, conn) as (own, _):
            return _without_credentials(self._outbox.disable_endpoint(id, reason, conn=own))

    def remove_endpoint(self, id: str, *, conn: Any = None) -> None:
        """Delete an endpoint with its waiting deliveries and its failed rows. See
        Outbox.remove_endpoint."""
        self._outbox._remove(id, conn, self._own_endpoint)

    def rotate_secret(
        self, id: str, *, secret: str | None = None, grace: float = 86_400.0, conn: Any = None
    ) -> Endpoint:
        """Give an endpoint a new secret; return the Endpoint, with it. The old one signs too for
        `grace` seconds. secret: whsec_ and base64, or None."""
        self._checked(None, {}, secret)
        with self._at_own_endpoint(id, conn) as (own, _):
            return _without_credentials(
                self._outbox.rotate_secret(id, secret=secret, grace=grace, conn=own)
            )

    def ping(self, id: str, *, type: str | None = None) -> Attempt:
        """Send a webhook.ping, or the catalogue's example of a type, at once, and return what
        happened. See Outbox.ping."""
        if type is not None:
            self._outbox._catalogue.public().example(type)
        if self._outbox._refusal():  # it names the file
            raise OutboxError("nothing is sent from here now; ask who runs this")
        return _for_customer(self._outbox._ping(id, type, self._own_endpoint))

    # Events.

    def emit(self, conn: Any, type: str, data: Any, **options: Unpack[EmitOptions]) -> str:
        """Record an event of this customer in conn's open transaction, as Outbox.emit; return its
        id. A type that is internal, or webhook.*, is a PayloadError."""
        if options.setdefault("tenant", self.id) != self.id:
            raise PayloadError(f"this is the door of {self.id}; leave the tenant out")
        self._outbox._catalogue.public().check(_checked_type(type))
        return self._outbox.emit(conn, type, data, **options)

    def _scope(self, filters: Mapping[str, Any], conn: Any = None) -> dict[str, Any]:
        """Return filters in the scope of this tenant: without internal types; an id in them that is
        not the customer's is NotFound, and another tenant is PayloadError. That the rows are this
        tenant's is not among them: each caller adds that, in the way that its query needs."""
        if filters.get("tenant", self.id) != self.id:
            raise PayloadError(f"this is the door of {self.id}; leave the tenant out")
        if filters.get("endpoint") is not None:
            self.endpoint(filters["endpoint"], conn=conn)
        if filters.get("event_id") is not None:
            with self._outbox._reading(conn) as cursor:
                self._check_own_event(cursor, filters["event_id"])
        internal = self._outbox._catalogue.internal
        return {**filters, "_but": sorted(internal) if internal else None}

    def _check_own_event(self, cursor: sqlite3.Cursor, event_id: str) -> None:
        """Raise NotFound where an event is not this customer's, or of an internal type."""
        seq = self._outbox._seq_on(cursor, event_id)
        cursor.execute("SELECT +tenant, +type FROM main.webhook_events WHERE seq = ?", (seq,))
        tenant, type = cursor.fetchone()
        if tenant != self.id or type in self._outbox._catalogue.internal:
            raise self._outbox._no_event(event_id)

    def event(self, id: str) -> Event:
        """Return an event of this customer with its deliveries to the customer's endpoints; raise
        NotFound."""
        deliveries = tuple(self.deliveries(event_id=id, limit=10_000))  # also looks whose it is
        found = self._outbox._events({"events": [id], "tenant": self.id}, 1, None)
        if not found:
            raise self._outbox._no_event(id)
        return dataclasses.replace(found[0], deliveries=deliveries)

    def events(
        self,
        *,
        type: str | None = None,
        since: float | None = None,
        until: float | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> list[Event]:
        """Return the customer's events without their deliveries, newest first, as Outbox.events."""
        chosen = self._scope({"tenant": self.id, "type": type, "since": since, "until": until})
        return self._outbox._events(chosen, limit, after)

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
        """Return deliveries to the customer's endpoints, newest event first, as
        Outbox.deliveries."""
        chosen: dict[str, Any] = {"event_id": event_id, "endpoint": endpoint, "tenant": self.id}
        chosen |= {"type": type, "status": status, "since": since, "until": until}
        return self._outbox._deliveries(_DELIVERIES_OF_TENANT, self._scope(chosen), limit, after)

    def attempts(self, event_id: str, endpoint: str | None = None) -> list[Attempt]:
        """Return what was tried for an event at the customer's endpoints, oldest first."""
        self._scope({"event_id": event_id, "endpoint": endpoint})
        scope = f"""endpoint_id IN (SELECT id FROM webhook_endpoints WHERE tenant = '{self.id}')"""
        return [
            _for_customer(attempt) for attempt in self._outbox._attempts(event_id, endpoint, scope)
        ]

    def failed(
        self, *, limit: int = 100, after: int | None = None, **filters: Unpack[Filters]
    ) -> list[FailedDelivery]:
        """Return failed rows of the customer's endpoints, oldest first, as Outbox.failed."""
        # The endpoint decides, and an endpoint of a tenant has rows of that tenant only. Each one's
        # rows are found by its index, so that what others' hold costs nothing.
        chosen = {**self._scope(filters), "tenant": None}
        source = f"""(SELECT id AS of FROM webhook_endpoints WHERE tenant = '{self.id}')
                      CROSS JOIN webhook_failed INDEXED BY webhook_failed_endpoint
                              ON endpoint_id = of"""
        return [_for_customer(row) for row in self._outbox._failed(source, chosen, limit, after)]

    def replay(
        self,
        *,
        all: bool = False,
        dry_run: bool = False,
        conn: Any = None,
        **filters: Unpack[Filters],
    ) -> int:
        """Make failed rows of the customer's endpoints pending again, as Outbox.replay; return how
        many. all: every row of the customer's."""
        # The endpoint decides (`_of`). A tenant among the filters, which is this one, is no choice.
        scope = {**self._scope(filters, conn), "tenant": None, "_of": self.id}
        chosen = {name: value for name, value in filters.items() if name != "tenant"}
        return self._outbox._replay(all, dry_run, conn, chosen, scope)

    def cancel(
        self,
        *,
        event_id: str | None = None,
        endpoint: str | None = None,
        key: str | None = None,
        type: str | None = None,
        since: float | None = None,
        until: float | None = None,
        all: bool = False,
        dry_run: bool = False,
        conn: Any = None,
    ) -> int:
        """Have deliveries that wait for the customer's endpoints not be sent, as Outbox.cancel;
        return how many. all: everything that waits for the customer's."""
        chosen: dict[str, Any] = {"event_id": event_id, "endpoint": endpoint, "key": key}
        chosen |= {"type": type, "since": since, "until": until}
        if not all and set(chosen.values()) == {None}:
            raise _Unclear("say which deliveries, or all=True")
        scope = {**self._scope(chosen, conn), "tenant": self.id, "_of": self.id}
        return self._outbox._change_waiting("status = 'cancelled'", scope, "1", dry_run, conn)

    def resend(self, event_id: str, *, endpoint: str | None = None, conn: Any = None) -> int:
        """Deliver a recorded event again, to the customer's endpoints that had it, or to one of the
        customer's, as Outbox.resend; return to how many. Raises NotFound."""
        with self._outbox._writing(conn) as cursor:
            self._check_own_event(cursor, event_id)
            if endpoint is not None:
                self._own_endpoint(cursor, endpoint)
            return self._outbox._resend_on(cursor, event_id, endpoint, self.id)

    def backfill(
        self,
        endpoint: str,
        *,
        since: float,
        until: float | None = None,
        type: str | None = None,
        dry_run: bool = False,
    ) -> int:
        """Give an endpoint the customer's recorded events of a time that match it and that it has
        no delivery for, as Outbox.backfill; return how many. It joins no transaction."""
        chosen = {"since": since, "until": until, "type": type}
        return self._outbox._backfill(endpoint, chosen, dry_run, None, self._own_endpoint)

    def _check(self, name: str, value: Any) -> None:
        """Raise what is wrong with one option that a customer chose. For a form, which says at each
        field what is wrong there."""
        options = self._checked(value, {}) if name == "url" else self._checked(None, {name: value})
        # _checked returns options only, and the url is none: it is taken as it was given.
        with self._customers_words():
            self._outbox._columns(options or {name: value})

    def _missed(self, endpoint: Endpoint) -> int:
        """Return how many of the customer's latest 10,000 events match an endpoint, came since it
        was added, and were never given to it: those that it missed while it was disabled. For a
        page, so it does not look at more."""
        oldest = """SELECT created_at FROM webhook_events WHERE tenant = ?
                     ORDER BY seq DESC LIMIT 1 OFFSET 9999"""
        found = self._outbox._select(oldest, self.id)
        since = max(endpoint.created_at, found[0][0] if found else 0.0)
        return self.backfill(endpoint.id, since=since, dry_run=True)

    def stats(self) -> Stats:
        """Return the numbers of the customer's endpoints, as Outbox.stats; errors of our own side
        are left out."""
        return self._outbox._stats(self.id)

    def forget(self) -> int:
        """Delete all that is the customer's: endpoints, events with what '*' endpoints got of them,
        attempts, failed rows; return how many events. It cannot be undone.

        In batches, so that no commit of the host waits long; run again where it was cut off. Events
        that are emitted for the customer meanwhile, or later, are recorded as ever: stop emitting
        first.
        """
        outbox, of = self._outbox, "tenant = ? AND seq BETWEEN ? AND ?"
        # Endpoints first, so that nothing more goes to the customer. Then events, and before them
        # their failed rows, which are those of '*' endpoints now: a trigger deletes an event's
        # deliveries and attempts with it, but no failed row.
        for endpoint in self.endpoints():
            with contextlib.suppress(NotFound):  # removed meanwhile
                self.remove_endpoint(endpoint.id)
        count = 0
        for ends in outbox._ranges(outbox._events_for(self.id), "e.seq", "1", (), 200, None):
            started = _monotonic()
            with outbox._writing(None) as cursor:
                cursor.execute(
                    f"""DELETE FROM main.webhook_failed
                         WHERE event IN (SELECT seq FROM main.webhook_events WHERE {of})""",
                    (self.id, *ends),
                )
                cursor.execute(f"DELETE FROM main.webhook_events WHERE {of}", (self.id, *ends))
                count += cursor.rowcount
            time.sleep(_monotonic() - started)  # why: see _in_batches
        return count


Outbox._door = Tenant


# ── receiving ─────────────────────────────────────────────────────────────────────────────────────
# Promises: the receiver's half. verify stands under signing; this remembers which events were
# handled. Only the table webhook_inbox; nothing of it is sent, and no drain looks at it.


class Inbox:
    """Remembers received event ids in the receiver's own SQLite file, so that duplicates are
    harmless.

        event = verify(request_body, request_headers, secret)
        with conn:                                # your transaction
            if inbox.accept(conn, event.id):
                ...                               # your writes, committed together with the id

    An event may come again, after a crash or a timeout, and so may somebody's replay of an old
    request. Once the id and your writes are committed together, the second one changes nothing.
    What you do beside the transaction (an e-mail, a call to another server) is not covered: after a
    crash in between it may be done twice, or not at all.

    database: path of the file that your handler writes to; our tables are made in it. It may be an
    outbox's file too. sqlite_only: as in Outbox. Raises SchemaError where the file is not usable.
    Ids are kept for ever unless you call prune: a failed row may be replayed after months.
    """

    def __init__(self, database: str | os.PathLike[str], *, sqlite_only: bool = False) -> None:
        self._path = _path(database)
        if sqlite_only:
            _PROCESS.sqlite_only.add(self._path)
        self._identity = _prepare_file(self._path, create=True)
        self._warned = False

    def accept(self, conn: Any, event_id: str) -> bool:
        """Return True the first time an id is seen, in the transaction open on conn; False for a
        duplicate, which you answer 2xx too.

        A handler that fails and rolls back leaves no trace, so the event may come again. Answer 2xx
        after your commit, not before; with PRAGMA synchronous below FULL a power cut may undo that
        commit, and a warning says so, once. Of two requests with one id at the same time the second
        waits for the first one's commit, as long as your connection waits for locks.

        conn: what Outbox.emit takes. event_id: ReceivedEvent.id, 1 to 256 characters. It is an id
        of one sender: where you receive from several, put the sender's name before it. Raises
        PayloadError, NotInTransaction, SchemaError (conn is open on another file), TransactionLost;
        errors of sqlite3 pass through.
        """
        _line("event_id", event_id, 256, 1)
        with _begun(conn):
            return self._accept(conn, event_id)

    def _accept(self, conn: Any, event_id: str) -> bool:
        """Enter an id in the host's transaction; return whether it is new.

        The INSERT writes only in the file whose identity we know, so it may come before the look at
        the file. Where that file got a new identity (`adopt`, a repair), it wrote nothing: then
        once more, with the new one.
        """
        db = _host(conn)
        cursor = _cursor(db)
        with _HostErrors(db, self._path):
            if self._identity is None:
                self._identity = _check_identity(db, cursor, None, self._path)
            # The write comes first: a transaction that has read does not wait for another writer,
            # it fails at once.
            first = self._remember(cursor, event_id)
            known = self._identity
            self._identity = _check_identity(db, cursor, known, self._path)
            if self._identity != known:
                first = self._remember(cursor, event_id)
            cursor.execute("PRAGMA main.synchronous")  # reads it
            (level,) = cursor.fetchone()
        if int(level) < 2 and not self._warned:
            self._warned = True
            _log.warning(
                "PRAGMA synchronous is below FULL: a power cut can lose an event after you "
                "answered 200"
            )
        return first

    def _remember(self, cursor: sqlite3.Cursor, event_id: str) -> bool:
        cursor.execute(
            """INSERT OR IGNORE INTO main.webhook_inbox
               SELECT ?, ? FROM main.webhook_meta WHERE key = 'outbox' AND value = ?""",
            (event_id, time.time(), self._identity),
        )
        return _changes(cursor) == 1

    def prune(self, older_than: float) -> int:
        """Forget ids received more than `older_than` seconds ago; return how many. A replay of such
        an event is taken for a new one. It is one DELETE on a connection of its own: other writers
        wait for it."""
        with _session(self._path) as db:
            return db.execute(
                "DELETE FROM webhook_inbox WHERE received_at < ?", (time.time() - older_than,)
            ).rowcount


# ── doctor ────────────────────────────────────────────────────────────────────────────────────────
# Promises: says in plain words what is wrong with a file and its machine, and what to do; repairs
# nothing. Looks from outside: what the app's own connections set, PRAGMA synchronous for one,
# cannot be seen from here.

# The first versions of SQLite without the WAL-reset bug (sqlite.org/wal.html#walresetbug): all
# later ones are without it, and so are later ones of the two branches to which the cure was ported
# back.
_WAL_RESET_FIXED = ((3, 51, 3), (3, 50, 7), (3, 44, 6))
# Types of file systems, as Linux names them, whose locks do not hold between machines.
_NETWORK_FILE_SYSTEM = re.compile(
    r"nfs|cifs|smb|afs|ceph|9p$|lustre|gluster|fuse\.(sshfs|s3|rclone|gcs|gluster|ceph)"
)
_LONG_WAL = 4_000  # pages that SQLite could not move into the file; it tries after 1,000
_BEHIND = 600.0  # seconds that a due delivery may have waited beside a drain before it is told
# Bytes of a file that is searched for damage. In rollback mode the search keeps writers waiting.
_MOST_CHECKED = 1 << 28


class _Finding(NamedTuple):
    level: str  # problem: something is to be done; note: good to know
    text: str  # what is wrong, and what to do


_problem = functools.partial(_Finding, "problem")
_note = functools.partial(_Finding, "note")


def _file_system(path: str) -> str:
    """Return the type of the file system that holds a path; '' where that is not known."""
    found, longest = "", 0
    for place, kind in _mounts():
        if os.path.commonpath([path, place]) == place and len(place) >= longest:
            found, longest = kind, len(place)
    return found


def _wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Say whether a version of SQLite has the WAL-reset bug."""
    newest, *backports = _WAL_RESET_FIXED
    return version < newest and not any(
        version[:2] == fixed[:2] and version >= fixed for fixed in backports
    )


def _look_at_file(path: str, db: sqlite3.Connection) -> Iterator[_Finding]:
    """Look at the database file as SQLite sees it: damage, journal mode, durability, the version's
    known bug, a WAL that grows, the file system. The only thing done to it is a passive checkpoint,
    as SQLite itself does one every now and then; it tells how many pages could not be moved."""
    (journal,) = db.execute("PRAGMA journal_mode").fetchone()
    (synchronous,) = db.execute("PRAGMA synchronous").fetchone()
    if os.stat(path).st_size > _MOST_CHECKED:
        yield _note(
            "too large to search for damage beside a live app; run PRAGMA quick_check on a copy"
        )
    elif (damage := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        yield _problem(
            f"the file is damaged ({_one_line(damage, 120)}); restore a backup, or try sqlite3's "
            ".recover"
        )
    if journal != "wal":
        yield _problem(
            f"not WAL but journal_mode {journal}: readers and writers wait for each other; use "
            "`init --wal`"
        )
    if synchronous < 2:
        yield _problem(
            "synchronous is below FULL by default here: a power cut loses commits; have the app "
            "set FULL"
        )
    if _wal_reset_bug(sqlite3.sqlite_version_info):
        bug = "has the WAL-reset bug, which may damage a file that two processes write in WAL mode"
        rare = "so rarely that SQLite's authors had to force it"
        cure = "use WAL all the same, keep backups, and upgrade SQLite when 3.51.3 is at hand"
        yield _note(f"SQLite {sqlite3.sqlite_version} {bug}, {rare}: {cure}")
    if journal == "wal":
        _, pages, moved = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if pages - moved > _LONG_WAL:
            kept = (
                f"a reader that stays open keeps {pages - moved:,} pages in {path}-wal, which grows"
            )
            yield _problem(
                f"{kept}: find a connection with a half-read cursor or a transaction that "
                "never ends"
            )
    kind = _file_system(path)
    if _NETWORK_FILE_SYSTEM.match(kind):
        yield _problem(
            f"on {kind}, a network file system: SQLite's locks fail there; move the file to a "
            "local disk"
        )


def _look_at_schema(db: sqlite3.Connection) -> Iterator[_Finding]:
    """Compare the tables, views, indexes and triggers that there are with those that there should
    be, white space and comments aside: other tools may have rebuilt or lost one."""
    sql = dict(((type, name), sql) for type, name, sql in db.execute(_OUR_OBJECTS))
    for (kind, name), expected in _plan(_SCHEMA).objects.items():
        there, wanted = (
            re.sub(r"--[^\n]*|\s+", "", text or "") for text in (sql.get((kind, name)), expected)
        )
        if there != wanted:
            yield _problem(
                f"the {kind} {name} is not as webhook_outbox makes it: rules of the outbox may not "
                "hold; `schema` prints it"
            )


def _look_at_owners(path: str) -> Iterator[_Finding]:
    """Look at the files on the disk: second names, other owners, folders that cannot be written. A
    file of SQLite's or ours beside the database that belongs to another user locks somebody out."""
    if links := _warn_of_links(path):
        yield _problem(links)
    owner = os.stat(path).st_uid
    for suffix in ("-wal", "-shm", "-journal", "-webhooks"):
        with contextlib.suppress(OSError):
            other = os.stat(path + suffix).st_uid
            if other != owner:
                theirs = f"{path}{suffix} belongs to user {other}, the file to {owner}"
                yield _problem(
                    f"{theirs}: run app and drain as one user, and hand it over with chown"
                )
    if not _temporary_folder():
        yield _problem(_NO_TEMPORARY_FOLDER)
    if not os.access(os.path.dirname(path), os.W_OK):
        yield _problem(
            f"the folder of {path} cannot be written: it must hold the journal and the drain's lock"
        )


def _look_at_drain(outbox: Outbox, stats: Stats) -> Iterator[_Finding]:
    """Say whether somebody drains, and keeps up. What is due with nobody there to send it is a
    problem; nobody there and nothing due is none."""
    pid, oldest = None, stats.oldest_due_age or 0.0
    try:
        pid = _drainer(outbox.path)
    except OutboxError as error:
        yield _problem(f"no drain can start: {error}")
    holder = f"{f'process {pid}' if pid else 'some process'} has the drain's lock"
    if pid is None and stats.due:
        yield _problem(
            f"{stats.due} deliveries are due and nobody drains; call outbox.start(), or run `drain`"
        )
    elif pid is not None and oldest > _BEHIND:
        waited = f"the oldest due delivery has waited {_age(oldest)}"
        yield _problem(f"{waited}, and {holder}; `status` shows for whom it waits")
    elif pid is not None:
        yield _note(holder)


def _look_at_triggers(db: sqlite3.Connection) -> Iterator[_Finding]:
    """List the app's own triggers that emit: a migration that rebuilds a table drops them without a
    word."""
    rows = db.execute(
        """SELECT name || ' on ' || tbl_name FROM sqlite_master
            WHERE type = 'trigger' AND sql LIKE '%webhook^_emit%' ESCAPE '^'
              AND tbl_name NOT LIKE 'webhook^_%' ESCAPE '^' ORDER BY tbl_name, name"""
    ).fetchall()
    if rows:
        yield _note(f"triggers that emit: {_one_line(', '.join(row[0] for row in rows), 2_000)}")


_HOLDS_MUCH = 100_000  # characters; below it no endpoint is worth a word


def _look_at_size(db: sqlite3.Connection) -> Iterator[_Finding]:
    """Name the endpoint whose attempts, answers and failed rows take the most room in the file. Its
    size is reckoned: the texts, and 100 or 200 for what a row takes besides."""
    row = db.execute(
        """SELECT endpoint_id, sum(size) FROM (
             SELECT endpoint_id,
                    sum(100 + coalesce(length(response), 0) + coalesce(length(error), 0)) AS size
               FROM webhook_attempts GROUP BY endpoint_id
              UNION ALL
             SELECT endpoint_id,
                    sum(200 + coalesce(length(response), 0) + coalesce(length(error), 0))
               FROM webhook_failed GROUP BY endpoint_id)
            GROUP BY endpoint_id ORDER BY 2 DESC LIMIT 1"""
    ).fetchone()
    if row and row[1] > _HOLDS_MUCH:
        holds = f"{_one_line(row[0], 64)} holds most of the file, {row[1] / 1e6:.1f} MB in"
        cure = "failed_retention, retention and `failed discard` bound them"
        yield _note(f"{holds} attempts, answers and failed rows; {cure}")


def _look_at_clock(now: float, db: sqlite3.Connection) -> Iterator[_Finding]:
    """Look whether the clock can be right: not before what the file has seen (a minute is let
    pass), and not before June 2025."""
    (newest,) = db.execute(
        """SELECT max(coalesce((SELECT created_at FROM webhook_events ORDER BY seq DESC LIMIT 1),
                               0),
                      coalesce((SELECT at FROM webhook_attempts ORDER BY id DESC LIMIT 1), 0))"""
    ).fetchone()
    if newest > now + 60:
        yield _problem(
            f"the clock says {_moment(now)}, the file knows of {_moment(newest)}: set the clock"
        )
    elif now < 1_750_000_000:
        yield _problem(
            f"the clock says {_moment(now)}: signatures made now are refused; set the clock"
        )


def _look_at_endpoints(outbox: Outbox, stats: Stats) -> Iterator[_Finding]:
    """Name endpoints that hold deliveries back or fail, and failed rows that wait for somebody."""
    rows = {e.id: e for e in outbox.endpoints()}
    for e in stats.endpoints:
        if not e.enabled and e.pending:
            why = rows[e.id].disabled_reason or "by hand"
            yield _problem(
                f"{e.id} is disabled ({why}) and {e.pending} deliveries are held; "
                f"`endpoint enable {e.id}`"
            )
        held = _held(e.failures, e.paused_until or 0.0, outbox.clock())
        if e.enabled and e.failing_since is not None:
            yield _problem(
                f"{e.id} fails since {_moment(e.failing_since)}{held and f' ({held})'}:"
                f" {e.last_error or 'see `events show`'}"
            )
    if stats.failed:
        yield _note(
            f"{stats.failed} failed rows wait for somebody: `failed list`, then replay or discard"
        )
    if not stats.endpoints:
        yield _note(
            "there are no endpoints: events are recorded and go nowhere; `endpoint add URL`"
        )


def _look_at_wires(outbox: Outbox, db: sqlite3.Connection) -> Iterator[_Finding]:
    """Name the enabled endpoints that cannot be sent to from here, in this environment: a secret, a
    certificate, a sender or a transform is not there. Nothing is sent, no name is looked up. Those
    that lack the master key are told together: they are all or none."""
    settings, contexts, unsigned = outbox._settings(), _Contexts(), list[str]()
    for row in _load_endpoints(db, "webhook_endpoints WHERE enabled"):
        try:
            if isinstance(row.endpoint, str):
                raise _Unready("its row is damaged; update or remove it")
            if barred := _barred(row.endpoint.url, settings.guard):
                raise _Unready(barred)
            wire = _Wire.make(row.endpoint, row.secrets, settings)
            if wire.call is None:
                wire.signing_secrets(outbox.clock())
                wire.own_headers()
            if wire.origin_key.scheme == "https":
                contexts.get(wire.origin_key.ca, wire.origin_key.cert)
        except _NoMasterKey as error:
            unsigned.append(str(error))
        except Exception as error:
            yield _problem(f"{row.id} cannot be sent to from here: {_one_line(str(error))}")
    if unsigned:
        yield _problem(f"{len(unsigned)} endpoints cannot be sent to from here: {unsigned[0]}")


def _findings(outbox: Outbox) -> Iterator[_Finding]:
    """Look everywhere. Where damage ends a look, that is the last finding, and the looks behind it
    are left out."""
    with _session(outbox.path) as db:
        try:
            yield from _look_at_file(outbox.path, db)
            yield from _look_at_schema(db)
            yield from _look_at_owners(outbox.path)
            yield from _look_at_clock(outbox.clock(), db)
            yield from _look_at_triggers(db)
            yield from _look_at_size(db)
            stats = outbox.stats()
            if stats.refusal:
                yield _problem(stats.refusal)
            yield from _look_at_drain(outbox, stats)
            yield from _look_at_endpoints(outbox, stats)
            yield from _look_at_wires(outbox, db)
        except (sqlite3.Error, ValueError) as error:
            yield _problem(
                f"the file cannot be read to the end: {_one_line(str(error))}; restore a backup"
            )


# ── pages ─────────────────────────────────────────────────────────────────────────────────────────
# Two sites of plain HTML: the dashboard for the operator, the portal for a tenant (a customer of
# the host). Both are WSGI applications (PEP 3333) that the host mounts under a path of its own, or
# that the commands `dashboard` and `portal` serve on loopback.
#
# Promises: pages without script or foreign asset. GET only reads; a POST counts only if a form of
# ours sent it. What people, receivers and events say is escaped by _fill, which lets nothing but
# _Html through. No secret but a new one, no header value; queries of URLs only to the tenant that
# edits its own. This section calls the verbs of Outbox and Tenant and knows no SQL.
#
# How a request is served, from the outside in:
#   _site_app   makes the WSGI application; it turns whatever goes wrong into a page
#   _site_of    reads where we are mounted, the query and the cookie's token: a _Site
#   open        makes the pages of it: a _Dashboard, or after the host's login a _PortalPages
#   _reply_to   finds the method for the path, in `gets` or `posts`, and calls it
#   _read_form  for a POST: reads the form and refuses one that another site sent
#
# A POST that changed something is answered 303 to the page that shows it, so that loading that page
# again in the browser does not send the form again. Three answers are pages at once, because what
# they show is kept nowhere: what a ping brought, a new secret, and a form that comes back with what
# is wrong in it.

_LONGEST_FORM = 65_536  # bytes of a POST: 100 patterns of 256 characters take less than half
_MOST_FIELDS = 400  # fields of a form, ticked boxes included; more is answered 400
_ON_A_PAGE = 25  # failed rows, deliveries, events
_FIRST_FAILED = 10  # failed rows on the first page, before the endpoints
_MOST_ENDPOINTS = 20  # on the dashboard's first page; on a page of their list five times as many
_MOST_SHOWN = 50_000  # characters of one event's data, so that no page is of megabytes
# The style of all pages stands in each page, for there is no asset to load. The header
# Content-Security-Policy admits it by its SHA-256 (see _site_app), and no other style: an attribute
# style="..." has no effect, so all that pages need is a class here. Colours are variables, set
# twice, for light and for dark; a test measures in a real browser that every text has a contrast of
# 4.5 to its ground, and that no page is wider than 320 pixels. Below 52rem a table's rows become
# blocks, in which each cell names its column (data-name, see _table).
_STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --text: #1a1e26; --soft: #566072;
  --line: #dde1e8; --edge: #8a94a6; --link: #0b57d0; --on: #fff; --bar: #4c8df6; --good: #0b6138;
  --good-back: #dcf3e6; --bad: #a01c16; --bad-back: #fde5e3 }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1217; --card: #181c23; --text: #e7eaf0; --soft: #9da8ba; --line: #2c323d;
    --edge: #6b7688; --link: #8ab4f8; --on: #0f1217; --bar: #6ea2f7; --good: #83dcab; --good-back:
    #123524; --bad: #ffaca6; --bad-back: #45191a }
}
* { box-sizing: border-box; margin: 0 }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--page); color:
  var(--text); font: 0.9375rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.3 } h2 { font-size: 1.0625rem; margin: 2.25rem 0 0.75rem }
h3 { font-size: 1em } a { color: var(--link) } small, .soft, dt { color: var(--soft) }
small { font-size: 0.8125rem; font-weight: 400; display: block }
.row { display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; align-items: center }
.ends { justify-content: space-between }
.card, table, .tiles > div { background: var(--card); border: 1px solid var(--line); border-radius:
  0.75rem }
.card { padding: 0.875rem 1rem; margin-bottom: 0.75rem }
.card pre { max-height: 9.5rem; background: var(--page) } header { margin-bottom: 1.25rem }
h1 + p { margin-top: 0.25rem } header p { margin-bottom: 0.25rem }
.tiles { display: flex; flex-wrap: wrap; gap: 0.75rem } .tiles dd { font-size: 1.625rem }
.tiles > div { padding: 0.625rem 1rem; flex: 1 1 6rem }
h2 + .row { margin-bottom: 0.75rem; align-self: end } table { width: 100%; border-spacing: 0 }
th, td { text-align: left; vertical-align: top; padding: 0.75rem }
tbody > * > * { border-top: 1px solid var(--line); font-weight: 400 } tbody th { min-width: 13rem }
thead th { color: var(--soft); font-size: 0.8125rem; font-weight: 500 }
th, .line, .pill, button { white-space: nowrap } tbody th { white-space: normal }
.good { color: var(--good); background: var(--good-back) }
.bad { color: var(--bad); background: var(--bad-back) }
.off { color: var(--soft); background: var(--line) }
.pill { border-radius: 1rem; padding: 0.0625rem 0.5625rem; font-size: 0.8125rem; font-weight: 500 }
pre { margin-top: 0.5rem; padding: 0.625rem 0.75rem; max-height: 24rem; overflow: auto; white-space:
  pre-wrap; background: var(--card); border-radius: 0.5rem; font: 0.8125rem/1.5 ui-monospace,
  monospace }
code { font: 0.875rem/1.5 ui-monospace, monospace; user-select: all }
svg { display: block; max-width: 100%; fill: var(--bar) } .none { fill: var(--line) }
summary { cursor: pointer; color: var(--soft); padding: 0.375rem 0 }
details form { margin-top: 0.375rem }
button, .button { font: inherit; font-size: 0.875rem; min-height: 2.25rem; padding: 0.25rem
  0.875rem; border-radius: 0.5rem; border: 1px solid var(--edge); background: var(--card); color:
  var(--text); cursor: pointer }
.button { display: inline-block; padding-top: 0.4375rem; text-decoration: none; line-height: 1.3 }
.main { background: var(--link); border-color: var(--link); color: var(--on) }
button.bad { color: var(--bad); background: var(--bad-back); border-color: var(--bad) }
ol { padding: 0 0 0 0.375rem; list-style: none; margin-top: 0.5rem }
li { padding: 0 0 1.25rem 1.25rem; border-left: 2px solid var(--line); position: relative }
li::before { content: ""; position: absolute; left: -0.4375rem; top: 0.375rem; width: 0.75rem;
  height: 0.75rem; border-radius: 50%; background: var(--good) }
li.miss::before { background: var(--bad) }
input, select { font: inherit; color: inherit; background: var(--card); border: 1px solid
  var(--edge); border-radius: 0.5rem; padding: 0.25rem 0.625rem; min-height: 2.25rem; max-width:
  100% }
.field { margin-top: 1.125rem; border: 0; padding: 0; min-width: 0 }
.field input { width: 100%; max-width: 44rem }
.field > label, legend { font-weight: 600; padding: 0 } .top { align-items: start }
.fault { color: var(--bad); margin-top: 0.25rem }
.field .box { display: flex; gap: 0.625rem; align-items: baseline; padding: 0.375rem 0; max-width:
  44rem }
.box input { width: 1.125rem; height: 1.125rem; min-height: 0; flex: none; position: relative; top:
  0.125rem }
.group { margin-top: 0.75rem; color: var(--soft); font-size: 0.8125rem }
.pick { align-items: end; margin-bottom: 0.75rem }
.pick label { font-size: 0.8125rem; color: var(--soft) }
.pick label > * { display: block; font-size: 0.9375rem; color: var(--text) }
.facts dt { font-size: 0.8125rem }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 0.75rem
  1.5rem; flex: 1 }
@media (max-width: 52rem) {
  thead { display: none }
  table, tbody, tbody th { display: block }
  tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: 0.5rem
    1rem; padding: 1rem }
  tbody th { grid-column: 1 / -1 }
  tbody > * > * { border: 0; padding: 0 }
  tr + tr { border-top: 1px solid var(--line) }
  td::before { content: attr(data-name); color: var(--soft); display: block; font-size: 0.8125rem }
}
"""


class _Html(str):
    """Text that is HTML already, so that _fill takes it as it is.

    Only templates of this file, and what _fill made of them, may become one. `_Html(text)` around
    what an event, a receiver or a person said would be a hole.
    """

    __slots__ = ()


class _Refusal(Exception):
    """A request that is not served; its arguments are the status line, what to tell the visitor,
    and further headers. _site_app makes a page of it."""


def _shown(value: object) -> str:
    """Return a value as HTML: a list is its parts one after the other, and what is no _Html is
    text, so it is escaped."""
    if isinstance(value, list):
        return "".join(map(_shown, value))
    return value if isinstance(value, _Html) else html.escape(str(value))


def _fill(template: str, *values: object) -> _Html:
    """Put values into the {} of a template of ours.

    What is no _Html is escaped, also between the quotes of an attribute: whoever forgets to mark a
    value sees tags on the page, and lets nothing through. The template itself is not escaped, so it
    holds no value.
    """
    return _Html(template.format(*map(_shown, values)))


def _pill(text: object, kind: str) -> _Html:
    """Return a word or two on a coloured ground. kind: good, bad or off."""
    return _fill('<span class="pill {}">{}</span>', kind, text)


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> _Html:
    """Return a table, or words where it has no rows; the first cell of a row is its head.

    On a phone the heads of the columns are gone and rows are blocks: each cell repeats the name of
    its column for that, and the style shows it.
    """
    head = [_fill('<th scope="col">{}</th>', name) for name in names]
    body = []
    for first, *rest in rows:
        cells = [
            _fill('<td data-name="{}">{}</td>', *pair) for pair in zip(names[1:], rest, strict=True)
        ]
        body.append(_fill('<tr><th scope="row">{}</th>{}</tr>', first, cells))
    nothing = _Html('<p class="card soft">There are none.</p>')
    return (
        _fill("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>", head, body)
        if body
        else nothing
    )


def _facts(facts: Mapping[str, object], kind: str) -> _Html:
    """Return names and values, leaving out what is "". kind: tiles (large numbers) or facts."""
    shown = [
        _fill("<div><dt>{}</dt><dd>{}</dd></div>", *fact) for fact in facts.items() if fact[1] != ""
    ]
    return _fill('<dl class="{}">{}</dl>', kind, shown)


def _alert(text: str | None) -> _Html:
    """Return a red card that screen readers read out, or nothing where there is no text."""
    return _fill('<p class="card bad" role="alert">{}</p>', text) if text else _Html("")


def _rough(seconds: float) -> str:
    """Return the age of something as people ask for it: below two minutes in whole seconds."""
    return f"{seconds:.0f} s" if seconds < 120 else _age(seconds)


def _time(at: float | None, now: float) -> _Html:
    """Return how long ago a time is, or how far ahead; the pointer over it shows it in UTC."""
    if at is None:
        return _Html("-")
    ago = "just now" if now - at < 1 else f"{_rough(now - at)} ago"
    words = f"in {_rough(max(1.0, at - now))}" if at > now else ago
    return _fill('<time title="{}">{}</time>', _moment(at), words)


def _next(delivery: Delivery, now: float) -> _Html:
    """Return when a delivery is tried next. What is due may wait for its turn, or for a drain: how
    long ago it became due would read as the time of an attempt."""
    if delivery.status != "pending":
        return _Html("-")
    return _time(delivery.due_at, now) if delivery.due_at > now else _Html("due now")


def _tries(delivery: Delivery, tried: int) -> str:
    """Return how often a delivery was tried. A replay or resend counts anew, while the page lists
    all attempts: where these are more, both are said. tried: all attempts that are recorded."""
    again = f" since it was sent again, {tried} in all" if tried > delivery.attempts else ""
    return f"{delivery.attempts}{again}"


_STATUS_KINDS = {"delivered": "good", "failed": "bad"}  # the others are grey


def _status_pill(delivery: Delivery) -> _Html:
    return _pill(delivery.status, _STATUS_KINDS.get(delivery.status, "off"))


def _state_pill(e: EndpointStats, now: float) -> _Html:
    """Return an endpoint's state. One is called failing from its first failure on: people who look
    at the page want to know at once. Alarms (`check`, notices) wait for `e.failing`, the third in a
    row or a minute of them."""
    if not e.enabled:
        return _pill("disabled", "off")
    if e.failing_since is not None:
        return _pill(f"failing for {_rough(now - e.failing_since)}", "bad")
    return _pill("active", "good")


def _judged(row: FailedDelivery | Attempt) -> _Html:
    """Return how an attempt ended: the reason where it failed, and the status code where an answer
    came, "status · HTTP 500"."""
    words = [row.reason or "", f"HTTP {row.status_code}" if row.status_code is not None else ""]
    return _pill(" · ".join(filter(None, words)), "bad" if row.reason else "good")


def _answer_of(row: FailedDelivery | Attempt) -> _Html:
    """Return the error, and the start of the receiver's answer.

    The error "HTTP 500" is left out: _judged stands beside it and says so already. The answer can
    be scrolled, so it has a tabindex: people without a mouse reach it with the Tab key.
    """
    error = (
        _fill("<p>{}</p>", row.error)
        if row.error and row.error != f"HTTP {row.status_code}"
        else ""
    )
    return _fill(
        "{}{}", error, _fill('<pre tabindex="0">{}</pre>', row.response) if row.response else ""
    )


def _timeline(attempts: Sequence[Attempt], with_endpoint: bool = True) -> _Html:
    """Return attempts as a list, oldest first: at most the last 200, each with what was answered.
    with_endpoint: say whose they are, where the page shows those of several endpoints."""
    step = (
        '<li class="{}"><div class="row"><strong>{}</strong>{}<span>{}after {}</span></div>{}</li>'
    )
    steps = [
        _fill(step, "miss" if a.reason else "", _moment(a.at), _judged(a),
              f"{a.endpoint_id}, " if with_endpoint else "", _age(a.duration), _answer_of(a))
        for a in attempts[-200:]
    ]  # fmt: skip
    more = ": the last 200" if len(attempts) > 200 else ""
    nothing = _Html('<p class="card soft">There was none yet.</p>')
    return _fill("<h2>Attempts{}</h2>{}", more, _fill("<ol>{}</ol>", steps) if steps else nothing)


def _bars(e: EndpointStats) -> _Html:
    """Draw the deliveries of the last hour, a bar for each five minutes.

    A bar is 8 wide with 2 between, and at most 28 high. Rounding goes up (-(-a // b)), so that one
    delivery beside a thousand is still seen; minutes without any get a grey line 2 high. The title
    says the numbers to screen readers and under the pointer.
    """
    most, bar = max(e.history) or 1, '<rect class="{}" x="{}" y="{}" width="8" height="{}" rx="1"/>'
    heights = [-(-count * 28 // most) or 2 for count in e.history]
    bars = [
        _fill(bar, "" if e.history[n] else "none", 10 * n, 28 - h, h) for n, h in enumerate(heights)
    ]
    each = ", ".join(map(str, e.history))
    title = f"{e.delivered} deliveries in the last hour; in each five minutes: {each}"
    svg = '<svg role="img" viewBox="0 0 118 28" width="118" height="28"><title>{}</title>{}</svg>'
    return _fill(f"<div>{svg}<small>{{}} delivered</small></div>", title, bars, e.delivered)


def _pinged(ping: Callable[[], Attempt]) -> _Html:
    """Ping, and return what came of it: the attempt, or why there could be none.

    NotFound goes up, for it is about the page: _site_app answers it 404. Any other error of the
    library is about the ping, a refused address say, and is shown.
    """
    try:
        attempt = ping()
    except NotFound:
        raise
    except OutboxError as error:
        return _alert(str(error))
    took = "It did not work, after" if attempt.reason else "It was taken, after"
    return _fill(
        '<div class="card"><div class="row">{}<span>{} {}</span></div>{}</div>',
        _judged(attempt), took, _age(attempt.duration), _answer_of(attempt),
    )  # fmt: skip


def _bounded(text: str) -> str:
    """Return text cut to what a page shows of one thing."""
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "\n…"


def _pretty(data: Any) -> str:
    """Return an event's data as indented JSON, cut to _MOST_SHOWN characters.

    Each level indents by two more spaces, so deep nesting makes that a thousand times longer than
    the data is: it is cut while it is made, not afterwards. Data that Python cannot parse is shown
    as its text.
    """
    if isinstance(data, _Unparsed):
        return _bounded(data)
    parts, length = list[str](), 0
    for part in json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(data):
        parts.append(part)
        length += len(part)
        if length > _MOST_SHOWN:
            break
    return _bounded("".join(parts))


class _Form(dict[str, str]):
    """The fields of a form by name. Of a name that came several times, as ticked boxes do, it has
    the last value, and `every` has them all. A name that did not come is a KeyError, which
    _reply_to answers 400."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        super().__init__(pairs)
        self._pairs = pairs

    def every(self, name: str) -> list[str]:
        return [value for field, value in self._pairs if field == name]


class _Reply(NamedTuple):
    """What a request gets."""

    status: str  # "303 See Other"
    page: _Html
    headers: Sequence[tuple[str, str]] = ()  # besides those that each answer has, see _site_app


# The tables of a site's paths. A path is words and ids in turn, and * stands for an id. The method
# gets the pages, for a POST also the form, and then the ids.
_Gets = Mapping[str, Callable[..., _Html]]  # path -> what shows it
_Posts = Mapping[str, Callable[..., _Reply]]  # path -> what does it


@dataclasses.dataclass(frozen=True, slots=True)
class _Site:
    """What the pages of one request share: where they are, what was asked, links, forms, and the
    frame of a page. It is made for one request and never changed, so threads share nothing."""

    base: str  # the path that we are mounted under, percent-encoded, without a slash at its end
    query: Mapping[str, str]  # of the URL; anybody can write it
    token: str  # what the browser's cookie holds and each form repeats, see _is_ours

    gets: ClassVar[_Gets] = {}  # each site fills these two at the end of its class
    posts: ClassVar[_Posts] = {}

    def url(self, path: str = "", **query: object) -> str:
        """Return the URL of a path of ours, for links and forms: it begins with the mount."""
        return f"{self.base}/{urllib.parse.quote(path)}" + (
            "?" + urllib.parse.urlencode(query) if query else ""
        )

    def link(self, text: object, path: str = "", kind: str = "", **query: object) -> _Html:
        """Return a link to a path of ours. kind: "" or the classes of a button."""
        return _fill('<a class="{}" href="{}">{}</a>', kind, self.url(path, **query), text)

    def form(self, action: str, *parts: object) -> _Html:
        """Return a form that is sent by POST. action: a URL that `url` returned. It carries the
        token, without which _is_ours refuses it."""
        token = _fill('<input type="hidden" name="token" value="{}">', self.token)
        return _fill('<form method="post" action="{}">{}{}</form>', action, token, list(parts))

    def button(self, action: str, text: str, kind: str = "", **fields: object) -> _Html:
        """Return a form that is a button only. fields: what it sends, unseen.

        All "Replay" buttons of a page look alike; the label for screen readers adds what is sent,
        "Replay: 17", so that they differ by ear too.
        """
        hidden = [
            _fill('<input type="hidden" name="{}" value="{}">', *field) for field in fields.items()
        ]
        label = ": ".join((text, *map(str, fields.values())))
        face = _fill('<button class="{}" aria-label="{}">{}</button>', kind, label, text)
        return self.form(action, hidden, face)

    def page(self, title: str, *parts: _Html) -> _Html:
        """Return a whole page: the style, and the parts one below the other. The viewport makes
        phones lay it out at their own width."""
        return _fill(
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            "<style>{}</style></head><body><main>{}</main></body></html>",
            title,
            _Html(_STYLE),
            list(parts),
        )

    def go(self, url: str) -> _Reply:
        """Return the answer to a form that was obeyed: the browser loads this URL by GET."""
        return _Reply("303 See Other", self.page("Done"), [("Location", url)])

    def not_found(self, error: NotFound) -> str:
        """Return what to tell of something that is not there. The portal overrides it: the error
        names what was asked for, which may be somebody else's."""
        return str(error)


def _select(name: str, label: str, options: Mapping[str, str], chosen: str) -> _Html:
    """Return a list to choose from. options: value -> text, in the order shown."""
    mark = {chosen: _Html(" selected")}
    shown = [
        _fill('<option value="{}"{}>{}</option>', value, mark.get(value, ""), text)
        for value, text in options.items()
    ]
    return _fill('<label>{}<select name="{}">{}</select></label>', label, name, shown)


def _input(name: str, label: str, value: str, kind: str = "text") -> _Html:
    """Return a field to write in. kind: HTML's type of the input; a phone's keyboard obeys it."""
    return _fill(
        '<label>{}<input type="{}" name="{}" value="{}"></label>', label, kind, name, value
    )


# A visitor of our pages may have another site open in the next tab, and that site can have the
# browser send a form to us: "replay all". Two things show that a form is ours, and both must hold.
#
# 1. The header Sec-Fetch-Site says same-origin; where a browser does not send it, the host in
#    Origin is the one in Host. Browsers set these headers themselves and let no page change them.
#    Very old browsers send neither; then the second thing alone decides.
# 2. The form repeats the random token of the browser's cookie. Another site can neither read the
#    cookie nor the page with the form. Alone it would not be enough: other ports of localhost and
#    sibling domains can set a cookie of this name that the browser sends to us, and then they know
#    the token.
#
# Any worker process can check both, for nothing is kept in memory. Rejected: a token signed with a
# random key of the process, which the other workers do not have. The cookie is SameSite=Lax, not
# Strict: with Strict a link in a chat would come without it, the page would set a new one, and the
# forms in open tabs would be void. A POST from another site carries neither kind.
def _is_ours(environ: WSGIEnvironment, token: str, form: Mapping[str, str]) -> bool:
    """Say whether a form was sent by a page of ours; the two rules stand above. The tokens are
    compared in constant time: how long it takes tells nothing about the right one."""
    site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
    if site is None and origin is not None:
        site = (
            "same-origin"
            if urllib.parse.urlsplit(origin).netloc == environ.get("HTTP_HOST")
            else "cross-site"
        )
    return site in (None, "same-origin") and hmac.compare_digest(
        token.encode(), form.get("token", "").encode()
    )


def _read_form(environ: WSGIEnvironment, token: str) -> _Form:
    """Return the form of a request, once it is known to be ours.

    Raises _Refusal (413 too long, 403 not ours) or ValueError, which _reply_to answers 400: no
    length, as of a chunked body; bytes beyond ASCII, which browsers percent-encode; what is no form
    or has more than _MOST_FIELDS fields. Nothing is read of a form that is too long.
    """
    length = int(environ.get("CONTENT_LENGTH") or "x")  # "x": a ValueError
    if length > _LONGEST_FORM:
        raise _Refusal("413 Content Too Large", "The form is too long.")
    body = environ["wsgi.input"].read(max(0, length)).decode("ascii")
    form = _Form(
        urllib.parse.parse_qsl(
            body,
            keep_blank_values=True,
            strict_parsing=bool(body),  # an empty form is an error in Python 3.10
            errors="strict",
            max_num_fields=_MOST_FIELDS,
        )
    )
    if not _is_ours(environ, token, form):
        raise _Refusal(
            "403 Forbidden", "This did not come from a form of this page: load the page again."
        )
    return form


def _site_of(environ: WSGIEnvironment) -> _Site:
    """Return what a request says of itself: our mount, the query, the token.

    WSGI hands the mount over as text that holds one byte a character (PEP 3333), hence latin-1.
    A query is read as far as 8,192 characters; links of ours are far shorter. A browser without our
    cookie, or with something else under its name, gets a new random token.
    """
    mount = environ.get("SCRIPT_NAME", "").strip("/")
    base = "/" + urllib.parse.quote(mount, encoding="latin-1") if mount else ""
    query = dict(urllib.parse.parse_qsl(environ.get("QUERY_STRING", "")[:8192]))
    cookie = re.search(
        r"(?:^|; ?)webhook_outbox=([A-Za-z0-9_-]{22})(?:;|$)", environ.get("HTTP_COOKIE", "")
    )
    return _Site(base, query, cookie[1] if cookie else secrets.token_urlsafe(16))


def _reply_to(pages: _Site, environ: WSGIEnvironment) -> _Reply:
    """Do what a request asks for, or raise what is wrong with it.

    A path is words and ids in turn, so every second part is an id: endpoint/ID/edit stands in the
    tables as endpoint/*/edit. The exits, in the order of the code: an unknown path is 404; GET and
    HEAD of a page, which alone set the cookie; a method that the path does not have is 405; POST;
    and a form that lacks a field, or holds what is no number, is 400.
    """
    parts = environ.get("PATH_INFO", "").strip("/").split("/")
    path = "/".join("*" if n % 2 else part for n, part in enumerate(parts))
    show, act = pages.gets.get(path), pages.posts.get(path)
    if show is None and act is None:
        raise _Refusal("404 Not Found", "There is no such page.")
    if environ["REQUEST_METHOD"] in ("GET", "HEAD") and show is not None:
        cookie = f"webhook_outbox={pages.token}; Path={pages.base or '/'}; HttpOnly; SameSite=Lax"
        cookie += "; Secure" if environ["wsgi.url_scheme"] == "https" else ""
        return _Reply("200 OK", show(pages, *parts[1::2]), [("Set-Cookie", cookie)])
    if environ["REQUEST_METHOD"] != "POST" or act is None:
        methods = (["GET", "HEAD"] if show else []) + (["POST"] if act else [])
        raise _Refusal(
            "405 Method Not Allowed", "This is not done this way.", ("Allow", ", ".join(methods))
        )
    try:
        return act(pages, _read_form(environ, pages.token), *parts[1::2])
    except (ValueError, KeyError):
        raise _Refusal("400 Bad Request", "The form cannot be understood.") from None


def _site_app(name: str, open: Callable[[WSGIEnvironment, _Site], _Site]) -> WSGIApplication:
    """Return a WSGI application. name: for the log. open: makes the pages for a request, from its
    environ and its _Site; it may raise _Refusal.

    It keeps no state between requests, so any number of threads and worker processes may serve it.
    The headers that each answer has: the policy admits our own style and nothing else, no script,
    image or frame, forms only to us, and nobody may show a page in a frame (where clicks could be
    stolen); no-store keeps events and a new secret out of caches; nosniff makes browsers believe
    the content type.
    """
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = "default-src 'none'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
    always = [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", f"{policy}style-src 'sha256-{style}'"),
        ("Cache-Control", "no-store"),
        # With no-referrer our own forms would come with Origin: null.
        ("Referrer-Policy", "same-origin"),
        ("X-Content-Type-Options", "nosniff"),
    ]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer a request. What goes wrong becomes a page with a status and a sentence: `told`,
        in the form of a _Refusal's arguments."""
        pages = _site_of(environ)
        told: Any = None
        try:
            pages = open(environ, pages)
            status, page, headers = _reply_to(pages, environ)
        except _Refusal as refusal:
            told = refusal.args
        except NotFound as error:
            told = "404 Not Found", pages.not_found(error)
        except Exception:  # the log has the traceback, which may hold data; a browser gets none
            _log.exception("the %s failed", name)
            told = "500 Internal Server Error", "It did not work; the app's log tells why."
        if told:
            status, text, *headers = told
            back = pages.link("Back to the overview")
            page = pages.page(status, _fill("<h1>{}</h1><p>{}</p><p>{}</p>", status, text, back))
        body = page.encode("utf-8", "replace")  # JSON can hold half a surrogate pair: "?"
        start_response(status, [*always, *headers, ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return app


def _trouble(e: EndpointStats) -> int:
    """Rank an endpoint, the worst first: the dashboard, the portal and `status` sort by it.

    0: it fails, or is on hold. 1: something waits for a person: it has failed rows, or it is
    disabled and either holds deliveries or was disabled by the drain. 2: it is well; one that a
    person disabled and that holds nothing is, too.
    """
    if e.failing or e.paused_until:
        return 0
    gone = not e.enabled and (e.pending or e.disabled_reason in _DISABLED_BY_DRAIN)
    return 1 if e.failed or gone else 2


def _others(rest: Sequence[EndpointStats]) -> str:
    """Say how many endpoints are not shown, and how many of them need a look: a list that is cut
    must not hide that."""
    well = sum(_trouble(e) == 2 for e in rest)
    more = [f"{len(rest) - well} more that need a look"] if well < len(rest) else []
    more += [f"{well} that are well"] if well else []
    return f"and {' and '.join(more)}"


def _row_numbers(form: Mapping[str, str]) -> list[int]:
    """Return the failed rows that a button names: "17", or "17,18,21" where it is for a page of
    them."""
    return [int(id) for id in form["ids"].split(",")]


# What the page of an event offers for a delivery that waits, beside sending it now: the verb's name
# in the form's URL -> the button's text and kind, and the verb itself. Each takes event_id and
# endpoint.
_FOR_WAITING: dict[str, tuple[str, str, Callable[..., object]]] = {
    "cancel": ("Cancel", "bad", Outbox.cancel)
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Dashboard(_Site):
    """The operator's pages: an overview, the list of all endpoints, a search, one event.

    It shows and changes what is anybody's, and asks for no login: that is the host's part, see
    dashboard_app. The methods that return a part of a page stand beside the page that has it.
    """

    outbox: Outbox

    @property
    def filters(self) -> dict[str, str]:
        """Return what the overview's failed rows are filtered by: their endpoint, and the row after
        which the page begins. Whatever else the query says is dropped."""
        return {
            name: value
            for name, value in self.query.items()
            if name == "endpoint" or (name == "after" and re.fullmatch("[0-9]{1,18}", value))
        }

    def act(self, verb: str, text: str, kind: str = "", **fields: object) -> _Html:
        """Return a button of the overview. Its URL keeps the filters, so that `change` comes back
        to the failed rows that were looked at."""
        return self.button(self.url(verb, **self.filters), text, kind, **fields)

    def overview(self) -> _Html:
        """Show what failed first, then the endpoints that need a look, then the latest events."""
        stats, now = self.outbox.stats(), self.outbox.clock()
        tiles: dict[str, object] = {"Pending": stats.pending, "Due now": stats.due}
        tiles |= {
            "Oldest due": _age(stats.oldest_due_age),
            "Held": stats.held,
            "Failed": stats.failed,
        }
        ranked = sorted(stats.endpoints, key=_trouble)
        rest = ranked[_MOST_ENDPOINTS:]
        others = self.link(_others(rest), "endpoints") if rest else ""
        shown = self.endpoints(ranked[:_MOST_ENDPOINTS], now)
        events = self.events(self.outbox.events(limit=10), now)
        head = '<header class="row ends"><h1>Webhooks</h1><p class="soft">{} {}</p></header>'
        return self.page(
            f"Webhooks: {stats.failed} failed",
            _fill(head, _moment(now), self.link("Refresh", **self.filters)),
            _alert(stats.refusal),
            _facts(tiles, "tiles"),
            self.failed(now),
            _fill("<h2>Endpoints</h2>{}<p>{}</p>", shown, others),
            _fill(
                "<h2>Latest events</h2>{}{}", self.finder("Find an event by id or type", ""), events
            ),
        )

    def finder(self, label: str, asked: str) -> _Html:
        """Return the field to search events with; it asks by GET, so it needs no token."""
        form = '<form class="row pick" action="{}">{}<button>Find</button></form>'
        return _fill(form, self.url("search"), _input("q", label, asked, "search"))

    def endpoints(self, some: Sequence[EndpointStats], now: float) -> _Html:
        """Return the table of some endpoints. Numbers and options are read one after the other, so
        an endpoint that was removed in between is left out."""
        rows = {e.id: e for e in self.outbox.endpoints()}
        names = ("Endpoint", "Last hour", "Success", "p50 / p95", "Waiting", "Failed", "Action")
        return _table(names, [self.endpoint(e, rows[e.id], now) for e in some if e.id in rows])

    def endpoint(self, e: EndpointStats, endpoint: Endpoint, now: float) -> tuple[object, ...]:
        """Return an endpoint's row: whose it is and what it gets, its last hour, what to do.

        Success counts attempts, and is rounded down: 100% means that none failed. "Try now" is for
        one on hold: it makes all that waits due at once and ends the hold.
        """
        held = _held(e.failures, e.paused_until or 0.0, now) if e.enabled else ""
        tenant = f"tenant {endpoint.tenant}" if endpoint.tenant else ""
        about = (tenant, _masked(endpoint.url), endpoint.description, endpoint.disabled_reason)
        lines = [
            " · ".join(filter(None, about)),
            f"Gets {', '.join(endpoint.events)}",
            f"Last error: {e.last_error}" if e.last_error else "",
            held,
        ]
        switch = (
            self.act("disable", "Disable", id=e.id)
            if e.enabled
            else self.act("enable", "Enable", id=e.id)
        )
        return (
            _fill('<div class="row"><strong>{}</strong>{}</div>{}', e.id, _state_pill(e, now),
                  [_fill("<small>{}</small>", line) for line in lines if line]),
            _bars(e),
            f"{100 * e.delivered // e.attempts}%" if e.attempts else "-",
            _fill('<span class="line">{} / {}</span>', _age(e.p50), _age(e.p95)),
            f"{e.pending}, oldest {_age(e.oldest_due_age)}" if e.oldest_due_age else e.pending,
            self.link(e.failed, endpoint=e.id) if e.failed else 0,
            _fill('<div class="row">{}{}{}</div>', switch, self.act("ping", "Ping", id=e.id),
                  self.act("retry", "Try now", id=e.id) if held else ""),
        )  # fmt: skip

    def all_endpoints(self) -> _Html:
        """Show all endpoints, page by page, worst first."""
        now, size = self.outbox.clock(), 5 * _MOST_ENDPOINTS
        number = (
            int(self.query["page"]) if re.fullmatch("[0-9]{1,6}", self.query.get("page", "")) else 0
        )
        ranked = sorted(self.outbox.stats().endpoints, key=_trouble)
        rest = len(ranked) - size * (number + 1)
        more = self.link(f"{rest} more", "endpoints", page=number + 1) if rest > 0 else ""
        return self.page(
            "Endpoints",
            _fill("<p>{}</p><h1>{} endpoints</h1>", self.link("← Webhooks"), len(ranked)),
            _fill("<h2>The worst first</h2>{}<p>{}</p>",
                  self.endpoints(ranked[size * number : size * (number + 1)], now), more),
        )  # fmt: skip

    def events(self, events: Sequence[Event], now: float) -> _Html:
        """Return a table of events, without their data."""
        rows = []
        for e in events:
            of = e.type, e.tenant or "-", e.key or "-"
            rows.append((self.link(e.id, f"event/{e.id}"), *of, _time(e.created_at, now)))
        return _table(("Event", "Type", "Tenant", "Key", "Emitted"), rows)

    def search(self) -> _Html:
        """Show the event of an id, or the events of a type, of a group (order.*), or whose type
        contains what was asked for; newest first, a page of them.

        One more is read than is shown, to know whether there is a next page. What can be no type
        finds nothing, and the file is not asked.
        """
        asked, after = self.query.get("q", "").strip(), self.query.get("after")
        if _event_seq(asked) is not None:
            return self.event(asked)
        found = list[Event]()
        if re.fullmatch(r"[A-Za-z0-9_.*-]{1,256}", asked):
            pattern = asked if "*" in asked else f"*{asked}*"
            before = after if _event_seq(after) is not None else None
            found = self.outbox.events(type=pattern, limit=_ON_A_PAGE + 1, after=before)
        rows = found[:_ON_A_PAGE]
        more = (
            self.link("Older", "search", q=asked, after=rows[-1].id)
            if len(found) > len(rows)
            else ""
        )
        return self.page(
            f"Events: {asked}",
            _fill("<p>{}</p><h1>Events</h1>", self.link("← Webhooks")),
            self.finder("An id, a type or a part of it", asked),
            _fill("{}<p>{}</p>", self.events(rows, self.outbox.clock()), more),
        )  # fmt: skip

    def failed(self, now: float) -> _Html:
        """Show failed rows, oldest first: a few on the plain overview, a page of them where they
        are filtered by an endpoint or begin after a row.

        "Replay these" names the rows that the page shows, not a filter: what fails between looking
        and pressing the button is not replayed unseen.
        """
        endpoint, after = self.filters.get("endpoint"), int(self.filters.get("after", 0))
        most = _ON_A_PAGE if self.filters else _FIRST_FAILED
        found = self.outbox.failed(limit=most + 1, after=after, endpoint=endpoint)
        rows = found[:most]
        tenants = self.outbox._tenants_of([row.endpoint_id for row in rows])
        links = [self.link("All failed rows")] if self.filters else []
        if len(found) > len(rows):
            links.append(self.link("Next page", **{**self.filters, "after": str(rows[-1].id)}))
        if len(rows) > 1:
            ids = ",".join(str(row.id) for row in rows)
            links.append(self.act("replay", f"Replay these {len(rows)}", ids=ids))
        of, shown = (
            f" of {endpoint}" if endpoint else "",
            [self.failed_row(row, tenants.get(row.endpoint_id), now) for row in rows],
        )
        head = '<div class="row ends"><h2>Failed rows{}, oldest first</h2>'
        return _fill(head + '<div class="row">{}</div></div>{}', of, links, shown or _table((), ()))

    def failed_row(self, row: FailedDelivery, tenant: str | None, now: float) -> _Html:
        """Return the card of a failed row. tenant: whose endpoint it is, if anybody's. Discarding
        deletes it for ever and there is no script to ask "Are you sure?", so its button is folded
        away: it takes a second click."""
        whose = f", tenant {tenant}" if tenant else ""
        return _fill(
            '<article class="card"><div class="row ends">'
            '<div class="row">{}<h3>{}</h3><span>to {}</span></div>'
            '<div class="row">{}<details><summary>Discard</summary>{}</details></div></div>'
            '<p class="soft">Given up {}, attempts: {}</p>{}</article>',
            _judged(row), self.link(row.type, f"event/{row.event_id}"), f"{row.endpoint_id}{whose}",
            self.act("replay", "Replay", ids=row.id),
            self.act("discard", "Delete for good", "bad", ids=row.id),
            _time(row.failed_at, now), row.attempts, _answer_of(row),
        )  # fmt: skip

    def event(self, id: str) -> _Html:
        """Show an event with its data, up to 200 deliveries and what was tried; NotFound is 404."""
        event, attempts, now = self.outbox.event(id), self.outbox.attempts(id), self.outbox.clock()
        about = f"{event.id}, emitted {_moment(event.created_at)}"
        about += "".join(
            f", {name} {value}"
            for name, value in (("tenant", event.tenant), ("key", event.key))
            if value
        )
        about += f", erased {_moment(event.erased_at)}" if event.erased_at else ""
        names = ("Endpoint", "Status", "Attempts", "Next", "Delivered", "Action")
        more = f"and {len(event.deliveries) - 200} more" if len(event.deliveries) > 200 else ""
        again = (
            self.button(self.url("resend"), "Resend to all", event=id)
            if len(event.deliveries) > 1
            else ""
        )
        tried = collections.Counter(attempt.endpoint_id for attempt in attempts)
        shown = [self.delivery(d, tried[d.endpoint_id], now) for d in event.deliveries[:200]]
        table = _table(names, shown)
        return self.page(
            f"{event.type} {event.id}",
            _fill(
                '<p>{}</p><h1>{}</h1><p class="soft">{}</p>',
                self.link("← Webhooks"),
                event.type,
                about,
            ),
            _fill('<h2>Data</h2><pre tabindex="0" class="card">{}</pre>', _pretty(event.data)),
            _fill(
                '<div class="row ends"><h2>Deliveries</h2>{}</div>{}<p>{}</p>', again, table, more
            ),
            _timeline(attempts),
        )

    def delivery(self, d: Delivery, tried: int, now: float) -> tuple[object, ...]:
        """Return a delivery's row. What waits can be sent now, or cancelled; anything else can be
        resent, also what was delivered. "Send now" and "Resend" are both the verb `resend`. tried:
        how many attempts are recorded."""
        waits = d.status in ("pending", "held")
        again = "Send now" if waits else "Resend"
        of = {"event": d.event_id, "endpoint": d.endpoint_id}
        buttons = [self.button(self.url("resend"), again, **of)]
        for verb, (text, kind, _) in _FOR_WAITING.items() if waits else ():
            buttons.append(self.button(self.url(verb), text, kind, **of))
        return (
            d.endpoint_id,
            _status_pill(d),
            _tries(d, tried),
            _next(d, now),
            _time(d.delivered_at, now),
            _fill('<div class="row">{}</div>', buttons),
        )

    def ping(self, form: _Form) -> _Reply:
        """Ping an endpoint and show what came of it. The browser waits for the attempt, which ends
        within its timeout."""
        said = _pinged(lambda: self.outbox.ping(form["id"]))
        back = self.link("← Webhooks")
        page = _fill("<p>{}</p><h1>A ping to {}</h1>{}", back, form["id"], said)
        return _Reply("200 OK", self.page("Ping", page))

    def resend(self, form: _Form) -> _Reply:
        """Have an event sent again, to one endpoint or, where none is named, to all it went to."""
        self.outbox.resend(form["event"], endpoint=form.get("endpoint"))
        return self.go(self.url(f"event/{form['event']}"))

    def of_waiting(self, verb: str, form: _Form) -> _Reply:
        """Do what a button of _FOR_WAITING says, and go back to the event."""
        _, _, does = _FOR_WAITING[verb]
        does(self.outbox, event_id=form["event"], endpoint=form["endpoint"])
        return self.go(self.url(f"event/{form['event']}"))

    def change(self, change: Callable[[], object]) -> _Reply:
        """Do something that the overview shows, and go back to it as it was filtered."""
        change()
        return self.go(self.url(**self.filters))

    gets: ClassVar[_Gets] = {
        "": overview,
        "endpoints": all_endpoints,
        "search": search,
        "event/*": event,
    }
    posts: ClassVar[_Posts] = {
        "replay": lambda p, form: p.change(lambda: p.outbox.replay(ids=_row_numbers(form))),
        "discard": lambda p, form: p.change(lambda: p.outbox.discard(ids=_row_numbers(form))),
        "enable": lambda p, form: p.change(lambda: p.outbox.enable_endpoint(form["id"])),
        "disable": lambda p, form: p.change(
            lambda: p.outbox.disable_endpoint(form["id"], "on the dashboard")
        ),
        "retry": lambda p, form: p.change(lambda: p.outbox.retry_now(endpoint=form["id"])),
        "ping": ping,
        "resend": resend,
        **{verb: lambda p, form, verb=verb: p.of_waiting(verb, form) for verb in _FOR_WAITING},
    }


def dashboard_app(outbox: Outbox) -> WSGIApplication:
    """Return the dashboard as a WSGI application: endpoints with their last hour, failed rows with
    the receiver's answer, an event's timeline; replay, discard, resend, cancel, ping, enable,
    disable.

    It asks for no login: whoever reaches it sees the events' data, and can replay, discard and
    disable. Mount it behind the login of your app, which also answers for the Host header.

    It works under any SCRIPT_NAME and keeps no state, so any number of workers may serve it, with
    or without a drain in their process. Other sites cannot make a visitor's browser act; what
    receivers sent is escaped; secrets and header values are not shown, queries of URLs are masked.
    """
    return _site_app(
        "dashboard", lambda environ, site: _Dashboard(site.base, site.query, site.token, outbox)
    )


def _utc_of(text: str, end: bool = False) -> float | None:
    """Return UTC seconds of a date, or a date and time, as a form has it; None for nothing.

    end: it ends a span, and a date alone means the end of that day ("until 2026-01-31" has the 31st
    in it). Python 3.10 does not know the Z that stands for UTC. Raises ValueError.
    """
    text = text.strip()
    if not text:
        return None
    moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return _seconds(moment) + (86_400 if end and len(text) == 10 else 0)


def _field_of(text: str, end: bool) -> str:
    """Return a time of the query as a browser's field for date and time takes it, to the minute.
    What is no time is returned as it came, and such a field stays empty."""
    with contextlib.suppress(ValueError, OverflowError):
        if at := _utc_of(text, end):
            return _iso(at)[:16]
    return text


def _fault(text: str | None) -> _Html:
    """Return what is wrong with a field, or nothing. Errors of the library begin with a small
    letter and end without a full stop; they stand here as a sentence."""
    if not text:
        return _Html("")
    text = text[:1].upper() + text[1:] + "." * (not text.endswith((".", "?")))
    return _fill('<p class="fault" role="alert">{}</p>', text)


def _box(value: str, text: str, hint: str, chosen: Sequence[str]) -> _Html:
    """Return an event type or pattern to tick; all boxes have the one name "events"."""
    mark = _Html(" checked" if value in chosen else "")
    box = _fill('<input type="checkbox" name="events" value="{}"{}>', value, mark)
    label = '<label class="box">{}<span>{}<small>{}</small></span></label>'
    return _fill(label, box, text, hint)


def _patterns_shown(patterns: Sequence[str]) -> str:
    """Return an endpoint's patterns for a cell of a table: the first eight of up to a hundred."""
    if "*" in patterns:
        return "all"
    more = f", and {len(patterns) - 8} more" if len(patterns) > 8 else ""
    return ", ".join(patterns[:8]) + more


def _body_sent(outbox: Outbox, endpoint: Endpoint, event_id: str) -> str:
    """Return the body that an endpoint gets of an event, as an attempt would send it now.

    It is made as the drain makes it, from the frozen data and the endpoint's options of today:
    where these were changed, or a transform was, the attempts before had another body. It is not
    signed, so no secrets are handed over. What cannot be made (a transform that raises, a sender
    that this process does not know) is a sentence here and a line in the log: the error may hold
    what is the operator's only.
    """
    try:
        wire = _Wire.make(endpoint, [], outbox._settings())
        body, _ = wire.body(outbox._picked(event_id))
    except Exception as error:  # whatever a transform of the host raises
        _log.info("the body of %s for %s cannot be shown: %s", event_id, endpoint.id, error)
        return "This body cannot be shown."
    return _bounded(body.decode("utf-8", "backslashreplace"))


# How long the old secret signs too, as the form for a new one offers it: seconds -> text.
_GRACES = {
    "86400": "signs too for a day",
    "3600": "signs too for an hour",
    "604800": "signs too for a week",
    "0": "ends at once",
}
# What a page says at its top after a form: the redirect names the key, `?said=saved`. The query has
# a key and not the sentence, for else a link from outside could put any sentence on our page.
_SAID = {
    "saved": "It is saved.",
    "enabled": "It is enabled: what was held is on its way.",
    "disabled": "It is disabled: nothing is sent to it until you enable it.",
    "removed": "The endpoint is removed.",
    "resent": "It will be sent again in a moment.",
    "backfilled": "What was missed will be sent in a moment.",
}


@dataclasses.dataclass(frozen=True, slots=True)
class _PortalPages(_Site):
    """What a customer sees, of what is that customer's: its endpoints, one endpoint with its
    deliveries, one delivery with its attempts.

    Everything that belongs to somebody is read through `door`, whose verbs raise NotFound for what
    is another tenant's. `outbox` is asked only for the clock, its options, the catalogue, and for
    events whose ids the door has just returned. This class only shows: its `posts` is empty, so
    without `manage` there is no form, and a forged one finds no path either.
    """

    outbox: Outbox
    door: Tenant  # the scoped verbs of the customer who is logged in to the host

    manage: ClassVar[bool] = False  # whether pages show what changes something, see _Portal

    def not_found(self, error: NotFound) -> str:
        """Return one sentence for what is somebody else's and for what does not exist, so that no
        customer finds out which ids there are."""
        return "There is no such page."

    def frame(self, title: str, *parts: object, back: _Html | None = None) -> _Html:
        """Return a page with the way back, its title, and what came of the form before."""
        said, back = _SAID.get(self.query.get("said", "")), back or self.link("← Webhooks")
        return self.page(
            title,
            _fill("<header><p>{}</p><h1>{}</h1></header>", back, title),
            _fill('<p class="card good" role="status">{}</p>', said) if said else _Html(""),
            _fill("{}", list(parts)),
        )

    # The list of endpoints.

    def overview(self) -> _Html:
        """Show the customer's endpoints, those in trouble first; where there is none yet, say what
        an endpoint is."""
        now, rows = self.outbox.clock(), {e.id: e for e in self.door.endpoints()}
        stats = [e for e in self.door.stats().endpoints if e.id in rows]
        said = _SAID.get(self.query.get("said", ""))
        room = len(rows) < self.door.max_endpoints
        add = self.link("Add an endpoint", "add", "button main") if self.manage and room else ""
        full = "" if room else f"You have {len(rows)} endpoints, as many as may be."
        stats.sort(key=_trouble)
        names = ("Endpoint", "Events", "Last hour", "Waiting", "Failed")
        nothing = _Html(
            '<div class="card"><h3>No endpoints yet</h3><p class="soft">An endpoint is an address '
            "of your server. We send it a signed request for each event that you choose, and try "
            "again until it is taken.</p></div>"
        )
        shown = [self.row(e, rows[e.id], now) for e in stats[: 5 * _MOST_ENDPOINTS]]
        table = _table(names, shown) if shown else nothing
        return self.page(
            "Webhooks",
            _fill('<header class="row ends"><h1>Webhooks</h1>{}</header>', add),
            _fill('<p class="card good" role="status">{}</p>', said) if said else _Html(""),
            _fill('{}<p class="soft">{}</p>', table, full if self.manage else ""),
        )

    def row(self, e: EndpointStats, endpoint: Endpoint, now: float) -> tuple[object, ...]:
        """Return an endpoint's row. Its URL is masked, as in every list, for it may hold a token;
        the form that edits it alone has it whole."""
        about = (endpoint.description, endpoint.disabled_reason)
        return (
            _fill('<div class="row"><strong>{}</strong>{}</div><small>{}</small>',
                  self.link(_masked(endpoint.url), f"endpoint/{e.id}"), _state_pill(e, now),
                  " · ".join(filter(None, about))),
            _patterns_shown(endpoint.events), _bars(e), e.pending, e.failed,
        )  # fmt: skip

    # One endpoint.

    def endpoint(self, id: str) -> _Html:
        """Show an endpoint: its state, what helps where it is in trouble, and its deliveries. One
        that was removed between the two reads is NotFound as well."""
        endpoint, now = self.door.endpoint(id), self.outbox.clock()
        stats = next((e for e in self.door.stats().endpoints if e.id == id), None)
        if stats is None:
            raise NotFound(id)
        facts: dict[str, object] = {
            "State": _state_pill(stats, now),
            "Events": _patterns_shown(endpoint.events),
            "Waiting": stats.pending,
            "Failed": stats.failed,
            "Added": _moment(endpoint.created_at),
            "Description": endpoint.description,
            "Only where": _dumps(endpoint.filter) if endpoint.filter else "",
        }
        return self.frame(
            _masked(endpoint.url),
            _fill('<div class="card">{}</div>', _facts(facts, "facts")),
            self.trouble(endpoint, stats),
            self.actions(endpoint) if self.manage else "",
            self.deliveries(id, now),
        )

    def trouble(self, endpoint: Endpoint, stats: EndpointStats) -> _Html:
        """Say why an endpoint gets nothing or fails, and what it missed, with what helps.

        Missed are events that came after the endpoint was added and match it, but were never given
        to it: it was disabled then, or its patterns were others. They can be sent only to an
        enabled endpoint.
        """
        at, cards = f"endpoint/{endpoint.id}", list[_Html]()
        card = '<div class="card row ends"><p>{}</p>{}</div>'
        if not endpoint.enabled:
            why = f": {endpoint.disabled_reason}" if endpoint.disabled_reason else ""
            held = f" {stats.pending} deliveries wait." if stats.pending else ""
            enable = self.button(self.url(f"{at}/enable"), "Enable", "main") if self.manage else ""
            cards.append(_fill(card, f"It is disabled{why}. Nothing is sent to it.{held}", enable))
        elif stats.failing_since is not None:
            why = f": {stats.last_error}" if stats.last_error else ""
            cards.append(_fill(card, f"It fails since {_moment(stats.failing_since)}{why}.", ""))
        if missed := self.door._missed(endpoint):
            send = self.button(self.url(f"{at}/backfill"), "Send them", "main")
            words = f"{missed} event{'s were' if missed > 1 else ' was'} missed: never sent here."
            words += "" if endpoint.enabled else " Enable it to have them sent."
            cards.append(_fill(card, words, send if self.manage and endpoint.enabled else ""))
        return _fill("{}", cards)

    def actions(self, endpoint: Endpoint) -> _Html:
        """Return what a customer may do with an endpoint. What needs a choice, or cannot be undone,
        is folded and takes a second click."""
        at = f"endpoint/{endpoint.id}"
        types = {"": "webhook.ping"} | {type: type for type in self.types()}
        example = self.form(
            self.url(f"{at}/ping"),
            _fill('<div class="row pick">{}<button>Send it</button></div>'
                  "<small>Your server cannot tell an example from a real event.</small>",
                  _select("type", "Which", types, "")),
        )  # fmt: skip
        rotate = self.form(
            self.url(f"{at}/rotate"),
            _fill('<div class="row pick">{}<button>Make a new secret</button></div>',
                  _select("grace", "The old secret", _GRACES, "86400")),
        )  # fmt: skip
        disable = self.button(self.url(f"{at}/disable"), "Disable") if endpoint.enabled else ""
        remove = self.button(self.url(f"{at}/remove"), "Remove it, with what waits", "bad")
        folded = "<details><summary>{}</summary>{}</details>"
        return _fill(
            '<div class="row top">{}{}{}{}{}</div>',
            self.link("Edit", f"{at}/edit", "button"),
            disable,
            _fill(folded, "Send an example", example),
            _fill(folded, "New secret", rotate),
            _fill(folded, "Remove", remove),
        )

    def types(self) -> dict[str, EventType]:
        """Return the catalogue's types without the internal ones; none without a catalogue."""
        return self.outbox._catalogue.public().types or {}

    # Deliveries.

    def deliveries(self, id: str, now: float) -> _Html:
        """Show the deliveries of an endpoint that the filter chooses, newest first, a page of them.

        A filter comes from the URL, so anybody may write anything into it. What is wrong with it is
        said above the table: the library's words for a status or type, ours for a time. Deliveries
        and the heads of their events are two reads; an event that was pruned between is left out.
        """
        asked = {name: self.query.get(name, "") for name in ("status", "type", "since", "until")}
        found, fault = list[Delivery](), ""
        try:
            after = self.query.get("after")
            found = self.door.deliveries(
                endpoint=id,
                status=asked["status"] or None,
                type=asked["type"] or None,
                since=_utc_of(asked["since"]),
                until=_utc_of(asked["until"], end=True),
                limit=_ON_A_PAGE + 1,
                after=(after, id) if after else None,
            )
        except PayloadError as error:
            fault = f"{error}."
        except (ValueError, OverflowError):
            fault = "A time is written 2026-01-31 or 2026-01-31T12:00, in UTC."
        rows = found[:_ON_A_PAGE]
        heads = self.outbox._heads_of([d.event_id for d in rows])
        given = {name: value for name, value in asked.items() if value}
        more = ""
        if len(found) > len(rows):
            more = self.link("Older", f"endpoint/{id}", **given, after=rows[-1].event_id)
        names = ("Event", "Emitted", "Status", "Attempts", "Next", "Delivered")
        shown = [
            self.delivery_row(id, d, heads[d.event_id], now) for d in rows if d.event_id in heads
        ]
        return _fill(
            "<h2>Deliveries</h2>{}{}{}<p>{}</p>",
            self.filter_form(id, asked),
            _alert(fault),
            "" if fault else _table(names, shown),
            more,
        )

    def delivery_row(
        self, id: str, d: Delivery, head: tuple[str, float, Any], now: float
    ) -> tuple[object, ...]:
        """Return a delivery's row. head: its event's type, when it was emitted, when erased."""
        link = self.link(head[0], f"endpoint/{id}/event/{d.event_id}")
        return (
            _fill("{}<small>{}</small>", link, d.event_id),
            _time(head[1], now),
            _status_pill(d),
            d.attempts,
            _next(d, now),
            _time(d.delivered_at, now),
        )

    def filter_form(self, id: str, asked: Mapping[str, str]) -> _Html:
        """Return the filter of the deliveries, as it is set; it asks by GET, so that a page of them
        can be bookmarked. With a catalogue types are a list to choose from, in which the type asked
        for stands even where it is not the catalogue's any more."""
        statuses = {"": "any", **{status: status for status in _STATUSES}}
        types = {"": "any", **{type: type for type in self.types()}}
        types.setdefault(asked["type"], asked["type"])
        by_type = (
            _select("type", "Type", types, asked["type"])
            if self.types()
            else _input("type", "Type", asked["type"])
        )
        since, until = (_field_of(asked[name], name == "until") for name in ("since", "until"))
        return _fill(
            '<form class="row pick" action="{}">{}{}{}{}<button>Filter</button></form>',
            self.url(f"endpoint/{id}"),
            _select("status", "Status", statuses, asked["status"]),
            by_type,
            _input("since", "From (UTC)", since, "datetime-local"),
            _input("until", "Until (UTC)", until, "datetime-local"),
        )  # fmt: skip

    def delivery(self, id: str, event_id: str) -> _Html:
        """Show one delivery: the body as it is sent, and what each attempt brought. Of an event
        that was erased there is no body, and nothing to send again."""
        endpoint, now = self.door.endpoint(id), self.outbox.clock()
        found = self.door.deliveries(event_id=event_id, endpoint=id, limit=1)
        if not found:
            raise NotFound(event_id)
        type, created_at, erased_at = self.outbox._heads_of([event_id])[event_id]
        at, attempts = f"endpoint/{id}/event/{event_id}", self.door.attempts(event_id, id)
        facts: dict[str, object] = {
            "Status": _status_pill(found[0]),
            "Attempts": _tries(found[0], len(attempts)),
            "Next": _next(found[0], now) if found[0].status == "pending" else "",
            "Delivered": _time(found[0].delivered_at, now) if found[0].delivered_at else "",
            "Emitted": _time(created_at, now),
            "Erased": _time(erased_at, now) if erased_at else "",
            "Event": event_id,
        }
        may = self.manage and not erased_at
        again = self.button(self.url(f"{at}/resend"), "Send it again") if may else ""
        body = "It was erased." if erased_at else _body_sent(self.outbox, endpoint, event_id)
        return self.frame(
            type,
            _fill('<div class="card row ends">{}{}</div>', _facts(facts, "facts"), again),
            _fill('<h2>Body, as it is sent</h2><pre tabindex="0" class="card">{}</pre>',
                  body),
            _timeline(attempts, with_endpoint=False),
            back=self.link(f"← {_masked(endpoint.url)}", f"endpoint/{id}"),
        )  # fmt: skip

    gets: ClassVar[_Gets] = {"": overview, "endpoint/*": endpoint, "endpoint/*/event/*": delivery}


@dataclasses.dataclass(frozen=True, slots=True)
class _Portal(_PortalPages):
    """What a customer sees and does: forms, and what they do.

    The form of an endpoint has three fields: url, description, events. A customer sets no other
    option here. In its methods `typed` is what stands in the fields, and `faults` what is wrong
    with them: field -> sentence, "" for the form as a whole.
    """

    manage = True

    def add_form(self) -> _Html:
        """Show the empty form. `once` is random and comes back with the form: a form that is sent
        twice, by a double click say, adds one endpoint, see `add`."""
        once = secrets.token_hex(8)
        return self.edit_page("Add an endpoint", "add", {"once": once}, {})

    def edit_form(self, id: str) -> _Html:
        """Show the form with what the endpoint has; here alone its URL is whole, for its owner."""
        endpoint = self.door.endpoint(id)
        typed = {
            "url": endpoint.url,
            "description": endpoint.description,
            "events": self.chosen(endpoint),
        }
        return self.edit_page("Edit the endpoint", f"endpoint/{id}/edit", typed, {})

    def chosen(self, endpoint: Endpoint) -> list[str]:
        """Return those of an endpoint's patterns that are the customer's to change. Those that only
        the operator may give have no box: a customer is not to read the names of internal types."""
        own = self.outbox._catalogue.is_operators
        return [pattern for pattern in endpoint.events if not own(pattern)]

    def edit_page(
        self, title: str, path: str, typed: Mapping[str, Any], faults: Mapping[str, str]
    ) -> _Html:
        """Show the form of an endpoint with what was typed, and beside each field what is wrong.
        path: where the form is sent, by which it also knows whether it adds or edits."""

        def field(name: str, label: str, kind: str, hint: str) -> _Html:
            """Return one field; its limit is the longest URL that is taken."""
            return _fill(
                '<div class="field"><label for="{}">{}</label><small>{}</small>'
                '<input id="{}" name="{}" type="{}" value="{}" maxlength="2048">{}</div>',
                name, label, hint, name, name, kind, typed.get(name, ""), _fault(faults.get(name)),
            )  # fmt: skip

        hidden = '<input type="hidden" name="once" value="{}">'
        button = "Add it" if path == "add" else "Save"
        return self.frame(
            title,
            _fault(faults.get("")),
            self.form(
                self.url(path),
                _fill(hidden, typed["once"]) if path == "add" else "",
                field("url", "URL", "url", "Where your server takes requests: https://..."),
                self.events_field(typed.get("events"), faults.get("events")),
                field("description", "Description", "text", "For you; may be empty."),
                _fill('<p class="field"><button class="main">{}</button></p>', button),
            ),
        )

    def events_field(self, chosen: Sequence[str] | None, fault: str | None) -> _Html:
        """Let the customer tick types of the catalogue, or write patterns where there is none.
        chosen: what the form has so far; None: nothing was chosen yet.

        An endpoint may have patterns that are no type of the catalogue: a group (order.*), a type
        that was taken out. They get a box too, ticked, because the form says all that the endpoint
        is to get, beside what is the operator's alone: see `chosen`.
        """
        types = self.types()
        if not types:
            return _fill(
                '<div class="field"><label for="events">Events</label>'
                "<small>Types such as order.created, groups such as order.*, or * for all; "
                "with spaces between them.</small>"
                '<input id="events" name="events" value="{}">{}</div>',
                "*" if chosen is None else " ".join(chosen),
                _fault(fault),
            )
        chosen = chosen or ()
        groups: dict[str, list[_Html]] = {"": [_box("*", "All events", "", chosen)]}
        others = {*chosen} - {*types} - {"*"}
        groups[""] += [_box(pattern, pattern, "", chosen) for pattern in sorted(others)]
        for type, of in types.items():
            old = "deprecated" if of.deprecated else ""
            groups.setdefault(of.group or "Events", []).append(
                _box(type, type, " · ".join(filter(None, (of.description, old))), chosen)
            )
        boxes = [
            _fill("{}{}", _fill('<p class="group">{}</p>', group) if group else "", some)
            for group, some in groups.items()
        ]
        fieldset = '<fieldset class="field"><legend>Events</legend>{}{}</fieldset>'
        return _fill(fieldset, boxes, _fault(fault))

    def typed(self, form: _Form) -> dict[str, Any]:
        """Return the fields of a form as options of an endpoint: boxes come one by one, patterns
        that were written as one text with spaces or commas between."""
        events = form.every("events")
        if not self.types():
            events = re.split(r"[\s,]+", form.get("events", "").strip())
        url, description = form.get("url", "").strip(), form.get("description", "").strip()
        return {"url": url, "events": [e for e in events if e], "description": description}

    def faults(self, typed: Mapping[str, Any]) -> dict[str, str]:
        """Return what is wrong, by field. Each option is checked alone, so that all faults are
        shown at once; the library's verbs stop at the first."""
        found = {}
        for name, value in typed.items():
            try:
                self.door._check(name, value)
            except OutboxError as error:
                found[name] = str(error)
        if typed.get("events") == []:
            found["events"] = "Choose at least one."
        return found

    def add(self, form: _Form) -> _Reply:
        """Add an endpoint and show its secret, or show the form again with what is wrong.

        The id is made of the customer's own id and the form's `once`: the same form has the same id
        again, and finds that its endpoint is there. The hash keeps customers from choosing an id
        that is another's. The second time the secret is not shown: the first answer had it, and
        `New secret` helps where that was lost.
        """
        typed, once = self.typed(form), f"{self.door.id} {form['once']}"
        id = "ep_" + hashlib.sha256(once.encode()).hexdigest()[:16]
        with contextlib.suppress(NotFound):
            self.door.endpoint(id)  # the form came twice
            return self.go(self.url(f"endpoint/{id}"))
        if not (faults := self.faults(typed)):
            try:
                endpoint = self.door.add_endpoint(**typed, id=id)
                return self.secret_page("The endpoint is added", endpoint)
            except OutboxError as error:  # of no one field: as many endpoints as may be
                faults = {"": str(error)}
        page = self.edit_page("Add an endpoint", "add", {**typed, "once": form["once"]}, faults)
        return _Reply("400 Bad Request", page)

    def edit(self, form: _Form, id: str) -> _Reply:
        """Save what was changed, or show the form again with what is wrong.

        Only changes are checked and saved. So a description can be mended although the URL would be
        refused today, and what the operator changed in the meantime stays. Patterns come in the
        order of the boxes, as a list, which never equals the endpoint's tuple: as sets they do.
        What the operator gave, and no box shows, stays in any case: the door sees to that.
        """
        endpoint, typed = self.door.endpoint(id), self.typed(form)
        changes = {n: v for n, v in typed.items() if v != getattr(endpoint, n)}
        if set(typed["events"]) == set(self.chosen(endpoint)):
            del changes["events"]
        if not (faults := self.faults(changes)):
            try:
                self.door.update_endpoint(id, **changes)
                return self.done(id, "saved")
            except PayloadError as error:
                faults = {"": str(error)}
        page = self.edit_page("Edit the endpoint", f"endpoint/{id}/edit", typed, faults)
        return _Reply("400 Bad Request", page)

    def secret_page(self, title: str, endpoint: Endpoint) -> _Reply:
        """Show a new secret, the one time that it is shown. It is no redirect: a GET that shows a
        secret would show it again."""
        said = _fill(
            '<div class="card"><p>Its secret, with which your server verifies each request. '
            "Keep it safe: it is not shown again.</p><p><code>{}</code></p></div><p>{}</p>",
            endpoint.secret,
            self.link("Go on", f"endpoint/{endpoint.id}", "button"),
        )
        return _Reply("200 OK", self.frame(title, said))

    def rotate(self, form: _Form, id: str) -> _Reply:
        """Give an endpoint a new secret and show it; what is no choice of the form's is 400."""
        grace = float(_choice("grace", form["grace"], list(_GRACES)))
        endpoint = self.door.rotate_secret(id, grace=grace)
        return self.secret_page("The endpoint has a new secret", endpoint)

    def ping(self, form: _Form, id: str) -> _Reply:
        """Send a webhook.ping, or the catalogue's example of a type, and show what came of it."""
        type = form.get("type") or None
        said = _pinged(lambda: self.door.ping(id, type=type))
        go_on = _fill("<p>{}</p>", self.link("Go on", f"endpoint/{id}", "button"))
        title = f"An example of {type}" if type else "A webhook.ping"
        return _Reply("200 OK", self.frame(title, said, go_on))

    def done(self, id: str, said: str) -> _Reply:
        """Go back to an endpoint's page. said: a key of _SAID."""
        return self.go(self.url(f"endpoint/{id}", said=said))

    def enable(self, form: _Form, id: str) -> _Reply:
        self.door.enable_endpoint(id)
        return self.done(id, "enabled")

    def disable(self, form: _Form, id: str) -> _Reply:
        self.door.disable_endpoint(id, "switched off here")
        return self.done(id, "disabled")

    def remove(self, form: _Form, id: str) -> _Reply:
        self.door.remove_endpoint(id)
        return self.go(self.url(said="removed"))

    def backfill(self, form: _Form, id: str) -> _Reply:
        """Have what an endpoint missed sent: all of it, though the page counts the latest 10,000
        events only."""
        self.door.backfill(id, since=self.door.endpoint(id).created_at)
        return self.done(id, "backfilled")

    def resend(self, form: _Form, id: str, event_id: str) -> _Reply:
        """Have a delivery sent again. The library's resend also makes one that was never there; a
        page has only those that there are."""
        if not self.door.deliveries(event_id=event_id, endpoint=id, limit=1):
            raise NotFound(event_id)
        self.door.resend(event_id, endpoint=id)
        return self.go(self.url(f"endpoint/{id}/event/{event_id}", said="resent"))

    gets: ClassVar[_Gets] = {**_PortalPages.gets, "add": add_form, "endpoint/*/edit": edit_form}
    posts: ClassVar[_Posts] = {
        "add": add,
        "endpoint/*/edit": edit,
        "endpoint/*/rotate": rotate,
        "endpoint/*/ping": ping,
        "endpoint/*/enable": enable,
        "endpoint/*/disable": disable,
        "endpoint/*/remove": remove,
        "endpoint/*/backfill": backfill,
        "endpoint/*/event/*/resend": resend,
    }


def portal_app(
    outbox: Outbox, tenant: Callable[[WSGIEnvironment], str | Tenant | None], *, manage: bool = True
) -> WSGIApplication:
    """Return the pages of the customer who is logged in to the host, as a WSGI application.

    tenant: called with the WSGI environ of each request; returns the id of the customer by the
    host's own login, or outbox.tenant(id, max_endpoints=...), or None, which is 403. manage: False
    only shows. It works under any SCRIPT_NAME, needs no script, and its forms cannot be sent from
    other sites. What is somebody else's is 404, like what does not exist. Customers reach what the
    outbox may reach: give them none with allow_networks or a proxy of your own network.
    """
    if not callable(tenant):
        raise PayloadError("tenant must be a function that returns the customer of a WSGI environ")
    kind = _Portal if manage else _PortalPages

    def open(environ: WSGIEnvironment, site: _Site) -> _Site:
        """Return the pages of the customer whom the host names for this request. It is asked each
        time: a logout counts from the next click on."""
        who = tenant(environ)
        if who is None:
            raise _Refusal("403 Forbidden", "Log in first; this page is for customers.")
        door = who if isinstance(who, Tenant) else outbox.tenant(who)
        return kind(site.base, site.query, site.token, outbox, door)

    return _site_app("portal", open)


# ── command line ──────────────────────────────────────────────────────────────────────────────────
# Promises: the library's verbs with the library's names; errors are one line on standard error; the
# only section that prints. Exit codes: 0 done, 1 the thing asked for failed or did not hold, 2
# usage, 130 Ctrl-C in a command that only watches.
#
# Its order: how things are printed; what each command does, a function (outbox, options) that
# returns an exit code, or None for 0; the local servers; the demo; the tables _ARGUMENTS and
# _COMMANDS, from which _parser makes the whole command line; main. To add a command, write its
# function and a row of _COMMANDS.
#
# What is printed may come from outside: an event's data, a receiver's answer, an id that plain SQL
# wrote. Three functions stand between it and the terminal. _visible turns into escapes what a
# terminal obeys. _say prints through it. _print prints what is safe already, and is called directly
# only where the text has escapes of our own.


class _Usage(Exception):
    """The command line asks for nothing that can be done; main answers it with exit code 2."""


_PLAIN = str.maketrans("·▁▂▃▄▅▆▇█…", ".12345678~")  # a terminal without Unicode shows these


def _print(text: str) -> None:
    """Print text that holds nothing to be obeyed but our own escapes.

    It is flushed at once: whoever reads a pipe follows a long command, and a reader that is gone
    is a BrokenPipeError here, inside main, not when the interpreter ends.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:  # a terminal may lack our bars, a row may hold what is no Unicode
        text = text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    print(text, flush=True)


def _escaped(found: re.Match[str]) -> str:
    """Return a character, or its escape as in JSON where it is not printable; json.dumps leaves
    one, DEL, as it is."""
    c = found[0]
    return c if c.isprintable() else "\\u007f" if c == "\x7f" else json.dumps(c)[1:-1]


def _visible(text: str) -> str:
    """Return text in which nothing is obeyed by a terminal, or hidden on it.

    What events and receivers say may hold control characters, also beyond ASCII, and marks that
    turn the direction of writing. Each of them becomes its escape in JSON, so JSON stays JSON. Line
    breaks stay.
    """
    return re.sub(r"[^\n -~]", _escaped, text)


def _say(text: str = "") -> None:
    """Print a line, or several, for people or as JSON; anything may stand in it."""
    _print(_visible(text))


def _indented(value: Any) -> str:
    """Return JSON, indented, or on one line where data is nested very deep.

    To indent is the work of an encoder written in Python, which gives up sooner than the one in C.
    """
    try:
        return json.dumps(value, indent=2)
    except RecursionError:
        return json.dumps(value)


def _json_text(value: Any) -> str:
    """Return JSON that every parser takes.

    An event's data may hold 1e999, which is valid JSON. Python reads it as infinity and writes the
    word Infinity, which is none. So it is written as 1e999 again. The pattern takes each string as
    a whole, so that the word inside a string stays.
    """
    numbers = {"Infinity": "1e999", "-Infinity": "-1e999", "NaN": "null"}
    return re.sub(
        r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN',
        lambda found: numbers.get(found[0], found[0]),
        _indented(value),
    )


def _cut(text: str, most: int) -> str:
    """Return text on one line of at most so many characters, escapes counted; … at its end says
    that there is more."""
    line = _visible(text[: most + 1].strip()).replace("\n", "\\n")
    return line if len(line) <= most else line[: most - 1] + "…"


def _data_text(data: Any) -> str:
    """Return an event's data in one line; its text where Python could not parse it."""
    return str(data) if isinstance(data, _Unparsed) else _dumps(data)


def _cell(name: str, value: Any) -> str:
    """Return a field of a record as a table shows it. By its name it may be a time, a duration or
    an event's data; any other is shown by its type.

    Nothing is "-"; so is a time of 0. Times are UTC, durations have a unit, data is JSON on one
    line, and what is long is cut to 80 characters.
    """
    if value is None or value == "" or value == {}:
        return "-"
    if name == "at" or name.endswith(("_at", "_since", "_until")):
        return _moment(value) if value else "-"
    if name == "duration":
        return _age(value)
    if name == "data":
        return _cut(_data_text(value), 80)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return _cut(" ".join(value) if isinstance(value, tuple) else str(value), 80)


def _record(row: Any) -> dict[str, Any]:
    """Return a dataclass as a dict that may be shown: no secret, no header value, no query of a
    URL. Tables and JSON of them go through here. The commands that show a secret on purpose
    (`endpoint add`, `rotate`, `secret`) print it by itself."""
    record = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    if isinstance(row, Event):  # asdict would copy its data, however deep
        record["deliveries"] = [_record(delivery) for delivery in row.deliveries]
    if isinstance(row, Endpoint):
        del record["secret"]
        record.update(url=_masked(row.url), headers=dict.fromkeys(row.headers, "..."))
    return record


def _fitting(names: Sequence[str], widths: list[int]) -> list[int]:
    """Return the widths of columns as a terminal has room for them, two spaces between them.

    As long as they are too wide, the widest gives up a character; ids do not, because people copy
    them, and nothing gets narrower than 6. What is too wide even so is broken by the terminal. In a
    pipe nothing is cut: other programs read it.
    """
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    while room and sum(widths) + 2 * len(widths) - 2 > room:
        may = [n for n, name in enumerate(names) if not name.endswith("id") and widths[n] > 6]
        if not may:
            break
        widths[max(may, key=widths.__getitem__)] -= 1
    return widths


def _show(rows: Sequence[Any], columns: str, as_json: bool, empty: str, without: str = "") -> None:
    """Print dataclasses as a table of some columns, or as JSON with all fields but `without`.

    empty: what to say where there are none; JSON is [] then. In a pipe the columns are always the
    same, for scripts that count them, but for the tenant's, which most apps have no use for: it is
    left out where no row has one. On a terminal, which has little room, each column is left out
    in which no row has anything.
    """
    records = [
        {name: value for name, value in _record(row).items() if name != without} for row in rows
    ]
    if as_json:
        return _say(_json_text(records))
    if not records:
        return _say(empty)
    some = set(columns.split() if not sys.stdout.isatty() else ()) - {"tenant"}
    names = [
        name for name in columns.split()
        if name in some or any(_cell(name, record[name]) != "-" for record in records)
    ]  # fmt: skip
    cells = [[name.upper().replace("_", " ") for name in names]]
    cells += [[_cell(name, record[name]) for name in names] for record in records]
    widths = _fitting(names, [max(map(len, column)) for column in zip(*cells, strict=True)])
    for row in cells:
        line = (_cut(cell, n).ljust(n) for cell, n in zip(row, widths, strict=True))
        _say("  ".join(line).rstrip())


def _show_one(row: Any, as_json: bool) -> None:
    """Print a dataclass, a field on each line, or as JSON."""
    if as_json:
        return _say(_json_text(_record(row)))
    for name, value in _record(row).items():
        _say(f"{name:16} {_cell(name, value)}")


_NAMED = 4  # endpoints that a message names
_STATUS_ROWS = 20  # endpoints of `status` without --all


@dataclasses.dataclass(frozen=True)
class _TypeRow:
    """A row of `types`: an EventType with its name, which is the key of the catalogue."""

    type: str
    description: str
    example: Any
    group: str
    internal: bool
    deprecated: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _FailedRow(FailedDelivery):
    """A failed row as people read it; JSON has the fields of a FailedDelivery only."""

    tenant: str | None = None  # whose its endpoint is


def _status_note(e: EndpointStats, now: float) -> str:
    """Say whose an endpoint is, and why it gets nothing or what went wrong there last; "" where it
    is no tenant's and all is well."""
    whose = f"tenant {e.tenant}" if e.tenant else ""
    if not e.enabled:
        why = f" ({e.disabled_reason})" if e.disabled_reason else ""
        held = f", {e.pending} deliveries are held" if e.pending else ""
        return ": ".join(filter(None, (whose, f"disabled{why}{held}")))
    held = _held(e.failures, e.paused_until or 0.0, now)
    return ": ".join(filter(None, (whose, held, e.last_error)))


def _status_row(e: EndpointStats, now: float, columns: int, width: int) -> list[str]:
    """Return an endpoint's line of the table; where little is left of a line, its note has one of
    its own. width: of the column of ids.

    The columns behind the id take 61 characters, and two spaces stand before the note. The share
    is rounded down, so 100 % means that none failed. A bar is so many sevenths of the busiest five
    minutes, rounded up: one delivery is seen beside a thousand. · is none.
    """
    share = f"{100 * e.delivered // e.attempts} %" if e.attempts else "-"
    most = max(e.history) or 1
    bars = "".join("▁▂▃▄▅▆▇█"[-(-count * 7 // most)] if count else "·" for count in e.history)
    p50, p95, oldest = (_age(age).replace(" ", "") for age in (e.p50, e.p95, e.oldest_due_age))
    row = f"{_cut(e.id, width):{width}} {share:>7}  {p50:>5}  {p95:>5}  "
    row += f"{e.pending:>7}  {oldest:>6}  {e.failed:>6}  {bars}"
    note, room = _status_note(e, now), columns - width - 63
    if room >= 30:
        return [f"{row}  {_cut(note, room)}".rstrip()]
    return [row, "  " + _cut(note, max(20, columns - 2))] if note else [row]


def _status_text(stats: Stats, now: float, most: float = _STATUS_ROWS, height: float = 1e9) -> str:
    """Return the sums and a table for the terminal's width (200 in a pipe).

    most: endpoints at the most. height: lines at the most, the last of which counts what is left
    out; `status --watch` gives the screen's. Endpoints that somebody should look at come first, so
    that a table that is cut shows them. The column of ids is as wide as the longest id, but leaves
    the other columns their 61 characters.
    """
    oldest = f", oldest {_age(stats.oldest_due_age)}" if stats.due else ""
    behind = sum(e.pending for e in stats.endpoints if e.enabled and e.paused_until)
    oldest += f"; {behind} behind a hold" if behind else ""
    first = f"{stats.refusal}\n" if stats.refusal else ""
    first += f"{stats.pending} pending ({stats.due} due now{oldest}), "
    first += f"{stats.held} held, {stats.failed} failed"
    if not stats.endpoints:
        return first + "\nno endpoints yet: `endpoint add URL` makes one"
    columns = shutil.get_terminal_size((200, 0)).columns
    width = max(8, min(max(len(e.id) for e in stats.endpoints), columns - 61))
    last = "TENANT: LAST ERROR" if any(e.tenant for e in stats.endpoints) else "LAST ERROR"
    last = f"     {last}" if columns - width - 63 >= 30 else ""
    titles = "SUCCESS    P50    P95  WAITING  OLDEST  FAILED  LAST HOUR"
    lines = [first, f"{'ENDPOINT':{width}} {titles}{last}"]
    ordered = sorted(stats.endpoints, key=_trouble)
    for shown, e in enumerate(ordered):
        row = _status_row(e, now, columns, width)
        if shown >= most or len(lines) + len(row) + (shown + 1 < len(ordered)) > height:
            return "\n".join([*lines, _others(ordered[shown:]) + "; `status --all` shows them"])
        lines += row
    return "\n".join(lines)


def _status(outbox: Outbox, options: Any) -> None:
    """Print the table, or all numbers as JSON; with --watch again every two seconds, until Ctrl-C.

    On a terminal each table is written over the one before: the cursor goes home, each line is
    cleared behind its text, and the rest of the screen behind the last. So it may not be longer
    than the screen. Clearing the screen first would flicker.
    """
    most = math.inf if options.all else _STATUS_ROWS
    over = options.watch and sys.stdout.isatty() and not options.json
    while True:
        stats, height = outbox.stats(), math.inf
        if over:
            height = (shutil.get_terminal_size().lines or 24) - 1
        if options.json:
            _say(_json_text(dataclasses.asdict(stats)))
        elif over:
            text = _visible(_status_text(stats, outbox.clock(), most, height))
            _print("\x1b[H" + text.replace("\n", "\x1b[K\n") + "\x1b[K\x1b[J")
        else:
            _say(_status_text(stats, outbox.clock(), most))
        if not options.watch:
            return
        time.sleep(2)


def _doctor(outbox: Outbox | SchemaError, options: Any) -> int:
    """Print what is wrong; exit code 1 where there is a problem, not for a note.

    Where the tables themselves are wrong there is no Outbox: main hands over the SchemaError, which
    is the one finding then.
    """
    found = [_problem(str(outbox))] if isinstance(outbox, SchemaError) else [*_findings(outbox)]
    healthy = all(finding.level != "problem" for finding in found)
    if options.json:
        _say(_json_text([finding._asdict() for finding in found]))
    else:
        for finding in found:
            _say(f"{finding.level:8} {finding.text}")
        if isinstance(outbox, Outbox) and healthy:
            _say(f"no problem found in {outbox.path}")
    return 0 if healthy else 1


def _check(outbox: Outbox, options: Any) -> int:
    """Say in one line what is wrong, or that all is well; exit code 1 where something is.

    Wrong is, in the order of the code: nothing may be sent from here (a copied file); the oldest
    due delivery waits too long; too many failed rows; too many endpoints that fail, or that the
    drain disabled. One that a person disabled is no alarm.
    """
    stats = outbox.stats()
    failing = [
        e.id for e in stats.endpoints
        if e.failing or (not e.enabled and e.disabled_reason in _DISABLED_BY_DRAIN)
    ]  # fmt: skip
    wrong = [stats.refusal] if stats.refusal else []
    if (stats.oldest_due_age or 0) > options.max_age:
        wrong.append(f"the oldest due delivery has waited {_age(stats.oldest_due_age)}")
    if stats.failed > options.max_failed:
        wrong.append(f"{stats.failed} failed rows")
    if len(failing) > options.max_failing_endpoints:
        more = f" and {len(failing) - _NAMED} more" if len(failing) > _NAMED else ""
        wrong.append(f"failing or disabled: {', '.join(failing[:_NAMED])}{more}")
    _say("; ".join(wrong) or f"ok: {stats.pending} pending, {stats.failed} failed rows")
    return 1 if wrong else 0


def _init(outbox: Outbox, options: Any) -> None:
    next_step = "" if outbox.endpoints() else "; `endpoint add URL` comes next"
    _say(f"{outbox.path} is ready{next_step}")


def _given(options: Any, names: str) -> dict[str, Any]:
    """Return those of some options that were given, as keyword arguments of the library.

    names: with spaces between. An option that was not given is None, and is left out, so that the
    library's default holds and `endpoint update` changes nothing else. A header comes as "Name:
    value", and cert as a list of one path or two.
    """
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
    """Record an event in a transaction of its own and print its id. That no endpoint gets it is no
    error, but seldom meant: it is said on standard error, so that the id stays alone on standard
    output."""
    try:
        data = json.loads(sys.stdin.read() if options.data == "-" else options.data)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"the data is not JSON: {_one_line(str(error), 100)}") from None
    with outbox.transaction() as conn:
        id = outbox.emit(
            conn,
            options.type,
            data,
            **_given(options, "tenant key idempotency_key delay expires headers"),
        )
    _say(id)
    if not outbox.event(id).deliveries:
        whose = f"of tenant {options.tenant}" if options.tenant else "without a tenant"
        print(
            f"no enabled endpoint {whose} takes it; `endpoint list` shows tenants and patterns",
            file=sys.stderr,
        )


class _Progress:
    """Says what a drain does: on a terminal in one live line, elsewhere in a line of the log every
    ten seconds in which something changed.

    The rate is that of the last three seconds, so it is 0 soon after the last delivery, and then
    there is no estimate of the time left. What holds the drain up is said in words. The loop's own
    thread calls `show`, about four times a second, and no other does: so it may look at the loop's
    parts without a lock, and must be quick.
    """

    __slots__ = ("_logged", "_seen", "drain", "terminal")
    _WINDOW, _LOG_EACH = 3.0, 10.0  # seconds

    def __init__(self, drain: _Drain, terminal: bool) -> None:
        self.drain, self.terminal = drain, terminal
        # When, and how many were delivered by then: of the last _WINDOW seconds, oldest first.
        self._seen = collections.deque([(_monotonic(), 0)])
        self._logged = _monotonic(), DrainReport(0, 0, 0, 0)  # the last line of the log

    def show(self, report: DrainReport) -> None:
        """Write the live line over itself, or a line of the log when it is time for one. The width
        is asked each time: people resize their windows."""
        mono = _monotonic()
        if self.terminal:
            with contextlib.suppress(OSError):  # the terminal was closed; a signal comes of that
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
                line = _cut(self.line(report, mono, columns), columns - 1)
                print("\r\x1b[K" + line, end="", file=sys.stderr, flush=True)
        elif mono - self._logged[0] >= self._LOG_EACH and report != self._logged[1]:
            self._logged = mono, report
            counts = report.delivered, report.failed, report.pending
            phase = " ".join(filter(None, self.phase(report.pending, True, mono)))
            _log.info("delivered %d, failed %d, waiting %d%s", *counts, phase and f"; {phase}")

    def rate(self, delivered: int, mono: float) -> tuple[float, int]:
        """Return the deliveries a second of the last seconds, and how many that were. One entry
        that is older than the window stays, as the point to count from."""
        self._seen.append((mono, delivered))
        while len(self._seen) > 2 and self._seen[1][0] <= mono - self._WINDOW:
            self._seen.popleft()
        then, before = self._seen[0]
        return (delivered - before) / max(0.001, mono - then), delivered - before

    def phase(self, pending: int, moves: bool, mono: float) -> tuple[str, str]:
        """Return what keeps the drain from going faster, or what it waits for: an endpoint or "",
        and words or "".

        moves: something was delivered lately. The first of these that holds is said, in the order
        of the code: it is stopping; outcomes cannot be recorded, so nothing is sent; another
        process has had the file locked for a second; endpoints are on hold, the one that goes on
        first or how many; attempts are under way; nothing is pending; the next one is due later.
        """
        drain, now = self.drain, self.drain.settings.clock()
        locked = 0.0 if drain.counts.locked_at is None else mono - drain.counts.locked_at
        held = [
            lane for lane in drain.finder.lanes.values()
            if lane.enabled and lane.health.paused_until > now and lane.backlog.when() < math.inf
        ]  # fmt: skip
        if drain.stopping:
            return "", f"finishing {drain.under_way():,} under way"
        if not drain.outcomes.storing:
            return "", "nothing is sent: outcomes cannot be recorded"
        if locked >= 1.0:
            return "", f"file locked by another process for {_age(locked)}"
        if held:
            first = min(held, key=lambda lane: lane.health.paused_until)
            what = _held(first.health.failures, first.health.paused_until, now)
            more = f"{len(held):,} endpoints held, next" + what.partition(", next")[2]
            return (first.id, what) if len(held) == 1 else ("", more)
        if moves or drain.under_way():
            return "", "" if moves else f"{drain.under_way():,} under way"
        if not pending:
            return "", "idle"
        due_at = drain.finder.schedule.due.next()
        return "", "" if due_at == math.inf else f"next in {_age(max(0.0, due_at - now))}"

    def line(self, report: DrainReport, mono: float, columns: int) -> str:
        """Return the live line as it fits a terminal. Each part has a rank, and where the line is
        too long the parts of the highest rank go first, down to those of rank 0, which stay. The
        time left is that of what this drain has to send; it is said only where three deliveries or
        more came in the last seconds, from which it is reckoned."""
        rate, lately = self.rate(report.delivered, mono)
        whose, what = self.phase(report.pending, lately > 0, mono)
        known = lately >= 3 and not self.drain.stopping
        left = _age(self.drain.counts.to_send() / rate) if known else ""
        parts = [
            (f"delivered {report.delivered:,}", 0),
            (f"failed {report.failed:,}", 0),
            (f"waiting {report.pending:,}", 0),
            (f"retried {report.retried:,}" if report.retried else "", 3),
            (f"{rate:,.1f}/s" if 0 < rate < 10 else f"{rate:,.0f}/s", 2 if what else 0),
            (f"{left} left" if left and report.pending else "", 2),
            (whose, 1),
            (what, 0),
        ]
        for most in (3, 2, 1, 0):
            line = "  ".join(text for text, rank in parts if text and rank <= most)
            if len(line) < columns:
                break
        return line


class _LogLine(logging.Formatter):
    """A line of the log, with nothing in it that a terminal obeys. On a terminal it clears the live
    line first and stands in its place; the next live line comes below it."""

    def __init__(self, terminal: bool) -> None:
        super().__init__("%(message)s" if terminal else "%(asctime)s %(levelname)s %(message)s")
        self.before = "\r\x1b[K" if terminal else ""

    def format(self, record: logging.LogRecord) -> str:
        return self.before + _visible(super().format(record))


def _left_waiting(stats: Stats, refused: Iterable[str], now: float) -> Iterator[str]:
    """Say what a drain left waiting, and why: its endpoint is disabled, refused by this command's
    guard, or on hold; with what helps. refused: ids, see _refused."""
    waits = [
        e for e in stats.endpoints
        if e.pending and (not e.enabled or e.paused_until or e.id in refused)
    ]  # fmt: skip
    for e in waits[:_NAMED]:
        if not e.enabled:
            yield f"{e.id}: {e.pending} held, it is disabled; `endpoint enable {e.id}` resumes it"
        elif e.id in refused:
            yield f"{e.id}: {e.pending} wait, its address is not admitted here"
        else:
            yield f"{e.id}: {e.pending} wait, {_held(e.failures, e.paused_until or 0.0, now)}"
    if len(waits) > _NAMED:
        yield f"and {len(waits) - _NAMED} endpoints more; see `status`"


def _refused(outbox: Outbox, stats: Stats) -> set[str]:
    """Return the enabled endpoints for which something waits, and which this command's own guard
    refuses. The app may have admitted them by options that this command line was not given; the
    drain leaves them waiting, see _barred."""
    waits = {e.id for e in stats.endpoints if e.enabled and e.pending}
    found = [e for e in outbox.endpoints() if e.id in waits and e.url]  # '': its row is damaged
    return {e.id for e in found if _barred(e.url, outbox._guard)}


def _drain_here(outbox: Outbox, options: Any) -> int:
    """Drain, say what happens, and at the end what was left and why.

    Exit code 1 where a drain that ends by itself left something for an endpoint that it may not
    reach: more tries would change nothing. For cron (`--once --quiet`) it does not wait while
    another process drains: the next minute brings the next try.

    The first SIGINT or SIGTERM stops the drain, which lets what is under way finish within ten
    seconds; a second one ends it at once. The handler runs in this thread, which is the loop's, and
    only tells the loop. The handlers of before come back at the end.
    """
    mode = _drain_mode(options.once, options.until_empty)
    # A copied file: one line and exit code 1. A drain for ever logs it, and waits for `adopt`.
    if mode != "forever" and (refusal := outbox._refusal()):
        raise OutboxError(refusal)
    if options.quiet and mode != "forever" and _drainer(outbox.path) is not None:
        return 0
    terminal = sys.stderr.isatty()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogLine(terminal and not options.quiet))
    level = logging.WARNING if options.quiet else logging.INFO
    logging.basicConfig(level=level, handlers=[handler])

    def on_signal(number: int, frame: Any) -> None:
        first = not drain.stopping
        drain.stop(10.0 if first else 0.0)
        if first and drain.under_way():
            _log.info("finishing %d under way; once more to stop at once", drain.under_way())

    drain = _Drain(outbox._settings(), mode)
    if not options.quiet:
        drain.progress = _Progress(drain, terminal).show
    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        report = outbox._run(drain)
    finally:
        for number, action in before.items():
            signal.signal(number, action)
        if drain.progress and terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    stats = outbox.stats()
    refused = _refused(outbox, stats) if stats.pending else set()
    if not options.quiet:
        counts = f"delivered {report.delivered}, failed {report.failed}, retried {report.retried}"
        counts += f", still pending {report.pending}"
        _say("; ".join((counts, *_left_waiting(stats, refused, outbox.clock()))))
    return 1 if refused and mode != "forever" else 0


def _warn_of_secret(secret: str | None) -> None:
    """Say on standard error where a secret's variable or file is not there: that is no error, for
    the process that drains may have it, but it may be a typo."""
    try:
        if secret is not None:
            _resolve_value(secret)
    except _Unready as error:
        said = f"in this process {_one_line(str(error))}; the process that drains needs it"
        print(said, file=sys.stderr)


def _endpoint_add(outbox: Outbox, options: Any) -> None:
    """Register an endpoint; print its id and its secret, which a sender of the host's has no use
    for."""
    given = _given(options, " ".join(("id", "secret", *_OPTIONS)))
    endpoint = outbox.add_endpoint(given.pop("url"), **given)
    _warn_of_secret(options.secret)
    if _is_called(endpoint.url):
        return _say(endpoint.id)
    _say(
        f"{endpoint.id}\nsecret {endpoint.secret}\n"
        "Give the secret to the receiver; `endpoint secret` shows it again."
    )


def _endpoint_update(outbox: Outbox, options: Any) -> None:
    changes = _given(
        options, " ".join(name for name, option in _OPTIONS.items() if not option.fixed)
    )
    _show_one(outbox.update_endpoint(options.id, **changes), False)


def _endpoint_show(outbox: Outbox, options: Any) -> None:
    endpoint = outbox.endpoint(options.id)
    _show_one(endpoint, options.json)
    held = _held(endpoint.failures, endpoint.paused_until, outbox.clock())
    if held and endpoint.enabled and not options.json:
        _say(held)


def _endpoint_list(outbox: Outbox, options: Any) -> None:
    columns = "id tenant url events enabled disabled_reason failing_since"
    empty = "no endpoints yet: `endpoint add URL` makes one"
    if options.tenant:
        make = f"`endpoint add URL --tenant {options.tenant}` makes one"
        empty = f"no endpoints of tenant {options.tenant}; {make}"
    _show(outbox.endpoints(tenant=options.tenant), columns, options.json, empty)


def _endpoint_set(outbox: Outbox, options: Any) -> None:
    """Disable, enable or remove an endpoint, and say what that means for what waits."""
    waiting = {e.id: e.pending for e in outbox.stats().endpoints}.get(options.id, 0)
    if options.verb == "disable":
        outbox.disable_endpoint(options.id, options.reason)
        said = f"{waiting} deliveries are held"
    elif options.verb == "enable":
        outbox.enable_endpoint(options.id)
        said = f"{waiting} deliveries wait for it"
    else:
        outbox.remove_endpoint(options.id)
        return _say(f"removed {options.id} and {waiting} deliveries that waited for it")
    _say(f"{options.verb}d {options.id}; {said}")


def _endpoint_rotate(outbox: Outbox, options: Any) -> None:
    endpoint = outbox.rotate_secret(options.id, **_given(options, "secret grace"))
    _warn_of_secret(options.secret)
    _say(f"secret {endpoint.secret}")
    grace = 86_400.0 if options.grace is None else options.grace
    until = f"too until {_moment(outbox.clock() + grace)}" if grace > 0 else "no more"
    _say(f"The old one signs {until}; give the receiver the new one.")


def _endpoint_ping(outbox: Outbox, options: Any) -> int:
    """Ping an endpoint and say what came of it; exit code 1 where it failed. A success ends the
    endpoint's hold, but what was tried before waits for its own next try: how to hurry it is said
    too."""
    failed = outbox.endpoint(options.id).failures > 0
    attempt = outbox.ping(options.id, type=options.type)
    answer = attempt.error or f"HTTP {attempt.status_code}"
    said = f"{attempt.reason or 'delivered'}: {answer}, after {_age(attempt.duration)}"
    if failed and not attempt.reason:
        waiting = {e.id: e.pending for e in outbox.stats().endpoints}.get(options.id, 0)
        retry = f"`endpoint retry {options.id}` makes what waits due now ({waiting})"
        said += f"; {retry}" if waiting else ""
    _say(said)
    return 1 if attempt.reason else 0


def _backfill(outbox: Outbox, options: Any) -> None:
    """Give an endpoint what it missed. Everything that is recorded may be years, so it has to be
    said, by --all; a wrong id is said before that."""
    outbox.endpoint(options.id)
    if options.since is None and not options.all:
        raise _Usage("say --since, or --all for everything that is recorded")
    count = outbox.backfill(
        options.id, since=options.since or 0.0, **_given(options, "until type dry_run")
    )
    _say(f"{count} deliveries {'would be ' if options.dry_run else ''}added")


def _events_list(outbox: Outbox, options: Any) -> None:
    """List events. Their deliveries are left out, also of the JSON: `events show` has them."""
    rows = outbox.events(**_given(options, "ids tenant type since until limit after"))
    _show(
        rows, "id type tenant key created_at data", options.json, "no events", without="deliveries"
    )


def _events_show(outbox: Outbox, options: Any) -> None:
    """Print an event with its data, its deliveries and its attempts; as JSON in one object. A
    replay or resend counts attempts anew: where more are listed than are counted, that is said."""
    event, attempts = outbox.event(options.id), outbox.attempts(options.id)
    if options.json:
        record = _record(event) | {"attempts": [_record(attempt) for attempt in attempts]}
        return _say(_json_text(record))
    tenant = f"  tenant {event.tenant}" if event.tenant else ""
    erased = event.erased_at is not None and f"erased {_moment(event.erased_at)}"
    _say(f"{event.id}  {event.type}  {_moment(event.created_at)}{tenant}")
    _say(f"{erased or _data_text(event.data)}\n")
    _show(
        event.deliveries, "endpoint_id status attempts due_at delivered_at", False, "no deliveries"
    )
    tried = collections.Counter(attempt.endpoint_id for attempt in attempts)
    if any(tried[d.endpoint_id] > d.attempts for d in event.deliveries):
        _say("(attempts since the last replay or resend; below are all)")
    _say()
    _show(attempts, "at endpoint_id status_code reason error duration", False, "no attempts yet")


def _row_id(text: str) -> int:
    """Return the id of a failed row, as an argument has it. argparse is not told that it is a
    number: of `failed replay --endpont crm` it would say that crm is none, and not that there is no
    such option."""
    try:
        return int(text)
    except ValueError:
        is_number = "a failed row's ID is its number in `failed list`"
        raise _Usage(f"{is_number}, and not {_cut(text, 80)}") from None


def _failed_filters(options: Any) -> Any:
    """Return the filters of failed rows. Ids may stand alone and behind --ids; both count."""
    return _given(options, "endpoint tenant type reason since until") | {
        "ids": [*map(_row_id, (*options.ids, *options.more_ids))] or None
    }


def _refuse_typo(outbox: Outbox, options: Any, found: bool) -> None:
    """Raise NotFound where nothing was found for an endpoint that does not exist: "nothing failed"
    for a misspelt id would look like good news."""
    if options.endpoint and not found:
        outbox.endpoint(options.endpoint)


def _with_tenants(outbox: Outbox, rows: Sequence[FailedDelivery]) -> list[_FailedRow]:
    """Return failed rows with the tenants whose endpoints they are of."""
    tenants = outbox._tenants_of([row.endpoint_id for row in rows])
    return [
        _FailedRow(**dataclasses.asdict(row), tenant=tenants.get(row.endpoint_id)) for row in rows
    ]


def _failed_list(outbox: Outbox, options: Any) -> None:
    """List the failed rows that the filters choose, a page of them."""
    rows = outbox.failed(**_given(options, "limit after"), **_failed_filters(options))
    _refuse_typo(outbox, options, bool(rows))
    _show(
        rows if options.json else _with_tenants(outbox, rows),
        "id event_id endpoint_id tenant type attempts reason error failed_at",
        options.json,
        "nothing failed",
    )


def _failed_show(outbox: Outbox, options: Any) -> None:
    rows = outbox.failed(ids=[_row_id(options.id)])
    if not rows:
        raise NotFound(f"there is no failed row {options.id}; `failed list` shows those there are")
    (shown,) = rows if options.json else _with_tenants(outbox, rows)
    _show_one(shown, options.json)


def _failed_act(outbox: Outbox, options: Any) -> None:
    """Replay or discard failed rows, and say how many; none where ids were named is an error."""
    act = outbox.replay if options.verb == "replay" else outbox.discard
    count = act(all=options.all, dry_run=options.dry_run, **_failed_filters(options))
    _refuse_typo(outbox, options, count > 0)
    if not count and (options.ids or options.more_ids):
        raise NotFound("there are no such failed rows; `failed list` shows those there are")
    rows = "failed row" if count == 1 else "failed rows"
    _say(f"{count} {rows} {'would be ' if options.dry_run else ''}{options.verb}ed")


def _adopt(outbox: Outbox, options: Any) -> None:
    """Adopt or neutralize a copied file, and say whose it is now and what was done to it.

    Secrets that are derived from the master key depend on the file's identity, which is new now, so
    receivers need new ones: that is said where there are such secrets.
    """
    adopts, was = options.command == "adopt", outbox._home()
    if adopts and outbox.home == was is not None:
        return _say(f"the home of {outbox.path} is {was!r} already: nothing was changed")
    count = outbox.adopt(keep=options.keep) if adopts else outbox.neutralize()
    whose = f"the home of {outbox.path} is {outbox.home!r} now"
    if adopts and options.keep:
        return _say(f"{whose}; what waits will be sent")
    whose = whose if adopts else f"{outbox.path} belongs to no place now"
    _say(
        f"{whose}: {count} deliveries cancelled, all endpoints disabled; "
        "`endpoint enable ID` ends that"
    )
    if any(_DERIVED in row[0] for row in outbox._select("SELECT secrets FROM webhook_endpoints")):
        _say(
            "secrets derived from the master key are new ones now; `endpoint secret ID` shows them"
        )


def _resend(outbox: Outbox, options: Any) -> None:
    _say(f"{outbox.resend(options.id, endpoint=options.endpoint)} deliveries are pending again")


def _events_cancel(outbox: Outbox, options: Any) -> None:
    """Cancel what waits and is chosen. The event's id may stand alone or behind --event-id, the
    library's name for it."""
    filters = _given(options, "event_id endpoint tenant key type since until")
    if options.id is not None and filters.setdefault("event_id", options.id) != options.id:
        raise PayloadError("two events are named; cancel one after the other")
    count = outbox.cancel(all=options.all, dry_run=options.dry_run, **filters)
    _say(f"{count} deliveries {'would be ' if options.dry_run else ''}cancelled")


def _events_erase(outbox: Outbox, options: Any) -> None:
    outbox.erase(options.id)
    _say(f"erased {options.id}")


def _endpoint_retry(outbox: Outbox, options: Any) -> None:
    """Make what waits for an endpoint due now. For a disabled one that sends nothing, which is said
    on standard error."""
    count = outbox.retry_now(endpoint=options.id, **_given(options, "type dry_run"))
    _say(f"{count} deliveries {'would be' if options.dry_run else 'are'} due now")
    if not outbox.endpoint(options.id).enabled:
        print(
            f"{options.id} is disabled, so they are held; `endpoint enable {options.id}` ends that",
            file=sys.stderr,
        )


# The local servers. `listen`, `dashboard`, `portal` and the demo's receivers are small WSGI servers
# of the standard library, with a thread for each connection. They are for one person and for tests:
# in production the host's own server mounts the pages.

_PATIENCE = 30.0  # seconds that a connection to a local server may last
_CLIENTS = 64  # connections to it at once


class _Clients:
    """Connections to a local server, oldest first, and when they came.

    A client may be slow, or silent, or many: none stays longer than `patience` whatever it does,
    and the oldest makes room where there are too many, so that whoever comes is served.

    Two kinds of threads touch it. The one that accepts connections adds them (`come`), and at least
    twice a second takes out those that are late and shuts them down (`look`). That wakes the thread
    that serves such a connection, for it waits in a read. This one takes its own connection out
    (`gone`) before it closes it. There is no lock: each step is one operation of the dict, and one
    that finds its connection gone does nothing.
    """

    def __init__(self, patience: float) -> None:
        # since: connection -> monotonic seconds when it came; a dict keeps the order of coming
        self.patience, self.since = patience, dict[Any, float]()

    def come(self, sock: Any) -> None:
        """Take a connection in; where there are as many as may be, the oldest has to go."""
        if len(self.since) >= _CLIENTS:
            self._cut(*list(self.since)[:1])
        self.since[sock] = _monotonic()

    def gone(self, sock: Any) -> None:
        self.since.pop(sock, None)

    def look(self) -> None:
        """Cut off the connections that have lasted too long."""
        late = _monotonic() - self.patience
        for sock, since in list(self.since.items()):
            if since < late:
                self._cut(sock)

    def _cut(self, sock: Any = None) -> None:
        """Take a connection out and shut it down; None where the last one has just gone."""
        self.gone(sock)
        with contextlib.suppress(OSError, AttributeError):  # closed already; None
            sock.shutdown(socket.SHUT_RDWR)


def _local_server(
    app: WSGIApplication, port: int, host: str = "127.0.0.1", patience: float = _PATIENCE
) -> Any:
    """Return an HTTP server of one WSGI application, which listens but does not serve yet: call its
    serve_forever. patience: seconds that a connection may last.

    port 0 is one that is free: `server_port` says which. Threads are daemons, so that Ctrl-C does
    not wait for them. What a client does wrong is not printed. Raises OutboxError where it cannot
    listen.
    """
    import io
    import socketserver
    import wsgiref.simple_server

    clients = _Clients(patience)

    class Handler(wsgiref.simple_server.WSGIRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def get_stderr(self) -> Any:  # takes the traceback of a client that breaks off
            return io.StringIO()

    class Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads, request_queue_size = True, _CLIENTS

        def handle_error(self, *_: Any) -> None:
            pass

        def process_request(self, request: Any, client_address: Any) -> None:
            clients.come(request)
            super().process_request(request, client_address)

        def close_request(self, request: Any) -> None:
            clients.gone(request)
            super().close_request(request)

        def service_actions(self) -> None:
            clients.look()

    try:
        return wsgiref.simple_server.make_server(host, port, app, Server, Handler)
    except (OSError, OverflowError) as error:
        raise OutboxError(f"cannot listen on {host} port {port}: {error}") from None


def _receiver_app(answer: Callable[[Mapping[str, str], bytes], int]) -> WSGIApplication:
    """Return a receiver, as a WSGI application. answer: headers and body of a POST -> status.

    It is for our own drain and for tests, so it takes what these send: a body of a known length
    below 10 MB. Anything but a POST is 405, one without a length is 411.
    """

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer a request; WSGI has the header webhook-id as HTTP_WEBHOOK_ID."""
        length = environ.get("CONTENT_LENGTH", "")
        if environ["REQUEST_METHOD"] != "POST":
            status = 405
        elif not re.fullmatch(r"[0-9]{1,7}", length):
            status = 411
        else:
            names = {
                name: name[5:].replace("_", "-") for name in environ if name.startswith("HTTP_")
            }
            headers = {short: environ[name] for name, short in names.items()}
            status = answer(headers, environ["wsgi.input"].read(int(length)))
        start_response(f"{status} X", [("Content-Length", "0")])
        return []

    return app


def _listen(_: None, options: Any) -> None:
    """Serve a receiver that prints what arrives, until Ctrl-C.

    With --secret each request is verified; a wrong signature is answered 400, and does not count as
    one of the requests that are to fail (--fail). A connection may last as much longer as --delay
    has it wait for its answer. Options are checked before it listens.
    """
    secret = _resolve_value(options.secret) if options.secret else None
    if secret:
        _secret_bytes(secret)
    _number("status", options.status, 200, 599)
    delay = _number("delay", options.delay, 0, 3600)
    to_fail = iter(range(_whole("fail", options.fail, 0, 1_000_000)))

    def answer(headers: Mapping[str, str], body: bytes) -> int:
        """Print a request and return the status to answer. Many threads may call it at once; each
        number of to_fail is given to one of them, so no more requests fail than were asked for."""
        verdict = "not verified (give --secret)"
        if secret:
            try:
                event = verify(body, headers, secret)
                verdict = f"verified  {event.id}  {event.type}"
            except SignatureError as error:
                _say(f"refused, answered 400: {error}")
                return 400
        status = int(options.status) if next(to_fail, None) is None else 500
        text = _one_line(body.decode("utf-8", "replace"), 2000)
        _say(f"{verdict}  answered {status}\n  {text}")
        time.sleep(delay)
        return status

    app = _receiver_app(answer)
    with _local_server(app, options.port, patience=_PATIENCE + delay) as server:
        _say(f"listening on http://127.0.0.1:{server.server_port}/ (Ctrl-C ends)")
        server.serve_forever()


def _serve_page(page: WSGIApplication, name: str, can: str, options: Any) -> None:
    """Serve the dashboard or the portal until Ctrl-C. can: what whoever reaches it can do, which is
    said beside the address: there is no login here."""
    own = {"localhost", "127.0.0.1", "::1", options.host}

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve only under our own names.

        A site that a visitor has open may have its own name resolve to 127.0.0.1 (DNS rebinding);
        for the browser the page here is of that site then, which may read and press everything. The
        name is in Host, and is refused. Where --host says "every address" of this machine, any
        address may stand in Host, for no resolver has a say in that, but no other name.
        """
        host = re.sub(r":[0-9]+$", "", environ.get("HTTP_HOST", "")).strip("[]").lower()
        if host in own or (options.host in ("0.0.0.0", "::") and _literal(host)):
            return page(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [
            f"This name is not the {name}'s; use the address that the command printed.\n".encode()
        ]

    with _local_server(guarded, options.port, options.host) as server:
        host = f"[{options.host}]" if ":" in options.host else options.host
        _say(f"{name} on http://{host}:{server.server_port}/ (Ctrl-C ends); {can}")
        server.serve_forever()


def _dashboard(outbox: Outbox, options: Any) -> None:
    _serve_page(
        dashboard_app(outbox), "dashboard", "whoever reaches it can replay and disable", options
    )


def _portal(outbox: Outbox, options: Any) -> None:
    door = outbox.tenant(options.tenant)
    _serve_page(
        portal_app(outbox, lambda _: door), "portal", f"whoever reaches it is {door.id}", options
    )


def _types(outbox: Outbox, options: Any) -> None:
    """Print the catalogue, which is the app's: it is in no file, so it takes --app to see it. The
    table has internal types too; an OpenAPI document, which is for customers, has not."""
    types = outbox.event_types
    if options.openapi:
        if types is None:
            raise OutboxError(
                "there is no catalogue: run it with --app, whose Outbox has event_types"
            )
        return _say(_json_text(_openapi(outbox._catalogue, outbox.app_name)))
    rows = [_TypeRow(name, **dataclasses.asdict(of)) for name, of in (types or {}).items()]
    empty = "there is no catalogue: any type is good; the app's is seen with --app"
    _show(rows, "type group internal deprecated description", options.json, empty)


class _Mailbox:
    """A mail server as small as can be (RFC 5321), for the demo: it takes what comes, but answers
    "later, please" to the first e-mail, so that the demo shows a sender's retry.

    One thread of its own accepts and serves, one client after the other; the demo's thread reads
    `taken` after the drain that sent. close() wakes the thread from accept, and that ends it.
    """

    def __init__(self) -> None:
        self.taken, self.refused = list[str](), 0  # the e-mails' texts; 1 once one was refused
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # close() was called
            while True:
                sock, _ = self._socket.accept()
                with sock, sock.makefile("rwb") as lines, contextlib.suppress(OSError):
                    self._talk(lines)

    def _talk(self, lines: Any) -> None:
        """Speak with one client until it leaves. Each command gets one line, which is all that
        smtplib waits for; the text of an e-mail ends with a line that is a dot."""

        def say(text: str) -> None:
            lines.write(text.encode() + b"\r\n")
            lines.flush()

        say("220 mailbox")
        for line in lines:
            word = line[:4].strip().upper()
            if word == b"DATA" and not self.refused:
                self.refused = 1
                say("451 later, please")
            elif word == b"DATA":
                say("354 go on")
                text = itertools.takewhile(lambda part: part != b".\r\n", lines)
                self.taken.append(b"".join(text).decode())
                say("250 taken")
            else:
                say("221 bye" if word == b"QUIT" else "250 fine")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class _Demo:
    """The invoice story on temporary files: a shop with its outbox, three real receivers and a mail
    server on this machine.

    The three are `billing`, which verifies, makes an invoice and e-mails it to accounting by an
    outbox of its own; `flaky`, which answers 503 twice; and `dead`, which answers 500 until it is
    mended. Nothing is simulated: the requests go over loopback, and what a step says it has seen
    was read from the files, from what arrived and from the answers.
    """

    def __init__(self, folder: str, stack: contextlib.ExitStack) -> None:
        """Make the files, the outboxes and the receivers. stack: closes what was opened."""
        self.stack, self.seen, self.received = stack, list[bool](), list[str]()
        self.shop, self.billing = (
            os.path.join(folder, "shop.db"),
            os.path.join(folder, "billing.db"),
        )
        self.run_sql(self.shop, "CREATE TABLE orders (id INTEGER PRIMARY KEY, total REAL)")
        self.run_sql(self.billing, "CREATE TABLE invoices (order_id INTEGER, total REAL)")
        self.inbox, self.mailbox = Inbox(self.billing), _Mailbox()
        stack.callback(self.mailbox.close)
        # Tries come quickly. The jitter, of which nothing is used, makes the window four seconds: a
        # busy machine must not let a delivery expire in the middle of the story.
        self.quick: dict[str, Any] = dict(
            retry=RetryPolicy((0, 0.2, 0.2), jitter=10), rng=lambda: 0.0
        )
        self.outbox = Outbox(
            self.shop, allow_networks=["127.0.0.0/8"], app_name="demo", **self.quick
        )
        self.mails().ensure_endpoint("call:mail", id="mail", events=["invoice.*"])
        self.secret = self.add("billing", self.invoice).secret or ""
        answers = iter([503, 503])
        self.add("flaky", lambda headers, body: next(answers, 200))
        self.broken = True
        self.add("dead", lambda headers, body: 500 if self.broken else 200)

    def add(self, id: str, answer: Callable[[Mapping[str, str], bytes], int]) -> Endpoint:
        """Start a receiver in a thread and register it as an endpoint; answer: as _receiver_app
        takes it."""
        server = self.stack.enter_context(_local_server(_receiver_app(answer), 0))
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.stack.callback(server.shutdown)
        return self.outbox.add_endpoint(
            f"http://127.0.0.1:{server.server_port}/hooks", events=["order.*"], id=id
        )

    def run_sql(self, path: str, sql: str) -> Any:
        with contextlib.closing(sqlite3.connect(path)) as conn:
            return conn.execute(sql).fetchone()

    def mails(self) -> Outbox:
        """Return billing's own outbox, for its e-mails. It is opened anew each time, as a process
        that starts opens it: what the one before had recorded is sent all the same."""
        return Outbox(self.billing, senders={"mail": self.mail}, **self.quick)

    def mail(self, event: Event) -> None:
        """Send an e-mail to accounting; to return is success."""
        import smtplib
        from email.message import EmailMessage

        message = EmailMessage()
        message["From"], message["To"] = "billing@example.com", "accounting@example.com"
        message["Subject"] = f"Invoice for order {event.data['order_id']}"
        message["Message-ID"] = f"<{event.id}@billing.example.com>"  # the same at each try
        with smtplib.SMTP(self.mailbox.address, local_hostname="demo", timeout=10) as server:
            server.send_message(message)

    def invoice(self, headers: Mapping[str, str], body: bytes) -> int:
        """Take a webhook, on billing's side; return the status to answer.

        One transaction holds the event's id (Inbox), the invoice and the e-mail that it means: a
        crash leaves all of them or none, and an event that comes again changes nothing.
        """
        try:
            event = verify(body, headers, self.secret)
        except SignatureError:
            return 400
        self.received.append(event.id)
        with contextlib.closing(sqlite3.connect(self.billing)) as conn, conn:
            if event.type == "order.created" and self.inbox.accept(conn, event.id):
                conn.execute(
                    "INSERT INTO invoices VALUES (?, ?)",
                    (event.data["order_id"], event.data["total"]),
                )
                self.mails().emit(conn, "invoice.created", event.data)
        return 200

    def order(self, total: float, refused: bool = False) -> str:
        """Record an order and its event in one transaction, on the shop's side. refused: raise
        before the commit, so that both are rolled back."""
        with contextlib.closing(sqlite3.connect(self.shop)) as conn, conn:
            row = conn.execute("INSERT INTO orders (total) VALUES (?)", (total,)).lastrowid
            id = self.outbox.emit(conn, "order.created", {"order_id": row, "total": total})
            if refused:
                raise ValueError("the card was refused")
            return id

    def step(self, text: str, held: bool) -> None:
        """Say whether something that was promised was seen; the exit code is made of these."""
        self.seen.append(held)
        _say(f"   {'seen    ' if held else 'NOT SEEN'}  {text}")

    def invoices(self) -> int:
        return int(self.run_sql(self.billing, "SELECT count(*) FROM invoices")[0])

    def play(self) -> None:
        self.play_invoice()
        self.play_failures()
        _say("\n" + _status_text(self.outbox.stats(), self.outbox.clock()))

    def play_invoice(self) -> None:
        """Show that an order makes one invoice and one e-mail, whatever comes twice or stops in
        between, and that an order which is rolled back makes none."""
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
        self.step("no e-mail yet: billing stopped after its commit", not self.mailbox.taken)
        mails = self.mails()
        mails.drain(until_empty=True)
        tries = [a.reason for event in mails.events() for a in mails.attempts(event.id)]
        self.step(
            "billing starts; the mail server refuses, then takes it", tries == ["sender", None]
        )
        self.step("accounting has one e-mail", len(self.mailbox.taken) == 1)
        _say("3. An order that is rolled back sends nothing.")
        with contextlib.suppress(ValueError):
            self.order(13.37, refused=True)
        self.outbox.drain(once=True)
        orders = self.run_sql(self.shop, "SELECT count(*) FROM orders")
        self.step("no order, no event, no request", orders == (1,) and len(self.received) == 2)

    def play_failures(self) -> None:
        """Show what is retried, given up and replayed."""
        _say("4. A flaky receiver is retried; a dead one ends in the failed table.")
        id = self.received[0]
        self.outbox.drain(until_empty=True)
        codes = [attempt.status_code for attempt in self.outbox.attempts(id, "flaky")]
        self.step(f"flaky answered {', '.join(map(str, codes))}", codes == [503, 503, 200])
        rows = self.outbox.failed(endpoint="dead")
        self.step(
            "dead answered HTTP 500 three times and is in webhook_failed",
            [r.attempts for r in rows] == [3],
        )
        _say("5. Somebody mends the dead receiver and replays.")
        self.broken = False
        replayed = self.outbox.replay(endpoint="dead")
        self.outbox.drain(until_empty=True)
        ended = {
            delivery.endpoint_id: delivery.status for delivery in self.outbox.event(id).deliveries
        }
        self.step(
            "replay delivered it",
            replayed == 1 and ended["dead"] == "delivered" and not self.outbox.failed(),
        )


def _demo(_: None, options: Any) -> int:
    """Play the story; exit code 0 only if every step was seen."""
    import tempfile

    # The story tells what fails; without a handler Python would print the drain's warnings too.
    logging.getLogger("webhook_outbox").addHandler(logging.NullHandler())
    _say(
        "A shop with an orders table, its outbox in the same file, "
        "three receivers and a mail server here.\n"
    )
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            demo = _Demo(folder, stack)
            demo.play()
    except OSError as error:
        raise OutboxError(f"the demo cannot run here: {error}") from None
    _say(f"\n{sum(demo.seen)} of {len(demo.seen)} checks seen.")
    return 0 if all(demo.seen) else 1


def _load_app(name: str) -> Outbox:
    """Return the host's own Outbox, by MODULE:NAME (NAME is "outbox" where it is left out).

    What the name stands for may be: an Outbox; an app that has the Outbox as its attribute
    `outbox`; a function that returns one of the two. An app is not called, though a Flask is
    callable: what is called has a name of its own, as functions and classes have, or is a partial.
    Modules are looked for in the working directory first. Whatever the host's code raises is one
    line, an OutboxError.
    """
    import importlib

    def is_outbox(found: Any) -> bool:
        """Say whether it is an Outbox, by what it can do. isinstance would not do: the host may
        have imported this file under another name (vendored), and has a class of its own then."""
        verbs = ("emit", "drain", "add_endpoint")
        return not isinstance(found, type) and all(callable(getattr(found, v, 0)) for v in verbs)

    module, _, attribute = name.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute or "outbox")
        makes = isinstance(found, functools.partial) or hasattr(found, "__name__")
        has = is_outbox(found) or is_outbox(getattr(found, "outbox", 0))
        if makes and not has and callable(found):
            found = found()
        if not is_outbox(found):
            found = getattr(found, "outbox", found)
    except Exception as error:  # whatever the app's module raises
        raise OutboxError(
            f"--app {name}: {type(error).__name__}: {error}; write MODULE:NAME of your Outbox"
        ) from None
    if not is_outbox(found):
        cure = "write MODULE:NAME of your Outbox, of an app that has it as its attribute `outbox`, "
        cure += "or of a function that returns one of them"
        raise OutboxError(f"--app {name} is no Outbox but {type(found).__name__}; {cure}")
    return found  # type: ignore[no-any-return]


def _when(text: str) -> float:
    """Return UTC seconds of an argument: a number, or an ISO date and time, which is UTC where it
    names no zone."""
    import argparse

    with contextlib.suppress(ValueError):
        return float(text)
    try:
        moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise argparse.ArgumentTypeError("write UTC seconds, or 2026-01-31T12:00") from None
    return _seconds(moment)


_FLAG = {"action": "store_true"}
# The arguments of all commands, as argparse's add_argument takes them. They have the names of the
# library's keyword arguments. "--type" is that of every command that takes one; "endpoint ping
# --type" is that of one command only, and goes before it. An argument that is a plain text and says
# enough by its name is left out.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "id": dict(help="the endpoint's id"),
    "--json": dict(_FLAG, help="as JSON, with all fields"),
    "--dry-run": dict(_FLAG, help="only count"),
    "--all": dict(_FLAG, help="all there are; without it a filter must be given"),
    "--limit": dict(type=int, metavar="N", help="so many at the most (100)"),
    "--type": dict(help="a type, or a group: 'order.*'"),
    "--since": dict(type=_when, metavar="TIME", help="emitted then or later: 2026-01-31T12:00"),
    "--until": dict(type=_when, metavar="TIME", help="emitted before; times are UTC, or seconds"),
    "endpoint ping --type": dict(help="the catalogue's example of this type instead"),
    "init --wal": dict(_FLAG, help="also switch the file to WAL"),
    "endpoint add url": dict(metavar="URL", help="https://..., or call:NAME, a sender of --app"),
    "endpoint add --id": dict(help="letters, digits, _ and -; one is made when it is left out"),
    "endpoint backfill --all": dict(_FLAG, help="everything that is recorded; else say --since"),
    **{f"--{name.replace('_', '-')}": option.argument for name, option in _OPTIONS.items()},
    "endpoint add --tenant": _OPTIONS["tenant"].argument,
    "emit --tenant": dict(metavar="ID", help="the tenant whose event it is"),
    "--tenant": dict(metavar="ID", help="only this tenant's"),
    "--secret": dict(help="whsec_..., env:NAME or file:PATH; one is made when it is left out"),
    "endpoint disable --reason": dict(default="", help="why; listings and pages show it"),
    "--grace": dict(
        type=float, metavar="S", help="seconds that the old secret signs too (86400, a day)"
    ),
    "emit type": dict(help="order.created"),
    "emit data": dict(metavar="JSON", help="the data; - reads it from standard input"),
    "emit --headers": dict(_OPTIONS["headers"].argument, help="sent with this event"),
    "--key": dict(help="an endpoint gets events with one key strictly in order"),
    "--idempotency-key": dict(metavar="KEY", help="emitted again with it, it is the same event"),
    "--delay": dict(type=float, metavar="S", help="seconds to wait before the first attempt"),
    "--expires": dict(type=float, metavar="S", help="seconds after which it is no longer sent"),
    "--once": dict(_FLAG, help="end when nothing is due now"),
    "--quiet": dict(
        _FLAG, help="for cron: say only what went wrong; with --once, leave where another drains"
    ),
    "--until-empty": dict(_FLAG, help="end when nothing is pending, retries included"),
    "--workers": dict(type=int, metavar="N", help="attempts under way at once (64)"),
    "--watch": dict(_FLAG, help="again every two seconds"),
    "status --json": dict(_FLAG, help="as JSON, with all numbers"),
    "status --all": dict(_FLAG, help=f"all endpoints, not the first {_STATUS_ROWS}"),
    "--max-age": dict(
        type=float, default=300.0, metavar="S", help="seconds that a due delivery may wait (300)"
    ),
    "--max-failed": dict(type=int, default=0, metavar="N", help="failed rows allowed (0)"),
    "--max-failing-endpoints": dict(
        type=int, default=0, metavar="N", help="failing or disabled ones allowed (0)"
    ),
    "--after": dict(metavar="ID", help="the last one of the page before"),
    "failed list --after": dict(type=int, metavar="ID", help="the last one of the page before"),
    "events show id": dict(help="the event's id"),
    "events erase id": dict(help="the event's id"),
    "events list --ids": dict(nargs="+", metavar="ID", help="only these"),
    "ids": dict(nargs="*", metavar="ID", help="the failed rows' numbers, see `failed list`"),
    "--ids": dict(
        dest="more_ids", nargs="+", default=[], metavar="ID", help="the same, by its name"
    ),
    "--endpoint": dict(metavar="ID", help="only this endpoint's"),
    "--reason": dict(help=", ".join(_REASONS)),
    **{
        f"failed {verb} {name}": dict(type=_when, metavar="TIME", help=help)
        for verb in ("list", "replay", "discard")
        for name, help in (
            ("--since", "failed then or later: 2026-01-31T12:00"),
            ("--until", "failed before; times are UTC, or seconds"),
        )
    },
    "failed show id": dict(metavar="ID", help="the failed row's number, see `failed list`"),
    "events cancel id": dict(nargs="?", metavar="ID", help="the event's id"),
    "events cancel --key": dict(help="of events with this key"),
    "--event-id": dict(metavar="ID", help="the same, by its name"),
    "resend id": dict(help="the event's id"),
    "resend --endpoint": dict(metavar="ID", help="only to this one, which need not have had it"),
    "--older-than": dict(
        type=float, metavar="S", help="seconds since they were finished (the outbox's retention)"
    ),
    "--keep": dict(_FLAG, help="the file was moved, not copied: keep all, send what waits"),
    "dashboard --port": dict(type=int, default=8001, help="port to listen on (8001)"),
    "portal --tenant": dict(required=True, metavar="ID", help="the tenant whose pages they are"),
    "portal --port": dict(type=int, default=8002, help="port to listen on (8002)"),
    "--openapi": dict(_FLAG, help="as an OpenAPI 3.1 document, without the internal ones"),
    "--host": dict(
        default="127.0.0.1", help="the address to listen on (127.0.0.1); there is no login"
    ),
    "--port": dict(type=int, default=8000, help="port to listen on (8000)"),
    "listen --secret": dict(help="verify with it: whsec_..., env:NAME or file:PATH"),
    "listen --delay": dict(type=float, default=0.0, metavar="S", help="seconds until it answers"),
    "--fail": dict(type=int, default=0, metavar="N", help="answer 500 to the first N requests"),
    "--status": dict(type=int, default=200, metavar="N", help="status code to answer (200)"),
}
_ADDING = " ".join(f"--{name.replace('_', '-')}" for name in _OPTIONS if name != "url")
_UPDATING = " ".join(
    f"--{name.replace('_', '-')}" for name, option in _OPTIONS.items() if not option.fixed
)
_LIMITS = "--max-age --max-failed --max-failing-endpoints"
_DRAINING = "--once --until-empty --quiet --workers"
_CHOOSING = "ids --ids --endpoint --tenant --type --reason --since --until"
_GROUPS = {
    "endpoint": "endpoints: where events go",
    "events": "events that were recorded",
    "failed": "failed rows: deliveries that were given up",
}
# All commands, in the order of --help. Each row: its words; the function that runs it with (outbox,
# options) and returns its exit code, or None for 0; its help; its arguments, which _ARGUMENTS
# describes. The answer to a typo reads this table as well.
_COMMANDS: tuple[tuple[str, Callable[[Any, Any], Any], str, str], ...] = (
    ("demo", _demo, "show the whole story on temporary files", ""),
    ("init", _init, "make the tables", "--wal"),
    ("schema", lambda o, a: _say(schema_sql().rstrip()), "print the SQL of the tables", ""),
    ("doctor", _doctor, "say what is wrong with this file and machine", "--json"),
    ("endpoint add", _endpoint_add, "register an endpoint", f"url --id --secret {_ADDING}"),
    ("endpoint list", _endpoint_list, "list endpoints", "--tenant --json"),
    ("endpoint show", _endpoint_show, "show one endpoint", "id --json"),
    ("endpoint update", _endpoint_update, "change an endpoint's options", f"id {_UPDATING}"),
    ("endpoint disable", _endpoint_set, "hold an endpoint's deliveries", "id --reason"),
    ("endpoint enable", _endpoint_set, "resume an endpoint's deliveries", "id"),
    ("endpoint remove", _endpoint_set, "delete an endpoint with what waits and failed", "id"),
    ("endpoint rotate", _endpoint_rotate, "give an endpoint a new secret", "id --secret --grace"),
    ("endpoint secret", lambda o, a: _say(o._secret(a.id)), "print an endpoint's secret", "id"),
    ("endpoint ping", _endpoint_ping, "send an endpoint a webhook.ping now", "id --type"),
    (
        "endpoint retry",
        _endpoint_retry,
        "make what waits for an endpoint due now, and end its hold",
        "id --type --dry-run",
    ),
    (
        "endpoint backfill",
        _backfill,
        "give an endpoint recorded events that it missed",
        "id --since --until --type --all --dry-run",
    ),
    (
        "emit",
        _emit_by_hand,
        "record an event by hand",
        "type data --tenant --key --idempotency-key --delay --expires --headers",
    ),
    ("drain", _drain_here, "send what is due; for ever unless told otherwise", _DRAINING),
    ("status", _status, "show endpoints and what waits", "--json --watch --all"),
    ("metrics", lambda o, a: _say(o.metrics().rstrip()), "print the numbers for Prometheus", ""),
    (
        "check",
        _check,
        "say in one line whether something is wrong, and exit with 1 then; for cron",
        _LIMITS,
    ),
    (
        "events list",
        _events_list,
        "list events, newest first",
        "--ids --tenant --type --since --until --limit --after --json",
    ),
    ("events show", _events_show, "show an event, its deliveries and attempts", "id --json"),
    (
        "events cancel",
        _events_cancel,
        "cancel what waits: it is not sent",
        "id --event-id --endpoint --tenant --key --type --since --until --all --dry-run",
    ),
    ("events erase", _events_erase, "empty an event, for privacy law, and cancel what waits", "id"),
    (
        "failed list",
        _failed_list,
        "list failed rows, oldest first",
        f"{_CHOOSING} --limit --after --json",
    ),
    ("failed show", _failed_show, "show one failed row", "id --json"),
    ("failed replay", _failed_act, "send failed rows again", f"{_CHOOSING} --all --dry-run"),
    ("failed discard", _failed_act, "delete failed rows for good", f"{_CHOOSING} --all --dry-run"),
    ("resend", _resend, "send a recorded event again, delivered or not", "id --endpoint"),
    (
        "prune",
        lambda o, a: _say(f"{o.prune(a.older_than)} events pruned"),
        "delete old events for which nothing waits",
        "--older-than",
    ),
    (
        "adopt",
        _adopt,
        "make a copied file this home's own: cancel what waits, disable endpoints",
        "--keep",
    ),
    ("neutralize", _adopt, "make a copied file harmless: as adopt does, but it gets no home", ""),
    (
        "dashboard",
        _dashboard,
        "serve pages for the browser: what failed and why, replay, disable",
        "--port --host",
    ),
    (
        "portal",
        _portal,
        "serve a tenant's pages for the browser, for a look",
        "--tenant --port --host",
    ),
    ("types", _types, "print the catalogue of event types", "--json --openapi"),
    (
        "listen",
        _listen,
        "serve a local receiver that verifies and prints what arrives",
        "--port --secret --status --fail --delay",
    ),
)


# What may stand before the command, behind it, or between its two words, see _parser.
_GLOBALS: dict[str, dict[str, Any]] = {
    "--db": dict(metavar="PATH", help="the app's file; else the variable WEBHOOK_OUTBOX_DB"),
    "--app": dict(metavar="MODULE:NAME", help="use the app's own Outbox instead of --db"),
    "--allow-network": dict(
        action="append",
        metavar="CIDR",
        help="admit a private network; also the variable WEBHOOK_OUTBOX_ALLOW_NETWORKS",
    ),
}


# What other tools call a verb of ours, and which one is meant: the first that there is.
_ELSEWHERE = {"rm": "remove discard", "delete": "remove discard", "create": "add", "edit": "update"}


def _nearest(word: str, known: Iterable[str]) -> str:
    """Return what a mistyped word may mean, or ""."""
    import difflib

    return next(iter(difflib.get_close_matches(word, list(known), 1)), "")


def _no_command(group: str, word: str) -> str:
    """Say that there is no such command, and which ones are meant, or which there are.

    group: "endpoint" where the word stands behind it, else "". word: "" where none was given. A
    verb without its group is understood too: `replay` is answered with `failed replay`.
    """
    all = [words for words, *_ in _COMMANDS]
    verbs = {words.rpartition(" ")[2] for words in all if words.startswith(group and group + " ")}
    other = [verb for verb in _ELSEWHERE.get(word, "").split() if verb in verbs]
    near = other[0] if other else _nearest(word, verbs if group else verbs | _GROUPS.keys())
    meant = [w for w in all if w.startswith(group) and w.rpartition(" ")[2] == near] or [near]
    if near:
        return f"there is no command {group} {word}; did you mean {' or '.join(meant)}?"
    names = verbs if group else dict.fromkeys(words.partition(" ")[0] for words in all)
    what = f"there is no command {group} {word}" if word else f"{group} needs a command".lstrip()
    return f"{what}; there are {', '.join(sorted(names))}"


def _not_taken(options: Any, extra: Sequence[str]) -> str:
    """Say which argument a command does not take, and which one is meant. extra: what argparse had
    no use for, an unknown option and its value for one: then the option is named."""
    words = " ".join(filter(None, (options.command, getattr(options, "verb", None))))
    unknown = next((text for text in extra if text.startswith("-")), extra[0])
    if not unknown.startswith("-"):
        return f"{words} does not take {unknown}"
    taken = next(arguments for known, _, _, arguments in _COMMANDS if known == words).split()
    near = _nearest(unknown.partition("=")[0], [*taken, *_GLOBALS])
    return f"{words} has no option {unknown}" + (f"; did you mean {near}?" if near else "")


class _Missing(Exception):
    """A command lacks arguments: its last word, how many, and what argparse says of it. _untangled
    may find them at the end of an option with several values."""


def _usage_text(prog: str, message: str, of_command: bool) -> str:
    """Return what argparse says of a wrong command line, in better words.

    prog: the words so far, "python -m webhook_outbox endpoint add". of_command: these are a whole
    command, not a group or nothing. The exits, in the order of the code: an unknown command; a
    command or a verb is missing; an argument is missing, which raises _Missing; argparse's words.
    """
    last = prog.rpartition(" ")[2]
    if wrong := re.match(r"argument (COMMAND|VERB): invalid choice: '(.*?)'", message):
        return _no_command(last if wrong[1] == "VERB" else "", wrong[2])
    missing = re.fullmatch(r"the following arguments are required: (.*)", message)
    if missing and missing[1] in ("VERB", "COMMAND"):
        return _no_command(last if missing[1] == "VERB" else "", "")
    if missing and of_command:
        raise _Missing(last, missing[1].count(",") + 1, message)
    return message


def _untangled(argv: Sequence[str], verb: str, count: int) -> list[str]:
    """Return a command line in which the missing arguments stand directly behind the verb.

    `endpoint add --events 'order.*' URL`: an option with several values takes all that follow, so
    argparse gave the URL to --events and misses it. People write that, so it is mended: the last
    `count` words behind such an option are moved in front. Where several options could have taken
    them, one whose last value looks like a URL goes first, then the last one of the line. Where no
    option could have, the line comes back as it was, and argparse complains again.
    """
    # runs: where the values of such an option end, with more of them than are missing.
    lists = [name for name, how in _ARGUMENTS.items() if how.get("nargs") == "+"]
    words, runs, end = list(argv), list[int](), len(argv)
    for at in reversed(range(len(words))):
        if words[at].startswith("-"):
            if words[at] in lists and end - at - 1 > count:
                runs.append(end)
            end = at
    runs.sort(key=lambda end: "://" not in words[end - 1])  # what looks like one is the URL
    if runs and verb in words:
        end, first = runs[0], words.index(verb) + 1
        moved = words[end - count : end]
        del words[end - count : end]
        words[first:first] = moved
    return words


def _parser() -> Any:
    """Return the parser of all commands, made of _GLOBALS, _COMMANDS and _ARGUMENTS.

    What stands before the command (--db) may stand behind it too, or between its words. There it
    is stored under a name of its own, late_db or group_db: under one name a parser that did not
    find it would put its default over what an outer one found. _command_line joins them.
    """
    import argparse

    class Parser(argparse.ArgumentParser):
        """argparse, with errors in one line and in our words, and an option with --name and
        --no-name. Its subparsers are of this class as well."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.register("action", "switch", argparse.BooleanOptionalAction)

        def error(self, message: str) -> NoReturn:
            message = _usage_text(self.prog, message, bool(self.get_default("run")))
            # A secret that stands where none is expected is quoted by argparse.
            message = re.sub(r"whsec_\S+", "whsec_...", message)
            more = "" if message.endswith("?") else "; see --help"
            self.exit(2, f"webhook_outbox: {_cut(' '.join(message.split()), 240)}{more}\n")

    def add_again(parser: Any, where: str) -> None:
        for argument, how in _GLOBALS.items():
            name = f"{where}_{argument[2:].replace('-', '_')}"
            parser.add_argument(argument, **{**how, "dest": name, "help": argparse.SUPPRESS})

    parser = Parser(
        prog="python -m webhook_outbox",
        description="Send webhooks from your SQLite transaction, signed and retried. "
        "`demo` shows the whole story.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    for name, how in _GLOBALS.items():
        parser.add_argument(name, **how)
    groups = {"": parser.add_subparsers(dest="command", required=True, metavar="COMMAND")}
    for words, run, help, arguments in _COMMANDS:
        group, _, name = words.rpartition(" ")
        if group not in groups:
            made = groups[""].add_parser(group, help=_GROUPS[group], description=_GROUPS[group])
            add_again(made, "group")
            groups[group] = made.add_subparsers(dest="verb", required=True, metavar="VERB")
        made = groups[group].add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        for argument in arguments.split():
            made.add_argument(
                argument, **_ARGUMENTS.get(f"{words} {argument}", _ARGUMENTS.get(argument, {}))
            )
        add_again(made, "late")
    return parser


def _check_first(argv: Sequence[str], refuse: Callable[[str], Any]) -> None:
    """Refuse an unknown option before the command. argparse would take its value for the command,
    and say that there is no command of that name. As argparse does, it takes the beginning of an
    option's name for the option. refuse: ends the program."""
    at = 0
    while at < len(argv) and argv[at].startswith("-"):
        name, given, _ = argv[at].partition("=")
        if not any(known.startswith(name) for known in (*_GLOBALS, "--help", "--version", "-h")):
            near = _nearest(name, _GLOBALS)
            refuse(f"there is no option {name}" + (f"; did you mean {near}?" if near else ""))
        at += 1 if given else 2


def _command_line(argv: Sequence[str]) -> Any:
    """Return the options of a command line; SystemExit with code 2 and one line where they are
    wrong, with 0 after --help. Of --db and --app the one nearest to the end counts, networks of all
    places are admitted."""
    parser = _parser()
    _check_first(argv, parser.error)
    try:
        try:
            options, extra = parser.parse_known_args(argv)
        except _Missing as missing:
            options, extra = parser.parse_known_args(_untangled(argv, *missing.args[:2]))
    except _Missing as missing:
        parser.error(f"{missing.args[0]}: {missing.args[2]}")
    if extra:
        parser.error(_not_taken(options, extra))
    options.allow_network = list(options.allow_network or ())
    for where in ("group", "late"):
        options.db = getattr(options, f"{where}_db", None) or options.db
        options.app = getattr(options, f"{where}_app", None) or options.app
        options.allow_network += getattr(options, f"{where}_allow_network", None) or ()
    return options


def _own_outbox(path: str, making: bool, networks: Sequence[str]) -> Outbox:
    """Return an Outbox of the command line's own, by options and the environment.

    The app's own may admit more networks than this command line was told. So its guard is
    provisional: what it refuses is left waiting, while an app's guard would end the attempt as
    `blocked`. making: for `init`; other commands refuse a file without our tables.
    """
    key = "WEBHOOK_OUTBOX_MASTER_KEY"
    more = os.environ.get("WEBHOOK_OUTBOX_ALLOW_NETWORKS", "").replace(",", " ").split()
    outbox = Outbox(
        path,
        create=making,
        allow_networks=[*networks, *more],
        master_key=f"env:{key}" if os.environ.get(key) else None,
    )
    outbox._guard = dataclasses.replace(outbox._guard, provisional=True)
    return outbox


def _open_outbox(options: Any) -> Outbox:
    """Return the app's own Outbox (--app), or one of the file that is named.

    --app goes with --db only where both mean one file; networks are admitted beside the app's own.
    Raises _Usage where two files, or none, or what is no network is said.
    """
    making = options.run is _init
    try:
        more = _guard(options.allow_network, False).allow_networks
    except PayloadError as error:
        raise _Usage(str(error)) from None
    if options.app:
        outbox = _load_app(options.app)
        if options.db and os.path.realpath(options.db) != outbox.path:
            raise _Usage(f"--app has its own file, {outbox.path}: leave out --db")
        admitted = (*outbox._guard.allow_networks, *more)
        outbox._guard = dataclasses.replace(outbox._guard, allow_networks=admitted)
    elif path := options.db or os.environ.get("WEBHOOK_OUTBOX_DB"):
        outbox = _own_outbox(path, making, options.allow_network)
    else:
        raise _Usage("which file? say --db PATH, or set WEBHOOK_OUTBOX_DB")
    if getattr(options, "workers", None) is not None:
        outbox.workers = int(_number("workers", options.workers, 1, 10_000))
    if making and options.wal:
        with _session(outbox.path) as db:
            db.execute("PRAGMA journal_mode = WAL")
    return outbox


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; argv: without the program's name, as sys.argv
    has it where it is None.

    What is raised becomes one line on standard error and an exit code, in the order of the code:
    _Usage and _Unclear are 2; SystemExit is argparse's; Ctrl-C is 130 as in a shell (`drain` has
    handlers of its own and ends with 0 or 1); a reader of our output that is gone (`... | head`) is
    1 without a word; the library's errors, SQLite's and the system's are 1. Anything else is a
    defect, and its traceback is wanted. `doctor` gets a SchemaError as what it is to speak about.
    """
    try:
        options = _command_line(sys.argv[1:] if argv is None else argv)
        alone = options.command in ("demo", "schema", "listen")  # needs no database
        try:
            outbox: Any = None if alone else _open_outbox(options)
        except SchemaError as error:
            if options.run is not _doctor:
                raise
            outbox = error
        return options.run(outbox, options) or 0
    except (_Usage, _Unclear) as error:
        print(f"webhook_outbox: {error}; see --help", file=sys.stderr)
        return 2
    except SystemExit as stop:  # argparse: 2 on usage, 0 after --help
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # else the interpreter would try to write the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OutboxError, _Unready, sqlite3.Error, OSError, OverflowError) as error:
        print(f"webhook_outbox: {_one_line(str(error), 500)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    # python -m: run the module as the app imports it, so that --app has the same classes.
    if __spec__ is not None:
        import importlib

        main = importlib.import_module(__spec__.name).main
    sys.exit(main())

# MIT License
#
# Copyright (c) 2026 the webhook_outbox authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
# associated documentation files (the "Software"), to deal in the Software without restriction,
# including without limitation the rights to use, copy, modify, merge, publish, distribute,
# sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
# NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
# OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
