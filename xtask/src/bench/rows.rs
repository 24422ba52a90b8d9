//! What every benchmark tells: values as quantiles in rows, and the targets that they are held against.

use std::time::Duration;

use serde_json::{Value, json};

/// What is told of some values: nearest-rank quantiles.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quantiles {
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
    pub(super) n: usize,
}

impl Quantiles {
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let n = values.len();
        let at = |percent: usize| {
            let rank = (n * percent).div_ceil(100).max(1);
            values.get(rank - 1).copied().unwrap_or(f64::NAN)
        };
        Self {
            p50: at(50),
            p90: at(90),
            p99: at(99),
            max: at(100),
            n,
        }
    }
}

/// A row of the results.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) unit: &'static str,
    pub(super) quantiles: Quantiles,
}

impl Row {
    pub(super) fn json(&self) -> Value {
        let Quantiles {
            p50,
            p90,
            p99,
            max,
            n,
        } = self.quantiles;
        json!({"name": self.name, "unit": self.unit, "p50": p50, "p90": p90, "p99": p99, "max": max, "n": n})
    }
}

/// On which side of a target a value is right.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

/// A figure that is aimed at, mostly a ratio.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) name: String,
    pub(super) value: f64,
    pub(super) bound: Bound,
}

impl Target {
    pub(super) fn new(name: impl Into<String>, value: f64, bound: Bound) -> Self {
        let name = name.into();
        Self { name, value, bound }
    }

    pub(super) fn is_met(&self) -> bool {
        match self.bound {
            Bound::AtMost(target) => self.value <= target,
            Bound::AtLeast(target) => self.value >= target,
        }
    }

    pub(super) fn json(&self) -> Value {
        let (Bound::AtMost(target) | Bound::AtLeast(target)) = self.bound;
        json!({"name": self.name, "value": self.value, "target": target, "ok": self.is_met()})
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of faults, pages and bytes, far below 2^52"
)]
pub(super) fn count(count: u64) -> f64 {
    count as f64
}

pub(super) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let found = Quantiles::of((1..=200).map(f64::from));
        assert_eq!(
            (found.p50, found.p90, found.p99, found.max, found.n),
            (100.0, 180.0, 198.0, 200.0, 200)
        );
    }

    #[test]
    fn what_was_not_measured_meets_no_target() {
        let found = Quantiles::of([]);
        assert!(!Target::new("none", found.p50, Bound::AtMost(1.0)).is_met());
        assert!(!Target::new("none", found.p50, Bound::AtLeast(1.0)).is_met());
    }
}
