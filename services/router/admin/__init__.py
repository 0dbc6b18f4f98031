"""The router's back door, for operators."""
