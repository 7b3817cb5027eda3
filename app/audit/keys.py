"""The keys that heads are signed with: a private key in a file for its owner only, and all public keys that there ever were.

A key is known by its fingerprint: the first 32 hex digits of the SHA-256 of its 32 public bytes. The file of public keys has
a JSON line for each, the newest last. A key that took another's place is endorsed by that one: trust in the first is enough.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from app.embedded.files import write_private
from events.heads import Signer, Verify

FINGERPRINT_CHARS = 32
ENDORSED_AS = b"distributed-lookup head key v1\n"

log = logging.getLogger(__name__)


class KeyProblem(Exception):  # noqa: N818 - what is the case, in our words
    """There is no key that could be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key, 32 bytes in hex. `endorsement` is the signature of the key `endorsed_by`, which it took the place of."""

    key_id: str
    public: str
    made_at: str
    endorsed_by: str | None = None
    endorsement: str | None = None

    @property
    def line(self) -> str:
        members = {
            "key": self.key_id,
            "public": self.public,
            "made_at": self.made_at,
            "endorsed_by": self.endorsed_by,
            "endorsement": self.endorsement,
        }
        return orjson.dumps({name: value for name, value in members.items() if value is not None}).decode()

    def verify(self, signature: bytes, signed: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.public)).verify(signature, signed)
        except (InvalidSignature, ValueError):
            return False
        return True


def public_path(private: Path) -> Path:
    """Where the public keys of a private key's file are kept."""
    return private.with_name(f"{private.name}.pub")


def make_key(path: Path, *, rotate: bool = False) -> PublicKey:
    """Make a key; with `rotate` one that takes the place of another, which endorses it and is gone. Raises `KeyProblem`."""
    if path.exists() != rotate:
        there = "There is a key already" if not rotate else "There is no key yet"
        raise KeyProblem(f"{there}: {path}." + ("" if rotate else " `lookup audit keygen --rotate` makes one in its place."))
    old = _load(path) if rotate else None
    new = Ed25519PrivateKey.generate()
    made = _public_of(new, old)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The public half first: a head must never be signed by a key that nobody knows.
        _add_public(public_path(path), made)
        write_private(path, new.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())
    except OSError as error:
        raise KeyProblem(f"The key cannot be written to {path}: is the folder writable?") from error
    return made


def have_key(path: Path) -> None:
    """Make a key if there is none. Raises `KeyProblem`."""
    if not path.exists():
        made = make_key(path)
        log.info("Made a key to sign heads of the log with: %s (%s).", made.key_id, path)


def load_signer(path: Path) -> Signer:
    """Raises `KeyProblem`."""
    private = _load(path)
    return Signer(fingerprint(_raw(private)), private.sign)


def load_public(path: Path) -> Mapping[str, PublicKey]:
    """All public keys of a file, by their id. Raises `KeyProblem`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        keys = [_read_public(orjson.loads(line)) for line in lines if line.strip()]
    except OSError as error:
        raise KeyProblem(f"The public keys cannot be read: {path}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise KeyProblem(f"{path} is no file of public keys as `lookup audit keygen` makes them.") from error
    return {key.key_id: key for key in keys}


def verifiers(keys: Mapping[str, PublicKey]) -> Mapping[str, Verify]:
    return {key_id: key.verify for key_id, key in keys.items()}


def fingerprint(public: bytes) -> str:
    return sha256(public).hexdigest()[:FINGERPRINT_CHARS]


def _load(path: Path) -> Ed25519PrivateKey:
    try:
        mode = path.stat().st_mode
        pem = path.read_bytes()
    except FileNotFoundError as error:
        raise KeyProblem(f"There is no key to sign heads with: {path}. `lookup audit keygen` makes one.") from error
    except OSError as error:
        raise KeyProblem(f"The key to sign heads with cannot be read: {path}.") from error
    if mode & 0o077:
        raise KeyProblem(f"Others may read the key that heads are signed with. Type: chmod 600 {path}")
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise KeyProblem(f"{path} is no private key as `lookup audit keygen` makes them.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyProblem(f"{path} is a key of another kind; heads are signed with Ed25519.")
    return key


def _public_of(new: Ed25519PrivateKey, old: Ed25519PrivateKey | None) -> PublicKey:
    raw = _raw(new)
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    if old is None:
        return PublicKey(fingerprint(raw), raw.hex(), made_at)
    return PublicKey(fingerprint(raw), raw.hex(), made_at, fingerprint(_raw(old)), old.sign(ENDORSED_AS + raw).hex())


def _raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _read_public(told: Mapping[str, Any]) -> PublicKey:
    key = PublicKey(told["key"], told["public"], told["made_at"], told.get("endorsed_by"), told.get("endorsement"))
    if fingerprint(bytes.fromhex(key.public)) != key.key_id:
        raise ValueError(key.key_id)
    return key


def _add_public(path: Path, key: PublicKey) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(key.line + "\n")
        file.flush()
        os.fsync(file.fileno())
