//! nginx stopped, started again, and its file replaced by another version, all under reads.

use std::{
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, SystemTime},
};

use readonce_testkit::{Content, guest::Guest};

use crate::{
    common::{KEEPERS, folder},
    rounds,
    server::{Load, LoadSpec, Server, image_over, is_clean},
};

const BYTES: u64 = 8 << 20;

/// A server of the file `image` in `folder`; it can be stopped and started again at the same port.
struct Nginx {
    child: Option<Child>,
    folder: PathBuf,
    port: u16,
}

impl Nginx {
    fn start(folder: &Path) -> Self {
        for _ in 0..5 {
            // Another process may take the port before nginx does: then another port.
            let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
            let port = listener.local_addr().expect("bound").port();
            drop(listener);
            let mut nginx = Self { child: None, folder: folder.to_owned(), port };
            std::fs::write(folder.join("nginx.conf"), nginx.config()).expect("room");
            if nginx.run() {
                return nginx;
            }
        }
        panic!("nginx does not start");
    }

    /// Whether it accepts connections.
    fn run(&mut self) -> bool {
        let mut child = Command::new("nginx")
            .arg("-c")
            .arg(self.folder.join("nginx.conf"))
            .arg("-p")
            .arg(&self.folder)
            .stderr(Stdio::null())
            .spawn()
            .expect("nginx is installed (Debian: apt install nginx-light)");
        while child.try_wait().expect("our child").is_none() {
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                self.child = Some(child);
                return true;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        false
    }

    fn stop(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("it runs");
        child.wait().expect("our child");
    }

    fn config(&self) -> String {
        let (folder, port) = (self.folder.display(), self.port);
        format!(
            "daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
            events {{}}
            http {{
                access_log off;
                client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
                uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
                root {folder};
                server {{ listen 127.0.0.1:{port}; }}
            }}"
        )
    }

    /// Puts a copy of `from` (same bytes, same time) in the place of what is served, in one step.
    fn serve(&self, from: &str) {
        let new = self.folder.join("new");
        let _ = std::fs::remove_file(&new);
        std::fs::hard_link(self.folder.join(from), &new).expect("the same folder");
        std::fs::rename(&new, self.folder.join("image")).expect("the same folder");
        // A rename onto a link of the same file does nothing, and leaves the old name.
        let _ = std::fs::remove_file(&new);
    }

    fn write(&self, name: &str, content: &Content, age: Duration) {
        let path = self.folder.join(name);
        std::fs::write(&path, content.bytes(0..content.len())).expect("room");
        let file = std::fs::File::options().write(true).open(path).expect("there");
        file.set_modified(SystemTime::now() - age).expect("ours");
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test(flavor = "multi_thread")]
async fn versions_never_meet_and_the_old_file_heals() {
    for keeper in KEEPERS {
        let (web, folder) = (folder(), folder());
        let at = folder.path();
        let mut nginx = Nginx::start(web.path());
        let old = Content::seeded(1, BYTES);
        nginx.write("old", &old, 2 * DAY);
        nginx.write("same-length", &Content::seeded(2, BYTES), DAY);
        nginx.write("longer", &Content::seeded(3, BYTES + 4096), DAY);
        nginx.write("shorter", &Content::seeded(4, BYTES / 2), DAY);
        nginx.serve("old");
        image_over(&format!("http://127.0.0.1:{}/image", nginx.port), at, keeper);
        let guest = Arc::new(Guest::new(old));
        let server = Server::start(at, &["--retry-for", "100ms"]);
        // The model knows the old version alone: a byte of another fails the load.
        let mut refused = 0;
        for round in 0..rounds(1, 10) {
            for other in ["same-length", "longer", "shorter", "absent", "stopped"] {
                let spec = LoadSpec { seed: round, requests_max: 10, writes_percent: 10 };
                let busy = Load::start(&guest, &server, spec).await;
                match other {
                    "absent" => std::fs::remove_file(web.path().join("image")).expect("there"),
                    "stopped" => nginx.stop(),
                    other => nginx.serve(other),
                }
                let tally = busy.all().await;
                assert!(tally.writes_failed == 0 && !tally.is_cut, "{other}: {tally:?}");
                let client = server.client().await;
                refused += tally.reads_failed + u64::from(client.read(BYTES - 512, 512).await.is_err());
                match other {
                    "stopped" => assert!(nginx.run(), "the port is free"),
                    _ => nginx.serve("old"),
                }
            }
        }
        assert!(refused > 0, "something was missing from the image while the file was another");
        // No restart, no flag: the old file is there again.
        guest.compare_all(&server.client().await).await.expect("healed");
        server.client().await.flush().await.expect("healed");
        assert_eq!(server.end().await, Some(0));
        is_clean(at, keeper.0);
        nginx.stop();
        let server = Server::start(at, &["-r", "--on-change=offline"]);
        guest.compare_all(&server.client().await).await.expect("all of it is local");
        assert_eq!(server.end().await, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_under_reads_is_not_seen() {
    let (web, folder) = (folder(), folder());
    let at = folder.path();
    let mut nginx = Nginx::start(web.path());
    let content = Content::seeded(1, BYTES);
    nginx.write("old", &content, DAY);
    nginx.serve("old");
    image_over(&format!("http://127.0.0.1:{}/image", nginx.port), at, KEEPERS[1]);
    let guest = Arc::new(Guest::new(content));
    let server = Server::start(at, &[]);
    let restarting = tokio::task::spawn_blocking(move || {
        for _ in 0..rounds(5, 100) {
            nginx.stop();
            assert!(nginx.run(), "the port is free");
        }
        nginx
    });
    let spec = LoadSpec { seed: 3, requests_max: 40, writes_percent: 30 };
    let tally = crate::server::load(&guest, &server, spec).await;
    let _nginx = restarting.await.expect("it ran");
    assert_eq!(tally.reads_failed + tally.writes_failed + tally.flushes_failed, 0, "{tally:?}");
    guest.compare_all(&server.client().await).await.expect("all of it");
    assert_eq!(server.end().await, Some(0));
    is_clean(at, "qcow2");
}
