//! Sparse bytes in memory, at any offset: what a simulated file holds.
//!
//! - Memory grows with the bytes written, not with their offsets. A copy shares its pages until one side changes them.
//! - `len` is kept by the owner: writes go anywhere, and the owner clears what lies past the end.
//!
//! Not here: sectors, logs, what a power loss keeps (`sim`).

use std::{collections::BTreeMap, ops::Range, sync::Arc};

/// Bytes of one page.
pub(crate) const PAGE: u64 = 4096;

/// Sparse bytes. Pages that are not there read as zeros.
#[derive(Clone, Default)]
pub(crate) struct Image {
    pub(crate) len: u64,
    pages: BTreeMap<u64, Arc<Page>>,
}

type Page = [u8; PAGE as usize];

impl Image {
    /// The parts of `range`, one a page: page index and the bytes inside the page.
    fn parts(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            (at < range.end).then(|| {
                let index = at / PAGE;
                let start = at % PAGE;
                let end = (start + range.end - at).min(PAGE);
                at += end - start;
                (index, start as usize..end as usize)
            })
        })
    }

    pub(crate) fn read(&self, offset: u64, mut buf: &mut [u8]) {
        for (index, inside) in Self::parts(offset..offset + buf.len() as u64) {
            let (part, rest) = buf.split_at_mut(inside.len());
            match self.pages.get(&index) {
                Some(page) => part.copy_from_slice(&page[inside]),
                None => part.fill(0),
            }
            buf = rest;
        }
    }

    /// Writes without a look at `len`.
    pub(crate) fn write(&mut self, offset: u64, mut data: &[u8]) {
        for (index, inside) in Self::parts(offset..offset + data.len() as u64) {
            let (part, rest) = data.split_at(inside.len());
            let page = self.pages.entry(index).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(page)[inside].copy_from_slice(part);
            data = rest;
        }
    }

    pub(crate) fn zero(&mut self, range: Range<u64>) {
        let touched = range.start / PAGE..range.end.div_ceil(PAGE);
        if touched.is_empty() || range.is_empty() {
            return;
        }
        // Only pages that exist are walked: the range may be as long as a file can be.
        let existing: Vec<u64> = self.pages.range(touched).map(|(index, _)| *index).collect();
        for index in existing {
            let start = range.start.max(index * PAGE) - index * PAGE;
            let end = (range.end - index * PAGE).min(PAGE);
            if (start, end) == (0, PAGE) {
                self.pages.remove(&index);
            } else if let Some(page) = self.pages.get_mut(&index) {
                Arc::make_mut(page)[start as usize..end as usize].fill(0);
            }
        }
    }

    /// Bytes held in memory.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// A cut that was kept below a write that was lost, or the other way round, leaves bytes past the end.
    pub(crate) fn forget_past_end(&mut self) {
        let past = self.pages.last_key_value().map_or(0, |(index, _)| (index + 1) * PAGE);
        self.zero(self.len..past.max(self.len));
    }
}
