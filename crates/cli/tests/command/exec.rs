//! Commands in a guest and files in and out of it, by the real agent.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use futures_util::{SinkExt, StreamExt};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use serde_json::Value;
use stencil_api::client::{Client, CommandEvent};
use stencil_api::exec::{CommandEnd, MESSAGE_LIMIT, STDIN_WINDOW, StreamCommand, ToCommand};
use tokio::net::UnixStream;
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::hosted::Guests;
use crate::stencil::{Server, done};

fn with_input(mut command: Command, input: &[u8]) -> Output {
    let mut process = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = process.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A command may end without having read everything.
            let _ = stdin.write_all(input);
        });
        process.wait_with_output().unwrap()
    })
}

#[test]
fn a_command_has_this_programs_input_output_and_exit_code() {
    let guests = Guests::start();
    let run = guests.command(&["exec", "web", "--", "sh", "-c", "cat; echo problem >&2; exit 3"]);
    let output = with_input(run, b"one\ntwo\n");
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(output.stdout, b"one\ntwo\n");
    assert_eq!(output.stderr, b"problem\n");

    let words = [
        "exec",
        "web",
        "--cwd",
        "/usr",
        "-e",
        "GREETING=good day",
        "--",
        "sh",
        "-c",
        "pwd; echo $GREETING; hostname",
    ];
    let output = done(&mut guests.command(&words));
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (0, "/usr\ngood day\nweb\n")
    );
}

#[test]
fn a_command_needs_no_dashes_before_it_and_its_own_are_its_own() {
    let guests = Guests::start();
    for (words, expected) in [
        (&["exec", "web", "echo", "-n", "--json", "-e"][..], "--json -e"),
        (&["exec", "--cwd", "/usr", "web", "pwd"], "/usr\n"),
        (&["exec", "web", "--cwd", "/usr", "pwd"], "/usr\n"),
        (&["exec", "web", "-e", "A=b", "--", "sh", "-c", "echo $A"], "b\n"),
        (&["exec", "web", "--timeout", "48h", "echo", "long"], "long\n"),
    ] {
        let ran = done(&mut guests.command(words));
        assert_eq!(
            (ran.code, ran.stdout.as_str()),
            (0, expected),
            "{words:?}: {ran:?}"
        );
    }
}

#[test]
fn much_input_and_output_pass_whole() {
    let guests = Guests::start();
    let input: Vec<u8> = (0..5_000_000_u32)
        .map(|index| index.to_le_bytes()[index as usize % 3])
        .collect();
    let output = with_input(guests.command(&["exec", "web", "--", "cat"]), &input);
    assert!(
        output.status.success(),
        "{:?}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.stdout == input, "{} bytes came back", output.stdout.len());
}

#[test]
fn a_signal_does_not_wait_behind_input_that_nobody_reads() {
    let guests = Guests::start();
    let command = StreamCommand {
        cmd: vec!["sleep".to_owned(), "1000".to_owned()],
        stdin: true,
        ..StreamCommand::default()
    };
    guests.block_on(async {
        let client = Client::new(guests.socket());
        let (input, mut output) = client.exec_stream("web", &command).await.unwrap();
        let much = vec![0; 10 << 20];
        // The server and the guest each take a window of it at most, and the rest waits.
        let (taken, waits) = much.split_at(STDIN_WINDOW as usize * 3 / 2);
        let said = async {
            input.write(taken).await.unwrap();
            tokio::join!(input.write(waits), input.tell(ToCommand::Signal(15)))
        };
        let (end, (written, told)) = tokio::join!(output.next(), said);
        assert!(
            matches!(end, Ok(CommandEvent::Exited(CommandEnd { signal: Some(15), .. }))),
            "{end:?}"
        );
        told.unwrap();
        assert!(written.is_err());
    });
}

#[test]
fn a_client_that_minds_no_credit_has_its_input_passed_on_whole() {
    let guests = Guests::start();
    // 48 messages, each of the most bytes: one that says that it is input, and then the input.
    let message = vec![0; MESSAGE_LIMIT];
    let bytes = 48 * (MESSAGE_LIMIT - 1);
    let script = format!("test $(wc -c) = {bytes}");
    let mut said = vec![Message::text(
        serde_json::json!({ "cmd": ["sh", "-c", script], "stdin": true }).to_string(),
    )];
    said.extend((0..48).map(|_| Message::binary(message.clone())));
    said.push(Message::text(r#""stdin_closed""#));
    let last = guests.block_on(last_word(&guests.socket(), &said));
    assert_eq!(last["exited"]["exit_code"], 0, "{last}");
}

#[test]
fn ends_have_the_exit_codes_of_a_shell() {
    let guests = Guests::start();
    for (words, code, stderr) in [
        (
            &["exec", "web", "--", "no-such-program"][..],
            127,
            "[not_executed]",
        ),
        (&["exec", "web", "--", "/etc"], 126, "[not_executed]"),
        (
            &["exec", "web", "--cwd", "/none", "--", "true"],
            1,
            "[not_executed]",
        ),
        (&["exec", "web", "--", "sh", "-c", "kill -TERM $$"], 143, ""),
        (
            &["exec", "web", "--timeout", "50ms", "--", "sleep", "1000"],
            124,
            "",
        ),
        (&["exec", "nobody", "--", "true"], 1, "[not_found]"),
    ] {
        let output = done(&mut guests.command(words));
        assert_eq!(output.code, code, "{words:?}: {output:?}");
        assert!(output.stderr.contains(stderr), "{words:?}: {output:?}");
    }
    // Also as one result.
    let output = done(&mut guests.command(&[
        "--json",
        "exec",
        "web",
        "--",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 4",
    ]));
    let result = output.json();
    assert_eq!(
        (
            output.code,
            &result["exit_code"],
            &result["stdout"],
            &result["stderr"]
        ),
        (4, &4.into(), &"out\n".into(), &"err\n".into())
    );
    assert!(result["timings"]["guest_us"].as_u64() <= result["timings"]["total_us"].as_u64());
    let late = done(&mut guests.command(&[
        "--json",
        "exec",
        "web",
        "--timeout",
        "50ms",
        "--",
        "sleep",
        "1000",
    ]));
    assert_eq!(
        (late.code, &late.json()["timed_out"], &late.json()["signal"]),
        (124, &true.into(), &9.into())
    );
    let binary = done(&mut guests.command(&["--json", "exec", "web", "--", "printf", r"a\377"]));
    assert_eq!(binary.json()["stdout_base64"], "Yf8=");
}

#[test]
fn a_client_that_is_killed_takes_its_command_along() {
    let guests = Guests::start();
    let mut client = guests
        .command(&["exec", "web", "--", "sh", "-c", "echo $$; exec sleep 1000"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(client.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    // The guest's processes are this host's.
    let pid = Pid::from_raw(line.trim().parse().unwrap()).unwrap();
    let command = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    client.kill().unwrap();
    client.wait().unwrap();
    let patience = rustix::time::Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    let ended = poll(&mut [PollFd::new(&command, PollFlags::IN)], Some(&patience)).unwrap();
    assert_eq!(ended, 1, "the command goes on");
}

#[test]
fn a_command_can_have_a_terminal_and_this_one_is_as_it_was_afterwards() {
    let guests = Guests::start();
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let own: OwnedFd = ioctl_tiocgptpeer(&terminal, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    let size = Winsize {
        ws_row: 31,
        ws_col: 97,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&terminal, size).unwrap();
    let before = tcgetattr(&own).unwrap();
    let mut client = guests
        .command(&[
            "exec",
            "-it",
            "web",
            "--",
            "sh",
            "-c",
            "stty size; read line; echo \"got $line\"; exit 5",
        ])
        .env("TERM", "dumb")
        .stdin(own.try_clone().unwrap())
        .stdout(own.try_clone().unwrap())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut terminal = fs::File::from(terminal);
    let mut seen = String::new();
    let mut read_until = |terminal: &mut fs::File, text: &str| {
        while !seen.contains(text) {
            let mut bytes = [0; 1000];
            let read = terminal.read(&mut bytes).unwrap();
            seen.push_str(std::str::from_utf8(&bytes[..read]).unwrap());
        }
    };
    read_until(&mut terminal, "31 97\r\n");
    // What is typed goes to the command, and comes back by its own terminal.
    terminal.write_all(b"this\r").unwrap();
    read_until(&mut terminal, "got this\r\n");
    assert_eq!(client.wait().unwrap().code(), Some(5));
    let after = tcgetattr(&own).unwrap();
    assert_eq!(
        (after.local_modes, after.input_modes, after.output_modes),
        (before.local_modes, before.input_modes, before.output_modes)
    );
}

/// What the server says last to a client that says these things on the WebSocket.
async fn last_word(socket: &Path, said: &[Message]) -> Value {
    let stream = UnixStream::connect(socket).await.unwrap();
    let (mut socket, _) = client_async("ws://stencil/instances/web/exec", stream)
        .await
        .unwrap();
    for message in said {
        socket.send(message.clone()).await.unwrap();
    }
    let mut last = Value::Null;
    // It ends by itself.
    while let Some(Ok(message)) = socket.next().await {
        if let Message::Text(text) = message {
            last = serde_json::from_str(&text).unwrap();
        }
    }
    last
}

#[test]
fn a_web_page_cannot_run_commands() {
    let guests = Guests::start();
    let refused = guests.block_on(async {
        let stream = UnixStream::connect(guests.socket()).await.unwrap();
        let mut request = "ws://stencil/instances/web/exec".into_client_request().unwrap();
        let origin = HeaderValue::from_static("https://example.org");
        request.headers_mut().insert("origin", origin);
        client_async(request, stream).await.unwrap_err()
    });
    let Error::Http(reply) = refused else {
        panic!("{refused}")
    };
    assert_eq!(reply.status(), 403);
    let body = String::from_utf8(reply.into_body().unwrap_or_default()).unwrap();
    assert!(body.contains("comes from a web page that may not ask"), "{body}");
}

#[test]
fn messages_that_are_not_understood_end_the_conversation_and_say_why() {
    let guests = Guests::start();
    let socket = guests.socket();
    let cat = || Message::text(r#"{"cmd": ["cat"], "stdin": true}"#);
    for (said, expected) in [
        (vec![Message::binary(vec![0, 1])], "the first message is binary"),
        (vec![Message::text("cat")], "the message is not as expected"),
        (
            vec![Message::text(r#"{"cmd": ["cat"], "tyt": null}"#)],
            "unknown field `tyt`",
        ),
        (vec![Message::text(r#"{"cmd": []}"#)], "cmd is empty"),
        (
            vec![cat(), Message::binary(vec![1, 1])],
            "a binary message begins with 0",
        ),
        (vec![cat(), Message::text(r#""kill""#)], "unknown variant `kill`"),
    ] {
        let last = guests.block_on(last_word(&socket, &said));
        let error = &last["error"];
        assert_eq!(
            (&error["status"], &error["code"]),
            (&400.into(), &"invalid_request".into()),
            "{said:?}: {last}"
        );
        assert!(
            error["message"].as_str().unwrap().contains(expected),
            "{said:?}: {last}"
        );
    }
    let said = [
        cat(),
        Message::binary(b"\0fine".to_vec()),
        Message::text(r#""stdin_closed""#),
    ];
    assert_eq!(
        guests.block_on(last_word(&socket, &said))["exited"]["exit_code"],
        0
    );
}

#[test]
fn forks_run_a_command_and_are_deleted_in_one_call() {
    let guests = Guests::start();
    // Of one that was never started: these guests' processes cannot be stopped for a snapshot.
    let create = [
        "create",
        "cold",
        "--hypervisor",
        "hosted",
        "--kernel",
        "guest.elf",
        "--ready-agent",
        "--no-start",
    ];
    let created = done(&mut guests.command(&create));
    assert_eq!(created.code, 0, "{created:?}");
    let output = done(&mut guests.command(&[
        "fork",
        "cold",
        "-n",
        "3",
        "--rm",
        "--",
        "sh",
        "-c",
        "hostname; cat /etc/machine-id",
    ]));
    assert_eq!(output.code, 0, "{output:?}");
    let mut lines: Vec<&str> = output.stdout.lines().collect();
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), 6, "each has its own name and machine id: {lines:?}");
    for name in ["cold-1", "cold-2", "cold-3"] {
        assert!(lines.contains(&format!("{name} | {name}").as_str()), "{lines:?}");
    }
    let list = done(&mut guests.command(&["ls", "--json"])).json();
    assert_eq!(list["instances"].as_array().unwrap().len(), 2, "{list}");

    let output = done(&mut guests.command(&[
        "fork",
        "cold",
        "-n",
        "2",
        "--rm",
        "--",
        "sh",
        "-c",
        "test $(hostname) = cold-1",
    ]));
    assert_eq!(
        (output.code, output.stderr.as_str()),
        (1, "cold-2 | (exit code 1)\nerror: 1 of 2 failed\n")
    );
    let words = [
        "fork",
        "cold",
        "--rm",
        "-e",
        "CODE=7",
        "--cwd",
        "/usr",
        "--",
        "sh",
        "-c",
        "pwd; exit $CODE",
    ];
    let output = done(&mut guests.command(&words));
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (7, "cold-1 | /usr\n"),
        "{output:?}"
    );
    let output = done(&mut guests.command(&["fork", "cold", "--json", "--", "hostname"]));
    let fork: &Value = &output.json()["forks"][0];
    assert_eq!(
        (&fork["exec"]["result"]["stdout"], &fork["deleted"]),
        (&"cold-1\n".into(), &Value::Null)
    );
    assert_eq!(
        done(&mut guests.command(&["exec", "cold-1", "--", "hostname"])).stdout,
        "cold-1\n"
    );
}

#[test]
fn files_and_directories_are_copied_in_and_out() {
    let guests = Guests::start();
    let here = guests.dir.path();
    let guest = here.join("in-guest");
    fs::create_dir_all(here.join("tree/a")).unwrap();
    fs::create_dir(&guest).unwrap();
    fs::write(here.join("tree/a/data"), vec![7; 3_000_000]).unwrap();
    fs::write(here.join("tree/run"), "#!/bin/sh\n").unwrap();
    let there = format!("web:{}", guest.display());
    let cp = |from: &str, to: &str| done(&mut guests.command(&["cp", from, to]));

    // Below a directory that is there, under a name that is not, and back in both ways.
    for (from, to) in [("tree", there.clone()), ("tree/run", format!("{there}/other"))] {
        let copied = cp(from, &to);
        assert_eq!((copied.code, copied.stderr.as_str()), (0, ""), "{from} {to}");
    }
    assert_eq!(fs::read(guest.join("tree/a/data")).unwrap(), vec![7; 3_000_000]);
    assert_eq!(fs::read(guest.join("other")).unwrap(), b"#!/bin/sh\n");
    fs::create_dir(here.join("back")).unwrap();
    for (from, to) in [
        ("tree", "back"),
        ("tree", "back/renamed"),
        ("other", "back/run"),
        ("other", "back"),
    ] {
        let copied = cp(&format!("{there}/{from}"), to);
        assert_eq!((copied.code, copied.stderr.as_str()), (0, ""), "{from} {to}");
    }
    for tree in ["tree", "renamed"] {
        assert_eq!(
            fs::read(here.join("back").join(tree).join("a/data")).unwrap(),
            vec![7; 3_000_000]
        );
    }
    assert_eq!(
        fs::read(here.join("back/run")).unwrap(),
        fs::read(here.join("back/other")).unwrap()
    );

    // What does not work says why, and leaves nothing.
    for (from, to, why) in [
        ("none", there.clone(), "No such file"),
        ("tree", format!("{there}/none/where"), "no directory"),
        ("tree", there.clone(), "is there already"),
        ("tree", "back".to_owned(), "one side of a copy is here"),
    ] {
        let failed = cp(from, &to);
        assert!(
            failed.code == 1 && failed.stderr.contains(why),
            "{from} {to}: {failed:?}"
        );
    }
    for (from, to, why) in [
        ("none", "back/none", "could not read"),
        ("tree", "back", "is there already"),
        ("tree/..", "back", "has no name to be copied under"),
    ] {
        let failed = cp(&format!("{there}/{from}"), to);
        assert!(
            failed.code == 1 && failed.stderr.contains(why),
            "{from} {to}: {failed:?}"
        );
    }
    assert_eq!(fs::read_dir(here.join("back")).unwrap().count(), 4);
    assert_eq!(fs::read_dir(&guest).unwrap().count(), 2);
}

#[test]
fn a_copy_that_is_interrupted_leaves_nothing_on_either_side() {
    let guests = Guests::start();
    let (here, guest) = (guests.dir.path().join("here"), guests.dir.path().join("in-guest"));
    for dir in [&here, &guest] {
        fs::create_dir(dir).unwrap();
    }
    // More than anybody copies while a signal is on its way.
    let endless = guests.dir.path().join("endless");
    fs::File::create(&endless).unwrap().set_len(1 << 40).unwrap();
    let (endless, there) = (endless.display().to_string(), format!("web:{}", guest.display()));
    for (from, to, place) in [
        (format!("web:{endless}"), here.display().to_string(), &here),
        (endless, there, &guest),
    ] {
        for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
            let mut copy = guests.command(&["cp", &from, &to]).spawn().unwrap();
            while fs::read_dir(place).unwrap().next().is_none() {
                assert!(copy.try_wait().unwrap().is_none(), "it ended by itself");
                std::thread::yield_now();
            }
            kill_process(Pid::from_child(&copy), signal).unwrap();
            assert_eq!(copy.wait().unwrap().code(), Some(code), "{from} {to}");
            assert_eq!(fs::read_dir(place).unwrap().count(), 0, "{from} {to}");
        }
    }
}

#[test]
fn what_is_not_copied_is_named() {
    let guests = Guests::start();
    let here = guests.dir.path();
    let tree = here.join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "x").unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        tree.join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let copy = |from: &str, to: &str| done(&mut guests.command(&["cp", from, to]));
    let inside = here.join("in");
    let copied = copy("tree", &format!("web:{}", inside.display()));
    assert_eq!(
        (copied.code, copied.stderr.as_str()),
        (0, "left out tree/pipe: it is a pipe\n")
    );
    assert_eq!(fs::read_dir(&inside).unwrap().count(), 1);
    let copied = copy(&format!("web:{}", tree.display()), "out");
    assert_eq!(copied.code, 0);
    assert!(
        copied.stderr.ends_with("/tree/pipe: it is a pipe\n"),
        "{copied:?}"
    );
    let partial = copy("web:/proc/1/attr", "attr");
    assert_eq!(partial.code, 1);
    assert!(
        partial.stderr.contains("/current: could not read it")
            && partial.stderr.contains("not all was copied"),
        "{partial:?}"
    );
    assert!(here.join("attr").is_dir());
}

#[test]
fn without_an_agent_it_is_said_what_would_be_right() {
    let server = Server::start();
    server.create("web");
    for words in [
        &["exec", "web", "--", "true"][..],
        &["--json", "exec", "web", "--", "true"],
        &["cp", "web:/etc", "."],
    ] {
        let refused = server.run(words);
        assert_eq!(refused.code, 1);
        assert!(
            refused.stderr.contains("gives its guests no port for one")
                && refused.stderr.contains("[no_agent]"),
            "{refused:?}"
        );
    }
}
