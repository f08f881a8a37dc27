"""A sampler of a small vocabulary, its states and its logits."""

from dataclasses import replace

import pytest
import torch

from gptjet.service.engine.request import new_request
from gptjet.service.engine.sampler import Sampler

VOCAB = 257
EOS = 256
PROMPT = (5, 6, 7, 5, 6)


def state_of(sampler, params, *, seed=1, index=0, prompt=PROMPT):
    return sampler.new_state(new_request(prompt, replace(params, seed=seed)), index)


def random_logits(rows, vocab=VOCAB, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture
def sampler():
    return Sampler(VOCAB, (EOS,))
