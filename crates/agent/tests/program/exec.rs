//! Commands: what they get, what they give, how they end.

use std::time::Duration;

use stencil_agent::{End, Exec, ExecError, MAX_SESSIONS, ToGuest, ToHost};

use crate::host::{Agent, shell};

#[test]
fn a_command_has_its_arguments_streams_and_code() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let done = host.run(shell("echo out; echo err >&2; cat; exit 7"));
    assert_eq!((&*done.stdout, &*done.stderr), ("out\n", "err\n"));
    assert_eq!((done.end, done.timed_out), (Some(End::Code(7)), false));
    assert!(done.took > Duration::ZERO);
}

#[test]
fn a_command_has_its_environment_and_directory_and_nothing_of_the_agents() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let done = host.run(Exec {
        env: vec![
            ("A".to_owned(), "b c".to_owned()),
            ("HOME".to_owned(), "/nowhere".to_owned()),
        ],
        cwd: Some("/proc".to_owned()),
        ..shell("env | grep -v -e ^_= -e ^PWD= -e ^SHLVL= -e ^OLDPWD= | sort; pwd")
    });
    assert_eq!(
        done.stdout,
        "A=b c\nHOME=/nowhere\nPATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n/proc\n"
    );
    // Its three streams, and the directory that it reads.
    assert_eq!(host.print("ls /proc/self/fd"), "0\n1\n2\n3\n");
}

#[test]
fn a_program_is_found_in_the_commands_own_path_and_keeps_the_name_that_it_was_called_by() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let dir = agent.dir.path();
    host.print(&format!(
        "mkdir {0}/a {0}/b; echo echo a > {0}/a/program; echo 'echo b' > {0}/b/program; chmod +x {0}/b/program",
        dir.display()
    ));
    let exec = |path: String, argv: &[&str]| Exec {
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        env: vec![("PATH".to_owned(), path)],
        cwd: Some(format!("{}/b", dir.display())),
        ..Exec::default()
    };
    let path = format!("{0}/none:{0}/a:{0}/b:/usr/bin:/bin", dir.display());
    assert_eq!(host.run(exec(path.clone(), &["program"])).stdout, "b\n");
    assert_eq!(host.run(exec(path, &["sh", "-c", "echo $0"])).stdout, "sh\n");
    // The directory that it works in, as execvp(3) has it.
    let path = format!(":{}/a", dir.display());
    assert_eq!(host.run(exec(path, &["program"])).stdout, "b\n");
}

#[test]
fn a_signal_ends_the_process_group() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let (session, _) = host.begin(shell("sleep 1000 & echo ready; wait"));
    assert!(matches!(host.next(), ToHost::Output { .. }));
    host.send(&ToGuest::Signal { session, signal: 15 });
    assert_eq!(host.finish(session).end, Some(End::Signal(15)));
}

#[test]
fn what_cannot_be_run_is_told_by_kind() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let exec = |program: &str| Exec {
        argv: vec![program.to_owned()],
        ..Exec::default()
    };
    let refusals = [
        (exec("no-such-program"), ExecError::NotFound),
        (exec("/proc/self/status"), ExecError::NotExecutable),
        (exec("a\0b"), ExecError::BadRequest),
        (Exec::default(), ExecError::BadRequest),
        (
            Exec {
                env: vec![("A=B".to_owned(), String::new())],
                ..exec("true")
            },
            ExecError::BadRequest,
        ),
        (
            Exec {
                cwd: Some("/no/such/directory".to_owned()),
                ..exec("true")
            },
            ExecError::BadDirectory,
        ),
        // As long as a request can be: what is told of it is shorter.
        (
            Exec {
                cwd: Some("\u{1}".repeat(60_000)),
                ..exec("true")
            },
            ExecError::BadDirectory,
        ),
        (exec(&"\u{1}".repeat(60_000)), ExecError::Failed),
    ];
    for (exec, error) in refusals {
        let refused = host.refused(exec);
        assert_eq!(refused.0, error, "{}", refused.1);
        assert!((1..=1000).contains(&refused.1.len()));
    }
    assert_eq!(host.print("echo and it goes on"), "and it goes on\n");
}

#[test]
fn a_command_whose_time_is_over_is_killed() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let done = host.run(Exec {
        timeout: Some(Duration::from_millis(200)),
        ..shell("trap '' TERM; echo begun; while :; do sleep 1000; done")
    });
    assert_eq!((done.end, done.timed_out), (Some(End::Signal(9)), true));
    assert_eq!(done.stdout, "begun\n");
    let done = host.run(Exec {
        timeout: Some(Duration::MAX),
        ..shell("exit 3")
    });
    assert_eq!((done.end, done.timed_out), (Some(End::Code(3)), false));
}

#[test]
fn a_child_in_the_background_outlives_its_session_and_does_not_hold_it() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let fifo = agent.dir.path().join("fifo");
    let said = agent.dir.path().join("said");
    let (fifo, said) = (fifo.display(), said.display());
    // It has the session's output open until it reads something.
    let done = host.run(shell(&format!(
        "mkfifo {fifo}; (read line < {fifo}; echo $line > {said}.new; mv {said}.new {said}) & echo begun"
    )));
    assert_eq!((&*done.stdout, done.end), ("begun\n", Some(End::Code(0))));
    host.print(&format!("echo still here > {fifo}"));
    assert_eq!(
        host.print(&format!("until [ -e {said} ]; do :; done; cat {said}")),
        "still here\n"
    );
}

#[test]
fn all_output_of_a_command_that_ended_arrives() {
    let agent = Agent::start();
    let mut host = agent.enter();
    for _ in 0..50 {
        let done = host.run(shell("head -c 60000 /dev/zero | tr '\\0' x; echo end >&2"));
        assert_eq!((done.stdout.len(), &*done.stderr), (60000, "end\n"));
    }
}

#[test]
fn sessions_are_limited_and_independent() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let cat = Exec {
        argv: vec!["cat".to_owned()],
        stdin: true,
        ..Exec::default()
    };
    let sessions: Vec<_> = (0..MAX_SESSIONS).map(|_| host.begin(cat.clone()).0).collect();
    assert_eq!(host.refused(cat.clone()).0, ExecError::TooManySessions);
    for session in &sessions[1..] {
        host.send(&ToGuest::StdinClosed { session: *session });
        assert_eq!(host.finish(*session).end, Some(End::Code(0)));
    }
    host.send(&ToGuest::Exec {
        session: sessions[0],
        exec: cat,
    });
    assert!(matches!(
        host.next(),
        ToHost::ExecFailed {
            error: ExecError::BadRequest,
            ..
        }
    ));
    host.send(&ToGuest::Stdin {
        session: sessions[0],
        bytes: b"as before".to_vec(),
    });
    host.send(&ToGuest::StdinClosed { session: sessions[0] });
    assert_eq!(host.finish(sessions[0]).stdout, "as before");
}
