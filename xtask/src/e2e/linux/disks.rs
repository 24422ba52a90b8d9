//! The disks of a Linux guest, and those of its forks: the first is its image's, the second was given to it by its path.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use super::{Failure, Linux, Scenario, holds, same};
use crate::command::{self, Output};
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
        "linux whose host's disk is full is Paused with the reason, and goes on when there is room",
        host_is_full,
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

/// How long a mount may take.
const MOUNT_LIMIT: Duration = Duration::from_secs(10);

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

/// A small file system of its own, unmounted when it goes.
struct Small(TempDir);

impl Small {
    fn new(megabytes: u32) -> Result<Self, Failure> {
        let at = tempfile::tempdir().map_err(Failure::file(std::env::temp_dir()))?;
        let small = Self(at);
        small.mount(&format!("size={megabytes}m,mode=700"))?;
        Ok(small)
    }

    fn grow(&self, megabytes: u32) -> Result<(), Failure> {
        self.mount(&format!("remount,size={megabytes}m"))
    }

    fn mount(&self, options: &str) -> Result<(), Failure> {
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(self.0.path());
        let mounted = command::run(&mut mount, MOUNT_LIMIT, Output::Kept)?;
        if mounted.succeeded() {
            return Ok(());
        }
        Err(Failure::Skipped(
            "this user may not mount a file system; run it as root".to_owned(),
        ))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Where it was never mounted there is nothing to undo.
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

fn host_is_full(linux: &mut Linux) -> Result<(), Failure> {
    let small = Small::new(24)?;
    let world = linux.world.another_in(small.0.path().to_owned(), &[])?;
    let scratch = tempfile::tempdir().map_err(Failure::file(std::env::temp_dir()))?;
    let base = scratch.path().join("disk.img");
    let made = File::create(&base).and_then(|file| file.set_len(64 << 20));
    made.map_err(Failure::file(&base))?;
    let vm = linux.boot_on(&world, json!([{"path": base}]))?;
    // More than there is room for on the host.
    vm.sh("(dd if=/dev/urandom of=/dev/vda bs=1M count=40 conv=fsync && touch /run/done) >/dev/null 2>&1 &")?;
    vm.wait("Paused")?;
    let why = vm.text("state_error")?;
    holds(why.contains("no room"), "the reason", "the host's disk", &why)?;
    for operation in ["resume", "standby"] {
        let refused = vm.try_act(operation)?;
        same(
            format!("the code of {operation}"),
            "insufficient_resources",
            refused.code(),
        )?;
        same(format!("the status of {operation}"), 507, refused.status)?;
        vm.is_in("Paused")?;
    }
    let refused = world.client.post(&vm.path("/exec"), json!({"cmd": ["true"]}))?;
    same("a command in it", 409, refused.status)?;
    small.grow(200)?;
    vm.act("resume")?;
    vm.sh("until [ -e /run/done ]; do sleep 0.1; done")?;
    vm.is_in("Running")?;
    vm.delete()?;
    world.finish()
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
