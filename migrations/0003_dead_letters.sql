-- The archive of dead letters, and what a replay changes about a job.

-- A replay starts the retries and the age of its job anew; the counters of the whole story stay as they are.
ALTER TABLE jobs
    -- When it was last replayed; its age counts from here, or else from first_at.
    ADD COLUMN replayed_at timestamptz,
    -- Attempts made before that.
    ADD COLUMN spared integer NOT NULL DEFAULT 0;

-- One row per message that died, however often it dies: a replay that ends in another death changes its row.
CREATE TABLE dead_letters (
    -- Made of what identifies the message (src/model/letter.rs), so that a letter delivered twice is one row.
    letter            uuid        PRIMARY KEY,
    -- NULL where the body does not tell.
    job_id            uuid,
    -- '' is the platform; NULL where the body does not tell whose job it is, so that no job's row is ever its.
    organization_id   text        COLLATE "C",
    kind              text        COLLATE "C",
    lane              text        COLLATE "C",
    routing_key       text        NOT NULL,
    state             text        COLLATE "C" NOT NULL CHECK (
        state IN ('dead', 'parked', 'replaying', 'replayed', 'discarded')),
    reason            text        COLLATE "C" NOT NULL,
    detail            text,
    attempts          integer     NOT NULL,
    first_at          timestamptz,
    died_at           timestamptz NOT NULL,
    archived_at       timestamptz NOT NULL DEFAULT now(),
    expires_at        timestamptz,
    group_name        text        COLLATE "C",
    sequence          bigint,
    -- Of the newest letter that was archived, or of the ledger where that is further.
    turn              integer     NOT NULL,
    -- Positions that the letter is for; NULL is every recipient.
    recipients        integer[],
    deaths            integer     NOT NULL DEFAULT 1,
    replays           integer     NOT NULL DEFAULT 0,
    -- The turn of the copy that the last replay makes.
    replay_turn       integer,
    -- Replays and discards, oldest first (src/model/letter.rs).
    history           jsonb       NOT NULL DEFAULT '[]',
    -- SHA-256 of the body, and its length.
    body_hash         bytea       NOT NULL,
    bytes             integer     NOT NULL,
    -- AES-256-GCM, bound to this row and this column (src/secrets/sealed.rs): the publisher's properties, and the body
    -- byte for byte.
    properties_sealed bytea       NOT NULL,
    body_sealed       bytea       NOT NULL
);

-- What is encrypted cannot be compressed.
ALTER TABLE dead_letters
    ALTER COLUMN properties_sealed SET STORAGE EXTERNAL,
    ALTER COLUMN body_sealed SET STORAGE EXTERNAL;

-- Each filter has its index in the order of the listing, newest first.
CREATE INDEX dead_letters_by_time ON dead_letters (died_at, letter);
CREATE INDEX dead_letters_by_organization ON dead_letters (organization_id, died_at, letter);
CREATE INDEX dead_letters_by_reason ON dead_letters (reason, died_at, letter);
CREATE INDEX dead_letters_by_kind ON dead_letters (kind, died_at, letter);
-- Counts by state are answered from this one alone, without the rows.
CREATE INDEX dead_letters_by_state ON dead_letters (state, died_at, letter) INCLUDE (reason, organization_id, kind);
CREATE INDEX dead_letters_by_job ON dead_letters (job_id);

-- What a replay or a discard was told, and what came of it: counts and filters, no content.
ALTER TABLE audit ADD COLUMN summary jsonb;
