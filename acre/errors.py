"""Exceptions for files that cannot be used.

Both are ValueErrors: the caller's remedy is another file. The message names the file,
the key or tensor, what was found and what was expected. A file that does not exist is a
FileNotFoundError instead.
"""


class ModelFileError(ValueError):
    """A model, adapter or tokenizer file that is corrupt, incomplete or unsupported."""


class CacheFileError(ValueError):
    """A saved cache that is corrupt, incomplete or belongs to another model."""
