//! What the engine observed, as it is told over the wire.

use std::time::Duration;

use stencil_core::State;
use stencil_engine::{AGENT_PROTOCOL, AgentState};

use super::{Agent, AgentStatus, Armed, Forks, Hypervisor, Instance, MemoryUse, Phase, Timings};

impl From<&dyn stencil_vmm::Hypervisor> for Hypervisor {
    fn from(backend: &dyn stencil_vmm::Hypervisor) -> Self {
        let able = backend.capabilities();
        Self {
            name: backend.name(),
            memory_modes: able.memory_modes,
            max_vcpus: able.max_vcpus,
            firmware: able.firmware,
            console_input: able.console_input,
            tells_identity: able.tells_identity,
            max_disk_layers: able.max_disk_layers,
            agent: able.agent,
            outlives_guest: able.outlives_guest,
        }
    }
}

impl From<stencil_engine::Instance> for Instance {
    fn from(seen: stencil_engine::Instance) -> Self {
        let forks = seen.forks.map(|forks| Forks {
            count: forks.len(),
            ids: forks.into_iter().map(|fork| fork.id).collect(),
        });
        let memory_use = seen.memory_use.map(|held| MemoryUse {
            pss: held.pss,
            private: held.private,
            shared: held.shared,
            rss: held.rss,
        });
        let mut instance = Self {
            id: seen.id,
            name: seen.name,
            state: seen.state,
            state_error: seen.state_error,
            guest_end: seen.guest_end,
            hypervisor: None,
            vcpus: None,
            memory: None,
            is_template: None,
            fork_of_template: None,
            forks,
            armed: seen.armed.map(|armed| Armed {
                target: armed.target,
                ready: armed.ready,
            }),
            agent: seen.agent.map(Agent::from),
            generation: None,
            memory_mode: None,
            memory_mode_reason: None,
            hot_pages: None,
            labels: None,
            readiness: None,
            image: None,
            kernel: None,
            firmware: None,
            disks: None,
            created_at: None,
            started_at: None,
            pid: None,
            timings: seen.timings.map(Timings::from),
            memory_use,
            accelerator: seen.accelerator.map(|accelerator| accelerator.to_string()),
            pages: seen.pages,
        };
        if let Some(metadata) = seen.metadata {
            instance.tell(metadata);
        }
        instance
    }
}

impl Instance {
    /// What the metadata add to what was observed.
    fn tell(&mut self, metadata: stencil_core::Metadata) {
        let spec = metadata.spec;
        self.name = Some(metadata.name);
        self.hypervisor = Some(spec.hypervisor);
        self.vcpus = Some(spec.vcpus);
        self.memory = Some(spec.memory_bytes);
        self.is_template = Some(metadata.is_template);
        self.fork_of_template = metadata.fork_of_template;
        self.generation = Some(metadata.generation);
        self.memory_mode = metadata.memory_mode;
        self.memory_mode_reason = metadata.memory_mode_reason;
        self.hot_pages = Some(metadata.hot_pages_path.is_some());
        self.labels = Some(spec.labels);
        self.readiness = Some(spec.readiness);
        self.image = spec.image;
        self.kernel = spec.kernel;
        self.firmware = spec.firmware;
        self.disks = (!spec.disks.is_empty()).then_some(spec.disks);
        self.created_at = Some(metadata.created_at);
        // A VMM that ended by itself is still on record; its pid may be somebody else's now.
        if !matches!(self.state, State::Stopped | State::Standby | State::Template)
            && let Some(vmm) = metadata.vmm
        {
            self.started_at = Some(vmm.started_at);
            self.pid = Some(vmm.process.pid);
        }
    }
}

impl From<AgentState> for Agent {
    fn from(state: AgentState) -> Self {
        let (status, version, error) = match state {
            AgentState::Absent => (AgentStatus::Absent, None, None),
            AgentState::Connected => (AgentStatus::Connected, Some(AGENT_PROTOCOL), None),
            AgentState::Ready => (AgentStatus::Ready, Some(AGENT_PROTOCOL), None),
            AgentState::Failed(why) => (AgentStatus::Failed, None, Some(why)),
        };
        Self {
            status,
            version,
            error,
        }
    }
}

impl From<stencil_engine::Timings> for Timings {
    fn from(timings: stencil_engine::Timings) -> Self {
        Self {
            operation: timings.operation.to_string(),
            total_us: micros(timings.total()),
            phases: timings
                .phases
                .into_iter()
                .map(|(name, took)| Phase {
                    name: name.to_owned(),
                    us: micros(took),
                })
                .collect(),
        }
    }
}

/// Whole microseconds; half a million years fit.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use stencil_core::rules::{LiveFork, Operation};
    use stencil_core::{
        Epoch, EpochId, EpochKind, InstanceId, MemoryMode, Metadata, ProcessIdentity, Readiness,
        VmGeneration, VmSpec, VmmRecord,
    };

    use super::*;
    use crate::reply::{ForkEntry, ForkOutcome};

    fn id(last: char) -> InstanceId {
        format!("01k6h2v9d3e4f5g6h7j8k9m0n{last}").parse().unwrap()
    }

    fn metadata() -> Metadata {
        let spec = VmSpec::new("microvm".parse().unwrap(), "/boot/guest.elf".into(), 2, 512 << 20);
        let made = "2026-01-02T03:04:05Z".parse().unwrap();
        Metadata::new(
            id('1'),
            "warm".parse().unwrap(),
            spec,
            VmGeneration::from_bytes([0x1f; 16]),
            made,
        )
    }

    fn vmm() -> VmmRecord {
        VmmRecord {
            process: ProcessIdentity {
                pid: 4711,
                start_time: 1,
                boot_id: String::new(),
            },
            version: "0.1.0".to_owned(),
            started_at: "2026-01-02T03:04:06Z".parse().unwrap(),
            epoch: Epoch {
                id: EpochId::random(),
                began: EpochKind::Fork,
                console_offset: 0,
            },
            other: serde_json::Map::new(),
        }
    }

    fn seen(state: State, metadata: Option<Metadata>) -> stencil_engine::Instance {
        stencil_engine::Instance {
            id: id('1'),
            name: None,
            metadata,
            state,
            state_error: None,
            guest_end: None,
            forks: None,
            armed: None,
            agent: None,
            memory_use: None,
            accelerator: None,
            pages: None,
            timings: None,
        }
    }

    #[test]
    fn a_fork_shows_everything_that_is_known_of_it() {
        let fork = stencil_engine::Instance {
            agent: Some(AgentState::Failed("it cannot set the clock".to_owned())),
            accelerator: Some(stencil_vmm::Accelerator::Tcg),
            pages: Some([("prefetched".to_owned(), 21)].into()),
            memory_use: Some(stencil_vmm::MemoryUse {
                pss: 1,
                private: 2,
                shared: 3,
                rss: 5,
            }),
            timings: Some(stencil_engine::Timings {
                operation: Operation::Fork,
                phases: vec![
                    ("spawn", Duration::from_nanos(700_900)),
                    ("restore", Duration::from_nanos(1_120_900)),
                ],
            }),
            ..seen(
                State::Running,
                Some(Metadata {
                    vmm: Some(vmm()),
                    fork_of_template: Some(id('0')),
                    memory_mode: Some(MemoryMode::Copy),
                    memory_mode_reason: Some(
                        "the memory could not be mapped: the VM has a balloon".to_owned(),
                    ),
                    spec: VmSpec {
                        readiness: Readiness::Console("ready epoch=".to_owned()),
                        labels: [("team".to_owned(), "db".to_owned())].into(),
                        ..metadata().spec
                    },
                    ..metadata()
                }),
            )
        };
        insta::assert_json_snapshot!(Instance::from(fork));
    }

    #[test]
    fn a_template_shows_its_forks() {
        let template = stencil_engine::Instance {
            forks: Some(vec![LiveFork {
                id: id('2'),
                name: "warm-1".parse().unwrap(),
            }]),
            armed: Some(stencil_engine::Armed { target: 8, ready: 7 }),
            ..seen(
                State::Template,
                Some(Metadata {
                    is_template: true,
                    ..metadata()
                }),
            )
        };
        insta::assert_json_snapshot!(Instance::from(template));
    }

    #[test]
    fn of_an_instance_whose_metadata_cannot_be_read_only_that_is_told() {
        let unknown = stencil_engine::Instance {
            state_error: Some("its metadata cannot be read".to_owned()),
            ..seen(State::Unknown, None)
        };
        insta::assert_json_snapshot!(Instance::from(unknown));
    }

    #[test]
    fn a_vmm_that_ended_by_itself_is_not_shown_with_its_old_pid() {
        let ended = seen(
            State::Stopped,
            Some(Metadata {
                vmm: Some(vmm()),
                ..metadata()
            }),
        );
        assert_eq!(Instance::from(ended).pid, None);
    }

    #[test]
    fn what_is_written_is_read_again() {
        let entry = ForkEntry {
            name: "warm-1".parse().unwrap(),
            outcome: ForkOutcome::Instance(Box::new(seen(State::Running, Some(metadata())).into())),
            exec: None,
            deleted: None,
        };
        let json = serde_json::to_value(&entry).unwrap();
        assert_eq!(json["instance"]["name"], "warm");
        assert_eq!(serde_json::from_value::<ForkEntry>(json).unwrap(), entry);
    }
}
