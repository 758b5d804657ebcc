from iddpm.cli import entry

entry()
