//! The model: the prose of the design over a few plain truths. It knows neither the table nor `derive`.

use stencil_core::{ForkRequest, Operation};

use super::{Event, Verdict};

#[derive(Clone, Debug, Default)]
struct Machine {
    booted: bool,
    ready: bool,
    frozen: bool,
    down: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    machine: Option<Machine>,
    snapshot: bool,
    template: bool,
    /// Its VMM hangs, or its snapshot is damaged.
    lost: bool,
    template_of_mine: Option<usize>,
}

impl Model {
    pub(super) fn name(&self) -> &'static str {
        match &self.machine {
            _ if self.lost => "Unknown",
            Some(machine) if machine.down => "Shutdown",
            Some(machine) if !machine.booted => "Created",
            Some(machine) if machine.frozen => "Paused",
            Some(machine) if machine.ready => "Running",
            Some(_) => "Initializing",
            None if self.template => "Template",
            None if self.snapshot => "Standby",
            None => "Stopped",
        }
    }

    fn is(&self, names: &[&str]) -> bool {
        names.contains(&self.name())
    }
}

pub(super) struct Models(pub(super) Vec<Option<Model>>);

impl Models {
    fn has_forks(&self, index: usize) -> bool {
        self.0
            .iter()
            .flatten()
            .any(|model| model.template_of_mine == Some(index))
    }

    pub(super) fn operate(&mut self, index: usize, operation: Operation, stop_at_created: bool) -> Verdict {
        let in_use = self.has_forks(index);
        let model = self.0[index].as_mut().unwrap();
        let invalid = Verdict::Refused("invalid_state");
        // Rule 4: what forks rely on stays, in whatever state it is.
        if operation == Operation::Delete {
            if in_use {
                return Verdict::Refused("template_in_use");
            }
            self.0[index] = None;
            return Verdict::Acts;
        }
        if model.lost {
            return invalid;
        }
        let runs = model
            .machine
            .as_ref()
            .is_some_and(|machine| machine.booted && !machine.frozen && !machine.down);
        let ready = runs && model.machine.as_ref().is_some_and(|machine| machine.ready);
        let frozen = model.is(&["Paused"]);
        let sleeps = model.machine.is_none() && model.snapshot;
        match operation {
            Operation::Start if runs => return Verdict::Nothing,
            // What has a memory goes on from it instead of booting over it.
            Operation::Start if sleeps || frozen => return invalid,
            Operation::Start => {
                let booted = !(stop_at_created && model.is(&["Stopped"]));
                model.machine = Some(Machine {
                    booted,
                    ..Machine::default()
                });
            }
            Operation::Stop if model.template && in_use => return Verdict::Refused("template_in_use"),
            Operation::Stop if model.machine.is_none() && !model.snapshot => return Verdict::Nothing,
            Operation::Stop => {
                *model = Model {
                    template_of_mine: model.template_of_mine,
                    ..Model::default()
                }
            }
            Operation::Pause if frozen => return Verdict::Nothing,
            Operation::Pause if ready => model.machine.as_mut().unwrap().frozen = true,
            Operation::Resume if runs => return Verdict::Nothing,
            Operation::Resume if frozen => model.machine.as_mut().unwrap().frozen = false,
            Operation::Standby if sleeps && !model.template => return Verdict::Nothing,
            Operation::Standby if ready || frozen => (model.machine, model.snapshot) = (None, true),
            Operation::Restore if runs => return Verdict::Nothing,
            Operation::Restore if sleeps && !model.template => {
                model.machine = Some(Machine {
                    booted: true,
                    ..Machine::default()
                });
            }
            Operation::Promote if sleeps && !model.template => model.template = true,
            Operation::Demote if model.template && in_use => return Verdict::Refused("template_in_use"),
            Operation::Demote if model.template => model.template = false,
            Operation::RecordHotPages | Operation::Arm if model.template => {}
            Operation::Exec if ready => {}
            _ => return invalid,
        }
        Verdict::Acts
    }

    pub(super) fn fork(&mut self, index: usize, request: &ForkRequest) -> Verdict {
        let source = self.0[index].as_mut().unwrap();
        let targets: &[&str] = match (source.name(), request.from_running) {
            ("Stopped", false) => &["Stopped", "Running"],
            ("Standby" | "Template", false) | ("Running", true) => {
                &["Running", "Paused", "Standby", "Stopped"]
            }
            _ => return Verdict::Refused("invalid_state"),
        };
        let target = request
            .target_state
            .map_or(targets[0].to_owned(), |target| target.to_string());
        if !targets.contains(&target.as_str()) {
            return Verdict::Refused("invalid_request");
        }
        source.snapshot |= request.from_running && target != "Stopped";
        let machine = Machine {
            booted: true,
            ready: target == "Running",
            frozen: target == "Paused",
            down: false,
        };
        let fork = Model {
            machine: ["Running", "Paused"]
                .contains(&target.as_str())
                .then_some(machine),
            snapshot: target == "Standby",
            template_of_mine: source.template.then_some(index),
            ..Model::default()
        };
        self.0.push(Some(fork));
        Verdict::Acts
    }

    pub(super) fn befall(&mut self, index: usize, event: &Event) {
        let model = self.0[index].as_mut().unwrap();
        let awake = model.machine.is_some() && !model.lost;
        match event {
            Event::GuestReady if awake && model.is(&["Initializing"]) => {
                model.machine.as_mut().unwrap().ready = true
            }
            Event::GuestEnds { .. } if awake && model.is(&["Initializing", "Running"]) => {
                model.machine.as_mut().unwrap().down = true;
            }
            Event::VmmKilled if awake => model.machine = None,
            Event::VmmHangs if awake => model.lost = true,
            Event::SnapshotDamaged if model.machine.is_none() && model.snapshot => model.lost = true,
            _ => {}
        }
    }
}
