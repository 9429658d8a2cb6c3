//! A process of ours: its log, its signals, its end.
//!
//! Invariant: every process started here is registered with the watchdog while it lives, and dropping it ends it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::run_dir::RunDir;

/// How often a state is looked at while somebody waits for it: short against everything that is waited for.
pub const POLL: Duration = Duration::from_millis(5);

/// How long a process may take to end in order before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// A running child.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    stop: Signal,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` with stderr appended to `log`; stdout goes there too unless the command already redirects it
    /// (`stdout`). `stop` is the signal by which it ends in order.
    ///
    /// # Errors
    /// The program can't be started or the log not written.
    pub fn spawn(mut command: Command, name: &str, log: &Path, stop: Signal) -> Result<Process> {
        let file = File::options().create(true).append(true).open(log).with_context(|| log.display().to_string())?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        Process::spawn_redirected(command, name, log, stop)
    }

    /// Like [`Process::spawn`], for a command whose streams are already set.
    ///
    /// # Errors
    /// The program can't be started.
    pub fn spawn_redirected(mut command: Command, name: &str, log: &Path, stop: Signal) -> Result<Process> {
        let child = command.spawn().with_context(|| format!("starting {name} ({:?})", command.get_program()))?;
        RunDir::current()?.register(child.id(), stop.as_str().trim_start_matches("SIG"))?;
        Ok(Process { name: name.to_owned(), child, log: log.to_owned(), stop, status: None })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its stderr goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The end of its log, for error messages.
    pub fn log_tail(&self) -> String {
        let log = String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.nix_pid(), signal).with_context(|| format!("sending {signal} to {}", self.name))
    }

    fn nix_pid(&self) -> Pid {
        Pid::from_raw(self.pid().cast_signed())
    }

    /// Its exit status, if it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        if self.status.is_none()
            && let Ok(Some(status)) = self.child.try_wait()
        {
            self.status = Some(status);
            if let Ok(run) = RunDir::current() {
                run.unregister(self.pid());
            }
        }
        self.status
    }

    /// Waits until `ready` gives a value, while the process lives, at most `limit`.
    ///
    /// # Errors
    /// It ended first, or the limit passed; the message carries the end of its log.
    pub async fn until<T>(&mut self, what: &str, limit: Duration, mut ready: impl FnMut() -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(value) = ready() {
                return Ok(value);
            }
            if let Some(status) = self.exited() {
                bail!("{} ended with {status} before {what}; its log ends:\n{}", self.name, self.log_tail());
            }
            if Instant::now() > deadline {
                bail!("{}: no {what} within {limit:?}; its log ends:\n{}", self.name, self.log_tail());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It still runs after `limit`.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.exited() {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} still runs after {limit:?}; its log ends:\n{}", self.name, self.log_tail());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Ends it at once, as a power cut would.
    pub fn kill9(&mut self) {
        if self.exited().is_none() {
            // It may end between the two lines; then there is nothing to kill.
            let _ = self.child.kill();
            let _ = self.child.wait().map(|status| self.status = Some(status));
            if let Ok(run) = RunDir::current() {
                run.unregister(self.pid());
            }
        }
    }

    /// Ends it in order by `signal`; after 10 s by force.
    pub fn stop_with(&mut self, signal: Signal) {
        if self.exited().is_some() {
            return;
        }
        // A stopped (SIGSTOP) process would not hear the first one.
        let _ = self.signal(signal);
        let _ = self.signal(Signal::SIGCONT);
        let deadline = Instant::now() + STOP_LIMIT;
        while self.exited().is_none() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        self.kill9();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop_with(self.stop);
    }
}

/// Clock ticks a second in /proc/PID/stat, fixed on Linux for user space.
const TICKS: f64 = 100.0;

/// CPU seconds that a process has used, user and system.
///
/// # Errors
/// It is gone.
pub fn cpu_s(pid: u32) -> Result<f64> {
    let [own, _] = cpu_and_ended_s(pid).with_context(|| format!("reading the CPU time of process {pid}"))?;
    Ok(own)
}

/// CPU seconds of a process, of its living children, and of those that have ended.
pub fn family_cpu_s(pid: u32) -> f64 {
    let [own, ended] = cpu_and_ended_s(pid).unwrap_or_default();
    // A child that ends in between counts with the next look.
    own + ended + children_of(pid).into_iter().filter_map(|child| cpu_s(child).ok()).sum::<f64>()
}

/// Of the process, and of its children that have ended (proc(5): fields 14 to 17).
fn cpu_and_ended_s(pid: u32) -> Option<[f64; 2]> {
    let fields = after_name(pid)?;
    let ticks = |at: usize| fields.split(' ').nth(at)?.parse::<f64>().ok();
    Some([(ticks(11)? + ticks(12)?) / TICKS, (ticks(13)? + ticks(14)?) / TICKS])
}

/// The living children of a process, by `/proc`.
pub fn children_of(pid: u32) -> Vec<u32> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    pids.filter(|child| parent_of(*child) == Some(pid)).collect()
}

fn parent_of(pid: u32) -> Option<u32> {
    after_name(pid)?.split(' ').nth(1)?.parse().ok()
}

/// What /proc/PID/stat says from its third field on: before that is a name, which may hold anything.
fn after_name(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(") ")?.1.trim_end().to_owned())
}
