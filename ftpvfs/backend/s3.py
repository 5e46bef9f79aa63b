"""S3 and what speaks its protocol, through s3fs.

Requests go through s3fs's `call_s3`, one botocore operation each, because the VFS needs what the file interface hides:
conditional reads, parts sent in parallel while a file arrives, user metadata, and copies above 5 GB.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import datetime, timezone
from typing import Any
from urllib.parse import unquote_plus
from xml.etree import ElementTree

import aiobotocore.session
import s3fs
from aiobotocore.parsers import AioResponseParserFactory, AioRestXMLParser
from botocore.exceptions import ClientError
from botocore.handlers import _handle_200_error
from botocore.utils import parse_timestamp

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
from ftpvfs.backend.errors import FORGOTTEN
from ftpvfs.backend.objectstore import ListedPage, ObjectStoreBackend, PartsFile, PartsUpload, Slice, bytes_of, md5
from ftpvfs.backend.options import check_options
from ftpvfs.errors import failure

logger = logging.getLogger(__name__)

MIB = 2**20
# asyncio receives this much at once, so that larger pieces would have to be joined.
PIECE = 2**18
# S3's own limits: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MAX_PARTS = 10_000
MAX_PART = 5 * 2**30
MAX_COPY = 5 * 2**30
# Four of them are on their way at once, and twice in memory each. 16 MiB take twice as much.
LEAST_PART = 8 * MIB
# Hashed on the event loop at once: 0.2 ms, about what a thread costs.
HASHED_INLINE = 2**17
# rclone's metadata key, so that both programs agree on times: seconds since the epoch with nanoseconds.
MTIME = "mtime"
# And the key of the MD5 (base64) that it keeps beside objects uploaded in parts.
MD5 = "md5chksum"
# What a copy with new metadata would otherwise lose.
# Access lists, tags (where a copy goes in parts) and object locks are the target bucket's.
KEPT_HEADERS = (
    "CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType", "Expires",
    "StorageClass", "ServerSideEncryption", "SSEKMSKeyId", "BucketKeyEnabled", "WebsiteRedirectLocation",
)  # fmt: skip
PLAIN_MD5 = re.compile(r'"?([0-9a-f]{32})(-\d+)?"?$')


def part_size(number: int) -> int:
    """Return how long a part of an upload of unknown size is: 16 GiB in the first 2,000, 5.2 TiB in all 10,000."""
    return LEAST_PART << 2 * (number // 2000)


class S3Backend(ObjectStoreBackend):
    """A bucket or a prefix of one at an S3 store. Any thread; not carried across a fork."""

    capability = Capability(
        real_directories=False, copies=True, sets_mtime=True, lists_mtime=False,
        largest=MAX_PARTS * MAX_PART, largest_streamed=sum(map(part_size, range(MAX_PARTS))),
    )  # fmt: skip
    copy_limit = MAX_COPY
    copy_part = 512 * MIB

    @classmethod
    def from_url(cls, url: str, storage_options: dict[str, Any], tuning: Tuning) -> Backend:
        """Make the backend; nothing is asked of the store yet."""
        cls.examine(url, storage_options, tuning)
        return cls(url, s3fs.S3FileSystem._strip_protocol(url), storage_options, tuning)

    @classmethod
    def examine(cls, url: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
        check_options(url, storage_options)
        if not s3fs.S3FileSystem._strip_protocol(url):
            raise ValueError(f"{url}: the URL names no bucket; write s3://bucket or s3://bucket/prefix")

    def __init__(self, url: str, root: str, storage_options: Mapping[str, Any], tuning: Tuning) -> None:
        super().__init__(url, root, storage_options, tuning)
        options = dict(storage_options)
        config = {
            "connect_timeout": tuning.connect_timeout,
            "read_timeout": tuning.read_timeout,
            "retries": {"total_max_attempts": 1},  # ours are the only retries
            # Newer botocore adds CRC trailers that many S3-compatible stores refuse; ours are MD5 and ETag.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "max_pool_connections": 64,
        }
        options["config_kwargs"] = {**config, **options.get("config_kwargs", {})}
        self.fs = s3fs.S3FileSystem(session=_session(options.pop("profile", None)), **{**UNCACHED, **options})
        self.fs.retries = 1

    def close(self) -> None:
        if self.fs._s3 is not None:
            self.fs.close_session(self.fs.loop, self.fs._s3creator)

    async def call(self, operation: str, path: str | None = None, **arguments: Any) -> dict[str, Any]:
        """Make one botocore request in the bucket, on the object at `path` where it is given."""
        if path is not None:
            arguments["Key"] = self.key(path)
        request = self.fs._call_s3(operation, Bucket=self.bucket, **arguments)
        if "Body" in arguments:
            return await self.within_time(len(arguments["Body"]), request)
        return await request  # type: ignore[no-any-return]

    # --- reading

    async def pages(self, prefix: str, *, delimiter: str, limit: int | None = None) -> AsyncIterator[ListedPage]:
        arguments: dict[str, Any] = {"Prefix": prefix, "EncodingType": "url"}
        if delimiter:
            arguments["Delimiter"] = delimiter
        if limit:
            arguments["MaxKeys"] = limit + 1  # the folder's own marker counts, too
        request = self._list_page(arguments)
        try:
            while request is not None:
                answer = await request
                token = None if limit else answer["NextContinuationToken"]
                # The store looks for the next page while this one is taken apart.
                request = self._list_page({**arguments, "ContinuationToken": token}) if token else None
                yield await asyncio.to_thread(self._page, answer, prefix, flat=not delimiter)
        finally:
            if request is not None:
                request.cancel()

    def _list_page(self, arguments: dict[str, Any]) -> asyncio.Task[dict[str, Any]] | None:
        return asyncio.ensure_future(self.retry.acall(lambda: self.call("list_objects_v2", **arguments)))

    def _page(self, answer: Mapping[str, Any], prefix: str, *, flat: bool) -> ListedPage:
        cut = len(prefix)
        known_mtime = self.tuning.server_mtime
        entries = [
            Entry(
                item["Key"][cut:],
                is_dir=False,
                size=item["Size"],
                mtime=item["LastModified"] if known_mtime or flat else None,
                fingerprint=item.get("ETag"),
                stamp=int(item["LastModified"]),
            )
            for item in answer.get("Contents", ())
            if item["Key"] != prefix
        ]
        folders = [Entry(item["Prefix"][cut:-1], is_dir=True) for item in answer.get("CommonPrefixes", ())]
        marked = any(item["Key"] == prefix for item in answer.get("Contents", ()))
        return ListedPage(entries + folders, has_marker=marked and bool(prefix))

    async def head(self, path: str) -> Entry:
        return self._entry(path, await self.call("head_object", path))

    def _entry(self, path: str, head: Mapping[str, Any]) -> Entry:
        modified = head["LastModified"].timestamp()
        mtime = modified if self.tuning.server_mtime else _stored_mtime(head, modified)
        return Entry(paths.split(path)[1], False, head["ContentLength"], mtime, head.get("ETag"), int(modified))

    async def read(self, path: str, start: int, stop: int, fingerprint: str | None) -> Pieces:
        pieces: Pieces = []

        async def take(piece: bytes) -> None:
            pieces.append(piece)

        await self.stream(path, start, stop, fingerprint, take)
        return pieces

    async def stream(
        self, path: str, start: int, stop: int, fingerprint: str | None, take: Callable[[bytes], Awaitable[None]]
    ) -> None:
        condition = {"IfMatch": fingerprint} if fingerprint else {}
        answer = await self.call("get_object", path, Range=f"bytes={start}-{stop - 1}", **condition)
        left = stop - start
        if answer["ContentLength"] != left:  # as of a store that knows no ranges, whose bytes are other ones
            answer["Body"].close()
            raise ConnectionResetError(errno.ECONNRESET, f"{answer['ContentLength']} bytes instead of {left} come")
        async with answer["Body"] as body:
            async for piece in body.iter_chunks(PIECE):
                left -= len(piece)
                await take(piece)
        if left:
            raise ConnectionResetError(errno.ECONNRESET, f"{left} of {stop - start} bytes are missing")

    def checksum(self, entry: Entry) -> Checksum | None:
        match = PLAIN_MD5.match(entry.fingerprint or "")
        return Checksum("md5", bytes.fromhex(match[1])) if match and not match[2] else None

    async def hash_of(self, path: str, entry: Entry) -> Checksum | None:
        """Return the MD5 that rclone leaves beside large objects, or else what the ETag means."""
        match = PLAIN_MD5.match(entry.fingerprint or "")
        parts = int(match[2][1:]) if match and match[2] else 0
        condition: dict[str, Any] = {"IfMatch": entry.fingerprint} if entry.fingerprint else {}
        if parts:
            condition["PartNumber"] = 1  # the answer is about the first part, as long as all but the last
        head = await self.call("head_object", path, **condition)
        known = _stored_md5(head)
        if known is not None:
            return Checksum("md5", known)
        if match is None or _is_encrypted(head):
            return None
        if not parts:
            return Checksum("md5", bytes.fromhex(match[1]))
        length = head["ContentLength"]
        # Stores that do not know part numbers answer for the whole object, and parts may be of several lengths.
        known_parts = head.get("PartsCount") == parts and length and -(-entry.size // length) == parts
        return Checksum("md5", bytes.fromhex(match[1]), length) if known_parts else None

    # --- writing

    def upload(
        self, path: str, *, mtime: float | None = None, size: int | None = None, replaces: Condition = ANY
    ) -> Upload:
        return S3Upload(self, path, mtime, size, replaces)

    def upload_file(
        self, path: str, descriptor: int, size: int, *, mtime: float | None = None, replaces: Condition = ANY
    ) -> FileUpload:
        return PartsFile(S3Upload(self, path, mtime, size, replaces), descriptor, size)

    async def put(self, path: str, data: bytes, mtime: float | None, replaces: Condition = ANY) -> Entry:
        digest = await self.digest(data) if self.tuning.verify else None
        checksum = {"ContentMD5": base64.b64encode(digest).decode()} if digest else {}

        async def request(condition: Condition) -> dict[str, Any]:
            return await self.call(
                "put_object", path, Body=data, Metadata=_metadata(mtime), **checksum, **_condition(condition)
            )

        try:
            answer = await self.conditional(path, replaces, request)
        except Exception as error:
            if not self.is_refusal(error, path, replaces):
                raise
            etag = (digest or await self.digest(data)).hex()
            return await self.our_own(path, replaces, etag, len(data), mtime)
        if digest:
            self.verify_etag(path, answer, digest.hex())
        return Entry(paths.split(path)[1], False, len(data), mtime, answer.get("ETag"))

    async def digest(self, data: bytes) -> bytes:
        """Return the MD5, without holding up the event loop where it takes long."""
        return md5(data) if len(data) < HASHED_INLINE else await asyncio.to_thread(md5, data)

    async def our_own(
        self, path: str, replaces: Condition, etag: str | None, size: int, mtime: float | None
    ) -> Entry:
        """Return the entry of the object that stands in the way where it is what was sent; else raise ECHANGED.

        An earlier try may have got through with its answer lost, even one of a process that is no more.
        """
        try:
            head = await self.call("head_object", path)
        except Exception as error:
            if self.translated(error, path).errno != errno.ENOENT:
                raise
            raise not_replaceable(path, replaces) from None
        entry = self._entry(path, head)
        if head.get("ETag", "").strip('"') == etag and _mtime_agrees(head, mtime):
            return entry
        # An encrypted object's ETag is no MD5; two files of one length and one nanosecond are a bold assumption less.
        if _is_encrypted(head) and mtime is not None and entry.size == size and _mtime_agrees(head, mtime):
            return entry
        raise not_replaceable(path, replaces)

    def verify_etag(self, path: str, answer: Mapping[str, Any], expected: str) -> bool:
        """Compare an ETag that is an MD5 with ours; return False where the store's says something else (encryption)."""
        match = PLAIN_MD5.match(answer.get("ETag") or "")
        if not match or _is_encrypted(answer):
            return False
        found = match[1] + (match[2] or "")
        if found != expected:
            raise failure(errno.EIO, path, f"The store has other bytes than were sent (ETag {found}, ours {expected})")
        return True

    async def delete(self, path: str, only: str | None = None) -> None:
        async def request(condition: Condition) -> None:
            await self.call("delete_object", path, **_condition(condition))

        try:
            await self.conditional(path, only or ANY, request)
        except Exception as error:
            if not self.is_refusal(error, path, only or ANY):
                raise
            if await self._is_there(path):  # else it is gone: that is what was wanted
                raise not_replaceable(path, only or ANY) from None

    async def _is_there(self, path: str) -> bool:
        try:
            await self.call("head_object", path)
        except Exception as error:
            if self.translated(error, path).errno != errno.ENOENT:
                raise
            return False
        return True

    def is_refusal(self, error: BaseException, path: str, replaces: Condition) -> bool:
        """Tell whether a condition failed; AWS answers that there is no such object where it is gone."""
        if super().is_refusal(error, path, replaces):
            return True
        known = self.translated(error, path)
        return replaces is not ANY and known.errno == errno.ENOENT and known.strerror != FORGOTTEN.reason

    # --- copying

    async def duplicate(self, source: str, target: str, mtime: float | None) -> Entry:
        head = await self.call("head_object", source)
        entry = self._entry(source, head)
        # A copy gets a new LastModified, so the old time must go into the metadata or be lost.
        kept_mtime = _stored_mtime(head, head["LastModified"].timestamp()) if mtime is None else mtime
        headers: dict[str, Any] = {name: head[name] for name in KEPT_HEADERS if head.get(name)}
        headers["Metadata"] = {**head.get("Metadata", {}), **_metadata(kept_mtime)}
        if entry.size <= self.copy_limit:
            await self._copy_whole(source, target, head["ETag"], headers)
        else:
            await self._copy_in_parts(source, target, head["ETag"], entry.size, headers)
        copied = self._entry(target, await self.call("head_object", target))
        if copied.size != entry.size:
            raise failure(errno.EIO, target, f"The copy has {copied.size} bytes instead of {entry.size}")
        return copied

    async def _copy_whole(self, source: str, target: str, etag: str, headers: dict[str, Any]) -> None:
        await self.call(
            "copy_object",
            target,
            CopySource={"Bucket": self.bucket, "Key": self.key(source)},
            CopySourceIfMatch=etag,
            MetadataDirective="REPLACE",
            **headers,
        )

    async def _copy_in_parts(self, source: str, target: str, etag: str, size: int, headers: dict[str, Any]) -> None:
        upload_id = (await self.call("create_multipart_upload", target, **headers))["UploadId"]
        step = max(self.copy_part, -(-size // MAX_PARTS))
        bounds = [(start, min(start + step, size)) for start in range(0, size, step)]

        async def part(number: int, start: int, stop: int) -> dict[str, Any]:
            answer = await self.call(
                "upload_part_copy",
                target,
                PartNumber=number,
                UploadId=upload_id,
                CopySource={"Bucket": self.bucket, "Key": self.key(source)},
                CopySourceIfMatch=etag,
                CopySourceRange=f"bytes={start}-{stop - 1}",
            )
            return {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

        try:
            outcomes = await self.gather(
                [lambda n=n, b=b: part(n, *b) for n, b in enumerate(bounds, 1)]  # type: ignore[misc]
            )
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
            await self.complete(target, upload_id, outcomes)
        except BaseException:
            try:
                await asyncio.shield(self.call("abort_multipart_upload", target, UploadId=upload_id))
            except Exception as error:  # noqa: BLE001 - what broke the copy is the better news
                logger.warning("parts of a broken copy to %r may be left: %s", target, type(error).__name__)
            raise

    async def complete(
        self, path: str, upload_id: str, parts: list[dict[str, Any]], replaces: Condition = ANY
    ) -> dict[str, Any]:
        """Publish a multipart upload; safe to be tried again after its answer was lost."""
        tries = 0

        async def request(condition: Condition) -> dict[str, Any]:
            return await self.call(
                "complete_multipart_upload",
                path,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
                **_condition(condition),
            )

        async def attempt() -> dict[str, Any]:
            nonlocal tries
            tries += 1
            try:
                return await self.conditional(path, replaces, request)
            except Exception as error:
                if tries == 1 or self.translated(error, path).errno != errno.ENOENT:
                    raise
                # The upload is gone: an earlier try may have done it, and its answer was lost.
                head = await self.call("head_object", path)
                if head.get("ETag", "").strip('"') != _composite_etag(parts):
                    raise failure(errno.EIO, path, "The store has forgotten the upload") from None
                return head

        return await self.retry.acall(attempt)


class S3Upload(PartsUpload):
    """A multipart upload whose parts leave while the file arrives."""

    backend: S3Backend

    def __init__(
        self,
        backend: S3Backend,
        path: str,
        mtime: float | None,
        size: int | None,
        replaces: Condition,
    ) -> None:
        super().__init__(backend, path, mtime, replaces)
        # A known size fits into S3's 10,000 parts from the start.
        self._least_part = max(LEAST_PART, -(-(size or 0) // (MAX_PARTS - 1)))
        self._upload_id: asyncio.Future[str] | None = None  # touched on the event loop alone

    def part_size(self, number: int) -> int:
        if number >= MAX_PARTS and self._pending:
            raise failure(errno.EFBIG, self.path, f"S3 takes {MAX_PARTS} parts, and {self.size} bytes have filled them")
        return max(self._least_part, part_size(number))

    async def _begun(self) -> str:
        """Return the upload's id; the first part that comes here begins it, the others wait."""
        if self._upload_id is None or self._upload_id.cancelled() or (
            self._upload_id.done() and self._upload_id.exception()
        ):
            self._upload_id = asyncio.ensure_future(self._begin())
        return await asyncio.shield(self._upload_id)

    async def _begin(self) -> str:
        answer = await self.backend.call("create_multipart_upload", self.path, Metadata=_metadata(self.mtime))
        return str(answer["UploadId"])

    async def send(self, number: int, offset: int, data: bytes | Slice) -> dict[str, Any]:
        upload_id = await self._begun()
        body, digest = await asyncio.to_thread(self._read_and_hash, data)
        checksum = {"ContentMD5": base64.b64encode(digest).decode()} if digest else {}
        answer = await self.backend.call(
            "upload_part", self.path, PartNumber=number + 1, UploadId=upload_id, Body=body, **checksum
        )
        plain = digest is not None and self.backend.verify_etag(self.path, answer, digest.hex())
        return {"part": {"PartNumber": number + 1, "ETag": answer["ETag"]}, "digest": digest if plain else None}

    def _read_and_hash(self, data: bytes | Slice) -> tuple[bytes, bytes | None]:
        body = bytes_of(data)
        return body, md5(body) if self.backend.tuning.verify else None

    async def finish(self, parts: list[dict[str, Any]], rest: bytes) -> Entry:
        if rest:
            parts = [*parts, await self.send(len(parts), self.size, rest)]
        upload_id = await self._begun()
        known = [part["part"] for part in parts]
        size = self.size + len(rest)
        try:
            answer = await self.backend.complete(self.path, upload_id, known, self.replaces)
        except Exception as error:
            if not self.backend.is_refusal(error, self.path, self.replaces):
                raise
            etag = _composite_etag(known)
            entry = await self.backend.our_own(self.path, self.replaces, etag, size, self.mtime)
            await self.discard()  # ours is there already, from an earlier try
            return entry
        digests = [part["digest"] for part in parts]
        if self.backend.tuning.verify:
            await self._verify(answer, digests, size)
        return Entry(paths.split(self.path)[1], False, size, self.mtime, answer.get("ETag"))

    async def _verify(self, answer: dict[str, Any], digests: list[bytes | None], size: int) -> None:
        known = [digest for digest in digests if digest]
        if len(known) == len(digests):
            expected = f"{md5(b''.join(known)).hex()}-{len(known)}"
            match = PLAIN_MD5.match(answer.get("ETag") or "")
            if match and match[2] and self.backend.verify_etag(self.path, answer, expected):
                return
        entry = await self.backend.head(self.path)
        if entry.size != size:
            raise failure(errno.EIO, self.path, f"The store has {entry.size} bytes of {size} that were sent")

    async def discard(self) -> None:
        if self._upload_id is None:
            return
        await asyncio.wait([self._upload_id])
        if self._upload_id.cancelled() or self._upload_id.exception() is not None:
            return  # it never began
        upload_id = self._upload_id.result()
        await self.backend.call("abort_multipart_upload", self.path, UploadId=upload_id)


def _composite_etag(parts: list[dict[str, Any]]) -> str | None:
    """Return the ETag of an object made of these parts: the MD5 of their MD5s; None where theirs are something else."""
    matches = [PLAIN_MD5.match(part["ETag"]) for part in parts]
    digests = [bytes.fromhex(match[1]) for match in matches if match]
    return f"{md5(b''.join(digests)).hex()}-{len(parts)}" if len(digests) == len(parts) else None


def _condition(replaces: Condition) -> dict[str, str]:
    if replaces is ANY:
        return {}
    return {"IfNoneMatch": "*"} if replaces is ABSENT else {"IfMatch": str(replaces)}


def _is_encrypted(answer: Mapping[str, Any]) -> bool:
    """Tell whether the ETag is something else than an MD5 although it may look like one."""
    by_key = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
    return by_key or "SSECustomerAlgorithm" in answer


def _mtime_agrees(head: Mapping[str, Any], mtime: float | None) -> bool:
    return mtime is None or head.get("Metadata", {}).get(MTIME) == _metadata(mtime)[MTIME]


def _metadata(mtime: float | None) -> dict[str, str]:
    return {} if mtime is None else {MTIME: f"{mtime:.9f}"}


def _stored_md5(head: Mapping[str, Any]) -> bytes | None:
    try:
        digest = base64.b64decode(head["Metadata"][MD5], validate=True)
    except (KeyError, ValueError):
        return None
    return digest if len(digest) == 16 else None


def _stored_mtime(head: Mapping[str, Any], otherwise: float) -> float:
    try:
        mtime = float(head["Metadata"][MTIME])
    except (KeyError, ValueError):
        return otherwise
    return mtime if math.isfinite(mtime) else otherwise


# --- listings, parsed fast: botocore spends 0.1 ms on each listed object, most of it on the date (measured: 1.2 s of
# CPU for 10,000 objects, 0.1 s this way). Parsers are a component of a session that it lets a program replace.


class _ListingParser(AioRestXMLParser):
    def _do_parse(self, response: Any, shape: Any) -> Any:
        if shape is not None and shape.name == "ListObjectsV2Output":
            return _parse_listing(response["body"])
        return super()._do_parse(response, shape)


class _ParserFactory(AioResponseParserFactory):
    def create_parser(self, protocol_name: str) -> Any:
        if protocol_name == "rest-xml":
            return _ListingParser(**self._defaults)
        return super().create_parser(protocol_name)


def _session(profile: str | None) -> Any:
    session = aiobotocore.session.AioSession(profile=profile)
    session.register_component("response_parser_factory", _ParserFactory())
    # botocore parses every answer once more to see whether a 200 hides an error; for listings ours sees that.
    session.unregister(EVERY_ANSWER, _handle_200_error)
    session.register(EVERY_ANSWER, _unless_listing)
    return session


EVERY_ANSWER = "before-parse.s3.*"


def _unless_listing(operation_model: Any, response_dict: dict[str, Any], **arguments: Any) -> None:
    if operation_model.name != "ListObjectsV2":
        _handle_200_error(operation_model, response_dict, **arguments)


def _parse_listing(body: bytes) -> dict[str, Any]:
    """Return what botocore would of a ListObjectsV2 answer, as far as the backend needs it; keys are URL-decoded."""
    root = ElementTree.fromstring(body)
    namespace, _, kind = root.tag.rpartition("}")
    namespace += "}" if namespace else ""
    if kind == "Error":
        code = root.findtext(namespace + "Code") or "InternalError"
        raise ClientError({"Error": {"Code": code, "Message": ""}}, "ListObjectsV2")
    tag_key, tag_size, tag_etag, tag_date = (namespace + name for name in ("Key", "Size", "ETag", "LastModified"))
    decoded = unquote_plus if root.findtext(namespace + "EncodingType") == "url" else str
    truncated = root.findtext(namespace + "IsTruncated") == "true"
    answer: dict[str, Any] = {
        "NextContinuationToken": root.findtext(namespace + "NextContinuationToken") if truncated else None,
        "Contents": [
            {
                "Key": decoded(item.findtext(tag_key, "")),
                "Size": int(item.findtext(tag_size, "0")),
                "ETag": item.findtext(tag_etag),
                "LastModified": _parse_date(item.findtext(tag_date, "")),
            }
            for item in root.iterfind(namespace + "Contents")
        ],
        "CommonPrefixes": [
            {"Prefix": decoded(item.findtext(namespace + "Prefix", ""))}
            for item in root.iterfind(namespace + "CommonPrefixes")
        ],
    }
    return answer


def _parse_date(text: str) -> float:
    """Return seconds since the epoch of S3's `2026-01-31T12:34:56.789Z`."""
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:  # Python 3.10 wants exactly three or six digits of a second; stores differ
        moment = parse_timestamp(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
