"""The losses and heads of GTSA, from the encoder's feature maps on."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tests.reference import alignment
from tests.reference.grouping import Array
from tests.reference.heads import gelu, linear


def cosine(a: Array, b: Array) -> float:
    """a . b / (|a| |b|)."""
    return float(np.dot(a, b)) / math.sqrt(float(np.dot(a, a)) * float(np.dot(b, b)))


def crop_loss(student: Sequence[Array], teacher: Sequence[Array], crops: Array, rotations: Array) -> float:
    """The mean over 2 (V - 1) pairs of views of - cos of every cell of the pixels that both views show.

    `student` holds the predictions (B, D, h, w) of all V views, `teacher` the projections of the two global ones;
    `crops` is (B, V, 4), `rotations` (B, V). The teacher's cells are turned by the student's angle minus its own.
    """
    pairs = []
    for t in range(2):
        for s in range(len(student)):
            if s == t:
                continue
            total, count, side = 0.0, 0, 10 if s < 2 else 4
            for b in range(len(crops)):
                box_s, intersects = alignment.overlap_box(crops[b, s], crops[b, t], False, int(rotations[b, s]))
                box_t, _ = alignment.overlap_box(crops[b, t], crops[b, s], False, int(rotations[b, t]))
                if not intersects:
                    continue
                of_student = sample(student[s][b], box_s, side)
                turns = int(rotations[b, s] - rotations[b, t])
                of_teacher = np.rot90(sample(teacher[t][b], box_t, side), turns, (1, 2))
                for i in range(side):
                    for j in range(side):
                        total -= cosine(of_student[:, i, j], of_teacher[:, i, j]) / side**2
                count += 1
            pairs.append(total / count if count else 0.0)
    return sum(pairs) / len(pairs)


def sample(planes: Array, box: alignment.Box, side: int) -> Array:
    """RoIAlign of (D, h, w) on a box in 0..1: (D, side, side)."""
    height, width = planes.shape[1:]
    cells = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    return alignment.roi_align(planes, cells, side, side)


def correspondence_loss(student: Sequence[Array], teacher: Sequence[Array]) -> float:
    """The mean over pairs of views and images of - cos of the best half of the student's patches' matches."""
    pairs = []
    for t in range(2):
        for s in range(len(student)):
            if s == t:
                continue
            for b in range(len(student[s])):
                ours = student[s][b].reshape(student[s][b].shape[0], -1).T
                theirs = teacher[t][b].reshape(teacher[t][b].shape[0], -1).T
                pairs.append(matches(ours, theirs, len(ours) // 2) / 2 + matches(theirs, ours, len(ours) // 2) / 2)
    return sum(pairs) / len(pairs)


def matches(patches: Array, others: Array, count: int) -> float:
    """- mean cos of the `count` patches (N, D) that are nearest to their nearest neighbor in `others` (M, D)."""
    best = sorted(max(cosine(patch, other) for other in others) for patch in patches)
    return -sum(best[-count:]) / count


def rotation_loss(logits: Array, rotations: Array) -> float:
    """The mean cross-entropy of logits (N, 4) with the rotations (N,)."""
    total = 0.0
    for row, label in zip(logits, rotations):
        total -= float(row[int(label)]) - math.log(sum(math.exp(float(x)) for x in row))
    return total / len(logits)


def layer_norm(rows: Array, eps: float = 1e-5) -> Array:
    """(x - mean) / sqrt(var + eps) of every row (N, D), without parameters."""
    result = np.zeros(rows.shape)
    for n, row in enumerate(rows):
        mean = sum(row) / len(row)
        variance = sum((x - mean) ** 2 for x in row) / len(row)
        result[n] = (row - mean) / math.sqrt(variance + eps)
    return result


def conv(planes: Array, weight: Array, bias: Array) -> Array:
    """Convolution of (I, h, w) with (O, I, k, k), zero-padded to the same size: (O, h, w)."""
    k = weight.shape[2]
    padded = np.pad(planes, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    result = np.zeros((len(weight), *planes.shape[1:]))
    for o, i, j in np.ndindex(*result.shape):
        result[o, i, j] = float((weight[o] * padded[:, i : i + k, j : j + k]).sum()) + bias[o]
    return result


def conv_head(planes: Array, layers: Sequence[tuple[Array, Array]], residual: bool) -> Array:
    """Blocks of 3x3 convolution, layer norm over channels and GELU on (I, h, w), then a 1x1 convolution."""
    for weight, bias in layers[:-1]:
        convolved = conv(planes, weight, bias)
        rows = convolved.reshape(len(weight), -1).T
        output = gelu(layer_norm(rows)).T.reshape(convolved.shape)
        planes = planes + output if residual and planes.shape == output.shape else output
    return conv(planes, *layers[-1])


def rotation_head(rows: Array, parameters: Mapping[str, Array]) -> Array:
    """Linear - layer norm - GELU twice, linear - layer norm, linear: (N, I) to (N, 4)."""
    for index in (0, 3, 6):
        rows = linear(rows, parameters[f"{index}.weight"], parameters[f"{index}.bias"])
        rows = layer_norm(rows) * parameters[f"{index + 1}.weight"] + parameters[f"{index + 1}.bias"]
        rows = gelu(rows) if index < 6 else rows
    return linear(rows, parameters["8.weight"], parameters["8.bias"])
