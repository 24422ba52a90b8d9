//! A `stencil serve` of its own: on a temporary data directory, ended with proof that nothing of it stays.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::client::Client;
use crate::interrupt::UndoneOnInterrupt;
use crate::processes;

/// How long a server may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long a server that was asked to end may take.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Lines at the end of the server's log that are worth showing.
const TAIL_LINES: usize = 15;

/// The server did not do as a server should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    #[error("could not {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("`stencil serve` ended ({status}) before it answered; it said:\n{log}")]
    Ended { status: ExitStatus, log: String },
    #[error("`stencil serve` did not answer in {} s; it said:\n{log}", START_LIMIT.as_secs())]
    Silent { log: String },
    #[error("the server is not running")]
    NotRunning,
    #[error("could not {what} process {pid}")]
    Process {
        what: &'static str,
        pid: i32,
        #[source]
        source: rustix::io::Errno,
    },
    #[error("`stencil serve` did not end in {} s after SIGTERM", STOP_LIMIT.as_secs())]
    DoesNotEnd,
    #[error("`stencil serve` ended with {0} after SIGTERM; 0 was expected")]
    EndedBadly(ExitStatus),
    #[error("left behind when the server had ended: {}", .0.join("; "))]
    LeftBehind(Vec<String>),
}

/// A server, and the directory that is all its own.
#[derive(Debug)]
pub(crate) struct Server {
    stencil: PathBuf,
    options: Vec<OsString>,
    root: TempDir,
    log: Arc<Mutex<String>>,
    child: Option<Child>,
    _undone: UndoneOnInterrupt,
}

impl Server {
    /// Starts a server and waits until it answers.
    pub(crate) fn start(stencil: &Path) -> Result<Self, ServerError> {
        Self::start_with(stencil, Vec::new())
    }

    /// The same, with options of `stencil serve`.
    pub(crate) fn start_with(stencil: &Path, options: Vec<OsString>) -> Result<Self, ServerError> {
        Self::start_in(std::env::temp_dir(), stencil, options)
    }

    /// The same, in a directory of its own in `parent`.
    pub(crate) fn start_in(
        parent: PathBuf,
        stencil: &Path,
        options: Vec<OsString>,
    ) -> Result<Self, ServerError> {
        let mut server = Self::not_started(parent, stencil, options)?;
        server.start_again()?;
        Ok(server)
    }

    /// A second server, with the same options on a copy of this one's data directory.
    pub(crate) fn start_on_copy(&self) -> Result<Self, ServerError> {
        let mut server = Self::not_started(std::env::temp_dir(), &self.stencil, self.options.clone())?;
        let failed = |source| ServerError::Io {
            what: "copy",
            path: self.data(),
            source,
        };
        let copied = Command::new("cp")
            .arg("-a")
            .args([self.data(), server.data()])
            .status()
            .map_err(failed)?;
        if !copied.success() {
            return Err(failed(std::io::Error::other(format!("cp ended with {copied}"))));
        }
        server.start_again()?;
        Ok(server)
    }

    fn not_started(parent: PathBuf, stencil: &Path, options: Vec<OsString>) -> Result<Self, ServerError> {
        let root = tempfile::Builder::new()
            .prefix("stencil-")
            .tempdir_in(&parent)
            .map_err(|source| ServerError::Io {
                what: "make a directory in",
                path: parent,
                source,
            })?;
        let path = root.path().to_owned();
        let undone = UndoneOnInterrupt::by(move || {
            // The server first, or it would take notice of its VMMs' ends.
            processes::end_all_below(&path);
            let _ = std::fs::remove_dir_all(&path);
        });
        let log = Arc::new(Mutex::new(String::new()));
        Ok(Self {
            stencil: stencil.to_owned(),
            options,
            root,
            log,
            child: None,
            _undone: undone,
        })
    }

    /// Starts the server on the directory that it had before.
    pub(crate) fn start_again(&mut self) -> Result<(), ServerError> {
        let mut child = serve(&self.stencil, &self.data())
            .args(&self.options)
            // It can be found by its working directory, as its VMMs can.
            .current_dir(self.root.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| ServerError::Io {
                what: "run",
                path: self.stencil.clone(),
                source,
            })?;
        let lines = self.keep_log(&mut child);
        self.child = Some(child);
        self.wait_until_it_answers(&lines)
    }

    /// Each line of the server's log is kept, and is a moment at which it may have begun to listen.
    fn keep_log(&self, child: &mut Child) -> Receiver<()> {
        let (told, lines) = channel();
        let log = Arc::clone(&self.log);
        if let Some(stderr) = child.stderr.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
                    log.push_str(&line);
                    log.push('\n');
                    // Nobody listens any more once the server has answered.
                    let _ = told.send(());
                }
            });
        }
        lines
    }

    fn wait_until_it_answers(&mut self, lines: &Receiver<()>) -> Result<(), ServerError> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(())
                    if self
                        .client()
                        .get("/health")
                        .is_ok_and(|reply| reply.status == 200) =>
                {
                    return Ok(());
                }
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => return Err(ServerError::Silent { log: self.log_tail() }),
                Err(RecvTimeoutError::Disconnected) => {
                    let mut child = self.child.take().ok_or(ServerError::NotRunning)?;
                    let status = child.wait().map_err(|source| ServerError::Io {
                        what: "wait for",
                        path: self.stencil.clone(),
                        source,
                    })?;
                    return Err(ServerError::Ended {
                        status,
                        log: self.log_tail(),
                    });
                }
            }
        }
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.data().join("stencil.sock"))
    }

    /// The server's process.
    pub(crate) fn pid(&self) -> Result<Pid, ServerError> {
        self.child
            .as_ref()
            .map(Pid::from_child)
            .ok_or(ServerError::NotRunning)
    }

    /// The data directory.
    pub(crate) fn data(&self) -> PathBuf {
        self.root.path().join("data")
    }

    /// The directory of all instances.
    pub(crate) fn instances(&self) -> PathBuf {
        self.data().join("instances")
    }

    /// A directory beside the data, for what a scenario needs.
    pub(crate) fn scratch(&self) -> &Path {
        self.root.path()
    }

    /// The last lines of the server's log.
    pub(crate) fn log_tail(&self) -> String {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }

    /// Kills the server with SIGKILL; its VMs know nothing of it.
    pub(crate) fn kill9(&mut self) -> Result<(), ServerError> {
        let mut child = self.child.take().ok_or(ServerError::NotRunning)?;
        let failed = |source| ServerError::Io {
            what: "kill",
            path: self.stencil.clone(),
            source,
        };
        child.kill().map_err(failed)?;
        child.wait().map(drop).map_err(failed)
    }

    /// Asks the server to end and waits for it. Its VMs go on without it.
    pub(crate) fn terminate(&mut self) -> Result<(), ServerError> {
        let mut child = self.child.take().ok_or(ServerError::NotRunning)?;
        let pid = Pid::from_child(&child);
        let failed = |what| {
            move |source| ServerError::Process {
                what,
                pid: pid.as_raw_nonzero().get(),
                source,
            }
        };
        kill_process(pid, Signal::TERM).map_err(failed("signal"))?;
        if !processes::wait_for_end(pid, STOP_LIMIT).map_err(failed("wait for"))? {
            self.child = Some(child);
            self.kill9()?;
            return Err(ServerError::DoesNotEnd);
        }
        let status = child.wait().map_err(|source| ServerError::Io {
            what: "wait for",
            path: self.stencil.clone(),
            source,
        })?;
        if status.success() {
            Ok(())
        } else {
            Err(ServerError::EndedBadly(status))
        }
    }

    /// Ends a server whose instances have been deleted; whatever is still there is a failure.
    pub(crate) fn finish(mut self) -> Result<(), ServerError> {
        let left = self.left_behind();
        self.terminate()?;
        let mut left = if left.is_empty() { self.left_behind() } else { left };
        if self.data().join("stencil.sock").exists() {
            left.push("its socket".to_owned());
        }
        if left.is_empty() {
            Ok(())
        } else {
            Err(ServerError::LeftBehind(left))
        }
    }

    /// What there is of instances: processes, directories.
    pub(crate) fn left_behind(&self) -> Vec<String> {
        let processes = processes::working_below(&self.data()).into_iter();
        let processes =
            processes.map(|found| format!("process {} ({})", found.pid.as_raw_nonzero(), found.command));
        let directories = [self.instances(), self.data().join("templates")];
        let entries = directories
            .iter()
            .filter_map(|directory| std::fs::read_dir(directory).ok())
            .flatten()
            .flatten();
        processes
            .chain(entries.map(|entry| entry.path().display().to_string()))
            .collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.is_some() {
            // Only on the way out of a failure, which is the one to tell.
            let _ = self.kill9();
        }
        processes::end_all_below(self.root.path());
    }
}

/// The command of a server on a data directory.
pub(crate) fn serve(stencil: &Path, data: &Path) -> Command {
    let mut command = Command::new(stencil);
    command
        .arg("serve")
        .arg("--data")
        .arg(data)
        .stdin(Stdio::null())
        // Where whoever runs this has a server is no concern of this one.
        .env_remove("STENCIL_SOCKET")
        .env("RUST_LOG", "info");
    command
}
