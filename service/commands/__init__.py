"""The sub-commands of `gptjet`, one module each; the table in `gptjet.service.cli` lists them.

A command module may import what is cheap at its top (typer, pydantic, plain data types); torch,
transformers and grpc are imported inside the functions that need them, so that `--help` and shell
completion stay fast.

Beside the commands: `flags` makes groups of flags out of dataclasses, `connection`, `sampling` and
`server_settings` are such groups, `loading` gets from settings to a model, `local` runs one in this
process with the client's answers, `output` prints them, `terminal` holds exit codes and errors.
"""
