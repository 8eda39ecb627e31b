"""Commands of the command line (`ratlip.cli`) that fill a file of their own."""
