//! Conversations: who is heard, and what an agent does with what is not for it.

use std::io::Write;
use std::os::unix::net::UnixStream;

use stencil_agent::{Decoder, End, EpochId, Exec, Nonce, Output, ToGuest, ToHost, encode};

use crate::host::{Agent, Host, epoch, shell};

#[test]
fn nobody_is_heard_before_hello() {
    let agent = Agent::start();
    let mut host = Host::new(UnixStream::connect(agent.socket()).unwrap());
    host.send(&ToGuest::Epoch(epoch(1)));
    assert_eq!(
        host.hello(),
        ToHost::Hello {
            epoch: None,
            frozen: false
        }
    );
}

#[test]
fn a_new_host_ends_the_sessions_of_the_one_before() {
    let agent = Agent::start();
    let mut first = agent.enter();
    let (_, pid) = first.begin(shell("echo ready; sleep 1000"));
    assert!(matches!(first.next(), ToHost::Output { .. }));
    let mut second = Host::new(UnixStream::connect(agent.socket()).unwrap());
    assert_eq!(
        second.hello(),
        ToHost::Hello {
            epoch: Some(EpochId([1; 16])),
            frozen: false
        }
    );
    // Killed, and reaped by its parent.
    second.print(&format!("while [ -e /proc/{pid} ]; do :; done"));
}

#[test]
fn one_stream_can_hold_many_conversations() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let (session, _) = host.begin(shell("yes"));
    // Its messages lie in the stream; a new host on the same stream knows them by their nonce.
    let old = host.nonce;
    let mut host = Host::new(host.stream.try_clone().unwrap());
    assert!(matches!(host.hello(), ToHost::Hello { .. }));
    assert_eq!(host.print("echo new"), "new\n");
    let mut bytes = Vec::new();
    let exec = shell("echo old");
    encode(old, &ToGuest::Exec { session, exec }, &mut bytes).unwrap();
    host.stream.write_all(&bytes).unwrap();
    assert_eq!(host.print("echo only new"), "only new\n");
}

#[test]
fn what_was_cut_off_costs_nothing_else() {
    let agent = Agent::start();
    let host = agent.enter();
    let mut bytes = Vec::new();
    encode(host.nonce, &ToGuest::Freeze, &mut bytes).unwrap();
    for cut in 1..bytes.len() {
        (&host.stream).write_all(&bytes[..cut]).unwrap();
        let mut next = Host::new(host.stream.try_clone().unwrap());
        assert!(matches!(next.hello(), ToHost::Hello { frozen: false, .. }));
    }
}

#[test]
fn a_host_of_another_version_learns_the_agents() {
    let agent = Agent::start();
    let mut host = Host::new(UnixStream::connect(agent.socket()).unwrap());
    let mut frame = vec![99, 1, 2, 3, 4, 5, 6, 7, 8, 0];
    frame.extend(crc32fast::hash(&frame).to_le_bytes());
    host.stream
        .write_all(&cobs::encode_vec_including_sentinels(&frame))
        .unwrap();
    // In the agent's version, or it could not be decoded here.
    let frame = host.next_frame().unwrap();
    assert_eq!(frame.nonce, Nonce::NONE);
    assert!(matches!(frame.message, ToHost::Hello { .. }));
}

#[test]
fn noise_does_not_stop_an_agent() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let mut noise: Vec<u8> = (0..1_000_000_u32)
        .map(|index| (index.wrapping_mul(index) >> 7).to_le_bytes()[0])
        .collect();
    assert!(Decoder::<ToGuest>::new().next(&mut &noise[..]).unwrap().is_err());
    host.stream.write_all(&noise).unwrap();
    noise.retain(|byte| *byte != 0);
    host.stream.write_all(&noise).unwrap();
    host.stream.write_all(&[0]).unwrap();
    assert_eq!(host.print("echo here"), "here\n");
}

#[test]
fn messages_for_sessions_that_are_not_there_are_ignored() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let (session, _) = host.begin(Exec {
        stdin: true,
        ..shell("exit 4")
    });
    assert_eq!(host.finish(session).end, Some(End::Code(4)));
    let bytes = b"late".to_vec();
    host.send(&ToGuest::Stdin { session, bytes });
    host.send(&ToGuest::Signal { session, signal: 9 });
    let stream = Output::Stdout;
    host.send(&ToGuest::Credit {
        session,
        stream,
        bytes: 1,
    });
    assert_eq!(host.print("echo here"), "here\n");
}

#[test]
fn an_agent_that_is_asked_to_end_ends_its_sessions() {
    let mut agent = Agent::start();
    let mut host = agent.enter();
    let marker = agent.dir.path().join("alive");
    // The lock is let go when the last process that has it has ended.
    let script = format!(
        "exec 9> {}; flock -n 9; echo locked; sleep 1000",
        marker.display()
    );
    host.begin(shell(&script));
    assert!(matches!(host.next(), ToHost::Output { .. }));
    let pid = rustix::process::Pid::from_child(&agent.process);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(agent.process.wait().unwrap().success());
    let lock = std::fs::File::open(&marker).unwrap();
    lock.lock().unwrap();
}
