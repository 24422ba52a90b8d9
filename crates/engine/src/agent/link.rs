//! The task of one link: connects to the agent, moves bytes, and connects again, for as long as the VMM lives.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use stencil_agent::{Decoder, SessionId, ToHost};
use stencil_core::{InstanceDir, InstanceId, error_chain};
use stencil_vmm::{Hypervisor, VmmProcess};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

use super::ask::Ask;
use super::conversation::Conversation;
use super::{AgentState, Identity, Seen};
use crate::registry::Slot;

/// Bytes that are read from a stream at a time.
const READ: usize = 64 << 10;
/// While so many bytes wait to be sent, nothing is taken from who asks.
const MUCH_UNSENT: usize = 128 << 10;
/// While so many do, nothing is read either: only a guest that floods and does not read brings it there.
const TOO_MUCH_UNSENT: usize = 1 << 20;
/// So many bytes without a frame in them, and the guest has something else on that port.
const NOISE: usize = 1 << 20;

/// How soon a connection is tried again, at first and at most while a guest may be booting.
const AGAIN: Duration = Duration::from_millis(20);
const AGAIN_AT_MOST: Duration = Duration::from_millis(500);
/// How long a guest may be booting.
const BOOTING: Duration = Duration::from_secs(60);
/// How often a failure of one agent is written to the log at most.
const BETWEEN_FAILURES: Duration = Duration::from_secs(10);
/// How soon it is tried later, and where a guest was heard that speaks something else.
const AGAIN_LATER: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Link {
    pub(super) slot: Weak<Slot>,
    pub(super) id: InstanceId,
    pub(super) hypervisor: Arc<dyn Hypervisor>,
    pub(super) dir: InstanceDir,
    pub(super) identity: Identity,
    /// The guest runs and has not been told its epoch.
    pub(super) is_new: bool,
    /// A connection that is there already.
    pub(super) stream: Option<UnixStream>,
    pub(super) asked: mpsc::Receiver<Ask>,
    pub(super) left: mpsc::UnboundedReceiver<SessionId>,
    pub(super) sees: watch::Sender<Seen>,
    pub(super) hurry: Arc<Notify>,
    pub(super) thaw: Arc<Thaw>,
    /// Whether somebody waits for a command.
    pub(super) busy: watch::Sender<bool>,
    /// Why the guest does not run, although somebody waits.
    pub(super) still: mpsc::Receiver<String>,
    pub(super) failures: Failures,
}

/// When a failure of an agent was last written to the log. A guest can fail as often as it likes.
#[derive(Debug, Default)]
pub(super) struct Failures {
    told: Option<Instant>,
    untold: u64,
}

impl Failures {
    /// How many were not told before this one, which is to be; `None` where it is not.
    fn next(&mut self, now: Instant) -> Option<u64> {
        if self.told.is_some_and(|told| now - told < BETWEEN_FAILURES) {
            self.untold += 1;
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

/// That a guest stood still: it is to be told the time, and its users' processes are to go on. Who asks for it never waits: what is asked for later is done later.
#[derive(Debug, Default)]
pub(super) struct Thaw {
    is_wanted: AtomicBool,
    told: Notify,
}

impl Thaw {
    pub(super) fn ask(&self) {
        self.is_wanted.store(true, Ordering::Release);
        self.told.notify_one();
    }

    fn take(&self) -> bool {
        self.is_wanted.swap(false, Ordering::AcqRel)
    }
}

/// Why a conversation ended.
#[derive(Debug)]
enum Ended {
    Closed,
    Broken(io::Error),
    Noise,
}

impl Link {
    pub(super) async fn keep(mut self, process: VmmProcess) {
        tokio::select! {
            _exit = process.exited() => self.see(AgentState::Absent),
            () = self.connect_again_and_again() => {}
        }
    }

    async fn connect_again_and_again(&mut self) {
        let began = Instant::now();
        let mut wait = AGAIN;
        loop {
            let connected = match self.stream.take() {
                Some(stream) => Ok(stream),
                None => self.hypervisor.connect_agent(&self.dir).await,
            };
            match connected {
                Ok(stream) => {
                    let was_heard = self.converse(stream).await;
                    if was_heard {
                        wait = AGAIN;
                    }
                }
                Err(error) => {
                    tracing::trace!(instance = %self.id, error = error_chain(&error), "no way to the agent yet");
                }
            }
            let failed = matches!(self.sees.borrow().state, AgentState::Failed(_));
            let limit = if failed || began.elapsed() > BOOTING {
                AGAIN_LATER
            } else {
                AGAIN_AT_MOST
            };
            let again = Instant::now() + if failed { limit } else { wait };
            wait = (2 * wait).min(limit);
            self.wait_until(again).await;
        }
    }

    /// Waits to be told to hurry, at most until `again`. What is asked meanwhile has nobody to do it.
    async fn wait_until(&mut self, again: Instant) {
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(again) => return,
                () = self.hurry.notified() => return,
                // Dropped, it tells who asked that the link is lost.
                Some(_ask) = self.asked.recv() => {}
                Some(_session) = self.left.recv() => {}
            }
        }
    }

    /// Talks until the stream ends; whether the guest was heard.
    async fn converse(&mut self, stream: UnixStream) -> bool {
        let identity = self.identity.clone();
        let mut conversation = if std::mem::take(&mut self.is_new) {
            Conversation::with_new_guest(identity)
        } else {
            Conversation::new(identity)
        };
        let ended = self.move_bytes(stream, &mut conversation).await;
        let was_heard = !matches!(conversation.state(), AgentState::Absent);
        match ended {
            Ended::Closed => tracing::debug!(instance = %self.id, "the stream to the agent ended"),
            Ended::Broken(error) => {
                tracing::debug!(instance = %self.id, error = error_chain(&error), "the stream to the agent broke");
            }
            Ended::Noise => {
                conversation.lose_sessions("its agent spoke nonsense");
                self.see(AgentState::Failed(
                    "what answers in the guest does not speak the agent's protocol".to_owned(),
                ));
                return was_heard;
            }
        }
        conversation.lose_sessions("the stream to its agent ended");
        self.see(AgentState::Absent);
        was_heard
    }

    async fn move_bytes(&mut self, mut stream: UnixStream, conversation: &mut Conversation) -> Ended {
        let (mut reader, mut writer) = stream.split();
        let mut decoder = Decoder::<ToHost>::new();
        let mut chunk = vec![0; READ];
        let mut noise = 0;
        loop {
            let unsent = conversation.unsent.len();
            tokio::select! {
                read = reader.read(&mut chunk), if unsent < TOO_MUCH_UNSENT => {
                    let read = match read {
                        Ok(0) => return Ended::Closed,
                        Ok(read) => read,
                        Err(error) => return Ended::Broken(error),
                    };
                    noise += read;
                    let mut unread = &chunk[..read];
                    while let Some(found) = decoder.next(&mut unread) {
                        if found.is_ok() {
                            noise = 0;
                        }
                        conversation.hear(found);
                    }
                    if noise > NOISE {
                        return Ended::Noise;
                    }
                }
                written = writer.write(&conversation.unsent), if unsent > 0 => match written {
                    Ok(written) => drop(conversation.unsent.drain(..written)),
                    Err(error) => return Ended::Broken(error),
                },
                Some(ask) = self.asked.recv(), if unsent < MUCH_UNSENT => {
                    if self.thaw.take() {
                        conversation.tell_epoch();
                    }
                    conversation.ask(ask);
                }
                () = self.thaw.told.notified() => if self.thaw.take() {
                    conversation.tell_epoch();
                },
                Some(session) = self.left.recv() => conversation.abandon(session),
                Some(why) = self.still.recv() => conversation.stand_still(&why),
            }
            let is_busy = conversation.is_busy();
            self.busy
                .send_if_modified(|was| std::mem::replace(was, is_busy) != is_busy);
            self.see(conversation.state().clone());
        }
    }

    /// Tells what is known of the agent, if it is something else than before.
    fn see(&mut self, state: AgentState) {
        let changed = self.sees.send_if_modified(|seen| {
            let changed = seen.state != state;
            seen.taken |= state == AgentState::Ready;
            seen.state.clone_from(&state);
            changed
        });
        if !changed {
            return;
        }
        match &state {
            AgentState::Failed(why) => {
                if let Some(not_told) = self.failures.next(Instant::now()) {
                    tracing::warn!(instance = %self.id, why, not_told, "its agent failed");
                }
            }
            state => tracing::debug!(instance = %self.id, ?state, "its agent"),
        }
        if let Some(slot) = self.slot.upgrade() {
            slot.tell();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_an_agent_are_told_at_a_bounded_rate_with_their_number() {
        let mut failures = Failures::default();
        let begin = Instant::now();
        let told: Vec<u64> = (0..10_000).filter_map(|_| failures.next(begin)).collect();
        assert_eq!(told, [0]);
        let later = begin + BETWEEN_FAILURES;
        assert_eq!((failures.next(later), failures.next(later)), (Some(9_999), None));
    }
}
