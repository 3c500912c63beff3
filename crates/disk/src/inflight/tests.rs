//! The table against its rules: one small unit of 8 bytes, one letter a byte (`.` not known).

use super::*;

const UNIT: u64 = 8;

fn table() -> InFlight<()> {
    InFlight::new(UNIT)
}

fn told(mut waiter: oneshot::Receiver<Delivery>) -> String {
    match waiter.try_recv() {
        Ok(Delivery::Bytes(bytes)) => String::from_utf8(bytes.to_vec()).expect("letters"),
        Ok(Delivery::Retry) => "retry".into(),
        Ok(Delivery::Failed(error)) => error.to_string(),
        Err(_) => "waits".into(),
    }
}

fn wait(read: Read) -> oneshot::Receiver<Delivery> {
    match read {
        Read::Wait(told, None) => told,
        _ => panic!("expected to wait"),
    }
}

#[test]
fn readers_of_one_unit_share_a_fetch_and_are_answered_as_their_bytes_come() {
    let mut table = table();
    let fetch = table.begin_fetch(0..2, 16);
    assert_eq!(fetch.wanted, vec![0..16]);
    let early = wait(table.read(0, 0..4));
    let late = wait(table.read(0, 2..8));
    assert!(table.fetched(fetch.id, 0, b"abcd").is_empty());
    assert_eq!(told(early), "abcd");
    let stores = table.fetched(fetch.id, 4, b"efghABCDEFGH");
    assert_eq!(told(late), "cdefgh");
    assert_eq!(
        stores.iter().map(|store| (store.unit, &store.bytes[..])).collect::<Vec<_>>(),
        [(0, &b"abcdefgh"[..]), (1, &b"ABCDEFGH"[..])]
    );
}

/// The first race of 2011: a guest writes a whole cluster while its fill is being fetched.
#[test]
fn a_whole_cluster_write_during_a_fill_wins() {
    let mut table = table();
    let fetch = table.begin_fetch(0..1, 8);
    let reader = wait(table.read(0, 0..8));
    assert!(matches!(table.write(0, 0, b"WWWWWWWW"), Write::TakenOver));
    assert!(table.fetched(fetch.id, 0, b"oldbytes").is_empty(), "late bytes find another owner");
    table.end_write(0);
    assert_eq!(told(reader), "retry");
    assert!(table.is_empty());
    assert!(table.fetched(fetch.id, 0, b"oldbytes").is_empty());
}

/// The second race of 2011: a guest writes one sector of the cluster that is being filled.
#[test]
fn a_write_to_another_sector_of_the_filling_cluster_is_kept() {
    let mut table = table();
    let fetch = table.begin_fetch(0..1, 8);
    let reader = wait(table.read(0, 0..8));
    assert!(matches!(table.write(0, 2, b"WW"), Write::NeedsRoom));
    assert!(table.attach(0, ()).is_ok());
    assert!(matches!(table.write(0, 2, b"WW"), Write::Absorbed(None)));
    assert!(matches!(table.read(0, 2..4), Read::Known(bytes) if &bytes[..] == b"WW"));
    let stores = table.fetched(fetch.id, 0, b"abcdefgh");
    assert_eq!(told(reader), "abWWefgh");
    assert_eq!(&stores[0].bytes[..], b"abWWefgh");
    assert!(stores[0].room.is_some());
    assert!(matches!(table.write(0, 0, b"x"), Write::Wait(_)), "local I/O is waited for");
    table.stored(0, Stored::Linked);
    assert!(table.is_empty());
}

#[test]
fn a_cow_fetches_only_the_rest_and_a_full_cover_needs_no_fetch() {
    let mut table = InFlight::<()>::new(1 << 20);
    let (fetch, store) = table.begin_guest(0, (), 0, &[7; 4096], 1 << 20);
    assert_eq!(fetch.expect("the rest is wanted").wanted, vec![4096..1 << 20]);
    assert!(store.is_none());
    let Write::Absorbed(Some(store)) = table.write(0, 4096, &vec![8; (1 << 20) - 4096]) else {
        panic!("all is known now")
    };
    assert_eq!(store.bytes.len(), 1 << 20);
}

#[test]
fn past_the_backings_end_is_zeros_without_a_fetch() {
    let mut table = table();
    let (fetch, store) = table.begin_guest(1, (), 0, b"ab", 10);
    assert!(fetch.is_none(), "the backing ends inside what was written");
    assert_eq!(&store.expect("complete").bytes[..], b"ab\0\0\0\0\0\0");
}

#[test]
fn guest_bytes_outlive_a_failed_fetch_and_a_flush_starts_it_again() {
    let mut table = table();
    let (fetch, _) = table.begin_guest(0, (), 0, b"ab", 8);
    let fetch = fetch.expect("the rest is wanted");
    let mut first = table.begin_flush();
    assert!(first.fetches.is_empty(), "it is under way");
    assert!(table.fetched(fetch.id, 2, b"cd").is_empty());
    table.fetch_ended(&fetch, Some(LayerError::Io("away".into())));
    assert!(matches!(first.waits[0].try_recv(), Ok(Err(LayerError::Io(_)))));
    assert!(matches!(table.read(0, 0..4), Read::Known(bytes) if &bytes[..] == b"abcd"));
    let mut second = table.begin_flush();
    assert_eq!(second.fetches[0].wanted, vec![4..8], "what arrived is not asked again");
    let stores = table.fetched(second.fetches[0].id, 4, b"efgh");
    assert_eq!(&stores[0].bytes[..], b"abcdefgh");
    table.stored(0, Stored::Linked);
    assert!(matches!(second.waits[0].try_recv(), Ok(Ok(()))));
}

#[test]
fn a_failed_fetch_without_guest_bytes_leaves_nothing() {
    let mut table = table();
    let fetch = table.begin_fetch(0..1, 8);
    let reader = wait(table.read(0, 0..8));
    table.fetch_ended(&fetch, Some(LayerError::Io("away".into())));
    assert_eq!(told(reader), "away");
    assert!(table.is_empty());
}

#[test]
fn a_full_disk_keeps_guest_bytes_for_the_next_flush() {
    let mut table = table();
    let (_, store) = table.begin_guest(0, (), 0, b"abcdefgh", 8);
    let store = store.expect("complete");
    table.stored(0, Stored::Kept(LayerError::NoSpace("full".into()), store.room));
    assert_eq!(table.guest_ranges(), vec![0..8]);
    let work = table.begin_flush();
    assert_eq!(&work.stores[0].bytes[..], b"abcdefgh");
    assert_eq!(table.guest_ranges(), vec![0..8]);
}

#[test]
fn memory_is_bounded_and_waiters_hear_of_room() {
    let mut table = InFlight::<()>::new(GUEST_BYTES_MAX);
    assert!(table.admit(Budget::Guest).is_ok(), "one is always let in");
    let (_, store) = table.begin_guest(0, (), 0, b"x", 0);
    assert!(store.is_some());
    let mut waiter = table.admit(Budget::Guest).expect_err("full");
    assert!(waiter.try_recv().is_err());
    table.stored(0, Stored::Linked);
    assert!(matches!(waiter.try_recv(), Ok(Ok(()))));
}
