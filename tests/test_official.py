"""Checkpoints of the authors' code: parts merged and written, what is refused, and the command that converts."""

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.baselines.llama import Llama, LlamaConfig
from megalodon_lm.data.tokenizer import ByteTokenizer
from megalodon_lm.errors import InputError, InputNote
from megalodon_lm.model.checkpoint import write_model
from megalodon_lm.model.identity import weights
from megalodon_lm.model.official import open_official, part_shapes, write_official
from megalodon_lm.model.stored_tensors import write_tensors

CHOICES = {"num_layers": 2, "model_dim": 32, "num_heads": 4, "z_dim": 16, "value_dim": 48, "ffn_hidden_dim": 24,
           "cema_ndim": 3, "chunk_size": 8, "norm_num_groups": 4, "vocab_size": 20}  # fmt: skip
GATED = {"swiglu": True, "rescale_nffn": True, "rope_base": 500.0}
TIED = {"share_emb": True, "scale_emb": True}
BUFFERS = ("rope.freqs", "prior_count", "prior_mean", "prior_logv")


def published(c):
    """What a checkpoint of the authors' code holds, written down from their modules: shape, and the cut dimension."""
    d, z, v, f, n, g = c.model_dim, c.z_dim, c.value_dim, c.ffn_hidden_dim, c.cema_ndim, c.norm_num_groups
    norm = {"weight": ((d,), 0), "bias": ((d,), 0), "prior_count": ((), None), "prior_mean": ((g,), 0),
            "prior_logv": ((g,), 0)}  # fmt: skip
    block = {f"mega.timenorm.{key}": value for key, value in norm.items()} | {
        "mega.cema.alpha": ((d, n, 1), 0), "mega.cema.delta": ((d, n, 1), 0), "mega.cema.theta": ((d, 1, 1), 0),
        "mega.cema.gamma": ((d, n, 2), 0), "mega.cema.omega": ((d, 1), 0), "mega.rmsnorm.weight": ((d,), None),
        "mega.wv.weight": ((v, d), 0), "mega.wv.bias": ((v,), 0), "mega.wz.weight": ((z, d), 0),
        "mega.wz.bias": ((z,), 0), "mega.wr.weight": ((v, d), 0), "mega.wr.bias": ((v,), 0),
        "mega.wh1.weight": ((d, d), 0), "mega.wh1.bias": ((d,), 0), "mega.wh2.weight": ((d, v), 1),
        "mega.gamma": ((2, z), 1), "mega.beta": ((2, z), 1), "nffn.norm.weight": ((d,), None),
        "nffn.norm.bias": ((d,), None), "nffn.fc1.weight": ((f, d), 0), "nffn.fc2.weight": ((d, f), 1),
    }  # fmt: skip
    block |= {"nffn.fc3.weight": ((f, d), 0)} if c.swiglu else {}
    block |= {"nffn.alpha": ((d,), None)} if c.rescale_nffn else {}
    found = {"embed.weight": ((c.vocab_size, d), 1), "rope.freqs": ((z // c.num_heads // 2,), None)}
    found |= {f"layers.{i}.{name}": value for i in range(c.num_layers) for name, value in block.items()}
    found |= {f"output.final_norm.{name}": value for name, value in norm.items()}
    return found | {"output.output.weight": ((c.vocab_size, d), 1)}


def write_parts(folder, c, parts, dtype=torch.float32, kind="fp32"):
    """A checkpoint as the authors' code would leave it, and its whole tensors."""
    generator = torch.Generator().manual_seed(3)
    whole = {n: torch.randn(shape, generator=generator).to(dtype) for n, (shape, _) in published(c).items()}
    for name in whole:
        if name.endswith(BUFFERS):
            whole[name] = torch.zeros_like(whole[name], dtype=torch.int64 if name.endswith("count") else dtype)
    width = c.z_dim // c.num_heads
    whole["rope.freqs"] = (1 / torch.tensor([c.rope_base ** (j / width) for j in range(0, width, 2)])).to(dtype)
    if c.share_emb:
        whole["output.output.weight"] = whole["embed.weight"]
    folder.mkdir()
    for rank in range(parts):
        part = {}
        for name, (_, dim) in published(c).items():
            part[name] = whole[name].clone() if dim is None else whole[name].chunk(parts, dim)[rank].clone()
        torch.save(part, folder / ("consolidated.pth" if parts == 1 else f"consolidated.{rank:02d}.pth"))
    values = {key: getattr(c, key) for key in (*CHOICES, "swiglu", "rescale_nffn", "scale_emb", "share_emb")}
    values |= {"rope_base": None if c.rope_base == 10_000 else c.rope_base, "efficient_attn": "fused"}
    (folder / "config.json").write_text(json.dumps({"model": values, "slurm": {"world_size": 64}}))
    (folder / "consolidate_config.json").write_text(json.dumps({"model_parallel_size": parts, "dtype": kind}))
    return whole


def loaded(folder):
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))]


@pytest.mark.parametrize("choices", [{}, GATED, TIED], ids=["plain", "gated", "tied"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_are_merged_and_written_as_they_were(parts, choices, tmp_path):
    c = ModelConfig(**CHOICES, **choices)
    whole = write_parts(tmp_path / "theirs", c, parts)
    config, tensors = open_official(tmp_path / "theirs")
    assert config == ModelConfig(**CHOICES, **choices, drop_keys=True)
    assert {n for n in whole if not n.endswith(BUFFERS)} - set(tensors) == (
        {"output.output.weight"} if c.share_emb else set()
    )
    for name, tensor in tensors.items():
        assert torch.equal(tensor, whole[name])
    (tmp_path / "ours").mkdir()
    write_official(config, tensors, tmp_path / "ours", parts)
    theirs, ours = loaded(tmp_path / "theirs"), loaded(tmp_path / "ours")
    assert len(ours) == parts
    for one, other in zip(theirs, ours, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-6 if name == "rope.freqs" else 0, atol=0)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in other.values())  # no views of a whole
    assert open_official(tmp_path / "ours")[0] == config


@pytest.mark.parametrize(
    ("size", "parts", "parameters"),
    [
        ("mega200M", 1, 220_627_968),
        ("mega1.3B", 2, 1_342_832_640),
        ("mega1.3B_pg19", 2, 1_327_628_288),
        ("mega7.1B", 4, 7_117_381_632),
        ("mega7.3B", 4, 7_385_817_088),
        ("paper7B", 1, 7_385_817_088),
    ],
)
def test_published_sizes_have_their_names_shapes_and_parameters(size, parts, parameters):
    c = ModelConfig.named(size)
    theirs, count = published(c), 0
    ours = part_shapes(c, parts)
    assert ours.keys() == theirs.keys()
    for name, (shape, dim) in theirs.items():
        cut = tuple(n // parts if i == dim else n for i, n in enumerate(shape))
        assert ours[name] == cut
        if not name.endswith(BUFFERS) and not (c.share_emb and name == "output.output.weight"):
            count += torch.empty(cut, device="meta").numel() * (1 if dim is None else parts)
    assert count == parameters


def test_weights_of_half_precision_keep_their_type_and_rounded_frequencies_are_told(tmp_path):
    c = ModelConfig(**CHOICES)
    whole = write_parts(tmp_path / "theirs", c, 2, torch.bfloat16, "bf16")
    with pytest.warns(InputNote, match="rope.freqs were rounded"):
        config, tensors = open_official(tmp_path / "theirs")
    assert tensors.layout["embed.weight"].dtype == torch.bfloat16
    (tmp_path / "ours").mkdir()
    write_official(config, tensors, tmp_path / "ours", 4)
    assert json.loads((tmp_path / "ours" / "consolidate_config.json").read_text()) == {
        "model_parallel_size": 4,
        "dtype": "bf16",
    }
    merged = torch.cat([part["layers.1.mega.wh2.weight"] for part in loaded(tmp_path / "ours")], 1)
    assert torch.equal(merged, whole["layers.1.mega.wh2.weight"])


class Intruder:
    def __reduce__(self):
        return print, ("run from a checkpoint",)


def spoiled(name, change):
    """Writes the second of two parts anew, one tensor changed."""

    def spoil(folder):
        path = folder / "consolidated.01.pth"
        part = torch.load(path, weights_only=True)
        part.update(change(part[name])) if callable(change) else part.pop(name)
        torch.save(part, path)

    return spoil


def settings(**changes):
    def spoil(folder):
        read = json.loads((folder / "config.json").read_text())
        read["model"] |= changes
        (folder / "config.json").write_text(json.dumps(read))

    return spoil


WZ = "layers.0.mega.wz.weight"
REFUSED = [
    (spoiled(WZ, lambda t: {"layers.0.mega.wq.weight": t}), "unknown tensor layers.0.mega.wq.weight; did"),
    (spoiled(WZ, None), f"consolidated.01.pth: {WZ} is missing, of shape (8, 32)"),
    (spoiled(WZ, lambda t: {WZ: t.T}), f"{WZ} has shape (32, 8) and must have (8, 32) in one of 2 parts"),
    (spoiled(WZ, lambda t: {"nested": {}}), "is not a state dict"),
    (settings(ndims=4), "unknown key 'ndims' in 'model'"),
    (settings(norm_affine=False), "norm_affine = False"),
    (settings(output_size=7), "output_size = 7 is not the vocabulary's size"),
    (settings(rope_base=100_000.0), "rope.freqs are not those of rope_base = 100000"),
    (settings(num_heads=3), "num_heads = 3 must divide z_dim"),
    (settings(num_heads=1), "2 parts must divide num_heads = 1"),
    (lambda folder: (folder / "consolidated.01.pth").unlink(), "consolidated.01.pth is missing"),
    (lambda folder: (folder / "consolidated.01.pth").write_bytes(b"PK\3\4 half"), "consolidated.01.pth cannot be read"),
    (lambda folder: torch.save({"x": Intruder()}, folder / "consolidated.01.pth"), "01.pth cannot be read"),
    (lambda folder: (folder / "config.json").write_text("{}"), "config.json has no table 'model'"),
    (lambda folder: (folder / "consolidate_config.json").write_text('{"dtype": "int8"}'), "model_parallel_size = None"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "says"), REFUSED)
def test_what_does_not_fit_is_refused_by_its_name(spoil, says, tmp_path, capsys):
    write_parts(tmp_path / "theirs", ModelConfig(**CHOICES), 2)
    spoil(tmp_path / "theirs")
    with pytest.raises(InputError) as refusal:
        open_official(tmp_path / "theirs")
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "run from a checkpoint" not in capsys.readouterr().out


def test_priors_other_heads_and_parts_of_other_checkpoints_are_refused(tmp_path):
    c, name = ModelConfig(**CHOICES), "layers.1.mega.timenorm.prior_count"
    write_parts(tmp_path / "a", c, 1)
    part = loaded(tmp_path / "a")[0]
    torch.save(part | {name: torch.tensor(5)}, tmp_path / "a" / "consolidated.pth")
    with pytest.raises(InputError, match=f"{name} = 5"):
        open_official(tmp_path / "a")

    write_parts(tmp_path / "b", ModelConfig(**CHOICES, **TIED), 1)
    part = loaded(tmp_path / "b")[0]
    torch.save(part | {"output.output.weight": part["embed.weight"] + 1}, tmp_path / "b" / "consolidated.pth")
    with pytest.raises(InputError, match=r"output.output.weight is not embed.weight"):
        open_official(tmp_path / "b")

    write_parts(tmp_path / "c", c, 2)
    spoiled("layers.1.nffn.norm.bias", lambda t: {"layers.1.nffn.norm.bias": t + 1})(tmp_path / "c")
    _, tensors = open_official(tmp_path / "c")
    with pytest.raises(InputError, match=r"consolidated.01.pth: layers.1.nffn.norm.bias is not that of the others"):
        dict(tensors)


@pytest.mark.parametrize(
    ("choices", "parts", "says"),
    [
        (
            {"timestep_norm": "decay"},
            1,
            "timestep_norm = 'decay' is a choice that the authors' code of Megalodon has not",
        ),
        ({"norm_num_groups": 32}, 1, "norm_num_groups = 32, one a feature, is refused"),
        ({}, 3, "3 parts must divide num_heads = 4"),
        ({}, 0, "0 parts must divide num_heads = 4"),
    ],
)
def test_what_their_code_has_not_is_not_written(choices, parts, says, tmp_path):
    model = Megalodon(ModelConfig(**CHOICES | choices))
    with pytest.raises(InputError, match=says):
        write_official(model.config, weights(model), tmp_path, parts)
    assert not list(tmp_path.iterdir())


class Counted(dict):
    """Tensors that are made when they are asked for; at most so many of them are alive at once."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.alive, self.most = weakref.WeakSet(), 0

    def __getitem__(self, name):
        made = super().__getitem__(name).clone()
        self.alive.add(made)
        self.most = max(self.most, len(self.alive))
        return made

    def items(self):
        return ((name, self[name]) for name in self)


def test_no_more_than_one_whole_tensor_is_in_memory(tmp_path):
    model = Megalodon(ModelConfig(**CHOICES))
    tensors = Counted(weights(model))
    write_model(model.config, tensors, tmp_path)
    write_official(model.config, tensors, tmp_path, 2)
    assert 0 < tensors.most <= 2  # one is let go when the next is there


def test_a_file_written_tensor_by_tensor_is_read_by_the_library(tmp_path):
    tensors = {"a": torch.randn(2, 3), "half": torch.randn(5).bfloat16(), "none": torch.zeros(0, 4)}
    tensors |= {"é": torch.tensor(7), "flag": torch.tensor([True, False]), "turned": torch.randn(3, 4).double().T}
    write_tensors(tmp_path / "x", tensors, {"format": "pt"})
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_command_goes_there_and_back(tmp_path, run):
    torch.manual_seed(0)
    model = Megalodon(ModelConfig(**CHOICES | {"vocab_size": 259}))
    native, theirs, back = (tmp_path / name for name in ("native", "theirs", "back"))
    model.save(native)
    ByteTokenizer().save(native)
    code, out, said = run("convert", native, "--to", "official", "--out", theirs, "--parts", 2)
    assert (code, said) == (0, "")
    assert out == f"{theirs}: {model.config.num_parameters:,} parameters, official, tokenizer: bytes\n"
    assert run("convert", theirs, "--to", "native", "--out", back)[0] == 0
    assert (back / "model.safetensors").read_bytes() == (native / "model.safetensors").read_bytes()
    tokens = torch.randint(259, (1, 20))
    assert torch.equal(Megalodon.load(back)(tokens)[0], model(tokens)[0])
    assert run("generate", back, "--max-tokens", 3)[0] == 0


def test_the_command_goes_to_transformers_and_on(tmp_path, run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import megalodon_lm.hub  # noqa: F401  # registers

    c = ModelConfig(**CHOICES | {"vocab_size": 259}, **TIED)
    write_parts(tmp_path / "theirs", c, 2)
    ByteTokenizer().save(tmp_path / "theirs")
    for source, to in (("theirs", "transformers"), ("transformers", "native"), ("native", "official")):
        assert run("convert", tmp_path / source, "--to", to, "--out", tmp_path / to)[0] == 0
    stored = [(tmp_path / to / "model.safetensors").read_bytes() for to in ("transformers", "native")]
    assert stored[0] == stored[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "transformers")
    assert (model.dtype, model.config.bos_token_id, model.config.eos_token_id) == (torch.float32, 256, 257)
    text = "Naïve tests"
    tokens = AutoTokenizer.from_pretrained(tmp_path / "transformers")(text, return_tensors="pt")["input_ids"]
    assert tokens[0].tolist() == ByteTokenizer().encode(text, begin=True).tolist()
    assert torch.equal(model(tokens).logits, Megalodon.load(tmp_path / "native")(tokens)[0])
    assert torch.equal(
        loaded(tmp_path / "official")[0]["embed.weight"][:, :16], loaded(tmp_path / "theirs")[0]["embed.weight"]
    )


def test_the_command_refuses(tmp_path, run, refused):
    Megalodon(ModelConfig(**CHOICES)).save(tmp_path / "native")
    convert = "convert", tmp_path / "native", "--out"
    code, out, _ = run(*convert, tmp_path / "other", "--to", "official")
    assert code == 0
    assert "tokenizer: none; put its tokenizer.json" in out
    assert "is not empty" in refused(*convert, tmp_path / "other", "--to", "native")
    assert "--parts 2 is for --to official" in refused(*convert, tmp_path / "x", "--to", "native", "--parts", 2)
    assert "3 parts must divide" in refused(*convert, tmp_path / "y", "--to", "official", "--parts", 3)
    Llama(LlamaConfig.sized(100_000, 40)).save(tmp_path / "llama")
    assert "another kind, llama, which has no such form" in refused(
        "convert", tmp_path / "llama", "--to", "official", "--out", tmp_path / "l"
    )
    shutil.copytree(tmp_path / "native", tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "checksum" in refused("convert", tmp_path / "damaged", "--to", "official", "--out", tmp_path / "z")
