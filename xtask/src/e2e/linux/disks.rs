//! The disks of a Linux guest, and those of its forks: the first is its image's, the second was given to it by its path.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use super::{Failure, Linux, Scenario, holds, same};
use crate::e2e::vm::Vm;
use crate::e2e::world::World;

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "forks of linux write to the same place of their disk, and none sees another's",
        are_their_own,
    ),
    (
        "forks of linux write to their image's disk, which stays as it is and as long as they do",
        of_the_image_are_their_own,
    ),
    (
        "what linux had not written to its disk before a stop is there at the next start",
        stop_lets_it_write,
    ),
    (
        "a server killed amid a standby of linux costs neither its memory nor its disk",
        killed_amid_standby,
    ),
];

/// The image that the template is made of.
pub(super) const IMAGE: &str = "debian";
const IMAGE_DISK: &str = "/dev/vda";
const OWN_DISK: &str = "/dev/vdb";

const BYTES: usize = 8 << 20;
/// What lies at the beginning of a base.
const BASE: &str = "base";

/// Makes the image file that both disks are based on.
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

/// That the file at `path` is the base as it was made.
fn is_untouched(path: PathBuf) -> Result<(), Failure> {
    let is = std::fs::read(&path).map_err(Failure::file(&path))?;
    holds(is == content(), path.display().to_string(), "as it was", is.len())
}

/// That each fork has the base on this disk, and then what it wrote itself.
fn keep_apart(forks: &[Vm], disk: &str) -> Result<(), Failure> {
    for fork in forks {
        same("what a fork finds on its disk", BASE, &*read(fork, disk)?)?;
    }
    for fork in forks {
        write(fork, disk, &fork.name)?;
    }
    for fork in forks {
        same("what a fork has on its disk", &*fork.name, &*read(fork, disk)?)?;
    }
    Ok(())
}

fn are_their_own(linux: &mut Linux) -> Result<(), Failure> {
    let forks = linux.forks(3)?;
    keep_apart(&forks, OWN_DISK)?;
    // What a fork wrote is what its own forks begin with.
    let [fork, ..] = &*forks else { return Ok(()) };
    fork.act("standby")?;
    fork.act("promote-template")?;
    let next = fork.fork(json!({}))?;
    same("what a fork of it finds", &*fork.name, &*read(&next, OWN_DISK)?)?;
    write(&next, OWN_DISK, &next.name)?;
    let last = fork.fork(json!({}))?;
    same("what another one finds", &*fork.name, &*read(&last, OWN_DISK)?)?;
    is_untouched(linux.world.server.scratch().join("disk.img"))
}

fn of_the_image_are_their_own(linux: &mut Linux) -> Result<(), Failure> {
    let forks = linux.forks(2)?;
    keep_apart(&forks, IMAGE_DISK)?;
    let path = format!("/images/{IMAGE}");
    is_untouched(linux.world.server.data().join(&path[1..]).join("disk0"))?;
    let refused = linux.world.client.delete(&path)?;
    same("the removal of an image in use", 409, refused.status)?;
    same("the reason", "image_in_use", refused.code())?;
    let users = refused.body["details"]["instances"]
        .as_array()
        .map_or(0, Vec::len);
    same("the instances that are named", 1 + forks.len(), users)
}

fn stop_lets_it_write(linux: &mut Linux) -> Result<(), Failure> {
    let fork = linux.template.fork(json!({}))?;
    // It keeps the disk open, for the last one to close it has the kernel write.
    fork.sh(&format!(
        "sh -c 'printf %s {} >&3; touch /run/wrote; sleep 1000' 3<>{OWN_DISK} >/dev/null 2>&1 &
        until [ -e /run/wrote ]; do sleep 0.1; done",
        fork.name
    ))?;
    fork.act("stop")?;
    fork.is_in("Stopped")?;
    fork.act("start")?;
    fork.wait_for_boot()?;
    same("what it finds on its disk", &*fork.name, &*read(&fork, OWN_DISK)?)
}

fn killed_amid_standby(linux: &mut Linux) -> Result<(), Failure> {
    let vm = linux.template.fork(json!({}))?;
    let count = vm.counter()?;
    // The end of the call is as good a moment as any before it: each time another one.
    for delay in [5, 25, 50, 75, 100, 150] {
        let text = format!("before-{delay}");
        write(&vm, OWN_DISK, &text)?;
        let (client, path) = (linux.world.client.clone(), vm.path("/standby"));
        let request = std::thread::spawn(move || client.post(&path, json!(null)));
        // Nothing is waited for: this chooses where in the operation the server dies.
        std::thread::sleep(Duration::from_millis(delay));
        linux.world.server.kill9()?;
        let _ = request.join();
        linux.world.server.start_again()?;
        match vm.state()?.as_str() {
            "Paused" => vm.act("resume").map(drop)?,
            "Standby" => vm.act("restore").map(drop)?,
            // Its agent is being found again.
            _ => {}
        }
        vm.wait_for_boot()?;
        vm.counts_on_from(count)?;
        same("what it finds on its disk", text, read(&vm, OWN_DISK)?)?;
    }
    Ok(())
}

/// Writes to the beginning of the disk; it is there when this returns.
fn write(vm: &Vm, disk: &str, text: &str) -> Result<(), Failure> {
    vm.sh(&format!(
        "printf %s {text} | dd of={disk} bs=512 conv=sync,fsync 2>&1"
    ))
    .map(drop)
}

/// Reads the beginning of the disk, and not of what the kernel remembers of it.
fn read(vm: &Vm, disk: &str) -> Result<String, Failure> {
    vm.sh(&format!(
        "echo 1 >/proc/sys/vm/drop_caches; head -c 512 {disk} | tr -d '\\0'"
    ))
}
