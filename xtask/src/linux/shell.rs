//! What the guest's shell is told to do, and what its answers say.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Warms a guest up: a token in a tmpfs, and a process that counts there, a line for each number, until it has come to 10.
pub(crate) const WARM_UP: &str = "cat /proc/sys/kernel/random/uuid >/run/token
(n=0; while :; do n=$((n+1)); echo $n; sleep 0.1; done) >/run/count 2>&1 &
echo $! >/run/counter
until [ $(wc -l </run/count) -ge 10 ]; do sleep 0.1; done";

/// Tells the guest's clock in seconds since 1970 in UTC, to a microsecond, of which busybox's `date` knows nothing.
pub(crate) const CLOCK: &str =
    "printf '%d.%06d\\n' $(adjtimex | awk '/time.tv_sec/ { s = $2 } /time.tv_usec/ { print s, $2 }')";

/// How far a guest's clock may be from the host's.
pub(crate) const CLOCK_LIMIT: Duration = Duration::from_secs(1);

/// How far the clock of a guest is from the host's, at least; it answered [`CLOCK`] with `told` between the two moments.
pub(crate) fn clock_off(told: &str, before: SystemTime, after: SystemTime) -> Option<Duration> {
    let clock = Duration::try_from_secs_f64(told.trim().parse().ok()?).ok()?;
    let since = |moment: SystemTime| moment.duration_since(UNIX_EPOCH).ok();
    let (early, late) = (
        since(before)?.checked_sub(clock),
        clock.checked_sub(since(after)?),
    );
    Some(early.or(late).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_off_by_what_it_lies_outside_of_the_two_moments() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let off = |told| clock_off(told, at(100), at(102));
        assert_eq!(off("101.500000\n"), Some(Duration::ZERO));
        assert_eq!(off("98.500000\n"), Some(Duration::from_millis(1500)));
        assert_eq!(off("102.250000\n"), Some(Duration::from_millis(250)));
        assert_eq!(off("%N\n"), None);
    }
}
