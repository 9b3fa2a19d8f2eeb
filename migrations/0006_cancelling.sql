-- What was called back: single jobs, and bookings up to a revision.

ALTER TABLE jobs
    -- The booking, so that it can be called back as a whole. Written with the row and never changed, but for rows that are
    -- older than these columns, at their next claim; NULL for a job without one, and while only the id is known.
    ADD COLUMN group_name       text    COLLATE "C",
    ADD COLUMN sequence         bigint,
    -- It is not to be sent any more. In the state `cancelled` nothing is left to decide; in another state the claim's owner
    -- finds it at the gate, the next owner at its claim, and a replay never takes the job.
    ADD COLUMN cancel_requested boolean NOT NULL DEFAULT false;

-- Neither column changes, so it ends no in-page (HOT) update.
CREATE INDEX jobs_by_group ON jobs (organization_id, group_name, sequence) WHERE group_name IS NOT NULL;

-- The highest revision that was called back. `sequence`, the highest that was taken up or called back, is never lower.
ALTER TABLE job_groups ADD COLUMN cancelled bigint;
