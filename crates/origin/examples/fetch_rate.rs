//! How close fetches come to a link's rate: `cargo run --release -p readonce-origin --example fetch_rate`.
//!
//! Prints for each link and protocol what one fetch and eight at once reach, in per cent of the link.

#![allow(clippy::disallowed_methods, reason = "a rate is measured in real time")]

use std::time::{Duration, Instant};

use readonce_origin::{Class, HttpVersion, Locator, OriginOptions, Proxies};
use readonce_storage::TokioRuntime;
use readonce_testkit::{Content, FaultyOrigin, LinkSpec, OriginSpec};

#[tokio::main]
async fn main() {
    for (megabits, bytes) in [(100, 16_000_000_u64), (1000, 100_000_000)] {
        let link = LinkSpec::new(megabits, 40);
        for version in [HttpVersion::Http1, HttpVersion::Http2] {
            for fetches in [1, 8] {
                let took = measure(link, version, fetches, bytes).await;
                let ideal = link.round_trip
                    + Duration::from_secs_f64(bytes as f64 * 8.0 / link.bits_per_second as f64);
                let percent = 100.0 * ideal.as_secs_f64() / took.as_secs_f64();
                println!(
                    "{megabits} Mbit/s, 40 ms, {version:?}, {fetches} fetches: {took:.3?}, {percent:.1} % of the link"
                );
            }
        }
    }
}

async fn measure(link: LinkSpec, http_version: HttpVersion, fetches: u64, bytes: u64) -> Duration {
    let spec = OriginSpec { link: Some(link), ..OriginSpec::new(Content::seeded(1, bytes + 64)) };
    let server = FaultyOrigin::start(spec).await.expect("a port");
    let options = OriginOptions { http_version, proxies: Proxies::None, ..OriginOptions::default() };
    let locator = Locator::parse(&server.url(), None).expect("a URL");
    let origin = readonce_origin::open(&locator, &options, &TokioRuntime::current()).await.expect("served");
    // The connections first: their handshakes are not what is measured.
    let warm = (0..fetches).map(|index| origin.read(index, 1));
    futures_util::future::join_all(warm).await;
    let start = Instant::now();
    let part = bytes / fetches;
    let running: Vec<_> = (0..fetches)
        .map(|index| {
            let origin = origin.clone();
            tokio::spawn(async move {
                let mut sink = |_, _| ();
                let range = index * part..(index + 1) * part;
                origin.fetch(range, Class::Demand, &mut sink).await.expect("served");
            })
        })
        .collect();
    for fetch in running {
        fetch.await.expect("no panic");
    }
    start.elapsed()
}
