//! An armed fork of an emulated guest runs a little before anybody takes it: until the agent in it has answered a greeting.
//!
//! An emulator translates what its guest executes, and a restored VM begins with nothing translated, which is most of what it
//! takes until it has its epoch. What ran once is translated, and stays so while the VM is paused.
//!
//! No user notices: of a guest that is ready by its agent there are forks only where all of its users' processes were stopped before
//! the snapshot was made. They go on when the guest has taken its own epoch, in which nothing is left of the randomness and the
//! time that it ran with before.

use stencil_core::Readiness;
use stencil_vmm::{Accelerator, VmmError};

use crate::agent;
use crate::fork_base::ForkBase;
use crate::pool::PreparedFork;
use crate::{Engine, EngineError};

impl Engine {
    /// Lets a prepared fork run until its agent has answered, where that is of use and allowed, and pauses it again.
    ///
    /// # Errors
    /// [`EngineError::Vmm`]; [`EngineError::AgentNotReady`] for an agent that has stopped nothing. The fork is of no use then.
    pub(crate) async fn greet(&self, base: &ForkBase, fork: &mut PreparedFork) -> Result<(), EngineError> {
        let spec = &base.metadata.spec;
        let hypervisor = self.hypervisor(&spec.hypervisor)?;
        let dir = fork.new.dir();
        let is_emulated = || hypervisor.accelerator(dir) == Some(Accelerator::Tcg);
        if spec.readiness != Readiness::Agent || !is_emulated() {
            return Ok(());
        }
        let greeted = async {
            // First: a guest that runs is told of who connects, and takes its time over it.
            let mut stream = hypervisor.connect_agent(dir).await?;
            hypervisor.resume(dir).await?;
            let answered = agent::greet(&mut stream).await;
            let is_frozen = answered.map_err(|source| VmmError::Agent {
                socket: dir.agent_socket(),
                source,
            })?;
            hypervisor.pause(dir).await?;
            Ok((stream, is_frozen))
        };
        let greeted = fork.process.during(greeted).await;
        let (stream, is_frozen) = greeted.map_err(EngineError::vmm(fork.id))?;
        if !is_frozen {
            return Err(EngineError::AgentNotReady {
                id: fork.id,
                why: "processes run in it that were stopped in its snapshot".to_owned(),
            });
        }
        fork.agent = Some(stream);
        Ok(())
    }
}
