-- The journal and what the command side keeps beside it.

-- The last position given. A batch takes this row as the last thing before it commits: positions come without a gap, in
-- commit order.
create table journal_head (
    only_row boolean primary key default true check (only_row),
    position bigint not null
) with (fillfactor = 10);

insert into journal_head (position) values (0);

create table events (
    position bigint primary key,
    aggregate text not null,
    id uuid not null,
    version bigint not null,
    type text not null,
    schema smallint not null,
    -- `json` keeps the text as it was written: what the relay publishes again is the same to the byte.
    payload json not null,
    at timestamptz not null,
    actor text,
    command_id text,
    traceparent text,
    unique (id, version)
);

-- The present state of every aggregate, so that a command need not read its history. Room on each page lets an update
-- stay there, without touching the index.
create table aggregates (
    id uuid primary key,
    kind text not null,
    version bigint not null,
    state json not null
) with (fillfactor = 70);

-- The values that only one living aggregate may hold.
create table claims (
    scope text not null,
    value text not null,
    id uuid not null,
    primary key (scope, value)
);

-- The command ledger: what was answered to a command that had an idempotency key.
create table commands (
    key text primary key,
    -- SHA-256 of the request.
    request bytea not null,
    id uuid,
    version bigint,
    position bigint,
    failure json,
    at timestamptz not null,
    check ((failure is null) = (position is not null))
);

create index commands_at on commands (at);
