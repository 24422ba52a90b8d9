//! Looks for what a build and a VM need on this host, and installs what is missing or says how.

use std::env;
use std::fs::{self, DirEntry};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::command::{self, CommandError, Output};
use crate::host::{self, Host, HostError};
use crate::linux::{self, LinuxError};
use crate::report;

/// A slow mirror of packages.
const APT_LIMIT: Duration = Duration::from_secs(10 * 60);
const LOOK_LIMIT: Duration = Duration::from_secs(30);

/// Something is missing that this task could not install.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("this host lacks {missing}; run this line, then try again:\n    {line}")]
    Missing { missing: String, line: String },
    #[error("apt-get could not install {packages}:\n{output}")]
    Apt { packages: String, output: String },
}

/// Linux guests cannot be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoLinux {
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Guest(#[from] LinuxError),
}

/// Something that the build needs, and where it comes from on Debian.
struct Need {
    what: &'static str,
    package: &'static str,
    is_there: fn() -> bool,
}

/// rustc links with `cc`, against the C library's start files.
const NEEDS: [Need; 3] = [
    Need {
        what: "a linker (cc)",
        package: "gcc",
        is_there: || cc(&["--version"]).is_some(),
    },
    Need {
        what: "the C library's start files (crt1.o)",
        package: "libc6-dev",
        // cc answers with a path where it has the file, and else with the bare name.
        is_there: || {
            cc(&["-print-file-name=crt1.o"]).is_some_and(|path| Path::new(path.trim()).is_absolute())
        },
    },
    Need {
        what: "libclang (the userfaultfd crate reads the kernel's headers with it)",
        package: "libclang-dev",
        is_there: has_libclang,
    },
];

/// What runs guests on any host.
const QEMU: Need = Need {
    what: "QEMU (qemu-system-x86_64)",
    package: "qemu-system-x86",
    is_there: || runs("qemu-system-x86_64", &["--version"]),
};

/// Whether libclang is where the build looks for it: where `LIBCLANG_PATH` says, or where distributions put it.
fn has_libclang() -> bool {
    let is_library = |file: DirEntry| {
        let name = file.file_name();
        let name = name.to_string_lossy();
        // libclang-cpp is another library.
        name.starts_with("libclang.so")
            || (name.starts_with("libclang-") && !name.starts_with("libclang-cpp"))
    };
    let holds_it =
        |dir: &Path| fs::read_dir(dir).is_ok_and(|mut files| files.any(|file| file.is_ok_and(is_library)));
    // Debian: /usr/lib/llvm-14/lib.
    let of_llvm = fs::read_dir("/usr/lib")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("lib"));
    env::var_os("LIBCLANG_PATH").is_some()
        || of_llvm
            .chain(["/usr/lib64".into(), "/usr/lib/x86_64-linux-gnu".into()])
            .any(|dir: PathBuf| holds_it(&dir))
}

/// The components of the toolchain that `ci` uses.
const COMPONENTS: [(&str, &str); 2] = [("fmt", "rustfmt"), ("clippy", "clippy")];

/// The `setup` task.
pub(crate) fn run() -> Result<(), SetupError> {
    let host = prepare()?;
    println!(
        "{} {}, {} cores, {}",
        report::mark(true),
        host.cpu,
        host.cores,
        report::bytes(host.memory_bytes)
    );
    println!("{} Linux {}, KVM: {}", report::mark(true), host.kernel, host.kvm);
    println!("{} the build has what it needs", report::mark(true));
    // Without one of the two the other works.
    let kvm = host::try_kvm();
    if let Err(error) = &kvm {
        println!("{} {}", report::mark(false), report::chain(error));
    }
    match prepare_linux() {
        Ok(()) => println!("{} Linux guests have what they need", report::mark(true)),
        Err(error) => {
            println!(
                "{} no Linux guests: {}",
                report::mark(false),
                report::chain(&error)
            );
            // No VM runs at all, of which KVM is the first cause.
            kvm?;
        }
    }
    let missing: Vec<&str> = COMPONENTS
        .into_iter()
        .filter(|(command, _)| !runs("cargo", &[command, "--version"]))
        .map(|(_, component)| component)
        .collect();
    if missing.is_empty() {
        println!("{} the checks have what they need", report::mark(true));
        return Ok(());
    }
    let components = missing.join(" ");
    Err(SetupError::Missing {
        missing: components.clone(),
        line: format!("rustup component add {components}"),
    })
}

/// Checks that the build has what it needs; as root, installs what it lacks.
pub(crate) fn prepare() -> Result<Host, SetupError> {
    get(&NEEDS)?;
    Ok(Host::look())
}

/// The same, on a host on which KVM runs VMs.
pub(crate) fn prepare_with_kvm() -> Result<Host, SetupError> {
    host::try_kvm()?;
    prepare()
}

/// Checks that QEMU is there; as root, installs it if it is not.
pub(crate) fn prepare_qemu() -> Result<(), SetupError> {
    get(&[QEMU])
}

/// Checks that Linux guests have what they need: QEMU and Debian's packages; as root, installs QEMU if it is not there.
pub(crate) fn prepare_linux() -> Result<(), NoLinux> {
    prepare_qemu()?;
    linux::fetch()?;
    Ok(())
}

fn get(needs: &[Need]) -> Result<(), SetupError> {
    let missing: Vec<&Need> = needs.iter().filter(|need| !(need.is_there)()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing)
}

fn install(missing: &[&Need]) -> Result<(), SetupError> {
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    let whats: Vec<&str> = missing.iter().map(|need| need.what).collect();
    let (packages, whats) = (packages.join(" "), whats.join(" and "));
    let line = format!("apt-get update && apt-get install --yes --no-install-recommends {packages}");
    let as_root = rustix::process::geteuid().is_root();
    if !as_root || !runs("apt-get", &["--version"]) {
        let line = if as_root {
            line
        } else {
            format!("sudo sh -c '{line}'")
        };
        return Err(SetupError::Missing { missing: whats, line });
    }
    report::step(&format!("installing {packages}"), || {
        let mut shell = Command::new("sh");
        shell.args(["-c", &line]).env("DEBIAN_FRONTEND", "noninteractive");
        let finished = command::run(&mut shell, APT_LIMIT, Output::Kept)?;
        if finished.succeeded() && missing.iter().all(|need| (need.is_there)()) {
            return Ok(());
        }
        Err(SetupError::Apt {
            packages: packages.clone(),
            output: finished.output,
        })
    })
}

fn cc(arguments: &[&str]) -> Option<String> {
    let finished = command::run(Command::new("cc").args(arguments), LOOK_LIMIT, Output::Kept).ok()?;
    finished.succeeded().then_some(finished.output)
}

fn runs(program: &str, arguments: &[&str]) -> bool {
    command::run(Command::new(program).args(arguments), LOOK_LIMIT, Output::Kept)
        .is_ok_and(|finished| finished.succeeded())
}
