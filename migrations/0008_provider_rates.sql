-- What providers allow an account, over all workers: a configuration's own word about it, and what the workers have of it.

ALTER TABLE smtp_configs
    -- NULL: what is known of the host.
    ADD COLUMN max_connections     integer CHECK (max_connections BETWEEN 1 AND 1000),
    ADD COLUMN messages_per_minute integer CHECK (messages_per_minute BETWEEN 1 AND 100000);

-- One row for each account that is sent through and limited: its bucket of tokens. Whoever changes it or its leases locks it first.
CREATE TABLE rate_accounts (
    -- SHA-256 of host and user name (src/model/provider.rs).
    account     bytea            PRIMARY KEY CHECK (length(account) = 32),
    -- As of `refilled_at`; below zero where more was sent than was granted.
    tokens      double precision NOT NULL,
    refilled_at timestamptz      NOT NULL
);

-- What a worker has of an account's connections, until it expires.
CREATE TABLE rate_leases (
    account     bytea       NOT NULL REFERENCES rate_accounts ON DELETE CASCADE,
    holder      uuid        NOT NULL,
    connections integer     NOT NULL CHECK (connections >= 0),
    wanted      integer     NOT NULL CHECK (wanted >= 0),
    expires_at  timestamptz NOT NULL,
    PRIMARY KEY (account, holder)
);
