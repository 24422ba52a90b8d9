//! One command in a guest: what it writes and how it ends, and what it is given to read.
//!
//! Between the link and who reads lies one buffer for each stream, of at most a window. The agent may send as much as
//! was granted; more is granted as the buffers are emptied.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use stencil_agent::{CHUNK, End, Output, SessionId, TtySize, WINDOW};
use tokio::sync::{Notify, Semaphore, mpsc};

use super::ask::Ask;

/// So much of a window is emptied before it is granted again: a grant is a message of its own.
const GRANT: u32 = WINDOW / 4;

/// A command that runs in a guest. When its `events` are dropped before its end, it is killed.
#[derive(Debug)]
pub struct ExecSession {
    /// Its process id in the guest.
    pub pid: u32,
    /// What it writes, and how it ends.
    pub events: ExecEvents,
    /// What it reads, and what is done to it.
    pub input: ExecInput,
}

/// Something that a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// It wrote.
    Output(Output, Bytes),
    /// It ended, and all that it wrote was told.
    Exited(Exited),
}

/// The end of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exited {
    /// How it ended.
    pub end: End,
    /// It was killed because its time was over.
    pub timed_out: bool,
    /// From before the agent forked until it knew of the end, on the guest's clock.
    pub took: Duration,
}

/// The command has ended, or the link to its guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the command has ended")]
pub struct SessionOver;

/// What link and reader share of a session.
#[derive(Debug)]
pub(super) struct Shared {
    received: Mutex<Received>,
    wake: Notify,
    /// How many bytes of standard input may be sent; closed when the session is over.
    credit: Semaphore,
}

#[derive(Debug, Default)]
struct Received {
    stdout: BytesMut,
    stderr: BytesMut,
    end: Option<Result<Exited, String>>,
}

impl Shared {
    pub(super) fn output(&self, stream: Output, bytes: &[u8]) {
        let mut received = self.received();
        let buffer = match stream {
            Output::Stdout => &mut received.stdout,
            Output::Stderr => &mut received.stderr,
        };
        buffer.extend_from_slice(bytes);
        self.wake.notify_one();
    }

    /// The session is over; of two ends the first counts.
    pub(super) fn end(&self, end: Result<Exited, String>) {
        self.received().end.get_or_insert(end);
        self.wake.notify_one();
        self.credit.close();
    }

    /// Nobody will take what is still here.
    pub(super) fn forget(&self) {
        let mut received = self.received();
        (received.stdout, received.stderr) = Default::default();
    }

    pub(super) fn grant_input(&self, bytes: u32) {
        self.credit.add_permits(bytes as usize);
    }

    fn take(&self) -> Option<Taken> {
        let mut received = self.received();
        let taken = [Output::Stdout, Output::Stderr].into_iter().find_map(|stream| {
            let buffer = match stream {
                Output::Stdout => &mut received.stdout,
                Output::Stderr => &mut received.stderr,
            };
            (!buffer.is_empty()).then(|| Taken::Output(stream, buffer.split().freeze()))
        });
        taken.or_else(|| received.end.take().map(Taken::End))
    }

    fn received(&self) -> MutexGuard<'_, Received> {
        // Nothing panics while it holds this lock.
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Taken {
    Output(Output, Bytes),
    End(Result<Exited, String>),
}

impl ExecSession {
    /// A session that is about to begin.
    pub(super) fn new(
        session: SessionId,
        asks: mpsc::Sender<Ask>,
        gone: mpsc::UnboundedSender<SessionId>,
    ) -> Self {
        let shared = Arc::new(Shared {
            received: Mutex::default(),
            wake: Notify::new(),
            credit: Semaphore::new(WINDOW as usize),
        });
        Self {
            pid: 0,
            events: ExecEvents {
                session,
                shared: Arc::clone(&shared),
                asks: asks.clone(),
                gone,
                emptied: [0; 2],
                is_over: false,
            },
            input: ExecInput {
                session,
                shared,
                asks,
            },
        }
    }

    pub(super) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.input.shared)
    }
}

/// What a command writes, and how it ends.
#[derive(Debug)]
pub struct ExecEvents {
    session: SessionId,
    shared: Arc<Shared>,
    asks: mpsc::Sender<Ask>,
    gone: mpsc::UnboundedSender<SessionId>,
    /// Bytes of each stream that were taken and not granted again.
    emptied: [u32; 2],
    is_over: bool,
}

impl ExecEvents {
    /// The next thing that the command does; `None` after its end. What it wrote comes in order for each stream. Nothing is
    /// lost when the future is dropped.
    ///
    /// # Errors
    /// Why the link to the guest was lost, as part of a sentence; what became of the command is not known.
    pub async fn next(&mut self) -> Option<Result<ExecEvent, String>> {
        if self.is_over {
            return None;
        }
        for (index, stream) in [Output::Stdout, Output::Stderr].into_iter().enumerate() {
            if self.emptied[index] >= GRANT {
                let credit = Ask::Credit {
                    session: self.session,
                    stream,
                    bytes: self.emptied[index],
                };
                // A link that is gone has ended the session, which is taken below.
                let _ = self.asks.send(credit).await;
                self.emptied[index] = 0;
            }
        }
        loop {
            match self.shared.take() {
                Some(Taken::Output(stream, bytes)) => {
                    // It is at most a window.
                    self.emptied[stream as usize] += u32::try_from(bytes.len()).unwrap_or(WINDOW);
                    return Some(Ok(ExecEvent::Output(stream, bytes)));
                }
                Some(Taken::End(end)) => {
                    self.is_over = true;
                    return Some(end.map(ExecEvent::Exited));
                }
                None => self.shared.wake.notified().await,
            }
        }
    }
}

impl Drop for ExecEvents {
    fn drop(&mut self) {
        if !self.is_over {
            // A link that is gone has no command that could be killed.
            let _ = self.gone.send(self.session);
        }
    }
}

/// What a command reads, and what is done to it. Dropping it closes nothing.
#[derive(Clone, Debug)]
pub struct ExecInput {
    session: SessionId,
    shared: Arc<Shared>,
    asks: mpsc::Sender<Ask>,
}

impl ExecInput {
    /// Gives the command bytes to read; waits while it has enough unread.
    ///
    /// # Errors
    /// [`SessionOver`].
    pub async fn write(&self, bytes: &[u8]) -> Result<(), SessionOver> {
        let session = self.session;
        for chunk in bytes.chunks(CHUNK) {
            // A chunk is far less than 4 GiB.
            let credit = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
            let granted = self.shared.credit.acquire_many(credit).await;
            granted.map_err(|_closed| SessionOver)?.forget();
            let bytes = chunk.to_vec();
            self.ask(Ask::Stdin { session, bytes }).await?;
        }
        Ok(())
    }

    /// The command's standard input ends here.
    ///
    /// # Errors
    /// [`SessionOver`].
    pub async fn close(&self) -> Result<(), SessionOver> {
        let session = self.session;
        self.ask(Ask::StdinClosed { session }).await
    }

    /// The command's terminal has another size.
    ///
    /// # Errors
    /// [`SessionOver`].
    pub async fn resize(&self, size: TtySize) -> Result<(), SessionOver> {
        let session = self.session;
        self.ask(Ask::Resize { session, size }).await
    }

    /// Sends a signal, by its number on x86-64 Linux, to the command's process group.
    ///
    /// # Errors
    /// [`SessionOver`].
    pub async fn signal(&self, signal: u8) -> Result<(), SessionOver> {
        let session = self.session;
        self.ask(Ask::Signal { session, signal }).await
    }

    async fn ask(&self, ask: Ask) -> Result<(), SessionOver> {
        self.asks.send(ask).await.map_err(|_gone| SessionOver)
    }
}
