//! From facts to a state, row by row.

use proptest::prelude::*;
use stencil_core::observe::derive;
use stencil_core::{GuestEnd, Metadata, Observed, SnapshotDir, SnapshotFacts, State, VmPhase, VmmFacts};

use crate::given;

fn complete() -> SnapshotFacts {
    let scratch = tempfile::tempdir().unwrap();
    SnapshotFacts::Complete(given::snapshot_files(&SnapshotDir::new(scratch.path())))
}

fn broken() -> SnapshotFacts {
    SnapshotFacts::Broken {
        reason: "memory-ranges is missing".to_owned(),
    }
}

fn instance() -> Metadata {
    given::minimal()
}

fn template() -> Metadata {
    Metadata {
        is_template: true,
        ..given::minimal()
    }
}

fn up(phase: VmPhase, ready: bool) -> VmmFacts {
    VmmFacts::Up {
        phase,
        ready,
        end: None,
    }
}

fn ended() -> VmmFacts {
    VmmFacts::Ended {
        reason: "killed by signal 9 (SIGKILL)".to_owned(),
    }
}

#[track_caller]
fn assert_derives(
    metadata: &Metadata,
    snapshot: &SnapshotFacts,
    vmm: &VmmFacts,
    state: State,
    error: Option<&str>,
) {
    let Observed {
        state: found,
        error: why,
        guest_end,
    } = derive(metadata, snapshot, vmm);
    assert_eq!((found, why.as_deref()), (state, error));
    assert!(guest_end.is_none() || state == State::Shutdown);
}

#[test]
fn without_a_vmm_the_snapshot_tells() {
    let none = &VmmFacts::None;
    assert_derives(&instance(), &SnapshotFacts::Absent, none, State::Stopped, None);
    assert_derives(&instance(), &complete(), none, State::Standby, None);
    assert_derives(&template(), &complete(), none, State::Template, None);
}

#[test]
fn a_standby_that_has_not_ended_is_neither_standby_nor_stopped() {
    let error = Some("its standby has not ended; if it stays so, start the server anew, which ends it");
    let prepared = &SnapshotFacts::Prepared;
    assert_derives(&instance(), prepared, &VmmFacts::None, State::Unknown, error);
    let paused = &up(VmPhase::Paused, true);
    assert_derives(&instance(), prepared, paused, State::Paused, None);
}

#[test]
fn a_template_without_its_snapshot_is_unknown() {
    let error = Some("it is a template, and its snapshot is missing");
    assert_derives(
        &template(),
        &SnapshotFacts::Absent,
        &VmmFacts::None,
        State::Unknown,
        error,
    );
}

#[test]
fn a_broken_snapshot_makes_the_state_unknown() {
    let error = Some("its snapshot is broken: memory-ranges is missing");
    assert_derives(&instance(), &broken(), &VmmFacts::None, State::Unknown, error);
    assert_derives(&template(), &broken(), &VmmFacts::None, State::Unknown, error);
}

#[test]
fn a_vmm_that_ended_leaves_the_state_of_the_disk_and_its_reason() {
    let error = Some("its VMM ended: killed by signal 9 (SIGKILL)");
    assert_derives(
        &instance(),
        &SnapshotFacts::Absent,
        &ended(),
        State::Stopped,
        error,
    );
    assert_derives(&instance(), &complete(), &ended(), State::Standby, error);
    assert_derives(&template(), &complete(), &ended(), State::Template, error);
    let both =
        Some("its snapshot is broken: memory-ranges is missing; its VMM ended: killed by signal 9 (SIGKILL)");
    assert_derives(&instance(), &broken(), &ended(), State::Unknown, both);
}

#[test]
fn a_vmm_that_is_silent_makes_the_state_unknown_whatever_is_on_disk() {
    let silent = VmmFacts::Silent {
        reason: "vm.info: no answer within 500 ms".to_owned(),
    };
    let error = Some("its VMM does not answer: vm.info: no answer within 500 ms");
    for snapshot in [SnapshotFacts::Absent, complete(), broken()] {
        assert_derives(&instance(), &snapshot, &silent, State::Unknown, error);
        assert_derives(&template(), &snapshot, &silent, State::Unknown, error);
    }
}

#[test]
fn a_vmm_that_is_up_tells_whatever_is_on_disk() {
    for snapshot in [SnapshotFacts::Absent, complete(), broken()] {
        for (phase, ready, state) in [
            (VmPhase::Undefined, false, State::Shutdown),
            (VmPhase::Undefined, true, State::Shutdown),
            (VmPhase::Created, false, State::Created),
            (VmPhase::Created, true, State::Created),
            (VmPhase::Running, false, State::Initializing),
            (VmPhase::Running, true, State::Running),
            (VmPhase::Paused, false, State::Paused),
            (VmPhase::Paused, true, State::Paused),
            (VmPhase::Shutdown, false, State::Shutdown),
            (VmPhase::Shutdown, true, State::Shutdown),
        ] {
            assert_derives(&instance(), &snapshot, &up(phase, ready), state, None);
        }
    }
}

#[test]
fn a_guest_that_failed_leaves_its_reason_and_one_that_powered_off_does_not() {
    let down = |failed, reason: &str| VmmFacts::Up {
        phase: VmPhase::Shutdown,
        ready: true,
        end: Some(GuestEnd {
            failed,
            reason: reason.to_owned(),
        }),
    };
    let error = Some("its guest ended: triple fault on vCPU 0");
    assert_derives(
        &instance(),
        &SnapshotFacts::Absent,
        &down(true, "triple fault on vCPU 0"),
        State::Shutdown,
        error,
    );
    assert_derives(
        &instance(),
        &SnapshotFacts::Absent,
        &down(false, "it powered off"),
        State::Shutdown,
        None,
    );
}

#[test]
fn a_template_with_a_vmm_is_unknown() {
    let error = Some("it is a template, which cannot wake, and yet it has a VMM");
    assert_derives(
        &template(),
        &complete(),
        &up(VmPhase::Running, true),
        State::Unknown,
        error,
    );
}

fn any_snapshot() -> impl Strategy<Value = SnapshotFacts> {
    prop_oneof![
        Just(SnapshotFacts::Absent),
        Just(SnapshotFacts::Prepared),
        Just(complete()),
        Just(broken())
    ]
}

fn any_vmm() -> impl Strategy<Value = VmmFacts> {
    use VmPhase::{Created, Paused, Running, Shutdown, Undefined};
    let phase = prop::sample::select(vec![Undefined, Created, Running, Paused, Shutdown]);
    let end = prop::option::of(any::<bool>().prop_map(|failed| GuestEnd {
        failed,
        reason: "because".to_owned(),
    }));
    prop_oneof![
        Just(VmmFacts::None),
        Just(ended()),
        Just(VmmFacts::Silent {
            reason: "because".to_owned()
        }),
        (phase, any::<bool>(), end).prop_map(|(phase, ready, end)| VmmFacts::Up { phase, ready, end }),
    ]
}

proptest! {
    #[test]
    fn unknown_always_has_an_error_and_a_template_is_never_awake(
        is_template: bool,
        snapshot in any_snapshot(),
        vmm in any_vmm(),
    ) {
        let observed = derive(&Metadata { is_template, ..given::minimal() }, &snapshot, &vmm);
        prop_assert!(observed.state != State::Unknown || observed.error.is_some());
        prop_assert!(!is_template || matches!(observed.state, State::Template | State::Unknown));
        prop_assert!(is_template || observed.state != State::Template);
    }
}
