//! Schedule: which request may be sent now. A plain state machine, and a thin async wrapper around it.
//!
//! - Demand has places of its own: it waits only for other demand, never for read-ahead, profile or stream.
//! - The others start only while no demand waits and there is room left beside the demand in flight, in the order of
//!   their class, and within a class in the order of arrival.
//! - At most `demand_max` and `background_max` requests are in flight.
//!
//! Not here: how large requests are, and how many bytes the link can take.

use std::collections::{BTreeMap, VecDeque};

use readonce_storage::sync::Mutex;
use tokio::sync::oneshot;

use crate::Class;

/// One request, as long as it waits or is in flight.
pub type Ticket = u64;

/// The classes behind demand, most urgent first.
const BACKGROUND: [Class; 3] = [Class::ReadAhead, Class::Profile, Class::Stream];

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It wants to be sent.
    Arrive(Class, Ticket),
    /// It ended, or is not wanted any more, whether it was sent or not.
    Leave(Class, Ticket),
}

/// Decides which request is sent.
#[derive(Debug)]
pub struct Schedule {
    demand_max: usize,
    background_max: usize,
    demand_in_flight: usize,
    background_in_flight: usize,
    waiting: BTreeMap<Class, VecDeque<Ticket>>,
}

impl Schedule {
    /// Limits of requests in flight; both at least 1.
    pub fn new(demand_max: usize, background_max: usize) -> Self {
        Self {
            demand_max: demand_max.max(1),
            background_max: background_max.max(1),
            demand_in_flight: 0,
            background_in_flight: 0,
            waiting: BTreeMap::new(),
        }
    }

    /// Takes an event; returns the requests that may be sent now.
    pub fn step(&mut self, event: Event) -> Vec<Ticket> {
        match event {
            Event::Arrive(class, ticket) => self.waiting.entry(class).or_default().push_back(ticket),
            Event::Leave(class, ticket) => {
                let queue = self.waiting.entry(class).or_default();
                match queue.iter().position(|waiting| *waiting == ticket) {
                    Some(index) => {
                        queue.remove(index);
                    }
                    None => self.leave_flight(class),
                }
            }
        }
        std::iter::from_fn(|| self.start()).collect()
    }

    fn leave_flight(&mut self, class: Class) {
        let in_flight = match class {
            Class::Demand => &mut self.demand_in_flight,
            _ => &mut self.background_in_flight,
        };
        *in_flight = in_flight.checked_sub(1).expect("a request leaves once, after it arrived");
    }

    fn start(&mut self) -> Option<Ticket> {
        if let Some(queue) = self.waiting.get_mut(&Class::Demand)
            && !queue.is_empty()
        {
            if self.demand_in_flight >= self.demand_max {
                return None;
            }
            self.demand_in_flight += 1;
            return queue.pop_front();
        }
        let left = self.demand_max.saturating_sub(self.demand_in_flight).min(self.background_max);
        if self.background_in_flight >= left {
            return None;
        }
        let queues =
            BACKGROUND.iter().find_map(|class| self.waiting.get_mut(class).and_then(VecDeque::pop_front))?;
        self.background_in_flight += 1;
        Some(queues)
    }
}

/// The async side: waits for a place.
pub struct Places {
    state: Mutex<State>,
}

struct State {
    schedule: Schedule,
    next: Ticket,
    waiters: BTreeMap<Ticket, oneshot::Sender<()>>,
}

impl State {
    fn step(&mut self, event: Event) {
        for ticket in self.schedule.step(event) {
            if let Some(waiter) = self.waiters.remove(&ticket) {
                // A waiter that is gone leaves the schedule by its own drop.
                let _ = waiter.send(());
            }
        }
    }
}

/// The right to have one request in flight; given back when dropped.
pub struct Place<'a> {
    places: &'a Places,
    class: Class,
    ticket: Ticket,
}

impl Places {
    /// Limits of requests in flight; both at least 1.
    pub fn new(demand_max: usize, background_max: usize) -> Self {
        let schedule = Schedule::new(demand_max, background_max);
        Self { state: Mutex::new(State { schedule, next: 0, waiters: BTreeMap::new() }) }
    }

    /// Waits until a request of this class may be sent.
    pub async fn take(&self, class: Class) -> Place<'_> {
        let (place, started) = {
            let mut state = self.state.lock();
            let ticket = state.next;
            state.next += 1;
            let (waiter, started) = oneshot::channel();
            state.waiters.insert(ticket, waiter);
            state.step(Event::Arrive(class, ticket));
            // Made before anything is awaited: its drop takes the ticket back wherever the caller stops.
            (Place { places: self, class, ticket }, started)
        };
        started.await.expect("the waiter is kept until its ticket starts or leaves");
        place
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.places.state.lock();
        state.waiters.remove(&self.ticket);
        state.step(Event::Leave(self.class, self.ticket));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a script: `D1` demand 1 arrives, `S2` stream 2 arrives, `-D1` it leaves. Returns what starts, in order.
    #[track_caller]
    fn check(demand_max: usize, background_max: usize, script: &str, starts: &str) {
        let mut schedule = Schedule::new(demand_max, background_max);
        let mut started = Vec::new();
        for word in script.split(' ') {
            let (leave, word) = match word.strip_prefix('-') {
                Some(word) => (true, word),
                None => (false, word),
            };
            let (class, ticket) = word.split_at(1);
            let class = match class {
                "D" => Class::Demand,
                "R" => Class::ReadAhead,
                "P" => Class::Profile,
                _ => Class::Stream,
            };
            let ticket = ticket.parse().expect("a number");
            let event = if leave { Event::Leave(class, ticket) } else { Event::Arrive(class, ticket) };
            started.extend(schedule.step(event).iter().map(u64::to_string));
        }
        assert_eq!(started.join(" "), starts);
    }

    #[test]
    fn demand_never_queues_behind_the_others() {
        check(4, 2, "S1 S2 S3 D4 D5 D6 D7", "1 2 4 5 6 7");
        check(2, 2, "S1 S2 D3 D4 D5 -D3", "1 2 3 4 5");
    }

    #[test]
    fn the_others_take_what_demand_leaves() {
        check(2, 2, "D1 D2 S3 -D1 -D2", "1 2 3");
        check(2, 2, "D1 D2 D3 S4 -D1 -D2", "1 2 3 4");
        check(1, 1, "D1 S2 P3 R4 -D1 -R4 -P3", "1 4 3 2");
        check(8, 2, "S1 S2 S3 -S2", "1 2 3");
    }

    #[test]
    fn one_that_leaves_while_it_waits_is_forgotten() {
        check(1, 1, "D1 D2 D3 -D2 -D1", "1 3");
        check(1, 1, "S1 S2 S3 -S2 -S1", "1 3");
    }

    #[tokio::test]
    async fn a_dropped_waiter_gives_its_place_back() {
        let places = Places::new(1, 1);
        let first = places.take(Class::Demand).await;
        let mut dropped = Box::pin(places.take(Class::Demand));
        assert!(futures_util::poll!(&mut dropped).is_pending());
        let mut second = Box::pin(places.take(Class::Demand));
        assert!(futures_util::poll!(&mut second).is_pending());
        drop(first);
        // `dropped` holds the place without having seen it.
        assert!(futures_util::poll!(&mut second).is_pending());
        drop(dropped);
        assert!(futures_util::poll!(&mut second).is_ready());
    }
}
