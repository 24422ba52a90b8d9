//! `stencil cp`: files and directories into a guest and out of it, by the agent in it, which packs and unpacks tar streams.

mod archive;

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use stencil_api::client::{Client, CommandEvent};
use stencil_api::exec::{CommandEnd, RunCommand, StreamCommand, ToCommand};
use stencil_engine::AGENT_PROGRAM as AGENT;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::reference;
use crate::args::Cp;
use crate::failure::Failure;

/// How many chunks of an archive are between who makes it and who takes it.
const CHUNKS: usize = 4;
/// The most bytes of what the guest complains that are told.
const COMPLAINT: usize = 4 << 10;

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    Guest { id: String, path: String },
}

impl Place {
    /// `NAME:PATH` is in a guest, but for a path that begins with `.` or `/` or has a slash before the colon.
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some((id, path)) if !id.is_empty() && !id.starts_with('.') && !id.contains('/') => Self::Guest {
                id: id.to_owned(),
                path: if path.is_empty() { "." } else { path }.to_owned(),
            },
            _ => Self::Here(PathBuf::from(text)),
        }
    }
}

pub(super) async fn cp(asked: Cp, client: &Client) -> Result<(), Failure> {
    match (Place::parse(&asked.from), Place::parse(&asked.to)) {
        (Place::Here(from), Place::Guest { id, path }) => {
            let id = reference::exact(client, &id).await?;
            push(&from, &id, &path, client).await
        }
        (Place::Guest { id, path }, Place::Here(to)) => {
            let id = reference::exact(client, &id).await?;
            pull(&id, &path, &to, client).await
        }
        _ => Err(Failure::Copy(
            "one side of a copy is here and the other one in an instance, as NAME:PATH".to_owned(),
        )),
    }
}

/// Into the guest: below `path` if that is a directory there, else as `path`.
async fn push(from: &Path, id: &str, path: &str, client: &Client) -> Result<(), Failure> {
    // Nothing unpacks into a directory and into nothing else.
    let probe = client.exec(id, &RunCommand::new([AGENT, "unpack", path])).await?;
    let (directory, name) = if probe.end.code() == 0 {
        (path, None)
    } else {
        let (directory, name) = split(path).ok_or_else(|| {
            Failure::Copy(format!(
                "{path} is no directory in the guest; name one that is there"
            ))
        })?;
        (directory, Some(name.to_owned()))
    };
    let (chunks, mut packed) = mpsc::channel(CHUNKS);
    let from = from.to_owned();
    let packing = tokio::task::spawn_blocking(move || archive::pack(&from, name.as_deref(), chunks));
    let command = StreamCommand {
        stdin: true,
        ..command(["unpack", directory])
    };
    let (input, mut output) = client.exec_stream(id, &command).await?;
    let feeding = async {
        while let Some(chunk) = packed.recv().await {
            if input.write(&chunk).await.is_err() {
                break;
            }
        }
        drop(packed);
        // What could not be packed is not unpacked as if it were whole: the command is killed with its connection.
        if let Err(failed) = finished(packing).await {
            return failed;
        }
        let _ = input.tell(ToCommand::StdinClosed).await;
        std::future::pending().await
    };
    let mut complaint = Vec::new();
    let ending = async {
        loop {
            match output.next().await? {
                CommandEvent::Stderr(bytes) => complain(&mut complaint, &bytes),
                CommandEvent::Stdout(_) => {}
                CommandEvent::Exited(end) => return Ok::<_, Failure>(end),
            }
        }
    };
    let end = tokio::select! {
        end = ending => end?,
        failed = feeding => return Err(failed),
    };
    succeeded(end, &complaint)
}

/// Out of the guest: below `to` if that is a directory here, else as `to`.
async fn pull(id: &str, path: &str, to: &Path, client: &Client) -> Result<(), Failure> {
    let (_input, mut output) = client.exec_stream(id, &command(["pack", path])).await?;
    let (chunks, packed) = mpsc::channel::<Bytes>(CHUNKS);
    let to = to.to_owned();
    let (whole, is_whole) = std::sync::mpsc::channel();
    let unpacking = tokio::task::spawn_blocking(move || archive::unpack(&to, packed, &is_whole));
    let mut complaint = Vec::new();
    let end = loop {
        match output.next().await? {
            CommandEvent::Stdout(bytes) => {
                if chunks.send(bytes).await.is_err() {
                    // It is not taken any further, and says why.
                    finished(unpacking).await?;
                    return Err(Failure::Copy("the guest sent more than an archive".to_owned()));
                }
            }
            CommandEvent::Stderr(bytes) => complain(&mut complaint, &bytes),
            CommandEvent::Exited(end) => break end,
        }
    };
    let sent = succeeded(end, &complaint);
    if sent.is_ok() {
        // Only then it takes its place. Nobody else waits for this.
        let _ = whole.send(());
    }
    drop((whole, chunks));
    let unpacked = finished(unpacking).await;
    sent.and(unpacked)
}

fn command<const N: usize>(words: [&str; N]) -> StreamCommand {
    StreamCommand {
        cmd: [AGENT].into_iter().chain(words).map(str::to_owned).collect(),
        ..StreamCommand::default()
    }
}

/// The directory and the name of a path in a guest.
fn split(path: &str) -> Option<(&str, &str)> {
    let (directory, name) = match path.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((directory, name)) => (directory, name),
        None => (".", path),
    };
    (!matches!(name, "" | "." | "..")).then_some((directory, name))
}

fn complain(complaint: &mut Vec<u8>, bytes: &[u8]) {
    let room = COMPLAINT - complaint.len();
    complaint.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

fn succeeded(end: CommandEnd, complaint: &[u8]) -> Result<(), Failure> {
    if end.code() == 0 {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(complaint);
    Err(Failure::Copy(format!("in the guest: {}", complaint.trim())))
}

async fn finished(work: JoinHandle<io::Result<()>>) -> Result<(), Failure> {
    match work.await {
        Ok(done) => done.map_err(Failure::Archive),
        // Nobody aborts it, so the join fails only by its panic, which goes on here.
        Err(failed) => std::panic::resume_unwind(failed.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_in_a_guest_has_a_name_before_its_colon() {
        let guest = |id: &str, path: &str| Place::Guest {
            id: id.to_owned(),
            path: path.to_owned(),
        };
        assert_eq!(Place::parse("web:/etc/hosts"), guest("web", "/etc/hosts"));
        assert_eq!(Place::parse("web:"), guest("web", "."));
        for here in ["file", "./web:file", "/srv/web:file", "dir/web:file", ":file"] {
            assert_eq!(Place::parse(here), Place::Here(here.into()), "{here}");
        }
    }

    #[test]
    fn a_path_has_a_directory_and_a_name() {
        assert_eq!(split("/etc/hosts"), Some(("/etc", "hosts")));
        assert_eq!(split("/hosts"), Some(("/", "hosts")));
        assert_eq!(split("hosts"), Some((".", "hosts")));
        for none in ["", "/", "a/", "a/..", "."] {
            assert_eq!(split(none), None, "{none:?}");
        }
    }
}
