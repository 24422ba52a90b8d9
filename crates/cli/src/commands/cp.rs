//! `stencil cp`: files and directories into a guest and out of it. The agent in it packs and unpacks on its side
//! (`stencil_agent::archive`).

mod chunks;

use std::ffi::OsString;
use std::fs;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use stencil_agent::PROGRAM as AGENT;
use stencil_agent::archive::{self, ArchiveError, Notes, PARTIAL};
use stencil_api::client::{Client, CommandEvent};
use stencil_api::exec::{CommandEnd, StreamCommand, ToCommand};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use self::chunks::{CHUNK, Chunks, Stream};
use super::reference;
use crate::args::Cp;
use crate::failure::Failure;
use crate::output::printable;

/// How many chunks of an archive are between who makes it and who takes it.
const CHUNKS: usize = 4;
/// The most bytes of what the guest complains that are told.
const COMPLAINT: usize = 16 << 10;

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
    let name = own_name(from)?;
    // Before there is anything that a signal could leave behind.
    let mut interruption = Interruption::new()?;
    let (sender, mut packed) = mpsc::channel(CHUNKS);
    let from = from.to_owned();
    let packing = tokio::task::spawn_blocking(move || {
        archive::pack(&from, &name, BufWriter::with_capacity(CHUNK, Chunks(sender)))
    });
    let command = StreamCommand {
        stdin: true,
        ..command(["unpack", path])
    };
    let (input, mut output) = client.exec_stream(id, &command).await?;
    let feeding = async {
        while let Some(chunk) = packed.recv().await {
            if input.write(&chunk).await.is_err() {
                break;
            }
        }
        drop(packed);
        let packed = finished(packing).await;
        // An archive that ends before its end is not unpacked, and nothing is left of it.
        let _ = input.tell(ToCommand::StdinClosed).await;
        packed
    };
    let ending = async {
        let mut complaint = Vec::new();
        loop {
            match output.next().await? {
                CommandEvent::Stderr(bytes) => complain(&mut complaint, &bytes),
                CommandEvent::Stdout(_) => {}
                CommandEvent::Exited(end) => return Ok::<_, Failure>((end, complaint)),
            }
        }
    };
    // It is dropped in the middle of what it sends where somebody else has something to say.
    let mut feeding = Box::pin(feeding);
    tokio::pin!(ending);
    let first = tokio::select! {
        packed = &mut feeding => First::Packed(packed),
        end = &mut ending => First::Ended(end?),
        code = interruption.comes() => First::Interrupted(code),
    };
    drop(feeding);
    let (packed, (end, complaint)) = match first {
        First::Packed(packed) => (Some(packed), ending.await?),
        First::Ended(end) => (None, end),
        First::Interrupted(code) => {
            let _ = input.tell(ToCommand::StdinClosed).await;
            let _ = ending.await;
            return Err(Failure::Ended { code });
        }
    };
    // Why it could not be packed says more than that its archive is damaged.
    let is_partial = match packed {
        Some(packed) => tell(&packed?),
        None => false,
    };
    succeeded(end, &complaint, is_partial)
}

/// What happens first while something is copied into a guest.
enum First {
    Packed(Result<Notes, Failure>),
    Ended((CommandEnd, Vec<u8>)),
    Interrupted(u8),
}

/// Out of the guest: below `to` if that is a directory here, else as `to`.
async fn pull(id: &str, path: &str, to: &Path, client: &Client) -> Result<(), Failure> {
    let asked = Path::new(path).file_name().map(OsString::from);
    let asked = match asked {
        Some(asked) => asked,
        None if to.is_dir() => {
            return Err(Failure::Copy(format!(
                "{path} has no name to be copied under; give one, such as {}",
                to.join("copy").display()
            )));
        }
        None => OsString::from("copy"),
    };
    // Before there is anything that a signal could leave behind.
    let mut interruption = Interruption::new()?;
    let (_input, mut output) = client.exec_stream(id, &command(["pack", path])).await?;
    let (chunks, packed) = mpsc::channel::<Bytes>(CHUNKS);
    let to = to.to_owned();
    let (whole, is_whole) = std::sync::mpsc::channel::<()>();
    let unpacking = tokio::task::spawn_blocking(move || {
        let unpacked = archive::unpack(Stream::new(packed), &to, archive::From::Stranger(&asked))?;
        match is_whole.recv() {
            Ok(()) => unpacked.keep(),
            // Why not, the guest tells.
            Err(_) => Ok(Notes::default()),
        }
    });
    let mut complaint = Vec::new();
    let receiving = async {
        loop {
            match output.next().await? {
                CommandEvent::Stdout(bytes) => {
                    // Where it is not taken any further, who unpacks says why.
                    if chunks.send(bytes).await.is_err() {
                        return Ok(None);
                    }
                }
                CommandEvent::Stderr(bytes) => complain(&mut complaint, &bytes),
                CommandEvent::Exited(end) => return Ok::<_, Failure>(Some(end)),
            }
        }
    };
    let received = tokio::select! {
        received = receiving => received,
        code = interruption.comes() => Err(Failure::Ended { code }),
    };
    let is_sent = matches!(&received, Ok(Some(end)) if matches!(end.code(), 0 | PARTIAL));
    if is_sent {
        // Only then it takes its place. Nobody else waits for this.
        let _ = whole.send(());
    }
    drop((whole, chunks));
    let unpacked = finished(unpacking).await;
    match received? {
        Some(end) if is_sent => succeeded(end, &complaint, tell(&unpacked?)),
        Some(end) => succeeded(end, &complaint, false),
        None => {
            unpacked?;
            Err(Failure::Copy("the guest sent more than an archive".to_owned()))
        }
    }
}

/// The name of what is at a path here, also of `.` and `a/..`.
fn own_name(path: &Path) -> Result<OsString, Failure> {
    let whole = match path.file_name() {
        Some(name) => return Ok(name.to_owned()),
        None => fs::canonicalize(path)
            .map_err(|error| Failure::Archive(ArchiveError::Read(path.to_owned(), error)))?,
    };
    let name = whole.file_name().map(OsString::from);
    name.ok_or_else(|| Failure::Archive(ArchiveError::NoName(path.to_owned())))
}

fn command<const N: usize>(words: [&str; N]) -> StreamCommand {
    StreamCommand {
        cmd: [AGENT].into_iter().chain(words).map(str::to_owned).collect(),
        ..StreamCommand::default()
    }
}

/// The signals that ask for the end. From when this is made they do not end this program by themselves.
struct Interruption {
    interrupt: Signal,
    terminate: Signal,
}

impl Interruption {
    fn new() -> Result<Self, Failure> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).map_err(Failure::Signal)?,
            terminate: signal(SignalKind::terminate()).map_err(Failure::Signal)?,
        })
    }

    /// Waits for one; the exit code that tells it.
    async fn comes(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
        }
    }
}

fn complain(complaint: &mut Vec<u8>, bytes: &[u8]) {
    let room = COMPLAINT - complaint.len();
    complaint.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

/// Tells what was not copied as it is; whether something is missing.
fn tell(notes: &Notes) -> bool {
    for line in notes.lines() {
        eprintln!("{line}");
    }
    notes.is_partial()
}

/// What the guest said and how its side ended.
fn succeeded(end: CommandEnd, complaint: &[u8], is_partial: bool) -> Result<(), Failure> {
    let complaint = String::from_utf8_lossy(complaint);
    let complaint = complaint.trim();
    let is_partial = match end.code() {
        0 => is_partial,
        PARTIAL => true,
        _ => return Err(Failure::Copy(format!("in the guest: {}", printable(complaint)))),
    };
    for line in complaint.lines() {
        eprintln!("in the guest: {}", printable(line));
    }
    if is_partial {
        return Err(Failure::Copy(
            "not all was copied; what is missing is named above".to_owned(),
        ));
    }
    Ok(())
}

async fn finished<T>(work: JoinHandle<Result<T, ArchiveError>>) -> Result<T, Failure> {
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
    fn what_is_here_has_a_name_also_where_its_path_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(dir.path()).unwrap();
        let name = path.file_name().unwrap();
        fs::create_dir(path.join("below")).unwrap();
        assert_eq!(own_name(&path.join("below/..")).unwrap(), name);
        assert_eq!(own_name(&path.join("below")).unwrap(), "below");
        assert!(own_name(Path::new("/")).is_err());
    }
}
