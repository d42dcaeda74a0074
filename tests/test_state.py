import copy
import gc
import os
import pickle
import weakref
from typing import ClassVar, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm import Megalodon, ModelConfig, State
from megalodon_lm.errors import InputError
from megalodon_lm.generation.engine import DecodingEngine
from megalodon_lm.state_spec import declare


def tokens(batch, length, seed=0):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def same(a, b):
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def state(tiny):
    with torch.no_grad():
        return tiny(tokens(3, 90))[1]


@pytest.mark.parametrize("rows", [[2, 0, 0], torch.tensor([1]), [-1, 1], [], torch.tensor([True, False, True])])
def test_select_forks_and_reorders_rows(tiny, state, rows):
    """Each chosen row goes on as that row did alone, in any company."""
    numbers = torch.arange(3)[rows].tolist()
    chosen, more = state.select(rows), tokens(3, 5, 1)[: len(numbers)]
    logits, _ = tiny(more, chosen)
    assert chosen.batch_size == len(numbers)
    for i, row in enumerate(numbers):
        alone, _ = tiny(more[[i]], state.split()[row])
        torch.testing.assert_close(logits[i], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [[3], [0, -4], torch.tensor([True, False])])
def test_rows_that_do_not_exist_are_refused(state, rows):
    with pytest.raises(ValueError, match="are not all rows of a state that has 3"):
        state.select(rows)


def test_rows_that_stand_at_different_places_join(tiny):
    """Conversations of unequal length, joined, go on as each would alone."""
    prompts = [tokens(1, n, n) for n in (3, 64, 100)]
    joined = State.cat([tiny(p)[1] for p in prompts])
    assert joined.position.tolist() == [3, 64, 100]
    more = tokens(3, 70, 1)
    logits, leaving = tiny(more, joined)
    assert leaving.position.tolist() == [73, 134, 170]
    for i, prompt in enumerate(prompts):
        alone, _ = tiny(more[[i]], tiny(prompt)[1])
        torch.testing.assert_close(logits[i], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 5, 38, 200])
@pytest.mark.parametrize("grad", [False, True])
def test_reading_on_leaves_the_state_as_it_was(tiny, state, length, grad):
    """A state is a value: it can be read on from twice, and gives the same twice."""
    before = state.clone()
    with torch.set_grad_enabled(grad):
        first, _ = tiny(tokens(3, length, 1), state)
        second, _ = tiny(tokens(3, length, 1), state)
    assert torch.equal(first, second)
    assert same(state, before)


def test_clone_is_independent_and_keeps_the_gradient(tiny):
    _, state = tiny(tokens(1, 10))
    clone = state.clone()
    assert clone.parts["layers"][0]["cema"].requires_grad
    for name, t in clone.tensors().items():
        assert t.data_ptr() != state.tensors()[name].data_ptr(), name


def test_split_and_cat_are_inverse(state):
    assert same(State.cat(state.split()), state)
    with pytest.raises(ValueError, match="at least one"):
        State.cat([])
    other = Megalodon(ModelConfig.named("tiny", chunk_size=32)).empty_state()
    with pytest.raises(ValueError, match="different models"):
        State.cat([state, other])


@pytest.mark.parametrize("detach", [False, True])
def test_detach_cuts_the_gradient(tiny, detach):
    seen = []
    handle = tiny.embed.register_forward_hook(lambda m, i, out: seen.append(out))
    _, state = tiny(tokens(1, 10))
    handle.remove()
    state = state.detach() if detach else state
    logits, _ = tiny(tokens(1, 5, 1), state)
    (grad,) = torch.autograd.grad(logits.square().sum(), seen, allow_unused=True)
    if detach:
        assert grad is None
    else:
        assert grad.abs().sum(-1).all()


def test_to_changes_only_the_cache(tiny, state):
    moved = state.to(dtype=torch.bfloat16)
    assert moved.nbytes == tiny.state_bytes(3, torch.bfloat16)
    for name, t in moved.tensors().items():
        before = state.tensors()[name].dtype
        assert t.dtype == (torch.bfloat16 if name.endswith(("keys", "values")) else before)
    types = {name: t.dtype for name, t in state.tensors().items()}
    assert {t for n, t in types.items() if n.endswith(("mean", "var"))} == {torch.float64}
    assert {t for n, t in types.items() if n.endswith(("count", "fill", "position"))} == {torch.int64}
    assert {t for n, t in types.items() if n.endswith("cema")} == {torch.float32}
    on_meta = state.to("meta")
    assert on_meta.parts["layers"][0]["cema"].is_meta
    assert not on_meta.position.is_meta
    assert not on_meta.parts["layers"][0]["attention"].fill.is_meta


@pytest.mark.parametrize("name", ["tiny", "small", "paper7B"])
@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_size_is_known_beforehand(name, batch, dtype):
    """Computed: statistics, CEMA's states as pairs of float32, a chunk of keys and values, and the counts."""
    with torch.device("meta"):
        model = Megalodon(c := ModelConfig.named(name))
    norm = 8 + 2 * 8 * c.norm_num_groups
    cache = c.chunk_size * (c.z_dim + c.value_dim) * dtype.itemsize + 8
    expected = batch * (c.num_layers * (norm + c.model_dim * c.cema_ndim * 2 * 4 + cache) + norm + 8)
    assert model.state_bytes(batch, dtype) == model.empty_state(batch, dtype=dtype).nbytes == expected


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_the_layers_declare(tiny, precision):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        _, read = tiny(tokens(3, 100))
    empty = tiny.empty_state(3, dtype=precision)
    assert read.nbytes == tiny.state_bytes(3, precision)
    found, expected = ({n: (t.shape, t.dtype, t.device) for n, t in s.tensors().items()} for s in (read, empty))
    assert list(found.items()) == list(expected.items())


class Memory(NamedTuple):
    recent: torch.Tensor
    older: torch.Tensor
    seen: torch.Tensor
    older_seen: torch.Tensor


class OtherModel(torch.nn.Linear):
    """What a State needs of a model, with layers of its own: two caches filled to different places, and a matrix."""

    summary = "another model"
    count = declare(dtype=torch.int64, on_cpu=True)
    memory = Memory(declare(6, 2, fill="seen"), declare(3, fill="older_seen"), count, count)
    state_spec: ClassVar = {"mixers": (memory, {"matrix": declare(2, 2, dtype=torch.float32)}, ()), "position": count}

    def fingerprint(self):
        return "other"


def test_a_state_knows_no_layer(tmp_path):
    """Everything follows from what the layers of a model declare."""
    model = OtherModel(1, 1)
    rng = torch.Generator().manual_seed(0)
    spec, count = model.state_spec, torch.tensor
    memory = Memory(torch.rand(2, 6, 2, generator=rng), torch.rand(2, 3, generator=rng), count([4, 1]), count([0, 1]))
    for cache, fill in ((memory.recent, memory.seen), (memory.older, memory.older_seen)):
        for row in range(2):
            cache[row, fill[row] :] = 0
    parts = {"mixers": (memory, {"matrix": torch.rand(2, 2, 2)}, ()), "position": count([9, 7])}
    state = State(parts, spec, weakref.ref(model))
    assert list(state.tensors()) == [
        "mixers.0.recent", "mixers.0.older", "mixers.0.seen", "mixers.0.older_seen", "mixers.1.matrix", "position"
    ]  # fmt: skip
    assert {n: t.shape[1] for n, t in state.used().items() if t.dim() > 1 and "matrix" not in n} == {
        "mixers.0.recent": 4, "mixers.0.older": 1
    }  # fmt: skip
    state.save(tmp_path / "other.state")
    loaded = State.load(tmp_path / "other.state", model)
    assert same(loaded, state)
    assert isinstance(loaded.parts["mixers"][0], Memory)
    assert same(State.cat(state.split()), state)
    moved = state.to("meta", torch.bfloat16)
    assert {n for n, t in moved.tensors().items() if t.dtype == torch.bfloat16} == {"mixers.0.recent", "mixers.0.older"}
    assert {n.split(".")[-1] for n, t in moved.tensors().items() if not t.is_meta} == {"seen", "older_seen", "position"}
    with pytest.raises(InputError, match=r"another model: mixers\.1\.matrix has shape \(1,\) a row"):
        State.from_tensors({**state.used(), "mixers.1.matrix": torch.zeros(2, 1)}, model)
    with pytest.raises(InputError, match=r"mixers\.1\.matrix has shape None"):
        State.from_tensors({n: t for n, t in state.used().items() if "matrix" not in n}, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_precision_of_what_a_model_carries(dtype):
    """Statistics are float64 and CEMA float32 or better, in the state of nothing and after some tokens."""
    model = Megalodon(ModelConfig.named("tiny")).to(dtype)
    with torch.no_grad():
        _, read = model(tokens(1, 5))
        _, nothing = model(tokens(1, 0))
    for name, t in (*read.tensors().items(), *nothing.tensors().items()):
        kind = name.split(".")[-1]
        precise = torch.promote_types(dtype, torch.float32)
        expected = {"mean": torch.float64, "var": torch.float64, "cema": precise, "keys": dtype, "values": dtype}
        assert t.dtype == expected.get(kind, torch.int64), name


@pytest.mark.parametrize("length", [0, 1, 63, 64, 90])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_save_and_load(dtype, length, tmp_path):
    torch.manual_seed(0)
    model = Megalodon(ModelConfig.named("tiny")).to(dtype)
    more = tokens(2, 30, 2)
    with torch.no_grad():
        _, state = model(tokens(2, length))
        state.save(tmp_path / "a.state")
        loaded = State.load(tmp_path / "a.state", model)
        assert same(loaded, state)
        assert torch.equal(model(more, loaded)[0], model(more, state)[0])
    unused = 2 * 2 * (64 - length % 64) * (32 + 128) * dtype.itemsize
    assert state.nbytes - unused < (tmp_path / "a.state").stat().st_size < state.nbytes - unused + 2500


def test_save_and_load_rows_at_different_places(tiny, tmp_path):
    state = State.cat([tiny(tokens(1, n))[1] for n in (3, 64, 100)])
    state.save(tmp_path / "a.state")
    assert same(State.load(tmp_path / "a.state", tiny), state)
    assert not any(t.requires_grad for t in State.load(tmp_path / "a.state", tiny).tensors().values())


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model so small that a file of its state is 1 kB, the state, and the file's path and bytes."""
    torch.manual_seed(0)
    sizes = {"model_dim": 4, "z_dim": 4, "value_dim": 4, "ffn_hidden_dim": 4, "cema_ndim": 1, "norm_num_groups": 1}
    model = Megalodon(ModelConfig.named("tiny", num_layers=1, chunk_size=4, vocab_size=256, **sizes))
    with torch.no_grad():
        _, state = model(tokens(2, 5))
    path = tmp_path_factory.mktemp("stored") / "a.state"
    state.save(path)
    return model, state, path, path.read_bytes()


def refused_or_the_same(stored, data):
    """Whether a file of this content is refused by name; if not, it must hold the state that was saved."""
    model, state, path, _ = stored
    path.write_bytes(data)
    try:
        loaded = State.load(path, model)
    except ValueError as error:
        return "a.state" in str(error)
    assert same(loaded, state)
    return False


def test_truncated_file_is_refused(stored):
    data = stored[-1]
    assert all(refused_or_the_same(stored, data[:length]) for length in range(len(data)))
    assert refused_or_the_same(stored, data + b"\0")


def test_a_flipped_bit_in_any_byte_is_refused_or_means_nothing(stored):
    """The header has bytes of no meaning: blanks that fill it up, and a copy of the positions for human readers."""
    data, harmless = stored[-1], []
    for place in range(len(data)):
        altered = bytearray(data)
        altered[place] ^= 1 << place % 8
        if not refused_or_the_same(stored, bytes(altered)):
            harmless.append(place)
    header = 8 + int.from_bytes(data[:8], "little")
    assert all(place < header for place in harmless)
    assert len(harmless) < 40


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_overwritten_bytes_are_refused_or_mean_the_same(stored, changes):
    data = bytearray(stored[-1])
    for place, value in changes:
        data[int(len(data) * place)] = value
    refused_or_the_same(stored, bytes(data))


def test_state_of_another_model_is_refused(tiny, state, tmp_path):
    state.save(tmp_path / "a.state")
    other_weights = copy.deepcopy(tiny)
    with torch.no_grad():
        other_weights.layers[0].mega.wz.bias[0] += 1
    other_shape = Megalodon(ModelConfig.named("tiny", num_layers=1))
    for other in (other_weights, other_shape):
        with pytest.raises(ValueError, match="another model"):
            State.load(tmp_path / "a.state", other)
    with pytest.raises(ValueError, match=r"another model: layers\.1"):
        other_shape(tokens(3, 2), state)
    with pytest.raises(ValueError, match="3 rows but the tokens have 2"):
        tiny(tokens(2, 2), state)
    with pytest.raises(ValueError, match="another model"):
        Megalodon(ModelConfig.named("tiny", chunk_size=32))(tokens(3, 2), state)
    with pytest.raises(ValueError, match="no state file"):
        State.load(tmp_path / "missing", tiny)
    with pytest.raises(ValueError, match="not a readable state file"):
        State.load(tmp_path, tiny)
    tiny.save(tmp_path / "m")
    with pytest.raises(ValueError, match="not a state file of this version"):
        State.load(tmp_path / "m" / "model.safetensors", tiny)
    (tmp_path / "text").write_text("not a state, but longer than eight bytes")
    with pytest.raises(ValueError, match="not a readable state file"):
        State.load(tmp_path / "text", tiny)


def test_a_state_of_another_model_of_the_same_shape_is_refused(tiny, state):
    """In memory too; a copy with the same weights takes it, and so does the model itself after a change."""
    twin = copy.deepcopy(tiny)
    more = tokens(3, 2)
    assert torch.equal(twin(more, state)[0], tiny(more, state)[0])
    State.cat([state, twin(more)[1]])
    with torch.no_grad():
        twin.layers[0].mega.wz.weight[1, 1] += 1
    twin(more, twin(more)[1])
    with pytest.raises(InputError, match="another model of the same shape"):
        twin(more, state)
    with pytest.raises(InputError, match="different models; their weights differ"):
        State.cat([state, twin(more)[1]])
    other_choice = Megalodon(ModelConfig.named("tiny", rope_base=5000.0))
    other_choice.load_state_dict(tiny.state_dict())
    with pytest.raises(InputError, match="another model of the same shape"):
        DecodingEngine(other_choice, state)


def test_the_joined_state_knows_the_model_that_one_of_them_knows(tiny, state, tmp_path):
    State.cat([tiny.empty_state(), state]).save(tmp_path / "a.state")
    assert State.load(tmp_path / "a.state", tiny).batch_size == 4


def test_failed_write_leaves_the_old_file(state, tmp_path, monkeypatch):
    state.save(tmp_path / "a.state")
    before = (tmp_path / "a.state").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        state.save(tmp_path / "a.state")
    assert (tmp_path / "a.state").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.state"]
    with pytest.raises(ValueError, match=r"cannot write .*Not a directory; nothing there was changed"):
        state.save(tmp_path / "a.state" / "b.state")
    with pytest.raises(ValueError, match=r"cannot write .*No such file"):
        state.save(tmp_path / "none" / "b.state")


def test_interrupted_write_leaves_the_old_file_and_no_other(state, tmp_path, monkeypatch):
    state.save(tmp_path / "a.state")
    before = (tmp_path / "a.state").read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        state.select([0]).save(tmp_path / "a.state")
    assert (tmp_path / "a.state").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.state"]


def test_a_reader_never_finds_half_a_file(state, tmp_path, monkeypatch):
    """Everything is on disk under another name before the name changes hands."""
    steps, path = [], tmp_path / "a.state"
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda file: steps.append(("sync", path.exists())) or sync(file))
    monkeypatch.setattr("os.replace", lambda *names: steps.append(("replace", path.exists())) or replace(*names))
    state.save(path)
    assert steps == [("sync", False), ("replace", False)]
    assert path.exists()


def test_copies_and_pickles(tiny, state, tmp_path):
    assert same(pickle.loads(pickle.dumps(state)), state)
    assert same(copy.deepcopy(state), state)
    more = tokens(3, 4, 1)
    assert torch.equal(tiny(more, copy.deepcopy(state))[0], tiny(more, state)[0])
    orphan = pickle.loads(pickle.dumps(state))
    with pytest.raises(ValueError, match=r"state\.save\(path, model\)"):
        orphan.save(tmp_path / "a.state")
    orphan.save(tmp_path / "a.state", tiny)
    loaded = State.load(tmp_path / "a.state", tiny)
    assert same(loaded, state)
    for kept in (loaded, state.select([0]), state.clone(), state.detach(), State.cat([state])):
        kept.save(tmp_path / "b.state")


def test_a_state_does_not_keep_its_model_alive(tmp_path):
    model = Megalodon(ModelConfig.named("tiny"))
    _, state = model(tokens(1, 2))
    state = state.detach()
    del model
    gc.collect()
    with pytest.raises(ValueError, match="the model of this state is gone"):
        state.save(tmp_path / "a.state")
