"""nanolm bench …: one module a command."""
