//! Tells whatever would go on for long that the server is about to end.

use tokio::sync::watch;

/// Whether the server is about to end; what would otherwise go on for long ends early then.
#[derive(Clone, Debug)]
pub(crate) struct Closing(pub(crate) watch::Receiver<bool>);

impl Closing {
    /// Returns when the server is about to end.
    pub(crate) async fn begun(mut self) {
        // An error means that the server is gone already.
        let _ = self.0.wait_for(|closing| *closing).await;
    }
}
