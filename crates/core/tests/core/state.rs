//! The table of edges.

use std::collections::BTreeSet;

use stencil_core::State;
use stencil_core::state::{StateError, render_table};

#[test]
fn the_table_renders_for_the_documentation() {
    insta::assert_snapshot!(render_table());
}

#[test]
fn the_edges_are_those_of_the_design() {
    // The design's sentence, as it stands there.
    const DESIGN: &str = "Created -> Initializing, Running, Shutdown; Initializing -> Running, Shutdown; \
        Running -> Paused, Shutdown; Paused -> Running, Shutdown, Standby; Shutdown -> Running, Stopped; Stopped -> Created; \
        Standby -> Paused, Stopped, Template; Template -> Standby, Stopped";
    let parse = |text: &str| text.trim().parse::<State>().unwrap();
    let design: BTreeSet<(State, State)> = DESIGN
        .split(';')
        .map(|row| row.split_once("->").unwrap())
        .flat_map(|(from, to)| to.split(',').map(move |to| (parse(from), parse(to))))
        .collect();
    let pairs = State::ALL
        .into_iter()
        .flat_map(|from| State::ALL.map(|to| (from, to)));
    let table: BTreeSet<(State, State)> = pairs.filter(|(from, to)| from.can_become(*to)).collect();
    assert_eq!(table, design);
}

#[test]
fn every_state_but_unknown_is_reached_from_stopped_and_leads_back() {
    let reached = |from: State| {
        let mut reached = BTreeSet::from([from]);
        let mut open = vec![from];
        while let Some(state) = open.pop() {
            open.extend(state.edges().iter().filter(|next| reached.insert(**next)));
        }
        reached
    };
    let known: BTreeSet<State> = State::ALL
        .into_iter()
        .filter(|state| *state != State::Unknown)
        .collect();
    for state in &known {
        assert_eq!(reached(*state), known, "from {state}");
    }
    assert_eq!(reached(State::Unknown).len(), 1);
}

#[test]
fn a_state_is_written_in_pascal_case_and_read_in_any() {
    for state in State::ALL {
        let text = state.to_string();
        assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{text}\""));
        assert_eq!(text.parse(), Ok(state));
        assert_eq!(text.to_lowercase().parse(), Ok(state));
        assert_eq!(text.to_uppercase().parse(), Ok(state));
    }
    for wrong in ["", "Run", "Running ", "unknown-state"] {
        assert_eq!(wrong.parse::<State>(), Err(StateError), "{wrong:?}");
    }
}
