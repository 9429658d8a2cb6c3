//! Who takes part, as the file names it: proxies by address, by a DNS name, or by what they enrolled.
//!
//! Invariant: names are unique; an entry whose addresses come from elsewhere says so (`find`), so that a name which begins to
//! answer with several addresses never silently stands for one of them.

use crate::config::section::{Checked, Section, wrong};
use crate::config::{Endpoint, endpoint};

/// One `[[proxies]]` table.
#[derive(Debug, Clone)]
pub struct ProxyEntry {
    /// The name reports use; for several proxies what their names begin with.
    pub name: String,
    /// How to reach its console, or theirs.
    pub endpoint: Endpoint,
    /// Which proxies it stands for.
    pub find: Find,
}

/// Which proxies an entry stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Find {
    /// The one at this address.
    Listed,
    /// One at each address that the host name answers with.
    Dns,
    /// Each that has enrolled itself in the store, where it enrolled; those with an entry of their own excepted.
    Members,
}

/// What becomes of proxies that serve the database and that no entry stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unlisted {
    /// No cutover begins while there are any.
    Refuse,
    /// They hold and follow by themselves, up to a second later than the others.
    Follow,
}

const FINDS: &[(&str, Find)] = &[("listed", Find::Listed), ("dns", Find::Dns), ("members", Find::Members)];

pub(super) const UNLISTED: &[(&str, Unlisted)] = &[("refuse", Unlisted::Refuse), ("follow", Unlisted::Follow)];

pub(super) fn proxies(sections: Vec<Section>) -> Checked<Vec<ProxyEntry>> {
    let mut proxies: Vec<ProxyEntry> = Vec::new();
    for mut section in sections {
        let name = section.required("name", Section::text)?;
        let find = section.choice("find", FINDS)?.unwrap_or(Find::Listed);
        let endpoint = endpoint(&mut section)?;
        check_host(&section, find, &endpoint)?;
        if proxies.iter().any(|other| other.name == name) {
            return Err(wrong("proxies.name", format!("'{name}' names two proxies")));
        }
        proxies.push(ProxyEntry { name, endpoint, find });
        section.finish()?;
    }
    Ok(proxies)
}

fn check_host(section: &Section, find: Find, endpoint: &Endpoint) -> Checked<()> {
    let hosts = endpoint.pg.get_hosts();
    let reason = match find {
        Find::Listed => return Ok(()),
        Find::Dns => match hosts {
            [tokio_postgres::config::Host::Tcp(_)] => return Ok(()),
            _ => "must name one host whose addresses are the proxies (find = 'dns')",
        },
        Find::Members if hosts.is_empty() && endpoint.pg.get_ports().is_empty() => return Ok(()),
        Find::Members => "must name neither host nor port: members are reached where they enrolled (find = 'members')",
    };
    Err(wrong(section.key("dsn"), reason))
}
