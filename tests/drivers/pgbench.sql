-- One round of the course for pgbench; `n` and `client` are given on the command line, variables live as long as a client.
-- A client whose file is gone ends here, between two transactions: pgbench knows no order to stop.
\setshell going_on cat :going
\set n :n + 1
\set client :base + :client_id
\set aid 1 + (:client * 31 + :n) % 1000
\set delta :n % 7 - 3
BEGIN;
INSERT INTO ledger (client, n, aid, delta) VALUES (:client, :n, :aid, :delta);
UPDATE accounts SET abalance = abalance + :delta WHERE aid = :aid;
INSERT INTO parcel (client, n, body, sent) VALUES (:client, :n, decode(md5(:n::text), 'hex'), timestamptz 'epoch' + :n * interval '1 millisecond');
COMMIT;
SELECT body, sent FROM parcel WHERE client = :client AND n = :n;
