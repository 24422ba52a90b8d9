//! Between two epochs no process of the user runs. This needs a cgroup of version 2 that may be written.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use stencil_agent::{End, EpochId, Exec, ExecError, ToGuest, ToHost};

use crate::host::{Agent, Host, await_path, shell};
use crate::skipped::skipped;

/// A cgroup for one test.
struct Cgroup(PathBuf);

impl Cgroup {
    /// None where this machine has none for us, which is said.
    fn new(test: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "));
        let dir = mount.and_then(|line| {
            let dir =
                Path::new(line.split(' ').nth(4)?).join(format!("stencil-{test}-{}", std::process::id()));
            fs::create_dir(&dir).ok()?;
            Some(dir)
        });
        if dir.is_none() {
            skipped("no cgroup of version 2 can be made here");
        }
        dir.map(Self)
    }

    fn option(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Cgroup {
    /// Ends what is in it. It is empty when its events say so.
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let populated = |events: String| events.contains("populated 1");
        while fs::read_to_string(self.0.join("cgroup.events")).is_ok_and(populated) {
            std::thread::yield_now();
        }
        let children = fs::read_dir(&self.0).unwrap().flatten().map(|child| child.path());
        for child in children.filter(|child| child.is_dir()) {
            for session in fs::read_dir(&child)
                .unwrap()
                .flatten()
                .filter(|session| session.path().is_dir())
            {
                let _ = fs::remove_dir(session.path());
            }
            let _ = fs::remove_dir(child);
        }
        fs::remove_dir(&self.0).unwrap();
    }
}

#[test]
fn frozen_processes_go_on_in_the_next_epoch_and_not_before() {
    let Some(cgroup) = Cgroup::new("freeze") else {
        return;
    };
    let agent = Agent::start_with(&["--shared-kernel", "--cgroup", cgroup.option()], "true");
    let mut host = agent.enter();
    let count = agent.dir.path().join("count");
    let path = count.display();
    // It goes on by itself, its session is over.
    host.print(&format!("(while :; do echo >> {path}; done) > /dev/null 2>&1 &"));
    await_path(&mut host, &count);
    let grown = |host: &mut Host| {
        let from = fs::metadata(&count).unwrap().len();
        host.print(&format!("until [ $(stat -c %s {path}) -gt {from} ]; do :; done"));
    };
    grown(&mut host);

    host.send(&ToGuest::Freeze);
    assert_eq!(host.next(), ToHost::Frozen);
    let stopped_at = fs::metadata(&count).unwrap().len();
    assert_eq!(host.refused(shell("true")).0, ExecError::NoEpoch);
    // As after a restore: another host.
    let mut host = agent.greet();
    assert_eq!(
        host.hello(),
        ToHost::Hello {
            epoch: Some(EpochId([1; 16])),
            frozen: true
        }
    );
    let mut wrong = crate::host::epoch(2);
    wrong.host_name = String::new();
    host.send(&ToGuest::Epoch(wrong));
    assert!(matches!(host.next(), ToHost::EpochFailed { .. }));
    let events = fs::read_to_string(cgroup.0.join("sessions/cgroup.events")).unwrap();
    assert!(events.contains("frozen 1"), "{events}");
    assert_eq!(fs::metadata(&count).unwrap().len(), stopped_at);

    host.epoch(2);
    grown(&mut host);
}

#[test]
fn sessions_of_a_lost_host_die_before_they_could_go_on() {
    let Some(cgroup) = Cgroup::new("lost") else { return };
    let agent = Agent::start_with(&["--shared-kernel", "--cgroup", cgroup.option()], "true");
    let mut host = agent.enter();
    let (_, pid) = host.begin(shell("sleep 1000"));
    let process = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    let process = rustix::process::pidfd_open(process, PidfdFlags::empty()).unwrap();
    host.send(&ToGuest::Freeze);
    assert_eq!(host.next(), ToHost::Frozen);
    // No epoch comes: it ends although everything is frozen.
    let _next = agent.greet();
    let mut ended = [PollFd::new(&process, PollFlags::IN)];
    let patience = Timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    assert_eq!(rustix::event::poll(&mut ended, Some(&patience)), Ok(1));
}

#[test]
fn an_agent_that_is_started_anew_keeps_what_is_frozen() {
    let Some(cgroup) = Cgroup::new("anew") else { return };
    let options = ["--shared-kernel", "--cgroup", cgroup.option()];
    let mut first = Agent::start_with(&options, "true");
    let mut host = first.enter();
    host.send(&ToGuest::Freeze);
    assert_eq!(host.next(), ToHost::Frozen);
    first.process.kill().unwrap();
    first.process.wait().unwrap();
    let second = Agent::start_with(&options, "true");
    let mut host = Host::new(UnixStream::connect(second.socket()).unwrap());
    assert!(matches!(
        host.hello(),
        ToHost::Hello {
            epoch: None,
            frozen: true
        }
    ));
    host.epoch(2);
    assert_eq!(host.print("echo and lets it go on"), "and lets it go on\n");
}

#[test]
fn everything_beside_the_agent_is_frozen() {
    let Some(cgroup) = Cgroup::new("beside") else {
        return;
    };
    let other = cgroup.0.join("other");
    fs::create_dir(&other).unwrap();
    let mut process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    fs::write(other.join("cgroup.procs"), process.id().to_string()).unwrap();
    let agent = Agent::start_with(&["--shared-kernel", "--cgroup", cgroup.option()], "true");
    let mut host = agent.enter();
    let is_frozen = || {
        fs::read_to_string(other.join("cgroup.events"))
            .unwrap()
            .contains("frozen 1")
    };
    assert!(!is_frozen());
    host.send(&ToGuest::Freeze);
    assert_eq!(host.next(), ToHost::Frozen);
    assert!(is_frozen());
    host.epoch(2);
    assert_eq!(fs::read_to_string(other.join("cgroup.freeze")).unwrap(), "0\n");
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn a_session_whose_time_is_over_dies_with_what_left_its_process_group() {
    let Some(cgroup) = Cgroup::new("timeout") else {
        return;
    };
    let agent = Agent::start_with(&["--shared-kernel", "--cgroup", cgroup.option()], "true");
    let mut host = agent.enter();
    let (session, _) = host.begin(Exec {
        timeout: Some(std::time::Duration::from_millis(300)),
        ..shell("setsid sleep 1000 & echo begun; wait")
    });
    let done = host.finish(session);
    assert_eq!((done.end, done.timed_out), (Some(End::Signal(9)), true));
    // A cgroup goes when its last process has ended, and the next session is over: then only that of `ls` is there.
    let list = format!("ls -d {}/*/ | wc -l", cgroup.0.join("sessions").display());
    while host.print(&list) != "1\n" {}
}

#[test]
fn an_agent_without_cgroups_says_that_it_cannot_freeze() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("nowhere");
    let agent = Agent::start_with(
        &["--shared-kernel", "--cgroup", nowhere.to_str().unwrap()],
        "true",
    );
    let mut host = agent.enter();
    host.send(&ToGuest::Freeze);
    assert!(matches!(host.next(), ToHost::FreezeFailed { why } if why.contains("nowhere")));
    assert_eq!(host.print("echo but it runs commands"), "but it runs commands\n");
}
