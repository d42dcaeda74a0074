"""Training by the trainer beside training in a plain loop: same initial weights, same batches, a model not of ours.

Mamba-2 and Gated DeltaNet are those of transformers (Mamba2ForCausalLM; Qwen3-Next of linear attention alone). No
library trains RWKV-7 or MEGA on a CPU: they are written out here from their formulas, in plain PyTorch, the recurrences
as loops over tokens.
"""

import json
import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm.data.batches import prefetched
from megalodon_lm.data.books import bundled
from megalodon_lm.training.recipe import Recipe
from megalodon_lm.training.trainer import Trainer

STEPS, WARMUP, RATE, LENGTH = 60, 5, 2e-3, 64


def mamba2(w, c):
    """Of transformers."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    model = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=c.vocab_size, hidden_size=c.model_dim, num_hidden_layers=c.num_layers, num_heads=c.num_heads,
            head_dim=c.head_dim, state_size=c.state_dim, n_groups=c.num_groups, expand=c.expansion,
            conv_kernel=c.num_taps, layer_norm_epsilon=c.norm_eps, chunk_size=32, tie_word_embeddings=False,
            residual_in_fp32=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    names = {
        "embed.weight": "backbone.embeddings.weight",
        "output.final_norm.weight": "backbone.norm_f.weight",
        "output.output.weight": "lm_head.weight",
    }
    given = {names.get(n, f"backbone.{n}"): t + 1 if "norm" in n else t for n, t in w.items()}
    given = {n: t.unsqueeze(1) if n.endswith("conv1d.weight") else t for n, t in given.items()}
    model.load_state_dict(given, strict=True)
    return list(model.parameters()), lambda tokens: model(tokens, use_cache=False).logits


def gated_deltanet(w, c):
    """Of transformers: Qwen3-Next, every layer with linear attention and a plain feed-forward network."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    model = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=c.vocab_size, hidden_size=c.model_dim, num_hidden_layers=c.num_layers,
            intermediate_size=c.ffn_hidden_dim, layer_types=["linear_attention"] * c.num_layers,
            mlp_only_layers=list(range(c.num_layers)), num_experts=0, linear_num_value_heads=c.num_heads,
            linear_num_key_heads=c.num_heads, linear_key_head_dim=c.head_dim, linear_value_head_dim=c.value_head_dim,
            linear_conv_kernel_dim=c.num_taps, rms_norm_eps=c.norm_eps, tie_word_embeddings=False, pad_token_id=None,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip

    def by_heads(*matrices):
        rows = zip(*(m.chunk(c.num_heads) for m in matrices), strict=True)
        return torch.cat([part for head in rows for part in head])

    given = {"model.embed_tokens.weight": w["embed.weight"], "lm_head.weight": w["output.output.weight"]}
    given["model.norm.weight"] = w["output.final_norm.weight"]  # offsets from 1, as ours
    for i in range(c.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        m = {n.removeprefix(f"{ours}mixer."): t for n, t in w.items() if n.startswith(f"{ours}mixer.")}
        given[f"{theirs}input_layernorm.weight"] = w[f"{ours}norm.weight"]
        given[f"{theirs}post_attention_layernorm.weight"] = w[f"{ours}feed_forward.norm.weight"]
        for part, name in (("gate_proj", "fc1"), ("up_proj", "fc3"), ("down_proj", "fc2")):
            given[f"{theirs}mlp.{part}.weight"] = w[f"{ours}feed_forward.{name}.weight"]
        given |= {
            f"{theirs}linear_attn.{name}": tensor
            for name, tensor in {
                "in_proj_qkvz.weight": by_heads(*(m[f"{x}_proj.weight"] for x in "qkvg")),
                "in_proj_ba.weight": by_heads(m["b_proj.weight"], m["a_proj.weight"]),
                "conv1d.weight": torch.cat([m[f"{x}_conv.weight"] for x in "qkv"]).unsqueeze(1),
                "A_log": m["A_log"],
                "dt_bias": m["dt_bias"],
                "norm.weight": m["o_norm.weight"] + 1,
                "out_proj.weight": m["o_proj.weight"],
            }.items()
        }
    model.load_state_dict(given, strict=True)
    return list(model.parameters()), lambda tokens: model(tokens, use_cache=False).logits


def normed(w, name, x, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + w[f"{name}.weight"]) + w[f"{name}.bias"]


def rwkv7(w, c):
    """By the formulas of the paper."""
    w = {n: t.clone().requires_grad_() for n, t in w.items()}

    def before(x):
        return F.pad(x, (0, 0, 1, -1))

    def logits(tokens):
        x, first = normed(w, "layers.0.ln0", w["embed.weight"][tokens]), None
        for i in range(c.num_layers):
            a = {n.removeprefix(f"layers.{i}.att."): t for n, t in w.items() if n.startswith(f"layers.{i}.att.")}
            n = normed(w, f"layers.{i}.ln1", x)
            xr, xw, xk, xv, xa, xg = (n + (before(n) - n) * mix for mix in a["mix"])
            r, k, v = xr @ a["receptance.weight"].T, xk @ a["key.weight"].T, xv @ a["value.weight"].T
            decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(a["w0"] + torch.tanh(xw @ a["w.down"]) @ a["w.up"]))
            rate = torch.sigmoid(a["a0"] + xa @ a["a.down"] @ a["a.up"])
            if first is None:
                first = v
            else:
                v = v + (first - v) * torch.sigmoid(a["v0"] + xv @ a["v.down"] @ a["v.up"])
            kappa = k * a["k_k"]
            k = k * (1 + (rate - 1) * a["k_a"])
            r, k, v, decay, rate, kappa = (t.unflatten(-1, (-1, c.head_dim)) for t in (r, k, v, decay, rate, kappa))
            kappa = kappa / kappa.norm(dim=-1, keepdim=True)
            matrix, rows = x.new_zeros(len(x), *k.shape[2:], c.head_dim), []
            for t in range(x.shape[1]):
                asked = torch.einsum("bhk,bhkv->bhv", kappa[:, t], matrix)
                removed = (rate * kappa)[:, t].unsqueeze(-1) * asked.unsqueeze(-2)
                matrix = decay[:, t].unsqueeze(-1) * matrix - removed + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
                rows.append(torch.einsum("bhk,bhkv->bhv", r[:, t], matrix))
            y = F.layer_norm(torch.stack(rows, 1), (c.head_dim,), eps=c.head_dim * 1e-5).flatten(-2)
            y = y * (1 + a["ln_x.weight"]) + a["ln_x.bias"]
            bonus = (r * k * a["r_k"].view(r.shape[2:])).sum(-1, keepdim=True) * v
            gate = torch.sigmoid(xg @ a["g.down"]) @ a["g.up"]
            x = x + ((y + bonus.flatten(-2)) * gate) @ a["output.weight"].T
            m = normed(w, f"layers.{i}.ln2", x)
            mixed = m + (before(m) - m) * w[f"layers.{i}.ffn.mix"][0]
            inside = torch.relu(mixed @ w[f"layers.{i}.ffn.key.weight"].T) ** 2
            x = x + inside @ w[f"layers.{i}.ffn.value.weight"].T
        return normed(w, "output.final_norm", x) @ w["output.output.weight"].T

    return list(w.values()), logits


def mega(w, c):
    """By the formulas of the paper, with positions that turn queries and keys in each chunk anew."""
    w = {n: t.clone().requires_grad_() for n, t in w.items()}
    pairs = c.rope_base ** (-torch.arange(0, c.z_dim, 2) / c.z_dim)
    turn = torch.polar(torch.ones(1), torch.arange(LENGTH)[:, None] % c.chunk_size * pairs)
    chunk = torch.arange(LENGTH) // c.chunk_size
    hidden = (chunk[:, None] != chunk) | torch.ones(LENGTH, LENGTH).triu(1).bool()

    def turned(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    def logits(tokens):
        x = w["embed.weight"][tokens] * math.sqrt(c.model_dim)
        for i in range(c.num_layers):
            m = {n.removeprefix(f"layers.{i}.mega."): t for n, t in w.items() if n.startswith(f"layers.{i}.mega.")}

            def linear(name, x, m=m):
                return x @ m[f"{name}.weight"].T + m[f"{name}.bias"]

            n = normed(w, f"layers.{i}.mega.norm", x)
            p, d = (torch.sigmoid(m[f"ema.{name}"][..., 0]) for name in ("alpha", "delta"))
            state, rows = x.new_zeros(len(x), *p.shape), []
            for t in range(x.shape[1]):
                state = (1 - p * d) * state + p * m["ema.beta"][..., 0] * n[:, t, :, None]
                rows.append((m["ema.gamma"][..., 0] * state).sum(-1) / math.sqrt(c.ema_ndim))
            average = F.silu(torch.stack(rows, 1) + m["ema.omega"][..., 0] * n)
            z = F.silu(linear("wz", average))
            q, k = (turned(z * m["gamma"][j] + m["beta"][j]) for j in range(2))
            scores = (q @ k.mT / math.sqrt(c.z_dim)).masked_fill(hidden, -torch.inf)
            attention = scores.softmax(-1) @ F.silu(linear("wv", n))
            inner = attention * F.silu(linear("wr", average))
            candidate = F.silu(linear("wc", average) + inner @ m["wh.weight"].T)
            update = torch.sigmoid(linear("wu", average))
            x = update * candidate + (1 - update) * x
            f = f"layers.{i}.nffn"
            inside = F.silu(normed(w, f"{f}.norm", x) @ w[f"{f}.fc1.weight"].T + w[f"{f}.fc1.bias"])
            x = x + inside @ w[f"{f}.fc2.weight"].T + w[f"{f}.fc2.bias"]
        return normed(w, "output.final_norm", x) @ w["output.output.weight"].T

    return list(w.values()), logits


def plain_loop(parameters, logits, batches):
    """The losses in nats of AdamW with a warm-up and clipped gradients."""
    optimizer = torch.optim.AdamW(parameters, RATE, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches):
        loss = F.cross_entropy(logits(batch.inputs).flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("other", [mamba2, gated_deltanet, rwkv7, mega], ids=lambda made: made.__name__)
def test_the_trainer_reaches_the_loss_of_a_plain_loop(other, tmp_path):
    (novel,) = bundled("validation").values()
    (tmp_path / "text.txt").write_bytes(novel[20_000:60_000])
    sizes = {"parameters": 200_000, "vocab_size": 259, "num_layers": 2} | ({"chunk_size": 16} if other is mega else {})
    recipe = Recipe.from_dict(
        {
            "model": {"architecture": other.__name__, **sizes},
            "data": {"train": [str(tmp_path / "text.txt")], "order": "shuffled"},
            "training": {"length": LENGTH, "batch_size": 8, "steps": STEPS, "warmup_steps": WARMUP,
                         "learning_rate": RATE, "schedule": "constant", "weight_decay": 0.0, "carry_state": False,
                         "precision": "float32", "checkpoint_minutes": math.inf},
        }
    )  # fmt: skip
    trainer = Trainer(recipe, tmp_path / "run")
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    batches = list(islice(prefetched(trainer.batches, trainer.batches.begin()), STEPS))
    assert all(batch.starts is None or not batch.starts[:, 1:].any() for batch in batches)
    ours = []
    trainer.train(lambda metrics: ours.append(metrics.bits_per_token * math.log(2)))
    theirs = plain_loop(*other(weights, recipe.model), batches)
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    a, b = (sum(losses[-10:]) / 10 for losses in (ours, theirs))
    print(json.dumps({"model": other.__name__, "first": theirs[0], "ours": a, "theirs": b, "worst_step": worst}))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)  # the same model
    assert a == pytest.approx(b, rel=0.01)
    assert a < 0.6 * ours[0]  # both have learnt
