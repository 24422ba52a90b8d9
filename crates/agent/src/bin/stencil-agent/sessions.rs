//! The sessions that there are, each in a cgroup of its own where there are cgroups.

use std::collections::BTreeMap;

use rustix::process::WaitOptions;
use stencil_agent::{Exec, ExecError, MAX_SESSIONS, SessionId};

use crate::cgroups::{CgroupError, Cgroups};
use crate::command::{self, NotBegun};
use crate::error_chain;
use crate::session::Session;

/// The sessions of the conversation, and the cgroups of the machine.
#[derive(Debug)]
pub(crate) struct Sessions {
    all: BTreeMap<SessionId, Session>,
    cgroups: Result<Cgroups, CgroupError>,
}

impl Sessions {
    pub(crate) fn new(cgroups: Result<Cgroups, CgroupError>) -> Self {
        Self {
            all: BTreeMap::new(),
            cgroups,
        }
    }

    pub(crate) fn ids(&self) -> Vec<SessionId> {
        self.all.keys().copied().collect()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&SessionId, &Session)> {
        self.all.iter()
    }

    pub(crate) fn get_mut(&mut self, id: SessionId) -> Option<&mut Session> {
        self.all.get_mut(&id)
    }

    /// Begins a session; its process id.
    pub(crate) fn begin(&mut self, id: SessionId, exec: &Exec) -> Result<u32, NotBegun> {
        if self.all.contains_key(&id) {
            let why = "the session's number is in use";
            return Err(NotBegun::new(ExecError::BadRequest, why));
        }
        if self.all.len() >= MAX_SESSIONS {
            let why = format!("{MAX_SESSIONS} sessions are running");
            return Err(NotBegun::new(ExecError::TooManySessions, why));
        }
        let cgroup = self.cgroups.as_mut().ok().map(Cgroups::begin_session).transpose();
        let cgroup = cgroup.map_err(|error| NotBegun::new(ExecError::Failed, error_chain(&error)))?;
        match command::begin(exec, cgroup.as_deref()) {
            Ok(begun) => {
                let session = Session::new(exec, begun, cgroup);
                let pid = session.pid().as_raw_nonzero().get().unsigned_abs();
                self.all.insert(id, session);
                Ok(pid)
            }
            Err(error) => {
                if let (Ok(cgroups), Some(cgroup)) = (&mut self.cgroups, cgroup) {
                    cgroups.end_session(cgroup);
                }
                Err(error)
            }
        }
    }

    /// Forgets a session. What its command left behind goes on.
    pub(crate) fn remove(&mut self, id: SessionId) {
        let cgroup = self.all.remove(&id).and_then(Session::into_cgroup);
        if let (Ok(cgroups), Some(cgroup)) = (&mut self.cgroups, cgroup) {
            cgroups.end_session(cgroup);
        }
    }

    /// Kills the commands that run, and forgets all sessions.
    pub(crate) fn end(&mut self) {
        for id in self.ids() {
            if let Some(session) = self.all.get(&id).filter(|session| session.is_running()) {
                session.kill();
            }
            self.remove(id);
        }
    }

    /// Takes note of the child processes that have ended; init has some that it did not begin.
    pub(crate) fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let mut sessions = self.all.values_mut();
            if let Some(session) = sessions.find(|session| session.is_running() && session.pid() == pid) {
                session.ended(status);
            }
        }
        if let Ok(cgroups) = &mut self.cgroups {
            cgroups.sweep();
        }
    }

    /// Whether the user's processes are stopped.
    pub(crate) fn are_frozen(&self) -> bool {
        self.cgroups.as_ref().is_ok_and(Cgroups::is_frozen)
    }

    /// Stops the user's processes, or says why not.
    pub(crate) fn freeze(&mut self) -> Result<(), String> {
        match &mut self.cgroups {
            Ok(cgroups) if cgroups.is_frozen() => Ok(()),
            Ok(cgroups) => cgroups.freeze().map_err(|error| error_chain(&error)),
            Err(error) => Err(error_chain(error)),
        }
    }

    /// Lets them go on, if they were stopped.
    pub(crate) fn thaw(&mut self) -> Result<(), String> {
        match &mut self.cgroups {
            Ok(cgroups) => cgroups.thaw().map_err(|error| error_chain(&error)),
            Err(_) => Ok(()),
        }
    }
}
