-- What a server knows, for SQLite and PostgreSQL alike. Times are milliseconds since 1970. Positions count what this server
-- has accepted, over all rooms, in order of commit.

CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);

-- One row: the last position given out.
CREATE TABLE stream (position BIGINT NOT NULL);
INSERT INTO stream VALUES (0);

-- Rooms that this server is or was in. Entered is the position of the state that another server told when this one came in
-- last, 0 for a room made here. If most members were left out of it, partial lists servers that know them, as JSON, one
-- process holds the room until a time to fetch them, and completed is the position at which they are there.
CREATE TABLE rooms (
	id TEXT PRIMARY KEY,
	version TEXT NOT NULL,
	entered BIGINT NOT NULL DEFAULT 0,
	partial TEXT NOT NULL DEFAULT '',
	completed BIGINT NOT NULL DEFAULT 0,
	held_until BIGINT NOT NULL DEFAULT 0
);

-- A room that is being joined, until a time at most.
CREATE TABLE joining (room TEXT PRIMARY KEY, until BIGINT NOT NULL);

-- Status: 0 accepted, 1 soft-failed, 2 rejected. An event without a position came as part of a state or its auth chain. The
-- state after an event is the room's state at position base, but for differs: see snapshot in state.go. Replaced is what a
-- state event took the place of. Latest is 1 for those that no accepted event follows.
CREATE TABLE events (
	id TEXT PRIMARY KEY,
	room TEXT NOT NULL,
	sender TEXT NOT NULL,
	auth TEXT NOT NULL,
	json TEXT NOT NULL,
	status INTEGER NOT NULL,
	position BIGINT NOT NULL DEFAULT 0,
	base BIGINT NOT NULL DEFAULT 0,
	differs TEXT NOT NULL DEFAULT '',
	replaced TEXT NOT NULL DEFAULT '',
	latest INTEGER NOT NULL DEFAULT 0,
	device TEXT NOT NULL DEFAULT '',
	txn TEXT NOT NULL DEFAULT ''
);
CREATE INDEX events_by_position ON events (room, position) WHERE position > 0;
CREATE INDEX events_latest ON events (room) WHERE latest = 1;
CREATE INDEX events_by_txn ON events (sender, device, txn) WHERE txn <> '';

-- Events that accepted ones of the room follow, whether they are known or not.
CREATE TABLE followed (room TEXT NOT NULL, event TEXT NOT NULL, PRIMARY KEY (room, event));

-- The history of every room's state. An entry holds at positions from since on, and before until, which is the largest
-- number there is for what holds now. Of a member event, server is that of the user whom it is about.
CREATE TABLE state (
	room TEXT NOT NULL,
	type TEXT NOT NULL,
	state_key TEXT NOT NULL,
	event TEXT NOT NULL,
	membership TEXT NOT NULL,
	server TEXT NOT NULL,
	since BIGINT NOT NULL,
	until BIGINT NOT NULL,
	PRIMARY KEY (room, type, state_key, since)
);
CREATE INDEX state_since ON state (room, since);
CREATE INDEX state_until ON state (room, until);
CREATE INDEX state_servers ON state (room, server, membership) WHERE until = 9223372036854775807 AND server <> '';
CREATE INDEX state_users ON state (state_key) WHERE type = 'm.room.member';

-- Events of a state that is being fetched, and of its auth chain, until all of it is proven. Entry is 1 for those that are
-- the state.
CREATE TABLE incoming (
	intake TEXT NOT NULL,
	id TEXT NOT NULL,
	room TEXT NOT NULL,
	type TEXT NOT NULL,
	state_key TEXT NOT NULL,
	membership TEXT NOT NULL,
	server TEXT NOT NULL,
	sender TEXT NOT NULL,
	auth TEXT NOT NULL,
	json TEXT NOT NULL,
	entry INTEGER NOT NULL,
	received BIGINT NOT NULL,
	PRIMARY KEY (intake, id)
);

-- How local users stand to rooms by what other servers have told them: invites and knocks, and their ends. Shown is what the
-- room shows of itself, via are servers that know it.
CREATE TABLE outside (
	user_id TEXT NOT NULL,
	room TEXT NOT NULL,
	membership TEXT NOT NULL,
	version TEXT NOT NULL,
	event TEXT NOT NULL,
	shown TEXT NOT NULL,
	via TEXT NOT NULL,
	position BIGINT NOT NULL,
	PRIMARY KEY (user_id, room)
);

CREATE TABLE users (id TEXT PRIMARY KEY, displayname TEXT NOT NULL DEFAULT '', avatar_url TEXT NOT NULL DEFAULT '');
CREATE TABLE tokens (hash TEXT PRIMARY KEY, user_id TEXT NOT NULL REFERENCES users (id), device TEXT NOT NULL);
CREATE TABLE aliases (alias TEXT PRIMARY KEY, room TEXT NOT NULL);

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
