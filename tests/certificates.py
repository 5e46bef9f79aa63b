"""Certificates for tests and benchmarks."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM


def write_certificate(
    file: Path,
    common_name: str = "localhost",
    *,
    days: int = 1,
    signed_by: Path | None = None,
    passphrase: bytes | None = None,
) -> Path:
    """Write a certificate for this machine with its key, key first, into one file: self-signed, or signed by a CA's."""
    key: Any = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    issuer, signer = name, key
    if signed_by is not None:
        text = signed_by.read_bytes()
        issuer = x509.load_pem_x509_certificate(text).subject
        signer = serialization.load_pem_private_key(text, None)
    now = datetime.now(timezone.utc)
    alternatives = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=signed_by is None, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    lock: Any = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, lock)
    file.write_bytes(private + certificate.public_bytes(PEM))
    return file
