//! Builds what the tasks drive: the two binaries in release, and the test guest.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::command::{self, CommandError, Output};
use crate::guest;

/// A cold build of every dependency on a small host.
const BUILD_LIMIT: Duration = Duration::from_secs(30 * 60);

/// What was to be driven could not be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("{what} failed:\n{output}")]
    Cargo { what: &'static str, output: String },
    #[error("cargo metadata names no target directory")]
    NoTargetDirectory,
    #[error("the test guest could not be built")]
    Guest(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What was built.
#[derive(Clone, Debug)]
pub(crate) struct Built {
    /// The `stencil` binary; the microVM's is beside it.
    pub(crate) stencil: PathBuf,
    /// The bare-metal test guest, an ELF with a PVH note.
    pub(crate) guest: PathBuf,
}

/// The root of the workspace.
pub(crate) fn workspace() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// The cargo that runs this task.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace());
    cargo
}

/// Where cargo puts what it builds in this workspace.
pub(crate) fn target_directory() -> Result<PathBuf, BuildError> {
    let mut metadata = cargo();
    metadata.args(["metadata", "--no-deps", "--format-version=1"]);
    let output = cargo_run("cargo metadata", &mut metadata)?;
    // Warnings of cargo may stand around the one line of JSON.
    let json = output
        .lines()
        .find_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let directory = json.as_ref().and_then(|json| json["target_directory"].as_str());
    directory.map(PathBuf::from).ok_or(BuildError::NoTargetDirectory)
}

/// Builds the server, the client and the microVM in release, and the guest.
pub(crate) fn build() -> Result<Built, BuildError> {
    cargo_run("cargo build", &mut release_server())?;
    cargo_run("cargo rustc", &mut release_microvm())?;
    Ok(Built {
        stencil: target_directory()?.join("release/stencil"),
        guest: test_guest()?,
    })
}

/// The microVM alone, and what it boots.
#[derive(Clone, Debug)]
pub(crate) struct BuiltVmm {
    /// The `stencil-microvm` binary.
    pub(crate) microvm: PathBuf,
    /// The bare-metal test guest, an ELF with a PVH note.
    pub(crate) guest: PathBuf,
}

/// Builds the microVM in release, and the guest.
pub(crate) fn microvm() -> Result<BuiltVmm, BuildError> {
    cargo_run("cargo rustc", &mut release_microvm())?;
    Ok(BuiltVmm {
        microvm: target_directory()?.join("release/stencil-microvm"),
        guest: test_guest()?,
    })
}

/// Builds, in release, the program that measures what the kernel alone takes for a fork.
pub(crate) fn kvm_floor() -> Result<PathBuf, BuildError> {
    let mut build = cargo();
    build.args([
        "build",
        "--release",
        "--locked",
        "--package=stencil-benches",
        "--bin=kvm-floor",
    ]);
    cargo_run("cargo build", &mut build)?;
    Ok(target_directory()?.join("release/kvm-floor"))
}

/// Builds the server, which is the client too, in release.
pub(crate) fn release_server() -> Command {
    let mut build = cargo();
    build.args(["build", "--release", "--locked", "--package=stencil"]);
    build
}

/// Builds the microVM in release, linked statically and at a fixed address: each fork starts one, and so it starts sooner
/// and has less memory of its own. Only this package is built so, for which cargo has no setting.
pub(crate) fn release_microvm() -> Command {
    let mut build = cargo();
    build.args(["rustc", "--release", "--locked", "--package=stencil-microvm"]);
    build.args(["--bin=stencil-microvm", "--"]);
    build.args(["-Ctarget-feature=+crt-static", "-Crelocation-model=static"]);
    build
}

/// Builds the agent of Linux guests in release.
pub(crate) fn agent() -> Result<PathBuf, BuildError> {
    cargo_run("cargo rustc", &mut release_agent())?;
    Ok(target_directory()?.join("release/stencil-agent"))
}

/// Builds the agent in release, as [`for_guests`].
pub(crate) fn release_agent() -> Command {
    for_guests("stencil-agent")
}

/// Builds the program that asks a guest's kernel for random bytes.
pub(crate) fn getrandom() -> Result<PathBuf, BuildError> {
    cargo_run("cargo rustc", &mut for_guests("stencil-getrandom"))?;
    Ok(target_directory()?.join("release/stencil-getrandom"))
}

/// Builds a package's program of the same name in release, linked statically, as its guest has no libraries, and small, as each
/// guest unpacks it.
fn for_guests(package: &str) -> Command {
    let mut build = cargo();
    build.args([
        "rustc",
        "--release",
        "--locked",
        "--package",
        package,
        "--bin",
        package,
    ]);
    build.args([
        "--",
        "-Ctarget-feature=+crt-static",
        "-Crelocation-model=static",
        "-Cstrip=symbols",
    ]);
    build
}

fn test_guest() -> Result<PathBuf, BuildError> {
    guest::build().map_err(|error| BuildError::Guest(error.into()))
}

fn cargo_run(what: &'static str, cargo: &mut Command) -> Result<String, BuildError> {
    let finished = command::run(cargo, BUILD_LIMIT, Output::Kept)?;
    if finished.succeeded() {
        Ok(finished.output)
    } else {
        Err(BuildError::Cargo {
            what,
            output: finished.output,
        })
    }
}
