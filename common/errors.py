"""The one exception that is shown to the user."""


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and what to do."""
