//! The service's socket in the file system: who owns it, who may reach it, when it goes.

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Longest path of a Unix socket: `sun_path` has 108 bytes and ends with a zero.
pub const PATH_BYTES_MAX: usize = 107;
/// Exit status of a daemon that finds another one in its place: `EX_TEMPFAIL` of `sysexits.h`.
pub const EXIT_ALREADY_RUNNING: u8 = 75;
/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 1024;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "fields are the facts that the message spells out")]
pub enum EndpointError {
    #[error(
        "{}: {bytes} bytes; the path of a Unix socket has at most {PATH_BYTES_MAX}",
        path.display()
    )]
    PathTooLong { path: PathBuf, bytes: usize },
    #[error(
        "{}: another daemon serves here, process {}",
        path.display(),
        pid.map_or("unknown".to_owned(), |pid| pid.to_string())
    )]
    AlreadyRunning { path: PathBuf, pid: Option<i32> },
    #[error("{}: exists and is no socket; it is left alone", path.display())]
    NotASocket { path: PathBuf },
    #[error("{}: belongs to user {uid}; it is left alone", path.display())]
    Foreign { path: PathBuf, uid: u32 },
    #[error("{}: {action}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

impl EndpointError {
    /// What the process should exit with.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::AlreadyRunning { .. } => EXIT_ALREADY_RUNNING,
            _ => 1,
        }
    }
}

/// What is done about the permissions of the socket's folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folder {
    /// It is the service's own: made or tightened to 0700.
    Private,
    /// The user named it: made with 0700 if it is missing, else left as it is.
    AsFound,
}

/// The default socket: `tandem/tandem.sock` below a runtime directory (the value of
/// `XDG_RUNTIME_DIR`), or, where there is none, `tandem-UID/tandem.sock` in `/tmp`.
///
/// # Errors
/// [`EndpointError::Foreign`] if the folder exists and is another user's: what listens there is not
/// to be trusted.
pub fn default_socket(runtime_dir: Option<&OsStr>) -> Result<PathBuf, EndpointError> {
    let folder = match runtime_dir.map(Path::new).filter(|path| path.is_absolute()) {
        Some(runtime_dir) => runtime_dir.join("tandem"),
        None => Path::new("/tmp").join(format!("tandem-{}", own_uid())),
    };
    match fs::symlink_metadata(&folder) {
        Ok(found) if found.uid() != own_uid() => {
            Err(EndpointError::Foreign { path: folder, uid: found.uid() })
        }
        _ => Ok(folder.join("tandem.sock")),
    }
}

/// The bound and listening socket of the one daemon that owns it. Dropping it removes the socket,
/// if it is still the same one, and gives up the lock.
#[derive(Debug)]
pub struct Endpoint {
    path: PathBuf,
    /// Device and inode of the socket's file.
    identity: (u64, u64),
    listener: UnixListener,
    _lock: File,
}

impl Endpoint {
    /// Takes the socket's lock, replaces a stale socket of our own, binds and listens. Clients can
    /// connect from now on and wait for the server.
    ///
    /// # Errors
    /// See [`EndpointError`].
    pub fn bind(path: &Path, folder: Folder) -> Result<Self, EndpointError> {
        let bytes = path.as_os_str().len();
        if bytes > PATH_BYTES_MAX {
            return Err(EndpointError::PathTooLong { path: path.to_owned(), bytes });
        }
        prepare_folder(path, folder)?;
        let lock = take_lock(path)?;
        clear_stale(path)?;
        let socket = bind_private(path)?;
        let metadata = fs::symlink_metadata(path).map_err(failed("look at", path))?;
        rustix::net::listen(&socket, BACKLOG).map_err(failed("listen", path))?;
        Ok(Self {
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
            listener: UnixListener::from(socket),
            _lock: lock,
        })
    }

    /// Where clients connect.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The listening socket, for the runtime that this is called in.
    pub(super) fn tokio_listener(&self) -> Result<tokio::net::UnixListener, EndpointError> {
        let listener = self.listener.try_clone().map_err(failed("duplicate", &self.path))?;
        tokio::net::UnixListener::from_std(listener).map_err(failed("watch", &self.path))
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours {
            // Nothing is left to tell anybody who could act on a failure.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn failed<E: Into<io::Error>>(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> EndpointError {
    let path = path.to_owned();
    move |error| EndpointError::Io { action, path, source: error.into() }
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn prepare_folder(path: &Path, folder: Folder) -> Result<(), EndpointError> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let Some(parent) = parent else { return Ok(()) };
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(parent).map_err(failed("make folder", parent))?;
    if folder == Folder::AsFound {
        return Ok(());
    }
    let metadata = fs::symlink_metadata(parent).map_err(failed("look at", parent))?;
    if metadata.uid() != own_uid() {
        return Err(EndpointError::Foreign { path: parent.to_owned(), uid: metadata.uid() });
    }
    if metadata.mode() & 0o077 != 0 {
        let private = fs::Permissions::from_mode(0o700);
        fs::set_permissions(parent, private).map_err(failed("make private", parent))?;
    }
    Ok(())
}

/// The lock file lies beside the socket and is never removed: removing it would let two daemons
/// hold a lock each. It holds its owner's process id.
fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    PathBuf::from(name)
}

fn take_lock(path: &Path) -> Result<File, EndpointError> {
    let lock_path = lock_path(path);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mode = Mode::RUSR | Mode::WUSR;
    let lock = rustix::fs::open(&lock_path, flags, mode).map_err(failed("open", &lock_path))?;
    let mut lock = File::from(lock);
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let pid = pid_of_lock(&mut lock).or_else(|| pid_behind(path).ok().flatten());
            return Err(EndpointError::AlreadyRunning { path: path.to_owned(), pid });
        }
        Err(error) => return Err(failed("lock", &lock_path)(error)),
    }
    let pid = format!("{}\n", std::process::id());
    lock.set_len(0)
        .and_then(|()| lock.write_all(pid.as_bytes()))
        .map_err(failed("write", &lock_path))?;
    Ok(lock)
}

fn pid_of_lock(lock: &mut File) -> Option<i32> {
    let mut text = String::new();
    lock.rewind().ok()?;
    lock.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn new_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Who listens at `path`: `Ok(None)` is somebody whose process is not known.
///
/// # Errors
/// `CONNREFUSED` if nobody listens.
fn pid_behind(path: &Path) -> rustix::io::Result<Option<i32>> {
    let socket = new_socket()?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => {}
        // The queue of connections is full, so somebody has it.
        Err(Errno::AGAIN | Errno::INPROGRESS) => return Ok(None),
        Err(error) => return Err(error),
    }
    let peer = rustix::net::sockopt::socket_peercred(&socket);
    Ok(peer.ok().map(|peer| peer.pid.as_raw_nonzero().get()))
}

/// Removes what a daemon of ours left behind when it was killed. We hold the lock.
fn clear_stale(path: &Path) -> Result<(), EndpointError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at", path)(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(EndpointError::NotASocket { path: path.to_owned() });
    }
    if metadata.uid() != own_uid() {
        return Err(EndpointError::Foreign { path: path.to_owned(), uid: metadata.uid() });
    }
    match pid_behind(path) {
        Ok(pid) => Err(EndpointError::AlreadyRunning { path: path.to_owned(), pid }),
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed("remove stale", path)),
        Err(error) => Err(failed("connect to", path)(error)),
    }
}

/// Binds with mode 0600 from the first moment: Linux gives the file the mode of the unbound socket
/// (less the umask). Where a system does not, the mode is set before `listen`, and until then every
/// connection is refused.
fn bind_private(path: &Path) -> Result<OwnedFd, EndpointError> {
    let private = Mode::RUSR | Mode::WUSR;
    let socket = new_socket().map_err(failed("make a socket for", path))?;
    rustix::fs::fchmod(&socket, private).map_err(failed("make private", path))?;
    let address = SocketAddrUnix::new(path).map_err(failed("name", path))?;
    rustix::net::bind(&socket, &address).map_err(failed("bind", path))?;
    let mode = fs::symlink_metadata(path).map_err(failed("look at", path))?.mode();
    if mode & 0o777 != 0o600 {
        rustix::fs::chmod(path, private).map_err(failed("make private", path))?;
    }
    Ok(socket)
}
