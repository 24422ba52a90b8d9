//! The process: its arguments, its socket, its end.

use std::os::unix::net::{UnixListener, UnixStream};

use serde_json::Value;

use crate::vmm::{Vmm, run};

#[test]
fn it_says_its_version() {
    let expected = format!("stencil-microvm {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(run(&["--version"]), (expected, String::new(), 0));
}

#[test]
fn wrong_arguments_are_told_with_the_right_ones() {
    for (arguments, why) in [
        (vec![], "--api-socket is missing"),
        (vec!["--api-socket"], "--api-socket needs a value"),
        (vec!["--api-socket", "fd=x"], "right are path=PATH, PATH and fd=N"),
        (vec!["--nonsense"], "unknown argument \"--nonsense\""),
    ] {
        let (_, errors, code) = run(&arguments);
        assert!(
            errors.contains(why) && errors.contains("usage: stencil-microvm"),
            "{errors}"
        );
        assert_eq!(code, 2);
    }
}

#[test]
fn a_descriptor_that_does_not_listen_is_refused() {
    let (_, errors, code) = run(&["--api-socket", "fd=9"]);
    assert!(
        errors.contains("file descriptor 9 is not a listening socket"),
        "{errors}"
    );
    assert_eq!(code, 1);
}

#[test]
fn a_socket_in_use_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vmm.sock");
    let _used = UnixListener::bind(&path).unwrap();
    let (_, errors, code) = run(&["--api-socket", &format!("path={}", path.display())]);
    assert!(
        errors.contains("is in use: another process listens on it"),
        "{errors}"
    );
    assert_eq!(code, 1);
    UnixStream::connect(&path).unwrap();
}

#[test]
fn vmm_shutdown_ends_the_process_cleanly_and_takes_the_console_socket_away() {
    let vmm = Vmm::booted(64 << 20);
    assert!(vmm.path().join("console.sock").exists());
    assert_eq!(vmm.put("vmm.shutdown", &Value::Null).status, 200);
    let (status, directory) = vmm.wait();
    assert!(status.success());
    assert!(!directory.path().join("console.sock").exists());
    assert!(directory.path().join("vmm.sock").exists(), "the parent made it");
}

#[test]
fn a_socket_that_it_made_is_taken_away_again() {
    let vmm = Vmm::start_at_path();
    assert_eq!(vmm.get("vmm.ping").status, 200);
    assert_eq!(vmm.put("vmm.shutdown", &Value::Null).status, 200);
    let (status, directory) = vmm.wait();
    assert!(status.success());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn sigterm_ends_the_process_cleanly() {
    let vmm = Vmm::booted(64 << 20);
    let pid = rustix::process::Pid::from_raw(vmm.pid().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let (status, directory) = vmm.wait();
    assert!(status.success());
    assert!(!directory.path().join("console.sock").exists());
}

#[test]
fn a_stale_console_socket_is_replaced_and_one_in_use_is_not() {
    let vmm = Vmm::start();
    let kernel = crate::guest::write_elf(vmm.path());
    let socket = vmm.path().join("console.sock");
    let used = UnixListener::bind(&socket).unwrap();
    vmm.done("vm.create", &crate::vmm::definition(&kernel, 64 << 20, 1));
    let reply = vmm.put("vm.boot", &Value::Null);
    assert!(reply.body.to_string().contains("is in use"), "{}", reply.body);
    drop(used);
    vmm.done("vm.boot", &Value::Null);
    vmm.wait_for("ready\n");
}
