//! The backend for Cloud Hypervisor against the fake one: the life of a VM, and what tests of it share.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use insta::assert_snapshot;
use stencil_core::{
    DiskFormat, DiskSpec, InstanceDir, MemoryMode, SnapshotDir, VmGeneration, VmPhase, VmSpec,
};
use stencil_vmm::{
    CloudHypervisor, HotPages, Hypervisor, KillGuard, PagerCommand, Restore, Restored, VmmError,
};
use tempfile::TempDir;

use crate::directory::{fixture, spawn};
use crate::fake::wait_until_ready;

const MIB: u64 = 1 << 20;
/// Which memory the snapshots hold.
pub(crate) const MEMORY: &str = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff";

/// A backend with a fake Cloud Hypervisor, and a place for instances.
pub(crate) struct World {
    root: TempDir,
    pub(crate) vmm: CloudHypervisor,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with("cloud-hypervisor v53.0\nMigration Protocol Versions: 1, 2\n", "")
    }

    pub(crate) fn with_fault(call: &str, fault: &str) -> Self {
        Self::with("cloud-hypervisor v53.0\n", &format!("{call} {fault}\n"))
    }

    /// With what `--version` prints, and with faults.
    pub(crate) fn with(version: &str, faults: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let binary = root.path().join("cloud-hypervisor");
        // The script finds what is beside its own name.
        symlink(fixture("vmms/cloud-hypervisor"), &binary).unwrap();
        symlink(std::env::current_exe().unwrap(), root.path().join("program")).unwrap();
        fs::write(root.path().join("version"), version).unwrap();
        fs::write(root.path().join("faults"), faults).unwrap();
        symlink(fixture("vmms/pager"), root.path().join("pager")).unwrap();
        let pager = PagerCommand {
            program: root.path().join("pager"),
            arguments: Vec::new(),
        };
        Self {
            root,
            vmm: CloudHypervisor::new(binary).with_pager(pager),
        }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The directory of a new instance.
    pub(crate) fn instance(&self, name: &str) -> InstanceDir {
        let dir = InstanceDir::new(self.root.path().join(name));
        fs::create_dir(dir.path()).unwrap();
        dir
    }

    /// Starts a VMM, which does not outlive the test.
    pub(crate) async fn spawn(&self, dir: &InstanceDir) -> KillGuard {
        let process = spawn(&self.vmm, dir).await.unwrap().kill_on_drop();
        wait_until_ready(&dir.vmm_socket());
        process
    }

    /// An instance with a running VM.
    pub(crate) async fn running(&self, name: &str) -> (InstanceDir, KillGuard) {
        let dir = self.instance(name);
        let process = self.spawn(&dir).await;
        self.vmm
            .create(&dir, &spec(), &VmGeneration::random())
            .await
            .unwrap();
        self.vmm.boot(&dir).await.unwrap();
        (dir, process)
    }

    /// The snapshot of an instance that was resumed once and ended.
    pub(crate) async fn snapshot(&self) -> SnapshotDir {
        let (dir, process) = self.running("template").await;
        self.vmm.pause(&dir).await.unwrap();
        self.vmm.resume(&dir).await.unwrap();
        self.vmm.pause(&dir).await.unwrap();
        fs::create_dir(dir.snapshot().path()).unwrap();
        self.vmm.snapshot(&dir, &dir.snapshot()).await.unwrap();
        self.vmm.stop(&dir, &process).await.unwrap();
        dir.snapshot()
    }

    pub(crate) async fn restore(
        &self,
        dir: &InstanceDir,
        snapshot: &SnapshotDir,
        memory_mode: MemoryMode,
    ) -> Result<Restored, VmmError> {
        self.restore_with(dir, snapshot, memory_mode, HotPages::Unused)
            .await
    }

    pub(crate) async fn restore_with(
        &self,
        dir: &InstanceDir,
        snapshot: &SnapshotDir,
        memory_mode: MemoryMode,
        hot_pages: HotPages<'_>,
    ) -> Result<Restored, VmmError> {
        let restore = Restore {
            snapshot,
            memory_mode,
            generation: &VmGeneration::random(),
            memory_generation: &MEMORY.parse().unwrap(),
            hot_pages,
        };
        self.vmm.restore(dir, &restore).await
    }

    pub(crate) async fn phase(&self, dir: &InstanceDir) -> VmPhase {
        self.vmm.info(dir).await.unwrap().phase
    }

    /// The requests that the fake was sent, the place of this world left out.
    pub(crate) fn requests(&self, dir: &InstanceDir) -> String {
        let log = fs::read_to_string(dir.vmm_log()).unwrap();
        log.replace(self.root.path().to_str().unwrap(), "[root]")
    }
}

pub(crate) fn spec() -> VmSpec {
    let kernel = "/boot/guest.elf".into();
    let mut spec = VmSpec::new("cloud-hypervisor".parse().unwrap(), kernel, 2, 64 * MIB);
    spec.initrd = Some("/boot/initrd.img".into());
    spec.cmdline = "console=ttyS0 quiet".to_owned();
    spec
}

pub(crate) fn printed(dir: &InstanceDir) -> String {
    fs::read_to_string(dir.console_log()).unwrap()
}

#[tokio::test]
async fn a_vm_lives_from_create_to_shutdown() {
    let world = World::new();
    let dir = world.instance("vm");
    let process = world.spawn(&dir).await;
    assert_eq!(world.phase(&dir).await, VmPhase::Undefined);
    world
        .vmm
        .create(&dir, &spec(), &VmGeneration::random())
        .await
        .unwrap();
    assert_eq!(world.phase(&dir).await, VmPhase::Created);
    world.vmm.boot(&dir).await.unwrap();
    assert_eq!(world.phase(&dir).await, VmPhase::Running);
    world.vmm.pause(&dir).await.unwrap();
    assert_eq!(world.phase(&dir).await, VmPhase::Paused);
    world.vmm.resume(&dir).await.unwrap();
    assert_eq!(world.phase(&dir).await, VmPhase::Running);
    let exit = world.vmm.stop(&dir, &process).await.unwrap();
    assert_eq!(exit.to_string(), "exit code 0", "it ended because it was asked");
    assert!(!dir.vmm_socket().exists());
    assert_eq!(printed(&dir), "booted\nresumed 1 in new memory\n");
    assert_snapshot!(world.requests(&dir));
}

#[tokio::test]
async fn disks_that_the_guest_writes_are_the_instance_s_own_and_no_format_is_guessed() {
    let world = World::new();
    let dir = world.instance("vm");
    let _process = world.spawn(&dir).await;
    let disk = |path: &str, format, read_only| DiskSpec {
        path: path.into(),
        format,
        bytes: None,
        read_only,
    };
    let spec = VmSpec {
        disks: vec![
            disk("/images/root.raw", DiskFormat::Raw, false),
            disk("/images/tools.raw", DiskFormat::Raw, true),
            disk("/images/data.qcow2", DiskFormat::Qcow2, true),
        ],
        ..spec()
    };
    world
        .vmm
        .create(&dir, &spec, &VmGeneration::random())
        .await
        .unwrap();
    assert_snapshot!(world.requests(&dir));
}

#[tokio::test]
async fn firmware_is_started_instead_of_a_kernel() {
    let world = World::new();
    let dir = world.instance("vm");
    let _process = world.spawn(&dir).await;
    let mut spec = spec();
    (spec.kernel, spec.initrd) = (None, None);
    spec.cmdline.clear();
    spec.firmware = Some("/boot/firmware.fd".into());
    world
        .vmm
        .create(&dir, &spec, &VmGeneration::random())
        .await
        .unwrap();
    let requests = world.requests(&dir);
    assert!(
        requests.contains(r#""payload":{"firmware":"/boot/firmware.fd"}"#),
        "{requests}"
    );
}

/// The names in an instance's directory.
pub(crate) fn left_in(dir: &InstanceDir) -> Vec<String> {
    let entries = fs::read_dir(dir.path()).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn it_runs_in_a_session_of_its_own_and_in_its_instance_s_directory() {
    let world = World::new();
    let dir = world.instance("vm");
    let process = world.spawn(&dir).await;
    let pid = process.identity().pid;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Counted from the name, which is in parentheses: state, parent, process group, session.
    let session = stat.rsplit(')').next().unwrap().split(' ').nth(4);
    assert_eq!(session, Some(pid.to_string().as_str()));
    let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    assert_eq!(cwd, fs::canonicalize(dir.path()).unwrap());
    let strays = stencil_vmm::stray_processes(dir.path()).unwrap();
    let identities: Vec<_> = strays.iter().map(|stray| &stray.identity).collect();
    assert_eq!(
        identities,
        [process.identity()],
        "a server that was killed finds it"
    );
}

#[tokio::test]
async fn a_lock_and_a_socket_that_a_killed_vmm_left_are_no_obstacle() {
    let world = World::new();
    let dir = world.instance("vm");
    for socket in [dir.vmm_socket(), dir.vsock_socket()] {
        drop(std::os::unix::net::UnixListener::bind(socket).unwrap());
    }
    fs::write(dir.path().join("vmm.sock.lock"), "").unwrap();
    let _process = world.spawn(&dir).await;
    assert_eq!(world.phase(&dir).await, VmPhase::Undefined);
    world
        .vmm
        .create(&dir, &spec(), &VmGeneration::random())
        .await
        .unwrap();
    world.vmm.boot(&dir).await.unwrap();
}

#[tokio::test]
async fn what_a_killed_server_left_of_a_restore_is_no_obstacle() {
    let world = World::new();
    let template = world.snapshot().await;
    let dir = world.instance("fork");
    fs::create_dir(dir.path().join("restoring")).unwrap();
    fs::write(dir.path().join("restoring/memory-ranges"), "cut off").unwrap();
    let _process = world.spawn(&dir).await;
    world.restore(&dir, &template, MemoryMode::Copy).await.unwrap();
    assert!(!dir.path().join("restoring").exists());
}

#[tokio::test]
async fn it_counts_no_pages() {
    let world = World::new();
    let dir = world.instance("vm");
    assert!(world.vmm.page_counters(&dir).await.unwrap().is_empty());
}
