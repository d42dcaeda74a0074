"""The encoder in transformers gives what the native encoder gives, and reads and writes the same files."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

from megalodon_lm import Encoder, EncoderConfig
from megalodon_lm.data.examples import Form
from megalodon_lm.errors import InputError
from megalodon_lm.hub import MegalodonEncoderConfig, MegalodonForSequenceClassification
from megalodon_lm.training.classification import FORM_FILE, load_form, save_form

SHAPES = {
    "tokens": {}, "numbers": {"input": "numbers", "attention": "laplace", "chunk_size": 8},
    "patches": {"input": "patches", "patch_dim": 3}, "pairs": {"pairs": True},
    "forward": {"direction": "forward", "chunk_size": 8, "norm_num_groups": 4},
}  # fmt: skip
IDS = torch.zeros(1, 3, dtype=torch.int64)


def small(shape, **choices):
    torch.manual_seed(0)
    return Encoder(EncoderConfig.named("encoder_tiny", num_classes=3, **SHAPES[shape], **choices)).eval()


def inputs(shape, length=20):
    """Of three examples, under the name that they have in transformers, and a mask."""
    draw = torch.Generator().manual_seed(1)
    steps = (3, 2, length) if shape == "pairs" else (3, length)
    mask = torch.ones(steps, dtype=torch.int64)
    mask[0, ..., length - 5 :] = mask[1, ..., 0] = 0
    if shape in ("numbers", "patches"):
        size = (*steps, 3) if shape == "patches" else steps
        return {"input_values": torch.randn(size, generator=draw)}, mask
    return {"input_ids": torch.randint(0, 256, steps, generator=draw)}, mask


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_loss_and_files_are_the_native_ones(shape, tmp_path):
    native = small(shape)
    model = MegalodonForSequenceClassification.of(native)
    given, mask = inputs(shape)
    [raw] = given.values()
    targets = torch.tensor([0, 2, 1])
    assert torch.equal(model(**given).logits, native(raw)[0])
    out = model(**given, attention_mask=mask, labels=targets)
    assert torch.equal(out.logits, native(raw, mask=mask.bool())[0])
    torch.testing.assert_close(out.loss, native(raw, mask=mask.bool(), targets=targets)[0])

    native.save(tmp_path / "native")
    loaded = MegalodonForSequenceClassification.from_pretrained(tmp_path / "native")
    assert loaded.native.fingerprint() == native.fingerprint()
    assert not loaded.native.training
    loaded.save_pretrained(tmp_path / "transformers")
    assert Encoder.load(tmp_path / "transformers").fingerprint() == native.fingerprint()
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "transformers")
    assert isinstance(auto, MegalodonForSequenceClassification)
    assert torch.equal(auto(**given, attention_mask=mask).logits, out.logits)
    assert AutoConfig.from_pretrained(tmp_path / "transformers").choices == native.config
    values = json.loads((tmp_path / "transformers" / "config.json").read_text())
    (tmp_path / "transformers" / "config.json").write_text(json.dumps({**values, "rope_base": 5.0}))
    with pytest.raises(InputError, match="was edited"):
        Encoder.load(tmp_path / "transformers")


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_hidden_states_are_the_inputs_of_blocks_and_head(shape):
    native = small(shape)
    model = MegalodonForSequenceClassification.of(native)
    given, mask = inputs(shape)
    [raw] = given.values()
    out = model(**given, attention_mask=mask, output_hidden_states=True)
    assert len(out.hidden_states) == len(native.layers) + 1
    assert torch.equal(out.logits, model(**given, attention_mask=mask).logits)
    first = torch.where(mask.bool()[..., None], native.embed(raw), 0)
    torch.testing.assert_close(out.hidden_states[0], first)
    assert all(h.shape == first.shape for h in out.hidden_states)
    assert not any(h[~mask.bool()].any() for h in out.hidden_states)
    assert model(**given).hidden_states is None


def test_a_classifier_is_converted_with_its_classes(tmp_path, run, refused):
    native = small("tokens")
    native.save(tmp_path / "native")
    save_form(Form("text", ("bad", "fair", "good")), tmp_path / "native")
    convert = ("convert",)
    out = "--to", "transformers", "--out"
    code, said, _ = run(*convert, tmp_path / "native", *out, tmp_path / "theirs")
    assert (code, "bad, fair, good" in said) == (0, True)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "theirs")
    assert theirs.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert theirs.native.fingerprint() == native.fingerprint()
    code, *_ = run(*convert, tmp_path / "theirs", "--to", "native", "--out", tmp_path / "again")
    assert code == 0
    assert Encoder.load(tmp_path / "again").fingerprint() == native.fingerprint()
    assert load_form(tmp_path / "again") == load_form(tmp_path / "native")
    (tmp_path / "theirs" / FORM_FILE).unlink()
    code, said, _ = run(*convert, tmp_path / "theirs", "--to", "native", "--out", tmp_path / "nameless")
    assert (code, "classes: 3" in said) == (0, True)
    assert "another kind, encoder" in refused(
        *convert, tmp_path / "native", "--to", "official", "--out", tmp_path / "x"
    )


def test_classes_by_the_names_of_transformers():
    config = MegalodonEncoderConfig(num_labels=4, hidden_size=16, z_dim=8, value_dim=32)
    assert (config.num_classes, config.num_labels, config.model_dim) == (4, 4, 16)
    named = MegalodonEncoderConfig.of(EncoderConfig(num_classes=2), id2label={0: "bad", 1: "good"})
    assert named.label2id == {"bad": 0, "good": 1}
    again = MegalodonEncoderConfig(**named.to_dict())
    assert (again.id2label, again.choices) == (named.id2label, named.choices)
    assert MegalodonEncoderConfig.of(EncoderConfig(num_classes=7)).num_labels == 7
    with pytest.raises(InputError, match=r"z_dim = 7"):
        MegalodonEncoderConfig(z_dim=7)


def test_a_seed_means_the_same_model_and_copies_are_independent():
    native = small("tokens")
    torch.manual_seed(0)
    model = MegalodonForSequenceClassification(MegalodonEncoderConfig.of(native.config))
    assert model.native.fingerprint() == native.fingerprint()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.native._modules is twin._modules
        with torch.no_grad():
            twin.embed.weight.zero_()
        assert model.embed.weight.any()


def test_a_trainer_learns_and_its_gradients_are_the_native_ones(tmp_path):
    model = MegalodonForSequenceClassification.of(small("tokens", num_layers=1)).train()
    native = copy.deepcopy(model.native)
    given, mask = inputs("tokens")
    targets = torch.tensor([0, 2, 1])
    model(**given, attention_mask=mask, labels=targets).loss.backward()
    native(given["input_ids"], mask=mask.bool(), targets=targets)[0].backward()
    for (name, p), q in zip(native.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    draw = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(80 * (i % 3), 80 + 80 * (i % 3), (12,), generator=draw), "label": i % 3}
        for i in range(48)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=60, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:12])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2
    trainer.save_model(tmp_path / "saved")
    assert Encoder.load(tmp_path / "saved").fingerprint() == model.native.fingerprint()


def test_recomputed_blocks_types_and_resizing(tmp_path):
    model = MegalodonForSequenceClassification.of(small("tokens")).train()
    given, mask = inputs("tokens")
    model.activation_checkpointing_enable()
    assert model.native.activation_checkpointing
    model(**given, attention_mask=mask, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval().resize_token_embeddings(300)
    assert model.native.config.vocab_size == model.config.vocab_size == 300
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(Encoder.load(tmp_path).eval()(given["input_ids"])[0], model(**given).logits)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(**given).logits.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ("tokens", {}, "give them as input_ids"),
        ("tokens", {"input_values": torch.zeros(1, 3)}, "give them as input_ids"),
        ("numbers", {"input_ids": IDS}, "give them as input_values"),
        ("tokens", {"input_ids": IDS, "output_attentions": True}, "output_attentions"),
        ("tokens", {"input_ids": torch.full((1, 3), 256)}, "token 256 is outside the vocabulary"),
        (
            "tokens",
            {"input_ids": IDS, "attention_mask": torch.zeros(1, 2)},
            "mask must",
        ),
        ("pairs", {"input_ids": IDS}, r"shape \(B, 2, L\)"),
    ],
)
def test_what_cannot_be_done_is_refused(shape, given, message):
    with pytest.raises(ValueError, match=message):
        MegalodonForSequenceClassification.of(small(shape))(**given)


ELSEWHERE = """
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
given = torch.load(folder + "/given.pt")
found = model(**given, labels=torch.tensor([0, 1, 2]))
found.loss.backward()
torch.save(found.logits.detach(), folder + "/found.pt")
model.save_pretrained(out)
"""


def test_without_the_package(elsewhere, tmp_path):
    native = small("numbers")
    given, mask = inputs("numbers")
    given["attention_mask"] = mask
    folder, out = tmp_path / "pushed", tmp_path / "elsewhere"
    MegalodonForSequenceClassification.of(native).save_pretrained(folder, remote_code=True)
    assert {"modeling_megalodon_encoder.py", "configuration_megalodon_encoder.py"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "modeling_megalodon.py").exists()
    torch.save(given, folder / "given.pt")
    elsewhere(ELSEWHERE, folder, out)
    with torch.no_grad():
        expected = native(given["input_values"], mask=mask.bool())[0]
    torch.testing.assert_close(torch.load(folder / "found.pt"), expected, rtol=1e-4, atol=1e-5)
    assert Encoder.load(out).fingerprint() == native.fingerprint()
