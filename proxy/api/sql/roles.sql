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
--   REPLICATION      slots: their positions and the way back (S6)
--   pg_monitor       the gate tells apply workers from clients by backend_type; lag and old transactions of everyone
--   CREATE           the schema pgcutover
--   member of the owner of the tables: triggers on them (source), setval on their sequences (target)
CREATE ROLE pgcutover LOGIN REPLICATION PASSWORD 'change me';
GRANT pg_monitor TO pgcutover;
GRANT CONNECT, CREATE ON DATABASE :"db" TO pgcutover;
GRANT :"owner" TO pgcutover;
-- SCRAM verifiers of both sides are compared. Leave this out where a hidden pg_authid matters more than a green
-- preflight: proxyctl then reports the check as red until every user is logged in once through both servers.
GRANT SELECT ON pg_catalog.pg_authid TO pgcutover;

-- The proxies' control login: it reads and records decisions, and nothing else.
-- Its rights on the store are granted by proxyctl (policy.proxy_role).
CREATE ROLE pgcutover_proxy LOGIN PASSWORD 'change me too';
GRANT CONNECT ON DATABASE :"db" TO pgcutover_proxy;
