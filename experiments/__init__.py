"""Experiments on rank collapse, each one command.

    python -m experiments <question> [--options]

A question is a module with `Config`, `QUICK` and `run`; its docstring states the claim,
the cost, the command and what came out.
"""
