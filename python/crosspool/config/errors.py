"""The errors that are the user's to mend."""

from __future__ import annotations


class ConfigError(ValueError):
    """A user's mistake in flags, a deployment file or a checkpoint: the message names the field
    and what would be right. The command line ends with exit status 2."""


class NoMemoryError(ConfigError):
    """The options ask for more memory than there is now. A device that has had it before may get it
    again, once others have given theirs back."""
