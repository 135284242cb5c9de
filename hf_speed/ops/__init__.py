"""Kernels and native code: each operation's schema, its plain-torch oracle and its backends."""
