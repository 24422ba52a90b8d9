//! HTTP as the fake speaks it: as much as its one client needs.

use std::fmt::Write as _;
use std::io::Read;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

/// A reply as it goes over the wire.
pub(super) type Reply = Vec<u8>;

/// The last part of the path and the body; nothing at the end of the connection.
pub(super) fn read_request(connection: &mut UnixStream) -> Option<(String, String)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        connection.read_exact(&mut byte).ok()?;
        head.extend(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let call = head.split(' ').nth(1)?.strip_prefix("/api/v1/")?.to_owned();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    connection.read_exact(&mut body).ok()?;
    Some((call, String::from_utf8(body).unwrap()))
}

pub(super) fn error(why: &str) -> Reply {
    reply(500, &json!(["Error from API", "The VM could not do it", why]))
}

pub(super) fn reply(status: u16, body: &Value) -> Reply {
    let body = body.to_string();
    let mut reply =
        format!("HTTP/1.1 {status} \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n");
    write!(
        reply,
        "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    reply.into_bytes()
}
