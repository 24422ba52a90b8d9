//! Messages of every kind: fixed ones, and arbitrary ones for properties.

use std::num::NonZeroU64;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use stencil_agent::{
    CHUNK, End, Entropy, Epoch, EpochId, Exec, ExecError, Nonce, Output, SessionId, ToGuest, ToHost, TtySize,
};

pub(crate) fn nonce() -> Nonce {
    Nonce::new(NonZeroU64::new(0x1122_3344_5566_7788).unwrap())
}

fn epoch_id() -> EpochId {
    EpochId(*b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff")
}

pub(crate) fn to_guest() -> Vec<ToGuest> {
    let session = SessionId(300);
    vec![
        ToGuest::Hello,
        ToGuest::Epoch(Epoch {
            id: epoch_id(),
            entropy: Entropy([0xa5; 64]),
            wall_clock: Duration::new(1_790_000_000, 123_456_789),
            host_name: "warm-1".to_owned(),
            machine_id: [0x5a; 16],
        }),
        ToGuest::Freeze,
        ToGuest::Exec {
            session,
            exec: Exec {
                argv: vec!["sh".to_owned(), "-c".to_owned(), "id".to_owned()],
                env: vec![("A".to_owned(), "b".to_owned())],
                cwd: Some("/tmp".to_owned()),
                tty: Some(TtySize {
                    rows: 24,
                    columns: 80,
                }),
                timeout: Some(Duration::from_millis(1500)),
                stdin: true,
            },
        },
        ToGuest::Exec {
            session,
            exec: Exec {
                argv: vec!["true".to_owned()],
                ..Exec::default()
            },
        },
        ToGuest::Stdin {
            session,
            bytes: vec![0, 1, 2],
        },
        ToGuest::StdinClosed { session },
        ToGuest::Credit {
            session,
            stream: Output::Stderr,
            bytes: 65536,
        },
        ToGuest::Resize {
            session,
            size: TtySize {
                rows: 50,
                columns: 132,
            },
        },
        ToGuest::Signal { session, signal: 15 },
        ToGuest::PowerOff,
    ]
}

pub(crate) fn to_host() -> Vec<ToHost> {
    let session = SessionId(300);
    let why = "no".to_owned();
    vec![
        ToHost::Hello {
            epoch: None,
            frozen: false,
        },
        ToHost::Hello {
            epoch: Some(epoch_id()),
            frozen: true,
        },
        ToHost::EpochTaken { id: epoch_id() },
        ToHost::EpochFailed {
            id: epoch_id(),
            why: why.clone(),
        },
        ToHost::Frozen,
        ToHost::FreezeFailed { why: why.clone() },
        ToHost::Started { session, pid: 42 },
        ToHost::ExecFailed {
            session,
            error: ExecError::NoEpoch,
            why,
        },
        ToHost::Output {
            session,
            stream: Output::Stdout,
            bytes: vec![0, 0, 1],
        },
        ToHost::StdinCredit {
            session,
            bytes: 65536,
        },
        ToHost::Exited {
            session,
            end: End::Code(3),
            timed_out: false,
            took: Duration::from_micros(1500),
        },
        ToHost::Exited {
            session,
            end: End::Signal(9),
            timed_out: true,
            took: Duration::from_secs(2),
        },
    ]
}

fn stdin((session, bytes): (u32, Vec<u8>)) -> ToGuest {
    let session = SessionId(session);
    ToGuest::Stdin { session, bytes }
}

/// Messages of all sizes that may be in a frame.
pub(crate) fn any_to_guest() -> impl Strategy<Value = ToGuest> {
    prop_oneof![
        proptest::sample::select(to_guest()),
        (any::<u32>(), vec(any::<u8>(), 0..300)).prop_map(stdin),
        // COBS counts in blocks of 254 bytes without zeros; long ones of one byte are quickly made.
        (any::<u32>(), any::<u8>(), 0..=CHUNK)
            .prop_map(|(session, byte, length)| stdin((session, vec![byte; length]))),
        (
            vec(".*", 1..8),
            vec((".*", ".*"), 0..8),
            any::<Option<Duration>>()
        )
            .prop_map(|(argv, env, timeout)| {
                ToGuest::Exec {
                    session: SessionId(1),
                    exec: Exec {
                        argv,
                        env,
                        timeout,
                        ..Exec::default()
                    },
                }
            }),
    ]
}
