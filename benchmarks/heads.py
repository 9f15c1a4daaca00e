"""Speed and memory of every head: starts `head_speed.py`, which says what it measures and how."""

import importlib
import sys

if __name__ == "__main__":
    folder = sys.path.pop(0)
    importlib.import_module("heads")  # the package, which this file would hide by its name
    sys.path.append(folder)
    importlib.import_module("head_speed").main()
