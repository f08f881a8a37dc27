"""What may go in and out: a policy chain on prompts and outputs, its audit log and review queue.

It knows texts, token ids and files, and nothing of gRPC, the engine or a model: `rpc` asks it.
"""
