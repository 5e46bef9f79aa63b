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
            "A storage option for fsspec: text, unless the store knows it as something else; repeatable",
        ),
        _Entry("Configuration", "config", "", "FILE", "", config, "", "Read options from this ini file"),
        _Entry("Configuration", "version", "", "", "", "", "", "Print the version"),
        _Entry("Configuration", "help", "h", "", "", "", "", "Print this help"),
    ]


class _Usage(NamedTuple):
    """How a command is called, what it does in a line or a few, and the groups of flags that mean something to it."""

    form: str
    meaning: str
    groups: tuple[str, ...] = ()
    flags: tuple[tuple[str, str], ...] = ()  # those of this command alone, which are in no table


CACHE_GROUPS = ("VFS", "Performance", "Events", "Networking", "Logging", "Backend", "Configuration")
GIVE_THE_SAME = "Give the URL, --cache-dir, --name and storage options that the server has, or the same --config."
USAGES = {
    "serve": _Usage("[serve] [URL] [flags]", "serve URL: a folder (default: the current one) or e.g. s3://bucket/prefix"),
    "check-config": _Usage("check-config FILE", "say what is wrong with an ini file, or ok; contacts no store"),
    "cache": _Usage("cache ls|verify|flush [URL] [flags]", "look at the disk cache, compare, store what waits"),
    "cache ls": _Usage(
        "cache ls [URL] [flags]",
        f"list what the disk cache has, and what waits to be stored; asks the store nothing. {GIVE_THE_SAME}"
        " Status 1 where there is no cache.",
        CACHE_GROUPS,
        (("--json", "Print the list as JSON"),),
    ),
    "cache verify": _Usage(
        "cache verify [URL] [flags]",
        f"compare the disk cache with the store. {GIVE_THE_SAME} Status 1 where they differ, or there is no cache.",
        CACHE_GROUPS,
    ),
    "cache flush": _Usage(
        "cache flush [URL] [flags]",
        f"store now what waits in the disk cache, beside a server or without one. {GIVE_THE_SAME}"
        " Status 1 where something is left, or there is no cache.",
        CACHE_GROUPS,
    ),
    "hash-password": _Usage(
        "hash-password",
        "make a password_hash for a [user:NAME] of the ini file, from standard input where that is no terminal",
    ),
    "help": _Usage("help [COMMAND]", "print this, or the help of a command"),
    "version": _Usage("version", "print the version"),
}


def help_text(topic: str = "") -> str:
    """What --help prints: for all, and for serve, the server's flags with their types, meanings and defaults."""
    if topic in ("", "serve"):
        return "\n".join(_overview()) + "\n"
    usage = USAGES[topic]
    out = ["Usage:", f"  ftpvfs {usage.form}", "", *textwrap.wrap(_sentence(usage.meaning), 110)]
    if topic == "cache":
        out += ["", "Commands:"]
        out += [f"  ftpvfs {each.form}" for name, each in USAGES.items() if name.startswith("cache ")]
        out += ["", "ftpvfs help cache ls, and so on, prints the help of each."]
    if usage.flags:
        out += ["", "Flags:", *(f"      {flag}  {meaning}" for flag, meaning in usage.flags)]
    if usage.groups:
        out += _flags([entry for entry in _entries() if entry.flag and entry.group in usage.groups])
    return "\n".join(out) + "\n"


def _overview() -> Iterator[str]:
    yield from ("Serve a folder, a bucket or any other fsspec store over FTP.", "", "Usage:")
    shown = [usage for name, usage in USAGES.items() if not name.startswith("cache ")]
    width = max(len(usage.form) for usage in shown) + 2
    yield from (f"  ftpvfs {usage.form.ljust(width)}{usage.meaning}" for usage in shown)
    yield from ("", f"Each flag is also a variable, --read-only is {PREFIX}READ_ONLY, and a key in the ini file.")
    yield from _flags([entry for entry in _entries() if entry.flag])


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _flags(entries: Sequence[_Entry]) -> Iterator[str]:
    heads = {entry: f"{f'-{entry.short},' if entry.short else '':>5} --{entry.flag} {entry.kind}" for entry in entries}
    width = max(map(len, heads.values())) + 2
    for group in dict.fromkeys(entry.group for entry in entries):
        yield from ("", f"{group} flags:")
        for entry in entries:
            if entry.group == group:
                default = "" if entry.default in ("", "`false`", "`0`") else f" (default {entry.default})"
                text = (entry.meaning + default).replace("`", "")
                head, indent = heads[entry].ljust(width), " " * width
                yield from textwrap.wrap(text, 110, initial_indent=head, subsequent_indent=indent)


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
