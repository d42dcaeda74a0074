"""The benchmark that runs two versions in turns: its interval holds the median as often as it says."""

import numpy as np
import pytest

from .benchmarks import benchmark


@pytest.fixture(scope="module")
def versions():
    return benchmark("versions")


@pytest.mark.parametrize("rounds", [6, 9, 80])
def test_the_interval_holds_the_median_of_a_skewed_distribution(versions, rounds):
    drawn = np.random.default_rng(0).lognormal(0, 0.3, (2000, rounds))  # whose median is 1
    found = [versions.middle(list(ratios)) for ratios in drawn]
    assert all(low <= ratio <= high for ratio, low, high in found)
    held = np.mean([low <= 1 <= high for _, low, high in found])
    assert 0.94 < held < 0.995
    assert np.median([ratio for ratio, _, _ in found]) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("rounds", [1, 5])
def test_too_few_rounds_for_an_interval_are_refused(versions, tmp_path, rounds):
    (tmp_path / "megalodon_lm").mkdir()
    with pytest.raises(SystemExit, match=f"rounds = {rounds} .* give at least 6"):
        versions.main(versions.Versions(tmp_path, rounds=rounds))


def test_a_folder_without_the_package_is_refused(versions, tmp_path):
    with pytest.raises(SystemExit, match="holds no package megalodon_lm; give the src folder"):
        versions.main(versions.Versions(tmp_path))
