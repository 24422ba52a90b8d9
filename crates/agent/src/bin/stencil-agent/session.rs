//! A command that runs: its streams within their credit, its time, its end.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitStatus};
use stencil_agent::{CHUNK, End, Exec, Output, TtySize, WINDOW};

use crate::cgroups;
use crate::command::{self, Begun};

/// What a terminal takes for the end of input: Ctrl-D.
const END_OF_INPUT: u8 = 4;

#[derive(Debug)]
pub(crate) struct Session {
    pid: Pid,
    cgroup: Option<PathBuf>,
    started: Instant,
    deadline: Option<Instant>,
    timed_out: bool,
    input: Option<Input>,
    /// How much input was taken that the host was not told of.
    taken: usize,
    stdout: Option<Source>,
    stderr: Option<Source>,
    is_tty: bool,
    /// How the command ended, and when.
    end: Option<(End, Duration)>,
}

/// What goes into the command.
#[derive(Debug)]
struct Input {
    stream: OwnedFd,
    /// At most a window.
    buffer: VecDeque<u8>,
    /// Nothing follows the buffer.
    closed: bool,
}

/// What comes out of it.
#[derive(Debug)]
struct Source {
    stream: OwnedFd,
    credit: u64,
    /// The command has ended: so much of what it wrote is left. Children that it left behind may go on writing.
    left: Option<u64>,
}

/// The host sent more input than it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BeyondCredit;

/// How a session ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) end: End,
    pub(crate) timed_out: bool,
    pub(crate) took: Duration,
}

impl Session {
    pub(crate) fn new(exec: &Exec, begun: Begun, cgroup: Option<PathBuf>) -> Self {
        let source = |stream| Source {
            stream,
            credit: WINDOW.into(),
            left: None,
        };
        Self {
            pid: begun.pid,
            cgroup,
            started: begun.started,
            // A time beyond what the clock can say is no limit.
            deadline: exec
                .timeout
                .and_then(|timeout| begun.started.checked_add(timeout)),
            timed_out: false,
            input: begun.stdin.map(|stream| Input {
                stream,
                buffer: VecDeque::new(),
                closed: false,
            }),
            taken: 0,
            stdout: begun.stdout.map(source),
            stderr: begun.stderr.map(source),
            is_tty: begun.is_tty,
            end: None,
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// When its time is over, while that matters.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline.filter(|_| self.end.is_none())
    }

    /// Gives up its cgroup.
    pub(crate) fn into_cgroup(self) -> Option<PathBuf> {
        self.cgroup
    }

    fn source(&mut self, stream: Output) -> &mut Option<Source> {
        match stream {
            Output::Stdout => &mut self.stdout,
            Output::Stderr => &mut self.stderr,
        }
    }

    /// Where output can come from now.
    pub(crate) fn readable(&self) -> impl Iterator<Item = (Output, BorrowedFd<'_>)> {
        let sources = [(Output::Stdout, &self.stdout), (Output::Stderr, &self.stderr)];
        sources.into_iter().filter_map(|(stream, source)| {
            let source = source.as_ref().filter(|source| source.credit > 0)?;
            Some((stream, source.stream.as_fd()))
        })
    }

    /// Where input waits to be taken.
    pub(crate) fn writable(&self) -> Option<BorrowedFd<'_>> {
        let input = self.input.as_ref().filter(|input| !input.buffer.is_empty())?;
        Some(input.stream.as_fd())
    }

    /// The host lets more output come.
    pub(crate) fn grant(&mut self, stream: Output, bytes: u32) {
        if let Some(source) = self.source(stream) {
            source.credit = source.credit.saturating_add(bytes.into());
        }
    }

    /// Some of what the command wrote, within its credit; nothing if there is none now.
    pub(crate) fn read(&mut self, stream: Output) -> Option<Vec<u8>> {
        let is_running = self.is_running();
        let slot = self.source(stream);
        let source = slot.as_mut()?;
        if source.left == Some(0) {
            *slot = None;
            return None;
        }
        let limit = source.credit.min(source.left.unwrap_or(u64::MAX));
        let limit = usize::try_from(limit).map_or(CHUNK, |limit| limit.min(CHUNK));
        if limit == 0 {
            return None;
        }
        let mut bytes = vec![0; limit];
        match rustix::io::read(&source.stream, &mut bytes[..]) {
            Ok(length) if length > 0 => {
                bytes.truncate(length);
                source.credit -= length as u64;
                if let Some(left) = &mut source.left {
                    *left -= length as u64;
                }
                return Some(bytes);
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if is_running => {}
            // Its end. That of a terminal is an error, EIO.
            _ => *slot = None,
        }
        None
    }

    /// Takes input for the command.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<(), BeyondCredit> {
        let waiting = self.input.as_ref().map_or(0, |input| input.buffer.len());
        if waiting + self.taken + bytes.len() > WINDOW as usize {
            return Err(BeyondCredit);
        }
        match &mut self.input {
            Some(input) if !input.closed => input.buffer.extend(bytes),
            // Nobody reads it.
            _ => self.taken += bytes.len(),
        }
        self.write();
        Ok(())
    }

    /// The input ends here.
    pub(crate) fn close_input(&mut self) {
        if let Some(input) = &mut self.input {
            if self.is_tty && !input.closed {
                input.buffer.push_back(END_OF_INPUT);
            }
            input.closed = true;
        }
        self.write();
    }

    /// Gives the command what it takes now.
    pub(crate) fn write(&mut self) {
        let Some(input) = &mut self.input else {
            return;
        };
        while !input.buffer.is_empty() {
            match rustix::io::write(&input.stream, input.buffer.as_slices().0) {
                Ok(length) => {
                    input.buffer.drain(..length);
                    self.taken += length;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // Nobody reads it any more.
                Err(_) => {
                    self.taken += input.buffer.len();
                    self.input = None;
                    return;
                }
            }
        }
        if input.closed && !self.is_tty {
            self.input = None;
        }
    }

    /// How much input was taken since the last time, if it is worth telling.
    pub(crate) fn taken(&mut self) -> Option<u32> {
        let is_worth = self.taken > WINDOW as usize / 4 || self.writable().is_none();
        let taken = u32::try_from(self.taken)
            .ok()
            .filter(|taken| is_worth && *taken > 0)?;
        self.taken = 0;
        Some(taken)
    }

    /// Tells its terminal another size.
    pub(crate) fn resize(&self, size: TtySize) {
        if let (true, Some(terminal)) = (self.is_tty, &self.stdout) {
            // A terminal that has just been hung up has no size.
            let _ = command::resize(&terminal.stream, size);
        }
    }

    /// Sends a signal to the command's process group.
    pub(crate) fn signal(&self, number: u8) {
        // A command that has ended has no process group of which we know that it is still this one.
        if let (None, Some(signal)) = (self.end, Signal::from_named_raw(number.into())) {
            let _ = rustix::process::kill_process_group(self.pid, signal);
        }
    }

    /// Kills all of its processes.
    pub(crate) fn kill(&self) {
        let killed = self.cgroup.as_deref().map(cgroups::kill);
        if !matches!(killed, Some(Ok(()))) {
            self.signal(libc::SIGKILL.unsigned_abs().to_le_bytes()[0]);
        }
    }

    /// Kills it if its time is over.
    pub(crate) fn check_time(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.deadline = None;
            self.timed_out = true;
            self.kill();
        }
    }

    /// The command has ended; what it wrote may still have to be read.
    pub(crate) fn ended(&mut self, status: WaitStatus) {
        let byte = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
        let end = match status.terminating_signal() {
            Some(signal) => End::Signal(byte(signal)),
            None => End::Code(status.exit_status().map_or(u8::MAX, byte)),
        };
        self.end = Some((end, self.started.elapsed()));
        self.input = None;
        if !self.is_tty {
            for source in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
                source.left = rustix::io::ioctl_fionread(&source.stream).ok();
            }
        }
    }

    /// Whether the command has not ended yet.
    pub(crate) fn is_running(&self) -> bool {
        self.end.is_none()
    }

    /// How it ended, when all that it wrote was read.
    pub(crate) fn is_over(&self) -> Option<Ended> {
        let (end, took) = self.end?;
        let is_read = self.stdout.is_none() && self.stderr.is_none();
        is_read.then_some(Ended {
            end,
            timed_out: self.timed_out,
            took,
        })
    }
}
