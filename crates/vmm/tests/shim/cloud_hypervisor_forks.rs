//! The backend for Cloud Hypervisor against the fake one: VMs that go on from a snapshot, in each memory mode.

use std::fs;

use insta::assert_snapshot;
use stencil_core::{InstanceDir, MemoryMode, SnapshotDir, VmPhase};
use stencil_uffd::{Gpa, Mark};
use stencil_vmm::{CloudHypervisor, HotPages, Hypervisor, Restored};

use crate::cloud_hypervisor::{MEMORY, World, left_in, printed};

#[tokio::test]
async fn forks_go_on_from_the_snapshot_in_each_memory_mode_and_leave_it_as_it_is() {
    let world = World::new();
    let template = world.snapshot().await;
    let before = fs::read(template.memory_ranges()).unwrap();
    for (name, mode, line) in [
        ("fork-1", MemoryMode::Cow, "resumed 2 in mapped memory\n"),
        ("fork-2", MemoryMode::Cow, "resumed 2 in mapped memory\n"),
        ("fork-3", MemoryMode::Copy, "resumed 2 in copied memory\n"),
        ("fork-4", MemoryMode::OnDemand, "resumed 2 in lazy memory\n"),
    ] {
        let dir = world.instance(name);
        let process = world.spawn(&dir).await;
        let restored = world.restore(&dir, &template, mode).await.unwrap();
        assert_eq!(restored, Restored::as_asked(mode));
        assert_eq!(world.phase(&dir).await, VmPhase::Paused);
        assert_eq!(
            left_in(&dir),
            ["console.log", "console.tty", "vmm.log", "vmm.sock", "vsock.sock"]
        );
        world.vmm.resume(&dir).await.unwrap();
        assert_eq!(printed(&dir), line);
        world.vmm.stop(&dir, &process).await.unwrap();
    }
    assert!(fs::read(template.memory_ranges()).unwrap() == before);
    assert_snapshot!(world.requests(&InstanceDir::new(world.file("fork-1"))));
}

#[tokio::test]
async fn a_fork_s_own_snapshot_can_be_restored_in_both_memory_modes() {
    let world = World::new();
    let template = world.snapshot().await;
    let dir = world.instance("fork");
    let mut source = template;
    for (mode, line) in [
        (MemoryMode::Cow, "resumed 2 in mapped memory"),
        (MemoryMode::Copy, "resumed 3 in copied memory"),
        (MemoryMode::Cow, "resumed 4 in mapped memory"),
    ] {
        let process = world.spawn(&dir).await;
        world.restore(&dir, &source, mode).await.unwrap();
        world.vmm.resume(&dir).await.unwrap();
        assert_eq!(printed(&dir).lines().last(), Some(line));
        world.vmm.pause(&dir).await.unwrap();
        source = SnapshotDir::new(dir.path().join(format!("after {line}")));
        fs::create_dir(source.path()).unwrap();
        world.vmm.snapshot(&dir, &source).await.unwrap();
        world.vmm.stop(&dir, &process).await.unwrap();
    }
    // What a guest printed is kept, whichever VMM it was that ran it.
    assert_eq!(printed(&dir).lines().count(), 3);
}

#[tokio::test]
async fn a_snapshot_waits_until_lazy_memory_is_there() {
    let world = World::new();
    let template = world.snapshot().await;
    let dir = world.instance("fork");
    let _process = world.spawn(&dir).await;
    world
        .restore(&dir, &template, MemoryMode::OnDemand)
        .await
        .unwrap();
    fs::create_dir(dir.snapshot().path()).unwrap();
    world.vmm.snapshot(&dir, &dir.snapshot()).await.unwrap();
    let asked = world.requests(&dir).matches("vm.snapshot").count();
    assert_eq!(asked, 4, "the fake refuses three times");
    assert!(dir.snapshot().state().exists());
}

#[tokio::test]
async fn a_memory_mode_that_its_release_does_not_have_is_refused() {
    use MemoryMode::{Copy, Cow, OnDemand, Uffd};
    for (version, modes) in [
        ("51.0", vec![Copy, Cow]),
        ("52.0", vec![Copy, Cow, OnDemand]),
        ("53.0", vec![Copy, Cow, Uffd, OnDemand]),
    ] {
        let world = World::with(&format!("cloud-hypervisor v{version}\n"), "");
        world.vmm.version().await.unwrap();
        assert_eq!(world.vmm.capabilities().memory_modes, modes, "{version}");
    }
}

#[tokio::test]
async fn a_list_of_hot_pages_never_costs_a_fork() {
    let world = World::new();
    let template = world.snapshot().await;
    let touched = [0, 0x5000].map(|gpa| (Gpa::new(gpa), Mark::Read));
    for (name, memory) in [("ours", MEMORY), ("others", "00000000000000000000000000000000")] {
        let list = world.file(name).with_extension("hot");
        stencil_uffd::HotPages::from_touches(memory.parse().unwrap(), touched)
            .save(&list)
            .unwrap();
        let dir = world.instance(name);
        let _process = world.spawn(&dir).await;
        let hot_pages = HotPages::Prefetch(&list);
        let restored = world
            .restore_with(&dir, &template, MemoryMode::Cow, hot_pages)
            .await;
        assert_eq!(restored.unwrap(), Restored::as_asked(MemoryMode::Cow));
        world.vmm.resume(&dir).await.unwrap();
        assert_eq!(printed(&dir), "resumed 2 in mapped memory\n");
    }
}

#[tokio::test]
async fn a_vm_whose_memory_cannot_be_mapped_is_copied_and_the_reason_told() {
    let world = World::new();
    let template = world.snapshot().await;
    let config = fs::read_to_string(template.config()).unwrap();
    fs::write(
        template.config(),
        config.replace("\"cpus\"", "\"balloon\":{\"size\":0},\"cpus\""),
    )
    .unwrap();
    let dir = world.instance("fork");
    let _process = world.spawn(&dir).await;
    let restored = world.restore(&dir, &template, MemoryMode::Cow).await.unwrap();
    assert_eq!(restored.memory_mode, MemoryMode::Copy);
    assert_snapshot!(restored.reason.unwrap(), @"the memory could not be mapped: the VM has a balloon");
    world.vmm.resume(&dir).await.unwrap();
    assert_eq!(printed(&dir), "resumed 2 in copied memory\n");
}

#[tokio::test]
async fn memory_that_nobody_serves_is_refused() {
    let mut world = World::new();
    let template = world.snapshot().await;
    world.vmm = CloudHypervisor::new(world.file("cloud-hypervisor"));
    let dir = world.instance("fork");
    let _process = world.spawn(&dir).await;
    let error = world
        .restore(&dir, &template, MemoryMode::Uffd)
        .await
        .unwrap_err();
    assert_snapshot!(error, @"cloud-hypervisor has no memory mode uffd; ask for another one");
    assert_eq!(world.phase(&dir).await, VmPhase::Undefined);
}
