"""What can go wrong for a user: every message names the thing, what was wrong with it, and what to do next."""


class NestedAttentionError(ValueError):
    """A request or a file that cannot be used. Its text is fit to be shown to a person."""


class Cancelled(Exception):
    """The person asked to stop; nothing was wrong."""
