//! Memory: above the hole below 4 GiB, sparse on disk, shared between forks.

use std::os::unix::fs::MetadataExt;

use serde_json::json;

use super::Scenario;
use super::failure::{Failure, holds, same};
use super::vm::Vm;
use super::world::World;
use crate::{guest_console, host, report};

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "memory above the hole below 4 GiB is there, on standby and in a fork",
        above_the_hole,
    ),
    (
        "a snapshot keeps holes where its VMM leaves them, and forks share what they do not write",
        shared,
    ),
];

/// Guest memory that reaches above 4 GiB, in bytes.
const LARGE: u64 = 5 << 30;
/// Where the hole may begin, in bytes: QEMU's q35 has it from 2 GiB on, the others from 3.
const HOLES: [u64; 2] = [2 << 30, 3 << 30];
/// Where the guest's page numbers begin, in bytes. They leave out the hole, and what firmware keeps below it.
const FIRST: u64 = 16 << 20;
/// More pages than firmware keeps.
const KEPT: u64 = 64;

fn above_the_hole(world: &mut World) -> Result<(), Failure> {
    let host = host::memory_bytes();
    if host < LARGE + (LARGE / 4) {
        return Err(Failure::Skipped(format!(
            "this host has {}, and a VM of 5 GiB is needed",
            report::bytes(host)
        )));
    }
    let vm = world.create(world.request_with("large", json!({"memory": "5GiB"})))?;
    vm.wait("Running")?;
    let last = last_page(&vm)?;
    let number = |bytes: u64| (bytes - FIRST) / 4096;
    holds(
        (number(LARGE) - KEPT..number(LARGE)).contains(&last),
        "the last page",
        format!("at most {KEPT} below {}", number(LARGE)),
        last,
    )?;
    // On both sides of the hole, above it, and the very last page.
    let [early, late] = HOLES.map(|hole| (number(hole) - KEPT, 2 * KEPT));
    let written = [(0, 4), early, late, (number(HOLES[1]) + 100_000, 4), (last, 1)];
    let mut hashes = Vec::new();
    for (number, (page, count)) in written.into_iter().enumerate() {
        vm.write(page, count, 50 + number as u64)?;
        hashes.push(vm.hash(page, count)?);
    }
    let distinct: std::collections::HashSet<&String> = hashes.iter().collect();
    same("different contents", written.len(), distinct.len())?;
    vm.act("standby")?;
    vm.act("restore")?;
    for ((page, count), hash) in written.iter().zip(&hashes) {
        same(
            format!("page {page} after standby"),
            hash.clone(),
            vm.hash(*page, *count)?,
        )?;
    }
    vm.act("standby")?;
    vm.act("promote-template")?;
    for mode in &world.hypervisor.memory_modes {
        let fork = vm.fork(json!({"memory_mode": mode}))?;
        for ((page, count), hash) in written.iter().zip(&hashes) {
            same(
                format!("page {page} in a fork by {mode}"),
                hash.clone(),
                fork.hash(*page, *count)?,
            )?;
        }
        fork.delete()?;
    }
    Ok(())
}

/// The guest's last page, which it names when it is asked for one beyond.
fn last_page(vm: &Vm) -> Result<u64, Failure> {
    let answer = guest_console::ask(&vm.client, &vm.id, &format!("hash {} 1", u64::MAX))?;
    let last = answer
        .rsplit_once("beyond the last, ")
        .and_then(|(_, last)| last.parse().ok());
    last.ok_or_else(|| Failure::Unexpected {
        what: "a page that there is not".to_owned(),
        expected: "which one is the last".to_owned(),
        found: answer,
    })
}

fn shared(world: &mut World) -> Result<(), Failure> {
    /// Bytes that the template writes and its forks read: more than twice what a VMM has for itself, of which QEMU has 20 MiB.
    const WRITTEN: u64 = 64 << 20;
    let template = world.create(world.request_with("warm", json!({"memory": "512MiB"})))?;
    template.wait("Running")?;
    template.write(0, WRITTEN / 4096, 1)?;
    template.act("standby")?;
    template.act("promote-template")?;
    let memory = template.snapshot("memory-ranges");
    let file = std::fs::metadata(&memory).map_err(Failure::file(&memory))?;
    let on_disk = file.blocks() * 512;
    // The guest itself is small.
    if world.hypervisor.leaves_holes() {
        holds(
            on_disk < 2 * WRITTEN,
            "the memory on disk",
            "less than 128 MiB",
            report::bytes(on_disk),
        )?;
    }
    same("the memory's permissions", 0o400, file.mode() & 0o777)?;
    // The first fork records: each page that it touches becomes its own.
    template.fork(json!({}))?;
    let forks = template.forks(4)?;
    // They read all that the template wrote; a page that only one process has mapped counts as private to it.
    for fork in &forks {
        fork.ask(&format!("touch 0 {} 1", WRITTEN / 4096))?;
    }
    for fork in &forks {
        let shown = fork.show()?;
        let bytes = |field: &str| shown["memory_use"][field].as_u64().unwrap_or(u64::MAX);
        holds(
            bytes("private") < WRITTEN / 2,
            "private memory of a fork",
            "less than 32 MiB",
            shown["memory_use"].to_string(),
        )?;
        let rss = bytes("rss");
        holds(
            rss >= WRITTEN,
            "resident memory of a fork that read 64 MiB",
            "64 MiB or more",
            shown["memory_use"].to_string(),
        )?;
    }
    Ok(())
}
