"""Tokens sorted by expert, times compressed experts.

`api.py` is the public function and chooses an implementation, `base.py` says what arguments have to be. `xla.py` is the
implementation for every platform and codec. Any other backend is a folder, with a file for each codec that it decodes:

    cpu/             C++
    cuda/, pallas/   for GPUs; gpu/ is what they share

In a folder `shared` is what serves all codecs.
"""
