"""Every example of docs/huggingface.md runs, one after the other, in a folder with a model."""

import re
from pathlib import Path

from megalodon_lm import ByteTokenizer
from megalodon_lm.hub import MegalodonForCausalLM
from megalodon_lm.hub.tokenization import save_tokenizer, special_tokens

DOCS = Path(__file__).parents[2] / "docs" / "huggingface.md"


def test_examples(native, tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = ByteTokenizer()
    MegalodonForCausalLM.of(native, **special_tokens(tokenizer)).save_pretrained("folder")
    save_tokenizer(tokenizer, "folder")
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        names = {"tokens": tokens, "model": native, "tokenizer": tokenizer}
        exec(block, names)
    assert names["text"] is not None
