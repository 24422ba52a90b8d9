//! A greeting and its answer, before a guest belongs to an instance.

use std::io;
use std::num::NonZeroU64;

use stencil_agent::{Decoder, Frame, Nonce, ToGuest, ToHost, encode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Bytes that are read at a time: an answer is one small frame.
const READ: usize = 4096;

/// Greets the agent at the other end, and waits for its answer for as long as the caller does; whether the users' processes
/// stand still.
///
/// # Errors
/// If the stream ends or breaks.
pub(crate) async fn greet(stream: &mut UnixStream) -> io::Result<bool> {
    let nonce = Nonce::new(rand::random::<NonZeroU64>());
    let mut hello = Vec::new();
    encode(nonce, &ToGuest::Hello, &mut hello).map_err(io::Error::other)?;
    stream.write_all(&hello).await?;
    let mut decoder = Decoder::<ToHost>::new();
    let mut chunk = [0; READ];
    loop {
        let read = stream.read(&mut chunk).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut unread = &chunk[..read];
        while let Some(found) = decoder.next(&mut unread) {
            if let Ok(Frame {
                nonce: of,
                message: ToHost::Hello { frozen, .. },
            }) = found
                && of == nonce
            {
                return Ok(frozen);
            }
        }
    }
}
