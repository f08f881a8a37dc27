"""The sentiment app: a label with probabilities and an explanation, or an honest "uncertain"."""
