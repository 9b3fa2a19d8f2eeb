-- What becomes of an organization whose configuration is at fault: its mail is parked, its server is probed, and once it
-- works the mail goes out.

ALTER TABLE smtp_configs
    -- When this server and these credentials were last seen to work for the first time: the first failure of one that
    -- never worked is enough to park.
    ADD COLUMN worked_at timestamptz,
    -- A message was accepted since anything was held against it, and since it last failed.
    ADD COLUMN proven boolean NOT NULL DEFAULT false,
    -- Failures in a row that are the configuration's fault.
    ADD COLUMN strikes integer NOT NULL DEFAULT 0,
    -- Since when no connection came about, and when that was last found.
    ADD COLUMN unreachable_since timestamptz,
    ADD COLUMN unreachable_at timestamptz,
    -- Set while its mail is parked.
    ADD COLUMN failing_since timestamptz,
    ADD COLUMN failing_reason text COLLATE "C",
    ADD COLUMN failing_hint text,
    -- When somebody else may publish `smtp_config.failing`; NULL once it is published.
    ADD COLUMN announce_at timestamptz,
    -- Pauses between probes since a message was last accepted, those that keep a refused password from being tried again for
    -- themselves: of each kind one is longer than the one before.
    ADD COLUMN probes integer NOT NULL DEFAULT 0,
    ADD COLUMN long_probes integer NOT NULL DEFAULT 0,
    ADD COLUMN next_probe_at timestamptz;

CREATE INDEX smtp_configs_failing ON smtp_configs (next_probe_at) WHERE failing_since IS NOT NULL;

-- An organization that has recovered, until its parked mail is released and that is announced.
CREATE TABLE recoveries (
    organization_id text        COLLATE "C" PRIMARY KEY,
    recovered_at    timestamptz NOT NULL,
    released        bigint      NOT NULL DEFAULT 0,
    -- What it had failed for, where nobody has published that yet; NULL without a version.
    failing_version bigint,
    failing_reason  text        COLLATE "C",
    failing_hint    text
);

-- What one worker does for all: it holds a lease, and renews it while it lives.
CREATE TABLE leases (
    name       text        COLLATE "C" PRIMARY KEY,
    holder     uuid        NOT NULL,
    expires_at timestamptz NOT NULL
);

-- Connection tests and test emails of the last minute.
CREATE TABLE test_times (
    organization_id text          COLLATE "C" PRIMARY KEY,
    at              timestamptz[] NOT NULL
);

-- For how long the message was parked before it was released, in milliseconds, since it was last replayed: what is parked
-- again and again is not parked for ever.
ALTER TABLE dead_letters ADD COLUMN parked_ms bigint NOT NULL DEFAULT 0;

-- A release moves it on by the time that the job was parked: its age goes on as if it had not been.
COMMENT ON COLUMN jobs.replayed_at IS 'When it was last replayed, or from when its age counts since it was released; else first_at counts.';

-- What the job's own last attempt had it parked for when it was last released, until it is put off again or replayed.
ALTER TABLE jobs ADD COLUMN parked_reason text COLLATE "C";

-- The release takes an organization's letters oldest first.
CREATE INDEX dead_letters_parked ON dead_letters (organization_id, died_at, letter) WHERE state = 'parked';
