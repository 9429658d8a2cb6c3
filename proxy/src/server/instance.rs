//! The name under which this process enrols itself in decision stores.
//!
//! Invariant: it stays the same over restarts with the same `state_dir`.

use std::io;

use crate::config::General;

/// The configured name, or a random one that is kept in `state_dir/instance`.
pub(super) fn name(general: &General) -> io::Result<String> {
    if let Some(name) = &general.instance {
        return Ok(name.clone());
    }
    let file = general.state_dir.join("instance");
    match std::fs::read_to_string(&file) {
        Ok(name) if !name.trim().is_empty() => return Ok(name.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let name = uuid::Uuid::new_v4().to_string();
    std::fs::create_dir_all(&general.state_dir)?;
    std::fs::write(&file, &name)?;
    Ok(name)
}
