#!/usr/bin/env python3
"""The random numbers that the trainers and the references share: Philox4x32-10, counter based.

Every number is a function of (seed, purpose, step, i), so that nothing needs to be saved for a
resume and the reference draws exactly what the trainer draws. `rng.py` alone runs its own test.

Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""
import numpy as np

INIT, SHUFFLE, DROPIT, AUGMENT = 1, 2, 3, 4  # purposes
DROP_PATH = 9

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
CHUNK = 8192  # elements whose temporaries stay in a core's cache


def philox4x32(counter, key):
    """Ten rounds. counter: four arrays or numbers of 32 bits, key: two numbers; four uint32."""
    c = [np.asarray(word, np.uint64) for word in counter]
    k = [int(word) for word in key]
    for _ in range(10):
        # 32 x 32 bit products fit in uint64: high and low word are a shift and a mask
        p0, p1 = MULTIPLIERS[0] * c[0], MULTIPLIERS[1] * c[2]
        c = [(p1 >> HALF) ^ c[1] ^ np.uint64(k[0]), p1 & LOW,
             (p0 >> HALF) ^ c[3] ^ np.uint64(k[1]), p0 & LOW]
        k = [(word + weyl) & 0xFFFFFFFF for word, weyl in zip(k, WEYL)]
    return [word.astype(np.uint32) for word in c]


def philox(seed, purpose, step, i):
    """Four uint32 (arrays, where i is one). seed and i: 64 bits; step and purpose: 32 bits."""
    i = np.asarray(i, np.uint64)
    return philox4x32((i & LOW, i >> HALF, step & 0xFFFFFFFF, purpose),
                      (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))


def epoch_permutation(seed, epoch, n):
    """The order in which an epoch visits n images: Fisher-Yates from the last position down."""
    r = philox(seed, SHUFFLE, epoch, np.arange(n))
    draws = (r[0].astype(np.uint64) | (r[1].astype(np.uint64) << HALF)).tolist()
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = draws[i] % (i + 1)
        order[i], order[j] = order[j], order[i]
    return np.array(order, np.int64)


def flips(seed, epoch, positions):
    """Which positions of an epoch's permutation are mirrored left to right: bool array."""
    return (philox(seed, AUGMENT, epoch, positions)[0] & 1).astype(bool)


def dropit_keys(seed, layer, step, n):
    """Keys of the random strategy, one an element: the largest are kept."""
    keys = np.empty(n, np.uint32)
    for start in range(0, n, CHUNK):
        i = np.arange(start, min(start + CHUNK, n))
        keys[start:start + CHUNK] = philox(seed ^ ((layer + 1) << 32), DROPIT, step, i)[0]
    return keys


def uniform(seed, purpose, step, n):
    """n float64 in (0, 1): the middle of 2^32 equal steps, so that a logarithm is always finite."""
    words = np.stack(philox(seed, purpose, step, np.arange((n + 3) // 4)), axis=1).reshape(-1)[:n]
    return (words.astype(np.float64) + 0.5) / 2.0**32


def normal(seed, purpose, step, n):
    """n float64 of the standard normal distribution (Box-Muller; two uniforms give two normals)."""
    u = uniform(seed, purpose, step, 2 * ((n + 1) // 2)).reshape(-1, 2)
    radius, angle = np.sqrt(-2.0 * np.log(u[:, 0])), 2.0 * np.pi * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:n]


def self_test():
    # the known answers published with Random123 (kat_vectors, philox4x32 10)
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, answer in known:
        found = tuple(int(word) for word in philox4x32(counter, key))
        assert found == answer, f"philox4x32{counter, key} is {found}, expected {answer}"
    # the seed's high word, the index's high word and a vector of indices go where they belong
    whole = philox(0x299F31D0A4093822, 0x03707344, 0x13198A2E, [0x85A308D3243F6A88, 5])
    assert [int(word[0]) for word in whole] == list(known[2][2])
    for n in (1, 2, 7, 1000):
        order = epoch_permutation(3, 1, n)
        assert sorted(order.tolist()) == list(range(n))
    assert (epoch_permutation(3, 1, 1000) != epoch_permutation(3, 2, 1000)).any()
    z = normal(1, INIT, 0, 100001)
    assert len(z) == 100001 and abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    print("rng.py: known answers, permutations and moments are right")


if __name__ == "__main__":
    self_test()
