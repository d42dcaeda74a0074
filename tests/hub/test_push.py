"""What `push_to_hub` sends is a whole model: taken down from a hub of this process, it loads."""

import base64
import copy
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import hub

from megalodon_lm import ByteTokenizer, architectures
from megalodon_lm.hub.tokenization import transformers_tokenizer


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as takes small files, each inside the commit that brings it."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in content.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.server.said.append(lines[0]["value"]["summary"])
            answer = {"commitUrl": f"{self.server.address}/me/small/commit/0", "commitOid": "0", "success": True}
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(content)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        elif self.path == "/api/repos/create":
            answer = {"url": f"{self.server.address}/me/small"}
        else:
            answer = {"errors": [], "warnings": []}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server(monkeypatch):
    made = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made.files, made.said, made.address = {}, [], f"http://127.0.0.1:{made.server_port}"
    thread = Thread(target=made.serve_forever)
    thread.start()
    monkeypatch.setattr(hub, "_hf_api", HfApi(endpoint=made.address, token="hf_x"))
    card = ModelCard("---\nlicense: mit\n---\n")  # of an earlier one, the library asks the hub itself
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.mark.parametrize("way", ["push", "save"])
def test_what_is_pushed_is_whole(way, server, model, tokens, tmp_path):
    pushed, theirs = copy.deepcopy(model), transformers_tokenizer(ByteTokenizer())
    if way == "push":
        pushed.save_pretrained(tmp_path / "saved", remote_code=True)
        pushed.push_to_hub("me/small", commit_message="mine")
        theirs.push_to_hub("me/small", commit_message="its tokens")
    else:
        pushed.save_pretrained(tmp_path / "small", push_to_hub=True, repo_id="me/small", commit_message="mine")
    assert server.said[0] == "mine"
    folder = tmp_path / "taken"
    folder.mkdir()
    for name, content in server.files.items():
        (folder / name).write_bytes(content)
    taken = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(taken(tokens).logits, model(tokens).logits)
    assert architectures.load(folder).fingerprint() == model.native.fingerprint()
    if way == "push":
        assert {p.name for p in (tmp_path / "saved").iterdir()} | {"modeling_megalodon.py"} <= server.files.keys()
        assert AutoTokenizer.from_pretrained(folder)("Who?").input_ids == theirs("Who?").input_ids
