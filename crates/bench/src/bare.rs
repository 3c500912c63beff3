//! A bare server: the least that a read over NBD can cost, for comparison with the rows where one core does all.
//!
//! - One client, blocking: receive a request, read the file from the page cache, send the reply. It checks nothing, knows no
//!   format, and serves reads of one request at a time only.
//! - What it reaches is a limit of the machine: no server that does more can be faster with the same client.

use std::{
    fs::File,
    io::{Read, Write},
    os::unix::{fs::FileExt, net::UnixListener},
    path::Path,
};

const REQUEST: usize = 28;
const REPLY: usize = 16;

/// Serves the first `size` bytes of the file at `image` on `socket`, to one client after the other.
pub fn serve(image: &Path, socket: &Path) -> anyhow::Result<()> {
    let file = File::open(image)?;
    let size = file.metadata()?.len();
    let listener = UnixListener::bind(socket)?;
    for stream in listener.incoming() {
        // A client that leaves in any way ends only its own turn.
        let _ = stream.and_then(|stream| one(stream, &file, size));
    }
    Ok(())
}

fn one(mut stream: impl Read + Write, file: &File, size: u64) -> std::io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    // The client's flags, and one option: NBD_OPT_GO.
    let mut option = [0; 4 + 16];
    stream.read_exact(&mut option)?;
    let len = u32::from_be_bytes(option[16..].try_into().expect("four bytes"));
    stream.read_exact(&mut vec![0; len as usize])?;
    let answer = |kind: u32, data: &[u8]| {
        let mut message = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        message.extend(7_u32.to_be_bytes());
        message.extend(kind.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        message
    };
    let mut info = vec![0; 2];
    info.extend(size.to_be_bytes());
    info.extend([0, 1]);
    stream.write_all(&[answer(3, &info), answer(1, &[])].concat())?;

    let mut request = [0; REQUEST];
    let mut reply = vec![0; REPLY + (1 << 20)];
    reply[..4].copy_from_slice(&0x6744_6698_u32.to_be_bytes());
    loop {
        stream.read_exact(&mut request)?;
        if request[7] != 0 {
            return Ok(());
        }
        let offset = u64::from_be_bytes(request[16..24].try_into().expect("eight bytes"));
        let len = u32::from_be_bytes(request[24..].try_into().expect("four bytes")) as usize;
        reply[8..REPLY].copy_from_slice(&request[8..16]);
        file.read_exact_at(&mut reply[REPLY..REPLY + len], offset)?;
        stream.write_all(&reply[..REPLY + len])?;
    }
}
