//! The world: what an engine does, on facts instead of processes and files.

use stencil_core::observe::derive;
use stencil_core::{
    Decision, ForkFrom, ForkRequest, GuestEnd, InstanceId, LiveFork, MemoryMode, Metadata, Operation,
    SnapshotFacts, SnapshotManifest, State, VmGeneration, VmPhase, VmmFacts, rules,
};

use super::{Event, Verdict};
use crate::given;

#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) metadata: Metadata,
    snapshot: SnapshotFacts,
    pub(super) vmm: VmmFacts,
}

impl Facts {
    pub(super) fn state(&self) -> State {
        derive(&self.metadata, &self.snapshot, &self.vmm).state
    }
}

pub(super) struct World {
    pub(super) instances: Vec<Option<Facts>>,
    manifest: SnapshotManifest,
}

fn up(phase: VmPhase, ready: bool) -> VmmFacts {
    VmmFacts::Up {
        phase,
        ready,
        end: None,
    }
}

impl World {
    /// Two instances that have done nothing yet.
    pub(super) fn new(manifest: SnapshotManifest) -> Self {
        let instance = |name| {
            Some(Facts {
                metadata: given::record(name),
                snapshot: SnapshotFacts::Absent,
                vmm: VmmFacts::None,
            })
        };
        Self {
            instances: vec![instance("one"), instance("two")],
            manifest,
        }
    }

    /// Which instances exist.
    pub(super) fn alive(&self) -> Vec<usize> {
        (0..self.instances.len())
            .filter(|index| self.instances[*index].is_some())
            .collect()
    }

    fn live_forks(&self, template: InstanceId) -> Vec<LiveFork> {
        let records = self.instances.iter().flatten().map(|facts| &facts.metadata);
        let forks = records.filter(|metadata| metadata.fork_of_template == Some(template));
        forks
            .map(|metadata| LiveFork {
                id: metadata.id,
                name: metadata.name.clone(),
            })
            .collect()
    }

    pub(super) fn operate(&mut self, index: usize, operation: Operation, stop_at_created: bool) -> Verdict {
        let facts = self.instances[index].clone().unwrap();
        let (state, forks) = (facts.state(), self.live_forks(facts.metadata.id));
        let decision = rules::decide(operation, state, &forks);
        if decision == Ok(Decision::Act) {
            let ready = matches!(facts.vmm, VmmFacts::Up { ready: true, .. });
            let Facts {
                metadata,
                snapshot,
                vmm,
            } = facts;
            let complete = SnapshotFacts::Complete(self.manifest.clone());
            let (metadata, snapshot, vmm) = match operation {
                Operation::Start if stop_at_created && state == State::Stopped => {
                    (metadata, snapshot, up(VmPhase::Created, false))
                }
                Operation::Start => (metadata, snapshot, up(VmPhase::Running, false)),
                Operation::Stop => (rules::demoted(&metadata), SnapshotFacts::Absent, VmmFacts::None),
                Operation::Pause => (metadata, snapshot, up(VmPhase::Paused, ready)),
                Operation::Resume => (metadata, snapshot, up(VmPhase::Running, ready)),
                Operation::Standby => (metadata, complete, VmmFacts::None),
                // The snapshot stays, so that a VMM that dies falls back to it.
                Operation::Restore => (metadata, snapshot, up(VmPhase::Running, false)),
                Operation::Promote => (rules::promoted(&metadata), snapshot, VmmFacts::None),
                Operation::Demote => (rules::demoted(&metadata), snapshot, vmm),
                Operation::RecordHotPages => (rules::with_hot_pages(&metadata, None), snapshot, vmm),
                Operation::Arm => (rules::with_armed(&metadata, Some(3)), snapshot, vmm),
                Operation::Delete | Operation::Fork | Operation::Exec => (metadata, snapshot, vmm),
            };
            self.instances[index] = (operation != Operation::Delete).then_some(Facts {
                metadata,
                snapshot,
                vmm,
            });
        }
        decision.into()
    }

    pub(super) fn fork(&mut self, index: usize, request: &ForkRequest) -> Verdict {
        let source = self.instances[index].clone().unwrap();
        let plan = match rules::fork(&source.metadata, source.state(), request, MemoryMode::Cow) {
            Ok(plan) => plan,
            Err(refusal) => return Verdict::Refused(refusal.code()),
        };
        let complete = SnapshotFacts::Complete(self.manifest.clone());
        if plan.from == ForkFrom::Running {
            self.instances[index] = Some(Facts {
                snapshot: complete.clone(),
                ..source.clone()
            });
        }
        let (id, name) = (InstanceId::generate(), "fork".parse().unwrap());
        let metadata = rules::fork_metadata(
            &source.metadata,
            &plan,
            id,
            name,
            VmGeneration::random(),
            given::time(),
        );
        assert!(
            !metadata.is_template
                && metadata.hot_pages_path.is_none()
                && metadata.armed.is_none()
                && metadata.vmm.is_none()
        );
        let (snapshot, vmm) = match plan.target {
            State::Stopped => (SnapshotFacts::Absent, VmmFacts::None),
            State::Running => (SnapshotFacts::Absent, up(VmPhase::Running, true)),
            State::Paused => (SnapshotFacts::Absent, up(VmPhase::Paused, false)),
            State::Standby => (complete, VmmFacts::None),
            other => panic!("a fork begins as {other}"),
        };
        self.instances.push(Some(Facts {
            metadata,
            snapshot,
            vmm,
        }));
        Verdict::Acts
    }

    pub(super) fn befall(&mut self, index: usize, event: &Event) {
        let facts = self.instances[index].as_mut().unwrap();
        let awake = matches!(facts.vmm, VmmFacts::Up { .. });
        match (event, &mut facts.vmm) {
            (
                Event::GuestReady,
                VmmFacts::Up {
                    phase: VmPhase::Running,
                    ready,
                    ..
                },
            ) => *ready = true,
            (
                Event::GuestEnds { failed },
                VmmFacts::Up {
                    phase: phase @ VmPhase::Running,
                    end,
                    ..
                },
            ) => {
                *phase = VmPhase::Shutdown;
                *end = Some(GuestEnd {
                    failed: *failed,
                    reason: "because".to_owned(),
                });
            }
            (Event::VmmKilled, vmm) if awake => {
                *vmm = VmmFacts::Ended {
                    reason: "because".to_owned(),
                }
            }
            (Event::VmmHangs, vmm) if awake => {
                *vmm = VmmFacts::Silent {
                    reason: "because".to_owned(),
                }
            }
            (Event::SnapshotDamaged, _) if !awake && matches!(facts.snapshot, SnapshotFacts::Complete(_)) => {
                facts.snapshot = SnapshotFacts::Broken {
                    reason: "because".to_owned(),
                };
            }
            _ => {}
        }
    }
}
