"""Choosing the next token of each sequence from the model's logits. Importing the package needs no torch."""
