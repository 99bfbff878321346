"""``python -m tests.machines.enter NAMESPACE COMMAND...``: become it, in a network namespace."""

import os
import sys

from pyroute2 import netns

if __name__ == "__main__":
    netns.setns(sys.argv[1])
    os.execv(sys.argv[2], sys.argv[2:])
