"""Help pages, completion and quoting of the command line, read from the configuration files."""
