//! Serves a raw file over NBD: what the protocol alone costs.
//!
//! `serve_file FILE SOCKET [wait]`: everything inline, or, with `wait`, every request as a task. Not for real data: it blocks its thread, and flush is all that it makes durable.

#![allow(clippy::disallowed_methods, reason = "an example outside the engine")]

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    sync::Arc,
};

use bytes::Bytes;
use readonce_disk::{BlockDevice, DeviceError, StatusExtent, ZeroMode};
use readonce_export::nbd::{Listener, Server, ServerOptions};
use readonce_storage::BoxFuture;

struct FileDevice {
    file: File,
    size: u64,
    is_waiting: bool,
}

fn io(error: std::io::Error) -> DeviceError {
    DeviceError::Io(error.to_string())
}

impl BlockDevice for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Option<Result<(), DeviceError>> {
        (!self.is_waiting).then(|| self.file.read_exact_at(buf, offset).map_err(io))
    }
    fn read(&self, offset: u64, len: usize) -> BoxFuture<'_, Result<Bytes, DeviceError>> {
        Box::pin(async move {
            let mut buf = vec![0; len];
            self.file.read_exact_at(&mut buf, offset).map_err(io)?;
            Ok(buf.into())
        })
    }
    fn write_now(&self, offset: u64, data: &[u8]) -> Option<Result<(), DeviceError>> {
        (!self.is_waiting).then(|| self.file.write_all_at(data, offset).map_err(io))
    }
    fn write(&self, offset: u64, data: Bytes) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move { self.file.write_all_at(&data, offset).map_err(io) })
    }
    fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move {
            if mode.only_if_fast {
                return Err(DeviceError::NotFast);
            }
            let zeros = vec![0; 1 << 20];
            let mut done = 0;
            while done < len {
                let part = (len - done).min(zeros.len() as u64);
                let part_len = usize::try_from(part).expect("at most 1 MiB");
                self.file.write_all_at(&zeros[..part_len], offset + done).map_err(io)?;
                done += part;
            }
            Ok(())
        })
    }
    fn trim(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async { Ok(()) })
    }
    fn flush(&self) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async move { self.file.sync_data().map_err(io) })
    }
    fn cache(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DeviceError>> {
        Box::pin(async { Ok(()) })
    }
    fn status(&self, _: u64, len: u64, _: usize) -> BoxFuture<'_, Result<Vec<StatusExtent>, DeviceError>> {
        Box::pin(async move { Ok(vec![StatusExtent { len, zero: false, hole: false, depth: 1 }]) })
    }
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(socket)) = (args.next(), args.next()) else {
        panic!("usage: serve_file FILE SOCKET [wait]");
    };
    let is_waiting = args.next().is_some();
    let file = OpenOptions::new().read(true).write(true).open(path).expect("the file opens");
    let size = file.metadata().expect("it has a size").len();
    let server = Server::new(Arc::new(FileDevice { file, size, is_waiting }), ServerOptions::default())
        .expect("short names");
    let listener = Listener::unix(socket).expect("the socket is free");
    println!("{}", server.uri(&listener));
    server.serve(listener).await;
}
