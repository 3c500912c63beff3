//! Local files: on the file system of the temporary directory and on tmpfs, by io_uring and without it.

#![allow(clippy::disallowed_methods, reason = "tests may use the machine's own clock and tasks")]

use std::{io, path::Path, sync::Arc};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use readonce_storage::{LocalFile, OpenMode, ReadAt, SimFile, Storage, flat::is_no_space};

type Open = fn(&Path, OpenMode) -> io::Result<LocalFile>;

const OPENS: [Open; 2] =
    [|path, mode| LocalFile::open(path, mode), |path, mode| LocalFile::open_without_ring(path, mode)];

fn directories() -> [tempfile::TempDir; 2] {
    [
        tempfile::tempdir().expect("a temporary directory"),
        tempfile::tempdir_in("/dev/shm").expect("Linux has a tmpfs at /dev/shm"),
    ]
}

/// Runs `test` on a new file of each kind.
fn on_each(test: impl AsyncFn(&LocalFile)) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    for directory in directories() {
        for (index, open) in OPENS.iter().enumerate() {
            let path = directory.path().join(format!("image{index}"));
            let file = open(&path, OpenMode::CreateNew).expect("it does not exist yet");
            runtime.block_on(test(&file));
            let on_disk = std::fs::metadata(&path).expect("it exists").len();
            assert_eq!(file.len(), on_disk, "{}", path.display());
        }
    }
}

async fn contents(file: &LocalFile) -> Bytes {
    file.read(0, usize::try_from(file.len()).expect("a small file")).await.expect("inside")
}

#[test]
fn what_is_written_is_read() {
    on_each(async |file| {
        assert!(file.is_empty());
        file.write(3, Bytes::from_static(b"abc")).await.expect("written");
        assert_eq!(contents(file).await, &b"\0\0\0abc"[..]);
        file.write_now(4, b"XYZ").expect("the budget is not used up").expect("written");
        assert_eq!(file.read(2, 5).await.expect("inside"), &b"\0aXYZ"[..]);
        file.sync().await.expect("synced");
        assert_eq!(file.read(7, 0).await.expect("nothing is inside"), &b""[..]);
    });
}

#[test]
fn large_reads_and_writes_are_whole() {
    on_each(async |file| {
        let mut data = vec![0; 5 << 20];
        SmallRng::seed_from_u64(1).fill(&mut data[..]);
        let data = Bytes::from(data);
        assert!(file.write_now(0, &data).is_none(), "too long for one poll");
        assert!(file.read_now(0, &mut vec![0; 5 << 20]).is_none());
        file.write(777, data.clone()).await.expect("written");
        assert!(file.read(777, data.len()).await.expect("inside") == data);
    });
}

#[test]
fn past_the_end_is_an_error() {
    on_each(async |file| {
        file.write(0, Bytes::from_static(b"abc")).await.expect("written");
        for (offset, len) in [(0, 4), (3, 1), (u64::MAX, 1), (1 << 62, 1), (0, usize::MAX)] {
            let error = file.read(offset, len).await.expect_err("past the end");
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
        if let Some(result) = file.read_now(2, &mut [0; 2]) {
            assert_eq!(result.expect_err("past the end").kind(), io::ErrorKind::UnexpectedEof);
        }
    });
}

#[test]
fn too_far_is_no_space() {
    on_each(async |file| {
        for offset in [u64::MAX, i64::MAX as u64, i64::MAX as u64 - 1] {
            let error = file.write(offset, Bytes::from_static(b"ab")).await.expect_err("too far");
            assert!(is_no_space(&error), "{error}");
            let error = file.write_now(offset, b"ab").expect("the budget is free").expect_err("too far");
            assert!(is_no_space(&error), "{error}");
            assert!(is_no_space(&file.allocate(offset, 2).await.expect_err("too far")));
        }
        assert_eq!(file.len(), 0);
    });
}

#[test]
fn the_file_cut_by_another_process_is_an_error() {
    on_each(async |file| {
        file.write(0, Bytes::from(vec![7; 8192])).await.expect("written");
        let other = std::fs::OpenOptions::new().write(true).open(file.path()).expect("it exists");
        other.set_len(100).expect("cut");
        assert!(file.read_now(0, &mut [0; 4096]).is_none(), "only a part is there");
        let error = file.read(0, 4096).await.expect_err("only a part is there");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        other.set_len(8192).expect("grown again");
    });
}

#[test]
fn random_operations_match_the_simulated_disk() {
    const LEN_MAX: u64 = 600_000;
    on_each(async |file| {
        let model = SimFile::new();
        let mut rng = SmallRng::seed_from_u64(7);
        for step in 0..300 {
            let offset = rng.random_range(0..LEN_MAX);
            let len = if step % 9 == 0 { 0 } else { rng.random_range(0..=(LEN_MAX - offset).min(70_000)) };
            let both: [&dyn Storage; 2] = [file, &model];
            let kind = rng.random_range(0..7);
            let data = Bytes::from(vec![rng.random::<u8>(); len as usize]);
            for storage in both {
                match kind {
                    0 | 1 => storage.write(offset, data.clone()).await,
                    2 => storage.write_now(offset, &data).expect("the budget is not used up"),
                    3 => storage.write_zeroes(offset, len).await,
                    4 => storage.punch_hole(offset, len).await,
                    5 => storage.set_len(offset).await,
                    _ => storage.allocate(offset, len).await,
                }
                .unwrap_or_else(|error| panic!("step {step}, kind {kind}: {error}"));
            }
            assert_eq!(file.len(), model.len(), "step {step}, kind {kind}, {offset} {len}");
            assert!(contents(file).await == model.contents(), "step {step}, kind {kind}, {offset} {len}");
        }
        file.sync().await.expect("synced");
    });
}

#[test]
fn allocated_and_punched_space_can_be_seen() {
    use std::os::unix::fs::MetadataExt;
    on_each(async |file| {
        let blocks = || std::fs::metadata(file.path()).expect("it exists").blocks() * 512;
        file.allocate(0, 1 << 20).await.expect("there is room");
        assert_eq!(file.len(), 1 << 20);
        assert!(blocks() >= 1 << 20);
        file.punch_hole(0, 1 << 20).await.expect("punched");
        assert_eq!(file.len(), 1 << 20);
        assert!(blocks() < 1 << 20);
        file.write_zeroes(0, 1 << 20).await.expect("zeroed");
        assert!(blocks() >= 1 << 20, "zeroes keep their space");
    });
}

#[test]
fn many_at_once_do_not_mix() {
    on_each(async |file| {
        const COUNT: u64 = 300;
        // Longer than one poll writes, so that every write takes the waiting path.
        const LEN: usize = (1 << 20) + 512;
        let write = async |index: u64| {
            file.write(index * 4096, Bytes::from(vec![index as u8; 4096])).await.expect("written");
            file.read(index * 4096, 4096).await.expect("inside")
        };
        let all = futures_join((0..COUNT).map(write)).await;
        for (index, bytes) in all.iter().enumerate() {
            assert!(bytes.iter().all(|byte| *byte == index as u8));
        }
        let large = async |index: u64| {
            file.write(index * LEN as u64, Bytes::from(vec![index as u8 + 1; LEN])).await.expect("written");
        };
        futures_join((0..8).map(large)).await;
        for index in 0..8 {
            let bytes = file.read(index * LEN as u64, LEN).await.expect("inside");
            assert!(bytes.iter().all(|byte| *byte == index as u8 + 1));
        }
    });
}

/// Polls all of them in turn until each has ended.
async fn futures_join<T>(futures: impl IntoIterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut running: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|cx| {
        for (future, result) in running.iter_mut().filter(|(_, result)| result.is_none()) {
            if let std::task::Poll::Ready(value) = future.as_mut().poll(cx) {
                *result = Some(value);
            }
        }
        if running.iter().all(|(_, result)| result.is_some()) {
            return std::task::Poll::Ready(());
        }
        std::task::Poll::Pending
    })
    .await;
    running.into_iter().map(|(_, result)| result.expect("all have ended")).collect()
}

#[test]
fn runtimes_that_come_and_go_share_the_ring() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = LocalFile::open(directory.path().join("image"), OpenMode::CreateNew).expect("new");
    let file = Arc::new(file);
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let file = Arc::clone(&file);
            scope.spawn(move || {
                for round in 0..20_u64 {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
                    runtime.block_on(async {
                        let at = thread * (4 << 20);
                        let len = (1 << 20) + 1;
                        let byte = (thread * 20 + round) as u8;
                        file.write(at, Bytes::from(vec![byte; len])).await.expect("written");
                        if round % 8 == 0 {
                            file.sync().await.expect("synced");
                        }
                        assert!(file.read(at, len).await.expect("inside").iter().all(|is| *is == byte));
                        // Begun, and left behind with the runtime.
                        let mut read = file.read(at, len);
                        std::future::poll_fn(|cx| {
                            let _ = read.as_mut().poll(cx);
                            std::task::Poll::Ready(())
                        })
                        .await;
                    });
                }
            });
        }
    });
}

#[test]
fn opening_says_what_is_wrong_and_where() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("absent");
    for mode in [OpenMode::Read, OpenMode::ReadWrite] {
        let error = LocalFile::open(&path, mode).expect_err("absent");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(
            error.to_string(),
            format!("Could not open '{}': No such file or directory", path.display())
        );
    }
    let error = LocalFile::open(directory.path(), OpenMode::Read).expect_err("a directory");
    assert_eq!(
        error.to_string(),
        format!("Could not open '{}': it is neither a file nor a block device", directory.path().display())
    );
    LocalFile::open(&path, OpenMode::CreateNew).expect("absent");
    let error = LocalFile::open(&path, OpenMode::CreateNew).expect_err("there");
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    LocalFile::open(&path, OpenMode::Create).expect("there");
    // A pipe without a writer: the open must not wait for one.
    let pipe = directory.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("a pipe");
    assert_eq!(
        LocalFile::open(&pipe, OpenMode::Read).expect_err("a pipe").kind(),
        io::ErrorKind::InvalidInput
    );
}

#[tokio::test]
async fn create_keeps_what_is_there() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("image");
    std::fs::write(&path, b"abc").expect("written");
    let file = LocalFile::open(&path, OpenMode::Create).expect("there");
    assert_eq!(contents(&file).await, &b"abc"[..]);
}

#[tokio::test]
async fn a_file_open_for_reading_refuses_changes_and_sees_growth() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("image");
    std::fs::write(&path, b"abc").expect("written");
    let file = LocalFile::open(&path, OpenMode::Read).expect("there");
    assert!(file.is_read_only());
    for result in [
        file.write(0, Bytes::from_static(b"x")).await,
        file.write_now(0, b"x").expect("refused at once"),
        file.set_len(0).await,
        file.allocate(0, 9).await,
        file.write_zeroes(0, 1).await,
        file.punch_hole(0, 1).await,
    ] {
        let error = result.expect_err("read-only");
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("opened for reading only"));
    }
    std::fs::write(&path, b"abcdef").expect("written");
    assert_eq!(file.read(2, 4).await.expect("it grew"), &b"cdef"[..]);
    assert_eq!(file.len(), 6);
}

#[tokio::test]
async fn identity_follows_the_file() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("image");
    let file = LocalFile::open(&path, OpenMode::CreateNew).expect("new");
    let before = file.identity().expect("known");
    assert_eq!(before, LocalFile::open(&path, OpenMode::Read).expect("there").identity().expect("known"));
    file.write(0, Bytes::from_static(b"abc")).await.expect("written");
    let after = file.identity().expect("known");
    assert_eq!((after.device, after.inode, after.len), (before.device, before.inode, 3));
    assert!(!file.is_block_device());
    let other = LocalFile::open(directory.path().join("other"), OpenMode::CreateNew).expect("new");
    assert_ne!(other.identity().expect("known").inode, before.inode);
    std::fs::File::options()
        .write(true)
        .open(&path)
        .and_then(|file| {
            file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(1_300_000_000, 123_456_789))
        })
        .expect("set");
    let touched = file.identity().expect("known");
    assert_eq!((touched.mtime_s, touched.mtime_ns), (1_300_000_000, 123_456_789));
}
