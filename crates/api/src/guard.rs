//! Who may ask: one place, in front of all routes.
//!
//! A browser on the host can reach the server, and any page in it can send requests: it says so in `Origin`. A page whose name was
//! made to lead here (DNS rebinding) has its own name in `Host`. And whoever reaches a TCP port needs a token.

use std::net::{IpAddr, SocketAddr};

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN, WWW_AUTHENTICATE};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;
use crate::tokens::Tokens;

/// Where the token may also be.
const API_KEY: &str = "x-api-key";

/// A TCP address to listen on, and who may ask there.
#[derive(Clone, Debug)]
pub struct Listen {
    /// The address; port 0 is one that the system chooses.
    pub address: SocketAddr,
    /// What who asks has to know. Without any, whoever reaches the address can do everything: it must be one of this host.
    pub tokens: Option<Tokens>,
    /// Names by which the server is reached, beside addresses and `localhost`.
    pub allow_hosts: Vec<String>,
}

/// Who may ask through one listener.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    /// Of TCP. The Unix socket has its mode.
    pub(crate) tcp: Option<Listen>,
    /// The origins of web pages that may ask, such as `https://panel.example`.
    pub(crate) allow_origins: Vec<String>,
}

/// Passes on what is allowed.
pub(crate) async fn guarded(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    match guard.check(request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            let is_unknown = refusal.status == StatusCode::UNAUTHORIZED;
            let mut reply = refusal.into_response();
            if is_unknown {
                reply
                    .headers_mut()
                    .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            reply
        }
    }
}

impl Guard {
    fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        for origin in headers.get_all(ORIGIN) {
            if !self
                .allow_origins
                .iter()
                .any(|allowed| origin == allowed.as_str())
            {
                return Err(ApiError::forbidden(
                    "the request comes from a web page that may not ask; start the server with --allow-origin to let it",
                ));
            }
        }
        let Some(tcp) = &self.tcp else { return Ok(()) };
        let named = headers
            .get_all(HOST)
            .iter()
            .map(|host| host.to_str().ok().and_then(|host| host.parse::<Authority>().ok()));
        let mut named: Vec<Option<Authority>> = named.collect();
        named.extend(uri.authority().cloned().map(Some));
        let is_known =
            |host: &Option<Authority>| host.as_ref().is_some_and(|host| tcp.is_called(host.host()));
        if named.is_empty() || !named.iter().all(is_known) {
            return Err(ApiError::forbidden(
                "the Host of the request is no address, not localhost, and no name of this server; start it with --allow-host \
                 to give it one",
            ));
        }
        match &tcp.tokens {
            Some(tokens) if !given(headers).any(|token| tokens.have(token)) => Err(ApiError::unauthorized(
                "over TCP the server takes a token of its token file, as `Authorization: Bearer TOKEN` or `X-API-Key: TOKEN` \
                 (of the CLI: STENCIL_TOKEN)",
            )),
            _ => Ok(()),
        }
    }
}

impl Listen {
    fn is_called(&self, host: &str) -> bool {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        bare.unwrap_or(host).parse::<IpAddr>().is_ok()
            || host.eq_ignore_ascii_case("localhost")
            || self
                .allow_hosts
                .iter()
                .any(|allowed| host.eq_ignore_ascii_case(allowed))
    }
}

/// The tokens that a request has.
fn given(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let bearer = headers.get_all(AUTHORIZATION).iter().filter_map(|value| {
        let (scheme, token) = value.as_bytes().split_at_checked("Bearer ".len())?;
        scheme
            .eq_ignore_ascii_case(b"Bearer ")
            .then_some(token.trim_ascii())
    });
    let key = headers
        .get_all(API_KEY)
        .iter()
        .map(|value| value.as_bytes().trim_ascii());
    bearer.chain(key)
}
