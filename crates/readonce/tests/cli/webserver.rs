//! A real web server: nginx, of the files in a folder.

use std::{
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};

use readonce_testkit::Content;

/// A server of the file `image` in `folder`; it can be stopped and started again at the same port.
pub struct Nginx {
    child: Option<Child>,
    folder: PathBuf,
    pub port: u16,
}

impl Nginx {
    pub fn start(folder: &Path) -> Self {
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
    pub fn run(&mut self) -> bool {
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

    pub fn stop(&mut self) {
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
    pub fn serve(&self, from: &str) {
        let new = self.folder.join("new");
        let _ = std::fs::remove_file(&new);
        std::fs::hard_link(self.folder.join(from), &new).expect("the same folder");
        std::fs::rename(&new, self.folder.join("image")).expect("the same folder");
        // A rename onto a link of the same file does nothing, and leaves the old name.
        let _ = std::fs::remove_file(&new);
    }

    pub fn write(&self, name: &str, content: &Content, age: Duration) {
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
