"""The one exception that a user is meant to read.

Everything that a user can get wrong (a key, a path, a damaged file) raises `UserError` with one
sentence that names the file or key and the remedy. The command line prints that sentence and exits
with status 2; anything else that escapes is a bug of ours and shows its traceback.
"""


class UserError(Exception):
    """Bad input, told in one sentence that names the file or key and the remedy."""
