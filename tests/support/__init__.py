"""What tests share."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
ENVIRONMENT = dict(os.environ)  # before anything else is imported: some modules set variables
