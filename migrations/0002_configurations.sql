-- Organizations with their feature flag, their SMTP configurations, and the audit log of the control commands.

CREATE TABLE organizations (
    organization_id text COLLATE "C" PRIMARY KEY CHECK (organization_id ~ '^[A-Za-z0-9_-]{1,64}$'),
    custom_smtp boolean NOT NULL DEFAULT false,
    -- The highest version that any configuration of this organization ever had; deleting one does not reset it.
    smtp_version bigint NOT NULL DEFAULT 0 CHECK (smtp_version >= 0)
);

CREATE TABLE smtp_configs (
    organization_id text COLLATE "C" PRIMARY KEY REFERENCES organizations,
    version bigint NOT NULL CHECK (version > 0),
    from_email text NOT NULL,
    from_name text NOT NULL,
    host text NOT NULL,
    port integer NOT NULL CHECK (port BETWEEN 1 AND 65535),
    secure boolean NOT NULL,
    -- AES-256-GCM, bound to this organization and this column (src/secrets/sealed.rs).
    username_sealed bytea NOT NULL,
    password_sealed bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    last_test_at timestamptz,
    last_test_ok boolean,
    last_test_code text
);

CREATE TABLE audit (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT now(),
    -- Who, as the command says; and as the broker has verified.
    actor text,
    user_id text,
    organization_id text COLLATE "C",
    command text NOT NULL,
    -- `ok`, or the code of the error that was answered.
    outcome text NOT NULL,
    -- Names of the parameters given, never their values.
    fields text[] NOT NULL DEFAULT '{}'
);

CREATE INDEX audit_by_organization ON audit (organization_id, id);

-- A hint for the caches of all workers, sent when the change commits. A trigger, so that a change by hand counts too.
CREATE FUNCTION sendoff_notify_smtp_config() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('sendoff_smtp_config', COALESCE(NEW.organization_id, OLD.organization_id));
    RETURN NULL;
END
$$;

CREATE TRIGGER smtp_configs_notify
    AFTER INSERT OR UPDATE OR DELETE ON smtp_configs
    FOR EACH ROW EXECUTE FUNCTION sendoff_notify_smtp_config();

CREATE TRIGGER organizations_notify_insert
    AFTER INSERT ON organizations
    FOR EACH ROW WHEN (NEW.custom_smtp) EXECUTE FUNCTION sendoff_notify_smtp_config();

CREATE TRIGGER organizations_notify_update
    AFTER UPDATE ON organizations
    FOR EACH ROW WHEN (OLD.custom_smtp IS DISTINCT FROM NEW.custom_smtp)
    EXECUTE FUNCTION sendoff_notify_smtp_config();
