"""The contour lines of fields as matplotlib draws them, and what they enclose; on the host, for many fields at once.

Each edge between two pixels that a line crosses is a node of a graph, and each quad of four pixels joins two of its
crossings. A line is a component of the graph. Lines that end at the border come before closed ones; otherwise they come
in the order of the quads they pass first, as in the algorithm "mpl2014" of contourpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Sides of a quad whose lower left pixel is (y, x), y upwards as matplotlib draws it.
SOUTH, WEST, NORTH, EAST = range(4)


def automatic_levels(low: float, high: float) -> list[float]:
    """The levels that matplotlib's ``contour(field, 0)`` takes between a field's extremes: one interval, often about 0.

    Example:
        >>> from hmg_gpu.plain.contour import automatic_levels
        >>> automatic_levels(-2.6, 1.1), automatic_levels(0.5, 9.0)
        ([-4.0, 0.0, 4.0], [0.0, 8.0, 16.0])
    """
    if not low < high:
        return [low]
    span, middle = high - low, (low + high) / 2
    # Ticks far from zero count from a round number near them.
    offset = 0.0 if abs(middle) / span < 100 else math.copysign(10.0 ** (math.log10(abs(middle)) // 1), middle)
    scale = 10.0 ** (math.log10(span) // 1)
    low, high, last = low - offset, high - offset, high
    first = low + offset
    widths = [
        width * scale
        for width in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15)
    ]
    ticks: list[float] = []
    for width in reversed([width for width in widths if width < span] + [next(w for w in widths if w >= span)]):
        base = low // width * width
        start, stop = _whole(low - base, width, offset, math.floor), _whole(high - base, width, offset, math.ceil)
        ticks = [step * width + base for step in range(start, stop + 1)]
        if any(low <= tick <= high for tick in ticks):
            break
    ticks = [tick + offset for tick in ticks]
    # What lies beyond the extremes is left out but for one on each side, if three remain.
    begin = max((index for index, tick in enumerate(ticks) if tick < first), default=0)
    end = min((index + 1 for index, tick in enumerate(ticks) if tick > last), default=len(ticks))
    return ticks[begin:end] if end - begin >= 3 else ticks


def _whole(length: float, width: float, offset: float, rounded: Callable[[float], int]) -> int:
    """Length / width as a whole number, where rounding errors may not add one."""
    tolerance = 1e-10
    if offset:
        tolerance = min(0.4999, max(1e-10, 10 ** (math.log10(abs(offset) / width) - 12)))
    quotient, rest = divmod(length, width)
    rest /= width
    if rounded is math.floor:
        return int(quotient + 1 if abs(rest - 1) < tolerance else quotient)
    return int(quotient if abs(rest) < tolerance else quotient + 1)


def first_lines(fields: NDArray, levels: NDArray, sizes: NDArray) -> NDArray:
    """The pixels to which the vertices of each field's first line are cut off (towards 0): bool [P, S, S].

    Args:
        fields: float64 [P, S, S].
        levels: float64 [P].
        sizes: int64 [P, 2], the valid height and width of each field, in its upper left.

    Example:
        >>> import numpy as np
        >>> from hmg_gpu.plain.contour import first_lines
        >>> field = np.ones((1, 4, 4))
        >>> field[0, 1:3, 1:3] = -1
        >>> first_lines(field, np.zeros(1), np.array([[4, 4]]))[0].astype(int)
        array([[0, 1, 1, 0],
               [1, 0, 1, 0],
               [1, 1, 1, 0],
               [0, 0, 0, 0]])
    """
    count, side, _ = fields.shape
    steps = np.arange(side)
    rows, columns = (steps < sizes[:, axis, None] for axis in (0, 1))  # [P, S]
    last_row, last_column = (steps == sizes[:, axis, None] - 2 for axis in (0, 1))
    high = fields > levels[:, None, None]

    # Node 2 p is the edge from pixel p to the one at its right, node 2 p + 1 that to the one above.
    pixel = np.arange(fields.size).reshape(fields.shape)
    quad = rows[:, 1:, None] & columns[:, None, 1:]  # [P, S - 1, S - 1]
    sw, se, nw, ne = high[:, :-1, :-1], high[:, :-1, 1:], high[:, 1:, :-1], high[:, 1:, 1:]
    at = pixel[:, :-1, :-1]
    node = (2 * at, 2 * at + 1, 2 * (at + side), 2 * (at + 1) + 1)  # of the south, west, north and east
    crossed = np.stack((sw != se, sw != nw, nw != ne, se != ne)) & quad  # [4, P, S - 1, S - 1]
    saddle = crossed.all(axis=0)
    middle = 0.25 * (fields[:, :-1, :-1] + fields[:, :-1, 1:] + fields[:, 1:, :-1] + fields[:, 1:, 1:])
    with_south_west = sw != (middle > levels[:, None, None])
    pairs = []
    for one, other in ((SOUTH, WEST), (SOUTH, EAST), (WEST, NORTH), (NORTH, EAST), (SOUTH, NORTH), (WEST, EAST)):
        joined = crossed[one] & crossed[other]
        if (one, other) in ((SOUTH, NORTH), (WEST, EAST)):
            joined = joined & ~saddle
        else:
            is_first = (one, other) in ((SOUTH, WEST), (NORTH, EAST))
            joined = joined & (~saddle | (with_south_west == is_first))
        pairs.append((node[one][joined], node[other][joined]))
    ends = [np.concatenate(part) for part in zip(*pairs, strict=True)]
    graph = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(2 * fields.size, 2 * fields.size))
    _, label = connected_components(graph, directed=False)

    # A line enters a quad with what is high on its left. It may start at the border, or else at the first such quad.
    entered = np.stack((sw & ~se, nw & ~sw, ne & ~nw, se & ~ne)) & quad
    first = np.broadcast_to(steps[:-1] == 0, (count, side - 1))
    border = (first[:, :, None], first[:, None], last_row[:, :-1, None], last_column[:, None, :-1])
    starts = entered & np.stack([np.broadcast_to(part, quad.shape) for part in border])
    order, closed = (np.moveaxis(part, 0, -1).reshape(count, -1) for part in (starts, entered))  # [P, quads * 4]
    is_open = order.any(axis=1)
    begin = np.where(is_open, order.argmax(axis=1), closed.argmax(axis=1))
    begins = is_open | closed.any(axis=1)
    nodes = np.stack(node, axis=-1).reshape(count, -1)[np.arange(count), begin]  # [P]

    result = np.zeros(fields.shape, dtype=bool)
    flat = fields.reshape(-1)
    mine = np.flatnonzero(begins)
    wanted = np.zeros(label.max(initial=0) + 1, dtype=bool)
    wanted[label[nodes[mine]]] = True
    is_node = np.zeros(2 * fields.size, dtype=bool)
    for side_nodes, is_crossed in zip(node, crossed, strict=True):
        is_node[side_nodes[is_crossed]] = True
    is_node[nodes[begins & is_open]] = False  # an open line has its first vertex once, a closed one again at its end
    chosen = np.flatnonzero(is_node & wanted[label])
    _mark(result, flat, levels, chosen, backwards=False)
    _mark(result, flat, levels, nodes[mine], backwards=True)
    return result


def _mark(result: NDArray, flat: NDArray, levels: NDArray, nodes: NDArray, *, backwards: bool) -> None:
    """Mark the pixels of vertices, computed like contourpy's: from the lower pixel to the higher, or the other way."""
    _, side, _ = result.shape
    near = nodes // 2
    far = near + np.where(nodes % 2 == 0, 1, side)
    level = levels[near // side**2]
    swap = (flat[near] > level) != backwards
    start, end = np.where(swap, far, near), np.where(swap, near, far)
    share = (flat[end] - level) / (flat[end] - flat[start])

    def between(first: NDArray, second: NDArray) -> NDArray:
        return (first * share + second * (1 - share)).astype(np.int64)

    y = between(start // side % side, end // side % side)
    x = between(start % side, end % side)
    result[near // side**2, y, x] = True


def enclosed(lines: NDArray, sizes: NDArray) -> NDArray:
    """What a 4-connected flood fill from the first pixel does not reach, without the line itself: bool [P, S, S].

    Example:
        >>> import numpy as np
        >>> from hmg_gpu.plain.contour import enclosed
        >>> enclosed(np.array([[[0, 1, 0], [1, 0, 1], [0, 1, 0]]], bool), np.array([[3, 3]]))[0].astype(int)
        array([[0, 0, 1],
               [0, 1, 0],
               [1, 0, 1]])
    """
    steps = np.arange(lines.shape[1])
    inside = (steps[:, None] < sizes[:, 0, None, None]) & (steps < sizes[:, 1, None, None])
    plane = np.zeros((3, 3, 3), dtype=bool)  # neighbours in the same field, four of them
    plane[1] = ndimage.generate_binary_structure(2, 1)
    labels, _ = ndimage.label(inside & ~lines, plane)
    # A line through the first pixel stops the fill there.
    reached = (labels == labels[:, :1, :1]) & ~lines & (labels[:, :1, :1] > 0)
    return inside & ~lines & ~reached


def published_masks(fields: NDArray, sizes: NDArray) -> NDArray:
    """What COM's script cuts out of level sets: the strict inside of the first line of the second automatic level.

    Args:
        fields: float64 [P, S, S].
        sizes: int64 [P, 2], the valid height and width of each, in its upper left.

    Returns:
        bool [P, S, S]; empty where there is no second level or no line of it.
    """
    steps = np.arange(fields.shape[1])
    inside = (steps[:, None] < sizes[:, 0, None, None]) & (steps < sizes[:, 1, None, None])
    lows = np.where(inside, fields, np.inf).min(axis=(1, 2))
    highs = np.where(inside, fields, -np.inf).max(axis=(1, 2))
    ticks = [automatic_levels(low, high) for low, high in zip(lows.tolist(), highs.tolist(), strict=True)]
    levels = np.array([one[1] if len(one) > 1 else np.inf for one in ticks])
    lines = first_lines(fields, levels, sizes)
    return enclosed(lines, sizes) & lines.any(axis=(1, 2), keepdims=True)
