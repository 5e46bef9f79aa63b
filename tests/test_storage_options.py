"""Storage options: what was written stays text, what a store does not know is refused before anything is sent."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import s3fs
from gcsfs.core import GCSFileSystem

from ftpvfs import VFS
from ftpvfs.assembly import Assembly
from ftpvfs.backend.options import Kind, check_needed, check_options, known_options, read_options
from ftpvfs.config import ConfigError, load, vfs_options
from ftpvfs.server.auth_proxy import ProxyAuthorizer, answer_of
from tests.conftest import Store, connect, download, upload

DIGITS = "12345678"


@pytest.mark.parametrize(
    ("url", "text_options"),
    [
        ("s3://b", ["key", "secret", "token", "profile", "endpoint_url", "username", "password"]),
        ("gs://b", ["token", "project", "endpoint_url", "default_location"]),
        ("sftp://h/x", ["username", "password", "passphrase"]),
        ("ftp://h/x", ["username", "password", "acct"]),
        ("https://h/x", []),
    ],
)
def test_digits_stay_text_unless_the_option_is_a_number(url: str, text_options: list[str]) -> None:
    for name in [*text_options, "unheard_of"]:
        for text in (DIGITS, "007", "1e5", "true", "null", "0x10", "-1", "1_0"):
            expected = {"true": True, "null": None}.get(text, text) if (url, name) == ("gs://b", "token") else text
            assert read_options(url, {name: text}) == {name: expected}


@pytest.mark.parametrize(
    ("url", "written", "meant"),
    [
        ("s3://b", {"anon": "true", "use_ssl": "off"}, {"anon": True, "use_ssl": False}),
        ("s3a://b", {"max_concurrency": "4", "max_paths": "10"}, {"max_concurrency": 4, "max_paths": 10}),
        ("s3://b", {"client_kwargs": '{"region_name": "x"}'}, {"client_kwargs": {"region_name": "x"}}),
        ("s3://b", {"secret": '" ;7"', "key": '"7'}, {"secret": " ;7", "key": '"7'}),
        ("gs://b", {"token": '{"type": "x"}', "project": "7"}, {"token": {"type": "x"}, "project": "7"}),
        ("gcs://b", {"requester_pays": "true", "timeout": "2.5"}, {"requester_pays": True, "timeout": 2.5}),
        ("sftp://h", {"port": "22", "known_hosts": "null"}, {"port": 22, "known_hosts": None}),
        ("ssh://h", {"client_keys": '["a"]', "password": "1"}, {"client_keys": ["a"], "password": "1"}),
        ("zip::s3://b/x.zip", {"s3": '{"secret": "7"}'}, {"s3": {"secret": "7"}}),
        ("/folder", {"sync": "false"}, {"sync": False}),
    ],
)  # fmt: skip
def test_an_option_of_another_type_is_read_as_that(url: str, written: dict[str, str], meant: dict[str, Any]) -> None:
    assert read_options(url, written) == meant


@pytest.mark.parametrize(
    ("url", "written", "words"),
    [
        ("s3://b", {"anon": "hunter2"}, "storage option anon: the value is not true or false"),
        ("s3://b", {"max_concurrency": "hunter2"}, "storage option max_concurrency: the value is not a number"),
        ("s3://b", {"client_kwargs": "hunter2"}, "storage option client_kwargs: the value is not JSON"),
        ("file:///x", {"sync": "hunter2"}, "storage option sync: the value is not true or false"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_not_shown(url: str, written: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_options(url, written)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "options", "wrong", "near"),
    [
        ("s3://b", {"endpiont_url": "x", "secret": "hunter2"}, "endpiont_url", "endpoint_url"),
        ("s3a://b", {"sceret": "hunter2"}, "sceret", "secret"),
        ("s3://b", {"client_kwargs": {"endpiont_url": "x"}}, "endpiont_url", "endpoint_url"),
        ("s3://b", {"config_kwargs": {"proxeis": {}}}, "proxeis", "proxies"),
        ("gs://b", {"endpiont_url": "x", "token": "hunter2"}, "endpiont_url", "endpoint_url"),
        ("gcs://b", {"projcet": "x"}, "projcet", "project"),
        ("memory://", {"anything": 1}, "anything", ""),
        ("zip::s3://b/x.zip", {"s3": {"endpiont_url": "x"}}, "endpiont_url", "endpoint_url"),
        ("zip::s3://b/x.zip", {"secret": "hunter2"}, "secret", ""),  # it was meant for S3, and zip swallowed it
        ("ftp://h/x", {"pasword": "hunter2"}, "pasword", "password"),
    ],
)
def test_an_option_that_would_be_swallowed_is_refused_with_the_nearest_one(
    url: str, options: dict[str, Any], wrong: str, near: str
) -> None:
    words = f"{wrong} is no storage option of .*; the nearest known one is {near}"
    with pytest.raises(ConfigError, match=words) as caught:
        check_options(url, options)
    assert "hunter2" not in str(caught.value)


def test_all_that_the_stores_constructors_name_is_known() -> None:
    for url, cls in (("s3://b", s3fs.S3FileSystem), ("gs://b", GCSFileSystem)):
        parameters = inspect.signature(cls.__init__).parameters.values()
        named = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD} - {"self"}
        check_options(url, dict.fromkeys(named, None))
        for each in parameters:
            if isinstance(each.default, bool):
                assert known_options(url).kinds[each.name] in (Kind.FLAG, Kind.EITHER)


def test_what_a_store_needs_and_no_url_says_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"sftp:// does not say which host; write for example --option host="):
        check_needed("sftp:///folder", {})
    check_needed("sftp:///folder", {"host": "h"})
    with pytest.raises(ConfigError, match="write for example zip::/folder/file"):
        check_needed("zip://x.zip", {})


def test_python_objects_stay_what_they_are(s3_store: Store, tmp_path: Path) -> None:
    options = {**s3_store.storage_options, "config_kwargs": {"proxies": None}, "default_cache_type": "none"}
    with VFS(s3_store.url, storage_options=options, cache_dir=tmp_path) as vfs:
        vfs.start()
    for url in ("s3://b", "gs://b", str(tmp_path)):
        with pytest.raises(ConfigError, match="endpiont_url is no storage option"):
            VFS(url, storage_options={"endpiont_url": "x"}, cache_dir=tmp_path / "c").prepare()


def test_every_place_that_takes_options_leaves_digits_alone(tmp_path: Path) -> None:
    ini = tmp_path / "ftpvfs.ini"
    ini.write_text(
        f"[backend]\nurl = s3://b\nsecret = {DIGITS}\n[user:a]\npassword = x\n"
        f"[user:b]\npassword = x\nurl = s3://c\noption.secret = {DIGITS}\noption.anon = false\n"
    )
    cache = ["--cache-dir", str(tmp_path / "cache")]
    from_ini = Assembly(load(["--config", str(ini), *cache], {}))
    from_flag = Assembly(load(["s3://b", f"--option=secret={DIGITS}", *cache], {}))
    given = [vfs._storage_options for vfs in (*from_ini.vfses, *from_flag.vfses)]  # noqa: SLF001 - not to be shown
    assert given == [{"secret": DIGITS}, {"secret": DIGITS, "anon": False}, {"secret": DIGITS}]
    for value in (DIGITS, int(DIGITS)):
        answer = answer_of({"type": "s3", "_root": "b", "secret_access_key": value, "anon": "false", "region": "eu"})
        read = read_options(answer.url, answer.storage_options)
        assert read == {"secret": DIGITS, "anon": False, "client_kwargs": {"region_name": "eu"}}


def test_a_program_that_misspells_an_option_lets_nobody_in(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho '{json.dumps({'type': 's3', '_root': 'b', 'endpiont_url': 'http://x'})}'\n")
    program.chmod(0o700)
    authorizer = ProxyAuthorizer(str(program), vfs_options(cache_dir=str(tmp_path / "cache")))
    session = type("Session", (), {"remote_ip": "192.0.2.1", "vfs": None, "_closed": False})()
    with pytest.raises(Exception, match="Authentication failed"):
        authorizer.validate_authentication("alice", "pass", session)
    assert authorizer.vfses == ()


def test_a_secret_of_digits_works_at_a_store(launched: Any, seaweedfs: Any, tmp_path: Path) -> None:
    """A store that checks signatures lets in whoever has the identity whose secret is digits alone."""
    store = Store("s3", f"s3://{seaweedfs.create_bucket()}", seaweedfs.storage_options, "", None, seaweedfs)
    digits = dataclasses.replace(store, storage_options={**store.storage_options, "key": "digits", "secret": DIGITS})
    options = [f"--option={name}={value}" for name, value in digits.storage_options.items()]
    server = launched(digits.url, *options, "--cache-dir", str(tmp_path / "cache"), "--workers", "1")
    with connect(server.address) as ftp:
        assert upload(ftp, "a", b"x").startswith("226")
        assert download(ftp, "a") == b"x"
