//! The other side of a QEMU's monitor as no QEMU is: it lies, floods, stalls and goes away. Each call ends in time with an error.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;

use stencil_core::{InstanceDir, VmPhase};
use stencil_vmm::{Call, Hypervisor, MAX_REPLY_BYTES, Qemu, VmStatus, VmmError};

use crate::directory::Scratch;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;
const DONE: &str = r#"{"return": {}}"#;
const EVENT: &str = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#;

/// The reply to a command of a conversation before.
const LATE: &str = r#"{"return": {"status": "postmigrate"}, "id": 7}"#;

/// What the other side does for its next line.
enum Turn {
    Says(String),
    /// Waits for a line.
    Listens,
    /// Keeps the connection and says nothing more.
    Stalls,
    /// Sends this without an end.
    Floods(String),
}

use Turn::{Floods, Listens, Says, Stalls};

fn says(line: &str) -> Turn {
    Says(line.to_owned())
}

fn flood(bytes: &str) -> Turn {
    Floods(bytes.repeat(1000))
}

/// Up to where `query-status` waits for its reply.
fn greeted(mut then: Vec<Turn>) -> Vec<Turn> {
    let mut turns = vec![
        says(EVENT),
        says(LATE),
        says(GREETING),
        Listens,
        says(LATE),
        says(EVENT),
        says(DONE),
        Listens,
    ];
    turns.append(&mut then);
    turns
}

/// What [`Hypervisor::info`] answers when this is on the other side.
async fn info(turns: Vec<Turn>) -> Result<VmStatus, VmmError> {
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.dir.vmm_socket()).unwrap();
    let other_side = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        // What fails here is that the backend has gone, as it may.
        let _ = play(&stream, turns);
    });
    let answer = Qemu::new("qemu".into()).info(&scratch.dir).await;
    // The connection is closed by a task, which has its turn meanwhile.
    let joined = tokio::task::spawn_blocking(move || other_side.join());
    joined.await.unwrap().unwrap();
    answer
}

fn play(mut stream: &UnixStream, turns: Vec<Turn>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    for turn in turns {
        match turn {
            Says(line) => stream.write_all(format!("{line}\r\n").as_bytes())?,
            Listens => drop(lines.next().transpose()?),
            Floods(bytes) => loop {
                stream.write_all(bytes.as_bytes())?;
            },
            Stalls => {
                // Ends when the backend closes its side.
                for _ in lines.by_ref() {}
            }
        }
    }
    Ok(())
}

fn status(status: &str) -> String {
    format!(r#"{{"return": {{"status": "{status}", "singlestep": false, "running": false}}}}"#)
}

#[tokio::test]
async fn what_it_says_of_its_vm_becomes_a_phase() {
    for (said, phase) in [
        ("prelaunch", VmPhase::Created),
        ("inmigrate", VmPhase::Undefined),
        ("running", VmPhase::Running),
        ("paused", VmPhase::Paused),
        ("io-error", VmPhase::Paused),
        ("shutdown", VmPhase::Shutdown),
        ("guest-panicked", VmPhase::Shutdown),
        ("internal-error", VmPhase::Shutdown),
    ] {
        let answer = info(greeted(vec![says(EVENT), says(&status(said))]))
            .await
            .unwrap();
        assert_eq!(answer.phase, phase, "{said}");
        let stopped_by_itself = phase == VmPhase::Shutdown || said == "io-error";
        assert_eq!(answer.end.is_some(), stopped_by_itself, "{said}");
    }
}

#[tokio::test]
async fn what_is_not_the_protocol_is_an_error_that_says_so() {
    for turns in [
        // One that goes away at once may be gone before anything is asked of it.
        vec![says("220 mail.example.org ESMTP"), Stalls],
        vec![says(DONE), Stalls],
        vec![says(r#"{"QMP": {"version": "new"}}"#), Stalls],
        greeted(vec![says("[]")]),
        greeted(vec![says("{}")]),
        greeted(vec![says(r#"{"return": 5}"#)]),
        greeted(vec![says(&status("dreaming"))]),
        greeted(vec![says(&"[".repeat(10_000))]),
    ] {
        let error = info(turns).await.unwrap_err();
        assert!(
            matches!(error, VmmError::Protocol { call: Call::Info, .. }),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_refusal_is_told_in_its_words() {
    let refusal = r#"{"error": {"class": "GenericError", "desc": "not now"}}"#;
    let error = info(greeted(vec![says(refusal)])).await.unwrap_err();
    assert_eq!(error.to_string(), "vm.info was refused: query-status: not now");
    assert!(error.was_refused());
}

#[tokio::test]
async fn a_line_that_does_not_end_is_not_kept() {
    for turns in [vec![flood("{\"QMP\": ")], greeted(vec![flood("x")])] {
        let error = info(turns).await.unwrap_err();
        assert!(
            matches!(
                error,
                VmmError::TooLarge {
                    limit: MAX_REPLY_BYTES,
                    ..
                }
            ),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn one_that_stalls_or_talks_of_other_things_is_given_up() {
    let event = flood("{\"event\": \"STOP\", \"timestamp\": {}}\n");
    for turns in [
        vec![Stalls],
        vec![says(GREETING), Stalls],
        greeted(vec![Stalls]),
        greeted(vec![Says(status("running")[..20].to_owned()), Stalls]),
        greeted(vec![event]),
    ] {
        let error = info(turns).await.unwrap_err();
        let is_in_time = matches!(error, VmmError::Timeout { after, .. } if after == Call::Info.deadline());
        assert!(
            is_in_time || matches!(error, VmmError::Protocol { .. }),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn one_that_goes_away_is_told_from_one_that_is_wrong() {
    for turns in [
        vec![],
        vec![says(GREETING)],
        vec![says(GREETING), Listens],
        greeted(vec![]),
    ] {
        let error = info(turns).await.unwrap_err();
        assert!(
            matches!(error, VmmError::HungUp { call: Call::Info, .. }),
            "{error:?}"
        );
    }
}

/// Answers each `query-status` with the next of these, and counts connections and questions.
fn monitor(listener: UnixListener, states: Vec<&'static str>) -> thread::JoinHandle<(usize, usize)> {
    thread::spawn(move || {
        let (mut connections, mut asked) = (0, 0);
        let mut states = states.into_iter();
        while let (Ok((mut stream, _)), true) = (listener.accept(), states.len() > 0) {
            connections += 1;
            stream.write_all(format!("{GREETING}\r\n").as_bytes()).unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            for line in lines.map_while(Result::ok) {
                let command: serde_json::Value = serde_json::from_str(&line).unwrap();
                let id = &command["id"];
                let reply = if command["execute"] == "query-status" {
                    asked += 1;
                    let Some(state) = states.next() else { break };
                    format!("{{\"return\": {{\"status\": \"{state}\"}}, \"id\": {id}}}\r\n")
                } else if command["execute"] == "stop" {
                    format!("{EVENT}\r\n{{\"return\": {{}}, \"id\": {id}}}\r\n")
                } else {
                    format!("{{\"return\": {{}}, \"id\": {id}}}\r\n")
                };
                stream.write_all(reply.as_bytes()).unwrap();
            }
        }
        (connections, asked)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn many_calls_share_one_connection_and_ask_only_what_may_have_changed() {
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.dir.vmm_socket()).unwrap();
    let other_side = monitor(listener, vec!["running", "paused"]);
    let vmm = Arc::new(Qemu::new("qemu".into()));
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let (vmm, dir) = (Arc::clone(&vmm), scratch.dir.clone());
        calls.spawn(async move { vmm.info(&dir).await });
    }
    for answer in calls.join_all().await {
        assert_eq!(answer.unwrap().phase, VmPhase::Running);
    }
    // What was done may have changed it, and an event says that it has.
    vmm.pause(&scratch.dir).await.unwrap();
    for _ in 0..64 {
        assert_eq!(vmm.info(&scratch.dir).await.unwrap().phase, VmPhase::Paused);
    }
    drop(vmm);
    // It waits for another one.
    drop(UnixStream::connect(scratch.dir.vmm_socket()).unwrap());
    let (connections, asked) = tokio::task::spawn_blocking(|| other_side.join())
        .await
        .unwrap()
        .unwrap();
    assert!(
        asked <= 64 + 2 && connections == 1,
        "{connections} connections, {asked} questions"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn another_client_of_the_monitor_is_waited_for() {
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.dir.vmm_socket()).unwrap();
    let first = UnixStream::connect(scratch.dir.vmm_socket()).unwrap();
    let vmm = Qemu::new("qemu".into());
    let other_side = thread::spawn(move || {
        // It takes the next one when the first has gone.
        let (busy, _) = listener.accept().unwrap();
        let _ = BufReader::new(busy).lines().next();
        monitor(listener, vec!["running"]).join().unwrap()
    });
    let asking = vmm.info(&scratch.dir);
    let leaving = async {
        tokio::task::yield_now().await;
        drop(first);
    };
    let (answer, ()) = tokio::join!(asking, leaving);
    assert_eq!(answer.unwrap().phase, VmPhase::Running);
    drop(vmm);
    drop(UnixStream::connect(scratch.dir.vmm_socket()).unwrap());
    tokio::task::spawn_blocking(|| other_side.join())
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn versions_before_7_2_are_refused_and_others_are_taken() {
    let ask = async |said: &str| {
        let scratch = Scratch::new();
        let binary = scratch.path().join("qemu");
        fs::write(&binary, format!("#!/bin/sh\necho '{said}'\n")).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&binary, executable).unwrap();
        Qemu::new(binary).version().await
    };
    let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)";
    assert_eq!(ask(debian).await.unwrap(), "7.2.22");
    assert_eq!(ask("QEMU emulator version 10.1.0").await.unwrap(), "10.1.0");
    let old = ask("QEMU emulator version 6.2.0 (Debian 1:6.2)")
        .await
        .unwrap_err();
    assert!(
        old.to_string()
            .ends_with("is version 6.2.0; this takes version 7.2 and later"),
        "{old}"
    );
    let other = ask("cloud-hypervisor v53.0").await.unwrap_err();
    assert!(matches!(other, VmmError::Version { .. }), "{other:?}");
}

#[tokio::test]
async fn an_instance_without_a_machine_of_its_own_is_named() {
    let dir = InstanceDir::new("/nonexistent/instance");
    let error = Qemu::new("qemu".into())
        .snapshot(&dir, &dir.snapshot())
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot read /nonexistent/instance/machine.json, which says what machine a VM is"
    );
}
