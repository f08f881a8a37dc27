"""The engine: requests in, tokens out, one step at a time.

It knows no wire format and no concrete backend. `request` holds the plain data, `backend` the seam
to a model, `scheduler` and `block_manager` decide who runs, `sampler` and `detokenizer` turn logits
into ids and ids into text, `engine` runs one step, `async_engine` runs steps in its own thread.
"""
