# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tables of the state database, and the way from an earlier format to today's.

An IPv4 address is stored as its number.  An IPv6 address and a prefix are stored as text,
for SQLite's integers hold 64 bits.

The tables keep values unique: by primary keys, unique indexes and, for ranges of ports,
a trigger.  Queries for the start or stop of one network or guest use indexes, so they
cost the same on a host with many networks.
"""

VERSION = 3

LEASE = """
CREATE TABLE IF NOT EXISTS lease (
    upstream TEXT NOT NULL,
    segment TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('ipv4', 'ipv6', 'prefix')),
    address INTEGER NOT NULL,
    network TEXT NOT NULL,
    used INTEGER NOT NULL,
    PRIMARY KEY (segment, address),
    UNIQUE (upstream, network, kind)
);
"""

RESERVATION = """
CREATE TABLE IF NOT EXISTS reservation (
    network TEXT NOT NULL,
    mac TEXT NOT NULL,
    family INTEGER NOT NULL CHECK (family IN (4, 6)),
    address INTEGER NOT NULL,
    owner TEXT NOT NULL,
    used INTEGER NOT NULL,
    PRIMARY KEY (network, mac, family),
    UNIQUE (network, address)
);
"""

FORMER_RESERVATION = """
CREATE TABLE IF NOT EXISTS reservation (
    network TEXT NOT NULL,
    mac TEXT NOT NULL,
    address INTEGER NOT NULL,
    owner TEXT NOT NULL,
    used INTEGER NOT NULL,
    PRIMARY KEY (network, mac),
    UNIQUE (network, address)
);
"""

CHOSEN_PORT = """
CREATE TABLE IF NOT EXISTS chosen_port (
    owner TEXT NOT NULL,
    network TEXT NOT NULL,
    proto TEXT NOT NULL,
    selector TEXT NOT NULL,
    target_port INTEGER NOT NULL,
    port INTEGER NOT NULL,
    used INTEGER NOT NULL,
    PRIMARY KEY (owner, network, proto, selector, target_port),
    UNIQUE (proto, port)
);
"""

ANY_SELECTOR = "*"
"""Selector of a port that was chosen in format 1, which had no selectors."""

MIGRATIONS = {
    # Indexes and the trigger were other ones, which SCHEMA makes.  The owner of a
    # reservation was not recorded: the claim of a guest that runs shows the owner.
    1: f"""
DROP TRIGGER IF EXISTS one_claim;
DROP INDEX IF EXISTS forward_claim;
ALTER TABLE chosen_port RENAME TO former_port;
{CHOSEN_PORT}
INSERT OR IGNORE INTO chosen_port
    SELECT owner, network, proto, '{ANY_SELECTOR}', target_port, port, 0 FROM former_port;
DROP TABLE former_port;
ALTER TABLE reservation RENAME TO former_reservation;
{FORMER_RESERVATION}
INSERT INTO reservation SELECT network, mac, address, coalesce(
    (SELECT owner FROM forward WHERE network = former.network AND target = former.address),
    (SELECT owner FROM static_nat WHERE network = former.network AND target = former.address),
    ''), 0 FROM former_reservation AS former;
DROP TABLE former_reservation;
""",
    # All addresses were IPv4.
    2: f"""
ALTER TABLE lease RENAME TO former_lease;
{LEASE}
INSERT INTO lease SELECT upstream, segment, 'ipv4', address, network, used FROM former_lease;
DROP TABLE former_lease;
ALTER TABLE reservation RENAME TO former_reservation;
{RESERVATION}
INSERT INTO reservation SELECT network, mac, 4, address, owner, used FROM former_reservation;
DROP TABLE former_reservation;
""",
}
"""Statements from each earlier format to the next; ``SCHEMA`` is run after the last."""

WRITER = """
CREATE TABLE IF NOT EXISTS writer (
    format INTEGER PRIMARY KEY,
    version TEXT NOT NULL
);
"""
"""The version that brought the database to each format.

This table stays as it is in every format to come: an earlier version reads it to say
which version is needed."""

SCHEMA = f"""
{WRITER}
CREATE TABLE IF NOT EXISTS network (
    uuid TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    namespace TEXT NOT NULL,
    bridge TEXT NOT NULL,
    upstream TEXT NOT NULL,
    kind TEXT NOT NULL,
    subnets TEXT NOT NULL,
    taken_over INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('preparing', 'starting', 'up', 'down')),
    boot TEXT NOT NULL,
    since REAL NOT NULL,
    document BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS one_namespace ON network (namespace) WHERE state != 'down';
CREATE UNIQUE INDEX IF NOT EXISTS one_bridge ON network (bridge) WHERE state != 'down';
CREATE INDEX IF NOT EXISTS network_start ON network (state) WHERE state = 'starting';
CREATE INDEX IF NOT EXISTS network_user ON network (upstream) WHERE state != 'down';
{LEASE}
CREATE INDEX IF NOT EXISTS lease_network ON lease (network);
CREATE INDEX IF NOT EXISTS lease_used ON lease (used);
CREATE TABLE IF NOT EXISTS transit (
    upstream TEXT PRIMARY KEY,
    subnet TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS transit6 (
    upstream TEXT PRIMARY KEY,
    subnet TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS host_part (
    network TEXT PRIMARY KEY,
    boot TEXT NOT NULL,
    part TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS guest (
    uuid TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    boot TEXT NOT NULL,
    published INTEGER NOT NULL,
    document BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS forward (
    scope TEXT NOT NULL,
    owner TEXT NOT NULL,
    owner_name TEXT NOT NULL,
    network TEXT NOT NULL,
    proto TEXT NOT NULL,
    address INTEGER NOT NULL,
    claimed INTEGER NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    target INTEGER NOT NULL,
    target_port INTEGER NOT NULL,
    target_last INTEGER NOT NULL,
    sources TEXT NOT NULL,
    published INTEGER NOT NULL,
    boot TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS forward_network ON forward (network);
CREATE INDEX IF NOT EXISTS forward_owner ON forward (owner);
CREATE INDEX IF NOT EXISTS forward_claim ON forward (scope, proto, claimed, first, last);
CREATE INDEX IF NOT EXISTS forward_ports ON forward (proto, first, last);
-- Claims do not overlap, so that only the nearest one that begins below the new
-- one's end can reach into it.
CREATE TRIGGER IF NOT EXISTS one_claim BEFORE INSERT ON forward
WHEN NEW.first <= (
    SELECT last FROM forward WHERE scope = NEW.scope AND proto = NEW.proto
    AND claimed = NEW.claimed AND first <= NEW.last ORDER BY first DESC LIMIT 1
) BEGIN SELECT RAISE(ABORT, 'claimed'); END;
CREATE TABLE IF NOT EXISTS static_nat (
    scope TEXT NOT NULL,
    address INTEGER NOT NULL,
    owner TEXT NOT NULL,
    owner_name TEXT NOT NULL,
    network TEXT NOT NULL,
    target INTEGER NOT NULL,
    ports TEXT NOT NULL,
    published INTEGER NOT NULL,
    boot TEXT NOT NULL,
    PRIMARY KEY (scope, address)
);
CREATE INDEX IF NOT EXISTS static_nat_network ON static_nat (network);
CREATE INDEX IF NOT EXISTS static_nat_owner ON static_nat (owner);
{RESERVATION}
CREATE INDEX IF NOT EXISTS reservation_owner ON reservation (owner);
CREATE INDEX IF NOT EXISTS reservation_used ON reservation (used);
{CHOSEN_PORT}
CREATE INDEX IF NOT EXISTS chosen_port_network ON chosen_port (network);
CREATE INDEX IF NOT EXISTS chosen_port_used ON chosen_port (used);
PRAGMA user_version = {VERSION};
"""
