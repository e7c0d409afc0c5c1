"""How much the tests that try random things try: little by default, all of it with ``HYPOTHESIS_PROFILE=long``."""

import os

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
