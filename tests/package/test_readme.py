"""The README's code runs, top to bottom, as one script."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_code_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    # Both scripts of "One device and many" train the same model.
    one, many = namespace["one"], namespace["many"]
    assert len(one) == len(many) > 1
    assert one[-1] < one[0]
    assert max(abs(a - b) / a for a, b in zip(one, many, strict=True)) <= 1e-6
