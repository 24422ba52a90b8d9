use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tar::{EntryType, Header};

use super::*;

fn packed(from: &Path, name: &str) -> (Vec<u8>, Notes) {
    let mut bytes = Vec::new();
    let notes = pack(from, OsStr::new(name), &mut bytes).unwrap();
    (bytes, notes)
}

fn unpacked(archive: &[u8], to: &Path, from: From<'_>) -> Result<Notes, ArchiveError> {
    unpack(archive, to, from)?.keep()
}

fn asked(name: &str) -> From<'_> {
    From::Stranger(OsStr::new(name))
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

/// What a stranger may send: entries with any name, kind and mode, and a link's target.
fn strange(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, kind, target) in entries {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_mode(0o6777);
        header.set_entry_type(*kind);
        let content: &[u8] = if kind.is_file() { b"evil" } else { b"" };
        if !target.is_empty() {
            header.set_link_name_literal(target).unwrap();
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        archive.append(&header, content).unwrap();
    }
    archive.into_inner().unwrap()
}

#[test]
fn a_tree_comes_back_as_it_was_under_the_name_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("a")).unwrap();
    fs::write(tree.join("a/data"), vec![7; 3_000_000]).unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    symlink("a/data", tree.join("link")).unwrap();
    let (archive, notes) = packed(&tree, "tree");
    assert!(!notes.is_partial() && notes.lines().next().is_none(), "{notes:?}");
    let to = dir.path().join("to");
    fs::create_dir(&to).unwrap();
    unpacked(&archive, &to, asked("other")).unwrap();
    assert_eq!(fs::read(to.join("other/link")).unwrap(), vec![7; 3_000_000]);
    assert_eq!(fs::read(to.join("other/empty")).unwrap(), b"");
    unpacked(&archive, &to.join("new"), asked("other")).unwrap();
    unpacked(&archive, &to, From::Owner).unwrap();
    assert_eq!(names(&to), ["new", "other", "tree"]);
    let again = unpacked(&archive, &to, asked("other")).unwrap_err();
    assert!(again.to_string().ends_with("other is there already"), "{again}");
    assert_eq!(names(&to), ["new", "other", "tree"]);
}

#[test]
fn holes_stay_holes_and_what_claims_no_blocks_has_its_content() {
    let dir = tempfile::tempdir().unwrap();
    let sparse = dir.path().join("sparse");
    fs::write(&sparse, "").unwrap();
    let file = fs::OpenOptions::new().write(true).open(&sparse).unwrap();
    file.set_len(64 << 20).unwrap();
    rustix::io::pwrite(&file, b"x", (64 << 20) - 1).unwrap();
    let (archive, _) = packed(&sparse, "sparse");
    let to = tempfile::tempdir().unwrap();
    unpacked(&archive, to.path(), asked("sparse")).unwrap();
    let found = fs::metadata(to.path().join("sparse")).unwrap();
    assert_eq!(found.len(), 64 << 20);
    assert!(found.blocks() * 512 < 1 << 20, "{} blocks", found.blocks());
    assert_eq!(
        fs::read(&sparse).unwrap(),
        fs::read(to.path().join("sparse")).unwrap()
    );

    // Their sizes are 0 and 4096, and both have no blocks.
    for (path, name) in [
        ("/proc/version", "version"),
        ("/sys/kernel/mm/transparent_hugepage/enabled", "enabled"),
    ] {
        let (archive, notes) = packed(Path::new(path), name);
        assert!(!notes.is_partial(), "{notes:?}");
        unpacked(&archive, to.path(), asked(name)).unwrap();
        assert_eq!(fs::read(to.path().join(name)).unwrap(), fs::read(path).unwrap());
    }
}

#[test]
fn a_tree_of_proc_is_copied_but_for_what_cannot_be_read_which_is_named() {
    let (archive, notes) = packed(Path::new("/proc/self/attr"), "attr");
    let to = tempfile::tempdir().unwrap();
    unpacked(&archive, to.path(), asked("attr")).unwrap();
    let missing: Vec<String> = names(Path::new("/proc/self/attr"))
        .into_iter()
        .filter(|name| !to.path().join("attr").join(name).exists())
        .collect();
    assert_eq!(notes.is_partial(), !missing.is_empty());
    let told: Vec<_> = notes.lines().collect();
    assert!(
        missing
            .iter()
            .all(|name| told.iter().any(|line| line.contains(name.as_str()))),
        "{missing:?} {told:?}"
    );
}

#[test]
fn pipes_sockets_and_devices_are_refused_or_left_out_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "x").unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(tree.join("socket")).unwrap();
    mknodat(CWD, tree.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let (archive, notes) = packed(&tree, "tree");
    let told: Vec<_> = notes.lines().collect();
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(
        told[0].ends_with("/tree/pipe: it is a pipe") && told[1].ends_with("/tree/socket: it is a socket"),
        "{told:?}"
    );
    assert!(!notes.is_partial());
    let to = tempfile::tempdir().unwrap();
    unpacked(&archive, to.path(), asked("tree")).unwrap();
    assert_eq!(names(&to.path().join("tree")), ["file"]);
    for (path, kind) in [
        (tree.join("pipe"), "pipe"),
        (tree.join("socket"), "socket"),
        ("/dev/null".into(), "device"),
    ] {
        let refused = pack(&path, OsStr::new("x"), &mut Vec::new()).unwrap_err();
        assert!(
            matches!(&refused, ArchiveError::Kind { kind: found, .. } if *found == kind),
            "{refused}"
        );
    }
}

#[test]
fn modes_obey_the_umask_and_those_of_directories_are_set_last() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("read-only/below")).unwrap();
    fs::write(tree.join("read-only/below/run"), "x").unwrap();
    for (path, mode) in [
        ("read-only/below/run", 0o4777),
        ("read-only/below", 0o555),
        ("read-only", 0o577),
        ("", 0o2777),
    ] {
        fs::set_permissions(tree.join(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    let (archive, _) = packed(&tree, "tree");
    let to = tempfile::tempdir().unwrap();
    // As anybody: root may write into read-only directories.
    let before = rustix::thread::capabilities(None).unwrap();
    let mut like_others = before;
    like_others
        .effective
        .remove(rustix::thread::CapabilitySet::DAC_OVERRIDE);
    rustix::thread::set_capabilities(None, like_others).unwrap();
    let done = unpacked(&archive, to.path(), asked("tree"));
    rustix::thread::set_capabilities(None, before).unwrap();
    done.unwrap();
    let tree = to.path().join("tree");
    let own = tree.join("fresh");
    fs::write(&own, "").unwrap();
    let umask = 0o666 & !mode(&own);
    for (path, sent) in [
        ("read-only/below/run", 0o777),
        ("read-only/below", 0o555),
        ("read-only", 0o577),
        ("", 0o777),
    ] {
        assert_eq!(mode(&tree.join(path)), sent & !umask, "{path}");
    }
}

#[test]
fn a_stranger_gets_nothing_out_of_the_place_and_the_name_that_were_asked_for() {
    let outside = tempfile::tempdir().unwrap();
    let to = outside.path().join("to");
    fs::create_dir(&to).unwrap();
    fs::write(to.join(".bashrc"), "mine").unwrap();
    let path = outside.path().to_str().unwrap();
    let (file, link, dir) = (EntryType::Regular, EntryType::Symlink, EntryType::Directory);
    for entries in [
        vec![("../evil", file, "")],
        vec![("a/../../evil", file, "")],
        vec![("/evil", file, "")],
        vec![("link", link, path), ("link/evil", file, "")],
        vec![("d", dir, ""), ("d/link", link, "."), ("d/link/evil", file, "")],
        vec![("d", dir, ""), ("d/d", file, ""), ("d/d", file, "")],
        vec![("d", dir, ""), ("e", file, "")],
        vec![("d/e", file, "")],
        vec![("one", file, ""), ("two", file, "")],
        vec![("hard", EntryType::Link, "/etc/hostname")],
        vec![("device", EntryType::Char, "")],
        vec![("pipe", EntryType::Fifo, "")],
        vec![],
    ] {
        let refused = unpacked(&strange(&entries), &to, asked("results"));
        assert!(refused.is_err(), "{entries:?}");
        assert_eq!(names(&to), [".bashrc"], "{entries:?}");
        assert_eq!(names(outside.path()), ["to"], "{entries:?}");
    }
    // Whatever it calls it.
    unpacked(&strange(&[(".bashrc", file, "")]), &to, asked("results")).unwrap();
    assert_eq!(fs::read(to.join(".bashrc")).unwrap(), b"mine");
    assert_eq!(fs::read(to.join("results")).unwrap(), b"evil");
    assert_eq!(
        mode(&to.join("results")) & 0o7022,
        0,
        "no set-uid, and nobody else writes"
    );
}

#[test]
fn links_that_lead_out_are_left_out_and_named() {
    let to = tempfile::tempdir().unwrap();
    let (file, link, dir) = (EntryType::Regular, EntryType::Symlink, EntryType::Directory);
    let archive = strange(&[
        ("d", dir, ""),
        ("d/file", file, ""),
        ("d/e", dir, ""),
        ("d/absolute", link, "/etc/passwd"),
        ("d/above", link, "../evil"),
        ("d/here", link, "."),
        ("d/by-another", link, "here/../evil"),
        ("d/e/above", link, "../../evil"),
        ("d/e/good", link, "../file"),
        ("d/good", link, "./e/good"),
    ]);
    let notes = unpacked(&archive, to.path(), asked("d")).unwrap();
    assert_eq!(names(&to.path().join("d")), ["e", "file", "good", "here"]);
    assert_eq!(names(&to.path().join("d/e")), ["good"]);
    assert_eq!(fs::read(to.path().join("d/good")).unwrap(), b"evil");
    assert_eq!(notes.lines().count(), 4);
    let alone = strange(&[("link", link, "neighbour")]);
    let notes = unpacked(&alone, to.path(), asked("link")).unwrap();
    assert_eq!(
        (names(to.path()), notes.lines().count()),
        (vec!["d".to_owned()], 1)
    );
    // Its owner's links stay what they are.
    unpacked(&alone, to.path(), From::Owner).unwrap();
    assert_eq!(
        fs::read_link(to.path().join("link")).unwrap(),
        Path::new("neighbour")
    );
}

#[test]
fn what_is_cut_off_or_not_kept_takes_no_place_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "old").unwrap();
    let whole = strange(&[("file", EntryType::Regular, "")]);
    // 1024: behind the entry, before the end of the archive.
    for length in [0, 100, 511, 514, 1024] {
        assert!(
            unpacked(&whole[..length], dir.path(), asked("file")).is_err(),
            "{length}"
        );
    }
    drop(unpack(&whole[..], dir.path(), asked("file")).unwrap());
    assert_eq!(names(dir.path()), ["file"]);
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"old");
    unpacked(&whole, dir.path(), asked("file")).unwrap();
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"evil");
}

#[test]
fn control_characters_in_names_are_escaped() {
    let refused = unpack(
        &strange(&[("evil\x1b[2J\n", EntryType::Fifo, "")])[..],
        tempfile::tempdir().unwrap().path(),
        asked("x"),
    );
    let said = refused.unwrap_err().to_string();
    assert!(
        said.contains("evil\\u{1b}[2J\\n:") && !said.contains('\x1b'),
        "{said}"
    );
}
