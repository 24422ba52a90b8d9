//! A small client of Stencil's HTTP API over its Unix socket: each call a connection of its own, within a time limit.
//! Calls block; what hyper needs of tokio runs on one thread in the background.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::time::{timeout, timeout_at};

/// The longest a call takes before it counts as hung; many forks on a busy small host take long.
const CALL_LIMIT: Duration = Duration::from_secs(120);

static RUNTIME: LazyLock<std::io::Result<Runtime>> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
});

/// A call got no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("no connection to the server at {}", path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the server gave no answer to {call} in {} s", CALL_LIMIT.as_secs())]
    Silent { call: String },
    #[error("the connection of {call} broke")]
    Broken {
        call: String,
        #[source]
        source: hyper::Error,
    },
    #[error("the answer to {call} is no JSON: {body}")]
    NoJson { call: String, body: String },
    #[error("{what} cannot be put into a request")]
    Request {
        what: String,
        #[source]
        source: hyper::http::Error,
    },
    #[error("no thread for connections")]
    Runtime(#[source] &'static std::io::Error),
}

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    /// What was called, for the reader.
    pub(crate) call: String,
    pub(crate) status: u16,
    /// `Null` where there was no body.
    pub(crate) body: Value,
}

impl Reply {
    /// The code of an error, such as `invalid_state`; empty where there is none.
    pub(crate) fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or_default()
    }
}

/// What a request carries.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    Nothing,
    Json(Value),
    /// What is said to be JSON, and need not be.
    Text(String),
    Bytes(Vec<u8>),
}

impl Body {
    /// `Null` is no body.
    fn of(json: Value) -> Self {
        if json.is_null() {
            Self::Nothing
        } else {
            Self::Json(json)
        }
    }
}

/// A client of one server, by its socket.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    pub(crate) fn get(&self, path: &str) -> Result<Reply, ClientError> {
        self.call(Method::GET, path, Body::Nothing)
    }

    /// `Null` is no body.
    pub(crate) fn post(&self, path: &str, body: Value) -> Result<Reply, ClientError> {
        self.call(Method::POST, path, Body::of(body))
    }

    pub(crate) fn patch(&self, path: &str, body: Value) -> Result<Reply, ClientError> {
        self.call(Method::PATCH, path, Body::Json(body))
    }

    pub(crate) fn delete(&self, path: &str) -> Result<Reply, ClientError> {
        self.call(Method::DELETE, path, Body::Nothing)
    }

    /// Calls the server and reads the whole answer.
    pub(crate) fn call(&self, method: Method, path: &str, body: Body) -> Result<Reply, ClientError> {
        let call = format!("{method} {path}");
        let reply = async {
            let response = send(&self.socket, method, path, body, &call).await?;
            read(response, &call).await
        };
        runtime()?
            .block_on(async { timeout(CALL_LIMIT, reply).await })
            .unwrap_or_else(|_| Err(ClientError::Silent { call: call.clone() }))
    }

    /// Calls the server, and leaves the answer to be read line by line as it comes.
    pub(crate) fn open(&self, path: &str) -> Result<Lines, ClientError> {
        let call = format!("GET {path}");
        let response = runtime()?
            .block_on(async {
                timeout(
                    CALL_LIMIT,
                    send(&self.socket, Method::GET, path, Body::Nothing, &call),
                )
                .await
            })
            .unwrap_or_else(|_| Err(ClientError::Silent { call: call.clone() }))?;
        let status = response.status().as_u16();
        Ok(Lines {
            call,
            status,
            body: response.into_body(),
            pending: Vec::new(),
        })
    }
}

/// Reads the whole of an answer.
async fn read(response: Response<Incoming>, call: &str) -> Result<Reply, ClientError> {
    let call = call.to_owned();
    let status = response.status().as_u16();
    let body = match response.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(source) => return Err(ClientError::Broken { call, source }),
    };
    let body = if body.is_empty() {
        Value::Null
    } else {
        match serde_json::from_slice(&body) {
            Ok(json) => json,
            Err(_) => {
                let body = String::from_utf8_lossy(&body).into_owned();
                return Err(ClientError::NoJson { call, body });
            }
        }
    };
    Ok(Reply { call, status, body })
}

/// A connection that is there before it is used, and is driven by the thread that calls: when a call is timed, neither
/// connecting nor waking another thread is in its time.
#[derive(Debug)]
pub(crate) struct Connection {
    runtime: Runtime,
    sender: Sender,
}

impl Connection {
    pub(crate) fn open(socket: &Path) -> Result<Self, ClientError> {
        let call = "a connection";
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| ClientError::Connect {
                path: socket.to_owned(),
                source,
            })?;
        let sender = runtime.block_on(async {
            let (sender, connection) = connect(socket, call).await?;
            // It goes on whenever this thread waits for an answer.
            tokio::spawn(connection);
            Ok(sender)
        })?;
        Ok(Self { runtime, sender })
    }

    /// Calls the server and reads the whole answer; `Null` is no body.
    pub(crate) fn post(&mut self, path: &str, body: Value) -> Result<Reply, ClientError> {
        let call = format!("POST {path}");
        let request = request(Method::POST, path, Body::of(body), &call)?;
        let sender = &mut self.sender;
        let reply = async {
            let response = sender.send_request(request).await;
            let broken = |source| ClientError::Broken {
                call: call.clone(),
                source,
            };
            read(response.map_err(broken)?, &call).await
        };
        self.runtime
            .block_on(async { timeout(CALL_LIMIT, reply).await })
            .unwrap_or_else(|_| Err(ClientError::Silent { call: call.clone() }))
    }
}

/// An answer that is read line by line.
#[derive(Debug)]
pub(crate) struct Lines {
    call: String,
    pub(crate) status: u16,
    body: Incoming,
    pending: Vec<u8>,
}

/// What came by a deadline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// A whole line, without its end.
    Line(String),
    /// The answer is over; a last line without an end is lost.
    Over,
    /// The deadline came first.
    Late,
}

impl Lines {
    pub(crate) fn next_by(&mut self, deadline: Instant) -> Result<Next, ClientError> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return Ok(Next::Line(String::from_utf8_lossy(&line).trim_end().to_owned()));
            }
            let body = &mut self.body;
            let frame = runtime()?.block_on(async { timeout_at(deadline.into(), body.frame()).await });
            match frame {
                Err(_) => return Ok(Next::Late),
                Ok(None) => return Ok(Next::Over),
                Ok(Some(Err(source))) => {
                    return Err(ClientError::Broken {
                        call: self.call.clone(),
                        source,
                    });
                }
                Ok(Some(Ok(frame))) => {
                    if let Some(data) = frame.data_ref() {
                        self.pending.extend_from_slice(data);
                    }
                }
            }
        }
    }
}

fn runtime() -> Result<&'static Runtime, ClientError> {
    RUNTIME.as_ref().map_err(ClientError::Runtime)
}

async fn send(
    socket: &Path,
    method: Method,
    path: &str,
    body: Body,
    call: &str,
) -> Result<Response<Incoming>, ClientError> {
    let request = request(method, path, body, call)?;
    let (mut sender, connection) = connect(socket, call).await?;
    // It ends with the answer; an error of it shows there.
    tokio::spawn(connection);
    sender
        .send_request(request)
        .await
        .map_err(|source| ClientError::Broken {
            call: call.to_owned(),
            source,
        })
}

type Sender = hyper::client::conn::http1::SendRequest<Full<Bytes>>;

async fn connect(
    socket: &Path,
    call: &str,
) -> Result<(Sender, impl Future<Output = hyper::Result<()>> + use<>), ClientError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| ClientError::Connect {
            path: socket.to_owned(),
            source,
        })?;
    hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|source| ClientError::Broken {
            call: call.to_owned(),
            source,
        })
}

fn request(method: Method, path: &str, body: Body, call: &str) -> Result<Request<Full<Bytes>>, ClientError> {
    let (kind, body) = match body {
        Body::Nothing => (None, Vec::new()),
        Body::Json(value) => (Some("application/json"), value.to_string().into_bytes()),
        Body::Text(text) => (Some("application/json"), text.into_bytes()),
        Body::Bytes(bytes) => (Some("application/octet-stream"), bytes),
    };
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "stencil");
    if let Some(kind) = kind {
        request = request.header("content-type", kind);
    }
    request
        .body(Full::new(Bytes::from(body)))
        .map_err(|source| ClientError::Request {
            what: call.to_owned(),
            source,
        })
}
