"""Checkpoints and the models in them, whatever backend computes with them.

`checkpoint` finds a model's files and reads their headers without torch; `hub` downloads them where
the model is not a folder; `safetensors_header` says what a weight file holds; `architecture`
builds the configuration and compares the tensors with the model they are for; `geometry` reads
sizes out of a configuration; `memory` says what is free; `transformers_loader` loads transformers'
own model, and `quiet` keeps it from talking; `tokenizer` turns text into ids.
"""
