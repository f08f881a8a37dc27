"""The fused engine's model: weights in two passes a layer, and the forward pass in plain PyTorch.

`families` knows whose checkpoints can be laid out so; `tensors` reads them one layer at a time;
`weights` lays them out and quantises on the fly; `recipe` and `quantized` read what
`gptjet quantize` wrote; `forward` computes with them where no kernel does.
"""
