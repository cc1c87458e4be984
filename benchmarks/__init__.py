"""Speed, memory and accuracy of the attention implementations: `python -m benchmarks`.

`__main__` is the command and says how it measures; a row is defined in `_record`.
Nothing here is part of the package, and nothing in the package imports it.
"""
