//! Retry: when a failed request is sent again, and when it is given up. Pure: time and chance come in as numbers.
//!
//! - The limit counts from the last byte that arrived: a slow origin that moves is never given up.
//! - The pause doubles from failure to failure, with jitter so that many waiters do not come back at once, and starts
//!   over after progress. What a server asks for in Retry-After is kept to, but never past the limit.
//!
//! Not here: which failures pass (`response`, `transport`).

use std::time::Duration;

use readonce_storage::Moment;

/// The first pause.
const BACKOFF_MIN: Duration = Duration::from_millis(250);

/// The longest pause of our own.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Wait so long, then ask again.
    Again {
        /// The pause.
        delay: Duration,
    },
    /// The limit is reached.
    GiveUp {
        /// Since the last byte arrived, or the first attempt.
        waited: Duration,
        /// Requests sent in vain since then.
        attempts: u32,
    },
}

/// One fetch's patience.
#[derive(Debug, Clone)]
pub struct Retry {
    limit: Duration,
    /// When the last byte arrived, or the first attempt began.
    last_progress: Moment,
    /// Failures since then.
    failures: u32,
}

impl Retry {
    /// A fetch that begins now.
    pub fn new(now: Moment, limit: Duration) -> Self {
        Self { limit, last_progress: now, failures: 0 }
    }

    /// Bytes arrived.
    pub fn progress(&mut self, now: Moment) {
        self.last_progress = now;
        self.failures = 0;
    }

    /// An attempt failed; `wait` is what the server asks for, `random` any number.
    pub fn failed(&mut self, now: Moment, wait: Option<Duration>, random: u64) -> Action {
        self.failures = self.failures.saturating_add(1);
        let waited = now.saturating_sub(self.last_progress);
        let left = self.limit.saturating_sub(waited);
        if left.is_zero() {
            return Action::GiveUp { waited, attempts: self.failures };
        }
        let doublings = self.failures.saturating_sub(1).min(16);
        let full = BACKOFF_MIN.saturating_mul(1 << doublings).min(BACKOFF_MAX);
        // Between half and all of it.
        let half = full / 2;
        let jitter = Duration::from_nanos(random % u64::try_from(half.as_nanos()).unwrap_or(u64::MAX).max(1));
        let delay = half.saturating_add(jitter).max(wait.unwrap_or_default());
        // The last attempt falls on the limit rather than past it.
        Action::Again { delay: delay.min(left) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn the_pause_doubles_and_starts_over_after_progress() {
        let mut retry = Retry::new(ms(0), ms(3_600_000));
        let mut pause = |now, random| match retry.failed(now, None, random) {
            Action::Again { delay } => delay,
            Action::GiveUp { .. } => panic!("far from the limit"),
        };
        assert_eq!(pause(ms(0), 0), ms(125));
        assert_eq!(pause(ms(0), 0), ms(250));
        assert_eq!(pause(ms(0), ms(100).as_nanos() as u64), ms(600));
        for _ in 0..40 {
            let delay = pause(ms(0), u64::MAX);
            assert!(delay <= BACKOFF_MAX, "{delay:?}");
        }
        assert!(pause(ms(0), 0) == BACKOFF_MAX / 2);
        retry.progress(ms(5));
        assert_eq!(retry.failed(ms(5), None, 0), Action::Again { delay: ms(125) });
    }

    #[test]
    fn the_limit_counts_from_the_last_byte() {
        let mut retry = Retry::new(ms(0), ms(1000));
        assert_eq!(retry.failed(ms(900), None, u64::MAX / 2), Action::Again { delay: ms(100) });
        retry.progress(ms(950));
        assert!(matches!(retry.failed(ms(1900), None, 0), Action::Again { .. }));
        assert_eq!(retry.failed(ms(1950), None, 0), Action::GiveUp { waited: ms(1000), attempts: 2 });
    }

    #[test]
    fn the_server_may_ask_for_a_longer_pause_but_not_past_the_limit() {
        let mut retry = Retry::new(ms(0), ms(60_000));
        let seven = Some(Duration::from_secs(7));
        assert_eq!(retry.failed(ms(0), seven, 0), Action::Again { delay: ms(7000) });
        let hour = Some(Duration::from_secs(3600));
        assert_eq!(retry.failed(ms(10_000), hour, 0), Action::Again { delay: ms(50_000) });
        assert_eq!(retry.failed(ms(60_000), hour, 0), Action::GiveUp { waited: ms(60_000), attempts: 3 });
    }

    #[test]
    fn no_limit_at_all_means_one_attempt() {
        let mut retry = Retry::new(ms(5), ms(0));
        assert_eq!(retry.failed(ms(5), None, 0), Action::GiveUp { waited: ms(0), attempts: 1 });
    }
}
