//! The machine that a QEMU is started as: its command line, and what is kept of it in a snapshot.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use serde::{Deserialize, Serialize};
use stencil_core::{DiskFormat, DiskSpec, InstanceDir, VmGeneration, VmSpec};

use super::Accelerator;

/// The name of the virtio-serial port in the guest.
const AGENT_PORT: &str = "org.stencil.agent";

/// What a VM is made as, and must be made as again to take its saved state.
///
/// It is a q35 without SATA and SMBus. Of the two machines with virtio it is the one that has a generation id and clocks that
/// Linux can calibrate under emulation; QEMU starts and restores both in the same time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Machine {
    pub(super) accelerator: Accelerator,
    pub(super) vcpus: u32,
    pub(super) memory_bytes: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) disks: Vec<DiskSpec>,
}

/// What a machine begins with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Begin<'a> {
    /// A kernel, and empty memory.
    Boot(&'a VmSpec),
    /// A saved state, and memory that is written before it is loaded.
    Copy,
    /// A saved state, and memory that is a private mapping of this file.
    Cow {
        memory: &'a Path,
        /// Whether QEMU can map a file privately that it only reads.
        reads_only: bool,
    },
}

impl Machine {
    pub(super) fn new(spec: &VmSpec, accelerator: Accelerator) -> Self {
        Self {
            accelerator,
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            disks: spec.disks.clone(),
        }
    }

    /// The command line, but for the monitor. Paths of the instance are relative to its directory, in which QEMU runs.
    ///
    /// The devices are in the order in which they are made, which is part of the saved state.
    pub(super) fn arguments(&self, generation: &VmGeneration, begin: Begin<'_>) -> Vec<OsString> {
        let mut arguments = Arguments::default();
        arguments
            .flag("-no-user-config")
            .flag("-nodefaults")
            .option("-display", "none")
            // Nothing runs before it is told to.
            .flag("-S")
            // A guest that is down leaves the VMM up, and does not come back by itself.
            .option("-action", "reboot=shutdown,shutdown=pause,panic=pause")
            .option(
                "-machine",
                "q35,sata=off,smbus=off,vmport=off,memory-backend=ram,suppress-vmdesc=on",
            )
            .option("-accel", self.accelerator.as_str())
            .option("-cpu", "max")
            .option("-smp", self.vcpus.to_string())
            .option("-m", format!("{}B", self.memory_bytes))
            .option("-object", self.memory(begin))
            // A saved state is one of devices alone, which has no section of the machine's configuration.
            .option("-global", "migration.send-configuration=off")
            .option("-global", "ICH9-LPC.disable_s3=1")
            .option("-global", "ICH9-LPC.disable_s4=1");
        self.devices(&mut arguments, generation);
        match begin {
            Begin::Boot(spec) => {
                if let Some(kernel) = &spec.kernel {
                    arguments
                        .option("-kernel", kernel)
                        .option("-append", &spec.cmdline);
                }
                if let Some(initrd) = &spec.initrd {
                    arguments.option("-initrd", initrd);
                }
            }
            Begin::Copy | Begin::Cow { .. } => {
                arguments.option("-incoming", "defer");
            }
        }
        arguments.0
    }

    fn memory(&self, begin: Begin<'_>) -> OsString {
        let size = self.memory_bytes;
        match begin {
            // Not a file: what is written to one goes to its disk, again and again.
            Begin::Boot(_) | Begin::Copy => format!("memory-backend-ram,id=ram,size={size}B").into(),
            Begin::Cow { memory, reads_only } => {
                let how = if reads_only { ",readonly=on,rom=off" } else { "" };
                let mut object: OsString =
                    format!("memory-backend-file,id=ram,size={size}B,share=off{how},mem-path=").into();
                object.push(escaped(memory.as_os_str()));
                object
            }
        }
    }

    fn devices(&self, arguments: &mut Arguments, generation: &VmGeneration) {
        let agent = InstanceDir::AGENT_SOCKET;
        arguments
            .option("-chardev", "stdio,id=console,signal=off")
            .option("-serial", "chardev:console")
            .option("-device", "virtio-serial-pci")
            .option(
                "-chardev",
                format!("socket,id=agent,path={agent},server=on,wait=off"),
            )
            .option(
                "-device",
                format!("virtserialport,chardev=agent,name={AGENT_PORT}"),
            )
            .option("-device", "pvpanic")
            .option(
                "-device",
                format!("vmgenid,id=generation,guid={}", guid(generation)),
            );
        for (number, disk) in self.disks.iter().enumerate() {
            arguments
                .option("-drive", drive(number, disk))
                .option("-device", format!("virtio-blk-pci,drive=disk{number}"));
        }
    }
}

/// The image of a disk: of one that the guest writes the instance's own layer, by its name in the instance's directory. The format
/// is never guessed, for a guest could write what makes it another one; a layer says that of the one below it.
fn drive(number: usize, disk: &DiskSpec) -> OsString {
    let (image, format, how) = if disk.read_only {
        (escaped(disk.path.as_os_str()), disk.format, ",readonly=on")
    } else {
        // Whatever error the host has with it: the guest is not told of one that somebody can mend.
        (
            InstanceDir::disk_name(number).into(),
            DiskFormat::Qcow2,
            ",werror=stop",
        )
    };
    let mut drive: OsString = format!("if=none,id=disk{number},format={format}{how},file=").into();
    drive.push(image);
    drive
}

/// A generation as a GUID: its digits in groups.
fn guid(generation: &VmGeneration) -> String {
    let digits = generation.to_string();
    let group = |from: usize, to: usize| &digits[from..to];
    [
        group(0, 8),
        group(8, 12),
        group(12, 16),
        group(16, 20),
        group(20, 32),
    ]
    .join("-")
}

/// A value inside of an option of QEMU's, where a comma ends it unless it is doubled.
fn escaped(value: &OsStr) -> OsString {
    let mut bytes = Vec::with_capacity(value.len());
    for byte in value.as_bytes() {
        bytes.push(*byte);
        if *byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

#[derive(Debug, Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn option(&mut self, option: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.0.push(option.into());
        self.0.push(value.as_ref().to_owned());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            accelerator: Accelerator::Tcg,
            vcpus: 2,
            memory_bytes: 64 << 20,
            disks: Vec::new(),
        }
    }

    fn generation() -> VmGeneration {
        "000102030405060708090a0b0c0d0e0f".parse().unwrap()
    }

    /// The arguments, an option with its value in a line.
    fn shown(begin: Begin<'_>) -> String {
        let arguments = machine().arguments(&generation(), begin);
        let words: Vec<_> = arguments.iter().map(|word| word.to_str().unwrap()).collect();
        words.join(" ").replace(" -", "\n-")
    }

    #[test]
    fn a_machine_that_boots() {
        let mut spec = VmSpec::new("qemu".parse().unwrap(), "/boot/vm,linuz".into(), 2, 64 << 20);
        spec.initrd = Some("/boot/initrd.img".into());
        spec.cmdline = "console=ttyS0 quiet".to_owned();
        insta::assert_snapshot!(shown(Begin::Boot(&spec)));
    }

    #[test]
    fn a_disk_that_the_guest_writes_is_the_instance_s_own_and_no_format_is_guessed() {
        let disk = |path: &str, read_only| DiskSpec {
            path: path.into(),
            format: DiskFormat::Raw,
            bytes: None,
            read_only,
        };
        assert_eq!(
            drive(0, &disk("/images/a.raw", false)),
            "if=none,id=disk0,format=qcow2,werror=stop,file=disk0.qcow2"
        );
        assert_eq!(
            drive(1, &disk("/images/a,b.raw", true)),
            "if=none,id=disk1,format=raw,readonly=on,file=/images/a,,b.raw"
        );
    }

    #[test]
    fn a_machine_that_is_restored_differs_in_its_memory_and_in_what_it_waits_for() {
        let memory = Path::new("/data/a,b/memory-ranges");
        let boots = shown(Begin::Boot(&VmSpec::new(
            "qemu".parse().unwrap(),
            "/k".into(),
            2,
            1,
        )));
        let copied = shown(Begin::Copy);
        let mapped = shown(Begin::Cow {
            memory,
            reads_only: false,
        });
        let mapped_for_reading = shown(Begin::Cow {
            memory,
            reads_only: true,
        });
        let own = |shown: &str| -> String {
            let own = shown.lines().filter(|line| !boots.contains(line));
            own.map(|line| format!("{line}\n")).collect()
        };
        assert_eq!(own(&copied), "-incoming defer\n");
        let file = "-object memory-backend-file,id=ram,size=67108864B,share=off";
        let path = "mem-path=/data/a,,b/memory-ranges";
        assert_eq!(own(&mapped), format!("{file},{path}\n-incoming defer\n"));
        assert_eq!(
            own(&mapped_for_reading),
            format!("{file},readonly=on,rom=off,{path}\n-incoming defer\n")
        );
    }

    #[test]
    fn what_a_newer_version_kept_is_not_taken_for_less_than_it_is() {
        let mut kept = serde_json::to_value(machine()).unwrap();
        assert_eq!(
            serde_json::from_value::<Machine>(kept.clone()).unwrap(),
            machine()
        );
        kept["floppies"] = serde_json::json!(["a"]);
        serde_json::from_value::<Machine>(kept).unwrap_err();
    }
}
