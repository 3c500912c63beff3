//! A full disk: reads do not feel it, a guest's write that needs room is told, and all goes on when there is room.

use std::{ffi::CString, fs::File, io::Write, os::unix::ffi::OsStrExt, path::Path};

use readonce_testkit::guest::Part;

use crate::{
    common::{KEEPERS, folder},
    disk::without_root,
    server::{LoadSpec, Server, WORKERS, image_over, is_clean, load, origin_and_guest},
};

const BYTES: u64 = 8 << 20;
const TMPFS_BYTES: u64 = 16 << 20;

/// A tmpfs over a folder. Dropped, it is unmounted.
struct Tmpfs(CString);

impl Tmpfs {
    fn mount(folder: &Path, bytes: u64) -> Option<Self> {
        let target = CString::new(folder.as_os_str().as_bytes()).expect("no zero byte");
        let options = CString::new(format!("size={bytes}")).expect("no zero byte");
        // SAFETY: all are valid strings that outlive the call.
        let mounted = unsafe {
            libc::mount(
                c"readonce-faults".as_ptr(),
                target.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                options.as_ptr().cast(),
            )
        };
        if mounted == 0 {
            return Some(Self(target));
        }
        without_root(&format!("mounting a tmpfs: {}", std::io::Error::last_os_error()));
        None
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // SAFETY: a valid string.
        unsafe { libc::umount2(self.0.as_ptr(), libc::MNT_DETACH) };
    }
}

/// Fills the file system with a file until `left` bytes are free.
fn fill(path: &Path, left: u64) {
    let mut file = File::create(path).expect("room for a name");
    while file.write_all(&[1; 4096]).is_ok() {}
    let len = file.metadata().expect("open").len();
    file.set_len(len - left).expect("shorter");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_that_need_room_and_nothing_else() {
    for keeper in KEEPERS {
        a_full_disk(keeper).await;
    }
}

async fn a_full_disk(keeper: (&str, &str)) {
    let folder = folder();
    let at = folder.path();
    let Some(_tmpfs) = Tmpfs::mount(at, TMPFS_BYTES) else { return };
    let (origin, guest) = origin_and_guest(BYTES, 9).await;
    image_over(&origin.url(), at, keeper);
    let server = Server::start(at, &[]);
    fill(&at.join("filler"), 1 << 20);

    let spec = LoadSpec { seed: 1, requests_max: 200, writes_percent: 50 };
    let full = load(&guest, &server, spec).await;
    assert_eq!((full.reads_failed, full.writes_failed, full.flushes_failed), (0, 0, 0), "{full:?}");
    assert!(full.reads > 0 && full.flushes > 0 && full.writes > 0, "{full:?}");
    assert!(full.writes_no_space > 0, "{full:?}");
    guest.compare_all(&server.client().await).await.expect("reads need no room");

    std::fs::remove_file(at.join("filler")).expect("there");
    let roomy = load(&guest, &server, LoadSpec { seed: 2, ..spec }).await;
    assert_eq!(roomy.reads_failed + roomy.writes_failed + roomy.flushes_failed, 0, "{roomy:?}");
    assert_eq!(roomy.writes_no_space, 0, "{roomy:?}");
    let client = server.client().await;
    for worker in 0..WORKERS {
        let part = Part { worker, workers: WORKERS, seed: 0, requests_max: 0, writes_percent: 0 };
        guest.write_all(&client, part).await.expect("there is room");
    }
    client.flush().await.expect("there is room");
    assert_eq!(server.end().await, Some(0));
    is_clean(at, keeper.0);
    // All of it is in the image.
    origin.vanish().await;
    let server = Server::start(at, &["-r", "--on-change=offline"]);
    guest.compare_all(&server.client().await).await.expect("it is local");
    assert_eq!(server.end().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_before_the_end_still_closes_clean() {
    for keeper in KEEPERS {
        let folder = folder();
        let at = folder.path();
        let Some(_tmpfs) = Tmpfs::mount(at, TMPFS_BYTES) else { return };
        let (origin, guest) = origin_and_guest(BYTES, 9).await;
        image_over(&origin.url(), at, keeper);
        let server = Server::start(at, &[]);
        fill(&at.join("filler"), 2 << 20);
        // Nobody flushes: what is left to do at the end has its room already.
        let spec = LoadSpec { seed: 3, requests_max: 100, writes_percent: 100 };
        let full = load(&guest, &server, spec).await;
        assert!(full.writes_no_space > 0 && full.writes_failed == 0, "{full:?}");
        assert_eq!(server.end().await, Some(0));
        is_clean(at, keeper.0);
        let server = Server::start(at, &["-r"]);
        guest.compare_all(&server.client().await).await.expect("what completed is there");
        assert_eq!(server.end().await, Some(0));
    }
}
