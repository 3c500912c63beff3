//! Requests of all classes at one origin, under schedules that shuttle draws, switched at waits and at each short lock: the places of
//! `schedule` by themselves, and fetches over a transport that redirects, expires and breaks off.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::select, stream};
use http::{HeaderMap, StatusCode, header};
use readonce_origin::{
    Class, HttpOrigin, Origin, OriginOptions, Reach, Validator, Version,
    schedule::Places,
    transport::{Head, Request, Response, Transport, TransportError},
};
use readonce_storage::{BoxFuture, Rt};
use readonce_testkit::schedules::{Shared, ShuttleRuntime, drawn, schedules, turns};
use shuttle::{
    future::spawn,
    scheduler::{PctScheduler, RandomScheduler},
};

const RANDOM_SCHEDULES: usize = 1_500;
const PCT_SCHEDULES: usize = 500;
const PCT_DEPTH: usize = 4;
/// Steps after which a schedule is called stuck.
const STEPS_MAX: usize = 100_000;

const DEMAND_MAX: usize = 2;
const BACKGROUND_MAX: usize = 2;
/// What `remote` allows beside demand.
const BACKGROUND_REQUESTS_MAX: usize = 8;

/// A request each.
const CLASSES: [Class; 7] = [
    Class::Demand,
    Class::Stream,
    Class::Demand,
    Class::ReadAhead,
    Class::Demand,
    Class::Profile,
    Class::Demand,
];

fn under_schedules<F: Future<Output = ()> + 'static>(work: fn() -> F) {
    schedules(RandomScheduler::new(RANDOM_SCHEDULES), STEPS_MAX, work);
    schedules(PctScheduler::new(PCT_DEPTH, PCT_SCHEDULES), STEPS_MAX, work);
}

/// Who is in flight: demand, and the others.
#[derive(Default)]
struct InFlight(Mutex<[usize; 2]>);

/// One that is, until it is dropped.
struct Flying(Arc<InFlight>, Class);

impl Flying {
    #[track_caller]
    fn begin(in_flight: &Arc<InFlight>, class: Class, limits: [usize; 2]) -> Self {
        let mut count = in_flight.0.lock().expect("no panic");
        count[kind(class)] += 1;
        assert!(count[kind(class)] <= limits[kind(class)], "{class:?}: {count:?} in flight of {limits:?}");
        Self(Arc::clone(in_flight), class)
    }
}

impl Drop for Flying {
    fn drop(&mut self) {
        if let Ok(mut count) = self.0.0.lock() {
            count[kind(self.1)] -= 1;
        }
    }
}

fn kind(class: Class) -> usize {
    usize::from(class != Class::Demand)
}

/// `work` to its end, or for a few turns: who asked has gone away. Whether it ended.
async fn perhaps_dropped(work: impl Future<Output = ()>) -> bool {
    let patience = match drawn(3) {
        0 => drawn(12),
        _ => {
            work.await;
            return true;
        }
    };
    matches!(select(Box::pin(work), Box::pin(turns(patience))).await, futures_util::future::Either::Left(_))
}

#[test]
fn places_are_never_too_many_and_never_lost() {
    under_schedules(|| async {
        let places = Arc::new(Places::new(DEMAND_MAX, BACKGROUND_MAX));
        let in_flight = Arc::new(InFlight::default());
        let tasks = CLASSES.map(|class| {
            let (places, in_flight) = (Arc::clone(&places), Arc::clone(&in_flight));
            spawn(async move {
                for _ in 0..2 {
                    let work = async {
                        let place = places.take(class).await;
                        let flying = Flying::begin(&in_flight, class, [DEMAND_MAX, BACKGROUND_MAX]);
                        turns(drawn(3)).await;
                        drop(flying);
                        drop(place);
                    };
                    perhaps_dropped(work).await;
                }
            })
        });
        for task in tasks {
            task.await.expect("everybody gets a place");
        }
        // All are free again.
        let all: Vec<_> = (0..DEMAND_MAX).map(|_| places.take(Class::Demand).now_or_never()).collect();
        assert!(all.iter().all(Option::is_some));
        drop(all);
        let all: Vec<_> = (0..BACKGROUND_MAX).map(|_| places.take(Class::Stream).now_or_never()).collect();
        assert!(all.iter().all(Option::is_some));
    });
}

/// Bytes of one fetch.
const FETCH_BYTES: u64 = 40;
const LEN: u64 = FETCH_BYTES * CLASSES.len() as u64;

fn byte(at: u64) -> u8 {
    (at % 251) as u8
}

/// Sends each request elsewhere; what it leads to is good for a few requests.
struct Server {
    rt: Rt,
    in_flight: Arc<InFlight>,
    /// Where it sent requests to: how many it takes there yet.
    signed: Mutex<BTreeMap<String, u64>>,
}

impl Server {
    async fn answer(&self, request: Request) -> Result<Response, TransportError> {
        let Range { start, end } = request.range;
        let class = CLASSES[(start / FETCH_BYTES) as usize];
        let flying = Flying::begin(&self.in_flight, class, [DEMAND_MAX, BACKGROUND_REQUESTS_MAX]);
        self.rt.sleep(Duration::from_millis(1)).await;
        if drawn(8) == 0 {
            return Err(TransportError::Passing("reset".into()));
        }
        let empty =
            |status, headers| Ok(Response { head: Head { status, headers }, body: stream::empty().boxed() });
        let mut headers = HeaderMap::new();
        if request.url.path() == "/file" {
            let uses = 1 + drawn(4);
            let mut signed = self.signed.lock().expect("no panic");
            let path = format!("/signed-{}", signed.len());
            headers.insert(header::LOCATION, path.parse().expect("legal"));
            signed.insert(path, uses);
            return empty(StatusCode::FOUND, headers);
        }
        {
            let mut signed = self.signed.lock().expect("no panic");
            let left = signed.get_mut(request.url.path()).expect("a path that was handed out");
            match left.checked_sub(1) {
                Some(fewer) => *left = fewer,
                None => return empty(StatusCode::FORBIDDEN, headers),
            }
        }
        headers.insert(header::ETAG, "\"v1\"".parse().expect("legal"));
        let content_range = format!("bytes {start}-{}/{LEN}", end - 1);
        headers.insert(header::CONTENT_RANGE, content_range.parse().expect("legal"));
        let rt = Arc::clone(&self.rt);
        let body = stream::unfold((start, Some(flying)), move |(at, flying)| {
            let rt = Arc::clone(&rt);
            async move {
                flying.as_ref()?;
                if at == end {
                    return None;
                }
                rt.sleep(Duration::from_millis(1)).await;
                if drawn(8) == 0 {
                    return Some((Err(TransportError::Passing("cut off".into())), (at, None)));
                }
                let to = (at + 1 + drawn(FETCH_BYTES)).min(end);
                Some((Ok((at..to).map(byte).collect::<Bytes>()), (to, flying)))
            }
        });
        let head = Head { status: StatusCode::PARTIAL_CONTENT, headers };
        Ok(Response { head, body: body.boxed() })
    }
}

impl Transport for Server {
    fn get(&self, request: Request) -> BoxFuture<'_, Result<Response, TransportError>> {
        Box::pin(self.answer(request))
    }
}

#[test]
fn fetches_of_all_classes_get_their_bytes_once() {
    under_schedules(|| async {
        let rt: Rt = Arc::new(Shared(ShuttleRuntime::new()));
        let in_flight = Arc::new(InFlight::default());
        let server =
            Server { rt: Arc::clone(&rt), in_flight: Arc::clone(&in_flight), signed: Mutex::default() };
        let options = OriginOptions {
            retry_for: Duration::from_secs(1 << 30),
            // Silence is not what is tested.
            stall_timeout: Duration::from_secs(1 << 30),
            reach: Reach::Later,
            expect: Some(Version { validator: Validator::StrongETag("\"v1\"".into()), len: LEN }),
            connections_max: DEMAND_MAX,
            ..OriginOptions::default()
        };
        let url = url::Url::parse("http://h/file").expect("a URL");
        let origin = HttpOrigin::open_with(Arc::new(server), &url, &options, &rt).await;
        let origin = origin.expect("nothing is asked");
        let tasks = (0..).zip(CLASSES).map(|(number, class)| {
            let origin = Arc::clone(&origin);
            spawn(async move {
                let range = number * FETCH_BYTES..(number + 1) * FETCH_BYTES;
                let mut got = 0;
                let mut at = range.start;
                let mut sink = |offset, piece: Bytes| {
                    assert_eq!(offset, at);
                    assert!(piece.iter().zip(at..).all(|(&found, at)| found == byte(at)));
                    got += piece.len() as u64;
                    at += piece.len() as u64;
                };
                let ended = perhaps_dropped(async {
                    origin.fetch(range.clone(), class, &mut sink).await.expect("it passes in the end");
                })
                .await;
                assert!(!ended || at == range.end);
                got
            })
        });
        let tasks: Vec<_> = tasks.collect();
        let mut got = 0;
        for task in tasks {
            got += task.await.expect("every fetch ends");
        }
        assert_eq!(origin.stats().bytes, got);
        assert_eq!(*in_flight.0.lock().expect("no panic"), [0, 0]);
    });
}
