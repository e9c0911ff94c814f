"""nanolm data …: one module a command."""
