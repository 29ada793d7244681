"""The errors that a user can do something about."""


class UserError(Exception):
    """Something that the user can put right: a recipe, a file, a server.

    The message names the field or file, the value found, and what would be right. Entry points
    print it without a traceback.
    """


class Interrupted(BaseException):
    """The step was asked to stop (Ctrl-C or SIGTERM) and has saved what it could resume from.

    No `Exception`, as `KeyboardInterrupt` is none: it is raised once, wherever the signal finds the
    process, and code that goes on after any failure of a library must not go on after this.
    """
