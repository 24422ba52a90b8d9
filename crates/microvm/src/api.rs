//! The REST API over HTTP/1.1: paths, bodies, statuses.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use stencil_vmm_api::{ErrorBody, PingReply, VmConfig, path};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, oneshot};

use crate::VERSION;
use crate::control::{Call, Message};
use crate::error::{CallError, VmError};
use crate::socket::accept;
use crate::status::Status;

/// The largest body that is read, in bytes.
const BODY_MAX: usize = 1 << 20;

/// Memory of a VM whose definition does not speak of it, as in Cloud Hypervisor: 512 MiB.
const MEMORY_DEFAULT: u64 = 512 << 20;

type Reply = Response<Full<Bytes>>;

/// The API, shared by all connections.
pub(crate) struct Api {
    messages: Sender<Message>,
    status: Arc<Status>,
    asked_to_quit: AtomicBool,
    quit: Notify,
}

impl Api {
    pub(crate) fn new(messages: Sender<Message>, status: Arc<Status>) -> Self {
        Self {
            messages,
            status,
            asked_to_quit: AtomicBool::new(false),
            quit: Notify::new(),
        }
    }

    /// Ends the VM and the control thread.
    pub(crate) async fn quit(&self) {
        let (done, is_done) = oneshot::channel();
        if self.messages.send(Message::Quit { done }).is_ok() {
            // An error means that the thread is gone, which is what is wanted.
            let _ = is_done.await;
        }
    }

    async fn call(&self, call: Call) -> Result<(), CallError> {
        let (reply, result) = oneshot::channel();
        let gone = || CallError::Info(VmError::Ending);
        self.messages
            .send(Message::Call { call, reply })
            .map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }
}

/// Serves connections until `vmm.shutdown` is answered.
pub(crate) async fn serve_all(listener: &UnixListener, api: &Arc<Api>) {
    loop {
        tokio::select! {
            () = api.quit.notified() => return,
            stream = accept(listener) => drop(tokio::spawn(serve(stream, Arc::clone(api)))),
        }
    }
}

async fn serve(stream: UnixStream, api: Arc<Api>) {
    let service = service_fn(|request| {
        let api = Arc::clone(&api);
        async move { Ok::<_, Infallible>(answer(&api, request).await) }
    });
    if let Err(error) = http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await
    {
        tracing::debug!(%error, "a connection broke");
    }
    if api.asked_to_quit.load(Ordering::Relaxed) {
        // The reply is out.
        api.quit.notify_one();
    }
}

async fn answer(api: &Api, request: Request<Incoming>) -> Reply {
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    let began = Instant::now();
    let mut reply = match route(api, &head.method, path, body).await {
        Ok(reply) => reply,
        Err(Failure::NotFound) => json_reply(StatusCode::NOT_FOUND, &ErrorBody(vec!["Not Found".to_owned()])),
        Err(Failure::BadRequest(why)) => json_reply(
            StatusCode::BAD_REQUEST,
            &ErrorBody(vec!["Error from API".to_owned(), why]),
        ),
        Err(Failure::Call(error)) => {
            let status = if error.is_not_found() {
                StatusCode::NOT_FOUND
            } else {
                StatusCode::INTERNAL_SERVER_ERROR
            };
            json_reply(status, &error.body())
        }
    };
    reply
        .headers_mut()
        .insert(SERVER, HeaderValue::from_static("stencil-microvm"));
    let status = reply.status().as_u16();
    if reply.status().is_server_error() || reply.status() == StatusCode::BAD_REQUEST {
        let body = reply
            .body()
            .clone()
            .collect()
            .await
            .map(|body| body.to_bytes())
            .unwrap_or_default();
        tracing::warn!(method = %head.method, path, status, body = %String::from_utf8_lossy(&body), "refused");
    } else {
        tracing::debug!(method = %head.method, path, status, elapsed = ?began.elapsed());
    }
    reply
}

enum Failure {
    NotFound,
    BadRequest(String),
    Call(CallError),
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

async fn route(api: &Api, method: &Method, path: &str, body: Incoming) -> Result<Reply, Failure> {
    let not_created = || CallError::Info(VmError::NotCreated);
    let call = match (method, path) {
        (&Method::GET, path::VMM_PING) => return Ok(json_reply(StatusCode::OK, &ping())),
        (&Method::GET, path::VM_INFO) => {
            return Ok(json_reply(
                StatusCode::OK,
                &api.status.info().ok_or_else(not_created)?,
            ));
        }
        (&Method::GET, path::VM_COUNTERS) => {
            return Ok(json_reply(
                StatusCode::OK,
                &api.status.counters().ok_or_else(not_created)?,
            ));
        }
        (&Method::PUT, path::VMM_SHUTDOWN) => {
            api.asked_to_quit.store(true, Ordering::Relaxed);
            let mut reply = Response::new(Full::default());
            reply
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
            return Ok(reply);
        }
        (&Method::PUT, path::VM_CREATE) => Call::Create(Box::new(vm_config(read_json(body).await?)?)),
        (&Method::PUT, path::VM_BOOT) => Call::Boot,
        (&Method::PUT, path::VM_PAUSE) => Call::Pause,
        (&Method::PUT, path::VM_RESUME) => Call::Resume,
        (&Method::PUT, path::VM_SHUTDOWN) => Call::Shutdown,
        (&Method::PUT, path::VM_DELETE) => Call::Delete,
        (&Method::PUT, path::VM_SNAPSHOT) => Call::Snapshot(read_json(body).await?),
        (&Method::PUT, path::VM_RESTORE) => Call::Restore(read_json(body).await?),
        _ => return Err(Failure::NotFound),
    };
    api.call(call).await?;
    let mut reply = Response::new(Full::default());
    *reply.status_mut() = StatusCode::NO_CONTENT;
    Ok(reply)
}

fn ping() -> PingReply {
    PingReply {
        build_version: format!("v{VERSION}"),
        version: VERSION.to_owned(),
        pid: i64::from(std::process::id()),
        features: vec!["kvm".to_owned()],
    }
}

/// A definition that does not speak of memory has the default; one that says 0 is wrong.
fn vm_config(mut definition: Value) -> Result<VmConfig, Failure> {
    if let Some(fields) = definition.as_object_mut() {
        fields
            .entry("memory")
            .or_insert_with(|| json!({"size": MEMORY_DEFAULT}));
    }
    serde_json::from_value(definition).map_err(|error| not_understood(&error))
}

async fn read_json<T: DeserializeOwned>(body: Incoming) -> Result<T, Failure> {
    let body = Limited::new(body, BODY_MAX).collect().await.map_err(|error| {
        Failure::BadRequest(format!(
            "The request body cannot be read (up to {BODY_MAX} bytes are): {error}"
        ))
    })?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| not_understood(&error))
}

fn not_understood(error: &serde_json::Error) -> Failure {
    Failure::BadRequest(format!("The request body is not understood: {error}"))
}

fn json_reply(status: StatusCode, value: &impl Serialize) -> Reply {
    let (status, text) = match serde_json::to_vec(value) {
        Ok(text) => (status, text),
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            json!([error.to_string()]).to_string().into_bytes(),
        ),
    };
    let mut reply = Response::new(Full::new(Bytes::from(text)));
    *reply.status_mut() = status;
    reply
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}
