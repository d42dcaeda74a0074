"""The thread pool on its own, with plain Python functions."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest

from megalodon_lm.ops.cpu.threads import run_on_pool


def squares(num_tasks, threads=2):
    found, tasks = [None] * num_tasks, iter(list(range(num_tasks)))  # next() of a list's iterator is atomic

    def work():
        for i in tasks:
            assert found[i] is None
            found[i] = i * i

    run_on_pool(work, threads)
    return found


@pytest.mark.parametrize("threads", [1, 2, 5, 3])
@pytest.mark.parametrize("num_tasks", [0, 1, 2, 7, 100])
def test_every_task_runs_once(threads, num_tasks):
    assert squares(num_tasks, threads) == [i * i for i in range(num_tasks)]


def test_calls_from_several_threads_and_from_inside_another():
    with ThreadPoolExecutor(4) as pool:
        assert all(f.result() == squares(50) for f in [pool.submit(squares, 50, 3) for _ in range(20)])
    run_on_pool(lambda: squares(9, 3), 3)


def test_an_exception_reaches_the_caller():
    def work():
        raise ArithmeticError("task")

    with pytest.raises(ArithmeticError, match="task"):
        run_on_pool(work, 2)
    assert squares(10)[3] == 9


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_has_a_pool_of_its_own():
    squares(10)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(squares, (20,)) == squares(20)
