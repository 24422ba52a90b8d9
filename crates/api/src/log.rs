//! One line in the log for each request. Where it is written, and that nobody waits for that, is the binary's affair.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::extract::Request;
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

/// Numbers the requests, so that lines about one request can be told from those about another.
static REQUESTS: AtomicU64 = AtomicU64::new(1);

/// Answers within a span that names the request, so that whatever is logged on the way names it too.
pub(crate) async fn logged(request: Request, next: Next) -> Response {
    let number = REQUESTS.fetch_add(1, Ordering::Relaxed);
    let span =
        tracing::error_span!("request", number, method = %request.method(), path = request.uri().path());
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD);
    let begun = Instant::now();
    let reply = next.run(request).instrument(span.clone()).await;
    let (status, took) = (reply.status().as_u16(), begun.elapsed());
    span.in_scope(|| {
        if changes {
            tracing::info!(status, ?took, "answered");
        } else {
            tracing::debug!(status, ?took, "answered");
        }
    });
    reply
}
