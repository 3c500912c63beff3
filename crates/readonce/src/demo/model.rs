//! What the guest must read: the origin's bytes, and over them what it wrote, by blocks of 4 KiB.
//!
//! Each block is written once at most. A read beside the write of a block may see its old or its new bytes; one that began
//! after the write had completed must see the new ones.

use std::{collections::BTreeMap, ops::Range, sync::Mutex};

use readonce_testkit::Content;

/// Bytes of a block.
pub const BLOCK_BYTES: u64 = 4096;

/// How far the write of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    Begun,
    Completed,
}

/// The model.
pub struct Model {
    old: Content,
    new: Content,
    written: Mutex<BTreeMap<u64, Written>>,
}

/// What was known when a read began.
pub struct Before(Vec<u64>);

impl Model {
    /// A disk of `content` that nobody wrote to.
    pub fn new(content: Content, seed: u64) -> Self {
        let new = Content::seeded(!seed, content.len());
        Self { old: content, new, written: Mutex::default() }
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.old.len()
    }

    fn written(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Written>> {
        self.written.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The bytes to write to the blocks of a range; `None` if one of them was written already.
    pub fn begin_write(&self, range: Range<u64>) -> Option<Vec<u8>> {
        let mut written = self.written();
        if blocks(&range).any(|block| written.contains_key(&block)) {
            return None;
        }
        written.extend(blocks(&range).map(|block| (block, Written::Begun)));
        drop(written);
        Some(self.new.bytes(range).to_vec())
    }

    /// The write has completed.
    pub fn end_write(&self, range: Range<u64>) {
        self.written().extend(blocks(&range).map(|block| (block, Written::Completed)));
    }

    /// To be asked before a read is sent.
    pub fn before_read(&self, range: &Range<u64>) -> Before {
        let written = self.written();
        let completed = blocks(range).filter(|block| written.get(block) == Some(&Written::Completed));
        Before(completed.collect())
    }

    /// Compares what was read.
    ///
    /// # Errors
    /// The first wrong block, in words.
    pub fn check(&self, offset: u64, data: &[u8], before: &Before) -> Result<(), String> {
        let range = offset..offset + data.len() as u64;
        let begun: Vec<u64> = {
            let written = self.written();
            blocks(&range).filter(|block| written.contains_key(block)).collect()
        };
        let old = self.old.bytes(range.clone());
        let new = if begun.is_empty() { old.clone() } else { self.new.bytes(range.clone()) };
        for (block, start) in blocks(&range).zip((0..).step_by(BLOCK_BYTES as usize)) {
            let part = start..(start + BLOCK_BYTES as usize).min(data.len());
            let is_old = data[part.clone()] == old[part.clone()];
            let is_new = data[part.clone()] == new[part];
            let right = match (begun.contains(&block), before.0.contains(&block)) {
                (_, true) => is_new,
                (true, false) => is_old || is_new,
                (false, false) => is_old,
            };
            if !right {
                let what = match (before.0.contains(&block), is_old) {
                    (true, true) => "a completed write is lost",
                    _ => "wrong bytes",
                };
                return Err(format!("{what} at {:#x}", block * BLOCK_BYTES));
            }
        }
        Ok(())
    }
}

/// The blocks of a range that begins and ends with one.
fn blocks(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_completed_write_must_be_read_and_one_under_way_may() {
        let model = Model::new(Content::seeded(5, 64 << 10), 5);
        let all = 0..64 << 10;
        let fresh = model.old.bytes(all.clone()).to_vec();
        let before = model.before_read(&all);
        let new = model.begin_write(4096..8192).expect("not written yet");
        assert!(model.begin_write(0..8192).is_none());
        let mut changed = fresh.clone();
        changed[4096..8192].copy_from_slice(&new);
        assert_eq!(model.check(0, &fresh, &before), Ok(()));
        assert_eq!(model.check(0, &changed, &before), Ok(()));
        model.end_write(4096..8192);
        let before = model.before_read(&all);
        assert_eq!(model.check(0, &changed, &before), Ok(()));
        assert_eq!(model.check(0, &fresh, &before), Err("a completed write is lost at 0x1000".to_owned()));
        changed[9000] ^= 1;
        assert_eq!(model.check(0, &changed, &before), Err("wrong bytes at 0x2000".to_owned()));
    }
}
