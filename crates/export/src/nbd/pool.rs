//! Bytes that all connections together hold for their clients: payload that is received or worked on, and replies that nobody fetches.
//!
//! - The first `OWN_BYTES_MAX` of each connection are its own: small requests are served whatever the others hold, and need no lock
//!   here.
//! - What is held goes with its request, also where the connection ended before it.
//! - Who found no room is woken whenever some is given back, and looks again.
//!
//! Not here: what one connection may hold (`connection`), and the buffers that each has (`inbox`, `outbox`).

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::{job::Mailbox, wire::PAYLOAD_LEN_MAX};

/// Bytes of each connection that are not counted here.
pub(super) const OWN_BYTES_MAX: usize = 128 << 10;

/// Room for all connections of a server.
pub(super) struct Pool(Mutex<State>);

struct State {
    /// Bytes.
    free: usize,
    /// Connections to wake. Weak: what has come back to one that ended holds room itself.
    waiting: Vec<Weak<Mailbox>>,
}

/// Bytes taken from a pool, until it is dropped.
#[derive(Default)]
pub(super) struct Held(Option<(Arc<Pool>, usize)>);

impl Pool {
    /// Room for `bytes_max`, and for one of the longest requests at least.
    pub fn new(bytes_max: usize) -> Arc<Self> {
        let free = bytes_max.max(PAYLOAD_LEN_MAX as usize);
        Arc::new(Self(Mutex::new(State { free, waiting: Vec::new() })))
    }

    /// Takes `len` bytes. Without room for them `mailbox` is woken once there may be.
    pub fn take(self: &Arc<Self>, len: usize, mailbox: &Arc<Mailbox>) -> Option<Held> {
        if len == 0 {
            return Some(Held::default());
        }
        let mut state = self.0.lock();
        match state.free.checked_sub(len) {
            Some(free) => {
                state.free = free;
                Some(Held(Some((Arc::clone(self), len))))
            }
            None => {
                let mailbox = Arc::downgrade(mailbox);
                if !state.waiting.iter().any(|other| other.ptr_eq(&mailbox)) {
                    state.waiting.push(mailbox);
                }
                None
            }
        }
    }
}

impl Held {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |(_, len)| *len)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some((pool, len)) = self.0.take() else { return };
        let mut state = pool.0.lock();
        state.free += len;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        for mailbox in waiting.iter().filter_map(Weak::upgrade) {
            mailbox.waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 2 * PAYLOAD_LEN_MAX as usize;

    #[test]
    fn what_is_given_back_can_be_taken_again_and_no_more() {
        let (pool, mailbox) = (Pool::new(MAX), Arc::new(Mailbox::default()));
        let first = pool.take(MAX - 10, &mailbox).expect("it is empty");
        assert_eq!(first.len(), MAX - 10);
        assert!(pool.take(11, &mailbox).is_none());
        assert!(pool.take(11, &mailbox).is_none());
        assert_eq!(pool.0.lock().waiting.len(), 1, "a connection waits once");
        let second = pool.take(10, &mailbox).expect("just enough");
        assert_eq!(pool.take(0, &mailbox).expect("nothing needs no room").len(), 0);
        drop(first);
        assert!(pool.0.lock().waiting.is_empty(), "all are woken");
        drop(second);
        assert!(pool.take(MAX + 1, &mailbox).is_none());
        assert!(pool.take(MAX, &mailbox).is_some());
    }

    #[test]
    fn the_longest_request_has_room_in_any_pool() {
        let (pool, mailbox) = (Pool::new(0), Arc::new(Mailbox::default()));
        assert!(pool.take(PAYLOAD_LEN_MAX as usize, &mailbox).is_some());
    }
}
