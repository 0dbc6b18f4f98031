"""Why a model cannot be served.

ModelError             also by itself: the cache of models cannot be written
|-- ModelNotFound      no such name, folder, file or hub model; or it could not be downloaded
|-- ModelCorrupt       a file is truncated, altered or contradicts another; the message names the file
`-- UnsupportedModel   the files are sound, but this engine does not compute that model
"""

from __future__ import annotations


class ModelError(Exception):
    """A model cannot be served; the message is one sentence for the person who named it."""


class ModelNotFound(ModelError):
    """Nothing answers to the name, or its files could not be fetched."""


class ModelCorrupt(ModelError):
    """A model file is unreadable or inconsistent; the message names it."""


class UnsupportedModel(ModelError):
    """The architecture, tokenizer or quantisation is not one this engine computes."""
