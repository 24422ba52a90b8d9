//! Commands with a terminal.

use stencil_agent::{End, Exec, ToGuest, ToHost, TtySize};

use crate::host::{Agent, Host, shell};

fn on_terminal(script: &str) -> Exec {
    Exec {
        tty: Some(TtySize {
            rows: 24,
            columns: 80,
        }),
        ..shell(script)
    }
}

/// Reads until the terminal has shown this.
fn await_text(host: &mut Host, text: &str) {
    let mut shown = String::new();
    while !shown.contains(text) {
        match host.next() {
            ToHost::Output { bytes, .. } => shown += &String::from_utf8_lossy(&bytes),
            ToHost::StdinCredit { .. } => {}
            other => panic!("{other:?} after {shown:?}"),
        }
    }
}

#[test]
fn a_terminal_is_one_and_controls_its_command() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let done = host.run(on_terminal("test -t 0 && test -t 1 && test -t 2 && echo $TERM && tty < /dev/tty > /dev/null; stty size; echo err >&2; exit 5"));
    assert_eq!((&*done.stdout, &*done.stderr), ("xterm\r\n24 80\r\nerr\r\n", ""));
    assert_eq!(done.end, Some(End::Code(5)));
}

#[test]
fn a_terminal_is_resized_and_its_command_is_told() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let (session, _) = host.begin(on_terminal(
        "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.1; done",
    ));
    await_text(&mut host, "ready");
    let size = TtySize {
        rows: 50,
        columns: 132,
    };
    host.send(&ToGuest::Resize { session, size });
    let done = host.finish(session);
    assert_eq!(done.stdout.trim_start(), "50 132\r\n");
}

#[test]
fn a_terminal_takes_input_and_its_end() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let (session, _) = host.begin(on_terminal("stty -echo; echo ready; cat"));
    await_text(&mut host, "ready\r\n");
    let bytes = b"typed\n".to_vec();
    host.send(&ToGuest::Stdin { session, bytes });
    host.send(&ToGuest::StdinClosed { session });
    let done = host.finish(session);
    assert_eq!((&*done.stdout, done.end), ("typed\r\n", Some(End::Code(0))));
}

#[test]
fn an_interrupt_from_the_terminal_reaches_the_command() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let (session, _) = host.begin(on_terminal("echo ready; exec sleep 1000"));
    await_text(&mut host, "ready");
    let bytes = vec![3];
    host.send(&ToGuest::Stdin { session, bytes });
    assert_eq!(host.finish(session).end, Some(End::Signal(2)));
}

#[test]
fn a_child_in_the_background_does_not_hold_the_terminal() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let done = host.run(on_terminal("trap '' HUP; sleep 5 & echo begun"));
    assert_eq!((&*done.stdout, done.end), ("begun\r\n", Some(End::Code(0))));
}
