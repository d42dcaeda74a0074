"""A model scores, writes and chats in the harness as it does through the harness's own class for transformers."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megalodon_lm import ByteTokenizer, Megalodon, ModelConfig
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation.harness import HarnessModel
from megalodon_lm.hub import MegalodonForCausalLM
from megalodon_lm.hub.tokenization import save_tokenizer, special_tokens
from megalodon_lm.hub.transformers_model import load_transformers

from ..benchmarks import benchmark

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "tests" / "files" / "tasks"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ '<|role|>' + m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|role|>assistant: ' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "Who <|role|>?"}, {"role": "assistant", "content": "I."}]
SYSTEM = [{"role": "system", "content": "Be brief."}]


PATHS = benchmark("harness_paths")
"""Which does the comparing."""


def requests(*arguments):
    return [SimpleNamespace(args=given) for given in arguments]


def llama(folder, begins, template=TEMPLATE):
    """A Llama of transformers with a tokenizer of bytes that puts the begin token before a text, or does not."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=4096, initializer_range=0.3)).save_pretrained(folder)
    vocabulary = {piece: token for token, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|from|>", "<|till|>", "<|role|>"])
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<|from|> $A", special_tokens=[("<|from|>", 256)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|from|>", eos_token="<|till|>", pad_token="<|till|>",
        chat_template=template,
    ).save_pretrained(folder)  # fmt: skip


def megalodon(folder):
    """Of random weights, larger than those training begins with: its choices are far from each other."""
    torch.manual_seed(0)
    native = Megalodon(ModelConfig.named("tiny", vocab_size=259)).eval()
    with torch.no_grad():
        native.output.output.weight.mul_(8)
    MegalodonForCausalLM.of(native, **special_tokens(ByteTokenizer())).save_pretrained(folder)
    save_tokenizer(ByteTokenizer(), folder)


MADE = {"megalodon": megalodon, "llama": lambda f: llama(f, False), "llama with begin": lambda f: llama(f, True)}


@pytest.fixture(scope="module", params=MADE)
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    MADE[request.param](folder)
    return PATHS.sides(folder, torch.float32, 3)


@pytest.mark.parametrize(("name", "number", "choices"), [("winogrande", 3, 2), ("mmlu_marketing", 1, 4)])
def test_both_choose_and_score_alike(both, name, number, choices):
    found = PATHS.compare(*PATHS.questions(name, FOLDER, number), *both)
    assert (found.questions, found.requests) == (number, number * choices)
    assert found.here == found.there
    assert not found.other_choices
    assert found.other_greedy == 0
    assert 0 < found.relative < 1e-4
    assert not PATHS.suspects(found)
    assert len({score for answers in found.log_likelihoods for score, _ in answers}) == found.requests


def test_the_comparison_finds_what_differs(both):
    here, there = both
    other = HarnessModel(here.reader.model, here.reader.tokenizer, "float32", begin=not here.reader.tokenizer.begins)
    found = PATHS.compare(*PATHS.questions("winogrande", FOLDER, 3), other, there)
    assert found.relative > 1e-4
    assert PATHS.suspects(found)


def test_both_write_and_roll_alike(both):
    here, there = both
    asked = requests(("It was a dark night", {"until": ["e"], "max_gen_toks": 8}), ("A b", {"max_gen_toks": 5}))
    there.model.generation_config.eos_token_id = [256, 257]  # here a text ends at both, and 258 is never written
    there.model.generation_config.suppress_tokens = [258]
    written = here.generate_until(asked)
    assert written == there.generate_until(asked, disable_tqdm=True)
    assert any(written)
    texts = requests(("It was a dark and stormy night",), ("A",))
    if not here.reader.tokenizer.begins:  # otherwise theirs counts the begin token too, behind another one
        rolled = there.loglikelihood_rolling(texts, disable_tqdm=True)
        assert here.loglikelihood_rolling(texts) == pytest.approx(rolled, rel=1e-4)


@pytest.mark.parametrize("answer", [True, False])
def test_chats_are_those_of_the_models_own_form(both, answer):
    here, there = both
    chat = CHAT if not answer else CHAT[:1]
    for history in (chat, SYSTEM + chat):
        one, other = (side.apply_chat_template(history, add_generation_prompt=answer) for side in both)
        assert here.tok_encode(one) == there.tok_encode(other)
        if there.model.config.model_type == "llama":
            assert one == other
            assert here.tok_encode(one, add_special_tokens=False) == here.tok_encode(one)
    assert here.chat_template(True) == there.chat_template(True)
    assert here.tok_encode(one + "x") == here.tok_encode(one) + here.tok_encode("x", add_special_tokens=False)
    scores = [side.loglikelihood(requests((text, " no")))[0] for side, text in zip(both, (one, other), strict=True)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


@pytest.mark.parametrize(
    ("template", "says"),
    [(None, "has no chat template: the model knows no chats"), ("{{ raise_exception('no') }}", "refuses a chat: no")],
)
def test_a_model_without_a_form_of_chats_is_not_asked_in_one(template, says, tmp_path):
    llama(tmp_path, False, template)
    model, tokenizer = load_transformers(tmp_path)
    with pytest.raises(InputError, match=says):
        HarnessModel(model, tokenizer).apply_chat_template(CHAT)


@pytest.mark.slow
@pytest.mark.skipif(
    not {"MEGALODON_SMOLLM2", "MEGALODON_TASKS"} <= set(os.environ),
    reason="MEGALODON_SMOLLM2 names the GGUF file of a real model, MEGALODON_TASKS a folder of local copies of tasks",
)
@pytest.mark.parametrize("name", PATHS.TASKS)
def test_a_real_model_scores_what_it_scores_in_the_harness(name):
    """In float32; in float64, where no rounding hides a difference, where that finds one."""
    file, data = Path(os.environ["MEGALODON_SMOLLM2"]), Path(os.environ["MEGALODON_TASKS"])
    found = PATHS.asked_again(*PATHS.questions(name, data, 20), file, 4)
    assert found.relative < 1e-4
    again = found.again or {"other_choices": [], "other_greedy": 0, "relative": 0}
    assert not again["other_choices"]
    assert again["relative"] < 1e-9
    assert name != "piqa" or found.here["acc"] > 0.6
