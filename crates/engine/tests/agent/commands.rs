//! Commands in a guest, whose agent is played by the test: what is passed on, what is bounded, how it ends.

use std::time::Duration;

use bytes::Bytes;
use stencil_agent::{CHUNK, SessionId, ToGuest, ToHost, WINDOW};
use stencil_core::State;
use stencil_engine::{
    CreateRequest, End, EngineError, Exec, ExecError, ExecEvent, ExecOutput, ExecRequest, ExecSession,
    ForkRequest, ForksRequest, MAX_CAPTURED, Output,
};
use tokio::task::JoinHandle;

use super::guest::Guest;
use super::{Guests, house, paused, template};
use crate::scripted::House;
use crate::{kill, within};

const SIGKILL: u8 = 9;

fn command(argv: &[&str]) -> Exec {
    Exec {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        ..Exec::default()
    }
}

fn request(argv: &[&str]) -> ExecRequest {
    ExecRequest {
        exec: command(argv),
        stdin: Bytes::new(),
    }
}

/// An instance `web` that is Running, and its guest.
async fn running() -> (House, Guests, Guest) {
    let (house, mut guests) = house().await;
    house.running("web").await;
    let guest = Guest::ready(&mut guests).await;
    (house, guests, guest)
}

fn run(house: &House, request: ExecRequest) -> JoinHandle<Result<ExecOutput, EngineError>> {
    let engine = house.engine.clone();
    tokio::spawn(async move { engine.exec("web", request).await })
}

/// Opens a session that the guest accepts.
async fn open(house: &House, guest: &mut Guest) -> (SessionId, ExecSession) {
    let engine = house.engine.clone();
    let opening = tokio::spawn(async move { engine.agent("web").await?.exec(command(&["sh"])).await });
    let (session, _) = guest.asked_to_run().await;
    guest.say(ToHost::Started { session, pid: 7 }).await;
    (session, within(opening).await.unwrap().unwrap())
}

impl Guest {
    async fn asked_to_run(&mut self) -> (SessionId, Exec) {
        match self.hear().await {
            ToGuest::Exec { session, exec } => (session, exec),
            other => panic!("a command was expected: {other:?}"),
        }
    }

    async fn write(&mut self, session: SessionId, stream: Output, bytes: &[u8]) {
        for chunk in bytes.chunks(CHUNK) {
            let bytes = chunk.to_vec();
            self.say(ToHost::Output {
                session,
                stream,
                bytes,
            })
            .await;
        }
    }

    async fn exit(&mut self, session: SessionId, end: End) {
        self.say(ToHost::Exited {
            session,
            end,
            timed_out: false,
            took: Duration::from_micros(700),
        })
        .await;
    }

    /// Runs whatever it is asked to, which writes this.
    async fn run(&mut self, output: &[u8], end: End) -> Exec {
        let (session, exec) = self.asked_to_run().await;
        self.say(ToHost::Started { session, pid: 7 }).await;
        self.write(session, Output::Stdout, output).await;
        self.exit(session, end).await;
        exec
    }
}

#[tokio::test]
async fn a_command_is_passed_on_whole_and_its_result_comes_back() {
    let (house, _guests, mut guest) = running().await;
    let asked = Exec {
        env: vec![("LANG".to_owned(), "C".to_owned())],
        cwd: Some("/srv".to_owned()),
        timeout: Some(Duration::from_secs(9)),
        ..command(&["grep", "-c", "a b"])
    };
    let running = run(
        &house,
        ExecRequest {
            exec: asked.clone(),
            stdin: Bytes::from_static(b"a b\n"),
        },
    );
    let (session, exec) = guest.asked_to_run().await;
    assert_eq!(exec, Exec { stdin: true, ..asked });
    guest.say(ToHost::Started { session, pid: 7 }).await;
    let bytes = b"a b\n".to_vec();
    assert_eq!(guest.hear().await, ToGuest::Stdin { session, bytes });
    assert_eq!(guest.hear().await, ToGuest::StdinClosed { session });
    guest.write(session, Output::Stderr, b"what?").await;
    guest.write(session, Output::Stdout, b"1\n").await;
    guest.exit(session, End::Code(3)).await;
    let output = within(running).await.unwrap().unwrap();
    assert_eq!(
        (output.stdout.bytes, output.stderr.bytes),
        (b"1\n".to_vec(), b"what?".to_vec())
    );
    assert!(!output.stdout.truncated);
    assert_eq!(output.exited.end, End::Code(3));
    assert_eq!(output.exited.took, Duration::from_micros(700));
}

#[tokio::test]
async fn of_much_output_the_first_mebibyte_is_kept_and_the_rest_read_and_thrown_away() {
    let (house, _guests, mut guest) = running().await;
    let running = run(&house, request(&["yes"]));
    let (session, _) = guest.asked_to_run().await;
    guest.say(ToHost::Started { session, pid: 7 }).await;
    let (mut sent, mut granted) = (0, WINDOW as usize);
    while sent < 3 * MAX_CAPTURED {
        while granted - sent < CHUNK {
            match guest.hear().await {
                ToGuest::Credit { bytes, .. } => granted += bytes as usize,
                other => panic!("credit was expected: {other:?}"),
            }
        }
        guest.write(session, Output::Stdout, &[b'y'; CHUNK]).await;
        sent += CHUNK;
    }
    guest.exit(session, End::Code(0)).await;
    let output = within(running).await.unwrap().unwrap();
    assert_eq!(output.stdout.bytes.len(), MAX_CAPTURED);
    assert!(output.stdout.truncated && !output.stderr.truncated);
}

#[tokio::test]
async fn who_does_not_read_stops_only_his_own_session() {
    let (house, _guests, mut guest) = running().await;
    let (session, mut unread) = open(&house, &mut guest).await;
    guest
        .write(session, Output::Stdout, &vec![1; WINDOW as usize])
        .await;
    // The next thing that the guest hears is not credit.
    let other = run(&house, request(&["true"]));
    guest.run(b"", End::Code(0)).await;
    within(other).await.unwrap().unwrap();
    let mut read = 0;
    while read < WINDOW as usize {
        match within(unread.events.next()).await.unwrap().unwrap() {
            ExecEvent::Output(Output::Stdout, bytes) => read += bytes.len(),
            other => panic!("output was expected: {other:?}"),
        }
    }
    let next = tokio::spawn(async move { unread.events.next().await });
    let bytes = WINDOW;
    let stream = Output::Stdout;
    assert_eq!(
        guest.hear().await,
        ToGuest::Credit {
            session,
            stream,
            bytes
        }
    );
    guest.exit(session, End::Signal(1)).await;
    let ended = within(next).await.unwrap().unwrap().unwrap();
    assert!(matches!(ended, ExecEvent::Exited(exited) if exited.end == End::Signal(1)));
}

#[tokio::test]
async fn an_agent_that_sends_more_than_it_was_granted_loses_the_session_and_no_other() {
    let (house, _guests, mut guest) = running().await;
    let (flooding, mut flooded) = open(&house, &mut guest).await;
    let (session, mut other) = open(&house, &mut guest).await;
    guest
        .write(flooding, Output::Stderr, &vec![1; WINDOW as usize + 1])
        .await;
    let signal = SIGKILL;
    assert_eq!(
        guest.hear().await,
        ToGuest::Signal {
            session: flooding,
            signal
        }
    );
    loop {
        match within(flooded.events.next()).await.unwrap() {
            Ok(ExecEvent::Output(Output::Stderr, _)) => {}
            Err(why) => break assert_eq!(why, "its agent sent more than it was granted"),
            Ok(other) => panic!("an end was expected: {other:?}"),
        }
    }
    guest.write(session, Output::Stdout, b"fine").await;
    let event = within(other.events.next()).await.unwrap().unwrap();
    assert_eq!(
        event,
        ExecEvent::Output(Output::Stdout, Bytes::from_static(b"fine"))
    );
}

#[tokio::test]
async fn input_waits_for_a_command_that_does_not_read() {
    let (house, _guests, mut guest) = running().await;
    let (session, command) = open(&house, &mut guest).await;
    let input = command.input.clone();
    let writing = tokio::spawn(async move { input.write(&vec![7; WINDOW as usize + 1]).await });
    let mut heard = 0;
    while heard < WINDOW as usize {
        match guest.hear().await {
            ToGuest::Stdin { bytes, .. } => heard += bytes.len(),
            other => panic!("input was expected: {other:?}"),
        }
    }
    // The last byte waits, and others do not wait for it.
    command.input.signal(15).await.unwrap();
    assert_eq!(guest.hear().await, ToGuest::Signal { session, signal: 15 });
    // A grant of more than was sent is no more than that.
    let bytes = u32::MAX;
    guest.say(ToHost::StdinCredit { session, bytes }).await;
    let bytes = vec![7];
    assert_eq!(guest.hear().await, ToGuest::Stdin { session, bytes });
    within(writing).await.unwrap().unwrap();
    guest.exit(session, End::Code(0)).await;
}

#[tokio::test]
async fn a_command_that_nobody_waits_for_any_more_is_killed() {
    let (house, _guests, mut guest) = running().await;
    let (session, command) = open(&house, &mut guest).await;
    guest.write(session, Output::Stdout, &[1; 1000]).await;
    drop(command);
    let signal = SIGKILL;
    let mut killed = false;
    let mut granted = 0;
    // What it still has to write is let come, so that it can end.
    while !killed || granted < 1000 {
        match guest.hear().await {
            ToGuest::Signal {
                session: of,
                signal: number,
            } => killed = (of, number) == (session, signal),
            ToGuest::Credit { bytes, .. } => granted += bytes,
            other => panic!("nothing else was expected: {other:?}"),
        }
    }
    // Also one that has not begun yet.
    let running = run(&house, request(&["sleep", "1000"]));
    let (session, _) = guest.asked_to_run().await;
    running.abort();
    assert_eq!(guest.hear().await, ToGuest::Signal { session, signal });
}

#[tokio::test]
async fn a_command_is_lost_with_its_vm_and_that_is_told() {
    let (house, _guests, mut guest) = running().await;
    let running = run(&house, request(&["sleep", "1000"]));
    let (session, _) = guest.asked_to_run().await;
    guest.say(ToHost::Started { session, pid: 7 }).await;
    kill(house.processes()[0]);
    let lost = within(running).await.unwrap().unwrap_err();
    assert!(
        matches!(&lost, EngineError::AgentLost { why, .. } if why == "its VM ended or was put on standby"),
        "{lost}"
    );
    let refused = house.engine.exec("web", request(&["true"])).await.unwrap_err();
    assert!(
        refused.to_string().starts_with("cannot exec in state Stopped"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_command_ends_when_its_guest_goes_down_or_is_paused_and_is_killed_if_that_goes_on() {
    let (house, _guests, mut guest) = running().await;
    let running = run(&house, request(&["sleep", "1000"]));
    let (session, _) = guest.asked_to_run().await;
    guest.say(ToHost::Started { session, pid: 7 }).await;
    paused(&house, &mut guest, "web").await;
    let lost = within(running).await.unwrap().unwrap_err();
    assert!(
        matches!(&lost, EngineError::AgentLost { why, .. } if why == "its VM was paused"),
        "{lost}"
    );
    assert_eq!(
        guest.hear().await,
        ToGuest::Signal {
            session,
            signal: SIGKILL
        }
    );
    house.engine.resume("web").await.unwrap();
    guest.take_epoch_again().await;
    // One that is not begun yet ends like one that runs.
    let running = run(&house, request(&["sleep", "1000"]));
    guest.asked_to_run().await;
    house.hypervisor.guests_go_down();
    let lost = within(running).await.unwrap().unwrap_err();
    assert!(
        matches!(&lost, EngineError::AgentLost { why, .. } if why == "its guest is down"),
        "{lost}"
    );
}

#[tokio::test]
async fn a_command_is_lost_with_its_agent_and_that_is_told() {
    let (house, _guests, mut guest) = running().await;
    let running = run(&house, request(&["sleep", "1000"]));
    guest.asked_to_run().await;
    let hello = ToHost::Hello {
        epoch: None,
        frozen: false,
    };
    guest.say_to_nobody(hello).await;
    let lost = within(running).await.unwrap().unwrap_err();
    assert!(
        matches!(&lost, EngineError::AgentLost { why, .. } if why == "its agent was started anew"),
        "{lost}"
    );
}

#[tokio::test]
async fn what_a_guest_cannot_start_is_told_with_its_reason() {
    let (house, _guests, mut guest) = running().await;
    let running = run(&house, request(&["mak"]));
    let (session, _) = guest.asked_to_run().await;
    let (error, why) = (ExecError::NotFound, "there is no mak\nhere".to_owned());
    guest.say(ToHost::ExecFailed { session, error, why }).await;
    let refused = within(running).await.unwrap().unwrap_err();
    assert!(
        matches!(&refused, EngineError::NotExecuted { error: ExecError::NotFound, why, .. } if why == "there is no mak here"),
        "{refused}"
    );
    for wrong in [command(&[]), command(&["echo", &"x".repeat(64 << 10)])] {
        let refused = house.engine.agent("web").await.unwrap().exec(wrong).await;
        assert!(matches!(refused, Err(EngineError::Invalid(_))));
    }
}

#[tokio::test]
async fn without_an_agent_a_command_is_refused_with_what_would_be_right() {
    let house = House::new().await;
    house.running("old").await;
    let refused = house.engine.exec("old", request(&["true"])).await.unwrap_err();
    assert!(matches!(&refused, EngineError::NoAgent { .. }));
    assert!(refused.to_string().ends_with(
        "scripted gives its guests no port for one: create the instance on a hypervisor that does"
    ));
    let mut guests = house.hypervisor.give_agent_ports();
    house.running("web").await;
    let mut guest = Guest::next(&mut guests).await;
    let refused = house.engine.exec("web", request(&["true"])).await.unwrap_err();
    assert!(
        matches!(&refused, EngineError::NoAgent { .. })
            && refused.to_string().contains("nobody in the guest has answered"),
        "{refused}"
    );
    guest.given_epoch().await;
    let refused = house.engine.exec("web", request(&["true"])).await.unwrap_err();
    assert!(matches!(&refused, EngineError::AgentNotReady { .. }), "{refused}");
    house.engine.pause("web").await.unwrap();
    let refused = house.engine.exec("web", request(&["true"])).await.unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("it is paused; let it go on (resume)"),
        "{refused}"
    );
}

fn forks_that_run(count: u32, argv: &[&str]) -> ForksRequest {
    ForksRequest {
        count,
        name_prefix: None,
        fork: ForkRequest::default(),
        exec: Some(request(argv)),
        delete_after: true,
    }
}

#[tokio::test]
async fn a_command_in_a_new_fork_waits_for_an_agent_that_is_not_there_yet() {
    let (house, mut guests) = house().await;
    let stopped = CreateRequest {
        start: false,
        ..house.request("web")
    };
    house.engine.create(stopped).await.unwrap();
    let engine = house.engine.clone();
    let forked = tokio::spawn(async move { engine.forks("web", forks_that_run(1, &["hostname"])).await });
    let mut guest = Guest::next(&mut guests).await;
    // It boots for longer than a command waits elsewhere for an agent.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    guest.take_epoch().await;
    let fork = house.engine.get("web-1").await.unwrap();
    assert!(fork.metadata.unwrap().delete_after);
    guest.run(b"web-1", End::Code(0)).await;
    let mut outcomes = within(forked).await.unwrap().unwrap();
    let work = outcomes.remove(0).work.unwrap();
    assert_eq!(work.exec.unwrap().stdout.bytes, b"web-1");
    assert!(work.deleted);
}

#[tokio::test]
async fn forks_run_a_command_each_tell_its_result_and_go() {
    let (house, mut guests) = house().await;
    template(&house, &mut guests, "warm").await;
    let before = house.directories();
    let engine = house.engine.clone();
    let forked = tokio::spawn(async move { engine.forks("warm", forks_that_run(3, &["hostname"])).await });
    let mut all = Vec::new();
    for _ in 0..3 {
        let mut guest = Guest::next(&mut guests).await;
        all.push(tokio::spawn(async move {
            let name = guest.take_epoch().await.host_name;
            // One of them cannot run it, and goes all the same.
            if name == "warm-2" {
                let (session, _) = guest.asked_to_run().await;
                let (error, why) = (ExecError::NotFound, "there is no hostname".to_owned());
                guest.say(ToHost::ExecFailed { session, error, why }).await;
            } else {
                guest.run(name.as_bytes(), End::Code(0)).await;
            }
            guest
        }));
    }
    let outcomes = within(forked).await.unwrap().unwrap();
    for outcome in outcomes {
        let (fork, work) = (outcome.result.unwrap(), outcome.work.unwrap());
        assert_eq!(fork.state, State::Running);
        assert!(work.deleted);
        match work.exec {
            Ok(output) => assert_eq!(output.stdout.bytes, outcome.name.as_str().as_bytes()),
            Err(EngineError::NotExecuted { .. }) => assert_eq!(outcome.name.as_str(), "warm-2"),
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(house.directories(), before);
    assert_eq!(house.processes(), [] as [u32; 0]);
}

#[tokio::test]
async fn commands_that_no_fork_could_run_are_refused_before_anything_is_made() {
    let house = House::new().await;
    house.template("warm").await;
    let before = (house.directories(), house.hypervisor.calls());
    let refused = house.engine.forks("warm", forks_that_run(2, &["true"])).await;
    assert!(matches!(refused, Err(EngineError::NoAgent { .. })), "{refused:?}");
    let _guests = house.hypervisor.give_agent_ports();
    let paused = ForkRequest {
        target_state: Some(State::Paused),
        ..ForkRequest::default()
    };
    for wrong in [
        ForksRequest {
            exec: None,
            ..forks_that_run(2, &[])
        },
        ForksRequest {
            fork: paused,
            ..forks_that_run(2, &["true"])
        },
    ] {
        let refused = house.engine.forks("warm", wrong).await;
        assert!(matches!(refused, Err(EngineError::Invalid(_))), "{refused:?}");
    }
    assert_eq!((house.directories(), house.hypervisor.calls()), before);
}
