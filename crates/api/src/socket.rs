//! The Unix socket that the server listens on: only its owner can open it from the first moment, and it takes its name
//! in one step, so that a client finds a server that listens or none.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use stencil_core::layout::MAX_SOCKET_PATH;

/// Only the owner reads and writes, and so connects.
const OWNER_ONLY: Mode = Mode::RUSR.union(Mode::WUSR);
/// Connections that wait to be accepted; the kernel cuts it to its own limit.
const BACKLOG: i32 = 1024;

/// Why there is no listening at a path.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there already.
    #[error("a server listens at {} already; stop it, or choose another socket", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else has the name.
    #[error("{} is there and is no socket; it is left alone: choose another name", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The path does not fit into a socket's address.
    #[error("{} is too long for a socket; at most {limit} bytes fit: choose a shorter one", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// How many bytes fit.
        limit: usize,
    },
    /// The system refused.
    #[error("cannot {what} the socket {}", path.display())]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A socket's name in the file system, removed when this is dropped if it is still this socket's.
#[derive(Debug)]
pub(crate) struct SocketName {
    path: PathBuf,
    device_and_inode: (u64, u64),
}

/// Listens at `path`; a socket that nobody listens on any more is replaced.
pub(crate) fn listen_at(path: &Path) -> Result<(UnixListener, SocketName), SocketError> {
    let io = |what| {
        move |errno: Errno| SocketError::Io {
            what,
            path: path.to_owned(),
            source: errno.into(),
        }
    };
    let too_long = || SocketError::PathTooLong {
        path: path.to_owned(),
        limit: MAX_SOCKET_PATH,
    };
    refuse_if_taken(path)?;

    // Bound under another name in the same directory; it must not be longer, or it would not fit where the path does.
    let temporary = path.with_file_name(format!(".{:x}", std::process::id()));
    let address = SocketAddrUnix::new(path)
        .and(SocketAddrUnix::new(&temporary))
        .map_err(|_| too_long())?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(io("make"))?;
    // The file that `bind` makes has the mode of the socket itself, less the umask (Linux, net/unix/af_unix.c,
    // unix_bind_bsd): set before, there is no moment in which others could connect.
    fchmod(&socket, OWNER_ONLY).map_err(io("restrict"))?;
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(SocketError::Io {
                what: "replace",
                path: temporary,
                source: error,
            });
        }
        _ => {}
    }
    bind(&socket, &address).map_err(io("bind"))?;
    let named = listen(&socket, BACKLOG).map_err(io::Error::from).and_then(|()| {
        let metadata = fs::symlink_metadata(&temporary)?;
        fs::rename(&temporary, path)?;
        Ok(SocketName {
            path: path.to_owned(),
            device_and_inode: (metadata.dev(), metadata.ino()),
        })
    });
    match named {
        Ok(name) => Ok((UnixListener::from(socket), name)),
        Err(source) => {
            let _ = fs::remove_file(&temporary);
            Err(SocketError::Io {
                what: "name",
                path: path.to_owned(),
                source,
            })
        }
    }
}

/// Fails if a server listens at `path`, or if what is there is no socket.
fn refuse_if_taken(path: &Path) -> Result<(), SocketError> {
    let failed = |source: io::Error| SocketError::Io {
        what: "look at",
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => {
            return Err(SocketError::NotASocket {
                path: path.to_owned(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    let probe = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(|errno| failed(errno.into()))?;
    let address = SocketAddrUnix::new(path).map_err(|_| SocketError::PathTooLong {
        path: path.to_owned(),
        limit: MAX_SOCKET_PATH,
    })?;
    match connect(&probe, &address) {
        // Refused: the socket outlived its server.
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        // Again: a server is there and is behind with accepting.
        Ok(()) | Err(Errno::AGAIN) => Err(SocketError::InUse {
            path: path.to_owned(),
        }),
        Err(errno) => Err(failed(errno.into())),
    }
}

impl Drop for SocketName {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.device_and_inode);
        if is_ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_the_owner_can_open_it_and_it_goes_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (_listener, name) = listen_at(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(name);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn a_socket_with_a_server_behind_it_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _server = listen_at(&path).unwrap();
        assert!(matches!(listen_at(&path), Err(SocketError::InUse { .. })));
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_socket_that_outlived_its_server_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _server = listen_at(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn the_name_of_a_server_that_came_later_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, name) = listen_at(&path).unwrap();
        drop(listener);
        let _later = listen_at(&path).unwrap();
        drop(name);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes");
        fs::write(&path, "mine").unwrap();
        assert!(matches!(listen_at(&path), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[test]
    fn a_path_that_no_client_could_use_is_told_with_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s".repeat(MAX_SOCKET_PATH));
        let error = listen_at(&path).unwrap_err().to_string();
        assert!(
            error.ends_with("at most 107 bytes fit: choose a shorter one"),
            "{error}"
        );
    }
}
