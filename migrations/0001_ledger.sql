-- Who has which job, and what became of it.

-- One number per life of a worker. Never reused: a number that was seen dead stays dead.
CREATE SEQUENCE worker_incarnations AS integer;

-- One row per job and organization ('' is the platform). The id leads the key: identifiers that follow the time
-- (UUIDv7) then fill the index from the right, and a person may ask for an id without naming the organization.
-- No index is on a column that changes: it would end in-page (HOT) updates altogether, and be written at each change of
-- state.
-- Every row is written at least twice (claimed, then settled). The half page that fillfactor leaves takes the second
-- version of each row, so that it needs no new index entry. Measured: at 50
-- nine of ten settles stay on their page and a job takes 504 bytes with its index; at 70 four of ten and 565 bytes.
-- Whoever locks several rows does so ordered by (id, organization_id), or two of them deadlock.
CREATE TABLE jobs (
    id              uuid        NOT NULL,
    organization_id text        COLLATE "C" NOT NULL,
    -- SHA-256 of the published body; NULL while only the id is known.
    body_hash       bytea,
    state           text        COLLATE "C" NOT NULL CHECK (
        state IN ('claimed', 'sent', 'deferred', 'parked', 'dead', 'unknown', 'cancelled')),
    turn            integer     NOT NULL,
    -- The incarnation that claimed the job, or that recorded its last hand-over; 0 is none that lives.
    owner           integer     NOT NULL,
    attempts        integer     NOT NULL DEFAULT 0,
    unknowns        integer     NOT NULL DEFAULT 0,
    -- Claims by workers that died.
    crashes         integer     NOT NULL DEFAULT 0,
    -- The claim's owner is about to send the final dot.
    committing      boolean     NOT NULL DEFAULT false,
    -- NULL unless some earlier claim's owner died; then whether one of them was committing. Kept until a settle
    -- accounts for it.
    orphan          boolean,
    -- Some recipient has accepted.
    partly_sent     boolean     NOT NULL DEFAULT false,
    not_before      timestamptz,
    first_at        timestamptz NOT NULL,
    updated_at      timestamptz NOT NULL,
    message_id      text,
    reason          text,
    detail          text,
    reply           text,
    -- Positions still to be sent to; NULL is every recipient.
    pending         integer[],
    -- [{"index", "code", "reason"}]
    refused         jsonb,
    -- The last attempts, oldest first.
    history         jsonb,
    PRIMARY KEY (id, organization_id)
) WITH (fillfactor = 50);

-- The highest revision of a booking that was taken up.
CREATE TABLE job_groups (
    organization_id text        COLLATE "C" NOT NULL,
    name            text        COLLATE "C" NOT NULL,
    sequence        bigint      NOT NULL,
    updated_at      timestamptz NOT NULL,
    PRIMARY KEY (organization_id, name)
) WITH (fillfactor = 70);

-- What was bound when the topology was last declared, so that a binding taken out of the settings can be unbound.
CREATE TABLE lane_bindings (
    prefix  text NOT NULL,
    lane    text NOT NULL,
    binding text NOT NULL,
    PRIMARY KEY (prefix, lane, binding)
);
