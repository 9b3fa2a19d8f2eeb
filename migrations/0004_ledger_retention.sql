-- What makes forgetting cheap, whatever the ledger has grown to.

-- first_at is written once, so this index costs no in-page (HOT) update; its entries come in the order of time, at its
-- right edge, and those of one batch share an entry's key.
CREATE INDEX jobs_by_first_at ON jobs (first_at);
