"""What a user reads when a store cannot be used: one clear line, the right errno, and never a secret."""

from __future__ import annotations

import errno
import io
import logging
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftpvfs.backend.backend import Backend, display_url, open_backend, protocol_of
from ftpvfs.backend.errors import is_transient, meaning_of, secrets_in, translate
from tests.conftest import Store, free_ports, program_environment
from tests.servers import FaultProxy
from tests.test_backend import failing, is_clear, listed, put

MakeBackend = Callable[..., Backend]
SECRET = "hush-hush/4+2=secret"


# -- at the start


def test_an_unknown_protocol_is_told_with_its_name() -> None:
    with pytest.raises(ValueError, match=r"^s4:// is no protocol that fsspec knows") as failed:
        open_backend("s4://bucket")
    assert len(str(failed.value).splitlines()) == 1


@pytest.mark.parametrize("url", ["s3://", "gs://"])
def test_a_url_without_a_bucket_is_told(url: str) -> None:
    with pytest.raises(ValueError, match="names no bucket"):
        open_backend(url)


WITHOUT = """
import sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None  # as if it were not installed
from ftpvfs.backend.backend import open_backend
try:
    open_backend(sys.argv[1])
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("url", "package"), [("s3://bucket", "s3fs"), ("gs://bucket", "gcsfs"), ("sftp://host/x", "sshfs")]
)
def test_a_missing_package_is_named(url: str, package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, url, f"{package},paramiko"],
        env=program_environment(), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip

    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{url.partition(':')[0]}:// needs a package that is not installed")
    assert package in line


@pytest.mark.parametrize("kind", ["s3", "gs", "local", "memory"])
def test_opening_a_backend_asks_nothing_of_its_store(kind: str) -> None:
    port = free_ports(1)[0]
    urls = {"s3": "s3://bucket/x", "gs": "gs://bucket/x", "local": "/nowhere/at/all", "memory": "memory://nothing"}
    options: dict[str, Any] = {"s3": {"key": "k", "secret": "s"}, "gs": {"token": "anon"}}.get(kind, {})
    if options:
        options["endpoint_url"] = f"http://127.0.0.1:{port}"

    open_backend(urls[kind], options).close()


def test_wrong_credentials_are_told_as_such(s3_store: Store, make_backend: MakeBackend) -> None:
    for wrong in ({"key": "nobody"}, {"secret": "wrong"}):
        backend = make_backend(s3_store, wrong)
        with failing(errno.EACCES) as failed:
            backend.check()
        assert "does not accept the credentials" in str(failed.value)
        assert failed.value.filename == s3_store.url


def test_missing_credentials_are_told_as_such(s3_store: Store, make_backend: MakeBackend) -> None:
    options = {"endpoint_url": s3_store.storage_options["endpoint_url"]}
    with failing(errno.EACCES) as failed:
        make_backend(s3_store.url, options).check()
    assert "No credentials" in str(failed.value)


def test_a_profile_that_does_not_exist_is_told(s3_store: Store, make_backend: MakeBackend) -> None:
    options = {"endpoint_url": s3_store.storage_options["endpoint_url"], "profile": "nobody"}
    with failing(errno.EACCES) as failed:
        make_backend(s3_store.url, options).check()
    assert "profile" in str(failed.value)


def test_a_bucket_name_that_cannot_be_is_told(s3_store: Store, make_backend: MakeBackend) -> None:
    with pytest.raises(OSError) as failed:  # noqa: PT011
        make_backend("s3://Not A Bucket!/x", s3_store.storage_options).check()
    assert is_clear(failed.value)


def test_a_host_that_does_not_exist_is_unreachable(make_backend: MakeBackend) -> None:
    options = {"key": "k", "secret": "s", "endpoint_url": "http://no-such-host.invalid:9"}
    with failing(errno.EHOSTUNREACH):
        make_backend("s3://bucket", options, low_level_retries=1).check()


def test_an_empty_prefix_of_a_bucket_that_is_there_is_no_error(s3_store: Store, make_backend: MakeBackend) -> None:
    make_backend(f"{s3_store.url}/nothing/here", s3_store.storage_options).check()


# -- secrets


@pytest.fixture
def logged() -> Iterator[Callable[[], str]]:
    """Everything that anybody logs, at any level."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield stream.getvalue
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


def shown(error: BaseException) -> str:
    """All that a log or a reply could show of an error, the errors below it included."""
    return "\n".join((str(error), repr(error), repr(error.args), *traceback.format_exception(error)))


def assert_no_secret(text: str) -> None:
    assert SECRET not in text
    assert "hush" not in text


def provoke(backend: Backend) -> Iterator[BaseException]:
    """The errors of every kind of request."""
    actions: list[Callable[[], Any]] = [
        backend.check,
        lambda: backend.list("folder"),
        lambda: backend.stat("a"),
        lambda: backend.fetch("a", 0, 1, None).result(timeout=20),
        lambda: put(backend, "a", b"1"),
        lambda: backend.copy("a", "b"),
        lambda: backend.mkdir("a"),
    ]
    for action in actions:
        with pytest.raises(OSError, check=is_clear) as failed:
            action()
        yield failed.value


def test_secrets_of_s3_are_never_shown(
    s3_store: Store, make_proxy: Any, make_backend: MakeBackend, logged: Callable[[], str]
) -> None:
    proxy: FaultProxy = make_proxy(s3_store)
    for status in (403, 503, 400):
        backend = make_backend(s3_store.proxied(proxy), {"secret": SECRET})
        proxy.heal()
        proxy.fail_next(1000, status=status, code=f"Whatever{SECRET}")  # a store that says it back
        errors = list(provoke(backend))
        assert len(errors) == 7
        for error in errors:
            assert_no_secret(str(error) + repr(error))
        assert_no_secret(repr(backend) + backend.display)
        backend.close()
    assert_no_secret("\n".join(line for line in logged().splitlines() if line.startswith("ftpvfs")))


def test_secrets_of_s3_are_not_in_wrong_credentials(
    s3_store: Store, make_backend: MakeBackend, logged: Callable[[], str]
) -> None:
    backend = make_backend(s3_store, {"secret": SECRET})

    for error in provoke(backend):
        assert_no_secret(shown(error))
    assert_no_secret(logged())


def test_a_token_of_gs_is_never_shown(gs_store: Store, make_backend: MakeBackend, logged: Callable[[], str]) -> None:
    from google.oauth2.credentials import Credentials

    backend = make_backend("gs://no-such-bucket/x", {**gs_store.storage_options, "token": Credentials(SECRET)})

    for error in provoke(backend):
        assert_no_secret(shown(error))
    assert_no_secret(repr(backend))
    assert_no_secret(logged())


def test_a_password_in_a_url_is_never_shown(make_backend: MakeBackend, logged: Callable[[], str]) -> None:
    port = free_ports(1)[0]
    for url in (
        f"sftp://me:{'hush-hush'}@127.0.0.1:{port}/folder",
        f"ftp://me:hush%2Fhush@127.0.0.1:{port}/folder",
        f"zip://x::sftp://me:hush-hush@127.0.0.1:{port}/folder/x.zip",
        f"http://me:hush-hush@127.0.0.1:{port}/folder?token=hush-hush",
    ):
        with pytest.raises((OSError, ValueError)) as failed:
            make_backend(url).check()
        assert_no_secret(str(failed.value) + repr(failed.value))
        assert len(str(failed.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("url", "shown_as"),
    [
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("sftp://me:pw@host/a", "sftp://host/a"),
        ("sftp://me:p@w@host/a@b", "sftp://host/a@b"),
        ("zip://in::sftp://me:pw@host/a.zip", "zip://in::sftp://host/a.zip"),
        ("http://host/a?sig=pw&x=1", "http://host/a?..."),
        ("/plain/a@b:c", "/plain/a@b:c"),
        ("memory://x", "memory://x"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown_as: str) -> None:
    assert display_url(url) == shown_as


@pytest.mark.parametrize(
    ("options", "secret"),
    [
        ({"secret": "abc"}, {"abc"}),
        ({"password": "abc", "host": "h"}, {"abc"}),
        ({"client_kwargs": {"aws_secret_access_key": "abc", "region": "r"}}, {"abc"}),
        ({"account_key": "abc", "connection_string": "AccountKey=xyz"}, {"abc", "AccountKey=xyz"}),
        ({"sas_token": "abc", "api_key": "def", "client_secret": "ghi"}, {"abc", "def", "ghi"}),
        ({"token": {"private_key": "abc", "type": "service_account"}}, {"abc"}),
        ({"token": {"refresh_token": "abc"}}, {"abc"}),
        ({"endpoint_url": "http://h", "anon": True}, set()),
        ({"endpoint_url": "http://me:abc@h"}, {"abc"}),
        ({"headers": [("Authorization", "Bearer abc")]}, {"Bearer abc"}),
        ({"headers": {"Authorization": "Bearer abc"}}, {"Bearer abc"}),
    ],
)
def test_secrets_among_options_are_known(options: dict[str, Any], secret: set[str]) -> None:
    assert set(secrets_in(options)) == secret


@pytest.mark.parametrize(
    ("url", "protocol"),
    [("/a/b", "file"), ("a", "file"), ("s3://b/c", "s3"), ("zip::s3://b/c.zip", "zip"), ("file:///x", "file")],
)
def test_protocols(url: str, protocol: str) -> None:
    assert protocol_of(url) == protocol


# -- the table


class Botocore(Exception):
    """As botocore's ClientError: what it has is `response`."""

    def __init__(self, code: str, status: int = 400) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class HttpError(Exception):
    """As gcsfs's: what it has is `code`, a number or its digits."""

    def __init__(self, code: int | str, message: str = "") -> None:
        super().__init__(message)
        self.code = code


@pytest.mark.parametrize(
    ("error", "code", "transient"),
    [
        (HttpError(429, "rateLimitExceeded"), errno.EBUSY, True),
        (HttpError("503"), errno.EBUSY, True),
        (HttpError(401, "Invalid Credentials"), errno.EACCES, False),
        (HttpError(410, "Gone"), errno.ENOENT, False),
        (HttpError(400, 'Provided MD5 hash "a" doesn\'t match calculated MD5 hash "b".'), errno.EIO, True),
        (HttpError(400, "Required"), errno.EINVAL, False),
        (Botocore("NoSuchKey", 404), errno.ENOENT, False),
        (Botocore("404", 404), errno.ENOENT, False),
        (Botocore("403", 403), errno.EACCES, False),
        (Botocore("SlowDown", 503), errno.EBUSY, True),
        (Botocore("InternalError", 500), errno.EIO, True),
        (Botocore("Unheard", 599), errno.EIO, True),
        (Botocore("Unheard", 400), errno.EINVAL, False),
        (Botocore("PreconditionFailed", 412), errno.ESTALE, False),
        (Botocore("QuotaExceeded", 403), errno.EDQUOT, False),
        (Botocore("EntityTooLarge", 400), errno.EFBIG, False),
        (Botocore("KeyTooLongError", 400), errno.ENAMETOOLONG, False),
        (Botocore("NotImplemented", 501), errno.EOPNOTSUPP, False),
        (FileNotFoundError("x"), errno.ENOENT, False),
        (PermissionError("x"), errno.EACCES, False),
        (FileExistsError("x"), errno.EEXIST, False),
        (OSError("Forbidden: x"), errno.EACCES, False),
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), errno.EHOSTUNREACH, True),
        (ConnectionResetError(), errno.ECONNRESET, True),
        (TimeoutError(), errno.ETIMEDOUT, True),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC, False),
        (NotImplementedError(), errno.EOPNOTSUPP, False),
        (KeyError("x"), errno.EINVAL, False),
        (ZeroDivisionError("a bug"), errno.EIO, False),
    ],
)
def test_each_failure_has_its_errno(error: Exception, code: int, transient: bool) -> None:
    known = translate(error, "a/b")

    assert known.errno == code
    assert is_clear(known)
    assert known.filename == "a/b"
    assert is_transient(error) is transient


def test_the_cause_below_a_bland_error_counts() -> None:
    error = OSError(errno.EIO, "bland")
    error.__cause__ = Botocore("SlowDown", 503)

    assert translate(error, "a").errno == errno.EBUSY


def test_a_key_error_below_a_clear_error_does_not_count() -> None:
    error = FileNotFoundError("a")
    error.__cause__ = KeyError("a")

    assert translate(error, "a").errno == errno.ENOENT


def test_an_interrupt_is_no_failure_of_a_store() -> None:
    assert meaning_of(KeyboardInterrupt()) is None


def test_a_long_text_of_many_lines_becomes_one() -> None:
    known = translate(ValueError("first\nsecond\n" + "x" * 1000), "a")

    assert is_clear(known)
    assert "first" in str(known)
    assert len(str(known)) < 300


def test_an_oserror_of_many_lines_becomes_one() -> None:
    assert is_clear(translate(OSError(errno.EIO, "first\nsecond"), "a"))


def test_a_path_that_is_no_text_is_no_problem(local_store: Store, make_backend: MakeBackend) -> None:
    Path(local_store.root, "x").write_bytes(b"")
    backend = make_backend(local_store)
    with failing(errno.ENOENT):
        backend.stat("caf\udce9")
    assert set(listed(backend)) == {"x"}
