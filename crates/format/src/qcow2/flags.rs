//! COPIED flags of the active tables: set exactly where the refcount is 1.
//!
//! - Tables are rewritten by sectors; a sector holds its entries with the old flags or the new ones.
//!
//! Not here: refcounts (`recount`), and whether flags are wrong (`check`).

use std::sync::Arc;

use readonce_storage::Storage;

use super::{
    chunks::{Chunks, words},
    counts::Counts,
    entry::{COPIED, OFFSET_MASK},
    header::Header,
    judge::{Cluster, entries},
    layout::L1_ENTRY_BYTES,
    recount::write_changes,
    scan::Named,
};
use crate::{FormatError, number::index};

/// Which flags may change.
#[derive(Clone, Copy)]
pub(super) enum Change<'a> {
    /// Those that must go: of clusters with a refcount above 1.
    Clear,
    /// All of them.
    Any,
    /// All but those of clusters that have a count here.
    AnyBut(&'a Counts),
}

impl Change<'_> {
    /// The word as it should be. `count` is the refcount of the cluster.
    fn apply(self, raw: u64, cluster: u64, count: u64) -> u64 {
        match self {
            Self::Clear if count <= 1 => raw,
            Self::AnyBut(kept) if kept.count(cluster) > 0 => raw,
            _ if count == 1 => raw | COPIED,
            _ => raw & !COPIED,
        }
    }
}

/// Makes the flags of the active L1 table and of the L2 tables that it names say what `counts` does. The flags are not synced.
pub(super) async fn set_flags(
    file: &Arc<dyn Storage>,
    header: &Header,
    tables: impl Iterator<Item = (u64, Named)>,
    counts: &Counts,
    change: Change<'_>,
) -> Result<(), FormatError> {
    let layout = &header.layout;
    let cluster_size = layout.cluster_size();
    let l1_bytes = u64::from(header.fields.l1_size) * L1_ENTRY_BYTES;
    let mut chunks = Chunks::new(file.as_ref(), header.fields.l1_table_offset, l1_bytes);
    while let Some((at, chunk)) = chunks.next().await {
        let chunk = chunk?;
        let mut new = chunk.to_vec();
        for (entry, raw) in words(at, &chunk).filter(|(_, raw)| raw & OFFSET_MASK != 0) {
            let cluster = (raw & OFFSET_MASK) / cluster_size;
            put(&mut new, entry - at, change.apply(raw, cluster, counts.count(cluster)));
        }
        write_changes(file, at, &chunk, &new).await?;
    }
    for (table, _) in tables.filter(|(table, named)| *table > 0 && named.active > 0) {
        let mut chunks = Chunks::new(file.as_ref(), table, cluster_size);
        while let Some((at, chunk)) = chunks.next().await {
            let chunk = chunk?;
            let mut new = chunk.to_vec();
            for entry in entries(layout, at, &chunk) {
                let Cluster::Room { at: offset, .. } = Cluster::of(layout, entry.raw, entry.bitmap) else {
                    continue;
                };
                let cluster = offset / cluster_size;
                let raw = if layout.external_data {
                    entry.raw | COPIED
                } else {
                    change.apply(entry.raw, cluster, counts.count(cluster))
                };
                put(&mut new, entry.at - at, raw);
            }
            write_changes(file, at, &chunk, &new).await?;
        }
    }
    Ok(())
}

fn put(chunk: &mut [u8], at: u64, raw: u64) {
    let at = index(at);
    if let Some(word) = chunk.get_mut(at..at + 8) {
        word.copy_from_slice(&raw.to_be_bytes());
    }
}
