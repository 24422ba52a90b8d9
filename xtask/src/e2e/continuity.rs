//! A fork goes on from where its source stopped, as a machine of its own.

use std::collections::HashSet;

use serde_json::json;

use super::Scenario;
use super::failure::{Failure, holds, same};
use super::world::World;
use crate::guest_console::value_of;

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "forks go on from the template's counter with the template's memory",
        goes_on,
    ),
    ("each way to restore memory brings all of it back", memory_modes),
    (
        "each fork has a generation of its own, and its guest knows it",
        generations,
    ),
    (
        "an instance that wakes from its own standby is the same machine",
        same_machine,
    ),
];

const PAGES: u64 = 512;

fn goes_on(world: &mut World) -> Result<(), Failure> {
    let template = world.running("warm")?;
    for _ in 0..4 {
        template.count()?;
    }
    template.write(0, PAGES, 7)?;
    let hash = template.hash(0, PAGES)?;
    template.act("standby")?;
    template.act("promote-template")?;
    for fork in template.forks(4)? {
        same(format!("the counter of {}", fork.name), 5, fork.count()?)?;
        same(
            format!("the memory of {}", fork.name),
            hash.clone(),
            fork.hash(0, PAGES)?,
        )?;
    }
    Ok(())
}

fn memory_modes(world: &mut World) -> Result<(), Failure> {
    let template = world.running("warm")?;
    template.count()?;
    template.write(100, PAGES, 11)?;
    // Pages that nobody wrote have to be there too.
    let hash = template.hash(0, 2 * PAGES)?;
    template.act("standby")?;
    template.act("promote-template")?;
    for mode in &world.hypervisor.memory_modes {
        let fork = template.fork(json!({"memory_mode": mode}))?;
        same("its memory mode", mode.clone(), fork.text("memory_mode")?)?;
        same(
            format!("its memory by {mode}"),
            hash.clone(),
            fork.hash(0, 2 * PAGES)?,
        )?;
        same(format!("its counter by {mode}"), 2, fork.count()?)?;
    }
    Ok(())
}

fn generations(world: &mut World) -> Result<(), Failure> {
    world.needs_identity()?;
    let template = world.running("warm")?;
    let mut seen = HashSet::from([template.ask_for("generation", "generation")?]);
    same(
        "the guest's and the server's",
        template.text("generation")?,
        template.ask_for("generation", "generation")?,
    )?;
    template.count()?;
    template.act("standby")?;
    template.act("promote-template")?;
    let before = clock_counter(&template.fork(json!({}))?)?;
    for fork in template.forks(8)? {
        let answer = fork.ask("generation")?;
        let generation = value_of(&answer, "generation").unwrap_or_default().to_owned();
        same(
            format!("the generation of {}", fork.name),
            fork.text("generation")?,
            generation.clone(),
        )?;
        holds(
            seen.insert(generation),
            format!("the generation of {}", fork.name),
            "one of its own",
            &answer,
        )?;
        same(
            "times that its clock was told of a new generation",
            before.clone(),
            clock_counter(&fork)?,
        )?;
    }
    Ok(())
}

/// The vmclock's count of generations, as the guest reads it.
fn clock_counter(vm: &super::vm::Vm) -> Result<String, Failure> {
    vm.ask_for("generation", "vmgen")
}

fn same_machine(world: &mut World) -> Result<(), Failure> {
    world.needs_identity()?;
    let vm = world.running("sleeper")?;
    vm.write(0, PAGES, 3)?;
    let (hash, generation) = (vm.hash(0, PAGES)?, vm.ask_for("generation", "generation")?);
    let told = clock_counter(&vm)?;
    for times in 1..=2 {
        vm.act("standby")?;
        vm.act("restore")?;
        same(
            format!("its generation after standby {times}"),
            generation.clone(),
            vm.ask_for("generation", "generation")?,
        )?;
        same("the server's", generation.clone(), vm.text("generation")?)?;
        same(
            "times that its clock was told of a new generation",
            told.clone(),
            clock_counter(&vm)?,
        )?;
        same("its memory", hash.clone(), vm.hash(0, PAGES)?)?;
        same("its counter", times, vm.count()?)?;
    }
    Ok(())
}
