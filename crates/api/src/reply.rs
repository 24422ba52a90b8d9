//! What is answered over the wire. What does not apply is absent; a client ignores what it does not know.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stencil_core::{HypervisorName, InstanceId, InstanceName, MemoryMode, Readiness, State, VmGeneration};

use crate::ErrorBody;

/// One instance, as it was observed.
///
/// Where its metadata cannot be read, its state is [`State::Unknown`], and what they would tell is absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    /// Its id.
    pub id: InstanceId,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<InstanceName>,
    /// Its state.
    pub state: State,
    /// Why the state cannot be told, or what went wrong on the way to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_error: Option<String>,
    /// Which hypervisor runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<HypervisorName>,
    /// How many vCPUs it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Its guest's memory in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Whether it is a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_template: Option<bool>,
    /// The template that it relies on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fork_of_template: Option<InstanceId>,
    /// Of a template: its live forks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forks: Option<Forks>,
    /// The identity of its machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<VmGeneration>,
    /// How its memory was last restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mode: Option<MemoryMode>,
    /// Whether the pages that its forks touch first are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hot_pages: Option<bool>,
    /// What its owner wants to remember of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    /// How its guest says that it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness: Option<Readiness>,
    /// The kernel that it boots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// When its VMM was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// The process id of its VMM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// How long its last operation took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
    /// What its VMM takes of the host's memory; only of one that was asked for alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_use: Option<MemoryUse>,
}

/// The live forks of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forks {
    /// How many.
    pub count: usize,
    /// Which.
    pub ids: Vec<InstanceId>,
}

/// How long an operation took, in microseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Which one, such as `fork`.
    pub operation: String,
    /// All of it.
    pub total_us: u64,
    /// One after the other; they add up to the whole, but for what is lost by rounding down.
    pub phases: Vec<Phase>,
}

/// A part of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// For how many microseconds.
    pub us: u64,
}

/// What a VMM's process takes of the host's memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryUse {
    /// Proportional: each shared page counts for its part.
    pub pss: u64,
    /// What nobody else has mapped.
    pub private: u64,
    /// What others have mapped too.
    pub shared: u64,
    /// All that is mapped.
    pub rss: u64,
}

/// The reply of `GET /instances`, oldest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceList {
    /// The instances.
    pub instances: Vec<Instance>,
}

/// The reply of `POST /instances/{id}/forks`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForkList {
    /// What came of each, in the order of their numbers.
    pub forks: Vec<ForkEntry>,
}

/// What came of one fork of many: `{name, instance}` or `{name, error}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForkEntry {
    /// The name that it has or would have had.
    pub name: InstanceName,
    /// The fork, or why there is none.
    #[serde(flatten)]
    pub outcome: ForkOutcome,
}

/// The fork, or why there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForkOutcome {
    /// It was made.
    Instance(Box<Instance>),
    /// It was not.
    Error(ErrorBody),
}

/// The reply of `GET /instances/{id}/wait`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Waited {
    /// Whether the state was reached.
    pub reached: bool,
    /// The instance as it was seen last.
    pub instance: Instance,
}

/// The reply of `GET /health`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// `ok`.
    pub status: String,
}

/// The reply of `GET /version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The server's version.
    pub version: String,
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
            hypervisor: None,
            vcpus: None,
            memory: None,
            is_template: None,
            fork_of_template: None,
            forks,
            generation: None,
            memory_mode: None,
            hot_pages: None,
            labels: None,
            readiness: None,
            kernel: None,
            created_at: None,
            started_at: None,
            pid: None,
            timings: seen.timings.map(Timings::from),
            memory_use,
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
        self.hot_pages = Some(metadata.hot_pages_path.is_some());
        self.labels = Some(spec.labels);
        self.readiness = Some(spec.readiness);
        self.kernel = Some(spec.kernel);
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
fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use stencil_core::rules::{LiveFork, Operation};
    use stencil_core::{Epoch, EpochKind, Metadata, ProcessIdentity, VmSpec, VmmRecord};

    use super::*;

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
            forks: None,
            memory_use: None,
            timings: None,
        }
    }

    #[test]
    fn a_fork_shows_everything_that_is_known_of_it() {
        let fork = stencil_engine::Instance {
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
                    memory_mode: Some(MemoryMode::Cow),
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
        };
        let json = serde_json::to_value(&entry).unwrap();
        assert_eq!(json["instance"]["name"], "warm");
        assert_eq!(serde_json::from_value::<ForkEntry>(json).unwrap(), entry);
    }
}
