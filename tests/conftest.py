"""What all tests share."""

import os
import signal

import pytest
import torch

from megalodon_lm import ByteTokenizer, Generator, Megalodon, ModelConfig
from megalodon_lm.cli.main import main
from megalodon_lm.ops import backend

torch.set_num_threads(2)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which the next line refuses products on a GPU
torch.use_deterministic_algorithms(True)  # fills what torch.empty and its like leave uninitialised with NaN
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs, and their children, ignore


@pytest.fixture(autouse=True)
def _no_kernel_falls_back_unseen():
    yield
    assert not any(backend._failures.values())


@pytest.fixture(scope="session")
def tiny() -> Megalodon:
    """An untrained byte model."""
    torch.manual_seed(0)
    return Megalodon(ModelConfig.named("tiny")).eval()


@pytest.fixture(scope="session")
def saved(tiny, tmp_path_factory):
    """Its folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    """Running one case of tests/test_fuzz.py again."""
    parser.addoption("--fuzz-seed", type=int, help="the only case that tests/test_fuzz.py runs")


@pytest.fixture(scope="module")
def generator():
    """bf16 where the processor has it, so that rounding would show."""
    torch.manual_seed(0)
    return Generator(Megalodon(ModelConfig.named("tiny")).eval(), ByteTokenizer())


@pytest.fixture
def run(capfd):
    """A command in this process: its exit code, output and errors."""

    def run(*arguments):
        capfd.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def refused(run):
    """What a command says that must refuse, in one line."""

    def refused(*arguments):
        code, _, said = run(*arguments)
        assert code == 2, said
        assert said.startswith("megalodon: error: ")
        assert said.count("\n") == 1
        assert len(said) < 1100
        return said

    return refused
