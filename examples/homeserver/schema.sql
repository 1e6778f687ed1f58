-- What a server knows, for SQLite and PostgreSQL alike. Times are milliseconds since 1970. Positions count what this server
-- has accepted, over all rooms, in order of commit.

CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);

-- One row: the last position given out.
CREATE TABLE stream (position BIGINT NOT NULL);
INSERT INTO stream VALUES (0);

-- A room without a state group is being joined for the first time. The one who joins, or completes a room whose members
-- were left out, holds it until a time. Partial names, as a JSON list, servers that know the members.
CREATE TABLE rooms (
	id TEXT PRIMARY KEY,
	version TEXT NOT NULL DEFAULT '',
	state BIGINT NOT NULL DEFAULT 0,
	held_until BIGINT NOT NULL DEFAULT 0,
	partial TEXT NOT NULL DEFAULT '',
	entered TEXT NOT NULL DEFAULT ''
);

-- Status: 0 accepted, 1 soft-failed, 2 rejected, 3 not proven yet. An event without a position came as part of a state or
-- its auth chain. Staged: 1 for what arrives with a state that is being fetched, 2 for its entries. Of a member event,
-- server is that of the user whom it is about.
CREATE TABLE events (
	id TEXT PRIMARY KEY,
	room TEXT NOT NULL,
	type TEXT NOT NULL,
	state_key TEXT,
	sender TEXT NOT NULL,
	membership TEXT NOT NULL,
	server TEXT NOT NULL,
	depth BIGINT NOT NULL,
	auth TEXT NOT NULL,
	json TEXT NOT NULL,
	status INTEGER NOT NULL,
	staged INTEGER NOT NULL DEFAULT 0,
	position BIGINT,
	received BIGINT NOT NULL,
	state_before BIGINT,
	state_after BIGINT,
	room_state BIGINT,
	replaced TEXT,
	device TEXT NOT NULL DEFAULT '',
	txn TEXT NOT NULL DEFAULT ''
);
CREATE INDEX events_by_position ON events (room, position);
CREATE INDEX events_staged ON events (room) WHERE staged > 0;
CREATE INDEX events_by_server ON events (room, server) WHERE server <> '';

CREATE TABLE edges (parent TEXT NOT NULL, child TEXT NOT NULL, PRIMARY KEY (parent, child));
CREATE INDEX edges_by_child ON edges (child);

CREATE TABLE extremities (room TEXT NOT NULL, event TEXT NOT NULL, PRIMARY KEY (room, event));

-- A state is a chain of groups, each of which overrides what the next one says: see state.go. An empty event: not set.
CREATE TABLE state_groups (id BIGSERIAL PRIMARY KEY, room TEXT NOT NULL, depth BIGINT NOT NULL, skip BIGINT NOT NULL);
CREATE TABLE state_entries (
	state_group BIGINT NOT NULL,
	type TEXT NOT NULL,
	state_key TEXT NOT NULL,
	event TEXT NOT NULL,
	PRIMARY KEY (state_group, type, state_key)
);

CREATE TABLE current_state (
	room TEXT NOT NULL,
	type TEXT NOT NULL,
	state_key TEXT NOT NULL,
	event TEXT NOT NULL,
	membership TEXT NOT NULL,
	server TEXT NOT NULL,
	PRIMARY KEY (room, type, state_key)
);
CREATE INDEX current_servers ON current_state (room, membership, server);

-- How local users stand to rooms: joined and left_at are the positions of the last changes into and out of join. Outside is the member event, and via who knows the room, if this server is not in it;
-- shown is what the room shows of itself then.
CREATE TABLE memberships (
	user_id TEXT NOT NULL,
	room TEXT NOT NULL,
	membership TEXT NOT NULL,
	position BIGINT NOT NULL,
	joined BIGINT NOT NULL DEFAULT 0,
	left_at BIGINT NOT NULL DEFAULT 0,
	version TEXT NOT NULL,
	event TEXT NOT NULL DEFAULT '',
	outside TEXT NOT NULL DEFAULT '',
	shown TEXT NOT NULL DEFAULT '[]',
	via TEXT NOT NULL DEFAULT '[]',
	forgotten INTEGER NOT NULL DEFAULT 0,
	PRIMARY KEY (user_id, room)
);
CREATE INDEX memberships_by_position ON memberships (user_id, position);

CREATE TABLE users (
	id TEXT PRIMARY KEY,
	password TEXT NOT NULL,
	displayname TEXT NOT NULL DEFAULT '',
	avatar_url TEXT NOT NULL DEFAULT ''
);
CREATE TABLE tokens (hash TEXT PRIMARY KEY, user_id TEXT NOT NULL REFERENCES users (id), device TEXT NOT NULL);
CREATE TABLE client_txns (
	user_id TEXT NOT NULL,
	device TEXT NOT NULL,
	txn TEXT NOT NULL,
	event TEXT NOT NULL,
	PRIMARY KEY (user_id, device, txn)
);
CREATE TABLE aliases (alias TEXT PRIMARY KEY, room TEXT NOT NULL, creator TEXT NOT NULL);

-- Keys of other servers, and the answer to the last transaction of each.
CREATE TABLE remote_keys (
	server TEXT NOT NULL,
	id TEXT NOT NULL,
	public TEXT NOT NULL,
	valid_until BIGINT NOT NULL,
	expired BIGINT NOT NULL,
	PRIMARY KEY (server, id)
);
CREATE TABLE transactions (origin TEXT PRIMARY KEY, id TEXT NOT NULL, answer TEXT NOT NULL);

-- What other servers are still to be told. The process that is telling one holds it until a time; up_to is where the
-- transaction on its way ends, so that it is repeated as it was.
CREATE TABLE outbox (
	destination TEXT NOT NULL,
	position BIGINT NOT NULL,
	event TEXT NOT NULL,
	PRIMARY KEY (destination, position)
);
CREATE TABLE destinations (
	name TEXT PRIMARY KEY,
	failures INTEGER NOT NULL DEFAULT 0,
	retry_at BIGINT NOT NULL DEFAULT 0,
	held_until BIGINT NOT NULL DEFAULT 0,
	up_to BIGINT NOT NULL DEFAULT 0
);
