//! A command line that is not understood exits with 2, says why, and asks nobody.

use crate::stencil::{command, done};

#[test]
fn what_is_not_understood_exits_with_2_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    for (words, expected) in [
        (&[][..], "Usage: stencil"),
        (&["explode"], "unrecognized subcommand 'explode'"),
        (&["create"], "--kernel <PATH>"),
        (
            &["create", "--kernel", "k", "--firmware", "f"],
            "cannot be used with",
        ),
        (
            &["create", "--image", "debian", "--kernel", "k"],
            "the argument '--image <NAME>' cannot be used with '--kernel <PATH>'",
        ),
        (
            &["create", "../x", "--kernel", "k"],
            "the name has '.' at position 1: use a-z, 0-9 and -",
        ),
        (
            &["create", "--kernel", "k", "--memory", "lots"],
            "`lots` is no size; give bytes",
        ),
        (
            &["create", "--kernel", "k", "--memory", "512M"],
            "can be read in two ways",
        ),
        (&["create", "--kernel", "k", "--vcpus", "many"], "invalid digit"),
        (
            &["create", "--kernel", "k", "--label", "nonsense"],
            "it is KEY=VALUE",
        ),
        (
            &["create", "--kernel", "k", "--no-start", "--wait"],
            "cannot be used with",
        ),
        (&["ls", "--state", "Asleep"], "a state is one of Stopped, Created"),
        (
            &["wait", "web", "--timeout", "soon"],
            "`soon` is no time; give seconds",
        ),
        (&["fork", "web", "-n", "-1"], "unexpected argument '-1'"),
        (&["fork", "web", "-n", "2", "--name", "x"], "cannot be used with"),
        (&["fork", "web", "--name-prefix", "x"], "--count <N>"),
        (&["fork", "web", "--memory-mode", "magic"], "a memory mode is"),
        (&["rm"], "<ID>..."),
        (&["start"], "<ID>"),
        (&["serve", "--listen", "8080"], "invalid socket address"),
    ] {
        let done = done(command(dir.path()).args(words));
        assert_eq!(done.code, 2, "{words:?}: {done:?}");
        assert!(done.stderr.contains(expected), "{words:?}: {}", done.stderr);
        assert_eq!(done.stdout, "", "{words:?}");
    }
}

#[test]
fn help_and_version_are_told_without_a_server() {
    let dir = tempfile::tempdir().unwrap();
    let help = done(command(dir.path()).arg("--help"));
    assert_eq!(help.code, 0);
    insta::assert_snapshot!(help.stdout);
    let version = done(command(dir.path()).arg("--version"));
    assert_eq!(
        (version.code, version.stdout.as_str()),
        (0, concat!("stencil ", env!("CARGO_PKG_VERSION"), "\n"))
    );
}

#[test]
fn without_a_server_it_says_how_to_start_one() {
    let dir = tempfile::tempdir().unwrap();
    let done = done(command(dir.path()).args(["ls", "--socket", "nobody.sock"]));
    assert_eq!(done.code, 1);
    assert_eq!(
        done.stderr,
        "error: no server listens at nobody.sock: No such file or directory (os error 2)\n\
         start one with `stencil serve`, or name its socket with --socket, or its address with --url\n"
    );
}
