#!/bin/sh
# Print a Python of 3.11 or newer that runs (3.11 first: the pins were seen working there), or say what is missing.
for p in "$PYTHON" python3.11 python3.12 python3.13 python3 python; do
  [ -n "$p" ] && "$p" -c 'import sys; sys.exit(not sys.version_info >= (3, 11))' >/dev/null 2>&1 && { echo "$p"; exit 0; }
done
echo "no Python 3.11 or newer found; install it (Debian, Ubuntu: apt install python3.11 python3.11-venv) or run: make PYTHON=/path/to/python3.11 ..." >&2
exit 1
