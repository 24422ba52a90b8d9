//! Flow control: much data, readers that do not read, and no memory for either.

use stencil_agent::{CHUNK, End, Exec, Output, SessionId, ToGuest, ToHost, WINDOW};

use crate::host::{Agent, Host, shell};

/// What an agent may need, in KiB: a window for each stream, its queues, itself.
const MEMORY_KIB: u64 = 16 << 10;

/// Takes output of `session` until so many bytes are there, and grants none.
fn take(host: &mut Host, session: SessionId, bytes: usize) {
    let mut taken = 0;
    while taken < bytes {
        match host.next() {
            ToHost::Output {
                session: of, bytes, ..
            } if of == session => taken += bytes.len(),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(taken, bytes);
}

#[test]
fn a_hundred_megabytes_flow_without_memory() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let (session, _) = host.begin(shell("head -c 100000000 /dev/zero"));
    let mut total = 0;
    loop {
        match host.next() {
            ToHost::Output { bytes, .. } => {
                total += bytes.len();
                host.send(&ToGuest::Credit {
                    session,
                    stream: Output::Stdout,
                    bytes: bytes.len().try_into().unwrap(),
                });
            }
            ToHost::Exited { end, .. } => break assert_eq!(end, End::Code(0)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(total, 100_000_000);
    assert!(
        agent.peak_memory_kib() < MEMORY_KIB,
        "{} KiB",
        agent.peak_memory_kib()
    );
}

#[test]
fn a_stream_that_nobody_reads_stops_alone() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let (session, _) = host.begin(shell("yes"));
    take(&mut host, session, WINDOW as usize);
    // Nothing more comes of it, and others go on.
    assert_eq!(host.print("echo meanwhile"), "meanwhile\n");
    host.send(&ToGuest::Credit {
        session,
        stream: Output::Stderr,
        bytes: u32::MAX,
    });
    assert_eq!(host.print("echo meanwhile"), "meanwhile\n");
    host.send(&ToGuest::Credit {
        session,
        stream: Output::Stdout,
        bytes: 1000,
    });
    take(&mut host, session, 1000);
    host.send(&ToGuest::Signal { session, signal: 9 });
    assert_eq!(
        host.print("echo its rest waits for credit"),
        "its rest waits for credit\n"
    );
    host.send(&ToGuest::Credit {
        session,
        stream: Output::Stdout,
        bytes: u32::MAX,
    });
    assert_eq!(host.finish(session).end, Some(End::Signal(9)));
}

#[test]
fn a_host_that_does_not_read_at_all_costs_no_memory() {
    let agent = Agent::start();
    let mut host = agent.enter();
    for _ in 0..20 {
        let session = host.ask(shell("yes"));
        host.send(&ToGuest::Credit {
            session,
            stream: Output::Stdout,
            bytes: u32::MAX,
        });
    }
    // Unheard as well: what it is asked until it takes no more, which is once it cannot answer any more.
    host.stream.set_nonblocking(true).unwrap();
    let mut asked = Vec::new();
    stencil_agent::encode(host.nonce, &ToGuest::Hello, &mut asked).unwrap();
    let asked = asked.repeat(1000);
    while std::io::Write::write(&mut host.stream, &asked).is_ok() {}
    // Another host comes, is heard at once, and finds an agent of normal size.
    assert_eq!(agent.enter().print("echo here"), "here\n");
    assert!(
        agent.peak_memory_kib() < MEMORY_KIB,
        "{} KiB",
        agent.peak_memory_kib()
    );
}

#[test]
fn input_flows_within_its_window_and_arrives_whole() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let (session, _) = host.begin(Exec {
        stdin: true,
        ..shell("sha256sum")
    });
    let input: Vec<u8> = (0..5_000_000_u32)
        .map(|index| (index % 251).to_le_bytes()[0])
        .collect();
    let mut credit = WINDOW as usize;
    for chunk in input.chunks(CHUNK) {
        while credit < chunk.len() {
            match host.next() {
                ToHost::StdinCredit { bytes, .. } => credit += bytes as usize,
                other => panic!("{other:?}"),
            }
        }
        credit -= chunk.len();
        host.send(&ToGuest::Stdin {
            session,
            bytes: chunk.to_vec(),
        });
    }
    host.send(&ToGuest::StdinClosed { session });
    // Of the same bytes by sha256sum(1).
    let expected = "d9b380b7e7b4216832cfebb75dbef64d95d592bcad101548204a03d9e0ddce70";
    let sum = host.finish(session).stdout;
    assert!(sum.starts_with(expected), "{sum}");
}

#[test]
fn input_that_nobody_reads_is_granted_on() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let (session, _) = host.begin(Exec {
        stdin: true,
        ..shell("exec < /dev/null; echo closed; read line < /dev/stderr; sleep 1000")
    });
    assert!(matches!(host.next(), ToHost::Output { .. }));
    let mut granted = 0;
    for _ in 0..20 {
        host.send(&ToGuest::Stdin {
            session,
            bytes: vec![0; CHUNK],
        });
        match host.next() {
            ToHost::StdinCredit { bytes, .. } => granted += bytes as usize,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(granted, 20 * CHUNK);
}

#[test]
fn more_input_than_was_granted_ends_the_session() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let (session, _) = host.begin(Exec {
        argv: vec!["sleep".to_owned(), "1000".to_owned()],
        stdin: true,
        ..Exec::default()
    });
    for _ in 0..20 {
        host.send(&ToGuest::Stdin {
            session,
            bytes: vec![0; CHUNK],
        });
    }
    assert_eq!(host.finish(session).end, Some(End::Signal(9)));
    assert_eq!(host.print("echo and it goes on"), "and it goes on\n");
}
