//! Many forks at once: a fleet that the host has no room for is not begun, and one that dies half-way leaves its other half.

use std::collections::HashSet;
use std::fs;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use serde_json::{Value, json};

use super::failure::{Failure, holds, refused, same};
use super::vm::Vm;
use super::world::World;
use super::{Scenario, armed};
use crate::arrivals::NEW_PREFIX;
use crate::client::Reply;
use crate::{host, processes, report};

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "VMMs killed while a fleet of forks comes up cost their own forks and no other",
        half_killed,
    ),
    (
        "armed forks killed while a fleet takes them leave the other forks, and a pool that fills again",
        pool_under_fire,
    ),
    (
        "more forks than the server may have files open for are refused before anything starts",
        too_many_files,
    ),
    ("armed forks give way to forks that are asked for", armed_give_way),
    (
        "forks that copy more memory than the host has are refused before anything starts",
        too_much_memory,
    ),
];

/// Forks of one call.
const FLEET: usize = 32;
/// How often a fleet is tried until one of its forks is hit while it comes up.
const ROUNDS: usize = 10;
/// The most forks of one call.
const MOST: u64 = 1024;

fn half_killed(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    let mut hit = false;
    for round in 0..ROUNDS {
        let (reply, killed) = fleet_under_fire(world, &template, &format!("round-{round}"))?;
        hit |= reply.status == 207;
        let failed = halves(world, &reply, killed, 0)?;
        same(
            "the answer to a fleet of which some failed",
            if failed.is_empty() { 201 } else { 207 },
            reply.status,
        )?;
        for name in &failed {
            // Nothing of it is in the way of another one.
            template.fork(json!({"name": name}))?.answers()?;
        }
        template.is_in("Template")?;
        for fork in forks(world)? {
            fork.delete()?;
        }
        if hit {
            return Ok(());
        }
    }
    holds(hit, "fleets under fire", "one of which some fail", ROUNDS)
}

fn pool_under_fire(world: &mut World) -> Result<(), Failure> {
    const ARMED: usize = 8;
    let template = armed::armed(world, ARMED as u64)?;
    for round in 0..3 {
        let (reply, killed) = fleet_under_fire(world, &template, &format!("round-{round}"))?;
        holds(killed > 0, "VMMs killed", "some", killed)?;
        armed::until_full(&template, ARMED as u64)?;
        for name in halves(world, &reply, killed, ARMED)? {
            template.fork(json!({"name": name}))?.answers()?;
        }
        for fork in forks(world)? {
            fork.delete()?;
        }
        armed::until_full(&template, ARMED as u64)?;
    }
    template.act("demote-template").map(drop)
}

/// Asks for a fleet, and kills every third VMM that is seen before it is an instance's; the answer, and how many were killed.
fn fleet_under_fire(world: &World, template: &Vm, prefix: &str) -> Result<(Reply, usize), Failure> {
    let instances = world.server.instances();
    let (source, request) = (template.clone(), json!({"count": FLEET, "name_prefix": prefix}));
    let asked = std::thread::spawn(move || source.ask_for_forks("/forks", request));
    let (mut seen, mut killed) = (HashSet::new(), 0);
    while !asked.is_finished() {
        for found in processes::vmms_below(&instances) {
            let directory = fs::read_link(format!("/proc/{}/cwd", found.pid.as_raw_nonzero()));
            let is_new = directory.is_ok_and(|path| {
                let name = path.file_name().unwrap_or_default();
                name.to_string_lossy().starts_with(NEW_PREFIX)
            });
            if is_new && seen.insert(found.pid) && seen.len() % 3 == 0 {
                // It may have ended since.
                let _ = kill_process(found.pid, Signal::KILL);
                killed += 1;
            }
        }
    }
    let asked = asked
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    Ok((template.let_them_run(asked)?, killed))
}

/// That each fork is there and answers, was killed after it was made, or left nothing; the names of the latter. So many
/// others are armed.
fn halves(world: &World, reply: &Reply, killed: usize, armed: usize) -> Result<Vec<String>, Failure> {
    let entries = reply.body["forks"].as_array().cloned().unwrap_or_default();
    same("entries of the answer", FLEET, entries.len())?;
    let (mut failed, mut up, mut hit) = (Vec::new(), 0, 0);
    for entry in &entries {
        let name = entry["name"].as_str().unwrap_or_default();
        if entry["error"].is_null() {
            let fork = world.vm(&entry["instance"])?;
            let shown = fork.show()?;
            let error = shown["state_error"].as_str().unwrap_or_default();
            if error.contains("SIGKILL") {
                hit += 1;
            } else {
                fork.is_in("Running")?;
                fork.answers()?;
                same("the counter of a fork that came up", 2, fork.count()?)?;
                up += 1;
            }
        } else {
            let message = entry["error"]["message"].as_str().unwrap_or_default();
            holds(!message.is_empty(), "why there is no fork", "a message", entry)?;
            refused(404, "not_found", world.client.get(&format!("/instances/{name}"))?)?;
            failed.push(name.to_owned());
        }
    }
    holds(
        hit + failed.len() <= killed,
        "forks that failed",
        format!("at most the {killed} whose VMM was killed"),
        reply.body.to_string(),
    )?;
    // What is on disk and what runs are those that came up, and the template.
    let listed: HashSet<String> = world
        .list()?
        .iter()
        .filter_map(|instance| Some(instance["id"].as_str()?.to_owned()))
        .collect();
    let instances = world.server.instances();
    let (new, on_disk): (HashSet<String>, HashSet<String>) = fs::read_dir(&instances)
        .map_err(Failure::file(&instances))?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .partition(|name| name.starts_with(NEW_PREFIX));
    same("instances", up + hit + 1, listed.len())?;
    same("directories", listed, on_disk)?;
    same("directories of forks that are armed", armed, new.len())?;
    same("VMMs", up + armed, processes::vmms_below(&instances).len())?;
    Ok(failed)
}

/// All instances but the template.
fn forks(world: &World) -> Result<Vec<Vm>, Failure> {
    let instances = world.list()?;
    let forks = instances
        .iter()
        .filter(|instance| !instance["fork_of_template"].is_null());
    forks.map(|instance| world.vm(instance)).collect()
}

fn too_many_files(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    let limit = |files| limit_open_files(world, files);
    limit(120)?;
    let error = refused(
        507,
        "insufficient_resources",
        template.try_forks(json!({"count": 100}))?,
    )?;
    same(
        "the resource",
        json!("open_files"),
        error["details"]["resource"].clone(),
    )?;
    same("what is needed", json!(100), error["details"]["needed"].clone())?;
    nothing_was_begun(world, &template)?;
    // As many as it says there is room for can be made, and one more cannot.
    let room = error["details"]["room_for"].as_u64().unwrap_or_default();
    holds(
        (1..100).contains(&room),
        "room",
        "some, and for less than 100",
        &error,
    )?;
    limit(70)?;
    refused(507, "insufficient_resources", template.try_fork(json!({}))?)?;
    // What starts no VMM needs none of it.
    template.fork(json!({"target_state": "Stopped"}))?.delete()?;
    nothing_was_begun(world, &template)?;
    limit(120)?;
    let room = usize::try_from(room).unwrap_or_default();
    for fork in template.forks(room)? {
        fork.answers()?;
    }
    Ok(())
}

fn limit_open_files(world: &World, files: u64) -> Result<(), Failure> {
    let limit = Rlimit {
        current: Some(files),
        maximum: getrlimit(Resource::Nofile).maximum,
    };
    prlimit(Some(world.server.pid()?), Resource::Nofile, limit)?;
    Ok(())
}

fn armed_give_way(world: &mut World) -> Result<(), Failure> {
    armed::armed(world, 24)?;
    let other = world.template("other")?;
    // Of some 36 descriptors for VMMs, armed forks have 24.
    limit_open_files(world, 120)?;
    for fork in other.forks(20)? {
        same("its counter", 2, fork.count()?)?;
    }
    Ok(())
}

fn too_much_memory(world: &mut World) -> Result<(), Failure> {
    /// Bytes that the guest fills.
    const FILLED: u64 = 96 << 20;
    let host = host::memory_bytes();
    if host > MOST * FILLED {
        return Err(Failure::Skipped(format!(
            "this host has {}, room for more forks than one call may ask for",
            report::bytes(host)
        )));
    }
    let vm = world.create(world.request_with("warm", json!({"memory": "128MiB"})))?;
    vm.wait("Running")?;
    vm.write(0, FILLED / 4096, 7)?;
    vm.act("standby")?;
    vm.act("promote-template")?;
    // In these each fork has all of the memory to itself.
    let copying = ["copy", "uffd", "ondemand"];
    for memory_mode in copying.into_iter().filter(|mode| world.has_mode(mode)) {
        let request = json!({"count": MOST, "memory_mode": memory_mode});
        let error = refused(507, "insufficient_resources", vm.try_forks(request)?)?;
        same(
            "the resource",
            json!("memory"),
            error["details"]["resource"].clone(),
        )?;
        let needed = error["details"]["needed"].as_u64().unwrap_or_default();
        holds(
            needed > MOST * FILLED,
            "what is needed",
            "at least what the guest filled",
            &error,
        )?;
        nothing_was_begun(world, &vm)?;
    }
    vm.fork(json!({"memory_mode": "copy"}))?.answers()
}

fn nothing_was_begun(world: &World, template: &Vm) -> Result<(), Failure> {
    let shown: Vec<Value> = world
        .list()?
        .iter()
        .map(|instance| instance["id"].clone())
        .collect();
    same("the instances", vec![json!(template.id)], shown)?;
    let instances = world.server.instances();
    let on_disk = fs::read_dir(&instances)
        .map_err(Failure::file(&instances))?
        .count();
    same("directories", 1, on_disk)?;
    same("processes", 0, processes::working_below(&instances).len())
}
