//! A VM's definition, checked: what `vm.create` takes, and what a snapshot's config.json says.

use stencil_vmm_api::{ConsoleMode, MICROVM_MAX_VCPUS, PayloadConfig, SerialMode, VmConfig};

use crate::identity::{Generation, GenerationError};
use crate::memory::PAGE;

/// The structures that a guest boots with lie below 1 MiB.
const MEMORY_MIN: u64 = 1 << 20;

/// A definition that this VMM can make a VM of.
#[derive(Clone, Debug)]
pub(crate) struct Definition {
    /// As it was given, with the defaults filled in.
    pub(crate) config: VmConfig,
    pub(crate) vcpus: u8,
    pub(crate) memory_bytes: u64,
    pub(crate) generation: Generation,
}

/// A definition that is wrong: which field, its value, and what is right.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DefinitionError {
    #[error("cpus.boot_vcpus is {0}; right is 1 to {MICROVM_MAX_VCPUS}")]
    Vcpus(u32),
    #[error("cpus.max_vcpus is {max}, less than cpus.boot_vcpus, {boot}")]
    MaxVcpus { max: u32, boot: u32 },
    #[error("memory.size is {0} bytes; right is a multiple of {PAGE} and at least {MEMORY_MIN}")]
    MemorySize(u64),
    #[error("memory.size is {asked} bytes; this host has {host}")]
    MemoryOfHost { asked: u64, host: u64 },
    #[error("memory.zones: {field} of {id:?} is set; guest memory is private and anonymous here")]
    Zone { id: String, field: &'static str },
    #[error("serial.mode is {0:?}; right is Off, Null, File or Socket")]
    SerialMode(SerialMode),
    #[error("serial.{field} is missing, which serial.mode {mode:?} needs")]
    SerialPlace { field: &'static str, mode: SerialMode },
    #[error("console.mode is {0:?}; right is Off or Null, as there is no virtio console")]
    ConsoleMode(ConsoleMode),
    #[error("generation is wrong")]
    Generation(#[from] GenerationError),
}

impl Definition {
    /// Checks `config`. Without a generation it gets a random one.
    pub(crate) fn new(mut config: VmConfig) -> Result<Self, DefinitionError> {
        let vcpus = vcpus(&config)?;
        let memory_bytes = memory_bytes(&config)?;
        check_serial(&config)?;
        if !matches!(config.console.mode, ConsoleMode::Off | ConsoleMode::Null) {
            return Err(DefinitionError::ConsoleMode(config.console.mode));
        }
        let generation = match &config.generation {
            Some(text) => text.parse()?,
            None => Generation::random(),
        };
        config.generation = Some(generation.to_string());
        Ok(Self {
            config,
            vcpus,
            memory_bytes,
            generation,
        })
    }

    /// The same machine's definition under another identity.
    pub(crate) fn set_generation(&mut self, generation: Generation) {
        self.config.generation = Some(generation.to_string());
        self.generation = generation;
    }

    pub(crate) fn payload(&self) -> PayloadConfig {
        self.config.payload.clone().unwrap_or_default()
    }
}

fn vcpus(config: &VmConfig) -> Result<u8, DefinitionError> {
    let boot = config.cpus.boot_vcpus;
    match u8::try_from(boot) {
        Ok(count) if (1..=MICROVM_MAX_VCPUS).contains(&boot) => {
            let max = config.cpus.max_vcpus;
            if max < boot {
                Err(DefinitionError::MaxVcpus { max, boot })
            } else {
                Ok(count)
            }
        }
        _ => Err(DefinitionError::Vcpus(boot)),
    }
}

fn memory_bytes(config: &VmConfig) -> Result<u64, DefinitionError> {
    for zone in &config.memory.zones {
        let wrong = |field| DefinitionError::Zone {
            id: zone.id.clone(),
            field,
        };
        if zone.shared {
            return Err(wrong("shared"));
        }
        if zone.file.is_some() {
            return Err(wrong("file"));
        }
    }
    let asked = config.memory.total_bytes();
    if asked < MEMORY_MIN || !asked.is_multiple_of(PAGE) {
        return Err(DefinitionError::MemorySize(asked));
    }
    let host = host_memory();
    if asked > host {
        Err(DefinitionError::MemoryOfHost { asked, host })
    } else {
        Ok(asked)
    }
}

/// The host's memory, in bytes.
fn host_memory() -> u64 {
    // A system call: /proc/meminfo takes the kernel far longer to write, and each fork asks.
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

fn check_serial(config: &VmConfig) -> Result<(), DefinitionError> {
    let (mode, serial) = (config.serial.mode, &config.serial);
    let missing = |field| Err(DefinitionError::SerialPlace { field, mode });
    match mode {
        SerialMode::Tty | SerialMode::Pty => Err(DefinitionError::SerialMode(mode)),
        SerialMode::File if serial.file.is_none() => missing("file"),
        SerialMode::Socket if serial.socket.is_none() => missing("socket"),
        SerialMode::Off | SerialMode::Null | SerialMode::File | SerialMode::Socket => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(json: &str) -> String {
        let config: VmConfig = serde_json::from_str(json).unwrap();
        let error = Definition::new(config).unwrap_err();
        let source = std::error::Error::source(&error);
        source.map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
    }

    #[test]
    fn refusals_name_the_field_the_value_and_what_is_right() {
        let cases = [
            (
                r#"{"memory":{"size":0}}"#,
                "memory.size is 0 bytes; right is a multiple of 4096 and at least 1048576",
            ),
            (
                r#"{"memory":{"size":2097153}}"#,
                "memory.size is 2097153 bytes; right is a multiple of 4096",
            ),
            (
                r#"{"memory":{"size":1125899906842624}}"#,
                "memory.size is 1125899906842624 bytes; this host has",
            ),
            (
                r#"{"cpus":{"boot_vcpus":0,"max_vcpus":1}}"#,
                "cpus.boot_vcpus is 0; right is 1 to 16",
            ),
            (
                r#"{"cpus":{"boot_vcpus":17,"max_vcpus":17}}"#,
                "cpus.boot_vcpus is 17; right is 1 to 16",
            ),
            (
                r#"{"cpus":{"boot_vcpus":2,"max_vcpus":1}}"#,
                "cpus.max_vcpus is 1, less than cpus.boot_vcpus, 2",
            ),
            (
                r#"{"memory":{"size":2097152},"serial":{"mode":"Socket"}}"#,
                "serial.socket is missing, which serial.mode Socket needs",
            ),
            (
                r#"{"memory":{"size":2097152},"serial":{"mode":"Pty"}}"#,
                "serial.mode is Pty; right is Off, Null",
            ),
            (
                r#"{"memory":{"size":2097152},"console":{"mode":"Tty"}}"#,
                "console.mode is Tty; right is Off or Null",
            ),
            (
                r#"{"memory":{"size":2097152},"generation":"xyz"}"#,
                "\"xyz\" is no generation id: 32 hexadecimal",
            ),
            (
                r#"{"memory":{"zones":[{"id":"z","size":2097152,"shared":true}]}}"#,
                "memory.zones: shared of \"z\" is set",
            ),
        ];
        for (json, expected) in cases {
            let refusal = refusal(json);
            assert!(refusal.contains(expected), "{refusal:?} should have {expected:?}");
        }
    }

    #[test]
    fn zones_add_up() {
        let config: VmConfig =
            serde_json::from_str(r#"{"memory":{"size":0,"zones":[{"id":"m","size":2097152}]}}"#).unwrap();
        let definition = Definition::new(config).unwrap();
        assert_eq!((definition.memory_bytes, definition.vcpus), (2 << 20, 1));
        assert_eq!(
            definition.config.generation,
            Some(definition.generation.to_string())
        );
    }
}
