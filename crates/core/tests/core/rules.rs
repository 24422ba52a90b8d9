//! Decisions and refusals, state by state.

use std::fmt::Write;

use stencil_core::rules;
use stencil_core::{
    Decision, ForkRequest, InstanceId, LiveFork, MemoryMode, Metadata, Operation, Refusal, State,
};

use crate::given;

pub(crate) fn forks(count: usize) -> Vec<LiveFork> {
    (1..=count)
        .map(|number| LiveFork {
            id: InstanceId::generate(),
            name: format!("fork-{number}").parse().unwrap(),
        })
        .collect()
}

#[test]
fn every_operation_in_every_state() {
    let mut table = String::new();
    for operation in Operation::ALL {
        for state in State::ALL {
            let outcome = match rules::decide(operation, state, &[]) {
                Ok(decision) => format!("{decision:?}"),
                Err(refusal) => format!("{}: {refusal}", refusal.code()),
            };
            writeln!(table, "{operation:16} {state:12} {outcome}").unwrap();
        }
    }
    assert!(
        !table.contains("it is allowed"),
        "a refusal must say what would be right"
    );
    insta::assert_snapshot!(table);
}

#[test]
fn a_fork_is_decided_as_its_plan_is() {
    for state in State::ALL {
        let plan = rules::fork(&given::minimal(), state, &ForkRequest::default(), MemoryMode::Cow);
        assert_eq!(
            rules::decide(Operation::Fork, state, &forks(1)),
            plan.map(|_| Decision::Act),
            "{state}"
        );
    }
}

/// The way that each lifecycle operation takes from each state in which it acts.
fn path(operation: Operation, state: State) -> Option<&'static [State]> {
    use State::{Created, Initializing, Paused, Running, Shutdown, Standby, Stopped, Template};
    Some(match (operation, state) {
        (Operation::Start, Stopped) => &[Stopped, Created, Initializing, Running],
        (Operation::Start, Created) => &[Created, Initializing, Running],
        (Operation::Start, Shutdown) => &[Shutdown, Running],
        (Operation::Stop, Created) => &[Created, Shutdown, Stopped],
        (Operation::Stop, Initializing) => &[Initializing, Shutdown, Stopped],
        (Operation::Stop, Running) => &[Running, Shutdown, Stopped],
        (Operation::Stop, Paused) => &[Paused, Shutdown, Stopped],
        (Operation::Stop, Shutdown) => &[Shutdown, Stopped],
        (Operation::Stop, Standby) => &[Standby, Stopped],
        (Operation::Stop, Template) => &[Template, Stopped],
        (Operation::Pause, Running) => &[Running, Paused],
        (Operation::Resume, Paused) => &[Paused, Running],
        (Operation::Standby, Running) => &[Running, Paused, Standby],
        (Operation::Standby, Paused) => &[Paused, Standby],
        (Operation::Restore, Standby) => &[Standby, Paused, Running],
        (Operation::Promote, Standby) => &[Standby, Template],
        (Operation::Demote, Template) => &[Template, Standby],
        (Operation::RecordHotPages | Operation::Arm, Template) => &[Template],
        (Operation::Exec, Running) => &[Running],
        _ => return None,
    })
}

#[test]
fn an_operation_acts_exactly_where_the_table_has_a_path_for_it() {
    for operation in Operation::ALL {
        for state in State::ALL {
            let result = rules::decide(operation, state, &[]);
            match operation {
                // It ends in no state.
                Operation::Delete => {
                    assert_eq!(result, Ok(Decision::Act), "delete in {state}");
                    continue;
                }
                // The source stays as it is.
                Operation::Fork => continue,
                _ => {}
            }
            let path = path(operation, state);
            assert_eq!(
                result == Ok(Decision::Act),
                path.is_some(),
                "{operation} in {state}"
            );
            for hop in path.unwrap_or_default().windows(2) {
                assert!(
                    hop[0].can_become(hop[1]),
                    "{operation} in {state}: {} to {}",
                    hop[0],
                    hop[1]
                );
            }
        }
    }
}

#[test]
fn there_is_nothing_to_do_where_the_goal_is_reached() {
    for (operation, state) in [
        (Operation::Start, State::Initializing),
        (Operation::Start, State::Running),
        (Operation::Stop, State::Stopped),
        (Operation::Pause, State::Paused),
        (Operation::Resume, State::Running),
        (Operation::Resume, State::Initializing),
        (Operation::Standby, State::Standby),
        (Operation::Restore, State::Running),
        (Operation::Restore, State::Initializing),
    ] {
        assert_eq!(
            rules::decide(operation, state, &[]),
            Ok(Decision::AlreadyThere),
            "{operation} in {state}"
        );
    }
}

#[test]
fn stop_demote_and_delete_of_a_template_are_refused_while_a_fork_lives() {
    let forks = forks(2);
    for operation in [Operation::Stop, Operation::Demote, Operation::Delete] {
        let refusal = rules::decide(operation, State::Template, &forks).unwrap_err();
        assert_eq!(refusal.code(), "template_in_use");
        assert_eq!(
            refusal.to_string(),
            format!("cannot {operation} while forks of the template live: delete fork-1, fork-2 first")
        );
        assert_eq!(
            refusal,
            Refusal::TemplateInUse {
                operation,
                forks: forks.clone()
            }
        );
    }
}

#[test]
fn delete_is_refused_while_a_fork_lives_also_where_the_state_is_unknown() {
    for state in State::ALL {
        assert_eq!(
            rules::decide(Operation::Delete, state, &forks(1))
                .unwrap_err()
                .code(),
            "template_in_use",
            "{state}"
        );
    }
}

#[test]
fn a_refusal_names_a_few_forks_and_carries_all() {
    let forks = forks(64);
    let refusal = rules::decide(Operation::Delete, State::Template, &forks).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "cannot delete while forks of the template live: \
         delete fork-1, fork-2, fork-3, fork-4, fork-5, and 59 more first"
    );
    assert!(matches!(refusal, Refusal::TemplateInUse { forks, .. } if forks.len() == 64));
}

#[test]
fn only_delete_is_allowed_where_the_state_is_unknown() {
    for operation in Operation::ALL {
        let result = rules::decide(operation, State::Unknown, &[]);
        assert_eq!(result.is_ok(), operation == Operation::Delete, "{operation}");
    }
}

#[test]
fn promote_and_demote_change_what_a_template_has_and_nothing_else() {
    let template = given::full();
    let demoted = rules::demoted(&template);
    assert_eq!(
        demoted,
        Metadata {
            is_template: false,
            hot_pages_path: None,
            armed: None,
            ..template.clone()
        }
    );
    assert_eq!(demoted.other, template.other);
    assert_eq!(
        rules::promoted(&demoted),
        Metadata {
            hot_pages_path: None,
            armed: None,
            vmm: None,
            delete_after: false,
            ..template
        }
    );
}
