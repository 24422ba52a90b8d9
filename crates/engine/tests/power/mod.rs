//! What a power loss or a crash amid a standby of a VM with disks leaves, and what is on the disk when an answer comes.

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use stencil_core::rules::Refusal;
use stencil_core::{InstanceDir, SnapshotDir, State};
use stencil_engine::{EngineError, ForkRequest};

use crate::disks::leave_open;
use crate::scripted::House;

/// A standby that was interrupted after the VMM was told to end and before it did. What is on disk is as after a crash of the
/// server there.
async fn interrupted(house: &House) -> SnapshotDir {
    house.with_disk("web").await;
    house.write("web", 0, b"with ram").await;
    house.hypervisor.fail("stop");
    house.engine.standby("web").await.unwrap_err();
    house.hypervisor.fail("nothing");
    house.dir("web").await.snapshot()
}

fn prepared(snapshot: &SnapshotDir) -> PathBuf {
    let mut paths = fs::read_dir(snapshot.path())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let is_prepared = |path: &PathBuf| path.display().to_string().contains("/manifest.prepared-");
    paths.find(is_prepared).unwrap()
}

async fn state(house: &House) -> State {
    house.engine.get("web").await.unwrap().state
}

#[tokio::test]
async fn a_snapshot_with_disks_exists_when_its_vmm_has_closed_them_and_not_before() {
    let house = House::new().await;
    house.with_disk("web").await;
    let snapshots = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&snapshots);
    house.hypervisor.as_it_ends(move |dir: &InstanceDir| {
        seen.lock().unwrap().push(dir.snapshot().manifest().exists());
        let mut disk = fs::File::options().append(true).open(dir.disk(0)).unwrap();
        disk.write_all(&[0; 1 << 16]).unwrap();
    });
    house.engine.standby("web").await.unwrap();
    assert_eq!(*snapshots.lock().unwrap(), [false]);
    assert_eq!(unsynced(&house.dir("web").await.disk(0)).unwrap_or(0), 0);
    house.engine.restore("web").await.unwrap();
    assert_eq!(state(&house).await, State::Running);
}

#[tokio::test]
async fn a_standby_that_a_crash_interrupted_while_its_vmm_ended_is_ended_by_the_next_server() {
    let house = House::new().await;
    interrupted(&house).await;
    // Meanwhile nothing can be done that would lose the memory.
    let web = house.engine.get("web").await.unwrap();
    assert_eq!(web.state, State::Unknown);
    let why = web.state_error.unwrap();
    assert!(why.contains("start the server anew, which ends it"), "{why}");
    assert!(matches!(
        house.engine.start("web").await,
        Err(EngineError::Refused(Refusal::InvalidState { .. }))
    ));
    let house = house.restart().await;
    assert_eq!(house.processes(), [] as [u32; 0]);
    assert_eq!(state(&house).await, State::Standby);
    house.engine.restore("web").await.unwrap();
    assert_eq!(&house.read("web", 0).await, b"with ram");
}

#[tokio::test]
async fn a_standby_that_a_power_loss_interrupted_leaves_the_disk_and_no_snapshot() {
    let house = House::new().await;
    let snapshot = interrupted(&house).await;
    let of_this_boot = prepared(&snapshot);
    let of_another = snapshot
        .path()
        .join("manifest.prepared-00000000-0000-4000-8000-000000000000");
    let house = house
        .restart_after(|| fs::rename(of_this_boot, of_another).unwrap())
        .await;
    assert_eq!(state(&house).await, State::Stopped);
    house.engine.start("web").await.unwrap();
    assert_eq!(&house.read("web", 0).await, b"with ram");
    // What it left is not in the way of the next one.
    house.engine.standby("web").await.unwrap();
    house.engine.restore("web").await.unwrap();
}

#[tokio::test]
async fn a_disk_that_an_interrupted_standby_left_open_costs_the_snapshot_and_no_more() {
    let house = House::new().await;
    interrupted(&house).await;
    let disk = house.dir("web").await.disk(0);
    let house = house.restart_after(|| leave_open(&disk)).await;
    assert_eq!(state(&house).await, State::Stopped);
    house.engine.start("web").await.unwrap();
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_put_in_place_is_kept_for_the_next_server() {
    let house = House::new().await;
    house.with_disk("web").await;
    house.write("web", 0, b"with ram").await;
    let in_the_way = house.dir("web").await.snapshot().manifest();
    let path = in_the_way.clone();
    house
        .hypervisor
        .as_it_ends(move |_| fs::create_dir_all(path.join("full")).unwrap());
    let failed = house.engine.standby("web").await.unwrap_err();
    assert!(matches!(failed, EngineError::Store(_)), "{failed:?}");
    assert_eq!(state(&house).await, State::Unknown);
    let house = house
        .restart_after(|| fs::remove_dir_all(in_the_way).unwrap())
        .await;
    assert_eq!(state(&house).await, State::Standby);
    house.engine.restore("web").await.unwrap();
    assert_eq!(&house.read("web", 0).await, b"with ram");
}

#[tokio::test]
async fn a_vm_that_runs_on_does_not_get_a_snapshot_that_was_prepared_before() {
    let house = House::new().await;
    house.with_disk("web").await;
    // As after a crash between the preparing of the snapshot and the end of its VMM.
    let snapshot = house.dir("web").await.snapshot();
    house.engine.pause("web").await.unwrap();
    let web = house.engine.get("web").await.unwrap();
    fs::create_dir(snapshot.path()).unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let prepared = snapshot.path().join(format!("manifest.prepared-{}", boot.trim()));
    fs::write(&prepared, "{}").unwrap();
    let house = house.restart().await;
    assert_eq!(state(&house).await, State::Paused);
    house.engine.resume("web").await.unwrap();
    assert!(!prepared.exists());
    crate::kill(web.metadata.unwrap().vmm.unwrap().process.pid);
    let house = house.restart().await;
    assert_eq!(state(&house).await, State::Stopped);
}

#[tokio::test]
async fn layers_survive_a_power_loss_where_their_instance_s_record_does() {
    let house = House::new().await;
    let unsynced_layers = async |name: &str| {
        let dir = house.dir(name).await;
        let layers = house.layers(name).await;
        layers
            .iter()
            .map(|layer| unsynced(&dir.path().join(layer)).unwrap_or(0))
            .collect::<Vec<_>>()
    };
    house.with_disk("web").await;
    assert_eq!(unsynced_layers("web").await, [0], "made at create");
    house.write("web", 0, b"unsynced").await;
    house.engine.stop("web").await.unwrap();
    let at_rest = ForkRequest {
        target_state: Some(State::Stopped),
        ..ForkRequest::default()
    };
    house.engine.fork("web", None, at_rest).await.unwrap();
    assert_eq!(unsynced_layers("web-1").await, [0, 0], "of a fork at rest");
    // The source must not write what its fork has: it gets a layer.
    house.engine.start("web").await.unwrap();
    assert_eq!(unsynced_layers("web").await, [0, 0], "made when it is brought up");
}

/// How many pages of a file are in memory only, where the kernel and the file system of this host tell.
fn unsynced(path: &Path) -> Option<u64> {
    let mut probe = tempfile::NamedTempFile::new().unwrap();
    probe.write_all(&[1; 8192]).unwrap();
    let before = cachestat(probe.as_file())?;
    probe.as_file().sync_all().unwrap();
    if (before, cachestat(probe.as_file())?) != (2, 0) {
        return None;
    }
    cachestat(&fs::File::open(path).unwrap())
}

/// Pages of a file that are dirty or being written; `None` before Linux 6.5 (cachestat(2)).
fn cachestat(file: &fs::File) -> Option<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    let whole = [0_u64; 2];
    let mut found = [0_u64; 5];
    // SAFETY: the call reads a `struct cachestat_range` of two numbers, and writes a `struct cachestat` of five; both live longer
    // than it, and the descriptor is open.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            whole.as_ptr(),
            found.as_mut_ptr(),
            0,
        )
    };
    let [_cached, dirty, being_written, ..] = found;
    (result == 0).then_some(dirty + being_written)
}
