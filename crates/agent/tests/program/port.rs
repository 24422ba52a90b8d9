//! A port: a character device, which is one stream whoever is at its other end. Here it is a terminal.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

use rustix::pty::OpenptFlags;
use rustix::termios::OptionalActions;
use stencil_agent::{Nonce, ToHost};

use crate::host::{Agent, Host, shell};

/// A terminal that changes no byte: its other side as a stream, and its path.
fn port() -> (UnixStream, PathBuf) {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    rustix::pty::grantpt(&master).unwrap();
    rustix::pty::unlockpt(&master).unwrap();
    let mut modes = rustix::termios::tcgetattr(&master).unwrap();
    modes.make_raw();
    rustix::termios::tcsetattr(&master, OptionalActions::Now, &modes).unwrap();
    let path = rustix::pty::ptsname(&master, Vec::new())
        .unwrap()
        .into_string()
        .unwrap();
    let (stream, other) = UnixStream::pair().unwrap();
    let (mut from, mut to) = (File::from(master), other.try_clone().unwrap());
    let (mut back_from, mut back_to) = (other, from.try_clone().unwrap());
    // They end with their streams.
    thread::spawn(move || io::copy(&mut from, &mut to));
    thread::spawn(move || io::copy(&mut back_from, &mut back_to));
    (stream, path.into())
}

#[test]
fn a_port_is_one_stream_for_all_hosts() {
    let (stream, path) = port();
    let options = ["--shared-kernel", "--port", path.to_str().unwrap()];
    let agent = Agent::start_in(tempfile::tempdir().unwrap(), &options, "true");
    let mut host = Host::new(stream.try_clone().unwrap());
    // It says that it is there before anybody asks.
    let frame = host.next_frame().unwrap();
    assert_eq!(frame.nonce, Nonce::NONE);
    assert!(matches!(frame.message, ToHost::Hello { epoch: None, .. }));
    assert!(matches!(host.hello(), ToHost::Hello { .. }));
    host.epoch(1);
    let (_, pid) = host.begin(shell("yes"));
    let mut next = Host::new(stream);
    assert!(matches!(next.hello(), ToHost::Hello { epoch: Some(_), .. }));
    next.print(&format!("while [ -e /proc/{pid} ]; do :; done"));
    drop(agent);
}
