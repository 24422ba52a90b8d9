//! The disk of a Linux guest, and those of its forks.

use std::path::PathBuf;

use serde_json::json;

use super::{Failure, Linux, Scenario, holds, same};
use crate::e2e::vm::Vm;
use crate::e2e::world::World;

pub(super) const SCENARIOS: &[Scenario] = &[(
    "forks of linux write to the same place of their disk, and none sees another's",
    are_their_own,
)];

const BYTES: usize = 8 << 20;
/// What lies at the beginning of the base.
const BASE: &str = "base";

/// Makes the image that the template's disk is based on.
pub(super) fn base(world: &World) -> Result<PathBuf, Failure> {
    let path = world.server.scratch().join("disk.img");
    std::fs::write(&path, content()).map_err(Failure::file(&path))?;
    Ok(path)
}

fn content() -> Vec<u8> {
    let mut content = BASE.as_bytes().to_vec();
    content.resize(BYTES, 0);
    content
}

fn are_their_own(linux: &mut Linux) -> Result<(), Failure> {
    let forks = linux.forks(3)?;
    for fork in &forks {
        same("what a fork finds on its disk", BASE, &*read(fork)?)?;
    }
    for fork in &forks {
        write(fork, &fork.name)?;
    }
    for fork in &forks {
        same("what a fork has on its disk", &*fork.name, &*read(fork)?)?;
    }
    // What a fork wrote is what its own forks begin with.
    let [fork, ..] = &*forks else { return Ok(()) };
    fork.act("standby")?;
    fork.act("promote-template")?;
    let next = fork.fork(json!({}))?;
    same("what a fork of it finds", &*fork.name, &*read(&next)?)?;
    write(&next, &next.name)?;
    let last = fork.fork(json!({}))?;
    same("what another one finds", &*fork.name, &*read(&last)?)?;
    let base = linux.world.server.scratch().join("disk.img");
    let is = std::fs::read(&base).map_err(Failure::file(&base))?;
    holds(is == content(), "the base image", "as it was", is.len())
}

/// Writes to the beginning of the disk; it is there when this returns.
fn write(vm: &Vm, text: &str) -> Result<(), Failure> {
    vm.sh(&format!(
        "printf %s {text} | dd of=/dev/vda bs=512 conv=sync,fsync 2>&1"
    ))
    .map(drop)
}

/// Reads the beginning of the disk, and not of what the kernel remembers of it.
fn read(vm: &Vm) -> Result<String, Failure> {
    vm.sh("echo 1 >/proc/sys/vm/drop_caches; head -c 512 /dev/vda | tr -d '\\0'")
}
