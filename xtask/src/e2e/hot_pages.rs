//! The pages that forks touch first: recorded by one fork, there ahead in later ones.

use std::fs;

use serde_json::{Value, json};

use super::Scenario;
use super::failure::{Failure, holds, same};
use super::vm::Vm;
use super::world::World;

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "the first fork of a template records its hot pages, and later ones have them ahead",
        recorded_and_used,
    ),
    ("damaged hot pages are ignored, and recorded anew", damaged),
    ("demote forgets hot pages, and removes their file", forgotten),
];

const PAGES: u64 = 512;

/// Later forks, of which one has to have what was recorded: the server takes a recording behind its requests.
const LATER_FORKS: usize = 50;

/// A template with contents, whose first fork has recorded.
fn recorded(world: &World) -> Result<(Vm, String), Failure> {
    // In this mode the first fork records.
    world.needs_mode("uffd")?;
    let template = world.running("warm")?;
    template.write(0, PAGES, 7)?;
    let hash = template.hash(0, PAGES)?;
    template.act("standby")?;
    template.act("promote-template")?;
    record(&template)?;
    Ok((template, hash))
}

/// A fork touches its pages; on standby its recording closes.
fn record(template: &Vm) -> Result<(), Failure> {
    let fork = template.fork(json!({}))?;
    fork.hash(0, PAGES)?;
    holds(
        fork.show()?["pages"]["demand_faults"].as_u64() > Some(0),
        "the fork that records",
        "served by userfaultfd",
        fork.show()?["pages"].to_string(),
    )?;
    fork.act("standby")?;
    Ok(())
}

/// The first fork that had pages fetched ahead, in this mode.
fn fork_with_hot_pages(template: &Vm, mode: &str) -> Result<Vm, Failure> {
    let mut pages = Value::Null;
    for _ in 0..LATER_FORKS {
        let fork = template.fork(json!({"memory_mode": mode}))?;
        pages = fork.show()?["pages"].clone();
        if pages["prefetched"].as_u64() >= Some(PAGES) {
            return Ok(fork);
        }
        fork.delete()?;
    }
    Err(Failure::Unexpected {
        what: "pages of a later fork".to_owned(),
        expected: format!("at least {PAGES} prefetched"),
        found: pages.to_string(),
    })
}

fn recorded_and_used(world: &mut World) -> Result<(), Failure> {
    let (template, hash) = recorded(world)?;
    for mode in ["uffd", "cow"] {
        let fork = if world.hypervisor.counts_pages(mode) {
            fork_with_hot_pages(&template, mode)?
        } else {
            template.fork(json!({"memory_mode": mode}))?
        };
        if mode == "cow" && world.hypervisor.counts_pages(mode) {
            // The pages were read, so that they are ahead and still shared.
            let copied = fork.show()?["pages"]["prefetched_written"].as_u64();
            holds(
                copied < Some(PAGES / 2),
                "pages that were copied ahead",
                "few",
                copied,
            )?;
        }
        same(
            format!("its memory by {mode}"),
            hash.clone(),
            fork.hash(0, PAGES)?,
        )?;
    }
    same(
        "that the template has hot pages",
        json!(true),
        template.show()?["hot_pages"].clone(),
    )
}

fn damaged(world: &mut World) -> Result<(), Failure> {
    let (template, hash) = recorded(world)?;
    fork_with_hot_pages(&template, "uffd")?;
    let list = world
        .server
        .data()
        .join("templates")
        .join(&template.id)
        .join("hot-pages");
    let length = fs::metadata(&list).map_err(Failure::file(&list))?.len();
    fs::OpenOptions::new()
        .write(true)
        .open(&list)
        .and_then(|file| file.set_len(length - 1))
        .map_err(Failure::file(&list))?;
    record(&template)?;
    let fork = fork_with_hot_pages(&template, "uffd")?;
    same("its memory", hash, fork.hash(0, PAGES)?)
}

fn forgotten(world: &mut World) -> Result<(), Failure> {
    let (template, _) = recorded(world)?;
    fork_with_hot_pages(&template, "uffd")?;
    for fork in world.list()? {
        if fork["is_template"] == false {
            world.vm(&fork)?.delete()?;
        }
    }
    template.act("demote-template")?;
    same(
        "that it has hot pages",
        json!(false),
        template.show()?["hot_pages"].clone(),
    )?;
    let list = world.server.data().join("templates").join(&template.id);
    holds(
        !list.exists(),
        "what is kept for the template",
        "gone",
        list.display().to_string(),
    )
}
