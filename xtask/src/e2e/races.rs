//! Requests that race each other: each is answered in order, and what is left is whole.

use std::sync::Barrier;

use serde_json::{Value, json};

use super::Scenario;
use super::failure::{Failure, holds, same};
use super::world::World;
use crate::client::Reply;

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "start, stop and delete race on one instance, and it ends whole or gone",
        start_stop_delete,
    ),
    (
        "pause, resume, standby and restore race, and the guest keeps its counter",
        sleep_and_wake,
    ),
    ("of two promotes one works", two_promotes),
    ("of two creates with one name one works", two_creates),
    (
        "demote races with forks, and no fork's template is gone",
        demote_and_forks,
    ),
    (
        "delete of a template races with forks, and no fork's template is gone",
        delete_and_forks,
    ),
];

const ROUNDS: usize = 5;

type Request<'a> = Box<dyn FnOnce() -> Result<Reply, Failure> + Send + 'a>;

/// Makes all requests at the same time; their answers, in the order of the requests.
fn at_once(requests: Vec<Request<'_>>) -> Result<Vec<Reply>, Failure> {
    let barrier = Barrier::new(requests.len());
    std::thread::scope(|scope| {
        let begin = |request: Request<'_>| {
            barrier.wait();
            request()
        };
        let threads: Vec<_> = requests
            .into_iter()
            .map(|request| scope.spawn(move || begin(request)))
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    })
}

fn none_failed(replies: &[Reply]) -> Result<(), Failure> {
    for reply in replies {
        let in_order = (200..300).contains(&reply.status) || [404, 409].contains(&reply.status);
        holds(
            in_order,
            &reply.call,
            "2xx, 404 or 409",
            format!("{} {}", reply.status, reply.body),
        )?;
    }
    Ok(())
}

fn start_stop_delete(world: &mut World) -> Result<(), Failure> {
    for round in 0..ROUNDS {
        let vm = world.create(world.request_with("torn", json!({"start": round % 2 == 0})))?;
        let mut requests: Vec<Request<'_>> = Vec::new();
        for operation in ["start", "stop", "start", "stop"] {
            let vm = &vm;
            requests.push(Box::new(move || vm.try_act(operation)));
        }
        requests.push(Box::new(|| vm.try_delete()));
        let replies = at_once(requests)?;
        none_failed(&replies)?;
        same("the answer to delete", 204, replies[4].status)?;
        vm.is_gone()?;
        world.is_empty()?;
        // Without the delete it ends in one of the states that were asked for.
        let vm = world.create(world.request_with("torn", json!({"start": false})))?;
        let replies = at_once(
            ["start", "stop", "start", "stop"]
                .map(|operation| {
                    let vm = &vm;
                    Box::new(move || vm.try_act(operation)) as Request<'_>
                })
                .into(),
        )?;
        for reply in &replies {
            same(&reply.call, 200, reply.status)?;
        }
        let shown = vm.show()?;
        let whole = match shown["state"].as_str() {
            Some("Stopped") => shown["pid"].is_null(),
            Some("Running" | "Initializing") => !shown["pid"].is_null(),
            _ => false,
        };
        holds(
            whole && shown["state_error"].is_null(),
            "the state in the end",
            "Stopped or Running",
            shown.to_string(),
        )?;
        vm.delete()?;
        world.is_empty()?;
    }
    Ok(())
}

fn sleep_and_wake(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("restless")?;
    for round in 1..=ROUNDS as u64 {
        vm.count()?;
        let requests = ["pause", "standby", "resume", "restore", "pause", "restore"].map(|operation| {
            let vm = &vm;
            Box::new(move || vm.try_act(operation)) as Request<'_>
        });
        none_failed(&at_once(requests.into())?)?;
        match vm.state()?.as_str() {
            "Running" => {}
            "Paused" => vm.act("resume").map(drop)?,
            "Standby" => vm.act("restore").map(drop)?,
            other => return holds(false, "its state", "Running, Paused or Standby", other),
        }
        vm.wait("Running")?;
        same("its counter", 2 * round, vm.count()?)?;
    }
    Ok(())
}

fn two_promotes(world: &mut World) -> Result<(), Failure> {
    let vm = world.standby("warm")?;
    for _ in 0..ROUNDS {
        let replies = at_once(vec![
            Box::new(|| vm.try_act("promote-template")),
            Box::new(|| vm.try_act("promote-template")),
        ])?;
        let mut statuses: Vec<u16> = replies.iter().map(|reply| reply.status).collect();
        statuses.sort_unstable();
        same("answers", vec![200, 409], statuses)?;
        vm.is_in("Template")?;
        vm.act("demote-template")?;
    }
    Ok(())
}

fn two_creates(world: &mut World) -> Result<(), Failure> {
    for _ in 0..ROUNDS {
        let request = world.request_with("wanted", json!({"start": false}));
        let replies = at_once(vec![
            Box::new(|| world.try_create(request.clone())),
            Box::new(|| world.try_create(request.clone())),
        ])?;
        let (made, refused): (Vec<&Reply>, Vec<&Reply>) =
            replies.iter().partition(|reply| reply.status == 201);
        same("those that worked", 1, made.len())?;
        same(
            "the other's answer",
            Some((409, "name_conflict")),
            refused.first().map(|reply| (reply.status, reply.code())),
        )?;
        world.vm(&made[0].body)?.delete()?;
        world.is_empty()?;
    }
    Ok(())
}

fn demote_and_forks(world: &mut World) -> Result<(), Failure> {
    let template = world.standby("warm")?;
    for round in 0..ROUNDS {
        template.act("promote-template")?;
        let mut requests: Vec<Request<'_>> = Vec::new();
        for number in 0..4 {
            let template = &template;
            requests.push(Box::new(move || {
                template.try_fork(json!({"name": format!("fork-{round}-{number}")}))
            }));
        }
        requests.insert(round % 5, Box::new(|| template.try_act("demote-template")));
        let replies = at_once(requests)?;
        none_failed(&replies)?;
        let forks = no_orphans(world)?;
        for fork in forks {
            fork.answers()?;
            fork.delete()?;
        }
        if template.state()? == "Template" {
            template.act("demote-template")?;
        }
    }
    template.act("restore")?;
    same("its counter", 2, template.count()?)
}

fn delete_and_forks(world: &mut World) -> Result<(), Failure> {
    for round in 0..ROUNDS {
        let template = world.template("warm")?;
        let mut requests: Vec<Request<'_>> = Vec::new();
        for number in 0..4 {
            let template = &template;
            requests.push(Box::new(move || {
                template.try_fork(json!({"name": format!("fork-{round}-{number}")}))
            }));
        }
        requests.insert(round % 5, Box::new(|| template.try_delete()));
        none_failed(&at_once(requests)?)?;
        for fork in no_orphans(world)? {
            fork.answers()?;
            fork.delete()?;
        }
        let left = template.try_delete()?;
        holds(
            [204, 404].contains(&left.status),
            &left.call,
            "204 or 404",
            &left.body,
        )?;
        world.is_empty()?;
    }
    Ok(())
}

/// That every fork of a template has its template; the forks, of whatever kind.
fn no_orphans(world: &World) -> Result<Vec<super::vm::Vm>, Failure> {
    let instances = world.list()?;
    let mut forks = Vec::new();
    for instance in &instances {
        if instance["name"] == "warm" {
            continue;
        }
        forks.push(world.vm(instance)?);
        let template = &instance["fork_of_template"];
        if !template.is_null() {
            let found = instances.iter().find(|other| other["id"] == *template);
            let state = found.map_or(&Value::Null, |found| &found["state"]);
            same(
                format!("the template of {}", instance["name"]),
                &json!("Template"),
                state,
            )?;
        }
    }
    Ok(forks)
}
