//! The table against its rules: one small unit of 8 bytes, one letter a byte (`.` not known).

use super::*;

const UNIT: u64 = 8;

fn table() -> InFlight<()> {
    InFlight::new(UNIT, Budgets::default())
}

/// Begins to fetch these units as one.
fn fetch(table: &mut InFlight<()>, units: Range<u64>, backing_end: u64) -> Fetch {
    let leave = table.admit(Budget::Fetch).expect("room");
    let mut fetch = table.begin_fetch(units.start, leave, backing_end);
    for _ in units.skip(1) {
        let leave = table.admit(Budget::Fetch).expect("room");
        table.extend_fetch(&mut fetch, leave, backing_end).expect("it is the next one");
    }
    fetch
}

/// A guest's first write into a part of a unit that is absent.
fn guest(
    table: &mut InFlight<()>,
    unit: u64,
    from: u64,
    data: &[u8],
    backing_end: u64,
) -> (Option<Fetch>, Option<Store<()>>) {
    let leave = table.admit(Budget::Guest).expect("room");
    table.begin_write(unit);
    table.begin_guest(unit, ((), leave), from, data, backing_end)
}

/// A guest's first write into a part of a unit that is being fetched.
fn attach(table: &mut InFlight<()>, unit: u64, from: u64, data: &[u8]) -> Option<Store<()>> {
    assert!(matches!(table.write(unit, from, data), Write::NeedsRoom));
    let leave = table.admit(Budget::Guest).expect("room");
    table.begin_prepare(unit, leave);
    table.attach(unit, (), from, data)
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
    let fetch = fetch(&mut table, 0..2, 16);
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
    let fetch = fetch(&mut table, 0..1, 8);
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
    let fetch = fetch(&mut table, 0..1, 8);
    let reader = wait(table.read(0, 0..8));
    assert!(attach(&mut table, 0, 2, b"WW").is_none());
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
    let mut table = InFlight::<()>::new(1 << 20, Budgets::default());
    let (fetch, store) = guest(&mut table, 0, 0, &[7; 4096], 1 << 20);
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
    let (fetch, store) = guest(&mut table, 1, 0, b"ab", 10);
    assert!(fetch.is_none(), "the backing ends inside what was written");
    assert_eq!(&store.expect("complete").bytes[..], b"ab\0\0\0\0\0\0");
}

#[test]
fn guest_bytes_outlive_a_failed_fetch_and_a_flush_starts_it_again() {
    let mut table = table();
    let (fetch, _) = guest(&mut table, 0, 0, b"ab", 8);
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
    let fetch = fetch(&mut table, 0..1, 8);
    let reader = wait(table.read(0, 0..8));
    table.fetch_ended(&fetch, Some(LayerError::Io("away".into())));
    assert_eq!(told(reader), "away");
    assert!(table.is_empty());
}

#[test]
fn a_full_disk_keeps_guest_bytes_for_the_next_flush() {
    let mut table = table();
    let (_, store) = guest(&mut table, 0, 0, b"abcdefgh", 8);
    let store = store.expect("complete");
    table.stored(0, Stored::Kept(LayerError::NoSpace("full".into()), store.room));
    assert_eq!(table.guest_ranges(), vec![0..8]);
    let work = table.begin_flush();
    assert_eq!(&work.stores[0].bytes[..], b"abcdefgh");
    assert_eq!(table.guest_ranges(), vec![0..8]);
}

/// A close that begins while a full disk is about to say so would give up bytes for which there is room by then.
#[test]
fn guest_bytes_that_are_being_stored_are_under_way() {
    let mut table = table();
    assert!(!table.is_guest_under_way());
    let (fetch, _) = guest(&mut table, 0, 0, b"abcd", 8);
    assert!(table.is_guest_under_way(), "the rest is being fetched");
    let store = table.fetched(fetch.expect("the rest").id, 4, b"efgh").remove(0);
    assert!(table.is_guest_under_way(), "it is being stored");
    table.stored(0, Stored::Kept(LayerError::NoSpace("full".into()), store.room));
    assert!(!table.is_guest_under_way(), "nobody works on it");
}

#[test]
fn while_room_is_taken_others_wait_and_a_complete_unit_is_not_stored_beside_it() {
    let mut table = table();
    let fetch = fetch(&mut table, 0..1, 8);
    assert!(matches!(table.write(0, 2, b"WW"), Write::NeedsRoom));
    let leave = table.admit(Budget::Guest).expect("room");
    table.begin_prepare(0, leave);
    let Write::Wait(mut other) = table.write(0, 0, b"WWWWWWWW") else { panic!("one owner takes room") };
    assert!(matches!(table.own(0..1), Own::Wait(_)));
    assert!(table.fetched(fetch.id, 0, b"abcdefgh").is_empty());
    table.fetch_ended(&fetch, None);
    assert!(matches!(table.read(0, 0..8), Read::Known(bytes) if &bytes[..] == b"abcdefgh"));
    assert!(other.try_recv().is_err());
    let store = table.attach(0, (), 2, b"WW").expect("all is known");
    assert_eq!(&store.bytes[..], b"abWWefgh");
    assert!(store.room.is_some());
    assert!(other.try_recv().is_ok());
}

#[test]
fn what_arrived_while_no_room_could_be_taken_is_a_fill() {
    let mut table = table();
    let first = fetch(&mut table, 0..1, 8);
    let second = fetch(&mut table, 1..2, 16);
    for unit in [0, 1] {
        let leave = table.admit(Budget::Guest).expect("room");
        table.begin_prepare(unit, leave);
    }
    assert!(table.fetched(first.id, 0, b"abcdefgh").is_empty());
    table.fetch_ended(&first, None);
    table.fetch_ended(&second, Some(LayerError::Io("away".into())));
    let store = table.end_prepare(0).expect("it is complete");
    assert!(store.room.is_none());
    assert!(table.end_prepare(1).is_none());
    assert!(!table.is_busy(1), "nothing is lost with it");
}

#[test]
fn all_units_are_owned_or_none() {
    let mut table = table();
    fetch(&mut table, 0..1, 64);
    table.begin_write(2);
    assert!(matches!(table.own(0..4), Own::Wait(_)));
    assert!(matches!(table.write(0, 0, b"x"), Write::NeedsRoom), "still a fetch");
    table.end_write(2);
    assert!(matches!(table.own(0..4), Own::All));
    (0..4).for_each(|unit| table.end_write(unit));
    assert!(table.is_empty());
    guest(&mut table, 3, 0, b"x", 64);
    assert!(matches!(table.own(0..4), Own::Guest));
    assert_eq!(table.count(), 1);
}

fn now<T>(future: std::pin::Pin<&mut (impl Future<Output = T> + ?Sized)>) -> Option<T> {
    match future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}

#[test]
fn memory_is_bounded_and_who_waits_comes_in_in_order() {
    let mut table = InFlight::<()>::new(UNIT, Budgets { fetch_bytes_max: 1, guest_bytes_max: 2 * UNIT });
    let only = table.admit(Budget::Fetch).expect("one is always let in");
    assert!(table.admit(Budget::Fetch).is_err());
    drop(only);
    for unit in 0..2 {
        assert!(guest(&mut table, unit, 0, b"x", 0).1.is_some());
    }
    let mut first = Box::pin(table.admit(Budget::Guest).expect_err("full").turn());
    assert!(now(first.as_mut()).is_none());
    let mut second = Box::pin(table.admit(Budget::Guest).expect_err("full").turn());
    assert!(now(second.as_mut()).is_none());
    table.stored(0, Stored::Linked);
    assert!(table.admit(Budget::Guest).is_err(), "who came first goes first");
    assert!(now(second.as_mut()).is_none());
    let leave = now(first.as_mut()).expect("its turn").expect("nothing failed");
    // It gives up: the next one has its turn.
    drop(leave);
    assert!(now(second.as_mut()).expect("its turn").is_ok());
}

#[test]
fn who_waits_for_memory_hears_that_the_origin_is_away() {
    let mut table = InFlight::<()>::new(UNIT, Budgets { fetch_bytes_max: UNIT, guest_bytes_max: UNIT });
    let (fetch, _) = guest(&mut table, 0, 0, b"x", 8);
    let mut waiter = Box::pin(table.admit(Budget::Guest).expect_err("full").turn());
    assert!(now(waiter.as_mut()).is_none());
    table.fetch_ended(&fetch.expect("the rest"), Some(LayerError::Io("away".into())));
    assert!(matches!(now(waiter.as_mut()), Some(Err(LayerError::Io(_)))));
}
