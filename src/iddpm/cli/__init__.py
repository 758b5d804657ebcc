"""The command line: a file for each verb, and the table of them."""
