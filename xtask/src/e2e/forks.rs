//! Forks among each other: isolated, many at once, and templates in their turn.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::Scenario;
use super::failure::{Failure, answered, holds, refused, same};
use super::world::World;

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "forks write to the same pages, and none sees another's; the template's memory keeps its SHA-256",
        isolated,
    ),
    ("a fork of a fork goes on from the fork", fork_of_fork),
    (
        "a fork is put on standby, restored, promoted and forked",
        fork_becomes_template,
    ),
    (
        "a fork of a running instance leaves it running with its counter",
        from_running,
    ),
    ("64 forks at once all answer", sixty_four),
    (
        "forks of a Standby instance are not counted as live forks of a template",
        of_standby,
    ),
    (
        "forks of one request leave out names that are taken, and a request that can make none makes none",
        some_names_taken,
    ),
    (
        "a fork that began on standby never changes the template's memory",
        began_on_standby,
    ),
];

/// The SHA-256 of a file, as hex.
pub(super) fn sha256(path: &Path) -> Result<String, Failure> {
    let mut hasher = HashingWriter(Sha256::new());
    let mut file = File::open(path).map_err(Failure::file(path))?;
    std::io::copy(&mut file, &mut hasher).map_err(Failure::file(path))?;
    Ok(hasher
        .0
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

struct HashingWriter(Sha256);

impl std::io::Write for HashingWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn isolated(world: &mut World) -> Result<(), Failure> {
    let template = world.running("warm")?;
    template.write(0, 256, 1)?;
    template.act("standby")?;
    template.act("promote-template")?;
    let memory = template.snapshot("memory-ranges");
    let before = sha256(&memory)?;
    let forks = template.forks(4)?;
    // Both ways to restore see to it that a write stays where it is.
    let copied = template.fork(json!({"memory_mode": "copy"}))?;
    let mut hashes = Vec::new();
    for (number, fork) in forks.iter().chain([&copied]).enumerate() {
        fork.write(0, 512, 100 + number as u64)?;
        hashes.push(fork.hash(0, 512)?);
    }
    for (fork, hash) in forks.iter().chain([&copied]).zip(&hashes) {
        same(
            format!("what {} has written", fork.name),
            hash.clone(),
            fork.hash(0, 512)?,
        )?;
    }
    let distinct: HashSet<&String> = hashes.iter().collect();
    same("different contents", forks.len() + 1, distinct.len())?;
    same("the template's memory", before.clone(), sha256(&memory)?)?;
    // A fork that is put on standby writes a memory file of its own.
    forks[0].act("standby")?;
    forks[0].act("restore")?;
    same("what it had written", hashes[0].clone(), forks[0].hash(0, 512)?)?;
    same(
        "the template's memory after a fork's standby",
        before,
        sha256(&memory)?,
    )?;
    let next = template.fork(json!({}))?;
    same("the counter of a new fork", 1, next.count()?)
}

fn fork_of_fork(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    let child = template.fork(json!({"name": "child"}))?;
    same("the child's counter", 2, child.count()?)?;
    child.write(0, 64, 9)?;
    let hash = child.hash(0, 64)?;
    child.act("standby")?;
    let grandchild = child.fork(json!({"name": "grandchild"}))?;
    same("the grandchild's counter", 3, grandchild.count()?)?;
    same("the grandchild's memory", hash, grandchild.hash(0, 64)?)?;
    // It was forked of an instance on standby: that is no template, and records nothing.
    same(
        "the grandchild's template",
        json!(null),
        grandchild.show()?["fork_of_template"].clone(),
    )?;
    child.delete()?;
    grandchild.answers()?;
    template.act("demote-template").map(drop)
}

fn fork_becomes_template(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    let child = template.fork(json!({"name": "child"}))?;
    child.count()?;
    child.act("standby")?;
    child.act("restore")?;
    same("the child's counter", 3, child.count()?)?;
    child.act("standby")?;
    child.act("promote-template")?;
    let grandchildren = child.forks(2)?;
    for grandchild in &grandchildren {
        same("its counter", 4, grandchild.count()?)?;
        same(
            "its template",
            json!(child.id),
            grandchild.show()?["fork_of_template"].clone(),
        )?;
    }
    // A template that is a fork itself is a live fork of its own template.
    let reply = template.try_act("demote-template")?;
    let error = refused(409, "template_in_use", reply)?;
    same(
        "the fork that is named",
        json!(child.id),
        error["details"]["forks"][0]["id"].clone(),
    )?;
    for grandchild in &grandchildren {
        grandchild.delete()?;
    }
    child.act("demote-template")?;
    child.act("restore")?;
    same("the child's counter in the end", 4, child.count()?)
}

fn from_running(world: &mut World) -> Result<(), Failure> {
    let source = world.running("source")?;
    source.count()?;
    source.count()?;
    source.write(0, 64, 5)?;
    let hash = source.hash(0, 64)?;
    let generation = source.text("generation")?;
    let fork = source.fork(json!({"from_running": true, "name": "fork"}))?;
    source.is_in("Running")?;
    same("the fork's counter", 3, fork.count()?)?;
    same("the source's counter", 3, source.count()?)?;
    same("the fork's memory", hash.clone(), fork.hash(0, 64)?)?;
    same("the source's memory", hash, source.hash(0, 64)?)?;
    same(
        "the source's generation",
        generation.clone(),
        source.text("generation")?,
    )?;
    if world.hypervisor.tells_identity {
        same(
            "the source's generation, as its guest has it",
            generation.clone(),
            source.ask_for("generation", "generation")?,
        )?;
    }
    holds(
        fork.text("generation")? != generation,
        "the fork's generation",
        "one of its own",
        &generation,
    )?;
    same("is_template", json!(false), source.show()?["is_template"].clone())?;
    same(
        "the fork's template",
        json!(null),
        fork.show()?["fork_of_template"].clone(),
    )?;
    // Many at once, too; and the source goes on as before.
    let made = answered(201, source.try_forks(json!({"count": 3, "from_running": true}))?)?;
    same("forks", 3, made["forks"].as_array().map_or(0, Vec::len))?;
    same("the source's counter afterwards", 4, source.count()?)
}

fn sixty_four(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    let forks = template.forks(64)?;
    let mut generations = HashSet::new();
    let mut pids = HashSet::new();
    for fork in &forks {
        fork.answers()?;
        same(format!("the counter of {}", fork.name), 2, fork.count()?)?;
        generations.insert(fork.text("generation")?);
        pids.insert(fork.pid()?.as_raw_nonzero());
    }
    same("generations", 64, generations.len())?;
    same("processes", 64, pids.len())?;
    same(
        "forks of the template",
        json!(64),
        template.show()?["forks"]["count"].clone(),
    )
}

fn of_standby(world: &mut World) -> Result<(), Failure> {
    let source = world.standby("source")?;
    let fork = source.fork(json!({}))?;
    source.act("promote-template")?;
    same("forks", json!(0), source.show()?["forks"]["count"].clone())?;
    source.act("demote-template")?;
    source.delete()?;
    same("the fork's counter without its source", 2, fork.count()?)
}

fn some_names_taken(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    template.fork(json!({"name": "job-2"}))?;
    let made = answered(
        201,
        template.try_forks(json!({"count": 3, "name_prefix": "job"}))?,
    )?;
    let names: Vec<&str> = made["forks"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| entry["name"].as_str())
        .collect();
    same(
        "their names, the taken one left out",
        vec!["job-1", "job-3", "job-4"],
        names,
    )
}

fn began_on_standby(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    let linked = template.fork(json!({"name": "linked", "target_state": "Standby"}))?;
    let memory = template.snapshot("memory-ranges");
    let before = sha256(&memory)?;
    // It may share the template's file; waking it, its work and its own standby may not change that.
    linked.act("restore")?;
    linked.write(0, 256, 77)?;
    linked.act("standby")?;
    same("the template's memory", before.clone(), sha256(&memory)?)?;
    linked.delete()?;
    same(
        "the template's memory after the fork's end",
        before,
        sha256(&memory)?,
    )?;
    template.fork(json!({}))?.answers()
}
