//! What can go wrong between a pager and Cloud Hypervisor: each time the VMM ends or is refused its VM, the reason is told, and
//! no pager is left.

use std::fs;
use std::path::PathBuf;

use insta::assert_snapshot;
use rustix::process::{Pid, Signal, kill_process};
use stencil_core::{InstanceDir, MemoryMode, ProcessIdentity, SnapshotDir};
use stencil_vmm::{CloudHypervisor, Exit, Hypervisor, PagerCommand, VmmError, VmmProcess};
use tokio::runtime::Runtime;

use crate::cloud_hypervisor::{World, left_in};
use crate::pager::{pagers, snapshot_with, the_pager};

/// The error of a restore in which a step goes wrong, after which nothing is left but the VMM that is stopped then.
async fn restore_error(faults: &str) -> VmmError {
    let world = World::with("cloud-hypervisor v53.0\n", faults);
    let template = world.snapshot().await;
    error_of(&world, &template).await
}

async fn error_of(world: &World, template: &SnapshotDir) -> VmmError {
    let dir = world.instance("fork");
    let process = world.spawn(&dir).await;
    let error = process
        .during(world.restore(&dir, template, MemoryMode::Uffd))
        .await
        .unwrap_err();
    assert!(pagers(&dir).is_empty(), "{error:?}");
    world.vmm.stop(&dir, &process).await.unwrap();
    let left = left_in(&dir);
    assert!(
        !left
            .iter()
            .any(|name| ["restoring", "migration.sock"].contains(&name.as_str())),
        "{left:?}"
    );
    error
}

const STEPS: [&str; 5] = ["Start", "MemoryFd", "Config", "State", "CompletePaused"];

#[tokio::test]
async fn a_step_that_is_refused_or_answered_wrongly_is_told_by_its_name() {
    let mut told = String::new();
    for fault in ["refuse", "wrong", "long"] {
        for step in STEPS {
            let error = restore_error(&format!("{step} {fault}\n")).await;
            assert!(
                matches!(error, VmmError::Pager { .. }),
                "{step} {fault}: {error:?}"
            );
            told += &format!("{fault}: {error}\n");
        }
    }
    assert_snapshot!(told);
}

#[tokio::test]
async fn a_connection_that_is_closed_within_a_step_is_told_by_the_step_s_name() {
    for step in STEPS {
        let error = restore_error(&format!("{step} close\n")).await.to_string();
        let expected = format!("{step}: Cloud Hypervisor closed the migration's connection");
        assert!(error.contains(&expected), "{error}");
    }
}

#[tokio::test]
async fn a_vmm_that_dies_at_any_step_is_told_with_how_it_died() {
    for step in STEPS {
        let error = restore_error(&format!("{step} die\n")).await;
        let killed = matches!(
            &error,
            VmmError::Ended {
                exit: Exit::Signal(9),
                ..
            }
        );
        assert!(killed, "{step}: {error:?}");
    }
}

#[tokio::test]
async fn a_vmm_that_does_not_receive_leaves_no_pager_that_waits_for_it() {
    let error = restore_error("vm.receive-migration error\n").await;
    assert!(matches!(error, VmmError::Rejected { .. }), "{error:?}");
}

#[tokio::test]
async fn a_restore_that_is_given_up_leaves_no_pager() {
    let world = World::with_fault("vm.receive-migration", "hang");
    let template = world.snapshot().await;
    let dir = world.instance("fork");
    let _process = world.spawn(&dir).await;
    let pager = tokio::select! {
        restored = world.restore(&dir, &template, MemoryMode::Uffd) => panic!("{restored:?}"),
        pager = first_pager(&dir) => pager,
    };
    pager.exited().await;
    assert!(pagers(&dir).is_empty());
}

async fn first_pager(dir: &InstanceDir) -> VmmProcess {
    loop {
        if let Some(pager) = pagers(dir).pop() {
            return pager;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_memory_file_that_is_cut_off_is_refused_before_anything_is_started() {
    let world = World::new();
    let template = world.snapshot().await;
    fs::File::options()
        .write(true)
        .open(template.memory_ranges())
        .unwrap()
        .set_len(4096)
        .unwrap();
    let error = error_of(&world, &template).await;
    assert!(matches!(error, VmmError::Snapshot { .. }), "{error:?}");
}

#[tokio::test]
async fn a_pager_that_cannot_be_started_is_named() {
    let mut world = World::new();
    let template = world.snapshot().await;
    let program = PathBuf::from("/nonexistent/pager");
    world.vmm = CloudHypervisor::new(world.file("cloud-hypervisor")).with_pager(PagerCommand {
        program: program.clone(),
        arguments: Vec::new(),
    });
    let error = error_of(&world, &template).await;
    assert!(
        matches!(&error, VmmError::Spawn { binary, .. } if *binary == program),
        "{error:?}"
    );
}

/// A VM that runs, whose memory is served, and which has not touched the pages from 8000 on.
async fn running(world: &World, template: &SnapshotDir) -> (InstanceDir, stencil_vmm::KillGuard, VmmProcess) {
    let dir = world.instance("fork");
    let process = world.spawn(&dir).await;
    world.restore(&dir, template, MemoryMode::Uffd).await.unwrap();
    let pager = the_pager(&dir);
    (dir, process, pager)
}

#[tokio::test]
async fn a_page_that_cannot_be_read_ends_its_vmm_and_says_why() {
    let world = World::with("cloud-hypervisor v53.0\n", "walk off\n");
    fs::write(world.file("touches"), "7 9000").unwrap();
    let template = snapshot_with(&world, [7, 9000]).await;
    let (dir, process, pager) = running(&world, &template).await;
    fs::File::options()
        .write(true)
        .open(template.memory_ranges())
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let resumed = process.during(world.vmm.resume(&dir)).await.unwrap_err();
    assert!(matches!(resumed, VmmError::Ended { .. }), "{resumed:?}");
    pager.exited().await;
    assert_snapshot!(
        world.vmm.last_words(&dir).unwrap(),
        @"the guest's memory is lost: the page at gpa 0x8000 cannot be read, at byte 32768 of the image: the file has 1048576 bytes, and its ranges need 67108864: it was cut"
    );
    let log = fs::read_to_string(dir.vmm_log()).unwrap();
    assert!(log.contains("the page at gpa 0x8000 cannot be read"), "{log}");
}

#[tokio::test]
async fn a_pager_that_is_killed_takes_its_vmm_with_it_and_that_is_told() {
    let world = World::with("cloud-hypervisor v53.0\n", "walk off\n");
    let template = world.snapshot().await;
    let (dir, process, pager) = running(&world, &template).await;
    kill_process(
        Pid::from_raw(pager.identity().pid.cast_signed()).unwrap(),
        Signal::KILL,
    )
    .unwrap();
    assert_eq!(process.exited().await, Exit::Signal(9));
    assert_snapshot!(world.vmm.last_words(&dir).unwrap(), @"its pager ended: killed by signal 9 (SIGKILL)");
    // The next VMM has nothing to do with it.
    let next = world.spawn(&dir).await;
    assert_eq!(world.vmm.last_words(&dir), None);
    world.vmm.stop(&dir, &next).await.unwrap();
}

#[test]
fn a_pager_that_is_killed_after_its_server_is_told_of_by_the_next_one() {
    let kill = |process: &ProcessIdentity| {
        let pid = Pid::from_raw(process.pid.cast_signed()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
    };
    // All that a server does ends with its runtime.
    let server = Runtime::new().unwrap();
    let world = World::with("cloud-hypervisor v53.0\n", "walk off\n");
    let (dir, vmm, pager) = server.block_on(async {
        let template = world.snapshot().await;
        let (dir, process, pager) = running(&world, &template).await;
        (dir, process.keep().identity().clone(), pager.identity().clone())
    });
    drop(server);
    Runtime::new().unwrap().block_on(async {
        let found = VmmProcess::attach(&vmm).unwrap().unwrap().kill_on_drop();
        let its_pager = VmmProcess::attach(&pager).unwrap().unwrap();
        assert_eq!(world.vmm.last_words(&dir), None, "it lives");
        kill(&pager);
        its_pager.exited().await;
        assert_snapshot!(world.vmm.last_words(&dir).unwrap(), @"its pager was killed");
        world.vmm.stop(&dir, &found).await.unwrap();
    });
}

#[tokio::test]
async fn a_request_that_is_none_for_a_page_ends_the_vmm_and_is_told() {
    let mut told = String::new();
    for fault in ["command", "payload", "foreign", "odd", "long"] {
        let world = World::with(
            "cloud-hypervisor v53.0\n",
            &format!("walk off\nPageFault {fault}\n"),
        );
        let template = world.snapshot().await;
        let (dir, process, pager) = running(&world, &template).await;
        process.during(world.vmm.resume(&dir)).await.unwrap_err();
        pager.exited().await;
        told += &format!("{fault}: {}\n", world.vmm.last_words(&dir).unwrap());
    }
    assert_snapshot!(told);
}
