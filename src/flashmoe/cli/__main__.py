"""python -m flashmoe.cli"""

import sys

from flashmoe.cli import main

sys.exit(main())
