"""One rank of a tensor-parallel model on gloo, with the stand-in; started by test_tensor_parallel.

Rank 0 loads a checkpoint through the gate, serves two prompts through the engine and a static
batch, and prints what it got as JSON; the other ranks follow until it closes the model.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

from gptjet.service.backends.deepspeed import loader
from gptjet.service.backends.deepspeed.backend import DeepSpeedBackend
from gptjet.service.backends.deepspeed.guards import Platform
from gptjet.service.backends.deepspeed.runtime import import_deepspeed
from gptjet.service.backends.deepspeed.tensor_parallel import ranks_from_environment
from gptjet.service.backends.factory import LoadOptions
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.request import SamplingParams, new_request


def install_stand_in() -> None:
    path = Path(__file__).with_name("stand_in.py")
    spec = importlib.util.spec_from_file_location("stand_in", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["stand_in"] = module
    spec.loader.exec_module(module)
    import_deepspeed(torch.device("cpu"))
    import deepspeed.ops
    from deepspeed.ops.transformer.inference.op_binding.base import BaseOp

    # on a CPU DeepSpeed would compile a shared-memory transport of its own first
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    BaseOp.inference_module = module.StandInOp()


def main(folder: str) -> None:
    torch.set_num_threads(1)
    install_stand_in()
    platform = Platform(
        device=torch.device("cpu"),
        dtype=torch.float32,
        name="stand-in",
        capability=None,
        free_bytes=lambda: 10**12,
        is_stand_in=True,
    )
    options = LoadOptions(model=folder, progress=False)
    if not ranks_from_environment().is_leader:
        loader.follow_leader(options, platform=platform)
        print("followed to the end")
        return
    loaded = loader.load(options, platform=platform)
    assert isinstance(loaded.backend, DeepSpeedBackend)
    engine = Engine(loaded.backend, loaded.tokenizer)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    prompts = [(1, 2, 3, 4, 5), (200, 7)]
    keys = [engine.add(new_request(prompt, params)) for prompt in prompts]
    tokens: dict[int, list[int]] = {key: [] for key in keys}
    while engine.has_work:
        for key, output in engine.step():
            tokens[key] += output.token_ids
    batch = loaded.backend.model.generate_greedy([list(prompt) for prompt in prompts], 12)
    result = {
        "streams": [tokens[key] for key in keys],
        "batch": batch,
        "parity": loaded.backend.spec.parity.status,
        "device": loaded.backend.spec.device,
        "heads": loaded.backend.model._blocks[0].attention.num_attention_heads_per_partition,
    }
    loaded.backend.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
