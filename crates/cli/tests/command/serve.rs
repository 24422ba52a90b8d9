//! The server as a process: how it begins, how it ends, and why it would not begin.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use rustix::process::Signal;

use crate::stencil::{Server, command, done, place, place_vmms};

#[test]
fn each_signal_that_ends_it_ends_it_well() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let server = Server::start();
        server.create("web");
        let socket = server.socket();
        let (code, log, dir) = server.end(signal);
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("ended; VMs go on running"), "{log}");
        assert!(!socket.exists(), "its socket is gone");
        let server = Server::start_in(dir);
        assert!(
            server.run(&["ls"]).stdout.contains("web"),
            "the next server has what it had"
        );
    }
}

#[test]
fn a_server_that_was_killed_leaves_a_socket_that_the_next_one_takes() {
    let server = Server::start();
    let socket = server.socket();
    let (code, _, dir) = server.end(Signal::KILL);
    assert_eq!(code, None);
    assert!(socket.exists());
    let server = Server::start_in(dir);
    assert_eq!(server.run(&["ls"]).code, 0);
}

#[test]
fn a_server_whose_log_nobody_reads_goes_on_answering() {
    /// More lines than a pipe holds, which is 64 KiB (pipe(7)).
    const REQUESTS: usize = 2000;
    let server = Server::start();
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    let mut replies = BufReader::new(stream.try_clone().unwrap());
    for _ in 0..REQUESTS {
        stream
            .write_all(b"POST /instances/nobody/start HTTP/1.1\r\nhost: stencil\r\ncontent-length: 0\r\n\r\n")
            .unwrap();
        let (mut line, mut length) = (String::new(), 0);
        while line != "\r\n" {
            line.clear();
            replies.read_line(&mut line).unwrap();
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        replies.read_exact(&mut vec![0; length]).unwrap();
    }
    drop((stream, replies));
    let (code, log, _) = server.end(Signal::TERM);
    assert_eq!(code, Some(0));
    // Read at last, it is all there.
    assert_eq!(log.matches("answered status=404").count(), REQUESTS);
}

#[test]
fn a_second_server_on_the_same_data_is_refused_and_the_first_goes_on() {
    let server = Server::start();
    let second = done(command(server.dir.path()).args(["serve", "--data", "data", "--microvm", "microvm"]));
    assert_eq!(second.code, 1);
    assert!(
        second.stderr.contains("is in use by the server with pid "),
        "{}",
        second.stderr
    );
    assert!(
        second
            .stderr
            .contains("stop that server, or choose another directory"),
        "{}",
        second.stderr
    );
    assert_eq!(server.run(&["ls"]).code, 0);
}

#[test]
fn a_second_server_on_the_same_socket_is_refused_and_the_first_goes_on() {
    let server = Server::start();
    let mut second = command(server.dir.path());
    second
        .args(["serve", "--data", "other", "--microvm", "microvm", "--socket"])
        .arg(server.socket());
    let second = done(&mut second);
    assert_eq!(second.code, 1);
    assert!(
        second.stderr.contains("a server listens at "),
        "{}",
        second.stderr
    );
    assert_eq!(server.run(&["ls"]).code, 0);
}

#[test]
fn over_tcp_it_takes_a_token_which_it_makes_and_a_client_has_in_its_environment() {
    let dir = tempfile::tempdir().unwrap();
    place_vmms(dir.path());
    let server = Server::start_with(dir, |serve| {
        serve.args(["--listen", "127.0.0.1:0", "--token-file", "tokens"]);
    });
    let tokens = server.dir.path().join("tokens");
    let token = std::fs::read_to_string(&tokens).unwrap();
    let url = server.url();
    let ask = |token: Option<&str>, words: &[&str]| {
        let mut command = command(server.dir.path());
        command.args(words).env("STENCIL_URL", &url);
        if let Some(token) = token {
            command.env("STENCIL_TOKEN", token);
        }
        done(&mut command)
    };
    let token = token.trim_end();
    server.create("web");
    let listed = ask(Some(token), &["ls"]);
    assert!(listed.code == 0 && listed.stdout.contains("web"), "{listed:?}");
    for wrong in [None, Some("not-the-right-token")] {
        let refused = ask(wrong, &["ls"]);
        assert!(
            refused.code == 1
                && refused.stderr.contains("STENCIL_TOKEN")
                && refused.stderr.contains("[unauthorized]"),
            "{refused:?}"
        );
    }
    let (code, log, _dir) = server.end(Signal::TERM);
    assert_eq!(code, Some(0));
    assert!(!log.contains(token));
}

#[test]
fn it_does_not_listen_on_tcp_without_a_token_unless_that_is_spelled_out() {
    let dir = tempfile::tempdir().unwrap();
    place_vmms(dir.path());
    std::fs::write(dir.path().join("open"), "sixteen-letters!").unwrap();
    for (words, code, expected) in [
        (
            &["--listen", "127.0.0.1:0"][..],
            1,
            "takes tokens: name a file of them with --token-file, which is made if it is not there; or let every user of this host \
             do everything with --no-auth",
        ),
        (
            &["--listen", "0.0.0.0:0"],
            1,
            "0.0.0.0:0 takes tokens: name a file",
        ),
        (
            &["--listen", "0.0.0.0:0", "--no-auth"],
            1,
            "0.0.0.0:0 can be reached from other machines: it takes tokens; name a file of them with --token-file",
        ),
        (
            &["--listen", "127.0.0.1:0", "--token-file", "open"],
            1,
            "can be read by others (mode 0644); let only its owner read it: chmod 600 ",
        ),
        (&["--no-auth"], 2, "--listen <ADDR:PORT>"),
        (
            &["--listen", "127.0.0.1:0", "--no-auth", "--token-file", "open"],
            2,
            "cannot be used with",
        ),
    ] {
        let mut serve = command(dir.path());
        serve
            .args(["serve", "--data", "data", "--microvm", "microvm"])
            .args(words);
        let refused = done(&mut serve);
        assert_eq!(refused.code, code, "{words:?}: {refused:?}");
        assert!(refused.stderr.contains(expected), "{words:?}: {}", refused.stderr);
    }
    let server = Server::start_with(dir, |serve| {
        serve.env("STENCIL_LISTEN", "127.0.0.1:0").arg("--no-auth");
    });
    let mut ls = command(server.dir.path());
    assert_eq!(done(ls.args(["ls", "--url", &server.url()])).code, 0);
}

#[test]
fn each_option_can_be_given_by_the_environment() {
    let dir = tempfile::tempdir().unwrap();
    place_vmms(dir.path());
    let data = dir.path().join("elsewhere");
    let mut serve = command(dir.path());
    serve
        .arg("serve")
        .env("STENCIL_DATA", "elsewhere")
        .env("STENCIL_MICROVM", "microvm")
        .env("STENCIL_ARMED", "100000");
    let refused = done(&mut serve);
    assert!(
        refused.code == 1 && refused.stderr.contains("armed is 100000"),
        "{refused:?}"
    );
    serve.env("STENCIL_ARMED", "0").env("STENCIL_MICROVM", "nothing");
    assert!(
        done(&mut serve)
            .stderr
            .contains("nothing cannot be used as the VMM")
    );
    assert!(!data.exists());
}

#[test]
fn a_vmm_that_cannot_be_used_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("notes"), "").unwrap();
    for (microvm, expected) in [
        (
            "nothing",
            "nothing cannot be used as the VMM; name another one with --microvm",
        ),
        (
            "notes",
            "notes cannot be used as the VMM; name another one with --microvm",
        ),
        ("/bin/true", "--version does not tell a version"),
    ] {
        let mut serve = command(dir.path());
        serve.args(["serve", "--data", "data", "--microvm", microvm]);
        let done = done(&mut serve);
        assert_eq!(done.code, 1, "{microvm}: {done:?}");
        assert!(done.stderr.contains(expected), "{microvm}: {}", done.stderr);
    }
    assert!(!dir.path().join("data").exists(), "nothing was made");
}

/// A directory with a microVM and a Cloud Hypervisor that only tell their versions.
fn with_cloud_hypervisor(version: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    place_vmms(dir.path());
    place(
        dir.path(),
        "cloud-hypervisor",
        &format!("cloud-hypervisor {version}"),
    );
    dir
}

#[test]
fn a_cloud_hypervisor_that_is_named_must_be_one_that_can_be_used() {
    let dir = with_cloud_hypervisor("v50.0");
    for (named, expected) in [
        (
            "nothing",
            "nothing cannot be used as Cloud Hypervisor; name another one with --cloud-hypervisor, or leave that out",
        ),
        ("cloud-hypervisor", "is version 50.0; this takes version 51 to 53"),
        ("guest.elf", "cannot start the VMM"),
    ] {
        let mut serve = command(dir.path());
        serve.args([
            "serve",
            "--data",
            "data",
            "--microvm",
            "microvm",
            "--cloud-hypervisor",
            named,
        ]);
        let done = done(&mut serve);
        assert_eq!(done.code, 1, "{named}: {done:?}");
        assert!(done.stderr.contains(expected), "{named}: {}", done.stderr);
    }
    assert!(!dir.path().join("data").exists(), "nothing was made");
}

#[test]
fn cloud_hypervisor_is_offered_where_there_is_one() {
    let create = |server: &Server| {
        let kernel = server.dir.path().join("guest.elf");
        let asked = [
            "create",
            "--no-start",
            "--hypervisor",
            "cloud-hypervisor",
            "--kernel",
        ];
        server.run(&[&asked[..], &[kernel.to_str().unwrap()]].concat())
    };
    let named = Server::start_with(with_cloud_hypervisor("v53.0"), |serve| {
        serve.args(["--cloud-hypervisor", "cloud-hypervisor"]);
    });
    let path = |dir: &tempfile::TempDir| format!("{}:/usr/bin:/bin", dir.path().display());
    let in_path = with_cloud_hypervisor("v51.0");
    let path_to_it = path(&in_path);
    let in_path = Server::start_with(in_path, |serve| {
        serve.env("PATH", path_to_it);
    });
    for server in [named, in_path] {
        let created = create(&server);
        assert_eq!(created.code, 0, "{created:?}");
    }

    // Without one, and with one in PATH that nobody has asked for and that cannot be used, the server runs all the same.
    let unknown = with_cloud_hypervisor("v50.0");
    let path_to_it = path(&unknown);
    let unknown = Server::start_with(unknown, |serve| {
        serve.env("PATH", path_to_it);
    });
    for server in [Server::start(), unknown] {
        let refused = create(&server);
        let expected = "hypervisor `cloud-hypervisor` is not known here; this server has: microvm";
        assert_eq!(refused.code, 1, "{refused:?}");
        assert!(refused.stderr.contains(expected), "{refused:?}");
    }
}

#[test]
fn qemu_is_offered_where_there_is_one() {
    let start = |version: &str| {
        let dir = tempfile::tempdir().unwrap();
        place_vmms(dir.path());
        place(
            dir.path(),
            "qemu-system-x86_64",
            &format!("QEMU emulator version {version}"),
        );
        let path = format!("{}:/usr/bin:/bin", dir.path().display());
        Server::start_with(dir, |serve| {
            serve.env("PATH", path);
        })
    };
    let create = |server: &Server| {
        let kernel = server.dir.path().join("guest.elf");
        let asked = ["create", "--no-start", "--hypervisor", "qemu", "--kernel"];
        server.run(&[&asked[..], &[kernel.to_str().unwrap()]].concat())
    };
    let created = create(&start("7.2.22"));
    assert_eq!(created.code, 0, "{created:?}");
    let refused = create(&start("6.2.0"));
    let expected = "hypervisor `qemu` is not known here; this server has: microvm";
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains(expected), "{refused:?}");
}

#[test]
fn an_address_that_is_not_this_hosts_is_told() {
    let server = Server::start();
    let mut serve = command(server.dir.path());
    // Of the block for documentation (RFC 5737).
    serve.args([
        "serve",
        "--data",
        "other",
        "--microvm",
        "microvm",
        "--listen",
        "192.0.2.1:80",
        "--token-file",
        "tokens",
    ]);
    let done = done(&mut serve);
    assert_eq!(done.code, 1);
    assert!(
        done.stderr.contains("error: cannot listen on 192.0.2.1:80: "),
        "{}",
        done.stderr
    );
}
