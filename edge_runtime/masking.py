"""Masks that hide a vector from all who see it alone, and vanish from a sum (Bonawitz et al. 2017,
section 4, arXiv 1611.04482).

Device u adds to its vector, modulo 2^32, a mask of its own and one for each neighbour v:

    y_u = x_u + PRG(b_u) + sum over v > u of PRG(s_uv) - sum over v < u of PRG(s_uv)

Both ends of a pair know s_uv = s_vu, by X25519 (`agree`), so pairwise masks cancel in the sum over
all. b_u protects u if its neighbours gave away its pairwise masks because its vector came too late.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge_runtime.quantization import Residues

KEY_BYTES = 32
NONCE_BYTES = 12


def expand(seed: bytes, size: int) -> Residues:
    """`size` pseudorandom numbers modulo 2^32: the key stream of AES-256 in counter mode from 0,
    as little-endian words. A seed serves once."""
    stream = Cipher(AES(seed), CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(4 * size)), "<u4").astype(np.uint32, copy=False)


def public_key(private: bytes) -> bytes:
    """Of an X25519 private key; both are KEY_BYTES long, as RFC 7748 writes them."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, context: bytes) -> bytes:
    """The KEY_BYTES that the holders of two private keys share, for one use named by `context`.

    Raises:
        ValueError: `public` is no X25519 key, or of low order.
    """
    shared = X25519PrivateKey.from_private_bytes(private).exchange(
        X25519PublicKey.from_public_bytes(public)
    )
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=context).derive(shared)


def is_usable(public: bytes) -> bool:
    """Whether `agree` will take a public key from whomever: one of low order gives every private
    key the same secret, 0."""
    try:
        agree(bytes(KEY_BYTES), public, b"")
    except ValueError:
        return False
    return True


def commitment(seed: bytes) -> bytes:
    """What a device publishes of its own mask's seed, so that a wrong one is recognised."""
    return hashlib.sha256(b"comigs self mask " + seed).digest()


def add_masks(
    total: Residues, *, own: Iterable[bytes] = (), pairwise: Mapping[int, bytes], index: int
) -> None:
    """Adds in place what device `index` adds.

    Args:
        own: seeds of masks of one's own.
        pairwise: index of another device -> the seed shared with it.
    """
    for seed in own:
        total += expand(seed, total.size)
    for other, seed in pairwise.items():
        if other > index:
            total += expand(seed, total.size)
        else:
            total -= expand(seed, total.size)


def seal(key: bytes, plain: bytes, context: bytes) -> bytes:
    """`plain` encrypted and bound to `context` (ChaCha20-Poly1305), behind a random nonce."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, plain, context)


def unseal(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """What was sealed.

    Raises:
        ValueError: it was sealed with another key or for another context, or is damaged.
    """
    nonce, ciphertext = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, ciphertext, context)
    except (InvalidTag, ValueError) as error:
        raise ValueError("the sealed message is not what was sent") from error
