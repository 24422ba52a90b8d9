//! Armed forks: prepared before they are asked for.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use serde_json::{Value, json};

use super::Scenario;
use super::failure::{Failure, answered, holds, refused, same};
use super::pressure::Pressure;
use super::vm::Vm;
use super::world::World;
use crate::armed::was_armed;
use crate::processes;

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "armed forks are taken, go on from the template, and are machines of their own",
        taken,
    ),
    (
        "armed forks are no instances, and a template with nothing else is demoted",
        no_instances,
    ),
    ("a killed pool costs nobody a fork", killed_pool),
    (
        "a killed server leaves armed forks to the next one, which ends them and arms its own",
        killed_server,
    ),
    (
        "a server that ends in order takes its armed forks along",
        ended_server,
    ),
    (
        "a pool is made larger and smaller, and wrong sizes are refused",
        resized,
    ),
    (
        "armed forks go when the host runs short of memory, and forks are made all the same",
        short_of_memory,
    ),
    (
        "24 forks at once from a pool of 8 all answer, and the pool is filled again",
        more_than_armed,
    ),
];

const PAGES: u64 = 256;
/// How long it is tried to make the host short of memory.
const PRESSURE_LIMIT: Duration = Duration::from_secs(20);
/// A host whose tasks waited for so long in that time is short of memory by any measure: the server is told at 200 ms in 2 s.
const MUCH_WAITED: Duration = Duration::from_secs(8);
/// Requests after which a pool has to be full; each takes a moment in which it fills.
const LOOKS: usize = 20_000;

/// A template with so many armed forks, whose hot pages are known where they are recorded at all.
pub(super) fn armed(world: &World, count: u64) -> Result<Vm, Failure> {
    let template = world.running("warm")?;
    template.count()?;
    template.write(0, PAGES, 7)?;
    template.act("standby")?;
    let promoted = world
        .client
        .post(&template.path("/promote-template"), json!({"armed": count}))?;
    same(
        "how many are to be armed",
        json!(count),
        answered(200, promoted)?["armed"]["target"].clone(),
    )?;
    if world.has_mode("uffd") {
        // The first one records, and on standby its recording closes.
        let recorder = template.fork(json!({}))?;
        recorder.hash(0, PAGES)?;
        recorder.act("standby")?;
        until(&template, "hot pages known", |shown| shown["hot_pages"] == true)?;
        recorder.delete()?;
    }
    until_full(&template, count)?;
    Ok(template)
}

pub(super) fn until_full(template: &Vm, count: u64) -> Result<(), Failure> {
    until(template, "a full pool", |shown| shown["armed"]["ready"] == count)
}

fn until(template: &Vm, what: &str, holds: impl Fn(&Value) -> bool) -> Result<(), Failure> {
    let mut shown = Value::Null;
    for _ in 0..LOOKS {
        shown = template.show()?;
        if holds(&shown) {
            return Ok(());
        }
        std::thread::yield_now();
    }
    Err(Failure::Unexpected {
        what: format!("{} after {LOOKS} looks", template.name),
        expected: what.to_owned(),
        found: shown.to_string(),
    })
}

/// A fork, and whether it was taken from the pool.
fn fork(world: &World, template: &Vm) -> Result<(Vm, bool), Failure> {
    let made = answered(201, template.try_fork(json!({}))?)?;
    Ok((world.vm(&made)?, was_armed(&made)))
}

/// The VMMs of the server that belong to no instance: the armed ones.
fn armed_processes(world: &World) -> Result<Vec<Pid>, Failure> {
    let instances: HashSet<i64> = world.list()?.iter().filter_map(|vm| vm["pid"].as_i64()).collect();
    Ok(processes::vmms_below(&world.server.instances())
        .into_iter()
        .map(|process| process.pid)
        .filter(|pid| !instances.contains(&i64::from(pid.as_raw_nonzero().get())))
        .collect())
}

fn taken(world: &mut World) -> Result<(), Failure> {
    let template = armed(world, 2)?;
    let hash = fork(world, &template)?.0.hash(0, PAGES)?;
    let mut generations = HashSet::new();
    for _ in 0..6 {
        until_full(&template, 2)?;
        let (fork, was_armed) = fork(world, &template)?;
        holds(was_armed, "where the fork came from", "the pool", &fork.name)?;
        same("its counter", 2, fork.count()?)?;
        same("its memory", hash.clone(), fork.hash(0, PAGES)?)?;
        let generation = fork.text("generation")?;
        if world.hypervisor.tells_identity {
            same(
                "the guest's generation",
                generation.clone(),
                fork.ask_for("generation", "generation")?,
            )?;
        }
        holds(
            generations.insert(generation.clone()),
            "its generation",
            "one of its own",
            generation,
        )?;
        if world.hypervisor.counts_pages("cow") {
            let pages = fork.show()?["pages"].clone();
            holds(
                pages["prefetched"].as_u64() >= Some(PAGES),
                "its hot pages",
                "there ahead",
                pages.to_string(),
            )?;
        }
    }
    Ok(())
}

fn no_instances(world: &mut World) -> Result<(), Failure> {
    let template = armed(world, 3)?;
    same("instances", 1, world.list()?.len())?;
    same("live forks", json!(0), template.show()?["forks"]["count"].clone())?;
    same("armed processes", 3, armed_processes(world)?.len())?;
    template.act("demote-template")?;
    same("armed processes after demote", 0, armed_processes(world)?.len())?;
    template.act("restore")?;
    same("its counter", 2, template.count()?)
}

fn killed_pool(world: &mut World) -> Result<(), Failure> {
    let template = armed(world, 4)?;
    for round in 0..3 {
        until_full(&template, 4)?;
        for pid in armed_processes(world)? {
            processes::kill(pid).map_err(|source| Failure::Unexpected {
                what: "kill of an armed fork".to_owned(),
                expected: "done".to_owned(),
                found: source.to_string(),
            })?;
        }
        let (fork, _) = fork(world, &template)?;
        same(format!("the counter in round {round}"), 2, fork.count()?)?;
    }
    until_full(&template, 4)
}

fn killed_server(world: &mut World) -> Result<(), Failure> {
    let template = armed(world, 3)?;
    let (fork, _) = fork(world, &template)?;
    until_full(&template, 3)?;
    let before: HashSet<Pid> = armed_processes(world)?.into_iter().collect();
    world.server.kill9()?;
    world.server.start_again()?;
    until_full(&template, 3)?;
    let after: HashSet<Pid> = armed_processes(world)?.into_iter().collect();
    same("armed processes", 3, after.len())?;
    holds(
        before.is_disjoint(&after),
        "the armed forks of the killed server",
        "ended",
        format!("{before:?} {after:?}"),
    )?;
    same("the counter of a fork that ran", 2, fork.count()?)
}

fn ended_server(world: &mut World) -> Result<(), Failure> {
    let template = armed(world, 3)?;
    let (fork, _) = fork(world, &template)?;
    world.server.terminate()?;
    let left = processes::working_below(&world.server.instances());
    same("VMMs without a server", 1, left.len())?;
    world.server.start_again()?;
    same("the counter of a fork that ran", 2, fork.count()?)?;
    until_full(&template, 3)
}

fn resized(world: &mut World) -> Result<(), Failure> {
    let template = armed(world, 1)?;
    let patch = |body: Value| world.client.patch(&template.path(""), body);
    answered(200, patch(json!({"armed": 3}))?)?;
    until_full(&template, 3)?;
    let shown = answered(200, patch(json!({"armed": 1}))?)?;
    same("armed", json!({"target": 1, "ready": 1}), shown["armed"].clone())?;
    same("armed processes", 1, armed_processes(world)?.len())?;
    for wrong in [json!({"armed": 5000}), json!({"armed": "many"}), json!({})] {
        refused(400, "invalid_request", patch(wrong)?)?;
    }
    answered(200, patch(json!({"armed": null}))?)?;
    same("armed processes", 0, armed_processes(world)?.len())?;
    template.act("demote-template")?;
    refused(409, "invalid_state", patch(json!({"armed": 1}))?).map(drop)
}

fn more_than_armed(world: &mut World) -> Result<(), Failure> {
    let template = armed(world, 8)?;
    let forks = template.forks(24)?;
    for fork in &forks {
        same(format!("the counter of {}", fork.name), 2, fork.count()?)?;
    }
    until_full(&template, 8)?;
    same(
        "live forks",
        json!(24),
        template.show()?["forks"]["count"].clone(),
    )
}

fn short_of_memory(world: &mut World) -> Result<(), Failure> {
    let template = armed(world, 3)?;
    let pressure = Pressure::begin(world.server.scratch())?;
    let began = Instant::now();
    while template.show()?["armed"]["ready"] != 0 {
        if began.elapsed() > PRESSURE_LIMIT {
            let waited = pressure.waited()?;
            if waited < MUCH_WAITED {
                return Err(Failure::Skipped(format!(
                    "this host's tasks waited for memory for only {waited:?} in {PRESSURE_LIMIT:?}"
                )));
            }
            return Err(Failure::Unexpected {
                what: "armed forks".to_owned(),
                expected: "none".to_owned(),
                found: format!(
                    "{}, after {waited:?} of waiting for memory",
                    template.show()?["armed"]
                ),
            });
        }
        std::thread::yield_now();
    }
    // They are out of the pool at once, and end behind it.
    for process in armed_processes(world)? {
        same(
            "whether an armed fork ended",
            true,
            processes::wait_for_end(process, PRESSURE_LIMIT)?,
        )?;
    }
    // Forks are made all the same.
    let (fork, was_armed) = fork(world, &template)?;
    same("whether it was armed", false, was_armed)?;
    same("its counter", 2, fork.count()?)
}
