//! Starting a VMM: what it is given, what is left when it fails.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use stencil_core::InstanceDir;
use stencil_vmm::{Exit, Hypervisor, MicroVm, VmmError, stray_processes};

use crate::directory::{Scratch, backend, fixture, spawn};

#[tokio::test]
async fn a_vmm_starts_in_its_directory_and_speaks_into_its_log() {
    let scratch = Scratch::new();
    let process = spawn(&backend("fails"), &scratch.dir).await.unwrap();
    assert_eq!(process.exited().await, Exit::Code(3));
    let name = scratch.path().file_name().unwrap().to_str().unwrap();
    assert_eq!(
        scratch.log(),
        format!("started in {name} with --api-socket fd=0\nthis host has no KVM\n")
    );
}

#[tokio::test]
async fn the_log_of_an_earlier_start_is_kept() {
    let scratch = Scratch::new();
    for _ in 0..2 {
        spawn(&backend("fails"), &scratch.dir)
            .await
            .unwrap()
            .exited()
            .await;
    }
    assert_eq!(scratch.log().matches("this host has no KVM").count(), 2);
}

#[tokio::test]
async fn a_vmm_has_its_socket_as_input_and_nothing_of_the_server_s() {
    let scratch = Scratch::new();
    let secret = fs::File::create(scratch.path().join("secret")).unwrap();
    spawn(&backend("shows-descriptors"), &scratch.dir)
        .await
        .unwrap()
        .exited()
        .await;
    drop(secret);
    let log = scratch.log();
    let target = |descriptor: &str| {
        log.split_once(&format!(" {descriptor} -> "))
            .unwrap()
            .1
            .lines()
            .next()
            .unwrap()
    };
    assert!(target("0").starts_with("socket:"), "{log}");
    assert!(target("1").ends_with("/vmm.log"), "{log}");
    assert!(target("2").ends_with("/vmm.log"), "{log}");
    assert!(!log.contains("secret"), "{log}");
    assert_eq!(log.matches("socket:").count(), 1, "{log}");
}

#[tokio::test]
async fn a_socket_that_an_earlier_vmm_left_is_no_obstacle() {
    let scratch = Scratch::new();
    drop(UnixListener::bind(scratch.dir.vmm_socket()).unwrap());
    let vmm = backend("sleeps");
    let process = spawn(&vmm, &scratch.dir).await.unwrap();
    // Connecting works before the VMM has done anything.
    UnixStream::connect(scratch.dir.vmm_socket()).unwrap();
    process.terminate().await.unwrap();
}

#[tokio::test]
async fn a_binary_that_is_not_there_leaves_no_socket() {
    let scratch = Scratch::new();
    let error = spawn(&MicroVm::new("/nonexistent/vmm".into()), &scratch.dir)
        .await
        .unwrap_err();
    assert!(matches!(&error, VmmError::Spawn { binary, .. } if binary == Path::new("/nonexistent/vmm")));
    assert!(!scratch.dir.vmm_socket().exists());
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_named() {
    let error = spawn(&backend("sleeps"), &InstanceDir::new("/nonexistent/instance"))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, VmmError::Prepare { path, .. } if path == Path::new("/nonexistent/instance/vmm.sock")),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_start_that_is_given_up_leaves_no_process() {
    let scratch = Scratch::new();
    scratch.make_pipe();
    {
        let vmm = backend("waits");
        let mut start = pin!(spawn(&vmm, &scratch.dir));
        // Polled once, so that the start is under way on its own thread; then dropped.
        std::future::poll_fn(|context| Poll::Ready(start.as_mut().poll(context).is_pending())).await;
    }
    // The start goes on by itself; what it started has the only listening socket, which refuses when that is dead.
    let refused = async {
        while !is_refused(&scratch.dir) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), refused)
        .await
        .expect("the VMM is still there");
    assert_eq!(stray_processes(scratch.path()).unwrap(), []);
}

fn is_refused(dir: &InstanceDir) -> bool {
    UnixStream::connect(dir.vmm_socket()).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

#[tokio::test]
async fn the_version_is_asked_of_the_binary_once() {
    let scratch = Scratch::new();
    let link = scratch.path().join("vmm");
    std::os::unix::fs::symlink(fixture("vmms/sleeps"), &link).unwrap();
    let vmm = MicroVm::new(link.clone());
    assert_eq!(vmm.version().await.unwrap(), "1.2.3");
    fs::remove_file(link).unwrap();
    assert_eq!(vmm.version().await.unwrap(), "1.2.3");
}

#[tokio::test]
async fn a_binary_that_tells_no_version_is_quoted() {
    let error = backend("fails").version().await.unwrap_err();
    assert!(
        matches!(&error, VmmError::Version { said, .. } if said.ends_with("with --version\n")),
        "{error:?}"
    );
    // "echo (GNU coreutils) 9.1", or "--version" where echo is another.
    let error = MicroVm::new("/bin/echo".into()).version().await.unwrap_err();
    assert!(matches!(&error, VmmError::Version { .. }), "{error:?}");
}
