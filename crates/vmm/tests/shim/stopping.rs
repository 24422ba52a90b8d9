//! Stopping a VMM: asked, then by force, always with proof of death.

use std::fs;
use std::os::unix::net::UnixListener;

use rustix::process::{Pid, Signal, kill_process};
use stencil_vmm::{Exit, Hypervisor};

use crate::directory::{Scratch, backend, spawn};
use crate::replayer::{Replayer, Reply};

/// Whether the process is there, be it as a zombie.
fn exists(pid: u32) -> bool {
    fs::exists(format!("/proc/{pid}")).unwrap()
}

#[tokio::test]
async fn a_vmm_is_asked_to_end_first() {
    let scratch = Scratch::new();
    let vmm = backend("sleeps");
    let process = spawn(&vmm, &scratch.dir).await.unwrap();
    // The replayer answers in its place, and the process ends as if it had.
    fs::remove_file(scratch.dir.vmm_socket()).unwrap();
    let replayer = Replayer::start(&scratch.dir, vec![Reply::Recorded("vmm-shutdown")]);
    let pid = Pid::from_raw(process.identity().pid.try_into().unwrap()).unwrap();
    let (exit, asked) = tokio::join!(vmm.stop(&scratch.dir, &process), async {
        let requests = replayer.requests().await;
        kill_process(pid, Signal::USR1).unwrap();
        requests
    });
    assert!(
        asked[0]
            .to_string()
            .starts_with("PUT /api/v1/vmm.shutdown HTTP/1.1\n")
    );
    assert_eq!(
        exit.unwrap(),
        Exit::Signal(Signal::USR1.as_raw()),
        "neither SIGTERM nor SIGKILL was sent"
    );
    assert!(!scratch.dir.vmm_socket().exists());
}

#[tokio::test]
async fn a_vmm_that_does_not_answer_is_terminated() {
    let scratch = Scratch::new();
    let vmm = backend("sleeps");
    let process = spawn(&vmm, &scratch.dir).await.unwrap();
    drop(UnixListener::bind(scratch.dir.console_socket()).unwrap());
    assert_eq!(vmm.stop(&scratch.dir, &process).await.unwrap(), Exit::Signal(15));
    assert!(!exists(process.identity().pid));
    assert!(!scratch.dir.vmm_socket().exists());
    assert!(!scratch.dir.console_socket().exists());
}

#[tokio::test]
async fn a_vmm_that_ignores_sigterm_is_killed() {
    let scratch = Scratch::new();
    scratch.make_pipe();
    let vmm = backend("ignores-sigterm");
    let process = spawn(&vmm, &scratch.dir).await.unwrap();
    assert_eq!(scratch.wait_until_told(), "deaf\n");
    assert_eq!(vmm.stop(&scratch.dir, &process).await.unwrap(), Exit::Signal(9));
    assert!(!exists(process.identity().pid));
}

#[tokio::test]
async fn a_vmm_that_is_stopped_by_a_signal_is_killed() {
    let scratch = Scratch::new();
    let vmm = backend("sleeps");
    let process = spawn(&vmm, &scratch.dir).await.unwrap();
    let pid = Pid::from_raw(process.identity().pid.try_into().unwrap()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    assert_eq!(vmm.stop(&scratch.dir, &process).await.unwrap(), Exit::Signal(9));
}

#[tokio::test]
async fn stopping_what_has_ended_cleans_up_and_tells_how_it_ended() {
    let scratch = Scratch::new();
    let vmm = backend("fails");
    let process = spawn(&vmm, &scratch.dir).await.unwrap();
    process.exited().await;
    for _ in 0..2 {
        assert_eq!(vmm.stop(&scratch.dir, &process).await.unwrap(), Exit::Code(3));
    }
    assert!(!scratch.dir.vmm_socket().exists());
    assert!(scratch.dir.vmm_log().exists());
}
