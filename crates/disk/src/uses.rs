//! Uses: who may still read or write a place in the file that a lookup named.
//!
//! - A reader, or a writer in place, *enters* before it looks a place up and leaves when its I/O has ended. What a commit
//!   unlinked may be used again once everybody has left who had entered before: [`Uses::quiesce`].
//! - Counters of two epochs: who enters counts in the current one; a wait makes the other one current and waits until the
//!   old one is empty. Who enters meanwhile is not waited for.
//! - A counter has stripes, each on a cache line of its own, so that threads that enter share none. Who leaves another
//!   thread than it entered on leaves its stripe all the same.
//! - Entering and leaving are one atomic addition each and never wait. Sequential consistency throughout: who enters adds,
//!   then looks whether the epoch is still the same; who waits changes the epoch, then looks at the counters.
//!
//! Not here: which clusters are unlinked (the format), when they are asked for (`flush`).

use crate::atomics::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// Stripes of a counter; more threads than this share some.
const STRIPES: usize = 16;

/// The uses of one image.
#[derive(Default)]
pub struct Uses {
    /// Its lowest bit says which counters are current.
    epoch: AtomicUsize,
    stripes: [Stripe; STRIPES],
    /// Somebody waits in `quiesce`.
    waits: AtomicBool,
    left: tokio::sync::Notify,
    /// One wait at a time.
    waiting: tokio::sync::Mutex<()>,
    /// A write was given up half-way: the file may change there until the next sync.
    torn: AtomicBool,
}

/// Counters of the two epochs, on a cache line of their own.
#[derive(Default)]
#[repr(align(128))]
struct Stripe {
    inside: [AtomicUsize; 2],
}

/// A use; ends when dropped.
pub struct Use<'a> {
    uses: &'a Uses,
    stripe: usize,
    epoch: usize,
}

/// A write in place; one that is dropped before [`WriteInPlace::ended`] may still be under way.
pub struct WriteInPlace<'a> {
    inside: Option<Use<'a>>,
}

impl Uses {
    /// Begins a use. What the caller looks up from now on stays what it is until the use is dropped.
    pub fn enter(&self) -> Use<'_> {
        let stripe = stripe_of_thread();
        loop {
            let epoch = self.epoch.load(SeqCst);
            self.stripes[stripe].inside[epoch % 2].fetch_add(1, SeqCst);
            let inside = Use { uses: self, stripe, epoch };
            if self.epoch.load(SeqCst) == epoch {
                return inside;
            }
            // The epoch ended in between: whoever waits for it may not have seen this use.
            drop(inside);
        }
    }

    /// Waits until every use that began before this call has ended.
    pub async fn quiesce(&self) {
        let _one_at_a_time = self.waiting.lock().await;
        let old = self.epoch.load(SeqCst);
        // A wait that was given up may have left some behind.
        self.empty(old.wrapping_add(1)).await;
        self.epoch.store(old.wrapping_add(1), SeqCst);
        self.empty(old).await;
    }

    /// Whether a write was given up half-way since this was asked last: a sync ends it.
    pub fn take_torn(&self) -> bool {
        self.torn.swap(false, SeqCst)
    }

    async fn empty(&self, epoch: usize) {
        for stripe in &self.stripes {
            loop {
                let left = self.left.notified();
                self.waits.store(true, SeqCst);
                if stripe.inside[epoch % 2].load(SeqCst) == 0 {
                    break;
                }
                left.await;
            }
        }
        self.waits.store(false, SeqCst);
    }
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.uses.stripes[self.stripe].inside[self.epoch % 2].fetch_sub(1, SeqCst);
        if self.uses.waits.load(SeqCst) {
            self.uses.left.notify_one();
        }
    }
}

impl<'a> WriteInPlace<'a> {
    /// Begins a write; `None` where nothing is ever unlinked.
    pub fn begin(uses: Option<&'a Uses>) -> Self {
        Self { inside: uses.map(Uses::enter) }
    }

    /// The write has ended, well or not.
    pub fn ended(mut self) {
        self.inside = None;
    }
}

impl Drop for WriteInPlace<'_> {
    fn drop(&mut self) {
        if let Some(inside) = self.inside.take() {
            inside.uses.torn.store(true, SeqCst);
        }
    }
}

/// Spreads threads over the stripes.
fn stripe_of_thread() -> usize {
    use std::{cell::Cell, sync::atomic::AtomicUsize};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static STRIPE: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    STRIPE.with(|stripe| {
        if stripe.get() == usize::MAX {
            stripe.set(NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % STRIPES);
        }
        stripe.get()
    })
}
