"""The one error of this project's own."""


class UserError(ValueError):
    """What a user can cause and mend: the message is one clear line that says the fix."""
