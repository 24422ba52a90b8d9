//! The link to the agent in a guest: it tells each guest who it is in this epoch, and runs commands there.
//!
//! | module | role |
//! |---|---|
//! | `link` | one task for each VM that runs: connects, and connects again; moves bytes |
//! | `greeting` | one greeting and its answer, of an armed fork |
//! | `ask` | what sessions and operations ask of a link |
//! | `conversation` | what is said, and what is heard: a value that does no I/O |
//! | `session` | one command: its output, its input, its end |
//! | `standstill` | looks whether a guest still runs in which commands run |
//! | `run` | a command from its request to its result |
//!
//! The task owns the stream. It greets the guest under a nonce of its own, waits for the guest's greeting for as long as
//! the guest boots, and gives it the epoch: fresh random bytes, the time, a host name and a machine id. A guest that has
//! this epoch already (the server was started anew) is left alone. What has become of it is in [`AgentState`], and each
//! change is told to the instance's slot.
//!
//! A guest is a stranger: what it sends is bounded in memory by the window of each stream of a session, and the task
//! never waits for who reads. A command whose reader is gone is killed.

mod ask;
mod conversation;
mod greeting;
mod link;
mod run;
mod session;
mod standstill;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use stencil_agent::{Exec, SessionId};
use stencil_core::{EpochId, InstanceDir, InstanceId, VmGeneration};
use stencil_vmm::{Hypervisor, VmmProcess};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use self::ask::{Ask, NotOpened};
use crate::registry::Slot;

pub(crate) use self::greeting::greet;
pub use self::run::{Agent, Captured, ExecOutput, ExecRequest, MAX_CAPTURED};
pub use self::session::{ExecEvent, ExecEvents, ExecInput, ExecSession, Exited, SessionOver};

/// How many things can be asked of a link before it has looked at them.
const ASKS: usize = 32;
/// How long a guest may take to stop its processes before a snapshot. Then it is made all the same, and no forks of it. The
/// agent gives up earlier (1.5 s).
const FREEZE_LIMIT: Duration = Duration::from_secs(2);

/// What is known of the agent in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentState {
    /// Nobody in the guest has answered, or not since the connection was lost.
    Absent,
    /// It has answered, and has not acknowledged the epoch yet.
    Connected,
    /// The guest is the machine that it is to be; commands can be run.
    Ready,
    /// It could not do its part, as part of a sentence.
    Failed(String),
}

/// The handle of a link. Dropped, the link ends, and with it all sessions.
#[derive(Debug)]
pub(crate) struct AgentLink {
    asks: mpsc::Sender<Ask>,
    /// Sessions that nobody reads any more. There are not more of them than were opened.
    gone: mpsc::UnboundedSender<SessionId>,
    seen: watch::Receiver<Seen>,
    hurry: Arc<Notify>,
    thaw: Arc<link::Thaw>,
    sessions: AtomicU32,
    /// The guest has said that its users' processes are stopped, and was not asked since to let them go on.
    frozen: AtomicBool,
    task: AbortHandle,
}

/// What the task tells of its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    state: AgentState,
    /// The epoch was acknowledged, whatever became of the agent since.
    taken: bool,
}

/// Who a guest is to be in one epoch.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) epoch: EpochId,
    pub(crate) host_name: String,
    /// It makes the machine id.
    pub(crate) generation: VmGeneration,
}

impl AgentLink {
    /// Begins to talk to the agent of the VM that `process` runs in `dir`, and goes on for as long as the process lives. A guest
    /// that `is_new` runs, and has not been told its epoch; of others that has to be asked. `stream` leads to it, if somebody has
    /// connected already.
    pub(crate) fn begin(
        slot: &Arc<Slot>,
        hypervisor: Arc<dyn Hypervisor>,
        dir: InstanceDir,
        process: VmmProcess,
        identity: Identity,
        is_new: bool,
        stream: Option<UnixStream>,
    ) -> Self {
        let (asks, asked) = mpsc::channel(ASKS);
        let (gone, left) = mpsc::unbounded_channel();
        let (sees, seen) = watch::channel(Seen {
            state: AgentState::Absent,
            taken: false,
        });
        let hurry = Arc::new(Notify::new());
        let thaw = Arc::new(link::Thaw::default());
        let (busy, is_busy) = watch::channel(false);
        let (stands_still, still) = mpsc::channel(1);
        let watching = standstill::watch(Arc::clone(&hypervisor), dir.clone(), is_busy, stands_still);
        let link = link::Link {
            // The slot owns the link, not the other way round.
            slot: Arc::downgrade(slot),
            id: slot.id,
            hypervisor,
            dir,
            identity,
            is_new,
            stream,
            asked,
            left,
            sees,
            hurry: Arc::clone(&hurry),
            thaw: Arc::clone(&thaw),
            busy,
            still,
            failures: link::Failures::default(),
        };
        let kept = async move {
            tokio::select! {
                () = link.keep(process) => {}
                () = watching => {}
            }
        };
        let task = tokio::spawn(kept).abort_handle();
        Self {
            asks,
            gone,
            seen,
            hurry,
            thaw,
            sessions: AtomicU32::new(0),
            frozen: AtomicBool::new(false),
            task,
        }
    }

    pub(crate) fn state(&self) -> AgentState {
        self.seen.borrow().state.clone()
    }

    /// Whether the guest is the machine that it is to be.
    pub(crate) fn has_taken_epoch(&self) -> bool {
        self.seen.borrow().taken
    }

    /// Whether an agent has answered that it is one.
    pub(crate) fn was_heard(&self) -> bool {
        let seen = self.seen.borrow();
        seen.taken || matches!(seen.state, AgentState::Connected | AgentState::Ready)
    }

    /// Whether it cannot become that machine by itself any more.
    pub(crate) fn has_failed(&self) -> bool {
        matches!(self.seen.borrow().state, AgentState::Failed(_))
    }

    /// Waits for somebody in the guest to answer, for at most `limit`.
    async fn settled(&self, limit: Duration) -> AgentState {
        let mut seen = self.seen.clone();
        let settles = seen.wait_for(|seen| !matches!(seen.state, AgentState::Absent | AgentState::Connected));
        // That it did not settle, or that its VMM has ended, is seen below.
        let _ = timeout(limit, settles).await;
        self.state()
    }

    /// The guest may listen from now on: a connection that failed before is tried again at once.
    pub(crate) fn hurry(&self) {
        self.hurry.notify_one();
    }

    /// Has the guest stop its users' processes, for a bounded time; whether it said that it has. They go on in the next
    /// epoch, or by [`thaw`](Self::thaw).
    pub(crate) async fn freeze(&self, id: InstanceId) -> bool {
        if self.state() != AgentState::Ready {
            return false;
        }
        let (done, frozen) = oneshot::channel();
        let asked = async {
            self.asks.send(Ask::Freeze(done)).await.ok()?;
            frozen.await.ok()
        };
        match timeout(FREEZE_LIMIT, asked).await {
            Ok(Some(Ok(()))) => {
                self.frozen.store(true, Ordering::Relaxed);
                true
            }
            Ok(Some(Err(why))) => {
                tracing::warn!(instance = %id, why, "its processes could not be stopped before its VM");
                false
            }
            Ok(None) => false,
            Err(_elapsed) => {
                tracing::warn!(instance = %id, after = ?FREEZE_LIMIT, "its agent did not stop its processes before its VM");
                false
            }
        }
    }

    /// Whether the users' processes are stopped.
    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Relaxed)
    }

    /// Sets the guest's clock, and lets the users' processes go on in the same epoch, as soon as the guest runs.
    pub(crate) fn thaw(&self) {
        self.frozen.store(false, Ordering::Relaxed);
        self.thaw.ask();
    }

    /// Asks the guest to power itself off; whether there is somebody to hear it.
    pub(crate) async fn power_off(&self) -> bool {
        let is_there = matches!(self.state(), AgentState::Ready | AgentState::Connected);
        is_there && self.asks.send(Ask::PowerOff).await.is_ok()
    }

    async fn open(&self, exec: Exec) -> Result<ExecSession, NotOpened> {
        let id = SessionId(self.sessions.fetch_add(1, Ordering::Relaxed));
        // From here on it is ended when the caller goes away.
        let mut session = ExecSession::new(id, self.asks.clone(), self.gone.clone());
        let (opened, answer) = oneshot::channel();
        let lost = || NotOpened::Lost("its VM ended, or its agent was lost".to_owned());
        let ask = Ask::Exec {
            session: id,
            exec,
            shared: session.shared(),
            opened,
        };
        self.asks.send(ask).await.map_err(|_| lost())?;
        session.pid = answer.await.map_err(|_| lost())??;
        Ok(session)
    }
}

impl Drop for AgentLink {
    fn drop(&mut self) {
        self.task.abort();
    }
}
