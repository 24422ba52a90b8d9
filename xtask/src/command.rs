//! Runs a program within a time limit, with its output shown as it comes and kept.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::interrupt::UndoneOnInterrupt;
use crate::processes;

/// How long a program that was asked to end may take to end its own children.
const GRACE: Duration = Duration::from_secs(10);

/// A program could not be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    #[error("could not run `{program}`")]
    Run {
        program: String,
        #[source]
        source: std::io::Error,
    },
}

/// What became of a program.
#[derive(Debug)]
pub(crate) struct Finished {
    /// `None` if it was ended because its time was over.
    pub(crate) status: Option<ExitStatus>,
    /// What it printed, on both streams; the lines of the one may come between those of the other.
    pub(crate) output: String,
    pub(crate) took: Duration,
}

impl Finished {
    pub(crate) fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }
}

/// Whether a program's lines are shown while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Shown,
    Kept,
}

/// Runs the program until it ends or `limit` has passed; then it and what it started are ended.
pub(crate) fn run(command: &mut Command, limit: Duration, output: Output) -> Result<Finished, CommandError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |source| CommandError::Run {
        program: program.clone(),
        source,
    };
    let began = Instant::now();
    // A group of its own: at the end of its time, all of it goes.
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let (lines, received) = channel();
    let readers = [
        child
            .stdout
            .take()
            .map(|stream| read_lines(stream, lines.clone(), output)),
        child
            .stderr
            .take()
            .map(|stream| read_lines(stream, lines, output)),
    ];
    let group = Pid::from_child(&child);
    let _undone = UndoneOnInterrupt::by(move || {
        // In a group of its own it does not hear the terminal's Ctrl-C.
        let _ = kill_process_group(group, Signal::TERM);
    });
    let in_time = processes::wait_for_end(group, limit).map_err(|source| failed(source.into()))?;
    if !in_time {
        // It may end between the two; a group that is gone needs no signal.
        let _ = kill_process_group(group, Signal::TERM);
        if !processes::wait_for_end(group, GRACE).map_err(|source| failed(source.into()))? {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
    let status = child.wait().map_err(failed)?;
    // What it left running would keep the streams open, and is not to stay anyway.
    let _ = kill_process_group(group, Signal::KILL);
    for reader in readers.into_iter().flatten() {
        // A reader only ends early by a panic of printing, when nobody reads our own output.
        let _ = reader.join();
    }
    Ok(Finished {
        status: in_time.then_some(status),
        output: received.try_iter().collect(),
        took: began.elapsed(),
    })
}

fn read_lines(
    stream: impl Read + Send + 'static,
    lines: Sender<String>,
    output: Output,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut bytes = Vec::new();
        while stream.read_until(b'\n', &mut bytes).is_ok_and(|read| read > 0) {
            let line = String::from_utf8_lossy(&bytes).into_owned();
            bytes.clear();
            if output == Output::Shown {
                let mut stdout = std::io::stdout().lock();
                // Our reader may be gone; the program's result is still wanted.
                let _ = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush());
            }
            if lines.send(line).is_err() {
                return;
            }
        }
    })
}
