//! Unix sockets to listen on: bound at a path, or inherited from the parent process.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd as _, RawFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// Where the API is served: the value of `--api-socket`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ApiSocket {
    /// A path to bind.
    Path(PathBuf),
    /// A file descriptor, inherited from the parent, that listens already.
    Inherited(RawFd),
}

/// A socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The value of `--api-socket` is neither of `path=PATH`, `PATH` and `fd=N`.
    #[error("--api-socket is {0:?}; right are path=PATH, PATH and fd=N")]
    Syntax(String),
    /// The inherited descriptor does not listen.
    #[error("file descriptor {0} is not a listening socket")]
    NotListening(RawFd, #[source] io::Error),
    /// Somebody listens at the path.
    #[error("{0:?} is in use: another process listens on it")]
    InUse(PathBuf),
    /// There is something else at the path.
    #[error("{0:?} exists and is not a socket; it is left alone")]
    NotASocket(PathBuf),
    /// The path cannot be bound.
    #[error("cannot listen on {0:?}")]
    Bind(PathBuf, #[source] io::Error),
}

impl FromStr for ApiSocket {
    type Err = SocketError;

    fn from_str(text: &str) -> Result<Self, SocketError> {
        let wrong = || SocketError::Syntax(text.to_owned());
        if let Some(number) = text.strip_prefix("fd=") {
            return number
                .parse()
                .ok()
                .filter(|fd| *fd >= 0)
                .map(Self::Inherited)
                .ok_or_else(wrong);
        }
        let path = text.strip_prefix("path=").unwrap_or(text);
        if path.is_empty() {
            Err(wrong())
        } else {
            Ok(Self::Path(path.into()))
        }
    }
}

impl ApiSocket {
    /// Listens, without blocking.
    pub(crate) fn listen(&self) -> Result<Listening, SocketError> {
        match self {
            Self::Path(path) => Listening::bind(path),
            Self::Inherited(number) => Listening::inherit(*number),
        }
    }
}

/// A listening, non-blocking socket, with the path that has to be removed afterwards where it was made here.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) listener: UnixListener,
    pub(crate) path: Option<BoundPath>,
}

impl Listening {
    /// Binds `path`. A socket that nobody listens on any more is replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |error| SocketError::Bind(path.to_owned(), error);
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(found) if !found.file_type().is_socket() => {
                return Err(SocketError::NotASocket(path.to_owned()));
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(failed)?;
                }
                Ok(_) => return Err(SocketError::InUse(path.to_owned())),
                Err(error) => return Err(failed(error)),
            },
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        let made = fs::symlink_metadata(path).map_err(failed)?;
        let path_made = BoundPath {
            path: path.to_owned(),
            device: made.dev(),
            inode: made.ino(),
        };
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            listener,
            path: Some(path_made),
        })
    }

    fn inherit(number: RawFd) -> Result<Self, SocketError> {
        let failed = |error: io::Error| SocketError::NotListening(number, error);
        // SAFETY: borrowed only for this question, which fails cleanly on a descriptor that is not open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        match rustix::net::sockopt::socket_acceptconn(borrowed) {
            Ok(true) => {}
            Ok(false) => return Err(failed(io::ErrorKind::InvalidInput.into())),
            Err(error) => return Err(failed(error.into())),
        }
        // SAFETY: the parent handed the descriptor over for this; nothing else in the process uses it.
        let listener = unsafe { UnixListener::from_raw_fd(number) };
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener, path: None })
    }
}

/// The next who connects. Where that fails, for want of file descriptors as a rule, the next attempt has to wait until
/// somebody may have hung up.
pub(crate) async fn accept(listener: &tokio::net::UnixListener) -> tokio::net::UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// A socket's path; removed when this is dropped, provided that it is still the socket that was made.
#[derive(Debug)]
pub(crate) struct BoundPath {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (self.device, self.inode));
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_in_use_is_refused_and_a_stale_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = Listening::bind(&path).unwrap();
        assert!(matches!(Listening::bind(&path), Err(SocketError::InUse(_))));
        // As after a kill: the path stays, nobody listens.
        std::mem::forget(first.path);
        drop(first.listener);
        let second = Listening::bind(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes");
        fs::write(&path, "keep me").unwrap();
        assert!(matches!(Listening::bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "keep me");
    }

    #[test]
    fn a_path_that_somebody_else_took_over_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listening = Listening::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(listening);
        assert!(path.exists());
    }
}
