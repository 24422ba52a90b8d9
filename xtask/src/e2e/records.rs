//! Metadata that cannot be read: nothing is guessed, and nothing is lost.

use std::fs;

use serde_json::{Value, json};

use super::Scenario;
use super::failure::{Failure, answered, holds, refused, same};
use super::forks::sha256;
use super::world::World;

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "with unreadable metadata of one fork, demote and delete of the template fail and lose nothing",
        unreadable,
    ),
    (
        "a server that starts ends no VM whose record it cannot read",
        unreadable_at_start,
    ),
    (
        "a server on a copy of a data directory leaves the original's VMs alone",
        copied_directory,
    ),
    ("metadata of a later version are not touched", later_version),
    (
        "fields of the metadata that this version does not know are kept",
        unknown_fields,
    ),
];

fn unreadable(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    let forks = template.forks(2)?;
    let memory = template.snapshot("memory-ranges");
    let before = sha256(&memory)?;
    let metadata = forks[0].dir().join("metadata.json");
    let kept = fs::read(&metadata).map_err(Failure::file(&metadata))?;
    for broken in [Some("{ this is no metadata"), Some(""), None] {
        match broken {
            Some(content) => fs::write(&metadata, content).map_err(Failure::file(&metadata))?,
            None => fs::remove_file(&metadata).map_err(Failure::file(&metadata))?,
        }
        for reply in [
            template.try_act("demote-template")?,
            template.try_act("stop")?,
            template.try_delete()?,
        ] {
            let error = refused(409, "unreadable_metadata", reply)?;
            let message = error["message"].as_str().unwrap_or_default();
            holds(
                message.contains(&forks[0].id),
                "the message",
                "the instance that cannot be read",
                message,
            )?;
            let data = world.server.data().display().to_string();
            holds(
                !error.to_string().contains(&data),
                "the error",
                "no path of the server",
                &error,
            )?;
        }
        same("the template's memory", before.clone(), sha256(&memory)?)?;
        same(
            "the template",
            json!(true),
            template.show()?["is_template"].clone(),
        )?;
        forks[0].is_in("Unknown")?;
        forks[1].answers()?;
    }
    fs::write(&metadata, kept).map_err(Failure::file(&metadata))?;
    forks[0].is_in("Running")?;
    forks[0].answers()?;
    refused(409, "template_in_use", template.try_delete()?)?;
    for fork in &forks {
        fork.delete()?;
    }
    template.act("demote-template")?;
    template.act("restore")?;
    same("the template's counter", 2, template.count()?)
}

fn unreadable_at_start(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("keep")?;
    let before = vm.count()?;
    let pid = vm.pid()?;
    let metadata = vm.dir().join("metadata.json");
    let kept = fs::read(&metadata).map_err(Failure::file(&metadata))?;
    for broken in ["{ this is no metadata", "", "{\"schema\": 99}"] {
        fs::write(&metadata, broken).map_err(Failure::file(&metadata))?;
        world.server.kill9()?;
        world.server.start_again()?;
        vm.is_in("Unknown")?;
        fs::write(&metadata, &kept).map_err(Failure::file(&metadata))?;
        vm.is_in("Running")?;
        same("its process", pid, vm.pid()?)?;
        vm.answers()?;
    }
    same("its guest's counter", before + 1, vm.count()?)?;
    // What cannot be read can be deleted, and then its VM ends.
    fs::write(&metadata, "").map_err(Failure::file(&metadata))?;
    world.server.kill9()?;
    world.server.start_again()?;
    vm.delete()?;
    world.is_empty()
}

fn copied_directory(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("keep")?;
    let pid = vm.pid()?;
    let second = world.server.start_on_copy()?;
    let path = vm.path("");
    let copy = answered(200, second.client().get(&path)?)?;
    let why = copy["state_error"].as_str().unwrap_or_default();
    holds(
        copy["state"] == "Stopped" && why.contains("copy"),
        "the copied instance",
        "Stopped, because it is a copy",
        &copy,
    )?;
    answered(204, second.client().delete(&path)?)?;
    second.finish()?;
    same("the original's process", pid, vm.pid()?)?;
    vm.answers()
}

fn later_version(world: &mut World) -> Result<(), Failure> {
    let vm = world.standby("later")?;
    let metadata = vm.dir().join("metadata.json");
    let kept = fs::read_to_string(&metadata).map_err(Failure::file(&metadata))?;
    let later =
        kept.replacen("\"schema\": 1", "\"schema\": 99", 1)
            .replacen("\"schema\":1", "\"schema\":99", 1);
    holds(later != kept, "the metadata", "a schema", &kept)?;
    fs::write(&metadata, &later).map_err(Failure::file(&metadata))?;
    vm.is_in("Unknown")?;
    let error = vm.text("state_error")?;
    holds(
        error.contains("99") && error.contains('1'),
        "the state_error",
        "both versions",
        &error,
    )?;
    for operation in ["start", "stop", "restore", "promote-template"] {
        let reply = vm.try_act(operation)?;
        let refused = [409, 500].contains(&reply.status) && !reply.code().is_empty();
        holds(refused, format!("{operation} of it"), "409 or 500", &reply.body)?;
    }
    world.server.kill9()?;
    world.server.start_again()?;
    same(
        "the file",
        later,
        fs::read_to_string(&metadata).map_err(Failure::file(&metadata))?,
    )?;
    vm.is_in("Unknown")?;
    fs::write(&metadata, kept).map_err(Failure::file(&metadata))?;
    vm.act("restore")?;
    same("its counter", 2, vm.count()?)
}

fn unknown_fields(world: &mut World) -> Result<(), Failure> {
    let vm = world.standby("kept")?;
    let metadata = vm.dir().join("metadata.json");
    let read = || -> Result<Value, Failure> {
        let content = fs::read_to_string(&metadata).map_err(Failure::file(&metadata))?;
        serde_json::from_str(&content)
            .map_err(std::io::Error::from)
            .map_err(Failure::file(&metadata))
    };
    let mut changed = read()?;
    changed["from_the_future"] = json!({"a": [1, 2]});
    fs::write(&metadata, changed.to_string()).map_err(Failure::file(&metadata))?;
    vm.act("promote-template")?;
    same(
        "the field after a rewrite",
        json!({"a": [1, 2]}),
        read()?["from_the_future"].clone(),
    )?;
    let fork = vm.fork(json!({}))?;
    let of_fork = fork.dir().join("metadata.json");
    let content = fs::read_to_string(&of_fork).map_err(Failure::file(&of_fork))?;
    holds(
        !content.contains("from_the_future"),
        "the fork's metadata",
        "nothing that is not on the list",
        &content,
    )?;
    answered(204, fork.try_delete()?).map(drop)
}
