//! The rules against a model: random lives of a set of instances and their forks.
//!
//! The [`world`] derives the state of an instance from its facts, asks the rules, and changes the facts as the decision
//! says. The model is the design's [`prose`]. Both must agree on every verdict and on every state, all the way.

mod prose;
mod world;

use proptest::prelude::*;
use stencil_core::{Decision, ForkRequest, Operation, Refusal, SnapshotDir, State, VmmFacts};

use crate::given;
use prose::{Model, Models};
use world::World;

#[derive(Clone, Debug)]
enum Event {
    Operate(Operation),
    Fork(ForkRequest),
    /// A start that got no further than to define the VM.
    Define,
    GuestReady,
    GuestEnds {
        failed: bool,
    },
    VmmKilled,
    VmmHangs,
    SnapshotDamaged,
}

#[derive(Debug, PartialEq)]
enum Verdict {
    Acts,
    Nothing,
    Refused(&'static str),
}

impl From<Result<Decision, Refusal>> for Verdict {
    fn from(result: Result<Decision, Refusal>) -> Self {
        match result {
            Ok(Decision::Act) => Self::Acts,
            Ok(Decision::AlreadyThere) => Self::Nothing,
            Err(refusal) => Self::Refused(refusal.code()),
        }
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    let operations: Vec<Operation> = Operation::ALL
        .into_iter()
        .filter(|operation| *operation != Operation::Fork)
        .collect();
    let target = prop::option::weighted(0.6, prop::sample::select(State::ALL.to_vec()));
    let request = (any::<bool>(), target).prop_map(|(from_running, target_state)| ForkRequest {
        from_running,
        target_state,
        memory_mode: None,
    });
    prop_oneof![
        12 => prop::sample::select(operations).prop_map(Event::Operate),
        5 => request.prop_map(Event::Fork),
        // The road to a template, so that many lives have one.
        4 => prop::sample::select(vec![Operation::Start, Operation::Standby, Operation::Promote]).prop_map(Event::Operate),
        5 => Just(Event::GuestReady),
        1 => Just(Event::Define),
        1 => any::<bool>().prop_map(|failed| Event::GuestEnds { failed }),
        1 => Just(Event::VmmKilled),
        1 => prop_oneof![Just(Event::VmmHangs), Just(Event::SnapshotDamaged)],
    ]
}

proptest! {
    #[test]
    fn the_rules_agree_with_the_prose_of_the_design(
        events in prop::collection::vec((any::<prop::sample::Index>(), any_event()), 1..120),
    ) {
        let scratch = tempfile::tempdir().unwrap();
        let manifest = given::snapshot_files(&SnapshotDir::new(scratch.path()));
        let mut world = World::new(manifest);
        let mut models = Models(vec![Some(Model::default()), Some(Model::default())]);

        for (index, event) in events {
            let alive = world.alive();
            if alive.is_empty() {
                break;
            }
            let index = alive[index.index(alive.len())];
            let (verdict, expected) = match &event {
                Event::Operate(operation) => (world.operate(index, *operation, false), models.operate(index, *operation, false)),
                Event::Define => (world.operate(index, Operation::Start, true), models.operate(index, Operation::Start, true)),
                Event::Fork(request) => (world.fork(index, request), models.fork(index, request)),
                _ => {
                    world.befall(index, &event);
                    models.befall(index, &event);
                    (Verdict::Nothing, Verdict::Nothing)
                }
            };
            prop_assert_eq!(verdict, expected, "{:?} of {}", event, index);

            for (index, (facts, model)) in world.instances.iter().zip(&models.0).enumerate() {
                let state = facts.as_ref().map(|facts| facts.state().to_string());
                prop_assert_eq!(state.as_deref(), model.as_ref().map(Model::name), "{} after {:?}", index, event);
            }
            for facts in world.instances.iter().flatten() {
                prop_assert!(!facts.metadata.is_template || facts.vmm == VmmFacts::None, "a template is awake");
                if let Some(template) = facts.metadata.fork_of_template {
                    let template = world.instances.iter().flatten().find(|facts| facts.metadata.id == template);
                    prop_assert!(template.is_some_and(|facts| facts.metadata.is_template), "a fork lost its template");
                }
            }
        }
    }
}
