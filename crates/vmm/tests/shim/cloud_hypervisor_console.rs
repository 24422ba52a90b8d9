//! Input for guests of Cloud Hypervisor: through a terminal that lives as long as the VMM.

use std::fs::{self, File};
use std::io::Write;

use insta::assert_snapshot;
use stencil_core::MemoryMode;
use stencil_vmm::{CloudHypervisor, Hypervisor, VmmError, VmmProcess};

use crate::cloud_hypervisor::{World, left_in, printed};
use crate::directory::{Scratch, backend, spawn};
use crate::fake::let_guest_read;

#[tokio::test]
async fn input_reaches_the_guest_byte_for_byte_and_output_goes_to_the_log() {
    let world = World::new();
    let (dir, process) = world.running("vm").await;
    let input = b"\x00\x03\x04\x11\x13\x1a\x1c\x7f\r\n\xff";
    world.vmm.console_input(&dir, &process, input).await.unwrap();
    let_guest_read(&dir.vmm_socket());
    assert_eq!(
        printed(&dir),
        format!("booted\nread {}\n", input.escape_ascii()),
        "no echo, no signals, no line is waited for"
    );
}

#[tokio::test]
async fn another_server_writes_to_the_same_guest() {
    let world = World::new();
    let (dir, process) = world.running("vm").await;
    world.vmm.console_input(&dir, &process, b"one").await.unwrap();
    let_guest_read(&dir.vmm_socket());
    let server = CloudHypervisor::new("cloud-hypervisor".into());
    let found = VmmProcess::attach(process.identity()).unwrap().unwrap();
    server.console_input(&dir, &found, b"two").await.unwrap();
    let_guest_read(&dir.vmm_socket());
    assert_eq!(printed(&dir), "booted\nread one\nread two\n");
}

#[tokio::test]
async fn each_fork_has_a_console_of_its_own() {
    let world = World::new();
    let template = world.snapshot().await;
    let mut forks = Vec::new();
    for name in ["fork-1", "fork-2"] {
        let dir = world.instance(name);
        let process = world.spawn(&dir).await;
        world.restore(&dir, &template, MemoryMode::Cow).await.unwrap();
        world.vmm.resume(&dir).await.unwrap();
        forks.push((name, dir, process));
    }
    for (name, dir, process) in &forks {
        world
            .vmm
            .console_input(dir, process, name.as_bytes())
            .await
            .unwrap();
    }
    for (name, dir, _) in &forks {
        let_guest_read(&dir.vmm_socket());
        assert!(printed(dir).ends_with(&format!("read {name}\n")));
    }
}

#[tokio::test]
async fn a_guest_that_does_not_read_is_told_and_holds_nobody_up() {
    let world = World::new();
    let (dir, process) = world.running("vm").await;
    // From here the clock jumps to the next deadline as soon as nothing else is left to do.
    tokio::time::pause();
    let input = vec![b'x'; 1 << 20];
    let error = world.vmm.console_input(&dir, &process, &input).await.unwrap_err();
    assert!(
        matches!(error, VmmError::ConsoleFull { taken, given: 0x10_0000, .. } if taken > 0 && taken < 0x1_0000),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_vmm_that_listens_and_does_not_read_holds_nobody_up() {
    let scratch = Scratch::new();
    let vmm = backend("sleeps");
    let process = spawn(&vmm, &scratch.dir).await.unwrap().kill_on_drop();
    let _deaf = std::os::unix::net::UnixListener::bind(scratch.dir.console_socket()).unwrap();
    tokio::time::pause();
    let input = vec![b'x'; 1 << 20];
    let error = vmm
        .console_input(&scratch.dir, &process, &input)
        .await
        .unwrap_err();
    assert!(matches!(error, VmmError::ConsoleFull { .. }), "{error:?}");
}

#[tokio::test]
async fn nothing_is_written_to_a_terminal_that_became_somebody_else_s() {
    let world = World::new();
    let (dir, process) = world.running("vm").await;
    process.terminate().await.unwrap();
    // A number that the kernel gave to another program, as far as the link can tell.
    let others = dir.path().join("others");
    File::create(&others).unwrap().write_all(b"theirs").unwrap();
    fs::remove_file(dir.console_terminal()).unwrap();
    std::os::unix::fs::symlink(&others, dir.console_terminal()).unwrap();
    let error = world
        .vmm
        .console_input(&dir, &process, b"ours")
        .await
        .unwrap_err();
    let shown = error.to_string().replace(dir.path().to_str().unwrap(), "[dir]");
    assert_snapshot!(shown, @"cannot write to the guest's console at [dir]/console.tty");
    assert_eq!(fs::read(&others).unwrap(), b"theirs");
    world.vmm.stop(&dir, &process).await.unwrap();
    assert_eq!(left_in(&dir), ["console.log", "others", "vmm.log"]);
}
