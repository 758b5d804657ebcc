import sys

from iddpm.cli import main

sys.exit(main())
