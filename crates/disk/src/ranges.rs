//! A set of byte ranges: sorted, disjoint, never touching each other.
//!
//! Not here: what the bytes are.

use std::{collections::BTreeMap, ops::Range};

/// A set of byte offsets, kept as ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// Start to end.
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Adds a range.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // Whatever overlaps or touches is taken in.
        while let Some((&other_start, &other_end)) = self.ranges.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.ranges.remove(&other_start);
            start = start.min(other_start);
            end = end.max(other_end);
        }
        self.ranges.insert(start, end);
    }

    /// Whether no byte is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&start, &end)| start..end)
    }

    /// Whether every byte of `range` is in the set.
    pub fn covers(&self, range: &Range<u64>) -> bool {
        range.is_empty()
            || self.ranges.range(..=range.start).next_back().is_some_and(|(_, &end)| end >= range.end)
    }

    /// The parts of `range` that are not in the set, in order.
    pub fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        let first = self.ranges.range(..=range.start).next_back().map_or(range.start, |(&start, _)| start);
        for (&start, &end) in self.ranges.range(first..range.end) {
            if start > at {
                gaps.push(at..start);
            }
            at = at.max(end);
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_flat_model(ops in prop::collection::vec((0u64..64, 0u64..16), 0..24), ask in (0u64..64, 0u64..32)) {
            let mut set = RangeSet::default();
            let mut flat = [false; 128];
            for (start, len) in ops {
                set.insert(start..start + len);
                flat[start as usize..(start + len) as usize].fill(true);
            }
            let ask = ask.0..ask.0 + ask.1;
            prop_assert_eq!(set.covers(&ask), ask.clone().all(|at| flat[at as usize]));
            let mut gap_bytes = [false; 128];
            for gap in set.gaps(ask.clone()) {
                prop_assert!(!gap.is_empty());
                gap_bytes[gap.start as usize..gap.end as usize].fill(true);
            }
            for at in 0..128u64 {
                let is_gap = ask.contains(&at) && !flat[at as usize];
                prop_assert_eq!(gap_bytes[at as usize], is_gap);
            }
        }
    }
}
