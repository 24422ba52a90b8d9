//! `pack` and `unpack`: files in and out, and no further.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use stencil_agent::archive::PARTIAL;
use stencil_agent::{End, Exec, PROGRAM, ToGuest};

use crate::host::Agent;

const AGENT: &str = env!("CARGO_BIN_EXE_stencil-agent");

fn pack(path: &Path) -> Output {
    Command::new(AGENT).arg("pack").arg(path).output().unwrap()
}

fn unpack(directory: &Path, archive: &[u8]) -> Output {
    let mut unpack = Command::new(AGENT)
        .arg("unpack")
        .arg(directory)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may end before it has read all.
    let _ = unpack.stdin.take().unwrap().write_all(archive);
    unpack.wait_with_output().unwrap()
}

#[test]
fn a_directory_comes_back_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/b/data"), vec![7; 3_000_000]).unwrap();
    fs::write(tree.join("run"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(tree.join("run"), fs::Permissions::from_mode(0o750)).unwrap();
    symlink("a/b/data", tree.join("link")).unwrap();
    symlink("/no/where", tree.join("dangling")).unwrap();
    let packed = pack(&tree);
    assert!(packed.status.success(), "{packed:?}");

    let to = tempfile::tempdir().unwrap();
    assert!(unpack(to.path(), &packed.stdout).status.success());
    let tree = to.path().join("tree");
    assert_eq!(fs::read(tree.join("a/b/data")).unwrap(), vec![7; 3_000_000]);
    assert_eq!(
        fs::metadata(tree.join("run")).unwrap().permissions().mode() & 0o7777,
        0o750
    );
    assert_eq!(fs::read_link(tree.join("link")).unwrap(), Path::new("a/b/data"));
    assert_eq!(
        fs::read_link(tree.join("dangling")).unwrap(),
        Path::new("/no/where")
    );
}

#[test]
fn files_travel_through_commands_of_an_agent() {
    let agent = Agent::start();
    let mut host = agent.enter();
    let from = agent.dir.path().join("from");
    fs::write(&from, "as it is").unwrap();
    let command = |what: &str, path: &Path| Exec {
        argv: [PROGRAM, what, path.to_str().unwrap()]
            .map(str::to_owned)
            .to_vec(),
        stdin: true,
        ..Exec::default()
    };
    let packed = host.run(command("pack", &from));
    assert_eq!(packed.end, Some(End::Code(0)), "{packed:?}");
    let to = agent.dir.path().join("to");
    fs::create_dir(&to).unwrap();
    let (session, _) = host.begin(command("unpack", &to));
    let bytes = packed.stdout.into_bytes();
    host.send(&ToGuest::Stdin { session, bytes });
    host.send(&ToGuest::StdinClosed { session });
    let unpacked = host.finish(session);
    assert_eq!(unpacked.end, Some(End::Code(0)), "{unpacked:?}");
    assert_eq!(fs::read(to.join("from")).unwrap(), b"as it is");
}

#[test]
fn a_file_takes_the_place_of_one_that_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "new").unwrap();
    let to = tempfile::tempdir().unwrap();
    fs::write(to.path().join("file"), "old and longer").unwrap();
    assert!(unpack(to.path(), &pack(&file).stdout).status.success());
    assert_eq!(fs::read(to.path().join("file")).unwrap(), b"new");
}

#[test]
fn what_cannot_be_done_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let told = |output: Output, text: &str| {
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains(text), "{stderr}");
    };
    told(pack(&dir.path().join("none")), "could not read");
    told(pack(Path::new("/dev/null")), "/dev/null is a device");
    told(
        unpack(&dir.path().join("none/where"), b""),
        "none is no directory",
    );
    fs::write(dir.path().join("file"), "x").unwrap();
    let cut = &pack(&dir.path().join("file")).stdout[..600];
    told(unpack(dir.path(), cut), "the archive is damaged");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn what_is_missing_in_an_archive_is_named_and_told_by_the_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("kept"), "x").unwrap();
    let whole = pack(&tree);
    assert_eq!(whole.status.code(), Some(0), "{whole:?}");
    let partial = pack(Path::new("/proc/self/task"));
    let told = String::from_utf8(partial.stderr).unwrap();
    assert_eq!(partial.status.code(), Some(i32::from(PARTIAL)), "{told}");
    assert!(told.contains("/mem: could not read it"), "{told}");
}
