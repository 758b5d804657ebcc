from iddpm.cli.main import entry

entry()
