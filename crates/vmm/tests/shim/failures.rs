//! The ways in which a call fails, each with an error that says which.

use std::error::Error;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use insta::assert_snapshot;
use stencil_vmm::{Call, Client, Hypervisor, MAX_REPLY_BYTES, VmmError};

use crate::directory::{Scratch, backend};
use crate::replayer::{Replayer, Reply};

/// The error of a boot that is answered so.
async fn boot_error(reply: Reply) -> VmmError {
    let scratch = Scratch::new();
    let replayer = Replayer::start(&scratch.dir, vec![reply]);
    let error = backend("sleeps").boot(&scratch.dir).await.unwrap_err();
    replayer.requests().await;
    error
}

fn reply(status: &str, body: &str) -> Reply {
    Reply::text(&format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    ))
}

// The clock is paused: it jumps to the deadline as soon as nothing else is left to do.
#[tokio::test(start_paused = true)]
async fn a_vmm_that_does_not_answer_is_a_timeout_that_names_the_call() {
    let error = boot_error(Reply::Silence).await;
    assert!(matches!(error, VmmError::Timeout { call: Call::Boot, after } if after == Call::Boot.deadline()));
    assert_snapshot!(error, @"vm.boot: no answer from the VMM within 120s");
}

#[tokio::test(start_paused = true)]
async fn info_waits_for_half_a_second_and_no_longer() {
    let scratch = Scratch::new();
    let replayer = Replayer::start(&scratch.dir, vec![Reply::Silence]);
    let error = backend("sleeps").info(&scratch.dir).await.unwrap_err();
    replayer.requests().await;
    assert!(
        matches!(error, VmmError::Timeout { call: Call::Info, after } if after == Duration::from_millis(500)),
        "{error:?}"
    );
}

#[tokio::test]
async fn without_a_socket_there_is_no_connection() {
    let scratch = Scratch::new();
    let error = backend("sleeps").boot(&scratch.dir).await.unwrap_err();
    assert!(
        matches!(error, VmmError::Connect { call: Call::Boot, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_socket_that_nobody_listens_on_refuses() {
    let scratch = Scratch::new();
    drop(UnixListener::bind(scratch.dir.vmm_socket()).unwrap());
    let error = backend("sleeps").boot(&scratch.dir).await.unwrap_err();
    assert!(matches!(error, VmmError::Connect { .. }), "{error:?}");
    let mut root: &dyn Error = &error;
    while let Some(source) = root.source() {
        root = source;
    }
    assert!(root.to_string().contains("Connection refused"), "{root}");
}

#[tokio::test]
async fn a_connection_closed_before_the_reply_is_no_reply() {
    let error = boot_error(Reply::text("")).await;
    assert!(
        matches!(error, VmmError::NoReply { call: Call::Boot, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn what_is_no_http_is_no_reply() {
    let error = boot_error(Reply::text("SSH-2.0-OpenSSH_9.2\r\n\r\n")).await;
    assert!(
        matches!(error, VmmError::NoReply { call: Call::Boot, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_connection_closed_in_the_body_is_a_reply_cut_short() {
    let error = boot_error(Reply::text(
        "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"config\":",
    ))
    .await;
    assert!(
        matches!(error, VmmError::CutShort { call: Call::Boot, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_reply_without_an_end_is_not_read_to_its_end() {
    let body = vec![b' '; MAX_REPLY_BYTES * 2];
    let error = boot_error(Reply::Bytes([&b"HTTP/1.1 200 OK\r\n\r\n"[..], &body].concat())).await;
    assert!(
        matches!(
            error,
            VmmError::TooLarge {
                call: Call::Boot,
                limit: MAX_REPLY_BYTES
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_refusal_tells_the_status_and_the_vmm_s_reasons() {
    let refusals = [
        "boot-no-vm",
        "create-twice",
        "pause-twice",
        "snapshot-while-running",
        "restore-missing-directory",
    ];
    let mut told = String::new();
    for refusal in refusals {
        let error = boot_error(Reply::Recorded(refusal)).await;
        told += &format!("{refusal}: {error}\n");
    }
    assert_snapshot!(told);
}

#[tokio::test]
async fn a_refusal_that_is_no_json_is_quoted() {
    let error = boot_error(reply("500 Internal Server Error", "thread 'api' panicked")).await;
    assert_snapshot!(error, @"vm.boot was refused with status 500: thread 'api' panicked");
}

#[tokio::test]
async fn a_refusal_without_a_word_says_so() {
    for body in ["", "[]"] {
        let error = boot_error(reply("503 Service Unavailable", body)).await;
        assert_eq!(
            error.to_string(),
            "vm.boot was refused with status 503: the VMM gave no reason"
        );
    }
}

#[tokio::test]
async fn a_reply_of_another_shape_is_told_from_a_broken_connection() {
    for body in ["", "null", "[1]", "{\"state\":\"Sleeping\",\"config\":{}}"] {
        let scratch = Scratch::new();
        let replayer = Replayer::start(&scratch.dir, vec![reply("200 OK", body)]);
        let error = backend("sleeps").info(&scratch.dir).await.unwrap_err();
        replayer.requests().await;
        assert!(
            matches!(error, VmmError::Protocol { call: Call::Info, .. }),
            "{body}: {error:?}"
        );
    }
}

#[test]
fn a_path_that_a_request_cannot_carry_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    let dir = stencil_core::InstanceDir::new(std::ffi::OsStr::from_bytes(b"/data/\xff"));
    assert!(matches!(Client::new(&dir), Err(VmmError::PathNotUtf8 { .. })));
}
