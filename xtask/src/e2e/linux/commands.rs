//! Commands in a Linux guest, and files in and out of it.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Failure, Linux, Scenario, answered, cp, holds, outputs, same};
use crate::client::Next;

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "one call forks linux, runs a command in each fork, and deletes them",
        fork_exec_delete,
    ),
    (
        "64 commands at once in one linux are all run, and it is Running for all who look meanwhile",
        many_at_once,
    ),
    (
        "a command in a linux that goes down or is paused ends with the reason",
        goes_down,
    ),
    (
        "of what linux prints without end the last part stays, and who follows its console goes on",
        prints_without_end,
    ),
    (
        "a command that outlives its time is ended with all of its processes",
        outlives_its_time,
    ),
    (
        "of a command that prints 100 MB the first MiB is kept, and all is taken",
        prints_much,
    ),
    ("what a command leaves in the background goes on", leaves_children),
    (
        "files and directories come into a guest and out of it as they are",
        copies_files,
    ),
];

/// How long something may take that comes soon.
const LIMIT: Duration = Duration::from_secs(60);
/// The most of each output that is kept.
const KEPT: usize = 1 << 20;

fn fork_exec_delete(linux: &mut Linux) -> Result<(), Failure> {
    let request = json!({"count": 4, "delete_after": true, "exec": {"cmd": ["sh", "-c", "hostname; cat /run/token; exit 0"]}});
    let made = answered(201, linux.template.try_forks(request)?)?;
    let entries = made["forks"].as_array().cloned().unwrap_or_default();
    same("forks", 4, entries.len())?;
    for (entry, output) in entries.iter().zip(outputs(&made)?) {
        same("deleted", json!(true), entry["deleted"].clone())?;
        let expected = format!(
            "{}\n{}\n",
            entry["name"].as_str().unwrap_or_default(),
            linux.token
        );
        same("what it wrote", expected, output)?;
    }
    same("instances beside the template", 1, linux.world.list()?.len())
}

fn many_at_once(linux: &mut Linux) -> Result<(), Failure> {
    const COMMANDS: usize = 64;
    const LOOKING: usize = 4;
    let fork = linux.template.fork(json!({}))?;
    let left = AtomicUsize::new(COMMANDS);
    std::thread::scope(|scope| {
        let run = || {
            let ran = fork.exec(json!({"cmd": ["true"], "timeout": "100s"}));
            left.fetch_sub(1, Ordering::Relaxed);
            same("its exit code", json!(0), ran?["exit_code"].clone())
        };
        let look = || {
            while left.load(Ordering::Relaxed) > 0 {
                fork.is_in("Running")?;
            }
            Ok(())
        };
        let commands: Vec<_> = (0..COMMANDS).map(|_| scope.spawn(run)).collect();
        let looks: Vec<_> = (0..LOOKING).map(|_| scope.spawn(look)).collect();
        let mut all = commands.into_iter().chain(looks);
        all.try_for_each(|thread| match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

fn goes_down(linux: &mut Linux) -> Result<(), Failure> {
    for (script, end) in [
        ("poweroff -f", "the guest powered off"),
        ("reboot -f", "the guest asked for a reset"),
    ] {
        let fork = linux.template.fork(json!({}))?;
        // Its shell waits for something that never comes.
        let script = format!("{script} & sleep 777");
        let lost = fork.client.post(
            &fork.path("/exec"),
            json!({"cmd": ["sh", "-c", script], "timeout": "100s"}),
        )?;
        same(format!("{script}: the code"), "agent_lost", lost.code())?;
        let why = lost.body["message"].as_str().unwrap_or_default();
        holds(
            why.contains("its guest is down: "),
            script,
            "that the guest is down",
            why,
        )?;
        fork.is_in("Shutdown")?;
        same("how it came to its end", end, &*fork.text("guest_end")?)?;
    }
    let fork = linux.template.fork(json!({}))?;
    let script = "touch /run/begun; sleep 777";
    let (lost, paused) = std::thread::scope(|scope| {
        let run = || {
            fork.client.post(
                &fork.path("/exec"),
                json!({"cmd": ["sh", "-c", script], "timeout": "100s"}),
            )
        };
        let running = scope.spawn(run);
        let paused = fork
            .sh("until [ -e /run/begun ]; do sleep 0.1; done")
            .and_then(|_| fork.act("pause"));
        (running.join(), paused)
    });
    paused?;
    let lost = match lost {
        Ok(lost) => lost?,
        Err(panic) => std::panic::resume_unwind(panic),
    };
    same("the code of one that is paused", "agent_lost", lost.code())?;
    fork.act("resume")?;
    let left = fork.sh("until ! ps -o args | grep -qE '^sleep 777'; do sleep 0.1; done")?;
    same("what is left of it", "", &*left)
}

fn prints_without_end(linux: &mut Linux) -> Result<(), Failure> {
    /// More than twice what is kept.
    const PRINTED: u64 = 200 << 10;
    let world = linux
        .world
        .another_in(std::env::temp_dir(), &["--log-limit", "64KiB"])?;
    let vm = linux.boot_on(&world, json!([]))?;
    let mut follower = world.client.open(&vm.path("/console?tail=0&follow=true"))?;
    vm.sh(&format!(
        "yes 'and again' | head -c {PRINTED} >/dev/ttyS0; echo the end >/dev/ttyS0"
    ))?;
    let log = vm.dir().join("console.log");
    let found = || std::fs::metadata(&log).map_err(Failure::file(&log));
    let deadline = Instant::now() + LIMIT;
    while found()?.blocks() * 512 > 96 << 10 {
        holds(
            Instant::now() < deadline,
            "what is kept",
            "less than 96 KiB",
            found()?.blocks(),
        )?;
        std::thread::yield_now();
    }
    holds(
        found()?.len() > PRINTED,
        "its length",
        "that of all that was printed",
        found()?.len(),
    )?;
    let mut last = String::new();
    while last.trim() != "the end" {
        match follower.next_by(deadline)? {
            Next::Line(line) => last = line,
            Next::Over | Next::Late => return holds(false, "the follower", "the end", last),
        }
    }
    vm.delete()?;
    world.finish()
}

fn outlives_its_time(linux: &mut Linux) -> Result<(), Failure> {
    let fork = linux.template.fork(json!({}))?;
    let result =
        fork.exec(json!({"cmd": ["sh", "-c", "echo begun; sleep 777 & sleep 888"], "timeout": "2s"}))?;
    same("timed_out", json!(true), result["timed_out"].clone())?;
    same("what it wrote before", json!("begun\n"), result["stdout"].clone())?;
    let left = fork.sh("ps -o args | grep -E '^sleep (777|888)' || true")?;
    same("processes of it that are left", "", &*left)
}

fn prints_much(linux: &mut Linux) -> Result<(), Failure> {
    let fork = linux.template.fork(json!({}))?;
    let result = fork.exec(json!({
        "cmd": ["sh", "-c", "head -c 100000000 /dev/zero; echo done >&2"], "timeout": "100s",
    }))?;
    same("its exit code", json!(0), result["exit_code"].clone())?;
    same("truncated", json!(true), result["truncated"].clone())?;
    same("its other output", json!("done\n"), result["stderr"].clone())?;
    let stdout = result["stdout"].as_str().unwrap_or_default();
    same("bytes that are kept", KEPT, stdout.len())?;
    holds(
        stdout.bytes().all(|byte| byte == 0),
        "what is kept",
        "zeros",
        "something else",
    )
}

fn leaves_children(linux: &mut Linux) -> Result<(), Failure> {
    let fork = linux.template.fork(json!({}))?;
    let child = fork
        .sh("(while ! [ -e /run/go ]; do sleep 0.1; done; echo went on >/run/went; sleep 999) & echo $!")?;
    let child = child.trim();
    fork.sh(&format!("kill -0 {child} && touch /run/go"))?;
    let told = fork.sh("while ! [ -s /run/went ]; do sleep 0.1; done; cat /run/went")?;
    same("what the child wrote", "went on\n", &*told)?;
    fork.sh(&format!("kill -0 {child}"))?;
    fork.sh("until ps -o args | grep '^sleep 999'; do sleep 0.1; done")
        .map(drop)
}

fn copies_files(linux: &mut Linux) -> Result<(), Failure> {
    let fork = linux.template.fork(json!({"name": "copied"}))?;
    let here = linux.world.server.scratch().join("cp");
    let file = here.join("sent/deep/file");
    let bytes: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::create_dir_all(here.join("sent/deep")).map_err(Failure::file(&here))?;
    std::fs::write(&file, &bytes).map_err(Failure::file(&file))?;
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o750)).map_err(Failure::file(&file))?;
    cp(
        &linux.world,
        &here.join("sent").display().to_string(),
        "copied:/run",
    )?;
    let size = fork.sh("stat -c '%a %s' /run/sent/deep/file")?;
    same(
        "mode and size in the guest",
        format!("750 {}\n", bytes.len()),
        size,
    )?;
    fork.sh("mv /run/sent /run/back")?;
    cp(&linux.world, "copied:/run/back", &here.display().to_string())?;
    let back = here.join("back/deep/file");
    let read = std::fs::read(&back).map_err(Failure::file(&back))?;
    holds(read == bytes, "what came back", "what was sent", read.len())?;
    let mode = std::fs::metadata(&back)
        .map_err(Failure::file(&back))?
        .permissions()
        .mode();
    same("its mode", 0o750, mode & 0o777)
}
