"""What the command line says of itself: help pages, recipes and completion, all read from the
configuration's files.
"""
