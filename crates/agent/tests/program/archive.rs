//! `pack` and `unpack`: files in and out, and no further.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

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

/// An archive with these entries, whatever their names; a link where there is a target.
fn archive(entries: &[(&str, Option<&str>)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, target) in entries {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_mode(0o644);
        match target {
            Some(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_link_name_literal(target).unwrap();
                header.set_size(0);
                header.set_cksum();
                archive.append(&header, &[][..]).unwrap();
            }
            None => {
                header.set_size(4);
                header.set_cksum();
                archive.append(&header, &b"evil"[..]).unwrap();
            }
        }
    }
    archive.into_inner().unwrap()
}

#[test]
fn nothing_gets_out_of_the_directory() {
    let outside = tempfile::tempdir().unwrap();
    let path = outside.path().to_str().unwrap();
    let to = outside.path().join("to");
    for (entries, fails) in [
        (vec![("../evil", None)], true),
        (vec![("a/../../evil", None)], true),
        (vec![("link", Some(path)), ("link/evil", None)], true),
        (vec![("link", Some("..")), ("link/evil", None)], true),
        // An absolute name is taken for one below the directory.
        (vec![("/evil", None)], false),
    ] {
        fs::create_dir(&to).unwrap();
        let unpacked = unpack(&to, &archive(&entries));
        assert_eq!(unpacked.status.success(), !fails, "{entries:?}: {unpacked:?}");
        assert!(!outside.path().join("evil").exists(), "{entries:?}");
        fs::remove_dir_all(&to).unwrap();
    }
    assert!(!Path::new("/evil").exists());
}

#[test]
fn what_cannot_be_done_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let told = |output: Output, text: &str| {
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains(text), "{stderr}");
    };
    told(pack(&dir.path().join("none")), "could not read");
    told(
        pack(Path::new("/dev/null")),
        "neither a file, a directory nor a symbolic link",
    );
    told(unpack(&dir.path().join("none"), b""), "is no directory");
    let mut damaged = archive(&[("file", None)]);
    damaged.truncate(600);
    damaged[150] ^= 1;
    told(unpack(dir.path(), &damaged), "the archive is damaged");
}
