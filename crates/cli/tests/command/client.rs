//! The commands of a client: tables for people, JSON for programs, an exit code for scripts.

use std::io::Write;
use std::process::Stdio;

use serde_json::json;

use crate::stencil::{Server, done};

#[test]
fn an_instance_is_made_listed_shown_and_deleted() {
    let server = Server::start();
    let words = [
        "create",
        "web",
        "--kernel",
        "guest.elf",
        "--memory",
        "64MiB",
        "--label",
        "team=db",
        "--no-start",
    ];
    let created = server.run(&words);
    assert_eq!(created.code, 0, "{created:?}");
    assert!(created.stdout.starts_with("web is Stopped"), "{}", created.stdout);

    let listed = server.run(&["ls"]);
    let (header, line) = listed.stdout.split_once('\n').unwrap();
    assert!(header.starts_with("NAME  ID "), "{header}");
    assert!(
        line.starts_with("web   ") && line.contains("  Stopped  ") && line.contains("64 MiB"),
        "{line}"
    );
    assert_eq!(server.run(&["ls", "--state", "running"]).stdout, "no instances\n");

    let shown = server.run(&["show", "web"]);
    let kernel = server.dir.path().join("guest.elf");
    assert!(
        shown.stdout.contains(kernel.to_str().unwrap()),
        "made absolute: {}",
        shown.stdout
    );
    assert!(shown.stdout.contains("team=db"), "{}", shown.stdout);

    let deleted = server.run(&["rm", "web"]);
    assert_eq!((deleted.code, deleted.stdout.as_str()), (0, "web is deleted\n"));
    assert_eq!(server.run(&["ls"]).stdout, "no instances\n");
}

#[test]
fn an_image_is_added_used_and_removed_when_nobody_uses_it_any_more() {
    let server = Server::start();
    let added = server.run(&[
        "image",
        "add",
        "debian",
        "--kernel",
        "guest.elf",
        "--cmdline",
        "quiet",
    ]);
    assert_eq!(added.code, 0, "{added:?}");
    assert!(added.stdout.starts_with("name     debian\n"), "{}", added.stdout);
    let without_disk = server.run(&[
        "image",
        "add",
        "other",
        "--kernel",
        "guest.elf",
        "--disk",
        "missing.raw",
    ]);
    assert_eq!(without_disk.code, 1);
    let told = without_disk.stderr;
    assert!(told.contains("/missing.raw` is not there"), "{told}");
    let listed = server.run(&["image", "ls"]);
    assert!(listed.stdout.contains("\ndebian  "), "{}", listed.stdout);
    let digest = server.run(&["image", "show", "debian", "--json"]).json()["kernel"]["sha256"].clone();
    assert_eq!(digest.as_str().unwrap().len(), 64);

    let created = server.run(&["create", "web", "--image", "debian", "--no-start"]);
    assert_eq!(created.code, 0, "{created:?}");
    assert_eq!(server.run(&["show", "web", "--json"]).json()["image"], "debian");
    let refused = server.run(&["image", "rm", "debian"]);
    assert_eq!(refused.code, 1);
    assert_eq!(
        refused.stderr,
        "error: cannot remove image debian while instances were made of it: delete web first [image_in_use]\n"
    );
    server.run(&["rm", "web"]);
    assert_eq!(
        server.run(&["image", "rm", "debian"]).stdout,
        "debian is deleted\n"
    );
    assert_eq!(server.run(&["image", "ls"]).stdout, "no images\n");
}

#[test]
fn programs_get_the_json_of_the_api() {
    let server = Server::start();
    server.create("web");
    assert_eq!(server.run(&["--json", "show", "web"]).json()["state"], "Stopped");
    assert_eq!(
        server.run(&["ls", "--json"]).json()["instances"][0]["name"],
        "web"
    );
    let forks = server.run(&["fork", "web", "-n", "2", "--json"]);
    assert_eq!(forks.json()["forks"][1]["instance"]["name"], "web-2");
    let waited = server.run(&["wait", "web", "--state", "stopped", "--json"]);
    assert_eq!(waited.json()["reached"], true);
    let version = server.run(&["version", "--json"]).json();
    assert_eq!(version["server"]["version"], env!("CARGO_PKG_VERSION"));
    let refused = server.run(&["--json", "pause", "web"]);
    assert_eq!(
        (refused.code, &refused.json()["code"]),
        (1, &json!("invalid_state"))
    );
}

#[test]
fn a_refusal_exits_with_1_and_says_what_would_be_right() {
    let server = Server::start();
    server.create("web");
    for (words, expected) in [
        (
            &["show", "nobody"][..],
            "error: there is no instance `nobody`; give its exact name or its whole id",
        ),
        (
            &["pause", "web"],
            "error: cannot pause in state Stopped: it does not run; start it first (start) [invalid_state]",
        ),
        (
            &["promote", "web"],
            "(start), then put it on standby (standby) first [invalid_state]",
        ),
        (
            &["create", "web", "--kernel", "guest.elf", "--no-start"],
            "choose another one [name_conflict]",
        ),
        (
            &["create", "--kernel", "guest.elf", "--disk", "root.raw,ro"],
            "error: the VMs of microvm have no disks; give none, or another hypervisor [invalid_request]",
        ),
        (
            &["create", "--kernel", "nothing.elf"],
            "nothing.elf` is not there; it takes a file that the server can read",
        ),
        (
            &["fork", "web", "-n", "100000"],
            "count is 100000; one call makes 1 to 1024 forks [invalid_request]",
        ),
        (
            &["wait", "web", "--timeout", "10ms"],
            "error: web is Stopped, not Running",
        ),
        (
            &["console", "web", "--send", "ping"],
            "has no console to write to while its VM is down",
        ),
        (&["start", "web"], "the server's log says more [internal]"),
    ] {
        let done = server.run(words);
        assert_eq!(done.code, 1, "{words:?}: {done:?}");
        assert!(done.stderr.contains(expected), "{words:?}: {}", done.stderr);
    }
}

#[test]
fn many_are_deleted_and_those_that_are_not_are_told() {
    let server = Server::start();
    server.create("a");
    server.create("b");
    let done = server.run(&["rm", "a", "nobody", "b", "nothing"]);
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (1, "a is deleted\nb is deleted\n")
    );
    assert!(
        done.stderr
            .contains("error: nobody: there is no instance `nobody`"),
        "{}",
        done.stderr
    );
    assert!(
        done.stderr.contains("error: nothing: there is no instance"),
        "{}",
        done.stderr
    );
    assert!(done.stderr.ends_with("error: 2 of 4 failed\n"), "{}", done.stderr);
}

#[test]
fn the_console_shows_what_was_printed() {
    let server = Server::start();
    server.create("web");
    let id = server.run(&["show", "web", "--json"]).json()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let log = server
        .dir
        .path()
        .join("data/instances")
        .join(id)
        .join("console.log");
    std::fs::write(log, b"one\ntwo \xff\n").unwrap();
    let output = server.command(&["console", "web"]).output().unwrap();
    assert_eq!(output.stdout, b"one\ntwo \xff\n", "byte by byte");
    let tail = server
        .command(&["console", "web", "--tail", "1", "--follow"])
        .output()
        .unwrap();
    assert_eq!(tail.stdout, b"two \xff\n");
}

#[test]
fn the_standard_input_can_be_sent_to_the_console() {
    let server = Server::start();
    server.create("web");
    let mut command = server.command(&["console", "web", "--send", "-"]);
    let mut process = command
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    process.stdin.take().unwrap().write_all(b"ping\n").unwrap();
    let output = process.wait_with_output().unwrap();
    // That it is refused shows that it was sent.
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("has no console to write to")
    );
}

#[test]
fn a_reader_that_goes_away_is_no_error_worth_a_word() {
    let server = Server::start();
    let mut process = server
        .command(&["ls"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(process.stdout.take());
    let output = process.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[test]
fn the_version_of_the_server_is_told_if_there_is_one() {
    let server = Server::start();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        server.run(&["version"]).stdout,
        format!("stencil {version}\nserver  {version}\n")
    );
    let alone = done(server.command(&["version"]).args(["--socket", "nobody.sock"]));
    assert_eq!(alone.code, 0);
    assert_eq!(
        alone.stdout,
        format!("stencil {version}\nserver  none listens at nobody.sock\n")
    );
}
