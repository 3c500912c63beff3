//! Draw: a fuzzer's bytes as a sequence of choices.
//!
//! - Once the bytes are used up every choice is its first: short inputs are simple cases, and each input has an end.
//! - A choice among few takes one byte, so that a changed byte changes one choice.

/// Choices to be drawn.
pub struct Draw<'a>(&'a [u8]);

impl<'a> Draw<'a> {
    /// Choices from these bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether all further choices are the first.
    pub fn is_done(&self) -> bool {
        self.0.is_empty()
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        (0..8).fold(0, |value, _| value << 8 | u64::from(self.byte()))
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        let value = match end {
            0..=0x100 => self.byte().into(),
            0x101..=0x1_0000 => u64::from(self.byte()) << 8 | u64::from(self.byte()),
            _ => self.number(),
        };
        value % end
    }

    /// An index into `len` things, which are not none.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// One of these.
    pub fn of<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }

    /// True once in `count` times.
    pub fn once_in(&mut self, count: u64) -> bool {
        self.below(count) == count - 1
    }

    /// At most `len_max` bytes.
    pub fn bytes(&mut self, len_max: usize) -> &'a [u8] {
        let len = self.index(len_max + 1).min(self.0.len());
        let (head, rest) = self.0.split_at(len);
        self.0 = rest;
        head
    }

    /// All bytes that are left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}
