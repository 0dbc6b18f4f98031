"""The router: composes the verbs of engines into serving patterns by small programs."""
