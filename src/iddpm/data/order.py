"""The order of training: a function of the seed and the position, with no state to save."""

import math
from functools import lru_cache

import numpy as np

LARGE = 1 << 20  # images from which an order is computed image by image: drawing it whole takes a second, and 16 bytes for each
ROUNDS = 10  # of that computation
BLOCK = 4096  # positions, about, in which classes come equally often
ORDER_KEY = int.from_bytes(b"order", "big")  # keeps these draws apart from every other use of the same seed


class Order:
    """Endless reading of `n` images, each epoch a fresh permutation; a run resumes by knowing its position.

    Position p lies in epoch e = p // n, whose permutation is drawn by Philox with key (seed, ORDER_KEY) and
    e in the highest counter word; of LARGE images and more it is `scattered`. `seed` is in 0 .. 2^64 - 1.
    """

    def __init__(self, n: int, seed: int) -> None:
        assert n >= 1, f"an order needs at least one image, not {n}"
        assert 0 <= seed < 2**64, f"the seed {seed} does not fit in 64 bits"
        self.n = n
        self.seed = seed

    def indices(self, position: int, count: int) -> np.ndarray:
        """The image indices (count,) int64 in 0 .. n-1 of positions `position` .. `position + count - 1`."""
        assert min(position, count) >= 0, f"position {position} and count {count} must not be negative"
        parts = []
        while count > 0:
            epoch, start = divmod(position, self.n)
            if self.n < LARGE:
                part = permutation(self.n, self.seed, epoch)[start : start + count]
            else:
                part = scattered(np.arange(start, min(start + count, self.n)), self.n, self.seed, epoch)
            parts.append(part)
            position += len(part)
            count -= len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


class Balanced(Order):
    """As `Order`, but every class comes equally often: of K classes m times in each K m positions, m = BLOCK // K.

    A number below K m stands for a class and its next image; they come in an order drawn for every K m positions. The images of
    a class come in an order of their own, drawn anew when all have come. `labels` are (n,) int64.
    """

    def __init__(self, labels: np.ndarray, seed: int) -> None:
        super().__init__(len(labels), seed)
        by_class = np.argsort(labels, kind="stable")
        self.members = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
        self.rounds = max(1, BLOCK // len(self.members))
        self._permutation = lru_cache(2 * len(self.members) + 2)(permutation.__wrapped__)  # of every class the present one

    def indices(self, position: int, count: int) -> np.ndarray:
        k, out = len(self.members), np.empty(count, np.int64)
        for row in range(count):
            block, place = divmod(position + row, k * self.rounds)
            times, which = divmod(int(permutation(k * self.rounds, self.seed, block, 1)[place]), k)
            own = self.members[which]
            epoch, nth = divmod(block * self.rounds + times, len(own))
            out[row] = own[self._permutation(len(own), self.seed, epoch, 2 + which)[nth]]
        return out


@lru_cache(maxsize=4)  # a batch seldom touches more than two epochs; safe to share among threads
def permutation(n: int, seed: int, epoch: int, what: int = 0) -> np.ndarray:
    """The order of n images in an epoch, (n,) int64: a permutation of 0 .. n-1. Another for `what` else is put in order."""
    return _draws(seed, epoch, what).permutation(n).astype(np.int64)


def scattered(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The images at some places (k,) of an epoch's order of n, (k,) int64, each found by itself; not the order of `permutation`.

    A Feistel network on pairs of numbers below a and b, whose a b is little above n; what leads to n or beyond is led on until
    it is below (Black & Rogaway 2002, Ciphers with arbitrary finite domains).
    """
    b = math.isqrt(n - 1) + 1
    a = -(-n // b)
    keys = _draws(seed, epoch).integers(2**64, size=ROUNDS, dtype=np.uint64)
    found = places.astype(np.int64)
    beyond = np.arange(len(found))
    while len(beyond):
        left, right = np.divmod(found[beyond], b)
        for k in range(0, ROUNDS, 2):
            left = (left + _mixed(right, keys[k]) % a) % a
            right = (right + _mixed(left, keys[k + 1]) % b) % b
        found[beyond] = left * b + right
        beyond = beyond[found[beyond] >= n]
    return found


def _mixed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Values (k,) int64 as ones that look drawn at random, 0 .. 2^63 - 1: the finaliser of splitmix64 (Steele et al. 2014)."""
    x = values.astype(np.uint64) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def _draws(seed: int, epoch: int, what: int = 0) -> np.random.Generator:
    key, counter = np.array([seed, ORDER_KEY], np.uint64), np.array([0, 0, what, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
