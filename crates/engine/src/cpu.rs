//! This host's CPU.

use std::arch::x86_64::{__cpuid, __cpuid_count, CpuidResult};
use std::sync::OnceLock;

use stencil_core::HostCpu;

/// This host's CPU. It is asked once: where the host is itself a VM, each question takes an exit.
pub(crate) fn host_cpu() -> &'static HostCpu {
    static CPU: OnceLock<HostCpu> = OnceLock::new();
    CPU.get_or_init(|| HostCpu {
        vendor: vendor(),
        model: model(),
        features: features(),
    })
}

/// The features that Cloud Hypervisor compares too (v53, `arch/src/x86_64/mod.rs`), and those of XSAVE, whose area is in a
/// snapshot. See Intel SDM volume 2, CPUID.
fn features() -> Vec<u32> {
    let (basic, extended, more, xsave) = (leaf(1), leaf(7), subleaf(7, 1), subleaf(0xd, 1));
    let (amd, sizes) = (leaf(0x8000_0001), leaf(0x8000_0008));
    vec![
        basic.ecx,
        basic.edx,
        extended.ebx,
        extended.ecx,
        extended.edx,
        more.eax,
        xsave.eax,
        amd.ecx,
        amd.edx,
        sizes.ebx,
    ]
}

fn vendor() -> String {
    let who = __cpuid(0);
    text(&[who.ebx, who.edx, who.ecx])
}

fn model() -> String {
    let words: Vec<u32> = (0x8000_0002..=0x8000_0004)
        .map(leaf)
        .flat_map(|part| [part.eax, part.ebx, part.ecx, part.edx])
        .collect();
    text(&words)
}

/// Characters in little-endian words, with blanks and NULs around them.
fn text(words: &[u32]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes)
        .trim_matches(['\0', ' '])
        .to_owned()
}

fn leaf(leaf: u32) -> CpuidResult {
    subleaf(leaf, 0)
}

/// Zeros where the CPU does not have the leaf; Intel's answer with another one then.
fn subleaf(leaf: u32, index: u32) -> CpuidResult {
    let highest = __cpuid(leaf & 0x8000_0000).eax;
    if leaf > highest {
        return CpuidResult {
            eax: 0,
            ebx: 0,
            ecx: 0,
            edx: 0,
        };
    }
    __cpuid_count(leaf, index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_s_cpu_has_what_every_x86_64_cpu_has() {
        let cpu = host_cpu();
        // Bit 26 of leaf 1's EDX is SSE2.
        assert_ne!(cpu.features[1] & 1 << 26, 0, "{cpu:?}");
        assert_eq!(cpu.vendor.len(), 12, "{cpu:?}");
    }
}
