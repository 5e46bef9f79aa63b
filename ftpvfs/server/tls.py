"""FTPS: certificates and what is asked of them, sessions that data connections resume, and the verbs of RFC 4217.

TLS 1.2 and 1.3 only, with forward secrecy and authenticated encryption. Each control connection keeps the context that
it began with, so that its data connections can resume it, also when the certificates have been read again meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import secrets
import sys
import termios
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto
from pyftpdlib.exceptions import _RetryError
from pyftpdlib.handlers import TLS_DTPHandler, TLS_FTPHandler
from pyftpdlib.handlers.ftps.ssl import SSLConnectionMixin
from pyftpdlib.utils import is_ssl_sock

from ftpvfs.config import ConfigError, TLSOptions

logger = logging.getLogger(__name__)

PARTIAL_WRITE = 1  # SSL_MODE_ENABLE_PARTIAL_WRITE, which pyOpenSSL always switches on
NO_RENEGOTIATION = 1 << 30  # OpenSSL's SSL_OP_NO_RENEGOTIATION, which older pyOpenSSL does not name
VERSIONS = {"tls1.2": SSL.TLS1_2_VERSION, "tls1.3": SSL.TLS1_3_VERSION}
CIPHERS = b"ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:DHE+CHACHA20:!aNULL:!PSK"  # of TLS 1.2; those of 1.3 are all good
RECORD = 16 * 1024  # the largest piece that TLS encrypts at once
OVERHEAD = 256  # what the largest piece may grow by
# Seconds for which a session can be resumed: longer than any FTP session, or its data connections would stop to.
RESUMABLE = 24 * 3600
# What carries data, and so has to wait for PROT P where TLS is required; PASV and PORT open the connection for it.
DATA = {"PASV", "EPSV", "PORT", "EPRT", "RETR", "STOR", "STOU", "APPE", "LIST", "NLST", "MLSD"}

NOT_RESUMED = "522 The data connection must resume the control connection's TLS session."


class Certificates:
    """The certificate of a listener, its key and the CAs of its clients; makes the contexts for its connections.

    Any thread; may be made before a fork. The constructor raises ConfigError, in one line, where a file is missing or
    holds something else, or where the key is another certificate's.
    """

    def __init__(self, options: TLSOptions) -> None:
        self._options = options
        self._material = _Material(options)
        self._context = self._material.context(options)

    def reload(self) -> bool:
        """Read the files again; tell whether they could be used.

        Connections that are there keep what they have; a broken file changes nothing.
        """
        try:
            material = _Material(self._options)
            context = material.context(self._options)
        except ConfigError as error:
            logger.error("%s; the certificate in use stays", error)  # noqa: TRY400 - the line says it all
            return False
        self._material, self._context = material, context
        logger.info("certificate %s read again", self._options.cert)
        return True

    def context(self) -> Any:
        """Return what a control connection and its data connections are to use.

        One of its own where data connections have to resume it: nobody else's session can be resumed in that.
        """
        return self._material.context(self._options) if self._options.require_reuse else self._context


class _Material:
    """What the files hold, read once."""

    def __init__(self, options: TLSOptions) -> None:
        self._chain = _certificates(options.cert, "certificate")
        self._key = _private_key(options.key or options.cert)
        self._client_cas = _certificates(options.client_ca, "client CA") if options.client_ca else []
        try:
            self.context(options).check_privatekey()
        except SSL.Error:
            raise ConfigError(f"the key in {options.key or options.cert!r} is not that of {options.cert!r}") from None
        expires = self._chain[0].not_valid_after_utc
        if expires < datetime.now(timezone.utc):
            logger.warning("certificate %r has expired on %s", options.cert, expires.date())

    def context(self, options: TLSOptions) -> Any:  # the stubs know less of contexts than pyOpenSSL
        context: Any = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(VERSIONS[options.min_version])
        context.set_options(SSL.OP_NO_COMPRESSION | NO_RENEGOTIATION | SSL.OP_CIPHER_SERVER_PREFERENCE)
        context.set_cipher_list(CIPHERS)
        context.use_certificate(self._chain[0])
        for certificate in self._chain[1:]:
            context.add_extra_chain_cert(certificate)
        context.use_privatekey(self._key)
        for certificate in self._client_cas:
            context.add_client_ca(certificate)
            context.get_cert_store().add_cert(crypto.X509.from_cryptography(certificate))
        if self._client_cas:
            context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
        context.set_session_id(secrets.token_bytes(16))
        context.set_session_cache_mode(SSL.SESS_CACHE_SERVER)
        context.set_timeout(RESUMABLE)
        return context


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {path!r}: {error.strerror}") from None


def _certificates(path: str, what: str) -> list[x509.Certificate]:
    """Return the certificates in a file, at least one."""
    data = _read(path, what)
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise ConfigError(f"{what} {path!r}: no certificate in PEM form in it, or a damaged one") from None


def _private_key(path: str) -> Any:
    data = _read(path, "key")
    try:
        return load_pem_private_key(data, password=None)
    except TypeError:
        raise ConfigError(f"key {path!r}: a key with a passphrase in it, which nobody could type") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"key {path!r}: no private key in PEM form in it") from None


class QuietHandshake(SSLConnectionMixin):
    """TLS that waits for the client without turning the loop: pyftpdlib's goes on to watch what it may not use."""

    # pyftpdlib's own.
    _ssl_accepting: bool
    _ssl_want_read: bool
    _ssl_want_write: bool

    @contextlib.contextmanager
    def _handle_ssl_want_rw(self) -> Iterator[None]:
        with super()._handle_ssl_want_rw():
            yield
        if self._ssl_accepting or self._ssl_closing:
            if self._ssl_want_read:
                self.modify_ioloop_events(self.ioloop.READ)
            elif self._ssl_want_write:
                self.modify_ioloop_events(self.ioloop.WRITE)


class TLSControl(QuietHandshake, TLS_FTPHandler):
    """The control connection's side of FTPS, for a `VFSHandler`. Runs on its event loop.

    `certfile`, `keyfile` and `ssl_context` are pyftpdlib's; `certificates` comes before them.
    """

    # pyftpdlib's own.
    ac_in_buffer: bytes

    certificates: Certificates | None = None
    # explicit: AUTH TLS may be used. required: it must be, and so must PROT P. implicit: TLS from the first byte, with
    # PROT P from the start.
    tls_mode = "explicit"
    # Whether data connections have to resume the control connection's session.
    tls_require_reuse = False
    # Why the last data connection was refused, where no command had asked for it yet; the next one is told.
    refused_data = ""
    # Whether an upload over TLS that ends without close_notify is one that was cut off.
    tls_strict_eof = True

    @classmethod
    def get_ssl_context(cls) -> Any:
        """Return the context for a new session."""
        if cls.certificates is None and cls.ssl_context is None:
            if cls.certfile is None:
                raise ValueError("at least certfile must be specified")
            options = TLSOptions(cert=cls.certfile, key=cls.keyfile or "", require_reuse=cls.tls_require_reuse)
            cls.certificates = Certificates(options)
        return cls.ssl_context if cls.certificates is None else cls.certificates.context()

    @property
    def demands_tls(self) -> bool:
        """Whether nothing but the way to TLS is answered in clear."""
        return self.tls_mode == "required" or self.tls_control_required or self.tls_mode == "implicit"

    @property
    def demands_private_data(self) -> bool:
        """Whether data connections in clear are refused."""
        return self.tls_mode in {"required", "implicit"} or self.tls_data_required

    # --- implicit

    def handle(self) -> None:
        """Greet the client, in implicit mode when TLS stands."""
        if self.tls_mode == "implicit":
            self.secure_connection(self.ssl_context)
            self._protect_data()
        else:
            super().handle()

    def secure_connection(self, ssl_context: Any) -> None:
        """Begin TLS, once what belongs before it has been said; a session that is idle needs no buffers."""
        self.say()
        super().secure_connection(ssl_context)
        if is_ssl_sock(self.socket):
            SSL._lib.SSL_set_mode(self.socket._ssl, SSL.MODE_RELEASE_BUFFERS)  # type: ignore[attr-defined]

    def handle_ssl_established(self) -> None:
        """Go on in TLS."""
        super().handle_ssl_established()
        if self.tls_mode == "implicit":
            super().handle()

    def close_when_done(self) -> None:
        """Close when all is said; nothing can be before TLS stands."""
        if self._ssl_accepting:
            self.close()
        else:
            super().close_when_done()

    def handle_max_cons(self) -> None:
        """Refuse a client too many; in implicit mode without a word, which would cost a handshake."""
        if self.tls_mode == "implicit":
            self.close()
        else:
            super().handle_max_cons()

    def handle_max_cons_per_ip(self) -> None:
        if self.tls_mode == "implicit":
            self.close()
        else:
            super().handle_max_cons_per_ip()

    def flush_account(self) -> None:
        super().flush_account()
        if self.tls_mode == "implicit":
            self._protect_data()

    def _protect_data(self) -> None:
        self._pbsz = self._prot = True

    # --- commands

    def process_command(self, cmd: str, *args: Any, **kwargs: Any) -> Any:
        """Run a command, unless it needs TLS and there is none."""
        if cmd in {"USER", "PASS"} and self.demands_tls and not is_ssl_sock(self.socket):
            self._refuse(cmd, 530, "TLS is required; use AUTH TLS first.")
        elif cmd in DATA and self.demands_private_data and not self._prot:
            self._refuse(cmd, 521, "Data connections must be protected; use PROT P first.")
        else:
            return super().process_command(cmd, *args, **kwargs)
        return None

    def _refuse(self, cmd: str, code: int, reason: str) -> None:
        self.respond(f"{code} {reason}")
        self.log_cmd(cmd, "", code, reason)

    def ftp_AUTH(self, line: str) -> None:
        """Begin TLS; what was sent in clear behind AUTH was sent by anybody, and is dropped."""
        super().ftp_AUTH(line)
        if is_ssl_sock(self.socket):
            self.ac_in_buffer = b""

    def ftp_PROT(self, line: str) -> None:
        """Protect data connections, or not (RFC 4217, section 9)."""
        if line.upper() == "C" and self.demands_private_data and is_ssl_sock(self.socket):
            self.respond("534 Data connections must be protected here.")
        else:
            super().ftp_PROT(line)


class TLSData(QuietHandshake, TLS_DTPHandler):
    """A data connection's side of FTPS, for a `VFSDTPHandler`. Runs on the session's event loop."""

    # What was found behind bytes that had to be given first.
    _found: Exception | None = None

    def secure_connection(self, ssl_context: Any) -> None:
        """Begin TLS. A call sends all that it is given, not one record; what it keeps back has to be given it again."""
        super().secure_connection(ssl_context)
        if is_ssl_sock(self.socket):
            SSL._lib.SSL_clear_mode(self.socket._ssl, PARTIAL_WRITE)  # type: ignore[attr-defined]

    def initiate_send(self) -> None:
        """Send what there is. Before TLS stands there is nothing to say, not even that there is nothing."""
        if not self._ssl_accepting:
            super().initiate_send()

    def send(self, data: Any) -> int:
        """Send all of the bytes or, for now, none. pyftpdlib's own would copy them first."""
        if not is_ssl_sock(self.socket):
            return super().send(data)  # type: ignore[no-any-return]
        if not data:  # an empty listing; an error of OpenSSL's
            return 0
        try:
            sent: int = self.socket.send(data)
        except SSL.WantReadError:
            self._ssl_want_read = True
            return 0
        except SSL.WantWriteError:
            self._ssl_want_write = True
            return 0
        except (SSL.ZeroReturnError, SSL.SysCallError):
            self.handle_close()
            return 0
        self.tot_bytes_sent += sent
        return sent

    def recv(self, buffer_size: int) -> bytes:
        """Return what has arrived, up to about so much; b"" after close_notify. Raises OSError where it broke off.

        Whole records, and none of which only a part may be there: what OpenSSL has taken is no news to the loop.
        """
        if self._found is not None:
            return self._nothing_received(self._found)
        records = max(1, min(buffer_size, _waiting(self._fileno)) // (RECORD + OVERHEAD))
        pieces: list[bytes] = []
        try:
            for _ in range(records):
                pieces.append(self.socket.recv(RECORD))  # noqa: PERF401 - what came before an error is kept
        except (SSL.Error, OSError) as error:
            if not pieces:
                return self._nothing_received(error)
            self._found = error  # something else than the records that have to be there; those first
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _nothing_received(self, error: Exception) -> bytes:
        if isinstance(error, SSL.WantReadError):
            self._ssl_want_read = True
            raise _RetryError from error
        if isinstance(error, SSL.WantWriteError):
            self._ssl_want_write = True
            raise _RetryError from error
        if isinstance(error, SSL.ZeroReturnError) or (isinstance(error, SSL.Error) and self._is_bare_end(error)):
            return b""
        if isinstance(error, SSL.Error):
            raise ConnectionResetError(errno.ECONNRESET, "TLS ended without close_notify") from error
        raise error

    def handle_ssl_established(self) -> None:
        """Refuse a client that does not show, by resuming its session, that it is the control connection's."""
        super().handle_ssl_established()
        if getattr(self.cmd_channel, "tls_require_reuse", False) and not was_resumed(self.socket):
            self._resp = (NOT_RESUMED, logger.warning)
            self.cmd_channel.refused_data = "" if self._initialized else NOT_RESUMED
            self.close()

    def _is_bare_end(self, error: SSL.Error) -> bool:
        """Tell whether the client has ended the connection without close_notify, and that is to be taken for an end."""
        if getattr(self.cmd_channel, "tls_strict_eof", True) or not is_unexpected_eof(error):
            return False
        self.log("The upload ended without close_notify; taken for complete (--tls-strict-eof off).", logger.warning)
        return True


def _waiting(descriptor: int) -> int:
    """Return how many bytes have arrived on a connection."""
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)


def was_resumed(connection: SSL.Connection) -> bool:
    """Tell whether the connection resumed an earlier one's session. pyOpenSSL has no name for it."""
    return bool(SSL._lib.SSL_session_reused(connection._ssl))  # type: ignore[attr-defined]


def is_unexpected_eof(error: SSL.Error) -> bool:
    """Tell whether TLS ended by the connection's orderly end (FIN) alone, and not by a reset or a broken record."""
    if isinstance(error, SSL.SysCallError):
        return bool(error.args[0] == -1)
    reasons = error.args[0] if error.args else []
    return any("unexpected eof" in str(reason).lower() for entry in reasons for reason in entry)

