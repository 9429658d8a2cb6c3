-- The least rights of a cutover. Run it as a superuser, connected to the database that moves, on BOTH servers, with the
-- same passwords; replace app, app_owner and the passwords. (psql -v db=app -v owner=app_owner -f roles.sql works too.)
\if :{?db}
\else
  \set db app
\endif
\if :{?owner}
\else
  \set owner app_owner
\endif

-- proxyctl's login. It owns the store, so the gates act in its name.
--   REPLICATION      slots: their positions and the way back (S6); the other server logs in as this role for it
--   pg_monitor       the gate tells apply workers from clients by backend_type; lag and old transactions of everyone
--   CREATE           the schema pgcutover
--   member of the owner of the tables: triggers on them (source), setval on their sequences (target)
CREATE ROLE pgcutover LOGIN REPLICATION PASSWORD 'change me';
GRANT pg_monitor TO pgcutover;
GRANT CONNECT, CREATE ON DATABASE :"db" TO pgcutover;
GRANT :"owner" TO pgcutover;
-- SCRAM verifiers of both sides are compared. Where pg_authid has to stay hidden leave this out: preflight is then red for
-- every user that no proxy has logged in to the target.
GRANT SELECT (rolname, rolpassword) ON pg_catalog.pg_authid TO pgcutover;
-- Not grantable, so done by hand, unless pgcutover owns them: the publication (source) needs pgcutover.sentinel and
-- pgcutover.heartbeat, the subscription (target) a REFRESH PUBLICATION WITH (copy_data = false) afterwards.
-- The way back is a subscription on the old server, and the one that led forward is dropped. From PostgreSQL 16 on
-- pgcutover has to own that one (ALTER SUBSCRIPTION ... OWNER TO pgcutover) and needs: GRANT pg_create_subscription TO
-- pgcutover. Before 16 only superusers own subscriptions: see the part that begins with pgcutover_subscriber below.
-- Physical replication: the right to promote, given on the source, in the database that moves; it arrives by WAL.
-- GRANT EXECUTE ON FUNCTION pg_catalog.pg_promote(boolean, integer) TO pgcutover;

-- The proxies' control login: it reads and records decisions, and nothing else.
-- Its rights on the store are granted by proxyctl (policy.proxy_role).
CREATE ROLE pgcutover_proxy LOGIN PASSWORD 'change me too';
GRANT CONNECT ON DATABASE :"db" TO pgcutover_proxy;
