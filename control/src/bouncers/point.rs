//! Points a PgBouncer at another server: its file from a template, or the user's command.
//!
//! Invariant: the file is replaced whole (written beside it, flushed, renamed), with the mode and the owner that it had; a
//! command that fails or takes too long has not pointed anything anywhere.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::time::Duration;

use crate::config::members::{Address, Point};

/// A command that edits a file, perhaps on another machine; clients are held meanwhile.
const COMMAND: Duration = Duration::from_secs(5);

/// Changes what PgBouncer will read.
pub(super) async fn point(how: &Point, backend: &str, to: &Address) -> Result<(), String> {
    match how {
        Point::Template { template, file } => {
            let text = rendered(template, backend, to)?;
            replace(file, &text).map_err(|error| format!("{}: {error}", file.display()))
        }
        Point::Command(words) => command(words, backend, to).await,
    }
}

/// Whether the template says of one of the sides what the file says: then it will say the right thing of the other one.
pub(super) fn check(how: &Point, sides: [(&str, &Address); 2]) -> Result<(), String> {
    let Point::Template { template, file } = how else { return Ok(()) };
    let found = fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let mut line = 0;
    for (backend, address) in sides {
        let wanted = rendered(template, backend, address)?;
        if wanted == found {
            return Ok(());
        }
        let same = wanted.lines().zip(found.lines()).take_while(|(wanted, found)| wanted == found).count();
        line = line.max(same + 1);
    }
    Err(format!("{} is not what {} says of either side: see line {line}", file.display(), template.display()))
}

fn rendered(template: &Path, backend: &str, to: &Address) -> Result<String, String> {
    let text = fs::read_to_string(template).map_err(|error| format!("{}: {error}", template.display()))?;
    if !text.contains("{host}") && !text.contains("{port}") {
        return Err(format!("{} has neither {{host}} nor {{port}}", template.display()));
    }
    Ok(filled(&text, backend, to))
}

fn filled(text: &str, backend: &str, to: &Address) -> String {
    let port = to.port.to_string();
    let places = [("{backend}", backend), ("{host}", &to.host), ("{port}", &port), ("{dbname}", &to.dbname)];
    places.iter().fold(text.to_owned(), |text, (place, value)| text.replace(place, value))
}

fn replace(file: &Path, text: &str) -> std::io::Result<()> {
    // A link goes on pointing where it does.
    let file = &fs::canonicalize(file)?;
    let before = fs::metadata(file)?;
    let beside = file.with_extension("pgcutover-new");
    let mut new = fs::File::create(&beside)?;
    new.set_permissions(before.permissions())?;
    new.write_all(text.as_bytes())?;
    new.sync_all()?;
    if let Err(error) = chown(&beside, Some(before.uid()), Some(before.gid())) {
        // Who may not give a file away owns what it wrote: PgBouncer can read it if its mode lets it.
        tracing::debug!(%error, "the owner of PgBouncer's file was not kept");
    }
    fs::rename(&beside, file)?;
    if let Some(directory) = file.parent() {
        fs::File::open(directory)?.sync_all()?;
    }
    Ok(())
}

async fn command(words: &[String], backend: &str, to: &Address) -> Result<(), String> {
    let words: Vec<String> = words.iter().map(|word| filled(word, backend, to)).collect();
    let Some((program, arguments)) = words.split_first() else { return Err("the command is empty".to_owned()) };
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).stdin(std::process::Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(COMMAND, command.output()).await;
    let output = output.map_err(|_| format!("{program}: not done within {COMMAND:?}"))?;
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().chars().take(200).collect::<String>();
    Err(format!("{program}: {}: {said}", output.status))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "[databases]\napp = host=10.0.0.1 port=5432 dbname=app\n[pgbouncer]\nauth_type = scram-sha-256\n";

    fn address(host: &str, port: u16) -> Address {
        Address { host: host.to_owned(), port, dbname: "app".to_owned() }
    }

    fn files(dir: &Path) -> Point {
        let (template, file) = (dir.join("ini.template"), dir.join("pgbouncer.ini"));
        fs::write(&file, NOW).unwrap();
        fs::write(&template, NOW.replace("10.0.0.1", "{host}").replace("5432", "{port}")).unwrap();
        Point::Template { template, file }
    }

    #[tokio::test]
    async fn a_file_is_replaced_whole_and_keeps_its_mode() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let how = files(dir.path());
        let file = dir.path().join("pgbouncer.ini");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let (blue, green) = (address("10.0.0.1", 5432), address("10.0.0.2", 5433));
        check(&how, [("blue", &blue), ("green", &green)]).unwrap();
        point(&how, "green", &green).await.unwrap();
        check(&how, [("blue", &blue), ("green", &green)]).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), NOW.replace("10.0.0.1", "10.0.0.2").replace("5432", "5433"));
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside it");
    }

    #[test]
    fn a_template_that_is_not_the_files_is_found_before_it_matters() {
        let dir = tempfile::tempdir().unwrap();
        let how = files(dir.path());
        let (blue, green) = (address("10.0.0.8", 5432), address("10.0.0.9", 5433));
        let error = check(&how, [("blue", &blue), ("green", &green)]).unwrap_err();
        assert!(error.ends_with("see line 2"), "{error}");
        fs::write(dir.path().join("ini.template"), NOW).unwrap();
        assert!(check(&how, [("blue", &blue), ("green", &green)]).unwrap_err().contains("neither"));
    }

    #[tokio::test]
    async fn a_command_gets_the_address_and_its_failure_counts() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out").display().to_string();
        let words = |script: String| {
            Point::Command(["sh", "-c", &script, "x", "{backend}", "{host}:{port}/{dbname}"].map(str::to_owned).into())
        };
        let to = address("10.0.0.2", 5433);
        point(&words(format!("echo $1 $2 > {out}")), "green", &to).await.unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("out")).unwrap(), "green 10.0.0.2:5433/app\n");
        let error = point(&words("echo no >&2; exit 3".to_owned()), "green", &to).await.unwrap_err();
        assert!(error.contains("exit status: 3") && error.ends_with("no"), "{error}");
    }
}
