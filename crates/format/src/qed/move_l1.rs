//! The L1 table of an image that another program made, moved to where ours is: right behind the header.
//!
//! - The table can fill no hole while it stays where it is, and nothing else may fit into what lies before it.
//! - Copy, sync, switch, sync: the header's first sector says at any moment where one whole table lies. What lies in the new
//!   place is moved away before, in the same way.
//! - Zeros become holes: such a table may be 1 GiB of nothing.
//!
//! Not here: the other moves, and when this one is worth it (`repair`).

use std::sync::Arc;

use bytes::Bytes;
use readonce_storage::Storage;
use zerocopy::IntoBytes;

use super::{
    header::Header,
    repair::{COPY_BYTES, move_units_away},
};
use crate::{FormatError, number::index};

/// Moves the table, if it lies elsewhere; says whether it did. Nothing else may use the file, and nothing in it may be wrong. The file
/// grows meanwhile by the table's length, twice at most.
pub(super) async fn move_l1(file: &Arc<dyn Storage>, header: &mut Header) -> Result<bool, FormatError> {
    let to = header.layout.header_bytes;
    let from = header.layout.l1_offset;
    if from == to {
        return Ok(false);
    }
    let len = header.layout.table_bytes();
    if from < to + len {
        // It lies in its own way.
        let aside = header.layout.whole_clusters_end(file.len());
        switch(file, header, aside).await?;
    }
    move_units_away(file, &header.layout, to..to + len).await?;
    switch(file, header, to).await?;
    Ok(true)
}

async fn switch(file: &Arc<dyn Storage>, header: &mut Header, to: u64) -> Result<(), FormatError> {
    let layout = header.layout;
    copy(file, layout.l1_offset, to, layout.table_bytes()).await?;
    file.sync().await?;
    let mut sector = header.sector;
    sector.fields.l1_table_offset = to.into();
    file.write(0, Bytes::copy_from_slice(sector.as_bytes())).await?;
    file.sync().await?;
    *header = Header::read(file.as_ref()).await?;
    Ok(())
}

async fn copy(file: &Arc<dyn Storage>, from: u64, to: u64, len: u64) -> Result<(), FormatError> {
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(COPY_BYTES);
        let copied = file.read(from + done, index(piece)).await?;
        if copied.iter().any(|&byte| byte != 0) {
            file.write(to + done, copied).await?;
        } else {
            let end = to + done + piece;
            if file.len() < end {
                file.set_len(end).await?;
            }
            file.punch_hole(to + done, piece).await?;
        }
        done += piece;
    }
    Ok(())
}
