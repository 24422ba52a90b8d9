//! One call to a QEMU by its machine protocol, QMP, over the [connection](super::link) that all calls share.
//!
//! Source: QEMU, docs/interop/qmp-spec and qapi/*.json, as of 7.2. What comes from the other side is bounded: in size by
//! [`MAX_REPLY_BYTES`](crate::MAX_REPLY_BYTES) a line, in time by the deadline of the call.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use stencil_core::InstanceDir;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, timeout, timeout_at};

use super::disk_reason;
use super::link::{DiskError, Fault, Link, Links};
use crate::rest::utf8;
use crate::{Call, VmmError};

/// What an open file is called in QEMU after it was handed over.
const HANDED_OVER: &str = "state";

/// One call, which has its deadline from its beginning to its end.
#[derive(Debug)]
pub(super) struct Monitor {
    call: Call,
    until: Instant,
    link: Arc<Link>,
}

/// What QEMU says that its VM does (qapi/run-state.json, `RunState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RunState {
    Prelaunch,
    Inmigrate,
    Running,
    Suspended,
    Paused,
    Debug,
    IoError,
    FinishMigrate,
    Postmigrate,
    SaveVm,
    RestoreVm,
    Watchdog,
    Colo,
    Shutdown,
    GuestPanicked,
    InternalError,
}

#[derive(Debug, Deserialize)]
struct StatusReply {
    status: RunState,
}

#[derive(Debug, Deserialize)]
struct MigrationEvent {
    status: String,
}

impl Monitor {
    /// Begins a call to the QEMU in `dir`. Where QEMU has another client, that is waited for until the deadline.
    pub(super) async fn open(links: &Links, dir: &InstanceDir, call: Call) -> Result<Self, VmmError> {
        let until = Instant::now() + call.deadline();
        let link = timeout_at(until, links.to(dir, call)).await;
        let link = link.map_err(|_elapsed| VmmError::Timeout {
            call,
            after: call.deadline(),
        })??;
        Ok(Self { call, until, link })
    }

    /// The version of this QEMU, such as `7.2.22`.
    pub(super) fn version(&self) -> &str {
        &self.link.version
    }

    /// What the VM does: as QEMU said it last, or asked for where that may have changed.
    pub(super) async fn status(&self) -> Result<RunState, VmmError> {
        if let Some(state) = self.link.known_state() {
            return Ok(state);
        }
        // Of many who want to know it one asks.
        let turn = timeout_at(self.until, self.link.asking.lock()).await;
        let _turn = turn.map_err(|_elapsed| self.too_late())?;
        if let Some(state) = self.link.known_state() {
            return Ok(state);
        }
        let changes = self.link.changes();
        let reply = self.execute("query-status", json!({})).await?;
        let state = self.parse::<StatusReply>(reply)?.status;
        self.link.learn(state, changes);
        Ok(state)
    }

    /// The error of a disk for which QEMU stopped the VM.
    pub(super) fn disk_error(&self) -> Option<DiskError> {
        self.link.disk_error()
    }

    /// Why the guest is down, in QEMU's word for it.
    pub(super) fn shutdown_cause(&self) -> Option<String> {
        self.link.shutdown_cause()
    }

    /// Refuses the call unless the VM does this.
    pub(super) async fn expect(&self, state: RunState) -> Result<(), VmmError> {
        let found = self.status().await?;
        if found == state {
            Ok(())
        } else {
            Err(self.refused(format!("the VM is {found:?}; it takes one that is {state:?}")))
        }
    }

    /// Lets the vCPUs run.
    pub(super) async fn cont(&self) -> Result<(), VmmError> {
        self.execute("cont", json!({})).await.map(drop)
    }

    /// Lets a VM go on that was stopped because a disk failed, and looks for this long whether that fails again.
    pub(super) async fn try_disks_again(&self, limit: Duration) -> Result<(), VmmError> {
        let mut events = self.link.events();
        self.cont().await?;
        let fails = async {
            loop {
                match events.recv().await {
                    Ok(event) if event.name == "BLOCK_IO_ERROR" => return,
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        match timeout(limit, fails).await {
            Ok(()) => Err(self.refused(disk_reason(self.disk_error().as_ref()))),
            Err(_elapsed) => Ok(()),
        }
    }

    /// Stops the vCPUs.
    pub(super) async fn stop(&self) -> Result<(), VmmError> {
        self.execute("stop", json!({})).await.map(drop)
    }

    /// Presses the machine's power button.
    pub(super) async fn press_power_button(&self) -> Result<(), VmmError> {
        self.execute("system_powerdown", json!({})).await.map(drop)
    }

    /// Asks QEMU to end.
    pub(super) async fn quit(&self) -> Result<(), VmmError> {
        self.execute("quit", json!({})).await.map(drop)
    }

    /// Where the guest's memory is in QEMU's own address space: all of it is one range, which begins with address 0.
    pub(super) async fn memory_address(&self) -> Result<u64, VmmError> {
        let arguments = json!({ "command-line": "gpa2hva 0" });
        let said = self.execute("human-monitor-command", arguments).await?;
        // "Host virtual address for 0x0 (ram) is 0x7f302be00000"
        said.as_str()
            .and_then(|said| said.split_ascii_whitespace().next_back()?.strip_prefix("0x"))
            .and_then(|address| u64::from_str_radix(address, 16).ok())
            .ok_or_else(|| VmmError::Protocol {
                call: self.call,
                source: serde::de::Error::custom("an address was expected"),
            })
    }

    /// Writes the state of the vCPUs and devices of a VM that does not run, without its memory.
    ///
    /// Xen's toolstack gave the command its name; every QEMU has it. It is the one that leaves memory out whatever it is
    /// made of: the capability `x-ignore-shared` of a migration does so for memory that is shared, and a fork's is private.
    pub(super) async fn save_devices(&self, file: &Path) -> Result<(), VmmError> {
        // `live`: QEMU keeps its disks.
        let arguments = json!({ "filename": utf8(file)?, "live": false });
        self.execute("xen-save-devices-state", arguments).await.map(drop)
    }

    /// Loads what [`save_devices`](Self::save_devices) wrote into a VM that waits for it, and waits until it is paused.
    pub(super) async fn load_devices(&self, file: BorrowedFd<'_>) -> Result<(), VmmError> {
        let capabilities = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.execute("migrate-set-capabilities", capabilities).await?;
        let name = json!({ "fdname": HANDED_OVER });
        let file = file
            .try_clone_to_owned()
            .map_err(|error| Fault::HungUp(error.kind()).of(self.call))?;
        self.execute_with("getfd", name, Some(file)).await?;
        let mut events = self.link.events();
        let from = json!({ "uri": format!("fd:{HANDED_OVER}") });
        self.execute("migrate-incoming", from).await?;
        let loaded = async {
            loop {
                let event = tokio::select! {
                    biased;
                    event = events.recv() => event,
                    // QEMU has said why in its log, and ended.
                    () = self.link.closed() => return Err(self.link.fault().of(self.call)),
                };
                // Of too many events that nobody took, the first are lost.
                let Ok(event) = event else { continue };
                if event.name == "MIGRATION"
                    && self.parse::<MigrationEvent>(event.data)?.status == "completed"
                {
                    return Ok(());
                }
            }
        };
        match timeout_at(self.until, loaded).await {
            Ok(loaded) => loaded,
            Err(_elapsed) => Err(self.too_late()),
        }
    }

    async fn execute(&self, command: &'static str, arguments: Value) -> Result<Value, VmmError> {
        self.execute_with(command, arguments, None).await
    }

    /// Sends a command, with an open file where it takes one, and waits for its reply.
    async fn execute_with(
        &self,
        command: &'static str,
        arguments: Value,
        file: Option<OwnedFd>,
    ) -> Result<Value, VmmError> {
        match timeout_at(self.until, self.link.ask(command, arguments, file)).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(refusal))) => Err(self.refused(format!("{command}: {refusal}"))),
            Ok(Err(fault)) => Err(fault.of(self.call)),
            Err(_elapsed) => Err(self.too_late()),
        }
    }

    /// A refusal of the call, in QEMU's words or because of its VM's state.
    pub(super) fn refused(&self, reason: String) -> VmmError {
        VmmError::Refused {
            call: self.call,
            reason,
        }
    }

    fn parse<T: for<'de> Deserialize<'de>>(&self, value: Value) -> Result<T, VmmError> {
        let call = self.call;
        serde_json::from_value(value).map_err(|source| VmmError::Protocol { call, source })
    }

    fn too_late(&self) -> VmmError {
        VmmError::Timeout {
            call: self.call,
            after: self.call.deadline(),
        }
    }
}
