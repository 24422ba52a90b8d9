//! Every operation in every state. What is expected is written down here, and not taken from the code that is tested.

use std::path::Path;

use hyper::Method;
use serde_json::{Value, json};

use super::Scenario;
use super::failure::{Failure, answered, holds, refused, same};
use super::vm::Vm;
use super::world::World;
use crate::client::{Body, Client};

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "every operation in a Stopped instance does what the table says",
        |world| try_state(world, "Stopped"),
    ),
    (
        "every operation in a Created instance does what the table says",
        |world| try_state(world, "Created"),
    ),
    (
        "every operation in an Initializing instance does what the table says",
        |world| try_state(world, "Initializing"),
    ),
    (
        "every operation in a Running instance does what the table says",
        |world| try_state(world, "Running"),
    ),
    (
        "every operation in a Paused instance does what the table says",
        |world| try_state(world, "Paused"),
    ),
    (
        "every operation in a Shutdown instance does what the table says",
        |world| try_state(world, "Shutdown"),
    ),
    (
        "every operation in a Standby instance does what the table says",
        |world| try_state(world, "Standby"),
    ),
    (
        "every operation in a Template does what the table says",
        |world| try_state(world, "Template"),
    ),
    (
        "every operation in a Template with a live fork does what the table says",
        |world| try_state(world, IN_USE),
    ),
    (
        "every operation in an Unknown instance does what the table says",
        |world| try_state(world, "Unknown"),
    ),
    ("a fork begins in the state that is asked for", fork_targets),
];

/// A template that has a live fork; not a state of its own, and a row of its own.
const IN_USE: &str = "Template in use";

/// What an operation comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comes {
    /// It works, and the instance is in this state afterwards.
    To(&'static str),
    /// A fork works: the fork is in the first state, the source in the second.
    Fork(&'static str, &'static str),
    /// It works, and the instance is gone.
    Gone,
    /// 409 with this code, and nothing changes.
    Refused(&'static str),
}
use Comes::{Fork, Gone, Refused, To};

const NO: Comes = Refused("invalid_state");
const USED: Comes = Refused("template_in_use");

const OPERATIONS: [&str; 11] = [
    "start",
    "stop",
    "pause",
    "resume",
    "standby",
    "restore",
    "promote-template",
    "demote-template",
    "fork",
    "fork from_running",
    "delete",
];

/// A row a state: what each of [`OPERATIONS`] comes to in it.
#[rustfmt::skip]
const TABLE: [(&str, [Comes; 11]); 10] = [
//                  start             stop           pause         resume              standby        restore             promote         demote         fork                              from_running                 delete
    ("Stopped",      [To("Running"),   To("Stopped"), NO,           NO,                 NO,            NO,                 NO,             NO,            Fork("Stopped", "Stopped"),       NO,                          Gone]),
    ("Created",      [To("Running"),   To("Stopped"), NO,           NO,                 NO,            NO,                 NO,             NO,            NO,                               NO,                          Gone]),
    ("Initializing", [To("Initializing"), To("Stopped"), NO,        To("Initializing"), NO,            To("Initializing"), NO,             NO,            NO,                               NO,                          Gone]),
    ("Running",      [To("Running"),   To("Stopped"), To("Paused"), To("Running"),      To("Standby"), To("Running"),      NO,             NO,            NO,                               Fork("Running", "Running"),  Gone]),
    ("Paused",       [NO,              To("Stopped"), To("Paused"), To("Running"),      To("Standby"), NO,                 NO,             NO,            NO,                               NO,                          Gone]),
    ("Shutdown",     [To("Running"),   To("Stopped"), NO,           NO,                 NO,            NO,                 NO,             NO,            NO,                               NO,                          Gone]),
    ("Standby",      [NO,              To("Stopped"), NO,           NO,                 To("Standby"), To("Running"),      To("Template"), NO,            Fork("Running", "Standby"),       NO,                          Gone]),
    ("Template",     [NO,              To("Stopped"), NO,           NO,                 NO,            NO,                 NO,             To("Standby"), Fork("Running", "Template"),      NO,                          Gone]),
    (IN_USE,         [NO,              USED,          NO,           NO,                 NO,            NO,                 NO,             USED,          Fork("Running", "Template"),      NO,                          USED]),
    ("Unknown",      [NO,              NO,            NO,           NO,                 NO,            NO,                 NO,             NO,            NO,                               NO,                          Gone]),
];

fn try_state(world: &mut World, row: &'static str) -> Result<(), Failure> {
    if row == "Shutdown" {
        world.needs_shutdown()?;
    }
    if row == "Created" {
        world.needs_unboot()?;
    }
    let base = world.standby("base")?;
    let (_, expected) = TABLE
        .into_iter()
        .find(|(state, _)| *state == row)
        .unwrap_or((row, [NO; 11]));
    let mut wrong = Vec::new();
    for (number, (operation, comes)) in OPERATIONS.into_iter().zip(expected).enumerate() {
        let vm = reach(world, &base, row, number)?;
        // All of a row is told at once, not only its first difference.
        if let Err(failure) = try_operation(&vm, operation, comes) {
            wrong.push(format!("{operation}: {}", crate::report::chain(&failure)));
        }
        leave(world, &vm)?;
    }
    holds(
        wrong.is_empty(),
        format!("operations in {row}"),
        "as in the table",
        wrong.join("\n"),
    )
}

/// A new instance in this state, made of one on standby.
fn reach(world: &World, base: &Vm, row: &str, number: usize) -> Result<Vm, Failure> {
    let name = format!("it-{number}");
    let fork = |target: &str| base.fork(json!({"name": name, "target_state": target}));
    let vm = match row {
        "Stopped" => world.create(world.request_with(&name, json!({"start": false})))?,
        "Created" => {
            let vm = world.running(&name)?;
            // Only its VMM can be asked for this: no operation ends there.
            let vmm = Client::new(vm.dir().join("vmm.sock"));
            answered(204, vmm.call(Method::PUT, "/api/v1/vm.shutdown", Body::Nothing)?)?;
            vm
        }
        "Initializing" => world
            .create(world.request_with(&name, json!({"readiness": {"console": "this is never printed"}})))?,
        "Running" | "Paused" | "Standby" => fork(row)?,
        "Shutdown" => {
            let vm = fork("Running")?;
            vm.ask("halt")?;
            vm
        }
        "Template" | IN_USE => {
            let vm = fork("Standby")?;
            vm.act("promote-template")?;
            if row == IN_USE {
                vm.fork(json!({"name": format!("{name}-fork"), "target_state": "Paused"}))?;
            }
            vm
        }
        _ => {
            let vm = fork("Standby")?;
            write(&vm.snapshot("manifest.json"), "{ this is no manifest")?;
            vm
        }
    };
    vm.wait(state_of(row))?;
    if row == "Unknown" {
        let error = vm.text("state_error")?;
        holds(!error.is_empty(), "an Unknown instance", "a state_error", &error)?;
    }
    Ok(vm)
}

fn state_of(row: &str) -> &str {
    if row == IN_USE { "Template" } else { row }
}

fn try_operation(vm: &Vm, operation: &str, comes: Comes) -> Result<(), Failure> {
    let before = vm.show()?;
    let reply = match operation {
        "delete" => vm.try_delete()?,
        "fork" => vm.try_fork(json!({"name": format!("{}-made", vm.name)}))?,
        "fork from_running" => {
            vm.try_fork(json!({"name": format!("{}-made", vm.name), "from_running": true}))?
        }
        operation => vm.try_act(operation)?,
    };
    match comes {
        To(state) => {
            let shown = answered(200, reply)?;
            same("the instance in the answer", json!(vm.id), shown["id"].clone())?;
            vm.wait(state)
        }
        Fork(state, source) => {
            let fork = answered(201, reply)?;
            same("the fork's state", json!(state), fork["state"].clone())?;
            vm.is_in(source)
        }
        Gone => {
            answered(204, reply)?;
            vm.is_gone()
        }
        Refused(code) => {
            let error = refused(409, code, reply)?;
            if code == "template_in_use" {
                let forks = error["details"]["forks"].as_array().map_or(0, Vec::len);
                same("forks that the refusal names", 1, forks)?;
            }
            let after = vm.show()?;
            for field in ["state", "pid", "generation", "is_template", "forks"] {
                same(
                    format!("`{field}` after the refusal"),
                    before[field].clone(),
                    after[field].clone(),
                )?;
            }
            Ok(())
        }
    }
}

/// Deletes the instance and what was forked of it, so that the next one has the host to itself.
fn leave(world: &World, vm: &Vm) -> Result<(), Failure> {
    for name in [
        format!("{}-made", vm.name),
        format!("{}-fork", vm.name),
        vm.name.clone(),
    ] {
        let reply = world.client.delete(&format!("/instances/{name}"))?;
        holds(
            [204, 404].contains(&reply.status),
            format!("deleting {name}"),
            "204 or 404",
            &reply.body,
        )?;
    }
    Ok(())
}

fn write(path: &Path, content: &str) -> Result<(), Failure> {
    std::fs::write(path, content).map_err(Failure::file(path))
}

fn fork_targets(world: &mut World) -> Result<(), Failure> {
    let stopped = world.create(world.request_with("stopped", json!({"start": false})))?;
    let on_standby = world.standby("standby")?;
    let template = world.template("template")?;
    let running = world.running("running")?;
    let possible = [
        (&stopped, false, vec!["Stopped", "Running"]),
        (
            &on_standby,
            false,
            vec!["Running", "Paused", "Standby", "Stopped"],
        ),
        (&template, false, vec!["Running", "Paused", "Standby", "Stopped"]),
        (&running, true, vec!["Running", "Paused", "Standby", "Stopped"]),
    ];
    for (source, from_running, targets) in possible {
        for target in [
            "Stopped",
            "Created",
            "Initializing",
            "Running",
            "Paused",
            "Shutdown",
            "Standby",
            "Template",
            "Unknown",
        ] {
            let reply = source.try_fork(json!({"target_state": target, "from_running": from_running}))?;
            let what = format!("a fork of {} into {target}", source.name);
            if !targets.contains(&target) {
                // A state that is none of a fork's is wrong in itself, or wrong for this source.
                let refused = [400, 409].contains(&reply.status) && !reply.code().is_empty();
                holds(refused, what, "400 or 409", &reply.body)?;
                continue;
            }
            let made: Value = answered(201, reply)?;
            let fork = world.vm(&made)?;
            // A fork that is booted may not have said yet that it is ready.
            fork.wait(target)?;
            let template_of_it = if source.name == "template" {
                json!(template.id)
            } else {
                Value::Null
            };
            same(what, template_of_it, made["fork_of_template"].clone())?;
            fork.delete()?;
        }
    }
    running.is_in("Running")?;
    running.answers()
}
