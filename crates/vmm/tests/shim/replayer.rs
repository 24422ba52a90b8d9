//! A server on a Unix socket that answers each connection with a recorded reply, and tells what it was sent.

use std::fmt;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use stencil_core::InstanceDir;

use crate::directory::fixture;

/// What a connection is answered.
pub(crate) enum Reply {
    /// The reply in `fixtures/replies` with this name.
    Recorded(&'static str),
    /// These bytes; then the connection is closed.
    Bytes(Vec<u8>),
    /// Nothing, for as long as the client waits.
    Silence,
}

impl Reply {
    pub(crate) fn text(text: &str) -> Self {
        Self::Bytes(text.as_bytes().to_vec())
    }
}

/// A request as it came over the socket. `Host`, which is the socket's path in another form, is left out.
pub(crate) struct Request {
    line: String,
    headers: Vec<String>,
    body: String,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.line)?;
        for header in &self.headers {
            writeln!(f, "{header}")?;
        }
        write!(f, "\n{}", self.body)
    }
}

/// A running server. It takes one connection for each reply, and then ends.
pub(crate) struct Replayer(JoinHandle<Vec<Request>>);

impl Replayer {
    pub(crate) fn start(dir: &InstanceDir, replies: Vec<Reply>) -> Self {
        let listener = UnixListener::bind(dir.vmm_socket()).unwrap();
        Self(std::thread::spawn(move || {
            replies
                .into_iter()
                .map(|reply| answer(listener.accept().unwrap().0, reply))
                .collect()
        }))
    }

    /// The requests, one for each connection, when all replies are given and all connections are closed.
    pub(crate) async fn requests(self) -> Vec<Request> {
        // Not joined here: the client closes its connections by a task of this thread's runtime.
        tokio::task::spawn_blocking(|| self.0.join().unwrap())
            .await
            .unwrap()
    }
}

fn answer(mut stream: UnixStream, reply: Reply) -> Request {
    let request = read_request(&mut stream);
    match reply {
        Reply::Recorded(name) => stream.write_all(&recorded(name)).unwrap(),
        // The client may have hung up before it took all of them.
        Reply::Bytes(bytes) => {
            let _ = stream.write_all(&bytes);
            return request;
        }
        Reply::Silence => {}
    }
    // The client closes the connection, although the reply says keep-alive, and sends nothing more on it.
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty(), "a second request on the same connection");
    request
}

fn read_request(stream: &mut UnixStream) -> Request {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.extend(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines().filter(|line| !line.is_empty()).map(str::to_owned);
    let line = lines.next().unwrap();
    let headers: Vec<_> = lines.filter(|line| !line.starts_with("host:")).collect();
    let length = headers
        .iter()
        .find_map(|header| header.strip_prefix("content-length: "))
        .map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    Request {
        line,
        headers,
        body: String::from_utf8(body).unwrap(),
    }
}

/// The files have plain line ends; on the wire the head has `\r\n`.
pub(crate) fn recorded(name: &str) -> Vec<u8> {
    let path = fixture("replies").join(format!("{name}.http"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (head, body) = text.split_once("\n\n").unwrap();
    format!("{}\r\n\r\n{body}", head.replace('\n', "\r\n")).into_bytes()
}
