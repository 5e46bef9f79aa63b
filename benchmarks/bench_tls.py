"""Compare FTPS over a local folder with vsftpd and plain pyftpdlib: python benchmarks/bench_tls.py

One download and one upload at a time, control and data connection in TLS, by curl. All servers have the same
certificate and serve the same folder. Each server's first download is compared and not timed; every upload is
compared on the disk. ftpvfs answers without waiting for the disk, as the others do (`--option sync=false`).
vsftpd takes part where it is installed (Debian's package); it and the benchmark have to be run by root then.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.metadata
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from harness import HEADER, LEGEND, MIB, Sample, Subject, machine, parser, size
from peers import HOST, REPOSITORY, Meter, Program, first_line, free_ports

sys.path.insert(0, str(REPOSITORY))
from tests.certificates import write_certificate

DEFAULT_SIZE = 1 << 30
SUBJECTS = ("download", "upload")
PYFTPDLIB = """
import sys, warnings
warnings.simplefilter("ignore")
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import TLS_FTPHandler
from pyftpdlib.servers import FTPServer
folder, cert, port, first, last = sys.argv[1:]
TLS_FTPHandler.authorizer = DummyAuthorizer()
TLS_FTPHandler.authorizer.add_anonymous(folder, perm="elradfmw")
TLS_FTPHandler.certfile = cert
TLS_FTPHandler.passive_ports = range(int(first), int(last))
FTPServer(("127.0.0.1", int(port)), TLS_FTPHandler).serve_forever()
"""
VSFTPD = """
listen=YES
listen_address={host}
listen_port={port}
background=NO
run_as_launching_user=YES
ftp_username=nobody
secure_chroot_dir={empty}
anonymous_enable=YES
no_anon_password=YES
anon_root={folder}
anon_world_readable_only=NO
write_enable=YES
anon_upload_enable=YES
anon_umask=022
pasv_min_port={first}
pasv_max_port={last}
ssl_enable=YES
allow_anon_ssl=YES
require_ssl_reuse=NO
ssl_ciphers=HIGH
rsa_cert_file={cert}
rsa_private_key_file={cert}
seccomp_sandbox=NO
xferlog_enable=NO
"""


class Server(Program):
    """One of the servers, with the ports of its own."""

    def __init__(self, name: str, folder: Path, served: Path, cert: Path, first_port: int) -> None:
        self.name = name
        self.port = free_ports(1)[0]
        command = COMMANDS[name](folder, served, cert, self.port, first_port)
        super().__init__(command, folder / f"{name}.log")
        self.wait_until(self._greets)
        self.meter = Meter(self.pid)

    def _greets(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=5) as connection:
                return connection.recv(512).startswith(b"220")
        except OSError:
            return False

    def curl(self, *arguments: str) -> float:
        """Run curl and return its seconds."""
        command = ["curl", "-sS", "--ssl-reqd", "-k", *arguments]
        start = time.perf_counter()
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if ended.returncode:
            raise RuntimeError(f"{self.name}: {ended.stderr}\n{self.last_words()}")
        return seconds

    def url(self, name: str) -> str:
        return f"ftp://{HOST}:{self.port}/{name}"


def _ftpvfs(folder: Path, served: Path, cert: Path, port: int, first: int) -> list[str]:
    flags: dict[str, object] = {
        "addr": f"{HOST}:{port}",
        "cert": cert,
        "tls-mode": "required",
        "cache-dir": folder / "cache",
    }
    flags |= {"passive-port": f"{first}-{first + 999}", "option": "sync=false"}
    return [sys.executable, "-m", "ftpvfs", str(served), *(f"--{name}={value}" for name, value in flags.items())]


def _pyftpdlib(folder: Path, served: Path, cert: Path, port: int, first: int) -> list[str]:
    return [sys.executable, "-c", PYFTPDLIB, str(served), str(cert), str(port), str(first), str(first + 999)]


def _vsftpd(folder: Path, served: Path, cert: Path, port: int, first: int) -> list[str]:
    config = folder / "vsftpd.conf"
    (folder / "empty").mkdir()
    text = VSFTPD.format(
        empty=folder / "empty", host=HOST, port=port, folder=served, first=first, last=first + 999, cert=cert
    )
    config.write_text(text.lstrip())
    return [_vsftpd_program() or "", str(config)]


def _vsftpd_program() -> str | None:
    return shutil.which("vsftpd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


COMMANDS = {"vsftpd": _vsftpd, "pyftpdlib": _pyftpdlib, "ftpvfs": _ftpvfs}


def main() -> None:
    arguments = parser(__doc__, SUBJECTS)
    arguments.add_argument("--size", type=size, default=DEFAULT_SIZE, help="of the download (default: 1G)")
    options = arguments.parse_args()
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tls-") as name:
        for line in run(Path(name), options):
            print(line, flush=True)
            lines.append(line)
    if not options.only and options.size == DEFAULT_SIZE:
        Path(__file__).with_name("results_tls.txt").write_text("\n".join(lines) + "\n")


def run(folder: Path, options: argparse.Namespace) -> list[str]:
    cert = write_certificate(folder / "cert.pem")
    served = folder / "served"
    (served / "uploads").mkdir(parents=True)
    names = ["ftpvfs", "pyftpdlib", *(["vsftpd"] if _vsftpd_program() and os.getuid() == 0 else [])]
    lines = [machine(), versions(names), HEADER]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(Server(name, folder, served, cert, 20000 + 1000 * number))
            for number, name in enumerate(names)
        ]
        for subject in options.only or SUBJECTS:
            measure = _download if subject == "download" else _upload
            lines.append("\n" + measure(servers, served, folder, options))
    lines.append(f"\n{options.runs} runs, interleaved. {LEGEND}")
    return lines


def _download(servers: Sequence[Server], served: Path, folder: Path, options: argparse.Namespace) -> str:
    source = _random_file(served / "big", options.size)
    for server in servers:
        got = folder / "got"
        server.curl("-o", str(got), server.url("big"))
        if not filecmp.cmp(source, got, shallow=False):
            raise RuntimeError(f"{server.name} sent other bytes than the file has")
        got.unlink()

    def measure(server: Server) -> Sample:
        return _sample(server, options.size, "-o", "/dev/null", server.url("big"))

    return _compare("download", options.size, servers, measure, options.runs)


def _upload(servers: Sequence[Server], served: Path, folder: Path, options: argparse.Namespace) -> str:
    bytes_wanted = options.size // 4
    source = _random_file(folder / "source", bytes_wanted)
    numbers = itertools.count()

    def measure(server: Server) -> Sample:
        name = f"uploads/{next(numbers)}"
        sample = _sample(server, bytes_wanted, "-T", str(source), server.url(name))
        if not filecmp.cmp(source, served / name, shallow=False):
            raise RuntimeError(f"{server.name} stored other bytes than it was sent")
        (served / name).unlink()
        return sample

    return _compare("upload", bytes_wanted, servers, measure, options.runs)


def _sample(server: Server, bytes_wanted: int, *arguments: str) -> Sample:
    server.meter.reset_peak()
    before = server.meter.cpu_seconds()
    seconds = server.curl(*arguments)
    cpu = server.meter.cpu_seconds() - before
    return Sample(bytes_wanted / seconds / 1e6, 1, cpu, server.meter.peak_memory())


def _compare(what: str, bytes_wanted: int, servers: Sequence[Server], measure: object, runs: int) -> str:
    samples: dict[str, list[Sample]] = {server.name: [] for server in servers}
    for _ in range(runs):
        for server in servers:
            samples[server.name].append(partial(measure, server)())  # type: ignore[arg-type]
    beside = tuple(server.name for server in servers if server.name != "ftpvfs")
    subject = Subject(f"TLS {what} of {bytes_wanted // MIB} MiB", "MB/s", "1 x vsftpd and pyftpdlib", beside=beside)
    return subject.block(samples)


def _random_file(path: Path, bytes_wanted: int) -> Path:
    with path.open("wb") as target:
        for start in range(0, bytes_wanted, MIB):
            target.write(os.urandom(min(MIB, bytes_wanted - start)))
    return path


def versions(names: Sequence[str]) -> str:
    found = [f"{name} {importlib.metadata.version(name)}" for name in ("pyftpdlib", "pyopenssl", "cryptography")]
    if "vsftpd" in names:
        # It tells its version to its standard input.
        said = subprocess.run(["sh", "-c", f"{_vsftpd_program()} -v 0>&1"], capture_output=True, text=True, check=False)
        found.append(said.stdout.strip().replace(": version", ""))
    return ", ".join([*found, first_line(["curl", "--version"]).partition(" libcurl")[0]])


if __name__ == "__main__":
    main()
