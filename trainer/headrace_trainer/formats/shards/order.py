"""The sample order: a pseudorandom permutation that can be evaluated at any position without a table.

A Feistel network (Luby and Rackoff, doi 10.1137/0217022) permutes the smallest power of four that is not below the
number of samples. Positions that land outside are permuted again until they land inside (cycle walking, Black and
Rogaway, doi 10.1007/3-540-45760-7_9). The round function is keyed BLAKE2b, so the order is the same on every machine
and numpy version, and takes no memory whatever the corpus size.
"""

import hashlib

_ROUNDS = 6


def shuffle_key(*, seed: int, epoch: int, manifest_digest: str) -> bytes:
    """A 32-byte key of everything that an epoch's order depends on."""
    return hashlib.sha256(f"{seed}:{epoch}:{manifest_digest}".encode()).digest()


def shuffled(position: int, *, num_samples: int, key: bytes) -> int:
    """The sample at ``position``. Over all positions in [0, num_samples), every sample occurs once."""
    assert 0 <= position < num_samples
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    position = _feistel(position, half_bits=half_bits, key=key)
    while position >= num_samples:
        position = _feistel(position, half_bits=half_bits, key=key)
    return position


def _feistel(value: int, *, half_bits: int, key: bytes) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for i in range(_ROUNDS):
        left, right = right, left ^ (_round(i, right, key) & mask)
    return left << half_bits | right


def _round(index: int, half: int, key: bytes) -> int:
    data = index.to_bytes(1, "little") + half.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, key=key, digest_size=8).digest(), "little")
