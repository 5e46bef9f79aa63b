"""What a store can do, asked once when its backend is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capability:
    """What one store can do. Upper layers ask this and never the store's protocol."""

    writes: bool = True
    # False: folders are mere prefixes of keys, and an empty one exists only as a marker or in our index.
    real_directories: bool = True
    renames_files: bool = False
    renames_directories: bool = False
    copies: bool = False
    # The new object appears whole or not at all, even where an old one stands.
    replaces_atomically: bool = True
    sets_mtime: bool = False
    # False: the true modification time costs a request for each object (S3 keeps it in user metadata).
    lists_mtime: bool = True
    reads_ranges: bool = True
    # True: `open_file` gives a real descriptor, which sendfile can send.
    opens_files: bool = False
    # True: `stat`, `list` and `open_file` ask the system alone and need not be waited for.
    answers_at_once: bool = False
    # False: each process has one of its own under the same URL.
    is_shared: bool = True
    # Bytes of the largest object, and of the largest whose size is not known when its upload begins; None: no limit.
    largest: int | None = None
    largest_streamed: int | None = None
    # True: `chmod` changes the access rights of files and folders.
    sets_mode: bool = False


READ_ONLY = Capability(writes=False)

# What fsspec's generic filesystems can do beyond reading; a protocol that is not here is taken for an object store
# that replaces whole objects. http(s), zip and the like only read.
GENERIC: dict[str, Capability] = {
    "memory": Capability(copies=True, is_shared=False),
    "sftp": Capability(renames_files=True, renames_directories=True, sets_mtime=False),
    "ssh": Capability(renames_files=True, renames_directories=True, sets_mtime=False),
    "smb": Capability(renames_files=True, renames_directories=True),
    "ftp": Capability(renames_files=True, renames_directories=True, replaces_atomically=True),
    "hdfs": Capability(renames_files=True, renames_directories=True),
    "http": READ_ONLY,
    "https": READ_ONLY,
    "zip": READ_ONLY,
    "tar": READ_ONLY,
    "libarchive": READ_ONLY,
    "git": READ_ONLY,
    "github": READ_ONLY,
    "data": READ_ONLY,
}
OBJECT_STORE = Capability(real_directories=False, copies=True)
