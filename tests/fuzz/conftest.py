import sys
from pathlib import Path

# For coordinator_help.
sys.path.insert(0, str(Path(__file__).parents[1] / "coordinator"))
