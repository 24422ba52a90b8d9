//! An instance's whole life, looking it up, and waiting for it.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use serde_json::json;

use super::Scenario;
use super::failure::{Failure, answered, holds, refused, same};
use super::world::World;
use crate::processes;

pub(super) const SCENARIOS: &[Scenario] = &[
    ("an instance lives its whole life", whole_life),
    ("what is asked for and already so is a no-op", already_there),
    (
        "an instance is found by id, by name and by a unique beginning of its id",
        found,
    ),
    (
        "the list can be narrowed to a state and to the forks of a template",
        narrowed,
    ),
    (
        "waiting ends when the state is reached, and says so when it is not",
        waited,
    ),
    ("delete leaves no process, no file and no socket", deleted),
    ("a shown instance tells all of itself", shown),
    (
        "the server's socket and directories are for its user alone",
        for_its_user_alone,
    ),
];

fn whole_life(world: &mut World) -> Result<(), Failure> {
    let vm = world.create(world.request_with("life", json!({"start": false})))?;
    vm.is_in("Stopped")?;
    vm.act("start")?;
    vm.wait("Running")?;
    same("the first count", 1, vm.count()?)?;
    vm.act("pause")?;
    vm.is_in("Paused")?;
    vm.act("resume")?;
    same("the count after a pause", 2, vm.count()?)?;
    vm.act("standby")?;
    vm.is_in("Standby")?;
    vm.act("restore")?;
    vm.is_in("Running")?;
    same("the count after standby", 3, vm.count()?)?;
    vm.act("standby")?;
    vm.act("promote-template")?;
    vm.is_in("Template")?;
    let fork = vm.fork(json!({}))?;
    fork.is_in("Running")?;
    same("the fork's count", 4, fork.count()?)?;
    fork.delete()?;
    fork.is_gone()?;
    vm.act("demote-template")?;
    vm.is_in("Standby")?;
    vm.act("restore")?;
    same("the count after all of it", 4, vm.count()?)?;
    vm.act("stop")?;
    vm.is_in("Stopped")?;
    vm.act("start")?;
    vm.wait("Running")?;
    same("the count of a new boot", 1, vm.count()?)?;
    vm.delete()?;
    vm.is_gone()?;
    world.is_empty()
}

fn already_there(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("again")?;
    vm.count()?;
    let pid = vm.pid()?;
    for operation in ["start", "resume", "restore"] {
        vm.act(operation)?;
    }
    vm.act("pause")?;
    vm.act("pause")?;
    vm.act("resume")?;
    same("the process", pid, vm.pid()?)?;
    same("the count", 2, vm.count()?)?;
    vm.act("standby")?;
    vm.act("standby")?;
    vm.act("stop")?;
    vm.act("stop")?;
    vm.is_in("Stopped")
}

fn found(world: &mut World) -> Result<(), Failure> {
    let [one, two] =
        ["one", "two"].map(|name| world.create(world.request_with(name, json!({"start": false}))));
    let (one, two) = (one?, two?);
    let id_of = |reference: &str| -> Result<String, Failure> {
        let shown = answered(200, world.client.get(&format!("/instances/{reference}"))?)?;
        Ok(shown["id"].as_str().unwrap_or_default().to_owned())
    };
    same("by id", one.id.clone(), id_of(&one.id)?)?;
    same("by name", two.id.clone(), id_of("two")?)?;
    let common = one
        .id
        .chars()
        .zip(two.id.chars())
        .take_while(|(one, two)| one == two)
        .count();
    same(
        "by a unique beginning of its id",
        one.id.clone(),
        id_of(&one.id[..=common])?,
    )?;
    refused(
        409,
        "ambiguous",
        world.client.get(&format!("/instances/{}", &one.id[..common]))?,
    )?;
    refused(404, "not_found", world.client.get("/instances/nobody")?)?;
    for operation in [
        "start",
        "stop",
        "pause",
        "resume",
        "standby",
        "restore",
        "promote-template",
        "demote-template",
    ] {
        refused(
            404,
            "not_found",
            world
                .client
                .post(&format!("/instances/nobody/{operation}"), json!(null))?,
        )?;
    }
    refused(
        404,
        "not_found",
        world.client.post("/instances/nobody/fork", json!({}))?,
    )?;
    refused(
        404,
        "not_found",
        world
            .client
            .post("/instances/nobody/forks", json!({"count": 1}))?,
    )?;
    refused(
        404,
        "not_found",
        world
            .client
            .get("/instances/nobody/wait?state=Running&timeout=1s")?,
    )?;
    refused(404, "not_found", world.client.get("/instances/nobody/console")?)?;
    refused(404, "not_found", world.client.delete("/instances/nobody")?).map(drop)
}

fn narrowed(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    let fork = template.fork(json!({"name": "fork"}))?;
    let names = |query: &str| -> Result<Vec<String>, Failure> {
        let list = answered(200, world.client.get(&format!("/instances{query}"))?)?;
        let list = list
            .as_array()
            .or_else(|| list["instances"].as_array())
            .cloned()
            .unwrap_or_default();
        Ok(list
            .iter()
            .filter_map(|instance| instance["name"].as_str().map(str::to_owned))
            .collect())
    };
    same(
        "all, oldest first",
        vec![template.name.clone(), fork.name.clone()],
        names("")?,
    )?;
    same(
        "templates",
        vec![template.name.clone()],
        names("?state=Template")?,
    )?;
    same("running ones", vec![fork.name.clone()], names("?state=Running")?)?;
    same(
        "forks of the template",
        vec![fork.name.clone()],
        names("?template=warm")?,
    )?;
    same("both", Vec::new(), names("?template=warm&state=Paused")?)?;
    refused(
        400,
        "invalid_request",
        world.client.get("/instances?state=Asleep")?,
    )
    .map(drop)
}

fn waited(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("awaited")?;
    let at_once = answered(200, world.client.get(&vm.path("/wait?state=Running"))?)?;
    same("a state that is there", json!(true), at_once["reached"].clone())?;
    let never = answered(
        200,
        world.client.get(&vm.path("/wait?state=Template&timeout=1s"))?,
    )?;
    same(
        "a state that does not come",
        json!(false),
        never["reached"].clone(),
    )?;
    same(
        "the state that is there instead",
        json!("Running"),
        never["instance"]["state"].clone(),
    )?;
    refused(
        400,
        "invalid_request",
        world.client.get(&vm.path("/wait?state=Asleep&timeout=1s"))?,
    )?;
    refused(
        400,
        "invalid_request",
        world.client.get(&vm.path("/wait?state=Running&timeout=long"))?,
    )?;
    // The state comes while it is waited for.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| vm.wait(world.when_down()));
        vm.ask("halt")?;
        waiting
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn deleted(world: &mut World) -> Result<(), Failure> {
    let running = world.running("running")?;
    let on_standby = world.standby("standby")?;
    let paused = world.running("paused")?;
    paused.act("pause")?;
    let halted = world.running("halted")?;
    halted.ask("halt")?;
    halted.wait(world.when_down())?;
    let mut pids = vec![running.pid()?, paused.pid()?];
    if world.hypervisor.outlives_guest {
        pids.push(halted.pid()?);
    }
    for vm in [&running, &on_standby, &paused, &halted] {
        vm.delete()?;
        vm.is_gone()?;
        refused(404, "not_found", vm.try_delete()?)?;
    }
    for pid in pids {
        // Zero: it has ended before the answer came.
        holds(
            processes::wait_for_end(pid, Duration::ZERO)?,
            "the process of a deleted instance",
            "none",
            pid,
        )?;
    }
    world.is_empty()
}

fn shown(world: &mut World) -> Result<(), Failure> {
    answered(200, world.client.get("/health")?)?;
    answered(200, world.client.get("/version")?)?;
    let request = json!({"labels": {"team": "blue"}});
    let template = world.create(world.request_with("told", request))?;
    template.wait("Running")?;
    let running = template.show()?;
    for field in [
        "id",
        "name",
        "state",
        "hypervisor",
        "vcpus",
        "memory",
        "is_template",
        "generation",
        "hot_pages",
        "labels",
        "readiness",
        "kernel",
        "created_at",
        "started_at",
        "pid",
        "timings",
        "memory_use",
    ] {
        holds(
            !running[field].is_null(),
            format!("`{field}` of a running instance"),
            "a value",
            running.to_string(),
        )?;
    }
    same("labels", json!({"team": "blue"}), running["labels"].clone())?;
    same("memory", json!(64 << 20), running["memory"].clone())?;
    same("vcpus", json!(1), running["vcpus"].clone())?;
    template.act("standby")?;
    template.act("promote-template")?;
    let fork = template.fork(json!({"memory_mode": "copy"}))?;
    let forked = fork.show()?;
    same(
        "the fork's template",
        json!(template.id),
        forked["fork_of_template"].clone(),
    )?;
    same(
        "the fork's memory mode",
        json!("copy"),
        forked["memory_mode"].clone(),
    )?;
    same(
        "labels of the fork",
        json!({"team": "blue"}),
        forked["labels"].clone(),
    )?;
    let told = template.show()?;
    same("is_template", json!(true), told["is_template"].clone())?;
    same(
        "the template's forks",
        json!({"count": 1, "ids": [fork.id]}),
        told["forks"].clone(),
    )?;
    same("the pid of a template", json!(null), told["pid"].clone())
}

fn for_its_user_alone(world: &mut World) -> Result<(), Failure> {
    let data = world.server.data();
    let [socket, instances, templates] =
        ["stencil.sock", "instances", "templates"].map(|name| data.join(name));
    for (path, expected) in [(socket, 0o600), (instances, 0o700), (templates, 0o700)] {
        let metadata = std::fs::metadata(&path).map_err(Failure::file(&path))?;
        let mode = metadata.permissions().mode() & 0o777;
        same(
            format!("the permissions of {}", path.display()),
            format!("{expected:o}"),
            format!("{mode:o}"),
        )?;
    }
    Ok(())
}
