//! A hypervisor for tests that does what it is told, so that any step of an operation can fail. Its VMMs are real
//! processes without a VM: what the engine does with processes, files and locks is real.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use stencil_core::{
    HypervisorName, InstanceDir, MemoryMode, ProcessIdentity, Readiness, SnapshotDir, VmGeneration, VmPhase,
    VmSpec,
};
use stencil_engine::{Config, CreateRequest, Engine};
use stencil_vmm::{
    Accelerator, Capabilities, Exit, HotPages, Hypervisor, PageCounters, Restore, Restored, Start, VmStatus,
    VmmError, VmmProcess, stray_processes,
};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};

use crate::disk::Disk;

type AsItEnds = Box<dyn FnMut(&InstanceDir) + Send>;

#[derive(Default)]
pub(crate) struct Scripted {
    phases: Mutex<HashMap<OsString, VmPhase>>,
    failing: Mutex<Option<(&'static str, u32)>>,
    /// How many next calls of `resume` are never answered.
    deaf: AtomicU32,
    tells_nothing: AtomicBool,
    maps_nothing: AtomicBool,
    emulates: AtomicBool,
    log: Mutex<Vec<String>>,
    restored: Mutex<Vec<VmGeneration>>,
    recording: Mutex<HashSet<OsString>>,
    version: Mutex<Option<&'static str>>,
    /// What was on disk when a VM was booted last.
    pub(crate) record_at_boot: Mutex<String>,
    /// Tells that a VMM has said how its VM is.
    pub(crate) asked: Notify,
    /// Where the guest's ends of streams to agents go; without, guests have no port for one.
    guests: Mutex<Option<mpsc::UnboundedSender<UnixStream>>>,
    /// What a VMM still does when it is to end.
    as_it_ends: Mutex<Option<AsItEnds>>,
}

impl fmt::Debug for Scripted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scripted")
    }
}

impl Scripted {
    /// What each VMM does from now on when it is to end.
    pub(crate) fn as_it_ends(&self, does: impl FnMut(&InstanceDir) + Send + 'static) {
        *self.as_it_ends.lock().unwrap() = Some(Box::new(does));
    }

    /// The next calls of this name fail.
    pub(crate) fn fail(&self, call: &'static str) {
        self.fail_times(call, u32::MAX);
    }

    /// So many next calls of this name fail.
    pub(crate) fn fail_times(&self, call: &'static str, times: u32) {
        *self.failing.lock().unwrap() = Some((call, times));
    }

    /// The calls that were made, such as `restore`, in order.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// What restores did about hot pages, in order.
    pub(crate) fn hot_pages(&self) -> Vec<String> {
        let about_hot_pages = ["without hot pages", "prefetching", "recording"];
        self.calls()
            .into_iter()
            .filter(|call| about_hot_pages.contains(&call.as_str()))
            .collect()
    }

    /// As which machines VMs were restored, in order.
    pub(crate) fn restored(&self) -> Vec<VmGeneration> {
        self.restored.lock().unwrap().clone()
    }

    /// The binary is replaced by one of this version.
    pub(crate) fn update(&self, version: &'static str) {
        *self.version.lock().unwrap() = Some(version);
    }

    /// From now on it cannot tell a guest that it is a fork.
    pub(crate) fn tell_no_identity(&self) {
        self.tells_nothing.store(true, Ordering::SeqCst);
    }

    /// From now on it copies memory that it is asked to map.
    pub(crate) fn map_nothing(&self) {
        self.maps_nothing.store(true, Ordering::SeqCst);
    }

    /// All guests go down, of which nobody hears who does not ask.
    pub(crate) fn guests_go_down(&self) {
        let mut phases = self.phases.lock().unwrap();
        phases.values_mut().for_each(|phase| *phase = VmPhase::Shutdown);
    }

    /// From now on its guests are emulated, and it serves no memory.
    pub(crate) fn emulate(&self) {
        self.emulates.store(true, Ordering::SeqCst);
    }

    /// The next VMM that is to resume does not answer.
    pub(crate) fn do_not_answer_once(&self) {
        self.deaf.store(1, Ordering::SeqCst);
    }

    /// From now on guests have a port for an agent; the guest's end of each connection comes out here.
    pub(crate) fn give_agent_ports(&self) -> mpsc::UnboundedReceiver<UnixStream> {
        let (sender, guests) = mpsc::unbounded_channel();
        *self.guests.lock().unwrap() = Some(sender);
        guests
    }

    fn call(&self, call: &'static str) -> Result<(), VmmError> {
        self.log.lock().unwrap().push(call.to_owned());
        match &mut *self.failing.lock().unwrap() {
            Some((failing, times)) if *failing == call && *times > 0 => {
                *times -= 1;
                Err(VmmError::PathNotUtf8 {
                    path: PathBuf::from(call),
                })
            }
            _ => Ok(()),
        }
    }

    /// The guests of all VMs power themselves off.
    pub(crate) fn power_guests_off(&self) {
        let mut phases = self.phases.lock().unwrap();
        phases.values_mut().for_each(|phase| *phase = VmPhase::Shutdown);
    }

    fn set(&self, dir: &InstanceDir, phase: VmPhase) {
        self.phases.lock().unwrap().insert(key(dir), phase);
    }
}

/// The instance's id, also while its directory has the name of an instance that is being made.
fn key(dir: &InstanceDir) -> OsString {
    let name = dir.path().file_name().unwrap().to_str().unwrap();
    name.trim_start_matches(".new-")
        .trim_start_matches(".del-")
        .into()
}

#[async_trait]
impl Hypervisor for Scripted {
    fn name(&self) -> HypervisorName {
        "scripted".parse().unwrap()
    }

    fn capabilities(&self) -> Capabilities {
        let memory_modes = if self.emulates.load(Ordering::SeqCst) {
            vec![MemoryMode::Cow]
        } else {
            vec![MemoryMode::Cow, MemoryMode::Uffd]
        };
        Capabilities {
            memory_modes,
            max_vcpus: 4,
            host_cpu: true,
            firmware: true,
            console_input: false,
            tells_identity: !self.tells_nothing.load(Ordering::SeqCst),
            max_disk_layers: 4,
            agent: self.guests.lock().unwrap().is_some(),
            outlives_guest: true,
        }
    }

    async fn version(&self) -> Result<String, VmmError> {
        Ok(self.version.lock().unwrap().unwrap_or("1.0.0").to_owned())
    }

    async fn spawn(&self, dir: &InstanceDir, _: Start<'_>) -> Result<VmmProcess, VmmError> {
        self.call("spawn")?;
        let identity = identity(idle_vmm(dir.path()).id());
        self.set(dir, VmPhase::Undefined);
        Ok(VmmProcess::attach(&identity).unwrap().unwrap())
    }

    async fn create(&self, dir: &InstanceDir, _: &VmSpec, _: &VmGeneration) -> Result<(), VmmError> {
        self.call("create")?;
        self.set(dir, VmPhase::Created);
        Ok(())
    }

    async fn boot(&self, dir: &InstanceDir) -> Result<(), VmmError> {
        self.call("boot")?;
        let record = fs::read_to_string(dir.metadata()).unwrap();
        *self.record_at_boot.lock().unwrap() = record;
        self.set(dir, VmPhase::Running);
        Ok(())
    }

    async fn pause(&self, dir: &InstanceDir) -> Result<(), VmmError> {
        self.call("pause")?;
        self.set(dir, VmPhase::Paused);
        Ok(())
    }

    async fn resume(&self, dir: &InstanceDir) -> Result<(), VmmError> {
        self.call("resume")?;
        if self.deaf.swap(0, Ordering::SeqCst) > 0 {
            std::future::pending::<()>().await;
        }
        self.set(dir, VmPhase::Running);
        Ok(())
    }

    async fn snapshot(&self, _: &InstanceDir, destination: &SnapshotDir) -> Result<(), VmmError> {
        fs::write(destination.config(), "{}").unwrap();
        self.call("snapshot")?;
        fs::write(destination.state(), "{}").unwrap();
        fs::write(destination.memory_ranges(), vec![0; 8192]).unwrap();
        Ok(())
    }

    async fn restore(&self, dir: &InstanceDir, request: &Restore<'_>) -> Result<Restored, VmmError> {
        self.call("restore")?;
        self.restored.lock().unwrap().push(*request.generation);
        self.log.lock().unwrap().push(match request.hot_pages {
            HotPages::Unused => "without hot pages".to_owned(),
            HotPages::Prefetch(_) => "prefetching".to_owned(),
            HotPages::Record => "recording".to_owned(),
        });
        if matches!(request.hot_pages, HotPages::Record) {
            assert_eq!(request.memory_mode, MemoryMode::Uffd);
            self.call("record")?;
            self.recording.lock().unwrap().insert(key(dir));
        }
        assert_eq!(fs::read(request.snapshot.memory_ranges()).unwrap().len(), 8192);
        self.set(dir, VmPhase::Paused);
        let mut restored = Restored::as_asked(request.memory_mode);
        if request.memory_mode == MemoryMode::Cow && self.maps_nothing.load(Ordering::SeqCst) {
            restored = Restored {
                memory_mode: MemoryMode::Copy,
                reason: Some("it maps nothing".to_owned()),
            };
        }
        Ok(restored)
    }

    async fn info(&self, dir: &InstanceDir) -> Result<VmStatus, VmmError> {
        let phase = self
            .phases
            .lock()
            .unwrap()
            .get(&key(dir))
            .copied()
            .unwrap_or(VmPhase::Undefined);
        self.asked.notify_waiters();
        Ok(VmStatus { phase, end: None })
    }

    async fn console_input(&self, _: &InstanceDir, _: &VmmProcess, _: &[u8]) -> Result<(), VmmError> {
        unreachable!("it takes none");
    }

    async fn page_counters(&self, dir: &InstanceDir) -> Result<PageCounters, VmmError> {
        let recording = self.recording.lock().unwrap().contains(&key(dir));
        Ok([("recording".to_owned(), u64::from(recording))].into())
    }

    async fn connect_agent(&self, _: &InstanceDir) -> Result<UnixStream, VmmError> {
        let guests = self.guests.lock().unwrap();
        let guests = guests
            .as_ref()
            .ok_or_else(|| VmmError::NoAgentPort { name: self.name() })?;
        let (host, guest) = UnixStream::pair().unwrap();
        // A test that is over has no guests any more.
        let _ = guests.send(guest);
        Ok(host)
    }

    fn accelerator(&self, _: &InstanceDir) -> Option<Accelerator> {
        self.emulates.load(Ordering::SeqCst).then_some(Accelerator::Tcg)
    }

    fn last_words(&self, _dir: &InstanceDir) -> Option<String> {
        None
    }

    async fn press_power_button(&self, dir: &InstanceDir) -> Result<bool, VmmError> {
        self.call("press the power button")?;
        self.set(dir, VmPhase::Shutdown);
        Ok(true)
    }

    async fn stop(&self, dir: &InstanceDir, process: &VmmProcess) -> Result<Exit, VmmError> {
        self.call("stop")?;
        if let Some(does) = &mut *self.as_it_ends.lock().unwrap() {
            does(dir);
        }
        Ok(process.terminate().await?)
    }
}

/// An idle process that looks like a VMM to the sweep: its command line has `--api-socket`.
fn idle_vmm(dir: &Path) -> Child {
    // As a zombie it counts as gone, and goes with the test.
    Command::new("tail")
        .args(["-f", "/dev/null", "--", "--api-socket"])
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn identity(pid: u32) -> ProcessIdentity {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = &stat[stat.rfind(')').unwrap() + 2..];
    ProcessIdentity {
        pid,
        // Field 22; field 3 comes first after the name (proc_pid_stat(5)).
        start_time: after_name.split(' ').nth(22 - 3).unwrap().parse().unwrap(),
        boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .unwrap()
            .trim()
            .to_owned(),
    }
}

/// A data directory with an engine on it; when it goes, its VMMs go too.
pub(crate) struct House {
    pub(crate) engine: Engine,
    pub(crate) hypervisor: Arc<Scripted>,
    _vmms: Vmms,
    pub(crate) data: TempDir,
}

impl House {
    pub(crate) async fn new() -> Self {
        Self::with(tempfile::tempdir().unwrap()).await
    }

    /// One whose data directory is on this disk.
    pub(crate) async fn on(disk: &Disk) -> Self {
        Self::with(tempfile::tempdir_in(disk.path()).unwrap()).await
    }

    async fn with(data: TempDir) -> Self {
        let hypervisor = Arc::new(Scripted::default());
        let engine = open(&data, &hypervisor).await;
        Self {
            engine,
            hypervisor,
            _vmms: Vmms(data.path().to_owned()),
            data,
        }
    }

    /// The server dies and another one starts: nothing is kept but what is on disk and the VMMs.
    pub(crate) async fn restart(self) -> Self {
        self.restart_after(|| ()).await
    }

    /// The same, and something happens while no server is there.
    pub(crate) async fn restart_after(self, meanwhile: impl FnOnce()) -> Self {
        drop(self.engine);
        meanwhile();
        let engine = open(&self.data, &self.hypervisor).await;
        Self { engine, ..self }
    }

    /// The server dies and another one starts, which does not offer the hypervisor.
    pub(crate) async fn restart_without_hypervisor(self) -> Self {
        drop(self.engine);
        let engine = open_with(&self.data, Vec::new()).await;
        Self { engine, ..self }
    }

    /// An instance that is called `name` and runs.
    pub(crate) async fn running(&self, name: &str) {
        self.engine.create(self.request(name)).await.unwrap();
    }

    /// An instance that is called `name` and is a template.
    pub(crate) async fn template(&self, name: &str) {
        self.running(name).await;
        self.engine.standby(name).await.unwrap();
        self.engine.promote(name, None).await.unwrap();
    }

    pub(crate) fn request(&self, name: &str) -> CreateRequest {
        let kernel = self.data.path().join("kernel.elf");
        fs::write(&kernel, include_bytes!("../../../../fixtures/pvh-note.elf")).unwrap();
        CreateRequest {
            name: Some(name.parse().unwrap()),
            hypervisor: "scripted".parse().unwrap(),
            kernel: Some(kernel),
            firmware: None,
            image: None,
            initrd: None,
            cmdline: None,
            disks: Vec::new(),
            vcpus: 1,
            memory_bytes: 16 << 20,
            readiness: Readiness::None,
            labels: Default::default(),
            start: true,
        }
    }

    /// A VMM in the directory of a fork that is not named yet, as a killed server leaves one; its process id.
    pub(crate) fn abandon_armed_fork(&self) -> u32 {
        let dir = self.data.path().join("instances/.new-01k9z0c8mn0000000000000009");
        fs::create_dir(&dir).unwrap();
        idle_vmm(&dir).id()
    }

    /// Names of what lies among the instances.
    pub(crate) fn directories(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.data.path().join("instances"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Process ids of all VMMs of this data directory.
    pub(crate) fn processes(&self) -> Vec<u32> {
        stray_processes(self.data.path())
            .unwrap()
            .into_iter()
            .map(|process| process.identity.pid)
            .collect()
    }

    pub(crate) fn metadata_path(&self, id: &impl ToString) -> PathBuf {
        self.data
            .path()
            .join("instances")
            .join(id.to_string())
            .join("metadata.json")
    }
}

async fn open(data: &TempDir, hypervisor: &Arc<Scripted>) -> Engine {
    open_with(data, vec![hypervisor.clone()]).await
}

async fn open_with(data: &TempDir, hypervisors: Vec<Arc<dyn Hypervisor>>) -> Engine {
    Engine::open(Config {
        data: data.path().to_owned(),
        hypervisors,
        armed: 0,
        log_limit: stencil_engine::DEFAULT_LOG_LIMIT,
    })
    .await
    .unwrap()
}

/// Ends the VMMs of a data directory when it goes.
struct Vmms(PathBuf);

impl Drop for Vmms {
    fn drop(&mut self) {
        for process in stray_processes(&self.0).unwrap_or_default() {
            let _ = Command::new("kill")
                .args(["-9", &process.identity.pid.to_string()])
                .status();
        }
    }
}
