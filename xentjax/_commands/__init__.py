"""The commands of `python -m xentjax`; the library imports none of them."""
