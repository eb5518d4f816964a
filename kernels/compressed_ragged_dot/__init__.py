"""Tokens sorted by expert, times compressed experts.

`api.py` is the public function and chooses an implementation, `base.py` says what arguments have to be, and
every other file is one implementation.
"""
