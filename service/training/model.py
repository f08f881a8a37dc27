"""The embedded model's shape, and a forward pass of GPT-J that a CPU trains quickly.

The trained object is transformers' GPTJForCausalLM. Its eager forward spends most of a CPU step on
strided rotary slices and materialised attention; `training_hidden` computes the same function from
the same parameters (a test compares them) in about a third of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPTJConfig, GPTJForCausalLM

from gptjet.service.training.tokenizer import CONTEXT_TOKENS, VOCAB_SIZE

# Heads of the last layer that are taught to look at the word to be copied.
COPY_HEADS = 2
# Initial scales that keep a token's identity readable through four layers of residual stream.
EMBEDDING_STD = 0.05
COPY_GAIN = 0.1


@dataclass(frozen=True)
class ForwardResult:
    """hidden [B, S, H]; query and key of the last layer, positions applied: [B, heads, S, D]."""

    hidden: Tensor
    query: Tensor
    key: Tensor


def embedded_config(
    *, layers: int = 4, width: int = 256, heads: int = 4, vocab_size: int = VOCAB_SIZE
) -> GPTJConfig:
    """GPT-J in small: head size 64, of which rotary positions turn the first half, as in GPT-J-6B
    (64 of 256) a part of each head stays position-free."""
    return GPTJConfig(
        vocab_size=vocab_size,
        n_positions=CONTEXT_TOKENS,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        rotary_dim=width // heads // 2,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def new_model(config: GPTJConfig, seed: int) -> GPTJForCausalLM:
    """A freshly initialised model in FP32; the same seed gives the same weights.

    Input and output embeddings are one matrix while training, which is what lets so small a model
    learn to copy words it has seen a few times; `untie` gives each its own for GPT-J's format.
    """
    torch.manual_seed(seed)
    model = GPTJForCausalLM(config)
    cast(nn.Linear, model.lm_head).weight = model.transformer.wte.weight
    # GPT-2's scaling of residual projections by 1/sqrt(2 * layers) (Radford et al. 2019).
    scale = (2 * config.n_layer) ** -0.5
    with torch.no_grad():
        model.transformer.wte.weight.mul_(EMBEDDING_STD / config.initializer_range)
        blocks: Any = model.transformer.h
        for block in blocks:
            # A head starts by passing on what it attends to: its value and output matrices are
            # transposes of one orthogonal matrix. Random ones take epochs to learn to copy.
            rotation = nn.init.orthogonal_(torch.empty(config.n_embd, config.n_embd))
            block.attn.v_proj.weight.copy_(rotation)
            block.attn.out_proj.weight.copy_(COPY_GAIN * rotation.T)
            block.mlp.fc_out.weight.mul_(scale)
    return model


def untie(model: GPTJForCausalLM) -> None:
    """Give the output layer a copy of the embeddings as its own weight, in place."""
    head = cast(nn.Linear, model.lm_head)
    head.weight = nn.Parameter(head.weight.detach().clone())


def training_hidden(model: GPTJForCausalLM, input_ids: Tensor, dropout: float = 0.0) -> Tensor:
    """Hidden states after the final LayerNorm, [B, S, H], of right-padded input_ids [B, S]."""
    return training_forward(model, input_ids, dropout).hidden


def training_forward(
    model: GPTJForCausalLM, input_ids: Tensor, dropout: float = 0.0
) -> ForwardResult:
    """Hidden states, and the last layer's queries and keys for `copy_attention_loss`.

    input_ids: int64 [B, S], right-padded (a causal model never sees its padding). Dropout of
    probability `dropout` applies to embeddings and residual branches.
    """
    config = model.config
    core: Any = model.transformer  # transformers does not annotate its blocks
    batch, length = input_ids.shape
    heads, head_dim = config.n_head, config.n_embd // config.n_head
    cos, sin = _rotary_tables(config.rotary_dim, length)
    hidden = functional.dropout(core.wte(input_ids), dropout, training=dropout > 0.0)
    for block in core.h:
        attn, mlp = block.attn, block.mlp
        normed = block.ln_1(hidden)
        weight = torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight])
        qkv = functional.linear(normed, weight).view(batch, length, 3, heads, head_dim)
        query, key, value = qkv.transpose(1, 3).unbind(2)  # each [B, heads, S, head_dim]
        query = _rotate(query, cos, sin, config.rotary_dim)
        key = _rotate(key, cos, sin, config.rotary_dim)
        context = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        context = context.transpose(1, 2).reshape(batch, length, config.n_embd)
        inner = functional.gelu(mlp.fc_in(normed), approximate="tanh")
        branch = attn.out_proj(context) + mlp.fc_out(inner)
        hidden = hidden + functional.dropout(branch, dropout, training=dropout > 0.0)
    return ForwardResult(core.ln_f(hidden), query, key)


def copy_attention_loss(
    query: Tensor, key: Tensor, input_ids: Tensor, targets: Tensor, label_at: Tensor, copies: Tensor
) -> Tensor:
    """Mean -log of the attention that COPY_HEADS of the last layer pay to what is to be copied.

    query, key [B, heads, S, D]; input_ids, targets int64 [B, S]; label_at int64 [B] (the end of the
    prompt); copies bool [B, S] marks positions whose target is copied from the prompt. 0 if none.
    """
    rows, places = copies.nonzero(as_tuple=True)
    position = torch.arange(input_ids.shape[1])
    wanted = targets[rows, places]
    source = (input_ids[rows] == wanted[:, None]) & (position <= label_at[rows, None])
    found = source.any(-1)  # input noise may have hidden the source
    if not bool(found.any()):
        return query.new_zeros(())
    rows, places, source = rows[found], places[found], source[found][:, None]
    future = (position > places[:, None])[:, None]
    asked = query[rows, :COPY_HEADS, places].float()  # [N, COPY_HEADS, D]
    offered = key[rows, :COPY_HEADS].float()  # [N, COPY_HEADS, S, D]
    scores = torch.einsum("nhd,nhsd->nhs", asked, offered) * query.shape[-1] ** -0.5
    attention = scores.masked_fill(future, -torch.inf).log_softmax(-1)
    paid: Tensor = attention.masked_fill(~source, -torch.inf).logsumexp(-1)
    return -paid.mean()


def lm_logits(model: GPTJForCausalLM, hidden: Tensor) -> Tensor:
    """Next-token logits [..., V] of hidden states [..., H]."""
    return cast(Tensor, cast(nn.Linear, model.lm_head)(hidden))


def _rotary_tables(rotary_dim: int, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each [length, rotary_dim / 2] (GPT-J: base 10000)."""
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def _rotate(states: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> Tensor:
    """Turn interleaved pairs of the first `rotary_dim` channels; states: [B, heads, S, D]."""
    turned, kept = states[..., :rotary_dim], states[..., rotary_dim:]
    even, odd = turned.reshape(*turned.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat([pairs.flatten(-2), kept], dim=-1)
