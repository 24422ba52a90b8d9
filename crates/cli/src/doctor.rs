//! `stencil doctor`: what this host can do, and what would let it do more. It asks the host and no server, and changes nothing.

mod host;
mod storage;
mod vmms;

use serde::Serialize;

use crate::args::Doctor;
use crate::failure::Failure;
use crate::output::Reader;
use crate::{place, table};

/// What was found.
#[derive(Debug, Serialize)]
pub(crate) struct Diagnosis {
    /// Whether VMs can run, with one hypervisor at least.
    pub(crate) can_run_vms: bool,
    pub(crate) findings: Vec<Finding>,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    pub(crate) about: &'static str,
    pub(crate) mark: Mark,
    pub(crate) fact: String,
    /// What follows from it, and what to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) advice: Option<String>,
}

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mark {
    Good,
    /// It works, and something does not.
    Limited,
    /// It does not work, or is not there.
    Missing,
}

impl Finding {
    fn good(about: &'static str, fact: impl Into<String>) -> Self {
        Self {
            about,
            mark: Mark::Good,
            fact: fact.into(),
            advice: None,
        }
    }

    fn limited(about: &'static str, fact: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            advice: Some(advice.into()),
            mark: Mark::Limited,
            ..Self::good(about, fact)
        }
    }

    fn missing(about: &'static str, fact: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            mark: Mark::Missing,
            ..Self::limited(about, fact, advice)
        }
    }
}

/// Tells what was found; fails where no VM can run.
pub(crate) fn run(asked: Doctor, json: bool) -> Result<(), Failure> {
    let data = place::absolute(asked.data.map_or_else(place::default_data, Ok)?)?;
    let diagnosis = diagnose(&data, asked.vmms)?;
    Reader::of(json).print(&diagnosis, table::diagnosis)?;
    if diagnosis.can_run_vms {
        Ok(())
    } else {
        Err(Failure::NoVms)
    }
}

fn diagnose(data: &std::path::Path, vmms: crate::args::Vmms) -> Result<Diagnosis, Failure> {
    let (kvm, of_kvm) = host::kvm();
    let (of_vmms, can_run_vms) = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::Runtime)?
        .block_on(vmms::look(vmms, kvm));
    let mut findings = vec![of_kvm];
    findings.extend(of_vmms);
    findings.extend([
        host::userfaultfd(),
        storage::data_directory(data),
        host::open_files(),
    ]);
    findings.extend(host::overcommit());
    Ok(Diagnosis {
        can_run_vms,
        findings,
    })
}
