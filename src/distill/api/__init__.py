"""The functions that `import distill` offers to Python programs and notebooks.

They read the same settings as the command line, with the same defaults. A mistake of the user
raises ValueError or OSError, with the one sentence that the command would print.
"""
