//! Guests with several vCPUs, and vCPUs that never leave the guest by themselves.

use serde_json::{Value, json};

use super::Scenario;
use super::failure::{Failure, answered, holds, same};
use super::vm::Vm;
use super::world::World;
use crate::guest_console::GuestConsole;
use crate::host;

pub(super) const SCENARIOS: &[Scenario] = &[
    ("a guest with two vCPUs uses both, and so does its fork", two),
    (
        "a fork uses two vCPUs that its template had already started",
        two_started,
    ),
    (
        "a guest that spins is paused, resumed and put on standby, and spins on",
        spins,
    ),
];

/// An instance with two vCPUs whose guest is ready, if the host can do that at all.
fn with_two(world: &World) -> Result<Vm, Failure> {
    let reply = world.try_create(world.request_with("pair", json!({"vcpus": 2})))?;
    if reply.status == 500 && !host::has_hardware_kvm() {
        return Err(Failure::Skipped(format!(
            "this host refuses a second vCPU: {}",
            reply.body
        )));
    }
    let vm = world.vm(&answered(201, reply)?)?;
    vm.wait("Running")?;
    Ok(vm)
}

/// That the guest finds both of its vCPUs at work.
fn uses_both(vm: &Vm) -> Result<(), Failure> {
    let cpus = vm.ask_for("cpus", "cpus")?;
    if cpus == "1" && !host::has_hardware_kvm() {
        return Err(Failure::Skipped(
            "this host's KVM does not start a second vCPU by INIT-SIPI".to_owned(),
        ));
    }
    same(format!("vCPUs that worked in {}", vm.name), "2".to_owned(), cpus)
}

fn two(world: &mut World) -> Result<(), Failure> {
    let vm = with_two(world)?;
    vm.count()?;
    vm.act("standby")?;
    vm.act("promote-template")?;
    let fork = vm.fork(json!({}))?;
    same("vcpus of the fork", json!(2), fork.show()?["vcpus"].clone())?;
    uses_both(&fork)?;
    same("the fork's counter", 2, fork.count()?)
}

fn two_started(world: &mut World) -> Result<(), Failure> {
    let vm = with_two(world)?;
    uses_both(&vm)?;
    vm.act("pause")?;
    vm.act("resume")?;
    uses_both(&vm)?;
    vm.act("standby")?;
    vm.act("promote-template")?;
    for mode in &world.hypervisor.memory_modes {
        let fork = vm.fork(json!({"memory_mode": mode}))?;
        uses_both(&fork)?;
        fork.answers()?;
    }
    Ok(())
}

fn spins(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("top")?;
    vm.ask("spin")?;
    vm.act("pause")?;
    vm.is_in("Paused")?;
    vm.act("resume")?;
    vm.act("standby")?;
    vm.is_in("Standby")?;
    let fork = vm.fork(json!({"name": "twin"}))?;
    vm.act("restore")?;
    for vm in [&vm, &fork] {
        let mut console = GuestConsole::open(&world.client, &vm.id)?;
        console.write(b"\n")?;
        let spun = console.line_that("spin", |line| line.starts_with("ok spun="))?;
        holds(
            spun != "ok spun=0",
            format!("what {} did meanwhile", vm.name),
            "some spins",
            &spun,
        )?;
        vm.answers()?;
        same(
            format!("the state of {}", vm.name),
            Value::from("Running"),
            vm.show()?["state"].clone(),
        )?;
    }
    Ok(())
}
