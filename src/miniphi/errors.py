"""Every error that miniphi raises on purpose.

    MiniphiError
    +-- CheckpointError          a model file is missing, truncated, corrupt or inconsistent
    +-- UnsupportedModelError    a model file is fine, but asks for something miniphi does not do
    +-- StorageError             a file cannot be written: it exists, the disk is full, no permission
    +-- DownloadError            a model could not be fetched, or what came is not what was asked for
    +-- ChatTemplateError        a chat template does not compile, raises, or tries to leave its sandbox
    +-- InvalidRequestError      a request's value is out of range; the message names the field
    |   +-- ContextLengthError   the prompt and its answer do not fit the model's context
    +-- CapacityError            the request is valid and this machine cannot hold it

A message says what was found, what was expected, and what to do.
"""

__all__ = [
    "CapacityError",
    "ChatTemplateError",
    "CheckpointError",
    "ContextLengthError",
    "DownloadError",
    "InvalidRequestError",
    "MiniphiError",
    "StorageError",
    "UnsupportedModelError",
]


class MiniphiError(Exception):
    """Base of every error that miniphi raises on purpose."""


class CheckpointError(MiniphiError):
    """A model file is missing, truncated, corrupt or inconsistent. Names the file and the tensor or key."""


class UnsupportedModelError(MiniphiError):
    """A model file is fine, but asks for something miniphi does not do. Names the key."""


class StorageError(MiniphiError):
    """A file cannot be written: it exists already, the disk is full, or permission is missing. Names the file."""


class DownloadError(MiniphiError):
    """A model could not be fetched, or what came is not what was asked for."""


class ChatTemplateError(MiniphiError):
    """A chat template does not compile, raises, or tries to leave its sandbox."""


class InvalidRequestError(MiniphiError, ValueError):
    """A request's value is out of range. Names the field."""


class ContextLengthError(InvalidRequestError):
    """The prompt and its answer do not fit the model's context."""


class CapacityError(MiniphiError):
    """The request is valid and this machine cannot hold it."""
