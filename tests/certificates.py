"""Certificates of servers in tests."""

import subprocess
from pathlib import Path


def self_signed(folder: Path, name: str = "IP:127.0.0.1") -> tuple[Path, Path]:
    """Make a certificate for a name, such as ``DNS:ares.example``; return the files of it and of its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subject = ["-subj", "/CN=gateway", "-addext", f"subjectAltName={name}", "-days", "1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, "-out", certificate, "-keyout", key]
    subprocess.run(make, check=True, capture_output=True)
    return certificate, key
