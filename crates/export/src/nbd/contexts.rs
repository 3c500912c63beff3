//! The metadata contexts that block status speaks of, and which of them a client has selected.

/// A metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    /// `base:allocation`: holes and zeros.
    Allocation,
    /// `qemu:allocation-depth`: which image of the chain holds the data.
    Depth,
}

impl Context {
    pub const ALL: [Context; 2] = [Context::Allocation, Context::Depth];

    pub fn name(self) -> &'static str {
        match self {
            Context::Allocation => "base:allocation",
            Context::Depth => "qemu:allocation-depth",
        }
    }

    fn namespace(self) -> &'static str {
        match self {
            Context::Allocation => "base:",
            Context::Depth => "qemu:",
        }
    }

    /// The number that stands for it on the wire.
    pub fn id(self) -> u32 {
        match self {
            Context::Allocation => 1,
            Context::Depth => 2,
        }
    }

    pub fn from_id(id: u32) -> Option<Context> {
        Self::ALL.into_iter().find(|context| context.id() == id)
    }

    /// Whether a query of NBD_OPT_SET_META_CONTEXT selects it.
    pub fn is_selected_by(self, query: &[u8]) -> bool {
        query == self.name().as_bytes()
    }

    /// Whether a query of NBD_OPT_LIST_META_CONTEXT asks for it: a namespace alone is a wildcard there.
    pub fn is_listed_by(self, query: &[u8]) -> bool {
        self.is_selected_by(query) || query == self.namespace().as_bytes()
    }
}

/// A set of contexts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Contexts {
    allocation: bool,
    depth: bool,
}

impl Contexts {
    /// Adds one; false if it was there.
    pub fn insert(&mut self, context: Context) -> bool {
        let place = match context {
            Context::Allocation => &mut self.allocation,
            Context::Depth => &mut self.depth,
        };
        !std::mem::replace(place, true)
    }

    pub fn contains(self, context: Context) -> bool {
        match context {
            Context::Allocation => self.allocation,
            Context::Depth => self.depth,
        }
    }

    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    pub fn iter(self) -> impl Iterator<Item = Context> {
        Context::ALL.into_iter().filter(move |&context| self.contains(context))
    }
}
