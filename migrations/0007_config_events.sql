-- Changes of configurations that are still to be announced: each was written with the change, and goes when the broker has
-- confirmed its event.
CREATE TABLE config_events (
    id              bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at              timestamptz NOT NULL DEFAULT now(),
    -- The event's.
    type            text        COLLATE "C" NOT NULL,
    organization_id text        COLLATE "C" NOT NULL,
    -- None of a deletion.
    version         bigint,
    -- Nobody takes it before: whoever has taken it publishes it until then.
    due_at          timestamptz NOT NULL DEFAULT now()
);
