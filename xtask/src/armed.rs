//! How an instance shows that it was forked from a pool.

use serde_json::Value;

/// The phase in which a fork is taken from its template's pool; one that starts a process has others instead.
pub(crate) const TAKE: &str = "take";

/// Whether the fork that the server shows was armed before it was asked for.
pub(crate) fn was_armed(instance: &Value) -> bool {
    let phases = instance["timings"]["phases"].as_array();
    phases.is_some_and(|phases| phases.iter().any(|phase| phase["name"] == TAKE))
}
