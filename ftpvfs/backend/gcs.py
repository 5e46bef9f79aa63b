"""Google Cloud Storage through gcsfs.

Requests go through gcsfs's own request method, one JSON API call each: conditional reads by generation, resumable
uploads that can be given up, and metadata, which the file interface hides. https://cloud.google.com/storage/docs/json_api
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import io
import json
import logging
import re
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

import aiohttp
from gcsfs.core import GCSFileSystem, quote

from ftpvfs import paths
from ftpvfs.backend.backend import (
    ABSENT,
    ANY,
    UNCACHED,
    Backend,
    Condition,
    Entry,
    FileUpload,
    Pieces,
    Tuning,
    Upload,
    not_replaceable,
)
from ftpvfs.backend.capability import Capability
from ftpvfs.backend.checksum import Checksum
from ftpvfs.backend.errors import CHANGED, NO_BUCKET, is_transient
from ftpvfs.backend.objectstore import ListedPage, ObjectStoreBackend, PartsFile, PartsUpload, Slice, bytes_of, md5
from ftpvfs.backend.options import check_options
from ftpvfs.errors import failure

logger = logging.getLogger(__name__)

MIB = 2**20
# The chunks of a resumable upload must be multiples of this.
CHUNK_UNIT = 2**18
RESUME_INCOMPLETE = 308
# rclone's and gsutil's metadata keys, so that all agree on times: RFC 3339, and whole seconds since the epoch.
MTIME = "mtime"
MTIME_GSUTIL = "goog-reserved-file-mtime"
# What no key can begin with: https://cloud.google.com/storage/docs/objects#naming
RESERVED = ".well-known/acme-challenge/"
FIELDS = "name,size,generation,updated,md5Hash,crc32c,metadata"
# What a rewrite with new metadata would otherwise lose; access lists are the target bucket's.
KEPT_FIELDS = (
    "contentType", "cacheControl", "contentDisposition", "contentEncoding", "contentLanguage", "customTime",
    "storageClass",
)  # fmt: skip
# GCS's own limit of an object: https://cloud.google.com/storage/quotas#objects
LARGEST = 5 * 2**40
RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d)?$")


class OneTryGCSFileSystem(GCSFileSystem):
    """gcsfs without its own six tries, so that ours are the only ones.

    The class is gcsfs's core one: the experimental one asks for the bucket's type over gRPC and hangs for a minute at
    every emulator.
    """

    _request = GCSFileSystem._request.__wrapped__


class GCSBackend(ObjectStoreBackend):
    """A bucket or a prefix of one. Any thread; not carried across a fork."""

    capability = Capability(
        real_directories=False, copies=True, sets_mtime=True, largest=LARGEST, largest_streamed=LARGEST
    )

    @classmethod
    def from_url(cls, url: str, storage_options: dict[str, Any], tuning: Tuning) -> Backend:
        """Make the backend; nothing is asked of the store yet."""
        cls.examine(url, storage_options, tuning)
        return cls(url, GCSFileSystem._strip_protocol(url), storage_options, tuning)

    @classmethod
    def examine(cls, url: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
        check_options(url, storage_options)
        if not GCSFileSystem._strip_protocol(url):
            raise ValueError(f"{url}: the URL names no bucket; write gs://bucket or gs://bucket/prefix")

    def __init__(self, url: str, root: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
        super().__init__(url, root, storage_options, tuning)
        # A plain number would bound the whole request, however well it gets on.
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=tuning.connect_timeout, sock_read=tuning.read_timeout
        )
        with self.errors(self.display):
            options = {"requests_timeout": timeout, **UNCACHED, **storage_options}
            # What is stored with `Content-Encoding: gzip` is read as it is stored, with the size and hash it has there.
            options["session_kwargs"] = {**options.get("session_kwargs", {}), "auto_decompress": False}
            self.fs = OneTryGCSFileSystem(**options)

    def close(self) -> None:
        if self.fs._session is not None:
            asyncio.run_coroutine_threadsafe(self.fs._session.close(), self.fs.loop)

    async def call(
        self,
        method: str,
        url: str,
        *names: str,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Make one request; `names` fill the URL's `{}`; return status, headers and body as they were sent.

        308 (Resume Incomplete) comes back as it is: without a Location, aiohttp takes it for no redirect.
        """
        body = None if data is None else io.BytesIO(data)  # aiohttp sends it in pieces, and large bytes in one
        # Nothing unpacks what comes (`auto_decompress` is off), so nothing is to be packed for the way either.
        headers = {"Accept-Encoding": "identity", **(headers or {})}
        request = self.fs._request(method, url, *names, data=body, headers=headers, **arguments)
        try:
            status, headers, _, content = await (self.within_time(len(data), request) if data else request)
        except FileExistsError:  # gcsfs's name for 412
            raise failure(CHANGED.code, url, CHANGED.reason) from None  # the cause would be taken for the error
        return status, headers, content

    async def json(self, method: str, url: str, *names: str, **arguments: Any) -> dict[str, Any]:
        """Make one request and return its JSON answer."""
        return json.loads((await self.call(method, url, *names, **arguments))[2] or b"{}")  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _about_bucket(self) -> Iterator[None]:
        """A request inside is about the bucket alone: 404 says that there is none."""
        try:
            yield
        except FileNotFoundError:
            raise failure(NO_BUCKET.code, self.display, NO_BUCKET.reason) from None  # the cause would be taken for it

    def check_name(self, path: str) -> None:
        super().check_name(path)
        if self.folder_key(path).startswith(RESERVED):
            raise failure(errno.EINVAL, path, f"No name in this store can begin with {RESERVED}")

    # --- reading

    async def pages(self, prefix: str, *, delimiter: str, limit: int | None = None) -> AsyncIterator[ListedPage]:
        arguments = {
            "prefix": prefix or None,
            "delimiter": delimiter or None,
            "maxResults": limit + 1 if limit else 1000,
            "fields": f"items({FIELDS}),prefixes,nextPageToken",
        }
        while True:
            with self._about_bucket():
                answer = await self.retry.acall(lambda: self.json("GET", "b/{}/o", self.bucket, **arguments))
            yield self._page(answer, prefix)
            if limit or not answer.get("nextPageToken"):
                return
            arguments["pageToken"] = answer["nextPageToken"]

    def _page(self, answer: Mapping[str, Any], prefix: str) -> ListedPage:
        cut = len(prefix)
        items = answer.get("items", ())
        entries = [self._entry(item["name"][cut:], item) for item in items if item["name"] != prefix]
        folders = [Entry(name[cut:-1], is_dir=True) for name in answer.get("prefixes", ())]
        return ListedPage(entries + folders, has_marker=bool(prefix) and any(item["name"] == prefix for item in items))

    def _entry(self, name: str, item: Mapping[str, Any]) -> Entry:
        updated = _seconds(item["updated"])
        mtime = updated if self.tuning.server_mtime else _stored_mtime(item.get("metadata", {}), updated)
        size, generation = int(item.get("size", 0)), str(item["generation"])
        return Entry(name, False, size, mtime, generation, digest=_digest_of(item))

    async def head(self, path: str) -> Entry:
        item = await self.json("GET", "b/{}/o/{}", self.bucket, self.key(path), fields=FIELDS)
        return self._entry(paths.split(path)[1], item)

    async def read(self, path: str, start: int, stop: int, fingerprint: str | None) -> Pieces:
        _, headers, data = await self.call(
            "GET", f"{self.fs._location}/download/storage/v1/b/{{}}/o/{{}}", self.bucket, self.key(path),
            alt="media", ifGenerationMatch=fingerprint,
            # Else the store itself unpacks what is stored as gzip, and knows no ranges of it:
            # https://cloud.google.com/storage/docs/transcoding
            headers={"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "gzip"},
        )  # fmt: skip
        # fake-gcs-server heeds no condition here, but says which version it sends, as the real service does.
        if fingerprint is not None and headers.get("X-Goog-Generation", fingerprint) != fingerprint:
            raise failure(CHANGED.code, path, CHANGED.reason)
        if len(data) != stop - start:
            raise ConnectionResetError(errno.ECONNRESET, f"{len(data)} of {stop - start} bytes arrived")
        return [data]

    def checksum(self, entry: Entry) -> Checksum | None:
        algorithm, _, value = (entry.digest or "").partition("=")
        return Checksum(algorithm, base64.b64decode(value)) if value else None

    async def hash_of(self, path: str, entry: Entry) -> Checksum | None:
        item = await self.json(
            "GET", "b/{}/o/{}", self.bucket, self.key(path), generation=entry.fingerprint, fields=FIELDS
        )
        return self.checksum(self._entry(entry.name, item))

    # --- writing

    def upload(
        self, path: str, *, mtime: float | None = None, size: int | None = None, replaces: Condition = ANY
    ) -> Upload:
        return GCSUpload(self, path, mtime, replaces)

    def upload_file(
        self, path: str, descriptor: int, size: int, *, mtime: float | None = None, replaces: Condition = ANY
    ) -> FileUpload:
        return PartsFile(GCSUpload(self, path, mtime, replaces), descriptor, size)

    async def put(self, path: str, data: bytes, mtime: float | None, replaces: Condition = ANY) -> Entry:
        item: dict[str, Any] = {"name": self.key(path), "metadata": _metadata(mtime)}
        digest = base64.b64encode(md5(data)).decode() if self.tuning.verify else None
        if digest:
            item["md5Hash"] = digest  # the store refuses other bytes
        # https://cloud.google.com/storage/docs/uploading-objects#uploading-an-object
        name = secrets.token_hex(16)  # no file can have it in it, not even this one
        boundary = f"--{name}".encode()
        body = b"\r\n".join((
            boundary, b"Content-Type: application/json; charset=UTF-8", b"", json.dumps(item).encode(),
            boundary, b"Content-Type: application/octet-stream", b"", data,
            boundary + b"--", b"",
        ))  # fmt: skip
        try:
            with self._about_bucket():
                answer = await self.json(
                    "POST",
                    self.upload_url(),
                    uploadType="multipart",
                    ifGenerationMatch=_generation(replaces),
                    headers={"Content-Type": f'multipart/related; boundary="{name}"'},
                    data=body,
                )
        except Exception as error:
            if not self.is_refusal(error, path, replaces):
                raise
            return await self.our_own(path, replaces, digest or base64.b64encode(md5(data)).decode(), mtime)
        return self.stored(path, answer, len(data), digest)

    async def our_own(self, path: str, replaces: Condition, digest: str | None, mtime: float | None) -> Entry:
        """Return the entry of the object that stands in the way where it is what was sent; else raise ECHANGED.

        An earlier try may have got through with its answer lost, even one of a process that is no more.
        """
        try:
            item = await self.json("GET", "b/{}/o/{}", self.bucket, self.key(path), fields=FIELDS)
        except FileNotFoundError:
            raise not_replaceable(path, replaces) from None
        wanted = _metadata(mtime)
        agrees = {name: item.get("metadata", {}).get(name) for name in wanted} == wanted
        if digest is None or item.get("md5Hash") != digest or not agrees:
            raise not_replaceable(path, replaces)
        return self._entry(paths.split(path)[1], item)

    def upload_url(self) -> str:
        """Return where new objects of the bucket are sent."""
        return f"{self.fs._location}/upload/storage/v1/b/{quote(self.bucket)}/o"

    def stored(self, path: str, item: Mapping[str, Any], size: int, digest: str | None) -> Entry:
        """Return the entry of the new object `item`, once it has the size and the MD5 (base64) of what was sent."""
        entry = self._entry(paths.split(path)[1], item)
        if entry.size != size:
            raise failure(errno.EIO, path, f"The store has {entry.size} bytes of {size} that were sent")
        found = item.get("md5Hash", digest)
        if digest and found != digest:
            raise failure(errno.EIO, path, f"The store has other bytes than were sent (MD5 {found}, ours {digest})")
        return entry

    async def delete(self, path: str, only: str | None = None) -> None:
        try:
            await self.call("DELETE", "b/{}/o/{}", self.bucket, self.key(path), ifGenerationMatch=only)
        except FileNotFoundError:  # as on S3: an earlier try's answer may have been lost; or there is no bucket
            self._is_bucket_seen = False
            await self.require_bucket()

    async def duplicate(self, source: str, target: str, mtime: float | None) -> Entry:
        if source == target:
            return await self._patch(source, mtime)
        item = await self.json("GET", "b/{}/o/{}", self.bucket, self.key(source))
        entry = self._entry(paths.split(source)[1], item)
        metadata = item.get("metadata", {})
        body: dict[str, Any] = {name: item[name] for name in KEPT_FIELDS if name in item}
        # The copy's own time is now, so the source's must go into the metadata or be lost.
        kept_mtime = _stored_mtime(metadata, _seconds(item["updated"])) if mtime is None else mtime
        body["metadata"] = {**metadata, **_metadata(kept_mtime)}
        token: str | None = None
        while True:  # large objects are copied in several calls
            answer = await self.json(
                "POST", "b/{}/o/{}/rewriteTo/b/{}/o/{}",
                self.bucket, self.key(source), self.bucket, self.key(target),
                json=body, rewriteToken=token, ifSourceGenerationMatch=entry.fingerprint,
            )  # fmt: skip
            if answer.get("done", True):
                break
            token = answer["rewriteToken"]
        copied = await self.head(target)
        if copied.size != entry.size:
            raise failure(errno.EIO, target, f"The copy has {copied.size} bytes instead of {entry.size}")
        return copied

    async def _patch(self, path: str, mtime: float | None) -> Entry:
        item = await self.json(
            "PATCH", "b/{}/o/{}", self.bucket, self.key(path), json={"metadata": _metadata(mtime)}
        )
        return self._entry(paths.split(path)[1], item)


class GCSUpload(PartsUpload):
    """A resumable upload. Its chunks are taken in order, so one is on its way while the next one fills.

    https://cloud.google.com/storage/docs/performing-resumable-uploads
    """

    backend: GCSBackend
    concurrency = 1
    ends_with_part = False

    def __init__(
        self, backend: GCSBackend, path: str, mtime: float | None, replaces: Condition
    ) -> None:
        super().__init__(backend, path, mtime, replaces)
        # Touched on the event loop alone.
        self._location: str | None = None
        self._digest = hashlib.md5(usedforsecurity=False)
        self._hashed = 0

    def part_size(self, number: int) -> int:
        return 16 * MIB  # a multiple of CHUNK_UNIT; there is no limit to their number

    async def send(self, number: int, offset: int, data: bytes | Slice) -> None:
        body = bytes_of(data) if isinstance(data, bytes) else await asyncio.to_thread(bytes_of, data)
        if self._location is None:
            self._location = await self._begin()
        if self._hashed == offset:  # not so when the part is sent again
            await asyncio.to_thread(self._digest.update, body)
            self._hashed += len(body)
        await self._chunk(body, offset)

    async def _begin(self) -> str:
        """Begin the upload; return the URL of its session."""
        with self.backend._about_bucket():
            _, headers, _ = await self.backend.call(
                "POST", self.backend.upload_url(), uploadType="resumable", name=self.backend.key(self.path),
                ifGenerationMatch=_generation(self.replaces),
                json={"name": self.backend.key(self.path), "metadata": _metadata(self.mtime)},
                headers={"X-Upload-Content-Type": "application/octet-stream"},
            )  # fmt: skip
        return headers["Location"]

    async def _chunk(
        self, data: bytes, offset: int, total: int | None = None, digest: str | None = None
    ) -> dict[str, Any]:
        """Send bytes at `offset`; a `total` ends the upload and publishes the object, if it has the MD5 `digest`.

        A chunk whose answer was lost is sent again as a whole, as Google's own Go client does: the store skips what it
        has already. (fake-gcs-server appends it a second time; the check of size and MD5 tells.)
        """
        assert self._location is not None
        stop = offset + len(data)
        span = f"{offset}-{stop - 1}" if data else "*"
        headers = {"Content-Range": f"bytes {span}/{'*' if total is None else total}"}
        if digest is not None:
            headers["X-Goog-Hash"] = f"md5={digest}"
        status, answer, body = await self.backend.call("PUT", self._location, headers=headers, data=data)
        if status != RESUME_INCOMPLETE:
            return json.loads(body or b"{}")  # type: ignore[no-any-return]
        taken = int(answer["Range"].rpartition("-")[2]) + 1 if "Range" in answer else 0
        if taken >= stop and total is None:
            return {}
        if taken <= offset:
            raise ConnectionResetError(errno.ECONNRESET, "The store took nothing of a chunk")
        return await self._chunk(data[taken - offset :], taken, total, digest)

    async def finish(self, parts: list[Any], rest: bytes) -> Entry:
        size = self.size + len(rest)
        digest = None
        if self.backend.tuning.verify:
            whole = self._digest.copy()
            await asyncio.to_thread(whole.update, rest)
            digest = base64.b64encode(whole.digest()).decode()
        try:
            # The service holds a session to its condition; fake-gcs-server knows conditions for single requests alone.
            await self.backend.require_now(self.path, self.replaces)
            item = await self._chunk(rest, self.size, size, digest)
        except Exception as error:
            if self.backend.is_refusal(error, self.path, self.replaces):
                return await self.backend.our_own(self.path, self.replaces, digest, self.mtime)
            if self.backend.translated(error, self.path).errno != errno.ENOENT:
                raise
            item = await self._finished(digest)
        return self.backend.stored(self.path, item, size, digest)

    async def _finished(self, digest: str | None) -> dict[str, Any]:
        """Return the object after its session is gone: an earlier try may have finished it, its answer lost."""
        key = self.backend.key(self.path)
        item = await self.backend.json("GET", "b/{}/o/{}", self.backend.bucket, key, fields=FIELDS)
        if digest is None or item.get("md5Hash") != digest:
            raise failure(errno.EIO, self.path, "The store has forgotten the upload")
        return item

    async def discard(self) -> None:
        if self._location is None:
            return
        try:
            await self.backend.call("DELETE", self._location)  # 499, which gcsfs takes for no error, says it is done
        except Exception as error:
            # An emulator may not know the call (fake-gcs-server), and a session without an end goes after a week.
            if is_transient(error):
                raise
            logger.debug("giving up the upload session of %r: %s", self.path, type(error).__name__)


def _generation(replaces: Condition) -> str | None:
    if replaces is ANY:
        return None
    return "0" if replaces is ABSENT else str(replaces)


def _digest_of(item: Mapping[str, Any]) -> str | None:
    """Return the hash of an object as `X-Goog-Hash` writes it; composed objects have no MD5."""
    for algorithm, name in (("md5", "md5Hash"), ("crc32c", "crc32c")):
        if item.get(name):
            return f"{algorithm}={item[name]}"
    return None


def _metadata(mtime: float | None) -> dict[str, str]:
    if mtime is None:
        return {}
    whole = int(mtime // 1)
    moment = datetime.fromtimestamp(whole, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    return {MTIME: f"{moment}.{round((mtime - whole) * 1e9):09d}Z", MTIME_GSUTIL: str(whole)}


def _seconds(text: str) -> float:
    """Return seconds since the epoch of an RFC 3339 time with any number of digits and any offset.

    Python 3.10 wants exactly three or six digits of a second; rclone writes nine, in the zone of its machine.
    """
    match = RFC3339.match(text)
    if match is None:
        raise ValueError(f"{text!r} is no RFC 3339 time")
    day, clock, fraction, zone = match.groups()
    zone = "+00:00" if zone in (None, "Z", "z") else zone
    return datetime.fromisoformat(f"{day}T{clock}{zone}").timestamp() + float(fraction or 0)


def _stored_mtime(metadata: Mapping[str, str], otherwise: float) -> float:
    try:
        return _seconds(metadata[MTIME])
    except (KeyError, ValueError):
        pass
    try:
        return float(metadata[MTIME_GSUTIL])
    except (KeyError, ValueError):
        return otherwise
