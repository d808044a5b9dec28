"""Keys and certificates of a federation, through the library ``cryptography``."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.errors import FedllmError

DAYS = 365


@dataclass(frozen=True)
class Authority:
    """Who says which certificates a federation trusts; PEM."""

    certificate: bytes
    key: bytes


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _signed(builder: x509.CertificateBuilder, days: int, key: Any) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .sign(key, hashes.SHA384())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def authority(name: str, days: int = 10 * DAYS) -> Authority:
    """A new authority with a self-signed certificate."""
    key = ec.generate_private_key(ec.SECP384R1())
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(_named(name))
        .issuer_name(_named(name))
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return Authority(_signed(builder, days, key), _pem(key))


def request(name: str) -> tuple[bytes, bytes]:
    """A new private key, and the request for a certificate of it; PEM."""
    key = ec.generate_private_key(ec.SECP384R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(_named(name))
    asked = builder.sign(key, hashes.SHA384())
    return _pem(key), asked.public_bytes(serialization.Encoding.PEM)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise FedllmError(f"{host!r}: no name of a host ({error})") from None


def issue(authority: Authority, asked: bytes, hosts: Sequence[str] = (), days: int = DAYS) -> bytes:
    """
    A certificate for the key and the name in a request, and for nothing else that it asks.

    hosts: of a server, the names and addresses under which it is dialled; without them the
    certificate is good for dialling only.  Raises FedllmError for a request that is none, has no
    name, or is not of its own key.
    """
    try:
        wanted = x509.load_pem_x509_csr(asked)
    except ValueError as error:
        raise FedllmError(f"certificate request: cannot be read ({error})") from None
    if not isinstance(wanted.public_key(), ec.EllipticCurvePublicKey):
        raise FedllmError("certificate request: of another kind of key than 'site init' makes")
    if not wanted.is_signature_valid:
        raise FedllmError("certificate request: not signed with its own key")
    if len(wanted.subject.get_attributes_for_oid(NameOID.COMMON_NAME)) != 1:
        raise FedllmError("certificate request: it does not say one name")
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    usage = [ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        x509.CertificateBuilder()
        .subject_name(wanted.subject)
        .issuer_name(issuer.subject)
        .public_key(wanted.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    )
    if hosts:
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    key = serialization.load_pem_private_key(authority.key, None)
    return _signed(builder, days, key)


def same_key(certificate: bytes, asked: bytes) -> bool:
    """Whether a certificate and a request are of the same key."""
    return (
        x509.load_pem_x509_certificate(certificate).public_key()
        == x509.load_pem_x509_csr(asked).public_key()
    )


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate, as other tools show it."""
    digest = x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()
    return ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))


def name_of(certificate: bytes) -> str:
    """Whose certificate this is: its common name."""
    subject = x509.load_pem_x509_certificate(certificate).subject
    (name,) = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(name.value)


def prove(key: bytes, said: bytes) -> bytes:
    """
    A signature under what somebody said, by which ``proven`` knows who it was.

    Raises FedllmError for a key that cannot be read.
    """
    try:
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise FedllmError(f"private key: cannot be read ({error})") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise FedllmError("private key: of another kind than these commands make")
    return private.sign(said, ec.ECDSA(hashes.SHA384()))


def proven(authority: bytes, certificate: bytes, proof: bytes, said: bytes) -> str:
    """
    Who said it: the name in a certificate of this authority whose key signed it.

    Raises FedllmError for another authority's certificate, one that is not valid now, or another
    key's signature.
    """
    try:
        theirs = x509.load_pem_x509_certificate(certificate)
        theirs.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
        key = theirs.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("a key of another kind")
        key.verify(proof, said, ec.ECDSA(hashes.SHA384()))
    except (ValueError, TypeError, InvalidSignature) as error:
        reason = str(error) or "the signature is not its key's"
        raise FedllmError(f"certificate: not one of this federation ({reason})") from None
    now = datetime.datetime.now(datetime.UTC)
    if not theirs.not_valid_before_utc <= now <= theirs.not_valid_after_utc:
        raise FedllmError(f"certificate: valid until {theirs.not_valid_after_utc:%Y-%m-%d} only")
    return name_of(certificate)


def node_keys() -> tuple[bytes, bytes]:
    """A key pair by which an engine knows a node: private and public, in OpenSSH's format."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )  # fmt: skip
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private, public + b"\n"


def write(path: Path, data: bytes, private: bool = False) -> None:
    """
    Write a file whole or not at all; a private one for its owner alone.

    Raises FedllmError where it cannot be written.
    """
    aside, mode = path.with_name(f".{path.name}.part"), 0o600 if private else 0o644
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
        os.replace(aside, path)
    except OSError as error:
        raise FedllmError(f"{path}: cannot be written ({error.strerror})") from None
