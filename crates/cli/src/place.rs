//! Where things are when nobody says: the data directory, and the server's socket in it.

use std::env;
use std::path::PathBuf;

use stencil_core::DataDir;

use crate::failure::Failure;

/// `/var/lib/stencil` for root; for others `stencil` in the user's data directory, as the XDG Base Directory
/// Specification has it: `$XDG_DATA_HOME` if it is absolute, else `~/.local/share`.
pub(crate) fn default_data() -> Result<PathBuf, Failure> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/stencil"));
    }
    let absolute = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
        .map(|data| data.join("stencil"))
        .ok_or(Failure::NoHome)
}

/// The socket of a server on the default data directory.
pub(crate) fn default_socket() -> Result<PathBuf, Failure> {
    Ok(DataDir::new(default_data()?).socket())
}

/// The path as the server sees it: its working directory is another one.
pub(crate) fn absolute(path: PathBuf) -> Result<PathBuf, Failure> {
    std::path::absolute(&path).map_err(|source| Failure::Path { path, source })
}
