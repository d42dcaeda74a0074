"""The thread pool on its own, with plain Python functions as kernels."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megalodon_lm.ops.cpu.threads import parallel_for


@pytest.fixture(autouse=True)
def _two_threads_afterwards():
    yield
    torch.set_num_threads(2)


def squares(num_tasks):
    found = [None] * num_tasks

    def kernel(first, last):
        for i in range(first, last):
            assert found[i] is None
            found[i] = i * i

    parallel_for(kernel, num_tasks)
    return found


@pytest.mark.parametrize("threads", [1, 2, 5, 3])
@pytest.mark.parametrize("num_tasks", [0, 1, 2, 7, 100])
def test_every_task_runs_once(threads, num_tasks):
    torch.set_num_threads(threads)
    assert squares(num_tasks) == [i * i for i in range(num_tasks)]


def test_calls_from_several_threads_and_from_inside_a_kernel():
    torch.set_num_threads(3)
    with ThreadPoolExecutor(4) as pool:
        assert all(f.result() == squares(50) for f in [pool.submit(squares, 50) for _ in range(20)])
    parallel_for(lambda first, last: [squares(9) for _ in range(first, last)], 6)


def test_an_exception_reaches_the_caller():
    def kernel(first, last):
        raise ArithmeticError(f"task {first}")

    with pytest.raises(ArithmeticError, match="task"):
        parallel_for(kernel, 10)
    assert squares(10)[3] == 9


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_has_a_pool_of_its_own():
    squares(10)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(squares, (20,)) == squares(20)
