"""Classifying from the command line: examples, runs that go on, decisions while a sound comes in, bad files."""

import dataclasses
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megalodon_lm import Encoder, EncoderConfig
from megalodon_lm.cli.commands import parse
from megalodon_lm.data.example_batches import ExampleBatches, batch_of, in_order
from megalodon_lm.data.example_files import Taking
from megalodon_lm.data.example_sources import load_examples
from megalodon_lm.data.examples import Form
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation.classification import Confusion, confusion, decisions, draw_confusion, probabilities
from megalodon_lm.training.classification import Classification, ClassificationRecipe, load_form, save_form
from megalodon_lm.training.recipe import bundled_recipes
from megalodon_lm.training.trainer import Trainer

from .test_sound import RATE, write_wav


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """High and low tones of different lengths, the class in the name."""
    folder, draw = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for i in range(24):
        time = np.arange(int(draw.integers(40, 90))) / RATE
        tone = np.sin(2 * np.pi * (200 if i % 2 else 30) * time) + 0.1 * draw.standard_normal(len(time))
        write_wav(folder / f"{'high' if i % 2 else 'low'}_{i}.wav", 0.7 * tone)
    return folder


def recipe(sources, **choices):
    model = {"size": "encoder_tiny", **choices.pop("model", {})}
    training = {"steps": 6, "batch_size": 4, "warmup_steps": 1, "precision": "float32", **choices.pop("training", {})}
    return ClassificationRecipe.from_dict({"model": model, "data": {"train": sources, **choices}, "training": training})


def of_sounds(sounds, **choices):
    return recipe([str(sounds)], label="(high|low)_", held_out=r"_[0-3]\.", **choices)


def run(folder, made, resume="no", watch=lambda m: None):
    trainer = Trainer(made, folder, "cpu", resume, Classification(made))
    trainer.train(watch)
    return trainer


def test_a_run_that_was_stopped_goes_on_to_the_last_bit(tmp_path, sounds):
    choices = {"training": {"checkpoint_steps": 2, "seed": 3}, "model": {"dropout": 0.1}}
    whole = run(tmp_path / "whole", of_sounds(sounds, **choices))

    def stop(metrics):
        if metrics.step == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "parts", of_sounds(sounds, **choices), watch=stop)
    again = run(tmp_path / "parts", of_sounds(sounds, **choices), "last")
    assert again.step == whole.step == 6
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))
    loaded = Encoder.load(tmp_path / "parts")
    assert loaded.config.num_classes == 2
    assert loaded.config.input == "numbers"
    assert load_form(tmp_path / "parts") == again.subject.form
    with pytest.raises(InputError, match=r"differs from that of the run in model\.num_layers"):
        run(tmp_path / "parts", of_sounds(sounds, model={"num_layers": 3}, training=choices["training"]), "last")


def test_commands(tmp_path, sounds, capsys):
    settings = of_sounds(sounds, training={"steps": 30, "validate_steps": 15, "learning_rate": 1e-2}, patch=4)
    (tmp_path / "recipe.toml").write_text(settings.to_toml())
    parse(["classify", "train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]).run()
    shown = capsys.readouterr()
    assert "of 4 validation examples are right" in shown.out
    assert re.search(r"step 15: \d+\.\d\d% right on the validation set", shown.err)
    assert re.search(r"bits/example  \d+\.\d\d% right  [\d,]+ inputs/s", shown.err)
    page = (tmp_path / "run" / "training.md").read_text()
    assert "bits per example |" in page
    assert re.search(r"best validation \| \d+\.\d\d% right, at step", page)
    assert not re.search("token|byte", shown.err + page)
    assert "| true" in (tmp_path / "run" / "classification.md").read_text()
    assert all((tmp_path / "run" / name).exists() for name in ("training.png", "classification.png"))
    command = ["classify", "evaluate", str(tmp_path / "run"), str(sounds), "--label", "(high|low)_"]
    for _ in range(2):
        parse([*command, "--json", str(tmp_path / "found.json")]).run()
    weights = tmp_path / "run" / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(InputError, match=r"cannot write .*model\.safetensors: it is not a file of figures"):
        parse([*command, "--json", str(weights)]).run()
    assert weights.read_bytes() == before
    found = json.loads((tmp_path / "found.json").read_text())
    assert np.sum(found["confusion"]) == 24
    assert found["accuracy"] > 0.9
    assert f"{found['accuracy']:.2%} of 24 examples are right" in capsys.readouterr().out
    parse(["classify", "predict", str(tmp_path / "run"), str(sounds / "high_11.wav"), str(sounds / "low_8.wav")]).run()
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == ["high", "low"]


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    """A model that decides while a sound comes in, and its form."""
    torch.manual_seed(0)
    choices = dict(direction="forward", chunk_size=16, input="patches", patch_dim=4, num_classes=3)
    model, folder = Encoder(EncoderConfig.named("encoder_tiny", **choices)).eval(), tmp_path_factory.mktemp("hearing")
    form = Form("sound", ("a", "b", "c"), RATE, patch=4, deviation=0.3)
    model.save(folder)
    save_form(form, folder)
    return model, form, folder


@settings(deadline=None, max_examples=15)
@given(data=st.data(), length=st.integers(1, 200))
def test_decisions_on_pieces_are_those_on_the_whole(hearing, data, length):
    model, form, _ = hearing
    sound = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    cuts = sorted(4 * c for c in data.draw(st.sets(st.integers(1, max(1, (length - 1) // 4)), max_size=5)))
    blocks = np.split(sound, [c for c in cuts if c < length])
    heard = 0
    for heard, found, _ in decisions(model, form, blocks):
        torch.testing.assert_close(found, probabilities(model, form, sound[:heard]), rtol=1e-4, atol=1e-5)
    assert heard == length


def test_bad_files_get_one_line_each_and_the_others_follow(tmp_path, hearing, capsys):
    tone = np.sin(np.arange(300) / 5)
    write_wav(tmp_path / "good.wav", tone)
    write_wav(tmp_path / "rate.wav", tone, rate=2000)
    write_wav(tmp_path / "stereo.wav", tone, channels=2)
    write_wav(tmp_path / "empty.wav", [])
    (tmp_path / "text.wav").write_text("This is a letter and no sound.")
    (tmp_path / "nothing.wav").write_bytes(b"")
    whole = (tmp_path / "good.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:400])
    (tmp_path / "header.wav").write_bytes(whole[:20])
    (tmp_path / "folder.wav").mkdir()
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.2]), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "long.flac", np.random.default_rng(0).uniform(-1, 1, 20_000), RATE)
    (tmp_path / "shortened.wav").write_bytes((tmp_path / "long.flac").read_bytes()[:9000])
    bad = {
        "rate": "has 2000 samples a second, not 1000", "stereo": "has 2 channels", "empty": "holds no samples",
        "text": "cannot be read as sound", "nothing": "cannot be read as sound", "cut": "is truncated",
        "header": "cannot be read as sound", "missing": "there is no such file", "folder": "it is a folder",
        "nan": "are no numbers", "shortened": "cannot be read as sound",
    }  # fmt: skip
    files = [str(tmp_path / f"{name}.wav") for name in [*bad, "good"]]
    for stream in ([], ["--stream"]):
        with pytest.raises(SystemExit, match="2"):
            parse(["classify", "predict", str(hearing[2]), *files, *stream]).run()
        out, error = capsys.readouterr()
        lines = error.splitlines()
        assert len(lines) == len(bad), error
        for line, (name, message) in zip(lines, bad.items(), strict=True):
            assert message in line, (name, line)
            assert f"{name}.wav" in line
        assert f"{tmp_path / 'good.wav'}" in out.splitlines()[-1]
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'good.wav'} 0.300 s\t")


WRITER = """
import random, sys, time
draw = random.Random(int(sys.argv[2]))
data = open(sys.argv[1], "rb").read()
while data:
    piece = draw.choice([1, 2, 3, 7, 50, 333])
    sys.stdout.buffer.write(data[:piece])
    sys.stdout.buffer.flush()
    data = data[piece:]
    if draw.random() < 0.2:
        time.sleep(0.002)
"""


def through_a_pipe(path, seed, monkeypatch, *options):
    """Run predict on what another process writes slowly, in pieces of any size, of whole samples or not."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(seed)], stdout=subprocess.PIPE) as writer:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(writer.stdout))
        parse(["classify", "predict", *options, "-", "--stream"]).run()


def test_sound_through_a_pipe_is_decided_as_the_file(tmp_path, hearing, capsys, monkeypatch):
    folder = str(hearing[2])
    tone = np.sin(np.arange(1237) ** 1.4 / 50)
    write_wav(tmp_path / "x.wav", tone)
    parse(["classify", "predict", folder, str(tmp_path / "x.wav")]).run()
    whole = capsys.readouterr().out.split("\t")[1:]
    parse(["classify", "predict", folder, str(tmp_path / "x.wav"), "--stream", "--every", "48"]).run()
    expected = [line.split()[1:] for line in capsys.readouterr().out.splitlines()]
    assert len(expected) == 26
    wav = (tmp_path / "x.wav").read_bytes()
    (tmp_path / "x.raw").write_bytes(wav[44:])
    (tmp_path / "unknown.wav").write_bytes(wav[:4] + b"\xff" * 4 + wav[8:40] + b"\xff" * 4 + wav[44:])
    soundfile.write(tmp_path / "extensible.wav", (tone * 32767).astype("<i2"), RATE, format="WAVEX", subtype="PCM_16")
    (tmp_path / "zero.wav").write_bytes(wav[:4] + b"\x00" * 4 + wav[8:40] + b"\x00" * 4 + wav[44:])
    for seed, name in enumerate(["x.wav", "unknown.wav", "zero.wav", "extensible.wav", "x.raw"]):
        raw = ["--raw"] if name == "x.raw" else []
        through_a_pipe(tmp_path / name, seed, monkeypatch, folder, "--every", "48", "--latency", *raw)
        out, error = capsys.readouterr()
        assert [line.split()[1:] for line in out.splitlines()] == expected, name
        assert out.splitlines()[-1].split("\t")[1:] == [word.strip() for word in whole]
        assert re.fullmatch(
            r"-: 26 decisions, one every 48 ms, each there after [\d.]+ ms \(median\), [\d.]+ ms \(longest\)\n", error
        )


def test_what_is_wrong_on_standard_input_is_one_line(tmp_path, hearing, capsys, monkeypatch):
    tone = np.sin(np.arange(300) / 5)
    for name, choices in {"good": {}, "rate": {"rate": 2000}, "stereo": {"channels": 2}}.items():
        write_wav(tmp_path / f"{name}.wav", tone, **choices)
    write_wav(tmp_path / "empty.wav", [])
    whole = (tmp_path / "good.wav").read_bytes()
    (tmp_path / "text.wav").write_text("This is a letter and no sound.")
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "header.wav").write_bytes(whole[:20])
    (tmp_path / "cut.wav").write_bytes(whole[:400])
    soundfile.write(tmp_path / "wide.wav", tone, RATE, subtype="PCM_24")
    soundfile.write(tmp_path / "real.wav", tone, RATE, subtype="FLOAT")
    for name, message in {
        "rate": "has 2000 samples a second, not 1000", "stereo": "has 2 channels of 16 bits", "empty": "no samples",
        "text": "is no WAV", "nothing": "is no WAV", "header": "is no WAV", "cut": "is truncated: 244 bytes",
        "wide": "1 channels of 24 bits", "real": "compressed or of floating point",
    }.items():  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            through_a_pipe(tmp_path / f"{name}.wav", 1, monkeypatch, str(hearing[2]))
        out, error = capsys.readouterr()
        assert message in error, name
        assert error.count("\n") == 1, error
        assert bool(out) == (name == "cut")  # what was heard is decided
    with pytest.raises(SystemExit, match="2"):
        through_a_pipe(tmp_path / "nothing.wav", 1, monkeypatch, str(hearing[2]), "--raw")
    assert "no samples" in capsys.readouterr().err
    for options, message in {
        ("--raw",): "--raw is for --stream - alone", ("-",): "standard input, is for --stream",
        ("--stream", "--every", "0"): "must be a positive number",
        ("--stream", "--every", "nan"): "must be a positive number",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            parse(["classify", "predict", str(hearing[2]), str(tmp_path / "good.wav"), *options]).run()


@pytest.mark.slow
def test_a_pipeline_of_the_shell(tmp_path, hearing):
    write_wav(tmp_path / "x.wav", np.sin(np.arange(300) / 5))
    command = f"cat {tmp_path}/x.wav | {sys.executable} -m megalodon_lm classify predict {hearing[2]} - --stream"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["- 0.100 s", "- 0.200 s", "- 0.300 s"]


def test_every_example_comes_once_in_an_epoch_whatever_was_asked_before(sounds):
    examples = load_examples(str(sounds), Taking("(high|low)_"))
    batches = ExampleBatches(examples, examples.form(), 5, seed=1)
    cursor, seen, cursors = batches.begin(), [], []
    while cursor[0] == 0:
        cursors.append(cursor)
        batch = batches.read(cursor)
        rows = batch.inputs if batch.mask is None else [x[m] for x, m in zip(batch.inputs, batch.mask, strict=True)]
        seen += [x.numpy().tobytes() for x in rows]
        cursor = batch.cursor
    form = examples.form()
    known = {form.steps(raw).tobytes() for raw in examples.raw}
    assert len(seen) == len(set(seen)) == 20
    assert set(seen) <= known
    other = ExampleBatches(examples, form, 5, seed=1)
    assert torch.equal(other.read(cursors[2]).inputs, batches.read(cursors[2]).inputs)
    assert batch_of(examples, examples.form(4)).num_read == 24 * 22  # steps of four samples, padding counted
    assert other.fingerprint == batches.fingerprint != ExampleBatches(examples, form, 5, seed=2).fingerprint
    second = [batches.read([1, i]).inputs for i in range(4)]
    assert not all(torch.equal(a, batches.read([0, i]).inputs) for i, a in enumerate(second))
    everything = sorted(i for which, _ in in_order(examples, form, 7) for i in which)
    assert everything == list(range(24))


def test_numbers_are_normalised_by_what_was_trained_on(sounds):
    examples = load_examples(str(sounds), Taking("(high|low)_"))
    numbers = np.concatenate([examples.form().steps(raw) for raw in examples.raw])
    assert abs(numbers.mean()) < 1e-4
    assert abs(numbers.std() - 1) < 1e-4


def test_confusion_counts_what_is_taken_for_what(sounds):
    examples = load_examples(str(sounds), Taking("(high|low)_"))

    class Always:
        device = torch.device("cpu")

        def __call__(self, inputs, mask=None):
            return torch.tensor([[1.0, 0.0]]).repeat(len(inputs), 1), None

    found = confusion(Always(), examples, examples.form(), "float32")
    assert found.counts.tolist() == [[12, 0], [12, 0]]
    assert found.accuracy == 0.5
    assert "| low | 12 | 0 |" in found.markdown()


def test_many_classes_have_a_table_of_the_most_frequent_mistakes_and_a_picture(tmp_path):
    counts = np.eye(30, dtype=np.int64) * 9
    counts[3, 4], counts[7, 1] = 5, 8
    found = Confusion(counts, tuple(f"a|{i}" for i in range(30)), 1.0)
    lines = found.markdown().splitlines()
    assert lines[2:] == [
        "| true | predicted | times |",
        "|---|---|---|",
        r"| a\|7 | a\|1 | 8 |",
        r"| a\|3 | a\|4 | 5 |",
    ]
    assert found.by_class[7] == 9 / 17
    for number in (30, 2, 70):
        draw_confusion(Confusion(np.eye(number, dtype=np.int64), ("x" * 40,) * number, 0.0), tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as drawn:
            assert drawn.size == (1350, 750)


SMALLER = {
    "listops": "listops:0:8", "listops_short": "listops-d20:0:8", "image": "pathfinder:0:8", "mnist": "pathfinder:0:8",
    "pathfinder": "pathfinder:0:8", "pathfinder_14": "pathfinder:0:8:6", "pathfinder_small": "pathfinder:0:8:6",
    "pathx": "pathfinder:0:8", "cifar": "pathfinder:0:8", "cifar_pixels": "pathfinder:0:8", "digits": "sounds",
    "digits_stream": "sounds", "text": "texts", "retrieval": "pairs", "patches": "pictures",
}  # fmt: skip


def test_every_recipe_is_known_here():
    assert {f"classify_{name}" for name in SMALLER} == {n for n in bundled_recipes() if n.startswith("classify_")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, sounds):
    """A few examples of each kind, by name."""
    root, draw = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    for i in range(8):
        for kind in ("texts", "pictures"):
            (root / kind / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (root / "texts" / "ab"[i % 2] / f"{i}.txt").write_text(f"text {i}" * (i + 1))
        pixels = draw.integers(0, 256, (40 + i, 60 - 3 * i, 3), np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / "ab"[i % 2] / f"{i}.png")
    rows = [f"{i % 2}\tx\ty\tone {i}\ttwo\n" for i in range(8)]
    (root / "new_aan_pairs.train.tsv").write_text("".join(rows))
    places = {"texts": str(root / "texts"), "pictures": str(root / "pictures"), "sounds": str(sounds)}
    return {**places, "pairs": f"lra:retrieval:train:{root}"}


@pytest.mark.parametrize("name", SMALLER)
def test_every_recipe_makes_a_step_when_shrunk(name, tmp_path, folders):
    made = ClassificationRecipe.load(f"classify_{name}", ["training.steps=1", "training.batch_size=2"])
    small = {"num_layers": 1, "model_dim": 16, "z_dim": 8, "value_dim": 16, "ffn_hidden_dim": 16}
    made.model = dataclasses.replace(made.model, **small)
    made.training.accumulate = 1
    made.data = dataclasses.replace(made.data, train=[folders.get(SMALLER[name], SMALLER[name])], validation=[])
    made.data.held_out_part, made.data.distinct = 0.3, False
    if SMALLER[name] == "sounds":
        made.data = dataclasses.replace(made.data, label="(high|low)_", held_out=r"_[0-3]\.")
    assert run(tmp_path / "run", made).step == 1


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(training={"segment": 4}), "training.segment"),
        (dict(training={"begin_from": "x"}), "training.begin_from"),
        (dict(held_out_part=1.5), "held_out_part"),
        (dict(patch=0), "data.patch"),
        (dict(held_out="("), "held_out = .* is no regular expression"),
        (dict(side=-1), "data.side"),
        (dict(training={"steps": 0}), "steps"),
        (dict(weights=[1.0]), "unknown key 'weights'"),
    ],
)
def test_wrong_recipes_are_refused(choices, message):
    with pytest.raises(InputError, match=message):
        recipe(["listops:0:9"], **choices)
    with pytest.raises(InputError, match="must name a source"):
        recipe([])
    with pytest.raises(InputError, match="would be held out"):
        Classification(recipe(["listops:0:9"], held_out="never"))


def test_a_language_model_s_commands_say_where_an_encoder_belongs(hearing):
    from megalodon_lm.architectures import load

    with pytest.raises(InputError, match="megalodon classify takes it"):
        load(hearing[2])
