//! The client's side of commands in a guest.

use std::io;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use http_body_util::Full;
use hyper::header::{
    CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::sync::{Mutex, Semaphore};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::{Client, ClientError, Result, instance};
use crate::exec::{
    CommandEnd, CommandResult, FromCommand, MESSAGE_LIMIT, RunCommand, STDERR, STDIN, STDIN_WINDOW, STDOUT,
    StreamCommand, ToCommand,
};

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Something that a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandEvent {
    /// It wrote to its standard output, or its terminal.
    Stdout(Bytes),
    /// It wrote to its standard error.
    Stderr(Bytes),
    /// It ended, and all that it wrote was told.
    Exited(CommandEnd),
}

/// A command that runs: what it does. Dropped before its end together with its [`CommandInput`], it is killed.
#[derive(Debug)]
pub struct CommandOutput {
    client: Client,
    source: SplitStream<Socket>,
    /// Of the input; what the server grants comes here.
    credit: Arc<Semaphore>,
}

/// A command that runs: what is given and done to it.
#[derive(Debug)]
pub struct CommandInput {
    client: Client,
    sink: Mutex<SplitSink<Socket, Message>>,
    /// How many bytes may be sent now; closed when the output is gone.
    credit: Arc<Semaphore>,
}

impl Client {
    /// `POST /instances/{id}/exec`
    ///
    /// # Errors
    /// [`ClientError`]; refused with `no_agent`, `invalid_state`, `not_executed` or `agent_lost`.
    pub async fn exec(&self, id: &str, asked: &RunCommand) -> Result<CommandResult> {
        self.tell(Method::POST, &instance(id, "/exec"), asked).await
    }

    /// `GET /instances/{id}/exec`: a command whose input and output are passed on as they come.
    ///
    /// # Errors
    /// As [`exec`](Self::exec); also later, by [`CommandOutput::next`].
    pub async fn exec_stream(
        &self,
        id: &str,
        asked: &StreamCommand,
    ) -> Result<(CommandInput, CommandOutput)> {
        let (sink, source) = self.upgrade(&instance(id, "/exec")).await?.split();
        let credit = Arc::new(Semaphore::new(STDIN_WINDOW as usize));
        let input = CommandInput {
            client: self.clone(),
            sink: Mutex::new(sink),
            credit: Arc::clone(&credit),
        };
        let output = CommandOutput {
            client: self.clone(),
            source,
            credit,
        };
        let asked = serde_json::to_string(asked).map_err(|source| self.broken(source))?;
        input.send(Message::Text(asked.into())).await?;
        Ok((input, output))
    }

    /// A WebSocket (RFC 6455, 4.1).
    async fn upgrade(&self, path: &str) -> Result<Socket> {
        let key = generate_key();
        let uri = self.address.uri(path).map_err(|source| self.broken(source))?;
        let request = Request::get(uri)
            .header(CONNECTION, "Upgrade")
            .header(UPGRADE, "websocket")
            .header(SEC_WEBSOCKET_VERSION, "13")
            .header(SEC_WEBSOCKET_KEY, &key)
            .body(Full::default())
            .map_err(|source| self.broken(source))?;
        let reply = self.request(request).await?;
        let accept = reply
            .headers()
            .get(SEC_WEBSOCKET_ACCEPT)
            .map(HeaderValue::as_bytes);
        if reply.status() != StatusCode::SWITCHING_PROTOCOLS
            || accept != Some(derive_accept_key(key.as_bytes()).as_bytes())
        {
            return Err(self.broken(io::Error::other("the server did not open a WebSocket")));
        }
        let stream = hyper::upgrade::on(reply)
            .await
            .map_err(|source| self.broken(source))?;
        Ok(WebSocketStream::from_raw_socket(TokioIo::new(stream), Role::Client, None).await)
    }
}

impl CommandOutput {
    /// The next thing that the command does; the last one is [`CommandEvent::Exited`].
    ///
    /// # Errors
    /// [`ClientError`]; refused as [`Client::exec`]. What became of the command is not known.
    pub async fn next(&mut self) -> Result<CommandEvent> {
        loop {
            let message = match self.source.next().await {
                Some(message) => message.map_err(|source| self.client.broken(source))?,
                None => {
                    let cut = io::Error::from(io::ErrorKind::UnexpectedEof);
                    return Err(self.client.broken(cut));
                }
            };
            match message {
                Message::Binary(bytes) => match bytes.first() {
                    Some(&STDOUT) => return Ok(CommandEvent::Stdout(bytes.slice(1..))),
                    Some(&STDERR) => return Ok(CommandEvent::Stderr(bytes.slice(1..))),
                    // Of a later version.
                    _ => {}
                },
                Message::Text(text) => match serde_json::from_str(&text) {
                    Ok(FromCommand::Started { .. }) => {}
                    Ok(FromCommand::StdinCredit(bytes)) => {
                        // A window at most, whatever is granted.
                        let room = (STDIN_WINDOW as usize).saturating_sub(self.credit.available_permits());
                        self.credit.add_permits(room.min(bytes as usize));
                    }
                    Ok(FromCommand::Exited(end)) => {
                        self.credit.close();
                        return Ok(CommandEvent::Exited(end));
                    }
                    Ok(FromCommand::Error(error)) => {
                        return Err(ClientError::Refused {
                            status: error.status,
                            body: Box::new(error.body),
                        });
                    }
                    Err(source) => {
                        let status = StatusCode::SWITCHING_PROTOCOLS.as_u16();
                        return Err(ClientError::Protocol { status, source });
                    }
                },
                _ => {}
            }
        }
    }
}

impl Drop for CommandOutput {
    fn drop(&mut self) {
        // Nobody hears any more what is granted.
        self.credit.close();
    }
}

impl CommandInput {
    /// Gives the command bytes to read; waits while it has enough unread, and for the output to be asked for what comes next: there
    /// the server tells how much it takes.
    ///
    /// # Errors
    /// [`ClientError`] when the command has ended or the connection is gone, which the output tells too.
    pub async fn write(&self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(MESSAGE_LIMIT - 1) {
            // A chunk is far less than 4 GiB.
            let credit = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
            let granted = self.credit.acquire_many(credit).await;
            let over = |_closed| self.client.broken(io::Error::from(io::ErrorKind::BrokenPipe));
            granted.map_err(over)?.forget();
            let mut message = BytesMut::with_capacity(1 + chunk.len());
            message.put_u8(STDIN);
            message.put(chunk);
            self.send(Message::Binary(message.freeze())).await?;
        }
        Ok(())
    }

    /// Does something to the command, also while a [`write`](Self::write) waits.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn tell(&self, said: ToCommand) -> Result<()> {
        let text = serde_json::to_string(&said).map_err(|source| self.client.broken(source))?;
        self.send(Message::Text(text.into())).await
    }

    async fn send(&self, message: Message) -> Result<()> {
        let sent = self.sink.lock().await.send(message).await;
        sent.map_err(|source| self.client.broken(source))
    }
}
