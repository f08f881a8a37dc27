"""`make chaos`: faults made to happen on real servers, and what became of them, in figures.

`scenario` says what a scenario gives back, `server` starts the servers, one module holds each kind
of fault, `__main__` is the command and `report` its table. Load always comes from other processes
than the server.
"""
