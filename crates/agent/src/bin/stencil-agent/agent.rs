//! The loop of the agent, and what each message of the host does.

use std::io;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use stencil_agent::{EpochId, Exec, ExecError, Frame, FrameError, Nonce, Output, SessionId, ToGuest, ToHost};

use crate::button::Button;
use crate::cgroups::{CgroupError, Cgroups};
use crate::command::NotBegun;
use crate::identity::Identity;
use crate::link::Link;
use crate::session::Session;
use crate::sessions::Sessions;
use crate::signals::Signals;
use crate::{error_chain, log, renewal};

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The host or the button wants the machine off.
    PowerOff,
    /// A signal said so.
    Signal,
}

/// Where something can be done.
#[derive(Clone, Copy, Debug)]
enum Ready {
    Link,
    Signals,
    Button,
    Input(SessionId),
    Output(SessionId, Output),
}

/// The agent.
#[derive(Debug)]
pub(crate) struct Agent {
    link: Link,
    signals: Signals,
    button: Option<Button>,
    identity: Identity,
    nonce: Nonce,
    epoch: Option<EpochId>,
    sessions: Sessions,
    /// Rotates who is served first.
    turn: usize,
}

impl Agent {
    pub(crate) fn new(
        link: Link,
        signals: Signals,
        cgroups: Result<Cgroups, CgroupError>,
        identity: Identity,
    ) -> Self {
        Self {
            link,
            signals,
            button: None,
            identity,
            nonce: Nonce::NONE,
            epoch: None,
            sessions: Sessions::new(cgroups),
            turn: 0,
        }
    }

    /// Also ends when this button is pressed.
    pub(crate) fn with_button(self, button: Option<Button>) -> Self {
        Self { button, ..self }
    }

    /// Serves the host until something asks for the end. The sessions end with it.
    pub(crate) fn run(&mut self) -> io::Result<Ended> {
        let ended = self.serve();
        self.sessions.end();
        ended
    }

    fn serve(&mut self) -> io::Result<Ended> {
        self.say_hello(Nonce::NONE)?;
        loop {
            self.link.flush();
            for ready in self.wait()? {
                match ready {
                    Ready::Link => self.link.look()?,
                    Ready::Signals => {
                        let asked = self.signals.take();
                        if asked.children {
                            self.sessions.reap();
                        }
                        if asked.end {
                            return Ok(Ended::Signal);
                        }
                    }
                    Ready::Button => {
                        if self.button.as_mut().is_some_and(Button::is_pressed) {
                            return Ok(Ended::PowerOff);
                        }
                    }
                    Ready::Input(session) => {
                        if let Some(session) = self.sessions.get_mut(session) {
                            session.write();
                        }
                    }
                    Ready::Output(session, stream) => self.pass_on(session, stream)?,
                }
            }
            while self.link.has_room()
                && let Some(frame) = self.link.next()
            {
                if self.heed(frame)? == Some(Ended::PowerOff) {
                    return Ok(Ended::PowerOff);
                }
            }
            self.look_after_sessions()?;
        }
    }

    /// Waits until something can be done.
    fn wait(&mut self) -> io::Result<Vec<Ready>> {
        let mut who = vec![Ready::Link, Ready::Signals];
        let mut what = vec![
            PollFd::from_borrowed_fd(self.link.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
        ];
        if let Some(button) = &self.button {
            who.push(Ready::Button);
            what.push(PollFd::from_borrowed_fd(button.as_fd(), PollFlags::IN));
        }
        let mut deadline: Option<Instant> = None;
        for (id, session) in self.sessions.iter() {
            if let Some(stream) = session.writable() {
                who.push(Ready::Input(*id));
                what.push(PollFd::from_borrowed_fd(stream, PollFlags::OUT));
            }
            if self.link.has_room() {
                for (output, stream) in session.readable() {
                    who.push(Ready::Output(*id, output));
                    what.push(PollFd::from_borrowed_fd(stream, PollFlags::IN));
                }
            }
            deadline = [deadline, session.deadline()].into_iter().flatten().min();
        }
        let timeout = if self.link.has_room() && self.link.has_more() {
            Some(Timespec::default())
        } else {
            // A time that is too long for the kernel is none.
            deadline.and_then(|deadline| {
                Timespec::try_from(deadline.saturating_duration_since(Instant::now())).ok()
            })
        };
        match rustix::event::poll(&mut what, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = who.iter().zip(&what).filter(|(_, fd)| !fd.revents().is_empty());
        let mut ready: Vec<Ready> = ready.map(|(who, _)| *who).collect();
        self.turn = self.turn.wrapping_add(1);
        if !ready.is_empty() {
            let first = self.turn % ready.len();
            ready.rotate_left(first);
        }
        Ok(ready)
    }

    fn say(&mut self, message: &ToHost) -> io::Result<()> {
        self.link.send(self.nonce, message)
    }

    fn say_hello(&mut self, nonce: Nonce) -> io::Result<()> {
        let hello = ToHost::Hello {
            epoch: self.epoch,
            frozen: self.sessions.are_frozen(),
        };
        self.link.send(nonce, &hello)
    }

    /// Does what a frame of the host asks for.
    fn heed(&mut self, frame: Result<Frame<ToGuest>, FrameError>) -> io::Result<Option<Ended>> {
        let Frame { nonce, message } = match frame {
            Ok(frame) => frame,
            // The host learns the version from the answer's.
            Err(FrameError::Version(_)) => return self.say_hello(Nonce::NONE).map(|()| None),
            // The end of something that was cut off.
            Err(_) => return Ok(None),
        };
        if message == ToGuest::Hello && nonce != Nonce::NONE {
            if nonce != self.nonce {
                self.sessions.end();
                self.link.forget_unwritten();
                self.nonce = nonce;
            }
            self.say_hello(nonce)?;
            return Ok(None);
        }
        if nonce != self.nonce || nonce == Nonce::NONE {
            return Ok(None);
        }
        match message {
            ToGuest::Hello => {}
            ToGuest::Epoch(epoch) => {
                let answer = self.take_epoch(&epoch);
                self.say(&answer)?;
                // The host waits for it; a console takes its time.
                self.link.flush();
                log(&format!("{answer:?}, host name {}", epoch.host_name));
            }
            ToGuest::Freeze => {
                let answer = self.freeze();
                self.say(&answer)?;
            }
            ToGuest::Exec { session, exec } => {
                let answer = match self.begin(session, &exec) {
                    Ok(pid) => ToHost::Started { session, pid },
                    Err(NotBegun { error, why }) => ToHost::ExecFailed { session, error, why },
                };
                self.say(&answer)?;
            }
            ToGuest::PowerOff => return Ok(Some(Ended::PowerOff)),
            ToGuest::Stdin { session, .. }
            | ToGuest::StdinClosed { session }
            | ToGuest::Credit { session, .. }
            | ToGuest::Resize { session, .. }
            | ToGuest::Signal { session, .. } => {
                // A session may end while something for it is on its way.
                if let Some(session) = self.sessions.get_mut(session) {
                    direct(session, message);
                }
            }
        }
        Ok(None)
    }

    fn take_epoch(&mut self, epoch: &stencil_agent::Epoch) -> ToHost {
        let taken = self.identity.take(epoch).map_err(|error| error_chain(&error));
        // Told again, it is for the time alone.
        let is_new = self.epoch != Some(epoch.id);
        let taken = taken.and_then(|()| {
            if is_new {
                renewal::renew(epoch).map_err(|error| error_chain(&error))
            } else {
                Ok(())
            }
        });
        let thawed = taken.and_then(|()| self.sessions.thaw());
        match thawed {
            Ok(()) => {
                self.epoch = Some(epoch.id);
                ToHost::EpochTaken { id: epoch.id }
            }
            Err(why) => ToHost::EpochFailed { id: epoch.id, why },
        }
    }

    fn freeze(&mut self) -> ToHost {
        match self.sessions.freeze() {
            Ok(()) => ToHost::Frozen,
            Err(why) => ToHost::FreezeFailed { why },
        }
    }

    /// Begins a session; its process id.
    fn begin(&mut self, id: SessionId, exec: &Exec) -> Result<u32, NotBegun> {
        if self.epoch.is_none() || self.sessions.are_frozen() {
            let why = "the guest is between two epochs, and runs nothing";
            return Err(NotBegun::new(ExecError::NoEpoch, why));
        }
        self.sessions.begin(id, exec)
    }

    /// Passes on some of what a command wrote.
    fn pass_on(&mut self, id: SessionId, stream: Output) -> io::Result<()> {
        if !self.link.has_room() {
            return Ok(());
        }
        let Some(bytes) = self.sessions.get_mut(id).and_then(|session| session.read(stream)) else {
            return Ok(());
        };
        self.say(&ToHost::Output {
            session: id,
            stream,
            bytes,
        })
    }

    /// What is due for sessions without anything new: credit, time, the rest of their output, their end.
    fn look_after_sessions(&mut self) -> io::Result<()> {
        let now = Instant::now();
        for id in self.sessions.ids() {
            let Some(session) = self.sessions.get_mut(id) else {
                continue;
            };
            session.check_time(now);
            if let Some(bytes) = session.taken() {
                self.say(&ToHost::StdinCredit { session: id, bytes })?;
            }
            self.finish(id)?;
        }
        Ok(())
    }

    /// Passes on the last output of a command that has ended, and then its end.
    fn finish(&mut self, id: SessionId) -> io::Result<()> {
        while let Some(session) = self.sessions.get_mut(id).filter(|session| !session.is_running()) {
            if let Some(ended) = session.is_over() {
                self.say(&ToHost::Exited {
                    session: id,
                    end: ended.end,
                    timed_out: ended.timed_out,
                    took: ended.took,
                })?;
                // The host waits for it; what is left of a session takes its time.
                self.link.flush();
                self.sessions.remove(id);
                return Ok(());
            }
            // One of them that waits for credit or room comes later.
            let open: Vec<Output> = session.readable().map(|(output, _)| output).collect();
            if open.is_empty() || !self.link.has_room() {
                return Ok(());
            }
            for output in open {
                self.pass_on(id, output)?;
            }
        }
        Ok(())
    }
}

/// What a message does with its session.
fn direct(session: &mut Session, message: ToGuest) {
    match message {
        ToGuest::Stdin { bytes, .. } => {
            if session.put(&bytes).is_err() {
                session.kill();
            }
        }
        ToGuest::StdinClosed { .. } => session.close_input(),
        ToGuest::Credit { stream, bytes, .. } => session.grant(stream, bytes),
        ToGuest::Resize { size, .. } => session.resize(size),
        ToGuest::Signal { signal, .. } => session.signal(signal),
        ToGuest::Hello | ToGuest::Epoch(_) | ToGuest::Freeze | ToGuest::Exec { .. } | ToGuest::PowerOff => {}
    }
}
