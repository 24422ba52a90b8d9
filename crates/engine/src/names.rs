//! Who has which name, and which numbered names are free: a pure value, kept by the registry under its lock.
//!
//! The next free `<prefix>-<number>` is found without a look at those that are taken: a thousand living forks do not make
//! the next one dearer.

use std::collections::{BTreeSet, HashMap};

use stencil_core::{InstanceId, InstanceName};

use crate::EngineError;

/// Who has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    Instance(InstanceId),
    /// An instance that is being made.
    Reserved,
}

impl Holder {
    /// The instance that has it, once that is made.
    pub(crate) fn instance(self) -> Option<InstanceId> {
        match self {
            Self::Instance(id) => Some(id),
            Self::Reserved => None,
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Names {
    holders: HashMap<InstanceName, Holder>,
    numbered: HashMap<String, Numbers>,
}

/// What is known of the names with one prefix. Each number below `next` is taken or among the freed ones.
#[derive(Debug)]
struct Numbers {
    next: u64,
    /// Given back, and perhaps taken again by name since.
    freed: BTreeSet<u64>,
}

impl Default for Numbers {
    fn default() -> Self {
        Self {
            next: 1,
            freed: BTreeSet::new(),
        }
    }
}

impl Names {
    pub(crate) fn holder(&self, name: &InstanceName) -> Option<Holder> {
        self.holders.get(name).copied()
    }

    /// Gives the name to `holder`, whoever had it.
    pub(crate) fn give(&mut self, name: InstanceName, holder: Holder) {
        self.holders.insert(name, holder);
    }

    /// The name is free again.
    pub(crate) fn free(&mut self, name: &InstanceName) {
        if self.holders.remove(name).is_none() {
            return;
        }
        let Some((prefix, number)) = numbered(name.as_str()) else {
            return;
        };
        let Some(numbers) = self.numbered.get_mut(prefix) else {
            return;
        };
        if number < numbers.next {
            numbers.freed.insert(number);
        }
        self.forget_unused(prefix);
    }

    /// Where all numbers are free, as much is known as of a prefix that was never asked for.
    fn forget_unused(&mut self, prefix: &str) {
        let unused = |numbers: &Numbers| numbers.freed.len() as u64 + 1 == numbers.next;
        if self.numbered.get(prefix).is_some_and(unused) {
            self.numbered.remove(prefix);
        }
    }

    /// Reserves the first `count` names `<prefix>-1`, `<prefix>-2`, ... that are free; all of them or none.
    pub(crate) fn reserve_numbered(
        &mut self,
        prefix: &str,
        count: u32,
    ) -> Result<Vec<InstanceName>, EngineError> {
        let mut reserved = Vec::new();
        for _ in 0..count {
            match self.reserve_next(prefix) {
                Ok(name) => reserved.push(name),
                Err(failed) => {
                    for name in &reserved {
                        self.free(name);
                    }
                    self.forget_unused(prefix);
                    return Err(failed);
                }
            }
        }
        Ok(reserved)
    }

    fn reserve_next(&mut self, prefix: &str) -> Result<InstanceName, EngineError> {
        let numbers = self.numbered.entry(prefix.to_owned()).or_default();
        loop {
            let number = numbers.freed.first().copied().unwrap_or(numbers.next);
            let name = format!("{prefix}-{number}");
            let name: InstanceName = name
                .parse()
                .map_err(|reason| EngineError::Invalid(format!("no fork can be named `{name}`: {reason}")))?;
            // Taken or about to be: in either case it is no free number any more.
            if numbers.freed.pop_first().is_none() {
                numbers.next += 1;
            }
            if !self.holders.contains_key(&name) {
                self.holders.insert(name.clone(), Holder::Reserved);
                return Ok(name);
            }
        }
    }
}

/// The parts of `<prefix>-<number>`, in the one spelling that [`Names::reserve_numbered`] gives.
fn numbered(name: &str) -> Option<(&str, u64)> {
    let (prefix, digits) = name.rsplit_once('-')?;
    let number: u64 = digits.parse().ok()?;
    (!digits.starts_with('0')).then_some((prefix, number))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> InstanceName {
        text.parse().unwrap()
    }

    fn numbers(names: &[InstanceName]) -> Vec<u64> {
        names
            .iter()
            .map(|name| numbered(name.as_str()).unwrap().1)
            .collect()
    }

    #[test]
    fn a_name_that_is_given_back_is_the_next_one_again() {
        let mut names = Names::default();
        names.reserve_numbered("job", 5).unwrap();
        names.free(&name("job-4"));
        names.free(&name("job-2"));
        assert_eq!(numbers(&names.reserve_numbered("job", 3).unwrap()), [2, 4, 6]);
    }

    #[test]
    fn a_name_that_is_too_long_leaves_none_reserved() {
        let mut names = Names::default();
        let prefix = "x".repeat(61);
        assert!(matches!(
            names.reserve_numbered(&prefix, 10),
            Err(EngineError::Invalid(_))
        ));
        assert!(names.numbered.is_empty() && names.holders.is_empty());
        assert_eq!(numbers(&names.reserve_numbered(&prefix, 9).unwrap())[0], 1);
    }

    #[test]
    fn a_prefix_without_names_is_forgotten() {
        let mut names = Names::default();
        for name in names.reserve_numbered("job", 100).unwrap() {
            names.free(&name);
        }
        assert!(names.numbered.is_empty() && names.holders.is_empty());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Numbered(u32),
        Named(u64),
        Free(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (1..4_u32).prop_map(Step::Numbered),
            (1..20_u64).prop_map(Step::Named),
            (1..20_u64).prop_map(Step::Free),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        #[test]
        fn numbered_names_are_the_first_that_are_free(steps in steps()) {
            let mut names = Names::default();
            let mut taken = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Numbered(count) => {
                        let count = count as usize;
                        let expected: Vec<u64> =
                            (1..).filter(|number| !taken.contains(number)).take(count).collect();
                        let count = u32::try_from(count).unwrap();
                        prop_assert_eq!(&numbers(&names.reserve_numbered("job", count).unwrap()), &expected);
                        taken.extend(expected);
                    }
                    Step::Named(number) => {
                        names.give(name(&format!("job-{number}")), Holder::Reserved);
                        taken.insert(number);
                    }
                    Step::Free(number) => {
                        names.free(&name(&format!("job-{number}")));
                        taken.remove(&number);
                    }
                }
            }
        }
    }
}
