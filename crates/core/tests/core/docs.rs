//! The documentation has the tables as the code has them.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use stencil_core::state::render_table;
use stencil_core::{Decision, ForkFrom, ForkRequest, MemoryMode, Operation, State, rules};

use crate::given;
use crate::rules::forks;

/// Fails unless the file has these lines, one after the other.
fn has(file: &str, lines: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = fs::read_to_string(path).unwrap();
    assert!(
        text.contains(lines),
        "{file} differs from the code, which says:\n\n{lines}"
    );
}

fn listed(states: impl IntoIterator<Item = State>) -> String {
    let states: Vec<State> = states.into_iter().collect();
    if states == State::ALL {
        return "every state".to_owned();
    }
    states.iter().map(State::to_string).collect::<Vec<_>>().join(", ")
}

/// Where each operation acts, where only while no fork lives, and where there is nothing to do.
fn operations() -> String {
    let mut table = String::from(
        "| operation | acts in | acts without live forks in | does nothing in |\n|---|---|---|---|\n",
    );
    for operation in Operation::ALL
        .into_iter()
        .filter(|operation| *operation != Operation::Fork)
    {
        let (mut always, mut unless_used, mut already) = (Vec::new(), Vec::new(), Vec::new());
        for state in State::ALL {
            let alone = rules::decide(operation, state, &[]);
            let used = rules::decide(operation, state, &forks(1));
            match (alone, used) {
                (Ok(Decision::Act), Ok(Decision::Act)) => always.push(state),
                (Ok(Decision::Act), _) => unless_used.push(state),
                (Ok(Decision::AlreadyThere), _) => already.push(state),
                (Err(_), _) => {}
            }
        }
        let (always, unless_used, already) = (listed(always), listed(unless_used), listed(already));
        writeln!(table, "| {operation} | {always} | {unless_used} | {already} |").unwrap();
    }
    table
}

/// What a fork can begin as, and what it is then made of.
fn fork_targets() -> String {
    let mut table = String::from(
        "| source | begins by default as | made of a snapshot | made of the configuration |\n|---|---|---|---|\n",
    );
    let sources = State::ALL
        .into_iter()
        .flat_map(|state| [(state, false), (state, true)]);
    for (state, from_running) in sources {
        let plan = |target_state| {
            let request = ForkRequest {
                from_running,
                target_state,
                memory_mode: None,
            };
            rules::fork(&given::minimal(), state, &request, MemoryMode::Cow)
        };
        let Ok(default) = plan(None) else { continue };
        let targets = |of_config: bool| {
            listed(State::ALL.into_iter().filter(|target| {
                plan(Some(*target)).is_ok_and(|plan| (plan.from == ForkFrom::Config) == of_config)
            }))
        };
        let how = if from_running { ", with `from_running`" } else { "" };
        writeln!(
            table,
            "| {state}{how} | {} | {} | {} |",
            default.target,
            targets(false),
            targets(true)
        )
        .unwrap();
    }
    table
}

#[test]
fn the_documentation_has_the_states_and_edges_of_the_code() {
    has("../../docs/states.md", &render_table());
}

#[test]
fn the_documentation_has_the_operations_of_the_code() {
    has("../../docs/states.md", &operations());
    let in_rustdoc: String = operations().lines().map(|line| format!("//! {line}\n")).collect();
    has("src/rules.rs", &in_rustdoc);
}

#[test]
fn the_documentation_has_the_forks_of_the_code() {
    has("../../docs/states.md", &fork_targets());
    let in_rustdoc: String = fork_targets()
        .lines()
        .map(|line| format!("/// {line}\n"))
        .collect();
    has("src/rules/fork.rs", &in_rustdoc);
}
