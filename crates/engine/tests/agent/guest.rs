//! The guest's end of a link, played by a test.

use stencil_agent::{Decoder, Epoch, EpochId, Frame, Nonce, ToGuest, ToHost, encode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::PATIENCE;

pub(crate) struct Guest {
    pub(crate) stream: UnixStream,
    decoder: Decoder<ToGuest>,
    unread: Vec<u8>,
    nonce: Nonce,
}

impl Guest {
    /// The guest that the link connects to next.
    pub(crate) async fn next(guests: &mut mpsc::UnboundedReceiver<UnixStream>) -> Self {
        let stream = timeout(PATIENCE, guests.recv()).await.unwrap().unwrap();
        Self {
            stream,
            decoder: Decoder::new(),
            unread: Vec::new(),
            nonce: Nonce::NONE,
        }
    }

    /// The same, whose agent is ready.
    pub(crate) async fn ready(guests: &mut mpsc::UnboundedReceiver<UnixStream>) -> Self {
        let mut guest = Self::next(guests).await;
        guest.take_epoch().await;
        guest
    }

    /// What the host says next; `None` when it has hung up.
    pub(crate) async fn hears(&mut self) -> Option<ToGuest> {
        loop {
            let mut unread = &self.unread[..];
            let found = self.decoder.next(&mut unread);
            let taken = self.unread.len() - unread.len();
            self.unread.drain(..taken);
            if let Some(found) = found {
                let Frame { nonce, message } = found.unwrap();
                if message == ToGuest::Hello {
                    self.nonce = nonce;
                }
                assert_eq!(nonce, self.nonce);
                return Some(message);
            }
            let read = timeout(PATIENCE, self.stream.read_buf(&mut self.unread));
            if read.await.unwrap().unwrap() == 0 {
                return None;
            }
        }
    }

    pub(crate) async fn hear(&mut self) -> ToGuest {
        self.hears().await.unwrap()
    }

    pub(crate) async fn say(&mut self, message: ToHost) {
        let mut frame = Vec::new();
        encode(self.nonce, &message, &mut frame).unwrap();
        self.stream.write_all(&frame).await.unwrap();
    }

    /// Says something that belongs to no conversation.
    pub(crate) async fn say_to_nobody(&mut self, message: ToHost) {
        let mut frame = Vec::new();
        encode(Nonce::NONE, &message, &mut frame).unwrap();
        self.stream.write_all(&frame).await.unwrap();
    }

    /// Is greeted, and answers with the epoch that it has.
    pub(crate) async fn greet(&mut self, epoch: Option<EpochId>) {
        assert_eq!(self.hear().await, ToGuest::Hello);
        self.say(ToHost::Hello { epoch, frozen: false }).await;
    }

    /// Is greeted, and given an epoch, which it does not acknowledge yet.
    pub(crate) async fn given_epoch(&mut self) -> Epoch {
        self.greet(None).await;
        match self.hear().await {
            ToGuest::Epoch(epoch) => epoch,
            other => panic!("an epoch was expected: {other:?}"),
        }
    }

    /// Is told the epoch that it has, and with it the time.
    pub(crate) async fn take_epoch_again(&mut self) -> Epoch {
        let ToGuest::Epoch(epoch) = self.hear().await else {
            panic!("the epoch was expected")
        };
        self.say(ToHost::EpochTaken { id: epoch.id }).await;
        epoch
    }

    pub(crate) async fn take_epoch(&mut self) -> Epoch {
        let epoch = self.given_epoch().await;
        self.say(ToHost::EpochTaken { id: epoch.id }).await;
        epoch
    }
}
