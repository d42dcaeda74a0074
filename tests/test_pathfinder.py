"""Pathfinder: labels follow from the pixels, and pictures from seed and number."""

import numpy as np
import pytest
from scipy import ndimage

from megalodon_lm.data.pathfinder import PATHX, PathfinderGeometry, picture


def discs(image, geometry):
    """The two brightest spots."""
    disc = np.hypot(*np.indices((5, 5)) - 2.0) <= geometry.marker
    spots = ndimage.correlate(image.astype(float), disc.astype(float), mode="constant")
    ends = []
    for _ in range(2):
        ends.append(np.unravel_index(spots.argmax(), spots.shape))
        y, x = np.indices(spots.shape)
        spots[np.hypot(y - ends[-1][0], x - ends[-1][1]) < 2.5 * geometry.marker] = 0
    return ends


def joined(image, geometry):
    """Whether the discs lie on one patch once the gaps of dashes are bridged."""
    ends = discs(image, geometry)
    drawn = image > 40
    if geometry.gap > 2:
        drawn = ndimage.binary_dilation(drawn, np.ones((3, 3)))
    patches, _ = ndimage.label(drawn, np.ones((3, 3)))
    return patches[ends[0]] == patches[ends[1]]


@pytest.mark.parametrize("geometry", [PathfinderGeometry.of(6), PathfinderGeometry()])
def test_labels_follow_from_the_pixels(geometry):
    made = [picture(5, i, geometry) for i in range(40)]
    assert [joined(image, geometry) for image, _ in made] == [bool(label) for _, label in made]


def test_large_pictures():
    made = [picture(1, i, PATHX) for i in range(6)]
    assert all(image.shape == (128, 128) for image, _ in made)
    assert all(joined(image, PATHX) == bool(label) for image, label in made)


def test_half_are_connected_and_any_can_be_asked_for_alone():
    made = [picture(3, i) for i in range(40)]
    assert [made[i][1] + made[i + 1][1] for i in range(0, 40, 2)] == [1] * 20
    assert 4 <= sum(label for _, label in made[::2]) <= 16
    again = picture(3, 17)
    assert np.array_equal(again[0], made[17][0])
    assert again[1] == made[17][1]
    assert len({image.tobytes() for image, _ in made}) == 40
    assert not np.array_equal(picture(4, 17)[0], again[0])
    assert all(image.dtype == np.uint8 and image.max() == 255 and image.shape == (32, 32) for image, _ in made)


def test_the_distance_of_the_discs_does_not_tell():
    geometry, found = PathfinderGeometry.of(6), ([], [])
    for i in range(200):
        image, label = picture(7, i, geometry)
        found[label].append(np.hypot(*np.subtract(*discs(image, geometry))))
    apart, connected = (np.array(distances) for distances in found)
    assert abs(np.median(apart) - np.median(connected)) < 1
    assert abs(np.ptp(np.quantile(apart, [0.1, 0.9])) - np.ptp(np.quantile(connected, [0.1, 0.9]))) < 2.5


def test_long_contours_find_room():
    image, label = picture(1, 2, PathfinderGeometry.of(14))
    assert joined(image, PathfinderGeometry.of(14)) == bool(label)
