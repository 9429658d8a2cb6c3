//! One directory per process for everything it starts, and the watchdog that clears it away.
//!
//! Invariant: when this process has ended, however it ended, what it registered here is stopped and the directory is
//! removed. A shell of its own process group waits on a pipe that only we hold open; the kernel closes it for us after
//! a panic, Ctrl-C, SIGTERM or SIGKILL alike. Should the watchdog die too, the next run sweeps.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use nix::unistd::Uid;

const PREFIX: &str = "pgcutover-e2e-";

/// Waits for end of file on stdin, stops every registered process that still is the one that was registered (same start
/// time), gives them 5 s, then kills, and removes the directory unless it shall be kept.
const CLEAN_UP: &str = r#"
read _
cd /
alive() { # pid start: still running, and not a zombie
    now=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f1,20)
    [ "${now#* }" = "$2" ] && [ "${now%% *}" != Z ]
}
each() { # command: run for every registered process that lives; false when there was none
    found=1
    for f in "$dir"/pids/*; do
        [ -e "$f" ] || continue
        read pid start stop <"$f"
        alive "$pid" "$start" && found=0 && "$@"
    done 2>/dev/null
    return $found
}
polite() { kill -"$stop" "$pid"; kill -CONT "$pid"; }
rude() { kill -KILL "$pid"; }
dir=$1
each polite
left=100
while [ $left -gt 0 ] && each :; do left=$((left - 1)); sleep 0.05; done
each rude && sleep 0.2
[ -e "$dir/keep" ] || rm -rf "$dir"
"#;

/// The directory of this process.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    next: AtomicU32,
    /// Locked while we live: how a sweeper tells a dead run from a live one.
    _lock: File,
    /// Its stdin is the pipe whose end tells it that we are gone; never closed by us.
    _watchdog: Child,
}

impl RunDir {
    /// The directory of this process, made at first use; sweeps what dead runs left behind.
    ///
    /// # Errors
    /// No directory can be made under the temporary directory, or no shell can be started.
    pub fn current() -> Result<&'static RunDir> {
        // A process has one parent-death watchdog, so this is one of the few true globals.
        static CURRENT: OnceLock<Result<RunDir, String>> = OnceLock::new();
        CURRENT
            .get_or_init(|| RunDir::create().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow::anyhow!("{error}"))
    }

    fn create() -> Result<RunDir> {
        let base = base();
        sweep(&base);
        let path = base.join(format!("{PREFIX}{}-{:08x}", std::process::id(), unique()));
        DirBuilder::new().mode(0o755).create(&path).with_context(|| format!("creating {}", path.display()))?;
        // The mode above is cut by the umask; the servers' user must be able to pass.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        fs::create_dir(path.join("pids"))?;
        let lock = File::create(path.join("lock"))?;
        lock.lock()?;
        let watchdog = clean_up(&path).stdin(Stdio::piped()).spawn().context("starting the watchdog shell")?;
        Ok(RunDir { path, next: AtomicU32::new(1), _lock: lock, _watchdog: watchdog })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a new directory `<name>-<n>` in it.
    ///
    /// # Errors
    /// The directory can't be made.
    pub fn subdirectory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(format!("{name}-{}", self.next.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    /// From now on nothing in the directory is removed, by nobody. Processes are stopped all the same.
    ///
    /// # Errors
    /// The mark can't be written.
    pub fn keep(&self) -> Result<()> {
        fs::write(self.path.join("keep"), "").context("marking the run directory as kept")
    }

    /// Shall the directory stay?
    pub fn kept(&self) -> bool {
        self.path.join("keep").exists()
    }

    /// Tells the watchdog about a process; `stop` is the signal (`QUIT`, `TERM`, …) that ends it in order.
    ///
    /// # Errors
    /// The entry can't be written.
    pub fn register(&self, pid: u32, stop: &str) -> Result<()> {
        let start = start_time(pid).unwrap_or_default();
        fs::write(self.path.join("pids").join(pid.to_string()), format!("{pid} {start} {stop}\n"))
            .with_context(|| format!("registering process {pid}"))
    }

    /// The process is gone.
    pub fn unregister(&self, pid: u32) {
        // The entry names the start time, so a leftover does no harm.
        let _ = fs::remove_file(self.path.join("pids").join(pid.to_string()));
    }
}

/// A short path: PostgreSQL's socket paths end at 107 bytes.
fn base() -> PathBuf {
    let path = std::env::temp_dir();
    if path.as_os_str().len() <= 40 { path } else { PathBuf::from("/tmp") }
}

fn unique() -> u32 {
    uuid::Uuid::new_v4().as_fields().0
}

fn clean_up(dir: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", CLEAN_UP, "pgcutover-watchdog"]).arg(dir).process_group(0);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Clears the directories of runs whose process is dead and whose watchdog died with it.
fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let named = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if !named || !is_ours(&path) || path.join("keep").exists() {
            continue;
        }
        // No lock file: it is being made right now.
        let Ok(lock) = File::open(path.join("lock")) else { continue };
        match lock.try_lock() {
            // Its end is not awaited beyond `status`, which the script's own limits bound (about 6 s).
            Ok(()) => drop(clean_up(&path).stdin(Stdio::null()).status()),
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}

/// A directory of this user: what another one wrote there must not make us kill or remove anything.
fn is_ours(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir() && meta.uid() == Uid::effective().as_raw())
}

/// When a process was started, in clock ticks since boot (field 22 of /proc/PID/stat): with the pid it names a process
/// for good, although pids are used again.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.rsplit_once(") ")?.1;
    after_name.split(' ').nth(19).map(str::to_owned)
}
