import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm import Megalodon, ModelConfig, State
from megalodon_lm.state import _is_cache


def tokens(batch, length, seed=0):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def same(a, b):
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def state(tiny):
    with torch.no_grad():
        return tiny(tokens(3, 90))[1]


def test_select_forks_and_reorders_rows(tiny, state):
    chosen = state.select([2, 0, 0])
    more = tokens(3, 5, 1)
    forked, _ = tiny(more, chosen)
    direct, _ = tiny(more[[1, 0, 0]], state)
    torch.testing.assert_close(forked[0], tiny(more, state.select([0, 1, 2]).select([2, 2, 2]))[0][0])
    torch.testing.assert_close(forked[1], tiny(more[[1]], state.select([0]))[0][0])
    assert direct.shape == forked.shape


def test_split_and_cat_are_inverse(state):
    assert same(State.cat(state.split()), state)
    with pytest.raises(ValueError, match="at least one"):
        State.cat([])
    other = State.empty(ModelConfig.named("tiny", chunk_size=32))
    with pytest.raises(ValueError, match="different models"):
        State.cat([state, other])


def test_detach_cuts_the_gradient(tiny):
    _, state = tiny(tokens(1, 10))
    assert state.layers[0].cema.requires_grad
    assert not any(t.requires_grad for t in state.detach().tensors().values())


def test_to_changes_only_the_cache(state):
    moved = state.to(dtype=torch.bfloat16)
    for name, t in moved.tensors().items():
        before = state.tensors()[name].dtype
        assert t.dtype == (torch.bfloat16 if _is_cache(name) else before)
    types = {name: t.dtype for name, t in state.tensors().items()}
    assert {t for n, t in types.items() if n.endswith(("mean", "var"))} == {torch.float64}
    assert {t for n, t in types.items() if n.endswith(("count", "fill", "position"))} == {torch.int64}
    assert {t for n, t in types.items() if n.endswith("cema")} == {torch.float32}
    on_meta = state.to("meta")
    assert on_meta.layers[0].cema.is_meta
    assert not on_meta.position.is_meta


def test_save_and_load(tiny, state, tmp_path):
    state.save(tmp_path / "a.state")
    loaded = State.load(tmp_path / "a.state", tiny)
    assert same(loaded, state)
    more = tokens(3, 30, 2)
    assert torch.equal(tiny(more, loaded)[0], tiny(more, state)[0])
    assert (tmp_path / "a.state").stat().st_size < 0.6 * state.nbytes  # 26 of 64 slots are in use


@given(cut=st.floats(0, 0.999))
@settings(max_examples=30, deadline=None)
def test_truncated_file_is_refused(tiny, tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "a.state"
    tiny(tokens(1, 5))[1].save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(ValueError, match=r"a\.state"):
        State.load(path, tiny)


@given(place=st.floats(0, 0.999), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_altered_file_is_refused_or_means_the_same(tiny, tmp_path_factory, place, bit):
    path = tmp_path_factory.mktemp("flip") / "a.state"
    before = tiny(tokens(1, 5))[1]
    before.save(path)
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1 << bit
    path.write_bytes(data)
    try:
        loaded = State.load(path, tiny)
    except ValueError as error:
        assert "a.state" in str(error)  # noqa: PT017
    else:
        assert same(loaded, before)


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
    with pytest.raises(ValueError, match="no state file"):
        State.load(tmp_path / "missing", tiny)
    (tmp_path / "text").write_text("not a state, but longer than eight bytes")
    with pytest.raises(ValueError, match="not a readable state file"):
        State.load(tmp_path / "text", tiny)


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
    with pytest.raises(ValueError, match="cannot write"):
        state.save(tmp_path / "a.state" / "b.state")


def test_copies_and_pickles(tiny, state, tmp_path):
    assert same(pickle.loads(pickle.dumps(state)), state)
    assert same(copy.deepcopy(state), state)
    orphan = pickle.loads(pickle.dumps(state))
    with pytest.raises(ValueError, match=r"state\.save\(path, model\)"):
        orphan.save(tmp_path / "a.state")
    orphan.save(tmp_path / "a.state", tiny)
    assert same(State.load(tmp_path / "a.state", tiny), state)
