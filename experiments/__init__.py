"""Experiments on rank collapse, one command a question.

    python -m experiments <question> [--options]

A question is a module of `questions` and an entry of `registry`. Its docstring states
the claim, the cost, the command and what came out. It has

* `Config`, everything that can change the result, and `QUICK`, small numbers;
* `run(config)`, which measures, writes JSON and figure into `config.output`, prints
  the findings and returns what the JSON holds. It raises ValueError if the options do
  not fit each other or do not fit the data, BlockingIOError if another run writes to
  the same folder, FloatingPointError if a training diverges, and ModuleNotFoundError
  or FileNotFoundError if data are not installed;
* `findings(result)`, what the measurements in the JSON say of the claims.
"""
