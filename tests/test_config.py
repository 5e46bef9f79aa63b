"""The options: what is accepted, what is refused and in which words, and that one table makes everything."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftpvfs import VFSAuthorizer, config
from ftpvfs.config import Address, ConfigError, load, vfs_options
from ftpvfs.config.values import (
    format_bandwidth,
    format_public_ip,
    parse_bandwidth,
    parse_networks,
    parse_public_ip,
)

README = Path(__file__).parents[1] / "README.md"
DAY = 24 * 3600

HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$RdescudvJCsgt3ub+b1dWRWJTmaaJObG"
DESIGN_EXAMPLE = """\
[server]
addr = :2121
passive_port = 30000-32000
public_ip = 203.0.113.7
[backend]
url = s3://bucket/prefix
endpoint_url = http://127.0.0.1:9000     ; any other key is a storage option, JSON where it parses as JSON
[vfs]
cache_mode = off
[tls]
cert = /etc/ftpvfs/cert.pem
key = /etc/ftpvfs/key.pem
mode = explicit
[user:alice]
password_hash = $argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$RdescudvJCsgt3ub+b1dWRWJTmaaJObG
home = /alice
perm = elradfmwMT                        ; pyftpdlib's letters
[user:bob]
password_hash = $argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$RdescudvJCsgt3ub+b1dWRWJTmaaJObG
url = gs://other-bucket/bob              ; a backend of his own
perm = elr
[log]
level = INFO
"""


@pytest.fixture
def ini(tmp_path):
    """Writes an ini file and returns its path."""

    def write(text: str, name: str = "ftpvfs.ini") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(*argv: str, **environ: str) -> str:
    """The message with which a command line is refused."""
    with pytest.raises(ConfigError) as caught:
        load(argv, environ)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1", 1024),  # rclone: a bare number is KiB
        ("1.5", 1536),
        ("1b", 1),
        ("100B", 100),
        ("1k", 1024),
        ("1K", 1024),
        ("1Ki", 1024),
        ("1KiB", 1024),
        ("1.5M", 3 * 2**19),
        ("128Mi", 2**27),
        ("10G", 10 * 2**30),
        (".5G", 2**29),
        ("2T", 2**41),
        ("1PiB", 2**50),
        ("1E", 2**60),
        ("off", None),
        ("OFF", None),
    ],
)
def test_sizes_are_read_as_rclone_reads_them(text, value):
    assert config.parse_size(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "1X", "1KB", "10 G", "1e3", "i", "1i", "G", "nan", "inf", "9E", "1_0", "\u0661", "1\n"],
)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"10G|off"):
        config.parse_size(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0.0),
        ("90", 90.0),
        ("1.5", 1.5),
        ("1ms", 0.001),
        ("250us", 0.00025),
        ("250\N{MICRO SIGN}s", 0.00025),
        ("1s", 1.0),
        ("1.s", 1.0),
        ("1m", 60.0),
        ("1.5m", 90.0),
        ("1h", 3600.0),
        ("1h2m3s", 3723.0),
        ("1h30m", 5400.0),
        ("5m0s", 300.0),
        ("1d", DAY),
        ("5d", 5 * DAY),
        ("1w", 7 * DAY),
        ("1M", 30 * DAY),
        ("1y", 365 * DAY),
        ("1.5y", 547.5 * DAY),
        ("off", None),
    ],
)
def test_durations_are_read_as_rclone_reads_them(text, value):
    assert config.parse_duration(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "1x", "-1s", "5 m", "1h30", "m", "1e3", "nan", "inf", "300y", "2001-02-03", "1s\n"]
)
def test_what_is_no_duration_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"5m|off"):
        config.parse_duration(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0s"),
        (0.001, "1ms"),
        (1.0, "1s"),
        (60.0, "1m0s"),
        (90.0, "1m30s"),
        (300.0, "5m0s"),
        (3600.0, "1h0m0s"),
        (3723.0, "1h2m3s"),
        (DAY, "1d"),
        (7 * DAY, "1w"),
        (30 * DAY, "1M"),
        (547.5 * DAY, "1.5y"),
        (None, "off"),
    ],
)
def test_durations_show_as_rclone_shows_them(value, text):
    assert config.format_duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1B"),
        (1023, "1023B"),
        (1024, "1Ki"),
        (2**27, "128Mi"),
        (3 * 2**19, "1.5Mi"),
        (None, "off"),
    ],
)
def test_sizes_show_as_rclone_shows_them(value, text):
    assert config.format_size(value) == text


@given(st.integers(0, 2**63 - 1))
def test_a_size_survives_being_written_and_read(size):
    assert config.parse_size(config.format_size(size)) == size


@given(st.integers(0, 2**62).map(lambda nanoseconds: nanoseconds / 10**9))
def test_a_duration_survives_being_written_and_read(seconds):
    assert config.parse_duration(config.format_duration(seconds)) == seconds


@given(st.integers(1, 65535), st.integers(1, 65535))
def test_a_port_range_survives_being_written_and_read(one, other):
    ports = range(min(one, other), max(one, other) + 1)
    assert config.parse_ports(config.format_ports(ports)) == ports


@given(st.one_of(st.just(""), st.just("localhost"), st.ip_addresses().map(str)), st.integers(0, 65535))
def test_an_address_survives_being_written_and_read(host, port):
    assert config.parse_address(config.format_address((host, port))) == (host, port)


@pytest.mark.parametrize("parser", [config.parse_size, config.parse_duration, config.parse_address, config.parse_ports])
@given(text=st.text(max_size=12))
def test_no_text_makes_a_parser_fail_otherwise_than_by_refusing(parser, text):
    with contextlib.suppress(ValueError):
        parser(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (":2121", ("", 2121)),
        ("localhost:2121", ("localhost", 2121)),
        ("127.0.0.1:21", ("127.0.0.1", 21)),
        ("ftp.example.org:21", ("ftp.example.org", 21)),
        ("[::1]:2121", ("::1", 2121)),
        ("[fe80::1%eth0]:2121", ("fe80::1%eth0", 2121)),
        (":0", ("", 0)),
    ],
)
def test_addresses_are_host_and_port(text, value):
    assert config.parse_address(text) == value


@pytest.mark.parametrize("text", ["localhost", "127.0.0.1", "[::1]", "2121", ""])
def test_an_address_without_a_port_is_refused_saying_so(text):
    with pytest.raises(ValueError, match="has no port"):
        config.parse_address(text)


@pytest.mark.parametrize(
    "text", ["::1:2121", ":ftp", ":70000", "[127.0.0.1]:21", "[x]:21", "ftp://h:21", "a b:21", ":-1", ":"]
)
def test_what_is_no_address_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"\[::1\]:2121"):
        config.parse_address(text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("", False),
        ("10.0.0.1", False),
    ],
)
def test_loopback_addresses_are_told_from_reachable_ones(host, loopback):
    assert Address(host, 21).is_loopback is loopback


@pytest.mark.parametrize(("text", "value"), [("022", 0o22), ("777", 0o777), ("0", 0), ("2755", 0o2755)])
def test_modes_are_octal(text, value):
    assert config.parse_mode(text) == value


@pytest.mark.parametrize("text", ["", "8", "0o22", "rwx", "-1", "77777", "22 "])
def test_what_is_no_mode_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="022"):
        config.parse_mode(text)


@pytest.mark.parametrize(
    ("text", "value"), [("30000-32000", range(30000, 32001)), ("21", range(21, 22)), (" 1 - 2 ", range(1, 3))]
)
def test_ports_are_a_range_with_both_ends_or_a_single_one(text, value):
    assert config.parse_ports(text) == value


@pytest.mark.parametrize("text", ["", "a-b", "2-1", "0-5", "1-65536", "1-2-3", "-5", "5-"])
def test_what_is_no_port_range_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="30000-32000"):
        config.parse_ports(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("True", True),
        ("1", True),
        ("t", True),
        ("yes", True),
        ("false", False),
        ("0", False),
        ("off", False),
    ],
)
def test_booleans_are_read_as_go_reads_them(text, value):
    assert config.parse_bool(text) is value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", (None, None)),
        ("0", (None, None)),
        ("10M", (10 * 2**20, 10 * 2**20)),
        ("10M:100k", (10 * 2**20, 100 * 2**10)),
        ("off:1", (None, 1024)),
    ],
)
def test_bandwidths_are_one_rate_or_up_and_down(text, value):
    rate = parse_bandwidth(text)
    assert rate == value
    assert parse_bandwidth(format_bandwidth(rate)) == value


@pytest.mark.parametrize("text", ["", "fast", "1M:", ":1M", "1M:1M:1M", "08:00,512k 12:00,10M"])
def test_what_is_no_bandwidth_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="10M:100k"):
        parse_bandwidth(text)


def test_a_public_address_may_depend_on_the_clients_network():
    public = parse_public_ip("ftp.example.org, 10.0.0.0/8=10.0.0.5, 192.168.0.0/16=")
    assert parse_public_ip(format_public_ip(public)) == public
    clients = ["198.51.100.1", "10.1.2.3", "::ffff:10.1.2.3", "192.168.1.1", "fe80::1%eth0"]
    expected = ["ftp.example.org", "10.0.0.5", "10.0.0.5", "", "ftp.example.org"]
    assert [public.host_for(client) for client in clients] == expected


@pytest.mark.parametrize("text", ["1.2.3", "::1", "a b", "1.2.3.4,5.6.7.8", "x=1.2.3.4", "10.0.0.0/8=::1", "-a"])
def test_what_is_no_public_address_is_refused(text):
    with pytest.raises(ValueError, match="write"):
        parse_public_ip(text)


@pytest.mark.parametrize("text", ["x", "10.0.0.1/8", "10.0.0.0/33", "10.0.0.1,,10.0.0.2"])
def test_what_is_no_list_of_networks_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"192\.168\.0\.0/16"):
        parse_networks(text)


# --- keywords


def test_keywords_are_text_or_numbers():
    as_text = vfs_options(dir_cache_time="5m", read_chunk_size="1Mi", umask="027", read_only="true", checkers="2")
    assert as_text == vfs_options(dir_cache_time=300, read_chunk_size=2**20, umask=0o27, read_only=True, checkers=2)
    assert (as_text.dir_cache_time, as_text.read_chunk_size, as_text.umask) == (300.0, 2**20, 0o27)


def test_sizes_and_durations_can_be_switched_off_by_keyword():
    assert vfs_options(dir_cache_time=None, max_buffer_memory=None) == vfs_options(
        dir_cache_time="off", max_buffer_memory="off"
    )


def test_defaults_are_those_of_the_table():
    options = vfs_options()
    assert (options.dir_cache_time, options.poll_interval, options.timeout) == (300.0, 60.0, 300.0)
    assert (options.buffer_size, options.read_chunk_size, options.read_chunk_size_limit) == (
        2**24,
        2**27,
        None,
    )
    assert (options.umask, options.dir_perms, options.file_perms) == (0o22, 0o777, 0o666)
    assert (options.uid, options.gid, options.name, options.read_only) == (None, None, None, False)
    assert options.cache_dir.endswith("ftpvfs")


def test_an_unknown_keyword_names_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown keyword cache_mod.*cache_mode"):
        vfs_options(cache_mod="off")


def test_each_keyword_may_be_written_as_its_flag():
    assert vfs_options(vfs_cache_mode="full", vfs_read_chunk_size=2**20) == vfs_options(
        cache_mode="full", read_chunk_size="1Mi"
    )
    for row in config.OPTIONS:
        if row.section == "vfs":
            default = getattr(vfs_options(), row.field)
            assert vfs_options(**{row.flag.replace("-", "_"): default}) == vfs_options()


def test_a_keyword_in_both_forms_is_refused_with_both_names():
    with pytest.raises(TypeError, match=r"cache_mode and vfs_cache_mode"):
        vfs_options(vfs_cache_mode="full", cache_mode="full")


def test_an_unknown_keyword_with_the_flags_prefix_names_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown keyword vfs_cache_mod; the nearest known one is vfs_cache_mode"):
        vfs_options(vfs_cache_mod="off")


def test_an_unknown_keyword_is_told_where_options_of_the_store_go():
    with pytest.raises(ConfigError, match=r"unknown keyword endpoint_url.*storage_options"):
        vfs_options(endpoint_url="http://127.0.0.1:9000")


def test_a_folder_may_be_any_path_like(tmp_path):
    class Folder:
        def __fspath__(self):
            return str(tmp_path)

    assert vfs_options(cache_dir=Folder()) == vfs_options(cache_dir=tmp_path) == vfs_options(cache_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("dir_cache_time", -1),
        ("dir_cache_time", float("nan")),
        ("dir_cache_time", True),
        ("read_chunk_size", -1),
        ("read_chunk_size", 1.5),
        ("read_only", 1),
        ("umask", "9"),
        ("umask", -1),
        ("checkers", 0),
        ("uid", 2**32),
        ("name", "a/b"),
        ("cache_mode", None),
        ("low_level_retries", "ten"),
    ],
)
def test_a_keyword_that_cannot_be_right_is_refused_by_name(keyword, value):
    with pytest.raises(ConfigError, match=f"keyword {keyword}: "):
        vfs_options(**{keyword: value})


def test_an_unknown_cache_mode_is_refused_with_those_that_there_are():
    assert "'fast' is not known; write off or minimal or writes or full" in refusal("--vfs-cache-mode", "fast")


# --- the command line


def test_nothing_at_all_serves_the_current_folder_on_localhost():
    loaded = load([], {})
    assert (loaded.command, loaded.url, loaded.storage_options) == ("serve", ".", {})
    assert loaded.server.addr == ("localhost", 2121)
    assert (loaded.server.user, loaded.server.password) == ("anonymous", "")
    assert loaded.server.passive_port == range(30000, 32001)
    assert (loaded.log.level, loaded.log.file) == ("NOTICE", "")


@pytest.mark.parametrize(
    "argv",
    [
        ["s3://b", "--read-only"],
        ["--read-only", "s3://b"],
        ["serve", "--read-only", "s3://b"],
        ["serve", "s3://b", "--read-only=true"],
        ["--read-only", "--", "s3://b"],
        ["--read-only=false", "s3://b", "--read-only"],  # the last one wins
    ],
)
def test_url_and_flags_come_in_any_order(argv):
    loaded = load(argv, {})
    assert (loaded.url, loaded.vfs.read_only) == ("s3://b", True)


def test_boolean_flags_can_be_switched_off():
    assert load(["--read-only=false"], {"FTPVFS_READ_ONLY": "true"}).vfs.read_only is False


def test_short_flags():
    assert load(["-L"], {}).vfs.copy_links is True
    assert load(["-v"], {}).log.level == "INFO"
    assert load(["-vv"], {}).log.level == "DEBUG"
    assert load(["-h"], {}).command == "help"


def test_rclones_flag_for_a_log_in_json():
    assert load(["--use-json-log"], {}).log.format == load(["--log-format", "json"], {}).log.format == "json"
    assert load([], {}).log.format == "text"
    assert "--use-json-log says otherwise" in refusal("--use-json-log", "--log-format", "text")


def test_values_come_behind_a_space_or_an_equals_sign():
    assert load(["--pass", "a=b"], {}).server.password == "a=b"
    assert load(["--pass=-a=b"], {}).server.password == "-a=b"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--vfs-cache-mod", "off"], ["--vfs-cache-mod;", "--vfs-cache-mode"]),
        (["--dir-cache"], ["unknown flag --dir-cache;", "--dir-cache-time"]),  # no abbreviations
        (["--pas=hunter2"], ["unknown flag --pas;", "--pass"]),
        (["-x"], ["unknown flag -x;"]),
        (["--addr"], ["--addr: the value is missing"]),
        (["--addr", "--read-only"], ["--addr: the value is missing"]),
        (["--addr", "2121"], ["--addr: '2121' has no port", ":2121"]),
        (["--dir-cache-time", "5x"], ["--dir-cache-time: '5x' is no duration", "1h30m"]),
        (["--buffer-size=1KB"], ["--buffer-size: '1KB' is no size", "10G"]),
        (["--read-only=maybe"], ["--read-only: 'maybe' is neither true nor false"]),
        (["--log-level", "LOUD"], ["--log-level: 'LOUD' is not known", "NOTICE"]),
        (["--public-ip", "::1"], ["--public-ip: '::1' is no IPv4 address", "203.0.113.7"]),
        (["-v", "--log-level", "INFO"], ["--log-level", "-v"]),
        (["a", "b"], ["more than one URL"]),
        (["serve", "a", "b"], ["more than one URL"]),
        (["check-confg", "x.ini"], ["more than one URL", "check-config"]),
        (["check-config"], ["name one ini file"]),
        (["--option", "novalue", "s3://b"], ["--option: no KEY=VALUE"]),
        (["--option", "a=1"], ["--option: storage options but no URL"]),
    ],
)
def test_a_bad_command_line_is_refused_in_one_line(argv, words):
    message = refusal(*argv)
    for word in words:
        assert word in message
    assert "hunter2" not in message


def test_storage_options_stay_as_they_were_written_for_their_store_to_read():
    flags = ["anon=true", 'kwargs={"a": [1]}', "key=text", "secret=12345678", 'id="7"', "token=a=b"]
    loaded = load(["s3://b", *(f"--option={flag}" for flag in flags)], {})
    expected = dict(flag.split("=", 1) for flag in flags)
    assert loaded.storage_options == expected


# --- environment


def test_a_variable_sets_an_option():
    loaded = load([], {"FTPVFS_VFS_READ_CHUNK_SIZE": "1Mi", "FTPVFS_URL": "memory://", "FTPVFS_PASS": "x", "HOME": "/"})
    assert (loaded.vfs.read_chunk_size, loaded.url, loaded.server.password) == (2**20, "memory://", "x")


def test_a_bad_variable_is_refused_by_name():
    message = refusal(FTPVFS_DIR_CACHE_TIME="5x")
    assert message.startswith("FTPVFS_DIR_CACHE_TIME: '5x' is no duration")


def test_a_misspelt_variable_names_the_nearest_one():
    assert "unknown variable FTPVFS_READONLY; the nearest known one is FTPVFS_READ_ONLY" in refusal(FTPVFS_READONLY="1")


@pytest.mark.parametrize("name", ["SERVICE_HOST", "SERVICE_PORT", "PORT", "PORT_2121_TCP", "PORT_2121_TCP_PROTO"])
def test_the_variables_of_a_kubernetes_service_are_only_warned_about(name):
    [warning] = load([], {f"FTPVFS_{name}": "tcp://10.0.0.1:2121"}).warnings
    assert f"FTPVFS_{name}" in warning


def test_an_empty_variable_counts_as_not_set(ini):
    path = ini("[server]\npass = secret\n")
    assert load(["--config", path], {"FTPVFS_PASS": "", "FTPVFS_DIR_CACHE_TIME": ""}).server.password == "secret"


# --- ini


def test_the_documented_ini_file_is_understood(ini):
    loaded = load(["--config", ini(DESIGN_EXAMPLE)], {})
    assert loaded.server.addr == ("", 2121)
    assert loaded.server.public_ip == ("203.0.113.7", ())
    assert loaded.url == "s3://bucket/prefix"
    assert loaded.storage_options == {"endpoint_url": "http://127.0.0.1:9000"}
    assert (loaded.vfs.cache_mode, loaded.log.level) == ("off", "INFO")


def test_users_and_listeners_of_the_documented_file(ini):
    loaded = load(["--config", ini(DESIGN_EXAMPLE)], {})
    alice, bob = loaded.users  # and nobody else: anonymous is off
    assert (alice.name, alice.password, alice.password_hash) == ("alice", None, HASH)
    assert (alice.home, alice.perm, alice.url) == ("/alice", "elradfmwMT", "")
    assert (bob.name, bob.home, bob.perm, bob.url) == ("bob", "/", "elr", "gs://other-bucket/bob")
    [listener] = loaded.listeners
    assert (listener.addr, listener.tls.mode, listener.tls.cert) == (("", 2121), "explicit", "/etc/ftpvfs/cert.pem")
    assert HASH not in repr(loaded)
    assert "bucket" not in repr(loaded)


def test_nobody_but_those_in_the_file_may_log_in_unless_asked_for(ini):
    def names(text, *argv):
        return [user.name for user in load(["--config", ini(text), *argv], {}).users]

    assert [user.name for user in load([], {}).users] == ["anonymous"]
    assert names("[user:alice]\npassword = a\n") == ["alice"]
    assert names("[user:alice]\npassword = a\n[user:anonymous]\nperm = elr\n") == ["alice", "anonymous"]
    assert names("[user:alice]\npassword = a\n", "--user", "bob", "--pass", "b") == ["bob", "alice"]
    assert "--user: alice is [user:alice] already" in refusal(
        "--config", ini("[user:alice]\npassword = a\n"), "--user", "alice"
    )


def test_a_user_may_have_a_store_with_options_of_its_own(ini):
    path = ini(
        "[backend]\nurl = s3://b\nkey = common\n"
        "[user:alice]\npassword = a\nurl = s3://c\noption.key = own\noption.password = x\noption.n = 5\n"
    )
    [alice] = load(["--config", path], {}).users
    assert alice.storage_options == {"key": "own", "password": "x", "n": "5"}


def test_listeners_have_their_own_tls_or_the_common_one(ini):
    path = ini(
        "[tls]\ncert = c.pem\nmode = explicit\nmin_version = tls1.3\n"
        "[listener:inside]\naddr = 127.0.0.1:21\ntls_mode = off\n"
        "[listener:outside]\naddr = :990\ntls_mode = implicit\ncert = d.pem\nrequire_tls_reuse = true\n"
    )
    inside, outside = load(["--config", path], {}).listeners
    assert (inside.name, inside.addr, inside.tls.mode) == ("inside", ("127.0.0.1", 21), "off")
    assert (outside.addr, outside.tls.mode, outside.tls.cert) == (("", 990), "implicit", "d.pem")
    assert (outside.tls.min_version, outside.tls.require_reuse, inside.tls.require_reuse) == ("tls1.3", True, False)
    both = load(["--config", path, "--addr", ":2121"], {}).listeners
    assert [(each.name, each.addr.port, each.tls.mode) for each in both[:1]] == [("", 2121, "explicit")]
    assert len(both) == 3


def test_a_certificate_alone_means_implicit_tls_as_with_rclone():
    assert [each.tls.mode for each in load(["--cert", "c.pem"], {}).listeners] == ["implicit"]
    assert [each.tls.mode for each in load(["--cert", "c.pem", "--tls-mode", "off"], {}).listeners] == ["off"]
    assert [each.tls.mode for each in load([], {}).listeners] == ["off"]
    assert "without a certificate; write --cert FILE" in refusal("--tls-mode", "explicit")
    assert "without a certificate" in refusal("--key", "k.pem")


def test_a_client_ca_is_refused_where_clients_could_do_without():
    given = ["--cert", "c.pem", "--client-ca", "ca.pem"]
    assert "nobody needs TLS to log in" in refusal(*given, "--tls-mode", "explicit")
    for mode in ("required", "implicit"):
        assert load([*given, "--tls-mode", mode], {}).listeners[0].tls.client_ca == "ca.pem"


def test_who_may_log_in_is_decided_in_one_place(ini):
    path = ini("[user:alice]\npassword = a\n")
    assert "--authorizer: leaves no room for [user:alice]" in refusal("--config", path, "--authorizer", "a:B")
    assert "--authorizer: leaves no room for --user" in refusal("--authorizer", "a:B", "--pass", "x")
    assert load(["--authorizer", "a:B"], {}).users == ()
    assert load(["--auth-proxy", "p"], {}).users == ()
    assert "--auth-proxy: leaves no room for a URL" in refusal("--auth-proxy", "p", "s3://b")
    assert "--authorizer: leaves no room for --auth-proxy" in refusal("--auth-proxy", "p", "--authorizer", "a:B")
    assert "'a.b' names no class" in refusal("--authorizer", "a.b")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("pass = a#b", "a#b"),
        ("pass = a;b", "a;b"),
        ("pass =#a", "#a"),
        ("pass = a b", "a b"),
        ("pass = a=b:c", "a=b:c"),
        (
            "pass = $argon2id$v=19$m=65536,t=3,p=4$c2FsdA$aGFzaA#x;y",
            "$argon2id$v=19$m=65536,t=3,p=4$c2FsdA$aGFzaA#x;y",
        ),
        ("pass = a ; a comment", "a"),
        ("pass = a\t# a comment", "a"),
        ("pass=a", "a"),
        ("pass = \u00fc\u2603", "\u00fc\u2603"),
        ("pass =", ""),
    ],
)
def test_a_comment_starts_behind_white_space_only(ini, line, value):
    path = ini(f"; first\n[server]\n# pass = x ; y\n  # indented\n{line}\n")
    assert load(["--config", path], {}).server.password == value


def test_a_password_never_becomes_empty_by_a_comment_sign(ini):
    path = ini("[server]\npass = #secret\n")
    message = refusal("--config", path)
    assert message.startswith(f"{path}:2: pass")
    assert "secret" not in message


def test_json_in_the_backend_section_may_hold_comment_signs_and_span_lines(ini):
    path = ini('[backend]\nurl = s3://b\na = "x ;y #z" ; note\nb = {"k": "a #b",\n   "l": 2}\nc = 5\nd = a "b\n')
    loaded = load(["--config", path], {})
    assert loaded.storage_options == {"a": '"x ;y #z"', "b": '{"k": "a #b",\n"l": 2}', "c": "5", "d": 'a "b'}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[server]\nadr = :1\n", 2, ["adr in [server]", "unknown key", "nearest known one is addr"]),
        ("[vfs]\nvfs_cache_mode = off\n", 2, ["vfs_cache_mode", "cache_mode"]),
        ("[server]\nread_only = true\n", 2, ["read_only belongs in [vfs]"]),
        ("[vfs]\nvfs_pass = x\n", 2, ["unknown key"]),
        ("[vsf]\n", 1, ["unknown section [vsf]", "[vfs]"]),
        ("[tls]\nmod = explicit\n", 2, ["mod in [tls]", "unknown key", "mode"]),
        ("[user:alice]\nhome = /\n", 1, ["[user:alice] has no password_hash", "hash-password"]),
        ("[user:alice]\npassword = a\npassword_hash = " + HASH + "\n", 1, ["give one of them"]),
        ("[user:alice]\npassword_hash = hunter2\n", 2, ["the value is no argon2 hash", "hash-password"]),
        ("[user:alice]\npassword = a\nprem = r\n", 3, ["unknown key", "nearest known one is perm"]),
        ("[user:alice]\npassword = a\nperm = rx\n", 3, ["'rx' is no permissions", "elradfmwMT"]),
        ("[user:alice]\npassword = a\noption.key = k\n", 1, ["no url for its storage options"]),
        ("[user:]\npassword = a\n", 1, ["[user:] has no name", "[user:alice]"]),
        ("[user]\npassword = a\n", 1, ["[user] has no name", "[user:alice]"]),
        ("[users:alice]\npassword = a\n", 1, ["unknown section [users:alice]", "[user:NAME]"]),
        ("[listener:a]\ncert = x\n", 1, ["[listener:a] has no addr", "addr = :990"]),
        ("[listener:a]\naddr = :1\nmode = off\n", 3, ["unknown key", "tls_mode"]),
        ("[listener:a]\naddr = :1\ntls_mode = required\n", 1, ["[listener:a]: TLS mode required without a cert"]),
        ("[listener:a]\naddr = :21\n[listener:b]\naddr = :21\n", 3, ["[listener:b]", ":21", "[listener:a]"]),
        ("[server]\naddr = :21\n[listener:c]\naddr = 127.0.0.1:21\n", 3, ["[listener:c]", "[server] or --addr"]),
        ("[server]\nworkers = 100000\n", 2, ["'100000' is no whole number from 1 to 256"]),
        ("[user:alice]\npassword_hash = " + HASH[:-3] + "\n", 2, ["the value is no argon2 hash"]),
        ("[user:alice]\npassword_hash = $argon2id$v=19$m=8,t=1,p=1$a$b\n", 2, ["the value is no argon2 hash"]),
        ("[vfs]\ndir_cache_time = 5x ; five\n", 2, ["dir_cache_time in [vfs]: '5x' is no duration", "1h30m"]),
        ("\n[server]\naddr = :1\n\naddr = :2\n", 5, ["'addr' is repeated"]),
        ("[vfs]\n[server]\n[vfs]\n", 3, ["section 'vfs' is repeated"]),
        ("[server]\naddr\n", 2, ["'=' is missing"]),
        ("[server]\naddr :2121\n", 2, ["addr is not followed by '='"]),
        ("[server]\nuser: me\n", 2, ["user is not followed by '='"]),
        ("[server]\n  addr = :2121\n", 2, ["indented"]),
        ("[server]\npass = hunter2\n  user = me\n", 2, ["indented"]),
        ("[server]\nhunter2\n", 2, ["'=' is missing"]),
        ("[server\naddr = :1\n", 1, ["a section has no end"]),
        ("[log]\nlevel = INFO\n[vfs\nread_only = true\n", 3, ["a section has no end"]),
        ("addr = :1\n", 1, ["before the first section"]),
        ("[backend]\nulr = s3://b\nsecret = hunter2\n", 1, ["[backend]", "no URL"]),
        ("[vfs]\ncache_mode = fast\n", 2, ["'fast' is not known"]),
    ],
)
def test_a_bad_ini_file_is_refused_with_file_and_line(ini, text, line, words):
    path = ini(text)
    message = refusal("--config", path)
    assert message.startswith(f"{path}:{line}: ")
    for word in words:
        assert word in message
    assert "hunter2" not in message


def test_listeners_may_share_a_port_on_different_addresses_and_any_free_one(ini):
    addresses = ["127.0.0.1:21", "127.0.0.2:21", ":0", ":0"]
    path = ini("".join(f"[listener:l{number}]\naddr = {addr}\n" for number, addr in enumerate(addresses)))
    assert [str(each.addr.port) for each in load(["--config", path], {}).listeners] == ["21", "21", "0", "0"]


def test_a_missing_or_unreadable_ini_file_is_refused(tmp_path):
    assert "No such file" in refusal("--config", str(tmp_path / "none.ini"))
    assert "Is a directory" in refusal(FTPVFS_CONFIG=str(tmp_path))
    (tmp_path / "bad.ini").write_bytes(b"[server]\nuser = \xff\n")
    assert "not UTF-8" in refusal("--config", str(tmp_path / "bad.ini"))


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    (tmp_path / "dos.ini").write_bytes(b"\xef\xbb\xbf[server]\r\nuser = me\r\n")
    assert load(["--config", str(tmp_path / "dos.ini")], {}).server.user == "me"


def test_all_that_is_wrong_with_a_file_is_found_at_once(ini):
    path = ini("[server]\naddr = 1\nnone = 1\n[vsf]\n[vfs]\numask = 9\n")
    problems = [str(problem) for problem in config.check_file(path)]
    assert [problem.removeprefix(path).split()[0] for problem in problems] == [":2:", ":3:", ":4:", ":6:"]
    assert config.check_file(ini(DESIGN_EXAMPLE, "good.ini")) == []


# --- all sources together


def test_flag_beats_variable_beats_ini_beats_default(ini):
    path = ini("[vfs]\ndir_cache_time = 1m\npoll_interval = 2m\nuid = 7\n")
    environ = {"FTPVFS_DIR_CACHE_TIME": "3m", "FTPVFS_POLL_INTERVAL": "4m", "FTPVFS_CONFIG": path}
    loaded = load(["--dir-cache-time", "5m"], environ).vfs
    assert (loaded.dir_cache_time, loaded.poll_interval, loaded.uid, loaded.gid) == (300.0, 240.0, 7, None)


def test_the_url_comes_from_the_argument_then_the_variable_then_the_ini(ini):
    path = ini("[backend]\nurl = memory://ini\nkey = ini\nother = 1\n")
    assert load(["--config", path], {}).url == "memory://ini"
    assert load(["--config", path], {"FTPVFS_URL": "memory://env"}).url == "memory://env"
    loaded = load(["--config", path, "memory://arg", "--option", "key=flag"], {"FTPVFS_URL": "memory://env"})
    assert (loaded.url, loaded.storage_options) == ("memory://arg", {"key": "flag", "other": "1"})


def test_secrets_do_not_show_in_the_configuration(ini):
    path = ini("[server]\npass = hunter2\n[backend]\nurl = sftp://me:hunter2@host\nsecret = hunter2\n")
    loaded = load(["--config", path], {})
    assert "hunter2" not in repr(loaded) + repr(loaded.server)


SAMPLES = {
    "addr": ":1",
    "passive_port": "5-6",
    "public_ip": "192.0.2.1",
    "proxy_protocol_from": "10.0.0.0/8",
    "authorizer": "some.module:Class",
    "bwlimit": "1M:2M",
    "mode": "explicit",
    "min_version": "tls1.3",
}


@pytest.mark.parametrize("row", config.OPTIONS, ids=lambda row: row.flag)
def test_every_option_is_a_flag_a_variable_and_a_key_and_is_documented(row, ini):
    samples = {
        "bool": "true",
        "on|off": "off",
        "SizeSuffix": "3Mi",
        "Duration": "7s",
        "FileMode": "711",
        "int": "3",
        "uint32": "3",
    }
    text = samples.get(row.kind.name) or SAMPLES.get(row.key)
    text = text or {"CacheMode": "off", "LogLevel": "ERROR"}.get(row.kind.name, row.kind.name.split("|")[-1])
    value = row.kind.parse(text)

    def found(*argv: str, **environ: str) -> object:
        return getattr(getattr(load(argv, {**needed, **environ}), row.section), row.field)

    needed = {"FTPVFS_CERT": "c.pem"} if row.section == "tls" and row.key != "cert" else {}
    assert found(f"--{row.flag}={text}") == value
    assert found(**{row.variable: text}) == value
    assert found("--config", ini(f"[{row.section}]\n{row.key} = {text}\n")) == value
    if row.hidden:
        return
    assert f"--{row.flag} " in config.help_text()
    for word in (f"`--{row.flag}", f"`[{row.section}] {row.key}`", f"`{row.variable}`"):
        assert word in config.reference()


def test_names_follow_from_the_fields():
    for row in config.OPTIONS:
        assert row.variable == "FTPVFS_" + row.flag.upper().replace("-", "_")
        if row.section == "vfs":
            assert row.flag.removeprefix("vfs-").replace("-", "_") == row.field == row.key
        if row.section == "tls":
            assert row.flag.replace("tls-", "").replace("-", "_") == row.field == row.key
    assert len({row.flag for row in config.OPTIONS}) == len(config.OPTIONS)


def test_a_default_reads_back_as_itself():
    for section, options in config.SECTIONS.items():
        for row in config.OPTIONS:
            if row.section == section and row.default is not None:
                default = getattr(options(), row.field)
                assert row.kind.parse(row.kind.format(default)) == default


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        vfs_options().read_only = True


def test_help_shows_groups_and_rclones_notation():
    text = config.help_text()
    assert "Server flags:" in text
    assert "VFS flags:" in text
    for default in ("(default 5m0s)", "(default 128Mi)", "(default 022)", "(default localhost:2121)"):
        assert default in " ".join(text.split())


def test_the_reference_does_not_depend_on_the_machine():
    assert str(Path.home()) not in config.reference()
    assert config.vfs_options().cache_dir not in config.reference()


def test_the_readme_holds_the_current_reference():
    text = README.read_text(encoding="utf-8")
    assert config.with_reference(text) == text, "run: python -m ftpvfs.config README.md"


def test_the_reference_is_written_between_its_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{config.BEGIN}\noutdated\n{config.END}\nafter\n", encoding="utf-8")
    assert config.main([str(readme)]) == 0
    written = readme.read_text(encoding="utf-8")
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "outdated" not in written
    assert config.with_reference(written) == written


# --- doors that stand open


@pytest.mark.parametrize(
    ("argv", "environ", "server"),
    [
        (["--user", "bob"], {}, ""),
        (["--pass", ""], {}, ""),
        (["--user", "bob", "--pass", ""], {}, ""),
        ([], {"FTPVFS_USER": "bob"}, ""),
        ([], {}, "[server]\nuser = bob\n"),
        ([], {}, "[server]\nuser = bob\npass =\n"),
        ([], {}, "[server]\npass =\n"),
    ],
)
def test_nobody_comes_in_with_any_password_beside_users_who_have_one(ini, argv, environ, server):
    path = ini(f"{server}[user:alice]\npassword = a\n")
    with pytest.raises(ConfigError, match=r"--user: without --pass any password lets .+ in .*write --pass, or \[user:"):
        load(["--config", path, *argv], environ)
    assert load(["--config", path, *argv, "--pass", "b"], environ).users[0].password == "b"


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("server", "authorizer"),
        ("server", "auth_proxy"),
        ("tls", "cert"),
        ("tls", "key"),
        ("tls", "client_ca"),
        ("listener:out]\naddr = :990\n[listener:in", "cert"),
        ("listener:out", "client_ca"),
        ("vfs", "cache_dir"),
        ("user:alice", "home"),
        ("user:alice", "password"),
        ("user:alice", "password_hash"),
        ("user:alice", "perm"),
        ("user:alice", "url"),
    ],
)
def test_a_value_that_a_template_has_left_empty_opens_nothing(ini, section, key):
    path = ini(f"[{section}]\n{key} =\n")
    with pytest.raises(ConfigError, match=rf"{key} in \[.*(the value is empty|is no )"):
        load(["--config", path], {})


def test_a_flag_that_is_empty_opens_nothing(ini):
    for flag in ("--authorizer", "--auth-proxy", "--cert", "--client-ca", "--cache-dir"):
        assert f"{flag}: the value is empty" in refusal(flag, "")


def test_an_empty_home_is_refused_in_a_program_too():
    with pytest.raises(ValueError, match="the home is empty"):
        VFSAuthorizer().add_user("alice", "secret", "")
