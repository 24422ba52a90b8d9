//! The REST client: the contract of `stencil-vmm-api` over a VMM's Unix socket.
//!
//! Each call is one connection. One thread serves a VMM's socket, in Cloud Hypervisor as in the microVM, so that a
//! connection kept idle by one caller would stand in the way of another.

use std::fmt;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use hyperlocal::UnixConnector;
use serde::Serialize;
use serde::de::DeserializeOwned;
use stencil_core::InstanceDir;
use stencil_vmm_api::{
    ErrorBody, PingReply, ReceiveMigrationRequest, RestoreRequest, SnapshotRequest, VmConfig, VmCounters,
    VmInfo, path,
};
use tower_service::Service;

use crate::VmmError;

/// The most that is read of a reply, in bytes. The largest that a VMM sends, `vm.info` of a VM with many devices, is
/// some tens of kilobytes; more than this is not a VMM, and must not fill the server's memory.
pub const MAX_REPLY_BYTES: usize = 1 << 20;

/// For `vm.info`, which states and lists are made from: a VMM that is busy with a long call must not hold up a list.
const INFO_DEADLINE: Duration = Duration::from_millis(500);
/// For calls that take a VMM milliseconds. Generous because a host can be busy with 64 forks at once.
const SHORT_DEADLINE: Duration = Duration::from_secs(10);
/// For calls that may read or write all of the guest's memory, or a kernel: gigabytes on a slow disk.
const BULK_DEADLINE: Duration = Duration::from_secs(120);
/// For `vm.power-button` and `vmm.shutdown`: whoever does not answer is sent a signal in the end, and that needs no patience.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(2);

/// The most that is quoted of an error reply that is no JSON.
const MAX_QUOTED_CHARS: usize = 1000;

const JSON: &str = "application/json";

/// A call of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `vmm.ping`
    Ping,
    /// `vm.create`
    Create,
    /// `vm.boot`
    Boot,
    /// `vm.pause`
    Pause,
    /// `vm.resume`
    Resume,
    /// `vm.snapshot`
    Snapshot,
    /// `vm.restore`
    Restore,
    /// `vm.receive-migration`
    ReceiveMigration,
    /// `vm.info`
    Info,
    /// `vm.counters`
    Counters,
    /// `vm.power-button`
    PowerButton,
    /// `vmm.shutdown`
    Shutdown,
}

impl Call {
    /// How long the call may take, from the connection to the last byte of the reply.
    pub fn deadline(self) -> Duration {
        match self {
            Self::Info | Self::Counters => INFO_DEADLINE,
            Self::Ping | Self::Create | Self::Pause | Self::Resume => SHORT_DEADLINE,
            Self::Boot | Self::Snapshot | Self::Restore | Self::ReceiveMigration => BULK_DEADLINE,
            Self::PowerButton | Self::Shutdown => SHUTDOWN_DEADLINE,
        }
    }

    fn method(self) -> Method {
        match self {
            Self::Ping | Self::Info | Self::Counters => Method::GET,
            _ => Method::PUT,
        }
    }

    fn path(self) -> &'static str {
        match self {
            Self::Ping => path::VMM_PING,
            Self::Create => path::VM_CREATE,
            Self::Boot => path::VM_BOOT,
            Self::Pause => path::VM_PAUSE,
            Self::Resume => path::VM_RESUME,
            Self::Snapshot => path::VM_SNAPSHOT,
            Self::Restore => path::VM_RESTORE,
            Self::ReceiveMigration => path::VM_RECEIVE_MIGRATION,
            Self::Info => path::VM_INFO,
            Self::Counters => path::VM_COUNTERS,
            Self::PowerButton => path::VM_POWER_BUTTON,
            Self::Shutdown => path::VMM_SHUTDOWN,
        }
    }
}

impl fmt::Display for Call {
    /// The last part of its path, such as `vm.info`: how manuals and logs call it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            self.path()
                .trim_start_matches(path::PREFIX)
                .trim_start_matches('/'),
        )
    }
}

/// A client of the VMM that listens on one socket. Making one opens nothing.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// For the VMM in `dir`.
    ///
    /// # Errors
    /// [`VmmError::PathNotUtf8`]: the path goes through an URI, which would change other bytes.
    pub fn new(dir: &InstanceDir) -> Result<Self, VmmError> {
        let socket = dir.vmm_socket();
        if socket.to_str().is_none() {
            return Err(VmmError::PathNotUtf8 { path: socket });
        }
        Ok(Self { socket })
    }

    /// Who is there: its version, and what was compiled in.
    ///
    /// # Errors
    /// See [`VmmError`], as for all calls.
    pub async fn ping(&self) -> Result<PingReply, VmmError> {
        self.get(Call::Ping).await
    }

    /// Defines the VM.
    ///
    /// # Errors
    /// See [`VmmError`].
    pub async fn create(&self, config: &VmConfig) -> Result<(), VmmError> {
        self.put(Call::Create, config).await
    }

    /// Boots the VM.
    ///
    /// # Errors
    /// See [`VmmError`].
    pub async fn boot(&self) -> Result<(), VmmError> {
        self.act(Call::Boot).await
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    /// See [`VmmError`].
    pub async fn pause(&self) -> Result<(), VmmError> {
        self.act(Call::Pause).await
    }

    /// Lets the vCPUs go on.
    ///
    /// # Errors
    /// See [`VmmError`].
    pub async fn resume(&self) -> Result<(), VmmError> {
        self.act(Call::Resume).await
    }

    /// Writes the paused VM to a directory.
    ///
    /// # Errors
    /// See [`VmmError`].
    pub async fn snapshot(&self, request: &SnapshotRequest) -> Result<(), VmmError> {
        self.put(Call::Snapshot, request).await
    }

    /// Makes the VM from a directory.
    ///
    /// # Errors
    /// See [`VmmError`].
    pub async fn restore(&self, request: &RestoreRequest) -> Result<(), VmmError> {
        self.put(Call::Restore, request).await
    }

    /// Makes the VM from what a sender of a migration says; answers when that has ended.
    ///
    /// # Errors
    /// See [`VmmError`].
    pub async fn receive_migration(&self, request: &ReceiveMigrationRequest) -> Result<(), VmmError> {
        self.put(Call::ReceiveMigration, request).await
    }

    /// What the VM has counted, by device.
    ///
    /// # Errors
    /// See [`VmmError`].
    pub async fn counters(&self) -> Result<VmCounters, VmmError> {
        self.get(Call::Counters).await
    }

    /// What the VM is and does; `None` when the VMM has none.
    ///
    /// # Errors
    /// See [`VmmError`].
    pub async fn info(&self) -> Result<Option<VmInfo>, VmmError> {
        match self.get(Call::Info).await {
            Ok(info) => Ok(Some(info)),
            // Every VMM has this path, so that 404 can only mean that there is no VM.
            Err(VmmError::Rejected { status: 404, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Presses the machine's power button.
    ///
    /// # Errors
    /// See [`VmmError`].
    pub async fn press_power_button(&self) -> Result<(), VmmError> {
        self.act(Call::PowerButton).await
    }

    /// Asks the VMM to end. That it answers does not mean that it has ended.
    ///
    /// # Errors
    /// See [`VmmError`].
    pub async fn shutdown(&self) -> Result<(), VmmError> {
        self.act(Call::Shutdown).await
    }

    async fn get<T: DeserializeOwned>(&self, call: Call) -> Result<T, VmmError> {
        let body = self.exchange(call, None).await?;
        serde_json::from_slice(&body).map_err(|source| VmmError::Protocol { call, source })
    }

    async fn put<T: Serialize>(&self, call: Call, body: &T) -> Result<(), VmmError> {
        let body = serde_json::to_vec(body).map_err(|source| VmmError::Protocol { call, source })?;
        self.exchange(call, Some(body.into())).await.map(drop)
    }

    async fn act(&self, call: Call) -> Result<(), VmmError> {
        self.exchange(call, None).await.map(drop)
    }

    /// Sends a request on a connection of its own and reads all of the reply, within the call's deadline. Dropping
    /// the future, as the deadline does, closes the connection.
    async fn exchange(&self, call: Call, body: Option<Bytes>) -> Result<Bytes, VmmError> {
        let after = call.deadline();
        match tokio::time::timeout(after, self.converse(call, body)).await {
            Ok(outcome) => outcome,
            Err(_elapsed) => Err(VmmError::Timeout { call, after }),
        }
    }

    async fn converse(&self, call: Call, body: Option<Bytes>) -> Result<Bytes, VmmError> {
        let socket = hyperlocal::Uri::new(&self.socket, call.path());
        let stream = UnixConnector
            .call(socket.into())
            .await
            .map_err(|source| VmmError::Connect {
                call,
                socket: self.socket.clone(),
                source,
            })?;
        let no_reply = |source| VmmError::NoReply { call, source };
        let (mut sender, connection) = http1::handshake(stream).await.map_err(no_reply)?;
        let exchange = async move {
            let reply = sender.send_request(request(call, body)).await.map_err(no_reply)?;
            let (head, body) = reply.into_parts();
            Ok::<_, VmmError>((head.status, read(call, body).await?))
        };
        // Driven here and not by a task of its own, which would cost a thread's wake-up each way.
        let (mut exchange, mut connection) = (pin!(exchange), pin!(connection));
        let outcome = tokio::select! {
            outcome = &mut exchange => outcome,
            // It is over, and the exchange knows how it ended.
            _ = &mut connection => exchange.await,
        };
        let (status, body) = outcome?;
        if status.is_success() {
            Ok(body)
        } else {
            Err(rejected(call, status, &body))
        }
    }
}

fn request(call: Call, body: Option<Bytes>) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::default());
    *request.method_mut() = call.method();
    *request.uri_mut() = Uri::from_static(call.path());
    let headers = request.headers_mut();
    // Who is meant is the socket's affair; HTTP/1.1 wants a name all the same (RFC 9112, 3.2).
    headers.insert(HOST, HeaderValue::from_static("vmm"));
    headers.insert(ACCEPT, HeaderValue::from_static(JSON));
    if let Some(body) = body {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(JSON));
        *request.body_mut() = Full::new(body);
    }
    request
}

async fn read(call: Call, body: Incoming) -> Result<Bytes, VmmError> {
    match Limited::new(body, MAX_REPLY_BYTES).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) => Err(match error.downcast::<hyper::Error>() {
            Ok(source) => VmmError::CutShort {
                call,
                source: *source,
            },
            // `Limited` has no other error than its own.
            Err(_limit) => VmmError::TooLarge {
                call,
                limit: MAX_REPLY_BYTES,
            },
        }),
    }
}

/// An error reply as the contract has it; what is in no such form is kept as text, for the person who must act.
fn rejected(call: Call, status: StatusCode, body: &[u8]) -> VmmError {
    let lines = serde_json::from_slice::<ErrorBody>(body)
        .map(|body| body.0)
        .unwrap_or_else(|_| {
            let text: String = String::from_utf8_lossy(body)
                .trim()
                .chars()
                .take(MAX_QUOTED_CHARS)
                .collect();
            if text.is_empty() { Vec::new() } else { vec![text] }
        });
    let body = ErrorBody(if lines.is_empty() {
        vec!["the VMM gave no reason".to_owned()]
    } else {
        lines
    });
    VmmError::Rejected {
        call,
        status: status.as_u16(),
        body,
    }
}
