"""The one table from the stores' exceptions to errno: what a failure means, and whether another try may help.

Stores are told apart by the names of their exception classes, so that nothing is imported for one that is not in use.
Sources: the S3 API's error responses, the GCS JSON API's status codes, fsspec/s3fs/gcsfs/asyncssh as installed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote

from ftpvfs.errors import ECHANGED, ENOSTORE, EUNSUPPORTED, failure


class TimedOut(TimeoutError):
    """A store that did not answer. asyncio makes a bare TimeoutError anew, without its path, for another thread."""


EDQUOT = getattr(errno, "EDQUOT", errno.ENOSPC)


@dataclass(frozen=True)
class Meaning:
    """What one kind of failure means to the layers above; `reason` None keeps the errno's own text."""

    code: int
    reason: str | None = None
    transient: bool = False


MISSING = Meaning(errno.ENOENT)
EXISTS = Meaning(errno.EEXIST)
FORBIDDEN = Meaning(errno.EACCES, "The store denies access")
CREDENTIALS = Meaning(errno.EACCES, "The store does not accept the credentials")
NO_CREDENTIALS = Meaning(errno.EACCES, "No credentials for the store: set them in the environment or with --option")
FORGOTTEN = Meaning(errno.ENOENT, "The store has forgotten the upload")
NO_BUCKET = Meaning(ENOSTORE, "No such bucket")
THROTTLED = Meaning(errno.EBUSY, "The store is busy and asks to slow down", transient=True)
BROKEN = Meaning(errno.EIO, "The store failed to answer the request", transient=True)
UNREACHABLE = Meaning(errno.EHOSTUNREACH, "The store cannot be reached", transient=True)
RESET = Meaning(errno.ECONNRESET, "The store broke the connection", transient=True)
TIMED_OUT = Meaning(errno.ETIMEDOUT, "The store did not answer in time", transient=True)
CHANGED = Meaning(ECHANGED, "The file changed at the store meanwhile")
NO_SPACE = Meaning(errno.ENOSPC, "No space left at the store")
UNSUPPORTED = Meaning(EUNSUPPORTED, "The store cannot do this")
TOO_BIG = Meaning(errno.EFBIG, "Larger than the store allows")
BAD_REQUEST = Meaning(errno.EINVAL, "The store refuses the request as invalid")
DAMAGED = Meaning(errno.EIO, "The bytes were damaged on the way", transient=True)
READ_ONLY_STORE = Meaning(errno.EROFS, "The store is read-only")

BY_STATUS: Mapping[int, Meaning] = {
    301: Meaning(errno.EINVAL, "The bucket lives in another region or endpoint"),
    307: Meaning(errno.EINVAL, "The bucket lives in another region or endpoint"),
    400: BAD_REQUEST,
    401: CREDENTIALS,
    403: FORBIDDEN,
    404: MISSING,
    405: READ_ONLY_STORE,
    408: TIMED_OUT,
    409: THROTTLED,
    410: MISSING,
    412: CHANGED,
    413: TOO_BIG,
    416: Meaning(errno.EINVAL, "Beyond the end of the file"),
    429: THROTTLED,
    500: BROKEN,
    501: UNSUPPORTED,
    502: BROKEN,
    503: THROTTLED,
    504: TIMED_OUT,
    507: NO_SPACE,
}

BY_S3_CODE: Mapping[str, Meaning] = {
    "NoSuchKey": MISSING,
    "NoSuchVersion": MISSING,
    "NoSuchUpload": FORGOTTEN,
    "NoSuchBucket": NO_BUCKET,
    "InvalidBucketName": Meaning(ENOSTORE, "Not a valid bucket name"),
    "AccessDenied": FORBIDDEN,
    "AccountProblem": FORBIDDEN,
    "AllAccessDisabled": FORBIDDEN,
    "InvalidAccessKeyId": CREDENTIALS,
    "SignatureDoesNotMatch": CREDENTIALS,
    "ExpiredToken": CREDENTIALS,
    "InvalidToken": CREDENTIALS,
    "TokenRefreshRequired": CREDENTIALS,
    "AuthorizationHeaderMalformed": CREDENTIALS,
    "RequestTimeTooSkewed": Meaning(errno.EACCES, "This machine's clock differs too much from the store's"),
    "SlowDown": THROTTLED,
    "ServiceUnavailable": THROTTLED,
    "TooManyRequests": THROTTLED,
    "ThrottlingException": THROTTLED,
    "RequestLimitExceeded": THROTTLED,
    "OperationAborted": THROTTLED,
    "ConditionalRequestConflict": THROTTLED,
    "InternalError": BROKEN,
    "RequestTimeout": TIMED_OUT,
    "PreconditionFailed": CHANGED,
    "InvalidRange": Meaning(errno.EINVAL, "Beyond the end of the file"),
    "EntityTooLarge": TOO_BIG,
    "KeyTooLongError": Meaning(errno.ENAMETOOLONG),
    "MethodNotAllowed": READ_ONLY_STORE,
    "NotImplemented": UNSUPPORTED,
    "InvalidObjectState": Meaning(errno.EACCES, "The object is archived and must be restored first"),
    "QuotaExceeded": Meaning(EDQUOT, "The store's quota is used up"),
    "InsufficientStorage": NO_SPACE,
    "XMinioStorageFull": NO_SPACE,
    "BadDigest": DAMAGED,
    "XAmzContentSHA256Mismatch": DAMAGED,
    "IncompleteBody": DAMAGED,
}

# By the last two parts of a class's full name or the name alone, the most special class of the exception first.
BY_CLASS: Mapping[str, Meaning] = {
    "NoCredentialsError": NO_CREDENTIALS,
    "PartialCredentialsError": NO_CREDENTIALS,
    "NoAuthTokenError": NO_CREDENTIALS,
    "CredentialRetrievalError": NO_CREDENTIALS,
    "ProfileNotFound": Meaning(errno.EACCES, "No such credentials profile"),
    "DefaultCredentialsError": NO_CREDENTIALS,
    "GoogleAuthError": CREDENTIALS,
    "EndpointConnectionError": UNREACHABLE,
    "ProxyConnectionError": UNREACHABLE,
    "ConnectTimeoutError": TIMED_OUT,
    "ReadTimeoutError": TIMED_OUT,
    "ConnectionTimeoutError": TIMED_OUT,
    "ServerTimeoutError": TIMED_OUT,
    "FSTimeoutError": TIMED_OUT,
    "ConnectionClosedError": RESET,
    "ResponseStreamingError": RESET,
    "IncompleteReadError": RESET,
    "ContentLengthError": RESET,
    "ClientPayloadError": RESET,
    "ServerDisconnectedError": RESET,
    "ClientConnectorDNSError": UNREACHABLE,
    "ClientConnectorError": UNREACHABLE,
    "ClientOSError": RESET,
    "ClientError": RESET,
    "HTTPClientError": RESET,
    "ProxyError": BROKEN,
    "SSLError": Meaning(errno.EPROTO, "The TLS connection to the store failed"),
    "ResponseParserError": BROKEN,
    "ParseError": BROKEN,  # what should be XML or JSON is something else: a gateway in between, or an answer cut short
    "JSONDecodeError": BROKEN,
    "InvalidDNSNameError": Meaning(ENOSTORE, "Not a valid bucket name"),
    "ParamValidationError": BAD_REQUEST,
    "InvalidRegionError": Meaning(errno.EINVAL, "Not a valid region name"),
    "NoRegionError": Meaning(errno.EINVAL, "No region is set for the store"),
    "SFTPNoSuchFile": MISSING,
    "SFTPNoSuchPath": MISSING,
    "SFTPPermissionDenied": FORBIDDEN,
    "SFTPConnectionLost": RESET,
    "SFTPNoConnection": RESET,
    "SFTPNoSpaceOnFilesystem": NO_SPACE,
    "SFTPOpUnsupported": UNSUPPORTED,
    "PermissionDenied": CREDENTIALS,
    "AuthenticationException": CREDENTIALS,
    "SSHException": RESET,
    "ConnectionLost": RESET,
    "ChannelOpenError": RESET,
    "NotImplementedError": UNSUPPORTED,
    "BlocksizeMismatchError": BAD_REQUEST,
}

BY_ERRNO: Mapping[int, Meaning] = {
    errno.ECONNREFUSED: UNREACHABLE,
    errno.EHOSTUNREACH: UNREACHABLE,
    errno.ENETUNREACH: UNREACHABLE,
    errno.ECONNRESET: RESET,
    errno.EPIPE: RESET,
    errno.ECONNABORTED: RESET,
    errno.ETIMEDOUT: TIMED_OUT,
}


def meaning_of(error: BaseException) -> Meaning | None:
    """Return what `error` means, or None for what is no failure of a store (a bug, an interrupt)."""
    for cause in _causes(error):
        meaning = _own_meaning(cause)
        if meaning is not None:
            return meaning
    if isinstance(error, OSError):
        return Meaning(error.errno or errno.EIO, _first_line(error.strerror or error))
    # Python's own exceptions are judged last: fsspec raises FileNotFoundError from a KeyError.
    if isinstance(error, ValueError | KeyError | TypeError | RuntimeError):
        return Meaning(errno.EINVAL, f"The store refuses the request: {_first_line(error)}")
    return None


def _own_meaning(error: BaseException) -> Meaning | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict) and "Error" in response:
        return _s3_meaning(response)
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return TIMED_OUT
    if isinstance(error, OSError) and error.errno is not None and error.errno in BY_ERRNO:
        return BY_ERRNO[error.errno]
    for cls in type(error).__mro__:
        if cls.__name__ == "HttpError" and isinstance(getattr(error, "code", None), int | str):
            return _http_meaning(error)
        status = getattr(error, "status", None)
        if cls.__name__ == "ClientResponseError" and isinstance(status, int):  # aiohttp's, from fsspec's http
            return BY_STATUS.get(status, BROKEN if status >= 500 else BAD_REQUEST)
        if cls.__module__ != "builtins" and cls.__name__ in BY_CLASS:
            return BY_CLASS[cls.__name__]
    return _plain_meaning(error)


def _s3_meaning(response: dict[str, Any]) -> Meaning:
    code = str(response["Error"].get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in BY_S3_CODE:
        return BY_S3_CODE[code]
    if code.isdigit():  # HEAD has no body, so botocore puts the status where the code should be
        status = int(code)
    return BY_STATUS.get(status) or (BROKEN if status >= 500 else Meaning(errno.EIO, f"The store answers {code}"))


def _http_meaning(error: Any) -> Meaning:
    status = int(error.code) if str(error.code).isdigit() else 0
    if status == 400 and "match calculated" in str(error):  # "Provided MD5 hash ... doesn't match calculated MD5 hash"
        return DAMAGED
    return BY_STATUS.get(status, BROKEN if status >= 500 else Meaning(errno.EIO, f"The store answers {error.code}"))


def _plain_meaning(error: BaseException) -> Meaning | None:
    """What gcsfs and fsspec say with Python's own exceptions, without an errno."""
    if isinstance(error, FileNotFoundError):
        return MISSING
    if isinstance(error, PermissionError):
        return FORBIDDEN if error.errno is None else None
    if isinstance(error, FileExistsError) and error.errno is None:
        return EXISTS
    if isinstance(error, NotImplementedError):
        return UNSUPPORTED
    if isinstance(error, ConnectionError):
        return RESET
    if isinstance(error, OSError) and error.errno is None:
        return FORBIDDEN if str(error).startswith("Forbidden") else None
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what led to it, the first cause first: s3fs hangs botocore's own error below a bland one."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__
    return reversed(chain)


def _first_line(error: BaseException | str) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def is_transient(error: BaseException) -> bool:
    """Tell whether the same request may well work a moment later."""
    meaning = meaning_of(error)
    return meaning is not None and meaning.transient


def translate(error: BaseException, path: str) -> OSError:
    """Return the OSError for `error` at `path`; the caller raises it `from error`.

    What means nothing to the table (a bug) becomes EIO with its class named, for the layers above know OSError alone.
    """
    meaning = meaning_of(error)
    if meaning is None:
        return failure(errno.EIO, path, f"Unexpected {type(error).__name__}: {_first_line(error)}")
    return oserror(meaning.code, path, meaning.reason)


def oserror(code: int, path: str, reason: str | None) -> OSError:
    """Return the OSError for `code` in the form that keeps its path on the way from fsspec's thread to the caller's."""
    if code == errno.ETIMEDOUT:
        return TimedOut(code, reason or os.strerror(code), path)
    return failure(code, path, reason)


SECRET_NAME = re.compile(
    r"secret|password|passwd|passphrase|token|credential|private|sas|key$|connection_string|auth|cookie|signature|sig$",
    re.I,
)
# gcsfs's names for ways to find a token.
NO_SECRETS = frozenset({"anon", "cloud", "cache", "browser", "google_default"})


def secrets_in(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the values among storage options that must never be shown."""
    for name, value in options.items():
        yield from _secrets_of(name, value)


def _secrets_of(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from secrets_in(value)
    elif isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, list | tuple) and len(item) == 2:  # a header as a pair
                yield from _secrets_of(str(item[0]), item[1])
            else:
                yield from _secrets_of(name, item)
    elif isinstance(value, str):
        if SECRET_NAME.search(name) and len(value) > 2 and value not in NO_SECRETS:
            yield value
        else:
            yield from secrets_in_url(value)


USER_AND_PASSWORD = re.compile(r"://[^/:]*:([^/]*)@")
QUERY = re.compile(r"https?://[^?]*\?(.*?)(?=::|$)")


def secrets_in_url(url: str) -> Iterator[str]:
    """Yield the passwords in a URL (there are several in `zip://x::sftp://...`) and what an HTTP query says."""
    for password in USER_AND_PASSWORD.findall(url):
        yield from {password, unquote(password)} - {""}
    for query in QUERY.findall(url):
        yield from (value for _, value in parse_qsl(query) if len(value) > 2)


def without_secrets(url: str) -> str:
    """Return the URL as it may be shown: without user and password, and without an HTTP query.

    >>> without_secrets("sftp://me:secret@host/folder")
    'sftp://host/folder'
    """
    url = re.sub(r"://[^/]*@", "://", url)
    return re.sub(r"(https?://[^?]*)\?.*?(?=::|$)", r"\1?...", url)
