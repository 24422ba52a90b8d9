//! One server per data directory, with real processes.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use stencil_core::{Store, StoreError};

use crate::given;

/// Names the data directory to [`the_other_server`].
const DATA: &str = "STENCIL_CORE_TEST_DATA";

/// Not a test: the process that has the data directory in the tests below, until its standard input ends.
#[test]
fn the_other_server() {
    let Some(data) = std::env::var_os(DATA) else {
        return;
    };
    let _store = Store::open(&PathBuf::from(data)).unwrap();
    // The test harness may have begun the line.
    println!("\nit is mine");
    std::io::stdin().lines().for_each(drop);
}

fn another_server(data: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "lock::the_other_server", "--nocapture"])
        .env(DATA, data)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "it is mine"));
    child
}

#[test]
fn a_second_server_is_refused_with_the_pid_of_the_first() {
    let scratch = tempfile::tempdir().unwrap();
    let mut other = another_server(scratch.path());
    let error = Store::open(scratch.path()).unwrap_err();
    assert!(
        matches!(&error, StoreError::InUse { pid, .. } if *pid == Some(other.id())),
        "{error:?}"
    );
    let data = std::fs::canonicalize(scratch.path()).unwrap();
    assert_eq!(
        error.to_string(),
        format!(
            "the data directory {} is in use by the server with pid {}: stop that server, or choose another directory",
            data.display(),
            other.id()
        )
    );

    // SIGKILL: the lock goes with its holder, however it went.
    other.kill().unwrap();
    other.wait().unwrap();
    Store::open(scratch.path()).unwrap();
}

#[test]
fn it_is_refused_within_one_process_too() {
    let (scratch, store) = given::store();
    let error = Store::open(scratch.path()).unwrap_err();
    assert!(
        matches!(error, StoreError::InUse { pid: Some(pid), .. } if pid == std::process::id()),
        "{error:?}"
    );
    drop(store);
    Store::open(scratch.path()).unwrap();
}

#[test]
fn a_child_that_lives_on_does_not_keep_the_lock() {
    let (scratch, store) = given::store();
    let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    drop(store);
    Store::open(scratch.path()).unwrap();
    drop(child.stdin.take());
    child.wait().unwrap();
}
