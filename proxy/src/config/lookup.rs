//! Who is asked for users that the user file does not name: the nearest setting wins.
//!
//! Invariant: the database that is asked is declared. Pure.

use crate::config::{Config, nearest};

/// How users are looked up for one database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserLookup<'a> {
    /// `auth_query`.
    pub query: &'a str,
    /// `auth_user`.
    pub user: &'a str,
    /// The declared database whose active backend is asked.
    pub dbname: &'a str,
}

/// `auth_query` unless the file says otherwise. Every name in it has a schema: whoever may create objects where it runs
/// can't put others in their place. A secret that is no longer valid is none, and who may not log in is nobody.
pub(super) const AUTH_QUERY: &str = "SELECT rolname, CASE WHEN rolvaliduntil OPERATOR(pg_catalog.<) pg_catalog.now() THEN NULL ELSE rolpassword END \
     FROM pg_catalog.pg_authid \
     WHERE rolname::pg_catalog.text OPERATOR(pg_catalog.=) $1::pg_catalog.text AND rolcanlogin";

impl Config {
    /// How users of a database are looked up that `auth_file` does not name; `None` where they are not.
    #[must_use]
    pub fn user_lookup<'a>(&'a self, database: &'a str) -> Option<UserLookup<'a>> {
        let (general, own) = (&self.general, self.databases.get(database));
        let user = own.and_then(|d| d.auth_user.as_deref()).or(general.auth_user.as_deref())?;
        let query = own.and_then(|d| d.auth_query.as_deref()).unwrap_or(&general.auth_query);
        let dbname = own.and_then(|d| d.auth_dbname.as_deref()).or(general.auth_dbname.as_deref());
        Some(UserLookup { query, user, dbname: dbname.unwrap_or(database) })
    }

    /// Whoever is asked for users has to be there.
    pub(super) fn check_lookups(&self) -> Result<(), (String, String)> {
        let own = self.databases.iter().map(|(name, d)| (format!("databases.{name}"), d.auth_dbname.as_ref()));
        let all = std::iter::once(("pgcutover".to_owned(), self.general.auth_dbname.as_ref())).chain(own);
        for (section, dbname) in all {
            let Some(dbname) = dbname.filter(|name| !self.databases.contains_key(*name)) else { continue };
            let hint = nearest(dbname, self.databases.keys().map(String::as_str));
            return Err((format!("{section}.auth_dbname"), format!("'{dbname}' is not a declared database{hint}")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const SMALL: &str = "[databases.app]\nactive = 'blue'\n[databases.app.backends.blue]\nhost = 'db1'\n";

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("/etc/pgcutover.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn users_are_looked_up_where_and_as_whom_the_nearest_setting_says() {
        let config = parse(&format!("[pgcutover]\nauth_user = 'lookup'\n{SMALL}")).unwrap();
        let lookup = config.user_lookup("app").unwrap();
        assert_eq!((lookup.user, lookup.dbname, lookup.query), ("lookup", "app", AUTH_QUERY));
        let own =
            SMALL.replace("active =", "auth_user = 'own'\nauth_query = 'SELECT 1, 2'\nauth_dbname = 'app'\nactive =");
        let config = parse(&format!("[pgcutover]\nauth_user = 'lookup'\n{own}")).unwrap();
        assert_eq!(config.user_lookup("app"), Some(UserLookup { query: "SELECT 1, 2", user: "own", dbname: "app" }));
        assert_eq!(parse(SMALL).unwrap().user_lookup("app"), None);
        let error = parse(&format!("[pgcutover]\nauth_dbname = 'aap'\n{SMALL}")).unwrap_err();
        assert!(error.contains("pgcutover.auth_dbname") && error.contains("did you mean 'app'?"), "{error}");
    }
}
