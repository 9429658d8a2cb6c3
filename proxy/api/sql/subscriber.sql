-- The way back (reverse replication) before PostgreSQL 16, where only superusers make subscriptions: run it as a superuser in
-- the database that moves, on each server of 15 or older. It lets the role pgcutover make, switch off and drop
-- subscriptions there, which then act as this superuser: one more reason to guard that role's password like a
-- superuser's. From 16 on GRANT pg_create_subscription TO pgcutover does it; without either set way_back.enabled = false.
CREATE SCHEMA IF NOT EXISTS pgcutover_subscriber;
REVOKE ALL ON SCHEMA pgcutover_subscriber FROM PUBLIC;
GRANT USAGE ON SCHEMA pgcutover_subscriber TO pgcutover;
-- Without a slot (NULL) it is only tried out, and stays switched off.
CREATE OR REPLACE FUNCTION pgcutover_subscriber.subscribe(p_name text, p_conninfo text, p_publication text, p_slot text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  IF p_name NOT LIKE 'pgcutover!_back!_%' ESCAPE '!' THEN
    RAISE EXCEPTION 'pgcutover: % is not the name of a way back', p_name USING ERRCODE = '42501';
  END IF;
  EXECUTE format('CREATE SUBSCRIPTION %I CONNECTION %L PUBLICATION %I WITH (create_slot = false, copy_data = false, enabled = %s, slot_name = %s)',
    p_name, p_conninfo, p_publication, CASE WHEN p_slot IS NULL THEN 'false' ELSE 'true' END, coalesce(quote_literal(p_slot), 'NONE'));
END
$f$;
CREATE OR REPLACE FUNCTION pgcutover_subscriber.disable(p_name text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  EXECUTE format('ALTER SUBSCRIPTION %I DISABLE', p_name);
END
$f$;
-- Leaves the slot on the other server alone.
CREATE OR REPLACE FUNCTION pgcutover_subscriber.unsubscribe(p_name text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  EXECUTE format('ALTER SUBSCRIPTION %I SET (slot_name = NONE)', p_name);
  EXECUTE format('DROP SUBSCRIPTION %I', p_name);
END
$f$;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA pgcutover_subscriber FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pgcutover_subscriber TO pgcutover;
