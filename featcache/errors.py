"""The errors a user can cause.

Every message says what was found, what was expected and what to do. A command line prints it as one
line and exits with status 1; anything that is not a `UserError` is a bug and keeps its traceback.
"""


class UserError(Exception):
    """Something outside the program has to change: a path, an option, a file."""


class ConfigError(UserError, ValueError):
    """An option has no legal meaning here."""


class DatasetError(UserError, ValueError):
    """A dataset on disk does not say what its format promises."""


class BackboneError(UserError, ValueError):
    """A backbone cannot be opened, or does not offer the features asked for."""


class CacheError(UserError, RuntimeError):
    """A cache is missing, unfinished, locked, or there is no room to write it."""


class StorageError(CacheError):
    """An object store cannot be reached, or answers something that makes no sense here."""


class StorageDeniedError(StorageError):
    """An object store does not let these credentials do what is needed."""


class CacheFormatError(CacheError):
    """A feature cache that another version wrote, and this one cannot read."""


class MappingError(CacheError):
    """This process has as many mapped files as the kernel allows."""


class CacheMismatchError(UserError, ValueError):
    """A cache holds something else than what is asked for; the message names the first field."""


class CacheCorruptError(UserError, RuntimeError):
    """Bytes on disk do not match their checksum; the message names the file."""


class UnreadableImagesError(UserError, RuntimeError):
    """More images than allowed could not be decoded; the readable ones are safely in the cache."""
