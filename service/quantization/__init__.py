"""Writing INT8 and INT4 checkpoints, and saying what that did to the model.

`calibration` collects the text and the activations, `gptq` rounds against them, `writer` puts the
folder together, `perplexity` measures it before and after.
"""
