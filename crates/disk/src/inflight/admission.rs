//! Who may bring another unit in flight: a bound for those without and one for those with guest bytes.
//!
//! - Whoever is beyond a bound waits, and is let in in the order of coming. One unit is always let in.
//! - Who waits for the memory of guest bytes is told when they could not be fetched or stored.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::error::LayerError;

/// Bytes of units in flight without guest bytes, by default. 64 MiB: at 40 ms it is what a 12 Gbit/s link holds.
pub const FETCH_BYTES_MAX: u64 = 64 << 20;
/// Bytes of units in flight with guest bytes, which stay in memory while the origin is away, by default.
pub const GUEST_BYTES_MAX: u64 = 64 << 20;

/// Which bound a unit counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Budget {
    /// Units without guest bytes.
    Fetch,
    /// Units with guest bytes.
    Guest,
}

/// The bounds, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budgets {
    /// Units without guest bytes.
    pub fetch_bytes_max: u64,
    /// Units with guest bytes.
    pub guest_bytes_max: u64,
}

impl Default for Budgets {
    fn default() -> Self {
        Self { fetch_bytes_max: FETCH_BYTES_MAX, guest_bytes_max: GUEST_BYTES_MAX }
    }
}

/// Leave for one unit to come in flight; given back when dropped.
#[derive(Debug)]
pub struct Leave {
    _permit: OwnedSemaphorePermit,
}

/// A place among those who wait until another unit may come in flight.
#[derive(Debug)]
pub struct Queue {
    places: Arc<Semaphore>,
    failure: Option<oneshot::Receiver<LayerError>>,
}

impl Queue {
    /// Waits for the caller's turn.
    ///
    /// # Errors
    /// What holds guest bytes could not be fetched or stored: whoever waits for their memory might wait for ever.
    pub async fn turn(self) -> Result<Leave, LayerError> {
        let acquire = std::pin::pin!(self.places.acquire_owned());
        let failure = async {
            match self.failure {
                Some(failure) => match failure.await {
                    Ok(error) => error,
                    Err(_) => std::future::pending().await,
                },
                None => std::future::pending().await,
            }
        };
        match futures_util::future::select(acquire, std::pin::pin!(failure)).await {
            futures_util::future::Either::Left((permit, _)) => {
                Ok(Leave { _permit: permit.expect("nobody closes it") })
            }
            futures_util::future::Either::Right((error, _)) => Err(error),
        }
    }
}

/// Both bounds, counted in units.
pub(super) struct Gates {
    /// Leave, a permit a unit.
    fetch_places: Arc<Semaphore>,
    guest_places: Arc<Semaphore>,
    /// Who waits for the memory of units with guest bytes.
    guest_waiters: Vec<oneshot::Sender<LayerError>>,
}

impl Gates {
    pub(super) fn new(unit_bytes: u64, budgets: Budgets) -> Self {
        let places = |bytes_max: u64| {
            let count = usize::try_from(bytes_max / unit_bytes).unwrap_or(usize::MAX);
            Arc::new(Semaphore::new(count.clamp(1, Semaphore::MAX_PERMITS)))
        };
        Self {
            fetch_places: places(budgets.fetch_bytes_max),
            guest_places: places(budgets.guest_bytes_max),
            guest_waiters: Vec::new(),
        }
    }

    /// Leave for another unit; else the queue to wait in.
    pub(super) fn admit(&mut self, budget: Budget) -> Result<Leave, Queue> {
        let places = match budget {
            Budget::Guest => &self.guest_places,
            Budget::Fetch => &self.fetch_places,
        };
        if let Ok(permit) = Arc::clone(places).try_acquire_owned() {
            return Ok(Leave { _permit: permit });
        }
        let failure = (budget == Budget::Guest).then(|| {
            let (tell, told) = oneshot::channel();
            self.guest_waiters.retain(|waiter| !waiter.is_closed());
            self.guest_waiters.push(tell);
            told
        });
        Err(Queue { places: Arc::clone(places), failure })
    }

    /// Tells who waits for the memory of guest bytes that they could not be fetched or stored.
    pub(super) fn fail_guests(&mut self, error: &LayerError) {
        for waiter in self.guest_waiters.drain(..) {
            let _ = waiter.send(error.clone());
        }
    }
}
