//! A command in a guest, from its request to its result.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use stencil_agent::{Exec, ExecError, Output};
use stencil_core::rules::{self, Operation};
use stencil_core::{HypervisorName, InstanceId, State};
use tokio::time::{Instant, timeout, timeout_at};

use super::ask::NotOpened;
use super::session::{ExecEvent, ExecSession, Exited};
use super::{AgentLink, AgentState};
use crate::running::RunningVmm;
use crate::wait::LOOK_AGAIN;
use crate::{Engine, EngineError};

/// The most bytes of each output of a command that are kept in its result.
pub const MAX_CAPTURED: usize = 1 << 20;
/// The most bytes of each output that are kept of all commands of one call together.
const MAX_CAPTURED_PER_CALL: usize = 64 << 20;

/// How long an agent may take to begin a command: it has to fork.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long after a command's time is over its end may come: the agent ends it.
const END_LIMIT: Duration = Duration::from_secs(5);

/// How long an agent that has not answered yet is waited for: a server that was just started may still be connecting.
const AGENT_WAIT: Duration = Duration::from_secs(1);

/// The same of one in a new fork, whose guest may be booting; longer where its command may take longer.
const FORK_WAIT: Duration = Duration::from_secs(30);

/// A command whose result is asked for as one.
#[derive(Clone, Debug, Default)]
pub struct ExecRequest {
    /// The command; whether it has an input is up to `stdin`.
    pub exec: Exec,
    /// What it is given to read.
    pub stdin: Bytes,
}

/// What came of a command.
#[derive(Clone, Debug)]
pub struct ExecOutput {
    /// How it ended.
    pub exited: Exited,
    /// What it wrote to its standard output.
    pub stdout: Captured,
    /// What it wrote to its standard error.
    pub stderr: Captured,
    /// From the request to the result.
    pub took: Duration,
}

/// What a command wrote to one of its outputs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    /// The first [`MAX_CAPTURED`] bytes; fewer where a call runs more than 64 commands, which share 64 MiB.
    pub bytes: Vec<u8>,
    /// There was more, which was thrown away.
    pub truncated: bool,
}

/// The agent in a guest, ready to run commands.
#[derive(Clone, Debug)]
pub struct Agent {
    id: InstanceId,
    running: Arc<RunningVmm>,
}

impl Engine {
    /// Runs a command in the guest and waits for its end. It is killed when the future is dropped.
    ///
    /// # Errors
    /// As [`Engine::agent`] and [`Agent::exec`]; [`EngineError::AgentLost`].
    pub async fn exec(&self, reference: &str, request: ExecRequest) -> Result<ExecOutput, EngineError> {
        self.agent(reference).await?.run(request, MAX_CAPTURED).await
    }

    /// The same in a fork that was just made, whose guest may be booting: its agent is waited for as long as the command itself
    /// may take, and [`FORK_WAIT`] at least. It is one of `count` of one call, which share what is kept of their outputs.
    pub(crate) async fn exec_in_fork(
        &self,
        fork: InstanceId,
        count: usize,
        request: ExecRequest,
    ) -> Result<ExecOutput, EngineError> {
        let limit = request
            .exec
            .timeout
            .map_or(FORK_WAIT, |timeout| timeout.max(FORK_WAIT));
        let reference = fork.to_string();
        self.until_agent(&reference, limit).await?;
        let most = MAX_CAPTURED.min(MAX_CAPTURED_PER_CALL / count.max(1));
        self.agent(&reference).await?.run(request, most).await
    }

    /// Waits until the agent in a guest is ready, or it is certain that it will not be, at most for `limit`.
    async fn until_agent(&self, reference: &str, limit: Duration) -> Result<(), EngineError> {
        let slot = self.inner.registry.find(reference)?;
        let mut changes = self.changes(&slot)?;
        let deadline = Instant::now() + limit;
        loop {
            let state = self.observe(&slot).await?.state();
            let running = slot.vmm();
            let agent = running.as_ref().and_then(|running| running.agent.as_ref());
            let has_settled =
                agent.is_none_or(|agent| matches!(agent.state(), AgentState::Ready | AgentState::Failed(_)));
            match state {
                State::Running if !has_settled => {}
                State::Initializing if !running.as_ref().is_some_and(|running| running.has_failed()) => {}
                // A VMM that is slow to answer on a busy host is no reason to give its guest up.
                State::Unknown
                    if running
                        .as_ref()
                        .is_some_and(|running| running.process.has_exited().is_none()) => {}
                _ => return Ok(()),
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(());
            }
            // That nothing was heard is as good a reason to look.
            let _ = timeout_at(deadline.min(now + LOOK_AGAIN), changes.next()).await;
        }
    }

    /// The agent in the guest of an instance that is Running.
    ///
    /// # Errors
    /// [`EngineError::NotFound`]; [`EngineError::Refused`] in another state;
    /// [`EngineError::NoAgent`] where there is none; [`EngineError::AgentNotReady`] while the guest is not yet the machine
    /// that it is to be.
    pub async fn agent(&self, reference: &str) -> Result<Agent, EngineError> {
        let slot = self.inner.registry.find(reference)?;
        let id = slot.id;
        let seen = self.observe(&slot).await?;
        // Of one whose hypervisor is not offered here, its state tells more.
        if seen.state() != State::Unknown {
            self.check_agent_port(id, &seen.metadata.spec.hypervisor)?;
        }
        rules::decide(Operation::Exec, seen.state(), &[])?;
        let gone = || EngineError::AgentLost {
            id,
            why: "its VM ended".to_owned(),
        };
        let running = slot.vmm().ok_or_else(gone)?;
        let link = running.agent.as_ref().ok_or_else(gone)?;
        match link.settled(AGENT_WAIT).await {
            AgentState::Ready => Ok(Agent { id, running }),
            AgentState::Absent => Err(EngineError::NoAgent {
                id,
                why: "nobody in the guest has answered: boot an image that starts stencil-agent, and wait until it has come up"
                    .to_owned(),
            }),
            AgentState::Connected => Err(EngineError::AgentNotReady {
                id,
                why: "it has not acknowledged the epoch yet; ask again in a moment".to_owned(),
            }),
            AgentState::Failed(why) => Err(EngineError::AgentNotReady { id, why }),
        }
    }
}

impl Engine {
    /// Refuses a hypervisor whose guests have no port for an agent.
    pub(crate) fn check_agent_port(&self, id: InstanceId, name: &HypervisorName) -> Result<(), EngineError> {
        if self.hypervisor(name)?.capabilities().agent {
            return Ok(());
        }
        Err(EngineError::NoAgent {
            id,
            why: format!(
                "{name} gives its guests no port for one: create the instance on a hypervisor that does"
            ),
        })
    }
}

impl Agent {
    /// Starts a command.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a request without a program or too large; [`EngineError::NotExecuted`] where the guest
    /// cannot start it; [`EngineError::AgentLost`].
    pub async fn exec(&self, exec: Exec) -> Result<ExecSession, EngineError> {
        if exec.argv.is_empty() {
            return Err(EngineError::Invalid(
                "cmd is empty; it takes a program and its arguments".to_owned(),
            ));
        }
        let lost = |why: &str| EngineError::AgentLost {
            id: self.id,
            why: why.to_owned(),
        };
        let link: &AgentLink = self.running.agent.as_ref().ok_or_else(|| lost("its VM ended"))?;
        let opened = timeout(START_LIMIT, link.open(exec)).await;
        let opened = opened.map_err(|_elapsed| lost("it did not begin the command in time"))?;
        opened.map_err(|not_opened| match not_opened {
            NotOpened::Refused(ExecError::NoEpoch, why) => EngineError::AgentNotReady { id: self.id, why },
            NotOpened::Refused(error, why) => EngineError::NotExecuted {
                id: self.id,
                error,
                why,
            },
            NotOpened::TooLarge => EngineError::Invalid(
                "cmd, env and cwd together are too large; they take at most 64 KiB less some bytes for each"
                    .to_owned(),
            ),
            NotOpened::Lost(why) => lost(&why),
        })
    }

    /// Runs a command to its end, and keeps `most` bytes of each of its outputs.
    ///
    /// # Errors
    /// As [`exec`](Self::exec); [`EngineError::AgentLost`] also while it runs.
    async fn run(&self, request: ExecRequest, most: usize) -> Result<ExecOutput, EngineError> {
        let begun = std::time::Instant::now();
        let ExecRequest { mut exec, stdin } = request;
        let limit = exec.timeout.map(|timeout| timeout.saturating_add(END_LIMIT));
        exec.stdin = !stdin.is_empty();
        let ExecSession {
            mut events, input, ..
        } = self.exec(exec).await?;
        let fed = async {
            // A command that ends before it has read everything is none the worse for it.
            if !stdin.is_empty() && input.write(&stdin).await.is_ok() {
                let _ = input.close().await;
            }
            std::future::pending().await
        };
        let ended = async {
            let (mut stdout, mut stderr) = (Captured::default(), Captured::default());
            while let Some(event) = events.next().await {
                match event {
                    Ok(ExecEvent::Output(Output::Stdout, bytes)) => stdout.keep(&bytes, most),
                    Ok(ExecEvent::Output(Output::Stderr, bytes)) => stderr.keep(&bytes, most),
                    Ok(ExecEvent::Exited(exited)) => return Ok((exited, stdout, stderr)),
                    Err(why) => return Err(why),
                }
            }
            Err("its agent told of no end".to_owned())
        };
        let ended = async {
            tokio::select! {
                ended = ended => ended,
                never = fed => never,
            }
        };
        let ended = match limit {
            Some(limit) => timeout(limit, ended)
                .await
                .unwrap_or_else(|_elapsed| Err("it did not tell of the command's end in time".to_owned())),
            None => ended.await,
        };
        let (exited, stdout, stderr) = ended.map_err(|why| EngineError::AgentLost { id: self.id, why })?;
        Ok(ExecOutput {
            exited,
            stdout,
            stderr,
            took: begun.elapsed(),
        })
    }

    /// Turns the end of a session without an exit into an error that names the instance.
    #[must_use]
    pub fn lost(&self, why: String) -> EngineError {
        EngineError::AgentLost { id: self.id, why }
    }
}

impl Captured {
    fn keep(&mut self, bytes: &[u8], most: usize) {
        let room = most - self.bytes.len();
        self.truncated |= bytes.len() > room;
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
}
