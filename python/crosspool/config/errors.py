"""The one error that is the user's to mend."""

from __future__ import annotations


class ConfigError(ValueError):
    """A user's mistake in flags, a deployment file or a checkpoint: the message names the field
    and what would be right. The command line ends with exit status 2."""
