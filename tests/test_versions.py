"""The benchmark that runs two versions in turns: its interval holds the median as often as it says."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).parent.parent / "benchmarks" / "versions.py"


@pytest.fixture(scope="module")
def versions():
    spec = importlib.util.spec_from_file_location("versions", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rounds", [8, 9, 80])
def test_the_interval_holds_the_median_of_a_skewed_distribution(versions, rounds):
    drawn = np.random.default_rng(0).lognormal(0, 0.3, (2000, rounds))  # whose median is 1
    found = [versions.middle(list(ratios)) for ratios in drawn]
    assert all(low <= ratio <= high for ratio, low, high in found)
    held = np.mean([low <= 1 <= high for _, low, high in found])
    assert 0.94 < held < 0.995
    assert np.median([ratio for ratio, _, _ in found]) == pytest.approx(1, abs=0.03)


def test_a_folder_without_the_package_is_refused(versions, tmp_path):
    with pytest.raises(SystemExit, match="holds no package megalodon_lm; give the src folder"):
        versions.main(versions.Versions(tmp_path))
