//! A server of its own for each test, and a client that can also ask what no typed client would.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use stencil_api::client::{Client, ClientError};
use stencil_api::request::CreateInstance;
use stencil_api::server::Server;
use stencil_engine::{Config, Engine};
use stencil_vmm::MicroVm;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub(crate) struct World {
    dir: TempDir,
    pub(crate) client: Client,
    stop: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

/// A reply as it came.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) allow: Option<String>,
    pub(crate) body: Value,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::on(tempfile::tempdir().unwrap()).await
    }

    /// A server on what is in `<dir>/data`.
    pub(crate) async fn on(dir: TempDir) -> Self {
        let engine = open(&data(&dir)).await.unwrap();
        let socket = data(&dir).join("stencil.sock");
        let server = Server::bind(engine, &socket, None).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn(server.run(async move {
            let _ = stopped.await;
        }));
        // What passes for a kernel as long as nobody boots it.
        fs::write(
            dir.path().join("guest.elf"),
            include_bytes!("../../../../fixtures/pvh-note.elf"),
        )
        .unwrap();
        Self {
            dir,
            client: Client::new(socket),
            stop,
            served,
        }
    }

    pub(crate) fn data(&self) -> PathBuf {
        data(&self.dir)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.data().join("stencil.sock")
    }

    pub(crate) fn kernel(&self) -> PathBuf {
        self.dir.path().join("guest.elf")
    }

    /// A request for an instance that is not started.
    pub(crate) fn stopped(&self, name: &str) -> CreateInstance {
        CreateInstance {
            name: Some(name.parse().unwrap()),
            start: false,
            ..CreateInstance::new(self.kernel())
        }
    }

    /// What is in the directory of instances, also half-made ones.
    pub(crate) fn instances_on_disk(&self) -> usize {
        fs::read_dir(self.data().join("instances")).unwrap().count()
    }

    /// Ends the server; returns when it has.
    pub(crate) async fn stop(self) -> TempDir {
        self.stop.send(()).unwrap();
        self.served.await.unwrap();
        self.dir
    }

    pub(crate) async fn post(&self, path: &str, json: &str) -> Reply {
        self.ask(Method::POST, path, Some("application/json"), json.to_owned())
            .await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.ask(Method::GET, path, None, "").await
    }

    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: impl Into<Bytes>,
    ) -> Reply {
        let stream = UnixStream::connect(self.socket()).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "stencil");
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        let reply = sender
            .send_request(request.body(Full::new(body.into())).unwrap())
            .await
            .unwrap();
        let status = reply.status().as_u16();
        let allow = reply
            .headers()
            .get("allow")
            .map(|allow| allow.to_str().unwrap().to_owned());
        let body = reply.into_body().collect().await.unwrap().to_bytes();
        let body = if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&body).expect("the body is JSON")
        };
        Reply { status, allow, body }
    }

    /// Sends these bytes, all of them, and only then reads what comes back until the server hangs up.
    pub(crate) async fn say(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.socket()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    }
}

fn data(dir: &TempDir) -> PathBuf {
    dir.path().join("data")
}

/// An engine whose VMM is nowhere to be found.
pub(crate) async fn open(data: &Path) -> Result<Engine, stencil_engine::EngineError> {
    let microvm = MicroVm::new("/nonexistent/stencil-microvm".into());
    Engine::open(Config {
        data: data.to_owned(),
        hypervisors: vec![Arc::new(microvm)],
        armed: 0,
        log_limit: stencil_engine::DEFAULT_LOG_LIMIT,
    })
    .await
}

/// The status and the code of a refusal.
pub(crate) fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (u16, String) {
    match result {
        Err(ClientError::Refused { status, body }) => (status, body.code.into_owned()),
        other => panic!("a refusal was expected: {other:?}"),
    }
}
