//! Extents of the device into the chunks of a block status reply. Pure.

use readonce_disk::StatusExtent;

use super::{
    contexts::{Context, Contexts},
    wire::Headers,
};

/// Extents asked of the device for one request.
pub(super) const STATUS_EXTENTS_MAX: usize = 4096;
/// Extents asked of the device where the client wants one: neighbours that differ in one context are one in the other.
pub(super) const STATUS_EXTENTS_ONE: usize = 8;
/// Bytes of an extent for a client with 32-bit lengths, aligned so that the rest begins aligned.
const COMPACT_EXTENT_LEN_MAX: u64 = 0xffff_0000;

const STATE_HOLE: u32 = 1 << 0;
const STATE_ZERO: u32 = 1 << 1;

/// A block status request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Query {
    pub headers: Headers,
    pub cookie: u64,
    /// Bytes.
    pub offset: u64,
    /// Bytes; at least 1.
    pub len: u64,
    pub one: bool,
    pub contexts: Contexts,
}

impl Query {
    /// How many extents to ask of the device.
    pub fn count_max(&self) -> usize {
        if self.one { STATUS_EXTENTS_ONE } else { STATUS_EXTENTS_MAX }
    }

    /// Bytes that the reply has at most.
    pub fn reply_len_max(&self) -> usize {
        Context::ALL.len() * (64 + 16 * self.count_max())
    }

    /// The whole reply; `None` if `extents` tell of nothing.
    pub fn reply(&self, extents: &[StatusExtent]) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        let mut contexts = self.contexts.iter().peekable();
        while let Some(context) = contexts.next() {
            let runs = self.runs(context, extents);
            if runs.is_empty() {
                return None;
            }
            let last = contexts.peek().is_none();
            self.headers.status_chunk(self.cookie, self.offset, last, context.id(), &runs, &mut out);
        }
        Some(out)
    }

    /// The extents as `context` sees them: neighbours in one state are one, and none reaches past the request.
    fn runs(&self, context: Context, extents: &[StatusExtent]) -> Vec<(u64, u32)> {
        let len_max = if self.headers == Headers::Extended { u64::MAX } else { COMPACT_EXTENT_LEN_MAX };
        let mut runs: Vec<(u64, u32)> = Vec::new();
        let mut left = self.len;
        for extent in extents {
            let len = extent.len.min(left);
            if len == 0 {
                break;
            }
            let state = state(context, extent);
            match runs.last_mut() {
                Some(run) if run.1 == state => run.0 = run.0.saturating_add(len),
                Some(_) if self.one => break,
                _ => runs.push((len, state)),
            }
            left -= len;
            if let Some(run) = runs.last_mut().filter(|run| run.0 > len_max) {
                // The client asks again behind it: what follows must not be told as if it came next.
                run.0 = len_max;
                break;
            }
        }
        runs
    }
}

fn state(context: Context, extent: &StatusExtent) -> u32 {
    match context {
        Context::Allocation => {
            (if extent.hole { STATE_HOLE } else { 0 }) | (if extent.zero { STATE_ZERO } else { 0 })
        }
        Context::Depth => extent.depth,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `D` data on top, `B` data of the backing, `z` zeros on top, `.` nothing; each letter 4 KiB.
    fn extents(picture: &str) -> Vec<StatusExtent> {
        picture
            .chars()
            .map(|letter| {
                let (zero, hole, depth) = match letter {
                    'D' => (false, false, 1),
                    'B' => (false, false, 2),
                    'z' => (true, false, 1),
                    _ => (true, true, 0),
                };
                StatusExtent { len: 4096, zero, hole, depth }
            })
            .collect()
    }

    fn check(picture: &str, one: bool, len: u64, context: Context, expected: &[(u64, u32)]) {
        let query = Query {
            headers: Headers::Structured,
            cookie: 7,
            offset: 0,
            len,
            one,
            contexts: Contexts::default(),
        };
        let blocks: Vec<_> = expected.iter().map(|&(blocks, state)| (blocks * 4096, state)).collect();
        assert_eq!(query.runs(context, &extents(picture)), blocks, "{picture} {context:?}");
    }

    #[test]
    fn neighbours_in_one_state_are_one_run() {
        check("DDBz..", false, 6 * 4096, Context::Allocation, &[(3, 0), (1, 2), (2, 3)]);
        check("DDBz..", false, 6 * 4096, Context::Depth, &[(2, 1), (1, 2), (1, 1), (2, 0)]);
        check("DDBz..", true, 6 * 4096, Context::Allocation, &[(3, 0)]);
        check("DDBz..", false, 2 * 4096, Context::Allocation, &[(2, 0)]);
        check("", false, 4096, Context::Allocation, &[]);
    }

    #[test]
    fn an_extent_longer_than_32_bits_is_cut_and_nothing_follows() {
        let long = |len| StatusExtent { len, zero: true, hole: true, depth: 0 };
        let data = StatusExtent { len: 4096, zero: false, hole: false, depth: 1 };
        let mut query = Query {
            headers: Headers::Structured,
            cookie: 7,
            offset: 0,
            len: 1 << 40,
            one: false,
            contexts: Contexts::default(),
        };
        let told = [long(1 << 31), long(1 << 31), data];
        assert_eq!(query.runs(Context::Allocation, &told), [(COMPACT_EXTENT_LEN_MAX, 3)]);
        query.headers = Headers::Extended;
        assert_eq!(query.runs(Context::Allocation, &told), [(1 << 32, 3), (4096, 0)]);
    }
}
