"""What --help prints, and the README's tables of options."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ftpvfs.config.table import LISTENER_OPTIONS, OPTIONS, PREFIX, URL_OPTION, USER_OPTIONS, Option
from ftpvfs.config.values import BOOL, ConfigError

ROWS = (*OPTIONS, *USER_OPTIONS)
LISTENERS = "One of several addresses to listen on; has the other TLS options' keys, too, under the flags' names: " + (
    ", ".join(f"`{row.key}`" for row in LISTENER_OPTIONS if row.field != "addr")
)


class _Entry(NamedTuple):
    """What help and reference say about one option."""

    group: str
    flag: str
    short: str
    kind: str
    key: str
    variable: str
    default: str
    meaning: str


def _entry(row: Option) -> _Entry:
    default = row.shown
    if row.default:
        default = f"`{row.kind.format(row.kind.parse(row.default))}`"
    kind = "" if row.kind is BOOL else row.kind.name
    key = f"[{row.section}] {row.key}"
    return _Entry(row.group, row.flag, row.short, kind, key, row.variable, default, row.meaning)


def _entries() -> list[_Entry]:
    config = f"{PREFIX}CONFIG"
    return [
        *(_entry(row) for row in ROWS if not row.hidden),
        _Entry("TLS", "", "", "", "[listener:NAME] addr", "", "", LISTENERS),
        _Entry("Logging", "verbose", "v", "", "", "", "", "Log level INFO; -vv is DEBUG"),
        _Entry("Logging", "use-json-log", "", "", "", "", "", "The same as --log-format json"),
        _entry(URL_OPTION)._replace(flag=""),
        _Entry(
            "Backend",
            "option",
            "",
            "KEY=VALUE",
            "[backend] KEY",
            "",
            "",
            "A storage option for fsspec, JSON where it parses as JSON; repeatable",
        ),
        _Entry("Configuration", "config", "", "FILE", "", config, "", "Read options from this ini file"),
        _Entry("Configuration", "version", "", "", "", "", "", "Print the version"),
        _Entry("Configuration", "help", "h", "", "", "", "", "Print this help"),
    ]


def help_text() -> str:
    """What --help prints: each group's flags with their types, meanings and defaults."""
    entries = [entry for entry in _entries() if entry.flag]
    heads = {entry: f"{f'-{entry.short},' if entry.short else '':>5} --{entry.flag} {entry.kind}" for entry in entries}
    width = max(map(len, heads.values())) + 2
    out = [
        "Serve a folder, a bucket or any other fsspec store over FTP.",
        "",
        "Usage:",
        "  ftpvfs [serve] [URL] [flags]     URL is a folder (default: the current one) or e.g. s3://bucket/prefix",
        "  ftpvfs check-config FILE",
        "  ftpvfs cache ls|verify|flush [URL] [flags]   see what the disk cache has, compare, store what waits",
        "  ftpvfs hash-password             make a password_hash for a [user:NAME] in the ini file",
        "",
        f"Each flag is also a variable, --read-only is {PREFIX}READ_ONLY, and a key in the ini file.",
    ]
    for group in dict.fromkeys(entry.group for entry in entries):
        out += ["", f"{group} flags:"]
        for entry in entries:
            if entry.group == group:
                default = "" if entry.default in ("", "`false`", "`0`") else f" (default {entry.default})"
                text = (entry.meaning + default).replace("`", "")
                head, indent = heads[entry].ljust(width), " " * width
                out += textwrap.wrap(text, 110, initial_indent=head, subsequent_indent=indent)
    return "\n".join(out) + "\n"


def reference() -> str:
    """The README's tables of options, one a group, in Markdown."""
    entries = _entries()
    out = []
    for group in dict.fromkeys(entry.group for entry in entries):
        out += [f"**{group}**", "", "| Flag | Ini | Variable | Default | Meaning |", "|---|---|---|---|---|"]
        for entry in entries:
            if entry.group == group:
                out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(entry)) + " |")
        out.append("")
    return "\n".join(out)


def _cells(entry: _Entry) -> Iterator[str]:
    short = f"`-{entry.short}`, " if entry.short else ""
    flag = f"--{entry.flag} {entry.kind}".rstrip() if entry.flag else "URL" if entry.variable else ""
    yield f"{short}`{flag}`" if flag else ""
    yield f"`{entry.key}`" if entry.key else ""
    yield f"`{entry.variable}`" if entry.variable else ""
    yield entry.default
    yield entry.meaning


BEGIN, END = "<!-- options -->", "<!-- /options -->"


def with_reference(readme: str) -> str:
    """The README's text with the current reference between its two markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"no {BEGIN} followed by {END}")
    return f"{before}{begin}\n{reference()}\n{end}{after}"


def main(argv: Sequence[str]) -> int:
    """`python -m ftpvfs.config README.md` writes the reference into the README."""
    for name in argv:
        path = Path(name)
        path.write_text(with_reference(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0
