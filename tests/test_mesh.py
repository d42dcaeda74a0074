"""Which ranks share what."""

import pytest
import torch.distributed as dist

from megalodon_lm.errors import InputError
from megalodon_lm.parallel.mesh import MeshSizes, build_mesh, rows_of

from .ranks import run_ranks


@pytest.mark.parametrize(
    ("sizes", "ranks", "shape"),
    [
        ({}, 1, (1, 1, 1, 1)),
        ({}, 6, (6, 1, 1, 1)),
        ({"chunk": 2}, 4, (2, 1, 2, 1)),
        ({"replicate": 1, "shard": 0, "tensor": 2}, 8, (1, 4, 1, 2)),
        ({"replicate": 2, "shard": 2}, 4, (2, 2, 1, 1)),
    ],
)
def test_one_dimension_takes_the_ranks_that_are_left(sizes, ranks, shape):
    assert tuple(MeshSizes(**sizes).over(ranks).values()) == shape


@pytest.mark.parametrize(
    ("sizes", "ranks", "words"),
    [
        ({"chunk": 2}, 3, "start 2 or a multiple"),
        ({"replicate": 1, "chunk": 2}, 4, "start 2, or change"),
        ({"shard": 0}, 4, "only one"),
        ({"chunk": -1}, 4, "mesh.chunk = -1"),
        ({"exchange": "ring"}, 2, "chain, parallel"),
    ],
)
def test_what_is_no_mesh_is_refused(sizes, ranks, words):
    with pytest.raises(InputError, match=words):
        MeshSizes(**sizes).over(ranks)


def test_fewer_rows_than_ranks_are_refused_and_no_other_number():
    MeshSizes(chunk=2).check_rows(6, 4)
    with pytest.raises(InputError, match=r"2 rows cannot be shared by 3 ranks; raise training\.batch_size"):
        MeshSizes(chunk=2).check_rows(6, 2)


def rows(rank):
    mesh = build_mesh(MeshSizes(replicate=2, chunk=2))
    return rows_of(mesh, 5), mesh["chunk"].get_local_rank()


def test_ranks_of_one_sequence_have_the_same_rows():
    assert run_ranks(rows, 4) == [(range(2), 0), (range(2), 1), (range(2, 5), 0), (range(2, 5), 1)]


def lost(rank):
    if rank == 1:
        raise ValueError("lost")
    dist.barrier()


def test_no_rank_stays_when_one_is_lost():
    with pytest.raises(AssertionError, match=r"rank 1 \(1\)(.|\n)*ValueError: lost"):
        run_ranks(lost, 3)
