//! Snapshot directories that are empty, truncated or of another version: told, and nothing lost.

use std::fs::{self, OpenOptions, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

use super::Scenario;
use super::failure::{Failure, holds, refused, same};
use super::vm::Vm;
use super::world::World;

pub(super) const SCENARIOS: &[Scenario] = &[
    ("an empty snapshot directory is no snapshot", empty),
    (
        "an emptied template is Unknown, and its forks live on",
        emptied_template,
    ),
    (
        "truncated memory makes the instance Unknown with its reason",
        truncated_memory,
    ),
    (
        "a truncated state file makes the instance Unknown with its reason",
        truncated_state,
    ),
    (
        "a snapshot by another version of the VMM is refused and kept",
        other_version,
    ),
    ("a manifest of a later schema is refused and kept", later_schema),
];

fn empty(world: &mut World) -> Result<(), Failure> {
    let vm = world.standby("emptied")?;
    clear(&vm.dir().join("snapshot"))?;
    // A snapshot without its manifest does not exist.
    vm.is_in("Stopped")?;
    refused(409, "invalid_state", vm.try_act("restore")?)?;
    refused(409, "invalid_state", vm.try_act("promote-template")?)?;
    refused(
        400,
        "invalid_request",
        vm.try_fork(json!({"target_state": "Paused"}))?,
    )?;
    vm.act("start")?;
    vm.wait("Running")
}

fn emptied_template(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    let fork = template.fork(json!({}))?;
    clear(&template.dir().join("snapshot"))?;
    is_broken(&template)?;
    same("the fork's counter", 2, fork.count()?)?;
    refused(409, "template_in_use", template.try_delete()?)?;
    fork.delete()?;
    template.delete()
}

fn truncated_memory(world: &mut World) -> Result<(), Failure> {
    let vm = world.standby("cut")?;
    truncate(&vm.snapshot("memory-ranges"))?;
    is_broken(&vm)?;
    let template = world.template("warm")?;
    truncate(&template.snapshot("memory-ranges"))?;
    is_broken(&template)?;
    vm.delete()?;
    template.delete()?;
    world.is_empty()
}

fn truncated_state(world: &mut World) -> Result<(), Failure> {
    for file in ["state.json", "config.json", "manifest.json"] {
        let vm = world.standby("cut")?;
        truncate(&vm.snapshot(file))?;
        is_broken(&vm)?;
        vm.delete()?;
    }
    world.is_empty()
}

fn other_version(world: &mut World) -> Result<(), Failure> {
    let vm = world.standby("older")?;
    let kept = change_manifest(&vm, "hypervisor_version", json!("stencil-microvm 0.0.1"))?;
    let error = refused(409, "invalid_state", vm.try_act("restore")?)?;
    let message = error["message"].as_str().unwrap_or_default();
    holds(
        message.contains("0.0.1"),
        "the message",
        "the version that made it",
        message,
    )?;
    refused(409, "invalid_state", vm.try_fork(json!({}))?)?;
    vm.is_in("Standby")?;
    same("instances", 1, world.list()?.len())?;
    write(&vm.snapshot("manifest.json"), &kept)?;
    vm.act("restore")?;
    same("its counter", 2, vm.count()?)
}

fn later_schema(world: &mut World) -> Result<(), Failure> {
    let vm = world.standby("later")?;
    let kept = change_manifest(&vm, "schema", json!(99))?;
    is_broken(&vm)?;
    write(&vm.snapshot("manifest.json"), &kept)?;
    vm.is_in("Standby")?;
    vm.act("restore")?;
    same("its counter", 2, vm.count()?)
}

/// That the instance is told to be broken, and that nothing but delete is done to it.
fn is_broken(vm: &Vm) -> Result<(), Failure> {
    vm.is_in("Unknown")?;
    let error = vm.text("state_error")?;
    holds(
        !error.is_empty(),
        format!("the state_error of {}", vm.name),
        "a reason",
        &error,
    )?;
    for operation in [
        "start",
        "stop",
        "standby",
        "restore",
        "promote-template",
        "demote-template",
    ] {
        refused(409, "invalid_state", vm.try_act(operation)?)?;
    }
    refused(409, "invalid_state", vm.try_fork(json!({}))?)?;
    refused(409, "invalid_state", vm.try_forks(json!({"count": 2}))?)?;
    vm.is_in("Unknown")
}

/// Changes a field of the manifest; its content before.
fn change_manifest(vm: &Vm, field: &str, value: Value) -> Result<String, Failure> {
    let path = vm.snapshot("manifest.json");
    let kept = fs::read_to_string(&path).map_err(Failure::file(&path))?;
    let mut manifest: Value = serde_json::from_str(&kept)
        .map_err(std::io::Error::from)
        .map_err(Failure::file(&path))?;
    manifest[field] = value;
    write(&path, &manifest.to_string())?;
    Ok(kept)
}

fn write(path: &Path, content: &str) -> Result<(), Failure> {
    fs::write(path, content).map_err(Failure::file(path))
}

fn clear(directory: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(directory)
        .map_err(Failure::file(directory))?
        .flatten()
    {
        fs::remove_file(entry.path()).map_err(Failure::file(entry.path()))?;
    }
    Ok(())
}

/// Halves a file, though it be read-only.
fn truncate(path: &Path) -> Result<(), Failure> {
    let size = fs::metadata(path).map_err(Failure::file(path))?.len();
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(Failure::file(path))?;
    let file = OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(Failure::file(path))?;
    file.set_len(size / 2).map_err(Failure::file(path))
}
