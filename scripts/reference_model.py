"""DeepSeek-V4 in float64 numpy, the whole sequence at once: an oracle that shares no code and no structure with src/.

Follows the architecture's formulas directly (no cache, no streaming state, no chunks). BF16 and F32 checkpoints only. Used by
scripts/make_odd_goldens.py to freeze tests/golden/model/odd_configs.safetensors; slow, meant for small models.
"""
import json
import pathlib
import struct

import numpy as np


def read_safetensors(path):
    raw = pathlib.Path(path).read_bytes()
    size = struct.unpack_from("<Q", raw)[0]
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = {}
    for name, spec in header.items():
        begin, end = spec["data_offsets"]
        data = raw[8 + size + begin : 8 + size + end]
        if spec["dtype"] == "BF16":
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        elif spec["dtype"] == "F32":
            values = np.frombuffer(data, np.float32).astype(np.float64)
        elif spec["dtype"] == "I64":
            values = np.frombuffer(data, np.int64)
        else:
            raise ValueError(f"{path}: {name}: {spec['dtype']} is not read here")
        tensors[name] = values.reshape(spec["shape"])
    return tensors


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


class ReferenceModel:
    def __init__(self, folder):
        self.config = json.loads((pathlib.Path(folder) / "config.json").read_text())
        self.weights = {}
        for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
            self.weights.update(read_safetensors(path))

    def linear(self, name, x):
        return x @ self.weights[name + ".weight"].T

    def norm(self, x, name=None):
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return y if name is None else y * self.weights[name + ".weight"]

    def rope_freqs(self, compressed):
        c = self.config
        dim, theta = c["qk_rope_head_dim"], c["compress_rope_theta" if compressed else "rope_theta"]
        freqs = theta ** -(np.arange(0, dim, 2) / dim)
        yarn = c.get("rope_scaling")
        if not (compressed and yarn):
            return freqs

        def correction(rotations):
            return dim * np.log(yarn["original_max_position_embeddings"] / (rotations * 2 * np.pi)) / (2 * np.log(theta))

        low = max(np.floor(correction(yarn["beta_fast"])), 0)
        high = min(np.ceil(correction(yarn["beta_slow"])), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
        return freqs / yarn["factor"] * ramp + freqs * (1 - ramp)

    @staticmethod
    def rotate(x, positions, freqs, inverse=False):
        """Rotates the last 2 * len(freqs) channels; the first axis of x is the position."""
        angles = (positions[:, None] * freqs).reshape((len(positions),) + (1,) * (x.ndim - 2) + (len(freqs),))
        cos, sin = np.cos(angles), np.sin(angles) * (-1 if inverse else 1)
        out, start = x.copy(), x.shape[-1] - 2 * len(freqs)
        even, odd = x[..., start::2], x[..., start + 1 :: 2]
        out[..., start::2] = even * cos - odd * sin
        out[..., start + 1 :: 2] = even * sin + odd * cos
        return out

    def hc_pre(self, prefix, streams):
        c, n = self.config, self.config["hc_mult"]
        m = self.norm(streams.reshape(len(streams), -1)) @ self.weights[prefix + "_fn"].T
        scale, base, eps = self.weights[prefix + "_scale"], self.weights[prefix + "_base"], c["hc_eps"]
        pre = sigmoid(m[:, :n] * scale[0] + base[:n]) + eps
        if prefix == "hc_head":
            return (pre[:, :, None] * streams).sum(1)
        post = 2 * sigmoid(m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = softmax((m[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(-1, n, n), 2) + eps
        comb /= comb.sum(1, keepdims=True) + eps
        for _ in range(c["hc_sinkhorn_iters"] - 1):
            comb /= comb.sum(2, keepdims=True) + eps
            comb /= comb.sum(1, keepdims=True) + eps
        return (pre[:, :, None] * streams).sum(1), post, comb

    def compress(self, prefix, x, ratio, dim, freqs):
        values = self.linear(prefix + "wkv", x)
        gates = self.linear(prefix + "wgate", x) + self.weights[prefix + "ape"][np.arange(len(x)) % ratio]
        rows = []
        for start in range(0, len(x) - ratio + 1, ratio):
            own = slice(start, start + ratio)
            if ratio == 4:
                slots = [(own, slice(dim, 2 * dim))] + ([(slice(start - 4, start), slice(0, dim))] if start else [])
                value = np.concatenate([values[s] for s in slots])
                gate = np.concatenate([gates[s] for s in slots])
            else:
                value, gate = values[own], gates[own]
            rows.append((softmax(gate, 0) * value).sum(0))
        if not rows:
            return np.zeros((0, dim))
        return self.rotate(self.norm(np.array(rows), prefix + "norm"), np.arange(len(rows)) * ratio, freqs)

    def select(self, prefix, x, q_low, freqs, visible):
        c = self.config
        heads, dim = c["index_n_heads"], c["index_head_dim"]
        q = self.rotate(self.linear(prefix + "wq_b", q_low).reshape(len(x), heads, dim), np.arange(len(x)), freqs)
        keys = self.compress(prefix + "compressor.", x, 4, dim, freqs)
        weight = self.linear(prefix + "weights_proj", x) * (dim * heads) ** -0.5
        scores = (np.maximum(np.einsum("thd,nd->thn", q, keys), 0) * weight[:, :, None]).sum(1)
        order = np.argsort(-np.where(visible, scores, -np.inf), axis=1, kind="stable")[:, : c["index_topk"]]
        chosen = np.zeros_like(visible)
        np.put_along_axis(chosen, order, True, 1)
        return chosen & visible

    def attention(self, prefix, x, ratio):
        c, count = self.config, len(x)
        heads, dim, positions, freqs = c["num_attention_heads"], c["head_dim"], np.arange(len(x)), self.rope_freqs(ratio > 0)
        q_low = self.norm(self.linear(prefix + "wq_a", x), prefix + "q_norm")
        q = self.rotate(self.norm(self.linear(prefix + "wq_b", q_low).reshape(count, heads, dim)), positions, freqs)
        rows = self.rotate(self.norm(self.linear(prefix + "wkv", x), prefix + "kv_norm"), positions, freqs)
        age = positions[:, None] - positions
        visible = (age >= 0) & (age < c["sliding_window"])
        if ratio:
            compressed = self.compress(prefix + "compressor.", x, ratio, dim, freqs)
            seen = np.arange(len(compressed)) < ((positions + 1) // ratio)[:, None]
            if ratio == 4:
                seen = self.select(prefix + "indexer.", x, q_low, freqs, seen)
            rows, visible = np.concatenate([rows, compressed]), np.concatenate([visible, seen], 1)
        scores = np.where(visible[:, None], np.einsum("thd,nd->thn", q, rows) * dim**-0.5, -np.inf)
        peak = scores.max(-1, keepdims=True)
        weights = np.exp(scores - peak)
        total = weights.sum(-1, keepdims=True) + np.exp(self.weights[prefix + "attn_sink"][None, :, None] - peak)
        out = self.rotate(np.einsum("thn,nd->thd", weights / total, rows), positions, freqs, inverse=True)
        groups = out.reshape(count, c["o_groups"], -1)
        wo_a = self.weights[prefix + "wo_a.weight"].reshape(c["o_groups"], c["o_lora_rank"], -1)
        return self.linear(prefix + "wo_b", np.einsum("tgk,grk->tgr", groups, wo_a).reshape(count, -1))

    def expert(self, prefix, x, rho):
        limit = self.config["swiglu_limit"] or np.inf
        gate = np.minimum(self.linear(prefix + "w1", x), limit)
        up = np.clip(self.linear(prefix + "w3", x), -limit, limit)
        return self.linear(prefix + "w2", gate * sigmoid(gate) * up * rho)

    def ffn(self, prefix, x, ids, hashed):
        c = self.config
        logits = self.linear(prefix + "gate", x)
        scores = np.sqrt(np.where(logits > 20, logits, np.log1p(np.exp(np.minimum(logits, 20)))))
        out = np.zeros_like(x)
        for t in range(len(x)):
            if hashed:
                chosen = self.weights[prefix + "gate.tid2eid"][ids[t]]
            else:
                chosen = np.argsort(-(scores[t] + self.weights[prefix + "gate.bias"]), kind="stable")[: c["num_experts_per_tok"]]
            rho = scores[t][chosen]
            rho = rho / rho.sum() if c["norm_topk_prob"] else rho
            for expert, weight in zip(chosen, rho * c["routed_scaling_factor"]):
                out[t] += self.expert(f"{prefix}experts.{expert}.", x[t], weight)
        return out + self.expert(prefix + "shared_experts.", x, 1.0) if c["n_shared_experts"] else out

    def forward(self, ids):
        """ids [T] -> logits [T, vocab]."""
        c = self.config
        streams = np.repeat(self.weights["embed.weight"][ids][:, None], c["hc_mult"], 1)

        def site(prefix, norm, sublayer):
            y, post, comb = self.hc_pre(prefix, streams)
            return post[:, :, None] * sublayer(self.norm(y, norm))[:, None] + np.einsum("tjk,tjd->tkd", comb, streams)

        for layer in range(c["num_hidden_layers"]):
            p = f"layers.{layer}."
            streams = site(p + "hc_attn", p + "attn_norm", lambda x: self.attention(p + "attn.", x, c["compress_ratios"][layer]))
            streams = site(p + "hc_ffn", p + "ffn_norm", lambda x: self.ffn(p + "ffn.", x, ids, layer < c["num_hash_layers"]))
        return self.linear("head", self.norm(self.hc_pre("hc_head", streams), "norm"))
