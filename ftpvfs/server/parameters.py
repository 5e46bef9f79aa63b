"""The verbs that set a session's parameters. pyftpdlib accepts some that change nothing; here each reply is true."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pyftpdlib.handlers import FTPHandler

# Offsets and sizes of files fit into 63 bits.
MOST_BYTES = 2**63 - 1


class Parameters(FTPHandler):
    """Type, restart marker, announced size and options of a `VFSHandler`'s session. Runs on its event loop."""

    # pyftpdlib's own.
    _current_type: str
    _current_facts: list[str]
    _available_facts: list[str]
    _restart_position: int
    _epsvall: bool

    # Bytes that ALLO has announced for the next upload.
    _allocated = 0

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._first_facts = list(self._current_facts)

    def ftp_TYPE(self, line: str) -> None:
        """Set the type of the transfers to come (RFC 959, section 3.1.1): `A`, `A N`, `I` or `L 8`."""
        kind = " ".join(line.upper().split())
        if kind in {"A", "A N"}:
            self._current_type = "a"
            self.respond("200 Type set to: ASCII.")
        elif kind in {"I", "L 8", "L8"}:
            self._current_type = "i"
            self.respond("200 Type set to: Binary.")
        elif kind[:1] in {"A", "E", "I", "L"}:
            self.respond(f'504 Type "{line}" is not supported; use A or I.')
        else:
            self.respond(f'501 There is no type "{line}".')

    def ftp_REST(self, line: str) -> None:
        """Set where the next RETR or STOR begins (RFC 3659, section 5)."""
        if _number(line) is None:
            self.respond("501 Invalid parameter: a number of bytes is needed.")
        else:
            super().ftp_REST(line)

    def ftp_ALLO(self, line: str) -> None:
        """Note how long the next file will be (RFC 959, section 4.1.3), so that its space is taken before it comes."""
        words = line.upper().split()
        size = _number(words[0]) if words else None
        is_record = len(words) == 3 and words[1] == "R" and _number(words[2]) is not None
        if size is None or not (len(words) == 1 or is_record):
            self.respond("501 Invalid parameter: a number of bytes is needed.")
            return
        self._allocated = size
        self.respond(f"200 Noted: the next upload has {size} bytes.")

    def ftp_OPTS(self, line: str) -> None:
        """Set an option (RFC 2389, section 4): the facts of MLST. UTF-8 is no option: it is always on."""
        name, _, value = line.partition(" ")
        if name.upper() not in {"UTF8", "UTF-8"}:
            super().ftp_OPTS(line)
        elif value.upper() not in {"", "ON"}:
            self.respond(f"501 UTF8 {value} is not supported: names are always UTF-8.")
        else:
            self.respond("200 Always in UTF8 mode.")

    def ftp_EPSV(self, line: str) -> None:
        """Open a passive data connection, or refuse all other kinds from now on (`EPSV ALL`; RFC 2428, section 4)."""
        if line.upper() != "ALL":
            super().ftp_EPSV(line)
            return
        self._epsvall = True
        self.respond("200 No other way to a data connection than EPSV is accepted now.")

    def ftp_REIN(self, line: str) -> None:
        """Log out, and forget every parameter (RFC 959, section 4.1.1)."""
        super().ftp_REIN(line)
        self._current_facts = list(self._first_facts)
        self._epsvall = False
        self._allocated = 0

    def ftp_MFMT(self, path: str, timeval: str) -> Any:
        """Set a file's modification time; what is no time is an error of syntax, and no file's."""
        if not _is_time(timeval):
            self.respond("501 Invalid time; expected: YYYYMMDDHHMMSS.")
            return None
        return super().ftp_MFMT(path, timeval)

    def ftp_SITE_HELP(self, line: str) -> None:
        """Tell the syntax of a SITE command, under the name that the list of all has."""
        command = f"SITE {line.upper()}"
        super().ftp_SITE_HELP(command if command in self.proto_cmds else line)


def _number(text: str) -> int | None:
    """Return the number of bytes that a text stands for: digits alone, not all that `int` takes."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else MOST_BYTES + 1
    return number if number <= MOST_BYTES else None


def _is_time(text: str) -> bool:
    try:
        datetime.strptime(text, "%Y%m%d%H%M%S")
    except ValueError:
        return False
    return len(text) == len("YYYYMMDDHHMMSS") and text.isascii() and text.isdigit()
