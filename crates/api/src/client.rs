//! The typed client: one method for each route, over the server's Unix socket or TCP.

mod address;
mod exec;
mod images;

use std::io;
use std::path::PathBuf;

use bytes::Bytes;
use futures_util::Stream;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::address::Address;
pub use self::exec::{CommandEvent, CommandInput, CommandOutput};

use crate::ErrorBody;
use crate::reply::{ForkList, Health, HypervisorList, Instance, InstanceList, Version, Waited};
use crate::request::{
    ChangeInstance, CreateInstance, ForkMany, ForkOne, ListInstances, PromoteTemplate, ReadConsole, WaitFor,
};

/// What needs no escape anywhere in a URI (RFC 3986, "unreserved").
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// Why a call did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address of the server is none.
    #[error("`{url}` cannot be the server's address: {why}; it is like http://10.0.0.7:8080")]
    BadUrl {
        /// What was given.
        url: String,
        /// What is wrong with it, as part of a sentence.
        why: &'static str,
    },
    /// The token cannot go into a request.
    #[error("the token has characters that cannot be sent; it takes printable ones of ASCII")]
    BadToken,
    /// Nobody listens there.
    #[error("no server listens at {server}")]
    NoServer {
        /// Its socket or address.
        server: String,
        /// What the system said.
        source: io::Error,
    },
    /// The server is there, and this user cannot talk to it, or the connection broke.
    #[error("the server at {server} could not be asked")]
    Connection {
        /// Its socket or address.
        server: String,
        /// What broke.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The server refused, or failed.
    #[error("{}", body.message)]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What it said.
        body: Box<ErrorBody>,
    },
    /// The reply is not what this version of the client knows.
    #[error("the server's reply ({status}) is not understood; is it another version?")]
    Protocol {
        /// The HTTP status.
        status: u16,
        /// Where the JSON is wrong.
        source: serde_json::Error,
    },
}

/// A client of one server. Cheap to clone; clones share connections.
#[derive(Clone, Debug)]
pub struct Client {
    address: Address,
    /// What goes into the header `authorization`.
    authorization: Option<HeaderValue>,
}

type Result<T> = std::result::Result<T, ClientError>;

impl Client {
    /// A client of the server that listens at `socket`. Nothing is asked yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            address: Address::socket(socket.into()),
            authorization: None,
        }
    }

    /// A client of the server at `url`, such as `http://10.0.0.7:8080`, which knows this token. Nothing is asked yet.
    ///
    /// # Errors
    /// [`ClientError::BadUrl`], [`ClientError::BadToken`].
    pub fn over_tcp(url: &str, token: Option<&str>) -> Result<Self> {
        let address = Address::url(url).map_err(|why| ClientError::BadUrl {
            url: url.to_owned(),
            why,
        })?;
        let authorization = token.map(|token| {
            let mut value =
                HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| ClientError::BadToken)?;
            value.set_sensitive(true);
            Ok(value)
        });
        Ok(Self {
            address,
            authorization: authorization.transpose()?,
        })
    }

    /// Where the server is, for people.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// `GET /health`
    ///
    /// # Errors
    /// [`ClientError`], as of every method here.
    pub async fn health(&self) -> Result<Health> {
        self.ask(Method::GET, "/health").await
    }

    /// `GET /version`
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn version(&self) -> Result<Version> {
        self.ask(Method::GET, "/version").await
    }

    /// `GET /hypervisors`
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn hypervisors(&self) -> Result<HypervisorList> {
        self.ask(Method::GET, "/hypervisors").await
    }

    /// `POST /instances`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `invalid_request` or `name_conflict`.
    pub async fn create(&self, asked: &CreateInstance) -> Result<Instance> {
        self.tell(Method::POST, "/instances", asked).await
    }

    /// `GET /instances`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `not_found` or `ambiguous` for the template.
    pub async fn list(&self, asked: &ListInstances) -> Result<Vec<Instance>> {
        let query = query([
            ("state", asked.state.map(|state| state.to_string())),
            ("template", asked.template.clone()),
        ]);
        let list: InstanceList = self.ask(Method::GET, &format!("/instances{query}")).await?;
        Ok(list.instances)
    }

    /// `GET /instances/{id}`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `not_found` or `ambiguous`, as every method that takes an id.
    pub async fn get(&self, id: &str) -> Result<Instance> {
        self.ask(Method::GET, &instance(id, "")).await
    }

    /// `POST /instances/{id}/start`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `invalid_state`.
    pub async fn start(&self, id: &str) -> Result<Instance> {
        self.ask(Method::POST, &instance(id, "/start")).await
    }

    /// `POST /instances/{id}/stop`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `invalid_state` or `template_in_use`.
    pub async fn stop(&self, id: &str) -> Result<Instance> {
        self.ask(Method::POST, &instance(id, "/stop")).await
    }

    /// `POST /instances/{id}/pause`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `invalid_state`.
    pub async fn pause(&self, id: &str) -> Result<Instance> {
        self.ask(Method::POST, &instance(id, "/pause")).await
    }

    /// `POST /instances/{id}/resume`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `invalid_state`.
    pub async fn resume(&self, id: &str) -> Result<Instance> {
        self.ask(Method::POST, &instance(id, "/resume")).await
    }

    /// `POST /instances/{id}/standby`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `invalid_state`.
    pub async fn standby(&self, id: &str) -> Result<Instance> {
        self.ask(Method::POST, &instance(id, "/standby")).await
    }

    /// `POST /instances/{id}/restore`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `invalid_state`.
    pub async fn restore(&self, id: &str) -> Result<Instance> {
        self.ask(Method::POST, &instance(id, "/restore")).await
    }

    /// `POST /instances/{id}/promote-template`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `invalid_state`, `invalid_request` or `guest_not_frozen`.
    pub async fn promote(&self, id: &str, asked: &PromoteTemplate) -> Result<Instance> {
        self.tell(Method::POST, &instance(id, "/promote-template"), asked)
            .await
    }

    /// `PATCH /instances/{id}`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `invalid_state` or `invalid_request`.
    pub async fn change(&self, id: &str, asked: &ChangeInstance) -> Result<Instance> {
        self.tell(Method::PATCH, &instance(id, ""), asked).await
    }

    /// `POST /instances/{id}/demote-template`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `invalid_state` or `template_in_use`.
    pub async fn demote(&self, id: &str) -> Result<Instance> {
        self.ask(Method::POST, &instance(id, "/demote-template")).await
    }

    /// `POST /instances/{id}/hot-pages/record`
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn record_hot_pages(&self, id: &str) -> Result<Instance> {
        self.ask(Method::POST, &instance(id, "/hot-pages/record")).await
    }

    /// `POST /instances/{id}/fork`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `invalid_state`, `guest_not_frozen`, `invalid_request`, `name_conflict` or
    /// `insufficient_resources`.
    pub async fn fork(&self, id: &str, asked: &ForkOne) -> Result<Instance> {
        self.tell(Method::POST, &instance(id, "/fork"), asked).await
    }

    /// `POST /instances/{id}/forks`
    ///
    /// # Errors
    /// [`ClientError`] if there is no fork at all; else each entry says what came of it.
    pub async fn forks(&self, id: &str, asked: &ForkMany) -> Result<ForkList> {
        self.tell(Method::POST, &instance(id, "/forks"), asked).await
    }

    /// `DELETE /instances/{id}`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `template_in_use`.
    pub async fn delete(&self, id: &str) -> Result<()> {
        self.send(Method::DELETE, &instance(id, ""), None, Bytes::new())
            .await
            .map(drop)
    }

    /// `GET /instances/{id}/wait`
    ///
    /// # Errors
    /// [`ClientError`]; that the state was not reached is none.
    pub async fn wait(&self, id: &str, asked: WaitFor) -> Result<Waited> {
        let query = query([
            ("state", Some(asked.state.to_string())),
            ("timeout", Some(asked.timeout.to_string())),
        ]);
        self.ask(Method::GET, &instance(id, &format!("/wait{query}")))
            .await
    }

    /// `GET /instances/{id}/console`: what the guest printed, chunk by chunk. An error in it means that it was cut off.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn console(
        &self,
        id: &str,
        asked: ReadConsole,
    ) -> Result<impl Stream<Item = Result<Bytes>> + Send + Unpin + use<>> {
        let query = query([
            ("tail", asked.tail.map(|lines| lines.to_string())),
            ("follow", asked.follow.then(|| "true".to_owned())),
        ]);
        let reply = self
            .send(
                Method::GET,
                &instance(id, &format!("/console{query}")),
                None,
                Bytes::new(),
            )
            .await?;
        let client = self.clone();
        let chunks = futures_util::StreamExt::map(reply.into_body().into_data_stream(), move |chunk| {
            chunk.map_err(|source| client.broken(source))
        });
        Ok(chunks)
    }

    /// `POST /instances/{id}/console`: at most 1 MiB for the guest to read.
    ///
    /// # Errors
    /// [`ClientError`]; refused with `invalid_state` while its VM is down.
    pub async fn console_write(&self, id: &str, input: impl Into<Bytes>) -> Result<()> {
        let bytes = Some("application/octet-stream");
        self.send(Method::POST, &instance(id, "/console"), bytes, input.into())
            .await
            .map(drop)
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T> {
        self.understand(self.send(method, path, None, Bytes::new()).await?)
            .await
    }

    async fn tell<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        asked: &impl Serialize,
    ) -> Result<T> {
        // Fails only for a path that is not UTF-8, which JSON cannot carry.
        let body = serde_json::to_vec(asked).map_err(|source| self.broken(source))?;
        self.understand(
            self.send(method, path, Some("application/json"), body.into())
                .await?,
        )
        .await
    }

    /// Sends a request; a reply that is an error becomes one here.
    async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&'static str>,
        body: Bytes,
    ) -> Result<Response<Incoming>> {
        let uri = self.address.uri(path).map_err(|source| self.broken(source))?;
        let mut request = Request::builder().method(method).uri(uri);
        if let Some(content_type) = content_type {
            request = request.header(CONTENT_TYPE, content_type);
        }
        let request = request
            .body(Full::new(body))
            .map_err(|source| self.broken(source))?;
        self.request(request).await
    }

    async fn request(&self, mut request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        if let Some(authorization) = &self.authorization {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        let reply = self
            .address
            .request(request)
            .await
            .map_err(|error| self.unreachable(error))?;
        if reply.status().is_success() || reply.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(reply);
        }
        let (status, body) = self.collect(reply).await?;
        let body = serde_json::from_slice(&body).map_err(|source| ClientError::Protocol {
            status: status.as_u16(),
            source,
        })?;
        Err(ClientError::Refused {
            status: status.as_u16(),
            body,
        })
    }

    async fn understand<T: DeserializeOwned>(&self, reply: Response<Incoming>) -> Result<T> {
        let (status, body) = self.collect(reply).await?;
        serde_json::from_slice(&body).map_err(|source| ClientError::Protocol {
            status: status.as_u16(),
            source,
        })
    }

    async fn collect(&self, reply: Response<Incoming>) -> Result<(StatusCode, Bytes)> {
        let status = reply.status();
        let body = reply
            .into_body()
            .collect()
            .await
            .map_err(|source| self.broken(source))?;
        Ok((status, body.to_bytes()))
    }

    fn unreachable(&self, error: hyper_util::client::legacy::Error) -> ClientError {
        let refused = cause(&error);
        match refused {
            Some(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                // An error of the system is its number; it cannot be taken out of the other one.
                let source = error
                    .raw_os_error()
                    .map_or_else(|| error.kind().into(), io::Error::from_raw_os_error);
                ClientError::NoServer {
                    server: self.address(),
                    source,
                }
            }
            _ => self.broken(error),
        }
    }

    fn broken(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Connection {
            server: self.address(),
            source: source.into(),
        }
    }
}

/// What the system said.
fn cause<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    let mut next = error.source();
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref() {
            return Some(error);
        }
        next = error.source();
    }
    None
}

/// The path of an instance's route; whatever the id is, it is one segment.
fn instance(id: &str, route: &str) -> String {
    format!("/instances/{}{route}", utf8_percent_encode(id, RESERVED))
}

/// `?a=b&c=d` of those fields that have a value.
fn query<const N: usize>(fields: [(&str, Option<String>); N]) -> String {
    let mut query = String::new();
    for (name, value) in fields {
        if let Some(value) = value {
            query.push(if query.is_empty() { '?' } else { '&' });
            query.push_str(&format!("{name}={}", utf8_percent_encode(&value, RESERVED)));
        }
    }
    query
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_one_segment_whatever_is_in_it() {
        assert_eq!(instance("web-1", "/start"), "/instances/web-1/start");
        assert_eq!(instance("../a b?c#d%", ""), "/instances/..%2Fa%20b%3Fc%23d%25");
    }

    #[test]
    fn only_fields_with_a_value_are_in_the_query() {
        assert_eq!(query([("a", None), ("b", None)]), "");
        assert_eq!(
            query([
                ("a", None),
                ("b", Some("x y".to_owned())),
                ("c", Some("1".to_owned()))
            ]),
            "?b=x%20y&c=1"
        );
    }
}
