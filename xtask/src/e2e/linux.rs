//! Linux in a VM, on QEMU: forks of it are machines of their own, and commands run in them.
//!
//! Linux boots once. All scenarios share the server, and the template that this Linux became; each ends with nothing left but
//! that template.

mod agent;
mod commands;
mod disks;
mod forks;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use super::failure::{Failure, answered, holds, same};
use super::vm::Vm;
use super::way::Way;
use super::world::World;
use super::{Outcome, Tried};
use crate::build::{self, Built};
use crate::command::{self, Output};
use crate::hypervisor::Hypervisor;
use crate::linux::{self, LinuxError, LinuxImage, shell};
use crate::report;
use crate::setup::NoLinux;

const MEMORY: &str = "256MiB";
/// How long it may take to copy files into a guest or out of it.
const COPY_LIMIT: Duration = Duration::from_secs(60);
/// How many seconds Linux may take to boot; under emulation, on a busy host, it is slow.
const BOOT_SECONDS: u64 = 180;
/// Where the guest has the program of fixtures/getrandom.
const GETRANDOM: &str = "/usr/bin/getrandom";
/// A scenario of a Linux guest.
type Scenario = (&'static str, fn(&mut Linux) -> Result<(), Failure>);

/// What is booted, and what is brought into it.
pub(super) struct Guest {
    image: LinuxImage,
    /// The program of fixtures/getrandom.
    getrandom: PathBuf,
}

impl Guest {
    pub(super) fn build() -> Result<Self, LinuxError> {
        Ok(Self {
            image: linux::image()?,
            getrandom: build::getrandom()?,
        })
    }
}

/// What the scenarios share.
struct Linux {
    world: World,
    template: Vm,
    /// What the template's guest has in its tmpfs.
    token: String,
    /// How far it had counted when it last ran.
    count: u64,
}

/// What the boot is called, which is a scenario too.
const BOOT: &str = "linux boots, its agent is ready, and it becomes a template";

/// The scenarios after the boot whose name has `filter` in it.
fn scenarios(filter: &str) -> impl Iterator<Item = Scenario> {
    let all = [
        forks::SCENARIOS,
        disks::SCENARIOS,
        commands::SCENARIOS,
        agent::SCENARIOS,
    ];
    let all = all.into_iter().flatten().copied();
    all.filter(move |(name, _)| name.to_lowercase().contains(filter))
}

/// Whether there are such scenarios.
pub(super) fn has(filter: &str) -> bool {
    BOOT.contains(filter) || scenarios(filter).next().is_some()
}

/// Tells that there is no Linux to boot.
pub(super) fn skipped(why: &NoLinux) -> Tried {
    Tried::told(
        BOOT.to_owned(),
        Outcome::Skipped(report::chain(why)),
        Instant::now(),
    )
}

/// Tries all scenarios whose name has `filter` in it.
pub(super) fn run(built: &Built, hypervisor: &Arc<Hypervisor>, guest: &Guest, filter: &str) -> Vec<Tried> {
    let began = Instant::now();
    let mut world = match World::new(built, hypervisor, Way::Plain) {
        Ok(world) => world,
        Err(failure) => return vec![Tried::told(BOOT.to_owned(), Outcome::failed(&failure), began)],
    };
    let (template, token, count) = match boot(&world, guest) {
        Ok(booted) => booted,
        Err(failure) => {
            let outcome = Outcome::failed_with(&failure, &world.last_words());
            return vec![Tried::told(BOOT.to_owned(), outcome, began)];
        }
    };
    let mut all = vec![Tried::told(BOOT.to_owned(), Outcome::Passed, began)];
    let mut linux = Linux {
        world,
        template,
        token,
        count,
    };
    for (name, act) in scenarios(filter) {
        let began = Instant::now();
        let outcome = match act(&mut linux) {
            Ok(()) => Outcome::of(linux.clear()),
            Err(Failure::Skipped(reason)) => Outcome::Skipped(reason),
            Err(failure) => Outcome::failed_with(&failure, &linux.world.last_words()),
        };
        // Of a scenario that failed, too: the next one finds the template alone.
        let _ = linux.clear();
        all.push(Tried::told(name.to_owned(), outcome, began));
    }
    let began = Instant::now();
    world = linux.world;
    let ended = world.clear().and_then(|()| world.finish());
    let name = "of a server of Linux guests nothing is left".to_owned();
    all.push(Tried::told(name, Outcome::of(ended), began));
    all
}

/// Boots Linux, brings a program into it, warms it up and makes it a template; what is in its tmpfs, and how far it had counted.
fn boot(world: &World, guest: &Guest) -> Result<(Vm, String, u64), Failure> {
    let Guest { image, getrandom } = guest;
    let add = json!({
        "name": disks::IMAGE, "kernel": image.kernel, "initrd": image.initrd, "cmdline": "console=ttyS0",
        "disks": [disks::base(world)?],
    });
    answered(201, world.client.post("/images", add)?)?;
    let vm = world.create(json!({
        "name": "warm", "hypervisor": "qemu", "image": disks::IMAGE, "memory": MEMORY, "readiness": "agent",
        "disks": [{"path": disks::base(world)?}],
    }))?;
    vm.wait_for_boot()?;
    cp(
        world,
        &getrandom.display().to_string(),
        &format!("{}:{GETRANDOM}", vm.name),
    )?;
    vm.sh(shell::WARM_UP)?;
    let told = vm.sh("cat /run/token; tail -n 1 /run/count")?;
    let mut lines = told.lines();
    let token = lines.next().unwrap_or_default().to_owned();
    let count = number("the counter", lines.next())?;
    vm.act("standby")?;
    vm.act("promote-template")?;
    Ok((vm, token, count))
}

impl Linux {
    /// Forks of the template that run, by one request.
    fn forks(&self, count: usize) -> Result<Vec<Vm>, Failure> {
        self.template.forks(count)
    }

    /// Boots another Linux than the template's.
    fn boot(&self, name: &str, image: &LinuxImage, readiness: Value) -> Result<Vm, Failure> {
        self.world.create(json!({
            "name": name, "hypervisor": "qemu", "kernel": image.kernel, "initrd": image.initrd,
            "cmdline": "console=ttyS0", "memory": MEMORY, "readiness": readiness,
        }))
    }

    /// Boots Linux on another server.
    fn boot_on(&self, world: &World, disks: Value) -> Result<Vm, Failure> {
        let image = self.world.server.data().join("images").join(disks::IMAGE);
        let vm = world.create(json!({
            "name": "elsewhere", "hypervisor": "qemu", "kernel": image.join("kernel"), "initrd": image.join("initrd"),
            "cmdline": "console=ttyS0", "memory": MEMORY, "readiness": "agent", "disks": disks,
        }))?;
        vm.wait_for_boot()?;
        Ok(vm)
    }

    /// Deletes all but the template, forks before what they are forks of.
    fn clear(&self) -> Result<(), Failure> {
        loop {
            let mut refused = None;
            let mut deleted = 0;
            for instance in self.world.list()? {
                let id = instance["id"].as_str().unwrap_or_default();
                if id == self.template.id {
                    continue;
                }
                let reply = self.world.client.delete(&format!("/instances/{id}"))?;
                if reply.status == 204 {
                    deleted += 1;
                } else {
                    refused = Some(reply);
                }
            }
            match refused {
                None => break,
                Some(_) if deleted > 0 => {}
                Some(reply) => answered(204, reply).map(drop)?,
            }
        }
        self.template.is_in("Template")?;
        let left = self.world.server.left_behind();
        let directory = self.template.dir().display().to_string();
        let others: Vec<&String> = left.iter().filter(|what| !what.contains(&directory)).collect();
        holds(
            others.is_empty(),
            "processes and directories beside the template's",
            "none",
            &others,
        )
    }
}

impl Vm {
    fn wait_for_boot(&self) -> Result<(), Failure> {
        let path = self.path(&format!("/wait?state=Running&timeout={BOOT_SECONDS}s"));
        let waited = answered(200, self.client.get(&path)?)?;
        holds(
            waited["reached"] == true,
            format!("{} booted Linux", self.name),
            "Running",
            &waited,
        )
    }

    /// Runs a command as it is asked for; its result.
    fn exec(&self, asked: Value) -> Result<Value, Failure> {
        answered(200, self.client.post(&self.path("/exec"), asked)?)
    }

    /// Runs a script that succeeds; what it wrote.
    fn sh(&self, script: &str) -> Result<String, Failure> {
        let result = self.exec(json!({"cmd": ["sh", "-c", script], "timeout": "100s"}))?;
        written(&format!("`{script}` in {}", self.name), &result)
    }

    /// How far its counter is.
    fn counter(&self) -> Result<u64, Failure> {
        number("the counter", self.sh("tail -n 1 /run/count")?.lines().next())
    }

    /// That it counts on from `count`.
    fn counts_on_from(&self, count: u64) -> Result<(), Failure> {
        let now = self.counter()?;
        holds(
            now >= count,
            "the counter of a fork",
            format!("{count} or more"),
            now,
        )?;
        self.sh(&format!(
            "kill -0 $(cat /run/counter) && while [ $(tail -n 1 /run/count) -le {now} ]; do sleep 0.1; done"
        ))
        .map(drop)
    }

    /// That its clock is the host's, within a second.
    fn has_the_time(&self) -> Result<(), Failure> {
        let before = SystemTime::now();
        let told = self.sh(shell::CLOCK)?;
        let after = SystemTime::now();
        holds(
            shell::clock_off(&told, before, after).is_some_and(|off| off <= shell::CLOCK_LIMIT),
            format!("the clock of {}", self.name),
            format!("a second at most from {before:?} to {after:?}"),
            told,
        )
    }
}

/// Copies as a user does.
fn cp(world: &World, from: &str, to: &str) -> Result<(), Failure> {
    let mut stencil = Command::new(&world.stencil);
    stencil
        .args(["cp", from, to])
        .env("STENCIL_SOCKET", world.server.data().join("stencil.sock"));
    let finished = command::run(&mut stencil, COPY_LIMIT, Output::Kept)?;
    holds(
        finished.succeeded(),
        format!("stencil cp {from} {to}"),
        "success",
        finished.output,
    )
}

/// What a command that succeeded wrote.
fn written(what: &str, result: &Value) -> Result<String, Failure> {
    holds(result["exit_code"] == 0, what, "exit code 0", result)?;
    Ok(result["stdout"].as_str().unwrap_or_default().to_owned())
}

fn number(what: &str, line: Option<&str>) -> Result<u64, Failure> {
    let line = line.unwrap_or_default();
    line.trim().parse().map_err(|_| Failure::Unexpected {
        what: what.to_owned(),
        expected: "a number".to_owned(),
        found: line.to_owned(),
    })
}

/// The outputs of the command that one request ran in each fork.
fn outputs(made: &Value) -> Result<Vec<String>, Failure> {
    let entries = made["forks"].as_array().into_iter().flatten();
    entries
        .map(|entry| written("the command in a fork", &entry["exec"]["result"]))
        .collect()
}
