-- The decision store: tables, functions and the gates view, schema pgcutover.
-- Run it on the TARGET FIRST, then on the source, in one transaction each; running it again changes nothing that exists.
-- (Under FOR ALL TABLES the first row of a table that the target lacks stops replication for good.)
-- PostgreSQL 11 to 18. The role that runs it owns the store: the gates act in its name, so it needs pg_read_all_stats.
-- Rules R1..R16 are those of ARCHITECTURE.md. No string in a function body holds a backslash: it would mean
-- something else where standard_conforming_strings is off.

CREATE SCHEMA IF NOT EXISTS pgcutover;
COMMENT ON SCHEMA pgcutover IS 'pgcutover: decision store, gates and sentinels of database cutovers';
-- The event trigger runs as whoever issues the DDL and has to reach pgcutover.aborted().
GRANT USAGE ON SCHEMA pgcutover TO PUBLIC;

-- db is the route name: the database's name as clients of the proxies know it. 50 bytes, so that every name made from it fits.
CREATE TABLE IF NOT EXISTS pgcutover.state (
  db text PRIMARY KEY CHECK (octet_length(db) BETWEEN 1 AND 50),
  epoch bigint NOT NULL CHECK (epoch > 0),
  run uuid NOT NULL,
  target text NOT NULL,
  at timestamptz NOT NULL
);
CREATE TABLE IF NOT EXISTS pgcutover.decision (
  db text NOT NULL,
  epoch bigint NOT NULL,
  run uuid NOT NULL,
  outcome text NOT NULL CHECK (outcome IN ('commit', 'abort')),
  target text NOT NULL,
  at timestamptz NOT NULL,
  PRIMARY KEY (db, epoch)
);
CREATE TABLE IF NOT EXISTS pgcutover.evidence (
  db text NOT NULL,
  epoch bigint NOT NULL,
  run uuid NOT NULL,
  outcome text NOT NULL CHECK (outcome = 'commit'),
  target text NOT NULL,
  at timestamptz NOT NULL,
  PRIMARY KEY (db, epoch)
);
-- Unlogged: never replicated, and empty after a crash, which is what a list of living proxies should be.
CREATE UNLOGGED TABLE IF NOT EXISTS pgcutover.member (
  db text NOT NULL,
  instance text NOT NULL,
  address text NOT NULL,
  backend text NOT NULL,
  route_epoch bigint NOT NULL,
  paused_epoch bigint,
  seen_at timestamptz NOT NULL,
  PRIMARY KEY (db, instance)
);
-- The timeline on which an epoch of a physical move was opened; NULL in every other one. Only where it is missing: ALTER TABLE
-- locks readers out.
DO $do$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a
                 WHERE a.attrelid = 'pgcutover.state'::pg_catalog.regclass AND a.attname = 'timeline') THEN
    ALTER TABLE pgcutover.state ADD COLUMN timeline text;
  END IF;
END
$do$;
-- Tickets for draw(), on a target; those that were never used are of no use after a minute.
CREATE UNLOGGED TABLE IF NOT EXISTS pgcutover.seat (
  ticket uuid PRIMARY KEY,
  sequence_schema text NOT NULL,
  sequence_name text NOT NULL,
  value bigint NOT NULL,
  at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
CREATE TABLE IF NOT EXISTS pgcutover.heartbeat (db text PRIMARY KEY, n bigint NOT NULL, at timestamptz NOT NULL);
CREATE TABLE IF NOT EXISTS pgcutover.sentinel (db text PRIMARY KEY, token text NOT NULL);
CREATE TABLE IF NOT EXISTS pgcutover.durable (
  db text PRIMARY KEY, epoch bigint NOT NULL, run uuid NOT NULL, at timestamptz NOT NULL
);

-- What is decided is decided on one server. A publication FOR ALL TABLES would carry state and decision to the other side,
-- where an epoch could then be decided a second time; so rows that replication brings are dropped there.
-- heartbeat and sentinel are seeded on both sides and only their UPDATEs travel: a replicated INSERT would be a duplicate
-- key that stops replication.
CREATE OR REPLACE FUNCTION pgcutover.local_only() RETURNS trigger LANGUAGE plpgsql AS $f$
BEGIN
  RETURN NULL;
END
$f$;

DO $do$
DECLARE
  t text;
BEGIN
  FOREACH t IN ARRAY ARRAY['state', 'decision', 'evidence', 'durable', 'heartbeat', 'sentinel'] LOOP
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_trigger g
                   WHERE g.tgrelid = ('pgcutover.' || t)::pg_catalog.regclass AND g.tgname = 'pgcutover_local') THEN
      EXECUTE pg_catalog.format(
        'CREATE TRIGGER pgcutover_local BEFORE INSERT OR DELETE %s ON pgcutover.%I FOR EACH ROW '
        'EXECUTE FUNCTION pgcutover.local_only()',
        CASE WHEN t IN ('heartbeat', 'sentinel') THEN '' ELSE 'OR UPDATE' END, t);
      EXECUTE pg_catalog.format('ALTER TABLE pgcutover.%I ENABLE REPLICA TRIGGER pgcutover_local', t);
    END IF;
  END LOOP;
END
$do$;

-- Every writing function begins here. An older snapshot would hide the other side's row, and a commit that is not on disk
-- is no commit. (set_config inside the function: a SET clause of a function ends before the transaction commits.)
CREATE OR REPLACE FUNCTION pgcutover.writing() RETURNS void LANGUAGE plpgsql AS $f$
BEGIN
  IF pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.<>) 'read committed' THEN
    RAISE EXCEPTION 'pgcutover: this function needs READ COMMITTED' USING ERRCODE = '25001',
      HINT = 'Call it as BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SELECT ...; COMMIT.';
  END IF;
  IF pg_catalog.current_setting('synchronous_commit') IN ('off', 'local', 'remote_write') THEN
    PERFORM pg_catalog.set_config('synchronous_commit', 'on', true);
  END IF;
END
$f$;

-- The timeline of this server; of a primary only.
CREATE OR REPLACE FUNCTION pgcutover.timeline() RETURNS text LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $f$
  SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)
$f$;
-- Whether this server is a promoted copy of the one on which the epoch was opened: the copy has the open epoch too.
CREATE OR REPLACE FUNCTION pgcutover.copied(p_db text, p_epoch bigint) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  RETURN EXISTS (SELECT FROM pgcutover.state s WHERE s.db = p_db AND s.epoch = p_epoch AND s.timeline <> pgcutover.timeline());
END
$f$;

-- R4: the next epoch, only if the last one is decided.
CREATE OR REPLACE FUNCTION pgcutover.open(p_db text, p_run uuid, p_target text, p_floor bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
DECLARE
  last_epoch bigint;
  next_epoch bigint;
BEGIN
  PERFORM pgcutover.writing();
  IF p_db IS NULL OR p_run IS NULL OR coalesce(p_target, '') = '' OR octet_length(p_db) NOT BETWEEN 1 AND 50 THEN
    RAISE EXCEPTION 'pgcutover: open() needs a database of 1 to 50 bytes, a run and a target' USING ERRCODE = '22023';
  END IF;
  LOCK TABLE pgcutover.state IN SHARE ROW EXCLUSIVE MODE;
  SELECT s.epoch INTO last_epoch FROM pgcutover.state s WHERE s.db = p_db;
  IF FOUND AND NOT EXISTS (SELECT FROM pgcutover.decision d WHERE d.db = p_db AND d.epoch = last_epoch)
           AND NOT EXISTS (SELECT FROM pgcutover.evidence e WHERE e.db = p_db AND e.epoch = last_epoch) THEN
    RAISE EXCEPTION 'pgcutover: epoch % of % is undecided', last_epoch, p_db USING ERRCODE = '55006',
      HINT = 'End it first: proxyctl abort.';
  END IF;
  -- A commit that was decided here took the database away; only evidence of a newer one brings it back. Without this an
  -- abort of a later epoch would open the fence of a server that has lost (found by the model).
  IF coalesce((SELECT max(d.epoch) FROM pgcutover.decision d WHERE d.db = p_db AND d.outcome = 'commit'), 0)
     > coalesce((SELECT max(e.epoch) FROM pgcutover.evidence e WHERE e.db = p_db), 0) THEN
    RAISE EXCEPTION 'pgcutover: % has moved away from this server', p_db USING ERRCODE = '55000',
      HINT = 'The source of a run is the server that takes the writes now: swap source and target.';
  END IF;
  next_epoch := 1 + greatest(
    coalesce(last_epoch, 0),
    coalesce((SELECT max(d.epoch) FROM pgcutover.decision d WHERE d.db = p_db), 0),
    coalesce((SELECT max(e.epoch) FROM pgcutover.evidence e WHERE e.db = p_db), 0),
    coalesce(p_floor, 0));
  INSERT INTO pgcutover.state AS s (db, epoch, run, target, at)
    VALUES (p_db, next_epoch, p_run, p_target, clock_timestamp())
    ON CONFLICT (db) DO UPDATE SET epoch = excluded.epoch, run = excluded.run, target = excluded.target, at = excluded.at,
      timeline = NULL;
  RETURN next_epoch;
END
$f$;

-- A physical move, R14: the epoch is decided on the timeline on which it was opened, and nowhere else. The target is a copy of
-- this very store: once promoted it would decide the epoch a second time, and its fence would open by that.
CREATE OR REPLACE FUNCTION pgcutover.bind(p_db text, p_epoch bigint, p_run uuid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  PERFORM pgcutover.writing();
  UPDATE pgcutover.state s SET timeline = pgcutover.timeline() WHERE s.db = p_db AND s.epoch = p_epoch AND s.run = p_run;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'pgcutover: epoch % of % is over, or not of run %', p_epoch, p_db, p_run USING ERRCODE = '55000';
  END IF;
END
$f$;

-- R2, R11: the one point at which an epoch gets its outcome. The caller counts it only after its COMMIT is acknowledged.
CREATE OR REPLACE FUNCTION pgcutover.decide(p_db text, p_epoch bigint, p_run uuid, p_want text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
DECLARE
  found_run uuid;
  found_outcome text;
BEGIN
  PERFORM pgcutover.writing();
  IF p_want IS NULL OR p_want NOT IN ('commit', 'abort') THEN
    RAISE EXCEPTION 'pgcutover: an outcome is commit or abort' USING ERRCODE = '22023';
  END IF;
  -- Evidence here means that this server was the target of the epoch (a promoted standby has the cloned state too):
  -- it was decided elsewhere, and nobody decides it a second time.
  INSERT INTO pgcutover.decision (db, epoch, run, outcome, target, at)
    SELECT s.db, s.epoch, s.run, p_want, s.target, clock_timestamp() FROM pgcutover.state s
    WHERE s.db = p_db AND s.epoch = p_epoch AND s.run = p_run
      AND NOT EXISTS (SELECT FROM pgcutover.evidence e WHERE e.db = p_db AND e.epoch = p_epoch)
      AND NOT pgcutover.copied(p_db, p_epoch)
    ON CONFLICT (db, epoch) DO NOTHING;
  -- A second statement on purpose: one statement would not see the row that won a race.
  SELECT q.run, q.outcome INTO found_run, found_outcome FROM (
    SELECT e.run, e.outcome, 0 AS rank FROM pgcutover.evidence e WHERE e.db = p_db AND e.epoch = p_epoch
    UNION ALL
    SELECT d.run, d.outcome, 1 FROM pgcutover.decision d WHERE d.db = p_db AND d.epoch = p_epoch) q
    ORDER BY q.rank LIMIT 1;
  IF found_run IS NULL AND pgcutover.copied(p_db, p_epoch) THEN
    RAISE EXCEPTION 'pgcutover: epoch % of % was opened before this server was promoted: it is not decided here', p_epoch, p_db
      USING ERRCODE = '55000', HINT = 'Ask the server that was the primary then.';
  END IF;
  IF found_run IS DISTINCT FROM p_run THEN
    RAISE EXCEPTION 'pgcutover: epoch % of % is not of run %', p_epoch, p_db, p_run USING ERRCODE = '55000';
  END IF;
  RETURN found_outcome;
END
$f$;

-- R10: the copy of a commit on the target. First writer wins; another run is an error, never an outcome.
CREATE OR REPLACE FUNCTION pgcutover.witness(p_db text, p_epoch bigint, p_run uuid, p_target text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
DECLARE
  found_run uuid;
BEGIN
  PERFORM pgcutover.writing();
  IF EXISTS (SELECT FROM pgcutover.decision d WHERE d.db = p_db AND d.epoch = p_epoch AND d.outcome = 'abort') THEN
    RAISE EXCEPTION 'pgcutover: epoch % of % was aborted here', p_epoch, p_db USING ERRCODE = '55000';
  END IF;
  INSERT INTO pgcutover.evidence (db, epoch, run, outcome, target, at)
    VALUES (p_db, p_epoch, p_run, 'commit', p_target, clock_timestamp())
    ON CONFLICT (db, epoch) DO NOTHING;
  SELECT e.run INTO found_run FROM pgcutover.evidence e WHERE e.db = p_db AND e.epoch = p_epoch;
  IF found_run IS DISTINCT FROM p_run THEN
    RAISE EXCEPTION 'pgcutover: epoch % of % is not of run %', p_epoch, p_db, p_run USING ERRCODE = '55000';
  END IF;
  RETURN 'commit';
END
$f$;

-- For the event trigger, which runs as the invoker; it tells anyone nothing but a yes or no.
CREATE OR REPLACE FUNCTION pgcutover.aborted(p_db text, p_epoch bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  RETURN EXISTS (SELECT FROM pgcutover.decision d WHERE d.db = p_db AND d.epoch = p_epoch AND d.outcome = 'abort');
END
$f$;
CREATE OR REPLACE FUNCTION pgcutover.witnessed(p_db text, p_epoch bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  RETURN EXISTS (SELECT FROM pgcutover.evidence e WHERE e.db = p_db AND e.epoch >= p_epoch);
END
$f$;

-- The form of every gate on this server, read from the marker at the head of its body.
CREATE OR REPLACE VIEW pgcutover.gates AS
  SELECT pg_catalog.substr(p.proname::text, 6) AS db, m.mark[1] AS form, m.mark[2]::bigint AS epoch
  FROM pg_catalog.pg_proc p
  CROSS JOIN LATERAL (SELECT pg_catalog.regexp_match(p.prosrc, '^/[*] pgcutover gate (open|fenced|target) ([0-9]+) [*]/')) AS m (mark)
  WHERE p.pronamespace = (SELECT n.oid FROM pg_catalog.pg_namespace n WHERE n.nspname = 'pgcutover')
    AND p.proname LIKE 'gate:%';

-- Writes one form of a route's gate and of its event-trigger function. Only flip, unfence, guard, settle and arm call it,
-- each holding the lock on state. p_form: open, fenced (R1: shut until an abort is visible), target (R10: shut until
-- evidence of a commit of this or a newer epoch is).
CREATE OR REPLACE FUNCTION pgcutover.put_gate(p_db text, p_form text, p_epoch bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $f$
DECLARE
  gate text := 'gate:' || p_db;
  ddl text := 'ddl:' || p_db;
  mark text := format('/* pgcutover gate %s %s */', p_form, p_epoch);
  refuse text := format(
    'RAISE EXCEPTION USING ERRCODE = ''25006'', MESSAGE = ''pgcutover: fenced'', DETAIL = %L, HINT = %L;',
    format('epoch %s of %s', p_epoch, p_db),
    CASE p_form WHEN 'target' THEN 'This server does not serve yet: a cutover to it is under way.'
      ELSE 'This database is moving or has moved: write through the proxy.' END);
  row_open text := CASE p_form
    WHEN 'target' THEN format('SELECT FROM pgcutover.evidence e WHERE e.db = %L AND e.epoch >= %s', p_db, p_epoch)
    ELSE format('SELECT FROM pgcutover.decision d WHERE d.db = %L AND d.epoch = %s AND d.outcome = ''abort''', p_db, p_epoch)
    END;
  ddl_open text := format('pgcutover.%s(%L, %s)', CASE p_form WHEN 'target' THEN 'witnessed' ELSE 'aborted' END, p_db, p_epoch);
BEGIN
  IF p_form = 'open' THEN
    -- As light as a trigger can be: this is what every statement pays outside a cutover.
    EXECUTE format('CREATE OR REPLACE FUNCTION pgcutover.%I() RETURNS trigger LANGUAGE plpgsql AS %L',
      gate, mark || ' BEGIN RETURN NULL; END');
    EXECUTE format('CREATE OR REPLACE FUNCTION pgcutover.%I() RETURNS event_trigger LANGUAGE plpgsql AS %L',
      ddl, mark || ' BEGIN RETURN; END');
    RETURN;
  END IF;
  -- SECURITY DEFINER, else the application gets 42501 even after an abort. Apply workers pass, else a replicated TRUNCATE
  -- would stop reverse replication.
  EXECUTE format('CREATE OR REPLACE FUNCTION pgcutover.%I() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER '
    'SET search_path = pg_catalog, pg_temp AS %L',
    gate, mark || format(' BEGIN IF EXISTS (%s) THEN RETURN NULL; END IF; '
      'IF (SELECT a.backend_type FROM pg_catalog.pg_stat_activity a WHERE a.pid = pg_catalog.pg_backend_pid()) '
      'LIKE ''logical replication%%'' THEN RETURN NULL; END IF; %s END', row_open, refuse));
  -- The invoker's rights, so that current_user tells the store's own DDL (flip, unfence) from everyone else's; session_user,
  -- because before 16 it is a superuser's function in which our login makes the subscription of the way back.
  EXECUTE format('CREATE OR REPLACE FUNCTION pgcutover.%I() RETURNS event_trigger LANGUAGE plpgsql '
    'SET search_path = pg_catalog, pg_temp AS %L',
    ddl, mark || format(' BEGIN IF %L IN (current_user, session_user) OR %s THEN RETURN; END IF; %s END', current_user, ddl_open, refuse));
END
$f$;

-- S0: the gate as a no-op, unless one is there. Never overwrites: a fence must not be armed away.
CREATE OR REPLACE FUNCTION pgcutover.arm(p_db text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  PERFORM pgcutover.writing();
  IF p_db IS NULL OR octet_length(p_db) NOT BETWEEN 1 AND 50 THEN
    RAISE EXCEPTION 'pgcutover: a database name here has 1 to 50 bytes' USING ERRCODE = '22023';
  END IF;
  LOCK TABLE pgcutover.state IN SHARE ROW EXCLUSIVE MODE;
  IF NOT EXISTS (SELECT FROM pgcutover.gates g WHERE g.db = p_db) THEN
    PERFORM pgcutover.put_gate(p_db, 'open', 0);
  END IF;
END
$f$;

-- S0, one table a transaction, with a short lock_timeout and retried by the caller: the lock queues behind open writers.
-- Returns whether the trigger is new. ENABLE ALWAYS: session_replication_role = replica does not pass the gate.
CREATE OR REPLACE FUNCTION pgcutover.arm_table(p_db text, p_table regclass) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
DECLARE
  gate oid := (SELECT p.oid FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
               WHERE n.nspname = 'pgcutover' AND p.proname = 'gate:' || p_db);
  have oid;
  enabled "char";
BEGIN
  PERFORM pgcutover.writing();
  IF gate IS NULL THEN
    RAISE EXCEPTION 'pgcutover: % has no gate here: arm() comes first', p_db USING ERRCODE = '55000';
  END IF;
  SELECT t.tgfoid, t.tgenabled INTO have, enabled FROM pg_trigger t WHERE t.tgrelid = p_table AND t.tgname = 'pgcutover_gate';
  IF have <> gate THEN
    RAISE EXCEPTION 'pgcutover: % has the gate %, not that of %', p_table, have::regproc, p_db USING ERRCODE = '55000';
  END IF;
  IF have IS NULL THEN
    EXECUTE format('CREATE TRIGGER pgcutover_gate BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON %s '
      'FOR EACH STATEMENT EXECUTE FUNCTION pgcutover.%I()', p_table, 'gate:' || p_db);
  END IF;
  IF enabled IS DISTINCT FROM 'A' THEN
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER pgcutover_gate', p_table);
  END IF;
  RETURN have IS NULL OR enabled <> 'A';
END
$f$;

-- S3, R3: fences the source, if the epoch is this run's, the newest, and open.
CREATE OR REPLACE FUNCTION pgcutover.flip(p_db text, p_epoch bigint, p_run uuid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  PERFORM pgcutover.writing();
  LOCK TABLE pgcutover.state IN SHARE ROW EXCLUSIVE MODE;
  PERFORM FROM pgcutover.state s WHERE s.db = p_db AND s.epoch = p_epoch AND s.run = p_run FOR UPDATE;
  IF NOT FOUND OR EXISTS (SELECT FROM pgcutover.decision d WHERE d.db = p_db AND d.epoch = p_epoch)
               OR EXISTS (SELECT FROM pgcutover.evidence e WHERE e.db = p_db AND e.epoch = p_epoch) THEN
    RAISE EXCEPTION 'pgcutover: epoch % of % is over, or not of run %', p_epoch, p_db, p_run USING ERRCODE = '55000';
  END IF;
  PERFORM pgcutover.put_gate(p_db, 'fenced', p_epoch);
END
$f$;

-- R3: back to the no-op after an abort. A gate that is not the fence of this epoch is left as it is.
CREATE OR REPLACE FUNCTION pgcutover.unfence(p_db text, p_epoch bigint, p_run uuid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  PERFORM pgcutover.writing();
  LOCK TABLE pgcutover.state IN SHARE ROW EXCLUSIVE MODE;
  PERFORM FROM pgcutover.state s WHERE s.db = p_db AND s.epoch = p_epoch AND s.run = p_run FOR UPDATE;
  IF NOT FOUND OR NOT EXISTS (SELECT FROM pgcutover.decision d
                              WHERE d.db = p_db AND d.epoch = p_epoch AND d.run = p_run AND d.outcome = 'abort') THEN
    RAISE EXCEPTION 'pgcutover: epoch % of % is not an aborted epoch of run %', p_epoch, p_db, p_run USING ERRCODE = '55000';
  END IF;
  IF EXISTS (SELECT FROM pgcutover.gates g WHERE g.db = p_db AND g.form = 'fenced' AND g.epoch = p_epoch) THEN
    PERFORM pgcutover.put_gate(p_db, 'open', 0);
  END IF;
END
$f$;

-- R10: on a target that has a gate, of its own or, a promoted standby, a cloned one. False: it has none, and nothing was done. A message older than anything known here is
-- refused: it would replace a newer fence.
CREATE OR REPLACE FUNCTION pgcutover.guard(p_db text, p_epoch bigint, p_run uuid) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
DECLARE
  now_form text;
  now_epoch bigint;
  copied boolean := pgcutover.copied(p_db, p_epoch);
BEGIN
  PERFORM pgcutover.writing();
  LOCK TABLE pgcutover.state IN SHARE ROW EXCLUSIVE MODE;
  SELECT g.form, g.epoch INTO now_form, now_epoch FROM pgcutover.gates g WHERE g.db = p_db;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  IF NOT copied AND EXISTS (SELECT FROM pgcutover.state s WHERE s.db = p_db
             AND NOT EXISTS (SELECT FROM pgcutover.decision d WHERE d.db = p_db AND d.epoch = s.epoch)
             AND NOT EXISTS (SELECT FROM pgcutover.evidence e WHERE e.db = p_db AND e.epoch = s.epoch)) THEN
    RAISE EXCEPTION 'pgcutover: an epoch of % is undecided on this server: it is a source', p_db USING ERRCODE = '55000',
      HINT = 'Source and target may be swapped in the configuration; end that epoch first: proxyctl abort.';
  END IF;
  IF now_epoch > p_epoch OR EXISTS (
      SELECT FROM pgcutover.state s WHERE s.db = p_db AND (s.epoch > p_epoch OR s.epoch = p_epoch AND s.run <> p_run)
      -- On a copy an abort of this very epoch may have come in before the promotion: then it stays shut for good.
      UNION ALL SELECT FROM pgcutover.decision d WHERE d.db = p_db AND (d.epoch > p_epoch OR d.epoch = p_epoch AND NOT copied)
      UNION ALL SELECT FROM pgcutover.evidence e WHERE e.db = p_db AND e.epoch >= p_epoch) THEN
    RAISE EXCEPTION 'pgcutover: epoch % of % is over, or not of run %', p_epoch, p_db, p_run USING ERRCODE = '55000';
  END IF;
  PERFORM pgcutover.put_gate(p_db, 'target', p_epoch);
  RETURN true;
END
$f$;

-- S10: once the evidence is there the target's form opens on every statement; the no-op is cheaper.
CREATE OR REPLACE FUNCTION pgcutover.settle(p_db text, p_epoch bigint, p_run uuid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  PERFORM pgcutover.writing();
  LOCK TABLE pgcutover.state IN SHARE ROW EXCLUSIVE MODE;
  IF NOT EXISTS (SELECT FROM pgcutover.evidence e WHERE e.db = p_db AND e.epoch = p_epoch AND e.run = p_run) THEN
    RAISE EXCEPTION 'pgcutover: there is no evidence of epoch % of % and run %', p_epoch, p_db, p_run USING ERRCODE = '55000';
  END IF;
  IF EXISTS (SELECT FROM pgcutover.gates g WHERE g.db = p_db AND g.form = 'target' AND g.epoch <= p_epoch) THEN
    PERFORM pgcutover.put_gate(p_db, 'open', 0);
  END IF;
END
$f$;

-- S4b: a session that has used a sequence has to have drawn the same value on the target (currval, lastval), for which the
-- sequence is set, and its role may have no right to that. Whoever holds a ticket, which only a proxy's control login makes,
-- may set one sequence to one value, once; S5 sets every sequence after that, and flushes what was written here, which nobody
-- waits for. Others do the same to the sequence at the same time: some value is drawn, which makes the sequence the
-- session's last one, and then replaced by the right one, for this session. currval and lastval belong to sessions, not to
-- roles. Without a ticket nothing happens (all that is called is strict), but every plan is made, and the next call finds them.
CREATE OR REPLACE FUNCTION pgcutover.draw(p_ticket uuid) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
DECLARE
  taken pgcutover.seat;
  sequence regclass;
BEGIN
  DELETE FROM pgcutover.seat s WHERE s.ticket = p_ticket AND s.at > clock_timestamp() - interval '1 minute'
    RETURNING s.* INTO taken;
  IF taken.ticket IS NULL AND p_ticket IS NOT NULL THEN
    RAISE EXCEPTION 'pgcutover: there is no such ticket' USING ERRCODE = '55000';
  END IF;
  PERFORM set_config('synchronous_commit', 'off', true);
  sequence := quote_ident(taken.sequence_schema) || '.' || quote_ident(taken.sequence_name);
  PERFORM setval(sequence, taken.value, false);
  PERFORM nextval(sequence);
  RETURN setval(sequence, taken.value, true);
END
$f$;

-- What tells a session from what it was a moment ago, at a hundredth of the cost of reading it whole: hashes of everything
-- that a session may change and the catalogue shows, under its own rights; the sequences that it has used, with their values;
-- when its server process last read its configuration. Called by the session's own server connection, hence no SET clauses
-- and every name and operator spelt out: whatever search_path the session has.
CREATE OR REPLACE FUNCTION pgcutover.session_print(
  p_settings text[], p_sequences oid[], OUT print text, OUT used text, OUT last text, OUT loaded text)
LANGUAGE plpgsql AS $f$
DECLARE
  s pg_catalog.oid;
  whole pg_catalog.text;
BEGIN
  BEGIN
    last := pg_catalog.lastval();
  EXCEPTION
    WHEN SQLSTATE '55000' THEN last := 'unused';
    WHEN SQLSTATE '42501' THEN last := 'hidden';
  END;
  used := '';
  FOREACH s IN ARRAY p_sequences LOOP
    BEGIN
      used := pg_catalog.concat(used, s, ':', pg_catalog.currval(s::pg_catalog.regclass), ',');
    EXCEPTION WHEN SQLSTATE '55000' OR SQLSTATE '42501' OR SQLSTATE '42P01' THEN
      NULL;
    END;
  END LOOP;
  loaded := pg_catalog.pg_conf_load_time()::pg_catalog.text;
  whole := pg_catalog.concat_ws(E'\n',
    session_user, current_user, pg_catalog.current_setting('role'), pg_catalog.pg_my_temp_schema(),
    (SELECT pg_catalog.string_agg(pg_catalog.quote_nullable(pg_catalog.current_setting(n, true)), ',')
       FROM pg_catalog.unnest(p_settings) n),
    '-', (SELECT pg_catalog.string_agg(
            pg_catalog.concat_ws(',', pg_catalog.quote_literal(p.name), p.prepare_time, p.from_sql,
                                 pg_catalog.quote_literal(p.statement)), ',')
       FROM pg_catalog.pg_prepared_statement() p
      WHERE p.name OPERATOR(pg_catalog.<>) ('_pgcutover_' OPERATOR(pg_catalog.||) pg_catalog.chr(1))),
    '-', (SELECT pg_catalog.string_agg(pg_catalog.quote_literal(c), ',') FROM pg_catalog.pg_listening_channels() c),
    '-', (SELECT pg_catalog.count(*) FROM pg_catalog.pg_cursor() c WHERE c.is_holdable),
    '-', (SELECT pg_catalog.string_agg(pg_catalog.concat_ws(':', l.classid, l.objid, l.objsubid, l.mode), ',')
       FROM pg_catalog.pg_lock_status() l
      WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.granted
        AND l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()));
  IF pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid THEN
    whole := pg_catalog.concat(whole, '-', EXISTS (SELECT FROM pg_catalog.pg_depend d
      WHERE d.refclassid OPERATOR(pg_catalog.=) 2615::pg_catalog.oid
        AND d.refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()));
  END IF;
  print := pg_catalog.concat(
    pg_catalog.hashtextextended(whole, 0), ':', pg_catalog.hashtextextended(whole, 1));
END
$f$;

-- The undo of S0. A gate that refuses, or would refuse, by a commit or an open epoch stays: 55000.
CREATE OR REPLACE FUNCTION pgcutover.may_disarm(p_db text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  LOCK TABLE pgcutover.state IN SHARE ROW EXCLUSIVE MODE;
  IF EXISTS (SELECT FROM pgcutover.gates g WHERE g.db = p_db AND g.form IS DISTINCT FROM 'open'
             AND NOT (g.form = 'fenced' AND pgcutover.aborted(g.db, g.epoch))
             AND NOT (g.form = 'target' AND pgcutover.witnessed(g.db, g.epoch))) THEN
    RAISE EXCEPTION 'pgcutover: the gate of % holds: it stays', p_db USING ERRCODE = '55000';
  END IF;
  IF EXISTS (SELECT FROM pgcutover.state s WHERE s.db = p_db
             AND NOT EXISTS (SELECT FROM pgcutover.decision d WHERE d.db = p_db AND d.epoch = s.epoch)
             AND NOT EXISTS (SELECT FROM pgcutover.evidence e WHERE e.db = p_db AND e.epoch = s.epoch)) THEN
    RAISE EXCEPTION 'pgcutover: an epoch of % is open: its gate stays', p_db USING ERRCODE = '55000';
  END IF;
END
$f$;
-- One table a transaction (DROP TRIGGER locks out readers too, so: a short lock_timeout). Returns whether one was there.
CREATE OR REPLACE FUNCTION pgcutover.disarm_table(p_db text, p_table regclass) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  PERFORM pgcutover.writing();
  PERFORM pgcutover.may_disarm(p_db);
  IF NOT EXISTS (SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_namespace n ON n.oid = p.pronamespace
                 WHERE t.tgrelid = p_table AND t.tgname = 'pgcutover_gate'
                   AND n.nspname = 'pgcutover' AND p.proname = 'gate:' || p_db) THEN
    RETURN false;
  END IF;
  EXECUTE format('DROP TRIGGER pgcutover_gate ON %s', p_table);
  RETURN true;
END
$f$;
-- After the tables: the functions, and the event trigger if there is one (2BP01 while a table still has the trigger).
CREATE OR REPLACE FUNCTION pgcutover.disarm(p_db text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  PERFORM pgcutover.writing();
  PERFORM pgcutover.may_disarm(p_db);
  IF EXISTS (SELECT FROM pg_event_trigger e WHERE e.evtname = 'pgcutover_ddl_' || p_db) THEN
    EXECUTE format('DROP EVENT TRIGGER %I', 'pgcutover_ddl_' || p_db);
  END IF;
  EXECUTE format('DROP FUNCTION IF EXISTS pgcutover.%I()', 'gate:' || p_db);
  EXECUTE format('DROP FUNCTION IF EXISTS pgcutover.%I()', 'ddl:' || p_db);
END
$f$;

REVOKE ALL ON ALL TABLES IN SCHEMA pgcutover FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA pgcutover FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pgcutover.aborted(text, bigint), pgcutover.witnessed(text, bigint) TO PUBLIC;
GRANT EXECUTE ON FUNCTION pgcutover.draw(uuid) TO PUBLIC;
GRANT EXECUTE ON FUNCTION pgcutover.session_print(text[], oid[]) TO PUBLIC;
