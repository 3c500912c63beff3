//! What a simulated power loss may leave, and what it may not.

#![allow(clippy::disallowed_methods, reason = "tests may use the machine's own clock and tasks")]

use std::{
    collections::BTreeSet,
    future::Future,
    io,
    pin::pin,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use readonce_storage::{
    ReadAt, SimFile, Storage,
    sim::{Fault, Lasts, NowCalls},
};

const SECTOR: usize = 512;
const SEEDS: u64 = 400;

/// Runs a future that never waits for anything but its own wake-ups.
fn now<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut cx) {
            return value;
        }
    }
}

fn write(file: &SimFile, offset: u64, data: impl Into<Vec<u8>>) {
    now(file.write(offset, Bytes::from(data.into()))).expect("no fault is armed");
}

fn sync(file: &SimFile) {
    now(file.sync()).expect("no fault is armed");
}

fn crashes(file: &SimFile) -> BTreeSet<Vec<u8>> {
    (0..SEEDS).map(|seed| file.crash(seed).contents()).collect()
}

/// A letter for each sector: what its bytes are, or `?` if they differ among themselves.
fn draw(bytes: &[u8]) -> String {
    bytes
        .chunks(SECTOR)
        .map(|sector| match sector[0] {
            first if sector.iter().any(|byte| *byte != first) => '?',
            0 => '.',
            first => char::from(first),
        })
        .collect()
}

fn sectors(letters: &str) -> Vec<u8> {
    letters.bytes().flat_map(|letter| [if letter == b'.' { 0 } else { letter }; SECTOR]).collect()
}

fn drawn_crashes(file: &SimFile) -> BTreeSet<String> {
    crashes(file).iter().map(|bytes| draw(bytes)).collect()
}

fn set(drawings: &[&str]) -> BTreeSet<String> {
    drawings.iter().map(|drawing| (*drawing).to_owned()).collect()
}

#[test]
fn reads_see_writes_at_once_and_zeros_elsewhere() {
    let file = SimFile::from_bytes(b"abc");
    write(&file, 5, *b"xy");
    assert_eq!(file.contents(), b"abc\0\0xy");
    assert_eq!(now(file.read(2, 4)).expect("inside"), &b"c\0\0x"[..]);
    let mut buf = [0; 2];
    file.read_now(5, &mut buf).expect("answers").expect("inside");
    assert_eq!(&buf, b"xy");
    assert_eq!(now(file.read(6, 2)).expect_err("past the end").kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(now(file.read(u64::MAX, 2)).expect_err("past the end").kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(now(file.read(0, usize::MAX)).expect_err("past the end").kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn synced_writes_survive_every_crash() {
    let file = SimFile::new();
    write(&file, 0, sectors("abcd"));
    sync(&file);
    assert_eq!(drawn_crashes(&file), set(&["abcd"]));
    assert_eq!(file.unsynced_count(), 0);
}

#[test]
fn a_sector_is_old_or_new_by_itself() {
    let file = SimFile::from_bytes(&sectors("abc"));
    write(&file, 0, sectors("ABC"));
    assert_eq!(drawn_crashes(&file), set(&["abc", "Abc", "aBc", "abC", "ABc", "AbC", "aBC", "ABC"]));
}

#[test]
fn writes_are_kept_in_any_order_of_sectors() {
    let file = SimFile::from_bytes(&sectors("ab"));
    write(&file, 0, sectors("A"));
    write(&file, SECTOR as u64, sectors("B"));
    assert_eq!(drawn_crashes(&file), set(&["ab", "Ab", "aB", "AB"]));
}

#[test]
fn a_sector_written_twice_is_any_of_its_states() {
    let file = SimFile::from_bytes(&sectors("a"));
    write(&file, 0, sectors("b"));
    write(&file, 0, sectors("c"));
    assert_eq!(drawn_crashes(&file), set(&["a", "b", "c"]));
}

#[test]
fn two_short_writes_to_one_sector_are_never_kept_in_the_wrong_order() {
    let file = SimFile::from_bytes(&[b'.'; 4]);
    write(&file, 0, *b"1");
    write(&file, 2, *b"2");
    let seen = crashes(&file);
    // The disk gets whole sectors: with the second write goes the first.
    assert_eq!(seen, BTreeSet::from([b"....".to_vec(), b"1...".to_vec(), b"1.2.".to_vec()]));
}

#[test]
fn crash_with_keeps_what_it_is_told() {
    let file = SimFile::from_bytes(&sectors("abc"));
    write(&file, 0, sectors("A"));
    now(file.write_zeroes(512, 512)).expect("no fault");
    write(&file, 1024, sectors("C"));
    assert_eq!(file.unsynced_count(), 3);
    assert_eq!(draw(&file.crash_with(|_| false).contents()), "abc");
    assert_eq!(draw(&file.crash_with(|op| op == 1).contents()), "a.c");
    assert_eq!(draw(&file.crash_with(|op| op != 1).contents()), "AbC");
}

#[test]
fn holes_zeroes_and_cuts_are_lost_too() {
    let file = SimFile::from_bytes(&sectors("abcd"));
    now(file.punch_hole(512, 1024)).expect("no fault");
    assert_eq!(draw(&file.contents()), "a..d");
    assert_eq!(drawn_crashes(&file), set(&["abcd", "a.cd", "ab.d", "a..d"]));

    let file = SimFile::from_bytes(&sectors("abcd"));
    now(file.set_len(1024)).expect("no fault");
    assert_eq!(draw(&file.contents()), "ab");
    let seen = drawn_crashes(&file);
    assert!(seen.contains("ab"));
    assert!(seen.contains("abcd"));
    assert!(seen.iter().all(|drawing| drawing.starts_with("ab")));
}

#[test]
fn a_file_cut_and_grown_reads_zeros_between() {
    let file = SimFile::from_bytes(&sectors("abcd"));
    now(file.set_len(700)).expect("no fault");
    now(file.set_len(2048)).expect("no fault");
    let mut expected = sectors("abcd");
    expected[700..].fill(0);
    assert_eq!(file.contents(), expected);
    sync(&file);
    assert_eq!(file.crash(1).contents(), expected);
}

#[test]
fn edges_of_an_unaligned_zeroing_are_kept() {
    let file = SimFile::from_bytes(&[7; 5000]);
    now(file.write_zeroes(100, 4500)).expect("no fault");
    let mut expected = [7; 5000];
    expected[100..4600].fill(0);
    assert_eq!(file.contents(), expected);
    assert_eq!(file.crash_with(|_| true).contents(), expected);
    for bytes in crashes(&file) {
        assert_eq!(bytes[..100], [7; 100]);
        assert_eq!(bytes[4600..], [7; 400]);
    }
    let file = SimFile::from_bytes(&[7; 5000]);
    now(file.punch_hole(4990, 1 << 40)).expect("no fault");
    assert_eq!(file.len(), 5000);
    assert_eq!(file.crash_with(|_| true).contents()[4980..], [[7; 10], [0; 10]].concat());
}

#[test]
fn an_append_may_leave_a_length_without_bytes_but_never_bytes_of_nobody() {
    let file = SimFile::from_bytes(&sectors("a"));
    write(&file, 512, sectors("bc"));
    let seen = drawn_crashes(&file);
    assert!(seen.contains("a"));
    assert!(seen.contains("a.."));
    assert!(seen.contains("ab"));
    assert!(seen.contains("a.c"));
    assert!(seen.contains("abc"));
    assert!(
        seen.iter()
            .all(|drawing| drawing.bytes().zip("abc".bytes()).all(|(is, may)| is == may || is == b'.'))
    );
}

#[test]
fn allocate_grows_and_changes_no_byte() {
    let file = SimFile::from_bytes(&sectors("ab"));
    now(file.allocate(512, 1024)).expect("no fault");
    assert_eq!(draw(&file.contents()), "ab.");
    now(file.allocate(0, 512)).expect("no fault");
    assert_eq!(file.len(), 1536);
}

#[test]
fn a_write_during_a_sync_is_not_covered_by_it() {
    // With every seed the write comes after the sync's start and before its end, or after both.
    let mut uncovered = 0;
    for seed in 0..50 {
        let file = SimFile::from_bytes(&sectors("ab"));
        write(&file, 0, sectors("A"));
        file.set_yields(seed, 4);
        let mut cx = Context::from_waker(Waker::noop());
        let mut sync = file.sync();
        for _ in 0..5 {
            assert!(sync.as_mut().poll(&mut cx).is_pending() || file.sync_count() == 1);
            if file.sync_count() == 1 {
                break;
            }
        }
        let before = file.unsynced_count();
        file.write_now(512, &sectors("B")).expect("answers").expect("no fault");
        if before == 1 {
            now(sync).expect("no fault");
            assert_eq!(file.unsynced_count(), 1);
            assert_eq!(draw(&file.crash_with(|_| false).contents()), "Ab");
            uncovered += 1;
        }
    }
    assert!(uncovered > 0, "no seed wrote while the sync was under way");
}

#[test]
fn a_failed_sync_loses_its_writes_for_good() {
    let file = SimFile::from_bytes(&sectors("ab"));
    write(&file, 0, sectors("A"));
    file.fail_nth(1, Fault::SyncFails, Lasts::Once);
    assert_eq!(now(file.sync()).expect_err("armed").raw_os_error(), Some(5));
    // Until the next sync the disk may have got it.
    assert_eq!(drawn_crashes(&file), set(&["ab", "Ab"]));
    write(&file, 512, sectors("B"));
    sync(&file);
    assert_eq!(draw(&file.contents()), "AB");
    assert_eq!(drawn_crashes(&file), set(&["aB"]));
}

#[test]
fn the_nth_operation_fails_and_nothing_else() {
    let run = |file: &SimFile| -> io::Result<()> {
        now(file.write(0, Bytes::from_static(b"x")))?;
        now(file.read(0, 1))?;
        now(file.sync())
    };
    let mut failed = Vec::new();
    for n in 1.. {
        let file = SimFile::new();
        file.fail_nth(n, Fault::Eio, Lasts::Once);
        let result = run(&file);
        if file.fault_hits() == 0 {
            result.expect("nothing failed");
            break;
        }
        assert_eq!(result.expect_err("a fault hit").raw_os_error(), Some(5));
        failed.push(file.op_count());
        run(&file).expect("the fault was for once");
    }
    assert_eq!(failed, [1, 2, 3]);
}

#[test]
fn no_space_hits_only_what_takes_space_and_until_healed() {
    let file = SimFile::from_bytes(&sectors("a"));
    file.fail_nth(1, Fault::NoSpace, Lasts::ForGood);
    now(file.read(0, 512)).expect("reads take no space");
    now(file.punch_hole(0, 512)).expect("holes take no space");
    now(file.sync()).expect("syncs take no space");
    for result in [
        now(file.write(0, Bytes::from_static(b"x"))),
        file.write_now(0, b"x").expect("answers"),
        now(file.allocate(0, 1)),
        now(file.write_zeroes(0, 1)),
        now(file.set_len(1)),
    ] {
        assert!(readonce_storage::flat::is_no_space(&result.expect_err("the disk is full")));
    }
    assert_eq!(draw(&file.contents()), ".");
    file.heal();
    write(&file, 0, *b"x");
    assert_eq!(file.fault_hits(), 5);
}

#[test]
fn a_read_may_meet_the_end_too_early() {
    let file = SimFile::from_bytes(&sectors("abcd"));
    file.fail_nth(2, Fault::Short, Lasts::Once);
    now(file.read(0, SECTOR)).expect("the first read is well");
    write(&file, 0, sectors("x"));
    let error = now(file.read(0, SECTOR)).expect_err("the second read is short");
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!((file.fault_hits_of(Fault::Short), file.read_fault_hits()), (1, 1));
    assert_eq!(now(file.read(0, SECTOR)).expect("it was one read"), sectors("x"));
}

#[test]
fn a_write_whose_caller_goes_away_is_done_later() {
    for seed in 0..20 {
        let file = SimFile::from_bytes(&sectors("abcd"));
        file.set_yields(seed, 8);
        let data = Bytes::from(sectors("x"));
        let mut left = file.write(0, data);
        if left.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
            || file.contents()[..SECTOR] == sectors("x")
        {
            continue;
        }
        drop(left);
        assert_eq!(file.contents(), sectors("abcd"), "nobody waited, and nothing was done since");
        sync(&file);
        assert_eq!(file.contents(), sectors("xbcd"));
    }
}

#[test]
fn tebibytes_apart_takes_pages_only() {
    const TIB: u64 = 1 << 40;
    let file = SimFile::new();
    write(&file, 60 * TIB, sectors("a"));
    write(&file, 5 * TIB + 17, sectors("b"));
    assert_eq!(file.len(), 60 * TIB + 512);
    assert!(file.resident_bytes() <= 3 * 4096);
    now(file.write_zeroes(TIB, 50 * TIB)).expect("no fault");
    assert!(file.resident_bytes() <= 4096);
    for seed in 0..50 {
        let crashed = file.crash(seed);
        assert!(crashed.resident_bytes() <= 3 * 4096);
    }
    sync(&file);
    let crashed = file.crash(0);
    assert_eq!(now(crashed.read(60 * TIB, 512)).expect("inside"), sectors("a"));
    assert_eq!(now(crashed.read(5 * TIB + 17, 512)).expect("inside"), sectors("."));
    let error = now(file.write(i64::MAX as u64, Bytes::from_static(b"xy"))).expect_err("too large");
    assert!(readonce_storage::flat::is_no_space(&error));
}

#[test]
fn now_calls_can_be_refused() {
    let file = SimFile::from_bytes(b"abc");
    file.set_now_calls(NowCalls::Refuse);
    let before = file.op_count();
    assert!(file.read_now(0, &mut [0]).is_none());
    assert!(file.write_now(0, b"x").is_none());
    assert_eq!(file.op_count(), before);
    assert_eq!(file.contents(), b"abc");
    file.set_now_calls(NowCalls::Random(3));
    let answers: BTreeSet<bool> = (0..64).map(|_| file.read_now(0, &mut [0]).is_some()).collect();
    assert_eq!(answers.len(), 2);
}

#[test]
fn the_same_seed_gives_the_same_crash() {
    let file = SimFile::new();
    for index in 0..40_u8 {
        write(&file, u64::from(index) * 300, vec![index + 1; 1000]);
    }
    for seed in 0..20 {
        assert_eq!(file.crash(seed).contents(), file.crash(seed).contents());
    }
    assert!(crashes(&file).len() > 100);
}

#[test]
fn a_crashed_file_starts_anew() {
    let file = SimFile::from_bytes(&sectors("a"));
    file.fail_nth(1, Fault::Eio, Lasts::ForGood);
    let crashed = file.crash(0);
    assert_eq!((crashed.op_count(), crashed.sync_count(), crashed.unsynced_count()), (0, 0, 0));
    write(&crashed, 0, sectors("b"));
    assert_eq!(draw(&file.contents()), "a");
}
