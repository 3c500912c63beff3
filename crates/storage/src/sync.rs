//! Short locks and counters of the engine, where a test may switch tasks between any two of them.
//!
//! - As built for use they are `parking_lot`'s and `std`'s own types: nothing is added.
//! - With the feature `schedules`, which only tests ask for, each `lock`, each access of an atomic and each turn of a spin first tells
//!   the hook that `at_switches` set for this thread. A scheduler that runs all its tasks as coroutines on one thread
//!   (shuttle) switches there. A lock that another task holds is asked for again and again, so that the thread never stops.
//! - Without a hook the types of the feature do what the others do.
//!
//! Not here: locks that are held across a wait (`tokio::sync`); files and rings, whose waits are the machine's.

#[cfg(not(feature = "schedules"))]
pub use parking_lot::{Mutex, RwLock};
pub use parking_lot::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};

#[cfg(feature = "schedules")]
pub use scheduled::{Hook, Mutex, RwLock, Switch, Switches, at_switches};

/// Atomics, as `std::sync::atomic` has them.
pub mod atomic {
    #[cfg(feature = "schedules")]
    pub use super::scheduled::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize};
    #[cfg(not(feature = "schedules"))]
    pub use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize};
    pub use std::sync::atomic::{Ordering, fence};
}

/// Lets others run, in a loop that waits for one of them.
pub fn yield_now() {
    #[cfg(feature = "schedules")]
    if scheduled::tell(scheduled::Switch::Waits) {
        return;
    }
    std::thread::yield_now();
}

#[cfg(feature = "schedules")]
mod scheduled {
    use std::{cell::Cell, marker::PhantomData, sync::atomic};

    use super::{MutexGuard, RwLockReadGuard, RwLockWriteGuard, atomic::Ordering};

    /// Where a task may be switched.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Switch {
        /// It can go on, and others might go first.
        May,
        /// It goes on only after another did.
        Waits,
    }

    /// What is told of each place where a task may be switched.
    pub type Hook = fn(Switch);

    thread_local! {
        static HOOK: Cell<Option<Hook>> = const { Cell::new(None) };
    }

    /// As long as it lives the hook is told.
    pub struct Switches {
        before: Option<Hook>,
        /// It stays on its thread.
        _thread: PhantomData<*const ()>,
    }

    /// Tells `hook` of each place on this thread where a task may be switched.
    pub fn at_switches(hook: Hook) -> Switches {
        Switches { before: HOOK.replace(Some(hook)), _thread: PhantomData }
    }

    impl Drop for Switches {
        fn drop(&mut self) {
            HOOK.set(self.before);
        }
    }

    /// Whether a hook was told.
    pub(super) fn tell(switch: Switch) -> bool {
        // A task that panics unwinds to its end: what it drops is no schedule any more.
        let hook = HOOK.get().filter(|_| !std::thread::panicking());
        if let Some(hook) = hook {
            hook(switch);
        }
        hook.is_some()
    }

    /// Takes a lock where it is free at once, else asks again after others ran.
    fn turn_by_turn<G>(at_once: impl Fn() -> Option<G>, wait: impl FnOnce() -> G) -> G {
        if !tell(Switch::May) {
            return wait();
        }
        loop {
            if let Some(guard) = at_once() {
                return guard;
            }
            tell(Switch::Waits);
        }
    }

    /// `parking_lot::Mutex`, with a switch before each lock.
    #[derive(Debug, Default)]
    pub struct Mutex<T: ?Sized>(parking_lot::Mutex<T>);

    impl<T> Mutex<T> {
        /// See `parking_lot`.
        pub const fn new(value: T) -> Self {
            Self(parking_lot::Mutex::new(value))
        }

        /// See `parking_lot`.
        pub fn into_inner(self) -> T {
            self.0.into_inner()
        }
    }

    impl<T: ?Sized> Mutex<T> {
        /// See `parking_lot`.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            turn_by_turn(|| self.0.try_lock(), || self.0.lock())
        }

        /// See `parking_lot`.
        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            tell(Switch::May);
            self.0.try_lock()
        }

        /// See `parking_lot`.
        pub fn get_mut(&mut self) -> &mut T {
            self.0.get_mut()
        }
    }

    /// `parking_lot::RwLock`, with a switch before each lock.
    #[derive(Debug, Default)]
    pub struct RwLock<T: ?Sized>(parking_lot::RwLock<T>);

    impl<T> RwLock<T> {
        /// See `parking_lot`.
        pub const fn new(value: T) -> Self {
            Self(parking_lot::RwLock::new(value))
        }
    }

    impl<T: ?Sized> RwLock<T> {
        /// See `parking_lot`.
        pub fn read(&self) -> RwLockReadGuard<'_, T> {
            turn_by_turn(|| self.0.try_read(), || self.0.read())
        }

        /// See `parking_lot`.
        pub fn write(&self) -> RwLockWriteGuard<'_, T> {
            turn_by_turn(|| self.0.try_write(), || self.0.write())
        }
    }

    /// An atomic of `std`, with a switch before each access.
    macro_rules! atomic {
        ($($name:ident: $value:ty),*) => {$(
            #[doc = concat!("`std`'s `", stringify!($name), "`, with a switch before each access.")]
            #[derive(Debug, Default)]
            pub struct $name(atomic::$name);

            impl $name {
                /// See `std`.
                pub const fn new(value: $value) -> Self {
                    Self(atomic::$name::new(value))
                }

                /// See `std`.
                pub fn load(&self, order: Ordering) -> $value {
                    tell(Switch::May);
                    self.0.load(order)
                }

                /// See `std`.
                pub fn store(&self, value: $value, order: Ordering) {
                    tell(Switch::May);
                    self.0.store(value, order);
                }

                /// See `std`.
                pub fn swap(&self, value: $value, order: Ordering) -> $value {
                    tell(Switch::May);
                    self.0.swap(value, order)
                }

                /// See `std`.
                ///
                /// # Errors
                /// The value, where it is not `current`.
                pub fn compare_exchange(
                    &self,
                    current: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    tell(Switch::May);
                    self.0.compare_exchange(current, new, success, failure)
                }
            }
        )*};
    }
    atomic!(AtomicBool: bool, AtomicU8: u8, AtomicU64: u64, AtomicUsize: usize);

    macro_rules! counter {
        ($($name:ident: $value:ty),*) => {$(
            impl $name {
                /// See `std`.
                pub fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                    tell(Switch::May);
                    self.0.fetch_add(value, order)
                }

                /// See `std`.
                pub fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                    tell(Switch::May);
                    self.0.fetch_sub(value, order)
                }
            }
        )*};
    }
    counter!(AtomicU64: u64, AtomicUsize: usize);
}
