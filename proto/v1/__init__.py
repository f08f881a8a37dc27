"""Version 1 of the wire contract: the .proto and the stubs that `make proto` generates from it."""
