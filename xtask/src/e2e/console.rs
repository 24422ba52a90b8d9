//! The guest's console over HTTP: what it printed, as it comes, and bytes for it to read.

use std::time::{Duration, Instant};

use hyper::Method;
use serde_json::json;

use super::Scenario;
use super::failure::{Failure, answered, holds, refused, same};
use super::world::World;
use crate::client::{Body, Next};
use crate::guest_console::GuestConsole;

pub(super) const SCENARIOS: &[Scenario] = &[
    ("the console's tail is its last lines", tail),
    (
        "a followed console shows what comes, and ends when the VM goes down",
        followed,
    ),
    ("two readers of a console each get all of it", two_readers),
    ("a guest that is down reads nothing: 409", down),
    ("a fork's console begins with its own words", of_a_fork),
];

/// Longer than any line takes to come.
const LINE_LIMIT: Duration = Duration::from_secs(60);

fn lines(world: &World, path: &str) -> Result<Vec<String>, Failure> {
    let mut stream = world.client.open(path)?;
    same(path, 200, stream.status)?;
    let deadline = Instant::now() + LINE_LIMIT;
    let mut lines = Vec::new();
    loop {
        match stream.next_by(deadline)? {
            Next::Line(line) => lines.push(line),
            Next::Over => return Ok(lines),
            Next::Late => return holds(false, path, "an end", "none").map(|()| lines),
        }
    }
}

fn tail(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("speaker")?;
    vm.answers()?;
    vm.count()?;
    let all = lines(world, &vm.path("/console"))?;
    holds(
        all.first()
            .is_some_and(|line| line.starts_with("ready epoch=boot")),
        "the first line",
        "ready epoch=boot",
        &all,
    )?;
    same(
        "the last two",
        vec!["ok pong".to_owned(), "ok counter=1".to_owned()],
        lines(world, &vm.path("/console?tail=2"))?,
    )?;
    same(
        "the last none",
        Vec::<String>::new(),
        lines(world, &vm.path("/console?tail=0"))?,
    )?;
    same(
        "more than there are",
        all,
        lines(world, &vm.path("/console?tail=1000"))?,
    )?;
    refused(
        400,
        "invalid_request",
        world.client.get(&vm.path("/console?tail=-1"))?,
    )
    .map(drop)
}

fn followed(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("speaker")?;
    let mut console = GuestConsole::open(&world.client, &vm.id)?;
    same("an answer", "ok pong".to_owned(), console.ask("ping")?)?;
    same("another one", "ok counter=1".to_owned(), console.ask("counter")?)?;
    let mut stream = world.client.open(&vm.path("/console?tail=0&follow=true"))?;
    vm.act("stop")?;
    let deadline = Instant::now() + LINE_LIMIT;
    while let Next::Line(_) = stream.next_by(deadline)? {}
    same(
        "what comes after the VM went down",
        Next::Over,
        stream.next_by(deadline)?,
    )
}

fn two_readers(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("speaker")?;
    let mut first = GuestConsole::open(&world.client, &vm.id)?;
    let mut second = GuestConsole::open(&world.client, &vm.id)?;
    same(
        "to the one that asked",
        "ok counter=1".to_owned(),
        first.ask("counter")?,
    )?;
    let line = second.line_that("counter", |line| line.starts_with("ok"))?;
    same("to the one that listened", "ok counter=1".to_owned(), line)
}

fn down(world: &mut World) -> Result<(), Failure> {
    let post = |vm: &super::vm::Vm| {
        world.client.call(
            Method::POST,
            &vm.path("/console"),
            Body::Bytes(b"ping\n".to_vec()),
        )
    };
    let vm = world.create(world.request_with("mute", json!({"start": false})))?;
    refused(409, "invalid_state", post(&vm)?)?;
    same(
        "what it printed",
        Vec::<String>::new(),
        lines(world, &vm.path("/console"))?,
    )?;
    vm.act("start")?;
    vm.wait("Running")?;
    answered(204, post(&vm)?)?;
    vm.answers()?;
    vm.act("standby")?;
    refused(409, "invalid_state", post(&vm)?)?;
    // What it printed is still there to read.
    let printed = lines(world, &vm.path("/console"))?;
    holds(
        printed
            .first()
            .is_some_and(|line| line.starts_with("ready epoch=boot")),
        "the first line",
        "ready epoch=boot",
        &printed,
    )
}

fn of_a_fork(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    let fork = template.fork(json!({}))?;
    let generation = fork.text("generation")?;
    // The fork is ready with the beginning of its first line; with an answer, that line is there to its end.
    fork.answers()?;
    let printed = lines(world, &fork.path("/console"))?;
    let mut expected = vec!["ok pong".to_owned()];
    if world.hypervisor.tells_identity {
        expected.insert(0, format!("ready epoch=restore generation={generation}"));
    }
    same("all that it printed", expected, printed)
}
