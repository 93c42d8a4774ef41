"""Processes that tests of this folder start can import its modules by their names, as rank_jobs and test_fit."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
