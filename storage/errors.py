"""Expected failures. Each message names what was wanted, what was found and what to do."""


class DistillError(Exception):
    """Base class of every failure that a user can fix; the command line exits with code 2."""


class ConfigError(DistillError):
    """A setting is unknown, of the wrong type, out of range or impossible with another one."""


class InputError(DistillError):
    """A prompt file holds a row that cannot be used."""


class LabelStoreError(DistillError):
    """Base class of everything the label cache refuses."""


class UnstableValueError(LabelStoreError):
    """A value without one stable serialisation was about to enter a key."""


class FormatError(LabelStoreError):
    """A file of the store is not what ``docs/format.md`` says."""


class ShardCorruptError(LabelStoreError):
    """A shard's bytes do not match the record that committed it."""


class LabelMismatchError(LabelStoreError):
    """Stored labels exist, but for another request than the caller's."""


class NotLabelledError(LabelStoreError):
    """A sample was asked for that no committed shard holds."""


class BadLabelError(LabelStoreError):
    """A label violates an invariant of the format (non-finite, unsorted, mass above 1, ...)."""
