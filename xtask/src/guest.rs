//! Builds the bare-metal test guest, `fixtures/guest`, into `target/fixtures/guest.elf`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::{env, fs, io, process};

/// What the guest is compiled for; its linker script makes it a bare-metal program.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Why there is no guest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    /// cargo is missing.
    #[error("cannot run {}", cargo.display())]
    Run {
        cargo: PathBuf,
        #[source]
        source: io::Error,
    },
    /// cargo has said why on its standard error.
    #[error("cargo could not build fixtures/guest: {0}")]
    Build(ExitStatus),
    /// The built guest could not be put in its place.
    #[error("cannot write {}", path.display())]
    Place {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Builds the guest, if anything in it has changed, and returns the path of its ELF file.
///
/// # Errors
/// If cargo fails, or `target/fixtures` is not writable.
pub(crate) fn build() -> Result<PathBuf, GuestError> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."));
    let package = root.join("fixtures/guest");
    let target = root.join("target/guest");
    let cargo = env::var_os("CARGO").unwrap_or(OsString::from("cargo"));
    let status = Command::new(&cargo)
        .args([
            "build",
            "--quiet",
            "--release",
            "--locked",
            "--target",
            TARGET,
            "--manifest-path",
        ])
        .arg(package.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        // Flags meant for the host's programs, such as those of a coverage run, do not fit a bare-metal one.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .map_err(|source| GuestError::Run {
            cargo: cargo.into(),
            source,
        })?;
    if !status.success() {
        return Err(GuestError::Build(status));
    }
    let elf = root.join("target/fixtures/guest.elf");
    place(&target.join(TARGET).join("release/stencil-guest"), &elf).map_err(|source| GuestError::Place {
        path: elf.clone(),
        source,
    })?;
    Ok(elf)
}

/// Makes `to` a copy of `from`: whoever opens it finds the old file or the new one, whole.
fn place(from: &Path, to: &Path) -> io::Result<()> {
    let built = fs::read(from)?;
    if fs::read(to).is_ok_and(|placed| placed == built) {
        return Ok(());
    }
    if let Some(directory) = to.parent() {
        fs::create_dir_all(directory)?;
    }
    let new = to.with_extension(format!("{}.new", process::id()));
    fs::write(&new, built)?;
    fs::rename(&new, to)
}
