//! The handle on a process: what it means, how the process ended, what memory it takes.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use stencil_core::ProcessIdentity;
use stencil_vmm::{Attached, Exit, Hypervisor, ProcessError, VmmError, VmmProcess, stray_processes};

use crate::directory::{Scratch, backend, spawn};

/// The identity of a process whose program's name has no blanks, by the shortest way.
fn identity(pid: u32) -> ProcessIdentity {
    identity_if_there(pid).unwrap()
}

/// The same of one that may have ended.
pub(crate) fn identity_if_there(pid: u32) -> Option<ProcessIdentity> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(ProcessIdentity {
        pid,
        start_time: stat.split(' ').nth(21).unwrap().parse().unwrap(),
        boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .unwrap()
            .trim()
            .to_owned(),
    })
}

fn kill(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal).unwrap();
}

/// A process that an earlier server started: its parent has ended.
fn orphan() -> ProcessIdentity {
    let shell = Command::new("sh")
        .args(["-c", "sleep 600 >/dev/null 2>&1 & echo $!"])
        .output()
        .unwrap();
    identity(String::from_utf8(shell.stdout).unwrap().trim().parse().unwrap())
}

/// A child of the test that has ended and that nobody has waited for.
fn zombie() -> Child {
    let child = Command::new("true").spawn().unwrap();
    let pid = Pid::from_child(&child);
    waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).unwrap();
    child
}

#[tokio::test]
async fn a_vmm_that_is_killed_tells_the_signal() {
    let scratch = Scratch::new();
    let process = spawn(&backend("sleeps"), &scratch.dir).await.unwrap();
    assert_eq!(process.has_exited(), None);
    kill(process.identity().pid, Signal::KILL);
    assert_eq!(process.exited().await.to_string(), "killed by signal 9 (SIGKILL)");
    assert_eq!(process.has_exited(), Some(Exit::Signal(9)));
}

#[tokio::test]
async fn a_vmm_is_ended_before_the_server_where_memory_runs_out() {
    let scratch = Scratch::new();
    let process = spawn(&backend("sleeps"), &scratch.dir).await.unwrap();
    let score = |pid: &str| -> i32 {
        let path = format!("/proc/{pid}/oom_score_adj");
        std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
    };
    let pid = process.identity().pid;
    assert!(score(&pid.to_string()) >= score("self") + 100);
    kill(pid, Signal::KILL);
}

#[tokio::test]
async fn a_vmm_that_ends_tells_its_code() {
    let scratch = Scratch::new();
    let process = spawn(&backend("fails"), &scratch.dir).await.unwrap();
    assert_eq!(process.exited().await.to_string(), "exit code 3");
    assert_eq!(process.clone().exited().await, Exit::Code(3));
}

#[tokio::test]
async fn everyone_who_waits_is_told_the_same() {
    let scratch = Scratch::new();
    let process = spawn(&backend("sleeps"), &scratch.dir).await.unwrap();
    let waiting: Vec<_> = (0..8)
        .map(|_| {
            let process = process.clone();
            tokio::spawn(async move { process.exited().await })
        })
        .collect();
    tokio::task::yield_now().await;
    kill(process.identity().pid, Signal::TERM);
    for waiter in waiting {
        assert_eq!(waiter.await.unwrap(), Exit::Signal(15));
    }
}

#[tokio::test]
async fn a_vmm_that_ends_leaves_no_zombie() {
    let scratch = Scratch::new();
    let process = spawn(&backend("fails"), &scratch.dir).await.unwrap();
    let pid = process.identity().pid;
    drop(process);
    // The reaper is the only one left who waits; it must, by itself.
    while fs::exists(format!("/proc/{pid}")).unwrap() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn the_identity_is_that_of_the_running_process() {
    let scratch = Scratch::new();
    scratch.make_pipe();
    let process = spawn(&backend("waits"), &scratch.dir).await.unwrap();
    assert_eq!(*process.identity(), identity(process.identity().pid));
    process.terminate().await.unwrap();
}

#[tokio::test]
async fn a_process_of_an_earlier_server_is_found_again_and_ended() {
    let recorded = orphan();
    let process = VmmProcess::attach(&recorded).unwrap().expect("it lives");
    assert_eq!(*process.identity(), recorded);
    assert_eq!(process.has_exited(), None);
    assert_eq!(process.terminate().await.unwrap(), Exit::Unseen);
    assert!(VmmProcess::attach(&recorded).unwrap().is_none());
}

#[tokio::test]
async fn a_pid_that_is_somebody_else_s_now_is_not_the_recorded_process() {
    let process = orphan();
    let earlier = ProcessIdentity {
        start_time: process.start_time - 1,
        ..process.clone()
    };
    let other_boot = ProcessIdentity {
        boot_id: "00000000-0000-0000-0000-000000000000".into(),
        ..process.clone()
    };
    assert!(VmmProcess::attach(&earlier).unwrap().is_none());
    assert!(VmmProcess::attach(&other_boot).unwrap().is_none());
    let itself = VmmProcess::attach(&process).unwrap().expect("nobody was harmed");
    itself.terminate().await.unwrap();
}

#[tokio::test]
async fn numbers_that_are_no_process_are_gone() {
    let mut identity = identity(std::process::id());
    for pid in [0, 4_194_304, u32::MAX] {
        identity.pid = pid;
        assert!(VmmProcess::attach(&identity).unwrap().is_none(), "{pid}");
    }
}

#[tokio::test]
async fn a_zombie_is_gone_and_left_to_its_parent() {
    let mut child = zombie();
    assert!(VmmProcess::attach(&identity(child.id())).unwrap().is_none());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[tokio::test]
async fn a_call_on_a_vmm_that_dies_fails_at_once_and_tells_how_it_died() {
    let scratch = Scratch::new();
    let vmm = backend("sleeps");
    let process = spawn(&vmm, &scratch.dir).await.unwrap();
    let (booted, ()) = tokio::join!(process.during(vmm.boot(&scratch.dir)), async {
        // The call has connected and waits for an answer that never comes.
        tokio::task::yield_now().await;
        kill(process.identity().pid, Signal::KILL);
    });
    let error = booted.unwrap_err();
    assert!(
        matches!(
            &error,
            VmmError::Ended {
                exit: Exit::Signal(9),
                ..
            }
        ),
        "{error:?}"
    );
    insta::assert_snapshot!(error, @"the VMM ended (killed by signal 9 (SIGKILL)) instead of answering");
}

#[tokio::test]
async fn a_call_on_a_vmm_that_never_came_up_tells_its_exit_code() {
    let scratch = Scratch::new();
    let vmm = backend("fails");
    let process = spawn(&vmm, &scratch.dir).await.unwrap();
    let error = process.during(vmm.boot(&scratch.dir)).await.unwrap_err();
    assert!(
        matches!(
            &error,
            VmmError::Ended {
                exit: Exit::Code(3),
                ..
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn memory_is_told_while_the_process_lives() {
    let scratch = Scratch::new();
    scratch.make_pipe();
    let process = spawn(&backend("waits"), &scratch.dir).await.unwrap();
    let memory = process.memory().unwrap();
    assert!(memory.private > 0 && memory.pss >= memory.private, "{memory:?}");
    assert_eq!(memory.rss, memory.private + memory.shared, "{memory:?}");
    process.terminate().await.unwrap();
    assert!(matches!(process.memory(), Err(ProcessError::Gone { .. })));
}

#[tokio::test]
async fn strays_are_vmms_below_the_directory_and_no_others() {
    let scratch = Scratch::new();
    let instance = scratch.path().join("instance");
    fs::create_dir(&instance).unwrap();
    // Not a VMM, in the directory; a VMM, elsewhere; a VMM, in a directory that is renamed later.
    let sleep = |directory: &std::path::Path, arguments: &[&str]| {
        Command::new("sh")
            .args(["-c", "read _", "vmm"])
            .args(arguments)
            .stdin(Stdio::piped())
            .current_dir(directory)
            .arg0("stencil-microvm")
            .spawn()
            .unwrap()
    };
    let mut others = [
        sleep(&instance, &[]),
        sleep("/".as_ref(), &["--api-socket", "fd=0"]),
    ];
    let mut stray = sleep(&instance, &["--api-socket", "fd=0"]);
    fs::rename(instance, scratch.path().join(".del-instance")).unwrap();

    let found = stray_processes(scratch.path()).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].identity, identity(stray.id()));
    assert!(found[0].directory.ends_with(".del-instance"));
    let process = VmmProcess::attach(&found[0].identity).unwrap().expect("it lives");
    process.terminate().await.unwrap();
    stray.wait().unwrap();
    for other in &mut others {
        other.kill().unwrap();
        other.wait().unwrap();
    }
}

#[tokio::test]
async fn a_vmm_belongs_to_the_directory_that_it_works_in_and_to_no_copy_of_it() {
    let scratch = tempfile::tempdir().unwrap();
    let [instance, copy] = ["instance", "copy"].map(|name| scratch.path().join(name));
    fs::create_dir(&instance).unwrap();
    fs::create_dir(&copy).unwrap();
    let mut child = Command::new("sleep")
        .arg("1000")
        .current_dir(&instance)
        .spawn()
        .unwrap();
    let identity = identity(child.id());
    // A directory stays the same when it is renamed.
    let renamed = scratch.path().join("renamed");
    fs::rename(&instance, &renamed).unwrap();
    let here = VmmProcess::attach_in(&identity, &renamed).unwrap();
    assert!(matches!(here, Attached::Here(_)), "{here:?}");
    let elsewhere = VmmProcess::attach_in(&identity, &copy).unwrap();
    assert!(matches!(elsewhere, Attached::Elsewhere), "{elsewhere:?}");
    VmmProcess::attach_in(&identity, &instance).expect_err("a directory that is gone is nobody's");
    child.kill().unwrap();
    child.wait().unwrap();
    let gone = VmmProcess::attach_in(&identity, &renamed).unwrap();
    assert!(matches!(gone, Attached::Gone), "{gone:?}");
}
