# SPDX-License-Identifier: Apache-2.0
"""The compiled loops and their torch twins give the same bits."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from keelwright.ops import combine, gram, kernels, order_statistics, philox
from keelwright.weights import numerics

MODULES = (kernels, combine, gram, order_statistics, philox, numerics)
ROOT = Path(__file__).parents[3]


@pytest.fixture
def plain(monkeypatch):
    """Return a function that computes with the torch twins."""

    def compute(call):
        with monkeypatch.context() as patch:
            for module in MODULES:
                for name, replacement in (("library", lambda: None), ("usable", lambda *tensors: None)):
                    if hasattr(module, name):
                        patch.setattr(module, name, replacement)
            return call()

    return compute


def draw(seed, n=5003, scale=1.0):
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale
    values[::97] = 0.0
    values[1::101] = -0.0
    return values


def same_bits(a, b):
    return a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_machine_with_a_compiler_has_the_compiled_loops():
    if shutil.which("cc") is None or sys.platform == "win32":
        pytest.skip("no C compiler: the package was built without compiled loops")
    assert kernels.kind() == "compiled"


def test_the_switch_turns_the_compiled_loops_off():
    code = "from keelwright.ops import kernels; print(kernels.kind())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"KEELWRIGHT_KERNELS": "off"}
    )
    assert done.stdout.strip() == "plain"


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("keep_equal", [False, True])
def test_weighted_sums_agree(plain, count, keep_equal):
    tensors = [draw(seed) for seed in range(count)]
    for other in tensors[1:]:
        other[::5] = tensors[0][::5]
    weights = [0.3, -1.7, 0.123456789, 2.0, 1e-3, 0.0, 0.7][:count]

    def compute():
        return combine.weighted_sum(tensors, weights, keep_equal=keep_equal)

    assert same_bits(compute(), plain(compute))


@pytest.mark.parametrize("elect", ["none", "mass", "count"])
@pytest.mark.parametrize("normalize", [False, True])
def test_elections_agree(plain, elect, normalize):
    vectors = [draw(seed) for seed in range(3)]
    vectors[1][::7] = -vectors[0][::7]

    def compute():
        return combine.elected_sum(vectors, [1.0, 0.5, 0.3], elect=elect, normalize=normalize)

    assert same_bits(compute(), plain(compute))


def test_products_agree_to_the_last_digits(plain):
    tensors, base = [draw(seed) for seed in range(3)], draw(9)
    for origin in (None, base):
        compiled, twin = gram.gram(tensors, origin), plain(lambda origin=origin: gram.gram(tensors, origin))
        assert torch.allclose(compiled, twin, rtol=1e-13, atol=1e-10)
        rows = torch.stack([one if origin is None else one - origin for one in tensors]).double()
        assert torch.allclose(compiled, rows @ rows.T, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("prefix", [None, 0x7F00, 0])
def test_histograms_agree_and_count_everything(plain, prefix):
    values = draw(1)

    def compute():
        return order_statistics.magnitude_histogram(values, prefix=prefix)

    assert torch.equal(compute(), plain(compute))
    if prefix is None:
        assert int(compute().sum()) == values.numel()


@pytest.mark.parametrize("rank", [1, 2, 100, 2500, 5003])
def test_a_cut_leaves_exactly_the_wanted_number_above_it(plain, rank):
    values = draw(2).round(decimals=1)  # many of equal magnitude
    high = order_statistics.magnitude_histogram(values)
    index, above = order_statistics.find_bin(high, rank)
    low = order_statistics.magnitude_histogram(values, prefix=index)
    cut = order_statistics.find_cut(index, above, low, rank)
    equal = order_statistics.equal_indices(values, cut)
    assert len(equal) == cut.equal
    until = None if cut.equal_above == cut.equal else int(equal[cut.equal_above])

    def compute(offset=0, part=values):
        return order_statistics.keep_between(part, offset=offset, low=cut, low_until=until, scale=2.5)

    order = torch.argsort(values.abs(), descending=True, stable=True)
    expected = torch.zeros_like(values)
    expected[order[:rank]] = values[order[:rank]] * 2.5
    assert same_bits(compute() + 0.0, expected + 0.0)
    assert same_bits(compute(), plain(compute))
    halves = torch.cat([compute(0, values[:1777].contiguous()), compute(1777, values[1777:].contiguous())])
    assert same_bits(halves, compute())
    assert order_statistics.value_of(cut) == float(values.abs()[order[rank - 1]])


def test_an_upper_cut_drops_what_is_above_it(plain):
    values = torch.tensor([1.0, -3.0, 2.0, 3.0, -2.0, 0.5])
    counts = order_statistics.magnitude_histogram(values)
    index, above = order_statistics.find_bin(counts, 1)
    cut = order_statistics.find_cut(index, above, order_statistics.magnitude_histogram(values, prefix=index), 1)
    assert (order_statistics.value_of(cut), cut.equal_above, cut.equal) == (3.0, 1, 2)

    def compute():
        return order_statistics.keep_between(values, offset=0, high=cut, high_from=2)

    # The first of the equal ones counts as above the cut, the second does not.
    assert compute().tolist() == [1.0, 0.0, 2.0, 3.0, -2.0, 0.5]
    assert same_bits(compute(), plain(compute))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, words):
    # Known answers of the Random123 distribution for philox4x32 with 10 rounds.
    assert tuple(int(one) for one in philox.philox4x32(np.array([counter], dtype=np.uint32), key)[0]) == words


@pytest.mark.parametrize("first", [0, 1, 3, 64, 4_294_967_290 * 4 + 2])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_streams_agree_wherever_they_are_cut(plain, first, count):
    key = philox.stream_key(7, "tuned", "model.layers.0.mlp.weight")
    compiled = philox.philox_words(key, first, count)
    assert np.array_equal(compiled, plain(lambda: philox.philox_words(key, first, count)))
    if count > 3:
        rest = philox.philox_words(key, first + 3, count - 3)
        assert np.array_equal(compiled[3:], rest)


def test_streams_of_other_names_differ_and_are_uniform():
    one, two = (philox.uniforms(philox.stream_key(0, role, "w"), 0, 100_000) for role in ("tuned", "tuned_2"))
    assert not torch.equal(one, two)
    # Mean and variance of 100,000 uniforms: standard errors 0.0009 and 0.00024.
    assert abs(float(one.mean()) - 0.5) < 0.004 and abs(float(one.var()) - 1 / 12) < 0.001
    assert float(one.min()) > 0.0 and float(one.max()) < 1.0


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_random_masks_agree(plain, probability):
    values = draw(3)

    def compute():
        return philox.keep_randomly(values, probability=probability, key=(1, 2), offset=11, scale=1.25)

    assert same_bits(compute(), plain(compute))
    kept = float((compute() != 0).sum()) / float((values != 0).sum())
    assert abs(kept - probability) < 0.03  # 4.5 standard errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widening_agrees_and_finds_what_is_not_finite(plain, dtype):
    values = draw(4).to(dtype)

    def compute(part):
        wide, is_finite = numerics.widen(part, torch.float32, torch.empty(part.numel()))
        return wide.clone(), is_finite

    for bad in (None, float("nan"), float("inf"), float("-inf")):
        part = values.clone()
        if bad is not None:
            part[17] = bad
        wide, is_finite = compute(part)
        twin, twin_is_finite = plain(lambda part=part: compute(part))
        assert is_finite is twin_is_finite is (bad is None)
        assert same_bits(wide, part.float()) and same_bits(twin, part.float())


def test_rounding_is_to_nearest_even_over_every_pair_of_neighbours(plain):
    bits = torch.arange(0, 1 << 16, dtype=torch.int32) << 16
    finite = bits[(bits & 0x7F800000) != 0x7F800000][:-1]
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (finite + low).view(torch.float32)
        values = values[values.abs() <= torch.finfo(torch.bfloat16).max]

        def compute(values=values):
            return numerics.round_once(values, torch.bfloat16, name="w", offset=0)

        assert same_bits(compute(), values.to(torch.bfloat16))
        assert same_bits(compute(), plain(compute))
