//! Counts: how often each cluster of a file is referred to.
//!
//! - Memory: a byte for each cluster, in pages of [`PAGE`] that exist only where something refers to (at most
//!   [`PAGES_MAX`]), and an entry of a map for each count that a byte does not hold.
//!
//! Not here: what refers to clusters (`scan`).

use std::collections::BTreeMap;

use crate::{
    FormatError,
    number::{bytes, index},
};

/// Counts of a page.
pub(super) const PAGE: u64 = 4096;
/// Pages of counts: 512 MiB.
const PAGES_MAX: usize = 1 << 17;
/// Number of the last page that can be: behind the longest file there is room for its refcounts.
const PAGE_NUMBER_MAX: usize = 1 << 20;
/// A byte of a page that says: look into the map.
const MANY: u8 = u8::MAX;

/// How often each cluster is referred to. Counts stop at the largest refcount of the image.
pub(super) struct Counts {
    /// By the number of the page; none where nothing refers to.
    pages: Vec<Option<Box<[u8]>>>,
    /// Pages that are there.
    pages_used: usize,
    /// Counts of [`MANY`] and more.
    many: BTreeMap<u64, u64>,
    max: u64,
}

impl Counts {
    pub(super) fn new(max: u64) -> Self {
        Self { pages: Vec::new(), pages_used: 0, many: BTreeMap::new(), max }
    }

    /// Adds to a cluster's count; returns what would not fit below the largest refcount.
    pub(super) fn add(&mut self, cluster: u64, times: u64) -> Result<u64, FormatError> {
        let now = self.count(cluster);
        let room = self.max - now;
        self.set(cluster, now + times.min(room))?;
        Ok(times.saturating_sub(room))
    }

    pub(super) fn set(&mut self, cluster: u64, count: u64) -> Result<(), FormatError> {
        let number = index(cluster / PAGE);
        if self.pages.get(number).is_none_or(Option::is_none) {
            if count == 0 {
                return Ok(());
            }
            self.make_page(number)?;
        }
        let page = self.pages.get_mut(number).and_then(Option::as_mut).expect("it was just made");
        let byte = page.get_mut(index(cluster % PAGE)).expect("below the length of a page");
        let new = u8::try_from(count).unwrap_or(MANY);
        if *byte == MANY {
            self.many.remove(&cluster);
        }
        *byte = new;
        if new == MANY {
            self.many.insert(cluster, count);
        }
        Ok(())
    }

    fn make_page(&mut self, number: usize) -> Result<(), FormatError> {
        if self.pages_used >= PAGES_MAX || number > PAGE_NUMBER_MAX {
            return Err(FormatError::Unsupported(format!(
                "the file uses clusters in more than {PAGES_MAX} places, each {PAGE} clusters long"
            )));
        }
        if self.pages.len() <= number {
            self.pages.resize_with(number + 1, || None);
        }
        if let Some(page) = self.pages.get_mut(number) {
            *page = Some(vec![0; index(PAGE)].into());
            self.pages_used += 1;
        }
        Ok(())
    }

    fn page(&self, number: u64) -> Option<&[u8]> {
        usize::try_from(number).ok().and_then(|number| self.pages.get(number)).and_then(Option::as_deref)
    }

    pub(super) fn count(&self, cluster: u64) -> u64 {
        match self.page(cluster / PAGE).and_then(|page| page.get(index(cluster % PAGE))) {
            None => 0,
            Some(&MANY) => self.many.get(&cluster).copied().unwrap_or_default(),
            Some(&count) => count.into(),
        }
    }

    /// The counts of the clusters from `start` on, without end.
    pub(super) fn from(&self, start: u64) -> impl Iterator<Item = u64> {
        (start / PAGE..).flat_map(move |number| {
            let page = self.page(number);
            let first = number * PAGE;
            (first.max(start)..first + PAGE).map(move |cluster| {
                match page.and_then(|page| page.get(index(cluster - first))) {
                    None => 0,
                    Some(&MANY) => self.many.get(&cluster).copied().unwrap_or_default(),
                    Some(&count) => count.into(),
                }
            })
        })
    }

    /// The first cluster at or after `start`, and before `end`, that is referred to.
    pub(super) fn next_used(&self, start: u64, end: u64) -> Option<u64> {
        let pages_end = end.div_ceil(PAGE).min(bytes(self.pages.len()));
        (start / PAGE..pages_end).find_map(|number| {
            let first = number * PAGE;
            let from = start.saturating_sub(first);
            let found = self.page(number)?.iter().skip(index(from)).position(|&count| count > 0)?;
            Some(first + from + bytes(found)).filter(|&cluster| cluster < end)
        })
    }

    /// The last cluster that is referred to.
    pub(super) fn last_used(&self) -> Option<u64> {
        (0..bytes(self.pages.len())).rev().find_map(|number| {
            let at = self.page(number)?.iter().rposition(|&count| count > 0)?;
            Some(number * PAGE + bytes(at))
        })
    }
}
