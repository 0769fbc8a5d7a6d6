"""Turn pip's installation report into a lock file on stdout: lock.py REPORT EXTRAS [EXCLUDED...]"""

import json
import re
import sys
from pathlib import Path


def main(report: str, extras: str, *excluded: str) -> None:
    """One `name==version` a line, sorted; this project and the excluded packages are left out."""
    packages = [entry["metadata"] for entry in json.loads(Path(report).read_text())["install"]]
    pins = {re.sub(r"[-_.]+", "-", p["name"]).lower(): p["version"] for p in packages}
    named = " and ".join(f"`{extra}`" for extra in extras.split(","))
    python = ".".join(map(str, sys.version_info[:2]))
    lines = [f"# Full lock of the {named} extras for Python {python}; installed with --no-deps. Made by `make lock`."]
    lines += [f"{name}=={pins[name]}" for name in sorted(pins.keys() - {"qurl", *excluded})]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
