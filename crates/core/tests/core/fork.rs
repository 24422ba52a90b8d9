//! Where a fork can come from, how it can begin, and what it inherits.

use std::collections::BTreeSet;

use serde_json::Value;
use stencil_core::rules::{check_frozen, fork, fork_metadata};
use stencil_core::{
    ForkFrom, ForkPlan, ForkRequest, InstanceId, MemoryMode, Metadata, Operation, Readiness, Refusal, State,
    VmGeneration,
};

use crate::given;

fn request(target_state: Option<State>) -> ForkRequest {
    ForkRequest {
        target_state,
        ..ForkRequest::default()
    }
}

fn from_running(target_state: Option<State>) -> ForkRequest {
    ForkRequest {
        from_running: true,
        ..request(target_state)
    }
}

fn plan(state: State, request: &ForkRequest) -> Result<ForkPlan, Refusal> {
    fork(&given::minimal(), state, request, MemoryMode::Cow)
}

#[test]
fn a_fork_of_a_stopped_instance_takes_its_configuration() {
    let plan = |target| plan(State::Stopped, &request(target)).unwrap();
    for (asked, target) in [
        (None, State::Stopped),
        (Some(State::Stopped), State::Stopped),
        (Some(State::Running), State::Running),
    ] {
        let expected = ForkPlan {
            from: ForkFrom::Config,
            target,
            memory_mode: MemoryMode::Cow,
            fork_of_template: None,
            keeps_disks: true,
        };
        assert_eq!(plan(asked), expected);
    }
}

#[test]
fn forks_are_made_of_snapshots_in_which_no_user_s_process_runs() {
    let asked_by = |readiness| {
        let mut source = given::minimal();
        source.spec.readiness = readiness;
        source
    };
    let by_text = asked_by(Readiness::Console("ready".to_owned()));
    let by_agent = asked_by(Readiness::Agent);
    // The last one says nothing, as those of earlier versions did.
    for (source, frozen, allowed) in [
        (&by_text, Some(true), true),
        (&by_text, Some(false), false),
        (&by_text, None, true),
        (&by_agent, Some(true), true),
        (&by_agent, Some(false), false),
        (&by_agent, None, false),
    ] {
        let decided = check_frozen(Operation::Promote, source, State::Standby, frozen);
        assert_eq!(decided.is_ok(), allowed, "{:?} {frozen:?}", source.spec.readiness);
    }
    for (state, expected) in [
        (
            State::Standby,
            "; let it go on (restore), and put it on standby (standby) while it is Running",
        ),
        (
            State::Template,
            "; demote it (demote-template), let it go on (restore), and put it",
        ),
        (State::Running, "; it runs on; ask again when its agent answers"),
    ] {
        let refusal = check_frozen(Operation::Fork, &by_agent, state, None).unwrap_err();
        assert_eq!(refusal.code(), "guest_not_frozen");
        assert!(refusal.to_string().contains(expected), "{refusal}");
    }
}

#[test]
fn only_the_disks_of_a_source_that_goes_on_running_meanwhile_are_not_a_fork_s() {
    for target in [State::Running, State::Paused, State::Standby, State::Stopped] {
        let running = plan(State::Running, &from_running(Some(target))).unwrap();
        assert_eq!(running.keeps_disks, target != State::Stopped, "{target}");
        for source in [State::Standby, State::Template] {
            assert!(
                plan(source, &request(Some(target))).unwrap().keeps_disks,
                "{target}"
            );
        }
    }
}

#[test]
fn a_fork_of_a_snapshot_begins_running_unless_asked() {
    for state in [State::Standby, State::Template] {
        for (asked, target) in [
            (None, State::Running),
            (Some(State::Running), State::Running),
            (Some(State::Paused), State::Paused),
            (Some(State::Standby), State::Standby),
        ] {
            let plan = plan(state, &request(asked)).unwrap();
            assert_eq!((plan.from, plan.target), (ForkFrom::Snapshot, target));
        }
    }
}

#[test]
fn a_stopped_fork_takes_only_the_configuration_and_interrupts_no_one() {
    let stopped = Some(State::Stopped);
    for (state, request) in [
        (State::Standby, request(stopped)),
        (State::Template, request(stopped)),
        (State::Running, from_running(stopped)),
    ] {
        assert_eq!(plan(state, &request).unwrap().from, ForkFrom::Config, "{state}");
    }
}

#[test]
fn only_a_fork_of_a_template_records_it() {
    let source = given::full();
    let of = |state, request| {
        fork(&source, state, &request, MemoryMode::Cow)
            .unwrap()
            .fork_of_template
    };
    assert_eq!(of(State::Template, request(None)), Some(source.id));
    assert_eq!(
        of(State::Template, request(Some(State::Stopped))),
        Some(source.id)
    );
    assert_eq!(of(State::Standby, request(None)), None);
    assert_eq!(of(State::Stopped, request(None)), None);
    assert_eq!(of(State::Running, from_running(None)), None);
}

#[test]
fn a_running_source_needs_to_be_asked_for() {
    let refusal = plan(State::Running, &request(None)).unwrap_err();
    assert_eq!(refusal.code(), "invalid_state");
    assert_eq!(
        refusal.to_string(),
        "cannot fork in state Running: \
         ask for from_running, which interrupts it for a moment, or put it on standby first (standby)"
    );
    let plan = plan(State::Running, &from_running(None)).unwrap();
    assert_eq!((plan.from, plan.target), (ForkFrom::Running, State::Running));
}

#[test]
fn from_running_is_refused_for_any_other_source() {
    for state in State::ALL.into_iter().filter(|state| *state != State::Running) {
        let refusal = plan(state, &from_running(None)).unwrap_err();
        assert!(matches!(refusal, Refusal::InvalidState { .. }), "{state}");
    }
    assert_eq!(
        plan(State::Template, &from_running(None))
            .unwrap_err()
            .to_string(),
        "cannot fork in state Template: from_running is for an instance that is Running; ask without it"
    );
}

#[test]
fn a_target_that_is_none_is_refused_with_those_that_are() {
    for target in [
        State::Created,
        State::Initializing,
        State::Shutdown,
        State::Template,
        State::Unknown,
    ] {
        let refusal = plan(State::Template, &request(Some(target))).unwrap_err();
        assert_eq!(refusal.code(), "invalid_request");
        assert_eq!(
            refusal.to_string(),
            format!(
                "a fork of a Template instance cannot begin as {target}: ask for one of Running, Paused, Standby, Stopped"
            )
        );
    }
    assert_eq!(
        plan(State::Stopped, &request(Some(State::Paused)))
            .unwrap_err()
            .to_string(),
        "a fork of a Stopped instance cannot begin as Paused: ask for one of Stopped, Running"
    );
}

#[test]
fn the_memory_mode_is_the_one_asked_for_or_the_default() {
    let asked = ForkRequest {
        memory_mode: Some(MemoryMode::Copy),
        ..ForkRequest::default()
    };
    assert_eq!(
        plan(State::Template, &asked).unwrap().memory_mode,
        MemoryMode::Copy
    );
    assert_eq!(
        plan(State::Template, &request(None)).unwrap().memory_mode,
        MemoryMode::Cow
    );
}

#[test]
fn a_fork_begins_at_a_state_of_the_table_and_reaches_its_target_by_edges() {
    use State::{Created, Initializing, Paused, Running, Standby, Stopped, Template};
    for (source, request) in [
        (Stopped, request(None)),
        (Standby, request(None)),
        (Template, request(None)),
        (Running, from_running(None)),
    ] {
        for target in State::ALL {
            let Ok(plan) = plan(
                source,
                &ForkRequest {
                    target_state: Some(target),
                    ..request
                },
            ) else {
                continue;
            };
            let way: &[State] = match (plan.from, plan.target) {
                (ForkFrom::Config, Stopped) => &[Stopped],
                (ForkFrom::Config, Running) => &[Stopped, Created, Initializing, Running],
                (_, Standby) => &[Standby],
                (_, Paused) => &[Standby, Paused],
                (_, Running) => &[Standby, Paused, Running],
                other => panic!("no way to {other:?}"),
            };
            assert!(way.windows(2).all(|hop| hop[0].can_become(hop[1])), "{way:?}");
        }
    }
}

/// The fork of a source that has every field there is.
fn forked(state: State, target: State) -> (Metadata, Metadata) {
    let source = given::full();
    let request = ForkRequest {
        memory_mode: Some(MemoryMode::Copy),
        ..request(Some(target))
    };
    let plan = fork(&source, state, &request, MemoryMode::Cow).unwrap();
    let name = "fork-1".parse().unwrap();
    let made = fork_metadata(
        &source,
        &plan,
        InstanceId::generate(),
        name,
        VmGeneration::random(),
        given::time(),
    );
    (source, made)
}

fn keys(json: &Value) -> BTreeSet<&str> {
    json.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn a_fork_has_the_fields_of_the_allow_list_and_no_other() {
    let (_, made) = forked(State::Template, State::Running);
    let json: Value = serde_json::from_slice(&made.to_json().unwrap()).unwrap();
    let record = [
        "schema",
        "id",
        "name",
        "created_at",
        "spec",
        "generation",
        "is_template",
        "fork_of_template",
        "memory_mode",
    ];
    assert_eq!(keys(&json), BTreeSet::from(record));
    let spec = [
        "hypervisor",
        "image",
        "kernel",
        "firmware",
        "initrd",
        "cmdline",
        "disks",
        "vcpus",
        "memory_bytes",
        "readiness",
        "labels",
    ];
    assert_eq!(keys(&json["spec"]), BTreeSet::from(spec));
    assert_eq!(json["is_template"], Value::Bool(false));
}

#[test]
fn a_fork_inherits_the_machine_and_is_someone_else() {
    let (source, made) = forked(State::Template, State::Running);
    let inherited = stencil_core::VmSpec {
        other: serde_json::Map::new(),
        ..source.spec.clone()
    };
    assert_eq!(made.spec, inherited);
    assert_ne!(made.id, source.id);
    assert_ne!(made.generation, source.generation);
    assert_eq!(made.name.as_str(), "fork-1");
    assert_eq!(made.fork_of_template, Some(source.id));
    assert_eq!(made.memory_mode, Some(MemoryMode::Copy));
}

#[test]
fn a_fork_of_a_fork_does_not_inherit_its_template() {
    let (source, made) = forked(State::Standby, State::Running);
    assert!(source.fork_of_template.is_some());
    assert_eq!(made.fork_of_template, None);
}

#[test]
fn a_fork_that_is_made_of_a_configuration_has_no_memory_mode() {
    let (_, made) = forked(State::Template, State::Stopped);
    assert_eq!(made.memory_mode, None);
    let (_, made) = forked(State::Template, State::Standby);
    assert_eq!(made.memory_mode, Some(MemoryMode::Copy));
}
