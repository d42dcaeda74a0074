"""Pathfinder: do the two marked ends belong to one dashed contour? Pictures of a generator of our own.

A picture has two long contours of dashes that bend but do not cross, shorter ones to distract, and discs on two ends:
of one contour where they are connected, of both where they are not. The second contour begins as far from an end of the
first as the first is from end to end, so that the distance of the discs does not tell. Geometry of the task: Linsley et
al. 2018 (arXiv 1805.08315), Tay et al. 2020 (arXiv 2011.04006).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""(n, 2), x and y in pixels."""
_TRIES = 60  # of a contour, before the picture is begun anew
_BENDS = 8  # of a step, before the contour is begun anew


@dataclass(frozen=True)
class PathfinderGeometry:
    """What pictures look like; lengths in pixels."""

    size: int = 32
    """Width and height: 32, or 128 as Path-X."""
    dashes: int = 9
    """Of a long contour; 6, 9 and 14 make the task easier or harder."""
    distractors: int = 4
    """Short contours, of a third as many dashes, as far as there is room."""
    dash: float = 2.0
    """Length of a dash."""
    gap: float = 1.2
    """Between two dashes."""
    turn: float = 0.65
    """Largest angle between two dashes, in radians; long contours need more of it to find room."""
    clearance: float = 3.0
    """Between contours, and between parts of one."""
    marker: float = 1.6
    """Radius of the discs."""

    @classmethod
    def of(cls, dashes: int) -> "PathfinderGeometry":
        """That of small pictures with contours of so many dashes, which bend the more the longer they are."""
        return cls(dashes=dashes, turn=0.2 + 0.05 * dashes)

    @property
    def step(self) -> float:
        """From the middle of a gap to that of the next."""
        return self.dash + self.gap


PATHX = PathfinderGeometry(128, 14, 20, 5.0, 3.0, 0.5, 7.0, 3.0)
"""Pictures of 128 x 128."""


def picture(seed: int, index: int, geometry: PathfinderGeometry | None = None) -> tuple[NDArray[np.uint8], int]:
    """Picture number `index` of a seed, (size, size) grey levels, and 1 where the marked ends are connected, else 0.

    Every other one is; which of two, and all else, is drawn anew for each number, so that any may be asked for alone.
    """
    g = geometry or PathfinderGeometry()
    draw = np.random.default_rng([seed, index // 2])
    connected = bool(draw.integers(2)) == bool(index % 2)
    draw = np.random.default_rng([seed, index // 2, index % 2 + 1])
    contours = None
    while contours is None:
        contours = _two_long(draw, g)
    first, second = contours
    ends = (first[-1], first[0] if connected else second[0])
    taken = np.concatenate([_surroundings(contour, g, g.marker) for contour in contours])
    for _ in range(g.distractors):
        short = _contour(draw, g, max(1, g.dashes // 3), taken, 0.0)
        if short is not None:
            contours.append(short)
            taken = np.concatenate([taken, _surroundings(short, g, 0.0)])
    canvas = np.zeros((g.size, g.size))
    for contour in contours:
        for begin, end in pairwise(contour):
            shift = (end - begin) / g.step * g.gap / 2
            _stroke(canvas, begin + shift, end - shift, 0.5)
    for end in ends:
        _stroke(canvas, end, end, g.marker)
    return np.rint(255 * canvas).astype(np.uint8), int(connected)


def _two_long(draw: np.random.Generator, g: PathfinderGeometry) -> list[Points] | None:
    """Two contours; the second begins as far from the end of the first as that is from its own beginning."""
    first = _contour(draw, g, g.dashes, np.empty((0, 3)), g.marker)
    if first is None:
        return None
    around = (first[-1], float(np.hypot(*(first[-1] - first[0]))))
    second = _contour(draw, g, g.dashes, _surroundings(first, g, g.marker), g.marker, around)
    return None if second is None else [first, second]


def _contour(
    draw: np.random.Generator,
    g: PathfinderGeometry,
    dashes: int,
    taken: Points,
    marker: float,
    around: tuple[Points, float] | None = None,
) -> Points | None:
    """Ends of the steps of a contour that keeps clear of others and of itself; None where none was found.

    Args:
        taken: (n, 3), places and how far to keep from them.
        marker: radius of a disc that its ends may get.
        around: a point, and how far from it the contour begins; None for anywhere.
    """
    for _ in range(_TRIES):
        if around is None:
            points = [draw.uniform(g.marker, g.size - 1 - g.marker, 2)]
        else:
            angle = draw.uniform(0, 2 * math.pi)
            points = [around[0] + around[1] * np.array([math.cos(angle), math.sin(angle)])]
        heading = draw.uniform(0, 2 * math.pi)
        if not _is_inside(points[0], g) or not _is_clear(points[0], taken, marker):
            continue
        while len(points) <= dashes:
            earlier = _surroundings(np.array(points[:-1]).reshape(-1, 2), g, 0.0)
            earlier[:1, 2] += marker
            grown = _step(draw, g, points, heading, taken, earlier, marker if len(points) == dashes else 0.0)
            if grown is None:
                break
            heading = grown
        else:
            return np.array(points)
    return None


def _step(
    draw: np.random.Generator,
    g: PathfinderGeometry,
    points: list[Points],
    heading: float,
    taken: Points,
    earlier: Points,
    marker: float,
) -> float | None:
    """Add a point ahead, clear of others (taken) and of its own contour (earlier); its heading, None without room."""
    for _ in range(_BENDS):
        turned = heading + draw.uniform(-g.turn, g.turn)
        point = points[-1] + g.step * np.array([math.cos(turned), math.sin(turned)])
        clear = _is_inside(point, g) and _is_clear(point, taken, marker) and _is_clear(point, earlier, 0.0)
        if clear and _is_clear((points[-1] + point) / 2, taken, 0.0):
            points.append(point)
            return turned
    return None


def _surroundings(points: Points, g: PathfinderGeometry, marker: float) -> Points:
    """Points and those half-way between them, and how far to keep from each: further from ends that may get a disc."""
    places = np.concatenate([points, (points[1:] + points[:-1]) / 2])
    clear = np.full((len(places), 1), g.clearance)
    clear[[0, len(points) - 1] if len(points) else []] += marker
    return np.concatenate([places, clear], 1)


def _is_inside(point: Points, g: PathfinderGeometry) -> bool:
    return bool(((point >= g.marker) & (point <= g.size - 1 - g.marker)).all())


def _is_clear(point: Points, taken: Points, marker: float) -> bool:
    return bool((np.hypot(*(taken[:, :2] - point).T) >= taken[:, 2] + marker).all())


def _stroke(canvas: Points, begin: Points, end: Points, radius: float) -> None:
    """Draw a line with round ends, its edge smoothed over a pixel."""
    low = np.maximum(np.floor(np.minimum(begin, end) - radius - 1), 0).astype(int)
    high = np.minimum(np.ceil(np.maximum(begin, end) + radius + 1), len(canvas) - 1).astype(int) + 1
    x, y = np.meshgrid(np.arange(low[0], high[0]), np.arange(low[1], high[1]))
    along, across = end - begin, np.stack([x, y], -1) - begin
    length = float(along @ along)
    place = np.clip(across @ along / length, 0, 1) if length else np.zeros(x.shape)
    distance = np.hypot(*np.moveaxis(across - place[..., None] * along, -1, 0))
    part = canvas[low[1] : high[1], low[0] : high[0]]
    np.maximum(part, np.clip(radius + 0.5 - distance, 0, 1), out=part)
