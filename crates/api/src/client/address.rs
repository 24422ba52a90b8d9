//! Where the server is, and the way there.

use std::fmt;
use std::io;
use std::path::PathBuf;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::http::uri::{PathAndQuery, Scheme};
use hyper::{Request, Response, Uri};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::TokioExecutor;
use hyperlocal::UnixConnector;

type Body = Full<Bytes>;

/// The server's socket, or its address.
#[derive(Clone, Debug)]
pub(super) enum Address {
    Socket {
        path: PathBuf,
        http: Client<UnixConnector, Body>,
    },
    Tcp {
        url: Uri,
        http: Client<HttpConnector, Body>,
    },
}

impl Address {
    pub(super) fn socket(path: PathBuf) -> Self {
        let http = Client::builder(TokioExecutor::new()).build(UnixConnector);
        Self::Socket { path, http }
    }

    /// `http://HOST:PORT`, and nothing behind it; else why not.
    pub(super) fn url(text: &str) -> Result<Self, &'static str> {
        let url: Uri = text.parse().map_err(|_| "it is no URL")?;
        if url.scheme() == Some(&Scheme::HTTPS) {
            return Err("https is not spoken; let a proxy on this host do that, and name it");
        }
        if url.scheme() != Some(&Scheme::HTTP) || url.host().is_none_or(str::is_empty) {
            return Err("it does not begin with http:// and a host");
        }
        if url.path_and_query().is_some_and(|path| path.as_str() != "/") {
            return Err("something follows the host and its port");
        }
        let http = Client::builder(TokioExecutor::new()).build_http();
        Ok(Self::Tcp { url, http })
    }

    /// The URI of a route.
    pub(super) fn uri(&self, route: &str) -> io::Result<Uri> {
        match self {
            Self::Socket { path, .. } => Ok(hyperlocal::Uri::new(path, route).into()),
            Self::Tcp { url, .. } => {
                let mut parts = url.clone().into_parts();
                parts.path_and_query = Some(PathAndQuery::try_from(route).map_err(io::Error::other)?);
                Uri::from_parts(parts).map_err(io::Error::other)
            }
        }
    }

    pub(super) async fn request(&self, request: Request<Body>) -> Result<Response<Incoming>, Error> {
        match self {
            Self::Socket { http, .. } => http.request(request).await,
            Self::Tcp { http, .. } => http.request(request).await,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket { path, .. } => path.display().fmt(f),
            Self::Tcp { url, .. } => f.write_str(url.to_string().trim_end_matches('/')),
        }
    }
}
