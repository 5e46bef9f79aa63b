"""The one table of options: flags, variables, ini keys, `VFS` keywords and the README's reference.

The fields of the options' classes in `table` are the table. Sizes, durations, modes and addresses are written as
rclone writes them and exist as text only here: everybody else gets bytes, seconds and numbers. What does not parse,
and what is not known, raises `ConfigError`, whose one line names the source (flag, variable or file.ini:line), the
key, the value unless it is secret, and what would be right.
"""

from ftpvfs.config.reference import BEGIN, END, help_text, main, reference, with_reference
from ftpvfs.config.sources import check_file, load
from ftpvfs.config.table import (
    OPTIONS,
    SECTIONS,
    Config,
    Listener,
    LogOptions,
    Option,
    ServerOptions,
    TLSOptions,
    User,
    VFSOptions,
    vfs_options,
)
from ftpvfs.config.values import (
    Address,
    Bandwidth,
    ConfigError,
    PublicIP,
    format_address,
    format_duration,
    format_ports,
    format_size,
    parse_address,
    parse_bool,
    parse_duration,
    parse_mode,
    parse_ports,
    parse_size,
)

__all__ = [
    "BEGIN",
    "END",
    "OPTIONS",
    "SECTIONS",
    "Address",
    "Bandwidth",
    "Config",
    "ConfigError",
    "Listener",
    "LogOptions",
    "Option",
    "PublicIP",
    "ServerOptions",
    "TLSOptions",
    "User",
    "VFSOptions",
    "check_file",
    "format_address",
    "format_duration",
    "format_ports",
    "format_size",
    "help_text",
    "load",
    "main",
    "parse_address",
    "parse_bool",
    "parse_duration",
    "parse_mode",
    "parse_ports",
    "parse_size",
    "reference",
    "vfs_options",
    "with_reference",
]
