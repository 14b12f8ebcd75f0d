//! The socket in the file system: owner, permissions, stale and live neighbours.

use crate::served::Served;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use tandem::server::{
    EXIT_ALREADY_RUNNING, Endpoint, EndpointError, Folder, PATH_BYTES_MAX, default_socket,
};
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("a file").mode() & 0o777
}

fn bind(path: &Path) -> Result<Endpoint, EndpointError> {
    Endpoint::bind(path, Folder::AsFound)
}

#[test]
fn the_default_path_lies_in_the_runtime_directory() {
    let path = default_socket(Some(OsStr::new("/run/user/7"))).expect("a path");
    assert_eq!(path, PathBuf::from("/run/user/7/tandem/tandem.sock"));
    let uid = rustix::process::geteuid().as_raw();
    for none in [None, Some(OsStr::new("")), Some(OsStr::new("relative"))] {
        let path = default_socket(none).expect("a folder of our own");
        assert_eq!(path, PathBuf::from(format!("/tmp/tandem-{uid}/tandem.sock")));
    }
}

#[test]
fn folder_and_socket_are_private_whatever_the_umask() {
    let folder = folder();
    let path = folder.path().join("a/tandem/tandem.sock");
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    let bound = Endpoint::bind(&path, Folder::Private);
    rustix::process::umask(umask);
    let endpoint = bound.expect("a free path");
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().expect("a folder")), 0o700);
    assert_eq!(mode(&folder.path().join("a/tandem/tandem.sock.lock")), 0o600);
    assert_eq!(endpoint.path(), path);
}

#[test]
fn a_private_folder_is_tightened_and_a_users_own_is_left_alone() {
    let folder = folder();
    let open = |name: &str| {
        let path = folder.path().join(name);
        fs::create_dir(&path).expect("a folder");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("ours");
        path
    };
    let (private, as_found) = (open("private"), open("as_found"));
    let _first = Endpoint::bind(&private.join("s"), Folder::Private).expect("a free path");
    let _second = Endpoint::bind(&as_found.join("s"), Folder::AsFound).expect("a free path");
    assert_eq!((mode(&private), mode(&as_found)), (0o700, 0o755));
}

#[test]
fn a_second_daemon_is_told_who_the_first_is() {
    let served = Served::start(|_| vec![]);
    let error = bind(&served.path).expect_err("taken");
    assert_eq!(error.exit_status(), 75);
    assert_eq!(EXIT_ALREADY_RUNNING, 75);
    let own = std::process::id();
    assert!(error.to_string().contains(&own.to_string()), "{error}");
    let EndpointError::AlreadyRunning { pid, .. } = error else { panic!("{error}") };
    assert_eq!(pid, Some(own as i32));
    served.connect().ping();
}

#[test]
fn of_many_daemons_that_start_at_once_one_serves() {
    let folder = folder();
    let path = folder.path().join("s");
    let bound: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| bind(&path))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert_eq!(bound.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    for error in bound.iter().filter_map(|outcome| outcome.as_ref().err()) {
        assert_eq!(error.exit_status(), EXIT_ALREADY_RUNNING, "{error}");
    }
    assert!(UnixStream::connect(&path).is_ok());
}

#[test]
fn a_stale_socket_is_replaced() {
    let folder = folder();
    let path = folder.path().join("s");
    drop(UnixListener::bind(&path).expect("a free path"));
    assert!(path.exists());
    let endpoint = bind(&path).expect("nobody listens");
    assert!(UnixStream::connect(&path).is_ok());
    drop(endpoint);
    assert!(!path.exists());
    bind(&path).expect("the lock file that stays is no obstacle");
}

#[test]
fn a_live_socket_is_never_replaced_even_without_its_lock() {
    let folder = folder();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).expect("a free path");
    let inode = fs::metadata(&path).expect("a socket").ino();
    let error = bind(&path).expect_err("somebody listens");
    let EndpointError::AlreadyRunning { pid, .. } = error else { panic!("{error}") };
    assert_eq!(pid, Some(std::process::id() as i32));
    assert_eq!(fs::metadata(&path).expect("a socket").ino(), inode);
    drop(listener);
}

#[test]
fn what_is_no_socket_or_not_ours_is_left_alone() {
    let folder = folder();
    let path = folder.path().join("s");
    fs::write(&path, "precious").expect("writable");
    let error = bind(&path).expect_err("a file");
    assert!(matches!(error, EndpointError::NotASocket { .. }), "{error}");
    assert_eq!(fs::read_to_string(&path).expect("still there"), "precious");
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can make another user's socket");
        return;
    }
    let path = folder.path().join("foreign");
    drop(UnixListener::bind(&path).expect("a free path"));
    std::os::unix::fs::chown(&path, Some(65_534), None).expect("root may");
    let error = bind(&path).expect_err("another user's");
    assert!(matches!(error, EndpointError::Foreign { uid: 65_534, .. }), "{error}");
    assert!(path.exists());
}

#[test]
fn a_path_of_107_bytes_is_served_and_one_more_is_refused_with_the_reason() {
    let folder = folder();
    let start = folder.path().as_os_str().len() + 1;
    let longest = folder.path().join("x".repeat(PATH_BYTES_MAX - start));
    let _endpoint = bind(&longest).expect("short enough");
    assert!(UnixStream::connect(&longest).is_ok());
    let error = bind(&folder.path().join("x".repeat(108 - start))).expect_err("too long");
    assert!(
        error.to_string().contains("108 bytes") && error.to_string().contains("107"),
        "{error}"
    );
}

#[test]
fn a_socket_that_is_no_longer_ours_is_not_removed() {
    let folder = folder();
    let path = folder.path().join("s");
    let endpoint = bind(&path).expect("a free path");
    fs::rename(&path, folder.path().join("away")).expect("ours");
    let successor = UnixListener::bind(&path).expect("a free path");
    drop(endpoint);
    assert!(UnixStream::connect(&path).is_ok());
    drop(successor);
}

#[test]
fn the_hello_says_who_speaks_and_what_is_taken() {
    let served = Served::start(|_| vec![]);
    let hello = crate::raw_client::RawClient::connect_silently(&served.path).json();
    let hello = &hello["hello"];
    assert_eq!(hello["protocol"], serde_json::json!({"major": 1, "minor": 0}));
    assert_eq!(hello["pid"], std::process::id());
    assert_eq!(hello["models"], serde_json::json!(["scripted"]));
    assert_eq!(hello["limits"]["frame_bytes_max"], 16 << 20);
    assert_eq!(hello["limits"]["json_depth_max"], 64);
    assert_eq!(hello["limits"]["queue_max"], 512);
    assert_eq!(hello["boot_id"].as_str().map(str::len), Some(32));
    let again = crate::raw_client::RawClient::connect_silently(&served.path).json();
    assert_eq!(again["hello"], *hello, "one life, one boot id");
}
