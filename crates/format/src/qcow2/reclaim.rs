//! Reclaim: clusters that a crash left counted and without a reference are free again.
//!
//! - Runs beside the guest, once, on an image that was found in use. It looks at clusters below the file's end when the image
//!   was opened. One whose refcount changed since then is left alone: what the scan reads of it may be old.
//! - Only what nothing refers to is freed. A refcount that is too high beside references stays for `check`: whether it becomes 1
//!   decides flags in tables.
//! - A refcount table that grew meanwhile lies elsewhere, and its old place may hold anything: the scan begins anew. Each time the table is
//!   twice as long, so that is soon over.
//! - A table in which anything is wrong ends it: then nothing is freed, and the mark stays. So it does where a large image is
//!   closed meanwhile: closing does not wait for a scan of all of it, and the next open begins anew.
//!
//! Not here: the scan itself (`scan`).

use std::{io, sync::Arc};

use bytes::Bytes;
use readonce_storage::{BoxFuture, ReadAt, Storage};

use super::{
    header::Header,
    scan::{self, CLUSTERS_MAX, Nobody, Scanned},
    writer::Core,
};
use crate::FormatError;

/// The file as a scan sees it while it grows: zeros past its end, so that what is appended meanwhile lies inside.
struct Growing {
    file: Arc<dyn Storage>,
    len: u64,
}

impl ReadAt for Growing {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_now(&self, _: u64, _: &mut [u8]) -> Option<io::Result<()>> {
        None
    }

    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, io::Result<Bytes>> {
        Box::pin(async move {
            let wanted = crate::number::bytes(len);
            let there = self.file.len().saturating_sub(offset).min(wanted);
            if there == wanted {
                return self.file.read(offset, len).await;
            }
            let mut padded = Vec::with_capacity(len);
            if there > 0 {
                padded.extend_from_slice(&self.file.read(offset, crate::number::index(there)).await?);
            }
            padded.resize(len, 0);
            Ok(padded.into())
        })
    }
}

/// Scans, and frees what nothing refers to.
pub(super) async fn run(core: &Core) {
    let done = core.reclaim.run(scan_and_free(core)).await;
    core.space.refs.end_tracking();
    match done {
        None => core.reclaim.failed("the image is being closed"),
        Some(Err(error)) => core.reclaim.failed(&error.to_string()),
        Some(Ok(clusters)) => {
            tracing::info!(clusters, "reclaimed what a crash left unlinked");
            core.reclaim.done();
        }
    }
}

/// Looks at the file as its header shows it now.
async fn scan_once(core: &Core) -> Result<(Scanned, u32), FormatError> {
    let header = Header::read(core.file.as_ref()).await?;
    let cluster_bits = header.layout.cluster_bits;
    // A scan goes no further.
    let len = core.file.len().max((CLUSTERS_MAX - 1) << cluster_bits);
    let file = Growing { file: core.file.clone(), len };
    Ok((scan::scan(&file, &header, &mut Nobody).await?, cluster_bits))
}

/// Returns the clusters freed.
async fn scan_and_free(core: &Core) -> Result<u64, FormatError> {
    let (scanned, cluster_bits) = loop {
        let moves = core.space.refs.table_moves();
        let scanned = scan_once(core).await;
        // An error counts no more than a result: it may come from what lies where the table was.
        if core.space.refs.table_moves() == moves {
            break scanned?;
        }
    };
    if scanned.check_errors > 0 || scanned.lost || scanned.corruptions > 0 {
        return Err(FormatError::corrupt("tables", "wrong", "must be checked and repaired"));
    }
    let end = core.reclaim.end >> cluster_bits;
    let per_piece = core.space.refs.per_piece();
    let mut freed = 0;
    let mut first = 0;
    while first < end {
        let next = (first + per_piece).min(end);
        if core.space.refs.load_piece_of(first).await? {
            for (cluster, count) in (first..next).zip(scanned.counts.from(first)) {
                freed += u64::from(count == 0 && core.space.reclaim(cluster << cluster_bits));
            }
        }
        first = next;
        tokio::task::yield_now().await;
    }
    // The refcounts are in memory now: what is free at the end of the file can be cut off.
    core.space.scan_all().await?;
    Ok(freed)
}
