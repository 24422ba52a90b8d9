//! What ends without being asked to: the server, a VMM, a guest.

use std::collections::HashSet;
use std::fs;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Scenario;
use super::failure::{Failure, answered, holds, refused, same};
use super::world::World;
use crate::arrivals::{Arrival, Arrivals};
use crate::processes;

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "a server that was killed and started again finds its VMs running and answering",
        server_killed,
    ),
    (
        "VMs go on while a server that ended in order is away",
        server_ended,
    ),
    (
        "a VMM that died while no server was there shows an error",
        vmm_killed_unseen,
    ),
    (
        "a server killed amid a batch of forks leaves nothing half-made",
        killed_amid_forks,
    ),
    (
        "a server killed amid a standby leaves the instance before or after it",
        killed_amid_standby,
    ),
    (
        "a VMM killed with SIGKILL shows as an error with its reason",
        vmm_killed,
    ),
    (
        "a VMM that hangs is told as Unknown, and can be deleted",
        vmm_hangs,
    ),
    (
        "a guest that faults shows the triple fault, and can be started again",
        guest_faults,
    ),
    (
        "a guest that halts is Shutdown without an error, or Stopped where its VMM ends with it",
        guest_halts,
    ),
];

/// How long forks may take to appear.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(60);

fn server_killed(world: &mut World) -> Result<(), Failure> {
    let plain = world.running("plain")?;
    plain.count()?;
    let template = world.template("warm")?;
    let forks = template.forks(3)?;
    let paused = template.fork(json!({"target_state": "Paused"}))?;
    let asleep = world.standby("asleep")?;
    let pids = [
        plain.pid()?,
        forks[0].pid()?,
        forks[1].pid()?,
        forks[2].pid()?,
        paused.pid()?,
    ];
    for _ in 0..2 {
        world.server.kill9()?;
        for pid in pids {
            holds(processes::lives(pid), "a VMM without its server", "alive", pid)?;
        }
        world.server.start_again()?;
    }
    same(
        "pids",
        pids,
        [
            plain.pid()?,
            forks[0].pid()?,
            forks[1].pid()?,
            forks[2].pid()?,
            paused.pid()?,
        ],
    )?;
    plain.is_in("Running")?;
    paused.is_in("Paused")?;
    template.is_in("Template")?;
    asleep.is_in("Standby")?;
    same("the counter of a VM that went on", 2, plain.count()?)?;
    for fork in &forks {
        same("the counter of a fork that went on", 2, fork.count()?)?;
    }
    same(
        "forks that the template has",
        json!(4),
        template.show()?["forks"]["count"].clone(),
    )?;
    paused.act("resume")?;
    same("the counter of the paused one", 2, paused.count()?)?;
    asleep.act("restore")?;
    same("the counter of the one on standby", 2, asleep.count()?)?;
    // Those found again are managed like any other.
    plain.act("standby")?;
    plain.act("restore")?;
    same("the counter after a standby", 3, plain.count()?)?;
    for fork in &forks {
        fork.delete()?;
    }
    for pid in &pids[1..4] {
        holds(
            processes::wait_for_end(*pid, Duration::ZERO)?,
            "the process of a deleted fork",
            "none",
            pid,
        )?;
    }
    Ok(())
}

fn server_ended(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("plain")?;
    vm.count()?;
    let pid = vm.pid()?;
    world.server.terminate()?;
    holds(processes::lives(pid), "its VMM", "alive", pid)?;
    world.server.start_again()?;
    vm.is_in("Running")?;
    same("its pid", pid, vm.pid()?)?;
    same("its counter", 2, vm.count()?)
}

fn vmm_killed_unseen(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("unseen")?;
    let pid = vm.pid()?;
    world.server.kill9()?;
    processes::kill(pid)?;
    world.server.start_again()?;
    vm.is_in("Stopped")?;
    let error = vm.text("state_error")?;
    holds(
        error.contains("ended"),
        "its state_error",
        "that its VMM ended",
        &error,
    )?;
    vm.act("start")?;
    vm.wait("Running")?;
    same("its state_error", json!(null), vm.show()?["state_error"].clone())
}

fn killed_amid_forks(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    // At different moments: when the first fork has taken its name, and when several have.
    for (round, killed_after) in [1, 3, 9].into_iter().enumerate() {
        let mut arrivals = Arrivals::watch(&world.server.instances())?;
        let (source, prefix) = (template.clone(), format!("round-{round}"));
        let request =
            std::thread::spawn(move || source.try_forks(json!({"count": 16, "name_prefix": prefix})));
        let deadline = Instant::now() + ARRIVAL_LIMIT;
        let mut named = 0;
        while named < killed_after {
            match arrivals.next_by(deadline)? {
                Some((_, Arrival::Named(_))) => named += 1,
                Some((_, Arrival::Awake(_))) => {}
                None => return holds(false, "forks that appear", killed_after.to_string(), named),
            }
        }
        world.server.kill9()?;
        // It has lost its server: there is no answer to look at.
        let _ = request.join();
        world.server.start_again()?;
        let mut listed = HashSet::new();
        for instance in world.list()? {
            let vm = world.vm(&instance)?;
            listed.insert(vm.id.clone());
            match instance["state"].as_str() {
                Some("Template") => continue,
                Some("Running" | "Initializing") => vm.wait("Running")?,
                // Those that do not run of themselves: the server died before it was asked to let them.
                Some("Paused") if !world.hypervisor.tells_identity => vm.act("resume").map(drop)?,
                _ => {
                    return holds(false, "a fork after the crash", "Running", instance.to_string());
                }
            }
            same("its counter", 2, vm.count()?)?;
            vm.delete()?;
        }
        holds(
            listed.contains(&template.id),
            "the instances after the crash",
            "the template",
            &listed,
        )?;
        let instances = world.server.instances();
        for entry in fs::read_dir(&instances)
            .map_err(Failure::file(&instances))?
            .flatten()
        {
            same(
                "what is left of instances",
                template.id.clone(),
                entry.file_name().to_string_lossy().into_owned(),
            )?;
        }
        let strays = processes::working_below(&world.server.data());
        holds(strays.is_empty(), "processes", "none", &strays)?;
        template.is_in("Template")?;
    }
    template.fork(json!({}))?.answers()
}

fn killed_amid_standby(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("sleeper")?;
    vm.needs_snapshots()?;
    let mut count = vm.count()?;
    // The end of the call is as good a moment as any before it: each time another one.
    for delay in [0, 2, 5, 10, 20, 40] {
        let (client, path) = (world.client.clone(), vm.path("/standby"));
        let request = std::thread::spawn(move || client.post(&path, json!(null)));
        // Nothing is waited for: this chooses where in the operation the server dies.
        std::thread::sleep(Duration::from_millis(delay));
        world.server.kill9()?;
        let _ = request.join();
        world.server.start_again()?;
        match vm.state()?.as_str() {
            "Running" => {}
            "Paused" => vm.act("resume").map(drop)?,
            "Standby" => vm.act("restore").map(drop)?,
            other => {
                return holds(
                    false,
                    "its state after the crash",
                    "Running, Paused or Standby",
                    format!("{other}: {}", vm.show()?),
                );
            }
        }
        count += 1;
        same("its counter", count, vm.count()?)?;
        let processes = processes::working_below(&world.server.data());
        same("processes", 1, processes.len())?;
    }
    Ok(())
}

fn vmm_killed(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("victim")?;
    let template = world.template("warm")?;
    let fork = template.fork(json!({}))?;
    for vm in [&vm, &fork] {
        processes::kill(vm.pid()?)?;
        vm.wait("Stopped")?;
        let error = vm.text("state_error")?;
        holds(
            error.contains("SIGKILL") && error.contains('9'),
            "its state_error",
            "signal 9 (SIGKILL)",
            &error,
        )?;
        same("its pid", json!(null), vm.show()?["pid"].clone())?;
    }
    // The dead fork is still a fork, and the instance can be started again.
    refused(409, "template_in_use", template.try_delete()?)?;
    vm.act("start")?;
    vm.wait("Running")?;
    vm.answers()?;
    same("its state_error", json!(null), vm.show()?["state_error"].clone())?;
    fork.delete()?;
    template.delete()
}

fn vmm_hangs(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("hung")?;
    let pid = vm.pid()?;
    rustix::process::kill_process(pid, rustix::process::Signal::STOP)?;
    vm.wait("Unknown")?;
    let error = vm.text("state_error")?;
    holds(
        error.contains("does not answer"),
        "its state_error",
        "that its VMM does not answer",
        &error,
    )?;
    vm.delete()?;
    holds(
        processes::wait_for_end(pid, Duration::ZERO)?,
        "its process",
        "none",
        pid,
    )?;
    vm.is_gone()
}

fn guest_faults(world: &mut World) -> Result<(), Failure> {
    world.needs_shutdown()?;
    world.needs_faults()?;
    let vm = world.running("faulty")?;
    vm.ask("fault")?;
    vm.wait("Shutdown")?;
    let error = vm.text("state_error")?;
    holds(
        error.to_lowercase().contains("triple fault"),
        "its state_error",
        "the triple fault",
        &error,
    )?;
    vm.act("start")?;
    vm.wait("Running")?;
    vm.answers()?;
    same("its state_error", json!(null), vm.show()?["state_error"].clone())
}

fn guest_halts(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("orderly")?;
    vm.ask("halt")?;
    vm.wait(world.when_down())?;
    same("its state_error", json!(null), vm.show()?["state_error"].clone())?;
    let stopped = answered(200, vm.try_act("stop")?)?;
    same("its state", json!("Stopped"), stopped["state"].clone())
}
