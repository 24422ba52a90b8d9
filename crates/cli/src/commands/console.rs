//! `stencil console`: what the guest printed, and input for it.

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use stencil_api::client::{Client, ClientError};
use stencil_api::request::ReadConsole;

use crate::args::Console;
use crate::failure::Failure;
use crate::input::standard_input;
use crate::output;

pub(super) async fn console(asked: Console, client: &Client) -> Result<(), Failure> {
    let Some(text) = asked.send else {
        let printed = ReadConsole {
            tail: asked.tail,
            follow: asked.follow,
        };
        return print(client.console(&asked.id, printed).await?).await;
    };
    if !asked.follow {
        return send(&asked.id, text, client).await;
    }
    // Listens before it speaks, so that no answer is missed.
    let answers = ReadConsole {
        tail: asked.tail.or(Some(0)),
        follow: true,
    };
    let answers = client.console(&asked.id, answers).await?;
    tokio::try_join!(send(&asked.id, text, client), print(answers)).map(|_| ())
}

async fn print(mut chunks: impl Stream<Item = Result<Bytes, ClientError>> + Unpin) -> Result<(), Failure> {
    while let Some(chunk) = chunks.next().await {
        output::write(&chunk?)?;
    }
    Ok(())
}

async fn send(id: &str, text: String, client: &Client) -> Result<(), Failure> {
    if text != "-" {
        return Ok(client.console_write(id, text + "\n").await?);
    }
    let mut input = standard_input();
    while let Some(chunk) = input.recv().await {
        client.console_write(id, chunk.map_err(Failure::Input)?).await?;
    }
    Ok(())
}
