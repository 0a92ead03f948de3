"""Tokens per second of OPT in a hand-written loop over LibTorch, and of transformers, as `opt bench` measures.

usage: libtorch_loop.py MODEL_DIR loop|transformers float32|bfloat16 [THREADS]

The loop does what the LibTorch backend does, call for call and in the same formats, with nothing between the calls
but Python: weights kept in the order that streams fastest, queries, keys and values as one product, a cache written
in place, fused attention. A batch is equally long here, so that its attention is one call a layer.
"""
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

PROMPT, STEPS, RUNS = 32, 64, 3


class Loop:
    def __init__(self, folder, dtype):
        config = json.load(open(f"{folder}/config.json"))
        self.heads, self.layers = config["num_attention_heads"], config["num_hidden_layers"]
        weights = {name.split("decoder.")[-1]: w for name, w in load_file(f"{folder}/model.safetensors").items()}
        # [in, out] in memory for f32, [out, in] otherwise; either way the second operand of a product.
        lay = (lambda w: w.t().contiguous()) if dtype == torch.float32 else (lambda w: w.t())
        get = lambda name: weights[name].to(dtype)
        linear = lambda *names: (lay(torch.cat([get(f"{n}.weight") for n in names])), torch.cat([get(f"{n}.bias") for n in names]))
        norm = lambda name: (weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float())
        self.tokens, self.positions = get("embed_tokens.weight"), get("embed_positions.weight")
        self.head, self.norm, self.dtype = lay(self.tokens), norm("final_layer_norm"), dtype
        if dtype == torch.float32:
            self.tokens = None
        self.blocks = []
        for i in range(self.layers):
            block, attention = f"layers.{i}", f"layers.{i}.self_attn"
            self.blocks.append((
                norm(f"{block}.self_attn_layer_norm"),
                linear(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
                linear(f"{attention}.out_proj"),
                norm(f"{block}.final_layer_norm"),
                linear(f"{block}.fc1"),
                linear(f"{block}.fc2"),
            ))

    def new_cache(self, batch, capacity):
        width = self.head.shape[0] // self.heads
        return [torch.empty(2, batch, self.heads, capacity, width) for _ in range(self.layers)]

    def forward(self, ids, past, cache, all_logits=False):
        """Logits of the last row of each sequence of ids [batch, rows], or of every row."""
        batch, rows = ids.shape
        flat = ids.flatten()
        h = (self.head.index_select(1, flat).t().contiguous() if self.tokens is None else self.tokens.index_select(0, flat)).float()
        h += self.positions.index_select(0, torch.arange(past + 2, past + 2 + rows).repeat(batch)).float()
        width = h.shape[1]
        for layer, (norm1, qkv, out, norm2, fc1, fc2) in enumerate(self.blocks):
            x = F.layer_norm(h, (width,), *norm1).to(self.dtype)
            y = torch.addmm(qkv[1], x, qkv[0]).view(batch, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            cache[layer][:, :, :, past:past + rows].copy_(y[1:])
            keys, values = cache[layer][:, :, :, :past + rows]
            mixed = F.scaled_dot_product_attention(y[0].float(), keys, values, is_causal=rows > 1)
            mixed = mixed.transpose(1, 2).reshape(batch * rows, width)
            if layer + 1 == self.layers and not all_logits:
                last = slice(rows - 1, None, rows)
                mixed, h = mixed[last], h[last]
            h += torch.addmm(out[1], mixed.to(self.dtype), out[0])
            x = F.layer_norm(h, (width,), *norm2).to(self.dtype)
            h += torch.addmm(fc2[1], torch.addmm(fc1[1], x, fc1[0]).relu_(), fc2[0])
        return F.layer_norm(h, (width,), *self.norm).to(self.dtype) @ self.head

    def prefill(self, tokens):
        ids = prompt(1, tokens)
        self.forward(ids, 0, self.new_cache(1, tokens))

    def decode(self, batch):
        cache = self.new_cache(batch, PROMPT + STEPS)
        ids = self.forward(prompt(batch, PROMPT), 0, cache).argmax(1, keepdim=True)
        started = time.perf_counter()
        for step in range(STEPS):
            logits = self.forward(ids, PROMPT + step, cache).float()
            # What `opt bench` asks for: the best id and the sum of all exponentials.
            logits.logsumexp(1)
            ids = logits.max(1, keepdim=True)[1]
            ids.tolist()
        return time.perf_counter() - started


class Transformers:
    def __init__(self, folder, dtype):
        from transformers import OPTForCausalLM

        self.model = OPTForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def prefill(self, tokens):
        self.model(prompt(1, tokens), logits_to_keep=1)

    def decode(self, batch):
        ids = prompt(batch, PROMPT)

        def generate(new):
            started = time.perf_counter()
            self.model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False)
            return time.perf_counter() - started

        return generate(STEPS + 1) - generate(1)


def prompt(batch, tokens):
    return torch.randint(4, 50000, (batch, tokens))


def median(run):
    times = []
    for index in range(1 + RUNS):
        started = time.perf_counter()
        taken = run() or time.perf_counter() - started
        if index:
            times.append(taken)
    return statistics.median(times)


def main():
    folder, which, dtype = sys.argv[1:4]
    torch.set_num_threads(int(sys.argv[4]) if len(sys.argv) > 4 else 2)
    with torch.inference_mode():
        model = {"loop": Loop, "transformers": Transformers}[which](folder, getattr(torch, dtype))
        row = {f"prefill {tokens}": round(tokens / median(lambda: model.prefill(tokens)), 1) for tokens in (128, 512)}
        row |= {f"decode {batch}": round(batch * STEPS / median(lambda: model.decode(batch)), 1) for batch in (1, 8)}
    print(json.dumps({"which": which, "dtype": dtype} | row))


main()
