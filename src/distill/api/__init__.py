"""What Python programs and notebooks use, under the names of `import distill`.

The settings are those of the command line, and so are their defaults: nothing here has any of its
own. Every mistake is a ValueError or an OSError of one sentence, as the commands say it.
"""
