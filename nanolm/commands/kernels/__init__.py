"""nanolm kernels …: one module a command."""
