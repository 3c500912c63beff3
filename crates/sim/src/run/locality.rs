//! Locality: which cells the image holds itself, before a session and after one in which nothing went wrong for good (I4).
//!
//! - What was read or asked for lies in an image that fills, and no byte came twice.
//! - An image that does not fill holds no more than what was written to it, and the rest of those clusters.

use std::{sync::Arc, time::Duration};

use readonce_disk::{BlockDevice, Disk};
use readonce_testkit::exec::Exec;

use crate::{
    plan::{Op, Session},
    shape::{Remote, Shape},
};

/// Longer than what fills an image goes on after the read that asked for it, with all its retries.
const STORED_WITHIN: Duration = Duration::from_secs(3600);

/// Of each cell, whether the top holds it, or nothing does: whether it needs no backing.
pub(super) fn of(exec: &Arc<Exec>, disk: &Arc<Disk>, cell: u64) -> Option<Vec<bool>> {
    let (disk, rt) = (Arc::clone(disk), exec.rt());
    exec.run(async move {
        rt.sleep(STORED_WITHIN).await;
        let size = disk.size();
        let mut local = vec![true; size.div_ceil(cell) as usize];
        let mut at = 0;
        while at < size {
            // Of what lies behind the top nothing may be known, where it is away.
            for extent in disk.status(at, size - at, 64).await.ok()? {
                if extent.depth > 1 {
                    local[(at / cell) as usize..(at + extent.len).div_ceil(cell) as usize].fill(false);
                }
                at += extent.len;
            }
        }
        Some(local)
    })
}

/// Holds a session without faults of disks, and of the origin none that last, against what it did.
///
/// # Panics
/// When something came twice, was not kept, or was kept though nobody wanted that.
pub(super) fn judge(
    session: &Session,
    shape: &Shape,
    (before, after): (&Option<Vec<bool>>, &Option<Vec<bool>>),
    sent_again: u64,
) {
    let ops = || session.guests.iter().flatten().map(|&(_, op)| op);
    let (Some(before), Some(after)) = (before, after) else { panic!("nothing failed, and status did") };
    if !shape.is_backed() || ops().any(|op| matches!(op, Op::CopyOnRead(_))) {
        return;
    }
    if session.copy_on_read {
        for (first, count) in ops().filter_map(Op::brings) {
            let left = (first..first + count).find(|&at| !after[at as usize]);
            assert_eq!(left, None, "cells {first} and {count} in all were read, and one is not kept");
        }
        if shape.remote == Remote::Raw {
            assert_eq!(sent_again, 0, "bytes came twice");
        }
        return;
    }
    let cells = (shape.top.cluster_size / shape.cell).max(1);
    let mut may = before.clone();
    for (first, count) in ops().filter_map(Op::changes) {
        let end = (first + count).next_multiple_of(cells).min(may.len() as u64);
        may[(first / cells * cells) as usize..end as usize].fill(true);
    }
    let kept = (0..after.len()).find(|&at| after[at] && !may[at]);
    assert_eq!(kept, None, "this cell is kept, though nothing was to be");
}
