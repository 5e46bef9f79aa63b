"""Google Cloud Storage through gcsfs.

Requests go through gcsfs's own request method, one JSON API call each: conditional reads by generation, resumable uploads
that can be given up, and metadata, which the file interface hides. https://cloud.google.com/storage/docs/json_api
"""

from __future__ import annotations

import base64
import errno
import json
import logging
from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timezone
from typing import Any

from gcsfs.core import GCSFileSystem, quote

from ftpvfs import paths
from ftpvfs.backend.backend import UNCACHED, Backend, Entry, Tuning, Upload
from ftpvfs.backend.capability import Capability
from ftpvfs.backend.objectstore import ListedPage, ObjectStoreBackend, PartsUpload, md5
from ftpvfs.errors import failure

logger = logging.getLogger(__name__)

MIB = 2**20
# The chunks of a resumable upload must be multiples of this.
CHUNK_UNIT = 2**18
# rclone's and gsutil's metadata keys, so that all agree on times: RFC 3339, and whole seconds since the epoch.
MTIME = "mtime"
MTIME_GSUTIL = "goog-reserved-file-mtime"
FIELDS = "name,size,generation,updated,md5Hash,metadata"


class OneTryGCSFileSystem(GCSFileSystem):  # type: ignore[misc]
    """gcsfs without its own six tries, so that ours are the only ones.

    The class is gcsfs's core one: the experimental one asks for the bucket's type over gRPC and hangs for a minute at
    every emulator.
    """

    _request = GCSFileSystem._request.__wrapped__


class GCSBackend(ObjectStoreBackend):
    """A bucket or a prefix of one. Any thread; not carried across a fork."""

    capability = Capability(real_directories=False, copies=True, sets_mtime=True)

    @classmethod
    def from_url(cls, url: str, storage_options: dict[str, Any], tuning: Tuning) -> Backend:
        """Make the backend; nothing is asked of the store yet."""
        root = GCSFileSystem._strip_protocol(url)
        if not root:
            raise ValueError(f"{url}: the URL names no bucket; write gs://bucket or gs://bucket/prefix")
        return cls(url, root, storage_options, tuning)

    def __init__(self, url: str, root: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
        super().__init__(url, root, storage_options, tuning)
        with self.errors(url):
            self.fs = OneTryGCSFileSystem(**{"requests_timeout": tuning.read_timeout, **UNCACHED, **storage_options})

    async def call(self, method: str, url: str, *names: str, **arguments: Any) -> tuple[Mapping[str, str], bytes]:
        """Make one request; `names` fill the URL's `{}`; return headers and body."""
        _, headers, _, body = await self.fs._request(method, url, *names, **arguments)
        return headers, body

    async def json(self, method: str, url: str, *names: str, **arguments: Any) -> dict[str, Any]:
        """Make one request and return its JSON answer."""
        return json.loads((await self.call(method, url, *names, **arguments))[1] or b"{}")  # type: ignore[no-any-return]

    def check(self) -> None:
        try:
            self.ask("", lambda: self.json("GET", "b/{}/o", self.bucket, prefix=self.folder_key(""), maxResults=1))
        except OSError as error:
            reason = "No such bucket" if error.errno == errno.ENOENT else error.strerror
            raise failure(error.errno or errno.EIO, self.display, reason) from error

    # --- reading

    async def pages(self, prefix: str, *, delimiter: str, limit: int | None = None) -> AsyncIterator[ListedPage]:
        arguments = {
            "prefix": prefix or None,
            "delimiter": delimiter or None,
            "maxResults": limit + 1 if limit else 1000,
            "fields": f"items({FIELDS}),prefixes,nextPageToken",
        }
        while True:
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
        updated = datetime.fromisoformat(item["updated"].replace("Z", "+00:00")).timestamp()
        mtime = updated if self.tuning.server_mtime else _stored_mtime(item.get("metadata", {}), updated)
        return Entry(name, False, int(item.get("size", 0)), mtime, str(item["generation"]))

    async def head(self, path: str) -> Entry:
        item = await self.json("GET", "b/{}/o/{}", self.bucket, self.key(path), fields=FIELDS)
        return self._entry(paths.split(path)[1], item)

    async def read(self, path: str, start: int, stop: int, fingerprint: str | None) -> bytes:
        url = self.fs.url(paths.key(self.bucket, self.key(path)))
        _, data = await self.call(
            "GET", url, headers={"Range": f"bytes={start}-{stop - 1}"}, ifGenerationMatch=fingerprint
        )
        if len(data) != stop - start:
            raise ConnectionResetError(errno.ECONNRESET, f"{len(data)} of {stop - start} bytes arrived")
        return data

    # --- writing

    def upload(self, path: str, *, mtime: float | None = None, size: int | None = None) -> Upload:
        return GCSUpload(self, path, mtime)

    async def put(self, path: str, data: bytes, mtime: float | None) -> Entry:
        item: dict[str, Any] = {"name": self.key(path), "metadata": _metadata(mtime)}
        if self.tuning.verify:
            item["md5Hash"] = base64.b64encode(md5(data)).decode()  # the store refuses other bytes
        # https://cloud.google.com/storage/docs/uploading-objects#uploading-an-object
        boundary = b"--==ftpvfs=="
        body = b"\r\n".join((
            boundary, b"Content-Type: application/json; charset=UTF-8", b"", json.dumps(item).encode(),
            boundary, b"Content-Type: application/octet-stream", b"", data,
            boundary + b"--", b"",
        ))  # fmt: skip
        answer = await self.json(
            "POST",
            self._upload_url(),
            uploadType="multipart",
            headers={"Content-Type": 'multipart/related; boundary="==ftpvfs=="'},
            data=body,
        )
        return self._stored(path, answer, len(data), mtime)

    def _upload_url(self) -> str:
        return f"{self.fs._location}/upload/storage/v1/b/{quote(self.bucket)}/o"

    def _stored(self, path: str, answer: Mapping[str, Any], size: int, mtime: float | None) -> Entry:
        if int(answer.get("size", size)) != size:
            raise failure(errno.EIO, path, f"The store has {answer['size']} bytes of {size} that were sent")
        entry = self._entry(paths.split(path)[1], answer) if "updated" in answer else None
        generation = str(answer["generation"]) if "generation" in answer else None
        return entry or Entry(paths.split(path)[1], False, size, mtime, generation)

    async def delete(self, path: str) -> None:
        try:
            await self.call("DELETE", "b/{}/o/{}", self.bucket, self.key(path))
        except FileNotFoundError:
            pass  # as on S3: gone is gone, and an earlier try's answer may have been lost

    async def duplicate(self, source: str, target: str, mtime: float | None) -> Entry:
        if source == target:
            return await self._patch(source, mtime)
        item = await self.json("GET", "b/{}/o/{}", self.bucket, self.key(source))
        entry = self._entry(paths.split(source)[1], item)
        kept = ("contentType", "cacheControl", "contentDisposition", "contentEncoding", "contentLanguage", "storageClass")
        body: dict[str, Any] = {name: item[name] for name in kept if name in item}
        body["metadata"] = {**item.get("metadata", {}), **_metadata(entry.mtime)}
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
    """A resumable upload. Its chunks are taken in order, so one is on its way while the next one fills."""

    backend: GCSBackend
    concurrency = 1

    def __init__(self, backend: GCSBackend, path: str, mtime: float | None) -> None:
        super().__init__(backend, path, mtime)
        self._location: str | None = None  # touched on the event loop alone

    def part_size(self, number: int) -> int:
        return 16 * MIB  # a multiple of CHUNK_UNIT; there is no limit to their number

    async def send(self, number: int, offset: int, data: bytes) -> None:
        if self._location is None:
            headers, _ = await self.backend.call(
                "POST", self.backend._upload_url(), uploadType="resumable", name=self.backend.key(self.path),
                json={"name": self.backend.key(self.path), "metadata": _metadata(self.mtime)},
                headers={"X-Upload-Content-Type": "application/octet-stream"},
            )  # fmt: skip
            self._location = headers["Location"]
        await self._chunk(data, offset, total=None)

    async def _chunk(self, data: bytes, offset: int, total: int | None) -> dict[str, Any]:
        """Send bytes at `offset`; a `total` ends the upload and publishes the object.

        After an answer that was lost the store is asked how far it got (308 and Range), and only the rest is sent.
        """
        assert self._location is not None
        stop = offset + len(data)
        span = f"{offset}-{stop - 1}" if data else "*"
        headers = {"Content-Range": f"bytes {span}/{'*' if total is None else total}"}
        answer, body = await self.backend.call("PUT", self._location, headers=headers, data=data)
        if total is not None:
            return json.loads(body)  # type: ignore[no-any-return]
        taken = int(answer["Range"].rpartition("-")[2]) + 1 if "Range" in answer else 0
        if taken < stop:
            if taken <= offset:
                raise ConnectionResetError(errno.ECONNRESET, "The store took nothing of a chunk")
            return await self._chunk(data[taken - offset :], taken, None)
        return {}

    async def finish(self, parts: list[Any], rest: bytes) -> Entry:
        size = self.size + len(rest)
        answer = await self._chunk(rest, self.size, size)
        return self.backend._stored(self.path, answer, size, self.mtime)

    async def discard(self) -> None:
        if self._location is None:
            return
        try:
            await self.backend.call("DELETE", self._location)
        except Exception as error:  # 499 means cancelled; an emulator may not know the call, sessions end by themselves
            logger.debug("giving up the upload session of %r: %s", self.path, type(error).__name__)


def _metadata(mtime: float | None) -> dict[str, str]:
    if mtime is None:
        return {}
    whole = int(mtime // 1)
    moment = datetime.fromtimestamp(whole, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    return {MTIME: f"{moment}.{round((mtime - whole) * 1e9):09d}Z", MTIME_GSUTIL: str(whole)}


def _stored_mtime(metadata: Mapping[str, str], otherwise: float) -> float:
    try:
        text = metadata[MTIME]
        moment, _, fraction = text.rstrip("Z").partition(".")
        whole = datetime.fromisoformat(moment).replace(tzinfo=timezone.utc).timestamp()
        return whole + float(f"0.{fraction or 0}")
    except (KeyError, ValueError):
        pass
    try:
        return float(metadata[MTIME_GSUTIL])
    except (KeyError, ValueError):
        return otherwise
