"""The groups of public names in a module's docstring."""

import re


def groups_of(module) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns (heading, [(name, its summary), …]) of each group in a module's docstring."""
    found = []
    for line in (module.__doc__ or "").splitlines():
        if entry := re.match(r"^  (\w+): (.*)", line):
            found[-1][1].append(entry.groups())
        elif line.endswith(".") and not line.startswith(" "):
            found.append((line.rstrip("."), []))
    return [(heading, names) for heading, names in found if names]
