//! A server whose guests are this host: its VMMs are agents, each in namespaces of its own. What commands in guests do is
//! real; only the machine is not.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use stencil_api::server::Server;
use stencil_core::{
    HypervisorName, InstanceDir, MemoryMode, ProcessIdentity, Readiness, SnapshotDir, VmGeneration, VmPhase,
    VmSpec,
};
use stencil_engine::{Config, CreateRequest, Engine, Filter};
use stencil_vmm::{
    Capabilities, Exit, Hypervisor, PageCounters, Restore, Restored, Start, VmStatus, VmmError, VmmProcess,
};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use crate::stencil::{command, done};

/// What of the host an agent has for itself, so that it changes nothing: the host's name and the machine id. Nor does it find
/// the program that powers the host off, whoever asks for that.
const PRIVATE: &str = r#"mount -t tmpfs none /etc && mount -t tmpfs none /run &&
exec env PATH=/nonexistent "$0" --listen agent.sock --shared-kernel --cgroup /nonexistent"#;

/// The agent's program, beside the one under test; built if it is not there.
fn agent() -> &'static Path {
    static AGENT: OnceLock<PathBuf> = OnceLock::new();
    AGENT.get_or_init(|| {
        let agent = Path::new(env!("CARGO_BIN_EXE_stencil")).with_file_name("stencil-agent");
        if !agent.exists() {
            let built = Command::new(env!("CARGO"))
                .args([
                    "build",
                    "--quiet",
                    "--package",
                    "stencil-agent",
                    "--bin",
                    "stencil-agent",
                ])
                .status()
                .unwrap();
            assert!(built.success());
        }
        agent
    })
}

#[derive(Debug)]
struct Hosted;

/// An agent that listens in the instance's directory.
fn start_agent(dir: &InstanceDir) -> Child {
    // As a zombie it counts as gone, and goes with the test.
    Command::new("unshare")
        .args([
            "--user",
            "--map-root-user",
            "--uts",
            "--mount",
            "sh",
            "-c",
            PRIVATE,
        ])
        .arg(agent())
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(dir.vmm_log()).unwrap())
        .spawn()
        .unwrap()
}

#[async_trait]
impl Hypervisor for Hosted {
    fn name(&self) -> HypervisorName {
        HypervisorName::from_static("hosted")
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            memory_modes: vec![MemoryMode::Cow],
            max_vcpus: 1,
            host_cpu: false,
            firmware: false,
            console_input: false,
            tells_identity: false,
            max_disk_layers: 0,
            agent: true,
            outlives_guest: false,
        }
    }

    async fn version(&self) -> Result<String, VmmError> {
        Ok("1".to_owned())
    }

    async fn spawn(&self, dir: &InstanceDir, _: Start<'_>) -> Result<VmmProcess, VmmError> {
        let mut agent = start_agent(dir);
        let process = VmmProcess::attach(&identity(agent.id())).unwrap().unwrap();
        // Somebody has to reap it.
        std::thread::spawn(move || agent.wait());
        Ok(process)
    }

    async fn create(&self, _: &InstanceDir, _: &VmSpec, _: &VmGeneration) -> Result<(), VmmError> {
        Ok(())
    }

    async fn boot(&self, _: &InstanceDir) -> Result<(), VmmError> {
        Ok(())
    }

    async fn pause(&self, _: &InstanceDir) -> Result<(), VmmError> {
        Ok(())
    }

    async fn resume(&self, _: &InstanceDir) -> Result<(), VmmError> {
        Ok(())
    }

    async fn snapshot(&self, _: &InstanceDir, destination: &SnapshotDir) -> Result<(), VmmError> {
        for file in [
            destination.config(),
            destination.state(),
            destination.memory_ranges(),
        ] {
            fs::write(file, "{}").unwrap();
        }
        Ok(())
    }

    async fn restore(&self, _: &InstanceDir, request: &Restore<'_>) -> Result<Restored, VmmError> {
        Ok(Restored::as_asked(request.memory_mode))
    }

    async fn info(&self, _: &InstanceDir) -> Result<VmStatus, VmmError> {
        Ok(VmStatus {
            phase: VmPhase::Running,
            end: None,
        })
    }

    async fn console_input(&self, _: &InstanceDir, _: &VmmProcess, _: &[u8]) -> Result<(), VmmError> {
        unreachable!("it takes none");
    }

    async fn page_counters(&self, _: &InstanceDir) -> Result<PageCounters, VmmError> {
        Ok(PageCounters::new())
    }

    async fn connect_agent(&self, dir: &InstanceDir) -> Result<UnixStream, VmmError> {
        let socket = dir.agent_socket();
        let connected = UnixStream::connect(&socket).await;
        connected.map_err(|source: io::Error| VmmError::Agent { socket, source })
    }

    fn last_words(&self, _: &InstanceDir) -> Option<String> {
        None
    }

    async fn stop(&self, _: &InstanceDir, process: &VmmProcess) -> Result<Exit, VmmError> {
        Ok(process.terminate().await?)
    }
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

/// The server, and an instance `web` that runs on it.
pub(crate) struct Guests {
    pub(crate) dir: TempDir,
    engine: Engine,
    runtime: Runtime,
}

impl Guests {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("guest.elf");
        fs::write(&kernel, include_bytes!("../../../../fixtures/pvh-note.elf")).unwrap();
        let runtime = Runtime::new().unwrap();
        let engine = runtime.block_on(async {
            let engine = Engine::open(Config {
                data: dir.path().join("data"),
                hypervisors: vec![Arc::new(Hosted)],
                armed: 0,
                log_limit: stencil_engine::DEFAULT_LOG_LIMIT,
            })
            .await
            .unwrap();
            let socket = dir.path().join("data/stencil.sock");
            let server = Server::bind(engine.clone(), &socket, None).await.unwrap();
            tokio::spawn(server.run(std::future::pending()));
            let request = CreateRequest {
                name: Some("web".parse().unwrap()),
                hypervisor: Hosted.name(),
                image: None,
                kernel: Some(kernel),
                firmware: None,
                initrd: None,
                cmdline: None,
                disks: Vec::new(),
                vcpus: 1,
                memory_bytes: 16 << 20,
                readiness: Readiness::Agent,
                labels: Default::default(),
                start: true,
            };
            engine.create(request).await.unwrap();
            engine
        });
        let guests = Self { dir, engine, runtime };
        let waited = done(&mut guests.command(&["wait", "web"]));
        assert_eq!(waited.code, 0, "{waited:?}");
        guests
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("data/stencil.sock")
    }

    pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// A command of a client.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = command(self.dir.path());
        command.args(words).env("STENCIL_SOCKET", self.socket());
        command
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        self.runtime.block_on(async {
            let instances = self.engine.list(Filter::default()).await.unwrap();
            // The youngest first: forks before their template.
            for instance in instances.iter().rev() {
                self.engine.delete(&instance.id.to_string()).await.unwrap();
            }
        });
    }
}
