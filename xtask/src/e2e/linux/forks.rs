//! That forks of a Linux are new machines, and have the same past.

use std::collections::HashSet;

use serde_json::json;

use super::{Failure, Linux, Scenario, answered, holds, outputs, same};
use crate::armed::was_armed;
use crate::e2e::armed::until_full;

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "16 forks of linux have no uuid and no random number in common",
        are_unlike,
    ),
    ("in forks of linux that are copied, too", copies_are_unlike),
    (
        "armed forks of linux are unlike too, have the time when they are taken, and one past",
        armed_are_unlike,
    ),
    (
        "forks of linux have the time, names of their own, and one past",
        have_one_past,
    ),
    (
        "a fork of linux becomes a template, whose forks go on from it",
        forks_of_forks,
    ),
];

const MANY: usize = 16;
const UUIDS: usize = 100;
const ARMED: u64 = 3;

/// 100 uuids, and 32 bytes of getrandom(2), by two processes at the same time. `read` is the shell's own: no process for each.
const DRAW: &str = "(n=0; while [ $n -lt 100 ]; do read uuid </proc/sys/kernel/random/uuid; echo uuid $uuid; n=$((n+1)); done) &
echo random $(getrandom); wait";

/// First by a command that begins as soon as each fork runs, then by one more in all of them at the same time.
fn are_unlike(linux: &mut Linux) -> Result<(), Failure> {
    let request = json!({"count": MANY, "exec": {"cmd": ["sh", "-c", DRAW], "timeout": "100s"}});
    let made = answered(201, linux.template.try_forks(request)?)?;
    let mut drawn = outputs(&made)?;
    let entries = made["forks"].as_array().into_iter().flatten();
    let forks = entries
        .map(|entry| linux.world.vm(&entry["instance"]))
        .collect::<Result<Vec<_>, _>>()?;
    let again: Vec<Result<String, Failure>> = std::thread::scope(|scope| {
        let asked: Vec<_> = forks.iter().map(|fork| scope.spawn(|| fork.sh(DRAW))).collect();
        let answers = asked.into_iter().map(std::thread::ScopedJoinHandle::join);
        answers
            .map(|answer| answer.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    for answer in again {
        drawn.push(answer?);
    }
    all_differ(&drawn, 2 * MANY)
}

fn copies_are_unlike(linux: &mut Linux) -> Result<(), Failure> {
    let request =
        json!({"count": 2, "memory_mode": "copy", "exec": {"cmd": ["sh", "-c", DRAW], "timeout": "100s"}});
    let made = answered(201, linux.template.try_forks(request)?)?;
    for entry in made["forks"].as_array().into_iter().flatten() {
        same(
            "the memory mode",
            json!("copy"),
            entry["instance"]["memory_mode"].clone(),
        )?;
    }
    all_differ(&outputs(&made)?, 2)
}

fn armed_are_unlike(linux: &mut Linux) -> Result<(), Failure> {
    let arm = |count: u64| {
        let patch = json!({"armed": count});
        answered(200, linux.world.client.patch(&linux.template.path(""), patch)?)
    };
    arm(ARMED)?;
    until_full(&linux.template, ARMED)?;
    let request = json!({"count": ARMED, "exec": {"cmd": ["sh", "-c", DRAW], "timeout": "100s"}});
    let made = answered(201, linux.template.try_forks(request)?)?;
    arm(0)?;
    let entries = made["forks"].as_array().cloned().unwrap_or_default();
    for entry in &entries {
        let fork = &entry["instance"];
        holds(was_armed(fork), "a fork from the pool", "taken", fork)?;
        let fork = linux.world.vm(fork)?;
        fork.has_the_time()?;
        fork.counts_on_from(linux.count)?;
        same(
            "what is in the tmpfs",
            &*linux.token,
            fork.sh("cat /run/token")?.trim(),
        )?;
    }
    all_differ(&outputs(&made)?, entries.len())
}

/// That `times` draws were made, and that nothing in them is there twice.
fn all_differ(drawn: &[String], times: usize) -> Result<(), Failure> {
    let lines: Vec<&str> = drawn.iter().flat_map(|text| text.lines()).collect();
    let uuids = lines
        .iter()
        .filter(|line| line.starts_with("uuid ") && line.len() == 5 + 36);
    same("uuids", times * UUIDS, uuids.count())?;
    let randoms = lines
        .iter()
        .filter(|line| line.starts_with("random ") && line.len() == 7 + 64);
    same("random numbers of 32 bytes", times, randoms.count())?;
    let distinct: HashSet<&&str> = lines.iter().collect();
    same("different ones", lines.len(), distinct.len())
}

fn have_one_past(linux: &mut Linux) -> Result<(), Failure> {
    let forks = linux.forks(4)?;
    let mut machines = HashSet::new();
    for fork in &forks {
        fork.has_the_time()?;
        same(
            "the host name",
            fork.name.clone(),
            fork.sh("hostname")?.trim().to_owned(),
        )?;
        machines.insert(fork.sh("cat /etc/machine-id")?);
        same(
            "what is in the tmpfs",
            &*linux.token,
            fork.sh("cat /run/token")?.trim(),
        )?;
        fork.counts_on_from(linux.count)?;
    }
    same("different machine ids", forks.len(), machines.len())?;
    let [first, others @ ..] = &*forks else {
        return Ok(());
    };
    first.sh("echo mine >/run/token")?;
    for other in others {
        same(
            "what is in another's tmpfs",
            &*linux.token,
            other.sh("cat /run/token")?.trim(),
        )?;
    }
    Ok(())
}

fn forks_of_forks(linux: &mut Linux) -> Result<(), Failure> {
    let fork = linux.template.fork(json!({"name": "second"}))?;
    fork.sh("echo second >/run/second")?;
    let (count, uuid) = (fork.counter()?, fork.sh("cat /proc/sys/kernel/random/uuid")?);
    fork.act("standby")?;
    fork.act("promote-template")?;
    let mut uuids = HashSet::from([uuid]);
    for third in fork.forks(2)? {
        third.counts_on_from(count)?;
        third.has_the_time()?;
        same("the fork's file", "second\n", &*third.sh("cat /run/second")?)?;
        same(
            "the first template's file",
            &*linux.token,
            third.sh("cat /run/token")?.trim(),
        )?;
        let uuid = third.sh("cat /proc/sys/kernel/random/uuid")?;
        holds(
            uuids.insert(uuid.clone()),
            "uuids of forks of a fork",
            "all different",
            uuid,
        )?;
    }
    Ok(())
}
