//! World: the files of a run, and how they are made and opened, as `readonce` opens a chain.
//!
//! Not here: one image by itself (`layout`), images that are changed while closed (`change`), what is done with them (`run`), what must be
//! true of them (`verdict`).

mod change;
mod layout;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use readonce_disk::{
    Base, BaseFiles, Disk, Image, ImageFiles, ImageOptions, Indexed, LayerError, Lazy, Source, Top,
    chain::{self, Chain, ChainOptions, CopyOnRead, OpenError, Places, driver_of},
    inflight::Budgets,
    pieces::Pieces,
};
use readonce_format::{
    FormatError,
    driver::{BackingRef, HeaderChange, Pin},
};
use readonce_origin::{HttpOrigin, Origin, OriginOptions, Reach, Validator, Version};
use readonce_storage::{ReadAt, Rt, SimFile, Storage, runtime::timeout};
use readonce_testkit::exec::Exec;
use url::Url;

pub use self::change::Wanted;

use crate::{
    places::{self, Holders, Local, RunPlaces},
    plan::Which,
    remote::{self, Packing},
    server::{Served, Server},
    shape::{Layout, Remote, Shape},
    stamp,
};

/// Two names for the same bytes.
const NAMES: [&str; 2] = ["/first.img", "/second.img"];

/// What lives longer than a session.
#[derive(Clone)]
pub struct Disks {
    /// The top image.
    pub top: Arc<SimFile>,
    /// The file that holds its data.
    pub data: Option<Arc<SimFile>>,
    /// The image below it.
    pub middle: Option<Arc<SimFile>>,
}

/// What does not change in a run.
#[derive(Clone)]
pub struct World {
    /// The images.
    pub shape: Shape,
    served: Served,
    /// The version that images pin.
    version: Version,
}

/// Images open for writing.
pub struct Opened {
    /// What the guests write.
    pub top: Arc<Image>,
    /// How they see it.
    pub disk: Arc<Disk>,
    /// What is filled below it, and is closed with it.
    below: Below,
}

/// What is open below the top.
enum Below {
    /// An image that is filled, or none.
    Image(Option<Arc<Image>>),
    /// Whatever the chain opened.
    Chain(Mounted),
}

/// A chain that was opened as `readonce` does it.
pub struct Mounted {
    /// The chain.
    pub chain: Chain,
    /// Who holds its files.
    pub holders: Arc<Holders>,
}

/// How a session opens the images.
#[derive(Debug, Clone, Copy)]
pub struct OpenAs {
    /// The top fills.
    pub copy_on_read: bool,
    /// Both bounds, bytes; a chain has its own.
    pub budget: u64,
    /// Who opens them.
    pub way: Way,
}

/// Who opens the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// This world, layer by layer, with bounds of its own.
    Hand,
    /// `disk::chain`, from the top's name on.
    Chain,
}

impl Opened {
    /// Whether an image below the top is open for writing as well.
    pub fn fills_below(&self) -> bool {
        match &self.below {
            Below::Image(middle) => middle.is_some(),
            Below::Chain(mounted) => mounted.chain.images().len() > 1,
        }
    }

    /// Closes as a chain does it: one that fails does not keep the others open. Of the top, and of what lies below it; a chain tells
    /// the first failure, as the top's.
    pub async fn close(self, wait_max: Duration) -> [Result<(), LayerError>; 2] {
        match self.below {
            Below::Image(middle) => {
                let top = self.top.close(wait_max).await;
                let middle = match middle {
                    Some(middle) => middle.close(wait_max).await,
                    None => Ok(()),
                };
                [top, middle]
            }
            Below::Chain(mounted) => {
                let closed = mounted.chain.close(wait_max).await;
                assert!(mounted.holders.are_gone(), "closing gives back all locks: {:?}", mounted.holders);
                [closed, Ok(())]
            }
        }
    }
}

impl Disks {
    /// Empty files for a shape.
    pub fn new(shape: &Shape) -> Self {
        Self {
            top: Arc::default(),
            data: shape.top.data_file.then(Arc::default),
            middle: shape.middle.is_some().then(Arc::default),
        }
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Arc<SimFile>> {
        [Some(&self.top), self.data.as_ref(), self.middle.as_ref()].into_iter().flatten()
    }

    /// The one, or the top's where there is no such one.
    pub fn file(&self, which: Which) -> &Arc<SimFile> {
        let file = match which {
            Which::Top => None,
            Which::Data => self.data.as_ref(),
            Which::Middle => self.middle.as_ref(),
        };
        file.unwrap_or(&self.top)
    }

    /// Those of the top image.
    pub fn own(&self) -> Vec<Arc<SimFile>> {
        [Some(&self.top), self.data.as_ref()].into_iter().flatten().cloned().collect()
    }

    /// Those of what lies below it.
    pub fn below(&self) -> Vec<Arc<SimFile>> {
        self.middle.iter().cloned().collect()
    }

    /// Each file, made anew.
    pub fn map(&self, mut anew: impl FnMut(&SimFile) -> SimFile) -> Self {
        Self {
            top: Arc::new(anew(&self.top)),
            data: self.data.as_ref().map(|file| Arc::new(anew(file))),
            middle: self.middle.as_ref().map(|file| Arc::new(anew(file))),
        }
    }
}

impl World {
    /// The world of a shape.
    pub fn new(shape: Shape) -> Self {
        let file = |version| remote::file(shape.remote, version, shape.backing_len, shape.cell);
        let bytes = file(1);
        let mut changed = if shape.remote == Remote::Raw { file(2) } else { Bytes::new() };
        // Another version is as long: its length must not be what tells it.
        if changed.len() != bytes.len() {
            changed = bytes.iter().map(|byte| byte ^ 0xa5).collect();
        }
        let version =
            Version { validator: Validator::StrongETag("\"first\"".into()), len: bytes.len() as u64 };
        Self { shape, served: Served { bytes, changed }, version }
    }

    /// The server, with another state in each session.
    pub fn server(&self, rt: Rt, delay_ms_max: u64) -> Arc<Server> {
        let files: BTreeMap<_, _> =
            NAMES.iter().map(|name| ((*name).to_owned(), self.served.clone())).collect();
        Server::new(rt, files, delay_ms_max)
    }

    /// Bytes of the remote file.
    pub fn remote_len(&self) -> u64 {
        self.version.len
    }

    /// The remote file by its nth name, if there is one.
    fn backing_ref(&self, name: usize) -> Option<BackingRef> {
        let format = match self.shape.remote {
            Remote::Nothing => return None,
            Remote::Raw => "raw",
            Remote::Qcow2(_) => "qcow2",
        };
        let name = format!("http://sim{}", NAMES[name % NAMES.len()]);
        Some(BackingRef { name, format: Some(format.into()) })
    }

    /// What an image has behind it that names the remote file: that, and the version.
    fn behind(&self) -> (Option<BackingRef>, Option<Pin>) {
        let backing = self.backing_ref(0);
        let pin = (backing.is_some() && !self.shape.pinned_late).then(|| self.pin());
        (backing, pin)
    }

    fn pin(&self) -> Pin {
        Pin { validator: self.version.validator.encode(), len: self.version.len }
    }

    /// Makes the images; returns what the guests must see in them.
    pub async fn create(&self, disks: &Disks, exec: &Arc<Exec>) -> Vec<u64> {
        let shape = &self.shape;
        let remote_len = if shape.remote == Remote::Nothing { 0 } else { shape.backing_len };
        let mut seen: Vec<u64> = (0..shape.size / shape.cell)
            .map(|at| if at * shape.cell < remote_len { stamp::of_backing(1, at) } else { stamp::ZERO })
            .collect();
        if let (Some(middle), Some(file)) = (&shape.middle, &disks.middle) {
            let file: Arc<dyn Storage> = file.clone();
            middle.layout.create(&file, None, shape.backing_len, self.behind()).await;
            self.write_some(file, &middle.layout, exec, &mut seen).await;
        }
        let file: Arc<dyn Storage> = disks.top.clone();
        let data: Option<Arc<dyn Storage>> = disks.data.clone().map(|data| data as Arc<dyn Storage>);
        let behind = match &shape.middle {
            Some(middle) => {
                let format = Some(middle.layout.format.into());
                (Some(BackingRef { name: places::MIDDLE.into(), format }), None)
            }
            None => self.behind(),
        };
        if shape.top.packed == Packing::Plain {
            shape.top.create(&file, data.as_ref(), shape.size, behind).await;
            return seen;
        }
        self.pack_some(&file, &mut seen).await;
        if let (backing @ Some(_), pin) = behind {
            let change = HeaderChange::Backing(backing, pin);
            shape.top.driver().change(&file, &change).await.expect("the image has room for a name");
        }
        seen
    }

    /// The top has compressed clusters, here and there.
    async fn pack_some(&self, file: &Arc<dyn Storage>, seen: &mut [u64]) {
        let mut guest = vec![0; self.shape.size as usize];
        let cell = self.shape.cell;
        let stride = self.shape.top.cluster_size / cell;
        let cells = seen.len() as u64;
        for cluster in (0..cells.div_ceil(stride)).filter(|cluster| cluster % 4 == 1) {
            let (first, end) = (cluster * stride, ((cluster + 1) * stride).min(cells));
            let of = |at| stamp::of_write((2 << 32) + cluster, at);
            let place = (first * cell) as usize..(end * cell) as usize;
            stamp::fill(&mut guest[place], cell, first, of);
            (first..end).for_each(|at| seen[at as usize] = of(at));
        }
        file.write(0, remote::packed(&guest, self.shape.top.packed)).await.expect("the disk has room");
        file.sync().await.expect("the disk is well");
    }

    /// The middle has bytes of its own, here and there.
    async fn write_some(&self, file: Arc<dyn Storage>, layout: &Layout, exec: &Arc<Exec>, seen: &mut [u64]) {
        let mapper = layout.driver().open_writable(file.clone(), None, exec.rt()).await.expect("it opens");
        let cell = self.shape.cell;
        let image = Image::new(mapper, file, None, exec.rt(), ImageOptions::default());
        let cells = self.shape.backing_len / cell;
        let stride = (layout.cluster_size / cell).max(1);
        for cluster in (0..cells.div_ceil(stride)).filter(|cluster| cluster % 3 == 1) {
            let (first, end) = (cluster * stride, ((cluster + 1) * stride).min(cells));
            let mut data = vec![0; ((end - first) * cell) as usize];
            let of = |at| stamp::of_write((1 << 32) + cluster, at);
            stamp::fill(&mut data, cell, first, of);
            image.write(first * cell, data.into()).await.expect("the disk has room");
            for at in first..end.min(seen.len() as u64) {
                seen[at as usize] = of(at);
            }
        }
        image.close(Duration::ZERO).await.expect("it closes");
    }

    /// Opens the images for writing.
    ///
    /// # Errors
    /// Of the format, or of a disk that died.
    pub async fn open(
        &self,
        disks: &Disks,
        exec: &Arc<Exec>,
        server: &Arc<Server>,
        how: OpenAs,
    ) -> Result<Opened, FormatError> {
        if how.way == Way::Chain {
            return self.open_chain(disks, exec, server, how.copy_on_read).await;
        }
        let mut middle = None;
        let backing: Option<Arc<dyn Source>> = match (&self.shape.middle, &disks.middle) {
            (Some(layer), Some(file)) if layer.fills => {
                let remote = self.remote(&layer.layout, file, exec, server).await?;
                let options = ImageOptions { copy_on_read: true, ..ImageOptions::default() };
                let image = self.open_image(&layer.layout, (file, None), remote, exec, options).await?;
                middle = Some(Arc::clone(&image));
                Some(image)
            }
            _ => self.below(disks, exec, server).await?,
        };
        let options = ImageOptions {
            copy_on_read: how.copy_on_read,
            budgets: Budgets { fetch_bytes_max: how.budget, guest_bytes_max: how.budget },
        };
        let files = (&disks.top, disks.data.as_ref());
        let top = self.open_image(&self.shape.top, files, backing, exec, options).await?;
        let disk = Arc::new(Disk::new(Top::Image(Arc::clone(&top)), false));
        Ok(Opened { top, disk, below: Below::Image(middle) })
    }

    async fn open_chain(
        &self,
        disks: &Disks,
        exec: &Arc<Exec>,
        server: &Arc<Server>,
        copy_on_read: bool,
    ) -> Result<Opened, FormatError> {
        let copy_on_read = match (copy_on_read, self.shape.is_backed()) {
            (false, _) => CopyOnRead::Off,
            (true, true) => CopyOnRead::On,
            (true, false) => CopyOnRead::Auto,
        };
        let options = ChainOptions {
            format: Some(self.shape.top.format.into()),
            copy_on_read,
            ..ChainOptions::default()
        };
        let mounted = self.mount(disks, exec, server, options).await.map_err(other)?;
        let top = mounted
            .chain
            .images()
            .into_iter()
            .next()
            .ok_or_else(|| FormatError::Io(std::io::Error::other(NOT_WRITABLE)))?;
        Ok(Opened { top, disk: Arc::clone(&mounted.chain.disk), below: Below::Chain(mounted) })
    }

    /// Opens the chain from the top's name on, as `readonce` does it.
    ///
    /// # Errors
    /// Of the chain.
    ///
    /// # Panics
    /// When a chain that does not open keeps a lock.
    pub async fn mount(
        &self,
        disks: &Disks,
        exec: &Arc<Exec>,
        server: &Arc<Server>,
        options: ChainOptions,
    ) -> Result<Mounted, OpenError> {
        let holders = Arc::<Holders>::default();
        let options = ChainOptions { places: self.places(disks, server, &holders), ..options };
        match chain::open(places::TOP, options, exec.rt(), Arc::new(|_| ())).await {
            Ok(chain) => Ok(Mounted { chain, holders }),
            Err(error) => {
                // What was tried behind the image ends when it is next looked at.
                exec.rt().sleep(Duration::from_secs(1)).await;
                assert!(holders.are_gone(), "{error}: who does not open holds nothing: {holders:?}");
                Err(error)
            }
        }
    }

    /// Where a chain finds all that there is.
    pub fn places(&self, disks: &Disks, server: &Arc<Server>, holders: &Arc<Holders>) -> Places {
        let (disks, server, holders) = (disks.clone(), Arc::clone(server), Arc::clone(holders));
        Places::new(Arc::new(RunPlaces { disks, server, holders }))
    }

    /// Opens the images for reading alone.
    ///
    /// # Errors
    /// Of the format, or of a disk that died.
    pub async fn open_to_read(
        &self,
        disks: &Disks,
        exec: &Arc<Exec>,
        server: &Arc<Server>,
    ) -> Result<(Arc<dyn Source>, u64), FormatError> {
        let backing = self.below(disks, exec, server).await?;
        let data = disks.data.as_ref().unwrap_or(&disks.top);
        let top = base(&self.shape.top, &disks.top, data, backing, exec).await?;
        let size = top.size().await.map_err(other)?;
        Ok((top, size))
    }

    /// What is behind the top, to be read.
    async fn below(
        &self,
        disks: &Disks,
        exec: &Arc<Exec>,
        server: &Arc<Server>,
    ) -> Result<Option<Arc<dyn Source>>, FormatError> {
        match (&self.shape.middle, &disks.middle) {
            (Some(layer), Some(file)) => {
                let remote = self.remote(&layer.layout, file, exec, server).await?;
                Ok(Some(base(&layer.layout, file, file, remote, exec).await?))
            }
            _ => self.remote(&self.shape.top, &disks.top, exec, server).await,
        }
    }

    async fn open_image(
        &self,
        layout: &Layout,
        (own, data): (&Arc<SimFile>, Option<&Arc<SimFile>>),
        backing: Option<Arc<dyn Source>>,
        exec: &Arc<Exec>,
        options: ImageOptions,
    ) -> Result<Arc<Image>, FormatError> {
        let own: Arc<dyn Storage> = own.clone();
        let data = data.map(|data| data.clone() as Arc<dyn Storage>);
        let mapper = layout.driver().open_writable(own.clone(), data.clone(), exec.rt()).await?;
        let files = ImageFiles { own: own.clone(), data: data.unwrap_or(own) };
        let image = Image::new(mapper, files, backing, exec.rt(), options);
        image.start_reclaim();
        Ok(image)
    }

    /// The remote backing that the image in `file` names, opened as a chain does it: tried now, and at each use until it opens.
    async fn remote(
        &self,
        layout: &Layout,
        file: &Arc<SimFile>,
        exec: &Arc<Exec>,
        server: &Arc<Server>,
    ) -> Result<Option<Arc<dyn Source>>, FormatError> {
        let description = layout.describe(&(file.clone() as Arc<dyn Storage>)).await?;
        if self.shape.remote == Remote::Nothing {
            assert_eq!(description.backing, None, "it was made without one");
            return Ok(None);
        }
        let backing = description.backing.expect("it was made with one");
        let url = Url::parse(&backing.name).expect("we wrote it");
        let pin = match description.pin {
            Some(pin) => {
                let foreign = description.only_readonce_wrote == Some(false);
                assert!(!foreign || !layout.is_pinned_for_good(), "nobody else wrote");
                pin
            }
            None => self.pin_now(layout, file, &url, exec, server).await?,
        };
        let version = Version::decode(&pin.validator, pin.len).expect("we encoded it");
        assert_eq!(version, self.version, "the pin is kept");
        let (server, rt) = (Arc::clone(server), exec.rt());
        let lazy = Lazy::new(Box::new(move || {
            let options = OriginOptions {
                expect: Some(version.clone()),
                reach: Reach::Preferred,
                ..OriginOptions::default()
            };
            let (server, rt, url, format) = (server.clone(), rt.clone(), url.clone(), backing.format.clone());
            Box::pin(async move { open_remote(server, &url, options, format.as_deref(), rt).await })
        }));
        let _ = timeout(&exec.rt(), Duration::from_secs(20), lazy.source()).await;
        Ok(Some(Indexed::new(Arc::new(lazy))))
    }

    /// Pins an image that is used for the first time, as a chain does it: to what is there now, and before anything is read.
    async fn pin_now(
        &self,
        layout: &Layout,
        file: &Arc<SimFile>,
        url: &Url,
        exec: &Arc<Exec>,
        server: &Arc<Server>,
    ) -> Result<Pin, FormatError> {
        assert!(self.shape.pinned_late, "the pin is kept");
        let options = OriginOptions { reach: Reach::Preferred, ..OriginOptions::default() };
        let origin = HttpOrigin::open_with(server.clone(), url, &options, &exec.rt()).await.map_err(other)?;
        let pin = Pin { validator: origin.validator(), len: origin.len() };
        let file: Arc<dyn Storage> = file.clone();
        layout.driver().change(&file, &HeaderChange::Pin(pin.clone())).await?;
        Ok(pin)
    }
}

/// Of a chain that serves its top read-only: the image is marked corrupt.
const NOT_WRITABLE: &str = "the top is not open for writing";

fn other(error: impl std::error::Error + Send + Sync + 'static) -> FormatError {
    FormatError::Io(std::io::Error::other(error))
}

/// An image as a layer that is only read.
async fn base(
    layout: &Layout,
    own: &Arc<SimFile>,
    data: &Arc<SimFile>,
    backing: Option<Arc<dyn Source>>,
    exec: &Arc<Exec>,
) -> Result<Arc<dyn Source>, FormatError> {
    let own: Arc<dyn ReadAt> = own.clone();
    let mapper = layout.driver().open(own.clone()).await?;
    let data = Local::new(data.clone());
    Ok(Arc::new(Base::new(mapper, BaseFiles { own, data }, backing, &exec.rt())))
}

async fn open_remote(
    server: Arc<Server>,
    url: &Url,
    options: OriginOptions,
    format: Option<&str>,
    rt: Rt,
) -> Result<Arc<dyn Source>, LayerError> {
    let origin: Arc<dyn Origin> = HttpOrigin::open_with(server, url, &options, &rt).await?;
    let origin: Arc<dyn Origin> = Pieces::new(origin, rt.clone());
    let own: Arc<dyn ReadAt> = origin.clone();
    let driver = driver_of(&*own, format).await.map_err(LayerError::NoBacking)?;
    let mapper = driver.open(own.clone()).await?;
    Ok(Arc::new(Base::new(mapper, BaseFiles { own, data: origin }, None, &rt)))
}
