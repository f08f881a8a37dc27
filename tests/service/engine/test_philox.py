"""Philox against Random123's published vectors, against Triton's, and as a source of uniforms."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gptjet.service.engine import philox

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, result, lowest word first.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

WORD = st.integers(0, 2**32 - 1)
KEY = st.integers(0, 2**64 - 1)

# Runs apart: Triton decides at import whether its kernels are interpreted on the CPU.
TRITON_SCRIPT = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton, triton.language as tl

@triton.jit
def kernel(out, seed, position, high, index, N: tl.constexpr):
    i = tl.arange(0, N)
    c0 = tl.load(position + i).to(tl.uint32)
    c1 = tl.load(high + i).to(tl.uint32)
    c2 = tl.load(index + i).to(tl.uint32)
    words = tl.philox(tl.load(seed), c0, c1, c2, c0 * 0)
    for w in tl.static_range(4):
        tl.store(out + w * N + i, words[w].to(tl.int64))

N = 4
out = torch.zeros(4, N, dtype=torch.int64)
position = torch.tensor([0, 1, 77, 2**31])
high = torch.tensor([0, 0, 0, 5])
index = torch.tensor([0, 1, 15, 3])
kernel[(1,)](out, torch.tensor([0x299F31D0A4093822]), position, high, index, N)
print(out.T.tolist())
"""


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_scalar_matches_the_published_vectors(counter, key, expected):
    assert philox.philox4x32(key[0] | key[1] << 32, counter) == expected


def test_array_matches_the_published_vectors():
    keys = np.array([k[0] | k[1] << 32 for _, k, _ in PUBLISHED], dtype=np.uint64)
    words_in = zip(*(counter for counter, _, _ in PUBLISHED), strict=True)
    counters = tuple(np.array(word, dtype=np.uint64) for word in words_in)
    words = philox.philox4x32_array(keys, counters)
    assert [tuple(int(w[i]) for w in words) for i in range(3)] == [e for _, _, e in PUBLISHED]


@given(key=KEY, counter=st.tuples(WORD, WORD, WORD, WORD))
def test_array_equals_scalar(key, counter):
    words = philox.philox4x32_array(
        np.array([key], dtype=np.uint64), tuple(np.array([w], dtype=np.uint64) for w in counter)
    )
    assert tuple(int(w[0]) for w in words) == philox.philox4x32(key, counter)


def test_a_triton_kernel_gives_the_same_words_for_the_documented_layout(tmp_path):
    pytest.importorskip("triton")
    script = tmp_path / "triton_philox.py"
    script.write_text(TRITON_SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    seed = 0x299F31D0A4093822
    rows = [(0, 0, 0, 0), (1, 0, 1, 0), (77, 0, 15, 0), (2**31, 5, 3, 0)]
    assert done.stdout.strip() == str([list(philox.philox4x32(seed, row)) for row in rows])


@given(
    rows=st.lists(
        st.tuples(KEY, st.integers(0, 255), st.integers(0, 2**40)), min_size=1, max_size=60
    )
)
def test_a_uniform_depends_on_its_own_row_alone(rows):
    together = philox.uniforms(*zip(*rows, strict=True))
    alone = [philox.uniforms([seed], [index], [position])[0] for seed, index, position in rows]
    assert together == alone
    assert all(0 <= value < 1 for value in together)


def test_every_part_of_key_and_counter_changes_the_number():
    rows = [(5, 0, 0), (5 + 2**32, 0, 0), (5, 1, 0), (5, 0, 1), (5, 0, 2**32)]
    values = {philox.uniforms([s], [i], [p])[0] for s, i, p in rows}
    values.add(philox.uniforms([5], [0], [0], stream=1)[0])
    assert len(values) == 6


def test_uniforms_are_53_bit_numbers_from_the_first_two_words():
    high, low, _, _ = philox.philox4x32(9, (4, 0, 2, 0))
    expected = ((high >> 5) * 2**26 + (low >> 6)) / 2**53
    assert philox.uniforms([9], [2], [4]) == [expected]


@pytest.mark.parametrize("varied", ["seed", "index", "position"])
def test_uniforms_are_uniform_along_every_axis(varied):
    count = 20_000
    axes = {name: [3] * count for name in ("seed", "index", "position")}
    axes[varied] = list(range(count))
    values = philox.uniforms(axes["seed"], axes["index"], axes["position"])
    observed = np.histogram(values, bins=64, range=(0, 1))[0]
    assert stats.chisquare(observed).pvalue > 1e-3
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
