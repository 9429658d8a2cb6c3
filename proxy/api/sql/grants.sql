-- What the proxies' control login may do with the store, and nothing else. {role} is replaced by the quoted role name.
GRANT USAGE ON SCHEMA pgcutover TO {role};
GRANT SELECT ON pgcutover.state, pgcutover.decision, pgcutover.evidence TO {role};
GRANT SELECT, INSERT, UPDATE ON pgcutover.member TO {role};
GRANT INSERT ON pgcutover.seat TO {role};
GRANT EXECUTE ON FUNCTION pgcutover.decide(text, bigint, uuid, text) TO {role};
GRANT EXECUTE ON FUNCTION pgcutover.witness(text, bigint, uuid, text) TO {role};
