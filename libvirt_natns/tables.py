# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tables of the state database: networks' (``store``) and guests' (``registry``).

Uniqueness is theirs: primary keys, unique indexes, and for ranges of ports a
trigger.
"""

VERSION = 1

SCHEMA = f"""
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
CREATE TABLE IF NOT EXISTS lease (
    upstream TEXT NOT NULL,
    segment TEXT NOT NULL,
    address INTEGER NOT NULL,
    network TEXT NOT NULL,
    used INTEGER NOT NULL,
    PRIMARY KEY (segment, address),
    UNIQUE (upstream, network)
);
CREATE TABLE IF NOT EXISTS transit (
    upstream TEXT PRIMARY KEY,
    subnet TEXT NOT NULL
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
CREATE INDEX IF NOT EXISTS forward_claim ON forward (scope, proto, first);
CREATE TRIGGER IF NOT EXISTS one_claim BEFORE INSERT ON forward
WHEN EXISTS (
    SELECT 1 FROM forward WHERE scope = NEW.scope AND proto = NEW.proto
    AND claimed = NEW.claimed
    AND first <= NEW.last AND last >= NEW.first
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
CREATE TABLE IF NOT EXISTS reservation (
    network TEXT NOT NULL,
    mac TEXT NOT NULL,
    address INTEGER NOT NULL,
    PRIMARY KEY (network, mac),
    UNIQUE (network, address)
);
CREATE TABLE IF NOT EXISTS chosen_port (
    owner TEXT NOT NULL,
    network TEXT NOT NULL,
    proto TEXT NOT NULL,
    target_port INTEGER NOT NULL,
    port INTEGER NOT NULL,
    PRIMARY KEY (owner, network, proto, target_port)
);
PRAGMA user_version = {VERSION};
"""
