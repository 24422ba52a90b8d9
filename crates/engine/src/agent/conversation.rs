//! What is said to an agent, and what is heard: frames and questions go in, bytes to send and the agent's state come out.
//! It does no I/O, and waits for nobody.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::rand::{GetRandomFlags, getrandom};
use stencil_agent::{
    Entropy, Epoch, EpochId, Exec, ExecError, Frame, FrameError, MAX_SESSIONS, Nonce, Output, SessionId,
    ToGuest, ToHost, VERSION, WINDOW, encode,
};
use tokio::sync::oneshot;

use super::ask::{Ask, NotOpened};
use super::session::{Exited, Shared};
use super::{AgentState, Identity};

/// SIGKILL on x86-64 Linux.
const SIGKILL: u8 = 9;
/// The most characters of a reason that a guest gives.
const LONGEST_WHY: usize = 1000;

/// A session that is not over.
#[derive(Debug)]
struct Session {
    /// Told once, when the command runs or does not.
    opened: Option<oneshot::Sender<Result<u32, NotOpened>>>,
    shared: Arc<Shared>,
    /// How many bytes of each output may still come.
    window: [u32; 2],
    /// How many bytes of input were sent and not granted again.
    unread_input: u32,
    /// Nobody reads it; it was killed.
    abandoned: bool,
}

/// One conversation with an agent, from the greeting to the end of the stream.
#[derive(Debug)]
pub(super) struct Conversation {
    identity: Identity,
    nonce: Nonce,
    state: AgentState,
    /// The guest has answered the greeting.
    greeted: bool,
    /// It was told the epoch together with the greeting.
    told_at_once: bool,
    sessions: HashMap<SessionId, Session>,
    /// Who waits for the answers to freezes, in the order in which they were asked for. Some may have gone on without.
    freezing: VecDeque<oneshot::Sender<Result<(), String>>>,
    /// To be sent.
    pub(super) unsent: Vec<u8>,
}

impl Conversation {
    /// A conversation that begins with the host's greeting.
    pub(super) fn new(identity: Identity) -> Self {
        let mut conversation = Self {
            identity,
            nonce: Nonce::NONE,
            state: AgentState::Absent,
            greeted: false,
            told_at_once: false,
            sessions: HashMap::new(),
            freezing: VecDeque::new(),
            unsent: Vec::new(),
        };
        conversation.greet();
        conversation
    }

    /// The same with a guest that runs, and certainly has not taken the epoch: it is told the epoch at once, which saves it a
    /// turn.
    pub(super) fn with_new_guest(identity: Identity) -> Self {
        let mut conversation = Self::new(identity);
        conversation.tell_epoch();
        conversation.told_at_once = true;
        conversation
    }

    pub(super) fn state(&self) -> &AgentState {
        &self.state
    }

    fn greet(&mut self) {
        self.nonce = Nonce::new(rand::random::<NonZeroU64>());
        self.greeted = false;
        self.told_at_once = false;
        self.say(&ToGuest::Hello);
    }

    /// What is small enough for a frame in any case.
    fn say(&mut self, message: &ToGuest) {
        let fits = encode(self.nonce, message, &mut self.unsent);
        debug_assert!(fits.is_ok(), "{message:?}");
    }

    /// Takes in what the decoder found.
    pub(super) fn hear(&mut self, found: Result<Frame<ToHost>, FrameError>) {
        match found {
            Ok(frame) if frame.nonce == self.nonce => self.answered(frame.message),
            // An agent that was just started knows of no conversation.
            Ok(Frame {
                nonce: Nonce::NONE,
                message: ToHost::Hello { .. },
            }) => {
                self.lose_sessions("its agent was started anew");
                self.state = AgentState::Connected;
                self.greet();
            }
            // Of another conversation: its template's, or an earlier server's.
            Ok(_) => {}
            Err(FrameError::Version(version)) if !self.greeted => {
                self.state = AgentState::Failed(format!(
                    "it speaks version {version} of the protocol and this server speaks {VERSION}"
                ));
            }
            // The rest of something that was cut off, or noise.
            Err(_) => {}
        }
    }

    fn answered(&mut self, message: ToHost) {
        match message {
            ToHost::Hello { epoch, frozen } if !self.greeted => {
                self.greeted = true;
                if epoch == Some(self.epoch()) && !frozen {
                    self.state = AgentState::Ready;
                } else {
                    self.state = AgentState::Connected;
                    if !self.told_at_once {
                        self.tell_epoch();
                    }
                }
            }
            ToHost::EpochTaken { id } if id == self.epoch() => self.state = AgentState::Ready,
            ToHost::EpochFailed { id, why } if id == self.epoch() => {
                let why = bounded(&why);
                self.state = AgentState::Failed(format!("the guest could not become a new machine: {why}"));
            }
            ToHost::Frozen => self.frozen(Ok(())),
            ToHost::FreezeFailed { why } => self.frozen(Err(bounded(&why))),
            ToHost::Started { session, pid } => self.started(session, pid),
            ToHost::ExecFailed { session, error, why } => {
                if let Some(session) = self.sessions.remove(&session) {
                    session.end_unopened(NotOpened::Refused(error, bounded(&why)));
                }
            }
            ToHost::Output {
                session,
                stream,
                bytes,
            } => self.output(session, stream, &bytes),
            ToHost::StdinCredit { session, bytes } => {
                if let Some(session) = self.sessions.get_mut(&session) {
                    // No more than it was sent.
                    let bytes = bytes.min(session.unread_input);
                    session.unread_input -= bytes;
                    session.shared.grant_input(bytes);
                }
            }
            ToHost::Exited {
                session,
                end,
                timed_out,
                took,
            } => {
                if let Some(session) = self.sessions.remove(&session) {
                    session.end(Ok(Exited { end, timed_out, took }));
                }
            }
            ToHost::Hello { .. } | ToHost::EpochTaken { .. } | ToHost::EpochFailed { .. } => {}
        }
    }

    fn epoch(&self) -> EpochId {
        EpochId(*self.identity.epoch.as_bytes())
    }

    /// Tells the guest who it is; its users' processes go on with that.
    pub(super) fn tell_epoch(&mut self) {
        let mut entropy = [0; 64];
        // So many bytes come whole (getrandom(2)).
        if let Err(error) = getrandom(&mut entropy, GetRandomFlags::empty()) {
            self.state = AgentState::Failed(format!("this host has no random bytes for it: {error}"));
            return;
        }
        let epoch = Epoch {
            id: self.epoch(),
            entropy: Entropy(entropy),
            wall_clock: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            host_name: self.identity.host_name.clone(),
            machine_id: *self.identity.generation.as_bytes(),
        };
        self.say(&ToGuest::Epoch(epoch));
    }

    fn frozen(&mut self, result: Result<(), String>) {
        if let Some(freezing) = self.freezing.pop_front() {
            // Who asked may have gone on without it.
            let _ = freezing.send(result);
        }
    }

    fn started(&mut self, id: SessionId, pid: u32) {
        let opened = self
            .sessions
            .get_mut(&id)
            .and_then(|session| session.opened.take());
        if let Some(opened) = opened {
            // Who asked may be gone; then the session is abandoned.
            let _ = opened.send(Ok(pid));
        }
    }

    fn output(&mut self, id: SessionId, stream: Output, bytes: &[u8]) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        if session.abandoned {
            let credit = ToGuest::Credit {
                session: id,
                stream,
                bytes: length,
            };
            self.say(&credit);
        } else if let Some(left) = session.window[stream as usize].checked_sub(length) {
            session.window[stream as usize] = left;
            session.shared.output(stream, bytes);
        } else {
            session
                .shared
                .end(Err("its agent sent more than it was granted".to_owned()));
            self.abandon(id);
        }
    }

    /// Nobody reads the session any more: its command is killed, and what it still writes is thrown away, so that it can end.
    pub(super) fn abandon(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        session.abandoned = true;
        session.shared.forget();
        let unread = session.window.map(|left| WINDOW - left);
        self.say(&ToGuest::Signal {
            session: id,
            signal: SIGKILL,
        });
        for (stream, bytes) in [Output::Stdout, Output::Stderr].into_iter().zip(unread) {
            if bytes > 0 {
                let session = id;
                self.say(&ToGuest::Credit {
                    session,
                    stream,
                    bytes,
                });
            }
        }
    }

    /// Does what is asked, or passes it on. What is asked of a session that is over has come too late.
    pub(super) fn ask(&mut self, ask: Ask) {
        match ask {
            Ask::Exec {
                session,
                exec,
                shared,
                opened,
            } => self.exec(session, exec, shared, opened),
            Ask::Stdin { session, bytes } => {
                if let Some(of) = self.sessions.get_mut(&session) {
                    of.unread_input += u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                    self.say(&ToGuest::Stdin { session, bytes });
                }
            }
            Ask::Credit {
                session,
                stream,
                bytes,
            } => {
                // An abandoned one was granted all of it.
                if let Some(of) = self.sessions.get_mut(&session).filter(|of| !of.abandoned) {
                    of.window[stream as usize] += bytes;
                    self.say(&ToGuest::Credit {
                        session,
                        stream,
                        bytes,
                    });
                }
            }
            Ask::StdinClosed { session } => self.say_of(session, &ToGuest::StdinClosed { session }),
            Ask::Resize { session, size } => self.say_of(session, &ToGuest::Resize { session, size }),
            Ask::Signal { session, signal } => self.say_of(session, &ToGuest::Signal { session, signal }),
            // Nobody would thaw it.
            Ask::Freeze(done) if done.is_closed() => {}
            Ask::Freeze(done) => {
                self.freezing.push_back(done);
                self.say(&ToGuest::Freeze);
            }
            Ask::PowerOff => self.say(&ToGuest::PowerOff),
        }
    }

    fn say_of(&mut self, session: SessionId, message: &ToGuest) {
        if self.sessions.contains_key(&session) {
            self.say(message);
        }
    }

    fn exec(
        &mut self,
        id: SessionId,
        exec: Exec,
        shared: Arc<Shared>,
        opened: oneshot::Sender<Result<u32, NotOpened>>,
    ) {
        // Who asked has gone already, and nobody would end the session.
        if opened.is_closed() {
            return;
        }
        // A guest that ends none would have this server keep more and more of them.
        if self.sessions.len() >= MAX_SESSIONS {
            let why = format!("{MAX_SESSIONS} commands have not ended yet");
            let _ = opened.send(Err(NotOpened::Refused(ExecError::TooManySessions, why)));
            return;
        }
        let exec = ToGuest::Exec { session: id, exec };
        if encode(self.nonce, &exec, &mut self.unsent).is_err() {
            // Who asked may be gone.
            let _ = opened.send(Err(NotOpened::TooLarge));
            return;
        }
        let session = Session {
            opened: Some(opened),
            shared,
            window: [WINDOW; 2],
            unread_input: 0,
            abandoned: false,
        };
        self.sessions.insert(id, session);
    }

    /// Whether somebody waits for a command.
    pub(super) fn is_busy(&self) -> bool {
        self.sessions.values().any(|session| !session.abandoned)
    }

    /// The guest does not run. All sessions are over for those who wait; their commands are killed as soon as it runs again.
    pub(super) fn stand_still(&mut self, why: &str) {
        let waiting = self.sessions.iter_mut().filter(|(_, session)| !session.abandoned);
        let mut over = Vec::new();
        for (id, session) in waiting {
            match session.opened.take() {
                // Who asked may be gone.
                Some(opened) => drop(opened.send(Err(NotOpened::Lost(why.to_owned())))),
                None => session.shared.end(Err(why.to_owned())),
            }
            over.push(*id);
        }
        for id in over {
            self.abandon(id);
        }
    }

    /// All sessions are over; why, as part of a sentence.
    pub(super) fn lose_sessions(&mut self, why: &str) {
        for (_, session) in self.sessions.drain() {
            session.end(Err(why.to_owned()));
        }
        self.freezing.clear();
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.lose_sessions("its VM ended or was put on standby");
    }
}

impl Session {
    fn end(self, end: Result<Exited, String>) {
        match (self.opened, end) {
            (Some(opened), Err(why)) => drop(opened.send(Err(NotOpened::Lost(why)))),
            (Some(opened), Ok(_)) => {
                let why = "its agent told of the end of a command that it had not begun";
                drop(opened.send(Err(NotOpened::Lost(why.to_owned()))));
            }
            (None, end) => self.shared.end(end),
        }
    }

    fn end_unopened(self, why: NotOpened) {
        if let Some(opened) = self.opened {
            // Who asked may be gone.
            let _ = opened.send(Err(why));
        } else {
            self.shared
                .end(Err("its agent took back that the command had begun".to_owned()));
        }
    }
}

/// A reason that a guest gives, without control characters and not longer than is worth reading.
fn bounded(why: &str) -> String {
    why.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(LONGEST_WHY)
        .collect()
}
