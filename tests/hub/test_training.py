"""What the tools of transformers do with a model: training, adapters, resizing, tying, types, devices."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from megalodon_lm import Megalodon, ModelConfig, architectures
from megalodon_lm.hub import MegalodonConfig, MegalodonForCausalLM


def fresh(**choices):
    torch.manual_seed(0)
    return MegalodonForCausalLM(MegalodonConfig.of(ModelConfig.named("tiny", chunk_size=16, **choices)))


def losses(model, folder, steps, **given):
    """Of a Trainer's steps, on a text that repeats itself."""
    text = torch.arange(97, 123).repeat(100)
    rows = [{"input_ids": text[i : i + 40], "labels": text[i : i + 40]} for i in range(0, 400, 3)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=3e-3, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **given,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], evaluated, trainer


def test_a_hundred_steps_of_a_trainer_lower_the_loss(tmp_path):
    model = fresh()
    found, evaluated, trainer = losses(model, tmp_path, 100)
    assert len(found) == 100
    assert found[0] > 5
    assert max(found[-10:]) < found[0] / 2
    assert evaluated < found[0] / 2
    trainer.save_model(tmp_path / "saved")
    assert architectures.load(tmp_path / "saved").fingerprint() == model.native.fingerprint()


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # peft calls these
def test_an_adapter_alone_lowers_the_loss_and_is_saved_alone(tmp_path, tokens):
    model = fresh()
    before = model.native.fingerprint()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["wv", "wh1", "fc1", "fc2"], lora_alpha=16))
    adapted.enable_input_require_grads()
    found, _, _ = losses(adapted, tmp_path, 40, gradient_checkpointing=True)
    assert sum(found[-5:]) / 5 < found[0] - 0.1
    assert not any(p.grad is not None for n, p in adapted.named_parameters() if "lora" not in n)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.eval()
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        base = fresh().eval()
        assert base.native.fingerprint() == before
        torch.testing.assert_close(
            PeftModel.from_pretrained(base, tmp_path / "adapter")(input_ids=tokens).logits, expected
        )
        merged = adapted.merge_and_unload()
    assert type(merged.native) is Megalodon
    with torch.no_grad():
        torch.testing.assert_close(merged.native(tokens)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choices", [{}, {"share_emb": True}])
def test_gradients_of_the_loss_are_the_native_ones_recomputed_or_not(choices, tokens):
    native = fresh(**choices).native
    native(tokens[:, :-1], targets=tokens[:, 1:])[0].backward()
    expected = {name: p.grad for name, p in native.named_parameters()}
    for recomputed in (False, True):
        model = fresh(**choices).train()
        if recomputed:
            model.activation_checkpointing_enable()
        assert model.is_activation_checkpointing == recomputed
        labels = tokens.clone()
        out = model(tokens, labels=labels)
        assert out.cache is None
        out.loss.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    with pytest.raises(ValueError, match="every block is recomputed, or none"):
        model.activation_checkpointing_enable(every_n_layers=2)


@pytest.mark.parametrize("size", [300, 259, 200])
@pytest.mark.parametrize("choices", [{}, {"share_emb": True}])
def test_resizing(size, choices, tmp_path, tokens):
    model, tokens = fresh(**choices).eval(), tokens % 200
    with torch.no_grad():
        before = model(tokens).logits
        model.resize_token_embeddings(size, mean_resizing=size != 300)
        after = model(tokens).logits
    kept = min(size, 259)
    assert after.shape[-1] == model.config.vocab_size == model.native.config.vocab_size == size
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    assert (model.get_output_embeddings().weight is model.embed.weight) == bool(choices)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, after)
        assert torch.equal(architectures.load(tmp_path).eval()(tokens)[0], after)
        assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape == (2, 52)


def test_tied_weights_stay_tied(tmp_path, tokens):
    model = fresh(share_emb=True)
    assert model.output.output.weight is model.embed.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.output.output.weight is loaded.embed.weight
    assert copy.deepcopy(model).output.output.weight is not model.embed.weight
    new = torch.nn.Embedding(259, 64)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new is model.native.embed
    model.tie_weights()
    assert model.output.output.weight is new.weight
    with pytest.raises(ValueError, match=r"multiplies embeddings by sqrt\(D\)"):
        fresh(scale_emb=True).set_input_embeddings(new)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path, tokens):
    fresh().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    native = Megalodon.load(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, native(tokens)[0])
        assert model.generate(tokens, max_new_tokens=5, do_sample=False).shape == (2, 55)
    model.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == dtype


def test_the_meta_device_and_device_maps(tmp_path, tokens):
    with torch.device("meta"):
        empty = MegalodonForCausalLM(MegalodonConfig.of(ModelConfig.named("tiny", chunk_size=16)))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    model = fresh().eval()
    model.save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert mapped.native.fingerprint() == model.native.fingerprint()
    empty.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(empty.eval()(tokens).logits, model(tokens).logits)


def test_tuples_instead_of_outputs(tokens):
    model = fresh().eval()
    with torch.no_grad():
        logits, cache = model(tokens, return_dict=False)
        assert torch.equal(logits, model(tokens).logits)
        assert model(tokens, use_cache=False).cache is None
    assert cache.get_seq_length() == 50


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_counts_in_neither_loss_nor_logits(side, tokens):
    model = fresh().eval()
    short = tokens[:1, :30]
    pad = torch.zeros(1, 20, dtype=torch.int64)
    parts = [pad, short] if side == "left" else [short, pad]
    masks = [pad, torch.ones_like(short)] if side == "left" else [torch.ones_like(short), pad]
    padded, mask = torch.cat(parts, 1), torch.cat(masks, 1)
    with torch.no_grad():
        alone = model(short, labels=short)
        out = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    assert torch.equal(out.logits[mask.bool()], alone.logits[0])
    torch.testing.assert_close(out.loss, alone.loss)
