"""What can go wrong with an object. Every message names the object by its whole uri."""


class StorageError(Exception):
    """The store refused, failed or could not be reached, also after retries."""


class NotFoundError(StorageError):
    """There is no such object."""


class ConflictError(StorageError):
    """A conditional write found another state than the caller expected: the object exists, or its etag is another one."""


class CorruptError(StorageError):
    """The bytes are not the promised ones: another sha256, or another size."""
