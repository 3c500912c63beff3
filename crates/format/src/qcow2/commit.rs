//! Commit: how a reservation changes an entry. Pure.
//!
//! - A fill ([`CommitMode::IfAbsent`]) changes absent units only, and never where the cluster lies for units that are there.
//! - What the old entry named and the new one does not is told, so that its refcount is lowered once that is on disk.
//!
//! Not here: entries in memory and on disk (`slice`, `links`).

use super::entry::{ALL, Entry, Place, Units};
use crate::CommitMode;

/// What a reservation holds for one cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A new cluster at this offset, for these units alone.
    New(u64),
    /// The cluster at this offset, where it is already or which other reservations may hold as well.
    Room(u64),
    /// A new cluster at this offset, with all that the old one holds.
    Copy(u64),
    /// Nothing: the units are to read as zeros.
    Zero,
}

/// What is to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) kind: Kind,
    /// Not empty.
    pub(super) units: Units,
    /// Whether `units` are all that the guest has of the cluster.
    pub(super) whole: bool,
    pub(super) mode: CommitMode,
    /// Whether an entry can say that it reads as zeros; else an entry without a cluster does.
    pub(super) zero_marks: bool,
}

/// What changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    /// The new entry.
    pub(super) entry: Entry,
    /// Units that are now as wished.
    pub(super) linked: Units,
    /// Of these, units of data that were none before.
    pub(super) data: Units,
    /// The place that the old entry named and the new one does not.
    pub(super) unlinked: Option<Place>,
    /// Whether the new entry names the reserved cluster.
    pub(super) used: bool,
}

impl Wish {
    /// The change of an entry.
    ///
    /// # Panics
    /// Where [`CommitMode::Overwrite`] meets what another owner put there: one of two owners would lose their bytes.
    pub(super) fn apply(self, old: Entry) -> Change {
        match self.kind {
            Kind::New(at) => self.new_cluster(old, at),
            Kind::Room(at) => self.in_room(old, at),
            Kind::Copy(at) => self.copy(old, at),
            Kind::Zero => self.zero(old),
        }
    }

    fn nothing(old: Entry, linked: Units) -> Change {
        Change { entry: old, linked, data: 0, unlinked: None, used: false }
    }

    /// Units that may be linked beside those that are there.
    fn free(self, old: Entry) -> Units {
        match self.mode {
            CommitMode::IfAbsent => self.units & old.absent(),
            CommitMode::Overwrite => {
                assert!(self.units & old.data == 0, "a write links over data: data is written in place");
                self.units
            }
        }
    }

    fn linked_at(self, old: Entry, at: u64) -> Change {
        let free = self.free(old);
        if free == 0 {
            return Self::nothing(old, 0);
        }
        let entry = Entry { place: Place::Own(at), data: old.data | free, zero: old.zero & !free };
        Change { entry, linked: free, data: free, unlinked: None, used: true }
    }

    fn new_cluster(self, old: Entry, at: u64) -> Change {
        if old.place == Place::None {
            return self.linked_at(old, at);
        }
        let free = match self.mode {
            CommitMode::IfAbsent => self.whole && old.data | old.zero == 0,
            CommitMode::Overwrite => {
                let own_data = matches!(old.place, Place::Own(_)) && old.data != 0;
                assert!(self.whole && !own_data, "a write links over data: data is written in place");
                true
            }
        };
        if !free {
            return Self::nothing(old, 0);
        }
        let entry = Entry { place: Place::Own(at), data: self.units, zero: 0 };
        Change { entry, linked: self.units, data: self.units, unlinked: Some(old.place), used: true }
    }

    fn in_room(self, old: Entry, at: u64) -> Change {
        match (old.place, self.mode) {
            (Place::None, _) => self.linked_at(old, at),
            (Place::Own(place), _) if place == at => self.linked_at(old, at),
            (_, CommitMode::IfAbsent) => Self::nothing(old, 0),
            (_, CommitMode::Overwrite) => panic!("a write links into a cluster that others have moved"),
        }
    }

    fn copy(self, old: Entry, at: u64) -> Change {
        let data = match old.place {
            Place::Shared(_) => old.data,
            Place::Compressed(_) => ALL,
            // Others have copied it already, or there is nothing to copy.
            Place::None | Place::Own(_) => return Self::nothing(old, self.units),
        };
        let entry = Entry { place: Place::Own(at), data, zero: old.zero };
        Change { entry, linked: self.units, data, unlinked: Some(old.place), used: true }
    }

    fn zero(self, old: Entry) -> Change {
        if self.mode == CommitMode::IfAbsent {
            let free = self.units & old.absent();
            let zero = if self.zero_marks { old.zero | free } else { 0 };
            return Self::nothing(Entry { zero, ..old }, free);
        }
        if self.whole && old.data != 0 {
            let zero = if self.zero_marks { ALL } else { 0 };
            let entry = Entry { place: Place::None, data: 0, zero };
            return Change { unlinked: Some(old.place), ..Self::nothing(entry, self.units) };
        }
        if !self.zero_marks {
            assert!(old.data == 0, "without zero marks whole clusters become zeros");
            return Self::nothing(old, self.units);
        }
        assert!(!matches!(old.place, Place::Compressed(_)), "a compressed cluster becomes zeros as a whole");
        let zero = old.zero | self.units;
        Self::nothing(Entry { data: old.data & !self.units, zero, ..old }, self.units)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABSENT: Entry = Entry { place: Place::None, data: 0, zero: 0 };
    const OWN: Entry = Entry { place: Place::Own(7), data: 0xf, zero: 0xf0 };
    const SHARED: Entry = Entry { place: Place::Shared(7), data: 0xf, zero: 0xf0 };
    const COMPRESSED: Entry = Entry { place: Place::Compressed(7), data: ALL, zero: 0 };

    fn wish(kind: Kind, units: Units, mode: CommitMode) -> Wish {
        Wish { kind, units, whole: units == ALL, mode, zero_marks: true }
    }

    #[test]
    fn a_fill_changes_absent_units_only() {
        let absent = ABSENT;
        let change = wish(Kind::Room(9), 0xff, CommitMode::IfAbsent).apply(absent);
        assert_eq!(change.entry, Entry { place: Place::Own(9), data: 0xff, zero: 0 });
        assert!(change.used && change.linked == 0xff);
        let change = wish(Kind::Room(7), 0xfff, CommitMode::IfAbsent).apply(OWN);
        assert_eq!(change.entry, Entry { data: 0xf0f, ..OWN });
        assert_eq!((change.linked, change.unlinked), (0xf00, None));
        for old in [OWN, SHARED, COMPRESSED] {
            for kind in [Kind::New(9), Kind::Room(9)] {
                let change = wish(kind, ALL, CommitMode::IfAbsent).apply(old);
                assert_eq!((change.entry, change.linked, change.used), (old, 0, false));
            }
        }
        let unused = Entry { data: 0, zero: 0, ..SHARED };
        let change = wish(Kind::New(9), ALL, CommitMode::IfAbsent).apply(unused);
        assert_eq!(change.unlinked, Some(Place::Shared(7)));
        assert_eq!(wish(Kind::Zero, ALL, CommitMode::IfAbsent).apply(OWN).entry.zero, !0xf);
    }

    #[test]
    fn a_write_replaces_what_is_shared_or_compressed() {
        for old in [SHARED, COMPRESSED] {
            let change = wish(Kind::New(9), ALL, CommitMode::Overwrite).apply(old);
            assert_eq!(change.entry, Entry { place: Place::Own(9), data: ALL, zero: 0 });
            assert_eq!((change.linked, change.unlinked), (ALL, Some(old.place)));
        }
        let change = wish(Kind::Room(7), 0x30, CommitMode::Overwrite).apply(OWN);
        assert_eq!(change.entry, Entry { place: Place::Own(7), data: 0x3f, zero: 0xc0 });
    }

    #[test]
    fn a_copy_keeps_what_each_unit_is() {
        let change = wish(Kind::Copy(9), ALL, CommitMode::Overwrite).apply(SHARED);
        assert_eq!(change.entry, Entry { place: Place::Own(9), ..SHARED });
        let change = wish(Kind::Copy(9), ALL, CommitMode::Overwrite).apply(COMPRESSED);
        assert_eq!(change.entry, Entry { place: Place::Own(9), data: ALL, zero: 0 });
        for old in [OWN, ABSENT] {
            let change = wish(Kind::Copy(9), ALL, CommitMode::Overwrite).apply(old);
            assert_eq!((change.entry, change.linked, change.used), (old, ALL, false));
        }
    }

    #[test]
    fn zeros_unlink_whole_clusters() {
        for old in [OWN, SHARED, COMPRESSED] {
            let change = wish(Kind::Zero, ALL, CommitMode::Overwrite).apply(old);
            assert_eq!(change.entry, Entry { place: Place::None, data: 0, zero: ALL });
            assert_eq!(change.unlinked, Some(old.place));
            let plain = Wish { zero_marks: false, ..wish(Kind::Zero, ALL, CommitMode::Overwrite) };
            assert_eq!(plain.apply(old).entry, ABSENT);
        }
        let change = wish(Kind::Zero, 0x3, CommitMode::Overwrite).apply(OWN);
        assert_eq!(change.entry, Entry { data: 0xc, zero: 0xf3, ..OWN });
        assert_eq!(change.unlinked, None);
    }

    #[test]
    #[should_panic(expected = "links over data")]
    fn a_write_over_data_is_a_bug() {
        wish(Kind::Room(7), 0x1, CommitMode::Overwrite).apply(OWN);
    }
}
