//! Memory cgroups, version 2: how much a process may still dirty in the ones that it is in.
//!
//! - Groups lie in each other, and the limit of each counts. Which of them have one is looked up once; what is dirty in them, each time.
//! - What cannot be read, version 1 included, is no limit.
//!
//! Not here: the machine's own limit, and what is done with it (`dirty`).

use std::{
    fs,
    path::{Component, Path, PathBuf},
    sync::OnceLock,
};

/// Where Linux's groups are.
const ROOT: &str = "/sys/fs/cgroup";
/// The group of a process, a line for each hierarchy; that of version 2 has the number 0.
const OWN: &str = "/proc/self/cgroup";
/// Groups in each other that are looked at; a path of more ends at the one that is furthest out.
const DEPTH_MAX: usize = 64;

/// The groups of a process that have a limit.
#[derive(Debug, Default)]
pub(crate) struct Groups(Vec<PathBuf>);

/// The groups that this process was in when it was first asked.
pub(crate) fn of_this_process() -> &'static Groups {
    static GROUPS: OnceLock<Groups> = OnceLock::new();
    GROUPS.get_or_init(|| Groups::of(Path::new(ROOT), &fs::read_to_string(OWN).unwrap_or_default()))
}

impl Groups {
    /// The groups under `root` of a process whose own file holds `own`.
    fn of(root: &Path, own: &str) -> Self {
        let Some(own) = own.lines().find_map(|line| line.strip_prefix("0::")) else { return Self::default() };
        let below: Vec<_> = Path::new(own).components().filter(|part| *part != Component::RootDir).collect();
        // Above what this process may see of the tree, nothing is.
        if below.iter().any(|part| !matches!(part, Component::Normal(_))) {
            return Self::default();
        }
        let mut folder = root.to_owned();
        let mut folders = vec![folder.clone()];
        for part in below.iter().take(DEPTH_MAX) {
            folder.push(part);
            folders.push(folder.clone());
        }
        folders.retain(|folder| limit(folder).is_some());
        Self(folders)
    }

    /// Bytes that may become dirty before the kernel stops a writer in the tightest of them; `None` without a limit.
    pub(crate) fn left(&self) -> Option<u64> {
        self.0.iter().filter_map(|folder| left_in(folder)).min()
    }
}

/// Bytes of memory that the group may use.
fn limit(group: &Path) -> Option<u64> {
    fs::read_to_string(group.join("memory.max")).ok()?.trim().parse().ok()
}

/// Linux stops the writers of a group at about 15 % of the memory that its programs leave to files: half-way between `vm.dirty_ratio` and
/// `vm.dirty_background_ratio`, with their defaults. An eighth of all is less.
fn left_in(group: &Path) -> Option<u64> {
    let limit = limit(group)?;
    let stat = fs::read_to_string(group.join("memory.stat")).ok()?;
    let bytes = |name: &str| -> u64 {
        let value = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    let dirty = bytes("file_dirty").saturating_add(bytes("file_writeback"));
    Some((limit.saturating_sub(bytes("anon")) / 8).saturating_sub(dirty))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A tree of groups: the path of each, its limit, and what is anonymous, dirty and on its way to a device in it.
    fn tree(groups: &[(&str, &str, [u64; 3])]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        for (path, max, [anon, dirty, writeback]) in groups {
            let folder = root.path().join(path);
            fs::create_dir_all(&folder).expect("room");
            fs::write(folder.join("memory.max"), format!("{max}\n")).expect("room");
            let stat = format!(
                "anon {anon}\nfile 5\nfile_dirty {dirty}\nfile_writeback {writeback}\nfile_dirty_x 9\n"
            );
            fs::write(folder.join("memory.stat"), stat).expect("room");
        }
        root
    }

    fn left(root: &tempfile::TempDir, own: &str) -> Option<u64> {
        Groups::of(root.path(), own).left()
    }

    /// In a container of 512 MiB on a large machine, writes stood still at a limit that was not known.
    #[test]
    fn the_tightest_of_the_groups_counts() {
        let limit = (512 * MIB).to_string();
        let large = (1024 * 1024 * MIB).to_string();
        let root = tree(&[
            ("a", &limit, [112 * MIB, 10 * MIB, 5 * MIB]),
            ("a/b", "max", [0; 3]),
            ("a/b/c", &large, [0, 15 * MIB, 0]),
            ("d", "0", [0, 1, 0]),
        ]);
        for own in ["0::/a/b/c\n", "12:cpu:/x\n0::/a/b\n", "0::/a"] {
            assert_eq!(left(&root, own), Some(35 * MIB), "{own}");
        }
        assert_eq!(left(&root, "0::/d"), Some(0));
        fs::write(root.path().join("a/memory.stat"), format!("anon {}\n", 600 * MIB)).expect("room");
        assert_eq!(left(&root, "0::/a"), Some(0), "more than the limit is in use");
    }

    #[test]
    fn what_cannot_be_read_is_no_limit() {
        let root = tree(&[("a", "max", [0; 3]), ("b", "many", [0; 3]), ("e", "100", [0; 3])]);
        for own in ["", "0::/", "0::/a", "0::/b", "0::/absent", "0::/../e", "4:memory:/e", "0::"] {
            assert_eq!(left(&root, own), None, "{own}");
        }
        fs::remove_file(root.path().join("e/memory.stat")).expect("it is there");
        assert_eq!(left(&root, "0::/e"), None);
        let deep = format!("0::{}", "/a".repeat(10_000));
        assert_eq!(left(&root, &deep), None);
    }

    /// A container sees its own group as the root.
    #[test]
    fn the_root_may_have_a_limit() {
        let root = tree(&[("", "80", [0, 1, 2])]);
        assert_eq!(left(&root, "0::/"), Some(7));
    }
}
