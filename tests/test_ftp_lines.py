"""Lines of the control connection: each that ends gets exactly one final reply, whatever is in it and however it comes.

A line ends with CR LF (RFC 959, section 5.3), or with LF alone, as devices and people with netcat send it.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import Store

Serve = Callable[..., tuple[str, int]]
# Only guards against hanging.
PATIENCE = 30.0
LOGIN = (b"USER anonymous", b"PASS guest", b"TYPE I")
FINAL = re.compile(r"([2-5]\d\d) .*")


class Control:
    """A control connection of bytes."""

    def __init__(self, address: tuple[str, int], *, end: bytes = b"\r\n") -> None:
        self.end = end
        self._socket = socket.create_connection(address, timeout=PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._replies = self._socket.makefile("rb")
        self.closed = False
        assert self.reply().startswith("220 ")

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exception: object) -> None:
        self._replies.close()
        self._socket.close()

    def log_in(self) -> None:
        for line in LOGIN:
            assert self.ask(line)[0] in "23"

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def ask(self, line: bytes) -> str:
        """Send a line; return its final reply."""
        self.send(line + self.end)
        return self.reply()

    def reply(self) -> str:
        """Return the last line of the next final reply, "" at the connection's end."""
        while True:
            line = self._replies.readline()
            if not line:
                self.closed = True
                return ""
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            if FINAL.fullmatch(text):
                return text

    def rest(self) -> list[str]:
        """Return all final replies up to the connection's end."""
        return list(iter(self.reply, ""))


@pytest.fixture
def address(local_store: Store, ftp_server: Serve) -> tuple[str, int]:
    local_store.write("a", b"content")
    local_store.write("in/a.csv", b"1")
    return ftp_server(local_store, attributes={"auth_failed_timeout": 0.001, "max_login_attempts": 10**9})


@pytest.fixture
def control(address: tuple[str, int]) -> Iterator[Control]:
    with Control(address) as made:
        made.log_in()
        yield made


def test_a_line_that_ends_with_lf_alone_is_answered(address: tuple[str, int]) -> None:
    with Control(address, end=b"\n") as lf:
        lf.log_in()
        assert lf.ask(b"PWD").startswith("257 ")
        lf.send(b"NOOP\nPWD\nMKD new\nSIZE a\nRMD new\n")
        assert [lf.reply()[:3] for _ in range(5)] == ["200", "257", "257", "213", "250"]
        assert lf.ask(b"SIZE a\r").startswith("213 ")  # and now CR LF


def test_a_line_that_ends_with_lf_alone_is_answered_among_others(control: Control) -> None:
    for end in (b"\n", b"\r\n", b"\n", b"\n"):
        control.send(b"PWD" + end)
        assert control.reply().startswith("257 ")
    control.send(b"\n")
    assert control.reply().startswith("500 ")


def test_a_name_with_a_line_feed_is_refused_and_no_two_commands(control: Control) -> None:
    """Whoever ends lines with CR LF means the LF before that for a part of the name."""
    control.send(b"MKD new\nDELE a\r\nSIZE a\r\n")
    assert [control.reply()[:3] for _ in range(2)] == ["501", "213"]
    assert control.ask(b"CWD new").startswith("550 ")


@pytest.mark.parametrize("end", [b"\r\n", b"\n"], ids=["CR LF", "LF"])
def test_lines_may_come_byte_by_byte(address: tuple[str, int], end: bytes) -> None:
    with Control(address, end=end) as slow:
        for byte in end.join([*LOGIN, b"PWD", b"", b"SIZE a", b"MKD n\xc3\xbc"]) + end:
            slow.send(bytes([byte]))
        codes = [slow.reply()[:3] for _ in range(7)]
    assert codes == ["331", "230", "200", "257", "500", "213", "257"]


@pytest.mark.parametrize(
    "signals",
    [
        b"\xff\xf4\xff\xf2",  # IP, Synch: what RFC 959 wants before ABOR
        b"\xff\xf4\xff",  # the same where the last byte has come out of band
        b"\xff\xf1",  # NOP
        b"\xff\xfb\x18\xff\xfd\x01",  # WILL TERMINAL-TYPE, DO ECHO
        b"\xff\xff",
    ],
)
def test_telnet_signals_before_a_command_are_no_part_of_it(control: Control, signals: bytes) -> None:
    assert control.ask(signals + b"PWD").startswith("257 ")
    assert control.ask(signals + b"SIZE a").startswith("213 ")
    assert control.ask(signals).startswith("500 ")


def test_an_overlong_line_is_answered_once(control: Control) -> None:
    for length in (6_000, 70_000):
        assert control.ask(b"x" * length).startswith("500 ")
        assert control.ask(b"PWD").startswith("257 ")


def test_a_user_whose_name_is_not_utf_8_can_be_written_into_the_log(
    address: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    with Control(address) as control:
        assert control.ask(b"USER caf\xe9").startswith("331 ")
        assert control.ask(b"x" * 9000).startswith("500 ")  # logged with the user's name
    assert "[caf\\udce9] Command too long." in caplog.text
    assert caplog.text.encode()


def test_replies_come_in_the_order_of_their_commands_though_port_has_to_connect(control: Control) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        control.send(b"PORT 127,0,0,1,%d,%d\r\nPWD\r\nEPRT |1|127.0.0.1|%d|\r\nPWD\r\n" % (*divmod(port, 256), port))
        assert [control.reply()[:3] for _ in range(4)] == ["200", "257", "200", "257"]
    control.send(b"PORT 127,0,0,1,%d,%d\r\nRETR a\r\nPWD\r\n" % divmod(port, 256))  # nobody listens any more
    assert [control.reply()[:3] for _ in range(3)] == ["425", "425", "257"]


# --- fuzz

VERBS = (
    b"ABOR ALLO APPE CDUP CWD DELE EPRT EPSV FEAT HELP LIST MDTM MFMT MKD MLSD MLST MODE NLST NOOP OPTS PASS PASV"
    b" PORT PWD REIN REST RETR RMD RNFR RNTO SITE SIZE STAT STOR STOU STRU SYST TYPE USER XCUP XCWD XMKD XPWD XRMD"
    b" AUTH PBSZ PROT ACCT SMNT HOST LANG CLNT"
).split()
NAMES = (
    b"a", b"in", b"in/", b"a/", b"in/*.csv", b"*", b"", b" ", b"..", b"/", b"-la", b"-la in", b"nowhere/x", b"[",
    b"\xff", b"caf\xe9", b"\xff\xf4\xff\xf2", b"\0", b"a\0b", b"%s%n", b"\xc3\xbc", b"x" * 300, b"x" * 5000,
)  # fmt: skip
WORDS = (
    b"CHMOD 644 a", b"HELP", b"UTF8 OFF", b"MLST size;", b"MLST", b"A N", b"I", b"L 7", b"F", b"S", b"0", b"7", b"-1",
    b"9" * 30, b"20200102030405 a", b"ALL", b"1", b"2", b"|1|127.0.0.1|1|", b"127,0,0,1,255,255", b"1,2,3", b"100 R 7",
)  # fmt: skip
LONG = 100


def fuzzed(random_: random.Random) -> bytes:
    """Return a line without its end: mostly nearly a command."""
    kind = random_.random()
    verb, argument = random_.choice(VERBS), random_.choice(NAMES + WORDS)
    if kind < 0.7:
        line = verb + b" " + argument if random_.random() < 0.85 else verb
    elif kind < 0.9:
        line = bytearray(verb + b" " + argument)
        for _ in range(random_.randrange(1, 4)):
            line.insert(random_.randrange(len(line) + 1), random_.randrange(256))
        line = bytes(line)
    else:
        line = random_.randbytes(random_.randrange(LONG))
    return line.replace(b"\n", b"").rstrip(b"\r")


def may_end_the_session(line: bytes) -> bool:
    """Tell whether a line ends the session by right, or would leave the count of replies to chance."""
    return any(word in line.upper() for word in (b"QUIT", b"REIN", b"USER", b"PASS"))


@pytest.mark.parametrize("end", [b"\r\n", b"\n"], ids=["CR LF", "LF"])
@pytest.mark.parametrize("seed", range(3))
def test_every_fuzzed_line_gets_exactly_one_final_reply(address: tuple[str, int], seed: int, end: bytes) -> None:
    random_ = random.Random(seed)
    for _ in range(10):
        lines = [line for line in (fuzzed(random_) for _ in range(120)) if not may_end_the_session(line)]
        with Control(address, end=end) as control:
            control.log_in()
            stream = end.join([*lines, b"ABOR", b"NOOP", b"QUIT"]) + end
            while stream:  # in pieces as a network may make them
                length = random_.choice((1, 7, 500, 20_000))
                with contextlib.suppress(ConnectionError):
                    control.send(stream[:length])
                stream = stream[length:]
            replies = control.rest()
        # An ABOR of a transfer gets one reply, the transfer its own (426); both are lines of the client's.
        assert len(replies) == len(lines) + 3, [*zip(lines, replies, strict=False)][-3:]
        assert replies[-1].startswith("221 ")


@pytest.mark.parametrize("seed", range(2))
def test_every_fuzzed_line_before_the_login_is_answered_or_ends_the_session(
    address: tuple[str, int], seed: int
) -> None:
    random_ = random.Random(seed)
    lines = [line for line in (fuzzed(random_) for _ in range(200)) if b"QUIT" not in line.upper()]
    answered = 0
    with contextlib.ExitStack() as sessions:
        control = sessions.enter_context(Control(address))
        for line in lines:
            answer = control.ask(line)
            if not answer or answer.startswith("421 "):
                assert answer, f"the session ended without a word after {line!r}"
                control = sessions.enter_context(Control(address))
            answered += 1
    assert answered == len(lines)
