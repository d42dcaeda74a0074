"""A folder with its own code loads where the package is not installed."""

import copy
import json

import torch

from megalodon_lm import architectures

ELSEWHERE = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = torch.load(folder + "/tokens.pt")
with torch.no_grad():
    logits = model(tokens).logits
written = model.generate(tokens, max_new_tokens=20, do_sample=False, num_beams=2)
model.train()
loss = model(tokens, labels=tokens).loss
loss.backward()
assert model.embed.weight.grad.abs().sum() > 0
torch.save((logits, written, loss.detach()), folder + "/found.pt")
model.save_pretrained(out)
"""


def test_without_the_package(model, tokens, elsewhere, tmp_path):
    folder, out = tmp_path / "pushed", tmp_path / "saved-elsewhere"
    copy.deepcopy(model).save_pretrained(folder, remote_code=True)
    assert {"modeling_megalodon.py", "configuration_megalodon.py", "ops_cema.py"} <= {p.name for p in folder.iterdir()}
    assert "import megalodon_lm" not in "".join(p.read_text() for p in folder.glob("*.py"))
    torch.save(tokens, folder / "tokens.pt")
    elsewhere(ELSEWHERE, folder, out)
    logits, written, loss = torch.load(folder / "found.pt")
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss, model(tokens, labels=tokens).loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(written, model.generate(tokens, max_new_tokens=20, do_sample=False, num_beams=2))
    for saved in (folder, out):  # also what was saved there is whole, and loads here
        assert json.loads((saved / "config.json").read_text())["auto_map"].keys() >= {"AutoModelForCausalLM"}
        assert (saved / "modeling_megalodon.py").exists()
        assert architectures.load(saved).fingerprint() == model.native.fingerprint()
