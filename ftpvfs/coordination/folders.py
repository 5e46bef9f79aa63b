"""The folder in which processes meet: on a disk of this machine, and nobody else's to write to."""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
import sys
from pathlib import Path

from ftpvfs.errors import failure

MOUNTS = "/proc/self/mountinfo"
# What the kernel and FUSE call filesystems whose bytes are on other machines: locks and mapped memory do not hold
# there as they do on one machine. FUSE's own are told apart by what stands behind the point.
NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "ncp", "9p", "afs", "kafs", "auristorfs", "coda", "ceph", "lustre",
    "gpfs", "pvfs2", "orangefs", "beegfs", "glusterfs", "gfs", "gfs2", "ocfs2", "panfs", "wekafs", "vboxsf", "prl_fs",
    "davfs", "webdav", "afpfs", "acfs", "mfs", "moosefs", "lizardfs", "ibrix", "sshfs", "s3fs", "virtiofs",
}  # fmt: skip
NETWORK_FUSE = {
    "sshfs", "s3fs", "rclone", "glusterfs", "ceph", "ceph-fuse", "cephfs", "gcsfuse", "goofys", "mountpoint-s3",
    "juicefs", "seaweedfs", "weed", "blobfuse", "blobfuse2", "s3ql", "davfs", "davfs2", "curlftpfs", "ossfs", "cosfs",
    "mfs", "moosefs", "lizardfs", "httpfs", "httpdirfs", "nfs", "smbnetfs", "hdfs", "fuse_dfs", "alluxio-fuse",
    "geesefs", "riofs", "gvfsd-fuse", "kio-fuse", "portal", "dislocker-network", "objectivefs", "cvmfs2", "xtreemfs",
}  # fmt: skip
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OCTAL = re.compile(r"\\([0-7]{3})")


def private_folder(folder: Path) -> None:
    """Make the folder, for this user alone. OSError where it cannot be, or where it is not on this machine's own disk.

    Nobody else may look into it, nor put there what we would believe: where somebody could have, it is refused.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_private(folder)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def examine_private_folder(folder: Path) -> None:
    """Raise what `private_folder` would, as far as that can be seen; nothing is made or changed."""
    if folder.exists():
        _check_private(folder)
        return
    place = _existing(folder)
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"it cannot be made in {place}")
    _check_local(folder)


def _check_private(folder: Path) -> None:
    status, above = folder.stat(), folder.parent.stat()
    if os.geteuid() not in (0, status.st_uid):
        raise PermissionError(errno.EPERM, "it belongs to another user")
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise PermissionError(errno.EPERM, f"everybody may put another in its place (see the mode of {folder.parent})")
    if status.st_mode & OTHERS_WRITE and any(folder.iterdir()):
        raise PermissionError(errno.EPERM, "others may have put there what is in it (its mode should be 0700)")
    _check_local(folder)


def _check_local(folder: Path) -> None:
    kind = network_filesystem(folder)
    if kind is not None:
        raise OSError(errno.EOPNOTSUPP, f"it is on a network file system ({kind}), where locks do not hold")


def unusable(folder: Path, error: OSError) -> OSError:
    """Return what to raise for a folder that cannot be used."""
    return failure(error.errno or errno.EIO, str(folder), f"The cache folder cannot be used: {error.strerror or error}")


def is_network_filesystem(path: str | Path) -> bool:
    """Tell whether the bytes at the path, which need not exist, are on another machine; False where nobody can say."""
    return network_filesystem(path) is not None


def network_filesystem(path: str | Path) -> str | None:
    """Return the name of the network file system that the path is on; None for a disk of this machine."""
    kind = filesystem_type(path)
    if kind is None:
        return None
    fuse, _, program = kind.partition(".")
    if fuse in {"fuse", "fuseblk"} and program:
        return kind if program.lower() in NETWORK_FUSE else None
    return kind if kind.lower() in NETWORK else None


def may_hang(path: str | Path) -> bool:
    """Tell whether another machine, or a program of this one, answers for what is at the path."""
    kind = filesystem_type(path)
    return kind is not None and (kind.startswith("fuse.") or kind.lower() in NETWORK)


def filesystem_type(path: str | Path) -> str | None:
    """Return what the system calls the file system of the path; None where it does not say."""
    place = _existing(Path(path).resolve())
    try:
        device = place.stat().st_dev
        with open(MOUNTS, encoding="utf-8", errors="surrogateescape") as mounts:
            return type_in_mounts(mounts.read(), str(place), device)
    except OSError:
        return _type_by_mount_program(str(place)) if sys.platform == "darwin" else None


def type_in_mounts(table: str, place: str, device: int) -> str | None:
    """Return the type of the file system that holds `place`, from a table as in /proc/self/mountinfo.

    The mount with the longest path above it counts; the last of those that lie on each other, and rather one with the
    device's number than another.

    >>> table = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\\n2 1 0:40 / /mnt/a\\\\040b rw - nfs4 host:/x rw\\n"
    >>> type_in_mounts(table, "/mnt/a b/c", 40), type_in_mounts(table, "/mnt/other", 2049)
    ('nfs4', 'ext4')
    """
    found: tuple[int, bool, str] | None = None
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in table.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if not separator or len(fields) < 5:
            continue
        mounted = OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
        if place != mounted and not place.startswith(mounted.rstrip("/") + "/"):
            continue
        candidate = (len(mounted), fields[2] == number, kinds[0])
        if found is None or candidate[:2] >= found[:2]:
            found = candidate
    return None if found is None else found[2]


def _existing(path: Path) -> Path:
    """Return the path, or the nearest above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


@functools.lru_cache(maxsize=64)
def _type_by_mount_program(place: str) -> str | None:
    """Ask macOS's `mount`, whose lines read `//host/x on /Volumes/x (smbfs, ...)`."""
    import subprocess

    listing = subprocess.run(["/sbin/mount"], capture_output=True, text=True, check=False, timeout=10).stdout
    best, kind = -1, None
    for match in re.finditer(r" on (.+) \((\w+)", listing):
        mounted = match[1].rstrip("/")
        if (place == mounted or place.startswith(mounted + "/")) and len(mounted) > best:
            best, kind = len(mounted), match[2]
    return kind
