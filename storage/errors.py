"""Expected failures. Each message names what was wanted, what was found and what to do."""


class DistillError(Exception):
    """Base class of every failure that a user can fix; the command line exits with code 2."""


class ConfigError(DistillError):
    """A setting is unknown, of the wrong type, out of range or impossible with another one."""


class InputError(DistillError):
    """A prompt file holds a row that cannot be used."""


class LabelStoreError(DistillError):
    """Base class of everything the label cache refuses."""


class StoreAccessError(LabelStoreError):
    """The medium failed (permission, full disk, lost connection); the data may be in order."""


class UnstableValueError(LabelStoreError):
    """A value without one stable serialisation was about to enter a key."""


class BadKeyError(LabelStoreError, ValueError):
    """Text that should be a key is none."""


class FormatError(LabelStoreError):
    """A file of the store is not what ``docs/format.md`` says."""


class UnsafePathError(FormatError):
    """A record or an archive names a path outside its own folder."""


class EditedSpecError(FormatError):
    """The content of a spec does not have the key under which it is stored."""


class WrongLabelSetError(FormatError):
    """A file belongs to another label set than the one that names it."""


class ShardCorruptError(LabelStoreError):
    """A file's bytes do not match the record that committed it."""


class WrongMagicError(ShardCorruptError):
    """A file is not of the kind that its name says: its first bytes are wrong."""


class OversizedError(ShardCorruptError):
    """A file would decompress to more than its format allows; nothing was allocated."""


class NotLabelledError(LabelStoreError):
    """A sample was asked for that no committed shard holds."""


class BadLabelError(LabelStoreError):
    """A label violates an invariant of the format (shapes, keys, hard label, ...)."""


class NotFiniteError(BadLabelError):
    """A number of a label is NaN or infinite."""


class VocabularyError(BadLabelError):
    """A token id is negative or beyond the vocabulary."""


class MassError(BadLabelError):
    """The probabilities of a position do not sum to one."""


class UnsortedError(BadLabelError):
    """The top-k of a position is not sorted, likeliest first."""
